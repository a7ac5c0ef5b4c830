"""Loading: from the source that a user names or holds to data that are checked and split."""

import difflib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from equipoise.data.arrays import (
    MIN_EXAMPLES,
    Found,
    Part,
    as_array,
    prepare,
    refuse_hidden,
)
from equipoise.data.dataset import MAX_VALIDATION, Array, Channels, Data, Fit, Pages, Subset
from equipoise.data.encoded import (
    EXTENSIONS,
    SKIPPED,
    UNREADABLE,
    ImageReader,
    Progress,
    list_images,
    one_image,
)
from equipoise.data.folders import read_folder, sort_folders
from equipoise.data.gate import DEFAULT_LIMITS, Limits, open_npz, read_npy
from equipoise.data.hub import MIRRORS, hub_passes, hub_set, is_hub_table
from equipoise.data.labels import names_of
from equipoise.data.levels import AS_MISSING, Categorical, as_frame, encode_frame
from equipoise.data.named import NAMES, celeba, digits, idx_set
from equipoise.data.packed import is_packed, load_packed
from equipoise.data.shard_files import Shard
from equipoise.data.shards import (
    ENDINGS,
    ShardedStream,
    choose_readers,
    describe_shards,
    find_shards,
    read_rows,
)
from equipoise.data.stream import Stream, first_examples, reader
from equipoise.data.tables import SUFFIXES, index_notes, is_table, read_table
from equipoise.files import check_text, expanded
from equipoise.levels import Levels
from equipoise.places import is_place, locate
from equipoise.text import parse_size, visible

NPZ_KEYS = (("train", "x_train"), ("validation", "x_validation", "x_val"), ("test", "x_test"))
NPZ_SINGLE_KEYS = ("x", "data", "images")

AT_HAND = 5000
"""Number of training examples at the beginning of a stream that stay in memory."""

MAX_TEST = 10_000
"""Largest number of examples that are read from the test part of a streamed set.

This is enough for the distances between sets of images.
"""

LISTED_ARRAYS, LONGEST_ARRAY_NAME = 20, 50
"""Number of arrays that an error lists, and the longest of their names in characters."""

MAX_IMAGE_SIZE = 4096
"""Longest side, in pixels, to which images are resized."""

POSSIBLE = (
    f"one of {', '.join(NAMES)}, a folder of images, an image, an .npy or .npz file, a table "
    f"({', '.join(SUFFIXES)}), or hf:owner/name"
)


