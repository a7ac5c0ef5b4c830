r"""Statistics of residuals x - m(z), from which noise models learn: eq. (10), quantiles, errors.

All take in any number of batches, and are combined over processes by sums alone.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor, nn

from equipoise.estimate import Estimate
from equipoise.gaps import missing_values, observed_values, row_means
from equipoise.gaussian import sum_dimensions

SMALLEST_SHARE = 1e-6
"""Smallest eigenvalue of a covariance over pairs of dimensions, as a share of the largest."""

AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""A function that sums a tensor over processes, with the same result in all of them."""


class SquareSums(nn.Module):
    """Sums of squares or products of residuals, and how many they are of, in float64.

    Args:
        shape: Shape of the sums.
        has_gaps: Whether residuals may be missing, NaN, so that each sum has a count of its own.
    """

    sum: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...], *, has_gaps: bool = False) -> None:
        super().__init__()
        count_shape = shape if has_gaps else ()
        self.register_buffer("sum", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(count_shape, dtype=torch.float64))

    @torch.no_grad()
    def add(self, other: "SquareSums", scale: float = 1.0) -> None:
        """Add another statistic's residuals.

        Args:
            other: The statistic, of the same shape.
            scale: Factor on the variance of its residuals.
        """
        self.sum += scale * other.sum
        self.count += other.count

    def all_reduce(self, all_reduce: AllReduce) -> None:
        """Add the batches of the other processes.

        Args:
            all_reduce: Sums over the processes.
        """
        self.sum.copy_(all_reduce(self.sum))
        self.count.copy_(all_reduce(self.count))


class ResidualVariance(SquareSums):
    r"""Mean squared residual as sum and count in float64, the closed form of eq. (10).

    .. math:: \sigma_*^2 = \frac1{ND} \sum_n \mathrm{E}_{q(z|x_n)} \sum_i (x_{ni} - m_i(z))^2

    The residuals must come from *samples* z of q(z|x): the expectation over z belongs to the
    equation, and the posterior mean in its place underestimates the variance. Partial results of
    several processes combine by adding ``sum`` and ``count``.

    Args:
        shape: () for one variance. Otherwise a shape that broadcasts to one example's, with 1 for
            each axis that is averaged over.
        has_gaps: Whether residuals may be missing, NaN. Only those that are observed count. Without
            it, those of a dimension that are missing in a batch count as the mean of the others.

    Example:
        >>> statistic = ResidualVariance()
        >>> statistic.update(torch.tensor([[1.0, 3.0], [1.0, 1.0]]))
        >>> statistic.var
        tensor(3., dtype=torch.float64)
    """

    def __init__(self, shape: tuple[int, ...] = (), *, has_gaps: bool = False) -> None:
        super().__init__(shape, has_gaps=has_gaps)

    @torch.no_grad()
    def update(
        self,
        residual: Float[Tensor, "batch *event"],
        keep: float = 1.0,
        all_reduce: AllReduce | None = None,
    ) -> None:
        r"""Add a batch.

        Args:
            residual: x - m(z), (B, \*), in the unit of the data; NaN where x is missing.
            keep: Factor on all earlier batches. Below one, they are forgotten exponentially.
            all_reduce: Sums over processes, if ``residual`` is this process's part of the batch.
        """
        squared = residual.square()
        count = torch.full_like(self.count, residual.numel() / self.sum.numel())
        missing = missing_values(residual)
        if missing is not None:
            squared, count = self._observed(squared, missing)

        if not self.sum.ndim:
            # So few values that float32 is enough; float64 is slow on many devices.
            squared = sum_dimensions(squared)
        squared = squared.sum(0, dtype=torch.float64).sum_to_size(self.sum.shape)

        if all_reduce is not None:
            totals = all_reduce(torch.cat([squared.flatten(), count.flatten()]))
            n = squared.numel()
            squared, count = totals[:n].view_as(squared), totals[n:].view_as(count)

        self.sum.mul_(keep).add_(squared)
        self.count.mul_(keep).add_(count)

    def _observed(self, squared: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the gaps of a batch's squares, and count how many they stand for."""
        if not self.sum.ndim:
            return squared.masked_fill(missing, 0.0), (~missing).sum().double()
        if self.count.ndim:
            return squared.masked_fill(missing, 0.0), (~missing).sum(0).double()

        # A dimension that no row of the batch has counts as before, or as the others do.
        known = self.var.to(squared.dtype)
        common = squared.nanmean().nan_to_num(0.0)
        means = torch.where(missing.all(0), known, squared.nanmean(0))
        means = torch.where(means.isnan(), common, means)
        filled = torch.where(missing, means, squared)
        return filled, torch.full_like(self.count, len(squared))

    @property
    def var(self) -> Tensor:
        """The variance, in the squared unit of the data; NaN before the first batch."""
        return self.sum / self.count


class StandardisedVariance(nn.Module):
    r"""How many times as large as predicted the squared residuals of held-out examples are.

    .. math:: c = \frac1N \sum_n c_n, \qquad
        c_n = \frac1D \sum_i \frac{(x_{ni} - m_i(z_n))^2}{\sigma_i^2(z_n)}, \qquad z_n \sim q(z|x_n)

    The mean over i is that of the observed dimensions.

    With the closed form (10) of the training residuals as :math:`\sigma^2`, c says how much of
    them has been learned by heart. :math:`c\,\sigma^2` is eq. (10) over the held-out examples. An
    example counts once, because its dimensions are not independent.

    Example:
        >>> statistic = StandardisedVariance()
        >>> statistic.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.zeros(()))
        >>> statistic.estimate()
        Estimate(value=2.0, standard_error=0.0, n=2)
    """

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))

    @torch.no_grad()
    def update(self, residual: Float[Tensor, "batch *event"], log_var: Tensor) -> None:
        r"""Add a batch.

        Args:
            residual: x - m(z), (B, \*), in the unit of the data.
            log_var: Logarithm of the predicted variance; broadcasts to (B, \*).
        """
        squared = residual.double().square() * torch.exp(-log_var.double())
        per_example = row_means(squared)
        missing = missing_values(residual)
        if missing is not None:
            # A row without any value has no residual.
            per_example = per_example[~missing.all(1)]
        ones = torch.ones_like(per_example)
        self.sums += torch.stack([ones, per_example, per_example.square()]).sum(1)

    def all_reduce(self, all_reduce: AllReduce) -> None:
        """Add the batches of the other processes.

        Args:
            all_reduce: Sums over the processes.
        """
        self.sums.copy_(all_reduce(self.sums))

    def estimate(self) -> Estimate:
        """Estimate c, with its standard error over examples.

        Returns:
            c. The standard error of a single example is None.

        Raises:
            ValueError: if there have been no residuals.
        """
        n, total, squares = self.sums.tolist()
        if not n:
            raise ValueError("no residuals to standardise; give at least one held-out example")
        mean = total / n
        if n < 2:
            return Estimate(mean, None, int(n))
        variance = max(0.0, squares / n - mean**2) * n / (n - 1)
        return Estimate(mean, math.sqrt(variance / n), int(n))


