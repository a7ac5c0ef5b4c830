r"""Objectives that training minimises, and bounds that evaluate a model, eqs. (1)-(5), (9), (11).

============================= =================================== ==================================
:class:`Elbo`                 bound, eq. (4): VAE and beta-VAE    Kingma and Welling; Higgins et al.
:class:`DetachedVarianceElbo` stage 2 that leaves the mean alone  Stirn et al. (2023)
:class:`FrozenMeanElbo`       stage 2 that trains the noise only
:class:`BatchVarianceElbo`    optimal variance of a batch         Rybkin et al. (2021)
:class:`DipVaeI`              bound, uncorrelated posterior means Kumar et al. (2018)
:class:`DipVaeII`             bound, uncorrelated codes           Kumar et al. (2018)
:class:`WaeMmd`               squared error, codes like the prior Tolstikhin et al. (2018)
:class:`RaeL2`                squared error, short codes          Ghosh et al. (2020)
============================= =================================== ==================================

Every term is per example, (B,), in nats. It is summed over dimensions and contains all constants,
so that ``elbo`` is a bound on log p(x) and not merely proportional to one. Only the training loop
averages over examples, eq. (5).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.categories import Likelihood, MixedLikelihood
from equipoise.correlation import AnyGaussian
from equipoise.digital import DigitalGaussian, Levels
from equipoise.gaps import missing_values, observed_difference
from equipoise.gaussian import (
    Gaussian,
    Randomness,
    SharedGenerator,
    standard_normal_like,
    standard_normal_log_prob,
    sum_dimensions,
)
from equipoise.noise import MIN_VAR, NoiseModel


@runtime_checkable
class LatentVariableModel(Protocol):
    """The part of a model that objectives use. :class:`equipoise.model.VAE` has it."""

    @property
    def noise(self) -> NoiseModel:
        """Noise model, a map from codes to log-variances."""

    @property
    def encoder(self) -> nn.Module:
        """Network that :meth:`encode` calls."""

    @property
    def decoder(self) -> nn.Module:
        """Network that :meth:`decode_mean` calls."""

    def encode(self, x: Tensor) -> Gaussian:
        """Approximate posterior q(z|x)."""

    def decode_mean(self, z: Tensor) -> Tensor:
        """Mean of p(x|z)."""

    def mean_and_context(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of p(x|z), and what the noise model reads: codes, or the decoder's features."""

    def around(self, output: Tensor, density: Callable[[Tensor], AnyGaussian]) -> Likelihood:
        """Likelihood with the given density of numbers around their mean."""

    def decode(self, z: Tensor) -> Likelihood:
        """Likelihood p(x|z)."""


class Terms(NamedTuple):
    r"""The objective of one batch, per example.

    Args:
        loss: Loss that is minimised, (B,), nats.
        log_likelihood: log p(x|z) under the noise of the model, (B,), nats.
        kl: KL(q(z|x), p(z)), (B,), nats.
        residual: x - m(z), without gradient, (B, \*). Eq. (10) is accumulated from it. It is NaN
            where x is missing, and for categories.
        log_var: Log-variance of p(x|z), without gradient. It broadcasts to (B, \*).
        posterior: Posterior q(z|x), (B, d).
        log_probability: The part of log_likelihood that is of categories, (B,), nats. 0 if there
            are none.
    """

    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor
    residual: Tensor
    log_var: Tensor
    posterior: Gaussian
    log_probability: Tensor | float = 0.0

    @property
    def elbo(self) -> Tensor:
        """Evidence lower bound, eq. (4): log-likelihood minus KL, (B,), nats."""
        return self.log_likelihood - self.kl

    @property
    def squared_error(self) -> Tensor:
        """Squared error summed over dimensions, (B,), in the squared unit of the data.

        Where x is missing, the mean of the others counts.
        """
        squared = self.residual.square()
        missing = missing_values(squared)
        if missing is None:
            return sum_dimensions(squared)
        observed = (~missing).sum(1).clamp_min(1)
        return sum_dimensions(squared.masked_fill(missing, 0.0)) * (missing.shape[1] / observed)