def load(
    source: object = "digits",
    *,
    data_dir: str | Path | None = None,
    image_size: int | str | None = None,
    channels: Channels | None = None,
    pages: Pages | None = None,
    fit: Fit = "crop",
    pool: bool = False,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.1,
    strict: bool = False,
    download: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    max_pixels: int | None = None,
    max_bytes: int | None = None,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    label: str | None = None,
    labels: Sequence[Any] | Array | None = None,
    categorical: Categorical = True,
    levels: Levels | None = None,
    say: Callable[[str], None] | None = None,
) -> Data:
    """Load examples, check them and split them into three parts.

    The split is random but fixed: it depends only on the number of examples. If a data set has
    its own test or validation part, that part is used. A note says how many held-out examples
    equal a training example.

    Args:
        source: "digits", "mnist", "fashion-mnist" or "celeba"; the path of a folder of images or
            of an .npy or .npz file; a table in a .csv, .tsv, .parquet or .feather file, the first
            two also with .gz; "hf:owner/name"; an array or tensor (N, D), (N, H, W),
            (N, C, H, W) or (N, H, W, C); or a map-style data set whose items are examples or
            (example, ...) tuples.
        data_dir: The first folder in which a named set is looked for. The folder
            $EQUIPOISE_DATA and the usual places follow.
        image_size: Size in pixels that each image file gets, one number for a square, or
            "WIDTHxHEIGHT": the centre is cut out and resized. None keeps the size of the images if
            they all have the same size and no side is longer than 128 pixels.
        channels: "grey" or "rgb". None means grey if all files are grey, RGB if files are grey and
            coloured, and otherwise all the bands that they have.
        pages: What becomes of image files of several pages (TIFF, GIF): each is one of the
            "examples", all of a file are the "channels" of one example, or only the "first" is
            read. None means "examples".
        fit: How images of other proportions get the size ``image_size``: "crop" cuts the centre
            out, "pad" adds black bars, and "stretch" distorts them.
        pool: Whether to take the parts of a folder (train, val, test) together, and split anew.
        test_fraction: Share of all examples that is used for the test if the set has no test part
            of its own, in [0, 1).
        validation_fraction: Share of the remaining examples that is used for validation if the
            set has no validation part of its own, in [0, 1). At most 2000 examples are used.
        strict: Whether an unreadable image is an error. If False, it is skipped, and a note
            says so.
        download: Whether a named set that is not on this machine may be downloaded from the
            Hugging Face hub.
        cache_dir: Folder for decoded images. None means $EQUIPOISE_CACHE, or ~/.cache/equipoise.
        progress: Function that is called often with (done, total) while images are decoded.
        max_pixels: Most pixels of an image file; 50 million if None. A larger one is skipped.
        max_bytes: Most bytes that a compressed file may unpack to, besides twice its size; 1 GB if
            None.
        columns: Names of the columns of a table to take. None takes all.
        drop: Names of columns to leave out.
        names: Names of the columns of an array. None takes those of a data frame.
        label: Where the labels of a conditional model are: a column of a table or of a data set on
            the hub, which then is no data; "folder" for the folders of classes of images; the name
            of an array in an .npz file; "label" for those of "digits", "mnist" and
            "fashion-mnist". None takes no labels.
        labels: Labels of the examples of an array, (N,): text, or whole numbers. None, NaN and
            numbers below 0 are unknown labels.
        categorical: Names of columns of numbers in a file or a data frame that are categories
            besides those of text and flags. True for none. False takes no column for one: then
            flags are numbers, and text is refused.
        levels: Levels of the columns of an array that are categories already, by their number. The
            array holds the numbers of levels.
        say: Function that is called with the size and place of a cache before it is written.

    Returns:
        The data. The three parts are views, so that a memory map is not copied.

    Raises:
        ValueError: If the source is unknown or a model cannot learn from it. The message says why
            and what to do.
        FileNotFoundError: If a named set is not on this machine. The message lists the places.
        ImportError: If the source needs an optional dependency that is not installed.
        OSError: If the cache cannot be written.

    Example:
        >>> data = load("digits")
        >>> data.train, data.kind
        (Subset(shape=(1455, 1, 8, 8), dtype=uint8), 'image')
        >>> data.test
        Subset(shape=(180, 1, 8, 8), dtype=uint8)
        >>> load(np.random.default_rng(0).normal(size=(100, 3))).train
        Subset(shape=(81, 3), dtype=float32)
    """
    sides = (1, 1) if image_size is None else parse_size(image_size)
    if not 1 <= min(sides) <= max(sides) <= MAX_IMAGE_SIZE:
        raise ValueError(f"image_size must be from 1 to {MAX_IMAGE_SIZE} pixels, not {image_size}")
    if channels not in {None, "grey", "rgb"}:
        raise ValueError(f"channels must be 'grey', 'rgb' or None, not {channels!r}")
    if pages not in {None, *get_args(Pages)}:
        raise ValueError(f"pages must be one of {', '.join(get_args(Pages))}, not {pages!r}")
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}, not {fit!r}")

    limits = _limits(max_pixels, max_bytes)
    reader = _reader(image_size, channels, strict, cache_dir, progress, limits, pages, fit, say)
    content = _find(
        source, data_dir, reader, download, columns, drop, categorical, pool=pool, label=label
    )
    if labels is not None:
        if label is not None or content.name != "array":
            raise ValueError("labels are for an array in memory; give label for other data")
        content = replace(content, train=content.train._replace(labels=labels))
    if (pages is not None or fit != "crop") and content.train.names is None:
        raise ValueError(
            f"{content.source}: pages={pages} and fit={fit} are for image files; leave them out"
        )
    if names is not None:
        content = replace(content, columns=tuple(names))
    if levels:
        content = replace(content, levels=levels)
    data = prepare(content, test_fraction, validation_fraction)

    if not _has_format(data, image_size, channels):
        raise ValueError(
            f"{data.source}: examples of shape {data.shape}; image_size={image_size} and "
            f"channels={channels} convert image files only: convert the array yourself, or leave "
            "them out"
        )
    return replace(
        data,
        loading=_record(
            source,
            data_dir=data_dir and str(expanded(data_dir).resolve()),
            image_size=image_size,
            channels=channels,
            pages=pages,
            fit=None if fit == "crop" else fit,
            pool=pool,
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            strict=strict,
            download=download,
            max_pixels=max_pixels,
            max_bytes=max_bytes,
            columns=list(columns) if columns else None,
            drop=list(drop) if drop else None,
            label=label,
            # Left out where nothing depends on it, as before there were categories.
            categorical=_as_recorded(categorical) if data.levels else None,
        ),
    )


