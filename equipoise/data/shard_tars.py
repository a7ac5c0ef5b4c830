"""Tar shards, as WebDataset lays them out: images or arrays that lie one after another.

An example is one member of the tar file, such as ``000017.jpg``; members of the same name with
another ending, such as ``000017.json``, belong to the same example and are not read. Members that
are pickles are never opened. An index beside the file (``.idx``, as DALI's wds2idx writes it) tells
where the members are. Without one, the headers of the members are read once.
"""

import functools
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from equipoise.data.dataset import Array
from equipoise.data.gate import DEFAULT_LIMITS, Limits, read_npy_bytes
from equipoise.data.images import Header, Plan, decode, read_header
from equipoise.data.shard_files import BYTES_AT_ONCE, Shard, opened, size_of
from equipoise.places import Place, SourceFile

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "ppm", "pgm", "gif")
INDEX_ENDINGS = (".idx", ".index")
INDEX_VERSION = "v1.2"
MOST_BETWEEN = 1 << 16
"""Most bytes between two members that are read with them in one piece."""
HEADER_BYTES = 1 << 18


class Member(NamedTuple):
    """A file within a tar file.

    Args:
        name: Its path there.
        offset: Where its content begins, in bytes.
        size: Length of its content, in bytes.
    """

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """What the files of an example have in common: the path up to the first dot of the name."""
        path = PurePosixPath(self.name)
        return str(path.parent / path.name.partition(".")[0])

    @property
    def ending(self) -> str:
        """What follows the first dot of the name, in small letters."""
        return PurePosixPath(self.name).name.partition(".")[2].lower()


