r"""Densities over the codes, eqs. (12) and (13), from which new codes are sampled.

A decoder is trained on codes of the aggregate posterior

.. math:: q(z) = \frac1N \sum_n q(z|x_n) = \frac1N \sum_n N(z; \mu_n, \mathrm{diag}\,s_n^2)

New codes should therefore be sampled from this density, and not from the prior N(0, I) if the two
differ. q(z) has one component for each example. A Gaussian mixture with few components approximates
it. The three densities have the same methods: ``log_prob(z)``, ``sample(n, generator)`` and the
distance ``kl_to_prior``.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.estimate import Estimate
from equipoise.gaussian import LOG_2PI, Gaussian, standard_normal_log_prob
from equipoise.labels import labelled, labels_of

ACTIVE_UNIT_VAR = 0.01
"""A unit is active if the variance of its posterior mean over the data is above this value.

Source: Burda, Grosse and Salakhutdinov (2016), *Importance weighted autoencoders*.
"""

# Number of codes, and of posteriors, per block. The densities of a block take 32 MiB in float64.
BLOCK = 2048


class Moments(NamedTuple):
    """First two moments of a density over the codes.

    Args:
        mean: Mean, (d,).
        covariance: Covariance, (d, d).
    """

    mean: Tensor
    covariance: Tensor


class LatentDistribution(nn.Module, ABC):
    """A density over the codes, the base class of the prior, eq. (12) and eq. (13)."""

    @property
    @abstractmethod
    def latent_dim(self) -> int:
        """Dimension d of the codes."""

    @abstractmethod
    def log_prob(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
        """Log-density of each code.

        Args:
            z: Codes, (B, d).

        Returns:
            The log-densities, (B,), nats.
        """

    @abstractmethod
    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "{n} latent"]:
        """Draw independent codes.

        Args:
            n: Number of codes.
            generator: Source of randomness, on the device of the density. None means the global
                generator.

        Returns:
            The codes, (n, d).
        """

    @torch.no_grad()
    def kl_to_prior(
        self, n_samples: int = 10_000, generator: torch.Generator | None = None
    ) -> Estimate:
        r"""Estimate the Kullback-Leibler divergence from this density to the prior by Monte Carlo.

        .. math:: KL(q \| p) = E_{z \sim q} [\log q(z) - \log N(z; 0, I)]

        Args:
            n_samples: Number of codes that are sampled, at least 2.
            generator: Source of randomness, on the device of the density. None means the global
                generator.

        Returns:
            The estimate in nats, with its standard error.

        Raises:
            ValueError: If ``n_samples`` is less than 2.
        """
        if n_samples < 2:
            raise ValueError(f"a standard error needs n_samples >= 2, got {n_samples}")

        z = self.sample(n_samples, generator)
        return Estimate.of_mean(self.log_prob(z) - standard_normal_log_prob(z))


class StandardNormal(LatentDistribution):
    """The prior p(z) = N(0, I).

    Args:
        latent_dim: Dimension d of the codes, at least 1.

    Raises:
        ValueError: If ``latent_dim`` is less than 1.

    Example:
        >>> StandardNormal(2).log_prob(torch.zeros(1, 2))  # -log(2 pi)
        tensor([-1.8379])
    """

    mean: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"expected latent_dim >= 1, got {latent_dim}")

        # The buffer also stores dtype and device of the module.
        self.register_buffer("mean", torch.zeros(latent_dim), persistent=False)

    @property
    def latent_dim(self) -> int:
        """Dimension d of the codes."""
        return len(self.mean)

    def log_prob(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
        """Log-density of each code under N(0, I).

        Args:
            z: Codes, (B, d).

        Returns:
            The log-densities, (B,), nats.
        """
        _check_codes(z, self.latent_dim)
        return standard_normal_log_prob(z)

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "{n} latent"]:
        """Draw independent codes.

        Args:
            n: Number of codes.
            generator: Source of randomness, on the device of the module. None means the global
                generator.

        Returns:
            The codes, (n, d).
        """
        return self.mean.new_empty(n, self.latent_dim).normal_(generator=generator)


class AggregatePosterior(LatentDistribution):
    r"""The aggregate posterior, eq. (12), with one component per example.

    .. math:: q(z) = \frac1N \sum_n N(z; \mu_n, \mathrm{diag}\,s_n^2)

    The density is exact and costs N densities per code. It is computed in blocks, so that memory
    never holds a (B, N) tensor.

    Args:
        means: Posterior means, (N, d).
        log_vars: Logarithms of the posterior variances, (N, d).

    Raises:
        ValueError: If the shapes differ, are not two-dimensional or contain zero, or if a value is
            not finite.

    Example:
        >>> posterior = AggregatePosterior(torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1))
        >>> posterior.log_prob(torch.zeros(1, 1))  # log N(1; 0, 1): both components are equally far
        tensor([-1.4189])
    """

    means: Tensor
    log_vars: Tensor

    def __init__(self, means: Tensor, log_vars: Tensor) -> None:
        super().__init__()
        if means.ndim != 2 or means.shape != log_vars.shape or means.numel() == 0:
            raise ValueError(
                "expected means and log_vars of one shape (N, d), neither zero, "
                f"got {tuple(means.shape)} and {tuple(log_vars.shape)}"
            )
        _check_finite(means=means, log_vars=log_vars)

        self.labels = labels_of(means)
        self.register_buffer("means", means.detach())
        self.register_buffer("log_vars", log_vars.detach())

    @property
    def latent_dim(self) -> int:
        """Dimension d of the codes."""
        return self.means.shape[1]

    def log_prob(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
        """Log-density of each code, eq. (12).

        Args:
            z: Codes, (B, d).

        Returns:
            The log-densities, (B,), nats, computed in float64 and returned in the dtype of ``z``.
        """
        _check_codes(z, self.latent_dim)

        # log N(z; mu_n, s_n^2) is linear in the features (1, z, z^2) of the code. A block of codes
        # and a block of posteriors need a single matrix product. Its terms cancel, so the codes are
        # centred and float64.
        centre = self.means.double().mean(0)
        log_sums = []
        for codes in torch.split(z.double() - centre, BLOCK):
            features = torch.cat([torch.ones_like(codes[:, :1]), codes, codes.square()], 1)

            blocks = []
            for first in range(0, len(self.means), BLOCK):
                mu = self.means[first : first + BLOCK].double() - centre
                log_var = self.log_vars[first : first + BLOCK].double()
                precision = torch.exp(-log_var)

                constant = -0.5 * (mu.square() * precision + log_var + LOG_2PI).sum(1, keepdim=True)
                coefficients = torch.cat([constant, mu * precision, -0.5 * precision], 1)
                blocks.append((features @ coefficients.mT).logsumexp(1))

            log_sums.append(torch.stack(blocks).logsumexp(0))

        log_prob = torch.cat(log_sums) - math.log(len(self.means))
        return log_prob.to(z.dtype)

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "{n} latent"]:
        """Draw independent codes. For each, draw an example and then a sample of its posterior.

        Args:
            n: Number of codes.
            generator: Source of randomness, on the device of the buffers. None means the global
                generator.

        Returns:
            The codes, (n, d).
        """
        rows = torch.randint(len(self.means), (n,), generator=generator, device=self.means.device)
        labels = None if self.labels is None else self.labels.to(rows.device)[rows]
        codes = Gaussian(self.means[rows], self.log_vars[rows]).sample(generator)
        return labelled(codes, labels)

    def moments(self) -> Moments:
        r"""Mean and covariance of q(z), in closed form.

        .. math:: E[z] = \bar\mu, \qquad
            \mathrm{Cov}[z] = \mathrm{Cov}[\mu_n] + \mathrm{diag}\,\overline{s^2}

        Returns:
            Mean (d,) and covariance (d, d), float64.
        """
        means = self.means.double()
        covariance = torch.cov(means.mT, correction=0).reshape(self.latent_dim, self.latent_dim)
        return Moments(means.mean(0), covariance + self.log_vars.double().exp().mean(0).diag())


class GaussianMixture(LatentDistribution):
    r"""A mixture of K Gaussians with full covariances, eq. (13).

    .. math:: \hat q(z) = \sum_k \pi_k N(z; \mu_k, \Sigma_k)

    The state contains the three tensors under their names.
    ``GaussianMixture(**mixture.state_dict())`` is therefore a copy.

    Args:
        weights: Weights pi, (K,), not negative, with a sum of one.
        means: Means mu, (K, d).
        covariances: Covariances Sigma, (K, d, d), symmetric and positive definite.

    Raises:
        ValueError: If the shapes do not fit together, or if a condition above does not hold.

    Example:
        >>> means = torch.tensor([[-1.0], [1.0]])
        >>> mixture = GaussianMixture(torch.tensor([0.5, 0.5]), means, torch.ones(2, 1, 1))
        >>> mixture.log_prob(torch.zeros(1, 1))
        tensor([-1.4189])
        >>> mixture.responsibilities(torch.zeros(1, 1))
        tensor([[0.5000, 0.5000]])
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    scale_trils: Tensor
    whiteners: Tensor

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        K, d = 0, 0
        if means.ndim == 2:
            K, d = means.shape
        if K * d == 0 or weights.shape != (K,) or covariances.shape != (K, d, d):
            raise ValueError(
                "expected weights (K,), means (K, d) and covariances (K, d, d), K and d not zero, "
                f"got {tuple(weights.shape)}, {tuple(means.shape)} and {tuple(covariances.shape)}"
            )

        self.register_buffer("weights", weights.detach().clone())
        self.register_buffer("means", means.detach().clone())
        self.register_buffer("covariances", covariances.detach().clone())

        # Derived tensors: the Cholesky factors of the covariances, and their inverses.
        self.register_buffer("scale_trils", torch.empty_like(covariances), persistent=False)
        self.register_buffer("whiteners", torch.empty_like(covariances), persistent=False)
        _factorise(self)

        self.register_load_state_dict_post_hook(_factorise)  # type: ignore[no-untyped-call, unused-ignore]

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return self.means.shape[0]

    @property
    def latent_dim(self) -> int:
        """Dimension d of the codes."""
        return self.means.shape[1]

    def with_covariances(self, covariances: Tensor) -> "GaussianMixture":
        """Make the same mixture with other covariances.

        Args:
            covariances: The covariances, (K, d, d).

        Returns:
            The new mixture.
        """
        return GaussianMixture(self.weights, self.means, covariances)

    def moments(self) -> Moments:
        r"""Mean and covariance, in closed form.

        .. math:: \mu = \sum_k \pi_k \mu_k, \qquad
            \Sigma = \sum_k \pi_k \bigl(\Sigma_k + (\mu_k - \mu)(\mu_k - \mu)^T\bigr)

        Returns:
            Mean (d,) and covariance (d, d), in the dtype of the mixture.
        """
        mean = self.weights @ self.means
        spread = self.means - mean

        between = (self.weights[:, None] * spread).mT @ spread
        within = torch.einsum("k,kij->ij", self.weights, self.covariances)

        return Moments(mean, within + between)

    def log_prob(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
        """Log-density of each code, eq. (13).

        Args:
            z: Codes, (B, d).

        Returns:
            The log-densities, (B,), nats, in the dtype of the mixture.
        """
        return torch.cat([self._log_joint(codes).logsumexp(1) for codes in self._blocks(z)])

    def responsibilities(
        self, z: Float[Tensor, "batch latent"]
    ) -> Float[Tensor, "batch components"]:
        r"""Posterior probability of each component.

        .. math:: r_k(z) = \pi_k N(z; \mu_k, \Sigma_k) / \hat q(z)

        Args:
            z: Codes, (B, d).

        Returns:
            The probabilities, (B, K), in the dtype of the mixture. The sum of each row is one.
        """
        return torch.cat([self._log_joint(codes).softmax(1) for codes in self._blocks(z)])

    def sample(
        self, n: int, generator: torch.Generator | None = None, component: int | None = None
    ) -> Float[Tensor, "{n} latent"]:
        """Draw independent codes, of all components or of one.

        Args:
            n: Number of codes, at least 1.
            generator: Source of randomness, on the device of the mixture. None means the global
                generator.
            component: Number of the component, from 0, from which all codes are drawn. None draws a
                component for each code with the weights as probabilities.

        Returns:
            The codes, (n, d), in random order.

        Raises:
            ValueError: If there is no such component, or if ``n`` is less than 1.
        """
        if n < 1:
            raise ValueError(f"expected n >= 1 codes to draw, got {n}")

        if component is None:
            components = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        elif 0 <= component < self.n_components:
            components = torch.full((n,), component, device=self.means.device)
        else:
            raise ValueError(
                f"expected a component from 0 to {self.n_components - 1}, got {component}"
            )

        return self._sample_of(components, generator)

    def _sample_of(self, components: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw a code of each of the given components, (n,)."""
        n = len(components)
        z = self.means.new_empty(n, self.latent_dim).normal_(generator=generator)
        # One matrix product per component saves memory. A factor for each of the n codes would take
        # n d^2 numbers.
        for k in set(components.tolist()):
            rows = components == k
            z[rows] = self.means[k] + z[rows] @ self.scale_trils[k].mT

        return z

    def _blocks(self, z: Tensor) -> tuple[Tensor, ...]:
        """Split codes so that the whitened residuals of a block (B, K, d) stay within 32 MiB."""
        _check_codes(z, self.latent_dim)
        size = max(1, BLOCK * BLOCK // self.means.numel())
        return torch.split(z.to(self.means.dtype), size)

    def _log_joint(self, z: Tensor) -> Tensor:
        """Return log pi_k + log N(z; mu_k, Sigma_k), (B, K)."""
        K, d = self.means.shape

        # Codes are centred, so that codes far from the origin lose no digits.
        centre = self.weights @ self.means
        offsets = self.whiteners @ (self.means - centre).unsqueeze(2)  # (K, d, 1)
        whitened = (z - centre) @ self.whiteners.reshape(K * d, d).mT - offsets.flatten()
        squared_distance = whitened.reshape(-1, K, d).square().sum(2)

        log_det = self.whiteners.diagonal(dim1=1, dim2=2).log().sum(1)
        return self._weights_of(z).log() + log_det - 0.5 * (d * LOG_2PI + squared_distance)

    def _weights_of(self, z: Tensor) -> Tensor:
        """Return the weights of the components, (K,), or (B, K) where they depend on the code."""
        return self.weights


@torch.no_grad()
def single_gaussian(mixture: GaussianMixture) -> GaussianMixture:
    r"""Replace a mixture by one Gaussian with the mixture's mean and covariance.

    .. math:: \mu = \sum_k \pi_k \mu_k, \qquad
        \Sigma = \sum_k \pi_k \bigl(\Sigma_k + (\mu_k - \mu)(\mu_k - \mu)^T\bigr)

    EM keeps the moments of the codes. So this is the Gaussian of highest likelihood on the codes
    that the mixture was fitted to.

    Args:
        mixture: The mixture of K components.

    Returns:
        A mixture of one component.

    Example:
        >>> means = torch.tensor([[-1.0], [1.0]])
        >>> halves = GaussianMixture(torch.tensor([0.5, 0.5]), means, torch.ones(2, 1, 1))
        >>> single_gaussian(halves).covariances
        tensor([[[2.]]])
    """
    mean, covariance = mixture.moments()
    return GaussianMixture(torch.ones_like(mixture.weights[:1]), mean[None], covariance[None])


@torch.no_grad()
def tempered(mixture: GaussianMixture, temperature: float) -> GaussianMixture:
    r"""Multiply the covariances of a mixture's components by a temperature.

    .. math:: \hat q_\tau(z) = \sum_k \pi_k N(z; \mu_k, \tau \Sigma_k)

    Below 1 codes are drawn from nearer the centres of the components, and are more typical and less
    diverse. Weights and means stay.

    Args:
        mixture: The mixture of K components.
        temperature: tau, above 0. At 1 it is the mixture itself.

    Returns:
        A mixture of K components.

    Raises:
        ValueError: If the temperature is not finite and above 0, or too low for the covariances to
            stay positive definite.

    Example:
        >>> mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> tempered(mixture, 0.25).scale_trils  # std
        tensor([[[0.5000]]])
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"expected a finite temperature above 0, got {temperature}")
    return mixture.with_covariances(temperature * mixture.covariances)


def _factorise(mixture: GaussianMixture, _incompatible_keys: Any = None) -> None:  # noqa: ANN401
    """Check the state of a mixture, and compute the factors of its covariances and their inverses.

    This runs at construction and after every ``load_state_dict``, so that the factors always belong
    to the state.

    Args:
        mixture: Mixture whose three tensors are set.
        _incompatible_keys: Argument that torch passes when it loads a state. It is not used.

    Raises:
        ValueError: If a value is not finite, if the weights are no distribution, or if a covariance
            is not symmetric and positive definite.
    """
    weights, covariances = mixture.weights.double(), mixture.covariances.double()
    _check_finite(weights=weights, means=mixture.means, covariances=covariances)

    if (weights < 0).any() or abs(weights.sum().item() - 1) > 1e-4:
        raise ValueError(
            "expected weights >= 0 that sum to one, "
            f"got a sum of {weights.sum():.6g} and a minimum of {weights.min():.6g}; "
            "divide them by their sum"
        )
    if (covariances - covariances.mT).abs().max() > 1e-5 * covariances.abs().max():
        raise ValueError("expected symmetric covariances; average each with its transpose")

    scale_trils, info = torch.linalg.cholesky_ex(covariances)
    if info.any():
        components = info.nonzero().flatten().tolist()
        raise ValueError(
            f"the covariance of component(s) {components} is not positive definite: "
            "fit with a larger floor or fewer components, or add a small multiple of the identity"
        )

    identity = torch.eye(mixture.latent_dim, dtype=scale_trils.dtype, device=scale_trils.device)
    mixture.scale_trils.copy_(scale_trils)
    mixture.whiteners.copy_(torch.linalg.solve_triangular(scale_trils, identity, upper=False))


def _check_codes(z: Tensor, latent_dim: int) -> None:
    if z.ndim != 2 or z.shape[1] != latent_dim:
        raise ValueError(f"expected codes of shape (B, {latent_dim}), got {tuple(z.shape)}")


def _check_finite(**tensors: Tensor) -> None:
    for name, values in tensors.items():
        n_bad = int((~values.isfinite()).sum())
        if n_bad:
            raise ValueError(
                f"{n_bad} of {values.numel()} values of {name} are not finite: "
                "the training that gave them diverged; go back to its last good checkpoint"
            )
