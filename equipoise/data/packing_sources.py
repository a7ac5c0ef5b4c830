"""What can be packed: images of a folder, shards and large tables, and whatever else is loaded."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from equipoise.data.arrays import Unit
from equipoise.data.cache import default_cache_dir
from equipoise.data.dataset import Array, Channels, Fit, Subset
from equipoise.data.encoded import first_names, list_images
from equipoise.data.folders import sort_folders
from equipoise.data.gate import Limits
from equipoise.data.images import Header, decode, make_plan, plan_notes, read_header
from equipoise.data.loading import load
from equipoise.data.packed import PARTS
from equipoise.data.shard_files import Shard
from equipoise.data.shard_tables import TableShard, flag_columns
from equipoise.data.shards import ENDINGS, find_shards, read_rows
from equipoise.data.tables import TEXT_FORMATS, text_to_parquet
from equipoise.places import Place, SourceFile, is_place, locate

AT_ONCE = 256
"""Number of images that are decoded at a time."""

Numbers: TypeAlias = NDArray[np.int64]
Say: TypeAlias = Callable[[str], None]


@dataclass
class Examples:
    r"""Examples with numbers, of which any can be read.

    Args:
        name: Name of the data set.
        source: Where they are.
        stamp: What changes whenever they change.
        n: Their number.
        read: Function that reads some examples in the order of their numbers, which increase, in
            arrays (B, \*).
        axis: Axis of the channels of images, if it is known.
        notes: Sentences that a user should read.
        columns: Names of the columns of a table.
        parts: Numbers of the examples in the parts "train", "validation" and "test", if the source
            has parts of its own.
        unit: The unit, if the source has one of its own.
        skipped: What could not be read, with the reason; reading adds to it.
    """

    name: str
    source: str
    stamp: str
    n: int
    read: Callable[[Numbers], Iterator[Array]]
    axis: int | None = None
    notes: list[str] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    parts: dict[str, Numbers] | None = None
    unit: Unit | None = None
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """How the examples are read; see :func:`equipoise.data.packing.pack`."""

    image_size: int | str | None
    channels: Channels | None
    fit: Fit
    columns: Sequence[str] | None
    drop: Sequence[str] | None
    limits: Limits


def find_examples(source: str | Path, options: Options, say: Say, stack: ExitStack) -> Examples:
    """Find what is to be packed.

    Args:
        source: As for :func:`equipoise.data.packing.pack`.
        options: How it is read.
        say: Called with what is done.
        stack: Gets what is to be done at the end.

    Returns:
        The examples.

    Raises:
        ValueError: If there are none, or the options are not for them.
    """
    is_hub = str(source).startswith("hf:") and not is_place(source)
    place = Path(source) if is_hub else locate(source)
    suffix = place.suffix.lower()
    is_there = not is_hub and (isinstance(place, Place) or place.exists())

    if is_there and isinstance(place, Path) and suffix in TEXT_FORMATS:
        return _of_text(place, options, say, stack)
    if is_there and (suffix in ENDINGS or _has_shards(place)):
        if options.fit != "crop":
            raise ValueError(f"{source}: fit is for a folder of images; leave it out")
        return _of_shards(_shards(str(source), options), place.name, str(source))
    if options.columns or options.drop:
        raise ValueError(f"{source}: columns and drop are for tables in files; leave them out")
    if is_there and isinstance(place, Path) and place.is_dir():
        return _of_images(place, options, say)
    return _of_parts(source, options, say)


def stamp_of(path: SourceFile) -> str:
    """Describe a file by what changes whenever it changes.

    Args:
        path: The file.

    Returns:
        Its place and size, and when it was changed, if that is known.
    """
    if isinstance(path, Path):
        status = path.stat()
        return f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
    with path.open() as file:
        return f"{path} {file.seek(0, 2)}"


def _of_images(folder: Path, options: Options, say: Say) -> Examples:
    """Read the headers of the images of a folder, and choose their format.

    They are decoded in threads. Those that cannot be read are left out.
    """
    listing = list_images(folder)
    say(f"Reading the headers of {len(listing.names):,} images.")
    limits, skipped = options.limits, list[str]()

    def header_of(name: str) -> Header | None:
        try:
            return read_header(folder / name, limits)
        except Exception:  # told when it is decoded
            return None

    with ThreadPoolExecutor() as pool:
        found = pool.map(header_of, listing.names, chunksize=64)
        headers = Counter(header for header in found if header is not None)
    if not headers:
        raise ValueError(f"{folder}: none of the images can be read")
    plan = make_plan(
        headers,
        options.image_size,
        options.channels,
        None,
        str(folder),
        pages="first",
        fit=options.fit,
    )

    def attempt(number: int) -> Array | Exception:
        try:
            return decode(folder / listing.names[number], plan, limits)
        except Exception as error:  # a broken file may cause any exception in Pillow
            return error

    def read(numbers: Numbers) -> Iterator[Array]:
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(numbers), AT_ONCE):
                some = numbers[first : first + AT_ONCE].tolist()
                images = []
                for number, image in zip(some, pool.map(attempt, some), strict=True):
                    if isinstance(image, Exception):
                        skipped.append(f"{listing.names[number]}: {image}")
                    else:
                        images.append(image)
                if images:
                    yield np.concatenate(images)

    notes = [*plan_notes(headers, plan), *listing.notes]
    parts = None
    folders = sort_folders(listing.names)
    of_file = folders.parts
    if folders.classes:
        notes.append(
            f"folders as of {len(folders.classes)} classes ({first_names(folders.classes)}): "
            "packed examples have no labels ('equipoise train FOLDER --label folder' takes them)"
        )
    if of_file:
        of_row = np.array([part or "" for part in of_file])
        parts = {part: np.flatnonzero(of_row == part).astype(np.int64) for part in PARTS}
        listed = ", ".join(f"{len(rows)} {part}" for part, rows in parts.items())
        n_outside = int(np.count_nonzero(of_row == ""))
        notes.append(f"the folder's own parts are used: {listed}; {n_outside} outside are left out")
    return Examples(
        os.path.basename(os.path.abspath(folder)),
        str(folder),
        f"{listing.stamp} {plan}",
        len(listing.names),
        read,
        axis=1,
        notes=notes,
        parts=parts,
        skipped=skipped,
    )


def _of_text(path: Path, options: Options, say: Say, stack: ExitStack) -> Examples:
    """Convert a table of text to Parquet in the cache, from which it is removed at the end."""
    stamp = stamp_of(path)
    name = f"text-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.parquet"
    converted = default_cache_dir() / name
    # After a kill it is still there, and is taken up again.
    stack.callback(partial(converted.unlink, missing_ok=True))
    if not converted.is_file():
        say(f"Converting {path} to Parquet in {converted} for the time of the packing.")
        try:
            text_to_parquet(path, converted)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    try:
        shards = _shards(str(converted), options)
    except ValueError as error:
        raise ValueError(str(error).replace(str(converted), str(path))) from error
    examples = _of_shards(shards, path.name, str(path))
    examples.stamp = stamp
    flags = [name for name in flag_columns(converted) if name in examples.columns]
    if flags:
        examples.notes.append(
            f"columns of flags become the numbers 0 and 1, and no categories: {first_names(flags)}"
        )
    return examples


def _of_shards(shards: Sequence[Shard], name: str, source: str) -> Examples:
    """Read shards of any kind, or one large table."""

    def read(numbers: Numbers) -> Iterator[Array]:
        before = 0
        for shard in shards:
            first, last = np.searchsorted(numbers, [before, before + shard.n])
            for run in _runs(numbers[first:last] - before, in_one=bool(shard.groups)):
                position = int(run[0])
                for piece in read_rows(shard, position, int(run[-1]) + 1):
                    low, high = np.searchsorted(run, [position, position + len(piece)])
                    if low < high:
                        yield piece[run[low:high] - position]
                    position += len(piece)
            before += shard.n

    kept = shards[0]
    is_wide = isinstance(kept, TableShard) and len(kept.columns) > 1
    return Examples(
        name.partition(".")[0] or name,
        source,
        " ".join(stamp_of(shard.path) for shard in shards),
        sum(shard.n for shard in shards),
        read,
        columns=cast(TableShard, kept).columns if is_wide else (),
    )


def _of_parts(source: str | Path, options: Options, say: Say) -> Examples:
    """Load other data, whose split and unit are kept."""
    data = load(
        source,
        image_size=options.image_size,
        channels=options.channels,
        fit=options.fit,
        say=say,
    )
    train = cast(Subset, data.train)
    subsets = {"train": train, "validation": data.validation, "test": data.test}
    parts, before = {}, 0
    for part, subset in subsets.items():
        parts[part] = np.arange(before, before + len(subset))
        before += len(subset)

    def read(numbers: Numbers) -> Iterator[Array]:
        for part, subset in subsets.items():
            if not len(subset):
                continue
            first, last = np.searchsorted(numbers, [parts[part][0], parts[part][-1] + 1])
            inside = numbers[first:last] - parts[part][0]
            for start in range(0, len(inside), AT_ONCE):
                yield subset[inside[start : start + AT_ONCE]]

    unit = Unit(train.dtype, data.offset, data.scale, data.quantum, cautions=data.cautions)
    return Examples(
        data.name,
        data.source,
        data.fingerprint,
        before,
        read,
        axis=1,
        notes=[note for note in data.notes if note not in data.cautions],
        columns=data.columns,
        parts=parts,
        unit=unit,
    )


def _shards(source: str, options: Options) -> tuple[Shard, ...]:
    return find_shards(
        source,
        options.columns,
        options.image_size,
        options.channels,
        options.limits,
        options.drop or (),
    )


def _has_shards(place: SourceFile) -> bool:
    """Tell whether a folder holds files that a stream reads."""
    return place.is_dir() and any(file.suffix.lower() in ENDINGS for file in place.iterdir())


def _runs(numbers: Numbers, *, in_one: bool) -> list[Numbers]:
    """Divide increasing numbers into stretches that are read in one piece."""
    if not len(numbers):
        return []
    if in_one:
        return [numbers]
    return np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
