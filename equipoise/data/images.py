"""From one image file to pixels: its header, the common format of all images, and the decoding."""

from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from equipoise.data.arrays import MIN_SIDE
from equipoise.data.dataset import Channels
from equipoise.data.gate import BYTES_PER_PIXEL, DECODING, DEFAULT_LIMITS, Limits, open_image

AS_THEY_ARE = 128
"""Longest side, in pixels, of images that are used without cropping or resizing."""

DEEP_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
GREY_MODES = DEEP_MODES | {"1", "L", "LA", "La", "F"}


class Header(NamedTuple):
    """Properties of an image that are known before its pixels are decoded.

    Width and height are those of the image when it is upright.
    """

    width: int
    height: int
    mode: str
    transparent: bool


class Plan(NamedTuple):
    """The format to which all images of a source are converted.

    Args:
        shape: Shape of the pixels, (C, H, W) with C of 1 or 3.
        resize: Whether a centred square is cut out and resized. If False, each image must have
            the right size already.
        crop: Side of that square as a share of the width. None means the largest square.
    """

    shape: tuple[int, int, int]
    resize: bool
    crop: float | None = None


def read_header(file: Path | BytesIO, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Read the header of an image.

    Args:
        file: Path or content of the image file.
        limits: The most that it may claim.

    Returns:
        Size, mode and transparency of the image.
    """
    with open_image(file, limits) as image:
        width, height = image.size
        # The orientation is read only if it precedes the pixels. Pillow would have to decode a
        # PNG to find one that follows them.
        if "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
            width, height = height, width

        return Header(width, height, image.mode, image.has_transparency_data)


def make_plan(
    headers: Counter[Header],
    image_size: int | None,
    channels: Channels | None,
    crop: float | None,
    source: str,
) -> Plan:
    """Choose the common format of all images from their headers.

    Args:
        headers: Headers of the readable images, with the number of images that have each.
        image_size: Side in pixels of the square that each image becomes. None keeps the common
            size of the images.
        channels: "grey" or "rgb". None means grey if all images are grey, otherwise RGB. Images
            with a palette count as colour images.
        crop: Side of the square that is cut out; see :class:`Plan`.
        source: Name of the images in error messages.

    Returns:
        The plan.

    Raises:
        ValueError: If the user has to choose a size, or the size is too small.
    """
    if channels is None:
        is_grey = all(header.mode in GREY_MODES for header in headers)
        channels = "grey" if is_grey else "rgb"
    depth = 1 if channels == "grey" else 3

    if image_size is not None:
        if image_size < MIN_SIDE:
            raise ValueError(f"image_size must be at least {MIN_SIDE}, not {image_size}")
        return Plan((depth, image_size, image_size), True, crop)

    sizes: Counter[tuple[int, int]] = Counter()
    for header, count in headers.items():
        sizes[header.width, header.height] += count
    (width, height), _ = sizes.most_common(1)[0]

    if len(sizes) > 1 or max(width, height) > AS_THEY_ARE:
        listed = ", ".join(f"{w}x{h} ({count})" for (w, h), count in sizes.most_common(5))
        if len(sizes) > 5:
            listed += f" and {len(sizes) - 5} more sizes"

        raise ValueError(
            f"{source}: images of {listed}; only images of one size, of at most {AS_THEY_ARE}x"
            f"{AS_THEY_ARE}, are used as they are: set image_size, for instance to 64, to cut a "
            "centred square out of each and resize it"
        )
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{source}: images of {width}x{height}; each side must be at least {MIN_SIDE}"
        )

    return Plan((depth, height, width), False)


def plan_notes(headers: Counter[Header], plan: Plan) -> tuple[str, ...]:
    """List the effects of a plan that a user might not expect.

    Args:
        headers: Headers of the readable images, with the number of images that have each.
        plan: The plan for these images.

    Returns:
        One sentence for each effect, with the number of images that it changes.
    """
    size = plan.shape[1]
    n_transparent = n_deep = n_small = 0
    for header, count in headers.items():
        if header.transparent:
            n_transparent += count
        if header.mode in DEEP_MODES:
            n_deep += count
        if plan.resize and _side((header.width, header.height), plan.crop) < size:
            n_small += count

    counts = {
        "images with transparency, laid on white": n_transparent,
        "images of 16 bits, reduced to 8": n_deep,
        f"images smaller than {size} pixels, enlarged": n_small,
    }
    return tuple(f"{effect}: {count}" for effect, count in counts.items() if count)


def decode(
    file: Path | BytesIO, plan: Plan, limits: Limits = DEFAULT_LIMITS
) -> UInt8[np.ndarray, "channel height width"]:
    """Decode an image to 8-bit pixels.

    The image is turned upright, transparency is laid on white, and the image is cropped and
    resized as planned.

    Args:
        file: Path or content of the image file.
        plan: The format of the result.
        limits: The most that it may claim.

    Returns:
        The pixels, with the shape ``plan.shape``.

    Raises:
        ValueError: If the pixels cannot be reduced to 8 bits, or the image does not have the size
            of the plan.
    """
    with open_image(file, limits) as image:
        if plan.resize:
            # A JPEG decodes faster at 1/2, 1/4 or 1/8 of its size. Twice the final size is
            # enough, because the quality then depends only on the resampling below.
            factor = 2 * plan.shape[1] / _side(image.size, plan.crop)
            image.draft(None, (int(image.width * factor), int(image.height * factor)))

        with DECODING.take(BYTES_PER_PIXEL * image.width * image.height):
            return _pixels(image, plan)


def _pixels(image: Image.Image, plan: Plan) -> UInt8[np.ndarray, "channel height width"]:
    """Decode an open image."""
    depth, height, width = plan.shape
    ImageOps.exif_transpose(image, in_place=True)
    picture = _eight_bits(image)

    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    picture = picture.convert("L" if depth == 1 else "RGB")

    if plan.resize:
        side = _side(picture.size, plan.crop)
        left = (picture.width - side) // 2
        top = (picture.height - side) // 2
        # The square is cut out before resizing, because a box that is passed to resize lets
        # pixels from outside it contribute.
        square = picture.crop((left, top, left + side, top + side))
        # Pillow widens the kernel when it shrinks an image, so there is no aliasing.
        picture = square.resize((width, height), Image.Resampling.BICUBIC)

    if picture.size != (width, height):
        raise ValueError(
            f"is {picture.width}x{picture.height} where its header and the others say "
            f"{width}x{height}"
        )
    return np.asarray(picture).reshape(height, width, depth).transpose(2, 0, 1)


def _side(size: tuple[int, int], crop: float | None) -> int:
    """Side of the centred square that is cut out of an image of a given width and height."""
    if crop is None:
        return min(size)
    return min(*size, round(crop * size[0]))


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("has floating-point pixels; save such images as one .npy array")
    if image.mode not in DEEP_MODES:
        return image

    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("has 32-bit pixels; save such images as one .npy array")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
