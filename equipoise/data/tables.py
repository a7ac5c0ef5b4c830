"""Tables in files: CSV, TSV, Parquet and Feather, by polars, with the names of their columns.

Columns of numbers are read, and empty cells become NaN. Columns of text and flags are categories,
see ``levels.py``. Nothing else is guessed: names and dates are refused, with what to do.
"""

import codecs
import contextlib
import csv
import difflib
import gzip
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from equipoise.data.dataset import Array
from equipoise.data.gate import DEFAULT_LIMITS, Limits
from equipoise.data.levels import (
    Categorical,
    describe_levels,
    encode,
    problem_of_levels,
    refuse_fractions,
)
from equipoise.files import check_regular, whole_file
from equipoise.levels import Level, Levels, level_values, sorted_levels
from equipoise.text import visible

Frame: TypeAlias = Any  # polars has types, but is optional

TEXT_FORMATS = {".csv": ",", ".tsv": "\t"}
"""Endings of files of text, and the separator that wins where several would do."""
BINARY_FORMATS = (".parquet", ".feather", ".arrow")
SUFFIXES = (".csv", ".tsv", ".parquet", ".feather", ".csv.gz", ".tsv.gz")
"""Endings of files that are tables, for messages."""

OTHER_SUFFIXES = (".xlsx", ".xls", ".ods", ".txt", ".json", ".npy", ".npz", ".zip", ".gz", ".dta")
"""Endings of files that are not written, for which nobody means a folder."""
MISSING = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null", "None", "?", "-")
"""Cells of a file of text that are missing values."""

SEPARATORS = (",", ";", "\t", "|")
SAMPLE_BYTES, SAMPLE_LINES, MOST_SAMPLE_BYTES = 1 << 16, 100, 1 << 26
INFERRED_ROWS = 10_000
PACKED_ROWS = 10_000
"""Rows of a group of a Parquet file that stands for a file of text."""
SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_CHARACTERS, LISTED, SHOWN_LEVELS = 5, 8, 12, 10, 5
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?")


class Column(NamedTuple):
    """What a column of a file holds.

    Args:
        name: Name, or "column N" where the file has none.
        kind: "numbers", "whole numbers", "true or false", "dates", "text", "numbers and text",
            "names", "categories", "empty", or the type that polars gives it.
        n_missing: Number of cells without a value.
        low: Smallest number, None where there are none.
        high: Largest number.
        note: What is odd, such as the first cell that is no number.
        levels: The levels of a column of categories.
    """

    name: str
    kind: str
    n_missing: int
    low: float | None = None
    high: float | None = None
    note: str = ""
    levels: tuple[Level, ...] = ()

    @property
    def is_numeric(self) -> bool:
        """Whether a model can learn from it."""
        return self.kind in ("numbers", "whole numbers", "true or false")


