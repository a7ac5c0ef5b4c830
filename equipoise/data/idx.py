"""The idx format of MNIST: a big-endian header and unsigned bytes, plain or gzipped."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8


def read_idx_images(path: Path) -> UInt8[np.ndarray, "n height width"]:
    """Read an idx file of grey images.

    Args:
        path: Path of the file. The file is memory-mapped, or decompressed into memory if its name
            ends in ``.gz``.

    Returns:
        The images, (N, H, W).

    Raises:
        ValueError: If the file is damaged, incomplete or holds something else. The message names
            the file.
    """
    if path.suffix == ".gz":
        try:
            content = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path} is damaged or incomplete ({error}); fetch it again"
            ) from error
    elif path.stat().st_size:
        content = np.memmap(path, np.uint8, mode="r")
    else:
        # An empty file cannot be memory-mapped.
        content = np.empty(0, np.uint8)

    if len(content) < 16:
        raise ValueError(
            f"{path} is {len(content)} bytes long, shorter than an idx header; fetch it again"
        )

    magic, *shape = struct.unpack(">4I", content[:16].tobytes())
    if magic != 0x0803:  # two zero bytes, type 8 (unsigned byte) and 3 axes
        raise ValueError(
            f"{path} starts with {magic:#010x}; an idx file of images starts with 0x00000803"
        )

    expected = 16 + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path} holds {len(content)} bytes where its header, for an array of {tuple(shape)}, "
            f"announces {expected}; fetch it again"
        )
    return content[16:].reshape(shape)
