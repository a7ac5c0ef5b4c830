"""Partitions of codes, from which EM starts: by k-means and by Ward's trees.

A single run of k-means may put two centres into one cluster and one between two others, which EM
cannot mend. A tree of merged clusters has no such luck. It finds clusters that are apart whatever
their number, and gives all numbers of clusters at once.

Sources: Ward (1963), *Hierarchical grouping to optimize an objective function*; Fraley and Raftery
(1998), *How many clusters? Which clustering method?*, for the start of EM at a tree.
"""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor

from equipoise.estimate import Estimate
from equipoise.gaussian import LOG_2PI
from equipoise.mixture_rows import Rows, split_rows
from equipoise.mixture_steps import Components, Whitening
from equipoise.processes import Processes

TREE_CODES = 1000
"""Most codes in a tree. Its time and memory grow with their square: 20 ms, and 4 MB."""

START_CODES_PER_COMPONENT, START_CODES = 50, 10_000
"""EM starts from partitions of this number of codes per component, and of at least the second."""

FEW_COMPONENTS, SHORT_CODES = 32, 2000
"""Up to the first number of components a missed cluster is worth a search: EM starts from the best
of several partitions after a few iterations on the second number of codes, and "auto" finds the
number itself. Among more components, one more or less changes little."""

CLEAR_GAIN = 2.0
"""A gain or a loss of more than this number of standard errors is no chance."""

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


class Starts:
    """What EM may start from: partitions of random codes, the same in all processes.

    Args:
        rows: The codes of this process.
        whitening: The map to whitened coordinates.
        processes: The processes.
        generator: Source of randomness.
    """

    def __init__(
        self,
        rows: Rows,
        whitening: Whitening,
        processes: Processes,
        generator: torch.Generator | None,
    ) -> None:
        self.rows = rows
        self.whitening = whitening
        self.processes = processes
        self.generator = generator
        self._sample: Tensor | None = None
        self._trees: Trees | None = None

    def _draw(self, n: int) -> Tensor:
        """Draw n codes of all processes."""
        subset, _ = split_rows(self.rows, n, self.processes, self.generator)
        return self.processes.gather(subset.draw(self.generator))

    def sample(self) -> Tensor:
        """Draw the codes that are divided where there are few components.

        Returns:
            Codes of all processes, the same at each call.
        """
        # No functools.cached_property: in Python 3.11 its lock is one for all threads, and those
        # of several processes wait for each other in here.
        if self._sample is None:
            self._sample = self._draw(START_CODES)
        return self._sample

    def few(self) -> Rows:
        """Take fewer of them, which tell the better start.

        Returns:
            The rows, held in memory.
        """
        return Rows.of(some_of(self.sample(), SHORT_CODES), None, None, None)

    def tree_codes(self) -> Tensor:
        """Take those that are in the trees.

        Returns:
            The codes, whitened.
        """
        return self.whitening.apply(some_of(self.sample(), TREE_CODES))

    def trees(self) -> Trees:
        """Build Ward's trees of the codes, in their own coordinates and whitened.

        Returns:
            The trees, the same at each call.
        """
        if self._trees is None:
            z, w = some_of(self.sample(), TREE_CODES), self.tree_codes()
            self._trees = Trees(z.cpu().numpy(), w.cpu().numpy(), most=FEW_COMPONENTS)
        return self._trees

    def of(self, K: int) -> list[Components]:
        """Divide codes into K parts, in each way that there is.

        Args:
            K: Number of components.

        Returns:
            The starts, in whitened coordinates.
        """
        if K > FEW_COMPONENTS:
            w = self.whitening.apply(self._draw(max(START_CODES, START_CODES_PER_COMPONENT * K)))
        else:
            w = self.whitening.apply(self.sample())

        divided = [_shared(w, k_means(w.cpu().numpy(), K, draw_seed(self.generator)), K)]
        if 1 < K <= FEW_COMPONENTS and len(w) >= K:
            w = self.tree_codes()
            divided += [_shared(w, labels, K) for labels in self.trees().cut(K)]
        # Every process has divided them, because it would have to wait anyway. All use what rank 0
        # found.
        return [Components(*map(self.processes.broadcast, parts)) for parts in divided]

    def promising(self, largest: int, test_codes: Tensor, floor: float) -> int:
        """Find the number of clusters of a tree at which held-out codes are most likely.

        Args:
            largest: Largest number of clusters.
            test_codes: The held-out codes, (M, d).
            floor: Smallest variance in any direction, in whitened coordinates.

        Returns:
            The smallest number that is not clearly worse than the best.
        """
        w, judges = self.tree_codes(), self.whitening.apply(some_of(test_codes, TREE_CODES))
        log_probs: dict[int, Tensor] = {}
        for K in range(1, min(largest, len(w)) + 1):
            divided = [_shared(w, labels, K) for labels in self.trees().cut(K)]
            candidates = [_log_prob_of_shared(judges, way, floor) for way in divided]
            log_probs[K] = max(candidates, key=lambda values: float(values.mean()))

        top = max(log_probs, key=lambda K: float(log_probs[K].mean()))
        found = min(
            K for K in log_probs if gain_in_errors(log_probs[top] - log_probs[K]) <= CLEAR_GAIN
        )
        return int(self.processes.broadcast(torch.tensor(found, device=w.device)))


def some_of(codes: Tensor, n: int) -> Tensor:
    """Take codes, which are random but always the same.

    Args:
        codes: The codes, (N, d).
        n: Number to take; all are taken if there are fewer.

    Returns:
        The codes that are taken, in random order.
    """
    if len(codes) <= n:
        return codes
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    return codes[order[:n].to(codes.device)]


def _log_prob_of_shared(w: Tensor, components: Components, floor: float) -> Tensor:
    """Return the log-density of whitened codes under components of one covariance."""
    weights, means, covariances = components
    values, vectors = torch.linalg.eigh(covariances[0])
    scale = values.clamp(min=floor).sqrt()
    distances = torch.cdist(w @ vectors / scale, means @ vectors / scale)
    log_joint = weights.log() - 0.5 * distances.square()
    log_volume: Tensor = scale.log().sum() + 0.5 * w.shape[1] * LOG_2PI
    return log_joint.logsumexp(1) - log_volume


def _shared(w: Tensor, labels: Labels, K: int) -> Components:
    """Make components of whitened codes that are divided, with one covariance for all."""
    label = torch.as_tensor(labels, device=w.device)
    counts = label.bincount(minlength=K)
    sums = w.new_zeros(K, w.shape[1]).index_add_(0, label, w)
    means = sums / counts.clamp(min=1).unsqueeze(1)

    within = w - means[label]
    covariance = within.mT @ within / len(w)
    return Components(counts.to(w) / len(w), means, covariance.expand(K, -1, -1))


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw a seed for a library that has generators of its own.

    Args:
        generator: Source of randomness. None means the global generator.

    Returns:
        The seed.
    """
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**31 - 1, (), generator=generator, device=device))


def gain_in_errors(differences: Tensor) -> float:
    """Compute the mean of differences in units of its standard error.

    Args:
        differences: The differences, (N,).

    Returns:
        The ratio.
    """
    mean, error, _ = Estimate.of_mean(differences)
    return mean / max(error or 0.0, 1e-300)
