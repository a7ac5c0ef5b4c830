r"""How well the predicted noise describes the errors of a model.

A Gaussian p(x|z) predicts, for every dimension of every example, that the residual x - m is about
as large as its std. The average over many examples tests this prediction in four ways. Coverage and
the standardised variance test the size of the std. The expected normalised calibration error tests
the size where the std differs between values. The PIT histogram tests the shape of the density, and
sparsification tests the order of the std. None of these figures says that the noise is small. The
likelihood tests that.

The residuals of digital data, such as 8-bit images, contain the error of rounding, and below half a
level they are all alike. Two things follow. On a bound of the scale, where mean and datum are both
black, hardly any residual is as large as its std, whatever it is. Such values are judged with the
others, and left out of a further set. And a std below a level is right if the *levels* are as
probable as it says. This is judged by the randomised PIT, which takes a datum to be anywhere in the
cell that was rounded to it, see :meth:`equipoise.digital.DigitalGaussian.pit`.

Every figure follows from sums over examples. The residuals therefore come in batches, and none of
them is stored. The ranks of values, by predicted std or by true error, come from histograms with
one cell for each bfloat16 number. Values that agree to 0.8 % therefore count as tied. A tie is
never split by position: a bin that begins within a tie receives a proportional part of the tie's
sums.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from equipoise.categories import numeric_part
from equipoise.data.varying import varying_dimensions as varying_dimensions
from equipoise.digital import DigitalGaussian
from equipoise.estimate import Estimate, jackknife
from equipoise.gaps import observed_difference
from equipoise.model import VAE

Array = NDArray[np.float64]

NOMINAL_COVERAGE = tuple(math.erf(k / math.sqrt(2)) for k in (1, 2, 3))
"""Share of a Gaussian within 1, 2 and 3 std: .6827, .9545, .9973."""
RELIABILITY_BINS = 20
"""Number of bins of the predicted std."""
PIT_BINS = 20
"""Number of bins of the PIT histogram."""
REMOVED = np.arange(100) / 100
"""Shares of the values that are removed, one for each point of the sparsification curves."""

GROUPS = 10
"""Number of groups of examples for the jackknife."""
CELLS = 2**15
"""Number of non-negative bfloat16 numbers."""
BLOCK = 2**20
"""Number of values that are processed at a time, which takes about 100 MB of memory."""


class Reliability(NamedTuple):
    """Predicted and observed error in bins of equally many values, by increasing predicted std.

    Args:
        predicted_std: root of the mean predicted variance (RMV) of each bin, (20,), model units.
        observed_rmse: root of the mean squared residual of each bin, (20,), model units.
    """

    predicted_std: Array
    observed_rmse: Array


class Sparsification(NamedTuple):
    """Error of the values that remain when the most uncertain ones are removed.

    The curves are relative to the error of all values. Removal in random order gives 1 everywhere.

    Args:
        removed: share of the values that is removed, (100,), from 0 to 0.99.
        model: RMSE of the rest when the values with the largest predicted std are removed first,
            (100,).
        oracle: RMSE of the rest when the values with the largest errors are removed first, (100,).
            No other order gives a lower curve.
    """

    removed: Array
    model: Array
    oracle: Array


class Calibration(NamedTuple):
    """Figures of the predicted noise of one model, over all values of one set of data.

    Standard errors are over examples, because the dimensions of one example are not independent.
    The calibration error and the error of the PIT histogram are sums of absolute values. With few
    values they lie above zero even if every std is right, and their standard errors are then too
    large.

    Args:
        coverage_1: share of the values whose residual is at most 1 predicted std.
            ``NOMINAL_COVERAGE`` holds the share of a Gaussian. The residuals of digital data are
            those of the levels. Where the std is below a level, they are smaller or larger than it
            by rounding alone, and ``digital_coverage_1`` is the share to look at.
        coverage_2: the same for 2 std.
        coverage_3: the same for 3 std.
        interval_coverage_1: share of the values in the interval that the model gives for the share
            of a Gaussian within 1 std.
        interval_coverage_2: the same for 2 std.
        interval_coverage_3: the same for 3 std.
        standardised_var: mean of ((x - m) / std)^2. It is 1 if every std is right, above 1 if they
            are too small (over-confident), and below 1 if they are too large.
        normalised_calibration_error: ENCE, mean of abs(RMV - RMSE) / RMV over 20 bins. It is 0 if
            every std is right.
        pit_histogram_error: sum of abs(share - 1/20) over 20 bins of the PIT. It is 0 if the noise
            is Gaussian and every std is right, and at most 1.9.
        sparsification_error_area: AUSE, area between the two sparsification curves. It is 0 if the
            std have the order of the errors.
        random_sparsification_error_area: AUSE of a random order, which a constant std also has.
        reliability: predicted and observed error of the bins of the calibration error.
        sparsification: the sparsification curves.
        pit_histogram: share of the values in each of 20 equal bins of the PIT, (20,).
        digital_coverage_1: share of the values whose PIT is that of a Gaussian within 1 std, if it
            was given. If the levels are as probable as the std says, it is ``NOMINAL_COVERAGE``,
            also where a level is wider than the std, and on the bounds of the scale.
        digital_coverage_2: the same for 2 std.
        digital_coverage_3: the same for 3 std.
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
    digital_coverage_1: Estimate | None = None
    digital_coverage_2: Estimate | None = None
    digital_coverage_3: Estimate | None = None


