"""Which columns of a table are categories, and the numbers of their levels.

A column of text or of flags is one of categories, and so is one that is named. Columns of numbers
are not guessed at.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from equipoise.data.dataset import Array
from equipoise.levels import Level, level_codes, sorted_levels
from equipoise.text import visible

FEW_LEVELS, MOST_LEVELS = 10, 1000
"""Levels of a column of text that are no question, and most that it may have if nobody names it."""
SHOWN_LEVELS = 5
TIMES = ("date", "time", "duration", "period")
"""What the types of dates, times and periods begin with, in pandas and polars."""
AS_MISSING = "they are treated as missing"
"""End of the note on values that a model does not know."""

Frame: TypeAlias = Any  # of pandas or polars, which are optional
Categorical: TypeAlias = Sequence[str] | bool
"""Names of columns that are categories besides those of text and flags; True for these alone, and
False for none."""


class Encoded(NamedTuple):
    """A column of categories as numbers.

    Args:
        codes: Number of the level of each row, NaN where there is none, (N,), float64.
        levels: The levels.
        note: What a user should read, empty if there is nothing.
    """

    codes: Array
    levels: tuple[Level, ...]
    note: str = ""


def encode(
    name: str,
    values: Sequence[Any],
    levels: Sequence[Level] | None = None,
    *,
    strict: bool = False,
) -> Encoded:
    """Number the levels of a column.

    Args:
        name: Name of the column, for messages.
        values: Its values, None where they are missing.
        levels: The levels of a model. Values that are none of these become missing, and a note
            names them. None takes those that occur.
        strict: Whether they are an error.

    Returns:
        The column, and its levels.

    Raises:
        ValueError: If a value is not among the levels of the model, and ``strict``.
    """
    if levels is None:
        levels = sorted_levels(values)
        refuse_fractions(name, levels)
    found = level_codes(values, levels)
    codes: Array = np.array([np.nan if code is None else code for code in found], np.float64)

    unseen = [
        row
        for row, (code, value) in enumerate(zip(found, values, strict=True))
        if code is None and value is not None
    ]
    if not unseen:
        return Encoded(codes, tuple(levels))
    first = visible(repr(values[unseen[0]]), 50)
    what = f"{len(unseen):,} values of the column {name!r} are no levels of the model's"
    what = f"{what}, the first is {first} in row {unseen[0]}"
    if strict:
        raise ValueError(f"{what}; it knows {_shown(levels)}")
    return Encoded(codes, tuple(levels), f"{what}: {AS_MISSING}")


def refuse_fractions(name: str, levels: Sequence[Level]) -> None:
    """Refuse numbers that are no whole ones as levels.

    Args:
        name: Name of the column.
        levels: What occurs in it.

    Raises:
        ValueError: If one of them has a fraction.
    """
    fractions = [v for v in levels if isinstance(v, float) and not v.is_integer()]
    if fractions:
        raise ValueError(
            f"the column {name!r} holds numbers with fractions, such as {fractions[0]:g}, which "
            "are no categories: take it as it is, or round it first"
        )


def problem_of_levels(n_levels: int, n_values: int) -> str | None:
    """Say why a column of text seems to hold names, and no categories.

    Args:
        n_levels: Number of different values.
        n_values: Number of values that are not missing.

    Returns:
        A clause; None if there are at most 10 levels, or at most 1000 of which each occurs twice on
        average.
    """
    if n_levels > FEW_LEVELS and (2 * n_levels > n_values or n_levels > MOST_LEVELS):
        return f"{n_levels:,} different values in {n_values:,} rows, like names"
    return None


def describe_levels(columns: Mapping[str, Sequence[Level]]) -> str:
    """Say which columns are categories, for a note.

    Args:
        columns: Levels by the name of the column.

    Returns:
        A clause such as "categories: 'kind' (3 levels)".
    """
    parts = [f"{visible(name, 50)!r} ({_count(levels)})" for name, levels in columns.items()]
    shown = ", ".join(parts[:10]) + (f" and {len(parts) - 10} more" if len(parts) > 10 else "")
    return f"categories: {shown}"


def _count(levels: Sequence[Level]) -> str:
    return "1 level" if len(levels) == 1 else f"{len(levels):,} levels"


def _shown(levels: Sequence[Level]) -> str:
    names = [visible(repr(level), 30) for level in levels[:SHOWN_LEVELS]]
    return ", ".join(names) + (", ..." if len(levels) > SHOWN_LEVELS else "")


class EncodedFrame(NamedTuple):
    """A data frame with numbers in the place of categories.

    Args:
        frame: The frame, of the same library.
        levels: Levels by the number of the column.
        notes: What a user should read.
    """

    frame: Frame
    levels: dict[int, tuple[Level, ...]]
    notes: tuple[str, ...] = ()


def as_frame(source: Any) -> Any:  # noqa: ANN401 (whatever holds data)
    """Make a data frame of what only stands for one.

    Args:
        source: Anything.

    Returns:
        A table of Arrow as a frame of polars, or of pandas if polars is not installed. All else as
        it is.

    Raises:
        ValueError: If it is a lazy frame, which has no values yet.
    """
    kind = type(source)
    if kind.__name__ == "LazyFrame":
        raise ValueError("a lazy frame; give what its method collect() returns")
    if kind.__module__.partition(".")[0] != "pyarrow" or not hasattr(source, "column_names"):
        return source
    try:
        import polars
    except ImportError:
        return source.to_pandas()
    return polars.from_arrow(source)


def encode_frame(
    frame: Frame,
    categorical: Categorical = True,
    levels: Mapping[int, tuple[Level, ...]] | None = None,
    *,
    strict: bool = False,
) -> EncodedFrame:
    """Put the numbers of levels in the place of the categories of a data frame.

    Args:
        frame: A frame of pandas or polars.
        categorical: Which columns are categories, if a model does not say so.
        levels: The levels of a model by the number of the column.
        strict: Whether a value that is not among them is an error.

    Returns:
        The frame, and the levels of its columns.

    Raises:
        ValueError: If there is no column of a name, if a column of text seems to hold names of
            rows, or if a value is not known, and ``strict``.
    """
    names = list(frame.columns)
    asked = set() if isinstance(categorical, bool) else set(categorical)
    if absent := sorted(asked - set(names)):
        raise ValueError(f"there is no column {absent[0]!r} among {names[:10]}")

    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"several columns have the name {twice!r}: give each a name of its own")

    columns: dict[Any, Array] = {}
    found: dict[int, tuple[Level, ...]] = {}
    notes = []
    for number, name in enumerate(names):
        series = frame[name]
        if str(series.dtype).lower().startswith(TIMES):
            raise ValueError(
                f"the column {name!r} holds dates or times, which are not learned: leave it out, "
                "or give a number in its place, such as days since the first"
            )
        is_known = levels is not None and number in levels
        is_chosen = name in asked or (categorical is not False and _is_category(series))
        if not is_known and (levels is not None or not is_chosen):
            continue

        values = _values(series)
        encoded = encode(str(name), values, levels[number] if levels else None, strict=strict)
        n_values = int((~np.isnan(encoded.codes)).sum())
        if not n_values and not is_known:
            continue
        is_text = any(isinstance(level, str) for level in encoded.levels)
        problem = problem_of_levels(len(encoded.levels), n_values)
        if problem and is_text and not is_known and name not in asked:
            raise ValueError(
                f"the column {name!r} has {problem}: leave it out, or name it as categorical"
            )
        columns[name], found[number] = encoded.codes, encoded.levels
        notes += [encoded.note] if encoded.note else []

    if columns:
        frame = _replaced(frame, columns)
    if found and levels is None:
        notes.append(describe_levels({str(names[i]): each for i, each in found.items()}))
    return EncodedFrame(frame, found, tuple(notes))


def _is_category(series: Any) -> bool:  # noqa: ANN401 (of pandas or polars)
    """Whether a column holds text or flags, or has the type of categories."""
    kind = str(series.dtype).lower()
    if kind.startswith(("bool", "categor", "enum", "str", "utf8", "large_string", "dictionary")):
        return True
    if kind != "object":
        return False
    present = [value for value in _values(series) if value is not None]
    return bool(present) and all(isinstance(value, str | bool | np.bool_) for value in present)


def _values(series: Any) -> list[Any]:  # noqa: ANN401 (of pandas or polars)
    """Values of a column, None where they are missing."""
    values = series.to_list()
    return [None if _is_missing(value) else value for value in values]


def _is_missing(value: Any) -> bool:  # noqa: ANN401 (a cell)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def _replaced(frame: Frame, columns: Mapping[Any, Array]) -> Frame:
    """Put other columns in place."""
    if hasattr(frame, "with_columns"):
        import polars as pl

        return frame.with_columns([pl.Series(name, codes) for name, codes in columns.items()])
    frame = frame.copy()
    for name, codes in columns.items():
        frame[name] = codes
    return frame


def new_frame(library: str, columns: Mapping[str, Any], like: object = None) -> Frame:
    """Make a data frame.

    Args:
        library: "pandas" or "polars".
        columns: Values by column.
        like: What the rows come from. Those of a frame of pandas keep its index.

    Returns:
        The frame.
    """
    frame = importlib.import_module(library).DataFrame(dict(columns))
    if library == "pandas" and isinstance(like, type(frame)) and len(like) == len(frame):
        frame.index = like.index
    return frame
