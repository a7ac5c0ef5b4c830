r"""Objectives: what training descends, and the bounds by which a model is judged, eqs. (1)-(5), (9), (11).

Every term is per example, (B,), in nats, summed over dimensions and with all constants, so that ``elbo`` is a
bound on log p(x) and not merely proportional to one. The loop alone averages over examples, eq. (5).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.gaussian import Gaussian, standard_normal_log_prob, sum_dimensions
from equipoise.noise import PredictedNoise


@runtime_checkable
class LatentVariableModel(Protocol):
    """What an objective needs of a model; :class:`equipoise.model.VAE` is one."""

    @property
    def noise(self) -> nn.Module:
        """Noise model: codes to log-variances."""

    def encode(self, x: Tensor) -> Gaussian:
        """Approximate posterior q(z|x)."""

    def decode_mean(self, z: Tensor) -> Tensor:
        """Mean of p(x|z)."""

    def decode(self, z: Tensor) -> Gaussian:
        """Likelihood p(x|z)."""


class Terms(NamedTuple):
    r"""One batch's objective, per example.

    Args:
        loss: what the gradient descends, (B,), nats.
        log_likelihood: log p(x|z) under the model's own noise, (B,), nats.
        kl: KL(q(z|x), p(z)), (B,), nats.
        residual: x - m(z), without gradient, (B, \*), from which eq. (10) is accumulated.
        log_var: log-variance of p(x|z), without gradient; broadcasts to (B, \*).
        posterior: q(z|x), (B, d).
    """

    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor
    residual: Tensor
    log_var: Tensor
    posterior: Gaussian

    @property
    def elbo(self) -> Tensor:
        """Evidence lower bound, eq. (4): log-likelihood minus KL, (B,), nats."""
        return self.log_likelihood - self.kl

    @property
    def squared_error(self) -> Tensor:
        """Squared error summed over dimensions, (B,), in the squared unit of the data."""
        return sum_dimensions(self.residual.square())


class Objective(nn.Module, ABC):
    """A model seen through the loss it is trained with.

    The objective, not the model, is what the engine wraps, so that one forward pass through it holds every
    parameter that receives a gradient.

    Args:
        model: encoder, decoder and noise.
    """

    def __init__(self, model: LatentVariableModel) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch *event"], generator: torch.Generator | None = None) -> Terms:
        r"""Evaluate the objective with one sample of z per example.

        Args:
            x: data in model units, (B, \*).
            generator: source of the sample.

        Returns:
            The terms, per example.
        """


class Elbo(Objective):
    r"""The evidence lower bound, eq. (4), with whatever noise the model has: eq. (9), or eq. (11) in stage 2.

    .. math:: \mathrm{E}_{q(z|x)}[\log p(x|z)] - \mathrm{KL}(q(z|x), p(z))

    The expectation is one reparametrised sample, the KL is closed form.
    """

    def forward(self, x: Float[Tensor, "batch *event"], generator: torch.Generator | None = None) -> Terms:
        """Evaluate the bound with one sample of z per example."""
        posterior = self.model.encode(x)
        likelihood = self.model.decode(posterior.sample(generator))
        log_likelihood, kl = likelihood.log_prob(x), posterior.kl()
        return Terms(
            loss=kl - log_likelihood,
            log_likelihood=log_likelihood,
            kl=kl,
            residual=(x - likelihood.mean).detach(),
            log_var=likelihood.log_var.detach(),
            posterior=posterior,
        )


class DetachedVarianceElbo(Objective):
    r"""Stage 2 in which the variance cannot bend the mean: eq. (9) for the networks, eq. (11) for the variance.

    .. math:: \mathrm{E}_q[\log N(x; m(z), \sigma_*^2)] - \mathrm{KL}
              \;+\; \mathrm{E}_q[\log N(x; \bar m(z), \sigma^2(\bar z))]

    where a bar stops the gradient. Encoder and decoder continue exactly as in stage 1, and the variance network
    learns from their codes and residuals. ``elbo`` is that of the whole model, with the predicted variance.
    The remedy is Stirn et al. (2023), *Faithful heteroscedastic regression with neural networks*, here for a VAE.

    Args:
        model: a model whose noise is :class:`equipoise.noise.PredictedNoise`.

    Raises:
        ValueError: if the model's noise is another.
    """

    def __init__(self, model: LatentVariableModel) -> None:
        super().__init__(model)
        if not isinstance(model.noise, PredictedNoise):
            raise ValueError(
                f"DetachedVarianceElbo trains a PredictedNoise, the model has {type(model.noise).__name__}; use Elbo."
            )

    def forward(self, x: Float[Tensor, "batch *event"], generator: torch.Generator | None = None) -> Terms:
        """Evaluate both parts with the same sample of z."""
        noise = cast(PredictedNoise, self.model.noise)
        posterior = self.model.encode(x)
        z = posterior.sample(generator)
        mean = self.model.decode_mean(z)
        at_global_variance = Gaussian(mean, noise.reference_log_var).log_prob(x)
        log_var = noise(z.detach())
        log_likelihood = Gaussian(mean.detach(), log_var).log_prob(x)
        kl = posterior.kl()
        return Terms(
            loss=kl - at_global_variance - log_likelihood,
            log_likelihood=log_likelihood.detach(),
            kl=kl,
            residual=(x - mean).detach(),
            log_var=log_var.detach(),
            posterior=posterior,
        )


LogPrior: TypeAlias = Callable[[Tensor], Tensor]
"""log p(z): codes (B, d) to nats (B,)."""


@torch.no_grad()
def importance_weighted_bounds(
    model: LatentVariableModel,
    x: Float[Tensor, "batch *event"],
    n_samples: int,
    log_priors: Sequence[LogPrior],
    generator: torch.Generator | None = None,
    *,
    observed: Sequence[Tensor] | None = None,
    max_rows: int = 4096,
) -> Float[Tensor, "observed priors batch"]:
    r"""Importance-weighted lower bound on log p(x) (IWAE), the paper's Table 3, for one or several p(z).

    .. math:: \log \frac1K \sum_k \frac{p(x|z_k)\, p(z_k)}{q(z_k|x)}, \qquad z_k \sim q(z|x)

    With K = 1 its mean is the evidence lower bound; it grows with K towards log p(x). Burda, Grosse and
    Salakhutdinov (2016), *Importance weighted autoencoders*, arXiv 1509.00519. Several priors, and several
    observations x near the one that q(z|x) is given, share the draws, so that each code is decoded once.

    Args:
        model: the model, in evaluation mode.
        x: data in model units, (B, \*).
        n_samples: K, exactly as many as are drawn, at least 1.
        log_priors: the prior N(0, I), or a fitted mixture, or both.
        generator: source of the samples.
        observed: O tensors like ``x`` whose densities are asked for, such as ``x`` with its rounding undone; ``x``
            alone if None.
        max_rows: decoder rows evaluated at once; bounds the memory and, but for the order of the draws, nothing else.

    Returns:
        (O, P, B), nats, float64.

    Raises:
        ValueError: if ``n_samples`` is below 1.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}.")
    observed = [x] if observed is None else observed
    posterior = model.encode(x)
    chunk = max(1, min(n_samples, max_rows // max(1, len(x))))
    total = torch.full((len(observed), len(log_priors), len(x)), -math.inf, dtype=torch.float64, device=x.device)
    for start in range(0, n_samples, chunk):
        k = min(chunk, n_samples - start)
        repeated = Gaussian(*(t.expand_as(posterior.mean).repeat_interleave(k, 0) for t in posterior))
        z = repeated.sample(generator)
        likelihood = model.decode(z)
        log_ratios = torch.stack([log_prior(z) - repeated.log_prob(z) for log_prior in log_priors])
        for sums, seen in zip(total, observed, strict=True):
            log_weights = likelihood.log_prob(seen.repeat_interleave(k, 0)).double() + log_ratios
            sums.copy_(torch.logaddexp(sums, log_weights.view(len(log_priors), len(x), k).logsumexp(2)))
    return total - math.log(n_samples)


def importance_weighted_bound(
    model: LatentVariableModel,
    x: Float[Tensor, "batch *event"],
    n_samples: int,
    generator: torch.Generator | None = None,
    *,
    log_prior: LogPrior = standard_normal_log_prob,
    max_rows: int = 4096,
) -> Float[Tensor, " batch"]:
    r"""Importance-weighted lower bound on log p(x) for one p(z), see :func:`importance_weighted_bounds`.

    Args:
        model: the model, in evaluation mode.
        x: data in model units, (B, \*).
        n_samples: K, at least 1.
        generator: source of the samples.
        log_prior: the prior N(0, I), or a fitted mixture's ``log_prob``.
        max_rows: decoder rows evaluated at once.

    Returns:
        (B,), nats, float64.
    """
    return importance_weighted_bounds(model, x, n_samples, [log_prior], generator, max_rows=max_rows)[0, 0]
