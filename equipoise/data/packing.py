"""Packing: a folder of images or a table becomes shards that every machine reads without decoding.

A random sample of the examples comes first: those that are held out, and those that stay in memory
in a training. The others keep their order, which the readers of a stream mix.
"""

import errno
import hashlib
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from equipoise.data.arrays import examples, image_unit, summarise, table_unit
from equipoise.data.cache import in_bytes
from equipoise.data.dataset import MAX_VALIDATION, Array, Channels, Fit
from equipoise.data.encoded import SKIPPED, first_names
from equipoise.data.gate import DEFAULT_LIMITS
from equipoise.data.loading import AT_HAND, MAX_TEST
from equipoise.data.packed import (
    INDEX,
    PARTS,
    UNFINISHED,
    Joined,
    check_digests,
    read_index,
    shards_of,
)
from equipoise.data.packing_sources import Examples, Options, Say, find_examples
from equipoise.files import StoreError, exclusive, is_empty, is_ours, remove, whole_file, write_json
from equipoise.places import SourceFile, locate
from equipoise.records import FORMAT, PackedShard, PackIndex, Unfinished, decode_record

SHARD_BYTES = 64_000_000
"""About how many bytes a shard has."""
N_START = 2
"""Examples that are read to learn their shape and type."""
TRIED = 256
"""Examples after which the next ones are tried, if the first cannot be read."""

Progress = Callable[[int, int], None]


