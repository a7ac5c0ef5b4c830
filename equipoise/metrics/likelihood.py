"""How well a model explains held-out data: ELBO and importance-weighted bounds, raw and in bits per dimension."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.estimate import Estimate
from equipoise.gaussian import standard_normal_log_prob
from equipoise.model import VAE
from equipoise.objectives import Elbo, LogPrior, importance_weighted_bounds


class Likelihood(NamedTuple):
    """Figures of one model on one set of data.

    Args:
        elbo: nats per example.
        log_likelihood: expected log p(x|z), nats per example.
        kl: nats per example.
        mse: squared error per dimension with z sampled, squared model units.
        noise_var: variance of p(x|z), mean over the dimensions, squared model units.
        floor_var: smallest variance that the noise model can produce; a raw likelihood means little without it.
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

    Args:
        model: in evaluation mode.
        batches: raw data, (B, \*) each, on the model's device.
        generator: source of the samples.

    Returns:
        Averages over all examples.
    """
    objective = Elbo(model)
    rows = []
    for raw in batches:
        terms = objective(model.scaling(raw), generator)
        # One number per example: the residuals of a large set would fill the memory.
        noise_var = terms.log_var.exp().expand_as(terms.residual).flatten(1).mean(1)
        rows.append(
            torch.stack([terms.kl, terms.log_likelihood, terms.squared_error, noise_var]).double()
        )
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
) -> Tensor:
    r"""Importance-weighted bound on log p(x) of each example, :func:`equipoise.objectives.importance_weighted_bounds`.

    Args:
        model: in evaluation mode.
        batches: raw data, (B, \*) each, on the model's device.
        n_samples: K.
        log_priors: log p(z) of each density to judge the model with: the prior, the fitted mixture.
        generator: source of the samples.
        dequantised: bound log p(x + u) as well, see :func:`dequantise`, from codes of q(z|x), which is as good a
            proposal. The model's data must be digital.

    Returns:
        (O, P, N), nats, float64: of the data as they are, and second, if asked for, dequantised; a row for each of
        ``log_priors``.
    """
    parts = []
    for raw in batches:
        x = model.scaling(raw)
        observed = [x, dequantise(x, model.scaling.quantum, generator)] if dequantised else [x]
        parts.append(
            importance_weighted_bounds(
                model, x, n_samples, log_priors, generator, observed=observed
            )
        )
    return torch.cat(parts, 2)


def dequantise(
    x: Tensor, quantum: float | None, generator: torch.Generator | None = None
) -> Tensor:
    r"""Spread each grey level evenly over the interval that was rounded to it, x + u with u uniform.

    A density of rounded data is unbounded: it can grow without limit at the levels. One of spread data is not, and
    bounds a probability of levels from below, :math:`E_u \log p(x + u) + D \log q \le \log P(x)`, where q is the
    distance of two levels. Theis, van den Oord and Bethge (2016), *A note on the evaluation of generative models*.

    Args:
        x: rounded data, any shape.
        quantum: q, distance of neighbouring levels, in the unit of ``x``.
        generator: source of randomness.

    Returns:
        The same shape, within q / 2 of ``x``.

    Raises:
        ValueError: if there is no quantum.
    """
    if quantum is None:
        raise ValueError("data that are no levels cannot be dequantised: leave it out")
    return x + quantum * (torch.empty_like(x).uniform_(generator=generator) - 0.5)


def bits_per_dimension(log_likelihood: Estimate, dimensions: int, quantum: float) -> Estimate:
    r"""Code length of digital data, from the likelihood of the dequantised data.

    .. math:: -\frac{\log p(x + u) + D \log q}{D \log 2}

    Args:
        log_likelihood: of :func:`dequantise`-d data, nats per example.
        dimensions: D.
        quantum: q, distance of neighbouring levels, in the unit of the data.

    Returns:
        Bits; lower is better. 8 for the uniform density of 256 levels on their own range.

    Example:
        >>> bits_per_dimension(Estimate(0.0, None, 1), 1, 1 / 256)  # uniform on [0, 1], where log p = 0
        Estimate(value=8.0, standard_error=None, n=1)
    """
    value, error, n = log_likelihood
    unit = dimensions * math.log(2)
    return Estimate(
        -(value / unit + math.log2(quantum)), None if error is None else error / unit, n
    )
