r"""Imputation: the missing values of a row, given those that are observed.

.. math:: p(x_\mathrm{mis}|x_\mathrm{obs})
    = \int p(x_\mathrm{mis}|x_\mathrm{obs}, z)\, p(z|x_\mathrm{obs})\, dz

p(z) is the mixture of eq. (13). Codes of :math:`p(z|x_\mathrm{obs})` are drawn by importance
sampling: half of them from a Gaussian, which is q(z|x) at first, and half from p(z). In each
further round the Gaussian takes the mean and the variance that were found. Hence a row is imputed
well also where the encoder has not met its gaps, and a row without any value from p(z) alone. Given
a code, the mean and variance of what is missing have a closed form, with and without correlated
noise.

The probabilities of a category are averaged over the codes in the same way, and the most probable
level is taken.

Mattei and Frellsen (2019), *MIWAE: Deep generative modelling and imputation of incomplete data
sets*, for the weights; Cappé et al. (2004), *Population Monte Carlo*, for the rounds; Hesterberg
(1995), *Weighted average importance sampling and defensive mixture distributions*.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from equipoise.aggregate import GaussianMixture
from equipoise.categories import Likelihood, MixedLikelihood
from equipoise.gaussian import Gaussian, RowGenerators
from equipoise.model import VAE, PowerScaling, Scaling

ROUNDS = 3
"""Rounds of importance sampling, the last of which is the result."""
INFLATION = 1.5
"""Factor on the variance that was found, because a proposal should be wider than its target."""
SMALLEST_VAR = 1e-6
"""Smallest variance of a proposal, where one code has all the weight."""
QUADRATURE_NODES = 9
"""Points at which a transformed column is averaged over the Gaussian around a mean."""
VALUES_AT_ONCE = 1 << 22
"""Values, of all codes of all rows, that are computed together: 16 MB each."""


class Imputation(NamedTuple):
    """What is missing, given what is observed.

    Args:
        mean: The rows, with the expectation of each missing number, and the most probable level of
            each missing category, (N, D), raw units.
        std: Std of each missing number, and 0 where it is observed, (N, D), raw units; NaN for
            categories.
        draws: The rows with missing values drawn at random, jointly within a row, (M, N, D).
        probability: Probability of the level of each category, 1 where it is observed, (N, D); NaN
            for numbers. None if the table has no categories.
    """

    mean: Tensor
    std: Tensor
    draws: Tensor
    probability: Tensor | None = None


class _Codes(NamedTuple):
    """Weighted codes of each row: codes (B, K, d), their likelihoods (B K, D), weights (B, K)."""

    z: Tensor
    likelihood: Likelihood
    weights: Tensor


@torch.no_grad()
def impute(
    model: VAE,
    mixture: GaussianMixture,
    raw: Float[Tensor, "rows columns"],
    *,
    n_samples: int = 100,
    n_draws: int = 0,
    seed: int = 0,
) -> Imputation:
    """Compute the distribution of missing values. What is observed stays as it is.

    The draws of a row follow from its values, so that its result does not depend on the others.

    Args:
        model: A model of a table, in evaluation mode.
        mixture: The mixture that was fitted to its codes, which serves as p(z).
        raw: Rows with NaN where a value is missing, (N, D), raw units.
        n_samples: Number of codes per row and round, at least 2.
        n_draws: M, number of multiple imputations.
        seed: Seed of the codes that all rows share.

    Returns:
        Means, standard deviations and draws.

    Raises:
        ValueError: If the model is one of images, or the rows have another width than its.
    """
    if len(model.shape) != 1 or raw.shape[1:] != model.shape:
        raise ValueError(
            f"missing values are imputed in rows of a table; the model has examples {model.shape}, "
            f"and these are {tuple(raw.shape[1:])}"
        )
    if n_samples < 2:
        raise ValueError(f"n_samples must be at least 2, got {n_samples}")

    raw = raw.as_subclass(Tensor)  # a row is completed as one whose label is unknown
    mean, std = raw.clone(), torch.zeros_like(raw)
    draws = raw.expand(n_draws, *raw.shape).clone()
    probability: Tensor | None = None
    if model.categories is not None:
        is_category = model.categories.is_category
        std[:, is_category] = torch.nan
        probability = torch.where(is_category, 1.0, torch.nan).expand_as(raw).clone()
    generator = torch.Generator(raw.device).manual_seed(seed)
    dtype = model.scaling.scale.dtype
    pool = mixture.sample(n_samples // 2, generator).to(dtype)

    gaps = raw.isnan().any(1).nonzero().flatten()
    block = max(1, VALUES_AT_ONCE // (n_samples * max(model.shape[0], 1)))
    for rows in torch.split(gaps, block) if len(gaps) else ():
        x = model.scaling(raw[rows])
        missing = x.isnan()
        generators = RowGenerators.of(x)

        codes = _posterior_codes(model, mixture, x, pool, n_samples - len(pool), generators)
        found, deviation = _moments(codes, x, model.scaling)
        if probability is not None:
            levels, best = _most_probable(codes, len(x))
            found = torch.where(levels.isnan(), found, levels)
            deviation = deviation.masked_fill(is_category, torch.nan)
            probability[rows] = torch.where(missing, best, probability[rows])
        mean[rows] = torch.where(missing, found, raw[rows])
        std[rows] = deviation

        for draw in draws:
            values = model.scaling.restore(_draw(model, codes, x, generators))
            draw[rows] = torch.where(missing, values, raw[rows])
    return Imputation(mean, std, draws, probability)


def _posterior_codes(
    model: VAE,
    mixture: GaussianMixture,
    x: Tensor,
    pool: Tensor,
    n: int,
    generators: RowGenerators,
) -> _Codes:
    """Draw codes of p(z|x_obs) for each row, by rounds of importance sampling."""
    proposal = model.encode(x)
    proposal = proposal._replace(log_var=proposal.log_var.expand_as(proposal.mean))
    n_codes = n + len(pool)
    shared = pool.expand(len(x), *pool.shape)
    own_share, shared_share = math.log(n / n_codes), math.log(len(pool) / n_codes)

    for _ in range(ROUNDS):
        own = _repeated(proposal, n).sample(generators).view(len(x), n, -1)
        z = torch.cat([own, shared], 1)

        flat = z.flatten(0, 1)
        likelihood = model.decode(flat)
        log_likelihood = likelihood.log_prob(x.repeat_interleave(n_codes, 0))
        log_prior = mixture.log_prob(flat).to(x.dtype)
        log_own = _repeated(proposal, n_codes).log_prob(flat)
        log_proposal = torch.logaddexp(log_own + own_share, log_prior + shared_share)
        log_weights = (log_likelihood + log_prior - log_proposal).view(len(x), -1)
        weights = log_weights.double().softmax(1).to(x.dtype)

        mean = (weights[..., None] * z).sum(1)
        var = (weights[..., None] * (z - mean[:, None]).square()).sum(1)
        proposal = Gaussian(mean, (INFLATION * var).clamp_min(SMALLEST_VAR).log())
    return _Codes(z, likelihood, weights)


def _repeated(density: Gaussian, n: int) -> Gaussian:
    """Repeat the density of each row n times."""
    return Gaussian(*(part.repeat_interleave(n, 0) for part in density))


def _moments(codes: _Codes, x: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Mean and std of each dimension over the codes of a row, (B, D), raw units."""
    n_codes = codes.z.shape[1]
    means, vars_ = codes.likelihood.given(x.repeat_interleave(n_codes, 0))
    means, vars_ = means.view(len(x), n_codes, -1), vars_.view(len(x), n_codes, -1)

    weights = codes.weights[..., None]
    if isinstance(scaling, PowerScaling):
        means, vars_ = _raw_moments(means, vars_, scaling)
    mean = (weights * means).sum(1)
    var = (weights * (vars_ + (means - mean[:, None]).square())).sum(1)
    std = var.masked_fill(~x.isnan(), 0.0).sqrt()
    if isinstance(scaling, PowerScaling):
        return mean, std
    return scaling.restore(mean), scaling.restore_std(std, mean)


