r"""Digital data: the probability of a level, in place of the density at it.

A pixel of 8 bits is one of 256 levels, and a level stands for all values that are rounded to it. A
Gaussian gives it the mass of this cell. The lowest and the highest level stand for all that lies
beyond them, too: their cells are open.

.. math:: \log P(k) = \log\bigl[\Phi\bigl((k + \tfrac12 - m) / s\bigr)
          - \Phi\bigl((k - \tfrac12 - m) / s\bigr)\bigr]

Here m and s are the mean and std of the Gaussian, in units of the distance q of two levels. The
cells of a Gaussian sum to one. log P is therefore at most zero, whatever the variance, and needs no
floor, while the density grows without limit on values that a model knows exactly.

Source: Tobin (1958), *Estimation of relationships for limited dependent variables*, for the open
cells; Salimans, Karpathy, Chen and Kingma (2017), *PixelCNN++*, for levels of images.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from equipoise.gaussian import Gaussian, Randomness, random_like, sum_dimensions


class Levels(NamedTuple):
    """The values that digital data can have, in the unit of the data.

    Args:
        quantum: q, distance of two neighbouring levels.
        low: Lowest level. Minus infinity if there is none.
        high: Highest level. Infinity if there is none.

    Example:
        >>> Levels(1 / 255).number  # of images of 8 bits
        256
    """

    quantum: float
    low: float = 0.0
    high: float = 1.0

    @property
    def number(self) -> int | None:
        """Number of levels; None if there is no lowest or no highest."""
        n_steps = (self.high - self.low) / self.quantum
        return round(n_steps) + 1 if math.isfinite(n_steps) else None

    def is_lowest(self, x: Tensor) -> Tensor:
        """Tell which values lie in the cell of the lowest level.

        Args:
            x: Values, any shape.

        Returns:
            True where they do, of the same shape.
        """
        return x < self.low + self.quantum / 2

    def is_highest(self, x: Tensor) -> Tensor:
        """Tell which values lie in the cell of the highest level.

        Args:
            x: Values, any shape.

        Returns:
            True where they do, of the same shape.
        """
        return x > self.high - self.quantum / 2

    def agree_on_bound(self, x: Tensor, mean: Tensor) -> Tensor:
        """Tell where a datum and its mean are on the same bound: a black background decoded black.

        They agree whatever the std is, and say nothing of it.

        Args:
            x: Data, any shape.
            mean: Means of p(x|z), of the same shape.

        Returns:
            True where they are; nowhere if there are no bounds.
        """
        both_lowest = self.is_lowest(x) & self.is_lowest(mean)
        both_highest = self.is_highest(x) & self.is_highest(mean)
        return both_lowest | both_highest


class DigitalGaussian(NamedTuple):
    r"""A batch of Gaussians that are rounded to levels, as mean and log-variance before rounding.

    Args:
        mean: Mean, (B, \*), in the unit of the data.
        log_var: Natural logarithm of the variance, of any shape that broadcasts to that of
            ``mean``.
        levels: The levels.

    Example:
        >>> coin = DigitalGaussian(torch.full((2, 1), 0.5), torch.zeros(()), Levels(1.0))
        >>> coin.log_prob(torch.tensor([[0.0], [1.0]])).exp()  # two levels, the mean between them
        tensor([0.5000, 0.5000])
    """

    mean: Tensor
    log_var: Tensor
    levels: Levels

    @classmethod
    def of(cls, gaussian: Gaussian, levels: Levels) -> "DigitalGaussian":
        """Round the values of a Gaussian to levels.

        Args:
            gaussian: The Gaussian.
            levels: The levels.

        Returns:
            The distribution of the levels.
        """
        return cls(gaussian.mean, gaussian.log_var, levels)

    def log_prob(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        r"""Log-probability of the levels of each example.

        If the data are as the model says, its mean is minus the entropy of the levels, which is at
        least -D log K for K levels.

        Args:
            x: Levels, (B, \*), of the shape of ``mean``.

        Returns:
            The log-probabilities, (B,), nats, summed over the dimensions, at most zero.
        """
        return sum_dimensions(self.log_prob_of_values(x))

    def log_prob_of_values(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        r"""Log-probability of the level of each value, differentiable in mean and log-variance.

        It is exact to rounding, also 10,000 std away from the mean, and for a std of any size.

        Args:
            x: Levels, (B, \*), of the shape of ``mean``.

        Returns:
            The log-probabilities, (B, \*), nats.
        """
        offset, is_end = self._offset(x)
        log_std = 0.5 * self.log_var - math.log(self.levels.quantum)
        return _log_cell(offset, log_std.expand_as(offset), is_end)

    def _offset(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Place each cell, by symmetry, where its upper edge is the one nearer to the mean.

        Returns the centre of the cell less the mean, in quanta, and whether its lower edge is minus
        infinity. Differences are then of small numbers, and never of two that are nearly one.
        """
        difference = (x - self.mean) / self.levels.quantum
        is_lowest, is_highest = self.levels.is_lowest(x), self.levels.is_highest(x)

        offset = torch.where(is_highest, -difference, -difference.abs())
        return torch.where(is_lowest, difference, offset), is_lowest | is_highest

    @torch.no_grad()
    def pit(
        self, x: Float[Tensor, "batch *event"], generator: Randomness = None
    ) -> Float[Tensor, "batch *event"]:
        r"""Randomised probability integral transform of each value.

        .. math:: u = F(k - \tfrac12) + v\,\bigl[F(k + \tfrac12) - F(k - \tfrac12)\bigr],
                  \qquad v \sim U(0, 1)

        F is the distribution function of the Gaussian, 0 below the lowest cell and 1 above the
        highest. If the data are as the model says, u is uniform on [0, 1], although levels are few.

        Source: Smith (1985), *Diagnostic checks of non-standard time series models*; Dunn and Smyth
        (1996), *Randomized quantile residuals*.

        Args:
            x: Levels, (B, \*), of the shape of ``mean``.
            generator: Source of randomness, on the device of ``mean``.

        Returns:
            The transforms, (B, \*), float64, from 0 to 1.
        """
        quantum = self.levels.quantum
        std = (0.5 * self.log_var.double()).exp()
        difference = x.double() - self.mean

        below = torch.special.ndtr((difference - quantum / 2) / std)
        above = torch.special.ndtr((difference + quantum / 2) / std)
        below = below.masked_fill(self.levels.is_lowest(x), 0.0)
        above = above.masked_fill(self.levels.is_highest(x), 1.0)

        u = random_like(
            below, lambda numbers, source: numbers.uniform_(generator=source), generator
        )
        return torch.lerp(below, above, u)


