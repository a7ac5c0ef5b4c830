r"""The diagonal Gaussian, eqs. (6)-(8) and (11), the only density in an equipoise VAE.

The encoder's posterior q(z|x) and the decoder's likelihood p(x|z) are both

.. math:: N(x; \mu, \mathrm{diag}\,\sigma^2)
    = \prod_i (2\pi\sigma_i^2)^{-1/2} \exp\bigl(-(x_i-\mu_i)^2 / 2\sigma_i^2\bigr)

Both are therefore records of two tensors, the mean and the logarithm of the variance.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.gaps import missing_values, observed_difference
from equipoise.labels import labelled, labels_of

LOG_2PI = math.log(2 * math.pi)

DRAWN_TOGETHER = 16
"""Numbers that torch draws together on the CPU: blocks of so many are as one long draw."""
VALUES_AT_ONCE = 1 << 22
"""Values that processes draw at once for a whole batch, of which each uses its own."""


def sum_dimensions(values: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    r"""Sum over every axis but the first. This gives one value per example.

    Args:
        values: One value per example and dimension, (B, \*).

    Returns:
        One value per example, (B,).
    """
    if values.ndim > 1:
        return values.flatten(1).sum(1)
    return values


class SharedGenerator(NamedTuple):
    """A source of randomness for one of several processes that share a batch.

    Every process draws numbers for the whole batch, from equal generators, and uses the rows of its
    own examples. The numbers of an example therefore do not depend on the number of processes.

    Args:
        generator: Generator with the same state in all processes.
        batch_size: Number of examples in the whole batch.
        rank: Number of this process. Its examples are the rows ``rank``, ``rank + world_size``, ...
            of the batch.
        world_size: Number of processes.
    """

    generator: torch.Generator
    batch_size: int
    rank: int
    world_size: int


class RowGenerators(NamedTuple):
    r"""A source of randomness for each example, which follows from its values.

    The draws of an example do not depend on the other examples, and no draw is shared by all of
    them, so that a mean over examples averages out what is drawn, too.

    Args:
        generators: One generator for each of B examples, on the device of the draws. Of B k rows,
            the first k are drawn from the first generator, and so on.
    """

    generators: tuple[torch.Generator, ...]

    @classmethod
    def of(cls, x: Float[Tensor, "batch *event"]) -> "RowGenerators":
        r"""Seed a generator for each example by a hash of its values.

        Args:
            x: The examples, (B, \*). Equal examples get equal draws.

        Returns:
            The generators, on the device of ``x``.
        """
        generators = []
        for row in x.detach().cpu().numpy():
            seed = int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest())
            generators.append(torch.Generator(x.device).manual_seed(seed))
        return cls(tuple(generators))


Randomness: TypeAlias = torch.Generator | SharedGenerator | RowGenerators | None
"""Source of randomness. None means the global generator of torch."""


def random_like(
    values: Tensor, draw: Callable[[Tensor, torch.Generator | None], Tensor], generator: Randomness
) -> Tensor:
    r"""Draw as many random numbers as there are values, each example's from its own source.

    Args:
        values: Tensor with the shape, dtype and device of the result, (B, \*).
        draw: Fills a tensor in place, given it and a generator.
        generator: Source of randomness, on the device of ``values``.

    Returns:
        The random numbers, (B, \*).
    """
    if isinstance(generator, SharedGenerator):
        shares = list(_shares(values, draw, generator))
        return shares[0] if len(shares) == 1 else torch.cat(shares)

    if isinstance(generator, RowGenerators):
        k = len(values) // len(generator.generators)
        parts = [draw(values.new_empty(k, *values.shape[1:]), g) for g in generator.generators]
        return torch.cat(parts)

    return draw(torch.empty_like(values), generator)


def _shares(
    values: Tensor,
    draw: Callable[[Tensor, torch.Generator | None], Tensor],
    generator: SharedGenerator,
) -> Iterator[Tensor]:
    """Draw the numbers of a whole batch block by block, and yield this process's part of each.

    On the CPU, the blocks have the numbers of one draw.
    """
    n, rank, world_size = generator.batch_size, generator.rank, generator.world_size
    n_values = max(1, math.prod(values.shape[1:]))
    at_once = max(1, VALUES_AT_ONCE // n_values // DRAWN_TOGETHER) * DRAWN_TOGETHER
    starts = list(range(0, max(1, n - DRAWN_TOGETHER), at_once))
    for first, last in zip(starts, [*starts[1:], n], strict=True):
        block = draw(values.new_empty(last - first, *values.shape[1:]), generator.generator)
        part = block[(rank - first) % world_size :: world_size]
        yield part if len(starts) == 1 else part.clone()  # or the block would be kept


def standard_normal_like(values: Tensor, generator: Randomness = None) -> Tensor:
    r"""Draw from the standard normal distribution.

    Args:
        values: Tensor with the shape, dtype and device of the result, (B, \*).
        generator: Source of randomness, on the device of ``values``.

    Returns:
        The random numbers, (B, \*).
    """
    return random_like(values, lambda numbers, source: numbers.normal_(generator=source), generator)


class Gaussian(NamedTuple):
    r"""A batch of Gaussians with diagonal covariance, as mean and log-variance.

    It is a NamedTuple and not a ``torch.distributions`` object, because it works with
    ``torch.compile`` and ``torch.export``, and because its samples need a ``generator``.

    Args:
        mean: Mean, (B, \*), in the unit of the variable.
        log_var: Natural logarithm of the variance, of any shape that broadcasts to that of
            ``mean``. A scalar is eq. (8), and a full (B, \*) is eq. (11).

    Example:
        >>> standard = Gaussian(torch.zeros(1, 2), torch.zeros(()))
        >>> standard.log_prob(torch.zeros(1, 2))  # -log(2 pi)
        tensor([-1.8379])
        >>> standard.kl()
        tensor([0.])
    """

    mean: Tensor
    log_var: Tensor

    @property
    def var(self) -> Tensor:
        """Variance, in the squared unit of the variable, of the shape of ``mean``."""
        return self.log_var.exp().expand_as(self.mean)

    @property
    def std(self) -> Tensor:
        """Standard deviation, in the unit of the variable, of the shape of ``mean``."""
        return (0.5 * self.log_var).exp().expand_as(self.mean)

    def log_prob(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        r"""Log-density of each example, eqs. (8) and (11).

        .. math:: -\tfrac12 \sum_i \bigl[\log 2\pi\sigma_i^2 + (x_i-\mu_i)^2/\sigma_i^2\bigr]

        Args:
            x: Values of the variable, (B, \*), of the shape of ``mean``. In rows (B, D), NaN marks
                what is not observed, and the sum is over the other dimensions.

        Returns:
            The log-densities, (B,), nats, summed over the dimensions, constants included.
        """
        missing = missing_values(x)
        if missing is not None:
            return self._marginal_log_prob(x, missing)

        # This function reads the data once forward and once backward, fewer times than a difference
        # and a square.
        squared = nn.functional.mse_loss(self.mean, x, reduction="none")
        precision = torch.exp(-self.log_var)
        normaliser = self.log_var + LOG_2PI

        if self.log_var.ndim == 0:
            # Eq. (8): the variance does not depend on the dimension, and stands before the sum.
            return -0.5 * (sum_dimensions(squared) * precision + x.shape[1:].numel() * normaliser)
        return -0.5 * sum_dimensions(squared * precision + normaliser)

    def _marginal_log_prob(self, x: Tensor, missing: Tensor) -> Tensor:
        """Sum over the observed dimensions of each row, in the same order of operations."""
        squared = (x - self.mean).masked_fill(missing, 0.0).square()
        precision = torch.exp(-self.log_var)
        normaliser = self.log_var + LOG_2PI

        if self.log_var.ndim == 0:
            observed = (~missing).sum(1)
            return -0.5 * (sum_dimensions(squared) * precision + observed * normaliser)
        summands = squared * precision + normaliser
        return -0.5 * sum_dimensions(summands.masked_fill(missing, 0.0))

    def squared_distance(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        r"""Squared Mahalanobis distance of each example from its mean, in units of the std.

        Args:
            x: Values of the variable, (B, \*), of the shape of ``mean``. Those that are missing
                do not count.

        Returns:
            The sums of (x - mean)^2 / var over the dimensions, (B,).
        """
        return sum_dimensions(observed_difference(x, self.mean).square() / self.var)

    def given(self, x: Float[Tensor, "batch dimensions"]) -> tuple[Tensor, Tensor]:
        """Mean and variance of each dimension, given the observed ones.

        Args:
            x: Rows with NaN where a value is missing, (B, D).

        Returns:
            Means, which are x where it is observed, and variances, which are 0 there, (B, D).
        """
        missing = x.isnan()
        return torch.where(missing, self.mean, x), self.var.masked_fill(~missing, 0.0)

    def sample_given(
        self, x: Float[Tensor, "batch dimensions"], generator: Randomness = None
    ) -> Float[Tensor, "batch dimensions"]:
        """Draw the missing values of each row, given the observed ones.

        Args:
            x: Rows with NaN where a value is missing, (B, D).
            generator: Source of randomness, on the device of ``mean``.

        Returns:
            Rows without gaps, (B, D).
        """
        return torch.where(x.isnan(), self.sample(generator), x)

    def sample(self, generator: Randomness = None) -> Tensor:
        r"""Draw one reparametrised sample per example, mean + std * epsilon.

        Args:
            generator: Source of randomness, on the device of ``mean``.

        Returns:
            The samples, (B, \*), differentiable with respect to ``mean`` and ``log_var``. They
            carry the labels that ``mean`` carries.
        """
        epsilon = standard_normal_like(self.mean, generator)
        return labelled(self.mean + torch.exp(0.5 * self.log_var) * epsilon, labels_of(self.mean))

    def kl(self) -> Float[Tensor, " batch"]:
        r"""Kullback-Leibler divergence to the standard normal prior, the last term of eq. (4).

        .. math:: \tfrac12 \sum_j \bigl[\mu_j^2 + \sigma_j^2 - 1 - \log \sigma_j^2\bigr]

        Returns:
            The divergences, (B,), nats, never negative.
        """
        return 0.5 * sum_dimensions(self.mean.square() + self.log_var.exp() - 1 - self.log_var)


def standard_normal_log_prob(z: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
    """Log-density of codes under the prior p(z) = N(0, I).

    Args:
        z: Codes, (B, d).

    Returns:
        The log-densities, (B,), nats.
    """
    return Gaussian(torch.zeros_like(z), z.new_zeros(())).log_prob(z)
