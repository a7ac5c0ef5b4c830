r"""Objectives: what training descends, and the bounds by which a model is judged, eqs. (1)-(5), (9), (11).

============================= ====================================== ==================================
:class:`Elbo`                 the bound, eq. (4); VAE, beta-VAE      Kingma and Welling; Higgins et al.
:class:`DetachedVarianceElbo` stage 2, the mean left as it is        Stirn et al. (2023)
:class:`BatchVarianceElbo`    sigma-VAE: optimal variance of a batch Rybkin et al. (2021)
:class:`DipVaeI`              and uncorrelated posterior means       Kumar et al. (2018)
:class:`DipVaeII`             and uncorrelated codes                 Kumar et al. (2018)
:class:`WaeMmd`               squared error, codes like the prior's  Tolstikhin et al. (2018)
:class:`RaeL2`                squared error, short codes             Ghosh et al. (2020)
============================= ====================================== ==================================

Every term is per example, (B,), in nats, summed over dimensions and with all constants, so that ``elbo`` is a
bound on log p(x) and not merely proportional to one. The loop alone averages over examples, eq. (5).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.gaussian import (
    Gaussian,
    Randomness,
    standard_normal_like,
    standard_normal_log_prob,
    sum_dimensions,
)
from equipoise.noise import MIN_VAR, NoiseModel


@runtime_checkable
class LatentVariableModel(Protocol):
    """What an objective needs of a model; :class:`equipoise.model.VAE` is one."""

    @property
    def noise(self) -> NoiseModel:
        """Noise model: codes to log-variances."""

    @property
    def decoder(self) -> nn.Module:
        """Network behind :meth:`decode_mean`."""

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
    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        r"""Evaluate the objective with one sample of z per example.

        Args:
            x: data in model units, (B, \*).
            generator: source of the sample.

        Returns:
            The terms, per example.
        """

    def _terms(self, x: Tensor, posterior: Gaussian, likelihood: Gaussian) -> Terms:
        """The terms of eq. (4), whose loss is the negative bound."""
        log_likelihood, kl = likelihood.log_prob(x), posterior.kl()
        return Terms(
            loss=kl - log_likelihood,
            log_likelihood=log_likelihood,
            kl=kl,
            residual=(x - likelihood.mean).detach(),
            log_var=likelihood.log_var.detach(),
            posterior=posterior,
        )


class Elbo(Objective):
    r"""The evidence lower bound, eq. (4), with whatever noise the model has: eq. (9), or eq. (11) in stage 2.

    .. math:: \mathrm{E}_{q(z|x)}[\log p(x|z)] - \beta\,\mathrm{KL}(q(z|x), p(z))

    The expectation is one reparametrised sample, the KL is closed form. Only beta = 1 is a bound. Any other with a
    fixed variance has the optima of another variance with beta = 1, for the squared error counts 1/(2 sigma^2) against
    beta: the paper's beta-VAE is sigma^2 = 1, which is beta = 2 at sigma^2 = 0.5.

    Args:
        model: encoder, decoder and noise.
        beta: weight of the KL in the loss; the terms' ``elbo`` is the bound all the same. Higgins et al. (2017),
            *beta-VAE: Learning basic visual concepts with a constrained variational framework*.
    """

    def __init__(self, model: LatentVariableModel, beta: float = 1.0) -> None:
        super().__init__(model)
        self.beta = beta

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate the bound with one sample of z per example."""
        posterior = self.model.encode(x)
        terms = self._terms(x, posterior, self.model.decode(posterior.sample(generator)))
        return (
            terms
            if self.beta == 1
            else terms._replace(loss=self.beta * terms.kl - terms.log_likelihood)
        )


