"""The section ``latent``: what the codes are like, and whether samples copy training data."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from equipoise import plots
from equipoise.aggregate import ACTIVE_UNIT_VAR, LatentDistribution
from equipoise.categories import vectors_of
from equipoise.data import Stream
from equipoise.estimate import Estimate
from equipoise.evaluation.subject import BATCH, Subject
from equipoise.metrics.latent import code_log_likelihood, latent_plane, latent_units
from equipoise.metrics.memorisation import as_vectors, memorisation
from equipoise.model import encode_all

COPIES_SOUGHT = 1000
"""Samples among which copies of the training data are sought."""
PLANE_POINTS, PLANE_EXAMPLES = 96, 5000
SHOWN_CODES = 1000


def latent_section(subject: Subject) -> dict[str, Any]:
    """Describe the codes of the test data, and seek copies of training data among samples.

    Args:
        subject: What is evaluated.

    Returns:
        Figures by name.
    """
    test = subject.batches("Encoding test data", subject.test.raw)
    posterior = encode_all(subject.model, test)
    units = latent_units(posterior)
    codes = posterior.sample(subject.generator("codes"))

    section = {
        "kl_mixture_prior": subject.mixture.kl_to_prior(generator=subject.generator("kl")),
        "active_units": {
            "value": sum(unit.is_active for unit in units),
            "of": len(units),
            "threshold": ACTIVE_UNIT_VAR,
            "n": len(subject.test.raw),
        },
        "rate_per_unit": [unit.rate for unit in units],
        "unit_is_active": [unit.is_active for unit in units],
        **_code_log_likelihood(subject, codes),
        "memorisation": _memorisation(subject),
    }

    if subject.model.latent_dim > 1:
        _draw_plane(subject)
    return section


def _code_log_likelihood(subject: Subject, codes: Tensor) -> dict[str, Any]:
    """Judge each density by codes of the test data, and further ones by their gain over it."""
    section: dict[str, Any] = code_log_likelihood(codes, subject.mixture)._asdict()
    if not subject.sources:
        return {"code_log_likelihood": section}

    mixture = subject.mixture.log_prob(codes)
    gains = {}
    for name, source in subject.sources.items():
        log_prob = source.log_prob(codes)
        section[name] = Estimate.of_mean(log_prob)
        gains[name] = Estimate.of_mean(log_prob - mixture)
    return {"code_log_likelihood": section, "code_gain": gains}


def _memorisation(subject: Subject) -> dict[str, Any]:
    """Compare distances between decoded means, in model units.

    There a copy is a copy, because both sides are equally blurred. Of a stream, only the training
    examples at hand are compared with.
    """
    model, generator = subject.model, subject.generator("copies")
    training_set = subject.data.train
    test = subject.some(subject.test.raw, COPIES_SOUGHT)

    training_codes = (
        model.encode(model.scaling(x)).mean
        for x in subject.batches("Decoding training data", training_set.at_hand)
    )
    # Drawn, and not their means, because codes of the mixture also have the posteriors' noise.
    test_codes = encode_all(model, subject.batches("Encoding test data", test)).sample(generator)

    def decoded(z: Tensor) -> Tensor:
        return vectors_of(model.decode(z))

    def as_vector(raw: Tensor) -> Tensor:
        x: Tensor = model.scaling(raw)
        return x if model.categories is None else model.categories(x)

    judge = partial(
        memorisation,
        training=as_vectors(map(decoded, training_codes)),
        test_reconstructions=as_vectors(map(decoded, torch.split(test_codes, BATCH))),
        test=as_vectors(map(as_vector, subject.completed(subject.batches("Test data", test)))),
    )

    def samples(source: LatentDistribution, generator: torch.Generator) -> Tensor:
        return as_vectors([vectors_of(model.generate(COPIES_SOUGHT, source, generator))])

    section: dict[str, Any] = judge(samples(subject.mixture, generator))._asdict()
    if isinstance(training_set, Stream):
        # Copies of the other training examples are not found.
        section["n_training"] = len(training_set.at_hand)

    for name, source in subject.sources.items():
        judgement = judge(samples(source, subject.generator(f"copies {name}")))
        section[name] = {
            "samples": judgement.samples,
            "closer": judgement.closer,
            "copied": judgement.copied,
        }
    return section


def _draw_plane(subject: Subject) -> None:
    """Draw the aggregate posterior, the mixture and the prior on a plane of the latent space."""
    training = subject.some(subject.data.train.at_hand, PLANE_EXAMPLES)
    posterior = encode_all(subject.model, subject.batches("Encoding training data", training))
    plane = latent_plane(posterior, subject.mixture, subject.generator("plane"), PLANE_POINTS)

    axis = "unit" if subject.model.latent_dim == 2 else "principal axis"
    figure = plots.latent_densities(
        plane.x,
        plane.y,
        {
            "aggregate posterior": plane.aggregate_log_prob,
            f"mixture of {subject.mixture.n_components}": plane.mixture_log_prob,
            "prior": plane.prior_log_prob,
        },
        plane.codes[:SHOWN_CODES],
        (f"latent {axis} 1", f"latent {axis} 2"),
    )
    plots.save(figure, subject.figures / "latent.png")
