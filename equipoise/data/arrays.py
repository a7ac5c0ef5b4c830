r"""From arrays to :class:`Data`: the meaning of the axes, a check of the values, and their unit.

All sources end here. A folder or an idx file is only a way to get an array of shape (N, \*).
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from equipoise.data.dataset import Array, Data, Names, Rows, Split, Subset, split
from equipoise.data.duplicates import describe_shared
from equipoise.data.labels import choose_names, describe_labels, names_of, number
from equipoise.levels import Level

MIN_EXAMPLES = 10
"""Smallest number of training examples."""

MIN_SIDE = 8
"""Smallest side of an image in pixels."""

MAX_DIMENSIONS = 10_000_000
"""Most values of an example."""
LONELY = 100
"""Distance of a smallest or largest value, in ranges of all others, that is pointed out."""
FAR_STDS, LARGEST_STDS = 1e4, 1e15
"""Distance of a held-out value from the training, in std, that is pointed out, and refused."""
EXACT_LEVELS = 2**24
"""Number of levels that float32 tells apart."""
CHUNK_BYTES = 1 << 24
"""Bytes of an array that are read at a time."""


class Summary(NamedTuple):
    """Result of one pass over an array.

    Args:
        digest: SHA-256 over shape, dtype and values, in hexadecimal.
        low: Smallest value.
        high: Largest value.
        n_constant: Number of dimensions that have the same value in all examples.
        n_missing: Number of missing values of each column of a table, (D,). None if none are.
    """

    digest: str
    low: float
    high: float
    n_constant: int
    n_missing: NDArray[np.int64] | None = None


class Part(NamedTuple):
    r"""The array of one part of a data set.

    Args:
        values: The examples, (N, \*), in memory or memory-mapped.
        summary: Summary of ``values`` if it has been computed already.
        notes: Sentences that a user should read.
        unreadable: Files that are left out, with the reason.
        rows: Number of the file and of the page of each example, where not each file is one.
        names: Names of the examples; None if they are numbered.
        labels: Label of each example, (N,), a name or a whole number; None if they have none.
    """

    values: Array
    summary: Summary | None = None
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    rows: list[tuple[int, int]] | None = None
    names: Names | None = None
    labels: Array | Sequence[Any] | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """Content of a source, before it is checked, scaled and split.

    Args:
        name: Name of the data set in reports.
        source: Description of the place where it was found.
        train: The examples. Those for test and validation are taken from them if the set has no
            such parts.
        validation: The set's own validation part.
        test: The set's own test part.
        white: Value of 8-bit integers in images that becomes x = 1.
        pieces: Indices of the set's own parts within ``train``, where they lie in one array. A part
            that the set does not have is empty.
        axis: Axis of the channels of images, if it is known, 1 or 3.
        columns: Names of the columns of a table, if they have names.
        label_names: Labels that there may be. Empty if they are those that the examples have.
        levels: Levels of the columns that are categories, by their number.
    """

    name: str
    source: str
    train: Part
    validation: Part | None = None
    test: Part | None = None
    white: int = 255
    pieces: Split | None = None
    axis: int | None = None
    columns: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    levels: Mapping[int, tuple[Level, ...]] = field(default_factory=dict)


class Unit(NamedTuple):
    """How values are stored and how they become model inputs; see :class:`Data`.

    ``cautions`` are the notes that say why results may be doubtful.
    """

    dtype: np.dtype[Any]
    offset: Float32[np.ndarray, "*shape"]
    scale: Float32[np.ndarray, "*shape"]
    quantum: float | None
    notes: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


def prepare(
    content: Found, test_fraction: float, validation_fraction: float, *, for_training: bool = True
) -> Data:
    """Check the arrays of a source, choose their unit, and split off the parts that are missing.

    Args:
        content: Content of the source.
        test_fraction: Share of the examples for the test if the source has no test part.
        validation_fraction: Share of the training part for validation if the source has no
            validation part.
        for_training: Whether to refuse data that a model cannot learn from: too few examples, or
            examples that are all the same.

    Returns:
        The checked data.

    Raises:
        ValueError: If a model cannot learn from the arrays. The message says why and what to do.
    """
    parts = [part for part in (content.train, content.validation, content.test) if part is not None]
    notes = [note for part in parts for note in part.notes]

    views = [examples(part.values, content.source, content.axis) for part in parts]
    count, *shape = views[0].shape
    if content.pieces is not None:
        count = len(content.pieces.train)

    if for_training and count < MIN_EXAMPLES:
        details = "".join(f"; {note}" for note in notes)
        raise ValueError(
            f"{content.source}: too few training examples: {count} of at least {MIN_EXAMPLES}"
            f"{details}"
        )
    if len({(view.shape[1:], view.dtype) for view in views}) > 1:
        each = ", ".join(f"{view.shape[1:]} {view.dtype}" for view in views)
        raise ValueError(
            f"{content.source}: the parts differ in the shape or dtype of an example: {each}"
        )

    summaries = [
        part.summary or summarise(view, content.source, content.columns)
        for part, view in zip(parts, views, strict=True)
    ]
    gaps = [summary.n_missing for summary in summaries if summary.n_missing is not None]
    n_constant = summaries[0].n_constant
    if for_training and n_constant == np.prod(shape):
        raise ValueError(
            f"{content.source}: all training examples are the same; there is nothing to learn"
        )

    files = _files_of(content)
    pieces = _pieces(content, count, files, test_fraction, validation_fraction)
    if for_training and files is not None and (len(pieces.validation) or len(pieces.test)):
        notes.append(_note_on_files(files))

    kind: Literal["image", "table"]
    if len(shape) > 1:
        kind = "image"
        low = min(summary.low for summary in summaries)
        high = max(summary.high for summary in summaries)
        unit = image_unit(views[0].dtype, low, high, content.white)

        if content.axis is None and (shape[0] not in (1, 3) or len(shape) != 3):
            place = "first" if content.train.values.shape[1:] == tuple(shape) else "last"
            what = {2: "signals", 3: "images", 4: "volumes"}[len(shape)]
            sides = "x".join(map(str, reversed(shape[1:])))
            notes.append(f"{what} of {sides} with {shape[0]} channels, which come {place}")
        if n_constant:
            notes.append(
                f"pixel values that are the same in all images: {n_constant} of {np.prod(shape)}"
            )
    else:
        kind = "table"
        try:
            part = Subset(views[0], pieces.train, np.dtype(np.float32))
            unit = table_unit(part, for_training, content.columns, tuple(content.levels))
        except ValueError as error:
            raise ValueError(f"{content.source}: {error}") from error
        if gaps:
            n_missing = np.sum(gaps, 0)
            share = n_missing.sum() / (sum(len(view) for view in views) * len(n_missing))
            notes.append(
                f"{share:.1%} of the values are missing, in {np.count_nonzero(n_missing)} of "
                f"{len(n_missing)} columns: nothing is filled in, only observed values count"
            )

    label_names, labels = _labels_of(content, parts)

    def subset(part: Part | None, indices: NDArray[np.int64]) -> Subset:
        if part is None:
            return Subset(views[0], indices, unit.dtype, content.train.names, labels[0])
        whole = Subset.whole(examples(part.values, content.source, content.axis), part.names)
        own = [numbers for other, numbers in zip(parts, labels, strict=True) if other is part]
        return replace(whole, dtype=unit.dtype, labels=own[0])

    train = subset(None, pieces.train)
    validation = subset(content.validation, pieces.validation)
    test = subset(content.test, pieces.test)
    if label_names and for_training:
        notes.append(describe_labels(label_names, train.label_numbers()))
    cautions = list(unit.cautions)
    held_out = {"validation": validation, "test": test} if for_training else {}
    for name, part in held_out.items():
        text, is_caution = describe_shared(part, train, name)
        if text is not None:
            (cautions if is_caution else notes).append(text)
        if kind == "table":
            cautions += _far_values(part, unit, name, content)

    digests = "".join(summary.digest for summary in summaries)
    for numbers in labels if label_names else ():
        digests += hashlib.sha256(numbers.tobytes()).hexdigest()  # type: ignore[union-attr]
    digests += "".join(label_names)
    if content.levels:
        has_numbers = len(content.levels) < shape[0]
        density = "the density of the numbers times " if has_numbers else ""
        notes.append(f"log-likelihoods are of {density}the probability of the categories, in nats")
        # The same numbers stand for other data if their levels have other names.
        digests += repr(sorted(content.levels.items()))
    return Data(
        name=content.name,
        train=train,
        validation=validation,
        test=test,
        kind=kind,
        shape=tuple(shape),
        offset=unit.offset,
        scale=unit.scale,
        quantum=unit.quantum,
        fingerprint=hashlib.sha256(digests.encode()).hexdigest(),
        source=content.source,
        notes=tuple(dict.fromkeys([*notes, *unit.notes, *cautions])),
        cautions=tuple(cautions),
        has_gaps=bool(gaps),
        columns=content.columns,
        label_names=label_names,
        levels=content.levels,
    )


def _labels_of(
    content: Found, parts: Sequence[Part]
) -> tuple[tuple[str, ...], list[NDArray[np.int64] | None]]:
    """Name the labels of a source, and number those of each part; none if it has no labels."""
    if content.train.labels is None:
        return (), [None for _ in parts]

    names = []
    for part in parts:
        values = [None] * len(part.values) if part.labels is None else part.labels
        if len(values) != len(part.values):
            raise ValueError(
                f"{content.source}: {len(values)} labels for {len(part.values)} examples; give "
                "one for each, None where it is unknown"
            )
        names.append(names_of(values, content.source))
    labels = content.label_names or choose_names(names, content.source)
    return labels, [number(part, labels, content.source) for part in names]


def _files_of(content: Found) -> NDArray[np.int64] | None:
    """Number of the file of each training example, if a file that is to be split has several."""
    if content.train.rows is None:
        return None
    files = np.array([file for file, _ in content.train.rows], np.int64)
    if content.pieces is not None:
        if len(content.pieces.validation) and len(content.pieces.test):
            return None
        files = files[content.pieces.train]
    return files if len(np.unique(files)) < len(files) else None


def _note_on_files(files: NDArray[np.int64]) -> str:
    """Say whether the parts share files, whose pages resemble each other."""
    n_files = len(np.unique(files))
    if n_files >= MIN_EXAMPLES:
        return "all pages of a file are in the same part: training, validation or test"
    return (
        f"pages of the same file are in several parts, since there are fewer than {MIN_EXAMPLES} "
        f"files ({n_files}): if its pages resemble each other, pages of new files will have "
        "larger errors than the test says"
    )


def _pieces(
    content: Found,
    count: int,
    files: NDArray[np.int64] | None,
    test_fraction: float,
    validation_fraction: float,
) -> Split:
    """Indices of the parts that lie in the array of the training: the set's own, or drawn."""
    own = content.pieces
    has_test = content.test is not None or (own is not None and len(own.test) > 0)
    has_validation = content.validation is not None or (own is not None and len(own.validation) > 0)
    fractions = (
        0.0 if has_test else test_fraction,
        0.0 if has_validation else validation_fraction,
    )
    drawn = split(count, *fractions)
    if files is not None:
        numbers, file_of = np.unique(files, return_inverse=True)
        if len(numbers) >= MIN_EXAMPLES:
            drawn_files = split(len(numbers), *fractions)
            drawn = Split(
                *(np.flatnonzero(np.isin(file_of, part)).astype(np.int64) for part in drawn_files)
            )
    if own is None:
        return drawn

    return Split(
        own.train[drawn.train],
        np.concatenate([own.validation, own.train[drawn.validation]]),
        np.concatenate([own.test, own.train[drawn.test]]),
    )


