r"""Yeo and Johnson's power transform of skewed columns, its inverse and its slope.

.. math:: t_\lambda(x) = \begin{cases}
        \bigl((1 + x)^\lambda - 1\bigr) / \lambda & x \ge 0 \\
        -\bigl((1 - x)^{2 - \lambda} - 1\bigr) / (2 - \lambda) & x < 0
    \end{cases}

A power of 1 changes nothing, below 1 it draws in what is far above, and above 1 what is far below.
Only powers from 0 to 2 are used, for which every real number is the transform of one.

Source: Yeo and Johnson (2000), *A new family of power transformations to improve normality or
symmetry*, Biometrika 87.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.estimate import Estimate

POWERS = np.linspace(0.0, 2.0, 41)
"""Powers that are tried."""
FOLDS, FEWEST_ROWS = 5, 30
"""Parts of the rows that are held out in turn, and rows of a column below which none is changed."""
CLEAR_GAIN = 2.0
"""Standard errors by which held-out values must be more likely."""


def yeo_johnson(x: Tensor, power: Tensor) -> Tensor:
    """Transform values.

    Args:
        x: Values, (B, D), as multiples of a std from a mean.
        power: Powers from 0 to 2, (D,).

    Returns:
        The transforms, (B, D).

    Example:
        >>> yeo_johnson(torch.tensor([[3.0, -1.0, 3.0]]), torch.tensor([1.0, 1.0, 0.0]))
        tensor([[ 3.0000, -1.0000,  1.3863]])
    """
    exponent, size = _exponent(x, power), torch.log1p(x.abs())
    is_log = exponent == 0
    grown = torch.expm1(exponent * size) / torch.where(is_log, 1.0, exponent)
    return torch.sign(x) * torch.where(is_log, size, grown)


def yeo_johnson_inverse(t: Tensor, power: Tensor) -> Tensor:
    """Undo :func:`yeo_johnson`.

    Args:
        t: Transforms, (B, D).
        power: Powers from 0 to 2, (D,).

    Returns:
        The values, (B, D).
    """
    exponent, size = _exponent(t, power), t.abs()
    is_log = exponent == 0
    shrunk = torch.log1p(exponent * size) / torch.where(is_log, 1.0, exponent)
    return torch.sign(t) * torch.expm1(torch.where(is_log, size, shrunk))


def yeo_johnson_log_slope(x: Tensor, power: Tensor) -> Tensor:
    r"""Compute the logarithm of dt/dx.

    .. math:: \log t'_\lambda(x) = \mathrm{sign}(x) (\lambda - 1) \log(1 + |x|)

    Args:
        x: Values, (B, D).
        power: Powers, (D,).

    Returns:
        The logarithms, (B, D).
    """
    return torch.sign(x) * (power - 1) * torch.log1p(x.abs())


def choose_powers(columns: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    r"""Choose the power of each column under which held-out values are most likely.

    .. math:: \log N(t_\lambda(x); \hat\mu, \hat\sigma^2) + \log t'_\lambda(x)

    Mean, variance and power are those of highest likelihood on four fifths of the values, and the
    rest are held out, in turns. A power is taken only if this gains more than two standard errors
    against the values as they are.

    Args:
        columns: The observed values of each column, (n_i,), in any unit.

    Returns:
        The powers, (D,), 1 for a column that stays as it is.
    """
    return np.array([_choose_power(values) for values in columns])


def _exponent(x: Tensor, power: Tensor) -> Tensor:
    """Return the power on the side of zero on which each value is."""
    return torch.where(x >= 0, power, 2 - power)


def _choose_power(values: NDArray[np.float64]) -> float:
    """Choose the power of one column."""
    std = values.std() if len(values) else 0.0
    if len(values) < FEWEST_ROWS or not std > 0:
        return 1.0

    x = torch.from_numpy((values - values.mean()) / std)[:, None]
    powers = torch.from_numpy(POWERS)
    t, log_slope = yeo_johnson(x, powers), yeo_johnson_log_slope(x, powers)

    gains = torch.empty(len(x), dtype=torch.float64)
    fold = torch.arange(len(x)) % FOLDS
    as_it_is = len(POWERS) // 2
    for k in range(FOLDS):
        kept, held_out = fold != k, fold == k
        best = _log_densities(t, log_slope, kept, kept).mean(0).argmax()
        found = _log_densities(t, log_slope, kept, held_out)
        gains[held_out] = found[:, best] - found[:, as_it_is]

    gain = Estimate.of_mean(gains)
    if gain.standard_error is None or gain.value <= CLEAR_GAIN * gain.standard_error:
        return 1.0
    everything = torch.ones_like(fold, dtype=torch.bool)
    best = _log_densities(t, log_slope, everything, everything).mean(0).argmax()
    return float(POWERS[int(best)])


def _log_densities(t: Tensor, log_slope: Tensor, given: Tensor, judged: Tensor) -> Tensor:
    """Log-density of the judged values for each power, up to a constant, (M, P)."""
    mean, std = t[given].mean(0), t[given].std(0).clamp_min(1e-9)
    return log_slope[judged] - 0.5 * ((t[judged] - mean) / std).square() - std.log()