def overfitting_ratio(standardised: Estimate) -> float:
    r"""Shrink a :class:`StandardisedVariance` towards one, by the error of its estimate.

    .. math:: r = 1 + w\,\max(0,\ c - 1), \qquad
        w = \max\Bigl(0,\ 1 - \frac{N + 1}{N - 1}\,\frac{\mathrm{s.e.}^2}{c^2}\Bigr)

    This is the positive part of James and Stein's rule, for the excess in units of c; the factor
    with N allows for a standard error that is known from N examples only. With a hundred ordinary
    examples w is close to one. Where one odd example makes up all of c, its relative error is one,
    w is zero, and the variance of the training residuals stays. Networks do not know new examples
    better than those that they learned from. A c below one is therefore chance, and counts as one.

    Source: James and Stein (1961), *Estimation with quadratic loss*.

    Args:
        standardised: c.

    Returns:
        r, the factor by which the variance of the training residuals is multiplied, at least 1.

    Example:
        >>> ordinary, odd = Estimate(2.0, 0.2, 100), Estimate(129.0, 129.0, 30)
        >>> round(overfitting_ratio(ordinary), 2), overfitting_ratio(odd)
        (1.99, 1.0)
    """
    value, error, n = standardised
    if error is None or not value > 0:
        return 1.0
    weight = max(0.0, 1 - (n + 1) / (n - 1) * (error / value) ** 2)
    return 1 + weight * max(0.0, value - 1)


