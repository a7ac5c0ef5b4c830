"""One gate for untrusted input: what may be opened, and how much it may unpack to.

A file may claim to be larger than it is. What it claims is bounded here, before anything of that
size is allocated.
"""

import contextlib
import ctypes
import functools
import gzip
import math
import os
import stat
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from equipoise.data.dataset import Array
from equipoise.files import check_regular

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The only formats in which images are read. Others, such as EPS, would start other programs."""
BYTES_PER_PIXEL = 16
"""Memory to decode a pixel: four bytes, and three copies of them."""
RETURNED_BYTES = 50_000_000
"""Memory that is given back to the system after an image."""
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MAX_HEADER_BYTES = 10_000
"""Longest header of an ``.npy`` file, as in NumPy."""
N_START = 12
"""Bytes of an ``.npy`` file up to the length of its header."""
ENCRYPTED = 1
"""Bit of a zip member's flags."""


@dataclass(frozen=True)
class Limits:
    """How much a file may claim.

    Args:
        max_pixels: Most pixels of an image file.
        max_bytes: Most bytes that a compressed file may unpack to, besides twice its size.
    """

    max_pixels: int = 50_000_000
    max_bytes: int = 1_000_000_000

    def check_unpacked(self, path: Path, claimed: int) -> None:
        """Refuse a compressed file that would unpack to too much.

        Args:
            path: Path of the file.
            claimed: Bytes that it would unpack to.

        Raises:
            ValueError: If they are more than the limit.
        """
        limit = 2 * path.stat().st_size + self.max_bytes
        if claimed > limit:
            raise ValueError(
                f"unpacks to {claimed:,} bytes, from a file of {path.stat().st_size:,}; if that "
                f"is right, give max_bytes={claimed}"
            )


DEFAULT_LIMITS = Limits()


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _return_memory() -> None:
    """Give memory that was freed back to the system: glibc keeps it for each thread."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        _libc().malloc_trim(0)


class ByteBudget:
    """Memory that threads take and give back. One alone may always go on, whatever it takes.

    Args:
        total: Bytes that may be taken at a time.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken = 0
        self.changed = threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Wait until so much memory is free, and give it back at the end.

        Args:
            size: Bytes.

        Yields:
            None.
        """
        size = min(size, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.taken + size <= self.total)
            self.taken += size

        try:
            yield
        finally:
            if size > RETURNED_BYTES:
                _return_memory()
            with self.changed:
                self.taken -= size
                self.changed.notify_all()


DECODING = ByteBudget(800_000_000)
"""Memory that all threads together may take to decode images."""


@contextmanager
def open_image(file: Path | BytesIO, limits: Limits = DEFAULT_LIMITS) -> Iterator[Image.Image]:
    """Open an image whose pixels are not yet decoded.

    Args:
        file: Path or content of the image file.
        limits: The most that it may claim.

    Yields:
        The image.

    Raises:
        ValueError: If it is not a regular file, no image, or claims more pixels than the limit.
    """
    if isinstance(file, Path):
        check_regular(file)

    try:
        opened = Image.open(file, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"it has more pixels than Pillow reads ({error}); make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"no image that can be read; expected {', '.join(IMAGE_FORMATS)}"
        ) from error

    with opened as image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise ValueError(
                f"it has {width} x {height} pixels, more than {limits.max_pixels:,}; "
                "make it smaller, or raise max_pixels"
            )
        yield image


def read_npy(path: Path) -> Array:
    """Open an ``.npy`` file as a memory map.

    Args:
        path: Path of the file.

    Returns:
        The array, memory-mapped.

    Raises:
        ValueError: If it is no such file, holds Python objects, or is shorter than it claims.
    """
    check_regular(path)
    with path.open("rb") as file:
        _check_header_length(file.read(N_START))
    try:
        # A pickle is never loaded, because it would run code from the file.
        content = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header that cannot be parsed may cause any exception
        raise ValueError(_reason(error)) from error

    if not isinstance(content, np.ndarray):
        content.close()
        raise ValueError("it is an .npz archive; give it the ending .npz")
    return content


class NpyHeader(NamedTuple):
    """What the start of an ``.npy`` file says of the array after it.

    Args:
        shape: Its shape.
        is_fortran: Whether the first axis is the one whose values lie next to each other.
        dtype: Type of its values.
        offset: Where they begin, in bytes.
    """

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]
    offset: int


def read_npy_header(file: Any) -> NpyHeader:  # noqa: ANN401 (a binary file)
    """Read the header of an ``.npy`` file, and nothing of the array.

    Args:
        file: The file, open for reading, at its start.

    Returns:
        The header.

    Raises:
        ValueError: If it is no such file, or holds Python objects.
    """
    start = file.read(N_START)
    _check_header_length(start)
    header = BytesIO(start + file.read(MAX_HEADER_BYTES))
    try:
        shape, is_fortran, dtype = _parse_npy_header(header)
    except Exception as error:  # a header that cannot be parsed may cause any exception
        raise ValueError(f"no .npy file that can be read ({_reason(error)})") from error
    if dtype.hasobject:
        raise ValueError(
            "it holds Python objects, which are never loaded; save an array of numbers"
        )
    if min(shape, default=0) < 0:
        raise ValueError(f"its header announces an array of shape {shape}")
    return NpyHeader(shape, is_fortran, dtype, header.tell())


def _parse_npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:  # noqa: ANN401
    """Parse shape, order of the axes and type at the start of an ``.npy`` file."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"its format has the version {version}")


