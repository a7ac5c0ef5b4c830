r"""Fitting the mixture of eq. (13) to codes: EM as matrix products, and variational Bayes.

The joint log-density of a code and a component is linear in the features of the code,

.. math:: \log \pi_k N(z; \mu_k, \Sigma_k) = \theta_k \cdot \phi(z), \quad
    \phi(z) = (1, z, z_i z_j)_{i \le j}

The E-step of all codes and components is therefore the product of :math:`\theta` and :math:`\phi`.
The sums that the M-step needs are the product of the responsibilities and :math:`\phi`. Both
products are computed chunk by chunk, so that memory does not grow with N. The
:class:`SufficientStatistics` of chunks, and of processes, add up.

The input may be posteriors q(z|x_n) = N(mu_n, diag s_n^2) instead of codes. Then :math:`\phi` is
replaced by its expectation :math:`(1, \mu_n, \mu_n \mu_n^T + \mathrm{diag}\,s_n^2)`, and no sample
is needed.

The fit runs in whitened coordinates, in which the codes have mean 0 and covariance I. There the
products lose no digits. If the codes are scaled, rotated or moved, the fit is scaled, rotated or
moved in the same way.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from equipoise.aggregate import GaussianMixture
from equipoise.estimate import Estimate
from equipoise.gaussian import LOG_2PI, Gaussian
from equipoise.mixture_start import TREE_CODES, Labels, Trees, k_means
from equipoise.processes import ALONE, Processes
from equipoise.residuals import AllReduce

# Smallest variance of a component in any direction, relative to that of all codes: the std is at
# least 1/1000. Without a floor the likelihood has no bound, because a component can shrink onto one
# code. The posterior noise keeps the codes of a trained VAE well above this floor.
FLOOR = 1e-6

# A component that explains less than this number of codes is empty.
EMPTY = 1e-3

# EM starts from partitions of this number of codes per component, and of at least START_CODES.
START_CODES_PER_COMPONENT = 50
START_CODES = 10_000

# Up to this number of components a missed cluster is worth a search: EM starts from the best of
# several partitions after SHORT_ITERATIONS on SHORT_CODES, and "auto" finds the number itself.
# Among more components, one more or less changes little.
FEW_COMPONENTS = 32
SHORT_ITERATIONS, SHORT_CODES = 3, 2000

# "auto" goes on while the gain is more than its standard error. A gain or a loss of more than this
# number of standard errors is no chance.
CLEAR_GAIN = 2.0

# A gain of less than this, in nats per code, is worth no component unless it is clear.
SMALL_GAIN = 0.05

# Before EM runs on all codes, it may run on a subsample. The subsample has this number of codes per
# component and latent unit, and at least SUBSAMPLE_CODES codes. It is used only if there are at
# least SUBSAMPLE_SHARE times this number of codes.
SUBSAMPLE_CODES_PER_COMPONENT_AND_UNIT = 100
SUBSAMPLE_CODES = 100_000
SUBSAMPLE_SHARE = 5

# "auto" holds out a tenth of the codes, but no more than this number. It gives the mean likelihood
# to 0.03 nats.
HELD_OUT_CODES = 20_000

# The largest K that "auto" tries. The paper uses 500 for CelebA; this is the next power of two.
MAX_COMPONENTS = 512


@runtime_checkable
class Codes(Protocol):
    """N codes of dimension d: a tensor, an array, or an object with a shape and slices of rows."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, d)."""

    def __getitem__(self, rows: slice, /) -> Any:  # noqa: ANN401 - or an array
        """Return a slice of rows."""


class SufficientStatistics(NamedTuple):
    """The sums over codes that one step of EM needs. Those of chunks and of processes add up.

    Args:
        log_likelihood: Sum over the codes of log q^(z), or of its bound, in whitened coordinates,
            ().
        n_codes: Number of codes, ().
        sums: Responsibilities times features, (K, 1 + d + d (d + 1) / 2).
    """

    log_likelihood: Tensor
    n_codes: Tensor
    sums: Tensor

    def plus(self, other: "SufficientStatistics") -> "SufficientStatistics":
        """Return the statistics of both sets of codes together.

        Args:
            other: Statistics of other codes under the same mixture.

        Returns:
            The sum of the two, field by field.
        """
        return SufficientStatistics(
            self.log_likelihood + other.log_likelihood,
            self.n_codes + other.n_codes,
            self.sums + other.sums,
        )


class EMStep(NamedTuple):
    """One iteration of EM, as it is passed to ``on_iteration``.

    Args:
        n_components: Number of components K of the mixture that is being fitted.
        iteration: Number of the iteration, from 1. It starts again at 1 after the fit to a
            subsample.
        log_likelihood: Mean over the codes under the mixture before the step, in nats per code.
        n_codes: Number of codes in this iteration, over all processes.
    """

    n_components: int
    iteration: int
    log_likelihood: float
    n_codes: int