@dataclass(frozen=True)
class Table:
    """A file that was read.

    Args:
        frame: The polars frame, with numbers in the columns that hold numbers.
        columns: What each column holds.
        has_names: Whether the file names its columns.
        notes: How it was read, where that was not plain.
    """

    frame: Frame
    columns: tuple[Column, ...]
    has_names: bool
    notes: tuple[str, ...] = ()

    def select(
        self, columns: Sequence[str] | None = None, drop: Sequence[str] | None = None
    ) -> "Table":
        """Take some of the columns.

        Args:
            columns: Names of the columns to take, in this order. None takes all.
            drop: Names of columns to leave out.

        Returns:
            The smaller table.

        Raises:
            ValueError: If there is no such column, or none is left.
        """
        by_name = {column.name: column for column in self.columns}
        for name in (*(columns or ()), *(drop or ())):
            if name not in by_name:
                similar = difflib.get_close_matches(name, by_name)
                hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
                raise ValueError(f"there is no column {name!r} among {_listed(by_name)}{hint}")

        kept = [name for name in (columns or by_name) if name not in (drop or ())]
        if not kept:
            raise ValueError("no column is left; give fewer to --drop")
        if len(set(kept)) < len(kept):
            raise ValueError("a column is named twice in --columns")
        return Table(
            self.frame.select(kept),
            tuple(by_name[name] for name in kept),
            self.has_names,
            self.notes,
        )

    def with_categories(self, categorical: Categorical = True) -> "Table":
        """Take columns of text and flags as categories.

        Args:
            categorical: Names of further columns; True for none. False leaves the table as it is:
                flags are numbers then.

        Returns:
            The table, with a note that names its categories.

        Raises:
            ValueError: If there is no such column.
        """
        if categorical is False:
            return self
        asked = () if categorical is True else tuple(categorical)
        self.select(asked or None)

        columns = []
        for column in self.columns:
            is_asked = column.name in asked
            if is_asked or column.kind in ("text", "true or false"):
                values = _cells(self.frame[column.name])
                levels = sorted_levels(values)
                refuse_fractions(column.name, levels)
                n_values = sum(value is not None for value in values)
                problem = problem_of_levels(len(levels), n_values)
                if problem and column.kind == "text" and not is_asked:
                    column = column._replace(kind="names", note=problem)
                elif levels:
                    note = "levels: " + ", ".join(repr(level) for level in levels[:SHOWN_LEVELS])
                    note += f", ... ({len(levels):,})" if len(levels) > SHOWN_LEVELS else ""
                    n_missing = len(values) - n_values
                    column = Column(column.name, "categories", n_missing, None, None, note, levels)
            columns.append(column)

        found = {column.name: column.levels for column in columns if column.levels}
        notes = (*self.notes, describe_levels(found)) if found else self.notes
        return Table(self.frame, tuple(columns), self.has_names, notes)

    def with_levels(self, levels: Levels, *, strict: bool = False) -> "Table":
        """Take the columns for categories that are so for a trained model.

        Args:
            levels: The model's levels, by the number of the column.
            strict: Whether a value that is not among them is an error.

        Returns:
            The table, with a note on each column that has such values. They count as missing.

        Raises:
            ValueError: If there is one, and ``strict``.
        """
        columns, notes = list(self.columns), list(self.notes)
        for number, names in levels.items():
            if number < len(columns):
                column = columns[number]
                cells = _cells(self.frame[column.name])
                encoded = encode(column.name, cells, names, strict=strict)
                columns[number] = column._replace(kind="categories", levels=encoded.levels)
                notes += [encoded.note] if encoded.note else []
        return Table(self.frame, tuple(columns), self.has_names, tuple(notes))

    @property
    def levels(self) -> dict[int, tuple[Level, ...]]:
        """Levels of the columns that are categories, by their number."""
        return {i: column.levels for i, column in enumerate(self.columns) if column.levels}

    def values(self, *, for_model: bool = False) -> Array:
        """Return the numbers, and those of the levels of categories; NaN where there are none.

        Args:
            for_model: Whether a trained model reads them. Then a column may be without any value,
                and none can be left out.

        Returns:
            Values, (N, D), float64.

        Raises:
            ValueError: If a column holds text or dates. It names all of them, and what to do.
        """
        allowed = ("empty", "categories") if for_model else ("categories",)
        bad = [c for c in self.columns if not c.is_numeric and c.kind not in allowed]
        if bad:
            raise ValueError(_problem_of(bad, for_model=for_model))

        import polars as pl

        numbers: list[Any] = []
        for column in self.columns:
            name = column.name
            if column.levels:
                codes = encode(name, _cells(self.frame[name]), column.levels).codes
                numbers.append(pl.Series(name, codes))
            elif column.kind == "empty":
                numbers.append(pl.lit(None, pl.Float64).alias(name))
            else:
                numbers.append(pl.col(name).cast(pl.Float64))
        values: Array = self.frame.with_columns(numbers).to_numpy()
        return np.ascontiguousarray(values)

    def describe(self) -> str:
        """Say what was read, for people: columns, kinds, gaps, ranges and the first rows.

        Returns:
            Lines of text.
        """
        import polars as pl

        without_value = [
            pl.col(column.name).is_null() | pl.col(column.name).cast(pl.Float64).is_nan()
            if column.is_numeric
            else pl.col(column.name).is_null()
            for column in self.columns
        ]
        width = max(len(visible(column.name)) for column in self.columns)
        lines = [f"{self.frame.height:,} rows, {len(self.columns)} columns"]
        for column in self.columns:
            parts = [f"  {visible(column.name):{width}}  {column.kind:13}"]
            if column.low is not None and column.high is not None:
                parts.append(f"{column.low:g} to {column.high:g}")
            if column.n_missing:
                share = column.n_missing / max(1, self.frame.height)
                parts.append(f"{column.n_missing:,} missing ({share:.1%})")
            if column.note:
                parts.append(column.note)
            lines.append(" ".join("  ".join(parts).splitlines()).rstrip())
        n_bare = int(self.frame.select(pl.all_horizontal(without_value)).to_series().sum())
        if n_bare:
            lines.append(f"{n_bare:,} rows without any value")

        lines.append(f"first rows of the first {min(SHOWN_COLUMNS, len(self.columns))} columns")
        shown = self.frame.select(self.frame.columns[:SHOWN_COLUMNS]).head(SHOWN_ROWS)
        cells = [
            ["." if cell is None else visible(str(cell), SHOWN_CHARACTERS) for cell in row]
            for row in [tuple(shown.columns), *shown.rows()]
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append(" ".join(("  " + "  ".join(padded)).splitlines()))
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def is_table(path: str | Path) -> bool:
    """Tell whether a file is a table, by its ending.

    Args:
        path: Path of the file.

    Returns:
        True for .csv and .tsv, also with .gz, and for .parquet, .feather and .arrow.

    Example:
        >>> is_table("rows.CSV.gz"), is_table("rows.parquet"), is_table("rows.npy")
        (True, True, False)
    """
    return _format(Path(path)) in (*TEXT_FORMATS, *BINARY_FORMATS)


def read_table(path: Path, limits: Limits = DEFAULT_LIMITS) -> Table:
    """Read a table.

    The separator, commas in place of decimal points, and whether the first line holds names are
    recognised from the first lines of a file of text.

    Args:
        path: Path of the file.
        limits: The most that a compressed file may unpack to.

    Returns:
        The table, of all columns of the file.

    Raises:
        ValueError: If it cannot be read, or two columns have the same name.
        ImportError: If polars is missing.
    """
    pl = _polars()
    check_regular(path)
    kind = _format(path)
    notes: list[str] = []
    has_names = True
    try:
        if kind == ".parquet":
            frame = pl.read_parquet(path)
        elif kind in BINARY_FORMATS:
            frame = pl.read_ipc(path)
        else:
            frame, layout, notes = _read_text(path, kind, limits)
            has_names = layout.has_names
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"it is damaged, or no {kind[1:]} file ({reason})") from error

    if not frame.width or not frame.height:
        raise ValueError(f"it has {frame.height} rows and {frame.width} columns")
    frame, columns = _columns_of(frame)
    return Table(frame, columns, has_names, tuple(notes))


