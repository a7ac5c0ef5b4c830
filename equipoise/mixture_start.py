"""Partitions of codes, from which EM starts: by k-means and by Ward's trees.

A single run of k-means may put two centres into one cluster and one between two others, which EM
cannot mend. A tree of merged clusters has no such luck. It finds clusters that are apart whatever
their number, and gives all numbers of clusters at once.

Sources: Ward (1963), *Hierarchical grouping to optimize an objective function*; Fraley and Raftery
(1998), *How many clusters? Which clustering method?*, for the start of EM at a tree.
"""

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage

TREE_CODES = 1000
"""Most codes in a tree. Its time and memory grow with their square: 20 ms, and 4 MB."""

Labels = NDArray[np.int64]


def k_means(points: NDArray[np.float64], n_clusters: int, seed: int) -> Labels:
    """Divide points by one run of k-means, started by k-means++.

    Args:
        points: The points, (n, d).
        n_clusters: Number of clusters K.
        seed: Seed of the run.

    Returns:
        The number of each point's cluster, from 0, (n,). With fewer distinct points than clusters,
        some clusters are empty.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(n_clusters, n_init=1, max_iter=50, random_state=seed)
    with warnings.catch_warnings():
        # scikit-learn warns if there are fewer distinct points than clusters. EM revives the empty
        # clusters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(model.fit(points).labels_, np.int64)


class Trees:
    """Ward's trees of the same codes in several coordinates.

    Args:
        *codes: The codes in each of the coordinates, (n, d), n at most :data:`TREE_CODES`. A tree
            depends on the coordinates: clusters may be apart in the codes' own, and hidden among
            directions of noise once these are whitened, or the other way round.
        most: Most clusters that are asked for.
    """

    def __init__(self, *codes: NDArray[np.float64], most: int) -> None:
        n = len(codes[0])
        # The labels for each number of clusters from one on, (most, n), of each tree.
        self._labels = [np.zeros((1, n), np.int64)] * len(codes)
        if n > 1:
            self._labels = [_cut(linkage(points, "ward"), min(most, n)) for points in codes]

    def cut(self, n_clusters: int) -> list[Labels]:
        """Divide the codes into clusters.

        Args:
            n_clusters: Number of clusters K, from 1 to the most of them, and at most n.

        Returns:
            For each of the coordinates, the number of each code's cluster, from 0, (n,).
        """
        return [labels[n_clusters - 1] for labels in self._labels]


def _cut(tree: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Undo the last merges of a tree one by one: labels of 1, 2, ..., most clusters, (most, n)."""
    n = len(tree) + 1
    order = leaves_list(tree)  # in which the codes of each cluster are neighbours
    labels = np.zeros((most, n), np.int64)
    first = {2 * n - 2: 0}

    for K in range(1, most):
        merge = n - 1 - K
        left, right, _, size = tree[merge].astype(np.int64)
        size_of_left = int(tree[left - n, 3]) if left >= n else 1

        begin = first[n + merge]
        first[int(left)], first[int(right)] = begin, begin + size_of_left
        labels[K:, order[begin + size_of_left : begin + size]] = K
    return labels
