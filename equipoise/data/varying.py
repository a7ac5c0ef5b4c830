"""Which dimensions of the data vary: those that a reconstruction can get wrong."""

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

VARYING_TAIL = 0.05
BLOCK = 2**20
"""Values at a time: about 100 MB of work space."""


def varying_dimensions(x: Shaped[Tensor, "batch *event"]) -> Bool[Tensor, "*event"]:
    r"""Tell the dimensions that vary over the examples from those that hardly do, as the border pixels of MNIST.

    A dimension varies if the central 90 % of its values spread over more than one grey level (whole numbers) or are
    not all the same (real numbers).

    Args:
        x: raw data, (B, \*); a few thousand examples suffice.

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
    tail = int(VARYING_TAIL * n)
    step = 0 if x.is_floating_point() else 1
    # In blocks, because kthvalue also makes an index of 8 bytes for each value.
    spreads = [
        part.kthvalue(n - tail, dim=0).values - part.kthvalue(1 + tail, dim=0).values
        for part in torch.split(x.flatten(1), max(1, BLOCK // n), dim=1)
    ]
    return (torch.cat(spreads) > step).view(x.shape[1:])