def text_to_parquet(path: Path, target: Path) -> None:
    """Convert a table of text to Parquet, without ever having all of it in memory.

    Separator, decimal commas, names and gaps are recognised as by :func:`read_table`.

    Args:
        path: Path of a .csv or .tsv file in UTF-8.
        target: Path of the new file.

    Raises:
        ValueError: If it is compressed, in another encoding, or cannot be read.
    """
    pl = _polars()
    check_regular(path)
    kind = _format(path)
    if path.name.lower().endswith(".gz"):
        raise ValueError("it is compressed: unpack it first (gunzip -k)")
    with path.open("rb") as file:
        start = _start(file)
    if _encoding(start) != "utf-8":
        raise ValueError(f"it is {_encoding(start)}: convert it to UTF-8 first (iconv)")

    layout = _layout(start, kind)
    options = {
        "separator": layout.separator,
        "has_header": layout.has_names,
        "decimal_comma": layout.has_commas,
        "null_values": list(MISSING),
        "try_parse_dates": True,
        "eol_char": "\n" if b"\n" in start else "\r",
        "new_columns": layout.names,
        "infer_schema_length": INFERRED_ROWS,
    }
    try:
        found = pl.scan_csv(path, **options).collect_schema()
        # A number with a point may follow rows of whole numbers.
        real = {name: pl.Float64 for name, dtype in found.items() if dtype.is_integer()}
        frame = pl.scan_csv(path, schema_overrides=real, **options)
        with whole_file(target) as temporary:
            frame.sink_parquet(temporary, row_group_size=PACKED_ROWS)
    except pl.exceptions.PolarsError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"it cannot be read ({reason})") from error


