r"""Noise models: how the decoder's mean m(z) becomes a likelihood p(x|z) = N(m(z), sigma^2), eqs. (8), (10), (11).

The variance sets the exchange rate between reconstruction and prior: the squared error enters the evidence
lower bound with weight 1/(2 sigma^2). Four models, from rigid to free:

======================= ============================================= ==========================
:class:`FixedNoise`     one given variance (0.5 is the plain VAE)     eq. (8)
:class:`GlobalNoise`    one learned variance, closed form             eqs. (8), (10)
:class:`DimensionNoise` one per pixel or channel, shared by inputs    eq. (10) per dimension
:class:`PredictedNoise` one per pixel and input, from a network       eq. (11)
======================= ============================================= ==========================

Each maps codes z (B, d) to a log-variance that broadcasts against the data (B, \*).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.gaussian import sum_dimensions

NoiseUpdate = Literal["closed-form", "gradient"]
AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sum of a tensor over processes, the same in all of them."""

MIN_VAR = 1e-10
"""Smallest variance of any model, in squared units of data of order one: float32 cannot resolve a smaller residual."""
MAX_INTERVAL_STD, INTERVAL_POINTS = 4.0, 33
"""Calibrated intervals are known every eighth of a std up to four, and interpolated between."""


class ResidualVariance(nn.Module):
    r"""Mean squared residual as sum and count in float64, the closed form of eq. (10).

    .. math:: \sigma_*^2 = \frac1{ND} \sum_n \mathrm{E}_{q(z|x_n)} \sum_i (x_{ni} - m_i(z))^2

    The residuals must come from *samples* z of q(z|x): the expectation over z belongs to the equation,
    and the posterior mean in its place underestimates the variance. Sums add up, so partial results of
    several processes combine by adding ``sum`` and ``count``.

    Args:
        shape: () for one variance; otherwise a shape that broadcasts to one example's, with 1 for each axis
            that is averaged over.

    Example:
        >>> statistic = ResidualVariance()
        >>> statistic.update(torch.tensor([[1.0, 3.0], [1.0, 1.0]]))
        >>> statistic.var
        tensor(3., dtype=torch.float64)
    """

    sum: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(
        self,
        residual: Float[Tensor, "batch *event"],
        keep: float = 1.0,
        all_reduce: AllReduce | None = None,
    ) -> None:
        r"""Add a batch.

        Args:
            residual: x - m(z), (B, \*), in the unit of the data.
            keep: factor on everything seen before; below one, old batches are forgotten exponentially.
            all_reduce: if given, ``residual`` is this process's part of the batch, and the sums of all are added.
        """
        squared = residual.square()
        if not self.sum.ndim:
            squared = sum_dimensions(
                squared
            )  # so few that float32 is enough; float64 is slow on many devices
        squared = squared.sum(0, dtype=torch.float64).sum_to_size(self.sum.shape)
        count: float | Tensor = residual.numel() / self.sum.numel()
        if all_reduce is not None:
            totals = all_reduce(torch.cat([squared.flatten(), squared.new_tensor([count])]))
            squared, count = totals[:-1].view_as(squared), totals[-1]
        self.sum.mul_(keep).add_(squared)
        self.count.mul_(keep).add_(count)

    def all_reduce(self, all_reduce: AllReduce) -> None:
        """Take in what other processes have seen.

        Args:
            all_reduce: sums over the processes.
        """
        self.sum.copy_(all_reduce(self.sum))
        self.count.copy_(all_reduce(self.count))

    @property
    def var(self) -> Tensor:
        """The variance, of the given shape, in the squared unit of the data; NaN before the first batch."""
        return self.sum / self.count


