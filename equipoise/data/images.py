"""From image files to pixels: the common format of all images, and the decoding into it."""

from collections import Counter
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from equipoise.data.arrays import MIN_SIDE
from equipoise.data.dataset import Array, Channels, Fit, Pages
from equipoise.data.frames import (
    Header,
    is_stack,
    open_stack,
    picture_frames,
    read_header,
)
from equipoise.data.gate import BYTES_PER_PIXEL, DECODING, DEFAULT_LIMITS, Limits
from equipoise.text import parse_size

__all__ = ["Header", "Plan", "decode", "make_plan", "plan_notes", "read_header"]

AS_THEY_ARE = 128
"""Longest side, in pixels, of images that are used without cropping or resizing."""

MAIN_SHARE = 0.9
"""Share of the images from which those of another kind are left out, each with the reason."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey, as in Pillow (ITU-R 601)."""


class Plan(NamedTuple):
    """The format to which all images of a source are converted.

    Args:
        shape: Shape of an example, (C, H, W).
        resize: Whether each image is brought to this size. If False, each must have it already.
        crop: Side of the square that is cut out, as a share of the width. None means the largest
            rectangle of the sides of ``shape``.
        fit: How an image of other proportions is brought to the size.
        dtype: Type of the values.
        pages: What becomes of files of several pages.
        n_pages: Pages of each file, where they are channels.
    """

    shape: tuple[int, int, int]
    resize: bool
    crop: float | None = None
    fit: Fit = "crop"
    dtype: str = "uint8"
    pages: Pages = "examples"
    n_pages: int = 1

    @property
    def bands(self) -> int:
        """Number of channels of each page."""
        return self.shape[0] // self.n_pages


def make_plan(
    headers: Counter[Header],
    image_size: int | str | None,
    channels: Channels | None,
    crop: float | None,
    source: str,
    pages: Pages | None = None,
    fit: Fit = "crop",
    *,
    is_wide: bool = False,
) -> Plan:
    """Choose the common format of all images from their headers.

    Args:
        headers: Headers of the readable images, with the number of images that have each.
        image_size: Size in pixels that each image gets, see :func:`equipoise.text.parse_size`.
            None keeps the common size of the images.
        channels: "grey" or "rgb". None means grey if all images are grey, RGB if they are grey and
            coloured, and all bands if they have another number of them. Images with a palette count
            as colour images.
        crop: Side of the square that is cut out; see :class:`Plan`.
        source: Name of the images in error messages.
        pages: What becomes of files of several pages. None means that each page is an example.
        fit: How an image of other proportions is brought to the size.
        is_wide: Whether images of 8 bits become those of 16 in any case, because a model knows
            those. Otherwise they do where some have 16.

    Returns:
        The plan.

    Raises:
        ValueError: If the user has to choose a size, the size is too small, or the images differ in
            what cannot be converted.
    """
    headers = _of_one_kind(headers, source)
    depth = _common_bands(headers, channels, source)
    n_pages = 1
    if pages == "channels":
        numbers = {header.pages for header in headers}
        if len(numbers) > 1:
            listed = ", ".join(map(str, sorted(numbers)[:5]))
            raise ValueError(f"{source}: files of {listed} pages; as channels, all need the same")
        n_pages = numbers.pop()

    # That of 16 bits, where some have 8.
    dtype = max((header.dtype for header in headers), key=lambda name: np.dtype(name).itemsize)
    if is_wide and dtype == "uint8":
        dtype = "uint16"
    plan = Plan(
        (depth * n_pages, 0, 0),
        resize=False,
        fit=fit,
        dtype=dtype,
        pages=pages or "examples",
        n_pages=n_pages,
    )
    if image_size is not None:
        width, height = parse_size(image_size)
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"image_size must be at least {MIN_SIDE}, not {image_size}")
        return plan._replace(shape=(plan.shape[0], height, width), resize=True, crop=crop)

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
            f"{AS_THEY_ARE}, are used as they are: set image_size, for instance to 64 or 64x48, to "
            "cut the centre out of each and resize it (fit=pad and fit=stretch keep all of it)"
        )
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{source}: images of {width}x{height}; each side must be at least {MIN_SIDE}"
        )

    return plan._replace(shape=(plan.shape[0], height, width))


def _kind(header: Header) -> str:
    """Name what decides which images can be in one array: bands, and the unit of the values."""
    bands = "grey and colour" if header.bands in (1, 3) else f"{header.bands} bands"
    if header.dtype in ("uint8", "uint16"):
        # Those of 8 bits are multiplied by 257, where there are some of 16.
        return f"{bands}, 8 or 16 bits"
    return f"{bands}, {header.dtype}"


