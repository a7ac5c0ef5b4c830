"""Precision and recall of samples: whether they look like data, and whether they cover them.

A Fréchet distance does not tell samples that are not like data from samples that leave some data
out. These two figures do. Either set of features is surrounded by balls, and precision and recall
are the shares of one set that lie in the balls of the other.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.estimate import Estimate

NEIGHBOURS = 3
"""Number of the nearest neighbour to which the ball around an example reaches."""

ROUNDING = 1e-12
"""Squared distances below this share of the squared lengths are rounding errors of float64."""

TIES = 1e-9
"""Relative difference of squared distances that are taken as equal."""

ROWS_AT_ONCE = 1000
"""Number of examples in a block of distances. With 10,000 others, a block takes 80 MB."""

GROUPS = 10
"""Number of groups of the jackknife."""


class PrecisionRecall(NamedTuple):
    """How samples and real examples cover each other.

    Args:
        precision: share of the samples that are within the manifold of the real examples.
        recall: share of the real examples that are within the manifold of the samples.
    """

    precision: Estimate
    recall: Estimate


def precision_recall(
    features: Float[Tensor, "n d"], reference: Float[Tensor, "m _"], k: int = NEIGHBOURS
) -> PrecisionRecall:
    r"""Compute improved precision and recall by the balls of k nearest neighbours.

    The manifold of a set is the union of the balls around its vectors. The radius of each ball is
    the distance to the k-th nearest other vector of the set:

    .. math:: \mathrm{precision} = \frac1N \sum_x
        \bigl[\exists y: \|x - y\| \le \|y - \mathrm{NN}_k(y)\|\bigr]

    Recall is the same with the roles of the samples x and the real examples y exchanged.

    Source: Kynkäänniemi, Karras, Laine, Lehtinen and Aila (2019), *Improved precision and recall
    metric for assessing generative models*. Their k is 3, too.

    The balls shrink when there are more vectors, so only figures of the same numbers should be
    compared. The standard error is that of the delete-a-group jackknife. Each of its 10 groups, or
    as many as there are vectors if they are fewer, has its share of both sets, so that the error
    accounts for the spread of either. For Gaussian vectors it is too large, by a factor of 1.2 to
    2, since balls are no smooth function of the vectors.

    Args:
        features: features x of the samples to judge, (N, d), where N is at least k + 1.
        reference: features y of real examples, (M, d), where M is at least k + 1.
        k: number of neighbours within the ball around an example.

    Returns:
        Precision, over the N samples, and recall, over the M real examples, each between 0 and 1.
        The standard error is None where at most k vectors of either set are left without a group.

    Raises:
        ValueError: if there are too few vectors, or the dimensions differ.

    Example:
        >>> line = torch.arange(10.0)[:, None]
        >>> found = precision_recall(line[:5], line, k=1)  # the lower half of the data
        >>> found.precision.value, found.recall.value
        (1.0, 0.6)
    """
    if min(len(features), len(reference)) <= k or k < 1 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"expected k >= 1, got {k}, and more than k vectors of one dimension on either side, "
            f"got {tuple(features.shape)} and {tuple(reference.shape)}"
        )

    n_groups = min(GROUPS, len(features), len(reference))
    features, reference = features.double(), reference.double()
    radii, reference_radii = _radii(features, k, n_groups), _radii(reference, k, n_groups)

    # Near the origin, distances lose fewer digits.
    features, reference = features - reference.mean(0), reference - reference.mean(0)

    precise, recalled = [], torch.zeros_like(reference_radii, dtype=torch.bool)
    blocks = torch.split(features, ROWS_AT_ONCE), torch.split(radii, ROWS_AT_ONCE, 1)
    for rows, rows_radii in zip(*blocks, strict=True):
        distances = _squared_distances(rows, reference)
        precise.append(_covered(distances, reference_radii))
        recalled |= _covered(distances.mT, rows_radii)

    has_error = all(len(x) - -(-len(x) // n_groups) > k for x in (features, reference))
    return PrecisionRecall(_share(torch.cat(precise, 1), has_error), _share(recalled, has_error))


def _radii(x: Tensor, k: int, n_groups: int) -> Tensor:
    """Squared radii of the balls of all vectors, and without each group, (1 + g, n).

    The i-th vector is in group i modulo g. Balls of a group that is left out have the radius -1.
    """
    x = x - x.mean(0)
    padding = -len(x) % n_groups
    blocks = []
    for first in range(0, len(x), ROWS_AT_ONCE):
        distances = _squared_distances(x[first : first + ROWS_AT_ONCE], x)
        distances.diagonal(first).fill_(torch.inf)

        # The k nearest of each group are enough to find the k nearest of any groups.
        padded = nn.functional.pad(distances, (0, padding), value=torch.inf)
        by_group = padded.reshape(len(distances), -1, n_groups)
        nearest = by_group.topk(min(k, by_group.shape[1]), 1, largest=False, sorted=False).values

        choices = [nearest, *(_without(nearest, j, n_groups) for j in range(n_groups))]
        blocks.append(torch.stack([some.flatten(1).kthvalue(k).values for some in choices]))

    # An example on the surface of a ball is within it, whatever the rounding.
    radii = torch.cat(blocks, 1) * (1 + TIES)
    for j in range(n_groups):
        radii[1 + j, j::n_groups] = -1
    return radii


def _without(values: Tensor, group: int, n_groups: int) -> Tensor:
    """Leave out a group of the last axis."""
    return values[..., torch.arange(values.shape[-1]) % n_groups != group]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of vectors (n, d) and (m, d), (n, m). Equal vectors have exactly zero."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = torch.addmm(squares, a, b.mT, alpha=-2)
    return distances.masked_fill_(distances < ROUNDING * squares, 0)


def _covered(distances: Tensor, radii: Tensor) -> Tensor:
    """Whether each row (n, m) is in a ball, for each set of radii (1 + g, m), as (1 + g, n)."""
    return torch.stack([(distances <= some).any(1) for some in radii])


def _share(covered: Tensor, has_error: bool) -> Estimate:
    """Share of the vectors that are covered, with the error of the jackknife over the groups."""
    n, n_groups = covered.shape[1], len(covered) - 1
    value = float(covered[0].double().mean())
    if not has_error:
        return Estimate(value, None, n)

    shares = [_without(covered[1 + j], j, n_groups).double().mean() for j in range(n_groups)]
    return Estimate.of_groups(value, torch.stack(shares).cpu().numpy(), n)