def load_stream(
    source: object,
    *,
    count: int | None = None,
    validation: object = None,
    test: object = None,
    buffer_size: int = 10_000,
    name: str = "stream",
    column: str | None = None,
    image_size: int | str | None = None,
    channels: Channels | None = None,
    max_pixels: int | None = None,
) -> Data:
    r"""Load examples that do not fit into memory: they are read in batches, again in each epoch.

    Only the beginning stays in memory: the examples that are held out, and the first 5000
    training examples (``data.train.at_hand``). These give the units, the initial values and the
    pictures, and held-out examples are looked for among these alone.

    An epoch is one pass over the source. To shuffle it, each next example is drawn from a buffer.
    The order is a pure function of seed and epoch. A buffer mixes only neighbours, so a source
    that is sorted by class should be mixed beforehand. A run resumes exactly, but it has to read
    the completed part of the epoch again.

    Every pass must give the same examples in the same order. To shuffle, a ``DataLoader`` draws
    from torch's global generator, which is therefore set to the same state for each pass. A pass
    with another beginning or another number of examples is an error.

    Args:
        source: An iterable of batches that can be read repeatedly, such as a ``DataLoader``, or a
            function that returns one. A batch is an array or tensor, (B, D), (B, H, W),
            (B, C, H, W) or (B, H, W, C), or a tuple that starts with one. The source may also be
            a data set of the Hugging Face library, as an object or as "hf:owner/name"; or a folder
            or list of files (``.npy``, ``.parquet``, ``.feather``, ``.arrow``, ``.tar``), also at a
            place such as "s3://bucket/folder", of which each process reads its own part, see
            :class:`equipoise.data.shard_batches.ShardBatches`; or what :func:`equipoise.pack` has
            written.
        count: Number of examples in a pass. None counts them in an additional pass.
        validation: The validation examples, as an array or tensor such as
            ``load_data("photos").validation``, or the number of examples that are held out at the
            beginning of the stream. None uses the validation part of a Hugging Face data set if
            it has one, and otherwise holds out a tenth of all examples, at most 2000.
        test: The test examples, in the same forms as ``validation``. None uses the test part of a
            Hugging Face data set if it has one, and otherwise holds out a tenth of all examples,
            at most 2000.
        buffer_size: Number of examples in the shuffle buffer, which is kept in memory.
        name: Name of the data set in reports.
        column: Column of a Hugging Face data set. None means its images, or its only column of
            arrays. Of tables, a column of lists; None means all columns if they are numbers, or the
            only column of lists. Of tar files, the ending of the members that are the examples.
        image_size: Side in pixels of the square that each image of a Hugging Face data set or a tar
            file becomes, as in :func:`load`.
        channels: Channels of such images, as in :func:`load`.
        max_pixels: Most pixels of such an image; 50 million if None. A larger one is refused,
            because a stream leaves nothing out.

    Returns:
        The data, in which ``train`` is a :class:`Stream`. Its ``fingerprint`` covers the examples
        in memory and the number of all examples. The other examples would have to be read for it.

    Raises:
        ValueError: If the source can be read only once, or a model cannot learn from the examples.

    Example:
        >>> def batches():
        ...     rng = np.random.default_rng(0)
        ...     for _ in range(100):
        ...         yield rng.normal(size=(64, 5))
        >>> data = load_stream(batches)
        >>> data.train
        Stream(shape=(5120, 5), dtype=float32, buffer_size=10000)
        >>> data.validation
        Subset(shape=(640, 5), dtype=float32)
    """
    if buffer_size < 1:
        raise ValueError(f"buffer_size must be at least 1, not {buffer_size}")

    limits = _limits(max_pixels, None)
    loading: dict[str, Any] = {}
    if isinstance(validation, int | None) and isinstance(test, int | None):
        loading = _record(
            source,
            stream=True,
            count=count,
            validation=validation,
            test=test,
            buffer_size=buffer_size,
            name=name,
            column=column,
            image_size=image_size,
            channels=channels,
            max_pixels=max_pixels,
        )

    if is_packed_source(source):
        decided = [count, validation, test, column, image_size, channels, max_pixels]
        if any(value is not None for value in decided):
            raise ValueError(
                f"{source}: what packed examples are was decided when they were packed: leave out "
                "count, validation, test, column, image_size, channels and max_pixels"
            )
        name_of_stream = None if name == "stream" else name
        data = load_packed(locate(cast(str, source)), name_of_stream, buffer_size, AT_HAND)
        return replace(data, loading=loading)

    label = f"a stream of type {type(source).__name__}"
    notes: list[str] = []
    shards: tuple[Shard, ...] = ()
    if is_hub_table(source) or (
        isinstance(source, str) and source.startswith("hf:") and not is_place(source)
    ):
        passes = hub_passes(source, column, image_size, channels, limits)
        source = passes.train
        label = passes.source
        notes.extend(passes.notes)

        if name == "stream":
            name = passes.name
        if count is None:
            count = passes.count_rows()

        if validation is None and passes.validation is not None:
            validation = first_examples(reader(passes.validation, label)(), MAX_VALIDATION)
        if test is None and passes.test is not None:
            test = first_examples(reader(passes.test, label)(), MAX_TEST)
    elif _is_sharded(source):
        files = cast("str | Path | Sequence[str | Path]", source)
        shards = find_shards(files, column, image_size, channels, limits)
        total_found = sum(shard.n for shard in shards)
        if count not in (None, total_found):
            raise ValueError(f"{source}: {total_found} examples by their headers, not {count}")
        count = total_found
        is_folder = isinstance(source, str | Path)
        label = str(source) if is_folder else f"a list of {len(shards)} files"
        if name == "stream" and is_folder:
            name = _name_of(str(source))
        notes += describe_shards(shards)

        def read_all() -> Iterator[Array]:
            return chain.from_iterable(read_rows(shard, 0, shard.n) for shard in shards)

        source = read_all
    elif isinstance(source, str | Path) or hasattr(source, "shape"):
        subject = source if isinstance(source, str | Path) else label
        raise ValueError(
            f"{subject} needs no stream: load_data reads files as they are needed, and arrays are "
            "in memory already. Expected an iterable of batches, a function that makes one, "
            f"hf:owner/name, or a folder of files ({', '.join(ENDINGS)})"
        )
    elif column or image_size or channels or max_pixels:
        raise ValueError(
            f"{label}: column, image_size, channels and max_pixels are for Hugging Face data; "
            "convert the batches"
        )

    read = reader(source, label)
    total = count
    if total is None:
        total = sum(len(batch) for _, batch in read())

    n_test, n_validation = _numbers_held_out(test, validation, total, label)
    set_aside = n_test + n_validation
    n_first = min(total, set_aside + AT_HAND)
    first = first_examples(read(), n_first)
    if len(first) < n_first:
        raise ValueError(f"{label}: only {len(first)} examples, where count={total} was declared")

    if n_validation:
        validation = first[n_test:set_aside]
    if n_test:
        test = first[:n_test]
    content = Found(
        name,
        label,
        train=Part(first[set_aside:]),
        validation=Part(as_array(validation)),
        test=Part(as_array(test)),
    )
    data = prepare(content, test_fraction=0.0, validation_fraction=0.0)

    n_train = total - set_aside
    at_hand = data.train.at_hand
    stream = Stream(read, first, set_aside, n_train, at_hand, buffer_size, label)
    if shards:
        parts = [(shard.path.name, shard.n) for shard in shards]
        stream = ShardedStream(
            *(read, first, set_aside, n_train, at_hand, buffer_size, label),
            shards=shards,
            readers=choose_readers(shards),
        )

    if set_aside:
        notes.append(
            f"the first {set_aside} examples of the stream are held out: they should be like the "
            "others"
        )
    notes.append(f"units and initial values come from the first {len(at_hand)} training examples")

    identity = f"{data.fingerprint} {set_aside} {total}"
    if shards:
        identity += f" {parts}"
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return replace(
        data,
        train=stream,
        fingerprint=fingerprint,
        notes=(*notes, *data.notes),
        loading=loading,
    )