def as_array(values: object) -> Array:
    """Convert an array-like object to an array, without a copy if possible.

    Args:
        values: An array, a tensor on any device, a data frame or a nested list.

    Returns:
        The array.

    Raises:
        ValueError: If it would become an array of other values than it stands for, or no array.
    """
    refuse_hidden(values)
    try:
        if not hasattr(values, "detach"):
            return np.asarray(values)

        # An object with the method detach is a tensor. This test does not import torch.
        tensor = values.detach().cpu()
        if tensor.is_floating_point():
            # NumPy has no bfloat16, and all floating-point values are read as float32 anyway.
            tensor = tensor.float()
        return np.asarray(tensor.numpy())
    except (NotImplementedError, TypeError) as error:
        raise ValueError(
            f"an object of type {type(values).__name__} does not become an array ({error}); give a "
            "dense array or tensor of numbers"
        ) from error


def refuse_hidden(values: object) -> None:
    """Refuse what NumPy would take for other values than it stands for.

    Args:
        values: An array, a picture or anything else.

    Raises:
        ValueError: If it is a masked array with masked values, a sparse matrix, or a picture of
            indices into a palette.
    """
    parts = values if isinstance(values, list | tuple) else [values]
    if any(np.ma.is_masked(part) for part in parts):
        raise ValueError(
            "a masked array, whose masked values would be taken as they are: leave those examples "
            "out, or give the values in their place by filled()"
        )
    if hasattr(values, "toarray"):
        raise ValueError("a sparse matrix; give what its method toarray() returns")
    if getattr(values, "palette", None) is not None:
        raise ValueError("a picture of indices into a palette; give what convert('RGB') returns")


