"""The section ``samples``: how far samples, and real data, are from the test data."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise import plots
from equipoise.aggregate import LatentDistribution
from equipoise.catalogue import SOURCES
from equipoise.categories import Likelihood
from equipoise.data import Batches, Subset
from equipoise.evaluation.subject import BATCH, Subject
from equipoise.glossary import term
from equipoise.metrics.features import FeatureExtractor, cached_features, features_of
from equipoise.metrics.precision_recall import precision_recall
from equipoise.metrics.samples import sample_quality
from equipoise.sources import ready_source

SHOWN_IMAGES = 36
COVERED = 2000
"""Largest number of examples on either side of precision and recall, whose cost is its square."""
JUDGED_SOURCES = tuple(name for name, source in SOURCES.items() if source.is_judged)
ROWS = ("real", "reconstruction", *JUDGED_SOURCES)
"""Rows of the table: training data, decoded test data, and the sources that are always judged."""


def samples_section(subject: Subject) -> dict[str, Any]:
    """Compute Fréchet and kernel distances from the test data, precision and recall.

    Args:
        subject: What is evaluated.

    Returns:
        Figures by row: real training data, reconstructions, and samples of each source.
    """
    extractor = subject.extractor
    if extractor is None:
        raise ValueError("the section samples needs features to compare samples in")
    extractor.module.to(subject.device)

    test = subject.some(subject.test.raw, subject.n_samples)
    # At random, because the examples are in their own order.
    compared = np.random.RandomState(subject.seed).permutation(len(test))[:COVERED]
    reference = _real_features(subject, extractor, "test", test)
    section: dict[str, Any] = {
        "features": extractor.name,
        "feature_dimension": extractor.dimension,
        "reference": {"examples": subject.test.name, "n": len(reference)},
    }

    rows = (*ROWS, *subject.sources)
    for done, row in enumerate(rows):
        features = _row_features(subject, extractor, row)
        subject.progress(f"Distances of {row}", done, len(rows))
        quality = sample_quality(features, reference, subject.seed)
        coverage = precision_recall(features[compared], reference[compared])
        section[row] = {
            "frechet_distance": quality.frechet,
            "kernel_distance": quality.kernel,
            "precision": coverage.precision,
            "recall": coverage.recall,
        }
    subject.progress("Distances", len(rows), len(rows))

    if subject.is_image:
        _draw_samples(subject)
    return section


def _row_features(subject: Subject, extractor: FeatureExtractor, row: str) -> Tensor:
    """Compute the features of one row of the table."""
    n = subject.n_samples
    if row == "real":
        training = subject.some(subject.data.train.at_hand, n)
        return _real_features(subject, extractor, row, training)

    if row == "reconstruction":
        images = _reconstructed(subject, n)
    else:
        images = _generated(subject, row, n)
    batches = subject.track(f"Features of {row}", images, math.ceil(n / BATCH))
    return features_of(extractor, batches).to(subject.device)


def _real_features(subject: Subject, extractor: FeatureExtractor, row: str, raw: Subset) -> Tensor:
    batches = subject.batches(f"Features of {row}", raw)
    if subject.data.has_gaps:
        # Not kept, because what fills the gaps is of this model.
        return features_of(extractor, subject.completed(batches)).to(subject.device)
    return cached_features(extractor, raw, batches).to(subject.device)


def _reconstructed(subject: Subject, n: int) -> Iterator[Tensor]:
    """Decode the posterior means of test examples."""
    model, generator = subject.model, subject.generator("reconstruction")
    test = subject.some(subject.test.raw, n)
    for raw in Batches(test, BATCH, subject.device).epoch():
        yield _observed(subject, model.reconstruct(model.scaling(raw)), generator)


def _generated(subject: Subject, name: str, n: int) -> Iterator[Tensor]:
    """Decode codes of a source."""
    source: LatentDistribution
    if name in subject.sources:
        source = subject.sources[name]
    else:
        source = ready_source(name, subject.mixture)

    generator = subject.generator("samples")
    for first in range(0, n, BATCH):
        likelihood = subject.model.generate(min(BATCH, n - first), source, generator)
        yield _observed(subject, likelihood, generator)


def _observed(subject: Subject, likelihood: Likelihood, generator: torch.Generator) -> Tensor:
    """Turn decoded codes into what the data would be.

    Images are shown by their means. Rows of a table get their noise, because means spread less.
    """
    x = likelihood.mean if subject.is_image else likelihood.sample(generator)
    return subject.model.scaling.restore_levels(x)


def _draw_samples(subject: Subject) -> None:
    """Draw test data beside samples from the prior, from the mixture and from further sources."""
    test = subject.some(subject.test.raw, SHOWN_IMAGES)
    raw_sets = {"test data": torch.from_numpy(test[:]).to(subject.device)}
    for row in ("prior", "mixture", *subject.sources):
        raw_sets[term(row).title] = next(_generated(subject, row, SHOWN_IMAGES))

    scaling = subject.model.scaling
    sets = {title: plots.pictures(scaling(raw).cpu().numpy()) for title, raw in raw_sets.items()}
    plots.save(plots.samples_compared(sets), subject.figures / "samples-compared.png")