class NoiseCalibration(NamedTuple):
    """Figures of the predicted noise over three sets of values.

    Args:
        all_dimensions: figures over all dimensions. These include the background, whose residuals
            are often far smaller than any std.
        varying_dimensions: figures over the dimensions that vary over the examples; None if no
            dimension varies.
        off_bounds: figures over the values of the dimensions that vary whose mean and datum are not
            both on the same bound of the scale, to half a level; None for data without bounds, or
            if there are no such values. The std can only be right or wrong there. A mean on a bound
            is judged by its errors alone, so that a std which is right for all of them reads as
            slightly too small.
        off_bounds_share: share of the values of the dimensions that vary which are off the bounds;
            None for data without bounds, or if no dimension varies.
    """

    all_dimensions: Calibration
    varying_dimensions: Calibration | None
    off_bounds: Calibration | None = None
    off_bounds_share: float | None = None


@torch.no_grad()
def calibration(
    residual: Float[Tensor, "batch *event"],
    std: Float[Tensor, "..."],
    interval_factors: tuple[float, float, float] = (1.0, 2.0, 3.0),
    *,
    pit: Float[Tensor, "..."] | None = None,
    among: Bool[Tensor, "..."] | None = None,
) -> Calibration:
    r"""Compare predicted standard deviations with the observed residuals.

    .. math:: \mathrm{ENCE} = \frac1{20} \sum_b
        \frac{|\mathrm{RMV}_b - \mathrm{RMSE}_b|}{\mathrm{RMV}_b}, \qquad
        \mathrm{PIT} = \Phi\Bigl(\frac{x - m}{std}\Bigr), \qquad
        \mathrm{AUSE} = \int_0^{.99}
        \frac{\mathrm{RMSE}_{std}(s) - \mathrm{RMSE}_{|x - m|}(s)}{\mathrm{RMSE}(0)} ds

    Here b runs over bins of equally many values, by predicted std. RMSE(s) is the RMSE of the
    values that remain when a share s is removed, beginning with the largest std or with the largest
    error. The error of the PIT histogram is known as the reliability index.

    With a constant std all bins are alike. The ENCE is then that of a single bin, and the AUSE is
    that of a random order. The PIT of the equation is uniform for continuous data only. Where the
    std is below the distance of two grey levels, it piles up at single values; give ``pit`` then.

    Levi, Gispan, Giladi and Fetaya (2022), *Evaluating and calibrating uncertainty prediction in
    regression tasks*; Ilg et al. (2018), *Uncertainty estimates and multi-hypotheses networks for
    optical flow*; Gneiting, Balabdaoui and Raftery (2007), *Probabilistic forecasts, calibration
    and sharpness*; Delle Monache et al. (2006), *Probabilistic aspects of meteorological and ozone
    regional ensemble forecasts*.

    Args:
        residual: x - m, finite, (B, \*). The examples are independent of each other; the dimensions
            of one example need not be.
        std: predicted std, positive and finite, of the same shape and unit.
        interval_factors: half widths of the model's intervals, in predicted std. They should hold
            the shares of a Gaussian within 1, 2 and 3 std. The default is right for Gaussian
            residuals.
        pit: probability integral transforms in place of those of the equation, from 0 to 1, of the
            same shape. Those of digital data are randomised, see
            :meth:`equipoise.digital.DigitalGaussian.pit`. With them, ``digital_coverage_1`` and so
            on are given.
        among: True for the values to judge, of the same shape. None judges all.

    Returns:
        Figures and curves. If all errors are zero, every coverage is 1, the ENCE is 1 and the AUSE
        is 0.

    Raises:
        ValueError: if the shapes differ or are empty, a value is out of its domain, or there is no
            value to judge.

    Example:
        >>> calibration(torch.tensor([[0.5, -1.5], [0.0, 2.5]]), torch.ones(2, 2)).coverage_1.value
        0.5
    """
    if among is None:
        among = torch.ones_like(residual, dtype=torch.bool)
    parts = [residual, std, among] if pit is None else [residual, std, among, pit]

    shapes = [tuple(part.shape) for part in parts]
    if len(set(shapes)) > 1 or residual.ndim < 2 or residual.numel() == 0:
        raise ValueError(
            "expected residuals and std of the same shape, with at least two axes "
            f"and none of them empty, got {' and '.join(map(str, shapes))}"
        )

    sums = _Sums(residual.device, interval_factors)
    for block in _blocks(*parts):
        sums.update(*block)
    return sums.calibration()


