"""Hugging Face data sets, whole or as a stream, through the library ``datasets`` (extra ``hub``)."""

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
from equipoise.data.images import Plan, decode, make_plan, plan_notes, read_header

MIRRORS = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist"}
"""Where a named set is fetched from when it is nowhere on this machine and the user allows a download."""
ARRAYS = ("Array2D", "Array3D", "List", "LargeList", "Sequence")
ROWS_AT_ONCE = 256
PLANNED_FROM = 1000
"""Images at the start of a stream whose headers decide what all become."""


def hub_set(address: str, reader: ImageReader, name: str | None = None) -> Found:
    """Find the images of a data set on the hub, in a local folder or in a parquet file.

    Args:
        address: "owner/name", or a path.
        reader: how the images become arrays.
        name: what to call the set; its address if None.

    Returns:
        The images, with the validation and test parts of the set where it has them.

    Raises:
        ImportError: if ``datasets`` is not installed.
        ValueError: if the set cannot be fetched or has no images.
    """
    datasets = _library(f"hf:{address}")
    splits = _splits(datasets, address)
    train = _train_of(splits, address)
    columns = _image_columns(datasets, train.features)
    if not columns:
        raise ValueError(
            f"hf:{address} has no column of images; its columns are {_described(train.features)}"
        )
    column, notes = _choose_column(datasets, train.features, None, f"hf:{address}")

    def read(split: str, table: Any) -> Part:  # noqa: ANN401
        table = table.cast_column(column, datasets.Image(decode=False))

        stamp = f"{address} {split} {len(table)} {table._fingerprint}"
        images = Encoded(
            len(table),
            lambda row: _content(table[row][column]),
            lambda row: f"{split} row {row}",
            stamp,
            f"hf:{address}",
        )
        return reader.read(images)

    validation = _validation_of(splits)
    first = read("train", train)
    return Found(
        name or address,
        f"hf:{address}",
        first._replace(notes=(*first.notes, *notes)),
        None if validation is None else read("validation", validation),
        read("test", splits["test"]) if "test" in splits and train is not splits["test"] else None,
    )


class HubPasses(NamedTuple):
    r"""A data set that is streamed.

    Args:
        name: of the set.
        source: what to call it in an error.
        train: begins a pass over the training part: batches, (B, \*).
        count_rows: goes through the training part to count its examples, without decoding them, where they are unknown.
        validation: begins a pass over the set's own validation part, if it has one.
        test: likewise.
        notes: sentences that a user should read.
    """

    name: str
    source: str
    train: Callable[[], Iterator[Array]]
    count_rows: Callable[[], int]
    validation: Callable[[], Iterator[Array]] | None = None
    test: Callable[[], Iterator[Array]] | None = None
    notes: tuple[str, ...] = ()


def is_hub_table(source: object) -> bool:
    """Whether something is a data set of the library ``datasets``, which need not be imported to tell.

    Args:
        source: anything.

    Returns:
        True for its ``Dataset`` and ``IterableDataset``.
    """
    return type(source).__module__.partition(".")[0] == "datasets" and hasattr(
        source, "select_columns"
    )


