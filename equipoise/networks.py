r"""Pairs of an encoder and a decoder, for tables and for images, signals and volumes.

Images may have any number of channels and any size from 8 pixels a side. Signals (C, L) and volumes
(C, D, H, W) have the same networks with convolutions along one and three axes.

An encoder maps data (B, \*) to the (B, 2d) parameters of q(z|x), mean and log-variance side by
side. A decoder maps codes (B, d) to means (B, \*). Any other ``nn.Module`` with these shapes serves
as well. The decoders of this module have two parts: ``hidden`` computes features from codes, and
``output`` the mean from the features. A head reads the same features, and predicts log-variances.

Three choices suit real-valued data:

- The *output layer is linear*. The mean of a Gaussian may be any real number. Images do reach 0 and
  1, where a sigmoid would need infinite inputs and would have vanishing gradients. Where the data
  have bounds, :class:`equipoise.model.VAE` clamps the mean to them and keeps the gradients.
- The *input is standardised* by the mean and std of the training data, and the *first output of the
  decoder is their mean*, see :func:`start_at_data`. Therefore the first residual variance (10) is
  close to the variance of the data.
- The *last layers start with small weights*. Therefore the first posterior is close to the prior,
  and the KL starts near zero.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.catalogue import ARCHITECTURES
from equipoise.kernels import GELU, ConvTranspose2d

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
"""Convolutions by the number of axes in space (and time)."""

Shape = tuple[int, ...]

MIN_IMAGE_SIZE = 8
"""Smallest height and width of an image, in pixels."""
COARSEST_SIZE = 4
"""Images are halved as long as the next size is not below this one.

