"""``equipoise cache``: list or clear the decoded images that trainings have left."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from equipoise.cli.command import Command, open_terminal, paragraph

if TYPE_CHECKING:
    from equipoise.data.cache import CachedImages


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``cache``."""
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "clear"),
        default="list",
        help="'list' shows what is in the cache, and 'clear' removes it. The default is list.",
    )
    parser.add_argument(
        "--older-than",
        type=float,
        metavar="DAYS",
        help="Only what was last used more than so many days ago, as far as the disk notes it.",
    )
    parser.add_argument(
        "--folder",
        metavar="FOLDER",
        help="Folder of the cache. The default is $EQUIPOISE_CACHE, or ~/.cache/equipoise.",
    )
    parser.epilog = paragraph(
        "Folders of images are decoded once, at the depth of their files, into this cache. It may "
        "be cleared at any time: images that are needed again are decoded again. A training that "
        "runs keeps what it has open. Other files in the folder stay."
    )


def _run(options: Namespace) -> None:
    """List or clear the cache."""
    from equipoise.config import ConfigError
    from equipoise.data.cache import cached_images, default_cache_dir, in_bytes, remove_images
    from equipoise.files import expanded

    if options.older_than is not None and not options.older_than >= 0:
        raise ConfigError([f"--older-than must be at least 0 days, got {options.older_than:g}"])
    folder = expanded(options.folder) if options.folder else default_cache_dir()
    found = cached_images(folder, options.older_than or 0.0)

    with open_terminal() as terminal:
        if not found:
            terminal.message(f"No decoded images in {folder}.")
            return
        for images in found:
            terminal.message(_describe(images))

        total = in_bytes(sum(images.n_bytes for images in found))
        if options.action == "list":
            terminal.message(
                f"{total} in {folder}. 'equipoise cache clear' removes it; images are then decoded "
                "again where they are needed."
            )
            return
        n_removed = remove_images(folder, found)
        terminal.message(f"Removed {in_bytes(n_removed)} of {total} in {folder}.")


def _describe(images: "CachedImages") -> str:
    """Say what the images are, how large they are, and when they were used."""
    from equipoise.data.cache import in_bytes

    shape = " x ".join(map(str, images.shape)) if images.shape else "incomplete"
    source = images.source or "unknown source"
    return f"{in_bytes(images.n_bytes):>9}  {images.used:%Y-%m-%d}  {shape}  {source}"


COMMAND = Command(
    "List or clear the cache of decoded images.",
    _add_arguments,
    _run,
)
