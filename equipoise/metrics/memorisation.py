r"""Tests whether samples are copies of the training data.

A copy is much nearer to one training example than to any other. The distance alone says little:
everything that a model decodes is blurred, and some regions hold more examples than others. Each
vector is therefore judged by the ratio of its distances to the nearest and the second nearest
training example. Samples are compared with reconstructions of the test set, that is, with what the
same decoder makes of examples that training never used.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from equipoise.estimate import Estimate, jackknife

MARGIN = 0.05
"""Excess of ``closer`` over one half that a model without copies may have.

The data sets that are compared are never exactly alike.
"""

PROJECTED = 1024
"""Number of dimensions to which examples with more dimensions are projected."""

VECTORS_AT_ONCE = 512
"""Number of vectors in a block of distances."""
TRAINING_AT_ONCE = 8192
"""Number of training examples in a block of distances; the block then takes 16 MiB."""


class Memorisation(NamedTuple):
    """Distances to the training data, and the evidence for copies.

    Args:
        samples: median distance of a sample to its nearest training example, unit of the features.
        reconstructions: the same for the reconstructed test examples.
        test: the same for the test examples.
        closer: probability that a sample is nearer to its nearest training example than a
            reconstructed test example is. Both distances are in units of the distance to the second
            nearest training example. It is one half without copies, and one if every sample is a
            copy.
        copied: whether ``closer`` exceeds one half by more than 0.05 and by more than three
            standard errors.
    """

    samples: Estimate
    reconstructions: Estimate
    test: Estimate
    closer: Estimate
    copied: bool


def memorisation(
    samples: Float[Tensor, "n _"],
    training: Float[Tensor, "t d"],
    test_reconstructions: Float[Tensor, "m _"],
    test: Float[Tensor, "k _"],
) -> Memorisation:
    r"""Compare the distances of samples and of reconstructed test examples to the training data.

    .. math:: \mathrm{closer} = P(r(\mathrm{sample}) < r(\mathrm{reconstruction})) + \tfrac12 P(=),
        \qquad r(v) = \frac{\min_t \|v - t\|}{\mathrm{second\,min}_t \|v - t\|}

    ``closer`` is the statistic of Mann and Whitney, as in Meehan, Chaudhuri and Dasgupta (2020), *A
    non-parametric test to detect data-copying in generative models*. The ratio r is that of Yoon,
    Choi, Kwon and Ryu (2023), *Diffusion probabilistic models generalize when they fail to
    memorize*. The standard error is that of DeLong, DeLong and Clarke-Pearson (1988), *Comparing
    the areas under two or more correlated receiver operating characteristic curves*.

    Args:
        samples: features of the samples, (n, d), at least 2. Pixels and columns are features too.
        training: features of the training examples, (t, d), at least 2. The test has most power if
            these are reconstructions as well, because both sides are then blurred. They must be
            complete: copies of an example that is left out are not found.
        test_reconstructions: features of the reconstructed test examples, (m, d), at least 2.
        test: features of the test examples, (k, d), at least 1.

    Returns:
        Median distances and the comparison.

    Raises:
        ValueError: if there are too few vectors, or their dimensions differ.

    Example:
        >>> training = torch.arange(0.0, 20.0)[:, None]
        >>> unseen = training[:-1] + 0.5
        >>> memorisation(training + 0.01, training, unseen, unseen).copied
        True
    """
    for name, vectors, minimum in (
        ("samples", samples, 2),
        ("training", training, 2),
        ("test_reconstructions", test_reconstructions, 2),
        ("test", test, 1),
    ):
        if len(vectors) < minimum or vectors.shape[1] != training.shape[1]:
            raise ValueError(
                f"expected at least {minimum} {name}, of the {training.shape[1]} dimensions of "
                f"training, got {tuple(vectors.shape)}"
            )

    sample_distances = _nearest_two(samples, training)
    reconstruction_distances = _nearest_two(test_reconstructions, training)
    test_distances = _nearest_two(test, training)

    closer = _probability_less(_ratio(sample_distances), _ratio(reconstruction_distances))
    margin = max(MARGIN, 3 * (closer.standard_error or 0.0))

    return Memorisation(
        samples=_median(sample_distances[:, 0]),
        reconstructions=_median(reconstruction_distances[:, 0]),
        test=_median(test_distances[:, 0]),
        closer=closer,
        copied=closer.value - 0.5 > margin,
    )


@torch.no_grad()
def as_vectors(batches: Iterable[Tensor]) -> Float[Tensor, "n vector"]:
    r"""Turn examples into vectors with the same distances from each other, in little memory.

    Examples of more than 1024 dimensions are projected to 1024 random directions, which changes
    distances by a few per cent: Johnson and Lindenstrauss (1984), *Extensions of Lipschitz mappings
    into a Hilbert space*.

    Args:
        batches: (B, \*) each, on one device.

    Returns:
        Vectors, (N, at most 1024), float32, on the device of the batches. The projection is always
        the same.

    Raises:
        ValueError: if there are no batches.
    """
    projection = None
    parts = []
    for batch in batches:
        vectors = batch.flatten(1).float()

        if vectors.shape[1] > PROJECTED:
            if projection is None:
                projection = _projection(vectors.shape[1]).to(vectors.device)
            vectors = vectors @ projection

        parts.append(vectors)

    if not parts:
        raise ValueError("there are no examples to compare; give at least one batch")
    return torch.cat(parts)


def _projection(dimensions: int) -> Tensor:
    """Random directions that preserve lengths on average, (dimensions, 1024)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(dimensions, PROJECTED, generator=generator) / math.sqrt(PROJECTED)