@dataclass(frozen=True)
class TarShard(Shard):
    """A tar file of images or arrays.

    Args:
        path: The file.
        n: Number of its examples.
        members: The member of each example, in the order of the file.
        ending: Ending of all members.
        has_index: Whether they were found in an index.
        plan: The common format of images. None for arrays, and before it is chosen.
        limits: The most that an image may claim.
    """

    members: tuple[Member, ...] = field(repr=False)
    ending: str
    has_index: bool
    plan: Plan | None = None
    limits: Limits = DEFAULT_LIMITS

    @classmethod
    def inspect(cls, path: SourceFile, column: str | None) -> "TarShard":
        """Find the members of a file by its index or by their headers.

        Args:
            path: The file.
            column: Ending of the members that are the examples. None takes that of images or
                arrays, if there is one.

        Returns:
            The shard, without the common format of its images.

        Raises:
            ValueError: If it is no tar file, its index is not of this file, or it is not clear
                which members are the examples.
        """
        index = _index_of(path)
        if index is None:
            found, has_index = _read_headers(path), False
        else:
            found, has_index = _read_index(path, index), True
        ending = _choose_ending(found, column)
        members = tuple(member for member in found if member.ending == ending)
        keys = Counter(member.key for member in members)
        twice = next((key for key, count in keys.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"two members are called {twice}.{ending}")
        return cls(path, len(members), members, ending, has_index)

    @property
    def is_image(self) -> bool:
        """Whether the members are images."""
        return _is_image(self.ending)

    def headers(self, n: int) -> Counter[Header]:
        """Read the headers of the first images.

        Args:
            n: Number of images.

        Returns:
            Their headers, with the number of images that have each.
        """
        found: Counter[Header] = Counter()
        with opened(self.path) as file:
            for member in self.members[:n]:
                content = self._contents(file, [member])[0]
                try:
                    found[read_header(BytesIO(content), self.limits)] += 1
                except Exception as error:  # a broken file may cause any exception in Pillow
                    raise self._bad(member, error) from error
        return found

    def read(self, start: int, stop: int) -> Iterator[Array]:
        """Read and decode some examples."""
        with opened(self.path) as file:
            end = self.members[-1].offset + self.members[-1].size
            if size_of(file) < end:
                raise self.changed()
            for members in _in_pieces(self.members[start:stop]):
                contents = self._contents(file, members)
                # The images of a piece are decoded at the same time.
                yield np.stack(list(_threads().map(self._decode, members, contents)))

    def _contents(
        self,
        file: Any,  # noqa: ANN401 (a binary file)
        members: Sequence[Member],
    ) -> list[bytes]:
        """Read members that lie close to each other in one piece."""
        first = members[0].offset
        file.seek(first)
        content: bytes = file.read(members[-1].offset + members[-1].size - first)
        return [content[m.offset - first :][: m.size] for m in members]

    def _decode(self, member: Member, content: bytes) -> Array:
        try:
            if len(content) != member.size:
                raise ValueError(f"it ends after {len(content)} of {member.size} bytes")
            if not self.is_image:
                return read_npy_bytes(content)
            if self.plan is None:
                raise ValueError("the format of the images was not chosen")
            image: Array = decode(BytesIO(content), self.plan, self.limits)[0]
            return image
        except Exception as error:  # a broken file may cause any exception in Pillow
            raise self._bad(member, error) from error

    def _bad(self, member: Member, error: Exception) -> ValueError:
        """Name a member that cannot be read."""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return ValueError(
            f"{self.path}: {member.name} cannot be read: {reason}. Streams leave nothing out: "
            "write the file without it"
        )


def _in_pieces(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Divide members into pieces that are read at once."""
    piece: list[Member] = []
    n_bytes = 0
    for member in members:
        gap = member.offset - piece[-1].offset - piece[-1].size if piece else 0
        if piece and (n_bytes + member.size > BYTES_AT_ONCE or not 0 <= gap <= MOST_BETWEEN):
            yield piece
            piece, n_bytes = [], 0
        piece.append(member)
        n_bytes += member.size
    if piece:
        yield piece


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """The threads in which all readers decode."""
    return ThreadPoolExecutor(thread_name_prefix="decode")


def _is_image(ending: str) -> bool:
    return ending.rpartition(".")[2] in IMAGE_ENDINGS


def _choose_ending(members: Sequence[Member], column: str | None) -> str:
    """Choose the members that are the examples, by their ending."""
    endings = Counter(member.ending for member in members)
    readable = [
        ending for ending in endings if _is_image(ending) or ending.rpartition(".")[2] == "npy"
    ]
    listed = ", ".join(f".{ending} ({count})" for ending, count in endings.most_common(10))
    if column is not None:
        column = column.lower().removeprefix(".")
        if column in readable:
            return column
        raise ValueError(f"no images or arrays with the ending .{column}; there are {listed}")
    if len(readable) == 1:
        return readable[0]
    if not readable:
        raise ValueError(
            f"no images or .npy arrays among its members, which are {listed or 'none'}"
        )
    raise ValueError(
        f"members of several kinds, {', '.join(readable)}: name the ending of those that are the "
        "examples with column="
    )


def _read_headers(path: SourceFile) -> list[Member]:
    """Read the headers of all members; their content is passed over."""
    source = opened(path) if isinstance(path, Path) else path.open(HEADER_BYTES)
    try:
        with source as file, tarfile.open(fileobj=file, mode="r:") as tar:
            return [
                Member(info.name, info.offset_data, info.size)
                for info in tar
                if info.isreg() and not info.issparse()
            ]
    except tarfile.TarError as error:
        raise ValueError(f"it is damaged, or no tar file without compression ({error})") from error


def _index_of(path: SourceFile) -> SourceFile | None:
    """Find the index of a tar file."""
    for ending in INDEX_ENDINGS:
        name = str(path).removesuffix(path.suffix) + ending
        index: SourceFile = Path(name) if isinstance(path, Path) else Place(name)
        if index.is_file():
            return index
    return None


def _read_index(path: SourceFile, index: SourceFile) -> list[Member]:
    """Read an index: a line for each example, with ending, offset, size and name of each member."""
    try:
        content = index.read_bytes() if isinstance(index, Path) else index.read()
        version, *lines = content.decode().splitlines()
        if version.split() != [INDEX_VERSION, str(len(lines))]:
            raise ValueError(f"its first line is not '{INDEX_VERSION} N' for N lines")
        members = []
        for line in lines:
            words = line.split()
            members += [
                Member(name, int(offset), int(size))
                for _, offset, size, name in zip(*[iter(words)] * 4, strict=True)
            ]
    except (ValueError, UnicodeError) as error:
        raise ValueError(
            f"its index {index.name} cannot be read ({error}): write it anew, or remove it"
        ) from error

    with opened(path) as file:
        size = size_of(file)
    if any(m.offset < 512 or m.size < 0 or m.offset + m.size > size for m in members):
        raise ValueError(f"its index {index.name} is of another file: write it anew, or remove it")
    return members
