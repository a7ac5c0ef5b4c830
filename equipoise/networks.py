r"""Encoder and decoder pairs for tables and for images of any size from 8 pixels and any number of channels.

An encoder maps data (B, \*) to the (B, 2d) parameters of q(z|x), mean and log-variance; a decoder maps codes
(B, d) to means (B, \*). Nothing here is special: any ``nn.Module`` with these shapes serves as either.

Three choices are made for real-valued data. The *output layer is linear*: the mean of a Gaussian may be any real
number, and images do reach 0 and 1, where a sigmoid needs infinite inputs and returns vanishing gradients (where the
data have bounds, :class:`equipoise.model.VAE` clamps the mean to them, and keeps the gradients). The
*input is standardised* by the training data's mean and std, and the decoder's *first output is that mean* (see
:func:`start_at_data`), so the first residual variance (10) is about the data's. The *last layers start small*, so the
first posterior is close to the prior, the KL starts near zero and training begins from balance.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.catalogue import ARCHITECTURES
from equipoise.kernels import GELU, ConvTranspose2d

Shape = tuple[int, ...]

MIN_IMAGE_SIZE = 8
COARSEST_SIZE = 4
"""Images are halved while the next size would stay at or above this one: 28 -> 14 -> 7, 64 -> 32 -> 16 -> 8 -> 4."""


def build_encoder(architecture: str, shape: Shape, latent_dim: int, width: int) -> nn.Module:
    r"""Make the encoder half of a pair.

    Args:
        architecture: "mlp", "conv" or "residual".
        shape: one example's shape, (C, H, W) for images or (D,) for rows of a table.
        latent_dim: d.
        width: channels of the first convolution (doubled at each halving of the image), or 1/8 of the units of
            a fully connected layer.

    Returns:
        Module from (B, \*shape) to (B, 2 d): mean and log-variance side by side.

    Raises:
        ValueError: if the architecture does not fit the shape.
    """
    _check(architecture, shape, latent_dim, width)
    make_encoder, _ = NETWORKS[architecture]
    return make_encoder(shape, latent_dim, width)


def build_decoder(architecture: str, shape: Shape, latent_dim: int, width: int) -> nn.Module:
    r"""Make the decoder half of a pair; also the shape of a variance network, which maps codes to log-variances.

    Args:
        architecture: "mlp", "conv" or "residual".
        shape: one example's shape, (C, H, W) or (D,).
        latent_dim: d.
        width: as for :func:`build_encoder`.

    Returns:
        Module from (B, d) to (B, \*shape), whose last layer is its attribute ``output``.

    Raises:
        ValueError: if the architecture does not fit the shape.
    """
    _check(architecture, shape, latent_dim, width)
    _, make_decoder = NETWORKS[architecture]
    return make_decoder(shape, latent_dim, width)


def default_architecture(shape: Shape) -> str:
    """Convolutions for images, fully connected layers for the rest.

    Args:
        shape: one example's shape.

    Returns:
        "conv" for (C, H, W) of at least 8 pixels a side, otherwise "mlp".
    """
    return "conv" if len(shape) == 3 and min(shape[1:]) >= MIN_IMAGE_SIZE else "mlp"


@torch.no_grad()
def start_at_data(encoder: nn.Module, decoder: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Fit an untrained pair of this module to the scale of the data.

    Args:
        encoder: Its layer ``standardise`` takes the mean and std of the data.
        decoder: Its layer ``output`` takes the mean as its bias, and starts with small weights. A
            convolution takes one mean per channel.
        mean: Mean of the training data, one example's shape, model units.
        std: Standard deviation over all dimensions, a scalar, model units.

    Raises:
        ValueError: if the networks are not of this module.
    """
    standardise = getattr(encoder, "standardise", None)
    output = getattr(decoder, "output", None)
    if not isinstance(standardise, Standardise) or not isinstance(output, nn.Module):
        raise ValueError("start_at_data knows the networks of networks.py only.")

    standardise.mean.copy_(mean.mean())
    standardise.std.copy_(std)

    cast(Tensor, output.weight).mul_(0.1)
    bias = cast(Tensor, output.bias)
    is_per_channel = len(bias) != mean.numel()
    bias.copy_(mean.mean(dim=(1, 2)) if is_per_channel else mean.flatten())


class Standardise(nn.Module):
    """(x - mean) / std with one fixed mean and std, of the training data."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Standardise."""
        return (x - self.mean) / self.std


