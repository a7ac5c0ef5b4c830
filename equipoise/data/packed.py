"""Packed examples: ``.npy`` shards with an index, which says what training needs to know of them.

:func:`equipoise.data.packing.pack` writes them. Nothing is decoded when they are read, and units
are those of all training examples, and not of the first ones.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.data.dataset import Array, Data, Subset
from equipoise.data.duplicates import describe_shared
from equipoise.data.encoded import first_names
from equipoise.data.shard_files import BYTES_AT_ONCE, NpyShard, opened
from equipoise.data.shards import READERS, ShardedStream, read_rows
from equipoise.data.stream import first_examples
from equipoise.files import StoreError
from equipoise.places import SourceFile
from equipoise.records import PackedShard, PackIndex, decode_record, read_record

INDEX = "index.json"
UNFINISHED = "unfinished.json"
"""What stands in the place of the index until all shards are written."""
CHECKED = 1 << 30
"""Bytes of packed files up to which their digests are compared whenever they are loaded."""
PARTS = ("test", "validation", "train")
"""The parts, in the order of their examples."""


class Joined:
    r"""Shards in a line, of which any stretch can be read.

    Args:
        shards: The files.
        dtype: Data type to which the values are cast.
    """

    def __init__(self, shards: list[NpyShard], dtype: np.dtype[Any]) -> None:
        self.shards = shards
        self.dtype = dtype
        self.shape = (sum(shard.n for shard in shards), *shards[0].shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice, /) -> Array:
        start, stop, _ = rows.indices(len(self))
        values = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        before = filled = 0
        for shard in self.shards:
            first, last = max(start - before, 0), min(stop - before, shard.n)
            before += shard.n
            if first < last:
                for piece in read_rows(shard, first, last):
                    values[filled : filled + len(piece)] = piece
                    filled += len(piece)
        return values


def is_packed(folder: SourceFile) -> bool:
    """Tell whether a folder holds packed examples, or the beginning of such.

    Args:
        folder: The folder.

    Returns:
        True if there is an index.

    Raises:
        StoreError: If the packing was stopped and has not gone on.
    """
    if (folder / INDEX).is_file():
        return True
    if (folder / UNFINISHED).is_file():
        raise StoreError(
            f"{folder} was not packed to the end: go on with the same 'equipoise pack' line"
        )
    return False


def shards_of(
    folder: SourceFile, records: list[PackedShard], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> list[NpyShard]:
    """Describe the files of packed examples.

    Args:
        folder: Their folder.
        records: What the index says of them.
        shape: Shape of an example.
        dtype: Data type that is stored.

    Returns:
        The shards with examples, in the order of the parts.
    """
    ordered = sorted(records, key=lambda record: PARTS.index(record["part"]))
    return [
        NpyShard(folder / record["name"], record["n"], record["offset"], dtype, shape)
        for record in ordered
        if record["n"]
    ]


def check_digests(folder: SourceFile, records: list[PackedShard]) -> None:
    """Compare the files of packed examples with their digests.

    Args:
        folder: Their folder.
        records: What the index says of them.

    Raises:
        StoreError: If a file is missing or was altered. It names all of these.
    """
    damaged = []
    for record in records:
        path = folder / record["name"]
        if not path.is_file():
            damaged.append(record["name"])
            continue
        with opened(path) as file:
            digest = hashlib.sha256()
            while content := file.read(BYTES_AT_ONCE):
                digest.update(content)
        if digest.hexdigest() != record["sha256"]:
            damaged.append(record["name"])
    if damaged:
        raise StoreError(
            f"{folder}: {len(damaged)} packed files are damaged or missing "
            f"({first_names(damaged)}): copy them again, or pack anew into another folder"
        )


def load_packed(folder: SourceFile, name: str | None, buffer_size: int, n_at_hand: int) -> Data:
    """Load packed examples as a stream.

    Args:
        folder: The folder, which may be at a place.
        name: Name of the data set. None takes that of the index.
        buffer_size: Number of examples in the shuffle buffer.
        n_at_hand: Number of training examples that stay in memory.

    Returns:
        The data, without their ``loading``.

    Raises:
        StoreError: If the index is damaged, or one of the files. Up to 1 GiB, and on this machine,
            all bytes are compared with their digests; otherwise 'equipoise pack' does so.
        ValueError: If a file is not what the index says.
    """
    index = read_index(folder)
    if isinstance(folder, Path):
        present = (folder / record["name"] for record in index["shards"])
        if sum(path.stat().st_size for path in present if path.is_file()) <= CHECKED:
            check_digests(folder, index["shards"])
    shape, dtype = tuple(index["shape"]), np.dtype(index["dtype"])
    shards = shards_of(folder, index["shards"], shape, np.dtype(index["stored"]))
    count = {part: sum(r["n"] for r in index["shards"] if r["part"] == part) for part in PARTS}
    n_test, n_validation, n_train = (count[part] for part in PARTS)
    set_aside = n_test + n_validation

    def read() -> Iterator[tuple[int, Array]]:
        return enumerate(chain.from_iterable(read_rows(shard, 0, shard.n) for shard in shards))

    first = first_examples(read(), min(set_aside + n_at_hand, set_aside + n_train))
    everything = Subset.whole(first)
    whole = Subset(everything.base, everything.indices, dtype)
    test = whole.take(slice(0, n_test))
    validation = whole.take(slice(n_test, set_aside))
    at_hand = whole.take(slice(set_aside, None))

    notes = [f"{len(shards):,} packed files; units come from all {n_train:,} training examples"]
    cautions = list(index["cautions"])
    for part, of_part in (("validation", validation), ("test", test)):
        text, is_caution = describe_shared(of_part, at_hand, part)
        if text is not None:
            (cautions if is_caution else notes).append(text)

    unit_shape = shape if index["kind"] == "table" else ()
    identity = [index[key] for key in ("digest", "dtype", "offset", "scale", "columns")]
    identity += [[record["part"], record["sha256"]] for record in index["shards"]]
    stream = ShardedStream(
        *(read, first, set_aside, n_train, at_hand, buffer_size, str(folder)),
        shards=tuple(shards),
        readers=READERS,
        axis=1,
    )
    return Data(
        name=name or index["name"],
        train=stream,
        validation=validation,
        test=test,
        kind=index["kind"],
        shape=shape,
        offset=np.array(index["offset"], np.float32).reshape(unit_shape),
        scale=np.array(index["scale"], np.float32).reshape(unit_shape),
        quantum=index["quantum"],
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        source=str(folder),
        notes=tuple(dict.fromkeys([*notes, *index["notes"], *cautions])),
        cautions=tuple(cautions),
        has_gaps=index["has_gaps"],
        columns=tuple(index["columns"]),
    )


def read_index(folder: SourceFile) -> PackIndex:
    """Read the index of packed examples.

    Args:
        folder: Their folder.

    Returns:
        The index.

    Raises:
        StoreError: If it is damaged.
    """
    file = folder / INDEX
    if isinstance(file, Path):
        return read_record(file, PackIndex)
    return decode_record(file.read(), PackIndex, str(file))
