r"""What the codes are like: which latent units carry information, and which density describes where codes lie."""

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
"""Posteriors of which the aggregate posterior of a figure is made, at most."""

PLANE_STDS = 4.0
"""How far beyond the means of all components a figure reaches, in their standard deviations."""


class LatentUnit(NamedTuple):
    """What one latent unit tells of the data.

    Args:
        mean_var: variance over the data of the posterior mean, squared latent units (the prior has variance one).
        rate: mean over the data of KL(q(z_u|x), N(0, 1)), nats; the rates of all units add up to the KL of the ELBO.
    """

    mean_var: Estimate
    rate: Estimate

    @property
    def is_active(self) -> bool:
        """Whether the posterior mean varies over the data by more than a dead unit's does."""
        return self.mean_var.value > ACTIVE_UNIT_VAR


def latent_units(posterior: Gaussian) -> tuple[LatentUnit, ...]:
    r"""Activity and rate of each latent unit.

    .. math:: A_u = \mathrm{Var}_x(\mathrm{E}_{q(z|x)}[z_u]), \qquad R_u = \mathrm{E}_x\,\mathrm{KL}(q(z_u|x), N(0, 1))

    A unit is active if A_u > 0.01. Burda, Grosse and Salakhutdinov (2016), *Importance weighted autoencoders*.

    Args:
        posterior: q(z|x) of each example, (N, d), at least two.

    Returns:
        One record per unit, in the order of the units.

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
            f"how a posterior varies over the data needs at least 2 examples, got {len(mean)}"
        )
    rates = (
        Gaussian(mean.reshape(-1, 1), posterior.log_var.double().reshape(-1, 1))
        .kl()
        .reshape(mean.shape)
    )
    squared_deviations = (mean - mean.mean(0)).square()
    return tuple(
        LatentUnit(Estimate.of_mean(deviations), Estimate.of_mean(rate))
        for deviations, rate in zip(squared_deviations.mT, rates.mT, strict=True)
    )


class CodeLogLikelihood(NamedTuple):
    """How well densities describe codes that none of them was fitted to, nats per code.

    Args:
        prior: under N(0, I).
        gaussian: under one full Gaussian.
        mixture: under the mixture.
        gain: mixture minus Gaussian on the same codes, whose error is smaller than that of either.
    """

    prior: Estimate
    gaussian: Estimate
    mixture: Estimate
    gain: Estimate


@torch.no_grad()
def code_log_likelihood(
    codes: Float[Tensor, "n latent"], mixture: GaussianMixture
) -> CodeLogLikelihood:
    r"""Compare the prior, one Gaussian and the mixture of eq. (13) by the log-likelihood of held-out codes.

    .. math:: \mathrm{E}_{x}\,\mathrm{E}_{q(z|x)} \log p(z)

    Args:
        codes: one sample of q(z|x) per held-out example, (N, d).
        mixture: fitted to the codes of other examples, on the device of the codes.

    Returns:
        Averages over the codes.
    """
    gaussian, mixed = single_gaussian(mixture).log_prob(codes), mixture.log_prob(codes)
    return CodeLogLikelihood(
        prior=Estimate.of_mean(standard_normal_log_prob(codes)),
        gaussian=Estimate.of_mean(gaussian),
        mixture=Estimate.of_mean(mixed),
        gain=Estimate.of_mean(mixed - gaussian),
    )


class LatentPlane(NamedTuple):
    """Densities over a plane in the space of codes, for a figure as in the paper's Table 1.

    Args:
        axes: orthonormal, (2, d); a code z lies at ``axes @ z``.
        x: grid along the first axis, (G,).
        y: grid along the second axis, (G,).
        aggregate_log_prob: marginal log-density of eq. (12) at (x[j], y[i]), nats, (G, G).
        mixture_log_prob: that of eq. (13).
        prior_log_prob: that of N(0, I).
        codes: a sample of each posterior that the aggregate is made of, on the plane, (M, 2).
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
    r"""Exact marginal densities of aggregate posterior, mixture and prior on a plane of the latent space.

    .. math:: z \sim N(\mu, \Sigma) \;\Rightarrow\; A z \sim N(A \mu, A \Sigma A^T)

    The rows of A are the two leading principal axes of the aggregate posterior, or the latent units themselves
    where there are but two. The prior is N(0, I) on every such plane.

    Args:
        posterior: q(z|x) of each example, (N, d), d at least 2. Of more than 5000, as many are drawn at random.
        mixture: on the same device.
        generator: source of that choice and of the codes.
        n_points: grid points along each axis, at least 2.

    Returns:
        Densities on a grid that reaches 4 standard deviations beyond the components of all three.

    Raises:
        ValueError: if there is one latent unit only, or no grid.
    """
    latent_dim = posterior.mean.shape[1]
    if latent_dim < 2 or n_points < 2:
        raise ValueError(
            f"a plane needs at least 2 latent units and 2 grid points, got {latent_dim} and {n_points}; "
            "show codes of one unit as a histogram"
        )
    device = posterior.mean.device
    rows = torch.randperm(len(posterior.mean), generator=generator, device=device)[
        :PLANE_POSTERIORS
    ]
    shown = Gaussian(posterior.mean[rows].double(), posterior.log_var[rows].double())
    identity = torch.eye(2, dtype=torch.float64, device=device)
    axes = _principal_axes(shown) if latent_dim > 2 else identity

    uniform = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64, device=device)
    aggregate = GaussianMixture(
        uniform, shown.mean @ axes.mT, (axes * shown.var[:, None]) @ axes.mT
    )
    covariances = axes @ mixture.covariances.double() @ axes.mT
    projected = GaussianMixture(
        mixture.weights.double(), mixture.means.double() @ axes.mT, covariances
    )
    prior = GaussianMixture(
        torch.ones_like(uniform[:1]), torch.zeros_like(identity[:1]), identity[None]
    )

    means = torch.cat([density.means for density in (aggregate, projected, prior)])
    variances = [
        density.covariances.diagonal(dim1=1, dim2=2) for density in (aggregate, projected, prior)
    ]
    reach = PLANE_STDS * torch.cat(variances).sqrt()
    low, high = (means - reach).amin(0).tolist(), (means + reach).amax(0).tolist()
    x, y = (
        torch.linspace(*ends, n_points, dtype=torch.float64, device=device)
        for ends in zip(low, high, strict=True)
    )
    points = torch.cartesian_prod(y, x).flip(1)

    def on_grid(density: GaussianMixture) -> NDArray[np.float64]:
        return density.log_prob(points).reshape(n_points, n_points).cpu().numpy()

    return LatentPlane(
        axes=axes.cpu().numpy(),
        x=x.cpu().numpy(),
        y=y.cpu().numpy(),
        aggregate_log_prob=on_grid(aggregate),
        mixture_log_prob=on_grid(projected),
        prior_log_prob=on_grid(prior),
        codes=(shown.sample(generator) @ axes.mT).cpu().numpy(),
    )


def _principal_axes(posterior: Gaussian) -> Tensor:
    """Two leading principal axes of the aggregate posterior, (2, d), the largest entry of each positive."""
    covariance = AggregatePosterior(posterior.mean, posterior.log_var).moments().covariance
    axes = torch.linalg.eigh(covariance).eigenvectors[:, [-1, -2]].mT
    return torch.mul(axes, axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign())
