r"""Thresholds with a known rate of false alarms, by the scores of held-out examples.

An example is called odd if few held-out examples have a score as low as its own. If it is like
them, and they decided on nothing else, this happens at most at the chosen rate, whatever the
distribution of the scores. Vovk, Gammerman and Shafer (2005), *Algorithmic learning in a random
world*; Bates et al. (2023), *Testing for outliers with conformal p-values*.
"""

import math

import numpy as np
from jaxtyping import Float64

FALSE_ALARM_RATE = 0.05
"""The rate if none is chosen."""
ROUNDING = 1e-9
"""Products of rates and numbers that are meant to be whole are so up to this."""


def conformal_p_values(
    scores: Float64[np.ndarray, " n"], held_out: Float64[np.ndarray, " m"]
) -> Float64[np.ndarray, " n"]:
    r"""Share of held-out scores that are as low, with the row itself counted among them.

    .. math:: p = \frac{1 + \#\{j : s_j \le s\}}{1 + m}

    Of rows like the held-out ones, at most a share a has a p-value of at most a.

    Args:
        scores: Scores of rows, lower for odder ones.
        held_out: Scores of rows that the model was not trained on.

    Returns:
        The p-values, at least 1 / (1 + m).

    Example:
        >>> conformal_p_values(np.array([-9.0, 2.5]), np.array([1.0, 2.0, 3.0]))
        array([0.25, 0.75])
    """
    n_as_odd = np.searchsorted(np.sort(held_out), scores, side="right")
    p_values: Float64[np.ndarray, " n"] = (1 + n_as_odd) / (1 + len(held_out))
    return p_values


def fewest_held_out(rate: float) -> int:
    """Count the held-out examples that a rate of false alarms takes at least.

    Args:
        rate: The rate, above 0 and below 1.

    Returns:
        The smallest m whose smallest p-value, 1 / (1 + m), is at most the rate.

    Example:
        >>> fewest_held_out(0.05), fewest_held_out(0.01)
        (19, 99)
    """
    return math.ceil(1 / rate - 1 - ROUNDING)


def conformal_threshold(held_out: Float64[np.ndarray, " m"], rate: float) -> float:
    r"""Find the score below which the p-value is at most the rate.

    .. math:: p(s) \le a \Leftrightarrow s < s_{(k)}, \qquad k = \lfloor a (1 + m) \rfloor

    Here :math:`s_{(k)}` is the k-th smallest held-out score.

    Args:
        held_out: Scores of rows that the model was not trained on.
        rate: Rate a of false alarms, above 0 and below 1.

    Returns:
        The threshold, a finite number: a score of minus infinity is always below it.

    Raises:
        ValueError: If the rate is out of its domain, or below the smallest p-value that so few
            held-out scores can give.

    Example:
        >>> conformal_threshold(np.arange(19.0), 0.05), conformal_threshold(np.arange(19.0), 0.1)
        (0.0, 1.0)
    """
    check_rate(rate, len(held_out))
    k = math.floor(rate * (1 + len(held_out)) + ROUNDING)
    threshold = np.sort(held_out)[min(k, len(held_out)) - 1]
    # What has no density left is odd, even if some of the held-out examples have none.
    return float(max(threshold, np.finfo(np.float64).min))


def check_rate(rate: float, n_held_out: int) -> None:
    """Refuse a rate of false alarms that no p-value reaches.

    Args:
        rate: The rate.
        n_held_out: Number of held-out examples.

    Raises:
        ValueError: If the rate is out of its domain or too small. The message says what to do.
    """
    if not 0 < rate < 1:
        raise ValueError(f"a false-alarm rate must be above 0 and below 1, got {rate:g}")
    if n_held_out < fewest_held_out(rate):
        smallest = 1 / (1 + n_held_out)
        raise ValueError(
            f"a false-alarm rate of {rate:g} takes at least {fewest_held_out(rate)} held-out "
            f"rows, and there are {n_held_out}, whose smallest p-value is {smallest:.3g}; "
            "give a higher rate or more data"
        )
