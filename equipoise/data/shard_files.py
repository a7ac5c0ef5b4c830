"""A file of examples, of which any stretch can be read: common to all kinds, and ``.npy``."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.data.dataset import Array
from equipoise.data.gate import read_npy_header
from equipoise.files import check_regular
from equipoise.places import SourceFile

BYTES_AT_ONCE = 1 << 20
"""About how many bytes a reader decodes at the same time."""


@dataclass(frozen=True)
class Shard(ABC):
    """A file of examples.

    Args:
        path: The file.
        n: Number of its examples.
    """

    path: SourceFile
    n: int

    @property
    def groups(self) -> tuple[int, ...]:
        """Numbers of examples in the parts of the file that have to be read from their start.

        Empty if every example can be read by itself.
        """
        return ()

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[Array]:
        r"""Read some examples, a few at a time.

        Args:
            start: Number of the first example.
            stop: Number of the example after the last one.

        Yields:
            Values as they are in the file, (B, \*).
        """

    def changed(self) -> ValueError:
        """Make the error that says that the file is not what it was."""
        return ValueError(
            f"{self.path} has changed since the source was loaded, when it had {self.n} examples"
        )


@dataclass(frozen=True)
class NpyShard(Shard):
    """An ``.npy`` file.

    Its examples are read by their offset, and not through a map, whose pages would count as memory.

    Args:
        path: The file.
        n: Number of its examples.
        offset: Where they begin, in bytes.
        dtype: Their type.
        shape: Shape of one of them.
    """

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def inspect(cls, path: SourceFile) -> "NpyShard":
        """Read the header of a file.

        Args:
            path: The file.

        Returns:
            The shard.

        Raises:
            ValueError: If it is no such file, holds Python objects, or is shorter than it claims.
        """
        with opened(path) as file:
            header = read_npy_header(file)
            n_bytes = size_of(file)
        if not header.shape:
            raise ValueError("a single number; expected an array of examples")
        is_by_column = header.is_fortran and len(header.shape) > 1
        if is_by_column and sum(side > 1 for side in header.shape) > 1:
            raise ValueError(
                "its examples are not stored one after another; save numpy.ascontiguousarray of it"
            )

        n, *shape = header.shape
        shard = cls(path, n, header.offset, header.dtype, tuple(shape))
        if n_bytes != shard._n_bytes():
            raise ValueError(
                f"it has {n_bytes:,} bytes, where its header announces {shard._n_bytes():,}"
            )
        return shard

    def read(self, start: int, stop: int) -> Iterator[Array]:
        """Read some examples by their offset."""
        bytes_of_row = self._bytes_of_row()
        at_once = rows_at_once(bytes_of_row)

        with opened(self.path) as file:
            if size_of(file) != self._n_bytes():
                raise self.changed()
            file.seek(self.offset + start * bytes_of_row)
            for first in range(start, stop, at_once):
                n = min(at_once, stop - first)
                content = file.read(n * bytes_of_row)
                if len(content) != n * bytes_of_row:
                    raise self.changed()
                yield np.frombuffer(content, self.dtype).reshape(n, *self.shape)

    def _bytes_of_row(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def _n_bytes(self) -> int:
        return self.offset + self.n * self._bytes_of_row()


def opened(path: SourceFile) -> AbstractContextManager[Any]:
    """Open a file for reading, so that a read fetches what it asks for and no more.

    Args:
        path: The file.

    Returns:
        A context that holds the open file.

    Raises:
        ValueError: If it is a pipe or another thing that is no file.
    """
    if isinstance(path, Path):
        check_regular(path)
        return path.open("rb", buffering=0)
    file: AbstractContextManager[Any] = path.open()
    return file


def size_of(file: Any) -> int:  # noqa: ANN401 (a binary file)
    """Count the bytes of an open file, and return to its start.

    Args:
        file: The file.

    Returns:
        Their number.
    """
    n_bytes: int = file.seek(0, 2)
    file.seek(0)
    return n_bytes


def rows_at_once(bytes_of_row: int) -> int:
    """Count the examples that are decoded at the same time.

    Args:
        bytes_of_row: Bytes of an example.

    Returns:
        Their number, at least one.
    """
    return max(1, BYTES_AT_ONCE // max(1, bytes_of_row))
