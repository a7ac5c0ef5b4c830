"""From one image file to its frames, each at the full depth of the file and with all its bands.

Pillow reads pictures of 8 bits, and one band of any depth. It keeps the upper byte of deep colour
images alone, so that these are read once more for the lower one. TIFF files of other bands, and
stacks with named axes (OME, ImageJ), are read by the library ``tifffile``, of the extra ``images``.
"""

import logging
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from equipoise.data.dataset import Array
from equipoise.data.gate import BYTES_PER_PIXEL, DECODING, DEFAULT_LIMITS, Limits, open_image
from equipoise.files import check_regular

GREY_MODES = frozenset({"1", "L", "LA", "La", "F", "I", "I;16", "I;16L", "I;16B", "I;16N"})
PAGED_FORMATS = frozenset({"GIF", "PNG", "TIFF", "WEBP"})
"""Formats whose files may hold several pages. Further pictures in a JPEG are previews."""

MOST_PAGES = 100_000
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_PACKINGS = (1, 5, 8, 32773, 32946)
"""Compressions of TIFF files for tifffile: none, LZW, Deflate, PackBits and old Deflate."""
DEFLATE = (8, 32946)
NAMED_AXES = ("ImageJ=", "<OME", "<?xml")
"""Beginnings of the descriptions of TIFF stacks whose axes have names."""
INSTALL = "it needs tifffile: pip install 'equipoise[images]'"


# Of files that tifffile reads, Pillow would say this on the terminal, once for each.
logging.getLogger("PIL.TiffImagePlugin").addFilter(
    lambda record: not str(record.msg).startswith("More samples per pixel")
)


class Header(NamedTuple):
    """Properties of an image that are known before its pixels are decoded.

    Args:
        width: Width of the image when it is upright.
        height: Height of the image when it is upright.
        mode: Pillow's name for its pixels; empty for a file that tifffile reads.
        transparent: Whether it has transparency.
        bands: Number of channels, without transparency.
        dtype: Type of its values at full depth.
        pages: Number of pages.
        reduced: Whether it has more than the 8 bits that are read.
    """

    width: int
    height: int
    mode: str
    transparent: bool
    bands: int = 3
    dtype: str = "uint8"
    pages: int = 1
    reduced: bool = False


