r"""Figures over several seeds: their mean, both errors, and which of them differ.

A figure v of S trainings, which differ in their seed alone, has two errors. The one over seeds is
the standard error of the mean of its S values. The one over test examples or samples is the mean of
the standard errors of the S figures: all trainings are judged by the same examples, so this error
does not fall with S. (By Minkowski's inequality it is the largest that the mean can have, whatever
the correlation of the S figures over examples.)

Two figures a and b *differ* if their difference is larger than two of both errors combined,

.. math:: |\bar a - \bar b| > 2 \sqrt{e^2 + e_a^2 + e_b^2}, \qquad
          e = \mathrm{std}_s(a_s - b_s) / \sqrt S,

where e is the standard error over seeds of the difference at the same seed s, since a seed gives
all methods the same start and order of examples. e_a and e_b are the errors over examples. They are
taken as independent, which is cautious: figures of the same examples mostly err together.

With few seeds e itself is uncertain. Of normal differences with mean 0, as many as
:math:`1 - 2 / \sqrt 6` = 18 % have a mean larger than 2 e if S = 3, and fewer only as far as the
errors over examples add to e.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from equipoise.estimate import Estimate

ERRORS = 2
"""Combined errors that a difference must be larger than."""


def over_seeds(contents: Sequence[Any]) -> Any:  # noqa: ANN401 (any JSON value)
    """Put the figures of several seeds together.

    Args:
        contents: JSON values of the same form, one for each seed.

    Returns:
        A value of this form. Of estimates (``{"value", "standard_error", "n"}``), and of numbers
        that are not equal for all seeds, it has the mean, as ``{"value", "error_over_seeds",
        "standard_error", "n", "of_seeds"}``, where ``of_seeds`` is the list of the seeds' values.
        What else is equal is kept as it is. It has None where a seed has no figure.

    Raises:
        ValueError: If the seeds have values that are neither equal nor figures.

    Example:
        >>> over_seeds([{"K": 8, "mse": 1.0}, {"K": 8, "mse": 3.0}])
        {'K': 8, 'mse': {'value': 2.0, 'error_over_seeds': 1.0, 'of_seeds': [1.0, 3.0]}}
    """
    first, *others = contents
    if not others:
        return first

    if all(isinstance(content, dict) for content in contents):
        if all("value" in content for content in contents):
            return _mean(contents)

        keys = dict.fromkeys(key for content in contents for key in content)
        return {key: over_seeds([content.get(key) for content in contents]) for key in keys}

    if all(content == first for content in others):
        return first
    if any(content is None for content in contents):
        return None
    if all(_is_number(content) for content in contents):
        return _mean([{"value": content} for content in contents])
    raise ValueError(f"these figures of several seeds cannot be averaged: {list(contents)}")


def _mean(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of a figure over seeds, with both errors, and what else is equal for all seeds."""
    values = [figure["value"] for figure in figures]
    value, error, _ = Estimate.of_mean(np.array(values, dtype=np.float64))
    mean: dict[str, Any] = {"value": value, "error_over_seeds": error}

    if all(figure.get("standard_error") is not None for figure in figures):
        mean["standard_error"] = float(np.mean([figure["standard_error"] for figure in figures]))

    common = {
        key: part
        for key, part in figures[0].items()
        if key not in ("value", "standard_error") and all(row.get(key) == part for row in figures)
    }
    return mean | common | {"of_seeds": values}


def of_seeds(function: Callable[..., float], *figures: Any) -> Any:  # noqa: ANN401 (JSON values)
    """Compute a figure from others, for each seed.

    Args:
        function: Function of the values.
        *figures: Figures over seeds, estimates or numbers.

    Returns:
        The figure over seeds; a number, if none of the others depends on the seed.

    Example:
        >>> both = over_seeds([1.0, 3.0])
        >>> of_seeds(lambda a, b: a / b, both, 2.0)["of_seeds"]
        [0.5, 1.5]
        >>> of_seeds(lambda a, b: a / b, 1.0, {"value": 2.0, "standard_error": 0.1})
        0.5
    """
    values = np.broadcast_arrays(*(_values(figure) for figure in figures))
    of_each = [function(*map(float, row)) for row in zip(*values, strict=True)]
    if not any(has_seeds(figure) for figure in figures):
        return of_each[0]

    return _mean([{"value": value} for value in of_each])


def has_seeds(figure: Any) -> bool:  # noqa: ANN401 (any JSON value)
    """Tell whether a JSON value is a figure over several seeds.

    Args:
        figure: The value.

    Returns:
        Whether it has a value for each seed.
    """
    return isinstance(figure, dict) and "of_seeds" in figure


def is_different(a: Any, b: Any) -> bool:  # noqa: ANN401 (JSON values)
    """Tell whether two figures differ by more than two of both errors combined.

    The equation is at the top of this module. An error that is not known counts as 0.

    Args:
        a: A figure over seeds, or an estimate or a number that is the same for all seeds.
        b: The other.

    Returns:
        Whether they do.

    Example:
        >>> a = over_seeds([{"value": v, "standard_error": 0.3} for v in (5.0, 6.0, 7.0)])
        >>> b = over_seeds([{"value": v, "standard_error": 0.4} for v in (4.0, 5.0, 6.0)])
        >>> is_different(a, b)  # by 1 at every seed, and 2 sqrt(0 + .09 + .16) = 1
        False
    """
    mean, error, _ = Estimate.of_mean(_values(a) - _values(b))
    combined = math.hypot(error or 0, _error_over_examples(a), _error_over_examples(b))
    return abs(mean) > ERRORS * combined


def error_over_seeds(figure: Any) -> float:  # noqa: ANN401 (a JSON value)
    """The standard error over seeds.

    Args:
        figure: A figure over seeds, an estimate or a number.

    Returns:
        The error, 0 for a figure of one training or one that is the same for all seeds.
    """
    return float(figure["error_over_seeds"]) if has_seeds(figure) else 0.0


def _values(figure: Any) -> np.ndarray:  # noqa: ANN401 (a JSON value)
    """The values of a figure over seeds, (S,), or its one value, (1,)."""
    if has_seeds(figure):
        return np.array(figure["of_seeds"], dtype=np.float64)

    return np.array([value_of(figure)], dtype=np.float64)


def value_of(figure: Any) -> float:  # noqa: ANN401 (a JSON value)
    """The value of a figure, or its mean over seeds.

    Args:
        figure: A figure over seeds, an estimate or a number.

    Returns:
        The value.
    """
    return float(figure["value"] if isinstance(figure, dict) else figure)


def _error_over_examples(figure: Any) -> float:  # noqa: ANN401 (a JSON value)
    """The standard error over examples, or 0 if it is not known."""
    return float(figure.get("standard_error") or 0) if isinstance(figure, dict) else 0.0


def _is_number(value: Any) -> bool:  # noqa: ANN401 (a JSON value)
    return isinstance(value, int | float) and not isinstance(value, bool)