def write_table(path: Path, columns: Mapping[str, Any]) -> Path:
    """Write a table, of the format that its ending names.

    Args:
        path: Path of the file, with an ending of :data:`SUFFIXES`.
        columns: Values by column.

    Returns:
        The path.

    Raises:
        ValueError: If the ending is another.
        ImportError: If polars is missing.
    """
    return write_frame(path, _polars().DataFrame(dict(columns)))


def write_filled(
    path: Path,
    source: Path,
    names: Sequence[str],
    values: Array,
    filled: Array,
    levels: Levels | None = None,
) -> Path:
    """Write a table again, with other values in some cells.

    From text to text, the other cells keep their characters, so that 007 does not become 7, and the
    new cells are written as the file writes them: with its separator and its decimal commas.

    Args:
        path: Path of the new file.
        source: Path of the table. Its order of columns, and those that are not named, stay.
        names: Names of the columns that the values are of, or their order if the file has no names.
        values: Values, (N, D).
        filled: True for the cells that get a value, (N, D). The others stay as they are.
        levels: Levels of the columns that are categories, by their number.

    Returns:
        The path of the new file.
    """
    pl = _polars()
    table = read_table(source)
    frame = table.frame
    if not table.has_names or not set(names) <= set(frame.columns):
        names = [column.name for column in table.columns]

    is_text = _format(path) in TEXT_FORMATS and _format(source) in TEXT_FORMATS
    if is_text:
        raw, layout, _ = _read_text(source, _format(source), DEFAULT_LIMITS, is_raw=True)
    written = raw if is_text else frame
    triples = zip(names, values.T, filled.T, strict=True)
    for number, (name, column, gaps) in enumerate(triples):
        if not gaps.any():
            continue
        if number in (levels or {}):
            found = level_values(column[gaps].tolist(), (levels or {})[number])
        else:
            # The shortest decimals of a float32, and not all of those of its float64.
            found = [float(str(value)) for value in column[gaps]]
        old = frame[name]
        if is_text:
            spelled = _spelled(found, old, raw[name], layout, is_level=number in (levels or {}))
            series = raw[name].scatter(np.flatnonzero(gaps), spelled)
        elif number in (levels or {}):
            series = _with_levels(old, np.flatnonzero(gaps), found)
        else:
            # Whole numbers and flags become real numbers where a gap is filled.
            series = old.cast(pl.Float64).scatter(np.flatnonzero(gaps), found)
        written = written.with_columns(series.alias(name))
    if is_text:
        return write_frame(path, written, layout.separator, has_names=layout.has_names)
    return write_frame(path, written)


def _spelled(
    values: list[Any],
    column: Any,  # noqa: ANN401 (polars)
    raw: Any,  # noqa: ANN401 (polars)
    layout: "_Layout",
    *,
    is_level: bool,
) -> list[str]:
    """Write values as a column of text writes them, and levels as it has them."""
    if is_level:
        known = dict(zip(_cells(column), raw.to_list(), strict=True))
        return [known.get(value, str(value)) for value in values]
    texts = [str(value) for value in values]
    return [text.replace(".", ",") for text in texts] if layout.has_commas else texts


