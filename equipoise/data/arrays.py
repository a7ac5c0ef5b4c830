r"""From arrays to :class:`Data`: what the axes are, whether the values are usable, and their unit.

All sources end here: a folder or an idx file is only a way to find an array of shape (N, \*).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from equipoise.data.dataset import Array, Data, Subset, split

MIN_EXAMPLES = 10
MIN_SIDE = 8
CHUNK_BYTES = 1 << 24


class Summary(NamedTuple):
    """What one pass over an array finds out.

    Args:
        digest: SHA-256 over shape, dtype and values, in hexadecimal.
        low: smallest value.
        high: largest value.
        constant: dimensions, counted in C order within an example, that are the same in all examples.
    """

    digest: str
    low: float
    high: float
    constant: tuple[int, ...]


class Part(NamedTuple):
    r"""The array of one part of a data set.

    Args:
        values: (N, \*), in memory or memory-mapped.
        summary: of ``values``, where it is known already.
        notes: sentences that a user should read.
    """

    values: Array
    summary: Summary | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Found:
    """What a source holds, before it is checked, scaled and split.

    Args:
        name: what the data set is called in reports.
        source: where it was found.
        train: the examples; also for test and validation where those are None.
        validation: the set's own validation part.
        test: the set's own test part.
        white: value of x = 1 in images of 8-bit integers.
    """

    name: str
    source: str
    train: Part
    validation: Part | None = None
    test: Part | None = None
    white: int = 255


class Unit(NamedTuple):
    """How values are stored and become model inputs; see :class:`Data`."""

    dtype: np.dtype[Any]
    offset: Float32[np.ndarray, "*shape"]
    scale: Float32[np.ndarray, "*shape"]
    quantum: float | None
    notes: tuple[str, ...] = ()


def prepare(
    found: Found, test_fraction: float, validation_fraction: float, *, for_training: bool = True
) -> Data:
    """Check the arrays of a source, choose their unit, and split off what the source does not.

    Args:
        found: the arrays.
        test_fraction: share for the test where the source has no test part.
        validation_fraction: share of the training part for validation where the source has none.
        for_training: whether to refuse what cannot be learned from: too few examples, or all the same.

    Returns:
        The checked data.

    Raises:
        ValueError: if the arrays cannot be learned from; the message says why and what to do.
    """
    parts = [part for part in (found.train, found.validation, found.test) if part is not None]
    notes = [note for part in parts for note in part.notes]
    views = [examples(part.values, found.source) for part in parts]
    count, *shape = views[0].shape
    if for_training and count < MIN_EXAMPLES:
        raise ValueError(
            f"{found.source}: too few training examples: {count} of at least {MIN_EXAMPLES}"
            + "".join(f"; {note}" for note in notes)
        )
    if any(list(view.shape[1:]) != shape or view.dtype != views[0].dtype for view in views):
        each = ", ".join(f"{view.shape[1:]} {view.dtype}" for view in views)
        raise ValueError(
            f"{found.source}: the parts differ in the shape or dtype of an example: {each}"
        )
    summaries = [
        part.summary or summarise(view, found.source)
        for part, view in zip(parts, views, strict=True)
    ]
    constant = summaries[0].constant
    if for_training and len(constant) == np.prod(shape):
        raise ValueError(
            f"{found.source}: all training examples are the same; there is nothing to learn"
        )

    pieces = split(
        count,
        0.0 if found.test is not None else test_fraction,
        0.0 if found.validation is not None else validation_fraction,
    )
    kind: Literal["image", "table"] = "image" if len(shape) == 3 else "table"
    if kind == "image":
        low, high = min(s.low for s in summaries), max(s.high for s in summaries)
        unit = image_unit(views[0].dtype, low, high, found.white)
        if constant:
            notes.append(
                f"pixel values that are the same in all images: {len(constant)} of {np.prod(shape)}"
            )
    else:
        unit = table_unit(Subset(views[0], pieces.train, np.dtype(np.float32)))

    def subset(part: Part | None, indices: NDArray[np.int64]) -> Subset:
        if part is None:
            return Subset(views[0], indices, unit.dtype)
        return replace(Subset.whole(examples(part.values, found.source)), dtype=unit.dtype)

    return Data(
        name=found.name,
        train=subset(None, pieces.train),
        validation=subset(found.validation, pieces.validation),
        test=subset(found.test, pieces.test),
        kind=kind,
        shape=tuple(shape),
        offset=unit.offset,
        scale=unit.scale,
        quantum=unit.quantum,
        fingerprint=hashlib.sha256("".join(s.digest for s in summaries).encode()).hexdigest(),
        source=found.source,
        notes=tuple(dict.fromkeys([*notes, *unit.notes])),
    )


def as_array(values: object) -> Array:
    """Make an array of what is one in all but name, where possible without a copy.

    Args:
        values: an array, a tensor on any device, a data frame, a nested list.

    Returns:
        The array.
    """
    if hasattr(values, "detach"):  # a tensor: torch need not be imported to recognise one
        tensor = values.detach().cpu()
        # NumPy knows no bfloat16, and floats are read as float32 in any case.
        return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
    return np.asarray(values)


def examples(values: Array, source: str) -> Array:
    r"""View an array as a table or as images with the channels first.

    Args:
        values: (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C) with C of 1, 3 or 4.
        source: what to call the array in an error.

    Returns:
        (N, D) or (N, C, H, W), sharing memory with ``values``.

    Raises:
        ValueError: if the axes or the dtype cannot be understood.
    """
    if values.dtype.kind not in "buif":
        raise ValueError(
            f"{source}: values of dtype {values.dtype}; expected real numbers (uint8, float32, ...)"
        )
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4:
        first, last = (values.shape[axis] in (1, 3, 4) for axis in (1, 3))
        if first == last:
            raise ValueError(
                f"{source}: cannot tell the channels of an array of shape {values.shape}: expected "
                "exactly one of axis 1 (N, C, H, W) and axis 3 (N, H, W, C) to be 1, 3 or 4 long; "
                "reshape to (N, D) to use the values as a table"
            )
        values = values if first else np.moveaxis(values, 3, 1)
    elif values.ndim != 2:
        raise ValueError(
            f"{source}: an array of shape {values.shape}; expected a table (N, D), grey images (N, H, W), "
            "or images (N, C, H, W) or (N, H, W, C)"
        )
    if values.ndim == 4 and min(values.shape[2:]) < MIN_SIDE:
        raise ValueError(
            f"{source}: images of {values.shape[3]}x{values.shape[2]}; each side must be at least {MIN_SIDE} "
            "(reshape to (N, D) to use the values as a table)"
        )
    if 0 in values.shape:
        raise ValueError(f"{source}: an array of shape {values.shape} holds no values")
    return values


def summarise(values: Array, source: str) -> Summary:
    r"""Go through an array once, in chunks: is it finite, what is its range, which dimensions vary.

    Args:
        values: (N, \*); floating-point values count as the float32 that they will be read as.
        source: what to call the array in an error.

    Returns:
        The summary.

    Raises:
        ValueError: if values are NaN or infinite, with their number and the position of the first.
    """
    dtype = np.dtype(np.float32) if values.dtype.kind == "f" else values.dtype.newbyteorder("<")
    digest = hashlib.sha256(f"{dtype.str} {values.shape}".encode())
    low = high = np.ravel(values[0]).astype(dtype)
    bad = 0
    first: tuple[int, ...] = ()
    for start, chunk in _chunks(values, dtype):
        digest.update(chunk.data)
        if dtype.kind == "f" and not (finite := np.isfinite(chunk)).all():
            if not bad:
                position = np.unravel_index(int(finite.argmin()), (len(chunk), *values.shape[1:]))
                first = (start + int(position[0]), *map(int, position[1:]))
            bad += int(np.sum(~finite))
        low, high = np.minimum(low, chunk.min(0)), np.maximum(high, chunk.max(0))
    if bad:
        raise ValueError(
            f"{source}: {bad} values are NaN, infinite or too large for float32, the first at index {first}; "
            "remove those examples or replace the values"
        )
    constant = tuple(map(int, np.flatnonzero(low == high)))
    return Summary(digest.hexdigest(), float(low.min()), float(high.max()), constant)


def image_unit(dtype: np.dtype[Any], low: float, high: float, white: int = 255) -> Unit:
    """Choose how images are stored, and the affine map that brings them to [0, 1].

    Args:
        dtype: of the values as they are.
        low: their minimum.
        high: their maximum.
        white: value of x = 1 in 8-bit integers.

    Returns:
        8-bit integers as uint8, floats in [0, 1] as they are, all else as float32, with a map
        of its range to [0, 1].
    """
    integer = dtype.kind in "ui"
    if dtype.kind == "b":
        return _image_unit(np.uint8, 0.0, 1.0, 1.0, "two-valued images: x is 0 or 1")
    if dtype == np.uint8 or (integer and low >= 0 and high <= white):
        notes = [] if dtype == np.uint8 else [f"{dtype.name} values in 0..{white} stored as uint8"]
        if high <= white / 8:
            notes.append(
                f"the largest value is {high:g} where {white} is white: all images are nearly black"
            )
        return _image_unit(np.uint8, 0.0, float(white), 1 / white, *notes)
    if not integer and low >= 0 and high <= 1:
        return _image_unit(np.float32, 0.0, 1.0, None)
    note = f"values from {low:g} to {high:g} rescaled to [0, 1]"
    return _image_unit(np.float32, low, high - low, 1 / (high - low) if integer else None, note)


def _image_unit(
    dtype: type, offset: float, scale: float, quantum: float | None, *notes: str
) -> Unit:
    return Unit(
        np.dtype(dtype), np.array(offset, np.float32), np.array(scale, np.float32), quantum, notes
    )


def table_unit(train: Subset) -> Unit:
    """Standardise each column by the mean and standard deviation of the training part.

    Args:
        train: training examples, (N, D), read as float32.

    Returns:
        Mean and standard deviation per column, (D,); constant columns keep a scale of 1.
    """
    # Two passes in float64: the one-pass formula cancels where the mean is far from zero.
    count, width = train.shape
    total, squares = np.zeros(width), np.zeros(width)
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    for _, chunk in _chunks(train, train.dtype):
        total += chunk.sum(0, dtype=np.float64)
        low, high = np.minimum(low, chunk.min(0)), np.maximum(high, chunk.max(0))
    mean = total / count
    for _, chunk in _chunks(train, train.dtype):
        squares += np.square(chunk - mean).sum(0)
    std = np.sqrt(squares / count)

    scale = std.astype(np.float32)
    constant = (low == high) | (scale == 0)
    coarse = ~constant & (std < 1e-5 * np.abs(mean))
    notes = []
    if constant.any():
        notes.append(f"constant columns: {_columns(constant)}")
    if coarse.any():
        notes.append(
            f"columns {_columns(coarse)} vary by less than 1e-5 of their mean, near the resolution of "
            "float32: subtract the mean in float64 before"
        )
    scale = np.where(constant, np.float32(1), scale)
    return Unit(train.dtype, mean.astype(np.float32), scale, None, tuple(notes))


def _columns(chosen: NDArray[np.bool_]) -> str:
    names = [str(column) for column in np.flatnonzero(chosen)]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _chunks(values: Array | Subset, dtype: np.dtype[Any]) -> Iterator[tuple[int, Array]]:
    """Consecutive examples, flattened and cast, with the index of the first: (k, D), some 16 MB each."""
    width = int(np.prod(values.shape[1:]))
    rows = max(1, CHUNK_BYTES // (width * dtype.itemsize))
    for start in range(0, len(values), rows):
        with np.errstate(
            over="ignore"
        ):  # what overflows float32 becomes infinite, and is reported as such
            yield (
                start,
                np.ascontiguousarray(values[start : start + rows], dtype).reshape(-1, width),
            )