def _nearest_two(vectors: Tensor, training: Tensor) -> Tensor:
    """Distances to the nearest and the second nearest training example, (n, 2)."""
    centre = training.mean(0)
    distances = []
    for rows in torch.split(vectors, VECTORS_AT_ONCE):
        block_distances, block_indices = [], []
        for first in range(0, len(training), TRAINING_AT_ONCE):
            block = training[first : first + TRAINING_AT_ONCE]
            all_distances = torch.cdist(rows - centre, block - centre)
            nearest = all_distances.topk(min(2, len(block)), largest=False)

            block_distances.append(nearest.values)
            block_indices.append(nearest.indices + first)

        best = torch.cat(block_distances, 1).topk(2, largest=False).indices
        nearest_two = torch.cat(block_indices, 1).gather(1, best)

        # The distances are computed again from differences, because the small distance of a copy is
        # lost to rounding in the matrix product of cdist.
        differences = rows[:, None] - training[nearest_two]
        distances.append(differences.norm(dim=2).sort(1).values)

    return torch.cat(distances)


def _ratio(nearest_two: Tensor) -> Tensor:
    """Nearest over second nearest distance, (n,).

    It is zero for a copy of an example that occurs twice, where both distances are zero.
    """
    nearest, second = nearest_two.double().unbind(1)
    return torch.where(second > 0, nearest / second, 0.0)


def _probability_less(a: Tensor, b: Tensor) -> Estimate:
    """P(a < b), where a tie counts one half."""
    above_a = 1 - _share_below(a, b)
    below_b = _share_below(b, a)
    standard_error = float((above_a.var() / len(a) + below_b.var() / len(b)).sqrt())

    return Estimate(float(above_a.mean()), standard_error, len(a))


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """Share of the others below each value, (n,), where a tie counts one half."""
    ordered = others.sort().values
    counts = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)

    return counts.double() / (2 * len(ordered))


def _median(distances: Tensor) -> Estimate:
    values = distances.double().cpu()

    def median_of(rows: NDArray[np.int64]) -> float:
        return float(values[torch.from_numpy(rows)].quantile(0.5))

    return jackknife(median_of, len(values))
