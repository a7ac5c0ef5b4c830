"""``load``: from whatever a user names or holds to checked, split data."""

import difflib
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.data.arrays import Found, Part, prepare
from equipoise.data.cache import default_cache_dir
from equipoise.data.dataset import Array, Channels, Data, Subset
from equipoise.data.encoded import ImageReader, Progress, list_images
from equipoise.data.hub import MIRRORS, hub_set
from equipoise.data.named import NAMES, celeba, digits, idx_set

NPZ_KEYS = (("train", "x_train"), ("validation", "x_validation", "x_val"), ("test", "x_test"))
NPZ_SINGLE_KEYS = ("x", "data", "images")
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
    if any(wanted) and (data.kind == "table" or any(w and w != s for w, s in zip(wanted, data.shape, strict=True))):
        raise ValueError(
            f"{data.source}: examples of shape {data.shape}; image_size={image_size} and channels={channels} "
            "convert image files only: convert the array yourself, or leave them out"
        )
    return data


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
    is_files = isinstance(source, str | Path) and (str(source).startswith("hf:") or Path(source).expanduser().is_dir())
    is_square = len(shape) == 3 and shape[1] == shape[2]
    channels: Channels | None = ("grey" if shape[0] == 1 else "rgb") if is_files and len(shape) == 3 else None
    reader = _reader(shape[1] if is_files and is_square else None, channels, strict, cache_dir, progress)
    data = prepare(_find(source, data_dir, reader, download=False), 0.0, 0.0, for_training=False)
    if data.shape != shape:
        raise ValueError(f"{data.source} has examples of shape {data.shape}, the model was trained on {shape}")
    return data.test if len(data.test) else data.train


def _reader(
    image_size: int | None,
    channels: Channels | None,
    strict: bool,
    cache_dir: str | Path | None,
    progress: Progress | None,
) -> ImageReader:
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    return ImageReader(image_size, channels, strict=strict, cache_dir=folder, progress=progress)


def _find(source: object, data_dir: str | Path | None, reader: ImageReader, download: bool) -> Found:
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
        close = difflib.get_close_matches(source.lower().replace("_", "-"), NAMES) + difflib.get_close_matches(
            source, siblings
        )
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
        raise ValueError(f"{source!r} is neither a known data set nor a path{hint} Expected {POSSIBLE}")
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
    train, validation, test = (next((Part(arrays[key]) for key in keys if key in arrays), None) for keys in NPZ_KEYS)
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
    if isinstance(source, np.ndarray):
        return source
    if hasattr(source, "detach"):  # a tensor: torch need not be imported to recognise one
        tensor = source.detach().cpu()
        # NumPy knows no bfloat16, and floats are read as float32 in any case.
        return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
    if hasattr(source, "__array__"):
        return np.asarray(source)
    if isinstance(source, list | tuple):
        return np.asarray(source)
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
        return _as_array(item) if hasattr(item, "detach") else np.asarray(item)

    if not len(dataset):
        raise ValueError("the data set is empty")
    first = example(0)
    collected = np.empty((len(dataset), *first.shape), first.dtype)
    for index in range(len(dataset)):
        item = first if index == 0 else example(index)  # once each: items may be expensive
        if item.shape != first.shape:
            raise ValueError(f"item {index} of the data set has the shape {item.shape}, item 0 {first.shape}")
        collected[index] = item
    return collected