SMALL_CELL = 1 / 8
"""Largest w (1 + t), for cells w std wide and t std away, at which the mass is taken by a series.

There the error of the series is below 1e-13. Above it, the difference of two tails loses two digits
at most."""


class _LogCell(torch.autograd.Function):
    r"""Logarithm of the mass of a cell one quantum wide, whose upper edge is near the mean.

    With the edges u > l in std from the mean, and tails T(a) = exp(-a^2 / 2) E(a) / 2, the mass is

    .. math:: \tfrac12 e^{-u^2 / 2} \bigl[E(|u|) - e^{(u^2 - l^2) / 2} E(|l|)\bigr]
              \quad (u \le 0), \qquad
              1 - \tfrac12 e^{-u^2 / 2} \bigl[E(u) + e^{(u^2 - l^2) / 2} E(|l|)\bigr]
              \quad (u > 0)

    E never underflows, and the exponents are taken before they are differences of large numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's own context type)
        offset: Tensor,
        log_std: Tensor,
        is_end: Tensor,
    ) -> Tensor:
        width = torch.exp(-log_std)
        upper, lower, centre = (offset + 0.5) * width, (offset - 0.5) * width, offset * width

        of_upper = _scaled_tail(upper)
        of_lower = (_scaled_tail(lower) * torch.exp(centre * width)).masked_fill(is_end, 0.0)
        exponent = -0.5 * upper.square()
        below_mean = exponent + torch.log(0.5 * (of_upper - of_lower))
        around_mean = torch.log1p(-0.5 * torch.exp(exponent) * (of_upper + of_lower))
        log_mass = torch.where(upper > 0, around_mean, below_mean)

        is_small = _is_small(centre, width, is_end)
        log_density = -log_std - 0.5 * (centre.square() + math.log(2 * math.pi))
        log_mass = torch.where(
            is_small, log_density + torch.log1p(_excess(centre, width)), log_mass
        )

        ctx.save_for_backward(offset, log_std, is_end, log_mass, of_upper - of_lower)
        return log_mass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        (gradient,) = gradients
        offset, log_std, is_end, log_mass, tails = ctx.saved_tensors
        width = torch.exp(-log_std)
        upper, centre = (offset + 0.5) * width, offset * width

        # The density at the upper edge over the mass, never as the ratio of two tiny numbers.
        around_mean = torch.exp(-0.5 * upper.square() - log_mass) / math.sqrt(2 * math.pi)
        at_upper = torch.where(upper > 0, around_mean, math.sqrt(2 / math.pi) / tails)
        of_small = torch.exp(-0.5 * width * (centre + 0.25 * width))
        of_small = of_small / (width * (1 + _excess(centre, width)))
        at_upper = torch.where(_is_small(centre, width, is_end), of_small, at_upper)

        # The density at the lower edge is smaller by exp(centre * width).
        decrease = torch.expm1(centre * width).masked_fill(is_end, -1.0)
        difference = -at_upper * decrease
        total = at_upper * (2 + decrease)

        slope = -centre * difference - 0.5 * width * total
        return gradient * width * difference, gradient * slope, None


_log_cell = cast(Callable[[Tensor, Tensor, Tensor], Tensor], _LogCell.apply)


def _scaled_tail(edge: Tensor) -> Tensor:
    """Twice the mass beyond an edge on the side away from the mean, times exp(edge^2 / 2)."""
    scaled: Tensor = torch.special.erfcx(edge.abs() / math.sqrt(2))
    return scaled


def _is_small(centre: Tensor, width: Tensor, is_end: Tensor) -> Tensor:
    """Tell the cells whose mass is taken by the series."""
    return (width * (1 + centre.abs()) < SMALL_CELL) & ~is_end


def _excess(centre: Tensor, width: Tensor) -> Tensor:
    """Mass of a cell over density at its centre times width, less one, by Taylor's series."""
    t, w = centre.square(), width.square()
    second = t - 1
    fourth = (t - 6) * t + 3
    sixth = ((t - 15) * t + 45) * t - 15
    return w / 24 * (second + w / 80 * (fourth + w / 168 * sixth))
