"""How well a model describes held-out data.

The measures are the ELBO and importance-weighted bounds, in nats and in bits per dimension.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.estimate import Estimate
from equipoise.gaussian import Gaussian, standard_normal_log_prob
from equipoise.model import VAE
from equipoise.objectives import Elbo, LogPrior, importance_weighted_bounds


class Likelihood(NamedTuple):
    """ELBO of one model on one set of data, and its parts.

    Args:
        elbo: evidence lower bound, nats per example.
        log_likelihood: expected log p(x|z), nats per example.
        kl: KL(q(z|x), p(z)), nats per example.
        mse: squared error per dimension with z sampled, squared model units.
        noise_var: variance of p(x|z), mean over the dimensions, squared model units.
        floor_var: smallest variance that the noise model can predict, squared model units. It
            limits the likelihood, so the two should be read together.
    """

    elbo: Estimate
    log_likelihood: Estimate
    kl: Estimate
    mse: Estimate
    noise_var: Estimate
    floor_var: float


@torch.no_grad()
def likelihood(
    model: VAE, batches: Iterable[Tensor], generator: torch.Generator | None = None
) -> Likelihood:
    r"""Evaluate the evidence lower bound, eq. (4), with one sample of z per example.

    The slope of a power transform is contained, so that models with and without are comparable.

    Args:
        model: the model, in evaluation mode.
        batches: raw data, (B, \*) each, on the model's device.
        generator: source of randomness for the samples.

    Returns:
        Averages over all examples.
    """
    objective = Elbo(model)
    rows = []
    for raw in batches:
        terms = objective(model.scaling(raw), generator)

        # Only the mean of each example is stored, because the variances of all dimensions of a
        # large set would fill the memory.
        noise_var = terms.log_var.exp().expand_as(terms.residual).flatten(1).mean(1)

        log_likelihood = terms.log_likelihood + model.scaling.log_transform_slope(raw)
        row = torch.stack([terms.kl, log_likelihood, terms.squared_error, noise_var])
        rows.append(row.double())

    kl, log_likelihood, squared_error, noise_var = torch.cat(rows, 1)

    return Likelihood(
        elbo=Estimate.of_mean(log_likelihood - kl),
        log_likelihood=Estimate.of_mean(log_likelihood),
        kl=Estimate.of_mean(kl),
        mse=Estimate.of_mean(squared_error / math.prod(model.shape)),
        noise_var=Estimate.of_mean(noise_var),
        floor_var=float(model.noise.floor_var),
    )


@torch.no_grad()
def iwae(
    model: VAE,
    batches: Iterable[Tensor],
    n_samples: int,
    log_priors: Sequence[LogPrior] = (standard_normal_log_prob,),
    generator: torch.Generator | None = None,
    *,
    dequantised: bool = False,
    digital: bool = False,
) -> Tensor:
    r"""Importance-weighted bound on log p(x) of each example.

    The bound is computed by :func:`equipoise.objectives.importance_weighted_bounds`. The slope of
    a power transform is contained, so that models with and without are comparable.

    Args:
        model: the model, in evaluation mode.
        batches: raw data, (B, \*) each, on the model's device.
        n_samples: K, number of samples of z per example.
        log_priors: log p(z) of each density that takes the place of the prior, such as the prior
            itself and the fitted mixture.
        generator: source of randomness for the samples.
        dequantised: whether to bound log p(x + u) as well, see :func:`dequantise`. The codes are
            samples of q(z|x) in both cases, which is a valid proposal for both. The data of the
            model must be digital.
        digital: whether to bound the logarithm of the probability of the levels as well, see
            :class:`equipoise.digital.DigitalGaussian` and :func:`has_cells`.

    Returns:
        Bounds in nats, float64, (O, P, N). The first axis has the data as they are, then, if
        ``dequantised``, the dequantised data, then, if ``digital``, the levels. The second axis has
        one entry for each of ``log_priors``.

    Raises:
        ValueError: if ``dequantised`` or ``digital`` is asked for, and the data have no levels, or
            if ``digital`` is, and :func:`has_cells` is false.
    """
    if digital and model.levels is None:
        raise ValueError("data without levels have no probabilities; leave digital out")

    parts = []
    for raw in batches:
        x = model.scaling(raw)

        observed = [x]
        if dequantised:
            observed.append(dequantise(x, model.scaling.quantum, generator))

        bounds = importance_weighted_bounds(
            model,
            x,
            n_samples,
            log_priors,
            generator,
            observed=observed,
            levels=model.levels if digital else None,
        )
        parts.append(bounds + model.scaling.log_transform_slope(raw))

    return torch.cat(parts, 2)


@torch.no_grad()
def has_cells(model: VAE) -> bool:
    """Tell whether the probability of the data's levels has a closed form under a model.

    It has for digital data with noise that is independent between the dimensions. Under noise that
    hangs together, the mass of a cell of all dimensions has none.

    Args:
        model: the model, in evaluation mode.

    Returns:
        Whether it has.
    """
    code = model.scaling.scale.new_zeros(1, model.latent_dim)
    return model.levels is not None and type(model.decode(code)) is Gaussian


def dequantise(
    x: Tensor, quantum: float | None, generator: torch.Generator | None = None
) -> Tensor:
    r"""Add uniform noise to rounded data: x + u, with u as wide as the distance of two levels.

    The density of rounded data is unbounded: it can grow without limit at the levels. The density
    of dequantised data is bounded. It gives a lower bound on the probability of the levels,
    :math:`E_u \log p(x + u) + D \log q \le \log P(x)`, where q is the distance of two levels.
    Theis, van den Oord and Bethge (2016), *A note on the evaluation of generative models*.

    Args:
        x: rounded data, any shape.
        quantum: q, distance of neighbouring levels, in the unit of ``x``; None for data that are
            not digital.
        generator: source of randomness.

    Returns:
        Data of the same shape, within q / 2 of ``x``.

    Raises:
        ValueError: if ``quantum`` is None.
    """
    if quantum is None:
        raise ValueError(
            "data without levels cannot be dequantised; leave dequantisation out for these data"
        )

    u = quantum * (torch.empty_like(x).uniform_(generator=generator) - 0.5)
    return x + u


def bits_per_dimension(log_likelihood: Estimate, dimensions: int, quantum: float = 1.0) -> Estimate:
    r"""Code length of digital data, from the probability of the levels or a density.

    .. math:: -\frac{\log P(x)}{D \log 2} \le -\frac{\log p(x + u) + D \log q}{D \log 2}

    Args:
        log_likelihood: log-probability of the levels, or log-likelihood of data after
            :func:`dequantise`, nats per example.
        dimensions: D, number of dimensions of an example.
        quantum: q, distance of neighbouring levels in the unit of the data, for a log-likelihood. 1
            for a log-probability.

    Returns:
        Bits per dimension; lower is better. The uniform density over 256 levels needs 8 bits.

    Example:
        >>> uniform = Estimate(0.0, None, 1)  # log p = 0 for the uniform density on [0, 1]
        >>> bits_per_dimension(uniform, 1, 1 / 256)
        Estimate(value=8.0, standard_error=None, n=1)
    """
    value, error, n = log_likelihood
    nats_per_bit = dimensions * math.log(2)

    bits = -(value / nats_per_bit + math.log2(quantum))
    if error is None:
        return Estimate(bits, None, n)
    return Estimate(bits, error / nats_per_bit, n)