def read_header(file: Path | BytesIO, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Read the header of an image.

    Args:
        file: Path or content of the image file.
        limits: The most that it may claim.

    Returns:
        Its properties.

    Raises:
        ValueError: If it is no image that can be read, or claims more than the limits.
    """
    if is_stack(file, limits):
        with open_stack(file, limits) as stack:
            return stack.header

    with open_image(file, limits) as image:
        width, height = image.size
        # The orientation is read only if it precedes the pixels. Pillow would have to decode a
        # PNG to find one that follows them.
        if "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
            width, height = height, width

        dtype, bands = _layout(image)
        return Header(
            width,
            height,
            image.mode,
            image.has_transparency_data,
            bands,
            dtype,
            _count_pages(image),
            dtype == "uint8" and _is_deep(image),
        )


def is_stack(file: Path | BytesIO, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Tell whether an image file is one for tifffile, and not for Pillow.

    Args:
        file: Path or content of the image file.
        limits: The most that it may claim.

    Returns:
        True for TIFF files with other bands than those of pictures, or with named axes.
    """
    if not _is_tiff(file):
        return False

    try:
        with open_image(file, limits) as image:
            tags: Any = getattr(image, "tag_v2", {})
            description = str(tags.get(270, ""))
            has_names = description.startswith(NAMED_AXES) and _count_pages(image) > 1
            # Four bands are colours and transparency, or four inks, only if the file says so.
            is_picture = tags.get(262) == 5 or any(kind in (1, 2) for kind in tags.get(338, ()))
            n_bands = tags.get(277, 1)
            has_bands = n_bands in (2, 4) and not is_picture
            is_in_planes = n_bands > 1 and tags.get(258, (8,))[0] > 8 and tags.get(284) == 2
            return has_names or has_bands or is_in_planes
    except ValueError as error:
        return "no image that can be read" in str(error)


def _is_tiff(file: Path | BytesIO) -> bool:
    """Tell whether a file begins as a TIFF file does."""
    if isinstance(file, BytesIO):
        return file.getvalue()[:4] in TIFF_STARTS
    check_regular(file)
    with file.open("rb") as content:
        return content.read(4) in TIFF_STARTS


def picture_frames(
    file: Path | BytesIO,
    limits: Limits,
    *,
    all_pages: bool,
    needed: Callable[[int, int], float] | None = None,
) -> Iterator[Image.Image | Array]:
    """Read the pages of a file that Pillow reads, upright.

    Args:
        file: Path or content of the image file.
        limits: The most that it may claim.
        all_pages: Whether to read all pages, and not only the first.
        needed: Returns the share of the sides that is needed at least, from width and height. A
            JPEG decodes faster at 1/2, 1/4 or 1/8 of its size.

    Yields:
        Pictures of 8 bits as Pillow has them, and others as arrays, (H, W, B).
    """
    with open_image(file, limits) as image:
        if needed is not None:
            factor = needed(image.width, image.height)
            image.draft(None, (int(image.width * factor), int(image.height * factor)))

        n_pages = _count_pages(image) if all_pages else 1
        for page in range(n_pages):
            if page:
                image.seek(page)
            with DECODING.take(BYTES_PER_PIXEL * image.width * image.height):
                dtype, bands = _layout(image)
                if dtype == "uint8":
                    # Later pages are decoded over this one.
                    yield ImageOps.exif_transpose(image) if n_pages > 1 else _upright(image)
                elif bands == 1:
                    yield _values(_upright(image), dtype)[..., None]
                else:
                    yield _both_bytes(file, image, page, limits)


def _upright(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _count_pages(image: Image.Image) -> int:
    """Number of pages of an open image."""
    if image.format not in PAGED_FORMATS:
        return 1
    number = int(getattr(image, "n_frames", 1))
    if number > MOST_PAGES:
        raise ValueError(f"it has {number:,} pages, more than {MOST_PAGES:,}; divide it")
    return number


def _tiles(image: Image.Image) -> list[Any]:
    """Where the pixels of an open image lie in its file, and how."""
    return list(getattr(image, "tile", ()))


def _raw_mode(image: Image.Image) -> str:
    """How the pixels lie in the file, as Pillow names it."""
    tiles = _tiles(image)
    if not tiles:
        return ""
    arguments = tiles[0].args
    if isinstance(arguments, tuple | list):
        arguments = arguments[0] if arguments else ""
    return str(arguments)


def _is_deep(image: Image.Image) -> bool:
    """Tell whether the file has more than 8 bits where Pillow has a picture of 8 bits."""
    if image.format == "PPM" and _tiles(image):
        arguments = _tiles(image)[0].args
        return bool(image.mode == "RGB" and isinstance(arguments, tuple) and arguments[-1] > 255)
    return ";16" in _raw_mode(image)


def _layout(image: Image.Image) -> tuple[str, int]:
    """Type of the values at full depth, and number of bands without transparency."""
    if image.mode == "F":
        return "float32", 1
    if image.mode.startswith("I;16"):
        return "uint16", 1
    if image.mode == "I":
        if image.format in ("PNG", "PPM"):
            return "uint16", 1
        tags: Any = getattr(image, "tag_v2", {})
        sign = "int" if tags.get(339, (1,))[0] == 2 else "uint"
        bits = tags.get(258, (32,))[0]
        return f"{sign}{16 if bits <= 16 else 32}", 1

    bands = 1 if image.mode in GREY_MODES else 3
    kind, _, order = _raw_mode(image).partition(";")
    if kind in ("RGB", "RGBA") and order in ("16B", "16L", "16N") and len(_tiles(image)) == 1:
        return "uint16", bands
    return "uint8", bands


def _values(image: Image.Image, dtype: str) -> Array:
    """Values of a picture of one band, (H, W)."""
    values = np.asarray(image)
    if dtype == "uint32":
        return values.view(np.uint32)
    return values.astype(dtype)


def _both_bytes(file: Path | BytesIO, image: Image.Image, page: int, limits: Limits) -> Array:
    """Values of a colour image of 16 bits, (H, W, 3), on white where it is transparent.

    Pillow decodes the upper byte of each value. Told of the other order, it decodes the lower one.
    """
    upper = np.asarray(_upright(image)).astype(np.uint16)
    with open_image(file, limits) as again:
        if page:
            again.seek(page)
        turned = [tile._replace(args=_in_other_order(tile.args)) for tile in _tiles(again)]
        again.tile = turned  # type: ignore[attr-defined]
        lower = np.asarray(_upright(again)).astype(np.uint16)

    return on_white(upper << 8 | lower, has_alpha=upper.shape[2] == 4)


def _in_other_order(arguments: Any) -> Any:  # noqa: ANN401 (a mode, or a tuple that begins with it)
    if not isinstance(arguments, str):
        return (_in_other_order(arguments[0]), *arguments[1:])
    kind, _, order = arguments.partition(";")
    native = "16L" if sys.byteorder == "little" else "16B"
    order = native if order == "16N" else order
    return f"{kind};{'16L' if order == '16B' else '16B'}"


def on_white(values: Array, *, has_alpha: bool) -> Array:
    """Lay an image on white.

    Args:
        values: Unsigned whole numbers, (H, W, B).
        has_alpha: Whether the last band is the opacity.

    Returns:
        The image without that band.
    """
    if not has_alpha:
        return values
    white = np.iinfo(values.dtype).max
    opacity = values[..., -1:].astype(np.float64) / white
    laid = values[..., :-1] * opacity + white * (1 - opacity)
    return np.rint(laid).astype(values.dtype)


class Stack(NamedTuple):
    """An open TIFF file of pages and bands.

    Args:
        header: Its properties.
        series: Its values, as tifffile has them.
        order: Axes of the values, with those of the pages first and those of the bands last.
        has_alpha: Whether the last band is the opacity.
    """

    header: Header
    series: Any
    order: tuple[int, ...]
    has_alpha: bool

    def values(self) -> Array:
        """Read the values.

        Returns:
            The pages, (P, H, W, B).
        """
        header = self.header
        array = np.transpose(self.series.asarray(), self.order)
        n_bands = header.bands + self.has_alpha
        array = array.reshape(header.pages, header.height, header.width, n_bands)
        if array.dtype == bool:
            array = array.astype(np.uint8) * np.uint8(255)
        return on_white(array.astype(header.dtype, copy=False), has_alpha=self.has_alpha)


@contextmanager
def open_stack(file: Path | BytesIO, limits: Limits = DEFAULT_LIMITS) -> Iterator[Stack]:
    """Open a TIFF file by tifffile.

    Args:
        file: Path or content of the file.
        limits: The most that it may claim.

    Yields:
        The file.

    Raises:
        ValueError: If tifffile is missing, if the file cannot be read, or claims too much.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(f"a TIFF file of several bands or named axes; {INSTALL}") from error

    if isinstance(file, BytesIO):
        file.seek(0)
    # What it would say on the terminal is in the reason, too.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with ExitStack() as opened:
        try:
            tiff = opened.enter_context(tifffile.TiffFile(file))
            series = tiff.series[0]
        except Exception as error:  # a damaged file may cause any exception
            raise ValueError(f"not an image ({error})") from error
        stack = _described(series)
        _check_claim(tiff, series, stack.header, limits)
        yield stack


def _described(series: Any) -> Stack:  # noqa: ANN401 (an object of tifffile)
    """Sort the axes of a series of pages."""
    axes, shape, page = str(series.axes), tuple(series.shape), series.keyframe
    if axes.count("Y") != 1 or axes.count("X") != 1:
        raise ValueError(f"its axes {axes} of {shape} are not those of images")

    is_band = [axis in "SC" for axis in axes]
    first = [i for i, axis in enumerate(axes) if axis not in "YXSC"]
    order = (*first, axes.index("Y"), axes.index("X"), *(i for i, it in enumerate(is_band) if it))
    n_bands = int(np.prod([n for n, it in zip(shape, is_band, strict=True) if it], dtype=np.int64))
    n_pages = int(np.prod([shape[i] for i in first], dtype=np.int64))

    kind = np.dtype(series.dtype)
    dtype = {"b": "uint8", "f": "float32"}.get(kind.kind, kind.name)
    if dtype not in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"):
        raise ValueError(f"it has values of {kind}; save them as float32 or with up to 32 bits")

    has_opacity = any(int(kind) in (1, 2) for kind in page.extrasamples)
    has_alpha = has_opacity and kind.kind == "u" and n_bands in (2, 4) and axes[-1] == "S"
    header = Header(
        shape[axes.index("X")],
        shape[axes.index("Y")],
        "",
        has_alpha,
        n_bands - has_alpha,
        dtype,
        n_pages,
    )
    return Stack(header, series, order, has_alpha)


def _check_claim(tiff: Any, series: Any, header: Header, limits: Limits) -> None:  # noqa: ANN401
    """Refuse what would unpack to more than it may, before anything of that size is allocated."""
    if header.width * header.height > limits.max_pixels:
        raise ValueError(
            f"it has {header.width} x {header.height} pixels, more than {limits.max_pixels:,}; "
            "make it smaller, or raise max_pixels"
        )
    if header.pages > MOST_PAGES:
        raise ValueError(f"it has {header.pages:,} pages, more than {MOST_PAGES:,}; divide it")
    if series.nbytes > 2 * tiff.filehandle.size + limits.max_bytes:
        raise ValueError(f"it unpacks to {series.nbytes:,} bytes; divide it, or raise max_bytes")

    for page in series.pages:
        if page is None or int(page.compression) == 1:
            continue
        if int(page.compression) not in TIFF_PACKINGS:
            raise ValueError(
                "it is compressed in an unusual way; save it without compression, or with Deflate"
            )
        if int(page.compression) in DEFLATE:
            _check_deflated(tiff, page)


def _check_deflated(tiff: Any, page: Any) -> None:  # noqa: ANN401 (objects of tifffile)
    """Refuse a part that unpacks to more than its place: tifffile unpacks all of it."""
    size = int(np.prod(page.chunks, dtype=np.int64)) * np.dtype(page.dtype).itemsize
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        tiff.filehandle.seek(offset)
        content = tiff.filehandle.read(count)
        if len(zlib.decompressobj().decompress(content, size + 1)) > size:
            raise ValueError("a part of it unpacks to more than its place in the image")
