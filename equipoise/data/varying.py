"""Which dimensions of the data vary: those that a reconstruction can get wrong."""

from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from equipoise.data.arrays import hardly_vary
from equipoise.data.batches import examples
from equipoise.data.dataset import ExampleSet
from equipoise.gaps import missing_values

VARYING_TAIL = 0.05
MASK_EXAMPLES = 5000
BLOCK = 2**20
"""Number of values that are looked at together, which take about 100 MB of work space."""


def varying_mask(training: ExampleSet) -> Bool[Tensor, "*event"]:
    r"""Find the dimensions of a data set that vary, from up to 5000 of its training examples.

    Intervals are calibrated on these dimensions, and judged on the same.

    Args:
        training: The training examples.

    Returns:
        True where the data vary, of one example's shape, on the CPU.
    """
    return varying_dimensions(examples(training, MASK_EXAMPLES))


def varying_dimensions(x: Shaped[Tensor, "batch *event"]) -> Bool[Tensor, "*event"]:
    r"""Tell the dimensions that vary from those that hardly do, such as the border pixels of MNIST.

    A dimension of whole numbers varies if the central 90 % of its values spread over more than one
    grey level. A dimension of real numbers varies if they are not all the same.

    Args:
        x: Raw data, (B, \*), NaN where a value of a row is missing. A few thousand examples
            suffice.

    Returns:
        True where the data vary, of one example's shape.

    Raises:
        ValueError: if there are no examples.

    Example:
        >>> varying_dimensions(torch.tensor([[0, 10, 7], [0, 20, 7], [0, 30, 8]]))
        tensor([False,  True, False])
    """
    n = len(x)
    if n == 0:
        raise ValueError("no examples, so nothing varies; give at least one")
    missing = missing_values(x)
    if missing is not None:
        # In the middle of their column they do not widen its spread.
        x = torch.where(missing, x.nanmedian(0).values.nan_to_num(0.0), x)

    tail = int(VARYING_TAIL * n)
    smallest_spread = 0 if x.is_floating_point() else 1

    # In blocks, because kthvalue also makes an index of 8 bytes for each value.
    spreads = []
    for block in torch.split(x.flatten(1), max(1, BLOCK // n), dim=1):
        high = block.kthvalue(n - tail, dim=0).values
        low = block.kthvalue(1 + tail, dim=0).values
        spreads.append(high - low)

    return (torch.cat(spreads) > smallest_spread).view(x.shape[1:])


def counted_columns(
    training: ExampleSet, categories: Collection[int] = ()
) -> Bool[Tensor, "*event"] | None:
    """Find the columns of a table over which a variance is pooled: those that are not constant.

    A constant column has no residual. With 16 of them beside 4 others, the mean squared residual of
    all would be a fifth of that of the others, and predicted std less than half of the errors. The
    pixels of an image all count, as in eq. (10): a black border is part of the picture.

    Args:
        training: The training examples, of which a stream's first ones are looked at.
        categories: Numbers of the columns that are categories, which have no residual either.

    Returns:
        True for the numeric columns that vary, (D,), on the CPU. None if all count.
    """
    rows = training.at_hand
    if len(rows.shape) != 2:
        return None

    low, high = rows[0].copy(), rows[0].copy()
    step = max(1, BLOCK // rows.shape[1])
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        low = np.fmin(low, np.fmin.reduce(block, 0))
        high = np.fmax(high, np.fmax.reduce(block, 0))

    is_numeric = ~np.isin(np.arange(len(low)), list(categories))
    varying = ~hardly_vary(low, high) & is_numeric
    if not varying.any():
        varying = is_numeric
    if varying.all():
        return None
    return torch.from_numpy(varying)
