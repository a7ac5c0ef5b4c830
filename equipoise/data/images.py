"""From one image file to pixels: what its header says, what all images become, and how one is decoded."""

from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from equipoise.data.arrays import MIN_SIDE
from equipoise.data.dataset import Channels

AS_THEY_ARE = 128
"""Images of one size, with no side longer than this, are used without cropping or resizing."""

DEEP_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
GREY_MODES = DEEP_MODES | {"1", "L", "LA", "La", "F"}


class Header(NamedTuple):
    """What is known of an image before its pixels are decoded, the size as it is to be seen."""

    width: int
    height: int
    mode: str
    transparent: bool


class Plan(NamedTuple):
    """What every image becomes.

    Args:
        shape: (C, H, W) with C of 1 or 3.
        resize: whether to cut out a centred square and resize it; else the size must be right already.
        crop: side of that square as a share of the width; None for the largest square.
    """

    shape: tuple[int, int, int]
    resize: bool
    crop: float | None = None


def read_header(file: Path | BytesIO) -> Header:
    """Read the header of an image.

    Args:
        file: path or content.

    Returns:
        Size, mode and transparency.
    """
    with Image.open(file) as image:
        width, height = image.size
        # Only an orientation that stands before the pixels: asking a PNG for more would decode it.
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
    """Decide what all images become, from all their headers.

    Args:
        headers: of the readable images.
        image_size: side of the square that they become; None to keep the size they share.
        channels: None for grey if all images are grey and else RGB; palettes count as colour.
        crop: see :class:`Plan`.
        source: what to call the images in an error.

    Returns:
        The plan.

    Raises:
        ValueError: if the size has to be chosen, or is too small.
    """
    if channels is None:
        channels = "grey" if all(header.mode in GREY_MODES for header in headers) else "rgb"
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
        more = f" and {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""
        raise ValueError(
            f"{source}: images of {listed}{more}; only images of one size, of at most {AS_THEY_ARE}x"
            f"{AS_THEY_ARE}, are used as they are: set image_size, for instance to 64, to cut a centred "
            "square out of each and resize it"
        )
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{source}: images of {width}x{height}; each side must be at least {MIN_SIDE}"
        )
    return Plan((depth, height, width), False)


def plan_notes(headers: Counter[Header], plan: Plan) -> tuple[str, ...]:
    """Say what the plan does to images that a user might not expect.

    Args:
        headers: of the readable images.
        plan: for them.

    Returns:
        Sentences, with the number of images concerned.
    """

    def tell(sentence: str, chosen: list[int]) -> list[str]:
        return [f"images {sentence}: {sum(chosen)}"] if chosen else []

    size = plan.shape[1]
    return (
        *tell("with transparency, laid on white", [n for h, n in headers.items() if h.transparent]),
        *tell("of 16 bits, reduced to 8", [n for h, n in headers.items() if h.mode in DEEP_MODES]),
        *tell(
            f"smaller than {size} pixels, enlarged",
            [
                n
                for h, n in headers.items()
                if plan.resize and _side((h.width, h.height), plan.crop) < size
            ],
        ),
    )


def decode(file: Path | BytesIO, plan: Plan) -> UInt8[np.ndarray, "channel height width"]:
    """Decode an image: turn it upright, lay transparency on white, reduce to 8 bits, crop and resize.

    Args:
        file: path or content.
        plan: what to make of it.

    Returns:
        Pixels, of ``plan.shape``.

    Raises:
        ValueError: if the pixels have no 8-bit meaning or the image is not of the size of the plan.
    """
    depth, height, width = plan.shape
    with Image.open(file) as image:
        if plan.resize:
            # A JPEG decodes faster at 1/2, 1/4 or 1/8 of its size; twice what is needed leaves the quality
            # to the resampling below.
            factor = 2 * height / _side(image.size, plan.crop)
            image.draft(None, (int(image.width * factor), int(image.height * factor)))
        ImageOps.exif_transpose(image, in_place=True)
        picture = _eight_bits(image)
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        picture = picture.convert("L" if depth == 1 else "RGB")
        if plan.resize:
            side = _side(picture.size, plan.crop)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            # Cut first: a box given to resize lets pixels from outside it in. Pillow widens the kernel when
            # it shrinks an image, so that this antialiases.
            square = picture.crop((left, top, left + side, top + side))
            picture = square.resize((width, height), Image.Resampling.BICUBIC)
        if picture.size != (width, height):
            found = f"{picture.width}x{picture.height}"
            raise ValueError(f"is {found} where its header and the others say {width}x{height}")
        return np.asarray(picture).reshape(height, width, depth).transpose(2, 0, 1)


def _side(size: tuple[int, int], crop: float | None) -> int:
    return min(size) if crop is None else min(*size, round(crop * size[0]))


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("has floating-point pixels; save such images as one .npy array")
    if image.mode not in DEEP_MODES:
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("has 32-bit pixels; save such images as one .npy array")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
