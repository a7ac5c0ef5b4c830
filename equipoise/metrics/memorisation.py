r"""Do samples copy the training data?

A copy lies much nearer to one training example than to any other. How near says little by itself: everything that is
decoded is blurred, and examples lie denser in some places than in others. So each vector is judged by the ratio of its
distances to the nearest and the second nearest training example, and samples are compared with what the same decoder
makes of examples that training never saw: the reconstructions of the test set.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equipoise.estimate import Estimate, jackknife

MARGIN = 0.05
"""Excess over one half in ``closer`` that a model without copies may have: test sets are never quite alike."""

PROJECTED = 1024
"""Dimensions that examples of more are projected to."""

VECTORS_AT_ONCE = 512
TRAINING_AT_ONCE = 8192
"""Sizes of a block of distances: 16 MiB."""


class Memorisation(NamedTuple):
    """Distances to the training data, and what they say of copies.

    Args:
        samples: median distance to the nearest training example, unit of the features.
        reconstructions: likewise, of the reconstructed test examples.
        test: likewise, of the test examples.
        closer: probability that a sample is nearer to its nearest training example, in units of the distance to the
            second nearest, than a reconstructed test example is; one half without copies, one if all are copies.
        copied: whether ``closer`` exceeds one half by more than 0.05 and by more than three standard errors.
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
    r"""Compare samples with reconstructions of unseen examples, in their distances to the training data.

    .. math:: \mathrm{closer} = P(r(\mathrm{sample}) < r(\mathrm{reconstruction})) + \tfrac12 P(=),
        \qquad r(v) = \frac{\min_t \|v - t\|}{\mathrm{second\,min}_t \|v - t\|}

    which is the statistic of Mann and Whitney, as in Meehan, Chaudhuri and Dasgupta (2020), *A non-parametric test to
    detect data-copying in generative models*; the ratio is that of Yoon, Choi, Kwon and Ryu (2023), *Diffusion
    probabilistic models generalize when they fail to memorize*. The standard error is that of DeLong, DeLong and
    Clarke-Pearson (1988), *Comparing the areas under two or more correlated receiver operating characteristic curves*.

    Args:
        samples: features of the samples, (n, d), at least 2. Pixels, or columns, are features too.
        training: of the training examples, (t, d), at least 2. The test has most power where these are reconstructed
            as well, so that blur is on either side, and complete: copies of an example that is left out are not found.
        test_reconstructions: of the reconstructed test examples, (m, d), at least 2.
        test: of the test examples, (k, d), at least 1.

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
    for name, vectors, least in (
        ("samples", samples, 2),
        ("training", training, 2),
        ("test_reconstructions", test_reconstructions, 2),
        ("test", test, 1),
    ):
        if len(vectors) < least or vectors.shape[1] != training.shape[1]:
            raise ValueError(
                f"expected at least {least} {name}, of the {training.shape[1]} dimensions of training, "
                f"got {tuple(vectors.shape)}"
            )
    of_samples, of_reconstructions, of_test = (
        _nearest_two(vectors, training) for vectors in (samples, test_reconstructions, test)
    )
    closer = _probability_less(_ratio(of_samples), _ratio(of_reconstructions))
    return Memorisation(
        samples=_median(of_samples[:, 0]),
        reconstructions=_median(of_reconstructions[:, 0]),
        test=_median(of_test[:, 0]),
        closer=closer,
        copied=closer.value - 0.5 > max(MARGIN, 3 * (closer.standard_error or 0.0)),
    )


@torch.no_grad()
def as_vectors(batches: Iterable[Tensor]) -> Float[Tensor, "n vector"]:
    r"""Examples as vectors that lie as far apart as the examples do, in little memory.

    Those of more than 1024 dimensions are projected at random to 1024, which keeps distances to within a few per cent:
    Johnson and Lindenstrauss (1984), *Extensions of Lipschitz mappings into a Hilbert space*.

    Args:
        batches: (B, \*) each, on one device.

    Returns:
        (N, at most 1024), float32, on the device of the batches; always by the same projection.

    Raises:
        ValueError: if there are no batches.
    """
    projection, parts = None, []
    for batch in batches:
        vectors = batch.flatten(1).float()
        if vectors.shape[1] > PROJECTED:
            if projection is None:
                generator = torch.Generator().manual_seed(0)
                projection = (
                    torch.randn(vectors.shape[1], PROJECTED, generator=generator) / PROJECTED**0.5
                )
                projection = projection.to(vectors.device)
            vectors = vectors @ projection
        parts.append(vectors)
    if not parts:
        raise ValueError("there are no examples to compare; give at least one batch")
    return torch.cat(parts)


def _nearest_two(vectors: Tensor, training: Tensor) -> Tensor:
    """Distances to the nearest and the second nearest training example, (n, 2)."""
    centre = training.mean(0)
    distances = []
    for rows in torch.split(vectors, VECTORS_AT_ONCE):
        near, index = [], []
        for first in range(0, len(training), TRAINING_AT_ONCE):
            block = training[first : first + TRAINING_AT_ONCE]
            nearest = torch.cdist(rows - centre, block - centre).topk(
                min(2, len(block)), largest=False
            )
            near.append(nearest.values)
            index.append(nearest.indices + first)
        two = torch.cat(index, 1).gather(1, torch.cat(near, 1).topk(2, largest=False).indices)
        # Once more by differences: what is left of a copy's distance in a matrix product is rounding.
        distances.append((rows[:, None] - training[two]).norm(dim=2).sort(1).values)
    return torch.cat(distances)


def _ratio(nearest_two: Tensor) -> Tensor:
    """Nearest over second nearest distance, (n,); zero for a copy of an example that is there twice."""
    nearest, second = nearest_two.double().unbind(1)
    return torch.where(second > 0, nearest / second, 0.0)


def _probability_less(a: Tensor, b: Tensor) -> Estimate:
    """P(a < b), ties counted half."""

    def below(values: Tensor, among: Tensor) -> Tensor:
        among = among.sort().values
        counts = torch.searchsorted(among, values) + torch.searchsorted(among, values, right=True)
        return counts.double() / (2 * len(among))

    above_a, below_b = 1 - below(a, b), below(b, a)
    standard_error = float((above_a.var() / len(a) + below_b.var() / len(b)).sqrt())
    return Estimate(float(above_a.mean()), standard_error, len(a))


def _median(distances: Tensor) -> Estimate:
    values = distances.double().cpu()
    return jackknife(lambda rows: float(values[torch.from_numpy(rows)].quantile(0.5)), len(values))