@torch.no_grad()
def noise_calibration(
    model: VAE,
    batches: Iterable[Tensor],
    varying: Bool[Tensor, "*event"],
    generator: torch.Generator | None = None,
) -> NoiseCalibration:
    r"""Evaluate the std that a model predicts for its reconstructions, see :func:`calibration`.

    The mean and std are those of :meth:`VAE.reconstruct`, which decodes the posterior mean. The
    variance was learned from samples of z, eq. (10), whose residuals are slightly larger. The std
    of a well-trained model is therefore slightly too large here.

    Args:
        model: the model, in evaluation mode.
        batches: raw data, (B, \*) each, on the model's device.
        varying: True for dimensions that vary, of the shape of one example; see
            :func:`varying_dimensions`.
        generator: source of randomness for the PIT of digital data, on the model's device.

    Returns:
        Figures over all dimensions, over those that vary, and over the values of these that are off
        the bounds of the scale. The curves are in model units.

    Raises:
        ValueError: if ``varying`` has another shape, there are no batches or a reconstruction is
            not finite.
    """
    if varying.shape != model.shape:
        raise ValueError(
            f"varying must have the shape of one example, {model.shape}, got {tuple(varying.shape)}"
        )

    device = next(model.parameters()).device
    varies = varying.flatten().to(device)
    any_varies = bool(varies.any())

    factor_1, factor_2, factor_3 = (model.noise.interval_factor(k) for k in (1.0, 2.0, 3.0))
    of_all, of_varying, off_bounds = (
        _Sums(device, (factor_1, factor_2, factor_3)) for _ in range(3)
    )

    levels = model.levels
    has_bounds = levels is not None and levels.number is not None
    for raw in batches:
        x = model.scaling(raw)
        reconstruction, x = numeric_part(model.reconstruct(x), x)

        for data, mean, std in _blocks(x, reconstruction.mean, reconstruction.std):
            judged = ~data.isnan()
            parts = [observed_difference(data, mean), std, judged]
            if levels is not None:
                digital = DigitalGaussian(mean, 2 * std.log(), levels)
                parts.append(digital.pit(data, generator))

            of_all.update(*parts)
            if not any_varies:
                continue
            parts = [part[:, varies] for part in parts]
            of_varying.update(*parts)
            if levels is not None and has_bounds:
                parts[2] = ~levels.agree_on_bound(data, mean)[:, varies]
                off_bounds.update(*parts)

    all_figures = of_all.calibration()
    if not any_varies:
        return NoiseCalibration(all_figures, None)

    figures = NoiseCalibration(all_figures, of_varying.calibration())
    if not has_bounds:
        return figures
    share = off_bounds.n_values / of_varying.n_values
    judged_off_bounds = off_bounds.calibration() if share else None
    return figures._replace(off_bounds=judged_off_bounds, off_bounds_share=share)