def _of_one_kind(headers: Counter[Header], source: str) -> Counter[Header]:
    """Headers of the images that make the data set; a few others are left out when decoded."""
    kinds = Counter[str]()
    for header, count in headers.items():
        kinds[_kind(header)] += count

    kind, n_most = kinds.most_common(1)[0]
    if n_most < MAIN_SHARE * kinds.total():
        listed = "; ".join(f"{kind} ({count})" for kind, count in kinds.most_common(5))
        raise ValueError(
            f"{source}: images that do not go together: {listed}: keep them apart, or convert them"
        )
    return Counter({header: n for header, n in headers.items() if _kind(header) == kind})


def _common_bands(headers: Counter[Header], channels: Channels | None, source: str) -> int:
    """Number of channels that the pages of all images get."""
    numbers = {header.bands for header in headers}
    if numbers <= {1, 3}:
        is_grey = channels == "grey" or (channels is None and 3 not in numbers)
        return 1 if is_grey else 3

    if channels is not None:
        raise ValueError(
            f"{source}: images of {next(iter(numbers))} bands do not become {channels}: only "
            "grey and colour images do"
        )
    return next(iter(numbers))


def plan_notes(headers: Counter[Header], plan: Plan, *, for_model: bool = False) -> tuple[str, ...]:
    """List the effects of a plan that a user might not expect.

    Args:
        headers: Headers of the readable images, with the number of images that have each.
        plan: The plan for these images.
        for_model: Whether the size is that of a model, which nobody has asked for.

    Returns:
        One sentence for each effect, with the number of images that it changes.
    """
    _, height, width = plan.shape
    size = f"{width}" if width == height else f"{width}x{height}"
    n_transparent = n_reduced = n_small = n_widened = n_paged = n_pages = n_padded = n_other = 0
    n_of_bands: Counter[int] = Counter()
    for header, count in headers.items():
        n_transparent += count * header.transparent
        n_reduced += count * header.reduced
        if np.dtype(header.dtype).kind == np.dtype(plan.dtype).kind:
            n_of_bands[header.bands] += count
        n_widened += count * (header.dtype == "uint8" and plan.dtype == "uint16")
        if header.pages > 1:
            n_paged += count
            n_pages += count * header.pages
        if plan.resize:
            _, _, inside_width, inside_height = _part(header.width, header.height, plan)
            n_small += count * (inside_width < width and inside_height < height)
            has_bars = plan.fit == "pad" and header.width * height != header.height * width
            n_padded += count * has_bars
            n_other += count * (for_model and (header.width, header.height) != (width, height))

    chosen = {
        "examples": "each page is an example (or pages=channels, pages=first)",
        "channels": "the pages of a file are the channels of an example",
        "first": "only the first page is read",
    }
    counts = {
        "images with transparency, laid on white": n_transparent,
        "images of more than 8 bits, reduced to 8": n_reduced,
        "images of 8 bits taken as those of 16, multiplied by 257": n_widened,
        f"images of other sizes than the model's {size}, resized with fit={plan.fit}": n_other,
        f"images smaller than {size} pixels, enlarged": n_small,
        "images of other proportions, with black bars": n_padded,
    }
    notes = [f"{effect}: {count}" for effect, count in counts.items() if count]
    if min(n_of_bands[1], n_of_bands[3]) and not for_model:
        chosen_bands = "grey" if plan.bands == 1 else "RGB (channels=grey makes all grey)"
        notes.insert(
            0, f"{n_of_bands[1]} grey and {n_of_bands[3]} colour images: all become {chosen_bands}"
        )
    if n_paged:
        files = "1 file has" if n_paged == 1 else f"{n_paged} files have"
        notes.append(f"{files} {n_pages} pages; {chosen[plan.pages]}")
    return tuple(notes)


def decode(file: Path | BytesIO, plan: Plan, limits: Limits = DEFAULT_LIMITS) -> Array:
    """Decode an image file to examples.

    Pages are turned upright, transparency is laid on white, and they are brought to the size of the
    plan. Values keep their depth.

    Args:
        file: Path or content of the image file.
        plan: The format of the result.
        limits: The most that it may claim.

    Returns:
        The examples, (n, C, H, W), of the plan's shape and type: one for each page, or one.

    Raises:
        ValueError: If the file cannot be read, or does not have the size or the bands of the plan.
    """
    all_pages = plan.pages != "first"
    pages = []
    if is_stack(file, limits):
        with open_stack(file, limits) as stack:
            size = stack.header.width * stack.header.height * stack.header.bands
            with DECODING.take(BYTES_PER_PIXEL * size * stack.header.pages):
                values = stack.values()
        pages = [_planned(page, plan) for page in (values if all_pages else values[:1])]
    else:
        needed = partial(_needed, plan=plan) if plan.resize else None
        for frame in picture_frames(file, limits, all_pages=all_pages, needed=needed):
            if isinstance(frame, Image.Image):
                pages.append(_pixels(frame, plan))
            else:
                pages.append(_planned(frame, plan))

    if plan.n_pages == 1:
        return np.stack(pages)
    if len(pages) != plan.n_pages:
        raise ValueError(f"has {len(pages)} pages where its header says {plan.n_pages}")
    return np.concatenate(pages)[None]


