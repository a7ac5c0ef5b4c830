r"""Categories: columns of a table that hold one of a few levels, beside those of numbers.

Within the library a category is the number of its level, 0 to L - 1, in its column of the rows, and
NaN where it is missing. Its likelihood is categorical, with logits l(z) from the decoder:

.. math:: \log p(x|z) = \sum_{i\ \mathrm{numeric}} \log p(x_i|z)
    + \sum_{j\ \mathrm{category}} \log \mathrm{softmax}(l_j(z))_{x_j}

This is a density in the numeric columns times a probability of the categories, in nats. Sums are
over what is observed. The encoder reads each category as a one-hot vector, of zeros where it is
missing. Mean, variance and residual are of numeric columns alone: they are NaN in the others, as if
these were not observed, so that eq. (10) and all that learns from residuals leaves them out.

Nazabal, Olmos, Ghahramani and Valera (2020), *Handling incomplete heterogeneous data using VAEs*.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from equipoise.correlation import AnyGaussian
from equipoise.gaussian import Randomness, random_like
from equipoise.levels import Levels


class Categories(nn.Module):
    """Which columns of a row are categories, and what follows from that.

    Args:
        levels: The levels of each column of categories.
        width: Number D of all columns.

    Raises:
        ValueError: If a column is not one of the D, or has no level.

    Example:
        >>> categories = Categories({1: ("a", "b", "c")}, 2)
        >>> categories.one_hot(torch.tensor([[0.3, 2.0], [0.3, torch.nan]]))
        tensor([[0., 0., 1.],
                [0., 0., 0.]])
    """

    is_category: Tensor
    column_of: Tensor
    code_of: Tensor

    def __init__(self, levels: Levels, width: int) -> None:
        super().__init__()
        self.columns = tuple(sorted(levels))
        self.sizes = [len(levels[column]) for column in self.columns]
        if not all(0 <= column < width for column in self.columns) or 0 in self.sizes:
            raise ValueError(f"columns of categories {self.columns} with {self.sizes} levels")

        is_category = torch.zeros(width, dtype=torch.bool)
        is_category[list(self.columns)] = True
        column_of = [c for c, n in zip(self.columns, self.sizes, strict=True) for _ in range(n)]
        code_of = [code for n in self.sizes for code in range(n)]
        # They follow from the levels, and are not saved.
        self.register_buffer("is_category", is_category, persistent=False)
        self.register_buffer("column_of", torch.tensor(column_of), persistent=False)
        self.register_buffer("code_of", torch.tensor(code_of), persistent=False)

    @property
    def n_logits(self) -> int:
        """Number of levels of all columns."""
        return sum(self.sizes)

    @property
    def is_numeric(self) -> Bool[Tensor, " columns"]:
        """True for the columns that are no categories, (D,)."""
        return ~self.is_category

    def hide(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch columns"]:
        """Put NaN in place of the categories, so that only numbers are observed.

        Args:
            x: Rows, (B, D).

        Returns:
            The rows, (B, D).
        """
        return x.masked_fill(self.is_category, torch.nan)

    def one_hot(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch logits"]:
        """Write each category as a vector with a one at its level.

        Args:
            x: Rows, (B, D).

        Returns:
            The vectors side by side, zeros where a category is missing.
        """
        # A power transform of 1 gives codes back up to rounding.
        return (x[:, self.column_of].round() == self.code_of).to(x.dtype)

    def forward(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch values"]:
        """Write rows as vectors between which distances make sense, for features and copies.

        Args:
            x: Rows, (B, D).

        Returns:
            The numbers, and then the one-hot vectors.
        """
        return torch.cat([x[:, self.is_numeric], self.one_hot(x)], 1)

    def log_probs(self, logits: Float[Tensor, "batch logits"]) -> Float[Tensor, "batch logits"]:
        """Normalise the logits of each column: log softmax.

        Args:
            logits: What the decoder returned for the categories.

        Returns:
            Logarithm of the probability of each level. Those of a column sum to one.
        """
        parts = [part.log_softmax(1) for part in torch.split(logits, self.sizes, 1)]
        return torch.cat(parts, 1)

    def most_probable(self, log_probs: Float[Tensor, "batch logits"]) -> tuple[Tensor, Tensor]:
        """Choose the most probable level of each column.

        Args:
            log_probs: Logarithms of probabilities, or anything that orders the levels.

        Returns:
            Codes of the levels, and their entries, (B, D) both; NaN in numeric columns.
        """
        best = [part.max(1) for part in torch.split(log_probs, self.sizes, 1)]
        codes, values = (
            log_probs.new_full((len(log_probs), len(self.is_category)), torch.nan) for _ in range(2)
        )
        for column, found in zip(self.columns, best, strict=True):
            codes[:, column] = found.indices.to(codes.dtype)
            values[:, column] = found.values
        return codes, values

    def log_frequencies(self, x: Float[Tensor, "rows columns"]) -> Float[Tensor, " logits"]:
        r"""Log-probability of each level in some rows, with one more row that is of all levels.

        .. math:: \log \frac{n_l + 1 / L}{n + 1}

        Args:
            x: Rows, (N, D).

        Returns:
            One number for each level.
        """
        counts = self.one_hot(x).sum(0)
        parts = [
            torch.log((n + 1 / len(n)) / (n.sum() + 1)) for n in torch.split(counts, self.sizes)
        ]
        return torch.cat(parts)


class MixedLikelihood(NamedTuple):
    """p(x|z) of a row of numbers and categories.

    Args:
        numeric: Gaussian over all columns, (B, D), of which those of categories mean nothing.
        logits: Logits of the categories, side by side, (B, L).
        categories: Which columns they are of.
    """

    numeric: AnyGaussian
    logits: Tensor
    categories: Categories

    @property
    def mean(self) -> Tensor:
        """Mean, (B, D), model units; NaN for categories, which have none."""
        return self.categories.hide(self.numeric.mean)

    @property
    def mode(self) -> Tensor:
        """Mean of each number and code of the most probable level of each category, (B, D)."""
        codes, _ = self.categories.most_probable(self.logits)
        return torch.where(self.categories.is_category, codes, self.numeric.mean)

    @property
    def log_var(self) -> Tensor:
        """Log-variance of the numeric columns."""
        return self.numeric.log_var

    @property
    def var(self) -> Tensor:
        """Variance, (B, D); NaN for categories."""
        return self.categories.hide(self.numeric.var)

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B, D), model units; NaN for categories."""
        return self.categories.hide(self.numeric.std)

    @property
    def log_probs(self) -> Tensor:
        """Logarithms of the probabilities of all levels, (B, L)."""
        return self.categories.log_probs(self.logits)

    @property
    def vectors(self) -> Tensor:
        """Means of numbers, and then probabilities of levels, as :meth:`Categories.forward`."""
        return torch.cat(
            [self.numeric.mean[:, self.categories.is_numeric], self.log_probs.exp()], 1
        )

    def log_probability(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """Log-probability of the observed categories alone, (B,), nats."""
        return (self.categories.one_hot(x) * self.log_probs).sum(1)

    def own_and_best(self, x: Float[Tensor, "batch columns"]) -> tuple[Tensor, Tensor]:
        """Compare levels: log-probability of the row's, NaN if missing, and of the best, (B, D)."""
        log_probs = self.log_probs
        _, best = self.categories.most_probable(log_probs)
        _, own = self.categories.most_probable(
            log_probs.masked_fill(self.categories.one_hot(x) == 0, -torch.inf)
        )
        return own.masked_fill(x.isnan(), torch.nan), best

    def log_prob(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """Log-density of the observed numbers plus log-probability of the categories, nats."""
        return self.numeric.log_prob(self.categories.hide(x)) + self.log_probability(x)

    def squared_distance(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """Squared Mahalanobis distance of the observed numbers from their mean, (B,)."""
        return self.numeric.squared_distance(self.categories.hide(x))

    def given(self, x: Float[Tensor, "batch columns"]) -> tuple[Tensor, Tensor]:
        """Mean and variance of the numeric columns given those observed; NaN for categories."""
        mean, var = self.numeric.given(self.categories.hide(x))
        return self.categories.hide(mean), self.categories.hide(var)

    def sample(self, generator: Randomness = None) -> Tensor:
        """Draw numbers with noise, and levels by their probabilities (Gumbel's trick), (B, D)."""
        return self._with_levels(self.numeric.sample(generator), generator)

    def sample_given(
        self, x: Float[Tensor, "batch columns"], generator: Randomness = None
    ) -> Tensor:
        """Draw the missing values of each row, given those observed, (B, D)."""
        numbers = self.numeric.sample_given(self.categories.hide(x), generator)
        return torch.where(x.isnan(), self._with_levels(numbers, generator), x)

    def _with_levels(self, numbers: Tensor, generator: Randomness) -> Tensor:
        def draw(values: Tensor, source: torch.Generator | None) -> Tensor:
            return values.exponential_(generator=source)

        gumbel = -random_like(self.logits, draw, generator).log()
        codes, _ = self.categories.most_probable(self.log_probs + gumbel)
        return torch.where(self.categories.is_category, codes, numbers)


Likelihood: TypeAlias = AnyGaussian | MixedLikelihood
"""What p(x|z) can be."""


def mode_of(likelihood: Likelihood) -> Tensor:
    """Return what p(x|z) is at its best: the mean of numbers, the most probable level otherwise."""
    return likelihood.mode if isinstance(likelihood, MixedLikelihood) else likelihood.mean


def numeric_part(likelihood: Likelihood, x: Tensor) -> tuple[AnyGaussian, Tensor]:
    """Leave categories out of a likelihood, and out of the rows that it is of.

    Args:
        likelihood: p(x|z).
        x: Rows, (B, D), or other examples.

    Returns:
        The density of numbers, and x with NaN in place of categories.
    """
    if isinstance(likelihood, MixedLikelihood):
        return likelihood.numeric, likelihood.categories.hide(x)
    return likelihood, x


def vectors_of(likelihood: Likelihood) -> Tensor:
    """Return means, with probabilities for categories, as vectors that have distances."""
    return likelihood.vectors if isinstance(likelihood, MixedLikelihood) else likelihood.mean


def joined(parts: Sequence[Likelihood]) -> Likelihood:
    """Put the likelihoods of several batches together.

    Args:
        parts: Likelihoods of one model.

    Returns:
        That of all their rows.
    """
    first = parts[0]
    if isinstance(first, MixedLikelihood):
        mixed = [part for part in parts if isinstance(part, MixedLikelihood)]
        numeric = _joined_gaussians([part.numeric for part in mixed])
        return first._replace(numeric=numeric, logits=torch.cat([part.logits for part in mixed]))
    return _joined_gaussians([part for part in parts if not isinstance(part, MixedLikelihood)])


def _joined_gaussians(parts: Sequence[AnyGaussian]) -> AnyGaussian:
    mean = torch.cat([part.mean for part in parts])
    log_var = torch.cat([part.log_var.expand_as(part.mean) for part in parts])
    return parts[0]._replace(mean=mean, log_var=log_var)
