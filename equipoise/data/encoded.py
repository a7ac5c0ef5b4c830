"""Many encoded images, in files or in a table, decoded in threads into the cache."""

import hashlib
import os
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from PIL import UnidentifiedImageError

from equipoise.data.arrays import Part
from equipoise.data.cache import default_cache_dir, one_writer, read_part, write_part
from equipoise.data.dataset import Array, Channels
from equipoise.data.images import Header, decode, make_plan, plan_notes, read_header

EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
FORMAT = "1"
"""Part of every cache key: to be changed with anything that changes the decoded pixels."""
IN_FLIGHT = 1024

Progress: TypeAlias = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """Encoded images by index, none of them read yet.

    Args:
        count: how many.
        open: the path or the content of one.
        name: what to call one in a message.
        stamp: changes whenever the images do.
        source: what to call them all.
        notes: sentences that a user should read.
    """

    count: int
    open: Callable[[int], Path | BytesIO]
    name: Callable[[int], str]
    stamp: str
    source: str
    notes: tuple[str, ...] = ()


class Listing(NamedTuple):
    """The image files of a folder.

    Args:
        folder: the folder.
        names: paths relative to it.
        stamp: SHA-256 over paths, sizes and times of change. Not over content: to read all files would take
            nearly as long as the decoding that the cache is to save.
        notes: sentences that a user should read.
    """

    folder: Path
    names: list[str]
    stamp: str
    notes: tuple[str, ...] = ()

    def encoded(self, names: list[str] | None = None) -> Encoded:
        """Some of these files as encoded images.

        Args:
            names: a part of ``self.names``; None for all of them.

        Returns:
            The images.
        """
        chosen = self.names if names is None else names
        stamp = hashlib.sha256(self.stamp.encode())
        for name in chosen:
            stamp.update(b"\0" + os.fsencode(name))
        return Encoded(
            len(chosen),
            lambda index: self.folder / chosen[index],
            lambda index: chosen[index],
            stamp.hexdigest(),
            str(self.folder),
            self.notes,
        )


def list_images(folder: Path) -> Listing:
    """Find the image files in a folder and the folders within it, sorted; each is looked at once.

    Hidden files are left out, and links to folders are not followed, as they may form a loop.

    Args:
        folder: where to look.

    Returns:
        The files, told by their extension.

    Raises:
        ValueError: if there are none.
    """
    names: list[str] = []
    others: list[str] = []
    stamp = hashlib.sha256()

    def walk(inside: str) -> None:
        # Names alone, because a million entries of os.scandir take a gigabyte.
        for name in sorted(os.listdir(folder / inside)):
            path = inside + name
            if name.startswith("."):
                continue
            here = os.lstat(folder / path)
            if stat.S_ISDIR(here.st_mode):
                walk(path + "/")
            elif os.path.splitext(name)[1].lower() not in EXTENSIONS:
                others.append(path)
            else:
                names.append(path)
                stamp.update(os.fsencode(f"{path}\0{_change(folder / path, here)}\0"))

    walk("")
    if not names:
        held = f"; it holds {_first(others)}" if others else "; it is empty"
        raise ValueError(
            f"{folder}: no image files ({' '.join(sorted(EXTENSIONS))}) in this folder{held}"
        )
    notes = (f"other files ignored: {len(others)} ({_first(others)})",) if others else ()
    return Listing(folder, names, stamp.hexdigest(), notes)


def _change(path: Path, here: os.stat_result) -> str:
    try:
        there = path.stat() if stat.S_ISLNK(here.st_mode) else here
    except OSError:  # a broken link: named as unreadable when it is opened
        return "missing"
    return f"{there.st_size} {there.st_mtime_ns}"


