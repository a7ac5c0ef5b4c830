"""Hugging Face data sets, whole or as a stream, by the library ``datasets`` (extra ``hub``)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equipoise.data.arrays import Found, Part
from equipoise.data.dataset import Array, Channels
from equipoise.data.encoded import Encoded, ImageReader
from equipoise.data.gate import DEFAULT_LIMITS, Limits
from equipoise.data.images import Header, Plan, decode, make_plan, plan_notes, read_header

MIRRORS = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist"}
"""Addresses of named sets that are not on this machine and that the user allows to download."""

ARRAYS = ("Array2D", "Array3D", "List", "LargeList", "Sequence")
"""Feature types of the library that hold an array in each row."""

ROWS_AT_ONCE = 256
"""Number of rows in a batch of a stream."""

PLANNED_FROM = 1000
"""Number of images at the beginning of a stream whose headers decide the format of all images."""


def hub_set(
    address: str, reader: ImageReader, name: str | None = None, *, label: str | None = None
) -> Found:
    """Load the images of a data set on the hub, in a local folder or in a parquet file.

    Args:
        address: "owner/name", or a path.
        reader: Reader that decodes the images.
        name: Name of the data set. None means its address.
        label: Column of labels. None takes none.

    Returns:
        The images, with the validation part and the test part of the data set if it has them.

    Raises:
        ImportError: If ``datasets`` is not installed.
        ValueError: If the data set cannot be loaded or has no images.
    """
    source = f"hf:{address}"
    datasets = _library(source)
    splits = _splits(datasets, address)
    train = _train_of(splits, address)

    if not _image_columns(datasets, train.features):
        raise ValueError(
            f"{source} has no column of images; its columns are {_described(train.features)}"
        )
    if label is not None and label not in train.features:
        raise ValueError(
            f"{source} has no column {label!r}; its columns are {_described(train.features)}"
        )
    column, notes = _choose_column(datasets, train.features, None, source)

    def read(split: str, table: Any) -> Part:  # noqa: ANN401
        table = table.cast_column(column, datasets.Image(decode=False))

        images = Encoded(
            count=len(table),
            open=lambda row: _content(table[row][column]),
            name=partial("{} row {}".format, split),
            stamp=f"{address} {split} {len(table)} {table._fingerprint}",
            source=source,
        )
        part = reader.read(images)
        if label is None or label not in table.features:
            return part

        # Names of classes, where the data set has some; several rows may come from one image.
        names = getattr(table.features[label], "names", None)
        values = [
            value if names is None or value is None or value < 0 else names[value]
            for value in table[label]
        ]
        rows = range(len(table)) if part.rows is None else [row for row, _ in part.rows]
        return part._replace(labels=[values[row] for row in rows])

    train_part = read("train", train)
    train_part = train_part._replace(notes=(*train_part.notes, *notes))

    validation_part = test_part = None
    validation = _validation_of(splits)
    if validation is not None:
        validation_part = read("validation", validation)
    if "test" in splits and splits["test"] is not train:
        test_part = read("test", splits["test"])

    return Found(name or address, source, train_part, validation_part, test_part, axis=1)


class HubPasses(NamedTuple):
    r"""A data set that is read as a stream.

    Args:
        name: Name of the data set.
        source: Name of the data set in error messages.
        train: Function that begins a pass over the training part, in batches, (B, \*).
        count_rows: Function that returns the number of training examples. If the number is not
            known, it reads all rows, but decodes none.
        validation: Function that begins a pass over the set's own validation part. None if the
            set has no such part.
        test: Function that begins a pass over the set's own test part. None if the set has no
            such part.
        notes: Sentences that a user should read.
    """

    name: str
    source: str
    train: Callable[[], Iterator[Array]]
    count_rows: Callable[[], int]
    validation: Callable[[], Iterator[Array]] | None = None
    test: Callable[[], Iterator[Array]] | None = None
    notes: tuple[str, ...] = ()


def is_hub_table(source: object) -> bool:
    """Whether an object is a data set of the library ``datasets``, without importing the library.

    Args:
        source: Any object.

    Returns:
        True for a ``Dataset`` or an ``IterableDataset``.
    """
    package = type(source).__module__.partition(".")[0]
    return package == "datasets" and hasattr(source, "select_columns")


def hub_passes(
    source: Any,  # noqa: ANN401 (an address or a table)
    column: str | None = None,
    image_size: int | str | None = None,
    channels: Channels | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> HubPasses:
    """Stream a data set from the hub, from local files, or from an object of the library.

    Args:
        source: "hf:owner/name", "hf:" and a path, or a ``Dataset`` or ``IterableDataset``.
        column: Column to train on. None means the images, or the only column of arrays.
        image_size: Side in pixels of the square that each image becomes. None keeps the common
            size of the images.
        channels: "grey" or "rgb". None means grey if the first images are grey, otherwise RGB.
        limits: The most that an image may claim.

    Returns:
        The passes.

    Raises:
        ImportError: If ``datasets`` is not installed.
        ValueError: If the data set cannot be loaded, if the column to use is not clear, or if one
            of the first images cannot be read.
    """
    datasets = _library(str(source))
    splits: dict[str, Any] = {}
    if isinstance(source, str):
        label = source
        name = source.removeprefix("hf:")

        splits = _splits(datasets, name, streaming=True)
        train = _train_of(splits, name)
    else:
        label = f"a Hugging Face data set of type {type(source).__name__}"
        name = "stream"
        train = source

    features = train.features or {}
    column, notes = _choose_column(datasets, features, column, label)
    is_image = column in _image_columns(datasets, features)

    def rows(table: Any) -> Iterator[list[Any]]:  # noqa: ANN401
        table = table.select_columns([column])
        if is_image:
            table = table.cast_column(column, datasets.Image(decode=False))

        return (batch[column] for batch in table.iter(batch_size=ROWS_AT_ONCE))

    def count_rows() -> int:
        try:
            return len(train)
        except TypeError:
            pass  # a stream has no length

        # The hub may know the number of rows. It is not used for a stream that a user passes,
        # because that may be a selection of the rows of another.
        if splits:
            known_splits = getattr(train.info, "splits", None) or {}
            split = known_splits.get(str(train.split))
            if split and split.num_examples:
                return int(split.num_examples)

        return sum(map(len, rows(train)))

    plan: Plan | None = None
    if is_image:
        first = list(islice(chain.from_iterable(rows(train)), PLANNED_FROM))
        headers = Counter(_headers(first, label, limits))

        plan = make_plan(headers, image_size, channels, None, label, pages="first")
        effects = plan_notes(headers, plan)
        notes = (*notes, *(f"among the first {len(first)}, {effect}" for effect in effects))
    elif image_size or channels:
        raise ValueError(
            f"{label}: {column} holds no encoded images; image_size and channels convert those only"
        )

    def read(table: Any) -> Iterator[Array]:  # noqa: ANN401
        if plan is None:
            return map(np.asarray, rows(table))
        return _decoded(rows(table), plan, label, limits)

    validation = _validation_of(splits)
    test = splits.get("test")
    return HubPasses(
        name,
        label,
        train=partial(read, train),
        count_rows=count_rows,
        validation=None if validation is None else partial(read, validation),
        test=None if test is None or test is train else partial(read, test),
        notes=notes,
    )


def _headers(cells: Iterable[Any], label: str, limits: Limits) -> Iterator[Header]:
    """Read the headers of images at the beginning of a stream."""
    for row, cell in enumerate(cells):
        try:
            yield read_header(_content(cell), limits)
        except Exception as error:  # a broken file may cause any exception in Pillow
            raise ValueError(
                f"{label}: the image in row {row} cannot be read: {error}. Streams leave nothing "
                "out: filter it out beforehand, or load the set without streaming"
            ) from error


def _decoded(
    batches: Iterable[list[Any]], plan: Plan, label: str, limits: Limits
) -> Iterator[Array]:
    """Decode batches of images in threads."""
    before = 0
    to_pixels = partial(decode, plan=plan, limits=limits)

    with ThreadPoolExecutor() as pool:
        for cells in batches:
            try:
                yield np.concatenate(list(pool.map(to_pixels, map(_content, cells))))
            except Exception as error:  # a broken file may cause any exception in Pillow
                raise ValueError(
                    f"{label}: an image in rows {before} to {before + len(cells) - 1} cannot be "
                    f"read: {error}. Streams leave nothing out: filter it out beforehand, or load "
                    "the set without streaming"
                ) from error
            before += len(cells)


def _content(cell: dict[str, Any] | None) -> Path | BytesIO:
    """Content or path of an encoded image."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError("there is no image")
    if cell["bytes"] is not None:
        return BytesIO(cell["bytes"])
    return Path(cell["path"])


