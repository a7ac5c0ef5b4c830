"""``load``: from whatever a user names or holds to checked, split data."""

import difflib
import hashlib
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.data.arrays import MIN_EXAMPLES, Found, Part, as_array, prepare
from equipoise.data.cache import default_cache_dir
from equipoise.data.dataset import MAX_VALIDATION, Array, Channels, Data, Subset
from equipoise.data.encoded import ImageReader, Progress, list_images
from equipoise.data.hub import MIRRORS, hub_passes, hub_set, is_hub_table
from equipoise.data.named import NAMES, celeba, digits, idx_set
from equipoise.data.stream import Stream, first_examples, reader

NPZ_KEYS = (("train", "x_train"), ("validation", "x_validation", "x_val"), ("test", "x_test"))
NPZ_SINGLE_KEYS = ("x", "data", "images")
AT_HAND = 5000
"""Training examples of a stream that are kept."""
MAX_TEST = 10_000
"""Of a streamed set's own test part: enough for the distances between sets of images."""
POSSIBLE = f"one of {', '.join(NAMES)}, a folder of images, an .npy or .npz file, or hf:owner/name"


def load(
    source: object = "digits",
    *,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    channels: Channels | None = None,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.1,
    strict: bool = False,
    download: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Data:
    """Find examples, check them and split them.

    The split is random but fixed: it depends on the number of examples only. A set's own test and
    validation parts are kept. A named set that is nowhere is a ``FileNotFoundError`` that lists the places,
    an extra that is not installed an ``ImportError``, a cache that cannot be written an ``OSError``.

    Args:
        source: "digits", "mnist", "fashion-mnist" or "celeba"; the path of a folder of images or of an .npy
            or .npz file; "hf:owner/name"; an array or tensor (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C);
            or a map-style data set whose items are examples or (example, ...) tuples.
        data_dir: where to look first for a named set; then $EQUIPOISE_DATA and the usual places.
        image_size: cut a centred square out of each image and resize it to this side, in pixels; for
            files only. None to keep images of one size, of at most 128 x 128, as they are.
        channels: "grey", "rgb", or None for grey where all files are grey.
        test_fraction: share of all examples for the test where the set has no test part, in [0, 1).
        validation_fraction: share of the rest for validation, in [0, 1), at most 2000 examples.
        strict: whether an unreadable image is an error; else it is skipped, and a note says so.
        download: whether a named set that is nowhere on this machine may be fetched from the Hugging Face
            hub.
        cache_dir: where decoded images are kept; $EQUIPOISE_CACHE or ~/.cache/equipoise if None.
        progress: called with (done, total) while images are decoded, often.

    Returns:
        The data, as views that do not copy a memory map.

    Raises:
        ValueError: if the source is unknown or cannot be learned from; the message says why and what to do.

    Example:
        >>> data = load("digits")
        >>> data.train, data.test, data.kind
        (Subset(shape=(1455, 1, 8, 8), dtype=uint8), Subset(shape=(180, 1, 8, 8), dtype=uint8), 'image')
        >>> load(np.random.default_rng(0).normal(size=(100, 3))).train
        Subset(shape=(81, 3), dtype=float32)
    """
    if channels not in {None, "grey", "rgb"}:
        raise ValueError(f"channels must be 'grey', 'rgb' or None, not {channels!r}")
    reader = _reader(image_size, channels, strict, cache_dir, progress)
    found = _find(source, data_dir, reader, download)
    data = prepare(found, test_fraction, validation_fraction)
    wanted = (channels and (1 if channels == "grey" else 3), image_size, image_size)
    if any(wanted) and (
        data.kind == "table" or any(w and w != s for w, s in zip(wanted, data.shape, strict=True))
    ):
        raise ValueError(
            f"{data.source}: examples of shape {data.shape}; image_size={image_size} and channels={channels} "
            "convert image files only: convert the array yourself, or leave them out"
        )
    return replace(
        data,
        loading=_record(
            source,
            data_dir=data_dir and str(Path(data_dir).expanduser().resolve()),
            image_size=image_size,
            channels=channels,
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            strict=strict,
            download=download,
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
    image_size: int | None = None,
    channels: Channels | None = None,
) -> Data:
    r"""Train on more examples than can be kept: they come in batches, anew in each epoch, and are never collected.

    What is kept is the beginning: the examples that are held out, and the first 5000 training examples
    (``data.train.at_hand``), which give units, initial values and pictures. An epoch is one pass. It is shuffled by
    drawing each next example from a buffer, in an order that is a pure function of seed and epoch; sources that are
    sorted by class should be mixed beforehand, since a buffer mixes only neighbours. A run resumes exactly, but reads
    again the part of the epoch that it had done.

    Every pass must give the same examples in the same order; torch's global generator, by which a ``DataLoader``
    shuffles, is set to a fixed state for each pass. What differs from the beginning known, or in number, is an error.

    Args:
        source: an iterable of batches that can be gone through repeatedly, such as a ``DataLoader``, or a function
            that makes one. A batch is an array or tensor, (B, D), (B, H, W), (B, C, H, W) or (B, H, W, C), or a tuple
            that starts with one. Or a data set of the Hugging Face library, as an object or "hf:owner/name", which is
            then streamed.
        count: examples in a pass; None to count them in one more pass.
        validation: examples held out, as an array or tensor such as ``load_data("photos").validation``; or how many
            of the first examples of the stream are held out for it; None for a tenth of all, at most 2000.
        test: likewise, for the final figures; None for the set's own test part where ``source`` names one on the hub.
        buffer_size: examples in the shuffle buffer; as many bytes are needed as they take.
        name: what the data set is called in reports.
        column: of a Hugging Face data set; None for its images, or else its only column of arrays.
        image_size: as for :func:`load`, for encoded images from Hugging Face.
        channels: likewise.

    Returns:
        The data; ``train`` is a :class:`Stream`. ``fingerprint`` covers the examples kept and the number of all, not
        the others: they would have to be read for it.

    Raises:
        ValueError: if the source can be gone through only once, or the examples cannot be learned from.

    Example:
        >>> def batches():
        ...     rng = np.random.default_rng(0)
        ...     for _ in range(100):
        ...         yield rng.normal(size=(64, 5))
        >>> data = load_stream(batches)
        >>> data.train, data.validation
        (Stream(shape=(5120, 5), dtype=float32, buffer_size=10000), Subset(shape=(640, 5), dtype=float32))
    """
    if buffer_size < 1:
        raise ValueError(f"buffer_size must be at least 1, not {buffer_size}")
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
        )
    label, notes = f"a stream of type {type(source).__name__}", []
    if is_hub_table(source) or (isinstance(source, str) and source.startswith("hf:")):
        found = hub_passes(source, column, image_size, channels)
        name, label, notes = (
            (found.name if name == "stream" else name),
            found.source,
            list(found.notes),
        )
        count = found.count_rows() if count is None else count
        source = found.train
        validation, test = (
            first_examples(reader(own, found.source)(), most) if given is None and own else given
            for given, own, most in (
                (validation, found.validation, MAX_VALIDATION),
                (test, found.test, MAX_TEST),
            )
        )
    elif isinstance(source, str | Path) or hasattr(source, "shape"):
        raise ValueError(
            f"{source if isinstance(source, str | Path) else label} needs no stream: load_data reads files as they are "
            "needed, and arrays are in memory already. Expected an iterable of batches, a function that makes one, or "
            "hf:owner/name"
        )
    elif column or image_size or channels:
        raise ValueError(
            f"{label}: column, image_size and channels are for Hugging Face data; convert the batches"
        )
    read = reader(source, label)
    total = sum(len(batch) for _, batch in read()) if count is None else count

    tenth = min(MAX_VALIDATION, max(1, total // 10))
    tests, validations = (
        tenth if given is None else given if isinstance(given, int) else 0
        for given in (test, validation)
    )
    set_aside = tests + validations
    if min(tests, validations) < 0 or total - set_aside < MIN_EXAMPLES:
        raise ValueError(
            f"{label}: {total} examples, of which {tests} are set aside for the test and {validations} for validation, "
            f"leave fewer than the {MIN_EXAMPLES} needed for training"
        )
    kept = min(total, set_aside + AT_HAND)
    first = first_examples(read(), kept)
    if len(first) < kept:
        raise ValueError(f"{label}: only {len(first)} examples, where count={total} was declared")
    data = prepare(
        Found(
            name,
            label,
            Part(first[set_aside:]),
            Part(as_array(validation) if validations == 0 else first[tests:set_aside]),
            Part(as_array(test) if tests == 0 else first[:tests]),
        ),
        0.0,
        0.0,
    )
    stream = Stream(
        read, first, set_aside, total - set_aside, data.train.at_hand, buffer_size, label
    )
    if set_aside:
        notes.append(
            f"held out are the first {set_aside} examples of the stream: they should be like the others"
        )
    notes.append(
        f"units and initial values come from the first {len(stream.at_hand)} training examples"
    )
    fingerprint = hashlib.sha256(f"{data.fingerprint} {set_aside} {total}".encode()).hexdigest()
    return replace(
        data,
        train=stream,
        fingerprint=fingerprint,
        notes=(*notes, *data.notes),
        loading=loading,
    )


def _record(source: object, **arguments: Any) -> dict[str, Any]:
    """Record with which arguments a source that has a name is found again.

    Paths become absolute, so that a run finds its data from anywhere. Arguments that change nothing
    are left out. Nothing is recorded of an object in memory.
    """
    if not isinstance(source, str | Path):
        return {}

    name = str(source)
    if name not in NAMES and Path(name).expanduser().exists():
        name = str(Path(name).expanduser().resolve())
    set_arguments = {
        key: value for key, value in arguments.items() if value is not None and value is not False
    }
    return {"source": name, **set_arguments}


def load_examples(
    source: object,
    shape: tuple[int, ...],
    *,
    data_dir: str | Path | None = None,
    strict: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Subset:
    """Find examples to apply a trained model to: all of them, in the order of the source.

    Nothing is split off and any number will do. Image files are cropped, resized and converted to the model's shape.

    Args:
        source: as for :func:`load`.
        shape: of the model's examples, (C, H, W) or (D,).
        data_dir: where to look first for a named set.
        strict: whether an unreadable image is an error; else it is skipped.
        cache_dir: where decoded images are kept.
        progress: called with (done, total) while images are decoded.

    Returns:
        The test part where the source has one of its own, otherwise all examples.

    Raises:
        ValueError: if the examples are of another shape, or cannot be read.
    """
    is_files = isinstance(source, str | Path) and (
        str(source).startswith("hf:") or Path(source).expanduser().is_dir()
    )
    is_square = len(shape) == 3 and shape[1] == shape[2]
    channels: Channels | None = (
        ("grey" if shape[0] == 1 else "rgb") if is_files and len(shape) == 3 else None
    )
    reader = _reader(
        shape[1] if is_files and is_square else None, channels, strict, cache_dir, progress
    )
    data = prepare(_find(source, data_dir, reader, download=False), 0.0, 0.0, for_training=False)
    if data.shape != shape:
        raise ValueError(
            f"{data.source} has examples of shape {data.shape}, the model was trained on {shape}"
        )
    return data.test if len(data.test) else data.train.at_hand


def _reader(
    image_size: int | None,
    channels: Channels | None,
    strict: bool,
    cache_dir: str | Path | None,
    progress: Progress | None,
) -> ImageReader:
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    return ImageReader(image_size, channels, strict=strict, cache_dir=folder, progress=progress)


def _find(
    source: object, data_dir: str | Path | None, reader: ImageReader, download: bool
) -> Found:
    root = None if data_dir is None else Path(data_dir).expanduser()
    if not isinstance(source, str | Path):
        return Found("array", f"an object of type {type(source).__name__}", Part(_as_array(source)))
    if source in NAMES:
        return _load_named(str(source), root, reader, download)
    if str(source).startswith("hf:"):
        return hub_set(str(source).removeprefix("hf:"), reader)
    return _load_path(Path(source).expanduser(), reader)


def _load_named(name: str, data_dir: Path | None, reader: ImageReader, download: bool) -> Found:
    if name == "digits":
        return digits()
    try:
        return celeba(data_dir, reader) if name == "celeba" else idx_set(name, data_dir)
    except FileNotFoundError:
        if not download or name not in MIRRORS:
            raise
    return hub_set(MIRRORS[name], reader, name)


def _load_path(path: Path, reader: ImageReader) -> Found:
    source = str(path)
    if path.is_dir():
        return Found(path.absolute().name, source, reader.read(list_images(path).encoded()))
    if not path.exists():
        siblings = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(
            source.lower().replace("_", "-"), NAMES
        ) + difflib.get_close_matches(source, siblings)
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
        raise ValueError(
            f"{source!r} is neither a known data set nor a path{hint} Expected {POSSIBLE}"
        )
    if path.suffix not in {".npy", ".npz"}:
        raise ValueError(f"{source} is a file of a type that cannot be read; expected {POSSIBLE}")
    try:
        if path.suffix == ".npz" and not zipfile.is_zipfile(path):
            raise ValueError("it is damaged or no .npz archive")
        # Never pickle: it would run code from the file.
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return Found(path.stem, source, Part(content))
        with content:
            arrays = {key: content[key] for key in _npz_keys(content.files, source)}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    train, validation, test = (
        next((Part(arrays[key]) for key in keys if key in arrays), None) for keys in NPZ_KEYS
    )
    return Found(path.stem, source, train or Part(next(iter(arrays.values()))), validation, test)


def _npz_keys(found: list[str], source: str) -> list[str]:
    """Which arrays of an .npz file hold examples: one of them, or those of the named parts."""
    parts = [next((key for key in keys if key in found), None) for keys in NPZ_KEYS]
    if parts[0] is not None:
        return [key for key in parts if key is not None]
    single = found if len(found) == 1 else [key for key in NPZ_SINGLE_KEYS if key in found]
    if len(single) != 1:
        raise ValueError(
            f"it holds {', '.join(found) or 'no arrays'}; expected a single array, one called "
            f"{', '.join(NPZ_SINGLE_KEYS)}, or train (and validation, test) or x_train (and x_val, x_test)"
        )
    return single


def _as_array(source: object) -> Array:
    """An array, tensor, data frame, nested list or map-style data set, as an array."""
    if (
        isinstance(source, np.ndarray | list | tuple)
        or hasattr(source, "detach")
        or hasattr(source, "__array__")
    ):
        return as_array(source)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return _collect(source)
    raise ValueError(
        f"an object of type {type(source).__name__}; expected an array, a tensor, a data set with __len__ "
        f"and __getitem__, or {POSSIBLE}"
    )


def _collect(dataset: Any) -> Array:  # noqa: ANN401
    def example(index: int) -> Array:
        item = dataset[index]
        if isinstance(item, dict):
            raise ValueError(
                f"item {index} of the data set is a dictionary with the keys {', '.join(map(str, item))}; "
                "expected the example itself, or a tuple that starts with it"
            )
        item = item[0] if isinstance(item, tuple | list) else item
        return as_array(item)

    if not len(dataset):
        raise ValueError("the data set is empty")
    first = example(0)
    collected = np.empty((len(dataset), *first.shape), first.dtype)
    for index in range(len(dataset)):
        item = first if index == 0 else example(index)  # once each: items may be expensive
        if item.shape != first.shape:
            raise ValueError(
                f"item {index} of the data set has the shape {item.shape}, item 0 {first.shape}"
            )
        collected[index] = item
    return collected