def _most_probable(codes: _Codes, n: int) -> tuple[Tensor, Tensor]:
    """The most probable level of each category over the codes of a row, and its probability."""
    likelihood = codes.likelihood
    if not isinstance(likelihood, MixedLikelihood):
        raise TypeError("the likelihood has no categories")
    probs = likelihood.log_probs.exp().view(n, codes.z.shape[1], -1)
    return likelihood.categories.most_probable((codes.weights[..., None] * probs).sum(1))


def _raw_moments(means: Tensor, vars_: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Mean and variance in raw units of Gaussians in model units, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_NODES)
    weights = weights / weights.sum()
    values = [scaling.restore(means + vars_.sqrt() * node) for node in nodes.tolist()]

    zero = torch.zeros_like(means)
    pairs = list(zip(weights.tolist(), values, strict=True))
    mean = sum((weight * value for weight, value in pairs), zero)
    return mean, sum((weight * (value - mean).square() for weight, value in pairs), zero)


def _draw(model: VAE, codes: _Codes, x: Tensor, generators: RowGenerators) -> Tensor:
    """Draw a code of each row by its weight, and the missing values given that code."""
    chosen = torch.stack(
        [
            torch.multinomial(weights, 1, generator=generator)
            for weights, generator in zip(codes.weights, generators.generators, strict=True)
        ]
    )
    z = codes.z.gather(1, chosen[..., None].expand(-1, 1, codes.z.shape[2]))[:, 0]
    return model.decode(z).sample_given(x, generators)