For example 28 -> 14 -> 7, and 64 -> 32 -> 16 -> 8 -> 4."""


def build_encoder(architecture: str, shape: Shape, latent_dim: int, width: int) -> nn.Module:
    r"""Make an encoder.

    Args:
        architecture: "mlp", "conv" or "residual".
        shape: Shape of one example, (C, H, W) for images or (D,) for rows of a table.
        latent_dim: Number of latent units d.
        width: Number of channels of the first convolution, which doubles each time the image is
            halved. For a fully connected layer, 1/8 of the number of its units.

    Returns:
        Module from (B, \*shape) to (B, 2 d), mean and log-variance side by side.

    Raises:
        ValueError: If the architecture is unknown or does not fit the shape, or if a number is less
            than 1.
    """
    _check(architecture, shape, latent_dim, width)
    return NETWORKS[architecture].encoder(shape, latent_dim, width)


def build_decoder(architecture: str, shape: Shape, latent_dim: int, width: int) -> nn.Module:
    r"""Make a decoder.

    A variance network, which maps codes to log-variances, is also made by this function.

    Args:
        architecture: "mlp", "conv" or "residual".
        shape: Shape of one example, (C, H, W) or (D,).
        latent_dim: Number of latent units d.
        width: Width, see :func:`build_encoder`.

    Returns:
        Module from (B, d) to (B, \*shape). Its attribute ``output`` is its last layer, and
        ``hidden`` is everything before it.

    Raises:
        ValueError: If the architecture is unknown or does not fit the shape, or if a number is less
            than 1.
    """
    _check(architecture, shape, latent_dim, width)
    return NETWORKS[architecture].decoder(shape, latent_dim, width)


def build_head(architecture: str, shape: Shape, width: int) -> nn.Module:
    r"""Make a variance head, which maps a decoder's features to log-variances.

    Args:
        architecture: "mlp", "conv" or "residual", that of the decoder.
        shape: Shape of one example, (C, H, W) or (D,).
        width: Width of the decoder, see :func:`build_encoder`.

    Returns:
        Module from what the decoder's ``hidden`` returns to (B, \*shape). Its last layer is its
        attribute ``output``.

    Raises:
        ValueError: If the architecture is unknown or does not fit the shape, or if a number is less
            than 1.
    """
    _check(architecture, shape, 1, width)
    return NETWORKS[architecture].head(shape, width)


def default_architecture(shape: Shape) -> str:
    """Choose convolutions for images, and fully connected layers for all other data.

    Args:
        shape: Shape of one example.

    Returns:
        "conv" for (C, H, W), (C, L) and (C, D, H, W) of at least 8 a side, otherwise "mlp".
    """
    return "conv" if _is_image(shape) else "mlp"


@torch.no_grad()
def start_at_data(
    encoder: nn.Module,
    decoder: nn.Module,
    mean: Tensor,
    std: Tensor,
    logits: Tensor | None = None,
) -> None:
    """Fit an untrained pair of this module to the scale of the data.

    Args:
        encoder: Its layer ``standardise`` takes the mean and std of the data.
        decoder: Its layer ``output`` takes the mean as its bias, and starts with small weights. A
            convolution takes one mean per channel.
        mean: Mean of the training data, of the shape of one example, model units.
        std: Standard deviation of the training data over all dimensions, (), model units.
        logits: Log-frequencies of the levels of categories, which the decoder returns after the
            mean. None if there are no categories.

    Raises:
        ValueError: If the networks are not of this module.
    """
    standardise = getattr(encoder, "standardise", None)
    output = getattr(decoder, "output", None)
    if not isinstance(standardise, Standardise) or not isinstance(output, nn.Module):
        raise ValueError(
            "Networks of an architecture need a layer 'standardise', a Standardise, in the "
            "encoder, and a layer 'output' with weight and bias in the decoder."
        )

    standardise.mean.copy_(mean.mean())
    standardise.std.copy_(std)

    cast(Tensor, output.weight).mul_(0.1)
    bias = cast(Tensor, output.bias)
    if logits is not None:
        mean = torch.cat([mean, logits])
    has_one_per_value = len(bias) == mean.numel()
    if has_one_per_value:
        bias.copy_(mean.flatten())
    else:
        bias.copy_(mean.flatten(1).mean(1))


class Standardise(nn.Module):
    """(x - mean) / std, with the mean and std of the training data over all dimensions.

    Both are constants, which :func:`start_at_data` sets.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Standardise the data."""
        return (x - self.mean) / self.std


class MLPEncoder(nn.Module):
    """Encoder of two hidden layers with 8 ``width`` units each.

    Args:
        shape: Shape of one example. The data are flattened.
        latent_dim: Number of latent units d.
        width: 1/8 of the number of units of a hidden layer.
    """

    def __init__(self, shape: Shape, latent_dim: int, width: int) -> None:
        super().__init__()
        units = 8 * width

        self.standardise = Standardise()
        self.hidden = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(shape), units),
            nn.GELU(),
            nn.Linear(units, units),
            nn.GELU(),
        )
        self.output = _posterior_layer(units, latent_dim)

    def forward(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch parameters"]:
        """Map data to the parameters of q(z|x)."""
        hidden = self.hidden(self.standardise(x))
        parameters: Tensor = self.output(hidden)
        return parameters


class MLPDecoder(nn.Module):
    """Decoder that mirrors :class:`MLPEncoder`.

    Args:
        shape: Shape of one example.
        latent_dim: Number of latent units d.
        width: 1/8 of the number of units of a hidden layer.
    """

    def __init__(self, shape: Shape, latent_dim: int, width: int) -> None:
        super().__init__()
        units = 8 * width

        self.shape = shape
        self.hidden = nn.Sequential(
            nn.Linear(latent_dim, units),
            nn.GELU(),
            nn.Linear(units, units),
            nn.GELU(),
        )
        self.output = nn.Linear(units, math.prod(shape))

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch *event"]:
        """Map codes to means."""
        mean: Tensor = self.output(self.hidden(z))
        return mean.view(-1, *self.shape)


class MLPHead(nn.Module):
    """Head of one hidden layer for the features of :class:`MLPDecoder`.

    Args:
        shape: Shape of one example.
        width: 1/8 of the number of units of the decoder's hidden layers, and of its own.
    """

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        units = 8 * width

        self.shape = shape
        self.hidden = nn.Sequential(nn.Linear(units, units), nn.GELU())
        self.output = nn.Linear(units, math.prod(shape))

    def forward(self, features: Float[Tensor, "batch units"]) -> Float[Tensor, "batch *event"]:
        """Map features to log-variances."""
        log_var: Tensor = self.output(self.hidden(features))
        return log_var.view(-1, *self.shape)


class ConvEncoder(nn.Module):
    """Encoder of strided convolutions, which halve the image, and one hidden layer.

    The channels double at each convolution, up to 8 ``width``.

    Args:
        shape: Shape of one image, (C, H, W), signal or volume, at least 8 a side.
        latent_dim: Number of latent units d.
        width: Number of channels after the first convolution.
        residual: Whether a residual block follows each convolution.
    """

    def __init__(
        self, shape: Shape, latent_dim: int, width: int, *, residual: bool = False
    ) -> None:
        super().__init__()
        sizes, channels = _pyramid(shape, width)
        n_axes = len(shape) - 1

        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(channels):
            convolution = CONVOLUTIONS[n_axes](inputs, outputs, 4, stride=2, padding=1)
            layers += [convolution, _activation(n_axes)]
            if residual:
                layers.append(ResidualBlock(outputs, n_axes))

        units = 8 * width
        coarsest = channels[-1] * math.prod(sizes[-1])
        layers += [nn.Flatten(), nn.Linear(coarsest, units), nn.GELU()]

        self.standardise = Standardise()
        self.hidden = nn.Sequential(*layers)
        self.output = _posterior_layer(units, latent_dim)

    def forward(
        self, x: Float[Tensor, "batch channels *space"]
    ) -> Float[Tensor, "batch parameters"]:
        """Map images to the parameters of q(z|x)."""
        hidden = self.hidden(self.standardise(x))
        parameters: Tensor = self.output(hidden)
        return parameters


class ConvDecoder(nn.Module):
    """Decoder that mirrors :class:`ConvEncoder`, with transposed convolutions.

    Args:
        shape: Shape of one image, (C, H, W), signal or volume, at least 8 a side.
        latent_dim: Number of latent units d.
        width: Number of channels before the last convolution.
        residual: Whether a residual block comes before each convolution.
    """

    def __init__(
        self, shape: Shape, latent_dim: int, width: int, *, residual: bool = False
    ) -> None:
        super().__init__()
        sizes, channels = _pyramid(shape, width)

        units = 8 * width
        coarsest = channels[-1] * math.prod(sizes[-1])
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, units),
            nn.GELU(),
            nn.Linear(units, coarsest),
            nn.GELU(),
            nn.Unflatten(1, (channels[-1], *sizes[-1])),
        ]

        for level in range(len(sizes) - 1, 0, -1):
            if residual:
                layers.append(ResidualBlock(channels[level], len(shape) - 1))

            layers += [_doubling(sizes, channels, level), _activation(len(shape) - 1)]

        # The last convolution gives the mean, without an activation.
        *hidden, output, _ = layers
        self.output = output
        self.hidden = nn.Sequential(*hidden)

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch channels *space"]:
        """Map codes to mean images."""
        mean: Tensor = self.output(self.hidden(z))
        return mean


class ConvHead(nn.Module):
    """Head of one hidden layer for the features of :class:`ConvDecoder`, at half the image's size.

    Args:
        shape: Shape of one image, (C, H, W), signal or volume, at least 8 a side.
        width: Number of channels of the features, and of its own hidden layer.
    """

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        sizes, channels = _pyramid(shape, width)

        n_axes = len(shape) - 1
        convolution = CONVOLUTIONS[n_axes](width, width, 3, padding=1)
        self.hidden = nn.Sequential(convolution, _activation(n_axes))
        self.output = _doubling(sizes, channels, 1)

    def forward(
        self, features: Float[Tensor, "batch width *half_space"]
    ) -> Float[Tensor, "batch channels *space"]:
        """Map features to log-variances."""
        log_var: Tensor = self.output(self.hidden(features))
        return log_var


class ResidualBlock(nn.Module):
    """x + f(x), where f normalises x and applies two 3 x 3 convolutions.

    The normalisation keeps the scale of f(x) from growing with the depth.

    Args:
        channels: Number of channels of the input and the output.
        n_axes: Number of axes besides that of the channels.
    """

    def __init__(self, channels: int, n_axes: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(math.gcd(channels, 8), channels),
            _activation(n_axes),
            CONVOLUTIONS[n_axes](channels, channels, 3, padding=1),
            _activation(n_axes),
            CONVOLUTIONS[n_axes](channels, channels, 3, padding=1),
        )

    def forward(
        self, x: Float[Tensor, "batch channels *space"]
    ) -> Float[Tensor, "batch channels *space"]:
        """Add the residual."""
        change: Tensor = self.body(x)
        return x + change


class Networks(NamedTuple):
    """The classes of an architecture.

    Args:
        encoder: Called with the shape of an example, d and the width. It has a layer
            ``standardise``, see :func:`start_at_data`.
        decoder: Called with the same. It has parts ``hidden`` and ``output``, see
            :func:`build_decoder`.
        head: Called with the shape of an example and the width.
    """

    encoder: Callable[[Shape, int, int], nn.Module]
    decoder: Callable[[Shape, int, int], nn.Module]
    head: Callable[[Shape, int], nn.Module]


NETWORKS: dict[str, Networks] = {
    "mlp": Networks(MLPEncoder, MLPDecoder, MLPHead),
    "conv": Networks(ConvEncoder, ConvDecoder, ConvHead),
    "residual": Networks(
        partial(ConvEncoder, residual=True), partial(ConvDecoder, residual=True), ConvHead
    ),
}
"""The classes of each architecture, by the names of
:data:`equipoise.catalogue.ARCHITECTURES`."""


def _activation(n_axes: int) -> nn.Module:
    """Make the activation after a convolution."""
    return GELU() if n_axes == 2 else nn.GELU()


def _pyramid(shape: Shape, width: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return sizes and channels of all levels, from the image down to the coarsest level.

    The channels double at each level, up to 8 ``width``. There are at least two levels.
    """
    sizes = [tuple(shape[1:])]
    channels = [shape[0]]

    while len(sizes) == 1 or min(sizes[-1]) // 2 >= COARSEST_SIZE:
        sizes.append(tuple(side // 2 for side in sizes[-1]))
        channels.append(min(width * 2 ** (len(sizes) - 2), 8 * width))

    return sizes, channels


def _doubling(sizes: list[tuple[int, ...]], channels: list[int], level: int) -> nn.Module:
    """Make the convolution from a level of the pyramid to the next finer one.

    Halving an odd size loses a row. The output padding adds it again.
    """
    inputs, outputs = channels[level], channels[level - 1]
    padding = [finer - 2 * side for finer, side in zip(sizes[level - 1], sizes[level], strict=True)]
    if len(padding) == 1:
        return nn.ConvTranspose1d(inputs, outputs, 4, 2, 1, padding[0])
    if len(padding) == 2:
        return ConvTranspose2d(inputs, outputs, output_padding=(padding[0], padding[1]))
    planes, rows, columns = padding
    return nn.ConvTranspose3d(inputs, outputs, 4, 2, 1, (planes, rows, columns))


def _posterior_layer(units: int, latent_dim: int) -> nn.Linear:
    """Make the last layer of an encoder, whose first posterior is close to the prior."""
    layer = nn.Linear(units, 2 * latent_dim)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    return layer


def _is_image(shape: Shape) -> bool:
    """Return whether examples of this shape are such that convolutions can take them."""
    return len(shape) - 1 in CONVOLUTIONS and min(shape[1:]) >= MIN_IMAGE_SIZE


def _check(architecture: str, shape: Shape, latent_dim: int, width: int) -> None:
    if architecture not in NETWORKS:
        names = ", ".join(repr(name) for name in NETWORKS)
        raise ValueError(f"architecture must be one of {names}, got {architecture!r}.")

    if latent_dim < 1 or width < 1 or not shape or min(shape) < 1:
        raise ValueError(
            "latent_dim, width and every axis of the data must be at least 1, "
            f"got {latent_dim}, {width} and {shape}."
        )

    if ARCHITECTURES[architecture].needs_images and not _is_image(shape):
        raise ValueError(
            f"architecture={architecture!r} needs images (channels, height, width) of at least "
            f"{MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE} pixels, got examples of shape {shape}; "
            "use architecture='mlp'."
        )