def read_npy_bytes(content: bytes) -> Array:
    """Decode the content of an ``.npy`` file.

    Args:
        content: All of its bytes.

    Returns:
        The array. It cannot be written to.

    Raises:
        ValueError: If it is no such file, holds Python objects, or is not as long as it claims.
    """
    header = read_npy_header(BytesIO(content))
    n_bytes = math.prod(header.shape) * header.dtype.itemsize
    if len(content) - header.offset != n_bytes:
        raise ValueError(
            f"its header announces {n_bytes:,} bytes, where {len(content) - header.offset:,} are "
            "there"
        )
    values = np.frombuffer(content, header.dtype, offset=header.offset)
    return values.reshape(header.shape, order="F" if header.is_fortran else "C")


def _check_header_length(start: bytes) -> None:
    """Refuse a header of gigabytes, all of which NumPy would read, by the start of the file."""
    is_long_form = start[6:7] > b"\x01"
    if is_long_form and int.from_bytes(start[8:12], "little") > MAX_HEADER_BYTES:
        raise ValueError(f"its header announces more than {MAX_HEADER_BYTES} bytes of itself")


@contextmanager
def open_npz(path: Path, limits: Limits = DEFAULT_LIMITS) -> Iterator["Archive"]:
    """Open an ``.npz`` archive.

    Args:
        path: Path of the file.
        limits: The most that it may unpack to.

    Yields:
        The archive.

    Raises:
        ValueError: If it is damaged, or no such archive.
    """
    check_regular(path)
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a patched directory may cause any exception
        raise ValueError(f"it is damaged or no .npz archive ({_reason(error)})") from error

    with archive:
        yield Archive(path, archive, limits)


class Archive:
    """An open ``.npz`` archive, of which single arrays are read.

    Args:
        path: Path of the file.
        archive: The open zip file.
        limits: The most that all arrays together may unpack to.

    Raises:
        ValueError: If two arrays have the same name.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, limits: Limits) -> None:
        self.path = path
        self.archive = archive
        self.limits = limits
        self.unpacked = 0

        self.names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        if len(set(self.names)) < len(self.names):
            raise ValueError("two of its arrays have the same name")

    def read(self, name: str) -> Array:
        """Read an array.

        Args:
            name: One of :attr:`names`.

        Returns:
            The array.

        Raises:
            ValueError: If it is encrypted, compressed in an unusual way, damaged, too large, or not
                an array of numbers.
        """
        info = self.archive.infolist()[self.names.index(name)]
        if info.flag_bits & ENCRYPTED:
            raise ValueError(f"{name} is encrypted; save it without a password")
        if info.compress_type not in ZIP_METHODS:
            raise ValueError(f"{name} is compressed in an unusual way; save it by np.savez")

        self.unpacked += info.file_size
        self.limits.check_unpacked(self.path, self.unpacked)

        try:
            with self.archive.open(info) as file:
                _check_header_length(file.read(N_START))
            with self.archive.open(info) as file:
                _check_claim(cast(zipfile.ZipExtFile, file), info.file_size)
            with self.archive.open(info) as file:
                array: Array = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # a damaged member may cause any exception
            raise ValueError(f"{name}: {_reason(error)}") from error
        return array


def _check_claim(file: zipfile.ZipExtFile, size: int) -> None:
    """Refuse an array whose header announces more than its member of the archive holds."""
    shape, _, dtype = _parse_npy_header(file)
    claimed = dtype.itemsize
    for side in shape:
        claimed *= side
    if not 0 <= claimed <= size:
        raise ValueError(f"its header announces {claimed:,} bytes, where {size:,} are there")


def read_gzip(
    path: Path, n_header: int, size_of: Callable[[bytes], int], limits: Limits = DEFAULT_LIMITS
) -> bytes:
    """Unpack a gzip file, if it may hold as much as the header of its content announces.

    Args:
        path: Path of the file.
        n_header: Number of bytes of the header.
        size_of: Returns the number of bytes that a header announces, with the header itself.
        limits: The most that it may unpack to.

    Returns:
        The content: as much as announced, one byte more if there is more, or less if it ends
        before.

    Raises:
        ValueError: If it is damaged, or too large.
    """
    check_regular(path)
    try:
        with gzip.open(path) as file:
            header = file.read(n_header)
            n_left = max(0, size_of(header) - len(header))
            limits.check_unpacked(path, n_left)
            return header + file.read(n_left + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"is damaged or incomplete ({error})") from error


def _reason(error: Exception) -> str:
    """Say in one line what is wrong with a file."""
    text = " ".join(str(error).split())[:300]
    return text or type(error).__name__


def is_special(path: str | Path) -> bool:
    """Tell whether a path is a pipe, a device or a socket.

    Args:
        path: The path. A link is followed.

    Returns:
        False also for a broken link, which is reported when it is opened.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