class Order:
    """The order in which examples are packed.

    Args:
        n: Number of examples in the source.
        parts: Numbers of the source's own parts, if it has some.
    """

    def __init__(self, n: int, parts: dict[str, NDArray[np.int64]] | None) -> None:
        parts = parts or {}
        self.own = parts.get("train")
        pool = n if self.own is None else len(self.own)
        limits = {"test": MAX_TEST, "validation": MAX_VALIDATION}
        self.left_out = {}

        chosen: dict[str, NDArray[np.int64]] = {}
        n_drawn = {}
        for part, most in limits.items():
            numbers = parts.get(part, np.empty(0, np.int64))
            if len(numbers):
                kept = _drawn(len(numbers), min(most, len(numbers)))
                chosen[part] = numbers[np.sort(kept)]
                self.left_out[part] = len(numbers) - len(kept)
            else:
                n_drawn[part] = min(MAX_VALIDATION, max(1, pool // 10))

        n_first = min(AT_HAND, max(0, pool - sum(n_drawn.values())))
        drawn = _drawn(pool, sum(n_drawn.values()) + n_first)
        self.taken = np.sort(drawn)
        for part, count in n_drawn.items():
            chosen[part], drawn = self._own(np.sort(drawn[:count])), drawn[count:]
        self.chosen = {**chosen, "train": self._own(np.sort(drawn))}
        self.count = {part: len(numbers) for part, numbers in self.chosen.items()}
        self.count["train"] = pool - sum(n_drawn.values())

    def numbers(self, part: str, start: int, stop: int) -> list[NDArray[np.int64]]:
        """Return the numbers of some examples of a part, in stretches that each increase.

        Args:
            part: Name of the part.
            start: Position of the first example within the part.
            stop: Position of the example after the last.

        Returns:
            Their numbers in the source.
        """
        head = self.chosen[part]
        stretches = [head[start:stop]]
        if part == "train" and stop > len(head):
            rest = np.arange(max(start, len(head)), stop) - len(head)
            # The k-th of those that were not taken: k, and one more for each that was before it.
            free = self.taken - np.arange(len(self.taken))
            stretches.append(self._own(rest + np.searchsorted(free, rest, side="right")))
        return [stretch for stretch in stretches if len(stretch)]

    def _own(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return positions if self.own is None else self.own[positions]


def _drawn(n: int, k: int) -> NDArray[np.int64]:
    """Draw k of n numbers, always the same, in random order; n may be far too large to shuffle."""
    return np.array(random.Random(0).sample(range(n), k), np.int64)  # noqa: S311 (no secret)


class _Output:
    """The folder that is packed into, of this machine or at a place."""

    def __init__(self, folder: SourceFile) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes | None:
        """Read a file, None if there is none."""
        file = self.folder / name
        if not file.is_file():
            return None
        return file.read_bytes() if isinstance(file, Path) else file.read()

    def write_json(self, name: str, value: Any) -> None:  # noqa: ANN401 (any JSON value)
        """Write a file of JSON."""
        file = self.folder / name
        if isinstance(file, Path):
            write_json(file, value)
        else:
            file.write(json.dumps(value).encode())

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file, which appears complete or not at all."""
        file = self.folder / name
        if isinstance(file, Path):
            with whole_file(file) as temporary:
                write(temporary)
            return
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder, name))
            file.upload(Path(folder, name))

    def remove(self, name: str) -> None:
        """Delete a file that was written here."""
        file = self.folder / name
        remove(file) if isinstance(file, Path) else file.remove()

    def has_others(self) -> bool:
        """Tell whether there are files, none of which is an index of ours."""
        if isinstance(self.folder, Path):
            is_begun = is_ours(self.folder / UNFINISHED) or is_ours(self.folder / INDEX)
            return not is_empty(self.folder) and not is_begun
        names = {file.name for file in self.folder.iterdir()}
        return bool(names) and not names & {UNFINISHED, INDEX}


def pack(
    source: str | Path,
    out: str | Path,
    *,
    image_size: int | str | None = None,
    channels: Channels | None = None,
    fit: Fit = "crop",
    columns: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    max_pixels: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Say = lambda text: None,
    progress: Progress | None = None,
) -> SourceFile:
    r"""Write examples into shards, with an index of what training needs to know of them.

    If it is stopped, the same call goes on after the last whole shard. The table or the folder may
    be larger than memory; so may what comes of it.

    Args:
        source: A folder of images, a table (.parquet, .feather, .arrow, .csv, .tsv), a folder of
            files that a stream reads, or anything else that :func:`equipoise.load_data` takes.
        out: Folder to write to, which may be at a place such as s3://bucket/folder.
        image_size: Size in pixels of each image, as for :func:`equipoise.load_data`.
        channels: "grey" or "rgb".
        fit: How images of other proportions get the size: "crop", "pad" or "stretch".
        columns: Columns of a table to take.
        drop: Columns of a table to leave out.
        max_pixels: Most pixels of an image file; 50 million if None.
        shard_bytes: About how many bytes a file has.
        say: Called with sentences that a user should read, such as the size before it is written.
        progress: Called with (done, total) examples.

    Returns:
        The folder.

    Raises:
        StoreError: If the folder holds something else.
        ValueError: If the examples cannot be read or a model cannot learn from them.
        OSError: If there is too little space.
    """
    limits = DEFAULT_LIMITS
    if max_pixels is not None:
        limits = replace(limits, max_pixels=max_pixels)

    with ExitStack() as stack:
        options = Options(image_size, channels, fit, columns, drop, limits)
        found = find_examples(source, options, say, stack)
        for note in found.notes:
            say(f"Note: {note}")
        output = _Output(locate(out))
        if output.has_others():
            raise StoreError(
                f"{out} is not empty, and holds no packed examples: choose another folder"
            )
        if isinstance(output.folder, Path):
            stack.enter_context(exclusive(output.folder, "packing"))
        _pack(found, output, shard_bytes, say, progress)
    return output.folder


def _pack(
    found: Examples, output: _Output, shard_bytes: int, say: Say, progress: Progress | None
) -> None:
    """Write the shards that are not there, and then the index."""
    order = Order(found.n, found.parts)
    start = examples(np.concatenate(_first(found)), found.source, found.axis)
    dtype = _stored(start.dtype, start.ndim)
    shape = start.shape[1:]
    bytes_of_row = max(1, math.prod(shape) * dtype.itemsize)
    n_each = max(1, shard_bytes // bytes_of_row)
    plan = hashlib.sha256(
        f"{found.stamp} {found.n} {found.columns} {dtype} {shape} {n_each}".encode()
    ).hexdigest()

    pieces = [
        (part, first, min(first + n_each, order.count[part]))
        for part in PARTS
        for first in range(0, order.count[part], n_each)
    ]
    done = _done(output, plan)
    if done is None:
        records = read_index(output.folder)["shards"]
        check_digests(output.folder, records)
        say(f"{output.folder} is packed already, and its {len(records):,} files are undamaged.")
        return

    total = sum(order.count.values())
    n_left = sum(stop - first for _, first, stop in pieces[len(done) :])
    _check_space(output.folder, n_left * bytes_of_row)
    what = " x ".join(map(str, shape))
    begun = f"; {len(done)} files are there already" if done else ""
    say(
        f"Packing {total:,} examples of {what} {dtype} into {in_bytes(total * bytes_of_row)} in "
        f"{output.folder}, {len(pieces):,} files{begun}."
    )
    for part, n in order.left_out.items():
        if n:
            say(f"Note: {n:,} examples of the {part} part are left out, so that it fits in memory")

    n_done = sum(stop - first for _, first, stop in pieces[: len(done)])
    for part, first, stop in pieces[len(done) :]:
        name = f"{part}-{first // n_each:06}.npy"
        stretches = order.numbers(part, first, stop)

        def rows(
            stretches: list[NDArray[np.int64]] = stretches, before: int = n_done
        ) -> Iterator[Array]:
            for stretch in stretches:
                for batch in found.read(stretch):
                    values = examples(batch, found.source, found.axis)
                    if values.shape[1:] != shape:
                        raise ValueError(
                            f"{found.source}: examples of shape {values.shape[1:]} and of {shape}"
                        )
                    yield _cast(values, dtype, found.source)
                    before += len(batch)
                    if progress is not None:
                        progress(before, total)

        done.append(_write_shard(output, name, part, rows(), shape, dtype, stop - first))
        done[-1]["skipped"], found.skipped[:] = list(found.skipped), []
        n_done += stop - first
        output.write_json(UNFINISHED, {"plan": plan, "shards": done})

    _finish(found, output, plan, done, shape, dtype, say)


def _write_shard(
    output: _Output,
    name: str,
    part: str,
    rows: Iterator[Array],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    most: int,
) -> PackedShard:
    """Write a shard, one batch of rows after another."""
    record: dict[str, Any] = {"name": name, "part": part, "skipped": []}

    def write(path: Path) -> None:
        n = 0
        with path.open("wb") as file:
            _write_header(file, (most, *shape), dtype)
            for batch in rows:
                file.write(np.ascontiguousarray(batch).data)
                n += len(batch)
            # As long as the first one, because the format leaves room for the count.
            record["offset"] = _write_header(file, (n, *shape), dtype)
        record["n"] = n
        with path.open("rb") as file:
            record["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()

    output.write(name, write)
    return cast(PackedShard, record)


def _write_header(file: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:  # noqa: ANN401
    """Write the header of an ``.npy`` file at its start; return its length."""
    file.seek(0)
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return int(file.tell())


def _finish(
    found: Examples,
    output: _Output,
    plan: str,
    records: list[PackedShard],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    say: Say,
) -> None:
    """Compute the statistics of the training part, and write the index."""
    training = [record for record in records if record["part"] == "train"]
    shards = shards_of(output.folder, training, shape, dtype)
    if not shards:
        raise ValueError(f"{found.source}: none of the examples can be read")
    joined = Joined(shards, dtype)
    say(f"Reading {len(joined):,} training examples for their unit.")
    summary = summarise(joined, found.source, found.columns)
    kind: Literal["image", "table"] = "table" if len(shape) == 1 else "image"
    if found.unit is not None:
        unit = found.unit
    elif kind == "table":
        unit = table_unit(joined, True, found.columns)
    else:
        unit = image_unit(dtype, summary.low, summary.high)
    if summary.n_constant == math.prod(shape):
        raise ValueError(f"{found.source}: all training examples are the same")

    notes = [*found.notes, *unit.notes]
    skipped = [name for record in records for name in record["skipped"]]
    if skipped:
        notes.append(f"{SKIPPED}: {len(skipped)} ({first_names(skipped)})")
        say(f"Note: {notes[-1]}")
    index: PackIndex = {
        "format": FORMAT,
        "name": found.name,
        "plan": plan,
        "kind": kind,
        "shape": list(shape),
        "stored": dtype.str,
        "dtype": unit.dtype.str,
        "offset": np.ravel(unit.offset).tolist(),
        "scale": np.ravel(unit.scale).tolist(),
        "quantum": unit.quantum,
        "low": summary.low,
        "high": summary.high,
        "digest": summary.digest,
        "columns": list(found.columns),
        "has_gaps": summary.n_missing is not None,
        "notes": list(dict.fromkeys(notes)),
        "cautions": list(unit.cautions),
        "shards": records,
    }
    output.write_json(INDEX, index)
    output.remove(UNFINISHED)


def _done(output: _Output, plan: str) -> list[PackedShard] | None:
    """Return the shards that an earlier call has written; None if it has written all."""
    if output.read(INDEX) is not None:
        if read_index(output.folder)["plan"] == plan:
            return None
        raise StoreError(
            f"{output.folder} holds other packed examples, or they were packed with other "
            "options: choose another folder, or remove it"
        )

    content = output.read(UNFINISHED)
    if content is None:
        output.write_json(UNFINISHED, {"plan": plan, "shards": []})
        return []
    unfinished = decode_record(content, Unfinished, str(output.folder / UNFINISHED))
    if unfinished["plan"] != plan:
        raise StoreError(
            f"{output.folder} was begun with other examples or other options: give the same, "
            "choose another folder, or remove it"
        )
    return list(unfinished["shards"])


def _first(found: Examples) -> list[Array]:
    """Read the first examples that can be read."""
    for first in range(0, found.n, TRIED):
        pieces = list(found.read(np.arange(first, min(found.n, first + N_START))))
        if pieces:
            found.skipped.clear()
            return pieces
    raise ValueError(f"{found.source}: none of the examples can be read")


def _stored(dtype: np.dtype[Any], n_axes: int) -> np.dtype[Any]:
    """Choose the type that is written: that of images, and float32 for tables and real numbers."""
    if n_axes == 2 or dtype.kind == "f":
        return np.dtype("<f4")
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("<")


def _cast(values: Array, dtype: np.dtype[Any], source: str) -> Array:
    """Convert values to the type that is written, if it holds them."""
    if dtype.kind in "ui" and values.dtype.kind not in "bui":
        raise ValueError(f"{source}: {values.dtype} values where the first examples have {dtype}")
    with np.errstate(over="ignore"):
        cast_values = values.astype(dtype, copy=False)
    if dtype.kind in "ui" and not np.array_equal(cast_values, values):
        raise ValueError(f"{source}: values that do not fit into {dtype}, as the first ones do")
    return cast_values


def _check_space(folder: SourceFile, needed: int) -> None:
    """Refuse to begin where there is too little space."""
    if not isinstance(folder, Path):
        return
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{in_bytes(needed)} are needed in {folder}, and {in_bytes(free)} are free",
        )