class ResidualQuantiles(nn.Module):
    r"""Quantiles of the size of standardised residuals, from a histogram that takes in any number of them.

    Each power of two has 2048 cells, so that a quantile is exact to 0.05 %, and rounded up. Counts add up, so partial
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
            standardised: (x - m(z)) / std(z), any shape.

        Raises:
            ValueError: if a value is not finite.
        """
        size = standardised.abs().float().flatten()
        if not bool(size.isfinite().all()):
            raise ValueError(
                "expected finite residuals and a positive std, but their ratio is not finite"
            )
        cell = (
            size.view(torch.int32) >> self.SHIFT
        )  # floats that are not negative have the order of their bits
        self.counts += torch.bincount(cell, minlength=len(self.counts))

    def all_reduce(self, all_reduce: AllReduce) -> None:
        """Take in what other processes have seen.

        Args:
            all_reduce: sums over the processes.
        """
        self.counts.copy_(all_reduce(self.counts))

    def quantile(self, share: Float[Tensor, " shares"]) -> Float[Tensor, " shares"]:
        """Smallest size that at least the given shares of the residuals do not exceed.

        Args:
            share: each within 0 and 1.

        Returns:
            One size per share, float32, in predicted std.

        Raises:
            ValueError: if there have been no residuals.
        """
        cumulative = self.counts.cumsum(0)
        if not (n := int(cumulative[-1])):
            raise ValueError(
                "no residuals to take quantiles of; give at least one batch of held-out data"
            )
        rank = (share.double().to(cumulative.device) * n).ceil().clamp(1, n).long()
        cell = torch.searchsorted(cumulative, rank)
        return ((cell + 1) << self.SHIFT).to(torch.int32).view(torch.float32)