class DetachedVarianceElbo(Objective):
    r"""Stage 2 in which the variance cannot bend the mean: eq. (9) for the networks, eq. (11) for the variance.

    .. math:: \mathrm{E}_q[\log N(x; m(z), \sigma_*^2)] - \mathrm{KL}
              \;+\; \mathrm{E}_q[\log N(x; \bar m(z), \sigma^2(\bar z))]

    where a bar stops the gradient. Encoder and decoder continue exactly as in stage 1, and the variance network
    learns from their codes and residuals. ``elbo`` is that of the whole model, with the predicted variance.
    The remedy is Stirn et al. (2023), *Faithful heteroscedastic regression with neural networks*, here for a VAE.

    Args:
        model: A model whose noise depends on the code and has a shared variance beside, such as
            :class:`equipoise.noise.PredictedNoise`.
        beta: weight of the KL in the loss, as in :class:`Elbo`.

    Raises:
        ValueError: if the model's noise is another.
    """

    def __init__(self, model: LatentVariableModel, beta: float = 1.0) -> None:
        super().__init__(model)
        self.beta = beta
        if not model.noise.depends_on_code or model.noise.shared_log_var is None:
            raise ValueError(
                "DetachedVarianceElbo trains a noise model such as PredictedNoise, with a shared "
                f"variance to start from; the model has {type(model.noise).__name__}, so use Elbo."
            )

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate both parts with the same sample of z."""
        noise = self.model.noise
        posterior = self.model.encode(x)
        z = posterior.sample(generator)
        mean = self.model.decode_mean(z)
        at_global_variance = Gaussian(mean, cast(Tensor, noise.shared_log_var)).log_prob(x)
        log_var = noise(z.detach())
        log_likelihood = Gaussian(mean.detach(), log_var).log_prob(x)
        kl = posterior.kl()
        return Terms(
            loss=self.beta * kl - at_global_variance - log_likelihood,
            log_likelihood=log_likelihood.detach(),
            kl=kl,
            residual=(x - mean).detach(),
            log_var=log_var.detach(),
            posterior=posterior,
        )


class BatchVarianceElbo(Objective):
    r"""sigma-VAE: the evidence lower bound at the variance that is optimal for this very batch.

    .. math:: \sigma_b^2 = \frac1{BD} \sum_{n \in b} \sum_i (x_{ni} - m_i(z_n))^2, \qquad
              -\log p(x|z) = \tfrac D2 \log \sigma_b^2 + \text{const}

    Eq. (10) over a batch in place of the data set: the variance follows each batch's residuals, gradients included.
    The model's own noise, with the running or exact form of eq. (10), is for evaluation. Rybkin, Daniilidis and Levine
    (2021), *Simple and effective VAE training with calibrated decoders*.
    """

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate the bound at the batch's optimal variance."""
        posterior = self.model.encode(x)
        mean = self.model.decode_mean(posterior.sample(generator))
        log_var = (x - mean).square().mean().clamp_min(MIN_VAR).log()
        return self._terms(x, posterior, Gaussian(mean, log_var))


class _DipVae(Elbo):
    r"""The evidence lower bound, and the covariance of the codes pulled towards I.

    .. math:: \mathrm{loss} + \lambda_\mathrm{od} \sum_{i \ne j} C_{ij}^2 + \lambda_\mathrm{d} \sum_i (C_{ii} - 1)^2

    Kumar, Sattigeri and Balakrishnan (2018), *Variational inference of disentangled latent concepts from unlabeled
    observations*. C is taken over the batch.

    Args:
        model: encoder, decoder and noise.
        off_diagonal: lambda_od.
        diagonal_ratio: lambda_d / lambda_od.
    """

    def __init__(
        self, model: LatentVariableModel, off_diagonal: float, diagonal_ratio: float
    ) -> None:
        super().__init__(model)
        self.off_diagonal = off_diagonal
        self.diagonal = diagonal_ratio * off_diagonal

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate bound and penalty with one sample of z per example; the penalty is the same for all examples."""
        terms = super().forward(x, generator)
        covariance = self._covariance(terms.posterior)
        deviation = (covariance - torch.eye(len(covariance), device=x.device)).square()
        diagonal = deviation.diagonal().sum()
        penalty = self.off_diagonal * (deviation.sum() - diagonal) + self.diagonal * diagonal
        return terms._replace(loss=terms.loss + penalty)

    @staticmethod
    def _covariance(posterior: Gaussian) -> Tensor:
        """Covariance over the batch of the posterior means, (d, d)."""
        centred = posterior.mean - posterior.mean.mean(0)
        return centred.mT @ centred / len(centred)


class DipVaeI(_DipVae):
    r"""DIP-VAE-I: C is the covariance of the posterior means, :math:`C = \mathrm{Cov}_x[\mu(x)]`.

    Args:
        model: encoder, decoder and noise.
        off_diagonal: lambda_od; 10 as in the authors' experiments. lambda_d is ten times that, as they recommend.
    """

    def __init__(self, model: LatentVariableModel, off_diagonal: float = 10.0) -> None:
        super().__init__(model, off_diagonal, diagonal_ratio=10.0)


class DipVaeII(_DipVae):
    r"""DIP-VAE-II: C is that of the aggregate posterior, eq. (12).

    .. math:: C = \mathrm{Cov}_x[\mu(x)] + \mathrm{E}_x\,\mathrm{diag}\,s^2(x)

    Args:
        model: encoder, decoder and noise.
        off_diagonal: lambda_od; 10 as in the authors' experiments. lambda_d is the same, as they recommend.
    """

    def __init__(self, model: LatentVariableModel, off_diagonal: float = 10.0) -> None:
        super().__init__(model, off_diagonal, diagonal_ratio=1.0)

    @staticmethod
    def _covariance(posterior: Gaussian) -> Tensor:
        return _DipVae._covariance(posterior) + posterior.var.mean(0).diag()


IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Scales of the inverse multiquadratic kernel, those of the authors' program."""


