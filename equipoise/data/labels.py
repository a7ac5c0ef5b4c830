"""Labels of examples: from the values that a source has to numbers and names."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Int64

from equipoise.data.dataset import Array
from equipoise.text import visible

MAX_LABELS = 256
"""Most labels, of each of which the networks read a number or a plane."""
FEW = 10
"""Number of training examples below which a label is pointed out."""
SHOWN = 10


def name_of(value: Any) -> str | None:  # noqa: ANN401 (any label)
    """Name the label that a value stands for.

    Args:
        value: Text, a whole number, or true or false. None, NaN, an empty text and negative numbers
            stand for an unknown label.

    Returns:
        The name, or None if the label is unknown.

    Raises:
        ValueError: If the value is something else, such as 0.37.

    Example:
        >>> name_of("cat"), name_of(np.float64(3.0)), name_of(float("nan")), name_of(-1)
        ('cat', '3', None, None)
    """
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, Real):
        number = float(value)
        if math.isnan(number) or number < 0:
            return None
        if not number.is_integer():
            raise ValueError(f"{number:g} is no label: give whole numbers or names")
        return str(int(value))  # type: ignore[call-overload]
    if isinstance(value, str):
        return value.strip() or None
    raise ValueError(f"{visible(repr(value), 50)} is no label: give whole numbers or names")


def names_of(values: Array | Sequence[Any], source: str) -> list[str | None]:
    """Name the label of each example.

    Args:
        values: One value per example, (N,).
        source: Where they come from, for the message.

    Returns:
        The names, None where a label is unknown.

    Raises:
        ValueError: If a value is no label. It names the first, and its row.
    """
    array = values if isinstance(values, np.ndarray) else np.array(list(values), dtype=object)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{source}: labels of shape {array.shape}; expected one for each example")
    found = []
    for row, value in enumerate(array):
        try:
            found.append(name_of(value))
        except ValueError as error:
            raise ValueError(f"{source}: row {row}: {error}") from error
    return found


def choose_names(parts: Sequence[list[str | None]], source: str) -> tuple[str, ...]:
    """List the labels of a data set.

    Args:
        parts: Names of the labels of the examples of each part.
        source: Where they come from, for the message.

    Returns:
        The labels, whole numbers by size and other names by letter.

    Raises:
        ValueError: If there are fewer than two, or more than 256.
    """
    names = {name for part in parts for name in part if name is not None}
    if not 2 <= len(names) <= MAX_LABELS:
        shown = ", ".join(visible(name, 30) for name in sorted(names)[:SHOWN])
        raise ValueError(
            f"{source}: {len(names)} different labels ({shown or 'none'}); a conditional model "
            f"takes 2 to {MAX_LABELS}: leave the label out, or group values"
        )
    numbers = sorted((name for name in names if name.isdecimal()), key=int)
    return (*numbers, *sorted(names.difference(numbers)))


def number(names: list[str | None], labels: Sequence[str], source: str) -> Int64[np.ndarray, " n"]:
    """Number the labels of examples.

    Args:
        names: The label of each example, None where it is unknown.
        labels: The labels, in the order of their numbers.
        source: Where they come from, for the message.

    Returns:
        Numbers, (N,), -1 where a label is unknown.

    Raises:
        ValueError: If a label is not among them. It names the first, and its row.
    """
    numbers = {name: k for k, name in enumerate(labels)}
    for row, name in enumerate(names):
        if name is not None and name not in numbers:
            shown = ", ".join(visible(label, 30) for label in labels[:50])
            raise ValueError(
                f"{source}: row {row} has the label {visible(name, 50)!r}, which the model does "
                f"not know; it knows {shown}. Leave the cell empty where a label is unknown"
            )
    return np.array([-1 if name is None else numbers[name] for name in names], np.int64)


def describe_labels(labels: Sequence[str], training: Int64[np.ndarray, " n"]) -> str:
    """Say which labels there are, how many examples have none, and which are rare.

    Args:
        labels: The labels.
        training: Their numbers for the training examples.

    Returns:
        A sentence.
    """
    counts = np.bincount(training[training >= 0], minlength=len(labels))
    shown = [f"{visible(n, 30)} {c:,}" for n, c in zip(labels[:SHOWN], counts, strict=False)]
    text = f"the model is conditional on {len(labels)} labels, with training examples: "
    text += ", ".join(shown) + (", ..." if len(labels) > SHOWN else "")
    n_unknown = int((training < 0).sum())
    if n_unknown:
        text += f"; {n_unknown:,} have none"
    rare = [visible(n, 30) for n, c in zip(labels, counts, strict=True) if c < FEW]
    if rare:
        text += f"; few have {', '.join(rare[:SHOWN])}, whose codes are borrowed from the others"
    return text
