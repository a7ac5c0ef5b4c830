r"""Correlated noise: p(x|z) = N(m(z), diag(s(z)) C diag(s(z))) around any noise model.

C is never trained with. Were it part of the loss, the networks would give up what it explains: the
low frequencies of images. It is estimated when training has ended, see
:func:`equipoise.noise_fit.fit_correlation`.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from equipoise.correlation import (
    CorrelatedGaussian,
    Correlation,
    build_correlation,
    describe_correlation,
)
from equipoise.noise import NoiseModel, build_noise, describe_noise


class CorrelatedNoise(NoiseModel):
    r"""A noise model, and the correlation of its standardised errors.

    .. math:: \Sigma(z) = \mathrm{diag}(s(z))\, C\, \mathrm{diag}(s(z))

    s(z) is the std of the noise model, and C a :class:`equipoise.correlation.Correlation`. The
    likelihood and its samples know both. Everything that is of one dimension alone stays that of
    the noise model: its std, floor, calibration and intervals.

    Args:
        marginal: The noise model, whose std is s(z).
        correlation: C, of the shape of one example.

    Raises:
        ValueError: If the noise model is correlated already.
    """

    summary = "Errors are correlated, in a way that is estimated after training"

    def __init__(self, marginal: NoiseModel, correlation: Correlation) -> None:
        super().__init__()
        if isinstance(marginal, CorrelatedNoise):
            raise ValueError("the noise model is correlated already; give its marginal")

        self.marginal = marginal
        self.correlation = correlation
        self.depends_on_code = marginal.depends_on_code
        self.reads_features = marginal.reads_features

    def forward(self, z: Float[Tensor, "batch *context"]) -> Tensor:
        """Return the log-variance of the noise model, log s^2."""
        log_var: Tensor = self.marginal(z)
        return log_var

    def likelihood(
        self, mean: Float[Tensor, "batch *event"], z: Float[Tensor, "batch *context"]
    ) -> CorrelatedGaussian:
        """Put correlated noise around a mean."""
        return CorrelatedGaussian(mean, self(z), self.correlation)

    @property
    def shared_log_var(self) -> Tensor | None:
        """That of the noise model."""
        return self.marginal.shared_log_var

    @property
    def floor_var(self) -> Tensor:
        """That of the noise model."""
        return self.marginal.floor_var

    def floor_share(self, log_var: Tensor) -> Tensor:
        """Compute the share of log-variances at which the noise model's floor is active."""
        return self.marginal.floor_share(log_var)

    def interval_factor(self, n_std: float) -> float:
        """Return that of the noise model."""
        return self.marginal.interval_factor(n_std)

    @property
    def calibration_scale(self) -> float:
        """That of the noise model."""
        return self.marginal.calibration_scale

    def networks(self) -> list[nn.Module]:
        """Return those of the noise model."""
        return self.marginal.networks()

    def description(self) -> dict[str, Any]:
        """Describe the noise model and the correlation."""
        return {
            "marginal": describe_noise(self.marginal),
            "correlation": describe_correlation(self.correlation),
        }

    @classmethod
    def from_description(
        cls, description: dict[str, Any], make_network: Callable[..., nn.Module]
    ) -> "NoiseModel":
        """Build both, with meaningless values."""
        marginal = build_noise(description["marginal"], make_network)
        return cls(marginal, build_correlation(description["correlation"]))


def marginal_of(noise: NoiseModel) -> NoiseModel:
    """Leave out the correlation of a noise model.

    Args:
        noise: Any noise model.

    Returns:
        The model itself, or the one that :class:`CorrelatedNoise` was made of.
    """
    return noise.marginal if isinstance(noise, CorrelatedNoise) else noise