class Objective(nn.Module, ABC):
    """A model together with its training loss.

    The training engine wraps the objective and not the model. A forward pass through the objective
    therefore uses every parameter that receives a gradient.

    Args:
        model: Encoder, decoder and noise.

    Attributes:
        all_reduce: Sum of a tensor over the processes that share a batch, through which gradients
            pass, see :func:`equipoise.training.engine.all_reduce_with_gradient`. The terms of whole
            batches are made of such sums. A single process has none to add.
    """

    all_reduce: Callable[[Tensor], Tensor] = staticmethod(lambda values: values)

    def __init__(self, model: LatentVariableModel) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        r"""Evaluate the objective with one sample of z per example.

        Args:
            x: Data in model units, (B, \*).
            generator: Source of randomness for the sample.

        Returns:
            The terms, per example.
        """

    def _whole_mean(self, mean: Tensor, n: int, generator: Randomness) -> Tensor:
        """Return the mean over the whole batch, given that over the n examples of this process."""
        return self.all_reduce(mean * (n / _whole_size(n, generator)))

    def _terms(self, x: Tensor, posterior: Gaussian, likelihood: Likelihood) -> Terms:
        """Return the terms of eq. (4). The loss is the negative bound."""
        log_likelihood = likelihood.log_prob(x)
        kl = posterior.kl()

        return Terms(
            loss=kl - log_likelihood,
            log_likelihood=log_likelihood,
            kl=kl,
            residual=(x - likelihood.mean).detach(),
            log_var=likelihood.log_var.detach(),
            posterior=posterior,
            log_probability=_log_probability(likelihood, x),
        )


def _log_probability(likelihood: Likelihood, x: Tensor) -> Tensor | float:
    """Log-probability of the categories alone, 0 if there are none."""
    if not isinstance(likelihood, MixedLikelihood):
        return 0.0
    return likelihood.log_probability(x).detach()