def _is_sharded(source: object) -> bool:
    """Tell whether a source is a folder, a table, a tar file, a place, or a list of files."""
    if isinstance(source, str | Path):
        if is_place(source):
            return True
        path = expanded(source)
        return path.is_dir() or (path.is_file() and path.suffix.lower() in (*ENDINGS[1:],))
    is_list = isinstance(source, list | tuple) and len(source) > 0
    parts = cast(Sequence[object], source)
    return is_list and all(isinstance(part, str | Path) for part in parts)


def is_packed_source(source: object) -> bool:
    """Tell whether a source is a folder of packed examples.

    Args:
        source: As in :func:`load_stream`.

    Returns:
        True if it is one.

    Raises:
        StoreError: If the packing was stopped and has not gone on.
    """
    is_hub = str(source).startswith("hf:") and not is_place(source)
    if not isinstance(source, str | Path) or source in NAMES or is_hub:
        return False
    return is_packed(locate(source))


def _name_of(source: str) -> str:
    """Name a stream after its folder or file."""
    place = locate(source)
    return place.resolve().name if isinstance(place, Path) else place.name


def _record(source: object, **arguments: object) -> dict[str, Any]:
    """Record with which arguments a source that has a name is found again.

    Paths become absolute, so that a run finds its data from anywhere. Arguments that change nothing
    are left out. Nothing is recorded of an object in memory. A name that cannot be written down is
    refused, because no run would find its data again.
    """
    if not isinstance(source, str | Path):
        return {}

    name = str(source)
    if is_place(name):
        check_text(name)
        given = {k: v for k, v in arguments.items() if v is not None and v is not False}
        return {"source": str(locate(name)), **given}

    # A path is never the name of a set, as when the examples were found.
    if source not in NAMES and expanded(name).exists():
        name = str(expanded(name).resolve())
    elif name.startswith("hf:") and expanded(name[3:]).exists():
        name = f"hf:{expanded(name[3:]).resolve()}"
    check_text(name)
    set_arguments = {
        key: value for key, value in arguments.items() if value is not None and value is not False
    }
    return {"source": name, **set_arguments}


def _as_recorded(categorical: Categorical) -> list[str] | bool:
    return categorical if isinstance(categorical, bool) else list(categorical)


