"""Examples in many files, the shards, of which each process reads only its own part.

Every file says in its header or footer how many examples it has, so that nothing is read to count
them. The library ``datasets`` can divide shards among processes, too. It is not used for this,
because its order of the examples depends on the number of processes.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equipoise.data.arrays import examples
from equipoise.data.dataset import Array
from equipoise.data.gate import read_npy
from equipoise.data.stream import Stream
from equipoise.files import expanded

ENDINGS = (".npy", ".parquet")
READERS = 64
"""Most places of the data from which examples are read at the same time: a power of two."""
GROUPS_PER_READER = 10
"""Fewest row groups of a Parquet source for each reader.

A reader begins and ends within a row group, of which more is read than is used: of each, half on
average and at most one row group in all. With 10 of them, this is at most a tenth of the data.
"""
BYTES_AT_ONCE = 1 << 20
"""About how many bytes a reader decodes at the same time."""


class Shard(NamedTuple):
    """A file of examples.

    Args:
        path: The file.
        n: Number of its examples.
        groups: Numbers of examples in the parts of the file that have to be read from their start:
            the row groups of a Parquet file. Empty if every example can be read by itself.
        columns: Columns of a Parquet file that make up an example.
        offset: Where the examples of an ``.npy`` file begin, in bytes.
        dtype: Their type.
        shape: Shape of one of them.
    """

    path: Path
    n: int
    groups: tuple[int, ...] = ()
    columns: tuple[str, ...] = ()
    offset: int = 0
    dtype: np.dtype[Any] = np.dtype(np.float32)
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class ShardedStream(Stream):
    """Training examples in files, of which each process reads only its own part.

    :func:`equipoise.load_stream` makes it of a folder. See
    :class:`equipoise.data.shard_batches.ShardBatches` for the order in which examples are read.

    Args:
        shards: The files, in the order of the examples.
        readers: Number of places from which examples are read at the same time, over all
            processes. It is a power of two, and does not depend on the number of processes.
    """

    shards: tuple[Shard, ...]
    readers: int

    def rows(self, shard: Shard, start: int, stop: int) -> Iterator[Array]:
        r"""Read some training examples of a file.

        Args:
            shard: The file.
            start: Number of the first example within the file.
            stop: Number of the example after the last one.

        Yields:
            Raw examples, (B, \*), in the type of the data.

        Raises:
            ValueError: If they have changed since the source was loaded.
        """
        label = str(shard.path)
        for values in read_rows(shard, start, stop):
            batch = examples(values, label)
            if batch.shape[1:] != self.shape[1:]:
                raise ValueError(
                    f"{label}: examples of shape {batch.shape[1:]}; the first are of shape "
                    f"{self.shape[1:]}"
                )
            yield self._cast(batch, label)


def find_shards(source: str | Path | Sequence[str | Path], column: str | None) -> tuple[Shard, ...]:
    """Find the files of a source, and read how many examples each has.

    Args:
        source: A folder with ``.npy`` or ``.parquet`` files, which are taken in the order of their
            names, or a list of such files.
        column: Column of Parquet files that holds the examples as lists. None takes all columns if
            they are numbers, or the only column of lists.

    Returns:
        The files with examples.

    Raises:
        ValueError: If there are none, or they are of different kinds.
        ImportError: If Parquet files need pyarrow, and it is not installed.
    """
    if isinstance(source, str | Path):
        folder = expanded(source)
        visible = [file for file in folder.iterdir() if not file.name.startswith((".", "_"))]
        files = sorted(file for file in visible if file.suffix.lower() in ENDINGS)
        label = str(folder)
    else:
        files = [expanded(file) for file in source]
        label = f"a list of {len(files)} files"

    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1 or not kinds <= set(ENDINGS):
        found = ", ".join(sorted(kinds)) or "none of them"
        raise ValueError(
            f"{label}: a stream of files needs .npy files alone, or .parquet files alone; "
            f"found {found}"
        )
    if column is not None and kinds == {".npy"}:
        raise ValueError(f"{label}: column is for .parquet files; leave it out")

    shards = [_inspect(file, column) for file in files]
    found_shards = tuple(shard for shard in shards if shard.n)
    if not found_shards:
        raise ValueError(f"{label}: no examples in the {len(files)} files")
    return found_shards


def choose_readers(shards: Sequence[Shard]) -> int:
    """Choose from how many places examples are read at the same time.

    Args:
        shards: The files.

    Returns:
        A power of two, at most :data:`READERS`, and fewer if the files have few row groups.
    """
    if not any(shard.groups for shard in shards):
        return READERS

    most = max(1, sum(len(shard.groups) for shard in shards) // GROUPS_PER_READER)
    return min(READERS, 1 << (most.bit_length() - 1))


def read_rows(shard: Shard, start: int, stop: int) -> Iterator[Array]:
    r"""Read some examples of a file, a few at a time.

    Args:
        shard: The file.
        start: Number of the first example.
        stop: Number of the example after the last one.

    Yields:
        Values as they are in the file, (B, \*).

    Raises:
        ValueError: If the file has changed since it was found.
    """
    pieces = _read_parquet(shard, start, stop) if shard.columns else _read_npy(shard, start, stop)
    n = 0
    for piece in pieces:
        n += len(piece)
        yield piece
    if n != stop - start:
        raise _changed(shard)


def _inspect(file: Path, column: str | None) -> Shard:
    """Read header or footer of a file."""
    try:
        if file.suffix.lower() == ".parquet":
            return _inspect_parquet(file, column)
        values = read_npy(file)
        if not values.ndim or not isinstance(values, np.memmap):
            raise ValueError("a single number; expected an array of examples")
        if not values.flags.c_contiguous:
            raise ValueError(
                "its examples are not stored one after another; save numpy.ascontiguousarray of it"
            )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    shape = values.shape[1:]
    return Shard(file, len(values), offset=values.offset, dtype=values.dtype, shape=shape)


def _read_npy(shard: Shard, start: int, stop: int) -> Iterator[Array]:
    """Read examples by their offset, and not through a map, whose pages would count as memory."""
    size = int(np.prod(shard.shape))
    bytes_of_row = size * shard.dtype.itemsize
    at_once = _rows_at_once(bytes_of_row)

    with shard.path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != shard.offset + shard.n * bytes_of_row:
            raise _changed(shard)
        file.seek(shard.offset + start * bytes_of_row)
        for first in range(start, stop, at_once):
            n = min(at_once, stop - first)
            values = np.fromfile(file, shard.dtype, n * size)
            if len(values) != n * size:
                raise _changed(shard)
            yield values.reshape(n, *shard.shape)


def _rows_at_once(bytes_of_row: int) -> int:
    """Count the examples that are decoded at the same time."""
    return max(1, BYTES_AT_ONCE // max(1, bytes_of_row))


def _parquet() -> Any:  # noqa: ANN401 (a module)
    """Import pyarrow.parquet."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            ".parquet files need pyarrow: install it or the extra 'hub', or save the parts as .npy"
        ) from error