def hub_passes(
    source: Any,  # noqa: ANN401 (an address or a table)
    column: str | None = None,
    image_size: int | None = None,
    channels: Channels | None = None,
) -> HubPasses:
    """Stream a data set from the hub, from local files, or as the library holds it.

    Args:
        source: "hf:owner/name", "hf:" and a path, or a ``Dataset`` or ``IterableDataset``.
        column: what to train on; None for the images, or else the only column of arrays.
        image_size: side of the square that images become; None to keep the size they share.
        channels: "grey", "rgb", or None for grey if the first images are grey.

    Returns:
        The passes.

    Raises:
        ImportError: if ``datasets`` is not installed.
        ValueError: if the set cannot be found, or it is not clear which column to use.
    """
    datasets, splits = _library(str(source)), {}
    name, label, train = (
        "stream",
        f"a Hugging Face data set of type {type(source).__name__}",
        source,
    )
    if isinstance(source, str):
        name, label = source.removeprefix("hf:"), source
        splits = _splits(datasets, name, streaming=True)
        train = _train_of(splits, name)
    features = train.features or {}
    column, notes = _choose_column(datasets, features, column, label)
    images = column in _image_columns(datasets, features)

    def rows(table: Any) -> Iterator[list[Any]]:  # noqa: ANN401
        table = table.select_columns([column])
        if images:
            table = table.cast_column(column, datasets.Image(decode=False))
        return (batch[column] for batch in table.iter(batch_size=ROWS_AT_ONCE))

    def count_rows() -> int:
        try:
            return len(train)
        except (
            TypeError
        ):  # a stream, whose number of rows may be known; but not that of one made from another
            known = (
                (getattr(train.info, "splits", None) or {}).get(str(train.split))
                if splits
                else None
            )
            return (known and known.num_examples) or sum(map(len, rows(train)))

    read: Callable[[Any], Iterator[Array]]
    if images:
        first = list(islice(chain.from_iterable(rows(train)), PLANNED_FROM))
        headers = Counter(read_header(_content(cell)) for cell in first)
        plan = make_plan(headers, image_size, channels, None, label)
        notes = (
            *notes,
            *(f"among the first {len(first)}, {note}" for note in plan_notes(headers, plan)),
        )

        def read(table: Any) -> Iterator[Array]:  # noqa: ANN401
            return _decoded(rows(table), plan, label)
    else:
        if image_size or channels:
            raise ValueError(
                f"{label}: {column} holds no encoded images; image_size and channels convert those only"
            )

        def read(table: Any) -> Iterator[Array]:  # noqa: ANN401
            return map(np.asarray, rows(table))

    validation, test = _validation_of(splits), splits.get("test")
    return HubPasses(
        name,
        label,
        partial(read, train),
        count_rows,
        None if validation is None else partial(read, validation),
        None if test is None or test is train else partial(read, test),
        notes,
    )


def _decoded(batches: Iterable[list[Any]], plan: Plan, label: str) -> Iterator[Array]:
    before = 0
    with ThreadPoolExecutor() as pool:
        for cells in batches:
            try:
                yield np.stack(list(pool.map(partial(decode, plan=plan), map(_content, cells))))
            except Exception as error:  # Pillow's readers raise nearly anything on a broken file
                raise ValueError(
                    f"{label}: an image in rows {before} to {before + len(cells) - 1} cannot be read: {error}. Streams "
                    "leave nothing out: filter it out beforehand, or load the set without streaming"
                ) from error
            before += len(cells)


def _content(cell: dict[str, Any]) -> Path | BytesIO:
    return BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"])


def _library(label: str) -> Any:  # noqa: ANN401 (a module)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{label} needs the Hugging Face library: pip install 'equipoise[hub]'"
        ) from error
    return datasets


def _splits(datasets: Any, address: str, **how: bool) -> dict[str, Any]:  # noqa: ANN401
    """Parts of a data set by name."""
    try:
        if address.endswith(".parquet"):
            tables = datasets.load_dataset("parquet", data_files=address, **how)
        elif Path(address, "dataset_dict.json").is_file():
            tables = datasets.load_from_disk(address)
        else:
            tables = datasets.load_dataset(address, **how)
    except (OSError, ValueError) as error:
        raise ValueError(f"hf:{address} could not be loaded: {error}") from error
    return {split: tables[split] for split in tables}


def _train_of(splits: dict[str, Any], address: str) -> Any:  # noqa: ANN401
    train = splits.get("train", next(iter(splits.values())) if len(splits) == 1 else None)
    if train is None:
        raise ValueError(f"hf:{address} has no part called train, only {', '.join(splits)}")
    return train


def _validation_of(splits: dict[str, Any]) -> Any:  # noqa: ANN401
    return next((splits[key] for key in ("validation", "valid", "val") if key in splits), None)


def _image_columns(datasets: Any, features: Any) -> list[str]:  # noqa: ANN401
    return [key for key, feature in features.items() if isinstance(feature, datasets.Image)]


def _described(features: Any) -> str:  # noqa: ANN401
    return ", ".join(f"{key} ({feature})" for key, feature in features.items()) or "not known"


def _choose_column(
    datasets: Any, features: Any, column: str | None, label: str
) -> tuple[str, tuple[str, ...]]:  # noqa: ANN401
    """What to train on, and a note where there was a choice."""
    images = _image_columns(datasets, features)
    arrays = [key for key, feature in features.items() if type(feature).__name__ in ARRAYS]
    if column is None and images:
        chosen = "image" if "image" in images else images[0]
        several = f"of the image columns {', '.join(images)}, {chosen} is used"
        return chosen, (several,) if len(images) > 1 else ()
    chosen = column or (arrays[0] if len(arrays) == 1 else "")
    if not chosen or (features and chosen not in features):
        raise ValueError(
            f"{label}: name the column to train on with column; its columns are {_described(features)}"
        )
    return chosen, ()