def _with_levels(series: Any, rows: Array, values: list[Any]) -> Any:  # noqa: ANN401 (polars)
    """Put levels into some cells of a column."""
    pl = _polars()
    cells = _cells(series)
    for row, value in zip(rows.tolist(), values, strict=True):
        cells[row] = value
    filled = pl.Series(series.name, cells, strict=False)
    if series.dtype not in (pl.Null, pl.Categorical, pl.Enum):
        # A level of text does not fit into numbers, and a column without values is of none.
        with contextlib.suppress(pl.exceptions.PolarsError):
            return filled.cast(series.dtype)
    return filled


def write_frame(
    path: Path, frame: Frame, separator: str | None = None, *, has_names: bool = True
) -> Path:
    """Write a polars frame, of the format that the ending of the file names.

    Args:
        path: Path of the file, with an ending of :data:`SUFFIXES`.
        frame: The frame. NaN becomes an empty cell in files of text.
        separator: Separator of columns in files of text. None takes that of the format.
        has_names: Whether the first line of files of text holds the names of the columns.

    Returns:
        The path.

    Raises:
        ValueError: If the ending is another.
    """
    pl = _polars()
    kind = _format(path)
    if kind not in (*TEXT_FORMATS, *BINARY_FORMATS):
        raise ValueError(f"{path}: tables are written to {', '.join(SUFFIXES)} and .npy")

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        if kind == ".parquet":
            frame.write_parquet(temporary)
        elif kind in BINARY_FORMATS:
            frame.write_ipc(temporary)
        else:
            frame = frame.with_columns(pl.selectors.float().fill_nan(None))
            separator = separator or TEXT_FORMATS[kind]
            text = frame.write_csv(separator=separator, include_header=has_names).encode()
            is_packed = path.name.lower().endswith(".gz")
            content = gzip.compress(text) if is_packed else text
            Path(temporary).write_bytes(content)
    return path


def _polars() -> Any:  # noqa: ANN401 (a module)
    try:
        import polars
    except ImportError as error:
        raise ImportError(
            "tables in files need polars, of the extra 'tables': pip install 'equipoise[tables]'"
        ) from error
    return polars