class MixtureFit(NamedTuple):
    """A fitted mixture and the history of the fit.

    Args:
        mixture: The mixture of eq. (13), float64, on the device of the codes.
        log_likelihoods: Mean log-likelihood in nats per code, one value for each iteration of EM.
            It belongs to the mixture that the iteration started from. For a fit to posteriors it is
            the bound that :func:`fit_mixture` documents. For a variational fit it is a single
            value, that of the result.
        converged: Whether the last change was below the tolerance.
        n_iterations: Number of iterations.
        n_floored: Number of components whose covariance is limited by the floor in a direction in
            which the codes vary. If it is not zero, some codes coincide or there are too many
            components.
        held_out: For each K in the order of the search, the mean log-likelihood of the held-out
            codes in nats per code, with its standard error. It is empty if no codes were held out.
        n_flat: Number of directions in which the codes do not vary: units that are not used or that
            copy others, or as many as there are too few codes. All components have the variance of
            the floor there.
    """

    mixture: GaussianMixture
    log_likelihoods: tuple[float, ...]
    converged: bool
    n_iterations: int
    n_floored: int
    held_out: dict[int, Estimate]
    n_flat: int = 0


@torch.no_grad()
def fit_mixture(
    codes: Codes,
    n_components: int | Literal["auto"] = "auto",
    *,
    log_vars: Codes | None = None,
    held_out: Codes | None = None,
    start: GaussianMixture | None = None,
    floor: float = FLOOR,
    tol: float = 1e-3,
    max_iter: int = 200,
    dtype: torch.dtype = torch.float64,
    chunk_size: int | None = None,
    subsample: int | Literal["auto"] | None = "auto",
    device: torch.device | str | None = None,
    processes: Processes | None = None,
    generator: torch.Generator | None = None,
    on_iteration: Callable[[EMStep], None] | None = None,
) -> MixtureFit:
    r"""Fit eq. (13) by expectation-maximisation.

    .. math:: r_{nk} = \pi_k N(z_n; \mu_k, \Sigma_k) / \hat q(z_n), \qquad
        N_k = \sum_n r_{nk}, \qquad \pi_k = N_k / N, \qquad
        \mu_k = \tfrac1{N_k} \sum_n r_{nk} z_n, \qquad
        \Sigma_k = \tfrac1{N_k} \sum_n r_{nk} z_n z_n^T - \mu_k \mu_k^T

    The likelihood never decreases, with one exception: an empty component is replaced by half of
    the heaviest component.

    With ``log_vars``, ``codes`` are the means of posteriors, and the expectation over each q(z|x_n)
    is exact. Then

    .. math:: \sum_n \log \sum_k \exp E_{q(z|x_n)} \log \pi_k N(z; \mu_k, \Sigma_k)
        \le \sum_n E_{q(z|x_n)} \log \hat q(z)

    is the bound that never decreases and that is reported. It belongs to EM in which all samples of
    a posterior share their responsibilities. With K = 1 the two sides are equal, and the result has
    the moments of the aggregate posterior, eq. (12).

    Args:
        codes: Samples of q(z|x), one or more per example, (N, d), or the posterior means if
            ``log_vars`` is set. A tensor is used on its device. An array, memory-mapped or not, is
            converted chunk by chunk.
        n_components: Number of components K, or "auto". "auto" fits K = 1, then the
            number of clusters that a tree of the codes promises, a quarter more, and then twice as
            many at a time. Each is scored on held-out codes. The search looks past one K that gains
            no more than its standard error, unless it clearly loses, and stops at the second; above
            K = 64 it stops at the first. Up to K = 32 the numbers below the best are bisected. The
            result is the smallest K that is worse than the best by no more than the standard error
            of the difference, or by less than 0.05 nats and two standard errors, if the Bayesian
            information criterion over the other codes does not object, because held-out codes may
            be few. The search ends at K = 512, or when there are fewer than 2 (d + 1) codes per
            component.
        log_vars: Logarithms of the posterior variances, (N, d). None if ``codes`` are samples.
        held_out: Codes of other examples on which each K is scored, samples of q(z|x), (M, d). If
            None, "auto" sets a random tenth of the rows aside, at most 20,000, and samples from
            them if ``log_vars`` is set. Pass held-out codes if an example has several rows, so that
            no example is on both sides.
        start: Mixture that EM starts from. If None, EM starts from a partition of a random subset.
            The means are those of its clusters, and all components share the covariance within
            clusters. Up to K = 32, the partitions are Ward's trees of the codes and of the whitened
            codes, and k-means; the one of highest likelihood after three iterations is taken.
            Otherwise it is k-means.
        floor: Smallest variance of a component in any direction, relative to that of all codes in
            this direction. In a direction in which the codes have less than 1e-6 of their largest
            variance, it is relative to the largest. Smaller variances are raised to the floor, and
            the others do not change.
            It is at least a thousand rounding errors of ``dtype``.
        tol: EM stops when the mean log-likelihood changes by less than this, in nats per code.
        max_iter: Largest number of iterations, at least 1.
        dtype: Precision of the two matrix products. Sums over chunks and parameters are always
            float64.
        chunk_size: Number of codes per chunk. None means 2048 on the CPU, because of its caches,
            and 16384 on other devices.
        subsample: Number of random codes that EM runs on first, until it converges there, so that
            few passes over all codes remain. "auto" means the larger of 100,000 and 100 K d, if
            there are at least five times this number of codes and no ``start``. Otherwise, and with
            None, EM runs on all codes from the first iteration. The first phase stops at a tenth of
            ``tol``, or at ``max_iter``. The history is that of the second phase.
        device: Device of the computation. None means the device of the codes. Codes on another
            device are copied chunk by chunk.
        processes: The processes that share the work, each with at least one of the codes. All
            return the same mixture. Random subsets take a share from each process, and each has its
            own part of ``held_out``. ``start`` and the options must be the same in all processes.
            Seed the ``generator`` differently in each.
        generator: Source of randomness, on the device. None means the global generator.
        on_iteration: Function that is called after each iteration, for example to show progress.

    Returns:
        The mixture and the history of the fit.

    Raises:
        ValueError: If the codes do not have the shape (N, d) with N >= K, are not all finite, or
            are all the same. Also if an option is outside its domain or contradicts another option.

    Example:
        >>> codes = torch.tensor([[-1.0], [1.0], [3.0], [5.0]])
        >>> fit = fit_mixture(codes, n_components=1)
        >>> fit.mixture.means, fit.mixture.covariances
        (tensor([[2.]], dtype=torch.float64), tensor([[[5.0000]]], dtype=torch.float64))

        Codes on disk are read chunk by chunk, so that they need not fit in memory:

        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/codes.npy", np.float32([[-1], [1], [3], [5]]))
        ...     fit = fit_mixture(np.load(f"{folder}/codes.npy", mmap_mode="r"), n_components=1)
        >>> fit.mixture.means
        tensor([[2.]], dtype=torch.float64)
    """
    _check_options(n_components, start, floor, tol, max_iter, subsample)

    if subsample == "auto" and start is not None:
        subsample = None
    if processes is None:
        processes = ALONE

    rows = _Rows.of(codes, log_vars, chunk_size, device)
    test_codes = None
    if held_out is not None:
        test_codes = _Rows.of(held_out, None, chunk_size, rows.device).draw(generator)
    if start is not None and start.latent_dim != rows.dim:
        raise ValueError(f"expected a start of dimension {rows.dim}, got {start.latent_dim}")

    n_codes = sum(processes.counts(rows.count, rows.device))
    if n_components == "auto" and test_codes is None:
        n_test = min(n_codes // 10, HELD_OUT_CODES)
        if n_test < 2:
            raise ValueError(
                f'"auto" needs 20 codes to hold some out, got {n_codes}: choose n_components'
            )
        n_codes -= n_test
        rows, test_rows = _split(rows, n_codes, processes, generator)
        test_codes = test_rows.draw(generator)
    if n_components != "auto" and n_codes < n_components:
        raise _too_few(n_codes, n_components)

    if test_codes is not None:
        # Every process scores the codes of all processes, so that all choose the same K.
        test_codes = processes.gather(test_codes)
        _check_held_out(test_codes, rows.dim)

    whitening = _whiten(rows, processes)
    floor = max(floor, 1e3 * torch.finfo(dtype).eps)

    def step(rows: _Rows, components: _Components, reduce: AllReduce) -> _Step:
        statistics = _statistics(rows, whitening, components, dtype)
        statistics = SufficientStatistics(*map(reduce, statistics))
        components, n_floored = _clip(_maximise(statistics), floor, whitening.varying)
        mean = (statistics.log_likelihood / statistics.n_codes).item()
        return _Step(components, mean + whitening.log_det, int(statistics.n_codes), n_floored)

    def iterate(rows: _Rows, first: _Components, tol: float) -> MixtureFit:
        components, n_floored = _clip(first, floor, whitening.varying)
        log_likelihoods: list[float] = []
        converged = False

        while not converged and len(log_likelihoods) < max_iter:
            components, log_likelihood, n, n_floored = step(rows, components, processes.all_reduce)
            log_likelihoods.append(log_likelihood)

            if on_iteration is not None:
                K = len(components.weights)
                on_iteration(EMStep(K, len(log_likelihoods), log_likelihood, n))

            if len(log_likelihoods) > 1:
                converged = abs(log_likelihoods[-1] - log_likelihoods[-2]) < tol

        return MixtureFit(
            mixture=whitening.mixture(components),
            log_likelihoods=tuple(log_likelihoods),
            converged=converged,
            n_iterations=len(log_likelihoods),
            n_floored=n_floored,
            held_out={},
            n_flat=int((~whitening.varying).sum()),
        )

    starts = _Starts(rows, whitening, processes, generator)

    def first_of(K: int) -> _Components:
        """Return the start of highest likelihood after a few iterations."""
        candidates = [_clip(candidate, floor)[0] for candidate in starts.of(K)]
        if len(candidates) == 1:
            return candidates[0]

        few = starts.few()
        found: list[tuple[float, _Components]] = []
        for components in candidates:
            for _ in range(SHORT_ITERATIONS):
                components, log_likelihood, *_ = step(few, components, _alone)
            found.append((log_likelihood, components))

        # All processes have the same sample, but may round differently.
        best = max(found, key=lambda pair: pair[0])[1]
        return _Components(*map(processes.broadcast, best))

    def fit(K: int) -> MixtureFit:
        first = first_of(K) if start is None else whitening.components(start)

        n_first = _first_phase(subsample, n_codes, K, rows.dim)
        if n_first < n_codes:
            subset, _ = _split(rows, n_first, processes, generator)
            # Iterations are cheap here. A tenth of the tolerance gets over plateaus that would cost
            # passes later.
            first = whitening.components(iterate(subset.load(), first, tol / 10).mixture)

        return iterate(rows, first, tol)

    if n_components != "auto":
        found = fit(int(n_components))
        if test_codes is None:
            return found
        score = Estimate.of_mean(found.mixture.log_prob(test_codes))
        return found._replace(held_out={int(n_components): score})

    if test_codes is None:
        raise RuntimeError('"auto" holds codes out')
    largest = max(1, min(MAX_COMPONENTS, n_codes // (2 * (rows.dim + 1))))
    promising = starts.promising(min(largest, FEW_COMPONENTS), test_codes, floor)
    return _search(fit, n_codes, largest, promising, test_codes)


@torch.no_grad()
def fit_variational_mixture(
    codes: Codes,
    n_components: int,
    *,
    floor: float = FLOOR,
    tol: float = 1e-3,
    max_iter: int = 200,
    generator: torch.Generator | None = None,
) -> MixtureFit:
    """Fit eq. (13) by variational Bayes, with scikit-learn's ``BayesianGaussianMixture``.

    The weights have a Dirichlet process prior. Components that the codes do not need stay unused,
    so that ``n_components`` is an upper limit. All codes are held in memory, on the CPU. Wrong
    input raises the same errors as :func:`fit_mixture`.

    Args:
        codes: Samples of q(z|x), (N, d).
        n_components: Largest number of components, at least 1 and at most N.
        floor: Number that is added to the variance of each component in all directions, relative to
            the variance of all codes.
        tol: The fit stops when the variational bound changes by less than this.
        max_iter: Largest number of iterations, at least 1.
        generator: Source of randomness. None means the global generator.

    Returns:
        The mixture with the mean parameters of the posterior. ``log_likelihoods`` has a single
        value, that of the result.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import BayesianGaussianMixture

    _check_options(n_components, None, floor, tol, max_iter, None)
    rows = _Rows.of(codes, None, None, None)
    if rows.count < n_components:
        raise _too_few(rows.count, n_components)

    whitening = _whiten(rows, ALONE)
    z = rows.draw(None)
    model = BayesianGaussianMixture(
        n_components=n_components,
        reg_covar=floor,
        tol=tol,
        max_iter=max_iter,
        random_state=_seed(generator),
    )
    with warnings.catch_warnings():
        # No warning is needed, because the result has a field that says whether the fit converged.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(whitening.apply(z).cpu().numpy())

    def tensor(values: Any) -> Tensor:  # noqa: ANN401 - an untyped array
        return torch.as_tensor(values, dtype=z.dtype, device=z.device)

    weights = tensor(model.weights_)
    components = _Components(
        weights / weights.sum(), tensor(model.means_), tensor(model.covariances_)
    )
    mixture = whitening.mixture(components)

    return MixtureFit(
        mixture=mixture,
        log_likelihoods=(mixture.log_prob(z).mean().item(),),
        converged=bool(model.converged_),
        n_iterations=int(model.n_iter_),
        n_floored=0,
        held_out={},
        n_flat=int((~whitening.varying).sum()),
    )


def _search(
    fit: Callable[[int], MixtureFit],
    n_codes: int,
    largest: int,
    promising: int,
    test_codes: Tensor,
) -> MixtureFit:
    """Fit larger and larger K until held-out codes gain no more, then those in between.

    ``promising`` is the number of components at which the search begins, after one.
    """
    fits: dict[int, MixtureFit] = {}
    log_probs: dict[int, Tensor] = {}

    def attempt(K: int) -> None:
        if K not in fits:
            fits[K] = fit(K)
            log_probs[K] = fits[K].mixture.log_prob(test_codes)

    def bic(K: int) -> float:
        """Return the Bayesian information criterion of Schwarz (1978), lower is better."""
        d = test_codes.shape[1]
        n_parameters = K * (1 + d + d * (d + 1) / 2) - 1
        return n_parameters * math.log(n_codes) - 2 * n_codes * fits[K].log_likelihoods[-1]

    attempt(1)
    best, n_missed, size = 1, 0, max(2, promising)
    while size <= largest and n_missed < (2 if size <= 2 * FEW_COMPONENTS else 1):
        attempt(size)
        gain = _gain(log_probs[size] - log_probs[best])
        if gain > 1:
            best, n_missed = size, 0
        else:
            n_missed += 1 if gain > -CLEAR_GAIN else 2
        size = max(size + 1, size * 5 // 4) if size == promising < FEW_COMPONENTS else 2 * size

    while best <= FEW_COMPONENTS:
        top = max(fits, key=lambda K: float(log_probs[K].mean()))
        best = min(
            K for K in fits if _is_negligible(log_probs[top] - log_probs[K]) and bic(K) <= bic(top)
        )
        below = max((smaller for smaller in fits if smaller < best), default=best - 1)
        if best - below == 1:
            break
        attempt(best - 1 if best == promising else (below + best) // 2)

    scores = {K: Estimate.of_mean(log_prob) for K, log_prob in log_probs.items()}
    return fits[best]._replace(held_out=scores)


def _gain(differences: Tensor) -> float:
    """Return the mean of differences in units of its standard error."""
    mean, error, _ = Estimate.of_mean(differences)
    return mean / max(error or 0.0, 1e-300)


def _is_negligible(differences: Tensor) -> bool:
    """Tell whether a gain is within its error, or small and within twice its error."""
    mean, error, _ = Estimate.of_mean(differences)
    error = error or 0.0
    return mean <= max(error, min(CLEAR_GAIN * error, SMALL_GAIN))


def _alone(values: Tensor) -> Tensor:
    """Sum over one process."""
    return values


@dataclass(frozen=True)
class _Rows:
    """The codes (or posteriors) of this process, or those that a mask selects, read in chunks."""

    codes: Codes
    log_vars: Codes | None
    chunk_size: int
    device: torch.device
    count: int
    mask: Tensor | None = None  # (N,), on the CPU

    @classmethod
    def of(
        cls,
        codes: Codes,
        log_vars: Codes | None,
        chunk_size: int | None,
        device: torch.device | str | None,
    ) -> "_Rows":
        shape = tuple(codes.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"expected codes of shape (N, d), neither zero, got {shape}; "
                "flatten each to a vector"
            )
        if log_vars is not None and tuple(log_vars.shape) != shape:
            raise ValueError(
                f"expected log_vars of the codes' shape {shape}, got {tuple(log_vars.shape)}"
            )

        if device is None:
            device = codes.device if isinstance(codes, Tensor) else "cpu"
        device = torch.device(device)

        if chunk_size is None:
            chunk_size = 2048 if device.type == "cpu" else 16384
        if chunk_size < 1:
            raise ValueError(f"expected chunk_size >= 1, got {chunk_size}")

        return cls(codes, log_vars, min(chunk_size, shape[0]), device, shape[0])

    @property
    def dim(self) -> int:
        return self.codes.shape[1]

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield codes, and log-variances if there are any, (B, d) each, float64."""
        for first in range(0, self.codes.shape[0], self.chunk_size):
            part = slice(first, first + self.chunk_size)

            mask = None
            if self.mask is not None:
                mask = self.mask[part]
                if not mask.any():
                    continue

            log_vars = None
            codes = _to_float64(self.codes[part], mask, self.device)
            if self.log_vars is not None:
                log_vars = _to_float64(self.log_vars[part], mask, self.device)
            yield codes, log_vars

    def chunks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield codes, and variances if there are any, (B, d) each, float64."""
        for codes, log_vars in self.parts():
            yield codes, None if log_vars is None else log_vars.exp()

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """Return the codes in one tensor. For posteriors, it has one sample of each."""
        samples = [self._none()]
        for z, log_var in self.parts():
            if log_var is not None:
                z = Gaussian(z, log_var).sample(generator)
            samples.append(z)

        return torch.cat(samples)

    def load(self) -> "_Rows":
        """Return the same rows, held in memory."""
        codes = [self._none()]
        log_vars = []
        for z, log_var in self.parts():
            codes.append(z)
            if log_var is not None:
                log_vars.append(log_var)

        return replace(
            self,
            codes=torch.cat(codes),
            log_vars=torch.cat(log_vars) if log_vars else None,
            mask=None,
        )

    def split(self, n: int, generator: torch.Generator | None) -> tuple["_Rows", "_Rows"]:
        """Split into n random rows and the others."""
        n = min(n, self.count)
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(self.count, generator=generator, device=device)

        mask = torch.zeros(self.count, dtype=torch.bool)
        mask[order[:n].cpu()] = True
        rest = ~mask

        if self.mask is not None:
            # Both masks are over the rows in use. Extend them to all rows.
            none = torch.zeros_like(self.mask)
            mask = none.masked_scatter(self.mask, mask)
            rest = none.masked_scatter(self.mask, rest)

        return replace(self, mask=mask, count=n), replace(self, mask=rest, count=self.count - n)

    def _none(self) -> Tensor:
        return torch.empty(0, self.dim, dtype=torch.float64, device=self.device)


def _split(
    rows: _Rows, n: int, processes: Processes, generator: torch.Generator | None
) -> tuple[_Rows, _Rows]:
    """Split the rows of all processes into n random ones and the others."""
    counts = processes.counts(rows.count, rows.device)
    return rows.split(processes.share(n, counts), generator)


class _Components(NamedTuple):
    """Weights (K,), means (K, d) and covariances (K, d, d) in whitened coordinates, float64."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def coefficients(self) -> Tensor:
        """Return theta of the module's docstring, (K, 1 + d + d (d + 1) / 2)."""
        d = self.means.shape[1]
        scale_trils, info = torch.linalg.cholesky_ex(self.covariances)
        if info.any():
            raise ValueError("a covariance is singular to working precision: choose a larger floor")

        precisions = torch.cholesky_inverse(scale_trils)
        linear = (precisions @ self.means.unsqueeze(2)).squeeze(2)
        log_det = 2 * scale_trils.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = self.weights.log() - 0.5 * (d * LOG_2PI + log_det + (self.means * linear).sum(1))

        # The feature z_i z_j with i < j also counts for z_j z_i.
        i, j = torch.triu_indices(d, d, device=self.means.device)
        quadratic = precisions[:, i, j] * torch.where(i == j, -0.5, -1.0)

        return torch.cat([constant.unsqueeze(1), linear, quadratic], 1)


class _Step(NamedTuple):
    """What an iteration of EM gives, and the likelihood before it."""

    components: _Components
    log_likelihood: float
    n_codes: int
    n_floored: int


class _Whitening(NamedTuple):
    """The affine map z = centre + colour w, under which w has mean 0 and covariance I."""

    centre: Tensor
    colour: Tensor
    whiten: Tensor  # the inverse of colour
    log_det: float  # the log-determinant of whiten: log q(z) = log q(w) + log_det
    varying: Tensor  # (d,), False for the axes of w in which the codes have no variance

    def apply(self, z: Tensor) -> Tensor:
        return (z - self.centre) @ self.whiten.mT

    def components(self, mixture: GaussianMixture) -> _Components:
        covariances = self.whiten @ mixture.covariances.to(self.whiten) @ self.whiten.mT
        return _Components(
            mixture.weights.to(self.whiten),
            self.apply(mixture.means.to(self.whiten)),
            _symmetric(covariances),
        )

    def mixture(self, components: _Components) -> GaussianMixture:
        weights, means, covariances = components
        return GaussianMixture(
            weights,
            self.centre + means @ self.colour.mT,
            _symmetric(self.colour @ covariances @ self.colour.mT),
        )


def _whiten(rows: _Rows, processes: Processes) -> _Whitening:
    """Compute mean and covariance of all codes in two passes, and check the codes."""
    totals = torch.zeros(2 + rows.dim, dtype=torch.float64, device=rows.device)
    for z, var in rows.chunks():
        finite = z.isfinite().all(1)
        if var is not None:
            finite = finite & var.isfinite().all(1)
        totals += torch.cat([torch.stack([finite.sum(), (~finite).sum()]), z.sum(0)])

    totals = processes.all_reduce(totals)
    count, n_bad = totals[:2]
    if n_bad > 0:
        raise ValueError(
            f"{int(n_bad)} of {int(count + n_bad)} codes are not finite: "
            "the training that gave them diverged; encode with its last good checkpoint"
        )
    centre = totals[2:] / count

    scatter = torch.zeros(rows.dim, rows.dim, dtype=torch.float64, device=rows.device)
    for z, var in rows.chunks():
        centred = z - centre
        products = centred.mT @ centred
        if var is not None:
            products = products + var.sum(0).diag()
        scatter += products
    covariance = processes.all_reduce(scatter) / count

    # A std below 1e-12 of the mean is the rounding error of the mean.
    std = covariance.diagonal().sqrt()
    std = torch.where(std > 1e-12 * centre.abs(), std, 0.0)
    if not std.max() > 0:
        raise ValueError(
            "all codes are the same: the encoder ignores its input (posterior collapse)"
        )

    # A unit that is not used, a copy of another, or fewer codes than units: some directions have no
    # variance. They are measured in the scale of the largest, so that the floor there is relative
    # to it.
    std = torch.where(std > math.sqrt(FLOOR) * std.max(), std, std.max())
    values, vectors = torch.linalg.eigh(covariance / torch.outer(std, std))
    varying = values > FLOOR * values[-1]
    scale = torch.where(varying, values, values[-1]).sqrt()

    return _Whitening(
        centre=centre,
        colour=std.unsqueeze(1) * vectors * scale,
        whiten=(vectors / scale).mT / std,
        log_det=-(std.log().sum() + scale.log().sum()).item(),
        varying=varying,
    )


def _features(w: Tensor, quadratic: Tensor | None, phi: Tensor) -> None:
    """Write phi of whitened codes w (B, d) into ``phi``, transposed, (1 + d + d (d + 1) / 2, B).

    ``quadratic`` is the contribution of the variance of w to the expectation of w_i w_j.
    """
    w = w.mT.contiguous()
    d = len(w)
    phi[0] = 1
    phi[1 : d + 1] = w

    last = d + 1
    for i in range(d):
        first, last = last, last + d - i
        torch.mul(w[i], w[i:], out=phi[first:last])

    if quadratic is not None:
        phi[d + 1 :] += quadratic


def _statistics(
    rows: _Rows, whitening: _Whitening, components: _Components, dtype: torch.dtype
) -> SufficientStatistics:
    """E-step: the two products, chunk by chunk."""
    coefficients = components.coefficients().to(dtype)

    # The matrix that maps variances of z to covariances of w.
    i, j = torch.triu_indices(rows.dim, rows.dim, device=coefficients.device)
    spread = whitening.whiten[i] * whitening.whiten[j]

    zero = torch.zeros((), dtype=torch.float64, device=coefficients.device)
    total = SufficientStatistics(zero, zero, torch.zeros_like(coefficients, dtype=torch.float64))

    # One buffer holds the features of each chunk, and the steps below work in place. New memory
    # would cost as much time as the arithmetic.
    buffer = coefficients.new_empty(coefficients.shape[1], rows.chunk_size)

    for z, var in rows.chunks():
        quadratic = None if var is None else (spread @ var.mT).to(dtype)
        phi = buffer[:, : len(z)]
        _features(whitening.apply(z).to(dtype), quadratic, phi)

        log_joint = coefficients @ phi  # (K, B)
        highest = log_joint.amax(0)
        responsibilities = log_joint.sub_(highest).exp_()
        normaliser = responsibilities.sum(0)
        responsibilities.div_(normaliser)

        log_likelihood = (highest + normaliser.log()).double().sum()
        sums = (responsibilities @ phi.mT).double()
        total = total.plus(SufficientStatistics(log_likelihood, zero + len(z), sums))

    return total


def _maximise(statistics: SufficientStatistics) -> _Components:
    """M-step. An empty component becomes half of the heaviest one."""
    sums = statistics.sums
    d = (math.isqrt(8 * sums.shape[1] + 1) - 3) // 2  # from 1 + d + d (d + 1) / 2 features
    counts = sums[:, 0]
    empty = (counts < EMPTY).nonzero().flatten().tolist()

    weights = counts / counts.sum()
    averages = sums[:, 1:] / counts.clamp(min=EMPTY).unsqueeze(1)
    means = averages[:, :d].clone()

    covariances = means.new_empty(len(means), d, d)
    i, j = torch.triu_indices(d, d, device=means.device)
    covariances[:, i, j] = averages[:, d:]
    covariances[:, j, i] = averages[:, d:]
    covariances -= means.unsqueeze(2) * means.unsqueeze(1)

    for k in empty:
        heaviest = int(weights.argmax())
        variances, directions = torch.linalg.eigh(covariances[heaviest])
        step = 0.5 * variances[-1].clamp(min=0).sqrt() * directions[:, -1]

        means[k], means[heaviest] = means[heaviest] + step, means[heaviest] - step
        covariances[k] = covariances[heaviest]
        weights[k] = weights[heaviest] = weights[heaviest] / 2

    return _Components(weights / weights.sum(), means, covariances)


def _clip(
    components: _Components, floor: float, varying: Tensor | None = None
) -> tuple[_Components, int]:
    """Raise eigenvalues below the floor to it, which gives the best covariance allowed.

    Also count the components that are limited in the axes where codes vary.
    """
    low = _is_low(components.covariances, floor)
    n_floored = int(low.sum())

    if n_floored:
        covariances = components.covariances.clone()
        if varying is not None and not varying.all():
            n_floored = int(_is_low(covariances[:, varying][:, :, varying], floor).sum())
        values, vectors = torch.linalg.eigh(covariances[low])
        covariances[low] = _symmetric((vectors * values.clamp(min=floor).unsqueeze(1)) @ vectors.mT)
        components = components._replace(covariances=covariances)

    return components, n_floored


def _is_low(covariances: Tensor, floor: float) -> Tensor:
    """Tell which covariances have an eigenvalue below the floor."""
    identity = torch.eye(covariances.shape[1], dtype=covariances.dtype, device=covariances.device)

    # If this Cholesky factor exists, no eigenvalue is below the floor. It costs far less than the
    # eigenvalues.
    is_low: Tensor = torch.linalg.cholesky_ex(covariances - floor * identity).info > 0
    return is_low


class _Starts:
    """What EM may start from: partitions of random codes, the same in all processes."""

    def __init__(
        self,
        rows: _Rows,
        whitening: _Whitening,
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
        subset, _ = _split(self.rows, n, self.processes, self.generator)
        return self.processes.gather(subset.draw(self.generator))

    def sample(self) -> Tensor:
        """The codes that are divided where there are few components."""
        # No functools.cached_property: in Python 3.11 its lock is one for all threads, and those
        # of several processes wait for each other in here.
        if self._sample is None:
            self._sample = self._draw(START_CODES)
        return self._sample

    def few(self) -> _Rows:
        """Fewer of them, which tell the better start."""
        return _Rows.of(_some(self.sample(), SHORT_CODES), None, None, None)

    def tree_codes(self) -> Tensor:
        """Return those that are in the trees, whitened."""
        return self.whitening.apply(_some(self.sample(), TREE_CODES))

    def trees(self) -> Trees:
        """Ward's trees of the codes, in their own coordinates and whitened."""
        if self._trees is None:
            z, w = _some(self.sample(), TREE_CODES), self.tree_codes()
            self._trees = Trees(z.cpu().numpy(), w.cpu().numpy(), most=FEW_COMPONENTS)
        return self._trees

    def of(self, K: int) -> list[_Components]:
        """Return the starts of K components."""
        if K > FEW_COMPONENTS:
            w = self.whitening.apply(self._draw(max(START_CODES, START_CODES_PER_COMPONENT * K)))
        else:
            w = self.whitening.apply(self.sample())

        divided = [_shared(w, k_means(w.cpu().numpy(), K, _seed(self.generator)), K)]
        if 1 < K <= FEW_COMPONENTS and len(w) >= K:
            w = self.tree_codes()
            divided += [_shared(w, labels, K) for labels in self.trees().cut(K)]
        # Every process has divided them, because it would have to wait anyway. All use what rank 0
        # found.
        return [_Components(*map(self.processes.broadcast, parts)) for parts in divided]

    def promising(self, largest: int, test_codes: Tensor, floor: float) -> int:
        """Find the number of clusters of a tree at which held-out codes are most likely."""
        w, judges = self.tree_codes(), self.whitening.apply(_some(test_codes, TREE_CODES))
        log_probs: dict[int, Tensor] = {}
        for K in range(1, min(largest, len(w)) + 1):
            divided = [_shared(w, labels, K) for labels in self.trees().cut(K)]
            candidates = [_log_prob_of_shared(judges, way, floor) for way in divided]
            log_probs[K] = max(candidates, key=lambda values: float(values.mean()))

        top = max(log_probs, key=lambda K: float(log_probs[K].mean()))
        found = min(K for K in log_probs if _gain(log_probs[top] - log_probs[K]) <= CLEAR_GAIN)
        return int(self.processes.broadcast(torch.tensor(found, device=w.device)))


def _some(codes: Tensor, n: int) -> Tensor:
    """Take n codes, which are random but always the same; all if there are fewer."""
    if len(codes) <= n:
        return codes
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    return codes[order[:n].to(codes.device)]


def _log_prob_of_shared(w: Tensor, components: _Components, floor: float) -> Tensor:
    """Return the log-density of whitened codes under components of one covariance."""
    weights, means, covariances = components
    values, vectors = torch.linalg.eigh(covariances[0])
    scale = values.clamp(min=floor).sqrt()
    distances = torch.cdist(w @ vectors / scale, means @ vectors / scale)
    log_joint = weights.log() - 0.5 * distances.square()
    log_volume: Tensor = scale.log().sum() + 0.5 * w.shape[1] * LOG_2PI
    return log_joint.logsumexp(1) - log_volume


def _shared(w: Tensor, labels: Labels, K: int) -> _Components:
    """Make components of whitened codes that are divided, with one covariance for all."""
    label = torch.as_tensor(labels, device=w.device)
    counts = label.bincount(minlength=K)
    sums = w.new_zeros(K, w.shape[1]).index_add_(0, label, w)
    means = sums / counts.clamp(min=1).unsqueeze(1)

    within = w - means[label]
    covariance = within.mT @ within / len(w)
    return _Components(counts.to(w) / len(w), means, covariance.expand(K, -1, -1))


def _first_phase(subsample: int | str | None, n_codes: int, K: int, d: int) -> int:
    """Return the number of codes on which EM runs first, all if a first phase does not pay."""
    if subsample is None:
        return n_codes

    if subsample == "auto":
        subsample = max(SUBSAMPLE_CODES, SUBSAMPLE_CODES_PER_COMPONENT_AND_UNIT * K * d)
        return subsample if n_codes >= SUBSAMPLE_SHARE * subsample else n_codes

    return int(subsample)


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**31 - 1, (), generator=generator, device=device))


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2


def _to_float64(
    values: Any,  # noqa: ANN401 - a tensor or an array
    mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Return the rows, or those that a mask selects, on the device."""
    if isinstance(values, Tensor):
        rows = values.detach()
        if mask is not None:
            rows = rows[mask]
        return rows.to(device, torch.float64)

    array = np.asarray(values)
    if mask is not None:
        array = array[mask.numpy()]

    # np.array makes a copy. Without it torch warns of arrays that are read-only, such as
    # memory-mapped ones.
    rows = torch.from_numpy(np.array(array, np.float64))
    if device.type == "cuda":
        # Pinned memory lets the copy to the device and the work there go on while the next chunk is
        # read.
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)


def _check_options(
    n_components: int | str,
    start: GaussianMixture | None,
    floor: float,
    tol: float,
    max_iter: int,
    subsample: int | str | None,
) -> None:
    problems = []

    if isinstance(n_components, str) and n_components != "auto":
        problems.append(f'n_components is a number or "auto", got "{n_components}"')
    if isinstance(n_components, int) and n_components < 1:
        problems.append(f"n_components is at least 1, got {n_components}")
    if start is not None and n_components != start.n_components:
        problems.append(
            f"start has {start.n_components} components, but n_components is {n_components}"
        )

    if not 0 <= floor < 1:
        problems.append(f"floor is a fraction of the variance, from 0 to below 1, got {floor}")
    if not tol >= 0:
        problems.append(f"tol is not negative, got {tol}")
    if max_iter < 1:
        problems.append(f"max_iter is at least 1, got {max_iter}")

    if isinstance(subsample, str) and subsample != "auto":
        problems.append(f'subsample is a number, "auto" or None, got "{subsample}"')
    if isinstance(subsample, int) and subsample < 1:
        problems.append(f"subsample is at least 1, got {subsample}")

    if problems:
        raise ValueError("; ".join(problems))


def _check_held_out(test_codes: Tensor, d: int) -> None:
    if test_codes.shape[1] != d or len(test_codes) < 2:
        raise ValueError(f"expected held_out codes (M, {d}), M > 1, got {tuple(test_codes.shape)}")
    if not test_codes.isfinite().all():
        raise ValueError("held_out codes are not all finite: encode with the last good checkpoint")


def _too_few(n_codes: int, n_components: int) -> ValueError:
    return ValueError(
        f"expected at least one code per component, got {n_codes} codes for {n_components}: "
        "encode more examples or ask for fewer components"
    )