class Elbo(Objective):
    r"""The evidence lower bound, eq. (4), with the noise of the model, eq. (9) or eq. (11).

    .. math:: \mathrm{E}_{q(z|x)}[\log p(x|z)] - \beta\,\mathrm{KL}(q(z|x), p(z))

    The expectation is estimated by one reparametrised sample. The KL has a closed form. Only
    beta = 1 gives a bound. At a fixed variance, only the ratio of the weights 1/(2 sigma^2) of the
    squared error and beta of the KL matters. Another beta therefore has the optima of another
    variance with beta = 1. The paper's beta-VAE is sigma^2 = 1, which is beta = 2 at sigma^2 = 0.5.

    Source: Higgins et al. (2017), *beta-VAE: Learning basic visual concepts with a constrained
    variational framework*.

    Args:
        model: Encoder, decoder and noise.
        beta: Weight of the KL in the loss. It does not change ``elbo`` of the terms, which is
            always the bound.
    """

    def __init__(self, model: LatentVariableModel, beta: float = 1.0) -> None:
        super().__init__(model)
        self.beta = beta

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate the bound with one sample of z per example."""
        posterior = self.model.encode(x)
        likelihood = self.model.decode(posterior.sample(generator))
        terms = self._terms(x, posterior, likelihood)

        if self.beta == 1:
            return terms
        return terms._replace(loss=self.beta * terms.kl - terms.log_likelihood)


class DetachedVarianceElbo(Objective):
    r"""Stage 2 in which the variance cannot change the mean, eq. (9) and eq. (11).

    .. math:: \mathrm{E}_q[\log N(x; m(z), \sigma_*^2)] - \mathrm{KL}
              \;+\; \mathrm{E}_q[\log N(x; \bar m(z), \sigma^2(\bar z))]

    A bar means that no gradient passes. The first line, eq. (9), trains encoder and decoder. The
    second line, eq. (11), trains the variance network. Encoder and decoder continue exactly as in
    stage 1. The variance network learns from their codes and residuals. ``elbo`` is the bound of
    the whole model, with the predicted variance.

    With ``levels`` of digital data, the variance network descends minus the log-probability of the
    levels, see :class:`equipoise.digital.DigitalGaussian`, in place of the second line. A density
    rewards a small variance without limit where a mean is exact, and a probability does not.

    Source: Stirn et al. (2023), *Faithful heteroscedastic regression with neural networks*, here
    for a VAE.

    Args:
        model: A model whose noise depends on the code and has a shared variance to start from,
            such as :class:`equipoise.noise.PredictedNoise`.
        beta: Weight of the KL in the loss, as in :class:`Elbo`.
        levels: Levels of digital data, whose probability trains the variance. None takes the
            density.

    Raises:
        ValueError: If the model has another kind of noise.
    """

    def __init__(
        self, model: LatentVariableModel, beta: float = 1.0, levels: Levels | None = None
    ) -> None:
        super().__init__(model)
        self.beta = beta
        self.levels = levels
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

        output, context = self.model.mean_and_context(z)
        stage_1_log_var = cast(Tensor, noise.shared_log_var)
        stage_1 = self.model.around(output, lambda mean: Gaussian(mean, stage_1_log_var))
        stage_1_log_likelihood = stage_1.log_prob(x)

        log_var = noise(context.detach())
        predicted = self.model.around(output.detach(), lambda mean: Gaussian(mean, log_var))
        log_likelihood = predicted.log_prob(x)
        of_variance = log_likelihood
        if self.levels is not None:
            of_variance = _digital(predicted, self.levels).log_prob(x)
        kl = posterior.kl()

        return Terms(
            loss=self.beta * kl - stage_1_log_likelihood - of_variance,
            log_likelihood=log_likelihood.detach(),
            kl=kl,
            residual=(x - predicted.mean).detach(),
            log_var=predicted.log_var.detach(),
            posterior=posterior,
            log_probability=_log_probability(predicted, x),
        )


class FrozenMeanElbo(Objective):
    r"""Stage 2 in which encoder and decoder stand still, eq. (11).

    .. math:: \mathrm{E}_q[\log N(x; m(z), \sigma^2(z))]

    Only the noise model learns. Neither gradients nor the statistics of a batch reach encoder and
    decoder, which compute as in evaluation: without dropout, for instance. The mean is therefore
    the same to the bit before and after. ``elbo`` is the bound of the whole model.

    The parameters of encoder and decoder should not be given to an optimiser, or its weight decay
    would change them.

    Args:
        model: A model whose noise depends on the code.
        levels: Levels of digital data, whose probability takes the place of the density in the
            loss.

    Raises:
        ValueError: If the model has another kind of noise.
    """

    def __init__(self, model: LatentVariableModel, levels: Levels | None = None) -> None:
        super().__init__(model)
        self.levels = levels
        if not model.noise.depends_on_code:
            raise ValueError(
                "FrozenMeanElbo trains nothing but a noise model such as PredictedNoise; the "
                f"model has {type(model.noise).__name__}, so use Elbo."
            )

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate the bound with one sample of z per example."""
        # Here and not once, because every evaluation between two epochs sets the modes.
        self.model.encoder.eval()
        self.model.decoder.eval()

        with torch.no_grad():
            posterior = self.model.encode(x)
            output, context = self.model.mean_and_context(posterior.sample(generator))

        noise = self.model.noise
        likelihood = self.model.around(output, lambda mean: noise.likelihood(mean, context))
        terms = self._terms(x, posterior, likelihood)
        if self.levels is None:
            return terms._replace(loss=-terms.log_likelihood)
        return terms._replace(loss=-_digital(likelihood, self.levels).log_prob(x))