def _format(path: Path) -> str:
    """Ending of a file without that of its compression."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    is_packed = path.name.lower().endswith(".gz")
    return "" if is_packed and suffix not in TEXT_FORMATS else suffix


def _read_text(
    path: Path, kind: str, limits: Limits, *, is_raw: bool = False
) -> tuple[Frame, "_Layout", list[str]]:
    """Read a file of text, or its cells as they are; return how it is laid out, and notes."""
    pl = _polars()
    content = _unpacked(path, limits) if path.name.lower().endswith(".gz") else None
    with path.open("rb") if content is None else io.BytesIO(content) as file:
        start = _start(file)
    if not start.strip():
        raise ValueError("it is empty")

    notes = []
    encoding = _encoding(start)
    if encoding != "utf-8":
        content = path.read_bytes() if content is None else content
        try:
            content = content.decode(encoding, errors="strict").encode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"its text is neither UTF-8 nor {encoding}: convert it to UTF-8 first, as 'iconv "
                "-f ENCODING -t UTF-8' does"
            ) from error
        start = _start(io.BytesIO(content))
        notes.append(f"the text is {encoding}")

    layout = _layout(start, kind)
    separator, has_names, has_commas, names = layout
    if separator != TEXT_FORMATS[kind]:
        notes.append(f"columns are separated by {separator!r}")
    if has_commas:
        notes.append("numbers have decimal commas")
    if not has_names:
        notes.append("the first line holds numbers, so that the columns have no names")

    options: dict[str, Any] = {
        "separator": separator,
        "has_header": has_names,
        "decimal_comma": has_commas,
        "null_values": list(MISSING),
        "try_parse_dates": True,
        "eol_char": "\n" if b"\n" in start else "\r",
    }
    if is_raw:
        options |= {"infer_schema": False, "null_values": None, "decimal_comma": False}
    source: Any = path if content is None else content
    try:
        frame = pl.read_csv(source, infer_schema_length=INFERRED_ROWS, **options)
    except (pl.exceptions.PolarsError, OSError) as error:
        if "utf-8" in str(error).lower() and encoding == "utf-8":
            raw = path.read_bytes() if content is None else content
            source = raw.decode("cp1252", errors="replace").encode()
            notes.append("the text is cp1252")
        if "truncate_ragged_lines" in str(error):
            raise ValueError(_ragged(source, separator, len(names))) from error
        # A number with a point after rows of whole numbers, for instance.
        frame = pl.read_csv(source, infer_schema_length=None, **options)

    if frame.width != len(names):
        raise ValueError(f"it has {frame.width} columns, and its first line {len(names)} names")
    # Those of polars keep doubled quotes.
    frame.columns = names
    note = _cut_off(source, separator, len(names))
    frame, note_of_end = _without_end(frame, source)
    return frame, layout, [*notes, *note, *note_of_end]


class _Layout(NamedTuple):
    """How a file of text is laid out."""

    separator: str
    has_names: bool
    has_commas: bool
    names: list[str]


def _layout(start: bytes, kind: str) -> _Layout:
    """Recognise the layout of a file of text by its first lines."""
    text = start.decode(errors="ignore").removeprefix("\ufeff")
    separator = _separator(text, TEXT_FORMATS[kind])
    rows = _sample(text, separator)
    has_names = not all(
        NUMBER.fullmatch(c.strip().replace(",", ".", 1)) for c in rows[0] if c.strip()
    )
    has_commas = separator != "," and _has_decimal_commas(rows[has_names:])
    names = [
        name.strip() if has_names and name.strip() else f"column {i}"
        for i, name in enumerate(rows[0])
    ]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"columns have the same name: {_listed(sorted(twice))}")
    return _Layout(separator, has_names, has_commas, names)


def _start(file: io.BufferedIOBase) -> bytes:
    """Read the first lines, at least three of them however long they are, if there are so many."""
    start = file.read(SAMPLE_BYTES)
    while start.count(b"\n") < 3 and len(start) < MOST_SAMPLE_BYTES:
        more = file.read(SAMPLE_BYTES)
        start += more
        if not more:
            break
    return start


def _cut_off(source: Path | bytes, separator: str, width: int) -> list[str]:
    """Say it if the last line seems to have been cut off: no line break, and too few cells."""
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - SAMPLE_BYTES))
        end = file.read()

    last = re.split(rb"[\r\n]", end)[-1].decode(errors="replace")
    n_cells = len(next(csv.reader([last], delimiter=separator), []))
    if not last.strip() or n_cells >= width or '"' in last:
        return []
    return [
        f"the last line has {n_cells} of {width} cells and no line break: it seems to be cut off, "
        f"and its other cells count as missing; it starts with {visible(repr(last), 50)}"
    ]


def _without_end(frame: Frame, source: Path | bytes) -> tuple[Frame, list[str]]:
    """Leave out empty lines at the end, which are no rows without values."""
    pl = _polars()
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - SAMPLE_BYTES))
        end = file.read()

    n_empty = len(re.sub(rb"\r\n?", b"\n", end[len(end.rstrip()) :])) - 1
    is_empty = frame.tail(max(0, n_empty)).select(pl.all_horizontal(pl.all().is_null())).to_series()
    # In a table of one column, an empty line may be a missing value.
    if n_empty < 1 or frame.width == 1 or not is_empty.all():
        return frame, []
    return frame.head(-n_empty), [f"{n_empty} empty lines at the end are left out"]


def _ragged(source: Path | bytes, separator: str, width: int) -> str:
    """Say which line has more cells than the first one."""
    content = source.read_bytes() if isinstance(source, Path) else source
    text = io.StringIO(content.decode(errors="replace"), newline=None)
    lines = csv.reader(text, delimiter=separator)
    try:
        for row in lines:
            if len(row) > width:
                return (
                    f"line {lines.line_num} has {len(row)} cells, and the first one {width}, where "
                    f"{separator!r} separates them; it starts with {visible(repr(row[0]), 50)}"
                )
    except csv.Error as error:
        return f"line {lines.line_num} cannot be read ({error})"
    return f"a line has more cells than the first one, {width}, where {separator!r} separates them"


def _unpacked(path: Path, limits: Limits) -> bytes:
    """Unpack a gzip file of text, up to the limit."""
    most = 2 * path.stat().st_size + limits.max_bytes
    try:
        with gzip.open(path) as file:
            content = file.read(most + 1)
    except (EOFError, OSError) as error:
        raise ValueError(f"is damaged or incomplete ({error})") from error
    limits.check_unpacked(path, len(content))
    return content


def _encoding(start: bytes) -> str:
    """Guess an encoding from the first bytes."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        # The sample may end within a character, which this decoder waits for.
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def _sample(text: str, separator: str) -> list[list[str]]:
    """Parse the first lines."""
    lines = csv.reader(io.StringIO(text, newline=None), delimiter=separator)
    rows = [row for row, _ in zip(lines, range(SAMPLE_LINES), strict=False) if row]
    # The last line of a sample may be cut off.
    return rows[:-1] if len(rows) > 2 else rows


