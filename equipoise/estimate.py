"""A figure with its uncertainty: what every measure of this library returns."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor


class Estimate(NamedTuple):
    """A figure found from a finite number of examples or draws.

    Args:
        value: the estimate.
        standard_error: its standard deviation over repetitions, in the unit of ``value``; None where it is not known.
        n: independent examples or draws that it rests on.
    """

    value: float
    standard_error: float | None
    n: int

    @classmethod
    def of_mean(cls, draws: Float[Tensor, " n"] | Float[np.ndarray, " n"]) -> "Estimate":
        """Estimate an expectation by the mean of independent draws.

        Args:
            draws: (n,), at least one.

        Returns:
            Mean and standard deviation / sqrt(n); the standard error of a single draw is None.

        Raises:
            ValueError: if there are no draws.

        Example:
            >>> Estimate.of_mean(np.array([1.0, 2.0, 3.0]))
            Estimate(value=2.0, standard_error=0.5773502691896258, n=3)
        """
        values = (
            draws.detach().double().cpu().numpy()
            if isinstance(draws, Tensor)
            else draws.astype(np.float64)
        )
        n = len(values)
        if n == 0:
            raise ValueError("the mean of no draws is not defined; give at least one")
        return cls(
            float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None, n
        )


def jackknife(
    statistic: Callable[[NDArray[np.int64]], float], n: int, groups: int = 10
) -> Estimate:
    r"""Estimate a statistic of n independent examples, with the delete-a-group jackknife for its standard error.

    .. math:: \mathrm{s.e.}^2 = \frac{g - 1}{g} \sum_j (\theta_{(j)} - \bar\theta_{(\cdot)})^2

    where :math:`\theta_{(j)}` leaves out every g-th example from the j-th on. For statistics that have no standard
    error in closed form and whose parts hang together within an example, such as the pixels of an image.
    Efron and Stein (1981), *The jackknife estimate of variance*.

    Args:
        statistic: of a subset of the examples, given by their indices, (k,).
        n: examples.
        groups: g; fewer if there are fewer examples than that.

    Returns:
        The statistic of all examples and its standard error, which is None for a single example.

    Example:
        >>> values = np.array([1.0, 2.0, 3.0])
        >>> jackknife(lambda rows: float(values[rows].mean()), 3)  # of a mean, that of the closed form
        Estimate(value=2.0, standard_error=0.5773502691896257, n=3)
    """
    rows: Int64[np.ndarray, " n"] = np.arange(n, dtype=np.int64)
    value, g = float(statistic(rows)), min(groups, n)
    if g < 2:
        return Estimate(value, None, n)
    left_out = np.array([statistic(rows[rows % g != j]) for j in range(g)])
    return Estimate(
        value, math.sqrt((g - 1) / g * float(np.square(left_out - left_out.mean()).sum())), n
    )