class BatchVarianceElbo(Objective):
    r"""sigma-VAE: the evidence lower bound at the optimal variance of each batch.

    .. math:: \sigma_b^2 = \frac1{BD} \sum_{n \in b} \sum_i (x_{ni} - m_i(z_n))^2, \qquad
              -\log p(x|z) = \tfrac D2 \log \sigma_b^2 + \text{const}

    This is eq. (10) over a batch instead of the data set. The variance is a function of the
    residuals of the batch, and the gradient passes through it. The noise of the model, with the
    running or exact form of eq. (10), is used for evaluation.

    Source: Rybkin, Daniilidis and Levine (2021), *Simple and effective VAE training with calibrated
    decoders*.
    """

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate the bound at the batch's optimal variance."""
        posterior = self.model.encode(x)
        mean = self.model.decode_mean(posterior.sample(generator))

        # The mean over values, not over rows: every observed value counts once.
        squared = observed_difference(x, mean).square()
        missing = missing_values(x)
        share = squared.new_ones(())
        if missing is not None:
            share = (~missing).double().mean().to(squared.dtype)
        error, share = self._whole_mean(torch.stack([squared.mean(), share]), len(x), generator)
        log_var = (error / share).clamp_min(MIN_VAR).log()
        return self._terms(x, posterior, Gaussian(mean, log_var))


class _DipVae(Elbo):
    r"""The evidence lower bound with a penalty that pulls the covariance of the codes towards I.

    .. math:: \mathrm{loss} + \lambda_\mathrm{od} \sum_{i \ne j} C_{ij}^2
        + \lambda_\mathrm{d} \sum_i (C_{ii} - 1)^2

    C is computed over the batch.

    Source: Kumar, Sattigeri and Balakrishnan (2018), *Variational inference of disentangled latent
    concepts from unlabeled observations*.

    Args:
        model: Encoder, decoder and noise.
        off_diagonal: Weight lambda_od of the elements off the diagonal.
        diagonal_ratio: Ratio lambda_d / lambda_od.
    """

    def __init__(
        self, model: LatentVariableModel, off_diagonal: float, diagonal_ratio: float
    ) -> None:
        super().__init__(model)
        self.off_diagonal = off_diagonal
        self.diagonal = diagonal_ratio * off_diagonal

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate bound and penalty with one sample of z per example.

        The penalty is the same for all examples.
        """
        terms = super().forward(x, generator)

        covariance = self._covariance(terms.posterior, generator)
        deviation = (covariance - torch.eye(len(covariance), device=x.device)).square()
        diagonal = deviation.diagonal().sum()
        penalty = self.off_diagonal * (deviation.sum() - diagonal) + self.diagonal * diagonal

        return terms._replace(loss=terms.loss + penalty)

    def _covariance(self, posterior: Gaussian, generator: Randomness) -> Tensor:
        """Return the covariance of the posterior means over the whole batch, (d, d)."""
        n = len(posterior.mean)
        centred = posterior.mean - self._whole_mean(posterior.mean.mean(0), n, generator)
        return self.all_reduce(centred.mT @ centred) / _whole_size(n, generator)


class DipVaeI(_DipVae):
    r"""DIP-VAE-I: C is the covariance of the posterior means, :math:`C = \mathrm{Cov}_x[\mu(x)]`.

    Args:
        model: Encoder, decoder and noise.
        off_diagonal: Weight lambda_od. 10 is the value in the authors' experiments. lambda_d is ten
            times lambda_od, as the authors recommend.
    """

    def __init__(self, model: LatentVariableModel, off_diagonal: float = 10.0) -> None:
        super().__init__(model, off_diagonal, diagonal_ratio=10.0)


class DipVaeII(_DipVae):
    r"""DIP-VAE-II: C is the covariance of the aggregate posterior, eq. (12).

    .. math:: C = \mathrm{Cov}_x[\mu(x)] + \mathrm{E}_x\,\mathrm{diag}\,s^2(x)

    Args:
        model: Encoder, decoder and noise.
        off_diagonal: Weight lambda_od. 10 is the value in the authors' experiments. lambda_d is
            equal to lambda_od, as the authors recommend.
    """

    def __init__(self, model: LatentVariableModel, off_diagonal: float = 10.0) -> None:
        super().__init__(model, off_diagonal, diagonal_ratio=1.0)

    def _covariance(self, posterior: Gaussian, generator: Randomness) -> Tensor:
        of_means = super()._covariance(posterior, generator)
        mean_var = self._whole_mean(posterior.var.mean(0), len(posterior.mean), generator)
        return of_means + mean_var.diag()


IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Scales of the inverse multiquadratic kernel in the program of the authors of WAE-MMD."""