class ResidualCovariance(SquareSums):
    r"""Second moments of residuals as sum and count in float64: eq. (10) as a matrix.

    .. math:: C = \frac1N \sum_n \mathrm{E}_{q(z|x_n)}\, u_n u_n^T, \qquad
        u_n = \frac{x_n - m(z)}{s(z)}

    It is the covariance at which the likelihood of the residuals is highest. As in eq. (10), they
    come from *samples* z of q(z|x), and their mean is taken to be zero. Partial results of several
    processes combine by adding ``sum`` and ``count``.

    Args:
        dimensions: D, number of dimensions of an example.
        has_gaps: Whether residuals may be missing, NaN. Each element of C is then over the rows
            that have both dimensions, and C is the nearest matrix that is positive definite.

    Example:
        >>> statistic = ResidualCovariance(2)
        >>> statistic.update(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        >>> statistic.covariance
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """

    def __init__(self, dimensions: int, *, has_gaps: bool = False) -> None:
        super().__init__((dimensions, dimensions), has_gaps=has_gaps)

    @torch.no_grad()
    def update(self, residual: Float[Tensor, "batch *event"]) -> None:
        r"""Add a batch.

        Args:
            residual: Standardised residuals u, (B, \*), D values per example.
        """
        rows = residual.flatten(1).double()
        if not self.count.ndim:
            self.sum += rows.mT @ rows
            self.count += len(rows)
            return

        observed = (~rows.isnan()).double()
        rows = rows.nan_to_num(0.0)
        self.sum += rows.mT @ rows
        self.count += observed.mT @ observed

    @property
    def n_rows(self) -> float:
        """Number of rows, of the dimension that is observed most often."""
        return float(self.count.max())

    @property
    def covariance(self) -> Tensor:
        """The matrix C, (D, D); NaN before the first batch."""
        covariance = self.sum / self.count
        if not self.count.ndim:
            return covariance

        # Of two columns that are never seen together, nothing is known.
        covariance = covariance.nan_to_num(0.0)
        var, axes = torch.linalg.eigh(covariance)
        var = var.clamp_min(SMALLEST_SHARE * float(var[-1]))
        nearest: Tensor = axes * var @ axes.mT
        return nearest

    @property
    def var(self) -> Tensor:
        """The mean variance over the dimensions, (); NaN before the first batch."""
        return self.covariance.diagonal().mean()


