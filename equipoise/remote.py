"""A run at a place such as s3://bucket/run: a folder of this machine, and its copy there.

The run is written into the folder ``runs/s3/bucket/run``, and uploaded from there after each
checkpoint. A checkpoint counts only when the index at the place, which is written after it, names
its size and its digest: one that was cut off by a kill is not seen. Where both have a run, what the
place has is what counts.

The index also names who writes. If another job has taken over since, as after a machine was given
up for lost, the earlier one stops at its next checkpoint.
"""

import hashlib
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from equipoise.files import StoreError, exclusive_outputs, whole_file, written_names
from equipoise.places import ADDRESS, Place, locate
from equipoise.records import Count, Digest, InnerPath, Name, decode_record

INDEX = "equipoise-run.json"
LARGE = ".safetensors"
"""Ending of the files that are believed only if the index names them."""
CHUNK = 1 << 20


class IndexedFile(TypedDict):
    """A file that was uploaded whole."""

    bytes: Count
    sha256: Digest


class Index(TypedDict):
    """What lies at the place."""

    writer: Name
    files: dict[InnerPath, IndexedFile]


class _NotWholeError(Exception):
    """A file is not what the index says."""


class RemoteRun:
    """A run at a place, and its folder on this machine.

    Args:
        address: Address of the run.

    Raises:
        StoreError: If the address is one of this machine, or carries a password.
    """

    def __init__(self, address: str) -> None:
        place = locate(address)
        if not isinstance(place, Place):
            raise StoreError(f"{address} is a folder of this machine: give its path, {place}")
        self.place = place
        self.writer = secrets.token_hex(8)
        self.sent: dict[str, IndexedFile] = {}
        """What this machine knows to lie at the place."""
        self.described: dict[tuple[str, int, int], IndexedFile] = {}
        """Digests by name, size and time of change, so that no file is read twice for them."""

    @property
    def folder(self) -> Path:
        """The folder of this machine."""
        return folder_of(self.place)

    def exists(self) -> bool:
        """Tell whether there is a run at the place, of which at least a checkpoint is whole."""
        index = self._read_index()
        return index is not None and bool(index["files"])

    def download(self) -> list[str]:
        """Make the folder of this machine what the place has.

        Returns:
            Names of files that are not what the index says, and are left out.

        Raises:
            StoreError: If files that equipoise did not write lie in the folder, or a job works
                there.
        """
        with exclusive_outputs(self.folder, "downloading"):
            index = self._read_index()
            self.sent = index["files"] if index else {}
            # What an earlier copy has, and the place does not.
            for name in written_names(self.folder) - self.sent.keys():
                (self.folder / name).unlink(missing_ok=True)

            left_out = [name for name, known in self.sent.items() if not self._fetch(name, known)]
            for name in left_out:
                del self.sent[name]
        return left_out

    def _fetch(self, name: str, known: IndexedFile) -> bool:
        """Download a file, if it is not here already; False if it is not what the index says."""
        file = self.folder / name
        if file.is_file() and self._describe(name) == known:
            return True
        try:
            with whole_file(file) as temporary:
                (self.place / name).download(temporary)
                # The others are small: they come in one piece, and are rewritten by the training.
                if name.endswith(LARGE) and _describe(temporary) != known:
                    raise _NotWholeError
        except (_NotWholeError, StoreError):
            file.unlink(missing_ok=True)
            return False
        return True

    def take_over(self) -> None:
        """Become the only writer, before anything is uploaded."""
        self._write_index()

    def upload(self) -> None:
        """Upload what has changed, then the index, and only then remove what is gone here.

        Raises:
            StoreError: If another job has taken over.
            ConnectionError: If the place cannot be reached.
        """
        index = self._read_index()
        if index is not None and index["writer"] != self.writer:
            raise StoreError(
                f"another job has gone on with {self.place} since, so that this one stops; "
                "train into another --out, or stop the other"
            )
        names = sorted(written_names(self.folder))
        found = {name: self._describe(name) for name in names if (self.folder / name).is_file()}

        for name, known in found.items():
            if self.sent.get(name) != known:
                (self.place / name).upload(self.folder / name)
        gone = self.sent.keys() - found.keys()
        self.sent = found
        self._write_index()
        for name in gone:
            (self.place / name).remove()

    def _describe(self, name: str) -> IndexedFile:
        """Compute size and digest of a file in the folder."""
        status = (self.folder / name).stat()
        key = (name, status.st_size, status.st_mtime_ns)
        if key not in self.described:
            self.described[key] = _describe(self.folder / name)
        return self.described[key]

    def _read_index(self) -> Index | None:
        file = self.place / INDEX
        return decode_record(file.read(), Index, str(file)) if file.is_file() else None

    def _write_index(self) -> None:
        index: Index = {"writer": self.writer, "files": self.sent}
        (self.place / INDEX).write(json.dumps(index).encode())


def folder_of(place: Place) -> Path:
    """Find the folder of this machine for a run at a place.

    Args:
        place: The place.

    Returns:
        A path below ``runs``.

    Example:
        >>> folder_of(Place("s3://bucket/photos/run-1"))
        PosixPath('runs/s3/bucket/photos/run-1')
    """
    match = ADDRESS.match(place.address)
    parts = [part for part in (match[2] if match else "").split("/") if part]
    if not match or not parts or ".." in parts:
        raise StoreError(f"{place} does not name a folder for a run")
    return Path("runs", match[1], *parts)


def fetch(address: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """Download a run from a place.

    Args:
        address: Address of the run.
        say: Called with a sentence about what was not whole.

    Returns:
        The folder of this machine.

    Raises:
        StoreError: If there is no run.
    """
    remote = RemoteRun(address)
    if not remote.exists():
        raise StoreError(
            f"{address} is not a run: it has no {INDEX}. "
            "'equipoise train --out' of an address makes one."
        )
    for name in remote.download():
        say(f"Passed over {remote.place / name}, which was not uploaded to its end.")
    return remote.folder


def _describe(file: Path) -> IndexedFile:
    """Compute size and digest of a file."""
    digest, n_bytes = hashlib.sha256(), 0
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            n_bytes += len(chunk)
    return {"bytes": n_bytes, "sha256": digest.hexdigest()}