class NoiseModel(nn.Module, ABC):
    """The variance of p(x|z) as a function of the code."""

    @abstractmethod
    def forward(self, z: Float[Tensor, "batch latent"]) -> Tensor:
        r"""Log-variance of the likelihood.

        Args:
            z: codes, (B, d).

        Returns:
            Natural logarithm of the variance; broadcasts to (B, \*).
        """

    def update(self, residual: Tensor, all_reduce: AllReduce | None = None) -> None:
        r"""Take a training batch into the closed form (10); does nothing where the model has none.

        Args:
            residual: x - m(z) with z sampled from q(z|x), (B, \*).
            all_reduce: if given, ``residual`` is this process's part of the batch.
        """

    def set_var(self, var: Tensor) -> None:
        """Replace the variance by the exact closed form over a whole data set; does nothing where there is none.

        Args:
            var: the variance, of the shape of :attr:`statistic_shape`.
        """

    @property
    def statistic_shape(self) -> tuple[int, ...]:
        """Shape of the closed form (10) that this model would take."""
        return ()

    @property
    def floor_var(self) -> Tensor:
        """Smallest variance that the model can produce; zero where there is no floor."""
        return torch.zeros(())

    def interval_factor(self, n_std: float) -> float:
        """Predicted std that hold as large a share of the errors as a Gaussian has within so many of its std.

        Args:
            n_std: std of a Gaussian, at least 0.

        Returns:
            The same number, where the model has not learned better from held-out errors.
        """
        return n_std

    def floor_share(self, log_var: Tensor) -> Tensor:
        """Share of the given log-variances at which the floor is active.

        Args:
            log_var: what ``forward`` returned.

        Returns:
            Scalar between 0 and 1.
        """
        return torch.zeros((), device=log_var.device)

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Constructor arguments as JSON values, from which ``store.py`` builds the model before it fills it."""


class FixedNoise(NoiseModel):
    """One given variance, eq. (8): 0.5 is the usual 'squared error + KL', 1 the paper's beta-VAE (beta = 2).

    Args:
        var: the variance, in the squared unit of the data.

    Raises:
        ValueError: if ``var`` is not positive and finite.
    """

    log_var: Tensor

    def __init__(self, var: float = 0.5) -> None:
        super().__init__()
        if not (var > 0 and math.isfinite(var)):
            raise ValueError(f"FixedNoise needs a positive, finite variance, got {var}.")
        self.register_buffer("log_var", torch.tensor(math.log(var)))

    def forward(self, z: Float[Tensor, "batch latent"]) -> Tensor:
        """Logarithm of the given variance, ()."""
        return self.log_var

    def description(self) -> dict[str, Any]:
        """The variance."""
        return {"kind": "FixedNoise", "var": self.log_var.exp().item()}


class _SharedNoise(NoiseModel):
    """What :class:`GlobalNoise` and :class:`DimensionNoise` have in common: a learned variance that ignores z."""

    log_var: Tensor

    def __init__(
        self, shape: tuple[int, ...], update: NoiseUpdate, min_var: float, memory: int
    ) -> None:
        super().__init__()
        if update not in ("closed-form", "gradient"):
            raise ValueError(f"update must be 'closed-form' or 'gradient', got {update!r}.")
        if not min_var > 0 or memory < 1:
            raise ValueError(f"Need min_var > 0 and memory >= 1 batch, got {min_var} and {memory}.")
        self.update_rule = update
        self.memory = memory
        self.min_var = min_var
        if update == "gradient":
            self.log_var = nn.Parameter(torch.zeros(shape))
        else:
            self.register_buffer("log_var", torch.zeros(shape))
        self.running = ResidualVariance(shape)

    def forward(self, z: Float[Tensor, "batch latent"]) -> Tensor:
        if self.update_rule == "gradient":
            return lower_bound(self.log_var, self.log_var.new_tensor(math.log(self.min_var)))
        return self.log_var

    def update(self, residual: Tensor, all_reduce: AllReduce | None = None) -> None:
        r"""Alternate, as Algorithm 1 does: after a step on the networks, sigma^2 becomes the closed form (10).

        Within an epoch the sum over all N examples is a running one over about the last ``memory`` batches,
        because older residuals belong to older networks. Under ``update="gradient"`` only the very first
        batch counts: it puts the parameter at the optimum from which gradients then move it.

        Args:
            residual: x - m(z) with z sampled from q(z|x), (B, \*).
            all_reduce: if given, ``residual`` is this process's part of the batch.
        """
        if self.update_rule == "closed-form":
            self.running.update(residual, 1 - 1 / self.memory, all_reduce)
            self.set_var(self.running.var)
        elif not self.running.count:
            self.running.update(residual, all_reduce=all_reduce)
            self.set_var(self.running.var)

    @torch.no_grad()
    def set_var(self, var: Tensor) -> None:
        self.log_var.copy_(var.clamp_min(self.min_var).log())

    @property
    def statistic_shape(self) -> tuple[int, ...]:
        return tuple(self.log_var.shape)

    @property
    def floor_var(self) -> Tensor:
        return self.log_var.new_tensor(self.min_var)

    def floor_share(self, log_var: Tensor) -> Tensor:
        return (log_var <= math.log(self.min_var) + 1e-5).float().mean()

    def description(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "update": self.update_rule,
            "min_var": self.min_var,
            "memory": self.memory,
        }


class GlobalNoise(_SharedNoise):
    r"""One learned variance for all pixels and inputs, eqs. (8)-(10): the heart of the paper.

    At the optimum the gradient of the evidence lower bound with respect to sigma^2 vanishes, so the closed
    form (10) replaces a gradient step: nothing is tuned and it converges at once.

    Args:
        update: "closed-form" (10), or "gradient" to learn log sigma^2 by the optimiser.
        min_var: smallest variance, in the squared unit of the data.
        memory: batches over which the running estimate extends within an epoch.

    Raises:
        ValueError: if an argument is out of its domain.

    Example:
        >>> noise = GlobalNoise()
        >>> noise.update(torch.full((4, 3), 0.1))
        >>> noise(torch.zeros(4, 2)).exp()
        tensor(0.0100)
    """

    def __init__(
        self, update: NoiseUpdate = "closed-form", *, min_var: float = MIN_VAR, memory: int = 100
    ) -> None:
        super().__init__((), update, min_var, memory)


class DimensionNoise(_SharedNoise):
    r"""One learned variance per dimension, shared by all inputs: eq. (10) with the sum over i taken away.

    Args:
        shape: broadcasts to one example's: (C, H, W) for one variance per pixel, (C, 1, 1) per channel, (D,) per
            column.
        update: "closed-form" or "gradient".
        min_var: smallest variance, in the squared unit of the data. A dimension that is constant in the data would
            otherwise drive its variance to zero and the likelihood to infinity.
        memory: batches over which the running estimate extends within an epoch.

    Raises:
        ValueError: if an argument is out of its domain.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        update: NoiseUpdate = "closed-form",
        *,
        min_var: float = 1e-6,
        memory: int = 100,
    ) -> None:
        super().__init__(shape, update, min_var, memory)

    def description(self) -> dict[str, Any]:
        """The options and the shape."""
        return super().description() | {"shape": list(self.log_var.shape)}


