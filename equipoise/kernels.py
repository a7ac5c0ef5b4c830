r"""Operations in the values of torch's own, with other gradients or in less time on CPUs.

A clamp keeps the gradient that brings a value back within its bounds. Two layers of the
convolutional networks are arranged for the order in which a CPU's memory holds images.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


class _Clamp(torch.autograd.Function):
    """Clamp values, and keep the gradient of each that descent would bring back within bounds."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's own context type)
        values: Tensor,
        low: Tensor | float,
        high: float | None,
    ) -> Tensor:
        clamped = values.clamp(low, high)  # type: ignore[arg-type] # a tensor and None serve
        ctx.save_for_backward(values, clamped)
        return clamped

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (gradient,) = gradients
        values, clamped = ctx.saved_tensors

        # Descent moves a value further out where excess and gradient differ in sign, which is where
        # their product is negative. The kernel of a ReLU's gradient takes a quarter of the time of
        # torch.where on a CPU.
        product = (values - clamped) * gradient
        smallest = torch.finfo(product.dtype).tiny
        return torch.ops.aten.threshold_backward(gradient, product, -smallest), None, None


_clamp = cast(Callable[[Tensor, Tensor | float, float | None], Tensor], _Clamp.apply)


def lower_bound(values: Tensor, bound: Tensor) -> Tensor:
    """Clamp from below, exactly, and keep the gradient that would lift a value off the bound.

    ``torch.clamp`` has no gradient below the bound, so that a variance which once fell under its
    floor would stay there. A softplus has one, but bends every value above the floor.

    Args:
        values: Any shape.
        bound: Smallest value of the result. It broadcasts to ``values`` and receives no gradient.

    Returns:
        The larger of the two, elementwise.

    Example:
        >>> raw = torch.tensor([-1.0, -1.0, 2.0], requires_grad=True)
        >>> clamped = lower_bound(raw, torch.tensor(0.0))
        >>> (clamped * torch.tensor([1.0, -1.0, 1.0])).sum().backward()
        >>> raw.grad  # descent raises the second: kept; it would lower the first: dropped
        tensor([ 0., -1.,  1.])
    """
    return _clamp(values, bound, None)


def bounded(values: Tensor, low: float, high: float) -> Tensor:
    """Clamp on both sides, exactly, and keep the gradient that would bring a value back.

    Args:
        values: Any shape.
        low: Smallest value of the result.
        high: Largest value of the result.

    Returns:
        The values, where those beyond a bound are replaced by it.

    Example:
        >>> bounded(torch.tensor([-0.2, 0.4, 1.3]), 0.1, 1.0)
        tensor([0.1000, 0.4000, 1.0000])
    """
    return _clamp(values, low, high)


class GELU(nn.GELU):
    """Apply torch's GELU in the order of the memory.

    For channels-last strides, torch's own takes up to twice as long on CPUs.
    """

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Apply it to each value."""
        if x.is_contiguous(memory_format=torch.channels_last):
            return nn.functional.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return nn.functional.gelu(x)


class ConvTranspose2d(nn.ConvTranspose2d):
    """Double an image by torch's transposed convolution with kernel 4, stride 2 and padding 1.

    The bias is added afterwards, because its gradient otherwise takes as long as that of the
    weights. A result of few channels, such as an image, is made by :func:`_double`, because torch's
    kernel computes as many channels as fill a vector of the processor.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        output_padding: Rows and columns to add, each 0 or 1.
    """

    FEW_CHANNELS = 4

    def __init__(self, inputs: int, outputs: int, output_padding: tuple[int, int]) -> None:
        super().__init__(inputs, outputs, 4, stride=2, padding=1, output_padding=output_padding)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        output_size: list[int] | None = None,
    ) -> Float[Tensor, "batch outputs big_height big_width"]:
        """Convolve, and add the bias."""
        # The type is a string because torch 2.6 cannot trace a subscripted class.
        padding = cast("tuple[int, int]", self.output_padding)

        # Compilers and the transforms of torch.func know torch's own operations only.
        is_transformed = (
            torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        )
        has_few_channels = self.out_channels <= self.FEW_CHANNELS
        if x.device.type == "cpu" and has_few_channels and not is_transformed:
            dtype = x.dtype
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu")
            weight = self.weight.to(dtype)
            y: Tensor = _Double.apply(x.to(dtype), weight, padding)  # type: ignore[no-untyped-call]
        else:
            y = nn.functional.conv_transpose2d(x, self.weight, None, 2, 1, padding)

        return y + cast(Tensor, self.bias).to(y.dtype)[:, None, None]


class _Double(torch.autograd.Function):
    """Apply :func:`_double` with torch's own gradients, which are fast and twice differentiable."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's own context type)
        x: Tensor,
        weight: Tensor,
        output_padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.output_padding = output_padding
        return _double(x, weight, output_padding)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 (torch's own context type)
        gradient: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        is_needed = (*ctx.needs_input_grad[:2], False)

        stride, padding, dilation = (2, 2), (1, 1), (1, 1)
        x_gradient, weight_gradient, _ = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            None,
            stride,
            padding,
            dilation,
            True,
            ctx.output_padding,
            1,
            is_needed,
        )
        return x_gradient, weight_gradient, None


def _double(x: Tensor, weight: Tensor, output_padding: tuple[int, int]) -> Tensor:
    r"""Transposed convolution, kernel 4, stride 2, padding 1, by one of kernel 2 and more channels.

    Along an axis, output o sums over the inputs i with o = 2 i - 1 + k, where k is 0, 1, 2 or 3.
    Hence inputs p - 1 and p give output 2 p - 1 by k = 2 and 0, and output 2 p by k = 3 and 1. Each
    of the two parities of each axis becomes a set of channels, and these are put side by side.
    """
    n, _, height, width = x.shape
    inputs, outputs = weight.shape[:2]

    # k = 2 (1 - tap) + parity, along both axes
    kernel = weight.view(inputs, outputs, 2, 2, 2, 2).flip(2, 4).permute(3, 5, 1, 0, 2, 4)
    kernel = kernel.reshape(4 * outputs, inputs, 2, 2)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    pairs = nn.functional.conv2d(x, kernel, padding=1).permute(0, 2, 3, 1)

    pairs = pairs.view(n, height + 1, width + 1, 2, 2, outputs).permute(0, 1, 3, 2, 4, 5)
    y = pairs.reshape(n, 2 * height + 2, 2 * width + 2, outputs)
    last_row = 1 + 2 * height + output_padding[0]
    last_column = 1 + 2 * width + output_padding[1]
    y = y[:, 1:last_row, 1:last_column].permute(0, 3, 1, 2)

    if x.is_contiguous(memory_format=torch.channels_last):
        return y.contiguous(memory_format=torch.channels_last)
    return y.contiguous()