def examples(values: Array, source: str, axis: int | None = None) -> Array:
    r"""View an array as a table, or as images with the channels first.

    Args:
        values: The examples, (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C), see
            :func:`channel_axis`; signals (N, C, L) or (N, L, C) of less than 8 channels; or volumes
            (N, C, D, H, W) or (N, D, H, W, C).
        source: Name of the array in error messages.
        axis: Axis of the channels of images, if it is known, 1 or 3.

    Returns:
        The examples, (N, D), (N, C, L), (N, C, H, W) or (N, C, D, H, W). They share memory with
        ``values``.

    Raises:
        ValueError: If the meaning of the axes is not clear, or the values are not real numbers.
    """
    if values.dtype.kind not in "buif":
        raise ValueError(
            f"{source}: values of dtype {values.dtype}; expected real numbers (uint8, float32, ...)"
        )

    if values.ndim == 3:
        values = _signals_or_grey(values)
    elif values.ndim == 4:
        axis = axis or channel_axis(values.shape)
        if axis is None:
            raise ValueError(
                f"{source}: cannot tell the channels of an array of shape {values.shape}: expected "
                "(N, C, H, W) or (N, H, W, C) with one of axis 1 and axis 3 of length 1, 3 or 4, "
                "or shorter than the other axes; move the channels to axis 1 and make the images "
                "square or larger, or reshape to (N, D) to use the values as a table"
            )
        values = np.moveaxis(values, axis, 1)
    elif values.ndim == 5:
        if min(values.shape[1:4]) >= MIN_SIDE > values.shape[4]:
            values = np.moveaxis(values, 4, 1)
    elif values.ndim != 2:
        raise ValueError(
            f"{source}: an array of shape {values.shape}; expected a table (N, D), signals "
            "(N, C, L) of less than 8 channels, grey images (N, H, W), images (N, C, H, W) or "
            "(N, H, W, C), or volumes (N, C, D, H, W)"
        )

    if values.ndim > 2 and min(values.shape[2:]) < MIN_SIDE:
        sides = "x".join(map(str, reversed(values.shape[2:])))
        raise ValueError(
            f"{source}: images of {sides}; each side must be at least {MIN_SIDE} (reshape to "
            "(N, D) to use the values as a table)"
        )
    if math.prod(values.shape[1:]) > MAX_DIMENSIONS:
        raise ValueError(
            f"{source}: examples of {math.prod(values.shape[1:]):,} values; a model takes at most "
            f"{MAX_DIMENSIONS:,}"
        )
    if 0 in values.shape:
        raise ValueError(f"{source}: an array of shape {values.shape} holds no values")
    return values


