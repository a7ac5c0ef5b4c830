"""What the commands share: their record, common arguments, help texts and the terminal."""

import os
import shutil
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from equipoise.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from equipoise.aggregate import GaussianMixture
    from equipoise.data import Data, Subset
    from equipoise.model import VAE
    from equipoise.run import Run
    from equipoise.terminal import Terminal


class Command(NamedTuple):
    """A command.

    Args:
        summary: A sentence that says what the command does, for ``--help``.
        add_arguments: Describes the command's arguments to a parser.
        run: Runs the command with the parsed arguments.
        after_interruption: What an interruption leaves behind, and how to go on. It follows a
            semicolon.
    """

    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]
    after_interruption: str = "no file was left half-written"


def add_run(parser: ArgumentParser) -> None:
    """Describe the argument that names the run."""
    parser.add_argument(
        "run",
        metavar="RUN",
        help="Run folder, or hf:owner/name of a run that was published on the Hugging Face hub.",
    )


def add_data_dir(parser: ArgumentParser) -> None:
    """Describe ``--data-dir``."""
    parser.add_argument(
        "--data-dir",
        metavar="FOLDER",
        help="Folder to search first for mnist, fashion-mnist and celeba.",
    )


def add_limits(parser: ArgumentParser) -> None:
    """Describe the limits on what a file may claim."""
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="Skip image files of more pixels than this. The default is 50 million.",
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        help="Refuse compressed files that unpack to more bytes than this, besides twice their "
        "size. The default is 1000000000.",
    )


def add_no_split(parser: ArgumentParser) -> None:
    """Describe ``--no-split`` for data to which a run is applied."""
    parser.add_argument(
        "--no-split",
        action="store_true",
        help="Take all images of a folder with the parts train, val and test.",
    )


def add_strict(parser: ArgumentParser) -> None:
    """Describe ``--strict`` for tables to which a run is applied."""
    parser.add_argument(
        "--strict",
        action="store_true",
        help="Refuse a table with a category that the model was not trained on. By default it "
        "counts as missing, and a note names the column, the value and the row.",
    )


def add_quiet(parser: ArgumentParser) -> None:
    """Describe ``--quiet``."""
    parser.add_argument(
        "--quiet", action="store_true", help="Print plain lines instead of progress bars."
    )


def add_help(parser: ArgumentParser) -> None:
    """Describe ``--help``."""
    parser.add_argument("-h", "--help", action="help", help="Show this help and exit.")


def show_default(default: object) -> str:
    """Write the default of an option as in a recipe."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return str(default)


def paragraph(text: str, indent: int = 0, further_indent: int | None = None) -> str:
    """Wrap a text to the width of the terminal, its first line and the further ones indented."""
    if further_indent is None:
        further_indent = indent

    return textwrap.fill(
        text,
        width=min(100, max(40, shutil.get_terminal_size().columns - 2)),
        initial_indent=" " * indent,
        subsequent_indent=" " * further_indent,
        break_on_hyphens=False,
    )


def list_entries(entries: Mapping[str, str]) -> str:
    """List names, each with its explanation below it."""
    lines = []
    for name, explanation in entries.items():
        lines.append(paragraph(name, indent=2, further_indent=4))
        lines.append(paragraph(explanation, indent=6))
    return "\n".join(lines)


def decoding_bar(terminal: "Terminal") -> Callable[[int, int], None]:
    """Return a function that shows how many images have been decoded."""
    return lambda done, total: terminal.progress("decoding images", done, total, "")


def data_of(run: "Run", terminal: "Terminal", data_dir: str | None) -> "Data":
    """Load the data of a run, and show how far that is."""
    return run.data(data_dir, decoding_bar(terminal), terminal.message)


def other_examples(
    source: str, run: "Run", model: "VAE", options: Namespace, terminal: "Terminal"
) -> "Subset":
    """Load examples for the model of a run, show how far that is, and what is to be known."""
    from equipoise.data import load_examples

    config = run.config()
    return load_examples(
        source,
        model.shape,
        columns=model.scaling.columns,
        label=run.settings()["data"]["load"].get("label") if model.label_names else None,
        label_names=model.label_names,
        levels=model.scaling.levels,
        strict=getattr(options, "strict", False),
        pages=config.pages,
        fit=config.fit,
        pool=getattr(options, "no_split", False),
        on_note=lambda note: terminal.message(f"Note: {note}"),
        data_dir=options.data_dir,
        max_pixels=options.max_pixels,
        max_bytes=options.max_bytes,
        progress=decoding_bar(terminal),
        is_wide=model.scaling.is_wide,
    )


def table_run(folder: str, does: str) -> tuple["Run", "VAE", "GaussianMixture"]:
    """Open a run for a command that is for tables.

    Args:
        folder: The run folder.
        does: What the command does with tables, for the message.

    Returns:
        The run, its model and its mixture.

    Raises:
        ConfigError: If it is a run of images.
    """
    from equipoise.run import Run

    run = Run(folder)
    model, mixture = run.model(), run.mixture()
    if len(model.shape) != 1:
        raise ConfigError([f"{folder} is a run of images, and this command {does} of tables"])
    return run, model, mixture


def warn_of_unit(model: "VAE", raw: "Tensor", terminal: "Terminal") -> None:
    """Say it if rows seem to be in another unit than those of the training.

    Args:
        model: The model.
        raw: The rows, (N, D), raw units.
        terminal: Where the warning goes.
    """
    text = model.scaling.range_warning(raw)
    if text is not None:
        terminal.message(f"Warning: {text}")


def table_to_write(path: str | None, model: "VAE") -> Path | None:
    """Take ``--out`` for a table if its ending is that of one, and if the model is of a table."""
    from equipoise.data.tables import OTHER_SUFFIXES, SUFFIXES, is_table

    if path is not None and not is_table(path) and path.lower().endswith(OTHER_SUFFIXES):
        endings = ", ".join(SUFFIXES)
        raise ConfigError([f"--out {path}: give a folder, or a file of a table: {endings}"])
    if path is None or not is_table(path):
        return None
    if len(model.shape) != 1:
        raise ConfigError([f"--out {path} is a table, and the run is of images; give a folder"])
    return Path(path)


def list_written(write: Callable[[], Iterable[Path]], folder: Path) -> list[str]:
    """Write files into a folder, and say of each whether it replaced an earlier one of ours."""
    before = set(folder.iterdir()) if folder.is_dir() else set()

    lines = []
    for path in write():
        replaced = "  (replaced)" if path in before else ""
        lines.append(f"{path}{replaced}")
    return lines


@contextmanager
def open_terminal(quiet: bool = False, silent: bool = False) -> Iterator["Terminal"]:
    """Show progress bars on a terminal, and plain lines elsewhere or if ``quiet``.

    A ``silent`` process shows nothing, because another process speaks for it.
    """
    from equipoise.terminal import LiveTerminal, PlainTerminal

    if silent:
        with open(os.devnull, "w") as nowhere:
            yield PlainTerminal(nowhere)
        return

    if quiet or not sys.stdout.isatty():
        yield PlainTerminal()
        return

    terminal = LiveTerminal()
    try:
        with terminal.bars:
            yield terminal
    finally:
        terminal.close()
