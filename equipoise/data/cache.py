"""A memory-mapped cache of decoded examples.

A part is written as a whole or not at all. The cache may be deleted at any time.
"""

import contextlib
import datetime
import errno
import json
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, NotRequired, TypedDict

import numpy as np
from filelock import FileLock, Timeout

from equipoise.data.arrays import Part, Summary, summarise
from equipoise.data.dataset import Array
from equipoise.data.gate import read_npy
from equipoise.files import StoreError, expanded
from equipoise.records import read_record

SILENT_SECONDS = 5.0
"""How long a lock is waited for without a word."""


class Origin(TypedDict):
    """Where the examples of a part come from.

    ``rows`` has the number of the file and of the page of each example. It is None if all files
    were read and have one page.
    """

    notes: list[str]
    unreadable: list[str]
    rows: list[tuple[int, int]] | None
    source: NotRequired[str]


class CachedPart(Origin):
    """The description of a part in the cache."""

    digest: str
    low: float
    high: float
    n_constant: int


class CachedImages(NamedTuple):
    """Decoded images in the cache.

    Args:
        key: Key of the part, which begins the names of its files.
        n_bytes: Size of its files.
        used: When it was last read or written.
        shape: Shape of the images, (N, C, H, W). None if they are incomplete or damaged.
        source: Where the images were. None if that is not recorded.
    """

    key: str
    n_bytes: int
    used: datetime.datetime
    shape: tuple[int, ...] | None
    source: str | None


KEY = re.compile(r"[0-9a-f]{64}")
LEFTOVER = re.compile(r"[0-9a-f]{16}.*\.tmp")
"""Names of files that a killed process may have left."""


def default_cache_dir() -> Path:
    """Folder of the caches: $EQUIPOISE_CACHE, or ~/.cache/equipoise.

    Returns:
        The folder, which need not exist.

    Raises:
        StoreError: If there is no home folder, and $EQUIPOISE_CACHE is not set.
    """
    try:
        return expanded(os.environ.get("EQUIPOISE_CACHE") or "~/.cache/equipoise")
    except StoreError as error:
        raise StoreError(f"no place for the cache: {error} in $EQUIPOISE_CACHE") from error


def read_part(folder: Path, key: str) -> Part | None:
    """Open a part in the cache.

    Args:
        folder: Folder of the cache.
        key: Key of the part.

    Returns:
        The part, memory-mapped. None if it does not exist, or is not what was written.
    """
    try:
        about = read_record(folder / f"{key}.json", CachedPart)
        values = read_npy(folder / f"{key}.npy")
        summary = summarise(values, key)
    except (OSError, ValueError, IndexError):
        return None

    # All of it, so that a flipped bit is noticed: this takes far less time than the decoding.
    recorded = Summary(about["digest"], about["low"], about["high"], about["n_constant"])
    if summary != recorded:
        return None
    return _part(values, summary, about)


def _part(values: Array, summary: Summary, about: CachedPart) -> Part:
    rows = about["rows"]
    if rows is not None:
        rows = [(index, page) for index, page in rows]
    unreadable = tuple(about["unreadable"])
    return Part(values, summary, tuple(about["notes"]), unreadable=unreadable, rows=rows)


@contextmanager
def one_writer(folder: Path, key: str) -> Iterator[None]:
    """Wait until no other process writes a part.

    ``torchrun``, for instance, starts several processes that need the same part. The operating
    system releases the lock of a process that dies.

    Args:
        folder: Folder of the cache. It is created if it does not exist.
        key: Key of the part.

    Yields:
        None. Another process may have written the part while this one waited, so the caller
        should look for it again.

    Raises:
        OSError: If the cache cannot be written.
    """
    with _advice(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{key}.lock")
        try:
            lock.acquire(timeout=SILENT_SECONDS)
        except Timeout:
            warnings.warn(
                f"waiting for another process that decodes the same images into {folder}; "
                f"it has locked {lock.lock_file}",
                stacklevel=3,
            )
            lock.acquire()

    try:
        yield
    finally:
        # Another process may now lock a new file of this name. At worst it writes the part again.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_part(
    folder: Path,
    key: str,
    rows: Iterable[Array],
    shape: tuple[int, ...],
    about: Callable[[], Origin],
    most_rows: int,
    dtype: str = "uint8",
) -> Part:
    r"""Write examples to the cache one after another, and open the result.

    The values are written to a file, not through a memory map. A full disk is then an error, and
    not a signal that kills the process. The description of the part is moved into place last,
    and a part without a description does not exist.

    Args:
        folder: Folder of the cache. It is created if it does not exist.
        key: Key of the part.
        rows: Any number of examples, each of the shape ``shape``.
        shape: Shape of one example.
        about: Function that returns where the examples come from. It is called after the last.
        most_rows: Number of examples that there are at most.
        dtype: Type of the values.

    Returns:
        The part, memory-mapped.

    Raises:
        OSError: If the cache cannot be written, or there is too little space for it. No incomplete
            file is left.
    """

    def write_rows(file: BinaryIO) -> None:
        _write_header(file, (0, *shape), dtype)
        count = 0
        for row in rows:
            file.write(np.ascontiguousarray(row, dtype).data)
            count += 1

        # This header is as long as the first one, because the format leaves room for the count.
        file.seek(0)
        _write_header(file, (count, *shape), dtype)

    values_path = folder / f"{key}.npy"
    with _advice(folder):
        folder.mkdir(parents=True, exist_ok=True)
        needed = bytes_of_part(most_rows, shape, dtype)
        free = shutil.disk_usage(folder).free
        if needed > free:
            reason = f"{in_bytes(needed)} are needed, and {in_bytes(free)} are free"
            raise OSError(errno.ENOSPC, reason)

        _write_whole(values_path, write_rows)
        values = read_npy(values_path)
        summary = summarise(values, str(values_path))

        record: CachedPart = {
            "digest": summary.digest,
            "low": summary.low,
            "high": summary.high,
            "n_constant": summary.n_constant,
            **about(),
        }
        content = json.dumps(record).encode()
        _write_whole(folder / f"{key}.json", lambda file: file.write(content))

    return _part(values, summary, record)


