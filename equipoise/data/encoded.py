"""Many encoded images, in files or in a table, which threads decode into the cache."""

import errno
import hashlib
import os
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from PIL import UnidentifiedImageError

from equipoise.data.arrays import Part
from equipoise.data.cache import (
    Origin,
    bytes_of_part,
    default_cache_dir,
    forget_part,
    in_bytes,
    one_writer,
    read_part,
    write_part,
)
from equipoise.data.dataset import Array, Channels, Fit, Pages
from equipoise.data.gate import DEFAULT_LIMITS, Limits, is_special
from equipoise.data.images import Header, decode, make_plan, plan_notes, read_header
from equipoise.files import written_names

EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
FORMAT = "3"
"""Part of every cache key. It has to change whenever the decoded pixels change."""

UNREADABLE = "files and folders that cannot be read ignored"
SKIPPED = "unreadable files skipped"
"""What the notes on them begin with."""

FOLLOWED = "links to folders followed"
NOT_FOLLOWED = "links to folders that are read anyway, not followed"
"""What the notes on links say."""

LONGEST_ENTRY = 300
"""Longest entry of a note, in characters."""

IN_FLIGHT = 1024
"""Number of images that are submitted to the threads at a time."""

NO_HANDLES = (errno.EMFILE, errno.ENFILE)
"""The system's errors if a program has too many open files. They are no fault of an image."""

Progress: TypeAlias = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """Encoded images that are read by their index.

    Args:
        count: Number of images.
        open: Function that returns the path or the content of the image with an index.
        name: Function that returns the name of the image with an index, for messages.
        stamp: A string that changes whenever the images change.
        source: Name of the images as a whole in messages.
        notes: Sentences that a user should read.
        unreadable: Files and folders in which there may be more images.
    """

    count: int
    open: Callable[[int], Path | BytesIO]
    name: Callable[[int], str]
    stamp: str
    source: str
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowNames:
    """Names of the examples that were read from files.

    Args:
        name: Returns the name of the file with a number.
        rows: Number of the file and of the page of each example, and -1 in place of the only page.
            None if each file is an example.
    """

    name: Callable[[int], str]
    rows: list[tuple[int, int]] | None

    def __call__(self, index: int) -> str:
        """Name the example with an index."""
        if self.rows is None:
            return self.name(index)
        file, page = self.rows[index]
        return self.name(file) if page < 0 else f"{self.name(file)}, page {page + 1}"