@dataclass(frozen=True)
class ImageReader:
    """How encoded images become arrays.

    Args:
        image_size: side of the square that they become; None to keep the size they share.
        channels: "grey", "rgb", or None for grey if all are grey.
        crop: side of the centred square to cut out, as a share of the width; None for the largest.
        strict: whether an unreadable image is an error instead of being skipped.
        cache_dir: where decoded images are kept.
        progress: called with (done, total); each image counts twice, for its header and for its pixels.
    """

    image_size: int | None = None
    channels: Channels | None = None
    crop: float | None = None
    strict: bool = False
    cache_dir: Path = field(default_factory=default_cache_dir)
    progress: Progress | None = None

    def read(self, images: Encoded) -> Part:
        """Decode images into the cache, or find them there.

        Args:
            images: what to decode.

        Returns:
            (N, C, H, W) uint8, memory-mapped; N is smaller than ``images.count`` if some were unreadable.

        Raises:
            ValueError: if no image is readable, ``strict`` and one is not, or a size must be chosen.
        """
        options = f"{FORMAT} {self.image_size} {self.channels} {self.crop} {images.stamp}"
        key = hashlib.sha256(options.encode()).hexdigest()
        part = read_part(self.cache_dir, key)
        if part is None:
            with one_writer(self.cache_dir, key):
                part = read_part(self.cache_dir, key) or self._decode(images, key)
        elif self.strict and len(part.values) < images.count:
            raise ValueError(f"{images.source}: {part.notes[0]}")
        return part._replace(notes=(*part.notes, *images.notes))

    def _decode(self, images: Encoded, key: str) -> Part:
        skipped: list[str] = []
        with ThreadPoolExecutor() as pool:
            readable = array("q")  # a list would take four times as much
            headers: Counter[Header] = Counter()
            for index, header in self._each(
                pool, images, range(images.count), read_header, skipped, 0
            ):
                readable.append(index)
                headers[header] += 1
            if not readable:
                raise ValueError(
                    f"{images.source}: none of the images can be read: {_first(skipped)}"
                )
            plan = make_plan(headers, self.image_size, self.channels, self.crop, images.source)

            def rows() -> Iterator[Array]:
                before = 2 * images.count - len(readable)
                to_pixels = partial(decode, plan=plan)
                for _, pixels in self._each(pool, images, readable, to_pixels, skipped, before):
                    yield pixels
                if len(skipped) == images.count:
                    raise ValueError(
                        f"{images.source}: none of the images can be read: {_first(skipped)}"
                    )

            def notes() -> tuple[str, ...]:
                unread = (
                    (f"unreadable files skipped: {len(skipped)} ({_first(skipped)})",)
                    if skipped
                    else ()
                )
                return (*unread, *plan_notes(headers, plan))

            return write_part(self.cache_dir, key, rows(), plan.shape, notes)

    def _each(
        self,
        pool: ThreadPoolExecutor,
        images: Encoded,
        indices: Sequence[int],
        function: Callable[[Path | BytesIO], T],
        skipped: list[str],
        before: int,
    ) -> Iterator[tuple[int, T]]:
        """Apply a function to images in threads, in order, a bounded number at a time; skip what fails.

        Progress is reported from ``before`` on.
        """

        def attempt(index: int) -> T | Exception:
            try:
                return function(images.open(index))
            except Exception as error:  # Pillow's readers raise nearly anything on a broken file
                return error

        total = 2 * images.count
        for start in range(0, len(indices), IN_FLIGHT):
            chunk = indices[start : start + IN_FLIGHT]
            results = pool.map(attempt, chunk)
            for done, (index, result) in enumerate(
                zip(chunk, results, strict=True), before + start + 1
            ):
                if not isinstance(result, Exception):
                    yield index, result
                else:
                    skipped.append(f"{images.name(index)}: {_reason(result)}")
                    if self.strict:
                        raise ValueError(f"{images.source}: cannot read {skipped[-1]}") from result
                if self.progress is not None:
                    self.progress(done, total)


def _reason(error: Exception) -> str:
    return (
        "not an image"
        if isinstance(error, UnidentifiedImageError)
        else str(error) or type(error).__name__
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