class PredictedNoise(NoiseModel):
    r"""A variance per pixel and per input, predicted from the code, eq. (11).

    .. math:: \log\sigma_i^2(z) = \max\bigl(\log\sigma_*^2 + h_i(z),\ \log\sigma_{\min}^2\bigr) + c_i

    with the network h, the optimal global variance sigma_*^2 of stage 1 and the floor that Algorithm 1 hands
    over (without one the log-variance gradient dominates and the prediction gets stuck near zero). c is zero
    until it is recalibrated. A network h = 0 is exactly :class:`GlobalNoise`: stage 2 starts where stage 1 ended.

    Args:
        network: h, any module from (B, d) to (B, \*).
        reference_var: sigma_*^2, a scalar or a shape that broadcasts to one example's.
        floor_var: sigma_min^2, likewise.
        calibration_shape: () for one c, or one example's shape for one c per dimension.

    Raises:
        ValueError: if a variance is not positive and finite.
    """

    reference_log_var: Tensor
    floor_log_var: Tensor
    calibration: Tensor
    interval_factors: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        reference_var: Tensor,
        floor_var: Tensor,
        calibration_shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        for name, var in (("reference_var", reference_var), ("floor_var", floor_var)):
            if not bool(torch.all(var > 0) and torch.all(torch.isfinite(var))):
                raise ValueError(f"{name} must be positive and finite, got {var}.")
        self.network = network
        dtype = torch.get_default_dtype()
        self.register_buffer("reference_log_var", reference_var.log().to(dtype))
        self.register_buffer("floor_log_var", floor_var.log().to(dtype))
        self.register_buffer(
            "calibration", torch.zeros(calibration_shape, device=reference_var.device)
        )
        self.register_buffer("interval_factors", None)

    def forward(self, z: Float[Tensor, "batch latent"]) -> Tensor:
        r"""Log-variance of eq. (11), bounded and calibrated, (B, \*)."""
        correction = self.network(z)
        log_var = self.reference_log_var + correction.to(
            torch.promote_types(correction.dtype, self.reference_log_var.dtype)
        )
        return lower_bound(log_var, self.floor_log_var) + self.calibration

    @property
    def floor_var(self) -> Tensor:
        """The lowest of the floors, after calibration."""
        return (self.floor_log_var + self.calibration).min().exp()

    def floor_share(self, log_var: Tensor) -> Tensor:
        """Share of the log-variances on their floor."""
        return (log_var <= self.floor_log_var + self.calibration + 1e-5).float().mean()

    @torch.no_grad()
    def recalibrate(self, standardised: ResidualVariance, shrinkage: float = 1.0) -> None:
        r"""Rescale the predicted variance so that held-out standardised residuals have unit variance.

        The scale is eq. (10) once more, for residuals divided by their predicted standard deviation, hence
        the one of highest held-out likelihood. One scale per dimension is shrunk to the common scale with
        the weight of ``shrinkage`` examples, since some pixels never vary.

        Args:
            standardised: statistic of (x - m(z)) / std(z) on held-out data, of shape () or one example's.
            shrinkage: weight of the common scale, in examples.

        Raises:
            ValueError: if the statistic has seen no data, or all its residuals are zero.
        """
        common = standardised.sum.mean() / standardised.count
        if not bool(torch.isfinite(common) and common > 0):
            raise ValueError("Recalibration needs held-out residuals that are not all zero.")
        scale = (standardised.sum + shrinkage * common) / (standardised.count + shrinkage)
        if standardised.sum.ndim == 0:
            scale = common
        self.calibration = (self.calibration + scale.log()).to(self.calibration.dtype)
        if (
            self.interval_factors is not None
        ):  # the intervals stay, as far as one factor for all can tell
            one_scale = scale.ndim == 0
            self.interval_factors = (
                (self.interval_factors / scale.sqrt()).to(self.calibration) if one_scale else None
            )

    @torch.no_grad()
    def calibrate_intervals(
        self, standardised: ResidualQuantiles, *, rescale: bool = False
    ) -> None:
        r"""Learn from held-out data how many predicted std hold which share of the errors.

        .. math:: q(k) = \min\bigl\{ q : \mathrm{share}(|x_{ni} - m_i| \le q\, std_{ni}) \ge
            \mathrm{erf}(k / \sqrt2) \bigr\}

        A Gaussian has q(k) = k; of errors with heavier tails q(1) is below and q(3) above it. Split conformal
        prediction: whatever the errors' distribution, a dimension drawn at random of a new example lies within q(k) std
        of its mean with a probability of at least N / (N + 1) times that of k, N being the number of held-out examples.
        Angelopoulos and Bates (2021), *A gentle introduction to conformal prediction*; for groups, here of dimensions,
        Dunn, Wasserman and Ramdas (2018), *Distribution-free prediction sets for two-layer hierarchical models*.

        Args:
            standardised: of (x - m(z)) / std(z) on held-out data, over the dimensions that vary.
            rescale: multiply the predicted std, and with it the likelihood's, by q(1), so that one std holds .683.

        Raises:
            ValueError: if the statistic has seen no data, or, to rescale, if q(1) is zero.
        """
        n_std = torch.linspace(0, MAX_INTERVAL_STD, INTERVAL_POINTS, dtype=torch.float64)
        factors = standardised.quantile(torch.erf(n_std / math.sqrt(2))).double()
        factors[0] = 0.0
        if rescale:
            one = _interpolate(factors, 1.0)
            if not one > MIN_VAR:
                raise ValueError(
                    "Recalibration needs held-out residuals of which at least a third are not zero."
                )
            self.calibration = (self.calibration + 2 * math.log(one)).to(self.calibration.dtype)
            factors = factors / one
        self.interval_factors = factors.to(self.calibration)

    def interval_factor(self, n_std: float) -> float:
        """The function q of :meth:`calibrate_intervals`; before it, the number itself."""
        return (
            n_std if self.interval_factors is None else _interpolate(self.interval_factors, n_std)
        )

    def description(self) -> dict[str, Any]:
        """The shapes; the network is the decoder's kind."""
        return {
            "kind": "PredictedNoise",
            "reference_shape": list(self.reference_log_var.shape),
            "floor_shape": list(self.floor_log_var.shape),
            "calibration_shape": list(self.calibration.shape),
            "interval_points": 0 if self.interval_factors is None else len(self.interval_factors),
        }