class Listing(NamedTuple):
    """The image files of a folder.

    Args:
        folder: The folder.
        names: Paths of the files relative to the folder.
        stamp: SHA-256 over paths, sizes and modification times. It does not cover the content,
            because reading all files would take nearly as long as the decoding that the cache
            saves.
        notes: Sentences that a user should read.
        unreadable: Files and folders that cannot be read, with the reason.
    """

    folder: Path
    names: list[str]
    stamp: str
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    def encoded(self, names: list[str] | None = None) -> Encoded:
        """Make encoded images of some of these files.

        Args:
            names: Some of ``self.names``. None means all of them.

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
            chosen.__getitem__,
            stamp.hexdigest(),
            str(self.folder),
            self.notes,
            self.unreadable,
        )


def one_image(path: Path) -> Listing:
    """List a single image file.

    Args:
        path: Path of the file.

    Returns:
        The file, in its folder.
    """
    stamp = hashlib.sha256(os.fsencode(f"{path.absolute()}\0{_version(path, os.lstat(path))}"))
    return Listing(path.parent, [path.name], stamp.hexdigest())


def list_images(folder: Path) -> Listing:
    """List the image files in a folder and its subfolders, in sorted order.

    Files are recognised by their extension. Hidden files are left out. Links to folders elsewhere
    are followed, but no folder is read twice.

    Args:
        folder: The folder.

    Returns:
        The image files.

    Raises:
        ValueError: If there are no image files.
    """
    names: list[str] = []
    others: list[str] = []
    special: list[str] = []
    outputs: list[str] = []
    unreadable: list[str] = []
    links: dict[str, list[str]] = {FOLLOWED: [], NOT_FOLLOWED: []}
    stamp = hashlib.sha256()

    for path, status, is_output in _walk(folder, unreadable, links):
        if is_output:
            outputs.append(path)
        elif os.path.splitext(path)[1].lower() not in EXTENSIONS:
            others.append(path)
        elif is_special(folder / path):
            special.append(path)
        else:
            names.append(path)
            stamp.update(os.fsencode(f"{path}\0{_version(folder / path, status)}\0"))

    if not names:
        content = f"it holds {first_names(others)}" if others else "it is empty"
        if unreadable:
            content += f"; not readable: {first_names(unreadable)}"
        if any(name.endswith((".npy", ".parquet")) for name in others):
            content += (
                "; 'equipoise train --stream' (equipoise.load_stream) trains on a folder of .npy "
                "or .parquet files, and a trained model takes one of them at a time"
            )
        raise ValueError(
            f"{folder}: no image files ({' '.join(sorted(EXTENSIONS))}) in this folder; {content}"
        )

    ignored = {
        "other files ignored": others,
        "pipes, devices and sockets ignored": special,
        "files that equipoise has written ignored": outputs,
        **links,
        UNREADABLE: unreadable,
    }
    notes = tuple(
        f"{what}: {len(files)} ({first_names(files)})" for what, files in ignored.items() if files
    )
    return Listing(folder, names, stamp.hexdigest(), notes, tuple(unreadable))


def _walk(
    folder: Path, unreadable: list[str], links: dict[str, list[str]]
) -> Iterator[tuple[str, os.stat_result, bool]]:
    """Go through a folder and its subfolders, in sorted order, without hidden files.

    Yields the path of each file, its status, and whether equipoise has written it. What cannot be
    entered, or has gone in the meantime, is appended to ``unreadable`` with the reason. Links to
    folders are appended to ``links``.
    """
    ours: set[str] = set()
    seen: set[tuple[int, int]] = set()
    root = folder.resolve()
    waiting = [""]
    while waiting:
        path = waiting.pop()
        inside = f"{path}/" if path else ""
        try:
            status = os.lstat(folder / path) if path else os.stat(folder)
            is_link = stat.S_ISLNK(status.st_mode) and os.path.isdir(folder / path)
            if is_link:
                status = os.stat(folder / path)

            is_folder = stat.S_ISDIR(status.st_mode)
            if is_folder:
                place = (status.st_dev, status.st_ino)
                # What lies within the folder itself comes under its own name.
                is_known = place in seen
                if is_link:
                    is_known = is_known or (folder / path).resolve().is_relative_to(root)
                    links[NOT_FOLLOWED if is_known else FOLLOWED].append(path)
                if is_known:
                    continue
                seen.add(place)

                ours.update(inside + name for name in written_names(folder / path))
                # os.listdir, because a million entries of os.scandir take a gigabyte of memory.
                names = os.listdir(folder / path)
        except OSError as error:
            if not path:
                raise
            unreadable.append(f"{path}: {error.strerror or error}")
            continue

        if is_folder:
            visible_names = (name for name in names if not name.startswith("."))
            waiting.extend(inside + name for name in sorted(visible_names, reverse=True))
        else:
            yield path, status, path in ours


def _version(path: Path, status: os.stat_result) -> str:
    """Size and modification time of a file, or of the file to which a link points."""
    try:
        if stat.S_ISLNK(status.st_mode):
            status = path.stat()
    except OSError:
        # A broken link is reported as unreadable when it is opened.
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class ImageReader:
    """Decodes images to an array in the cache.

    Args:
        image_size: Size in pixels of each image, a number or "WIDTHxHEIGHT". None keeps the common
            size of the images.
        channels: "grey" or "rgb". None means grey if all images are grey, otherwise RGB.
        crop: Side of the centred square that is cut out, as a share of the width. None means the
            largest square.
        strict: Whether an unreadable image is an error. If False, it is skipped.
        cache_dir: Folder for decoded images. None means $EQUIPOISE_CACHE, or ~/.cache/equipoise.
        progress: Function that is called with (done, total). Each image counts twice: once for
            its header and once for its pixels.
        limits: The most that an image may claim.
        say: Function that is called with the size and place of a cache before it is written.
        pages: What becomes of files of several pages. None means that each page is an example.
        fit: How an image of other proportions is brought to the size.
        for_model: Whether the size is that of a model, so that a note says which images had others.
        is_wide: Whether the model is one of 16 bits, which images of 8 become.
    """

    image_size: int | str | None = None
    channels: Channels | None = None
    crop: float | None = None
    strict: bool = False
    cache_dir: Path | None = None
    progress: Progress | None = None
    limits: Limits = DEFAULT_LIMITS
    say: Callable[[str], None] | None = None
    pages: Pages | None = None
    fit: Fit = "crop"
    for_model: bool = False
    is_wide: bool = False

    @property
    def folder(self) -> Path:
        """Folder of the cache. It is looked for only where it is needed: there may be no home."""
        return self.cache_dir or default_cache_dir()

    def read(self, images: Encoded) -> Part:
        """Read images from the cache, or decode them into it.

        Args:
            images: The encoded images.

        Returns:
            The pixels, (N, C, H, W), memory-mapped. N is smaller than ``images.count`` if some
            images are unreadable, and larger if files have several pages.

        Raises:
            ValueError: If no image is readable, if an image is unreadable and ``strict`` is True,
                or if the user has to choose a size.
        """
        # The limit is part of the key, because it decides which images are skipped.
        options = (
            f"{FORMAT} {self.image_size} {self.channels} {self.crop} {self.pages} {self.fit} "
            f"{self.limits.max_pixels} {self.for_model} {self.is_wide} {images.stamp}"
        )
        key = hashlib.sha256(options.encode()).hexdigest()

        if self.strict and images.unreadable:
            raise ValueError(f"{images.source}: cannot read {first_names(images.unreadable)}")

        part = read_part(self.folder, key)
        damaged: tuple[str, ...] = ()
        if part is None:
            if (self.folder / f"{key}.json").exists():
                damaged = ("the decoded images in the cache were damaged, and are decoded anew",)
            with one_writer(self.folder, key):
                # Another process may have written the part while this one waited.
                part = read_part(self.folder, key) or self._decode(images, key)

        if self.strict and part.unreadable:
            raise ValueError(f"{images.source}: {part.notes[0]}")

        return part._replace(
            notes=(*damaged, *part.notes, *images.notes),
            unreadable=(*part.unreadable, *images.unreadable),
            names=RowNames(images.name, part.rows),
        )

    def _decode(self, images: Encoded, key: str) -> Part:
        skipped: list[str] = []
        passing: list[str] = []

        with ThreadPoolExecutor() as pool:
            readable = array("q")  # a list would take four times as much memory
            headers: Counter[Header] = Counter()
            all_indices = range(images.count)
            header_of = partial(read_header, limits=self.limits)
            for index, header in self._each(
                pool, images, all_indices, header_of, skipped, passing, 0
            ):
                readable.append(index)
                headers[header] += 1

            if not readable:
                raise _no_readable_image(images, skipped)
            plan = make_plan(
                headers,
                self.image_size,
                self.channels,
                self.crop,
                images.source,
                self.pages,
                self.fit,
                is_wide=self.is_wide,
            )
            files, pages = array("q"), array("q")

            def rows() -> Iterator[Array]:
                n_done = 2 * images.count - len(readable)
                to_pixels = partial(decode, plan=plan, limits=self.limits)
                most_pages = max(header.pages for header in headers)
                for index, examples in self._each(
                    pool, images, readable, to_pixels, skipped, passing, n_done, most_pages
                ):
                    for page, pixels in enumerate(examples):
                        files.append(index)
                        pages.append(page if len(examples) > 1 else -1)
                        yield pixels

                if len(skipped) == images.count:
                    raise _no_readable_image(images, skipped)

            def about() -> Origin:
                notes = plan_notes(headers, plan, for_model=self.for_model)
                if skipped:
                    notes = (
                        f"{SKIPPED}: {len(skipped)} ({first_names(skipped)})",
                        *notes,
                    )
                is_each_file = len(files) == images.count and set(pages) == {-1}
                return Origin(
                    notes=list(notes),
                    unreadable=skipped,
                    source=images.source,
                    rows=None if is_each_file else list(zip(files, pages, strict=True)),
                )

            n_images = len(readable)
            if plan.pages == "examples":
                n_images = sum(n * header.pages for header, n in headers.items())
            if self.say is not None:
                size = in_bytes(bytes_of_part(n_images, plan.shape, plan.dtype))
                self.say(
                    f"Decoding {n_images:,} images into {size} in {self.folder}; 'equipoise cache' "
                    "lists and clears what is there."
                )
            part = write_part(self.folder, key, rows(), plan.shape, about, n_images, plan.dtype)
            if passing:
                # The images themselves may be whole, and readable the next time.
                forget_part(self.folder, key)
            return part

    def _each(
        self,
        pool: ThreadPoolExecutor,
        images: Encoded,
        indices: Sequence[int],
        function: Callable[[Path | BytesIO], T],
        skipped: list[str],
        passing: list[str],
        n_done: int,
        n_pages: int = 1,
    ) -> Iterator[tuple[int, T]]:
        """Apply a function to images in threads and yield the results in order.

        Images for which the function fails are appended to ``skipped``, with the reason, and also
        to ``passing`` if the reason is the system's. Reports of progress start after ``n_done``.
        Only ``IN_FLIGHT`` pages are processed at a time.
        """

        def attempt(index: int) -> T | Exception:
            try:
                return function(images.open(index))
            except Exception as error:  # a broken file may cause any exception in Pillow
                return error

        at_once = max(1, IN_FLIGHT // n_pages)
        for start in range(0, len(indices), at_once):
            chunk = indices[start : start + at_once]
            for index, result in zip(chunk, pool.map(attempt, chunk), strict=True):
                if not isinstance(result, Exception):
                    yield index, result
                else:
                    if getattr(result, "errno", None) in NO_HANDLES:
                        raise result
                    skipped.append(f"{images.name(index)}: {_reason(result)}")
                    if _is_of_system(result):
                        passing.append(skipped[-1])
                    if self.strict:
                        raise ValueError(f"{images.source}: cannot read {skipped[-1]}") from result

                n_done += 1
                if self.progress is not None:
                    self.progress(n_done, 2 * images.count)


def _no_readable_image(images: Encoded, skipped: list[str]) -> ValueError:
    return ValueError(f"{images.source}: none of the images can be read: {first_names(skipped)}")


def _is_of_system(error: Exception) -> bool:
    """Tell whether the system has refused to read an image, which may itself be whole."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) is not None


def _reason(error: Exception) -> str:
    if isinstance(error.__cause__, UnidentifiedImageError):
        return "not an image"
    return str(error) or type(error).__name__


def first_names(names: Sequence[str]) -> str:
    """List the first three names, and an ellipsis if there are more.

    Args:
        names: Names of files, or what is wrong with them.

    Returns:
        The list, on one line.
    """
    # A line end in a name would look like a line of its own.
    listed = ", ".join(_cut(name).replace("\n", "\\n") for name in names[:3])
    if len(names) > 3:
        listed += ", ..."
    return listed


def _cut(text: str) -> str:
    """A text without its middle, if it is long: the name of a file, or what is wrong with it."""
    if len(text) <= LONGEST_ENTRY:
        return text
    half = LONGEST_ENTRY // 2
    return f"{text[:half]}…{text[-half:]}"
