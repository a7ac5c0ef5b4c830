"""The section ``likelihood``: bounds on log p(x), with the prior and with the mixture as p(z)."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from equipoise import plots
from equipoise.estimate import Estimate
from equipoise.evaluation.subject import Subject
from equipoise.gaussian import standard_normal_log_prob
from equipoise.metrics.baselines import baselines
from equipoise.metrics.likelihood import (
    Likelihood,
    bits_per_dimension,
    has_cells,
    iwae,
    likelihood,
)

PAPER_SAMPLES, PAPER_EXAMPLES = 20, 500
"""The protocol of the paper's Table 3: 20 importance samples on 500 test examples."""
SWEEP = np.geomspace(0.1, 10, 81)
"""Multiples of the optimal variance at which the closed-form curve is drawn."""


def likelihood_section(subject: Subject) -> dict[str, Any]:
    """Bound log p(x) of raw data, and where they are digital, of their levels.

    Args:
        subject: What is evaluated.

    Returns:
        Estimates by name, nats per example.
    """
    model, test = subject.model, subject.test.raw
    elbo = likelihood(model, subject.batches("ELBO", test), subject.generator("elbo"))
    section: dict[str, Any] = elbo._asdict()
    section["noise_floor_var"] = section.pop("floor_var")
    if not subject.data.has_gaps and model.categories is None:
        of = (subject.data.train.at_hand, test, model.scaling, model.latent_dim)
        section |= baselines(*of)._asdict()

    log_priors = [standard_normal_log_prob, subject.mixture.log_prob]
    first = subject.batches("IWAE of the paper", test.take(slice(PAPER_EXAMPLES)))
    paper = iwae(model, first, PAPER_SAMPLES, log_priors, subject.generator("paper"))
    section |= _by_prior("iwae_20_first_500", paper[0])

    _draw_variance_sweep(subject, elbo)
    if subject.importance_samples:
        section |= _bounds_of_all(subject)
    if test.labels is not None:
        section |= _by_label(subject)
    return section


def _by_label(subject: Subject) -> dict[str, Any]:
    """ELBO and squared error of the test examples of each label, given the label."""
    test, names = subject.test.raw, subject.model.label_names
    numbers = test.label_numbers()
    found: dict[str, Any] = {}
    for number, name in enumerate(names):
        examples = test.take(np.flatnonzero(numbers == number).astype(np.int64))
        if not len(examples):
            continue
        batches = subject.batches(f"ELBO of {name}", examples)
        elbo = likelihood(subject.model, batches, subject.generator(f"elbo {name}"))
        # A label may have the name of a figure.
        found[f"label {name}"] = {"elbo": elbo.elbo, "mse": elbo.mse}
    return found


def _bounds_of_all(subject: Subject) -> dict[str, Any]:
    """Importance-weighted bounds over the whole test set, and bits per dimension from them."""
    model, n_samples = subject.model, subject.importance_samples
    quantum, is_exact = model.scaling.quantum, has_cells(model)
    bounds = iwae(
        model,
        subject.batches(f"IWAE-{n_samples}", subject.test.raw),
        n_samples,
        [standard_normal_log_prob, subject.mixture.log_prob],
        subject.generator("iwae"),
        dequantised=quantum is not None,
        digital=is_exact,
    )

    name = f"iwae_{n_samples}"
    section: dict[str, Any] = dict(_by_prior(name, bounds[0]))
    if quantum is None:
        return section

    dimensions = math.prod(model.shape)
    kinds = [("dequantised", "bits_per_dim_dequantised", bounds[1], quantum)]
    if is_exact:
        kinds.append(("digital", "bits_per_dim", bounds[2], 1.0))

    for kind, key, both, unit in kinds:
        section[kind] = _by_prior(name, both)
        for suffix in ("", "_mixture"):
            bound = section[kind][f"{name}{suffix}"]
            section[f"{key}{suffix}"] = bits_per_dimension(bound, dimensions, unit)
    return section


def _by_prior(name: str, bounds: Tensor) -> dict[str, Estimate]:
    """Name a pair of bounds, of which the first has the prior as p(z), the second the mixture."""
    with_prior, with_mixture = bounds
    return {
        name: Estimate.of_mean(with_prior),
        f"{name}_mixture": Estimate.of_mean(with_mixture),
    }


def _draw_variance_sweep(subject: Subject, elbo: Likelihood) -> None:
    """Draw the ELBO, eq. (9), of the networks as they are with any one variance.

    It is highest at their squared error, eq. (10).
    """
    dimensions, mse = math.prod(subject.model.shape), elbo.mse.value
    var = SWEEP * mse
    log_likelihood = -dimensions / 2 * (np.log(2 * math.pi * var) + mse / var)
    curve = log_likelihood - elbo.kl.value

    learned = elbo.noise_var.value
    shared_log_var = subject.model.noise.shared_log_var
    if subject.model.noise.depends_on_code and shared_log_var is not None:
        learned = float(shared_log_var.exp().mean())

    curves = {"ELBO with one variance, nats": {"test data": curve}}
    figure = plots.variance_sweep(var, curves, learned)
    plots.save(figure, subject.figures / "variance-sweep.png")