def _signals_or_grey(values: Array) -> Array:
    """Tell signals, (N, C, L) or (N, L, C), from grey images, which have 8 pixels a side."""
    _, first, last = values.shape
    if first < MIN_SIDE <= last:
        return values
    if last < MIN_SIDE <= first:
        return np.moveaxis(values, 2, 1)
    return values[:, None]


def channel_axis(shape: tuple[int, ...]) -> int | None:
    """Tell which axis of an array of images has the channels.

    Args:
        shape: (N, C, H, W) or (N, H, W, C).

    Returns:
        1 or 3: the one of 1, 3 or 4 channels, as of pictures; otherwise the one that differs where
        the other two are equal, as of square images; otherwise the one that is the shortest. None
        if that does not tell.

    Example:
        >>> [channel_axis((9, *sides)) for sides in [(3, 8, 8), (8, 8, 40), (12, 30, 5), (8, 8, 8)]]
        [1, 3, 3, None]
    """
    _, first, middle, last = shape
    if (first in (1, 3, 4)) != (last in (1, 3, 4)):
        return 1 if first in (1, 3, 4) else 3
    if (middle == last) != (first == middle):
        return 1 if middle == last else 3
    if first != last and min(first, last) < middle:
        return 1 if first < last else 3
    return None


def summarise(values: Rows, source: str, columns: Sequence[str] = ()) -> Summary:
    r"""Read an array once, in chunks, for its checksum, its range and its constant dimensions.

    Args:
        values: The examples, (N, \*). Floating-point values are read as float32. NaN in a table
            (N, D) is a missing value.
        source: Name of the array in error messages.
        columns: Names of the columns of a table, for them.

    Returns:
        The summary.

    Raises:
        ValueError: If values are infinite, or NaN in images. The message gives their number and the
            position of the first one.
    """
    dtype = values.dtype.newbyteorder("<")
    if values.dtype.kind == "f":
        dtype = np.dtype(np.float32)

    digest = hashlib.sha256(f"{dtype.str} {values.shape}".encode())
    with np.errstate(over="ignore"):
        low = high = np.ravel(values[:1]).astype(dtype)
    n_missing = np.zeros(low.shape, np.int64)
    n_bad = 0
    first_bad: tuple[int, ...] = ()

    for start, chunk in _chunks(values, dtype):
        if dtype.kind == "f":
            finite = np.isfinite(chunk)
            if len(values.shape) == 2 and not finite.all():
                missing = np.isnan(chunk)
                n_missing += missing.sum(0)
                finite |= missing
                # NaN has many bit patterns, and none of them means more than another.
                chunk = np.where(missing, np.float32(np.nan), chunk)

            n_bad_in_chunk = finite.size - int(np.count_nonzero(finite))
            if n_bad_in_chunk and not n_bad:
                chunk_shape = (len(chunk), *values.shape[1:])
                row, *position = np.unravel_index(int(finite.argmin()), chunk_shape)
                first_bad = (start + int(row), *map(int, position))
            n_bad += n_bad_in_chunk

        digest.update(chunk.data)
        low = np.fmin(low, np.fmin.reduce(chunk, 0))
        high = np.fmax(high, np.fmax.reduce(chunk, 0))

    if n_bad:
        what = "infinite or too large" if len(values.shape) == 2 else "NaN, infinite or too large"
        where = f"at index {first_bad}"
        if columns:
            where = f"in row {first_bad[0]}, column {columns[first_bad[1]]!r}"
        raise ValueError(
            f"{source}: {n_bad} values are {what} for float32, the first {where}; remove those "
            "examples or replace the values"
            + (", or put NaN where they are missing" if len(values.shape) == 2 else "")
        )

    n_constant = int(np.count_nonzero(low == high))
    gaps = n_missing if n_missing.any() else None
    extremes = (
        (0.0, 0.0) if np.isnan(low).all() else (float(np.nanmin(low)), float(np.nanmax(high)))
    )
    return Summary(digest.hexdigest(), *extremes, n_constant, gaps)