def load_examples(
    source: object,
    shape: tuple[int, ...],
    *,
    data_dir: str | Path | None = None,
    strict: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    max_pixels: int | None = None,
    max_bytes: int | None = None,
    pages: Pages | None = None,
    fit: Fit = "crop",
    pool: bool = False,
    on_note: Callable[[str], None] | None = None,
    columns: Sequence[str] = (),
    label: str | None = None,
    labels: Sequence[Any] | Array | None = None,
    label_names: Sequence[str] = (),
    levels: Levels | None = None,
    is_wide: bool = False,
) -> Subset:
    """Load examples to which a trained model is applied, in the order of the source.

    No examples are split off, and any number of them is accepted. Image files are cropped,
    resized and converted to the model's shape.

    Args:
        source: The source of the examples, as in :func:`load`.
        shape: Shape of the model's examples, (C, H, W) or (D,).
        data_dir: The first folder in which a named set is looked for.
        strict: Whether an unreadable image is an error. If False, it is skipped.
        cache_dir: Folder for decoded images.
        progress: Function that is called with (done, total) while images are decoded.
        max_pixels: Most pixels of an image file, as in :func:`load`.
        max_bytes: Most bytes that a compressed file may unpack to, as in :func:`load`.
        pages: What becomes of image files of several pages, as in :func:`load`.
        fit: How images get the model's size, as in :func:`load`.
        pool: Whether to take all parts of a folder, and not only its test part.
        on_note: Called with each sentence that a user should read. None makes warnings of those on
            files that cannot be read.
        columns: Names of the model's columns, which are taken by name from a table that has names.
        label: Where labels are, as in :func:`load`. A source that lacks them has unknown labels,
            and a note says so.
        labels: Labels of the examples of an array, as in :func:`load`.
        label_names: Labels that the model knows. Others count as unknown, with a note, or are an
            error if ``strict``.
        levels: Levels of the model's categories by the number of the column. Values of a file or a
            data frame that are none of them become missing, with a note, or are an error if
            ``strict``.
        is_wide: Whether the model is one of images beyond 8 bits, so that image files of 8 bits
            are multiplied by 257, with a note.

    Returns:
        The test part if the source has its own, otherwise all examples. Their method ``names``
        says which file or row each is.

    Raises:
        ValueError: If the examples have another shape or cannot be read.
    """
    is_files = isinstance(source, str | Path) and (
        str(source).startswith("hf:")
        or expanded(source).is_dir()
        or expanded(source).suffix.lower() in EXTENSIONS
    )
    image_size: str | None = None
    channels: Channels | None = None
    if is_files and len(shape) == 3:
        depth, height, width = shape
        if depth in (1, 3) and pages != "channels":
            channels = "grey" if depth == 1 else "rgb"
        image_size = f"{width}x{height}"

    limits = _limits(max_pixels, max_bytes)
    reader = replace(
        _reader(image_size, channels, strict, cache_dir, progress, limits, pages, fit),
        for_model=True,
        is_wide=is_wide,
    )
    content = _find(
        source,
        data_dir,
        reader,
        False,
        columns,
        categorical=False,
        for_model=True,
        pool=pool,
        label=label,
        levels=levels or {},
        strict=strict,
    )
    if labels is not None:
        content = replace(content, train=content.train._replace(labels=labels))
    content = replace(content, label_names=tuple(label_names))
    if not strict:
        content = _with_known_labels(content)
    if content.pieces is not None and not len(content.pieces.test):
        content = replace(content, pieces=None)
    for axis in (1, 3):
        sides = content.train.values.shape
        if len(sides) == 4 and (sides[axis], *np.delete(sides, [0, axis])) == shape:
            content = replace(content, axis=content.axis or axis)
    data = prepare(content, test_fraction=0.0, validation_fraction=0.0, for_training=False)
    for note in content.train.notes:
        if on_note is not None:
            on_note(note)
        elif note.startswith((SKIPPED, UNREADABLE)) or note.endswith(AS_MISSING):
            warnings.warn(note, stacklevel=2)

    if data.shape != shape:
        raise ValueError(
            f"{data.source} has examples of shape {data.shape}, the model was trained on {shape}"
        )
    if len(data.test):
        return data.test
    return data.train.at_hand


def _reader(
    image_size: int | str | None,
    channels: Channels | None,
    strict: bool,
    cache_dir: str | Path | None,
    progress: Progress | None,
    limits: Limits,
    pages: Pages | None,
    fit: Fit,
    say: Callable[[str], None] | None = None,
) -> ImageReader:
    return ImageReader(
        image_size,
        channels,
        strict=strict,
        cache_dir=None if cache_dir is None else expanded(cache_dir),
        progress=progress,
        limits=limits,
        pages=pages,
        fit=fit,
        say=say,
    )


def _limits(max_pixels: int | None, max_bytes: int | None) -> Limits:
    """The limits of a user, or the usual ones where none is given."""
    given = {"max_pixels": max_pixels, "max_bytes": max_bytes}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    return replace(DEFAULT_LIMITS, **{k: v for k, v in given.items() if v is not None})


def _has_format(data: Data, image_size: int | str | None, channels: Channels | None) -> bool:
    """Whether examples have the image size and the channels that a user requested, if any."""
    if not image_size and not channels:
        return True
    if data.kind == "table":
        return False

    n_channels = {"grey": 1, "rgb": 3}
    depth, height, width = data.shape
    if channels and depth != n_channels[channels]:
        return False
    return not image_size or (width, height) == parse_size(image_size)