def _open_parquet(file: Path) -> Any:  # noqa: ANN401 (a class of pyarrow)
    """Open a Parquet file so that it is read as it is needed."""
    return _parquet().ParquetFile(file, pre_buffer=False, buffer_size=1 << 16)


def _inspect_parquet(file: Path, column: str | None) -> Shard:
    """Read the footer of a Parquet file, and choose the columns."""
    with _open_parquet(file) as table:
        schema, footer = table.schema_arrow, table.metadata
        groups = tuple(footer.row_group(g).num_rows for g in range(footer.num_row_groups))

    if not footer.num_rows:
        return Shard(file, 0)

    types = {field.name: str(field.type) for field in schema}
    lists = [name for name, kind in types.items() if "list<" in kind]
    others = [
        name
        for name, kind in types.items()
        if not kind.startswith(("int", "uint", "float", "double"))
    ]
    if column is not None and column not in types:
        raise ValueError(f"no column {column!r}; there are {', '.join(types)}")
    if column is not None:
        columns: tuple[str, ...] = (column,)
    elif not others:
        columns = tuple(types)
    elif len(lists) == 1:
        columns = (lists[0],)
    else:
        raise ValueError(
            f"the columns {', '.join(others)} are no numbers; name the column of lists with "
            "column=, or leave these out of the files"
        )
    return Shard(file, footer.num_rows, groups, columns)


def _read_parquet(shard: Shard, start: int, stop: int) -> Iterator[Array]:
    """Read examples from the row groups that have them."""
    with _open_parquet(shard.path) as table:
        if table.metadata.num_rows != shard.n:
            raise _changed(shard)

        chosen, before, skipped = [], 0, 0
        for group, n in enumerate(shard.groups):
            if before + n <= start:
                skipped = before + n
            elif before < stop:
                chosen.append(group)
            before += n

        position = skipped
        if not chosen:
            return
        first_group = table.metadata.row_group(chosen[0])
        at_once = _rows_at_once(first_group.total_byte_size // first_group.num_rows)
        for batch in table.iter_batches(
            at_once, row_groups=chosen, columns=list(shard.columns), use_threads=False
        ):
            first, last = max(start - position, 0), min(stop - position, len(batch))
            position += len(batch)
            if first < last:
                yield _as_array(batch, shard)[first:last]
            if position >= stop:
                return


def _as_array(batch: Any, shard: Shard) -> Array:  # noqa: ANN401 (a class of pyarrow)
    """Convert a batch of rows to examples."""
    # By name, because the columns come in the order of the file.
    columns = [batch.column(name) for name in shard.columns]
    if hasattr(columns[0], "flatten") and "list<" in str(columns[0].type):
        values = columns[0].flatten().to_numpy(zero_copy_only=False)
        lengths = {len(row) for row in columns[0]} if len(batch) else {0}
        if len(lengths) != 1 or columns[0].null_count:
            raise ValueError(f"{shard.path}: lists of different lengths, or none, in a column")
        return np.reshape(values, (len(batch), -1))

    arrays = [column.to_numpy(zero_copy_only=False) for column in columns]
    return np.stack(arrays, axis=1)


def _changed(shard: Shard) -> ValueError:
    """Say that a file is not what it was."""
    return ValueError(
        f"{shard.path} has changed since the source was loaded, when it had {shard.n} examples"
    )
