"""A memory-mapped cache of decoded examples: written whole or not at all, safe to delete at any time."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock

from equipoise.data.arrays import Part, Summary, summarise
from equipoise.data.dataset import Array


def default_cache_dir() -> Path:
    """Where caches go: $EQUIPOISE_CACHE, or ~/.cache/equipoise.

    Returns:
        The folder, which need not exist.
    """
    return Path(os.environ.get("EQUIPOISE_CACHE") or "~/.cache/equipoise").expanduser()


def read_part(folder: Path, key: str) -> Part | None:
    """Open a cached part.

    Args:
        folder: of the cache.
        key: of the part.

    Returns:
        The part, memory-mapped; None if it is not there, or not readable.
    """
    try:
        about = json.loads((folder / f"{key}.json").read_text())
        values = np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False)
        constant = tuple(about["constant"])
        summary = Summary(about["digest"], about["low"], about["high"], constant)
        return Part(values, summary, tuple(about["notes"]))
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def one_writer(folder: Path, key: str) -> Iterator[None]:
    """Wait until no other process writes a part, such as those that ``torchrun`` starts together.

    The operating system takes the lock back from a process that dies.

    Args:
        folder: of the cache; made if needed.
        key: of the part.

    Yields:
        Nothing; look again for the part, another process may have written it meanwhile.

    Raises:
        OSError: if the cache cannot be written.
    """
    with _advice(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{key}.lock")
        lock.acquire()
    try:
        yield
    finally:
        # Another process may then lock a new file: it makes the part a second time at worst.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_part(
    folder: Path,
    key: str,
    rows: Iterable[Array],
    shape: tuple[int, ...],
    notes: Callable[[], tuple[str, ...]],
) -> Part:
    r"""Write examples one after another to the cache, and open the result.

    The values are written as a stream, not through a memory map: a full disk is then an error and not a
    signal that kills the process. The description is renamed into place last; without it there is no part.

    Args:
        folder: of the cache; made if needed.
        key: of the part.
        rows: uint8 examples, each of ``shape``, as many as there are.
        shape: of one example.
        notes: asked after the last example for what a user should read.

    Returns:
        The part, memory-mapped.

    Raises:
        OSError: if the cache cannot be written; nothing is left behind.
    """

    def write_rows(file: BinaryIO) -> None:
        count = 0
        _write_header(file, (0, *shape))
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(np.ascontiguousarray(row).data)
        file.seek(0)
        _write_header(
            file, (count, *shape)
        )  # as long as the first: the format leaves room for the count

    values_path = folder / f"{key}.npy"
    with _advice(folder):
        _write_whole(values_path, write_rows)
        values = np.load(values_path, mmap_mode="r", allow_pickle=False)
        summary = summarise(values, str(values_path))
        about = {**summary._asdict(), "notes": notes()}
        _write_whole(folder / f"{key}.json", lambda file: file.write(json.dumps(about).encode()))
    return Part(values, summary, about["notes"])


@contextmanager
def _advice(folder: Path) -> Iterator[None]:
    """Say what to do about a cache that cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the cache of decoded images in {folder} ({error.strerror or error}); "
            "free some space there, or choose another place with cache_dir or $EQUIPOISE_CACHE",
        ) from error


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
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
