r"""Noise models: how the decoder's mean m(z) becomes a likelihood p(x|z) = N(m(z), sigma^2).

The variance sets the balance between reconstruction and prior: the squared error enters the
evidence lower bound with the weight 1/(2 sigma^2). Four models, from rigid to free:

======================= ============================================= ======================
:class:`FixedNoise`     one given variance (0.5 is the plain VAE)     eq. (8)
:class:`GlobalNoise`    one learned variance, in closed form          eqs. (8), (10)
:class:`DimensionNoise` one per pixel or channel, shared by inputs    eq. (10) per dimension
:class:`PredictedNoise` one per pixel and input, from a network       eq. (11)
======================= ============================================= ======================

:class:`equipoise.correlated_noise.CorrelatedNoise` adds a correlation of the dimensions to any of
them, once training is over.

Each maps codes z (B, d) to a log-variance that broadcasts against the data (B, \*). A noise model
of your own is a subclass of :class:`NoiseModel`. Defining it is enough: models that have it are
saved, loaded and resumed like all others, as long as the module that defines it is imported.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.correlation import AnyGaussian
from equipoise.gaussian import Gaussian
from equipoise.kernels import lower_bound
from equipoise.residuals import AllReduce, ErrorsByStd, ResidualQuantiles, ResidualVariance

NoiseUpdate = Literal["closed-form", "gradient"]

MIN_VAR = 1e-10
"""Smallest variance of any model, in squared units of data of order one. float32 cannot resolve a
smaller residual."""
MAX_LOG_VAR = 60.0
"""Largest log-variance that is predicted in evaluation. Its std of 1e13 float32 still squares."""
MAP_POINTS = 129
"""Knots of a calibrated map of the log-std, from the smallest to the largest that was found."""
MAX_INTERVAL_STD, INTERVAL_POINTS = 4.0, 33
"""Calibrated intervals are known at every eighth of a std up to four, and interpolated between."""


class NoiseModel(nn.Module, ABC):
    """The variance of p(x|z) as a function of the code.

    A subclass needs :meth:`forward` and :meth:`description`. Everything else has a default that
    means: there is no closed form, no floor, no calibration, and every parameter learns like the
    weights of a network.
    """

    summary: ClassVar[str] = "The noise variance comes from a noise model of the user's own"
    """The model in words, for the model card of a published run."""
    depends_on_code: bool = False
    """Whether the variance differs between inputs, so that there is a map of it to look at."""
    reads_features: bool = False
    """Whether :meth:`forward` takes what the decoder's layer ``hidden`` returns, and not codes."""

    overfitting: float | Tensor = 1.0
    """Ratio of the variance of held-out residuals to that of training residuals, by which the
    closed form multiplies the latter within an epoch. The training loop sets it after each."""

    is_closed_form: bool = False
    """Whether :meth:`update` sets the variance to :attr:`overfitting` times eq. (10)."""

    _classes: ClassVar[dict[str, type["NoiseModel"]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401 (of any metaclass)
        super().__init_subclass__(**options)
        known = NoiseModel._classes.get(cls.__name__)
        if known is not None and known.__module__ != cls.__module__:
            raise TypeError(
                f"there is a noise model {cls.__name__} in {known.__module__} already; "
                "saved models are built again by this name, so choose another"
            )
        NoiseModel._classes[cls.__name__] = cls

    @abstractmethod
    def forward(self, z: Float[Tensor, "batch latent"]) -> Tensor:
        r"""Compute the log-variance of the likelihood.

        Args:
            z: Codes, (B, d).

        Returns:
            Natural logarithm of the variance; broadcasts to (B, \*).
        """

    def likelihood(
        self, mean: Float[Tensor, "batch *event"], z: Float[Tensor, "batch *context"]
    ) -> AnyGaussian:
        r"""Put the noise around a mean: p(x|z).

        Args:
            mean: Mean m(z), (B, \*).
            z: What :meth:`forward` takes: codes (B, d), or features if :attr:`reads_features`.

        Returns:
            Gaussian over data, (B, \*), of independent errors unless a subclass knows better.
        """
        return Gaussian(mean, self(z))

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Describe the model by JSON values, from which it is built again."""

    @classmethod
    def from_description(
        cls, description: dict[str, Any], make_network: Callable[..., nn.Module]
    ) -> "NoiseModel":
        """Build the model that a description is of; its tensors are filled afterwards.

        The default takes the description as the arguments of the constructor.

        Args:
            description: What :meth:`description` returned.
            make_network: Makes an untrained network from codes (B, d) to the shape of the data.
                Called with ``reads_features=True``, it makes one from the decoder's features.

        Returns:
            The noise model, with meaningless values.
        """
        return cls(**description)

    def update(self, residual: Tensor, all_reduce: AllReduce | None = None) -> None:
        r"""Take a training batch into the closed form (10); does nothing where there is none.

        Args:
            residual: x - m(z) with z sampled from q(z|x), (B, \*).
            all_reduce: Sums over processes, if ``residual`` is this process's part of the batch.
        """

    def set_var(self, var: Tensor) -> None:
        """Replace the variance by the closed form over a whole data set, where there is one.

        Args:
            var: The variance, of the shape of :attr:`statistic_shape`.
        """

    @property
    def statistic_shape(self) -> tuple[int, ...]:
        """Shape of the closed form (10) that this model would take."""
        return ()

    @property
    def shared_log_var(self) -> Tensor | None:
        """Log of the variance that all inputs share, which is eq. (10) where it is learned.

        None where there is no such variance.
        """
        return None

    @property
    def floor_var(self) -> Tensor:
        """Smallest variance that the model can produce; zero where there is no floor."""
        return torch.zeros(())

    def floor_share(self, log_var: Tensor) -> Tensor:
        """Compute the share of log-variances at which the floor is active.

        Args:
            log_var: What ``forward`` returned.

        Returns:
            Scalar between 0 and 1.
        """
        return torch.zeros((), device=log_var.device)

    def interval_factor(self, n_std: float) -> float:
        """Return the half-width of an interval, in predicted std.

        The interval holds the share of the errors that a Gaussian has within ``n_std`` of its std.

        Args:
            n_std: Std of a Gaussian, at least 0.

        Returns:
            The same number, where the model has not learned better from held-out errors.
        """
        return n_std

    def recalibrate(self, standardised: ResidualVariance) -> None:
        """Rescale the variance by held-out residuals, where the model has a scale for that.

        Args:
            standardised: Statistic of (x - m(z)) / std(z) on held-out data, of the shape of
                :attr:`calibration_shape`.
        """

    def forget_calibration(self) -> None:
        """Predict the std as before any calibration, where the model has one."""

    def calibrate_std(self, errors: ErrorsByStd, min_var: float = MIN_VAR) -> None:
        """Replace the predicted std by the errors that were found, where the model can.

        Args:
            errors: Held-out residuals by the std that this model predicts.
            min_var: Smallest variance that can be found, in squared model units.
        """

    def calibrate_intervals(
        self, standardised: ResidualQuantiles, *, rescale: bool = False
    ) -> None:
        """Learn :meth:`interval_factor` from held-out residuals, where the model has that.

        Args:
            standardised: Of (x - m(z)) / std(z) on held-out data, over the dimensions that vary.
            rescale: Multiply the predicted std, so that one std holds .683 of the errors.
        """

    @property
    def calibration_shape(self) -> tuple[int, ...]:
        """Shape of the statistic that :meth:`recalibrate` takes."""
        return ()

    @property
    def calibration_scale(self) -> float:
        """Mean factor by which calibration has multiplied the predicted std."""
        return 1.0

    def learning_rate_factors(self) -> dict[str, float]:
        """Name the parameters that are not a network's weights, with factors on the learning rate.

        These parameters are also left out of weight decay, which would pull them towards zero.

        Returns:
            Factor by parameter name; empty where every parameter learns like a network.
        """
        return {}

    def networks(self) -> list[nn.Module]:
        """List the networks within the model, which can be compiled.

        Returns:
            The networks; none where the variance does not come from one.
        """
        return []


def noise_class(name: str) -> type[NoiseModel]:
    """Look up the class of a noise model.

    Args:
        name: Name of the class.

    Returns:
        The class.

    Raises:
        ValueError: if no class of that name has been defined.
    """
    if name not in NoiseModel._classes:
        raise ValueError(
            f"the noise model {name!r} is not defined; "
            "import the module with its class before the model is loaded"
        )
    return NoiseModel._classes[name]


def build_noise(description: dict[str, Any], make_network: Callable[..., nn.Module]) -> NoiseModel:
    """Build the noise model that a description is of; its tensors are filled afterwards.

    Args:
        description: What :func:`describe_noise` returned.
        make_network: Makes an untrained network, see :meth:`NoiseModel.from_description`.

    Returns:
        The noise model, with meaningless values.

    Raises:
        ValueError: if no class of that name has been defined.
    """
    cls = noise_class(description["kind"])
    return cls.from_description(description["arguments"], make_network)


def describe_noise(noise: NoiseModel) -> dict[str, Any]:
    """Describe a noise model by JSON values, from which :func:`build_noise` builds it again.

    Args:
        noise: Any noise model.

    Returns:
        The name of its class as "kind", and its :meth:`NoiseModel.description` as "arguments".
    """
    return {"kind": type(noise).__name__, "arguments": noise.description()}


class FixedNoise(NoiseModel):
    """One given variance, eq. (8).

    0.5 is the usual 'squared error + KL', and 1 the paper's beta-VAE (beta = 2).

    Args:
        var: The variance, in the squared unit of the data.

    Raises:
        ValueError: if ``var`` is not positive and finite.
    """

    summary = "The noise variance is given, not learned"
    log_var: Tensor

    def __init__(self, var: float = 0.5) -> None:
        super().__init__()
        if not (var > 0 and math.isfinite(var)):
            raise ValueError(f"FixedNoise needs a positive, finite variance, got {var}.")
        self.register_buffer("log_var", torch.tensor(math.log(var)))

    def forward(self, z: Float[Tensor, "batch latent"]) -> Tensor:
        """Return the logarithm of the given variance, ()."""
        return self.log_var

    @property
    def shared_log_var(self) -> Tensor:
        """Logarithm of the given variance."""
        return self.log_var

    def description(self) -> dict[str, Any]:
        """Return the variance."""
        return {"var": self.log_var.exp().item()}


class _SharedNoise(NoiseModel):
    """What :class:`GlobalNoise` and :class:`DimensionNoise` share: a learned variance without z."""

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
        self.is_closed_form = update == "closed-form"
        self.memory = memory
        self.min_var = min_var
        if update == "gradient":
            self.log_var = nn.Parameter(torch.zeros(shape))
        else:
            self.register_buffer("log_var", torch.zeros(shape))
        self.running = ResidualVariance(shape)

    def forward(self, z: Float[Tensor, "batch latent"]) -> Tensor:
        return self.shared_log_var

    def update(self, residual: Tensor, all_reduce: AllReduce | None = None) -> None:
        r"""Set sigma^2 to the closed form (10), after each step on the networks (Algorithm 1).

        Within an epoch the sum over all N examples is a running one over about the last ``memory``
        batches, because older residuals belong to older networks. It is multiplied by
        :attr:`overfitting`, which makes it that of held-out examples. Under ``update="gradient"``
        only the very first batch counts: it puts the parameter at the optimum, from which gradients
        then move it.

        Args:
            residual: x - m(z) with z sampled from q(z|x), (B, \*).
            all_reduce: Sums over processes, if ``residual`` is this process's part of the batch.
        """
        if self.is_closed_form:
            self.running.update(residual, 1 - 1 / self.memory, all_reduce)
            self.set_var(self.overfitting * self.running.var)
        else:
            # A mask, because a question would wait for the device.
            is_first = self.running.count == 0
            self.running.update(residual, all_reduce=all_reduce)
            log_var = self.running.var.clamp_min(self.min_var).log().to(self.log_var.dtype)
            with torch.no_grad():
                self.log_var.copy_(torch.where(is_first, log_var, self.log_var))

    @torch.no_grad()
    def set_var(self, var: Tensor) -> None:
        self.log_var.copy_(var.clamp_min(self.min_var).log())

    @property
    def statistic_shape(self) -> tuple[int, ...]:
        return tuple(self.log_var.shape)

    @property
    def shared_log_var(self) -> Tensor:
        if self.update_rule == "gradient":
            return lower_bound(self.log_var, torch.full_like(self.log_var, math.log(self.min_var)))
        return self.log_var

    @property
    def floor_var(self) -> Tensor:
        return self.log_var.new_tensor(self.min_var)

    def floor_share(self, log_var: Tensor) -> Tensor:
        return (log_var <= math.log(self.min_var) + 1e-5).float().mean()

    def learning_rate_factors(self) -> dict[str, float]:
        """Ten times the networks' rate for a variance that is learned by gradient.

        Its logarithm has a long way to go, and follows residuals that shrink all the while.
        """
        return {"log_var": 10.0} if self.update_rule == "gradient" else {}

    def description(self) -> dict[str, Any]:
        return {"update": self.update_rule, "min_var": self.min_var, "memory": self.memory}


class GlobalNoise(_SharedNoise):
    r"""One learned variance for all pixels and inputs, eqs. (8)-(10): the heart of the paper.

    At the optimum the gradient of the evidence lower bound with respect to sigma^2 vanishes. The
    closed form (10) therefore replaces a gradient step: nothing is tuned and it converges at once.

    Args:
        update: "closed-form" (10), or "gradient" to learn log sigma^2 by the optimiser.
        min_var: Smallest variance, in the squared unit of the data.
        memory: Number of batches over which the running estimate extends within an epoch.

    Raises:
        ValueError: if an argument is out of its domain.

    Example:
        >>> noise = GlobalNoise()
        >>> noise.update(torch.full((4, 3), 0.1))
        >>> noise(torch.zeros(4, 2)).exp()
        tensor(0.0100)
    """

    summary = "One noise variance is learned for all dimensions"

    def __init__(
        self, update: NoiseUpdate = "closed-form", *, min_var: float = MIN_VAR, memory: int = 100
    ) -> None:
        super().__init__((), update, min_var, memory)


class DimensionNoise(_SharedNoise):
    r"""One learned variance per dimension, shared by all inputs: eq. (10) without the sum over i.

    Args:
        shape: Broadcasts to one example's: (C, H, W) for one variance per pixel, (C, 1, 1) per
            channel, (D,) per column.
        update: "closed-form" or "gradient".
        min_var: Smallest variance, in the squared unit of the data. A dimension that is constant in
            the data would otherwise drive its variance to zero and the likelihood to infinity.
        memory: Number of batches over which the running estimate extends within an epoch.

    Raises:
        ValueError: if an argument is out of its domain.
    """

    summary = "Noise variances are learned, the same for all examples"

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
        """Return the options and the shape."""
        return super().description() | {"shape": list(self.log_var.shape)}

    @classmethod
    def from_description(
        cls, description: dict[str, Any], make_network: Callable[..., nn.Module]
    ) -> "NoiseModel":
        """Build the model that a description is of, whose shape is a list in JSON."""
        return cls(**{**description, "shape": tuple(description["shape"])})


class PredictedNoise(NoiseModel):
    r"""A variance per pixel and per input, predicted from the code, eq. (11).

    .. math:: \log\sigma_i^2(z)
        = 2 g\Bigl(\tfrac12 \max\bigl(\log\sigma_*^2 + h_i(z),\
          \log\sigma_{\min}^2\bigr)\Bigr) + c_i

    Here h is the network, sigma_*^2 the optimal variance of stage 1, and sigma_min^2 the floor that
    Algorithm 1 hands over. h reads z itself, or the features that the decoder computes from z.
    Without a floor the log-variance gradient dominates and the prediction gets stuck near zero. The
    monotone map g of the log-std is the identity and c is zero until they are calibrated. A network
    h = 0 is exactly :class:`GlobalNoise`: stage 2 starts where stage 1 ended.

    Args:
        network: h, any module from (B, d) to (B, \*); from the decoder's features to (B, \*) if
            ``reads_features``.
        reference_var: sigma_*^2, a scalar or a shape that broadcasts to one example's.
        floor_var: sigma_min^2, a scalar or a shape that broadcasts to one example's.
        calibration_shape: () for one c, or one example's shape for one c per dimension.
        reads_features: Whether the network is a head on the decoder's features.

    Raises:
        ValueError: if a variance is not positive and finite.
    """

    summary = "The noise variance is predicted for every dimension of every example"
    depends_on_code = True

    reference_log_var: Tensor
    floor_log_var: Tensor
    calibration: Tensor
    interval_factors: Tensor | None
    std_map: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        reference_var: Tensor,
        floor_var: Tensor,
        calibration_shape: tuple[int, ...] = (),
        *,
        reads_features: bool = False,
    ) -> None:
        super().__init__()
        for name, var in (("reference_var", reference_var), ("floor_var", floor_var)):
            if not bool(torch.all(var > 0) and torch.all(torch.isfinite(var))):
                raise ValueError(f"{name} must be positive and finite, got {var}.")

        self.network = network
        self.reads_features = reads_features
        dtype = torch.get_default_dtype()
        calibration = torch.zeros(calibration_shape, device=reference_var.device)
        self.register_buffer("reference_log_var", reference_var.log().to(dtype))
        self.register_buffer("floor_log_var", floor_var.log().to(dtype))
        self.register_buffer("calibration", calibration)
        self.register_buffer("interval_factors", None)
        self.register_buffer("std_map", None)

    def forward(self, z: Float[Tensor, "batch *context"]) -> Tensor:
        r"""Compute the log-variance of eq. (11), bounded and calibrated, (B, \*)."""
        correction = self.network(z)
        dtype = torch.promote_types(correction.dtype, self.reference_log_var.dtype)
        log_var = self.reference_log_var + correction.to(dtype)
        if not self.training:
            log_var = log_var.clamp_max(MAX_LOG_VAR)
        return self._calibrated(lower_bound(log_var, self.floor_log_var))

    def _calibrated(self, log_var: Tensor) -> Tensor:
        """Apply the map g, linear between its knots and of slope 1 beyond them, and the shift c."""
        if self.std_map is None:
            return log_var + self.calibration

        before, after = (2 * self.std_map).unbind()
        within = log_var.clamp(before[0], before[-1])
        beyond = log_var - within
        if len(before) == 1:
            return after + beyond + self.calibration

        step = (before[-1] - before[0]) / (len(before) - 1)
        cell = ((within.detach() - before[0]) / step).long().clamp_max(len(before) - 2)
        slope = after.diff() / step
        mapped: Tensor = after[cell] + slope[cell] * (within - before[cell])
        return mapped + beyond + self.calibration

    @property
    def shared_log_var(self) -> Tensor:
        """Logarithm of sigma_*^2, the optimum of stage 1."""
        return self.reference_log_var

    @property
    def floor_var(self) -> Tensor:
        """The lowest of the floors, after calibration."""
        return self._calibrated(self.floor_log_var).min().exp()

    def floor_share(self, log_var: Tensor) -> Tensor:
        """Compute the share of the log-variances that lie on their floor."""
        return (log_var <= self._calibrated(self.floor_log_var) + 1e-5).float().mean()

    @property
    def calibration_shape(self) -> tuple[int, ...]:
        """Shape of c."""
        return tuple(self.calibration.shape)

    @property
    def calibration_scale(self) -> float:
        """Mean factor by which calibration has multiplied the predicted std.

        Over the dimensions if there is a c for each, and over the knots of a map.
        """
        factor = (0.5 * self.calibration).exp().mean()
        if self.std_map is not None:
            before, after = self.std_map
            factor = factor * (after - before).exp().mean()
        return float(factor)

    @torch.no_grad()
    def recalibrate(self, standardised: ResidualVariance, shrinkage: float = 1.0) -> None:
        r"""Rescale the predicted variance so that held-out residuals have the predicted size.

        The scale is eq. (10) once more, for residuals divided by their predicted standard
        deviation. Hence it is the scale of highest held-out likelihood. One scale per dimension is
        shrunk towards the common scale with the weight of ``shrinkage`` examples, because some
        pixels never vary.

        Args:
            standardised: Statistic of (x - m(z)) / std(z) on held-out data, of shape () or one
                example's.
            shrinkage: Weight of the common scale, in examples.

        Raises:
            ValueError: if the statistic is without data, or all its residuals are zero.
        """
        common = standardised.sum.mean() / standardised.count.mean()
        if not bool(torch.isfinite(common) and common > 0):
            raise ValueError("Recalibration needs held-out residuals that are not all zero.")

        is_common = standardised.sum.ndim == 0
        if is_common:
            scale = common
        else:
            weight = standardised.count + shrinkage
            scale = (standardised.sum + shrinkage * common) / weight
        self.calibration = (self.calibration + scale.log()).to(self.calibration.dtype)

        if self.interval_factors is None:
            return
        if is_common:
            # The intervals stay where they were.
            factors = self.interval_factors / scale.sqrt()
            self.interval_factors = factors.to(self.calibration)
        else:
            # One factor for all dimensions does not know where they are now.
            self.interval_factors = None

    @torch.no_grad()
    def forget_calibration(self) -> None:
        """Predict the std without map and shift, and intervals as those of a Gaussian."""
        self.calibration = torch.zeros_like(self.calibration)
        self.std_map = None
        self.interval_factors = None

    @torch.no_grad()
    def calibrate_std(self, errors: ErrorsByStd, min_var: float = MIN_VAR) -> None:
        r"""Learn from held-out residuals which error a predicted std stands for.

        The map of :meth:`ErrorsByStd.monotone_map` keeps the order of the std. Where the head says
        "more uncertain", the std stays larger, but its size is the error that was found. A common
        factor, which :meth:`recalibrate` learns, is the map of one knot.

        Args:
            errors: Held-out residuals by the std that this model predicts, without a calibration.
            min_var: Smallest variance that can be found, such as that of rounding.

        Raises:
            ValueError: if there is a calibration, or there are no residuals other than zero.
        """
        if self.std_map is not None or bool(self.calibration.any()):
            raise ValueError(
                "The std are calibrated already: call forget_calibration() first, and collect "
                "the errors afterwards."
            )
        log_std, log_error = errors.monotone_map(min_var).numpy()
        if len(log_std) > 1:
            # At equal distances, among which the place of a value need not be sought.
            grid = np.linspace(log_std[0], log_std[-1], MAP_POINTS)
            log_std, log_error = grid, np.interp(grid, log_std, log_error)
        self.std_map = torch.from_numpy(np.stack([log_std, log_error])).to(self.calibration)
        # The intervals were multiples of other std.
        self.interval_factors = None

    @torch.no_grad()
    def calibrate_intervals(
        self, standardised: ResidualQuantiles, *, rescale: bool = False
    ) -> None:
        r"""Learn from held-out data which interval holds which share of the errors.

        .. math:: q(k) = \min\bigl\{ q : \mathrm{share}(|x_{ni} - m_i| \le q\, std_{ni}) \ge
            \mathrm{erf}(k / \sqrt2) \bigr\}

        A Gaussian has q(k) = k. Errors with heavier tails have a q(1) below 1 and a q(3) above 3.
        This is split conformal prediction: whatever the distribution of the errors, a dimension
        drawn at random of a new example lies within q(k) std of its mean with a probability of at
        least N / (N + 1) times that of k, where N is the number of held-out examples.
        Angelopoulos and Bates (2021), *A gentle introduction to conformal prediction*. For groups,
        which are dimensions here: Dunn, Wasserman and Ramdas (2018), *Distribution-free prediction
        sets for two-layer hierarchical models*.

        Args:
            standardised: Of (x - m(z)) / std(z) on held-out data, over the dimensions that vary.
            rescale: Multiply the predicted std, and with it the likelihood's, by q(1), so that one
                std holds .683 of the errors.

        Raises:
            ValueError: if the statistic is without data, or, to rescale, if q(1) is zero.
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
            calibration = self.calibration + 2 * math.log(one)
            self.calibration = calibration.to(self.calibration.dtype)
            factors = factors / one

        self.interval_factors = factors.to(self.calibration)

    def interval_factor(self, n_std: float) -> float:
        """Return q(n_std) of :meth:`calibrate_intervals`; before it, the number itself."""
        if self.interval_factors is None:
            return n_std
        return _interpolate(self.interval_factors, n_std)

    def networks(self) -> list[nn.Module]:
        """Return the network h."""
        return [self.network]

    def description(self) -> dict[str, Any]:
        """Return the shapes and what the network reads; it is of the decoder's kind."""
        n_points = 0 if self.interval_factors is None else len(self.interval_factors)
        return {
            "reference_shape": list(self.reference_log_var.shape),
            "floor_shape": list(self.floor_log_var.shape),
            "calibration_shape": list(self.calibration.shape),
            "interval_points": n_points,
            "map_points": 0 if self.std_map is None else self.std_map.shape[1],
            "reads_features": self.reads_features,
        }

    @classmethod
    def from_description(
        cls, description: dict[str, Any], make_network: Callable[..., nn.Module]
    ) -> "NoiseModel":
        """Build the model that a description is of, with an untrained network."""
        # Models that were saved before there were heads and maps do not speak of them.
        reads_features = bool(description.get("reads_features", False))
        noise = cls(
            make_network(reads_features=True) if reads_features else make_network(),
            torch.ones(description["reference_shape"]),
            torch.ones(description["floor_shape"]),
            tuple(description["calibration_shape"]),
            reads_features=reads_features,
        )

        if description["interval_points"]:
            noise.interval_factors = torch.zeros(description["interval_points"])
        if description.get("map_points"):
            noise.std_map = torch.zeros(2, description["map_points"])
        return noise


def _interpolate(factors: Tensor, n_std: float) -> float:
    """Interpolate values given from 0 to ``MAX_INTERVAL_STD``; linear beyond it."""
    position = n_std / MAX_INTERVAL_STD * (len(factors) - 1)
    below = min(int(position), len(factors) - 2)
    low, high = factors[below : below + 2].tolist()
    return float(low + (position - below) * (high - low))


class NoiseOptions(NamedTuple):
    """What the option ``noise`` can build a noise model from.

    Args:
        shape: One example's shape.
        latent_dim: Number of latent units d.
        update: Option ``noise_update``.
        memory: Number of batches over which a running estimate extends.
        var: Option ``noise_var``.
        quantum: Distance of two neighbouring values, for digital data. None for continuous data.
    """

    shape: tuple[int, ...]
    latent_dim: int
    update: NoiseUpdate
    memory: int
    var: float | None
    quantum: float | None


def _global_noise(options: NoiseOptions) -> NoiseModel:
    return GlobalNoise(options.update, memory=options.memory)


def _channel_noise(options: NoiseOptions) -> NoiseModel:
    channels, *axes = options.shape
    return _dimension_noise(options._replace(shape=(channels, *[1 for _ in axes])))


def _dimension_noise(options: NoiseOptions) -> NoiseModel:
    shape, update, memory = options.shape, options.update, options.memory
    if options.quantum is None:
        return DimensionNoise(shape, update, memory=memory)

    rounding_var = options.quantum**2 / 12
    return DimensionNoise(shape, update, memory=memory, min_var=rounding_var)


def _fixed_noise(options: NoiseOptions) -> NoiseModel:
    return FixedNoise(float(options.var or 0.0))


NOISE_BUILDERS: dict[str, Callable[[NoiseOptions], NoiseModel]] = {
    "global": _global_noise,
    "channel": _channel_noise,
    "dimension": _dimension_noise,
    "fixed": _fixed_noise,
}
"""How each choice of the option ``noise`` is built, see :data:`equipoise.catalogue.NOISES`."""
