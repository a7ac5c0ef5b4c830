"""Examples in many files, the shards, of which each process reads only its own part.

Every file says in its header or footer how many examples it has, so that nothing is read to count
them. The library ``datasets`` can divide shards among processes, too. It is not used for this,
because its order of the examples depends on the number of processes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from equipoise.data.arrays import examples
from equipoise.data.dataset import Array, Channels
from equipoise.data.gate import DEFAULT_LIMITS, Limits
from equipoise.data.images import Header, make_plan
from equipoise.data.shard_files import NpyShard, Shard
from equipoise.data.shard_tables import ArrowShard, ParquetShard, TableShard
from equipoise.data.shard_tars import TarShard
from equipoise.data.stream import Stream
from equipoise.places import SourceFile, locate

KINDS: dict[str, type[Shard]] = {
    ".npy": NpyShard,
    ".parquet": ParquetShard,
    ".feather": ArrowShard,
    ".arrow": ArrowShard,
    ".tar": TarShard,
}
"""What reads the files of each ending."""
ENDINGS = tuple(KINDS)
PLANNED_FROM = 1000
"""Number of images in tar files whose headers decide the format of all images."""
READERS = 64
"""Most places of the data from which examples are read at the same time: a power of two."""
GROUPS_PER_READER = 10
"""Fewest row groups of a Parquet source for each reader.

