"""The idx format of MNIST: a big-endian header and unsigned bytes, plain or gzipped."""

import math
import struct
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from equipoise.data.gate import DEFAULT_LIMITS, Limits, read_gzip
from equipoise.files import check_regular

N_HEADER = 16
"""Bytes of the header: what the file holds, and the length of its three axes."""


def read_idx_labels(path: Path, limits: Limits = DEFAULT_LIMITS) -> UInt8[np.ndarray, " n"]:
    """Read an idx file of labels.

    Args:
        path: Path of the file, also with ``.gz``.
        limits: The most that it may unpack to.

    Returns:
        The labels, (N,).

    Raises:
        ValueError: If the file is damaged, incomplete, too large or holds something else.
    """
    check_regular(path)
    if path.suffix == ".gz":
        try:
            content = read_gzip(path, 8, lambda header: 8 + _count_of_labels(header), limits)
        except ValueError as error:
            raise ValueError(f"{path} {error}; fetch it again") from error
    else:
        content = path.read_bytes()

    try:
        n = _count_of_labels(content[:8])
    except ValueError as error:
        raise ValueError(f"{path} {error}; fetch it again") from error
    if len(content) != 8 + n:
        raise ValueError(f"{path} holds {len(content) - 8} labels of {n}; fetch it again")
    return np.frombuffer(content, np.uint8, offset=8)


def _count_of_labels(header: bytes) -> int:
    """Number of labels, as the header of their file says."""
    if len(header) < 8:
        raise ValueError(f"is {len(header)} bytes long, shorter than an idx header")
    magic, n = struct.unpack(">2I", header)
    if magic != 0x0801:  # two zero bytes, type 8 (unsigned byte) and 1 axis
        raise ValueError(f"starts with {magic:#010x}; an idx file of labels starts with 0x00000801")
    return int(n)


def read_idx_images(
    path: Path, limits: Limits = DEFAULT_LIMITS
) -> UInt8[np.ndarray, "n height width"]:
    """Read an idx file of grey images.

    Args:
        path: Path of the file. The file is memory-mapped, or decompressed into memory if its name
            ends in ``.gz``.
        limits: The most that it may unpack to.

    Returns:
        The images, (N, H, W).

    Raises:
        ValueError: If the file is damaged, incomplete, too large or holds something else. The
            message names the file.
    """
    if path.suffix == ".gz":
        try:
            unpacked = read_gzip(path, N_HEADER, lambda header: _announced(header)[0], limits)
        except ValueError as error:
            raise ValueError(f"{path} {error}; fetch it again") from error
        content = np.frombuffer(unpacked, np.uint8)
    elif path.stat().st_size:
        check_regular(path)
        content = np.memmap(path, np.uint8, mode="r")
    else:
        # An empty file cannot be memory-mapped.
        content = np.empty(0, np.uint8)

    try:
        expected, shape = _announced(content[:N_HEADER].tobytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}; fetch it again") from error

    if len(content) != expected:
        raise ValueError(
            f"{path} holds {len(content)} bytes where its header, for an array of {shape}, "
            f"announces {expected}; fetch it again"
        )
    return content[N_HEADER:].reshape(shape)


def _announced(header: bytes) -> tuple[int, tuple[int, ...]]:
    """Size of a file in bytes, and shape of its array, as the header says."""
    if len(header) < N_HEADER:
        raise ValueError(f"is {len(header)} bytes long, shorter than an idx header")

    magic, *shape = struct.unpack(">4I", header)
    if magic != 0x0803:  # two zero bytes, type 8 (unsigned byte) and 3 axes
        raise ValueError(f"starts with {magic:#010x}; an idx file of images starts with 0x00000803")
    return N_HEADER + math.prod(shape), tuple(shape)
