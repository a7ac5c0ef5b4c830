"""A figure with its uncertainty, the result of every measure of this library."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor


class Estimate(NamedTuple):
    """A figure that is computed from a finite number of examples or draws.

    Args:
        value: The estimate.
        standard_error: Standard deviation of the estimate over repetitions, in the unit of
            ``value``. None if it is not known.
        n: Number of independent examples or draws.
    """

    value: float
    standard_error: float | None
    n: int

    @classmethod
    def of_mean(cls, draws: Float[Tensor, " n"] | Float[np.ndarray, " n"]) -> "Estimate":
        """Estimate an expectation by the mean of independent draws.

        Args:
            draws: The draws, (n,), at least one.

        Returns:
            The mean, with the standard error std / sqrt(n). The standard error of a single draw is
            None, and so is that of draws which are not all finite.

        Raises:
            ValueError: If there are no draws.

        Example:
            >>> Estimate.of_mean(np.array([1.0, 2.0, 3.0]))
            Estimate(value=2.0, standard_error=0.5773502691896258, n=3)
        """
        if isinstance(draws, Tensor):
            values = draws.detach().double().cpu().numpy()
        else:
            values = draws.astype(np.float64)

        n = len(values)
        if n == 0:
            raise ValueError("the mean of no draws is not defined; give at least one")

        standard_error = None
        if n > 1 and np.isfinite(values).all():
            standard_error = float(values.std(ddof=1)) / math.sqrt(n)
        return cls(float(values.mean()), standard_error, n)

    def times(self, factor: float) -> "Estimate":
        """Multiply the figure and its error by a number that is known exactly.

        Args:
            factor: The number.

        Returns:
            The product.
        """
        error = None if self.standard_error is None else abs(factor) * self.standard_error
        return Estimate(factor * self.value, error, self.n)

    @classmethod
    def of_ratio(
        cls, numerators: Float[np.ndarray, " n"], denominators: Float[np.ndarray, " n"]
    ) -> "Estimate":
        r"""Estimate the ratio of two expectations, such as a share of values that differ in number.

        .. math:: r = \frac{\sum_i a_i}{\sum_i b_i}, \qquad
                  \mathrm{s.e.}^2 = \frac{n}{n - 1}
                  \frac{\sum_i (a_i - r b_i)^2}{\bigl(\sum_i b_i\bigr)^2}

        Source: Cochran (1977), *Sampling techniques*, section 2.11. With equal denominators it is
        :meth:`of_mean` of the ratios.

        Args:
            numerators: a, one for each independent example, (n,).
            denominators: b, not negative, (n,).

        Returns:
            The ratio. The standard error of a single example is None.

        Raises:
            ValueError: If the denominators are zero, or there are none.

        Example:
            >>> Estimate.of_ratio(np.array([1.0, 4.0]), np.array([1.0, 3.0])).value
            1.25
        """
        n, total = len(denominators), float(denominators.sum())
        if not total > 0:
            raise ValueError("the ratio to nothing is not defined; give a positive denominator")

        ratio = float(numerators.sum()) / total
        if n < 2:
            return cls(ratio, None, n)

        squares = float(np.square(numerators - ratio * denominators).sum())
        return cls(ratio, math.sqrt(n / (n - 1) * squares) / total, n)

    @classmethod
    def of_groups(cls, value: float, without_group: Float[np.ndarray, " g"], n: int) -> "Estimate":
        r"""Estimate the error of a statistic by the delete-a-group jackknife.

        .. math:: \mathrm{s.e.}^2 = \frac{g - 1}{g} \sum_j (\theta_{(j)} - \bar\theta_{(\cdot)})^2

        Source: Efron and Stein (1981), *The jackknife estimate of variance*.

        Args:
            value: The statistic of all examples.
            without_group: The statistic without each of g groups of equal size, (g,), at least two.
            n: Number of examples.

        Returns:
            The statistic with its standard error.
        """
        g = len(without_group)
        squares = float(np.square(without_group - without_group.mean()).sum())
        return cls(value, math.sqrt((g - 1) / g * squares), n)


def jackknife(
    statistic: Callable[[NDArray[np.int64]], float], n: int, groups: int = 10
) -> Estimate:
    r"""Estimate a statistic of n independent examples by the delete-a-group jackknife.

    Each of the g groups has every g-th example, from another one on, see
    :meth:`Estimate.of_groups`. The method is for statistics without a standard error in closed
    form, whose values within an example are correlated, such as the pixels of an image.

    Args:
        statistic: Function from the indices of a subset of the examples, (k,), to the statistic of
            this subset.
        n: Number of examples.
        groups: Number of groups g. It is n if there are fewer examples.

    Returns:
        The statistic of all examples and its standard error. The standard error of a single example
        is None.

    Example:
        >>> values = np.array([1.0, 2.0, 3.0])
        >>> jackknife(lambda rows: float(values[rows].mean()), 3)  # as for a mean
        Estimate(value=2.0, standard_error=0.5773502691896257, n=3)
    """
    rows: Int64[np.ndarray, " n"] = np.arange(n, dtype=np.int64)
    value = float(statistic(rows))
    g = min(groups, n)
    if g < 2:
        return Estimate(value, None, n)

    without_group = np.array([statistic(rows[rows % g != j]) for j in range(g)])
    return Estimate.of_groups(value, without_group, n)