class WaeMmd(Objective):
    r"""WAE-MMD: squared error, and the distance of the codes of a batch from as many draws of the prior.

    .. math:: \|x - m(z)\|^2 + \lambda\,\mathrm{MMD}^2(q(z), p(z)), \qquad z = \mu(x)

    Tolstikhin, Bousquet, Gelly and Schölkopf (2018), *Wasserstein auto-encoders*, with a deterministic encoder.

    Args:
        model: encoder and decoder; its posterior should be a point (``VAE(..., deterministic=True)``), for none is
            trained.
        penalty: lambda; 200 is the authors' program for MNIST, which sets 10 beside 0.05 times the squared error.
    """

    def __init__(self, model: LatentVariableModel, penalty: float = 200.0) -> None:
        super().__init__(model)
        self.penalty = penalty

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate squared error and distance; the distance is the same for all examples."""
        posterior = self.model.encode(x)
        z = posterior.mean
        likelihood = self.model.decode(z)
        error = sum_dimensions((x - likelihood.mean).square())
        distance = maximum_mean_discrepancy(z, standard_normal_like(z, generator))
        return self._terms(x, posterior, likelihood)._replace(loss=error + self.penalty * distance)


def maximum_mean_discrepancy(z: Float[Tensor, "n d"], prior: Float[Tensor, "n d"]) -> Tensor:
    r"""Squared maximum mean discrepancy of two samples, unbiased, with a sum of inverse multiquadratic kernels.

    .. math:: \frac1{n(n-1)} \sum_{i \ne j} \bigl(k(z_i, z_j) + k(p_i, p_j)\bigr) - \frac2{n^2} \sum_{ij} k(z_i, p_j),
              \qquad k(a, b) = \sum_s \frac{2 d s}{2 d s + \|a - b\|^2}

    Args:
        z: codes, (n, d), n at least 2.
        prior: draws from N(0, I), (n, d).

    Returns:
        (), no unit; may be negative, and its mean is zero for samples of one distribution.

    Example:
        >>> codes = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> bool(maximum_mean_discrepancy(codes, codes + 3) > 0.5)
        True
    """
    n, d = z.shape
    both = torch.cat([z, prior])
    squared_norms = both.square().sum(1)
    # One product instead of torch.cdist, whose gradient is infinite where two codes coincide.
    squared_distances = (squared_norms[:, None] + squared_norms - 2 * both @ both.mT).clamp_min(0)
    kernel = sum(
        (2 * d * s / (2 * d * s + squared_distances) for s in IMQ_SCALES),
        torch.zeros_like(squared_distances),
    )
    within = kernel[:n, :n].sum() + kernel[n:, n:].sum() - kernel.diagonal().sum()
    return within / (n * (n - 1)) - 2 * kernel[:n, n:].mean()


class RaeL2(Objective):
    r"""RAE-L2: an autoencoder with short codes and small decoder weights, and no distribution at all.

    .. math:: \|x - m(z)\|^2 + \tfrac\beta2 \|z\|^2 + \lambda \|\theta\|^2, \qquad z = \mu(x)

    Ghosh, Sajjadi, Vergari, Black and Schölkopf (2020), *From variational to deterministic autoencoders*: the
    deterministic reference, to sample from a mixture fitted to its codes.

    Args:
        model: encoder and decoder, the posterior a point (``VAE(..., deterministic=True)``).
        code_penalty: beta; 1e-4, as in pythae's reproduction of the paper.
        weight_penalty: lambda, on the decoder's parameters; 1e-7 likewise.
    """

    def __init__(
        self, model: LatentVariableModel, code_penalty: float = 1e-4, weight_penalty: float = 1e-7
    ) -> None:
        super().__init__(model)
        self.code_penalty = code_penalty
        self.weight_penalty = weight_penalty

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate squared error and penalties; nothing is drawn."""
        posterior = self.model.encode(x)
        z = posterior.mean
        likelihood = self.model.decode(z)
        error = sum_dimensions((x - likelihood.mean).square())
        weights = sum(p.square().sum() for p in self.model.decoder.parameters())
        loss = error + 0.5 * self.code_penalty * z.square().sum(1) + self.weight_penalty * weights
        return self._terms(x, posterior, likelihood)._replace(loss=loss)


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
    max_rows: int | None = None,
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
        max_rows: decoder rows evaluated at once, which bound the memory and decide on the order of the draws, nothing
            else; None for 256 on CPUs, whose caches hold no more, and 4096 elsewhere.

    Returns:
        (O, P, B), nats, float64.

    Raises:
        ValueError: if ``n_samples`` is below 1.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}.")
    observed = [x] if observed is None else observed
    max_rows = max_rows or (256 if x.device.type == "cpu" else 4096)
    if len(x) > max_rows:
        bounds = partial(importance_weighted_bounds, model, max_rows=max_rows)
        rows = [slice(start, start + max_rows) for start in range(0, len(x), max_rows)]
        parts = [
            bounds(x[r], n_samples, log_priors, generator, observed=[seen[r] for seen in observed])
            for r in rows
        ]
        return torch.cat(parts, 2)
    posterior = model.encode(x)
    chunk = max(1, min(n_samples, max_rows // max(1, len(x))))
    total = torch.full(
        (len(observed), len(log_priors), len(x)), -math.inf, dtype=torch.float64, device=x.device
    )
    for start in range(0, n_samples, chunk):
        k = min(chunk, n_samples - start)
        repeated = Gaussian(
            *(t.expand_as(posterior.mean).repeat_interleave(k, 0) for t in posterior)
        )
        z = repeated.sample(generator)
        likelihood = model.decode(z)
        log_ratios = torch.stack([log_prior(z) - repeated.log_prob(z) for log_prior in log_priors])
        for sums, seen in zip(total, observed, strict=True):
            log_weights = likelihood.log_prob(seen.repeat_interleave(k, 0)).double() + log_ratios
            sums.copy_(
                torch.logaddexp(sums, log_weights.view(len(log_priors), len(x), k).logsumexp(2))
            )
    return total - math.log(n_samples)


def importance_weighted_bound(
    model: LatentVariableModel,
    x: Float[Tensor, "batch *event"],
    n_samples: int,
    generator: torch.Generator | None = None,
    *,
    log_prior: LogPrior = standard_normal_log_prob,
    max_rows: int | None = None,
) -> Float[Tensor, " batch"]:
    r"""Importance-weighted lower bound on log p(x) for one p(z), see :func:`importance_weighted_bounds`.

    Args:
        model: the model, in evaluation mode.
        x: data in model units, (B, \*).
        n_samples: K, at least 1.
        generator: source of the samples.
        log_prior: the prior N(0, I), or a fitted mixture's ``log_prob``.
        max_rows: decoder rows evaluated at once, as there.

    Returns:
        (B,), nats, float64.
    """
    return importance_weighted_bounds(
        model, x, n_samples, [log_prior], generator, max_rows=max_rows
    )[0, 0]
