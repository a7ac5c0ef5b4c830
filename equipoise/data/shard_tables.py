"""Shards that are tables, by pyarrow: Parquet, and Arrow (Feather)."""

import importlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.data.dataset import Array
from equipoise.data.shard_files import Shard, opened, rows_at_once
from equipoise.files import check_regular
from equipoise.places import SourceFile

Table = Any  # pyarrow has no types
Schema = Any
NUMBERS = ("int", "uint", "float", "double", "halffloat", "bool")


def flag_columns(path: Path) -> list[str]:
    """List the columns of a Parquet file that hold true and false.

    Args:
        path: The file.

    Returns:
        Their names.
    """
    schema = _import("pyarrow.parquet", path).read_schema(path)
    return [field.name for field in schema if str(field.type) == "bool"]


@dataclass(frozen=True)
class TableShard(Shard):
    """A table in parts that have to be read from their start.

    Args:
        path: The file.
        n: Number of its examples.
        rows_of_groups: Numbers of examples in its parts.
        columns: Columns that make up an example.
    """

    rows_of_groups: tuple[int, ...]
    columns: tuple[str, ...]

    @property
    def groups(self) -> tuple[int, ...]:
        """Numbers of examples in the parts."""
        return self.rows_of_groups

    def read(self, start: int, stop: int) -> Iterator[Array]:
        """Read some examples from the parts that have them."""
        before, chosen, skipped = 0, [], 0
        for group, n in enumerate(self.groups):
            if before + n <= start:
                skipped = before + n
            elif before < stop:
                chosen.append(group)
            before += n
        if not chosen:
            return

        position = skipped
        for batch in self._batches(chosen):
            first, last = max(start - position, 0), min(stop - position, len(batch))
            position += len(batch)
            if first < last:
                yield _as_array(batch, self)[first:last]
            if position >= stop:
                return

    @classmethod
    def inspect(
        cls, path: SourceFile, column: str | Sequence[str] | None, drop: Sequence[str] = ()
    ) -> "TableShard":
        """Read what a file says of itself, and choose the columns.

        Args:
            path: The file.
            column: Column of lists, or columns of numbers. None chooses.
            drop: Columns to leave out.

        Returns:
            The shard.
        """
        schema, groups = cls._layout(path)
        columns = choose_columns(schema, column, drop) if sum(groups) else ()
        return cls(path, sum(groups), groups, columns)

    @staticmethod
    @abstractmethod
    def _layout(path: SourceFile) -> tuple[Schema, tuple[int, ...]]:
        """Read the schema of a file, and the numbers of examples in its parts."""

    @abstractmethod
    def _batches(self, groups: list[int]) -> Iterator[Table]:
        """Read some parts, a few rows at a time."""


