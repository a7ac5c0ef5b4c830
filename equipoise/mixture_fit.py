r"""Fitting the mixture of eq. (13) to codes: EM as two matrix products a step, and variational Bayes.

The joint log-density of a code and a component is linear in the features of the code,

.. math:: \log \pi_k N(z; \mu_k, \Sigma_k) = \theta_k \cdot \phi(z), \quad \phi(z) = (1, z, z_i z_j)_{i \le j}

so that the E-step of all codes and components is the product of :math:`\theta` and :math:`\phi`, and the sums
that the M-step needs are the product of the responsibilities and :math:`\phi`. Both run over chunks of codes,
hence memory does not grow with N; the :class:`SufficientStatistics` of chunks, or of processes, add up.

Where posteriors q(z|x_n) = N(mu_n, diag s_n^2) are given instead of codes, :math:`\phi` is replaced by its
expectation :math:`(1, \mu_n, \mu_n \mu_n^T + \mathrm{diag}\,s_n^2)`, and nothing has to be drawn.

All of it happens in whitened coordinates, where the codes have mean 0 and covariance I: there the products
lose no digits, and codes that are scaled, rotated or moved have the same fit scaled, rotated or moved.
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
from equipoise.processes import ALONE, Processes

# Smallest variance of a component in any direction, relative to that of all codes: a std of 1/1000 of theirs.
# Without it the likelihood has no bound (a component shrinks onto one code). Posterior noise keeps the codes
# of a trained VAE well above it.
FLOOR = 1e-6
# A component that explains less than this many codes is empty.
EMPTY = 1e-3
# k-means, which starts EM, runs on this many codes per component, and on no fewer than this many in all.
START_CODES_PER_COMPONENT, START_CODES = 50, 10_000
# Before all codes, EM runs on this many per component and unit, and on no fewer than this many in all, if all
# are at least so many times more.
SUBSAMPLE_CODES_PER_COMPONENT_AND_UNIT, SUBSAMPLE_CODES, SUBSAMPLE_SHARE = 100, 100_000, 5
# "auto" holds out a tenth of the codes, at most this many: their mean likelihood is known to about 0.03 nats.
HELD_OUT_CODES = 20_000
# The largest K that "auto" tries: the paper's 500 for CelebA, as a power of two.
MAX_COMPONENTS = 512


@runtime_checkable
class Codes(Protocol):
    """N codes of dimension d: a tensor, an array, or whatever has a shape and gives its rows in slices."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, d)."""

    def __getitem__(self, rows: slice, /) -> Any:  # noqa: ANN401 - a tensor, or what NumPy can convert
        """Return a slice of rows."""


class SufficientStatistics(NamedTuple):
    """What codes contribute to one step of EM: sums, which add up over chunks and over processes.

    Args:
        log_likelihood: sum over the codes of log q^(z), or of its bound, in whitened coordinates, ().
        n_codes: number of codes, ().
        sums: responsibilities times features, (K, 1 + d + d (d + 1) / 2).
    """

    log_likelihood: Tensor
    n_codes: Tensor
    sums: Tensor

    def plus(self, other: "SufficientStatistics") -> "SufficientStatistics":
        """Return the statistics of the codes of both.

        Args:
            other: statistics of other codes under the same mixture.

        Returns:
            The sum of the two, field by field.
        """
        return SufficientStatistics(
            *(mine + theirs for mine, theirs in zip(self, other, strict=True))
        )


class EMStep(NamedTuple):
    """One iteration of EM, as told to ``on_iteration``.

    Args:
        n_components: K of the mixture that is being fitted.
        iteration: from 1, and from 1 again when a fit to a subsample is over.
        log_likelihood: mean over the codes, of the mixture before the step, nats per code.
        n_codes: number of codes that the iteration saw, over all processes.
    """

    n_components: int
    iteration: int
    log_likelihood: float
    n_codes: int