def _needed(width: int, height: int, plan: Plan) -> float:
    """Share of the sides of an image with which the resampling decides on the quality."""
    _, _, inside_width, inside_height = _part(width, height, plan)
    return 2 * max(plan.shape[2] / inside_width, plan.shape[1] / inside_height)


def _part(width: int, height: int, plan: Plan) -> tuple[int, int, int, int]:
    """The part of an image of some size that is resized: left, top, width and height."""
    if plan.fit != "crop":
        return 0, 0, width, height

    _, rows, columns = plan.shape
    most = width if plan.crop is None else min(width, round(plan.crop * width))
    # The largest rectangle of the right proportions.
    inside_width = min(most, max(1, round(height * columns / rows)))
    inside_height = min(height, max(1, round(inside_width * rows / columns)))
    return (width - inside_width) // 2, (height - inside_height) // 2, inside_width, inside_height


def _place(width: int, height: int, plan: Plan) -> tuple[int, int]:
    """Width and height of the resized part: those of the plan unless there are bars."""
    _, rows, columns = plan.shape
    if plan.fit != "pad":
        return columns, rows
    scale = min(columns / width, rows / height)
    return max(1, round(scale * width)), max(1, round(scale * height))


def _resized(picture: Image.Image, plan: Plan) -> Image.Image:
    """Bring a picture, of any mode, to the size of the plan."""
    left, top, width, height = _part(picture.width, picture.height, plan)
    # The part is cut out before resizing, because a box that is passed to resize lets pixels from
    # outside it contribute.
    part = picture.crop((left, top, left + width, top + height))
    size = _place(width, height, plan)
    # Pillow widens the kernel when it shrinks an image, so there is no aliasing.
    part = part.resize(size, Image.Resampling.BICUBIC)

    _, rows, columns = plan.shape
    if size == (columns, rows):
        return part
    whole = Image.new(part.mode, (columns, rows))
    whole.paste(part, ((columns - size[0]) // 2, (rows - size[1]) // 2))
    return whole


def _check_dtype(dtype: str, plan: Plan) -> None:
    """Refuse values in another unit than the others."""
    if dtype != plan.dtype and (dtype, plan.dtype) != ("uint8", "uint16"):
        raise ValueError(f"has {dtype} values where the others have {plan.dtype}")


def _check_size(width: int, height: int, plan: Plan) -> None:
    """Refuse an image whose header lied."""
    _, rows, columns = plan.shape
    if (width, height) != (columns, rows):
        raise ValueError(
            f"is {width}x{height} where its header and the others say {columns}x{rows}"
        )


def _pixels(picture: Image.Image, plan: Plan) -> Array:
    """Convert a picture of 8 bits, (C, H, W)."""
    if plan.bands not in (1, 3):
        raise ValueError(f"is a picture where the others have {plan.bands} bands")
    _check_dtype("uint8", plan)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    picture = picture.convert("L" if plan.bands == 1 else "RGB")

    if plan.resize:
        picture = _resized(picture, plan)
    _check_size(picture.width, picture.height, plan)
    values = np.asarray(picture).reshape(picture.height, picture.width, plan.bands)
    if plan.dtype == "uint16":
        values = values.astype(np.uint16) * np.uint16(257)
    return values.transpose(2, 0, 1)


def _planned(values: Array, plan: Plan) -> Array:
    """Convert a page of any depth and bands, (H, W, B), to (C, H, W)."""
    bands = values.shape[2]
    if {bands, plan.bands} == {1, 3}:
        values = _grey(values) if bands == 3 else np.repeat(values, 3, axis=2)
    elif bands != plan.bands:
        raise ValueError(f"has {bands} bands where the others have {plan.bands}")
    _check_dtype(values.dtype.name, plan)
    if values.dtype == np.uint8 and plan.dtype == "uint16":
        values = values.astype(np.uint16) * np.uint16(257)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        n = values.size - np.count_nonzero(np.isfinite(values))
        raise ValueError(f"has {n} values that are NaN or infinite")

    if plan.resize:
        values = np.dstack([_resized_band(values[..., i], plan) for i in range(plan.bands)])
    _check_size(values.shape[1], values.shape[0], plan)
    return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=plan.dtype)


def _grey(values: Array) -> Array:
    """Mix red, green and blue of any depth, (H, W, 3), to grey."""
    grey = values.astype(np.float64) @ np.array(LUMA)
    if values.dtype.kind != "f":
        grey = np.rint(grey)
    return np.asarray(grey[..., None], values.dtype)


def _resized_band(band: Array, plan: Plan) -> Array:
    """Resize one band, (H, W), as real numbers that stay within the range that it had."""
    picture = _resized(
        Image.fromarray(
            band.astype(np.float32),
        ),
        plan,
    )
    low, high = float(band.min()), float(band.max())
    resized = np.asarray(picture).astype(np.float64)
    if plan.fit == "pad":
        low = min(low, 0.0)
    resized = resized.clip(low, high)
    return resized.astype(np.float32) if band.dtype.kind == "f" else np.rint(resized)