def _blocks(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split values of the same examples into blocks of so many rows as memory is for, (b, D)."""
    flat = [part.flatten(1) for part in values]
    rows = max(1, BLOCK // flat[0].shape[1])
    yield from zip(*(torch.split(part, rows) for part in flat), strict=True)


class _Sums:
    """Sums from which the figures follow, for each group of the jackknife.

    For each example, ``per_example`` has the number of values that are judged, and over these the
    sums of what lies within each width, and of the squares.

    In each histogram the first column is a count. ``by_std`` has the columns count, predicted
    variance and squared error. ``by_error`` has the columns count and squared error. ``by_pit`` has
    a count only.
    """

    def __init__(self, device: torch.device, interval_factors: tuple[float, float, float]) -> None:
        self.n = 0
        self.is_digital = False
        self.interval_factors = interval_factors
        self.per_example: list[Tensor] = []

        self.by_std = torch.zeros(3, GROUPS, CELLS, dtype=torch.float64, device=device)
        self.by_error = torch.zeros(2, GROUPS, CELLS, dtype=torch.float64, device=device)
        self.by_pit = torch.zeros(1, GROUPS, PIT_BINS, dtype=torch.float64, device=device)

    @property
    def n_values(self) -> int:
        """Number of values that are judged."""
        return int(self.by_pit.sum())

    def update(
        self, residual: Tensor, std: Tensor, among: Tensor, pit: Tensor | None = None
    ) -> None:
        """Add examples, (B, D) each, of which the values ``among`` are judged."""
        residual, std = residual.double(), std.double()
        z = residual / std
        if not bool(torch.all((std > 0) & std.isfinite() & z.isfinite())):
            raise ValueError(
                "expected finite residuals and positive, finite std, got residuals from "
                f"{float(residual.min()):g} to {float(residual.max()):g} and std from "
                f"{float(std.min()):g} to {float(std.max()):g}"
            )

        half_widths = (1.0, 2.0, 3.0, *self.interval_factors)
        rows = [among, *(among & (z.abs() <= k) for k in half_widths)]
        rows.append(z.square().masked_fill(~among, 0.0))
        if pit is None:
            pit = torch.special.ndtr(z)
        else:
            self.is_digital = True
            rows += [among & ((2 * pit - 1).abs() <= share) for share in NOMINAL_COVERAGE]
        self.per_example.append(torch.stack([row.double().sum(1) for row in rows]))

        group = (self.n + torch.arange(len(residual), device=residual.device)) % GROUPS
        group = group[:, None].expand_as(residual)[among]
        residual, std, pit = residual[among], std[among], pit[among]
        squared = residual.square()
        self.by_std += _histogram(group, _cell(std), CELLS, std.square(), squared)
        self.by_error += _histogram(group, _cell(residual.abs()), CELLS, squared)

        pit_bin = (pit * PIT_BINS).long().clamp_max(PIT_BINS - 1)
        self.by_pit += _histogram(group, pit_bin, PIT_BINS)

        self.n += len(z)

    def calibration(self) -> Calibration:
        if self.n == 0:
            raise ValueError("no examples to judge the noise by; give at least one batch")
        if self.n_values == 0:
            raise ValueError("no values to judge the noise by; among is False for all of them")

        by_std = _occupied_cells(self.by_std)
        by_error = _occupied_cells(self.by_error)
        by_pit = self.by_pit.cpu().numpy()

        def sparsification(groups: NDArray[np.int64] | slice) -> Sparsification:
            return _sparsification(by_std[:, groups].sum(1), by_error[:, groups].sum(1))

        def calibration_error(groups: NDArray[np.int64]) -> float:
            return _normalised_calibration_error(_reliability(by_std[:, groups].sum(1)))

        def pit_error(groups: NDArray[np.int64]) -> float:
            return _pit_histogram_error(by_pit[0, groups].sum(0))

        def area(groups: NDArray[np.int64]) -> float:
            return _area_above_oracle(sparsification(groups))

        def random_area(groups: NDArray[np.int64]) -> float:
            random_order = sparsification(groups)._replace(model=np.ones_like(REMOVED))
            return _area_above_oracle(random_order)

        counts, *sums = torch.cat(self.per_example, 1).cpu().numpy()
        means = [Estimate.of_ratio(row, counts) for row in sums]

        return Calibration(
            coverage_1=means[0],
            coverage_2=means[1],
            coverage_3=means[2],
            interval_coverage_1=means[3],
            interval_coverage_2=means[4],
            interval_coverage_3=means[5],
            standardised_var=means[6],
            normalised_calibration_error=self._over_groups(calibration_error),
            pit_histogram_error=self._over_groups(pit_error),
            sparsification_error_area=self._over_groups(area),
            random_sparsification_error_area=self._over_groups(random_area),
            reliability=_reliability(by_std.sum(1)),
            sparsification=sparsification(slice(None)),
            pit_histogram=by_pit[0].sum(0) / by_pit.sum(),
            digital_coverage_1=means[7] if self.is_digital else None,
            digital_coverage_2=means[8] if self.is_digital else None,
            digital_coverage_3=means[9] if self.is_digital else None,
        )

    def _over_groups(self, figure: Callable[[NDArray[np.int64]], float]) -> Estimate:
        """Estimate a figure of a subset of the groups, with a standard error over the groups."""
        groups = self.by_pit[0].any(1).nonzero()[:, 0].cpu().numpy()
        estimate = jackknife(lambda rows: figure(groups[rows]), len(groups), len(groups))
        return estimate._replace(n=self.n)


def _occupied_cells(histogram: Tensor) -> Array:
    """The cells of a histogram that hold a value, of all groups, (columns, GROUPS, occupied)."""
    occupied = histogram[0].any(0)
    cells: Array = histogram[:, :, occupied].cpu().numpy()
    return cells


def _cell(values: Tensor) -> Tensor:
    """Position of non-negative values among the numbers of bfloat16: their bits as an integer."""
    return values.to(torch.bfloat16).view(torch.int16).long()


def _histogram(group: Tensor, cell: Tensor, n_cells: int, *weights: Tensor) -> Tensor:
    """Count and sum of each weight, per group and cell, (1 + weights, GROUPS, n_cells)."""
    index = (group * n_cells + cell).flatten()
    columns = [torch.bincount(index, minlength=GROUPS * n_cells).double()]
    columns += [torch.bincount(index, weight.flatten(), GROUPS * n_cells) for weight in weights]

    return torch.stack(columns).view(-1, GROUPS, n_cells)


def _sums_of_lowest(histogram: Array, shares: Array) -> Array:
    """Count and sums over the lowest values that make up each share, (columns, shares).

    A share that ends within a tie receives a proportional part of the tie's sums.
    """
    cumulative = np.pad(histogram.cumsum(1), ((0, 0), (1, 0)))
    rank = cumulative[0] / cumulative[0, -1]

    return np.stack([np.interp(shares, rank, column) for column in cumulative])


def _reliability(by_std: Array) -> Reliability:
    edges = np.linspace(0, 1, RELIABILITY_BINS + 1)
    count, var, squared = np.diff(_sums_of_lowest(by_std, edges))

    return Reliability(np.sqrt(var / count), np.sqrt(squared / count))


def _normalised_calibration_error(reliability: Reliability) -> float:
    predicted, observed = reliability
    return float(np.mean(np.abs(predicted - observed) / predicted))


def _pit_histogram_error(counts: Array) -> float:
    return float(np.abs(counts / counts.sum() - 1 / PIT_BINS).sum())


def _sparsification(by_std: Array, by_error: Array) -> Sparsification:
    return Sparsification(REMOVED, _remaining_error(by_std), _remaining_error(by_error))


def _remaining_error(histogram: Array) -> Array:
    """RMSE of what is left when the highest values are removed, over the RMSE of all, (100,)."""
    count, *_, squared = _sums_of_lowest(histogram, 1 - REMOVED)
    mse = squared[0] / count[0]
    if mse == 0:
        return np.ones_like(REMOVED)

    relative: Array = np.sqrt(squared / count / mse)
    return relative


def _area_above_oracle(curves: Sparsification) -> float:
    return float(np.trapezoid(curves.model - curves.oracle, curves.removed))
