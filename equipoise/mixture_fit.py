"""Fitting the mixture of eq. (13) to codes: by EM, with the number of components, or variational.

:mod:`equipoise.mixture_steps` is a step of EM, :mod:`equipoise.mixture_start` where it starts.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from equipoise.aggregate import GaussianMixture
from equipoise.estimate import Estimate
from equipoise.mixture_rows import Codes, Rows, split_rows
from equipoise.mixture_start import CLEAR_GAIN, FEW_COMPONENTS, Starts, draw_seed, gain_in_errors
from equipoise.mixture_steps import (
    FLOOR,
    Components,
    Step,
    SufficientStatistics,
    expectation,
    maximisation,
    raise_to_floor,
    whiten,
)
from equipoise.processes import ALONE, Processes
from equipoise.residuals import AllReduce

# Iterations from each of several starts, after which the best goes on.
SHORT_ITERATIONS = 3

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

    rows = Rows.of(codes, log_vars, chunk_size, device)
    test_codes = None
    if held_out is not None:
        test_codes = Rows.of(held_out, None, chunk_size, rows.device).draw(generator)
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
        rows, test_rows = split_rows(rows, n_codes, processes, generator)
        test_codes = test_rows.draw(generator)
    if n_components != "auto" and n_codes < n_components:
        raise _too_few(n_codes, n_components)

    if test_codes is not None:
        # Every process scores the codes of all processes, so that all choose the same K.
        test_codes = processes.gather(test_codes)
        _check_held_out(test_codes, rows.dim)

    whitening = whiten(rows, processes)
    floor = max(floor, 1e3 * torch.finfo(dtype).eps)

    def step(rows: Rows, components: Components, reduce: AllReduce) -> Step:
        statistics = expectation(rows, whitening, components, dtype)
        statistics = SufficientStatistics(*map(reduce, statistics))
        components, n_floored = raise_to_floor(maximisation(statistics), floor, whitening.varying)
        mean = (statistics.log_likelihood / statistics.n_codes).item()
        return Step(components, mean + whitening.log_det, int(statistics.n_codes), n_floored)

    def iterate(rows: Rows, first: Components, tol: float) -> MixtureFit:
        components, n_floored = raise_to_floor(first, floor, whitening.varying)
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

    starts = Starts(rows, whitening, processes, generator)

    def first_of(K: int) -> Components:
        """Return the start of highest likelihood after a few iterations."""
        candidates = [raise_to_floor(candidate, floor)[0] for candidate in starts.of(K)]
        if len(candidates) == 1:
            return candidates[0]

        few = starts.few()
        found: list[tuple[float, Components]] = []
        for components in candidates:
            for _ in range(SHORT_ITERATIONS):
                components, log_likelihood, *_ = step(few, components, _alone)
            found.append((log_likelihood, components))

        # All processes have the same sample, but may round differently.
        best = max(found, key=lambda pair: pair[0])[1]
        return Components(*map(processes.broadcast, best))

    def fit(K: int) -> MixtureFit:
        first = first_of(K) if start is None else whitening.components(start)

        n_first = _first_phase(subsample, n_codes, K, rows.dim)
        if n_first < n_codes:
            subset, _ = split_rows(rows, n_first, processes, generator)
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
    rows = Rows.of(codes, None, None, None)
    if rows.count < n_components:
        raise _too_few(rows.count, n_components)

    whitening = whiten(rows, ALONE)
    z = rows.draw(None)
    model = BayesianGaussianMixture(
        n_components=n_components,
        reg_covar=floor,
        tol=tol,
        max_iter=max_iter,
        random_state=draw_seed(generator),
    )
    with warnings.catch_warnings():
        # No warning is needed, because the result has a field that says whether the fit converged.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(whitening.apply(z).cpu().numpy())

    def tensor(values: Any) -> Tensor:  # noqa: ANN401 - scikit-learn has no types
        return torch.as_tensor(values, dtype=z.dtype, device=z.device)

    weights = tensor(model.weights_)
    components = Components(
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
        gain = gain_in_errors(log_probs[size] - log_probs[best])
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


def _is_negligible(differences: Tensor) -> bool:
    """Tell whether a gain is within its error, or small and within twice its error."""
    mean, error, _ = Estimate.of_mean(differences)
    error = error or 0.0
    return mean <= max(error, min(CLEAR_GAIN * error, SMALL_GAIN))


def _alone(values: Tensor) -> Tensor:
    """Sum over one process."""
    return values


def _first_phase(subsample: int | str | None, n_codes: int, K: int, d: int) -> int:
    """Return the number of codes on which EM runs first, all if a first phase does not pay."""
    if subsample is None:
        return n_codes

    if subsample == "auto":
        subsample = max(SUBSAMPLE_CODES, SUBSAMPLE_CODES_PER_COMPONENT_AND_UNIT * K * d)
        return subsample if n_codes >= SUBSAMPLE_SHARE * subsample else n_codes

    return int(subsample)


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