def _separator(text: str, usual: str) -> str:
    """Find the separator that divides the first lines into most columns, equally many in each."""

    def n_columns(separator: str) -> int:
        try:
            widths = {len(row) for row in _sample(text, separator)}
        except csv.Error:
            return 0
        return widths.pop() if len(widths) == 1 else 0

    widths = {separator: n_columns(separator) for separator in (usual, *SEPARATORS)}
    best = max(widths, key=lambda separator: widths[separator])
    return best if widths[best] > 1 else usual


def _has_decimal_commas(rows: list[list[str]]) -> bool:
    cells = [cell.strip() for row in rows for cell in row]
    commas = sum(bool(DECIMAL_COMMA.fullmatch(cell)) for cell in cells)
    points = sum("." in cell and bool(NUMBER.fullmatch(cell)) for cell in cells)
    return commas > points


def _columns_of(frame: Frame) -> tuple[Frame, tuple[Column, ...]]:
    """Say what each column holds, and make numbers of text that are numbers."""
    pl = _polars()
    columns = []
    for name in frame.columns:
        series = frame[name]
        note = ""
        if series.dtype == pl.String:
            series, kind, note = _of_text(series)
            frame = frame.with_columns(series)
        elif series.dtype == pl.Null or series.null_count() == len(series):
            kind = "empty"
        elif series.dtype == pl.Boolean:
            kind = "true or false"
        elif series.dtype.is_temporal():
            kind = "dates"
        elif series.dtype.is_integer():
            kind = "whole numbers"
        elif series.dtype.is_numeric():
            if not series.dtype.is_float():
                series = series.cast(pl.Float64)  # of Decimal
                frame = frame.with_columns(series)
            kind = "numbers"
        elif series.dtype in (pl.Categorical, pl.Enum):
            kind = "text"
        else:
            kind = str(series.dtype)
        columns.append(_described(name, series, kind, note))
    return frame, tuple(columns)


def _of_text(series: Any) -> tuple[Any, str, str]:  # noqa: ANN401 (polars)
    """Take a column of text for numbers if all of its cells are numbers; say what it is."""
    pl = _polars()
    stripped = _stripped(series)
    present = stripped.drop_nulls()
    if not len(present):
        return stripped, "empty", ""

    numbers = stripped.cast(pl.Float64, strict=False)
    bad = (stripped.is_not_null() & numbers.is_null()).arg_true()
    if not len(bad):
        return numbers, "numbers", ""
    if all(DATE.fullmatch(cell) for cell in present.head(SAMPLE_LINES)):
        return series, "dates", f"such as {present[0]!r}"

    first = int(bad[0])
    if 2 * len(bad) <= len(present):
        note = (
            f"{len(bad):,} of {len(present):,} cells are no numbers, the first is "
            f"{stripped[first][:30]!r} in row {first}"
        )
        return series, "numbers and text", note
    return series, "text", f"such as {present[0][:30]!r}"