def forget_part(folder: Path, key: str) -> None:
    """Let a part be written anew the next time. Its values can be read as long as they are open.

    Args:
        folder: Folder of the cache.
        key: Key of the part.
    """
    (folder / f"{key}.json").unlink(missing_ok=True)


def bytes_of_part(n: int, shape: tuple[int, ...], dtype: str) -> int:
    """Count the bytes of n examples.

    Args:
        n: Number of examples.
        shape: Shape of one example.
        dtype: Type of the values.

    Returns:
        The number of bytes.
    """
    return n * math.prod(shape) * np.dtype(dtype).itemsize


def in_bytes(n: int) -> str:
    """Write a number of bytes in words, such as "6.1 GB".

    Args:
        n: The number.

    Returns:
        Three digits and a unit.
    """
    size, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def cached_images(folder: Path, least_days: float = 0.0) -> list[CachedImages]:
    """List the decoded images in the cache, the largest first.

    Args:
        folder: Folder of the cache, which need not exist.
        least_days: Days for which they have not been used.

    Returns:
        What was found, with files of killed processes, and without any other files.
    """
    sizes: dict[str, int] = {}
    used: dict[str, float] = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        is_part = KEY.fullmatch(file.stem) and file.suffix in (".npy", ".json")
        if not (is_part or LEFTOVER.fullmatch(file.name)):
            continue
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            key = file.stem if is_part else file.name
            sizes[key] = sizes.get(key, 0) + status.st_size
            used[key] = max(used.get(key, 0.0), status.st_atime, status.st_mtime)

    latest = time.time() - 86_400 * least_days
    found = [_describe(folder, key, sizes[key], used[key]) for key in sizes if used[key] <= latest]
    return sorted(found, key=lambda images: (-images.n_bytes, images.key))


def remove_images(folder: Path, images: Iterable[CachedImages]) -> int:
    """Remove decoded images from the cache, except those that a process is writing.

    Args:
        folder: Folder of the cache.
        images: What :func:`cached_images` returned.

    Returns:
        Number of bytes that were removed.
    """
    removed = 0
    for part in images:
        is_leftover = part.key.endswith(".tmp")
        # The name of a leftover begins with the key of what was written.
        lock_names = [f.name for f in folder.glob(f"{part.key[:16]}*.lock")]
        if any(_is_locked(folder / name) for name in lock_names):
            continue
        names = [part.key] if is_leftover else [f"{part.key}.json", f"{part.key}.npy"]
        for name in names:
            (folder / name).unlink(missing_ok=True)
        removed += part.n_bytes
    return removed


def _describe(folder: Path, key: str, n_bytes: int, used: float) -> CachedImages:
    """Read what is known about a part."""
    shape, source = None, None
    with contextlib.suppress(OSError, ValueError):
        source = read_record(folder / f"{key}.json", CachedPart).get("source")
        shape = read_npy(folder / f"{key}.npy").shape
    when = datetime.datetime.fromtimestamp(used).astimezone()
    return CachedImages(key, n_bytes, when, shape, source)


def _is_locked(path: Path) -> bool:
    """Tell whether another process holds a lock."""
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def _advice(folder: Path) -> Iterator[None]:
    """Add advice to the error of a cache that cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the cache of decoded images in {folder} ({error.strerror or error}); "
            "free some space there, or choose another place with cache_dir or $EQUIPOISE_CACHE",
        ) from error


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: str) -> None:
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, and rename it when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:16], suffix=".tmp")

    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