def image_unit(dtype: np.dtype[Any], low: float, high: float, white: int = 255) -> Unit:
    """Choose how images are stored, and the affine map that brings them to [0, 1].

    Args:
        dtype: Data type of the images in the source.
        low: Smallest value of all images.
        high: Largest value of all images.
        white: Value of 8-bit integers that becomes x = 1.

    Returns:
        The unit. Booleans and integers in 0, ..., ``white`` are stored as uint8, and other integers
        as int32. Floating-point values are stored as float32. The range of integers beyond 8 bits,
        and of floating-point values outside [0, 1], is mapped to [0, 1].
    """
    if dtype.kind == "b":
        return _image_unit(np.uint8, 0.0, 1.0, 1.0, "two-valued images: x is 0 or 1")

    is_integer = dtype.kind in "ui"
    if dtype == np.uint8 or (is_integer and low >= 0 and high <= white):
        notes, cautions = [], []
        if dtype != np.uint8:
            notes.append(f"{dtype.name} values in 0..{white} stored as uint8")
        if high <= white / 8:
            cautions.append(
                f"the largest value is {high:g} where {white} is white: all images are nearly black"
            )
        unit = _image_unit(np.uint8, 0.0, float(white), 1 / white, *notes)
        return unit._replace(cautions=tuple(cautions))

    if not is_integer and low >= 0 and high <= 1:
        return _image_unit(np.float32, 0.0, 1.0, None)

    note = f"values from {low:.10g} to {high:.10g} rescaled to [0, 1]"
    if not is_integer:
        return _image_unit(np.float32, low, high - low, None, note)
    if high - low >= EXACT_LEVELS or max(-low, high) >= 2**31:
        caution = (
            f"{note}, as real numbers: float32 does not resolve so many levels; subtract what all "
            "have in common, or divide"
        )
        unit = _image_unit(np.float32, low, high - low, None, caution)
        return unit._replace(cautions=(caution,))

    # The map is in float32, in which an offset beyond 2^24 is rounded.
    offset = float(np.float32(low))
    if offset > low:
        offset = float(np.nextafter(np.float32(low), np.float32(-np.inf)))
    scale = level_scale(max(1, int(high - offset)))
    if (offset, scale) != (low, high - low):
        note = (
            f"values from {low:.10g} to {high:.10g}, on a scale where {offset:.10g} to "
            f"{offset + scale:.10g} become [0, 1], so that float32 gives back every level"
        )
    return _image_unit(np.int32, offset, float(scale), 1 / scale, note)