class ResidualQuantiles(nn.Module):
    r"""Quantiles of the size of standardised residuals, from a histogram of any number of them.

    Each power of two has 2048 cells, so that a quantile is exact to 0.05 %, and rounded up. Partial
    results of several processes combine by adding ``counts``.

    Example:
        >>> statistic = ResidualQuantiles()
        >>> statistic.update(torch.tensor([[-0.5, 1.0, -2.0, 4.0]]))
        >>> statistic.quantile(torch.tensor([0.5, 1.0]))
        tensor([1.0005, 4.0020])
    """

    SHIFT = 12
    """Bits that a float32 loses: 11 of its mantissa's 23 remain."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2 ** (31 - self.SHIFT), dtype=torch.int64))

    @torch.no_grad()
    def update(self, standardised: Float[Tensor, "batch *event"]) -> None:
        r"""Add a batch.

        Args:
            standardised: (x - m(z)) / std(z), any shape. NaN in rows (B, D) is left out.

        Raises:
            ValueError: if a value is not finite.
        """
        size = observed_values(standardised).abs().float().flatten()
        if not bool(size.isfinite().all()):
            raise ValueError(
                "expected finite residuals and a positive std, but their ratio is not finite"
            )

        # Floats that are not negative have the order of their bits.
        cell = size.view(torch.int32) >> self.SHIFT
        self.counts += torch.bincount(cell, minlength=len(self.counts))

    def all_reduce(self, all_reduce: AllReduce) -> None:
        """Add the batches of the other processes.

        Args:
            all_reduce: Sums over the processes.
        """
        self.counts.copy_(all_reduce(self.counts))

    def quantile(self, share: Float[Tensor, " shares"]) -> Float[Tensor, " shares"]:
        """Find the smallest size that at least the given shares of the residuals do not exceed.

        Args:
            share: Each within 0 and 1.

        Returns:
            One size per share, float32, in predicted std.

        Raises:
            ValueError: if there have been no residuals.
        """
        cumulative = self.counts.cumsum(0)
        n = int(cumulative[-1])
        if not n:
            raise ValueError(
                "no residuals to take quantiles of; give at least one batch of held-out data"
            )

        rank = (share.double().to(cumulative.device) * n).ceil().clamp(1, n).long()
        cell = torch.searchsorted(cumulative, rank)
        return ((cell + 1) << self.SHIFT).to(torch.int32).view(torch.float32)


class ErrorsByStd(nn.Module):
    r"""Squared residuals by predicted std, and the monotone map from the std to the error.

    The histogram has one cell for each bfloat16 number. Std that agree to 0.8 % therefore count as
    tied. Partial results of several processes combine by adding ``sums``.

    Example:
        >>> std = torch.rand(2000, generator=torch.Generator().manual_seed(0)) + 0.1
        >>> errors = ErrorsByStd()
        >>> errors.update(3 * std, std)  # every residual is three times its std
        >>> log_std, log_error = errors.monotone_map()
        >>> torch.allclose(log_error - log_std, torch.tensor(3.0).log().double(), atol=1e-6)
        True
    """

    N_CELLS = 2**15
    """Number of non-negative bfloat16 numbers."""
    MAX_BINS, VALUES_PER_BIN = 50, 100
    """Most bins of the std, and fewest residuals in one: an error of 7 % in a Gaussian's std."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, self.N_CELLS, dtype=torch.float64))

    @torch.no_grad()
    def update(self, residual: Float[Tensor, " values"], std: Float[Tensor, " values"]) -> None:
        """Add residuals.

        Args:
            residual: x - m(z), one value for each dimension of each example that counts.
            std: Its predicted std, in the same unit.

        Raises:
            ValueError: if a value is not finite, or a std is not positive.
        """
        residual, std = residual.double(), std.double()
        if not bool(torch.all(residual.isfinite() & std.isfinite() & (std > 0))):
            raise ValueError("expected finite residuals, and std that are positive and finite")

        cell = std.to(torch.bfloat16).view(torch.int16).long()
        columns = (torch.ones_like(std), std.square(), residual.square())
        self.sums += torch.stack([torch.bincount(cell, c, self.N_CELLS) for c in columns])

    def all_reduce(self, all_reduce: AllReduce) -> None:
        """Add the batches of the other processes.

        Args:
            all_reduce: Sums over the processes.
        """
        self.sums.copy_(all_reduce(self.sums))

    @property
    def count(self) -> int:
        """Number of residuals."""
        return int(self.sums[0].sum())

    def monotone_map(self, min_var: float = 0.0) -> Float64[Tensor, "2 knots"]:
        r"""Map the predicted std to the error that was found, so that a larger std stays larger.

        .. math:: \min_{v_1 \le v_2 \le \ldots} \sum_b n_b (e_b^2 - v_b)^2

        e_b is the root mean squared residual of bin b, of n_b values; bins have equally many. The
        solution is also that of highest likelihood of a Gaussian. It is constant over blocks of
        bins. Each block becomes a knot, at the root mean squared std of the block, between which
        the map is linear and strictly increasing.

        Source: Robertson, Wright and Dykstra (1988), *Order restricted statistical inference*;
        Oron and Flournoy (2017), *Centered isotonic regression*, for the knots.

        Args:
            min_var: Smallest squared error of a knot, because a small sample may have no error.

        Returns:
            Logarithms of the std, increasing, and of the errors, increasing.

        Raises:
            ValueError: if there have been no residuals, or all are zero.
        """
        from sklearn.isotonic import IsotonicRegression

        sums = self.sums[:, self.sums[0] > 0].cpu().numpy()
        if not sums[2].any():
            raise ValueError("Recalibration needs held-out residuals that are not all zero.")

        # A cell lies in the bin of its middle, so that a tie is not divided.
        middle = (sums[0].cumsum() - sums[0] / 2) / sums[0].sum()
        n_bins = min(max(1, int(sums[0].sum()) // self.VALUES_PER_BIN), self.MAX_BINS)
        count, var, error = _sums_by_group(sums, (middle * n_bins).astype(int))

        error = np.maximum(error, min_var * count)
        isotonic = IsotonicRegression().fit_transform(
            np.arange(len(count)), error / count, sample_weight=count
        )
        count, var, error = _sums_by_group(np.stack([count, var, error]), isotonic)

        return torch.from_numpy(0.5 * np.log(np.stack([var, error]) / count))


def _sums_by_group(sums: NDArray[np.float64], label: NDArray[Any]) -> NDArray[np.float64]:
    """Add the columns that have the same label, by increasing label."""
    labels, group = np.unique(label, return_inverse=True)
    return np.stack([np.bincount(group, row, len(labels)) for row in sums])
