r"""Measures of the latent space.

They tell which latent units carry information, and which density describes the codes best.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from equipoise.aggregate import (
    ACTIVE_UNIT_VAR,
    AggregatePosterior,
    GaussianMixture,
    single_gaussian,
)
from equipoise.estimate import Estimate
from equipoise.gaussian import Gaussian, standard_normal_log_prob

PLANE_POSTERIORS = 5000
"""Largest number of posteriors in the aggregate posterior of a figure."""

PLANE_STDS = 4.0
"""Distance from each mean to the edge of a figure, in standard deviations of the component."""


class LatentUnit(NamedTuple):
    """Information that one latent unit carries about the data.

    Args:
        mean_var: variance over the data of the posterior mean, squared latent units. The prior has
            variance one.
        rate: mean over the data of KL(q(z_u|x), N(0, 1)), nats. The rates of all units add up to
            the KL of the ELBO.
    """

    mean_var: Estimate
    rate: Estimate

    @property
    def is_active(self) -> bool:
        """Whether the posterior mean varies over the data more than that of a dead unit."""
        return self.mean_var.value > ACTIVE_UNIT_VAR


def latent_units(posterior: Gaussian) -> tuple[LatentUnit, ...]:
    r"""Activity and rate of each latent unit.

    .. math:: A_u = \mathrm{Var}_x(\mathrm{E}_{q(z|x)}[z_u]), \qquad
        R_u = \mathrm{E}_x\,\mathrm{KL}(q(z_u|x), N(0, 1))

    A unit is active if A_u > 0.01. The threshold is that of Burda, Grosse and Salakhutdinov (2016),
    *Importance weighted autoencoders*.

    Args:
        posterior: q(z|x) of each example, (N, d), of at least two examples.

    Returns:
        One :class:`LatentUnit` per unit, in the order of the units.

    Raises:
        ValueError: if there is only one example.

    Example:
        >>> dead_and_alive = Gaussian(torch.tensor([[0.0, -1.0], [0.0, 1.0]]), torch.zeros(2, 2))
        >>> [(unit.is_active, unit.rate.value) for unit in latent_units(dead_and_alive)]
        [(False, 0.0), (True, 0.5)]
    """
    mean = posterior.mean.double()
    if len(mean) < 2:
        raise ValueError(
            f"the variance of a posterior over the data needs at least 2 examples, got {len(mean)}"
        )

    log_var = posterior.log_var.double()
    per_unit = Gaussian(mean.reshape(-1, 1), log_var.reshape(-1, 1))
    rates = per_unit.kl().reshape(mean.shape)
    squared_deviations = (mean - mean.mean(0)).square()

    return tuple(
        LatentUnit(Estimate.of_mean(deviations), Estimate.of_mean(rate))
        for deviations, rate in zip(squared_deviations.mT, rates.mT, strict=True)
    )


class CodeLogLikelihood(NamedTuple):
    """Log-likelihood of held-out codes under three densities, nats per code.

    Args:
        prior: log-likelihood under N(0, I).
        gaussian: log-likelihood under one Gaussian of full covariance.
        mixture: log-likelihood under the mixture.
        gain: mixture minus Gaussian on the same codes. Its standard error is smaller than that of
            either.
    """

    prior: Estimate
    gaussian: Estimate
    mixture: Estimate
    gain: Estimate


@torch.no_grad()
def code_log_likelihood(
    codes: Float[Tensor, "n latent"], mixture: GaussianMixture
) -> CodeLogLikelihood:
    r"""Compare the prior, one Gaussian and the mixture, eq. (13), on held-out codes.

    Each is judged by its mean log-likelihood:

    .. math:: \mathrm{E}_{x}\,\mathrm{E}_{q(z|x)} \log p(z)

    Args:
        codes: one sample of q(z|x) per held-out example, (N, d).
        mixture: mixture that was fitted to the codes of other examples, on the device of the codes.

    Returns:
        Averages over the codes.
    """
    gaussian_log_prob = single_gaussian(mixture).log_prob(codes)
    mixture_log_prob = mixture.log_prob(codes)

    return CodeLogLikelihood(
        prior=Estimate.of_mean(standard_normal_log_prob(codes)),
        gaussian=Estimate.of_mean(gaussian_log_prob),
        mixture=Estimate.of_mean(mixture_log_prob),
        gain=Estimate.of_mean(mixture_log_prob - gaussian_log_prob),
    )


class LatentPlane(NamedTuple):
    """Densities over a plane in the latent space, for a figure as in the paper's Table 1.

    Args:
        axes: orthonormal axes of the plane, (2, d). A code z lies at ``axes @ z``.
        x: grid along the first axis, (G,).
        y: grid along the second axis, (G,).
        aggregate_log_prob: marginal log-density of the aggregate posterior, eq. (12), at (x[j],
            y[i]), nats, (G, G).
        mixture_log_prob: marginal log-density of the mixture, eq. (13), of the same shape.
        prior_log_prob: marginal log-density of N(0, I), of the same shape.
        codes: one sample of each posterior of the aggregate, projected to the plane, (M, 2).
    """

    axes: Float[np.ndarray, "2 latent"]
    x: Float[np.ndarray, " grid"]
    y: Float[np.ndarray, " grid"]
    aggregate_log_prob: Float[np.ndarray, "grid grid"]
    mixture_log_prob: Float[np.ndarray, "grid grid"]
    prior_log_prob: Float[np.ndarray, "grid grid"]
    codes: Float[np.ndarray, "examples 2"]


@torch.no_grad()
def latent_plane(
    posterior: Gaussian,
    mixture: GaussianMixture,
    generator: torch.Generator | None = None,
    n_points: int = 128,
) -> LatentPlane:
    r"""Exact marginal densities of aggregate posterior, mixture and prior on a plane.

    .. math:: z \sim N(\mu, \Sigma) \;\Rightarrow\; A z \sim N(A \mu, A \Sigma A^T)

    The rows of A are the two leading principal axes of the aggregate posterior. If there are only
    two latent units, they are the units themselves. The prior is N(0, I) on every such plane.

    Args:
        posterior: q(z|x) of each example, (N, d), with d at least 2. If there are more than 5000,
            then 5000 of them are drawn at random.
        mixture: mixture on the same device.
        generator: source of randomness for that draw and for the codes.
        n_points: number of grid points along each axis, at least 2.

    Returns:
        Densities on a grid that reaches 4 standard deviations beyond the components of all three
        densities.

    Raises:
        ValueError: if there is only one latent unit, or fewer than 2 grid points.
    """
    latent_dim = posterior.mean.shape[1]
    if latent_dim < 2 or n_points < 2:
        raise ValueError(
            "a plane needs at least 2 latent units and 2 grid points, "
            f"got {latent_dim} and {n_points}; show codes of one unit as a histogram"
        )

    device = posterior.mean.device
    rows = torch.randperm(len(posterior.mean), generator=generator, device=device)
    rows = rows[:PLANE_POSTERIORS]
    chosen = Gaussian(posterior.mean[rows].double(), posterior.log_var[rows].double())

    identity = torch.eye(2, dtype=torch.float64, device=device)
    axes = _principal_axes(chosen) if latent_dim > 2 else identity

    aggregate = _aggregate_on_plane(chosen, axes)
    projected_mixture = GaussianMixture(
        mixture.weights.double(),
        mixture.means.double() @ axes.mT,
        axes @ mixture.covariances.double() @ axes.mT,
    )
    prior = GaussianMixture(
        torch.ones(1, dtype=torch.float64, device=device),
        torch.zeros_like(identity[:1]),
        identity[None],
    )

    x, y = _grid([aggregate, projected_mixture, prior], n_points)
    points = torch.cartesian_prod(y, x).flip(1)

    def on_grid(density: GaussianMixture) -> NDArray[np.float64]:
        return density.log_prob(points).reshape(n_points, n_points).cpu().numpy()

    return LatentPlane(
        axes=axes.cpu().numpy(),
        x=x.cpu().numpy(),
        y=y.cpu().numpy(),
        aggregate_log_prob=on_grid(aggregate),
        mixture_log_prob=on_grid(projected_mixture),
        prior_log_prob=on_grid(prior),
        codes=(chosen.sample(generator) @ axes.mT).cpu().numpy(),
    )


def _aggregate_on_plane(posterior: Gaussian, axes: Tensor) -> GaussianMixture:
    """Marginal density of the aggregate posterior: one component per posterior, equal weights."""
    n = len(posterior.mean)
    weights = torch.full((n,), 1 / n, dtype=torch.float64, device=axes.device)
    covariances = (axes * posterior.var[:, None]) @ axes.mT

    return GaussianMixture(weights, posterior.mean @ axes.mT, covariances)


def _grid(densities: list[GaussianMixture], n_points: int) -> tuple[Tensor, Tensor]:
    """Grid points along both axes, (n_points,) each, that cover the components of all densities."""
    means = torch.cat([density.means for density in densities])
    variances = [density.covariances.diagonal(dim1=1, dim2=2) for density in densities]
    reach = PLANE_STDS * torch.cat(variances).sqrt()

    low = (means - reach).amin(0).tolist()
    high = (means + reach).amax(0).tolist()
    x, y = (
        torch.linspace(start, end, n_points, dtype=torch.float64, device=means.device)
        for start, end in zip(low, high, strict=True)
    )

    return x, y


def _principal_axes(posterior: Gaussian) -> Tensor:
    """Two leading principal axes of the aggregate posterior, (2, d).

    The largest entry of each axis is positive.
    """
    covariance = AggregatePosterior(posterior.mean, posterior.log_var).moments().covariance
    axes: Tensor = torch.linalg.eigh(covariance).eigenvectors[:, [-1, -2]].mT
    largest_entry = axes.gather(1, axes.abs().argmax(1, keepdim=True))

    return axes * largest_entry.sign()