class WaeMmd(Objective):
    r"""WAE-MMD: squared error, and the distance between codes and samples of the prior.

    .. math:: \|x - m(z)\|^2 + \lambda\,\mathrm{MMD}^2(q(z), p(z)), \qquad z = \mu(x)

    The distance is between the codes of a batch and a sample of the prior of the same size. The
    encoder is deterministic.

    Source: Tolstikhin, Bousquet, Gelly and Schölkopf (2018), *Wasserstein auto-encoders*.

    Args:
        model: Encoder and decoder. The posterior should be a point
            (``VAE(..., deterministic=True)``), because its variance is not trained.
        penalty: Weight lambda. 200 corresponds to the authors' program for MNIST, which weights the
            distance by 10 and the squared error by 0.05.
    """

    def __init__(self, model: LatentVariableModel, penalty: float = 200.0) -> None:
        super().__init__(model)
        self.penalty = penalty

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate squared error and distance. The distance is the same for all examples."""
        posterior = self.model.encode(x)
        z = posterior.mean
        likelihood = self.model.decode(z)

        error = sum_dimensions(observed_difference(x, likelihood.mean).square())
        distance = maximum_mean_discrepancy(*self._codes_and_prior(z, generator))
        loss = error + self.penalty * distance

        return self._terms(x, posterior, likelihood)._replace(loss=loss)

    def _codes_and_prior(self, z: Tensor, generator: Randomness) -> tuple[Tensor, Tensor]:
        """Return the codes of the whole batch, and as many samples of the prior."""
        if isinstance(generator, SharedGenerator):
            whole = z.new_zeros(generator.batch_size, z.shape[1])
            whole[generator.rank :: generator.world_size] = z
            z, generator = self.all_reduce(whole), generator.generator
        return z, standard_normal_like(z, generator)


def _whole_size(n: int, generator: Randomness) -> int:
    """Count the examples of the batch over all processes, of which this one has n."""
    return generator.batch_size if isinstance(generator, SharedGenerator) else n


def maximum_mean_discrepancy(z: Float[Tensor, "n d"], prior: Float[Tensor, "n d"]) -> Tensor:
    r"""Unbiased squared maximum mean discrepancy of two samples.

    .. math:: \frac1{n(n-1)} \sum_{i \ne j} \bigl(k(z_i, z_j) + k(p_i, p_j)\bigr)
              - \frac2{n^2} \sum_{ij} k(z_i, p_j),
              \qquad k(a, b) = \sum_s \frac{2 d s}{2 d s + \|a - b\|^2}

    The kernel k is a sum of inverse multiquadratic kernels.

    Args:
        z: Codes, (n, d), n at least 2.
        prior: Samples of N(0, I), (n, d).

    Returns:
        The discrepancy, (), without unit. It may be negative. Its mean is zero if both samples have
        the same distribution.

    Raises:
        ValueError: If there is a single code, of which there is no distance to others.

    Example:
        >>> codes = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> bool(maximum_mean_discrepancy(codes, codes + 3) > 0.5)
        True
    """
    n, d = z.shape
    if n < 2:
        raise ValueError(f"the discrepancy is between pairs of codes, got {n}; take larger batches")
    both = torch.cat([z, prior])

    # A matrix product is used because the gradient of torch.cdist is infinite where two codes
    # coincide.
    squared_norms = both.square().sum(1)
    squared_distances = (squared_norms[:, None] + squared_norms - 2 * both @ both.mT).clamp_min(0)

    kernel = torch.zeros_like(squared_distances)
    for s in IMQ_SCALES:
        kernel = kernel + 2 * d * s / (2 * d * s + squared_distances)

    within = kernel[:n, :n].sum() + kernel[n:, n:].sum() - kernel.diagonal().sum()
    return within / (n * (n - 1)) - 2 * kernel[:n, n:].mean()


class RaeL2(Objective):
    r"""RAE-L2: a deterministic autoencoder with penalties on codes and decoder weights.

    .. math:: \|x - m(z)\|^2 + \tfrac\beta2 \|z\|^2 + \lambda \|\theta\|^2, \qquad z = \mu(x)

    It has no density of its own. New examples are decoded from samples of a mixture that is fitted
    to its codes.

    Source: Ghosh, Sajjadi, Vergari, Black and Schölkopf (2020), *From variational to deterministic
    autoencoders*.

    Args:
        model: Encoder and decoder. The posterior is a point (``VAE(..., deterministic=True)``).
        code_penalty: Weight beta. 1e-4 is the value in pythae's reproduction of the paper.
        weight_penalty: Weight lambda of the parameters of the decoder. 1e-7 is the value in
            pythae's reproduction of the paper.
    """

    def __init__(
        self, model: LatentVariableModel, code_penalty: float = 1e-4, weight_penalty: float = 1e-7
    ) -> None:
        super().__init__(model)
        self.code_penalty = code_penalty
        self.weight_penalty = weight_penalty

    def forward(self, x: Float[Tensor, "batch *event"], generator: Randomness = None) -> Terms:
        """Evaluate squared error and penalties. Nothing is random."""
        posterior = self.model.encode(x)
        z = posterior.mean
        likelihood = self.model.decode(z)

        error = sum_dimensions(observed_difference(x, likelihood.mean).square())
        weights = sum(p.square().sum() for p in self.model.decoder.parameters())
        loss = error + 0.5 * self.code_penalty * z.square().sum(1) + self.weight_penalty * weights

        return self._terms(x, posterior, likelihood)._replace(loss=loss)


OBJECTIVE_CLASSES: dict[str, Callable[..., Objective]] = {
    "elbo": Elbo,
    "vae": Elbo,
    "beta-vae": Elbo,
    "dip-vae-i": DipVaeI,
    "dip-vae-ii": DipVaeII,
    "wae-mmd": WaeMmd,
    "sigma-vae": BatchVarianceElbo,
    "rae-l2": RaeL2,
}
"""Class of each choice of the option ``objective``, see :data:`equipoise.catalogue.OBJECTIVES`.