class MixtureFit(NamedTuple):
    """A fitted mixture and how the fit went.

    Args:
        mixture: eq. (13), float64, on the device of the codes.
        log_likelihoods: mean log-likelihood in nats per code, one for each iteration of EM, of the mixture
            that the iteration started from. In a fit to posteriors it is the bound that :func:`fit_mixture`
            documents; in a variational fit it is one value, that of the result.
        converged: whether the last change was below the tolerance.
        n_iterations: number of iterations run.
        n_floored: number of components that the floor holds up. More than none says that codes coincide, or
            that there are too many components.
        held_out: for each K tried, in that order, the mean log-likelihood of held-out codes in nats per code,
            with its standard error; empty if none were held out.
    """

    mixture: GaussianMixture
    log_likelihoods: tuple[float, ...]
    converged: bool
    n_iterations: int
    n_floored: int
    held_out: dict[int, Estimate]


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

    The likelihood never decreases, unless an empty component is revived, as half of the heaviest one.

    Given ``log_vars``, ``codes`` are means of posteriors, and the expectation over each q(z|x_n) is exact.
    Then

    .. math:: \sum_n \log \sum_k \exp E_{q(z|x_n)} \log \pi_k N(z; \mu_k, \Sigma_k)
        \le \sum_n E_{q(z|x_n)} \log \hat q(z)

    is what never decreases and what is reported: EM in which all draws of a posterior share their
    responsibilities. With K = 1 it is an equality, and the result has the moments of the aggregate posterior,
    eq. (12).

    Args:
        codes: samples of q(z|x), one or more per example, (N, d); with ``log_vars``, the posterior means. A
            tensor is used on its device; an array, memory-mapped or not, is converted chunk by chunk.
        n_components: K, or "auto": 1, 2, 4, ... are fitted and scored on held-out codes until the mean gain
            over the last is no more than its standard error, and the last that gained is returned. The search
            ends at 512, or where fewer than 2 (d + 1) codes per component are left.
        log_vars: logarithms of the posterior variances, (N, d); None if ``codes`` are samples.
        held_out: codes of other examples, (M, d), samples of q(z|x), to score each K on. With "auto", None
            sets a random tenth of the rows aside for it (at most 20,000; sampled if ``log_vars`` are given):
            give them where an example has several rows.
        start: mixture to start from. None starts from k-means (itself started by k-means++) on a random
            subset: its centres, and the covariance within clusters, shared by all.
        floor: smallest variance of a component in any direction, relative to that of all codes in it; lower
            ones are clipped, others left as they are. Raised to a thousand rounding errors of ``dtype`` if
            less.
        tol: stop when the mean log-likelihood changes by less, nats per code.
        max_iter: most iterations, at least 1.
        dtype: precision of the two matrix products; sums over chunks and parameters are float64 in any case.
        chunk_size: codes per chunk; None is 2048 on the CPU, for its caches, and 16384 elsewhere.
        subsample: number of random codes on which EM runs first, until it converges there, so that few passes
            over all codes are left. "auto" is the larger of 100,000 and 100 K d, for at least five times as
            many codes and without a ``start``; else, and with None, EM runs on all codes from the first
            iteration. The first phase stops at a tenth of ``tol``, or at ``max_iter``; the history is that of the
            second.
        device: where to compute; None is where the codes are. Codes that are elsewhere go there by the chunk.
        processes: those that share the work, if each holds a part of the codes (at least one); all get the same
            mixture. Random subsets take a share from each, and ``held_out`` is a part too. ``start`` and the
            options must be the same in all; seed the ``generator`` differently.
        generator: source of randomness, on the device; the global one if None.
        on_iteration: called after each iteration, for instance to show progress.

    Returns:
        The mixture and the history of the fit.

    Raises:
        ValueError: if the codes are not (N, d) with N >= K, are not all finite or all the same, or if an
            option is outside its domain or contradicts another.

    Example:
        >>> codes = torch.tensor([[-1.0], [1.0], [3.0], [5.0]])
        >>> fit = fit_mixture(codes, n_components=1)
        >>> fit.mixture.means, fit.mixture.covariances
        (tensor([[2.]], dtype=torch.float64), tensor([[[5.0000]]], dtype=torch.float64))

        Codes on disk are read as they are needed, however many there are:

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
    processes = processes or ALONE
    rows = _Rows.of(codes, log_vars, chunk_size, device)
    test_codes = (
        None
        if held_out is None
        else _Rows.of(held_out, None, chunk_size, rows.device).draw(generator)
    )
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
        test_codes = processes.gather(test_codes)  # all score all of them, hence all decide alike
        _check_held_out(test_codes, rows.dim)

    whitening = _whiten(rows, processes)
    floor = max(floor, 1e3 * torch.finfo(dtype).eps)

    def iterate(rows: _Rows, first: _Components, tol: float) -> MixtureFit:
        components, n_floored = _clip(first, floor)
        log_likelihoods: list[float] = []
        converged = False
        while not converged and len(log_likelihoods) < max_iter:
            statistics = _statistics(rows, whitening, components, dtype)
            statistics = SufficientStatistics(*map(processes.all_reduce, statistics))
            log_likelihoods.append(
                (statistics.log_likelihood / statistics.n_codes).item() + whitening.log_det
            )
            components, n_floored = _clip(_maximise(statistics), floor)
            if on_iteration is not None:
                K, n = len(components.weights), int(statistics.n_codes)
                on_iteration(EMStep(K, len(log_likelihoods), log_likelihoods[-1], n))
            converged = (
                len(log_likelihoods) > 1 and abs(log_likelihoods[-1] - log_likelihoods[-2]) < tol
            )
        mixture = whitening.mixture(components)
        return MixtureFit(
            mixture, tuple(log_likelihoods), converged, len(log_likelihoods), n_floored, {}
        )

    def fit(K: int) -> MixtureFit:
        first = (
            _k_means(rows, whitening, K, processes, generator)
            if start is None
            else whitening.components(start)
        )
        n_first = _first_phase(subsample, n_codes, K, rows.dim)
        if n_first < n_codes:
            subset, _ = _split(rows, n_first, processes, generator)
            # A tenth of the tolerance, as iterations cost little here and a plateau would cost passes later.
            first = whitening.components(iterate(subset.load(), first, tol / 10).mixture)
        return iterate(rows, first, tol)

    if test_codes is None:
        return fit(int(n_components))
    if n_components != "auto":
        return _search(fit, [n_components], test_codes)
    largest = max(1, min(MAX_COMPONENTS, n_codes // (2 * (rows.dim + 1))))
    return _search(fit, [2**i for i in range(largest.bit_length())], test_codes)


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

    A Dirichlet process prior on the weights leaves components unused that the codes do not call for, so that
    ``n_components`` is an upper limit. All codes are held in memory, on the CPU. Wrong input raises as in
    :func:`fit_mixture`.

    Args:
        codes: samples of q(z|x), (N, d).
        n_components: most components, at least 1 and at most N.
        floor: added to the variance of each component in all directions, relative to that of all codes.
        tol: stop when the variational bound changes by less.
        max_iter: most iterations, at least 1.
        generator: source of randomness; the global one if None.

    Returns:
        The mixture of the posterior's mean parameters. ``log_likelihoods`` holds one value, that of the
        result.
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
    with warnings.catch_warnings():  # the result says whether it converged
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(whitening.apply(z).cpu().numpy())
    weights, means, covariances = (
        torch.as_tensor(values, dtype=z.dtype, device=z.device)
        for values in (model.weights_, model.means_, model.covariances_)
    )
    mixture = whitening.mixture(_Components(weights / weights.sum(), means, covariances))
    log_likelihood = mixture.log_prob(z).mean().item()
    return MixtureFit(mixture, (log_likelihood,), bool(model.converged_), int(model.n_iter_), 0, {})


def _search(
    fit: Callable[[int], MixtureFit], candidates: Sequence[int], test_codes: Tensor
) -> MixtureFit:
    """Fit growing K until the held-out codes gain no more than the standard error of the gain."""
    best = fit(candidates[0])
    best_log_prob = best.mixture.log_prob(test_codes)
    scores = {candidates[0]: Estimate.of_mean(best_log_prob)}
    for K in candidates[1:]:
        candidate = fit(K)
        log_prob = candidate.mixture.log_prob(test_codes)
        scores[K] = Estimate.of_mean(log_prob)
        gain = Estimate.of_mean(log_prob - best_log_prob)
        if gain.value <= (gain.standard_error or 0.0):
            break
        best, best_log_prob = candidate, log_prob
    return best._replace(held_out=scores)


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
                f"expected codes of shape (N, d), neither zero, got {shape}; flatten each to a vector"
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
            chosen = slice(first, first + self.chunk_size)
            mask = None if self.mask is None else self.mask[chosen]
            if mask is None or mask.any():
                codes = _to_float64(self.codes[chosen], mask, self.device)
                log_vars = (
                    None
                    if self.log_vars is None
                    else _to_float64(self.log_vars[chosen], mask, self.device)
                )
                yield codes, log_vars

    def chunks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield codes, and variances if there are any, (B, d) each, float64."""
        for codes, log_vars in self.parts():
            yield codes, None if log_vars is None else log_vars.exp()

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """Return the codes in one tensor; of posteriors, one sample of each."""
        drawn = [
            z if log_var is None else Gaussian(z, log_var).sample(generator)
            for z, log_var in self.parts()
        ]
        return torch.cat([self._none(), *drawn])

    def load(self) -> "_Rows":
        """Return the same rows, held in memory."""
        parts = list(self.parts())
        codes = torch.cat([self._none(), *(z for z, _ in parts)])
        log_vars = [log_var for _, log_var in parts if log_var is not None]
        return replace(
            self, codes=codes, log_vars=torch.cat(log_vars) if log_vars else None, mask=None
        )

    def split(self, n: int, generator: torch.Generator | None) -> tuple["_Rows", "_Rows"]:
        """Split into n random rows and the others."""
        n = min(n, self.count)
        device = "cpu" if generator is None else generator.device
        picked = torch.zeros(self.count, dtype=torch.bool)
        picked[torch.randperm(self.count, generator=generator, device=device)[:n].cpu()] = True
        rest = ~picked
        if self.mask is not None:
            none = torch.zeros_like(self.mask)
            picked, rest = (none.masked_scatter(self.mask, chosen) for chosen in (picked, rest))
        return replace(self, mask=picked, count=n), replace(self, mask=rest, count=self.count - n)

    def _none(self) -> Tensor:
        return torch.empty(0, self.dim, dtype=torch.float64, device=self.device)


def _split(
    rows: _Rows, n: int, processes: Processes, generator: torch.Generator | None
) -> tuple[_Rows, _Rows]:
    """Split the rows of all processes into n random ones and the others."""
    return rows.split(processes.share(n, processes.counts(rows.count, rows.device)), generator)


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
        i, j = torch.triu_indices(d, d, device=self.means.device)
        quadratic = precisions[:, i, j] * torch.where(
            i == j, -0.5, -1.0
        )  # z_i z_j stands for z_j z_i too
        return torch.cat([constant.unsqueeze(1), linear, quadratic], 1)


class _Whitening(NamedTuple):
    """The affine map z = centre + colour w, under which w has mean 0 and covariance I."""

    centre: Tensor
    colour: Tensor
    whiten: Tensor  # the inverse of colour
    log_det: float  # of whiten: log q(z) = log q(w) + log_det

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
    """Find the mean and covariance of all codes in two passes, and check that the codes can be fitted."""
    totals = torch.zeros(2 + rows.dim, dtype=torch.float64, device=rows.device)
    for z, var in rows.chunks():
        finite = z.isfinite().all(1) if var is None else (z.isfinite() & var.isfinite()).all(1)
        totals += torch.cat([torch.stack([finite.sum(), (~finite).sum()]), z.sum(0)])
    count, n_bad, *_ = totals = processes.all_reduce(totals)
    if n_bad > 0:
        raise ValueError(
            f"{int(n_bad)} of {int(count + n_bad)} codes are not finite: the training that gave them "
            "diverged; encode with its last good checkpoint"
        )
    centre = totals[2:] / count
    scatter = torch.zeros(rows.dim, rows.dim, dtype=torch.float64, device=rows.device)
    for z, var in rows.chunks():
        centred = z - centre
        scatter += centred.mT @ centred if var is None else centred.mT @ centred + var.sum(0).diag()
    covariance = processes.all_reduce(scatter) / count
    std = covariance.diagonal().sqrt()
    std = torch.where(
        std > 1e-12 * centre.abs(), std, 0.0
    )  # below it is the rounding error of the mean
    if not std.max() > 0:
        raise ValueError(
            "all codes are the same: the encoder ignores its input (posterior collapse)"
        )
    # Directions without variance (a unit that is not used, or a copy of another) get a scale all the same.
    std = torch.where(std > 0, std, std.max())
    values, vectors = torch.linalg.eigh(covariance / torch.outer(std, std))
    scale = values.clamp(min=FLOOR).sqrt()
    log_det = -(std.log().sum() + scale.log().sum()).item()
    return _Whitening(
        centre, std.unsqueeze(1) * vectors * scale, (vectors / scale).mT / std, log_det
    )


def _features(w: Tensor, quadratic: Tensor | None, phi: Tensor) -> None:
    """Write phi of whitened codes w (B, d) into ``phi``, transposed, (1 + d + d (d + 1) / 2, B).

    ``quadratic`` holds what the variance of w adds to the expectation of w_i w_j.
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
    i, j = torch.triu_indices(rows.dim, rows.dim, device=coefficients.device)
    spread = whitening.whiten[i] * whitening.whiten[j]  # variances of z to covariances of w
    zero = torch.zeros((), dtype=torch.float64, device=coefficients.device)
    total = SufficientStatistics(zero, zero, torch.zeros_like(coefficients, dtype=torch.float64))
    # One buffer for the features, and steps in place: memory new to the process costs as much as arithmetic.
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
        total = total.plus(
            SufficientStatistics(
                log_likelihood, zero + len(z), (responsibilities @ phi.mT).double()
            )
        )
    return total


def _maximise(statistics: SufficientStatistics) -> _Components:
    """M-step; an empty component becomes half of the heaviest one."""
    sums = statistics.sums
    d = (math.isqrt(8 * sums.shape[1] + 1) - 3) // 2  # from 1 + d + d (d + 1) / 2 features
    counts = sums[:, 0]
    empty = (counts < EMPTY).nonzero().flatten().tolist()
    averages = sums[:, 1:] / counts.clamp(min=EMPTY).unsqueeze(1)
    means = averages[:, :d].clone()
    covariances = means.new_empty(len(means), d, d)
    i, j = torch.triu_indices(d, d, device=means.device)
    covariances[:, i, j] = covariances[:, j, i] = averages[:, d:]
    covariances -= means.unsqueeze(2) * means.unsqueeze(1)
    weights = counts / counts.sum()
    for k in empty:
        heaviest = int(weights.argmax())
        variances, directions = torch.linalg.eigh(covariances[heaviest])
        step = 0.5 * variances[-1].clamp(min=0).sqrt() * directions[:, -1]
        means[k], means[heaviest] = means[heaviest] + step, means[heaviest] - step
        covariances[k] = covariances[heaviest]
        weights[k] = weights[heaviest] = weights[heaviest] / 2
    return _Components(weights / weights.sum(), means, covariances)


def _clip(components: _Components, floor: float) -> tuple[_Components, int]:
    """Raise the eigenvalues below the floor to it, which is the best covariance among those allowed."""
    covariances = components.covariances
    identity = torch.eye(covariances.shape[1], dtype=covariances.dtype, device=covariances.device)
    # Where this Cholesky factor exists no eigenvalue is below the floor; it costs far less than they do.
    low = torch.linalg.cholesky_ex(covariances - floor * identity).info > 0
    if low.any():
        values, vectors = torch.linalg.eigh(covariances[low])
        covariances = covariances.clone()
        covariances[low] = _symmetric((vectors * values.clamp(min=floor).unsqueeze(1)) @ vectors.mT)
    return components._replace(covariances=covariances), int(low.sum())


def _k_means(
    rows: _Rows,
    whitening: _Whitening,
    K: int,
    processes: Processes,
    generator: torch.Generator | None,
) -> _Components:
    """Start: the clusters of a random subset, and the covariance within them, shared by all."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    subset, _ = _split(rows, max(START_CODES, START_CODES_PER_COMPONENT * K), processes, generator)
    w = processes.gather(whitening.apply(subset.draw(generator)))
    model = KMeans(K, n_init=1, max_iter=50, random_state=_seed(generator))
    with warnings.catch_warnings():  # fewer distinct codes than clusters: EM revives the empty ones
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(w.cpu().numpy())
    labels = torch.as_tensor(model.labels_, dtype=torch.long, device=w.device)
    means = torch.as_tensor(model.cluster_centers_, device=w.device)
    within = w - means[labels]
    covariance = within.mT @ within / len(w)
    components = _Components(
        labels.bincount(minlength=K).to(w) / len(w), means, covariance.expand(K, -1, -1)
    )
    # All have found clusters, in the time that they would have waited; those of rank 0 count.
    return _Components(*map(processes.broadcast, components))


def _first_phase(subsample: int | str | None, n_codes: int, K: int, d: int) -> int:
    """Return the number of codes on which EM runs first, all of them if that is not worth while."""
    if subsample == "auto":
        subsample = max(SUBSAMPLE_CODES, SUBSAMPLE_CODES_PER_COMPONENT_AND_UNIT * K * d)
        return subsample if n_codes >= SUBSAMPLE_SHARE * subsample else n_codes
    return n_codes if subsample is None else int(subsample)


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**31 - 1, (), generator=generator, device=device))


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2


def _to_float64(values: Any, mask: Tensor | None, device: torch.device) -> Tensor:  # noqa: ANN401 - or an array
    """Return rows, or those that a mask selects, on the device."""
    if isinstance(values, Tensor):
        rows = values.detach() if mask is None else values.detach()[mask]
        return rows.to(device, torch.float64)
    array = np.asarray(values)
    # np.array copies, as torch warns of arrays that are read-only, such as memory-mapped ones.
    rows = torch.from_numpy(np.array(array if mask is None else array[mask.numpy()], np.float64))
    if device.type == "cuda":  # the next chunk is read while this one travels and is used
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