def _numbers_held_out(test: object, validation: object, total: int, label: str) -> tuple[int, int]:
    """Numbers of examples at the beginning of a stream that are held out for test and validation.

    A number is 0 if ``test`` or ``validation`` holds the examples of that part.
    """
    tenth = min(MAX_VALIDATION, max(1, total // 10))
    numbers = []
    for part in (test, validation):
        if part is None:
            numbers.append(tenth)
        else:
            numbers.append(part if isinstance(part, int) else 0)

    n_test, n_validation = numbers
    for name, part in (("test", test), ("validation", validation)):
        if isinstance(part, int) and part == 0:
            raise ValueError(
                f"{label}: {name}=0 holds nothing out; give at least 1, or the examples themselves"
            )

    if min(numbers) < 0 or total - sum(numbers) < MIN_EXAMPLES:
        raise ValueError(
            f"{label}: {total} examples, of which {n_test} are set aside for the test and "
            f"{n_validation} for validation, leave fewer than the {MIN_EXAMPLES} needed for "
            "training"
        )
    return n_test, n_validation


def _find(
    source: object,
    data_dir: str | Path | None,
    reader: ImageReader,
    download: bool,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    categorical: Categorical = True,
    *,
    for_model: bool = False,
    pool: bool = False,
    label: str | None = None,
    levels: Levels | None = None,
    strict: bool = False,
) -> Found:
    source = as_frame(source)
    if isinstance(source, str) and source not in NAMES and is_place(source):
        place = locate(source)
        if not isinstance(place, Path):
            raise ValueError(
                f"{source} is read as a stream: equipoise.load_stream, or --stream in the command"
            )
        source = place
    if label is not None and for_model and not _may_have(source, label):
        found = _find(source, data_dir, reader, download, columns, drop, for_model=True, pool=pool)
        return _with_unknown(found, label)
    if isinstance(source, str | Path) and source not in NAMES and is_table(source):
        path = expanded(source)
        if path.is_file():
            return _load_table(
                path,
                reader.limits,
                columns,
                drop,
                categorical,
                label,
                levels=levels if for_model else None,
                strict=strict,
            )
    if (columns or drop) and not for_model:
        raise ValueError(
            "columns and drop are for tables in files with names: "
            f"{', '.join(SUFFIXES)}; leave them out"
        )

    if not isinstance(source, str | Path):
        kind = _kind_of(source)
        if label is not None and not for_model:
            raise ValueError(f"{kind} has no label {label!r}; give the labels as labels=")
        names = _names_of(source)
        if not names:
            return Found("array", kind, Part(_as_array(source)))
        encoded = encode_frame(source, categorical, levels, strict=strict)
        values = Part(_as_array(encoded.frame), notes=encoded.notes)
        return Found("array", kind, values, columns=names, levels=encoded.levels)
    if not isinstance(categorical, bool):
        raise ValueError("categorical is for columns of tables; leave it out")

    if source in NAMES:
        folder = None if data_dir is None else expanded(data_dir)
        return _load_named(str(source), folder, reader, download, label)

    if str(source).startswith("hf:"):
        return hub_set(str(source).removeprefix("hf:"), reader, label=label)
    return _load_path(expanded(source), reader, pool=pool, label=label, for_model=for_model)


def _load_table(
    path: Path,
    limits: Limits,
    columns: Sequence[str] | None,
    drop: Sequence[str] | None,
    categorical: Categorical,
    label: str | None,
    *,
    levels: Levels | None,
    strict: bool,
) -> Found:
    """Read a table; that for a model by the names of its columns, where both have names."""
    for_model = levels is not None
    try:
        table = read_table(path, limits)
        if for_model and not table.has_names:
            columns = None
        labels: list[Any] | None = None
        if label is not None and not (for_model and label not in table.frame.columns):
            # Read as it is in the file, also where it is text.
            labels = table.select([label]).frame[label].to_list()
            drop = [*(drop or ()), label]
        absent = set(columns or ()) - {column.name for column in table.columns}
        if for_model and absent and len(absent) < len(columns or ()):
            lacking = _listed([repr(name) for name in columns or () if name in absent])
            there = _listed([repr(column.name) for column in table.columns])
            raise ValueError(
                f"there is no column {lacking} among {there}, and the model was trained on it: "
                "rename one, or add an empty column if its values are missing"
            )
        table = table.select(columns or None, drop)
        notes = [] if for_model else index_notes(table)
        if levels is None:
            table = table.with_categories(categorical)
        else:
            table = table.with_levels(levels, strict=strict)
        values = table.values(for_model=for_model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error

    names = tuple(column.name for column in table.columns) if table.has_names else ()
    name = path.name.partition(".")[0] or path.stem
    part = Part(values, notes=(*table.notes, *notes), labels=labels)
    if label is not None and labels is None:
        part = part._replace(notes=(*part.notes, _note_on_unknown(label)))
    return Found(name, str(path), part, columns=names, levels=table.levels)


def _note_on_unknown(label: str) -> str:
    return f"there is no label {label!r}: the labels of all examples are unknown to the model"


def _names_of(source: object) -> tuple[str, ...]:
    """Names of the columns of a data frame; none if they are not all text."""
    names = list(getattr(source, "columns", ()))
    return tuple(names) if all(isinstance(name, str) for name in names) else ()


def _load_named(
    name: str,
    data_dir: Path | None,
    reader: ImageReader,
    download: bool,
    label: str | None = None,
) -> Found:
    if label not in (None, "label") or (label and name == "celeba"):
        there = "no labels" if name == "celeba" else "the label 'label' alone"
        raise ValueError(f"{name} has {there}, not {label!r}")
    if name == "digits":
        return digits(with_labels=label is not None)

    try:
        if name == "celeba":
            return celeba(data_dir, reader)
        return idx_set(name, data_dir, reader.limits, with_labels=label is not None)
    except FileNotFoundError:
        if not download or name not in MIRRORS:
            raise

    return hub_set(MIRRORS[name], reader, name, label=label)


def _load_path(
    path: Path, reader: ImageReader, *, pool: bool, label: str | None, for_model: bool
) -> Found:
    source = str(path)
    if path.is_dir():
        if is_packed(path):
            raise ValueError(
                f"{source} holds packed examples, which equipoise.load_stream and 'equipoise "
                "train' read; for another use give one of its .npy files"
            )
        if label not in (None, "folder"):
            raise ValueError(f"{source}: the label of images is 'folder', not {label!r}")
        name = os.path.basename(os.path.abspath(path))  # of "..", too
        with_labels = label is not None
        return read_folder(list_images(path), name, reader, pool=pool, with_labels=with_labels)

    if not path.exists():
        similar = _similar_names(path)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else "."
        raise ValueError(
            f"{source!r} is neither a known data set nor a path{hint} Expected {POSSIBLE}"
        )
    if label is not None and path.suffix != ".npz":
        raise ValueError(f"{source} has no label {label!r}; .npz files, tables and folders have")
    if path.suffix.lower() in EXTENSIONS:
        return Found(path.stem, source, reader.read(one_image(path).encoded()), axis=1)
    if path.suffix not in {".npy", ".npz"}:
        raise ValueError(f"{source} is a file of a type that cannot be read; expected {POSSIBLE}")

    try:
        if path.suffix == ".npy":
            return Found(path.stem, source, Part(read_npy(path)))
        with open_npz(path, reader.limits) as archive:
            names = [name for name in archive.names if label not in _npz_words(name)]
            keys = _npz_keys(names)
            arrays = {key: archive.read(key) for key in keys}
            labels = {
                key: archive.read(name)
                for key in keys
                for name in (_npz_label(key, label, archive.names) if label else ())
            }
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error

    if label and not labels and not for_model:
        raise ValueError(
            f"{source} holds no labels {label!r}; it holds {_listed(list(archive.names))}"
        )
    train, validation, test = (_npz_part(arrays, keys, labels) for keys in NPZ_KEYS)
    if train is None:
        # The only array, whatever its name: it must not be its own test part, too.
        key, values = next(iter(arrays.items()))
        train, validation, test = Part(values, labels=labels.get(key)), None, None
    found = Found(path.stem, source, train, validation, test)
    return _with_unknown(found, label) if label and not labels else found


def _with_known_labels(content: Found) -> Found:
    """Make labels unknown that a model does not know, with a note."""
    parts = {
        "train": _known(content.train, content),
        "validation": content.validation and _known(content.validation, content),
        "test": content.test and _known(content.test, content),
    }
    return replace(content, **parts)  # type: ignore[arg-type]


def _known(part: Part, content: Found) -> Part:
    """Those labels of a part that a model knows."""
    if part.labels is None:
        return part
    names = names_of(part.labels, content.source)
    others = [row for row, name in enumerate(names) if name not in (None, *content.label_names)]
    if not others:
        return part

    first = visible(str(names[others[0]]), 50)
    note = (
        f"{len(others):,} labels are none of the model's, the first is {first!r} in row "
        f"{others[0]}: {AS_MISSING}"
    )
    labels = [name if name in content.label_names else None for name in names]
    return part._replace(labels=labels, notes=(*part.notes, note))


def _may_have(source: object, label: str) -> bool:
    """Tell whether a source is of a kind that has labels of this name."""
    if not isinstance(source, str | Path):
        return False
    if source in NAMES:
        return label == "label" and source != "celeba"
    if str(source).startswith("hf:"):
        return True
    path = expanded(source)
    if path.is_dir():
        return label == "folder" and bool(sort_folders(list_images(path).names).classes)
    return path.suffix == ".npz" or is_table(path)


def _with_unknown(found: Found, label: str) -> Found:
    """Note that examples for a conditional model have no labels."""
    notes = (*found.train.notes, _note_on_unknown(label))
    return replace(found, train=found.train._replace(notes=notes))


def _npz_words(name: str) -> tuple[str, ...]:
    """The name of an array in an .npz file, and its parts, as y and train of y_train."""
    return (name, *name.split("_"))


def _npz_label(key: str, label: str, names: list[str]) -> list[str]:
    """Name of the array of labels that belongs to an array of examples, if there is one.

    That of x_train or train is y_train, and that of the only array is y.
    """
    part = key.removeprefix("x_")
    candidates = [f"{label}_{part}", f"{part}_{label}"]
    if key in NPZ_SINGLE_KEYS or not any(key in keys for keys in NPZ_KEYS):
        candidates.append(label)
    return [name for name in candidates if name in names][:1]


def _similar_names(path: Path) -> list[str]:
    """Names of data sets, and of files in the same folder, that are similar to a path."""
    siblings: list[str] = []
    if path.parent.is_dir():
        siblings = [str(sibling) for sibling in path.parent.glob("*")]

    source = str(path)
    similar_sets = difflib.get_close_matches(source.lower().replace("_", "-"), NAMES)
    return similar_sets + difflib.get_close_matches(source, siblings)


def _npz_keys(names: list[str]) -> list[str]:
    """Names of the arrays in an .npz file that hold examples: one array, or one for each part."""
    parts = [next((key for key in keys if key in names), None) for keys in NPZ_KEYS]
    if parts[0] is not None:
        return [key for key in parts if key is not None]

    if len(names) == 1:
        return names

    single = [key for key in NPZ_SINGLE_KEYS if key in names]
    if len(single) != 1:
        raise ValueError(
            f"it holds {_listed(names) or 'no arrays'}; expected a single array, one called "
            f"{', '.join(NPZ_SINGLE_KEYS)}, or train (and validation, test) or x_train (and "
            "x_val, x_test)"
        )
    return single


def _listed(names: list[str]) -> str:
    """The first names, each cut where it is long."""
    shown = [visible(name, LONGEST_ARRAY_NAME) for name in names[:LISTED_ARRAYS]]
    if len(names) > LISTED_ARRAYS:
        shown.append("...")
    return ", ".join(shown).replace("\n", "\\n")


def _npz_part(
    arrays: dict[str, Array], keys: tuple[str, ...], labels: dict[str, Array]
) -> Part | None:
    """The first array that has one of the given names, with its labels; None if there is none."""
    for key in keys:
        if key in arrays:
            return Part(arrays[key], labels=labels.get(key))
    return None


def _kind_of(source: object) -> str:
    """Say what data in memory are."""
    if isinstance(source, np.ndarray):
        return "an array"
    if hasattr(source, "detach"):
        return "a tensor"
    if hasattr(source, "columns"):
        return "a data frame"
    return f"an object of type {type(source).__name__}"


def _as_array(source: object) -> Array:
    """Convert an array, tensor, data frame, nested list or map-style data set to an array."""
    is_sequence = isinstance(source, np.ndarray | list | tuple)
    if is_sequence or hasattr(source, "detach") or hasattr(source, "__array__"):
        array = as_array(source)
        of_objects = array.dtype == object and array.ndim == 2
        return _numbers(array, _names_of(source)) if of_objects else array

    if isinstance(source, Mapping):
        keys = _listed([str(key) for key in source])
        raise ValueError(f"a dictionary with the keys {keys}; give one of its arrays")
    refuse_hidden(source)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return _collect(source)
    raise ValueError(
        f"an object of type {type(source).__name__}; expected an array, a tensor, a data set with "
        f"__len__ and __getitem__, or {POSSIBLE}"
    )


def _numbers(values: Array, names: tuple[str, ...]) -> Array:
    """Make numbers of a table whose columns differ in type, and NaN of what is missing."""
    numbers = np.full(values.shape, np.nan)
    bad = []
    for j, column in enumerate(values.T):
        # The missing value of pandas is equal to nothing, and its comparison has no truth.
        is_missing = [v is None or type(v).__name__ in ("NAType", "NaTType") for v in column]
        rest = column[np.logical_not(is_missing)]
        other = [v for v in rest if not isinstance(v, Real | Decimal | np.bool_)]
        if other or not len(rest):
            what = f" (such as {visible(repr(other[0]), 30)})" if other else " (no value)"
            bad.append(f"{names[j]!r}{what}" if names else f"{j}{what}")
        else:
            numbers[np.logical_not(is_missing), j] = rest.astype(np.float64)
    if bad:
        listed = ", ".join(bad[:LISTED_ARRAYS]) + (", ..." if len(bad) > LISTED_ARRAYS else "")
        raise ValueError(
            f"columns {listed} hold no numbers: leave them out, or give numbers in their place"
        )
    return numbers


def _collect(dataset: Any) -> Array:  # noqa: ANN401
    """Copy the examples of a map-style data set into one array."""
    if not len(dataset):
        raise ValueError("the data set is empty")

    first = _example(dataset, 0)
    collected = np.empty((len(dataset), *first.shape), first.dtype)
    collected[0] = first

    # Each item is read only once, because that may be expensive.
    for index in range(1, len(dataset)):
        example = _example(dataset, index)
        if example.shape != first.shape:
            raise ValueError(
                f"item {index} of the data set has the shape {example.shape}, item 0 {first.shape}"
            )

        if example.dtype != collected.dtype:
            # As for a list of all items, so that nothing is cut off to fit the first one.
            collected = collected.astype(np.promote_types(example.dtype, collected.dtype))
        collected[index] = example

    return collected


def _example(dataset: Any, index: int) -> Array:  # noqa: ANN401
    item = dataset[index]
    if isinstance(item, dict):
        raise ValueError(
            f"item {index} of the data set is a dictionary with the keys "
            f"{', '.join(map(str, item))}; expected the example itself, or a tuple that starts "
            "with it"
        )
    if isinstance(item, tuple | list):
        item = item[0]
    return as_array(item)