class MLPEncoder(nn.Module):
    """Two hidden layers of 8 ``width`` units.

    Args:
        shape: one example's shape; flattened.
        latent_dim: d.
        width: 1/8 of the units of a layer.
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
        parameters: Tensor = self.output(self.hidden(self.standardise(x)))
        return parameters


class MLPDecoder(nn.Module):
    """Mirror image of :class:`MLPEncoder`.

    Args:
        shape: one example's shape.
        latent_dim: d.
        width: 1/8 of the units of a layer.
    """

    def __init__(self, shape: Shape, latent_dim: int, width: int) -> None:
        super().__init__()
        units = 8 * width
        self.shape = shape
        self.hidden = nn.Sequential(
            nn.Linear(latent_dim, units), nn.GELU(), nn.Linear(units, units), nn.GELU()
        )
        self.output = nn.Linear(units, math.prod(shape))

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch *event"]:
        """Map codes to means."""
        mean: Tensor = self.output(self.hidden(z))
        return mean.view(-1, *self.shape)


class ConvEncoder(nn.Module):
    """Strided convolutions that halve the image and double the channels, then one hidden layer.

    Args:
        shape: (C, H, W), at least 8 x 8.
        latent_dim: d.
        width: channels after the first convolution.
        residual: put a residual block after each convolution.
    """

    def __init__(
        self, shape: Shape, latent_dim: int, width: int, *, residual: bool = False
    ) -> None:
        super().__init__()
        sizes, channels = _pyramid(shape, width)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), GELU()]
            if residual:
                layers.append(ResidualBlock(outputs))
        units = 8 * width
        self.standardise = Standardise()
        self.hidden = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels[-1] * math.prod(sizes[-1]), units), nn.GELU()
        )
        self.output = _posterior_layer(units, latent_dim)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch parameters"]:
        """Map images to the parameters of q(z|x)."""
        parameters: Tensor = self.output(self.hidden(self.standardise(x)))
        return parameters


class ConvDecoder(nn.Module):
    """Mirror image of :class:`ConvEncoder`, with transposed convolutions.

    Args:
        shape: (C, H, W), at least 8 x 8.
        latent_dim: d.
        width: channels before the last convolution.
        residual: put a residual block before each convolution.
    """

    def __init__(
        self, shape: Shape, latent_dim: int, width: int, *, residual: bool = False
    ) -> None:
        super().__init__()
        sizes, channels = _pyramid(shape, width)
        self.shape = shape
        units = 8 * width
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, units),
            nn.GELU(),
            nn.Linear(units, channels[-1] * math.prod(sizes[-1])),
            nn.GELU(),
            nn.Unflatten(1, (channels[-1], *sizes[-1])),
        ]
        for level in range(len(sizes) - 1, 0, -1):
            if residual:
                layers.append(ResidualBlock(channels[level]))
            # Halving an odd size loses a row; the output padding brings it back.
            (big_height, big_width), (height, breadth) = sizes[level - 1], sizes[level]
            odd = (big_height - 2 * height, big_width - 2 * breadth)
            up = ConvTranspose2d(channels[level], channels[level - 1], output_padding=odd)
            layers += [up, GELU()] if level > 1 else [up]
        self.output = up
        self.hidden = nn.Sequential(*layers[:-1])

    def forward(
        self, z: Float[Tensor, "batch latent"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Map codes to mean images."""
        mean: Tensor = self.output(self.hidden(z))
        return mean


class ResidualBlock(nn.Module):
    """x + f(x) with two 3 x 3 convolutions, normalised so that depth does not change the scale.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(math.gcd(channels, 8), channels),
            GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Add the residual."""
        change: Tensor = self.body(x)
        return x + change


NETWORKS: dict[
    str,
    tuple[Callable[[Shape, int, int], nn.Module], Callable[[Shape, int, int], nn.Module]],
] = {
    "mlp": (MLPEncoder, MLPDecoder),
    "conv": (ConvEncoder, ConvDecoder),
    "residual": (partial(ConvEncoder, residual=True), partial(ConvDecoder, residual=True)),
}
"""How encoder and decoder of each architecture are made from the shape of an example, d and the
width. The names are those of :data:`equipoise.catalogue.ARCHITECTURES`.

An encoder has a layer ``standardise``, a decoder a last layer ``output``; see
:func:`start_at_data`."""


def _pyramid(shape: Shape, width: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Sizes and channels from the image down to the coarsest level; channels stop growing at 8 ``width``."""
    sizes, channels = [(shape[1], shape[2])], [shape[0]]
    while not sizes[1:] or min(sizes[-1]) // 2 >= COARSEST_SIZE:
        height, breadth = sizes[-1]
        sizes.append((height // 2, breadth // 2))
        channels.append(min(width * 2 ** (len(sizes) - 2), 8 * width))
    return sizes, channels


def _posterior_layer(units: int, latent_dim: int) -> nn.Linear:
    layer = nn.Linear(units, 2 * latent_dim)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    return layer


def _check(architecture: str, shape: Shape, latent_dim: int, width: int) -> None:
    if architecture not in NETWORKS:
        names = ", ".join(repr(name) for name in NETWORKS)
        raise ValueError(f"architecture must be one of {names}, got {architecture!r}.")

    if latent_dim < 1 or width < 1 or not shape or min(shape) < 1:
        raise ValueError(
            "latent_dim, width and every axis of the data must be at least 1, "
            f"got {latent_dim}, {width} and {shape}."
        )

    needs_images = ARCHITECTURES[architecture].needs_images
    if needs_images and (len(shape) != 3 or min(shape[1:]) < MIN_IMAGE_SIZE):
        raise ValueError(
            f"architecture={architecture!r} needs images (channels, height, width) of at least "
            f"{MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE} pixels, got examples of shape {shape}; "
            "use architecture='mlp'."
        )
