r"""One step of expectation-maximisation as two matrix products, in whitened coordinates.

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

In whitened coordinates the codes have mean 0 and covariance I, and the products lose no digits. If
the codes are scaled, rotated or moved, the fit is scaled, rotated or moved in the same way.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.aggregate import GaussianMixture
from equipoise.gaussian import LOG_2PI
from equipoise.mixture_rows import Rows
from equipoise.processes import Processes

FLOOR = 1e-6
"""Smallest variance of a component in any direction, relative to that of all codes: the std is at
least 1/1000. Without a floor the likelihood has no bound, because a component can shrink onto one
code. The posterior noise keeps the codes of a trained VAE well above this floor."""

EMPTY = 1e-3
"""A component that explains less than this number of codes is empty."""


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


class Components(NamedTuple):
    """A mixture in whitened coordinates, float64.

    Args:
        weights: Weights, (K,).
        means: Means, (K, d).
        covariances: Covariances, (K, d, d).
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def coefficients(self) -> Tensor:
        """Compute theta of the module's docstring.

        Returns:
            The coefficients of the features, (K, 1 + d + d (d + 1) / 2).

        Raises:
            ValueError: If a covariance is singular.
        """
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


class Step(NamedTuple):
    """What an iteration of EM gives.

    Args:
        components: The components after it.
        log_likelihood: Mean over the codes before it, nats per code.
        n_codes: Number of codes, over all processes.
        n_floored: Number of components that are limited by the floor.
    """

    components: Components
    log_likelihood: float
    n_codes: int
    n_floored: int


class Whitening(NamedTuple):
    """The affine map z = centre + colour w, under which w has mean 0 and covariance I.

    Args:
        centre: Mean of the codes, (d,).
        colour: The matrix, (d, d).
        whiten: Its inverse, (d, d).
        log_det: Log-determinant of ``whiten``: log q(z) = log q(w) + log_det.
        varying: False for the axes of w in which the codes have no variance, (d,).
    """

    centre: Tensor
    colour: Tensor
    whiten: Tensor
    log_det: float
    varying: Tensor

    def apply(self, z: Tensor) -> Tensor:
        """Whiten codes.

        Args:
            z: Codes, (N, d).

        Returns:
            Whitened codes, (N, d).
        """
        return (z - self.centre) @ self.whiten.mT

    def components(self, mixture: GaussianMixture) -> Components:
        """Whiten a mixture.

        Args:
            mixture: The mixture.

        Returns:
            Its components in whitened coordinates.
        """
        covariances = self.whiten @ mixture.covariances.to(self.whiten) @ self.whiten.mT
        return Components(
            mixture.weights.to(self.whiten),
            self.apply(mixture.means.to(self.whiten)),
            _symmetric(covariances),
        )

    def mixture(self, components: Components) -> GaussianMixture:
        """Undo :meth:`components`.

        Args:
            components: Components in whitened coordinates.

        Returns:
            The mixture.
        """
        weights, means, covariances = components
        return GaussianMixture(
            weights,
            self.centre + means @ self.colour.mT,
            _symmetric(self.colour @ covariances @ self.colour.mT),
        )


def whiten(rows: Rows, processes: Processes) -> Whitening:
    """Compute mean and covariance of all codes in two passes, and check the codes.

    Args:
        rows: The codes of this process.
        processes: The processes.

    Returns:
        The map to whitened coordinates.

    Raises:
        ValueError: If codes are not finite, or all are the same.
    """
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

    return Whitening(
        centre=centre,
        colour=std.unsqueeze(1) * vectors * scale,
        whiten=(vectors / scale).mT / std,
        log_det=-(std.log().sum() + scale.log().sum()).item(),
        varying=varying,
    )


def write_features(w: Tensor, quadratic: Tensor | None, phi: Tensor) -> None:
    """Compute the features of whitened codes, in memory that is there.

    Args:
        w: Whitened codes, (B, d).
        quadratic: Contribution of the variance of w to the expectation of w_i w_j.
        phi: Where the features are written, transposed, (1 + d + d (d + 1) / 2, B).
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


def expectation(
    rows: Rows, whitening: Whitening, components: Components, dtype: torch.dtype
) -> SufficientStatistics:
    """Take the E-step: the two products, chunk by chunk.

    Args:
        rows: The codes of this process.
        whitening: The map to whitened coordinates.
        components: The components so far.
        dtype: Precision of the products.

    Returns:
        The sums over the codes of this process.
    """
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
        write_features(whitening.apply(z).to(dtype), quadratic, phi)

        log_joint = coefficients @ phi  # (K, B)
        highest = log_joint.amax(0)
        responsibilities = log_joint.sub_(highest).exp_()
        normaliser = responsibilities.sum(0)
        responsibilities.div_(normaliser)

        log_likelihood = (highest + normaliser.log()).double().sum()
        sums = (responsibilities @ phi.mT).double()
        total = total.plus(SufficientStatistics(log_likelihood, zero + len(z), sums))

    return total


def maximisation(statistics: SufficientStatistics) -> Components:
    """Take the M-step. An empty component becomes half of the heaviest one.

    Args:
        statistics: The sums over all codes.

    Returns:
        The components of highest likelihood.
    """
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

    return Components(weights / weights.sum(), means, covariances)


def raise_to_floor(
    components: Components, floor: float, varying: Tensor | None = None
) -> tuple[Components, int]:
    """Raise eigenvalues below the floor to it, which gives the best covariance allowed.

    Args:
        components: The components.
        floor: Smallest variance in any direction, in whitened coordinates.
        varying: False for axes in which the codes have no variance. None if they have in all.

    Returns:
        The components, and the number of those that are limited in an axis where codes vary.
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


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2