It is called with the model, then with beta if the objective has one, then with its penalty."""

LogPrior: TypeAlias = Callable[[Tensor], Tensor]
"""Function log p(z) from codes (B, d) to nats (B,)."""


@torch.no_grad()
def importance_weighted_bounds(
    model: LatentVariableModel,
    x: Float[Tensor, "batch *event"],
    n_samples: int,
    log_priors: Sequence[LogPrior],
    generator: Randomness = None,
    *,
    observed: Sequence[Tensor] | None = None,
    levels: Levels | None = None,
    max_rows: int | None = None,
) -> Float[Tensor, "observed priors batch"]:
    r"""Importance-weighted lower bound on log p(x) (IWAE), Table 3, for one or several p(z).

    .. math:: \log \frac1K \sum_k \frac{p(x|z_k)\, p(z_k)}{q(z_k|x)}, \qquad z_k \sim q(z|x)

    With K = 1 the mean of the estimate is the evidence lower bound. The bound grows with K towards
    log p(x). The bound can be evaluated for several priors, and for several observations near the x
    from which q(z|x) is computed. They share the samples, so that each code is decoded once.

    Source: Burda, Grosse and Salakhutdinov (2016), *Importance weighted autoencoders*, arXiv
    1509.00519.

    Args:
        model: Model in evaluation mode.
        x: Data in model units, (B, \*).
        n_samples: Number of samples K per example, at least 1.
        log_priors: P functions log p(z), for example the prior N(0, I) and a fitted mixture.
        generator: Source of randomness for the samples. :class:`RowGenerators` go with at most
            ``max_rows`` / ``n_samples`` examples, or one.
        observed: O tensors of the shape of ``x`` whose densities are computed, for example ``x``
            without its rounding. None means ``x`` alone.
        levels: Levels of digital data. With them, the probability of ``x``, see
            :class:`equipoise.digital.DigitalGaussian`, is bounded as well, as a last row.
        max_rows: Number of rows that the decoder evaluates at once. It limits the memory and
            changes the order of the random samples. None means 256 on CPUs, because of their
            caches, and 4096 on other devices.

    Returns:
        The bounds, (O, P, B), nats, float64, or (O + 1, P, B) with ``levels``.

    Raises:
        ValueError: If ``n_samples`` is below 1, or ``levels`` are given and the likelihood of the
            model is not a :class:`Gaussian`.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}.")

    if observed is None:
        observed = [x]
    if not max_rows:
        max_rows = 256 if x.device.type == "cpu" else 4096

    if len(x) > max_rows:
        bounds = partial(importance_weighted_bounds, model, levels=levels, max_rows=max_rows)
        parts = []
        for start in range(0, len(x), max_rows):
            rows = slice(start, start + max_rows)
            observed_rows = [values[rows] for values in observed]
            parts.append(bounds(x[rows], n_samples, log_priors, generator, observed=observed_rows))
        return torch.cat(parts, 2)

    posterior = model.encode(x)
    log_var = posterior.log_var.expand_as(posterior.mean)
    chunk = max(1, min(n_samples, max_rows // max(1, len(x))))
    shape = (len(observed) + (levels is not None), len(log_priors), len(x))
    log_sums = torch.full(shape, -math.inf, dtype=torch.float64, device=x.device)

    for start in range(0, n_samples, chunk):
        k = min(chunk, n_samples - start)
        repeated = Gaussian(posterior.mean.repeat_interleave(k, 0), log_var.repeat_interleave(k, 0))
        z = repeated.sample(generator)
        likelihood = model.decode(z)
        log_ratios = torch.stack([log_prior(z) - repeated.log_prob(z) for log_prior in log_priors])

        pairs: list[tuple[Likelihood | DigitalGaussian, Tensor]]
        pairs = [(likelihood, values) for values in observed]
        if levels is not None:
            pairs.append((_digital(likelihood, levels), x))

        for log_sum, (density, values) in zip(log_sums, pairs, strict=True):
            log_likelihood = density.log_prob(values.repeat_interleave(k, 0)).double()
            log_weights = (log_likelihood + log_ratios).view(len(log_priors), len(x), k)
            log_sum.copy_(torch.logaddexp(log_sum, log_weights.logsumexp(2)))

    return log_sums - math.log(n_samples)


def _digital(likelihood: Likelihood, levels: Levels) -> DigitalGaussian:
    """Round a likelihood to levels, or refuse one whose cells have no closed form."""
    if type(likelihood) is not Gaussian:
        raise ValueError(
            "The probability of a level is known for independent Gaussians only, and the "
            f"likelihood is a {type(likelihood).__name__}. Dequantise the data instead."
        )
    return DigitalGaussian.of(likelihood, levels)


def importance_weighted_bound(
    model: LatentVariableModel,
    x: Float[Tensor, "batch *event"],
    n_samples: int,
    generator: Randomness = None,
    *,
    log_prior: LogPrior = standard_normal_log_prob,
    max_rows: int | None = None,
) -> Float[Tensor, " batch"]:
    r"""Importance-weighted lower bound on log p(x) for one p(z).

    See :func:`importance_weighted_bounds`.

    Args:
        model: Model in evaluation mode.
        x: Data in model units, (B, \*).
        n_samples: Number of samples K per example, at least 1.
        generator: Source of randomness for the samples.
        log_prior: Function log p(z), the prior N(0, I) or ``log_prob`` of a fitted mixture.
        max_rows: Number of rows that the decoder evaluates at once, as in
            :func:`importance_weighted_bounds`.

    Returns:
        The bound, (B,), nats, float64.
    """
    bounds = importance_weighted_bounds(
        model, x, n_samples, [log_prior], generator, max_rows=max_rows
    )
    return bounds[0, 0]