def _library(label: str) -> Any:  # noqa: ANN401 (a module)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{label} needs the Hugging Face library: pip install 'equipoise[hub]'"
        ) from error
    return datasets


def _splits(datasets: Any, address: str, **options: bool) -> dict[str, Any]:  # noqa: ANN401
    """Parts of a data set by their name."""
    try:
        if address.endswith(".parquet"):
            tables = datasets.load_dataset("parquet", data_files=address, **options)
        elif Path(address, "dataset_dict.json").is_file():
            tables = datasets.load_from_disk(address)
        else:
            tables = datasets.load_dataset(address, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"hf:{address} could not be loaded: {error}") from error

    return {split: tables[split] for split in tables}


def _train_of(splits: dict[str, Any], address: str) -> Any:  # noqa: ANN401
    """The part called train, or the only part."""
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise ValueError(f"hf:{address} has no part called train, only {', '.join(splits)}")


def _validation_of(splits: dict[str, Any]) -> Any:  # noqa: ANN401
    for key in ("validation", "valid", "val"):
        if key in splits:
            return splits[key]
    return None


def _image_columns(datasets: Any, features: Any) -> list[str]:  # noqa: ANN401
    return [key for key, feature in features.items() if isinstance(feature, datasets.Image)]


def _described(features: Any) -> str:  # noqa: ANN401
    return ", ".join(f"{key} ({feature})" for key, feature in features.items()) or "not known"


def _choose_column(
    datasets: Any,  # noqa: ANN401 (a module)
    features: Any,  # noqa: ANN401
    column: str | None,
    label: str,
) -> tuple[str, tuple[str, ...]]:
    """Name of the column to train on, and a note if there is more than one column of images."""
    images = _image_columns(datasets, features)
    if column is None and images:
        column = "image" if "image" in images else images[0]
        if len(images) == 1:
            return column, ()
        return column, (f"of the image columns {', '.join(images)}, {column} is used",)

    arrays = [key for key, feature in features.items() if type(feature).__name__ in ARRAYS]
    if not column and len(arrays) == 1:
        column = arrays[0]

    if not column or (features and column not in features):
        raise ValueError(
            f"{label}: name the column to train on with column; its columns are "
            f"{_described(features)}"
        )
    return column, ()
