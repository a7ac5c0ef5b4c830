"""The table of the page on image files: every format and type, and what becomes of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.data import load
from equipoise.model import Scaling
from tests.test_data_frames import folder_of, png16, write_pages, write_tiff

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "your-images.md"
N, SIDE = 12, 9
HEAD = (
    "| Files | Values | Example | Stored as | x = 0 and 1 | Every value comes back |",
    "|---|---|---|---|---|---|",
)


def values(dtype, bands=1):
    """Examples over the whole range of a type, (N, H, W, B)."""
    rng = np.random.default_rng(0)
    shape = (N, SIDE, SIDE, bands)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    drawn = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    drawn.flat[:2] = info.min, info.max
    return drawn


def camera(n_bits):
    pixels = values("uint16") >> (16 - n_bits)
    return pixels[..., 0]


def pillow(kind, **options):
    def write(path, example):
        pixels = example[..., 0] if example.shape[2] == 1 else example
        Image.fromarray(pixels).save(path.with_suffix(f".{kind}"), **options)

    return write


def deep_png(path, example):
    path.with_suffix(".png").write_bytes(png16(example))


def frames(path, example):
    pages = [Image.fromarray(example[..., i]) for i in range(example.shape[2])]
    pages[0].save(path.with_suffix(".gif"), save_all=True, append_images=pages[1:])


FILES = {
    "PNG, grey": ("uint8", 1, pillow("png")),
    "PNG, RGB": ("uint8", 3, pillow("png")),
    "PNG, RGB and transparency": ("uint8", 4, pillow("png")),
    "PNG, grey of 16 bits": ("uint16", 1, deep_png),
    "PNG, RGB of 16 bits": ("uint16", 3, deep_png),
    "PNG, RGB of 16 bits and transparency": ("uint16", 4, deep_png),
    "JPEG": ("uint8", 3, pillow("jpg", quality=95)),
    "BMP": ("uint8", 3, pillow("bmp")),
    "WebP, lossless": ("uint8", 3, pillow("webp", lossless=True)),
    "PGM of 16 bits": ("uint16", 1, pillow("pgm")),
    "GIF of 5 frames": ("uint8", 5, frames),
    "TIFF": ("uint8", 1, write_tiff),
    "TIFF, 16 bits": ("uint16", 1, write_tiff),
    "TIFF, 16 bits with a sign": ("int16", 1, write_tiff),
    "TIFF, RGB of 16 bits": ("uint16", 3, write_tiff),
    "TIFF, 32 bits": ("uint32", 1, write_tiff),
    "TIFF, float": ("float32", 1, write_tiff),
    "TIFF, 2 bands": ("uint8", 2, write_tiff),
    "TIFF, 4 bands": ("uint8", 4, write_tiff),
    "TIFF, 5 bands of 16 bits": ("uint16", 5, write_tiff),
    "TIFF, 200 bands, float": ("float32", 200, write_tiff),
    "TIFF of 5 pages": ("uint16", 5, write_pages),
}
ARRAYS = {
    "bool": values("uint8")[..., 0] > 127,
    "uint8": values("uint8")[..., 0],
    "int8": values("int8")[..., 0],
    "uint16": values("uint16")[..., 0],
    "uint16, 12 bits used": camera(12),
    "uint16, 8 bits used": camera(8),
    "int16": values("int16")[..., 0],
    "int32, up to 2^24 levels": values("int32")[..., 0] >> 8,
    "int32, more levels": values("int32")[..., 0],
    "int64, up to 2^24 levels": values("int64")[..., 0] >> 40,
    "float32 in [0, 1]": values("float32")[..., 0],
    "float32, other": values("float32")[..., 0] * 8 - 2,
    "float64 in [0, 1]": values("float64")[..., 0],
    "float16 in [0, 1]": values("float16")[..., 0],
    "uint8, (N, C, H, W) of 5": values("uint8", 5).transpose(0, 3, 1, 2),
    "uint8, (N, H, W, C) of 5": values("uint8", 5),
}


def row(title, data, kind):
    """One row of the table, measured."""
    scaling = Scaling(torch.as_tensor(data.offset), torch.as_tensor(data.scale), data.quantum)
    parts = (data.train, data.validation, data.test)
    raw = torch.from_numpy(np.concatenate([part[:] for part in parts]))
    found = np.concatenate([part.base[part.indices] for part in parts]).astype(np.float64)
    error = np.abs(scaling.restore(scaling(raw)).double().numpy() - found).max()
    returns = f"to {error / float(scaling.scale):.0e} of the range" if error else "to the bit"

    base = data.train.base
    stored = f"{data.train.dtype}"
    n_channels, *_ = data.shape
    example = f"{n_channels} x {data.shape[1]} x {data.shape[2]}"
    if len(base) != N:
        example += f", {len(base) // N} of each file"
    low, high = float(data.offset), float(data.offset + data.scale)
    return f"| {title} | {kind} | {example} | {stored} | {low:.9g}, {high:.9g} | {returns} |"


def table(folder):
    """All rows, in order."""
    lines = list(HEAD)
    for number, (title, (dtype, bands, write)) in enumerate(FILES.items()):
        files = folder_of(folder / str(number), values(dtype, bands), write)
        lines.append(row(title, load(files, cache_dir=folder / "cache"), dtype))
    for title, array in ARRAYS.items():
        np.save(folder / "array.npy", array)
        lines.append(row("`.npy`", load(folder / "array.npy"), title))
    return "\n".join(lines)


def test_the_table_of_the_page_is_what_happens(tmp_path):
    pytest.importorskip("tifffile")
    measured = table(tmp_path)
    assert measured in PAGE.read_text(encoding="utf-8"), measured


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        print(table(Path(made)))