def level_scale(n_steps: int) -> int:
    """Find the scale by which each of some levels comes back from float32 to the bit.

    Args:
        n_steps: Largest level k, from 1 to 2^24; the smallest is 0.

    Returns:
        ``n_steps`` if (k / n_steps) n_steps = k for all levels in float32, as for 255 and 65,535.
        Otherwise the next larger sum of two powers of two, at most a third larger, for which Kahan
        has proved it (Goldberg, 1991, *What every computer scientist should know about
        floating-point arithmetic*, theorem 7).

    Example:
        >>> level_scale(255), level_scale(41)
        (255, 48)
    """
    levels = np.arange(n_steps + 1, dtype=np.float32)
    if ((levels / np.float32(n_steps)) * np.float32(n_steps) == levels).all():
        return n_steps

    larger = 1 << (n_steps - 1).bit_length()
    sums = (larger // 2 + (1 << power) for power in range(larger.bit_length()))
    return min(number for number in sums if number >= n_steps)


def _image_unit(
    dtype: type, offset: float, scale: float, quantum: float | None, *notes: str
) -> Unit:
    return Unit(
        np.dtype(dtype), np.array(offset, np.float32), np.array(scale, np.float32), quantum, notes
    )


def table_unit(
    train: Rows,
    for_training: bool = True,
    names: tuple[str, ...] = (),
    categories: tuple[int, ...] = (),
) -> Unit:
    """Standardise each column by the mean and standard deviation of the training part.

    Args:
        train: Training examples, (N, D), read as float32. Missing values, NaN, do not count.
        for_training: Whether to refuse a column that has no value at all.
        names: Names of the columns for messages. Without them, numbers are given.
        categories: Numbers of the columns that are categories, whose values stay as they are.

    Returns:
        Mean and standard deviation of each column, (D,). Columns that are constant, or vary by
        the rounding of float32 only, have a scale of 1, or of their range if that is larger.

    Raises:
        ValueError: If a column has no value.
    """
    # Two passes in float64: the formula for one pass cancels if the mean is far from zero.
    width = train.shape[1]
    total = np.zeros(width)
    count = np.zeros(width, np.int64)
    low = np.full(width, np.inf)
    high = np.full(width, -np.inf)

    for _, chunk in _chunks(train, train.dtype):
        total += np.nansum(chunk, 0, dtype=np.float64)
        count += (~np.isnan(chunk)).sum(0)
        low = np.fmin(low, np.fmin.reduce(chunk, 0))
        high = np.fmax(high, np.fmax.reduce(chunk, 0))

    if for_training and not count.all():
        raise ValueError(
            f"columns {_columns(count == 0, names)} have no value in any of the {len(train)} "
            "training rows; leave them out"
        )
    low, high = np.where(count > 0, low, 0.0), np.where(count > 0, high, 0.0)
    count = np.maximum(count, 1)
    mean = total / count

    squares = np.zeros(width)
    next_low, next_high = np.full(width, np.inf), np.full(width, -np.inf)
    for _, chunk in _chunks(train, train.dtype):
        squares += np.nansum(np.square(chunk - mean), 0)
        next_low = np.fmin(next_low, np.fmin.reduce(np.where(chunk > low, chunk, np.nan), 0))
        next_high = np.fmax(next_high, np.fmax.reduce(np.where(chunk < high, chunk, np.nan), 0))
    std = np.sqrt(squares / count)

    scale = std.astype(np.float32)
    constant = hardly_vary(low, high) | (scale == 0)
    is_category = np.isin(np.arange(width), categories)
    varies = (low < high) & ~is_category
    if isinstance(train, Subset) and train.base.dtype.itemsize > 4 and constant.any():
        original = train.base[:, constant][train.indices]
        # Before it is rounded to float32.
        varies[constant] = np.fmin.reduce(original, 0) < np.fmax.reduce(original, 0)
        varies &= ~is_category
    coarse = varies & (constant | (std < 1e-5 * np.abs(mean)))

    notes, cautions = [], []
    is_constant = constant & ~coarse & ~is_category
    if is_constant.any():
        notes.append(f"constant columns: {_columns(is_constant, names)}")
    if coarse.any():
        cautions.append(
            f"columns {_columns(coarse, names)} vary by less than 1e-5 of their mean, near the "
            "resolution of float32: subtract the mean in float64 before"
        )

    for extreme, nearest, other_end in ((low, next_low, high), (high, next_high, low)):
        rest = np.abs(other_end - nearest.astype(np.float64))
        lonely = varies & (rest > 0) & (np.abs(nearest - extreme) > LONELY * rest)
        if lonely.any():
            listed = ", ".join(f"{extreme[i]:g}" for i in np.flatnonzero(lonely)[:20])
            cautions.append(
                f"columns {_columns(lonely, names)} have the value {listed}, from which all others "
                f"are over {LONELY} times as far as from each other: if it stands for a missing "
                "value, leave the cell empty or put NaN"
            )

    scale = np.where(constant, np.maximum(np.float32(1), (high - low).astype(np.float32)), scale)
    offset = mean.astype(np.float32)
    scale[is_category], offset[is_category] = 1.0, 0.0
    return Unit(train.dtype, offset, scale, None, tuple(notes), tuple(cautions))


def _far_values(part: Subset, unit: Unit, name: str, content: Found) -> list[str]:
    """Point out far values of held-out rows, and refuse those whose squares overflow float32."""
    width = part.shape[1]
    largest, values = np.zeros(width), np.zeros(width)
    for _, chunk in _chunks(part, unit.dtype):
        distance = np.nan_to_num(np.abs(chunk - unit.offset.astype(np.float64)) / unit.scale)
        furthest = distance.argmax(0)
        reached = distance[furthest, np.arange(width)]
        values = np.where(reached > largest, chunk[furthest, np.arange(width)], values)
        largest = np.maximum(largest, reached)

    far = largest > FAR_STDS
    if not far.any():
        return []
    listed = ", ".join(f"{values[i]:g}" for i in np.flatnonzero(far)[:20])
    text = (
        f"columns {_columns(far, content.columns)} have the value {listed} in the {name} rows, "
        f"over {FAR_STDS:g} std from the training rows: if it stands for a missing value, leave "
        "the cell empty or put NaN"
    )
    if largest.max() > LARGEST_STDS:
        raise ValueError(f"{content.source}: {text}; its squared error is too large for float32")
    return [text]


def hardly_vary(low: Array, high: Array) -> NDArray[np.bool_]:
    """Tell columns that are constant but for the rounding of float32.

    Args:
        low: Smallest value of each column, (D,).
        high: Largest value of each column, (D,).

    Returns:
        True for columns whose values are at most about two numbers of float32 apart, (D,).
    """
    largest = np.maximum(np.abs(low), np.abs(high))
    few_roundings = 2 * np.finfo(np.float32).eps * largest.astype(np.float64)
    constant: NDArray[np.bool_] = high.astype(np.float64) - low <= few_roundings
    return constant


def _columns(chosen: NDArray[np.bool_], names: tuple[str, ...] = ()) -> str:
    """Names or numbers of the columns for which ``chosen`` is True, at most 20 of them."""
    numbers = [repr(names[i]) if names else str(i) for i in np.flatnonzero(chosen)]
    listed = ", ".join(numbers[:20])
    if len(numbers) > 20:
        listed += f" and {len(numbers) - 20} more"
    return listed


def _chunks(values: Rows, dtype: np.dtype[Any]) -> Iterator[tuple[int, Array]]:
    """Consecutive examples, (k, D), flattened and cast, with the index of the first one.

    A chunk takes about 16 MB.
    """
    width = int(np.prod(values.shape[1:]))
    if not width:
        raise ValueError(f"examples of shape {values.shape[1:]} have no values")
    rows = max(1, CHUNK_BYTES // (width * dtype.itemsize))

    for start in range(0, len(values), rows):
        # Values that overflow float32 become infinite, and are reported as infinite.
        with np.errstate(over="ignore"):
            chunk = np.ascontiguousarray(values[start : start + rows], dtype)
            yield start, chunk.reshape(-1, width)