A reader begins and ends within a row group, of which more is read than is used: of each, half on
average and at most one row group in all. With 10 of them, this is at most a tenth of the data.
"""


@dataclass(frozen=True, eq=False, repr=False)
class ShardedStream(Stream):
    """Training examples in files, of which each process reads only its own part.

    :func:`equipoise.load_stream` makes it of a folder. See
    :class:`equipoise.data.shard_batches.ShardBatches` for the order in which examples are read.

    Args:
        shards: The files, in the order of the examples.
        readers: Number of places from which examples are read at the same time, over all
            processes. It is a power of two, and does not depend on the number of processes.
        axis: Axis of the channels of images, if it is known.
    """

    shards: tuple[Shard, ...]
    readers: int
    axis: int | None = None

    def rows(self, shard: Shard, start: int, stop: int) -> Iterator[Array]:
        r"""Read some training examples of a file.

        Args:
            shard: The file.
            start: Number of the first example within the file.
            stop: Number of the example after the last one.

        Yields:
            Raw examples, (B, \*), in the type of the data.

        Raises:
            ValueError: If they have changed since the source was loaded.
        """
        label = str(shard.path)
        for values in read_rows(shard, start, stop):
            batch = examples(values, label, self.axis)
            if batch.shape[1:] != self.shape[1:]:
                raise ValueError(
                    f"{label}: examples of shape {batch.shape[1:]}; the first are of shape "
                    f"{self.shape[1:]}"
                )
            yield self._cast(batch, label)


def find_shards(
    source: str | Path | Sequence[str | Path],
    column: str | Sequence[str] | None,
    image_size: int | str | None = None,
    channels: Channels | None = None,
    limits: Limits = DEFAULT_LIMITS,
    drop: Sequence[str] = (),
) -> tuple[Shard, ...]:
    """Find the files of a source, and read how many examples each has.

    Args:
        source: A folder of files of one kind, which are taken in the order of their names, such a
            file, or a list of them. Folders and files may be at a place such as s3://bucket/folder.
        column: Column of tables that holds the examples as lists, or columns of numbers. None
            takes all columns if they are numbers, or the only column of lists. Of tar files, the
            ending of the members that are the examples.
        image_size: Side in pixels that the images of tar files get. None keeps their size.
        channels: "grey" or "rgb", for the images of tar files.
        limits: The most that an image may claim.
        drop: Columns of tables to leave out.

    Returns:
        The files with examples.

    Raises:
        ValueError: If there are none, or they are of different kinds.
        ImportError: If tables need pyarrow, or a place needs a library, and it is not installed.
    """
    if isinstance(source, str | Path):
        label = str(source)
        files = _files_of(locate(source))
    else:
        label = f"a list of {len(source)} files"
        files = [locate(file) for file in source]

    kinds = {KINDS.get(file.suffix.lower()) for file in files}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        found = ", ".join(sorted({file.suffix.lower() for file in files})) or "none of them"
        raise ValueError(
            f"{label}: a stream of files needs files of one kind, of {', '.join(ENDINGS)}; "
            f"found {found}"
        )
    if kind is not TarShard and (image_size or channels):
        raise ValueError(
            f"{label}: image_size and channels are for images that are decoded, of .tar files; "
            "leave them out"
        )

    if drop and not issubclass(kind, TableShard):
        raise ValueError(f"{label}: drop is for the columns of tables; leave it out")
    inspected = [_inspect(kind, file, column, drop) for file in files]
    shards = tuple(shard for shard in inspected if shard.n)
    if not shards:
        raise ValueError(f"{label}: no examples in the {len(files)} files")
    if kind is TarShard:
        return _planned(cast("tuple[TarShard, ...]", shards), image_size, channels, limits, label)
    return shards


def choose_readers(shards: Sequence[Shard]) -> int:
    """Choose from how many places examples are read at the same time.

    Args:
        shards: The files.

    Returns:
        A power of two, at most :data:`READERS`, and fewer if the files have few row groups.
    """
    if not any(shard.groups for shard in shards):
        return READERS

    most = max(1, sum(len(shard.groups) for shard in shards) // GROUPS_PER_READER)
    return min(READERS, 1 << (most.bit_length() - 1))


def describe_shards(shards: Sequence[Shard]) -> list[str]:
    """Say how many files there are, how they were counted, and how many processes can share them.

    Args:
        shards: The files.

    Returns:
        Sentences.
    """
    readers = choose_readers(shards)
    text = f"{len(shards):,} files, counted by their headers"
    if readers < READERS:
        n_groups = sum(len(shard.groups) for shard in shards)
        text += (
            f"; with {n_groups:,} row groups, up to {readers} processes read only their own part "
            "(write smaller row groups for more)"
        )

    tars = [shard for shard in shards if isinstance(shard, TarShard)]
    if not tars:
        return [text]
    notes = [f"{len(tars):,} tar files of .{tars[0].ending} members"]
    n_read = sum(not shard.has_index for shard in tars)
    if n_read:
        notes[0] += (
            f"; {n_read:,} have no index (.idx), so that the headers of all their members were "
            "read to count them"
        )
    return notes


def read_rows(shard: Shard, start: int, stop: int) -> Iterator[Array]:
    r"""Read some examples of a file, a few at a time.

    Args:
        shard: The file.
        start: Number of the first example.
        stop: Number of the example after the last one.

    Yields:
        Values as they are in the file, (B, \*).

    Raises:
        ValueError: If the file has changed since it was found.
    """
    n = 0
    for piece in shard.read(start, stop):
        n += len(piece)
        yield piece
    if n != stop - start:
        raise shard.changed()


def _files_of(place: SourceFile) -> list[SourceFile]:
    """The files of a folder that may be shards, or a single file."""
    if not place.is_dir():
        return [place]
    visible = [file for file in place.iterdir() if not file.name.startswith((".", "_"))]
    return sorted((file for file in visible if file.suffix.lower() in KINDS), key=lambda f: f.name)


def _inspect(
    kind: type[Shard],
    file: SourceFile,
    column: str | Sequence[str] | None,
    drop: Sequence[str],
) -> Shard:
    """Read the header or footer of a file."""
    try:
        if kind is NpyShard:
            if column is not None:
                raise ValueError("column is for tables and .tar files; leave it out")
            return NpyShard.inspect(file)
        if kind is TarShard:
            if not isinstance(column, str | None):
                raise ValueError("give the ending of its members with column=, and not several")
            return TarShard.inspect(file, column)
        return cast("type[ParquetShard | ArrowShard]", kind).inspect(file, column, drop)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _planned(
    shards: tuple[TarShard, ...],
    image_size: int | str | None,
    channels: Channels | None,
    limits: Limits,
    label: str,
) -> tuple[Shard, ...]:
    """Choose the common format of the images of tar files, by the headers of the first."""
    shards = tuple(replace(shard, limits=limits) for shard in shards)
    if len({shard.ending for shard in shards}) > 1:
        listed = ", ".join(sorted({f".{shard.ending}" for shard in shards}))
        raise ValueError(f"{label}: members of {listed}; name the ending with column=")
    if not shards[0].is_image:
        if image_size or channels:
            raise ValueError(f"{label}: image_size and channels are for images; leave them out")
        return shards

    headers: Counter[Header] = Counter()
    for shard in shards:
        headers += shard.headers(min(shard.n, PLANNED_FROM - headers.total()))
        if headers.total() >= PLANNED_FROM:
            break
    plan = make_plan(headers, image_size, channels, None, label, pages="first")
    return tuple(replace(shard, plan=plan) for shard in shards)
