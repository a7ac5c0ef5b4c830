"""How well a model explains held-out data: ELBO and importance-weighted bound, with standard errors."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equipoise.aggregate import GaussianMixture
from equipoise.data import Batches, Subset
from equipoise.estimate import Estimate
from equipoise.gaussian import standard_normal_log_prob
from equipoise.model import VAE
from equipoise.objectives import Elbo, importance_weighted_bound

EVALUATION_BATCH = 1000
IWAE_BATCH = 100
IWAE_SAMPLES = 20
IWAE_EXAMPLES = 500
"""The paper's protocol: 20 importance samples on 500 test examples."""


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
def likelihood(model: VAE, batches: Iterable[Tensor], generator: torch.Generator | None = None) -> Likelihood:
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
        rows.append(torch.stack([terms.kl, terms.log_likelihood, terms.squared_error, noise_var]))
    kl, log_likelihood, squared_error, noise_var = torch.cat(rows, 1)
    return Likelihood(
        elbo=Estimate.of_mean(log_likelihood.double() - kl.double()),
        log_likelihood=Estimate.of_mean(log_likelihood),
        kl=Estimate.of_mean(kl),
        mse=Estimate.of_mean(squared_error / math.prod(model.shape)),
        noise_var=Estimate.of_mean(noise_var),
        floor_var=float(model.noise.floor_var),
    )


def iwae(
    model: VAE,
    batches: Iterable[Tensor],
    n_samples: int,
    generator: torch.Generator | None = None,
    log_prior: Callable[[Tensor], Tensor] = standard_normal_log_prob,
) -> Estimate:
    r"""Importance-weighted bound on log p(x), see :func:`equipoise.objectives.importance_weighted_bound`.

    Args:
        model: in evaluation mode.
        batches: raw data, (B, \*) each, on the model's device.
        n_samples: K.
        generator: source of the samples.
        log_prior: log p(z); a mixture's ``log_prob`` judges the model with that mixture as its prior.

    Returns:
        Nats per example.
    """
    bounds = [
        importance_weighted_bound(model, model.scaling(raw), n_samples, generator, log_prior=log_prior)
        for raw in batches
    ]
    return Estimate.of_mean(torch.cat(bounds))


def likelihood_section(model: VAE, test: Subset, mixture: GaussianMixture, seed: int) -> dict[str, Any]:
    """Section ``likelihood`` of ``evaluation.json``, by the protocol of every figure we print.

    Args:
        model: in evaluation mode.
        test: raw test examples.
        mixture: fitted to the aggregate posterior, the other p(z) of the paper's Table 3.
        seed: of the samples of z.

    Returns:
        JSON values: averages with standard error and N, in nats; ``mse``, ``noise_var`` and ``noise_floor_var`` in
        squared model units.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed + 5)
    whole = likelihood(model, Batches(test, EVALUATION_BATCH, device).epoch(), generator)
    first = Subset(test.base, test.indices[:IWAE_EXAMPLES], test.dtype)
    log_priors = {"": standard_normal_log_prob, "_mixture": lambda z: mixture.log_prob(z)}
    bounds = {
        f"iwae_{IWAE_SAMPLES}_first_{IWAE_EXAMPLES}{suffix}": iwae(
            model, Batches(first, IWAE_BATCH, device).epoch(), IWAE_SAMPLES, generator, log_prior
        )
        for suffix, log_prior in log_priors.items()
    }
    averages = {
        "elbo": whole.elbo,
        "log_likelihood": whole.log_likelihood,
        "kl": whole.kl,
        "mse": whole.mse,
        "noise_var": whole.noise_var,
        **bounds,
    }
    figures: dict[str, Any] = {name: figure._asdict() for name, figure in averages.items()}
    return figures | {"noise_floor_var": whole.floor_var}
