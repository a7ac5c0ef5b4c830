"""Images from the Hugging Face hub or a local copy, through the library ``datasets`` (extra ``hub``)."""

from io import BytesIO
from pathlib import Path
from typing import Any

from equipoise.data.arrays import Found, Part
from equipoise.data.encoded import Encoded, ImageReader

MIRRORS = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist"}
"""Where a named set is fetched from when it is nowhere on this machine and the user allows a download."""


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
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"hf:{address} needs the Hugging Face library: pip install 'equipoise[hub]'") from error

    try:
        if address.endswith(".parquet"):
            tables = datasets.load_dataset("parquet", data_files=address)
        elif Path(address, "dataset_dict.json").is_file():
            tables = datasets.load_from_disk(address)
        else:
            tables = datasets.load_dataset(address)
    except (OSError, ValueError) as error:
        raise ValueError(f"hf:{address} could not be loaded: {error}") from error

    splits = {split: tables[split] for split in tables}
    train = splits.get("train", next(iter(splits.values())) if len(splits) == 1 else None)
    if train is None:
        raise ValueError(f"hf:{address} has no part called train, only {', '.join(splits)}")
    columns = [key for key, feature in train.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        found = ", ".join(f"{key} ({feature})" for key, feature in train.features.items())
        raise ValueError(f"hf:{address} has no column of images; its columns are {found}")
    column = "image" if "image" in columns else columns[0]
    notes = (f"of the image columns {', '.join(columns)}, {column} is used",) if len(columns) > 1 else ()

    def read(split: str, table: Any) -> Part:  # noqa: ANN401
        table = table.cast_column(column, datasets.Image(decode=False))

        def content(row: int) -> Path | BytesIO:
            cell = table[row][column]
            return BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"])

        stamp = f"{address} {split} {len(table)} {table._fingerprint}"
        images = Encoded(len(table), content, lambda row: f"{split} row {row}", stamp, f"hf:{address}")
        return reader.read(images)

    validation = next((splits[key] for key in ("validation", "valid", "val") if key in splits), None)
    first = read("train", train)
    return Found(
        name or address,
        f"hf:{address}",
        first._replace(notes=(*first.notes, *notes)),
        None if validation is None else read("validation", validation),
        read("test", splits["test"]) if "test" in splits and train is not splits["test"] else None,
    )
