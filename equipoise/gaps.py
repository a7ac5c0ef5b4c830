r"""Missing values: NaN in the rows of a table marks what was not observed.

It is carried in the data themselves, through their scaling, into residuals. What it means is
decided in few places. The density of a partly observed row is its marginal, which sums over the
observed dimensions alone:

.. math:: \log p(x_\mathrm{obs}|z) = \sum_{i\ \mathrm{observed}} \log p(x_i|z)

The encoder gets zeros, the mean of a standardised column, and the mask. Eq. (10) counts observed
values only. Mattei and Frellsen (2019), *MIWAE: Deep generative modelling and imputation of
incomplete data sets*. Pixels of images are never missing.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def missing_values(x: Tensor) -> Tensor | None:
    r"""Find the missing values of rows.

    Args:
        x: Rows of a table, or residuals of them, (B, D). Anything of another shape has no gaps.

    Returns:
        True where a value is NaN, (B, D). None if there are no such values. On a GPU the mask is
        returned in any case, because a question would wait for the device, and so it is while a
        program is exported, which has no values to ask.

    Example:
        >>> missing_values(torch.tensor([[1.0, torch.nan]]))
        tensor([[False,  True]])
        >>> missing_values(torch.tensor([[1.0, 2.0]])) is None
        True
    """
    if x.ndim != 2 or not x.is_floating_point():
        return None
    missing = torch.isnan(x)
    is_unasked = x.is_cuda or torch.compiler.is_exporting()
    return missing if is_unasked or bool(missing.any()) else None


def n_observed(x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    r"""Count the observed values of each example.

    Args:
        x: Examples or residuals, (B, \*).

    Returns:
        The numbers, (B,), in the dtype of ``x``.
    """
    missing = missing_values(x)
    if missing is None:
        return x.new_full((len(x),), float(x[0].numel())) if len(x) else x.new_zeros(0)
    return (~missing).sum(1).to(x.dtype)


def observed_difference(
    x: Float[Tensor, "batch *event"], mean: Float[Tensor, "batch *event"]
) -> Float[Tensor, "batch *event"]:
    r"""Subtract a mean where x is observed. The difference is 0 elsewhere, and has no gradient.

    Args:
        x: Data, (B, \*).
        mean: Mean, (B, \*).

    Returns:
        x - mean or 0, (B, \*).
    """
    missing = missing_values(x)
    difference = x - mean
    return difference if missing is None else difference.masked_fill(missing, 0.0)


def row_means(values: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    r"""Average the observed values of each example.

    Args:
        values: Values, (B, \*).

    Returns:
        The means, (B,), NaN for a row without any value.

    Example:
        >>> row_means(torch.tensor([[1.0, torch.nan], [1.0, 3.0]]))
        tensor([1., 2.])
    """
    if missing_values(values) is None:
        return values.flatten(1).mean(1)
    return values.nanmean(1)


def column_means(values: Float[Tensor, "batch *event"]) -> Float[Tensor, "*event"]:
    r"""Average the observed values of each dimension.

    Args:
        values: Values, (B, \*).

    Returns:
        The means, (\*), NaN for a column without any value.
    """
    return values.mean(0) if missing_values(values) is None else values.nanmean(0)


def column_vars(values: Float[Tensor, "batch *event"]) -> Float[Tensor, "*event"]:
    r"""Variance of the observed values of each dimension, with the number less one below.

    Args:
        values: Values, (B, \*).

    Returns:
        The variances, (\*), NaN for a column of less than two values.
    """
    missing = missing_values(values)
    if missing is None:
        return values.var(0)
    n = (~missing).sum(0)
    return (values - values.nanmean(0)).square().nansum(0) / (n - 1)


def observed_values(values: Tensor) -> Tensor:
    """Collect the observed values of all examples.

    Args:
        values: Values, any shape.

    Returns:
        ``values`` itself if none is missing, and otherwise the others as one vector.
    """
    missing = missing_values(values)
    return values if missing is None else values[~missing]
