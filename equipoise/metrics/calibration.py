r"""How good the predicted noise is: does p(x|z) know how far from its mean the data lie?

A Gaussian p(x|z) claims for every dimension of every example that the residual x - m is of the size of its std.
Averaged over many, the claim can be tested: its size (coverage, standardised variance), its size where it differs
(expected normalised calibration error), the shape of the density (PIT histogram), and its order (sparsification).
None of them says that the noise is small; that is the likelihood's part.

Every figure follows from sums over examples, so residuals come in batches and none is kept. Ranks, by predicted std or
by true error, come from histograms whose cells are the numbers of bfloat16: values that agree to 0.8 % count as tied.
Ties are never split by position: a bin that begins within a tie takes its share of the tie's sums.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from equipoise.data.varying import varying_dimensions as varying_dimensions
from equipoise.estimate import Estimate, jackknife
from equipoise.model import VAE

Array = NDArray[np.float64]

NOMINAL_COVERAGE = tuple(math.erf(k / math.sqrt(2)) for k in (1, 2, 3))
"""Share of a Gaussian within 1, 2 and 3 std: .6827, .9545, .9973."""
RELIABILITY_BINS = 20
PIT_BINS = 20
REMOVED = np.arange(100) / 100
"""Shares of the values that are removed, for the sparsification curves."""

GROUPS = 10
"""Groups of examples for the jackknife."""
CELLS = 2**15
"""Non-negative bfloat16 numbers."""
BLOCK = 2**20
"""Values at a time: about 100 MB of work space."""


class Reliability(NamedTuple):
    """Predicted against observed error, in bins of equally many values, from the smallest predicted std to the largest.

    Args:
        predicted_std: root of the mean predicted variance (RMV) of each bin, (20,), model units.
        observed_rmse: root of the mean squared residual of each bin, (20,), model units.
    """

    predicted_std: Array
    observed_rmse: Array


class Sparsification(NamedTuple):
    """Error that remains when the most uncertain values are removed, relative to the error of all of them.

    Args:
        removed: share of the values that is removed, (100,), from 0 to 0.99.
        model: RMSE of the rest when the largest predicted std go first; a random order gives 1 throughout.
        oracle: the same when the largest errors go first: no order is better.
    """

    removed: Array
    model: Array
    oracle: Array


class Calibration(NamedTuple):
    """Figures of the predicted noise of one model on one set of data, pooled over dimensions and examples.

    Standard errors are over examples, as the dimensions of one example hang together. The calibration error and that of
    the PIT histogram are sums of absolute values: few values raise them above zero even if the std are right, and
    their standard error is then too large.

    Args:
        coverage_1: share of the values with a residual of at most 1 predicted std; see ``NOMINAL_COVERAGE``.
        coverage_2: the same for 2 std.
        coverage_3: the same for 3 std.
        interval_coverage_1: share of the values in the model's own interval for the share of 1 std of a Gaussian.
        interval_coverage_2: the same for 2 std.
        interval_coverage_3: the same for 3 std.
        standardised_var: mean of ((x - m) / std)^2: 1 if right, above 1 where the std are too small (over-confident),
            below 1 where they are too large.
        normalised_calibration_error: ENCE, mean of abs(RMV - RMSE) / RMV over 20 bins; 0 if right.
        pit_histogram_error: sum of abs(share - 1/20) over 20 bins of the PIT; 0 if Gaussian and right, at most 1.9.
        sparsification_error_area: AUSE, area between the two sparsification curves; 0 if the std rank as the errors do.
        random_sparsification_error_area: the same for a random order: what a constant std gets.
        reliability: what the calibration error is the mean of.
        sparsification: the curves.
        pit_histogram: share of the values in 20 equal bins of the PIT, (20,).
    """

    coverage_1: Estimate
    coverage_2: Estimate
    coverage_3: Estimate
    interval_coverage_1: Estimate
    interval_coverage_2: Estimate
    interval_coverage_3: Estimate
    standardised_var: Estimate
    normalised_calibration_error: Estimate
    pit_histogram_error: Estimate
    sparsification_error_area: Estimate
    random_sparsification_error_area: Estimate
    reliability: Reliability
    sparsification: Sparsification
    pit_histogram: Array


class NoiseCalibration(NamedTuple):
    """The same figures over two sets of dimensions.

    Args:
        all_dimensions: background included, whose residuals are often far smaller than any std.
        varying_dimensions: those that vary over the examples; None if there are none.
    """

    all_dimensions: Calibration
    varying_dimensions: Calibration | None


@torch.no_grad()
def calibration(
    residual: Float[Tensor, "batch *event"],
    std: Float[Tensor, "..."],
    interval_factors: tuple[float, float, float] = (1.0, 2.0, 3.0),
) -> Calibration:
    r"""Compare predicted standard deviations with the residuals that came.

    .. math:: \mathrm{ENCE} = \frac1{20} \sum_b \frac{|\mathrm{RMV}_b - \mathrm{RMSE}_b|}{\mathrm{RMV}_b}, \qquad
        \mathrm{PIT} = \Phi\Bigl(\frac{x - m}{std}\Bigr), \qquad
        \mathrm{AUSE} = \int_0^{.99} \frac{\mathrm{RMSE}_{std}(s) - \mathrm{RMSE}_{|x - m|}(s)}{\mathrm{RMSE}(0)} ds

    where b are bins of equally many values by predicted std, and RMSE(s) is that of the values left when a share s is
    removed, those of the largest std or of the largest error first. The error of the PIT histogram is the reliability
    index. With a constant std all bins are alike, so that the ENCE is that of a single bin, and the AUSE is that of a
    random order. A PIT is uniform for continuous data; where the std is below a grey level, 8-bit data heap it up.

    Levi, Gispan, Giladi and Fetaya (2022), *Evaluating and calibrating uncertainty prediction in regression tasks*;
    Ilg et al. (2018), *Uncertainty estimates and multi-hypotheses networks for optical flow*; Gneiting, Balabdaoui
    and Raftery (2007), *Probabilistic forecasts, calibration and sharpness*; Delle Monache et al. (2006),
    *Probabilistic aspects of meteorological and ozone regional ensemble forecasts*.

    Args:
        residual: x - m, finite, (B, \*); examples are independent of each other, their dimensions need not be.
        std: predicted, positive and finite, of the same shape and unit.
        interval_factors: half widths, in predicted std, of the intervals that should hold the shares of 1, 2 and 3 std;
            those of a Gaussian unless given.

    Returns:
        Figures and curves. Errors that are all zero are covered in full, with an ENCE of 1 and an AUSE of 0.

    Raises:
        ValueError: if the shapes differ or are empty, or a value is out of its domain.

    Example:
        >>> calibration(torch.tensor([[0.5, -1.5], [0.0, 2.5]]), torch.ones(2, 2)).coverage_1.value
        0.5
    """
    if residual.shape != std.shape or residual.ndim < 2 or residual.numel() == 0:
        raise ValueError(
            "expected residuals and std of one shape, (examples, dimensions) or more axes, none of them empty, "
            f"got {tuple(residual.shape)} and {tuple(std.shape)}"
        )
    sums = _Sums(residual.device, interval_factors)
    sums.update(residual.flatten(1), std.flatten(1))
    return sums.calibration()


@torch.no_grad()
def noise_calibration(
    model: VAE, batches: Iterable[Tensor], varying: Bool[Tensor, "*event"]
) -> NoiseCalibration:
    r"""Evaluate the std maps that a model shows beside its reconstructions, see :func:`calibration`.

    The mean and std are those of :meth:`VAE.reconstruct`, which decodes the posterior mean. The variance was learned
    from samples of z, eq. (10), whose residuals are a little larger; so a well-trained std is here a little too large.

    Args:
        model: in evaluation mode.
        batches: raw data, (B, \*) each, on the model's device.
        varying: True for dimensions that vary, of one example's shape; see :func:`varying_dimensions`.

    Returns:
        Figures over all dimensions and over those that vary; the curves are in model units.

    Raises:
        ValueError: if ``varying`` has another shape, there are no batches or a reconstruction is not finite.
    """
    if varying.shape != model.shape:
        raise ValueError(
            f"varying must have the shape of one example, {model.shape}, got {tuple(varying.shape)}"
        )
    device = next(model.parameters()).device
    among = varying.flatten().to(device)
    one, two, three = (model.noise.interval_factor(k) for k in (1.0, 2.0, 3.0))
    every, some = (_Sums(device, (one, two, three)) for _ in range(2))
    for raw in batches:
        x = model.scaling(raw)
        seen = model.reconstruct(x)
        residual, std = (x - seen.mean).flatten(1), seen.std.flatten(1)
        every.update(residual, std)
        if among.any():
            some.update(residual[:, among], std[:, among])
    return NoiseCalibration(every.calibration(), some.calibration() if among.any() else None)


class _Sums:
    """What the figures follow from, by group of the jackknife; the first column of each histogram counts."""

    def __init__(self, device: torch.device, interval_factors: tuple[float, float, float]) -> None:
        self.n = 0
        self.interval_factors = interval_factors
        self.per_example: list[Tensor] = []
        self.by_std = torch.zeros(
            3, GROUPS, CELLS, dtype=torch.float64, device=device
        )  # count, var, squared error
        self.by_error = torch.zeros(
            2, GROUPS, CELLS, dtype=torch.float64, device=device
        )  # count, squared error
        self.by_pit = torch.zeros(1, GROUPS, PIT_BINS, dtype=torch.float64, device=device)

    def update(self, residual: Tensor, std: Tensor) -> None:
        """Add examples, (B, D) each."""
        rows = max(1, BLOCK // residual.shape[1])
        for r, s in zip(torch.split(residual, rows), torch.split(std, rows), strict=True):
            r, s = r.double(), s.double()
            z, squared = r / s, r.square()
            if not bool(torch.all((s > 0) & s.isfinite() & z.isfinite())):
                raise ValueError(
                    "expected finite residuals and positive, finite std, got residuals from "
                    f"{float(r.min()):g} to {float(r.max()):g} and std from {float(s.min()):g} to {float(s.max()):g}"
                )
            within = [
                (z.abs() <= k).double().mean(1) for k in (1.0, 2.0, 3.0, *self.interval_factors)
            ]
            self.per_example.append(torch.stack([*within, z.square().mean(1)]))
            group = (self.n + torch.arange(len(r), device=r.device))[:, None] % GROUPS
            self.by_std += _histogram(group, _cell(s), CELLS, s.square(), squared)
            self.by_error += _histogram(group, _cell(r.abs()), CELLS, squared)
            pit = (torch.special.ndtr(z) * PIT_BINS).long().clamp_max(PIT_BINS - 1)
            self.by_pit += _histogram(group, pit, PIT_BINS)
            self.n += len(r)

    def calibration(self) -> Calibration:
        if self.n == 0:
            raise ValueError("no examples to judge the noise by; give at least one batch")
        by_std, by_error = (
            sums[:, :, sums[0].any(0)].cpu().numpy() for sums in (self.by_std, self.by_error)
        )
        by_pit = self.by_pit.cpu().numpy()

        def over_groups(figure: Callable[[NDArray[np.int64]], float]) -> Estimate:
            groups = min(self.n, GROUPS)
            return jackknife(figure, groups, groups)._replace(n=self.n)

        def sparsification(groups: NDArray[np.int64] | slice) -> Sparsification:
            return _sparsification(by_std[:, groups].sum(1), by_error[:, groups].sum(1))

        means = [Estimate.of_mean(row) for row in torch.cat(self.per_example, 1)]
        return Calibration(
            coverage_1=means[0],
            coverage_2=means[1],
            coverage_3=means[2],
            interval_coverage_1=means[3],
            interval_coverage_2=means[4],
            interval_coverage_3=means[5],
            standardised_var=means[6],
            normalised_calibration_error=over_groups(
                lambda groups: _normalised_calibration_error(_reliability(by_std[:, groups].sum(1)))
            ),
            pit_histogram_error=over_groups(
                lambda groups: _pit_histogram_error(by_pit[0, groups].sum(0))
            ),
            sparsification_error_area=over_groups(
                lambda groups: _area_above_oracle(sparsification(groups))
            ),
            random_sparsification_error_area=over_groups(
                lambda groups: _area_above_oracle(
                    sparsification(groups)._replace(model=np.ones_like(REMOVED))
                )
            ),
            reliability=_reliability(by_std.sum(1)),
            sparsification=sparsification(slice(None)),
            pit_histogram=by_pit[0].sum(0) / by_pit.sum(),
        )


def _cell(values: Tensor) -> Tensor:
    """Position of non-negative values among the numbers of bfloat16: their bits, read as a whole number."""
    return values.to(torch.bfloat16).view(torch.int16).long()


def _histogram(group: Tensor, cell: Tensor, n_cells: int, *weights: Tensor) -> Tensor:
    """Count and sum of each weight, per group and cell, (1 + weights, GROUPS, n_cells)."""
    index = (group * n_cells + cell).flatten()
    columns = [torch.bincount(index, minlength=GROUPS * n_cells).double()]
    columns += [torch.bincount(index, weight.flatten(), GROUPS * n_cells) for weight in weights]
    return torch.stack(columns).view(-1, GROUPS, n_cells)


def _sums_of_lowest(histogram: Array, shares: Array) -> Array:
    """Count and sums of the given shares of the values, lowest first, (columns, shares); ties in proportion."""
    cumulative = np.pad(histogram.cumsum(1), ((0, 0), (1, 0)))
    rank = cumulative[0] / cumulative[0, -1]
    return np.stack([np.interp(shares, rank, column) for column in cumulative])


def _reliability(by_std: Array) -> Reliability:
    count, var, squared = np.diff(_sums_of_lowest(by_std, np.linspace(0, 1, RELIABILITY_BINS + 1)))
    return Reliability(np.sqrt(var / count), np.sqrt(squared / count))


def _normalised_calibration_error(reliability: Reliability) -> float:
    predicted, observed = reliability
    return float(np.mean(np.abs(predicted - observed) / predicted))


def _pit_histogram_error(counts: Array) -> float:
    return float(np.abs(counts / counts.sum() - 1 / PIT_BINS).sum())


def _sparsification(by_std: Array, by_error: Array) -> Sparsification:
    def remaining(histogram: Array) -> Array:
        count, *_, squared = _sums_of_lowest(histogram, 1 - REMOVED)
        mse = squared[0] / count[0]
        return np.sqrt(squared / count / mse) if mse else np.ones_like(REMOVED)

    return Sparsification(REMOVED, remaining(by_std), remaining(by_error))


def _area_above_oracle(curves: Sparsification) -> float:
    return float(np.trapezoid(curves.model - curves.oracle, curves.removed))
