r"""What needs no network: the mean of the training, and principal components of it.

Reconstructions are good if their squared error is well below that of both. PCA of d components is
the best that a linear encoder and decoder with codes of d numbers can do on the training examples.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from equipoise.data import Subset
from equipoise.data.batches import as_tensor
from equipoise.data.dataset import Array
from equipoise.estimate import Estimate
from equipoise.model import Scaling

FITTED_VALUES = 1 << 25
"""Most values of training examples to which PCA is fitted."""
MOST_FITTED = 10_000
AT_ONCE = 500


class Baselines(NamedTuple):
    """Squared errors over test examples, mean over the dimensions, in squared model units.

    Args:
        mse_mean_example: Error of the mean of the training examples.
        mse_pca: Error of the projection on as many principal components as the codes have units.
    """

    mse_mean_example: Estimate
    mse_pca: Estimate


def baselines(train: Subset, test: Subset, scaling: Scaling, n_components: int) -> Baselines:
    """Compute the squared errors of the mean example and of PCA.

    Args:
        train: Training examples without gaps, of which some are used, evenly spaced: at most
            10,000, with at most 33 million values.
        test: Examples to judge by, without gaps.
        scaling: Brings both to model units.
        n_components: Number of principal components; fewer if there are fewer examples.

    Returns:
        The errors.
    """
    from sklearn.decomposition import PCA

    shape = train.shape[1:]
    width = int(np.prod(shape))
    n = min(len(train), MOST_FITTED, max(n_components + 1, FITTED_VALUES // width))

    some = train.take(np.linspace(0, len(train) - 1, n).astype(np.int64))

    def blocks(part: Subset) -> Iterator[Array]:
        for start in range(0, len(part), AT_ONCE):
            raw = as_tensor(part.take(slice(start, start + AT_ONCE)))
            x = scaling(raw.to(scaling.scale.device))
            yield x.flatten(1).cpu().numpy()

    pca = PCA(min(n_components, n, width), random_state=0).fit(np.concatenate(list(blocks(some))))

    of_mean, of_pca = [], []
    for x in blocks(test):
        of_mean.append(np.square(x - pca.mean_).mean(1))
        of_pca.append(np.square(x - pca.inverse_transform(pca.transform(x))).mean(1))
    return Baselines(
        Estimate.of_mean(np.concatenate(of_mean)), Estimate.of_mean(np.concatenate(of_pca))
    )