def _stripped(series: Any) -> Any:  # noqa: ANN401 (polars)
    """Leave out spaces around text, and cells that stand for missing values."""
    stripped = series.str.strip_chars()
    return stripped.set(stripped.is_in(list(MISSING)), None)


def _cells(series: Any) -> list[Any]:  # noqa: ANN401 (polars)
    """Values of a column, None where they are missing."""
    pl = _polars()
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if series.dtype == pl.String:
        series = _stripped(series)
    if series.dtype.is_float():
        series = series.fill_nan(None)
    cells: list[Any] = series.to_list()
    return cells


def _described(name: str, series: Any, kind: str, note: str) -> Column:  # noqa: ANN401 (polars)
    n_missing = series.null_count()
    if kind not in ("numbers", "whole numbers", "true or false"):
        return Column(name, kind, n_missing, note=note)

    if kind == "numbers":
        n_missing += int(series.is_nan().sum() or 0)
        series = series.fill_nan(None)
    if n_missing == len(series):
        return Column(name, "empty", n_missing)
    return Column(name, kind, n_missing, float(series.min()), float(series.max()), note)


def index_notes(table: Table) -> list[str]:
    """Notice a column that only counts the rows, which spreadsheets and pandas write.

    Args:
        table: A table, of the columns that are learned.

    Returns:
        What there is to say.
    """
    frame, first = table.frame, table.columns[0]
    n = frame.height
    if first.kind != "whole numbers" or first.n_missing or n < 2:
        return []
    steps = np.diff(frame[first.name].to_numpy())
    if not (steps == 1).all():
        return []
    return [
        f"the column {first.name!r} counts the rows; if it is an index, leave it out by "
        f"--drop {_quoted(first.name)}"
    ]


ADVICE = {
    "dates": "dates in {}: give numbers in their place, such as days since the first",
    "text": "text in {}, where the model has numbers",
    "numbers and text": "text in {}, among numbers",
    "names": "text in {}",
    "empty": "no value at all in {}",
}
"""What is said of the columns that hold no numbers, by what they hold."""


def _problem_of(columns: list[Column], *, for_model: bool) -> str:
    """Name columns that hold no numbers, say what they hold, and what to do."""
    problems = []
    for kind in dict.fromkeys(column.kind for column in columns):
        found = [column for column in columns if column.kind == kind]
        listed = _listed([column.name for column in found])
        notes = "; ".join(column.note for column in found[:3] if column.note)
        if notes:
            listed += f" ({notes})"
        problems.append(ADVICE.get(kind, f"values of the type {kind} in {{}}").format(listed))

    few = " Where a cell stands for a missing value, leave it empty." if notes else ""
    if for_model:
        return f"{'; '.join(problems)}. The model was trained on these columns.{few}"
    names = " ".join(_quoted(column.name) for column in columns[:LISTED])
    text = [c for c in columns if c.kind in ("text", "numbers and text", "names")]
    as_levels = " ".join(_quoted(column.name) for column in text[:LISTED])
    learn = f" To learn them as categories: --categorical {as_levels}." if text else ""
    return f"{'; '.join(problems)}. To leave them out: --drop {names}.{learn}{few}"


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    """The first names, each in quotes."""
    shown = [repr(visible(name, 50)) for name in list(names)[:LISTED]]
    if len(names) > LISTED:
        shown.append(f"and {len(names) - LISTED} more")
    return ", ".join(shown)


def _quoted(name: str) -> str:
    """Quote a name for the shell, if it needs that."""
    return name if re.fullmatch(r"[\w.-]+", name) else f"'{name}'"
