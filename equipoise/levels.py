"""Levels of categories: their order, their numbers, and the values that they stand for.

Without torch, so that loading data stays light; ``categories.py`` has their likelihood.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Level: TypeAlias = str | bool | int | float
Levels: TypeAlias = Mapping[int, tuple[Level, ...]]
"""The levels of each column of categories, by its number, in their order."""


def sorted_levels(values: Iterable[Any]) -> tuple[Level, ...]:
    """Order the levels that occur, so that the order of the rows does not matter.

    Args:
        values: Values of one kind, or text and others. None stands for what is missing.

    Returns:
        The different values: False before True, numbers by size, text by its characters.

    Example:
        >>> sorted_levels(["b", "a", None, "b"]), sorted_levels([2.0, 1.0])
        (('a', 'b'), (1, 2))
    """
    levels = {_plain(value) for value in values if value is not None}
    return tuple(sorted(levels, key=lambda level: (isinstance(level, str), level)))


def level_codes(values: Iterable[Any], levels: Sequence[Level]) -> list[int | None]:
    """Find the number of each value's level.

    Args:
        values: Values. Numbers and flags are found among levels that are text, and flags among
            those that are numbers, because files of text tell them apart differently.
        levels: The levels.

    Returns:
        The numbers. None where there is no such level.

    Example:
        >>> level_codes(["b", "z", None], ("a", "b")), level_codes(["true", 0], (False, True))
        ([1, None, None], [1, 0])
    """
    exact = {level: code for code, level in enumerate(levels)}
    alike = {_key(level): code for code, level in enumerate(levels)}
    known: dict[Any, int | None] = {}
    codes = []
    for value in values:
        plain = None if value is None else _plain(value)
        if plain not in known:
            known[plain] = None if plain is None else exact.get(plain, alike.get(_key(plain)))
        codes.append(known[plain])
    return codes


def level_values(codes: Iterable[float], levels: Sequence[Level]) -> list[Level | None]:
    """Return the levels that codes stand for.

    Args:
        codes: Numbers of levels, NaN where there is none.
        levels: The levels.

    Returns:
        Levels, None where there is none.

    Example:
        >>> level_values([1.0, float("nan")], ("a", "b"))
        ['b', None]
    """
    return [None if code != code else levels[round(code)] for code in codes]


def _plain(value: Any) -> Level:  # noqa: ANN401 (a cell of a frame)
    """Make a plain Python value of a cell; whole numbers are integers."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, str | bool | int):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


def _key(level: Level) -> str:
    """What a level is in any dress."""
    text = str(level).strip().lower() if isinstance(level, bool | str) else str(level)
    return {"true": "1", "false": "0"}.get(text, str(level).strip())