def _interpolate(factors: Tensor, n_std: float) -> float:
    """Value at ``n_std`` of a function with given values from 0 to ``MAX_INTERVAL_STD``, linear beyond it."""
    position = n_std / MAX_INTERVAL_STD * (len(factors) - 1)
    below = min(int(position), len(factors) - 2)
    low, high = factors[below : below + 2].tolist()
    return float(low + (position - below) * (high - low))


class _Clamp(torch.autograd.Function):
    """Values within bounds; the gradient of one beyond them is kept where descent would bring it back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: Tensor | float, high: float | None) -> Tensor:  # noqa: ANN401 (torch's own context type)
        clamped = values.clamp(low, high)  # type: ignore[arg-type] # a tensor and None serve
        ctx.save_for_backward(values, clamped)
        return clamped

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (gradient,) = gradients
        values, clamped = ctx.saved_tensors
        # Descent moves a value further out where excess and gradient differ in sign: where their product is negative.
        # The kernel of a ReLU's gradient is a quarter of the time of torch.where on a CPU.
        product = (values - clamped) * gradient
        return (
            torch.ops.aten.threshold_backward(gradient, product, -torch.finfo(product.dtype).tiny),
            None,
            None,
        )


def lower_bound(values: Tensor, bound: Tensor) -> Tensor:
    """Clamp from below, exactly, without losing the gradient that would lift a value off the bound.

    ``torch.clamp`` has no gradient below the bound, so a variance that once fell under its floor would stay
    there; a softplus has one but bends every value above the floor.

    Args:
        values: any shape.
        bound: broadcasts to ``values``; receives no gradient.

    Returns:
        The larger of the two, elementwise.

    Example:
        >>> raw = torch.tensor([-1.0, -1.0, 2.0], requires_grad=True)
        >>> (lower_bound(raw, torch.tensor(0.0)) * torch.tensor([1.0, -1.0, 1.0])).sum().backward()
        >>> raw.grad  # descent raises the second: kept; it would lower the first: dropped
        tensor([ 0., -1.,  1.])
    """
    return _clamp(values, bound, None)


def bounded(values: Tensor, low: float, high: float) -> Tensor:
    """Clamp on both sides, exactly, without losing the gradient that would bring a value back, see :func:`lower_bound`.

    Args:
        values: any shape.
        low: smallest value of the result.
        high: largest value of the result.

    Returns:
        The values, those beyond a bound replaced by it.

    Example:
        >>> bounded(torch.tensor([-0.2, 0.4, 1.3]), 0.1, 1.0)
        tensor([0.1000, 0.4000, 1.0000])
    """
    return _clamp(values, low, high)


_clamp = cast(Callable[[Tensor, Tensor | float, float | None], Tensor], _Clamp.apply)