class ParquetShard(TableShard):
    """A Parquet file, whose parts are its row groups."""

    @staticmethod
    def _layout(path: SourceFile) -> tuple[Schema, tuple[int, ...]]:
        """Read the footer."""
        with _parquet_file(path) as table:
            footer = table.metadata
            groups = tuple(footer.row_group(g).num_rows for g in range(footer.num_row_groups))
            return table.schema_arrow, groups

    def _batches(self, groups: list[int]) -> Iterator[Table]:
        with _parquet_file(self.path) as table:
            if table.metadata.num_rows != self.n:
                raise self.changed()

            first_group = table.metadata.row_group(groups[0])
            at_once = rows_at_once(first_group.total_byte_size // max(1, first_group.num_rows))
            # From afar, the columns of a group come in one piece, and not one by one.
            by_group = [groups] if isinstance(self.path, Path) else [[group] for group in groups]
            for some in by_group:
                yield from table.iter_batches(
                    at_once, row_groups=some, columns=list(self.columns), use_threads=False
                )


class ArrowShard(TableShard):
    """An Arrow or Feather file, whose parts are its record batches."""

    @staticmethod
    def _layout(path: SourceFile) -> tuple[Schema, tuple[int, ...]]:
        """Read the schema, and the lengths of the record batches."""
        with _arrow_file(path) as table:
            numbers = range(table.num_record_batches)
            return table.schema, tuple(table.get_batch(number).num_rows for number in numbers)

    def _batches(self, groups: list[int]) -> Iterator[Table]:
        with _arrow_file(self.path) as table:
            if table.num_record_batches != len(self.groups):
                raise self.changed()
            for group in groups:
                batch = table.get_batch(group)
                if batch.num_rows != self.groups[group]:
                    raise self.changed()
                at_once = rows_at_once(batch.nbytes // max(1, batch.num_rows))
                for first in range(0, batch.num_rows, at_once):
                    yield batch.slice(first, at_once)


def choose_columns(
    schema: Table, column: str | Sequence[str] | None, drop: Sequence[str] = ()
) -> tuple[str, ...]:
    """Choose the columns that make up an example.

    Args:
        schema: Schema of a table, of pyarrow.
        column: Column of lists, or columns of numbers. None takes all columns if they are numbers,
            or the only column of lists.
        drop: Columns to leave out.

    Returns:
        Their names.

    Raises:
        ValueError: If there is no such column, or the choice is not clear.
    """
    types = {field.name: str(field.type) for field in schema}
    unknown = [name for name in drop if name not in types]
    if unknown:
        raise ValueError(f"no column {unknown[0]!r}; there are {', '.join(types)}")
    types = {name: kind for name, kind in types.items() if name not in drop}
    lists = [name for name, kind in types.items() if "list<" in kind]
    if column is not None:
        columns = (column,) if isinstance(column, str) else tuple(column)
        absent = [name for name in columns if name not in types]
        if absent:
            raise ValueError(f"no column {absent[0]!r}; there are {', '.join(types)}")
        if len(columns) == 1 and columns[0] in lists:
            return columns
        types = {name: types[name] for name in columns}

    others = [name for name, kind in types.items() if not kind.startswith(NUMBERS)]
    if not others and types:
        return tuple(types)
    if column is None and len(lists) == 1:
        return (lists[0],)
    raise ValueError(
        f"the columns {', '.join(others)} are no numbers; name the column of lists with "
        "column=, or leave these out of the files ('equipoise pack --drop' writes such files)"
    )


def _as_array(batch: Table, shard: TableShard) -> Array:
    """Convert a batch of rows to examples."""
    # By name, because the columns come in the order of the file.
    columns = [batch.column(name) for name in shard.columns]
    if "list<" in str(columns[0].type):
        values = columns[0].flatten().to_numpy(zero_copy_only=False)
        lengths = {len(row) for row in columns[0]} if len(batch) else {0}
        if len(lengths) != 1 or columns[0].null_count:
            raise ValueError(f"{shard.path}: lists of different lengths, or none, in a column")
        return np.reshape(values, (len(batch), -1))

    arrays = [column.to_numpy(zero_copy_only=False) for column in columns]
    # Flags with gaps come as Python objects.
    arrays = [array.astype(np.float32) if array.dtype == object else array for array in arrays]
    return np.stack(arrays, axis=1)


def _parquet_file(path: SourceFile) -> AbstractContextManager[Table]:
    """Open a Parquet file so that it is read as it is needed."""
    parquet = _import("pyarrow.parquet", path)
    if isinstance(path, Path):
        opened_file: AbstractContextManager[Table] = parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 16
        )
        return opened_file
    return _remote_parquet(parquet, path)


@contextmanager
def _remote_parquet(parquet: Any, path: SourceFile) -> Iterator[Table]:  # noqa: ANN401 (a module)
    with opened(path) as file, parquet.ParquetFile(file, pre_buffer=True) as table:
        yield table


@contextmanager
def _arrow_file(path: SourceFile) -> Iterator[Table]:
    """Open an Arrow file; one of this machine as a map, of which only headers are read to count."""
    pyarrow = _import("pyarrow", path)
    if isinstance(path, Path):
        check_regular(path)
        source: Any = pyarrow.memory_map(str(path))
    else:
        source = pyarrow.PythonFile(path.open(), mode="r")
    with source:
        try:
            reader = pyarrow.ipc.open_file(source)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"no Arrow file that can be read from any place ({error}); Arrow streams, as the "
                "library datasets keeps them, can be: hf:PATH"
            ) from error
        yield reader


def _import(name: str, path: SourceFile) -> Any:  # noqa: ANN401 (a module)
    """Import a part of pyarrow."""
    try:
        if name == "pyarrow":
            importlib.import_module("pyarrow.ipc")
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{path.suffix} files need pyarrow: install it or the extra 'hub', or save the parts "
            "as .npy"
        ) from error
