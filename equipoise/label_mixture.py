r"""One mixture for each label, which share their components.

The codes of label y have the density

.. math:: \hat q(z|y) = \sum_k \pi_{yk} N(z; \mu_k, \Sigma_k)

Means and covariances are those of the mixture of all codes, eq. (13). The weights are estimates
with a Dirichlet prior around the common weights, which counts as much as a few codes:

.. math:: \pi_{yk} = \frac{\sum_{n: y_n = y} r_{nk} + a\,\pi_k}{N_y + a},
    \qquad r_{nk} \propto \pi_{yk} N(z_n; \mu_k, \Sigma_k)

A label with few codes borrows from the common mixture: without any, it has the common weights.
Gauvain and Lee (1994), *Maximum a posteriori estimation for multivariate Gaussian mixture
observations of Markov chains*.
"""

import torch
from torch import Tensor

from equipoise.aggregate import GaussianMixture, LatentDistribution
from equipoise.labels import labelled, labels_of, numbers_of

PRIOR_CODES = 10.0
"""Number of codes a for which the common weights count."""
ROUNDS = 50
"""Rounds of EM on the weights, which converges in far fewer."""


class LabelMixture(GaussianMixture):
    """A mixture whose weights depend on the label that a code carries.

    A code that carries none has the density of the common weights. Samples carry labels.

    Args:
        weights: Common weights, (K,).
        means: Means, (K, d).
        covariances: Covariances, (K, d, d).
        label_weights: Weights of each label, (L, K), each row a distribution.
        label_shares: Share of each label among the examples, (L,), with a sum of one.

    Raises:
        ValueError: If the shapes do not fit together, or the numbers are no distributions.
    """

    label_weights: Tensor
    label_shares: Tensor

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        label_weights: Tensor,
        label_shares: Tensor,
    ) -> None:
        super().__init__(weights, means, covariances)
        L = len(label_shares)
        if label_weights.shape != (L, len(weights)) or label_shares.ndim != 1 or not L:
            raise ValueError(
                f"expected label_weights (L, {len(weights)}) and label_shares (L,), got "
                f"{tuple(label_weights.shape)} and {tuple(label_shares.shape)}"
            )
        for rows in (label_weights, label_shares[None]):
            if not bool(((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() < 1e-4)).all()):
                raise ValueError("expected weights and shares of labels >= 0 that sum to one")

        self.register_buffer("label_weights", label_weights.detach().clone())
        self.register_buffer("label_shares", label_shares.detach().clone())

    def sample(
        self, n: int, generator: torch.Generator | None = None, component: int | None = None
    ) -> Tensor:
        """Draw a label for each code by its share, and then the code.

        Args:
            n: Number of codes.
            generator: Source of randomness, on the device of the mixture.
            component: Number of the component from which all codes are drawn. They then carry no
                labels.

        Returns:
            The codes with their labels, (n, d).
        """
        if component is not None or n < 1:
            return super().sample(n, generator, component)
        return self.sample_given(draw_labels(self.label_shares, n, generator), generator)

    def sample_given(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a code of each label.

        Args:
            labels: Numbers of the labels, (n,).
            generator: Source of randomness, on the device of the mixture.

        Returns:
            The codes with their labels, (n, d).
        """
        weights = self._weights_by_label()[labels + 1]
        components = torch.multinomial(weights, 1, generator=generator).flatten()
        return labelled(self._sample_of(components, generator), labels)

    def with_covariances(self, covariances: Tensor) -> "LabelMixture":
        """Make the same mixture with other covariances, (K, d, d)."""
        return LabelMixture(
            self.weights, self.means, covariances, self.label_weights, self.label_shares
        )

    def _weights_of(self, z: Tensor) -> Tensor:
        labels = labels_of(z)
        return self.weights if labels is None else self._weights_by_label()[labels + 1]

    def _weights_by_label(self) -> Tensor:
        """Weights of codes without a label, and then of each label, (1 + L, K)."""
        return torch.cat([self.weights[None], self.label_weights])


class AnyLabel(LatentDistribution):
    """A density of codes that is the same for all labels, and whose samples carry labels.

    Args:
        density: The density.
        label_shares: Share of each label among the examples, (L,).
    """

    label_shares: Tensor

    def __init__(self, density: LatentDistribution, label_shares: Tensor) -> None:
        super().__init__()
        self.density = density
        self.register_buffer("label_shares", label_shares.detach().clone())

    @property
    def latent_dim(self) -> int:
        """Dimension d of the codes."""
        return self.density.latent_dim

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of each code, (B,), nats."""
        return self.density.log_prob(z)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n codes, and a label for each by its share, (n, d)."""
        return self.sample_given(draw_labels(self.label_shares, n, generator), generator)

    def sample_given(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a code for each label, (n, d)."""
        return labelled(self.density.sample(len(labels), generator), labels)


def draw_labels(shares: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw labels by their share among the examples.

    Args:
        shares: Share of each label, (L,).
        n: Number of labels to draw, at least 1.
        generator: Source of randomness, on the device of ``shares``.

    Returns:
        Numbers of labels, (n,).
    """
    return torch.multinomial(shares, n, replacement=True, generator=generator)


@torch.no_grad()
def fit_label_weights(
    mixture: GaussianMixture, codes: Tensor, labels: Tensor, n_labels: int
) -> LabelMixture:
    """Estimate the weights of each label, with the components of a mixture as they are.

    Args:
        mixture: Mixture of all codes.
        codes: Codes, (N, d).
        labels: Numbers of their labels, (N,); those that are unknown do not count.
        n_labels: Number of labels L.

    Returns:
        The mixture with weights for each label.

    Example:
        >>> means = torch.tensor([[-5.0], [5.0]])
        >>> common = GaussianMixture(torch.tensor([0.5, 0.5]), means, torch.ones(2, 1, 1))
        >>> codes, labels = torch.tensor([[5.0]] * 30), torch.zeros(30, dtype=torch.int64)
        >>> fit_label_weights(common, codes, labels, 2).label_weights  # (30 + 10 / 2) / (30 + 10)
        tensor([[0.1250, 0.8750],
                [0.5000, 0.5000]])
    """
    known = labels >= 0
    codes, labels = codes[known], labels[known]
    # The densities of the components, times the common weights, do not change.
    joint = mixture.responsibilities(codes).double()
    common = mixture.weights.double()
    ratio = joint / common.clamp_min(torch.finfo(common.dtype).tiny)

    counts = numbers_of(labels, n_labels).to(common)
    weights = common.expand(n_labels, -1)
    for _ in range(ROUNDS):
        responsibilities = weights[labels] * ratio
        responsibilities = responsibilities / responsibilities.sum(1, keepdim=True)
        sums = torch.zeros_like(weights).index_add_(0, labels, responsibilities)
        weights = (sums + PRIOR_CODES * common) / (counts + PRIOR_CODES)[:, None]

    dtype = mixture.weights.dtype
    shares = counts / counts.sum() if len(labels) else torch.full_like(counts, 1 / n_labels)
    return LabelMixture(
        mixture.weights, mixture.means, mixture.covariances, weights.to(dtype), shares.to(dtype)
    )
