"""Files and folders that equipoise owns: written whole, listed in a manifest, locked by one job.

A folder that equipoise writes to has a manifest, ``.equipoise.jsonl``. It names every file that was
written there, one JSON object per line. A file that the manifest does not name belongs to somebody
else: it is neither replaced nor deleted. A file appears complete or not at all.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

MANIFEST = ".equipoise.jsonl"
"""The file that makes a folder one of ours, and names what was written there."""
LOCK = ".equipoise.lock"
"""The file that the job which works in a folder has locked."""
HOLDER = ".equipoise.holder.json"
"""The file that says which job has locked the folder."""
FOLDER_FORMAT = "equipoise-folder-1"
CHECKED = (".json", ".jsonl")
"""Endings of files whose digest stands in the manifest. Files of tensors carry their own."""
MAX_MANIFEST_BYTES = 50_000_000
OUTPUT_SECONDS = 60.0
"""How long a job waits for another that writes its outputs into the same folder."""


class StoreError(ValueError):
    """A file cannot be read or written. The message says what to do about it."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file so that it appears complete or not at all.

    The data go to a temporary file in the same folder, are flushed to the disk, and the temporary
    file is renamed. If the process is killed, the old file or the new one is there. If the disk is
    full, the old one is there.

    If the file lies within a folder that has a manifest, it is entered there before it appears.

    Args:
        path: Path of the file. Its folder is made if it does not exist.

    Yields:
        Path of the temporary file to write to. It has the same ending.

    Raises:
        StoreError: If the folder has a manifest, and the file is there but was not written by
            equipoise.
        OSError: If the disk is full or cannot be written to. The message names the file.
    """
    temporary = path.with_name(f".equipoise-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")

    try:
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _claim(path)
            yield temporary

            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if path.suffix in CHECKED:
                # Before the file appears: whichever of old and new a kill leaves, its digest is
                # known.
                record_digest(path, temporary.read_bytes())
            temporary.replace(path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in the error of a write, which says nothing of it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, _describe_failure(path, error)) from error


def _describe_failure(path: Path, error: OSError) -> str:
    """Say which file could not be written, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left to write {path}; what was there before is untouched, "
            "so free some and go on"
        )

    return f"cannot write {path}: {error.strerror or error}; what was there before is untouched"


def _sync_folder(folder: Path) -> None:
    """Flush a rename in a folder to the disk, on systems that can open folders."""
    with contextlib.suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 (any JSON value)
    """Write a JSON file, which appears complete or not at all.

    Args:
        path: Path of the file.
        value: Any JSON value. NaN and infinite numbers are refused.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Names of files may hold bytes that are no text, for which "?" is written.
    content = text.encode(errors="replace")
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as an ``.npy`` file, which appears complete or not at all.

    ``np.save`` is not used, because its error says nothing of a full disk.

    Args:
        path: Path of the file.
        array: The array, of numbers.
    """
    values = np.ascontiguousarray(array)
    header = np.lib.format.header_data_from_array_1_0(values)

    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(values.data)


def expanded(path: str | Path) -> Path:
    """Put a home folder in the place of the ``~`` or ``~user`` with which a path may begin.

    Args:
        path: The path.

    Returns:
        The path, without ``~``.

    Raises:
        StoreError: If the system knows no such home folder, as in some containers.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise StoreError(f"{path}: no such home folder is known; give the whole path") from error


def check_text(path: str | Path) -> None:
    """Refuse a path of bytes that are no text: JSON cannot name it, and safetensors not open it.

    Args:
        path: The path.

    Raises:
        StoreError: If it is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"the name {path} is not UTF-8: rename it, or choose another") from error


def check_regular(path: Path) -> None:
    """Refuse what is not a regular file, such as a pipe, on which reading would wait for ever.

    Args:
        path: Path of the file. A link is followed.

    Raises:
        StoreError: If it is something else, or does not exist.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise StoreError(f"There is no {path}.") from error
    if not stat.S_ISREG(mode):
        raise StoreError(f"{path} is not a regular file")


def own_folder(folder: Path) -> None:
    """Make a folder one of ours, by a manifest. Files that are there stay somebody else's.

    Args:
        folder: Path of the folder. It is made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        _append(folder, {"format": FOLDER_FORMAT})
        _sync_folder(folder)


def own_outputs(folder: Path) -> None:
    """Make a folder that outputs go to one of ours, unless it lies within one that is.

    Args:
        folder: Path of the folder.
    """
    if owner_of(folder / "output") is None:
        own_folder(folder)
    if folder.is_dir():
        _remove_leftovers(folder.glob(".equipoise-*"))


def adopt(folder: Path, names: Iterable[str]) -> None:
    """Enter files into the manifest of a folder that another program put there for us.

    Args:
        folder: Path of the folder. It gets a manifest if it has none.
        names: Paths of the files, relative to the folder. Those that do not exist are left out.
    """
    own_folder(folder)
    for name in names:
        if (folder / name).is_file():
            _append(folder, {"wrote": name})


def owner_of(path: Path) -> Path | None:
    """Find the folder of ours in which a file lies or would lie.

    Args:
        path: Path of the file, which need not exist.

    Returns:
        The innermost folder with a manifest. None if there is none.
    """
    for folder in path.absolute().parents:
        if (folder / MANIFEST).is_file():
            return folder
    return None


def written_names(folder: Path) -> set[str]:
    """Read the manifest of a folder.

    Lines that cannot be read, such as one that a kill has cut off, are left out.

    Args:
        folder: Path of the folder.

    Returns:
        Paths of the files that equipoise has written there, relative to the folder, with "/".
        Empty if there is no manifest.
    """
    return set(_manifest_of(folder).names)


class _Manifest:
    """What has been read of a manifest.

    It is only ever appended to, so that the next reading begins where this one has ended. A run of
    a thousand epochs has a manifest of thousands of lines, and looks into it at each of them.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: set[str] = set()
        self.digests: dict[str, list[dict[str, Any]]] = {}
        """The last two digests of each file that has some."""
        self.n_read = 0
        self.last_line = b""

    def continues(self) -> bool:
        """Tell whether what was read is still how the file begins."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.n_read - len(self.last_line))
                return file.read(len(self.last_line)) == self.last_line
        except OSError:
            return False

    def read(self) -> None:
        """Read the lines that were added. One that a kill has cut off is left out."""
        if self.path.stat().st_size > MAX_MANIFEST_BYTES:
            return

        with self.path.open("rb") as file:
            file.seek(self.n_read)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if line.endswith(b"\n"):
                self._take(line)
                self.n_read += len(line)
                self.last_line = line

    def _take(self, line: bytes) -> None:
        """Take in a line, unless it cannot be read."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(entry, dict):
            return

        if isinstance(entry.get("wrote"), str):
            self.names.add(entry["wrote"])
        if isinstance(entry.get("removed"), str):
            self.names.discard(entry["removed"])
        if isinstance(entry.get("digest_of"), str):
            before = self.digests.get(entry["digest_of"], [])
            self.digests[entry["digest_of"]] = [*before[-1:], entry]


_MANIFESTS: dict[Path, _Manifest] = {}


def _manifest_of(folder: Path) -> _Manifest:
    """Read the manifest of a folder, as far as it has not been read before."""
    path = folder.absolute() / MANIFEST
    if not path.is_file():
        return _Manifest(path)

    manifest = _MANIFESTS.get(path)
    if manifest is None or not manifest.continues():
        manifest = _MANIFESTS[path] = _Manifest(path)

    manifest.read()
    return manifest


def record_digest(path: Path, content: bytes, *, grows: bool = False) -> None:
    """Enter the digest of a file's content into the manifest of its folder, if there is one.

    Args:
        path: Path of the file.
        content: What it is about to hold or, if it ``grows``, what it holds.
        grows: Whether the file is appended to, so that more may follow this content.
    """
    owner = owner_of(path)
    if owner is not None:
        digest = hashlib.sha256(content).hexdigest()
        entry = {"digest_of": _name_in(owner, path), "sha256": digest, "bytes": len(content)}
        _append(owner, {**entry, "grows": grows})


def check_digest(path: Path, content: bytes) -> None:
    """Refuse a file of ours that was damaged or altered after it was written.

    Args:
        path: Path of the file.
        content: What it holds.

    Raises:
        StoreError: If the manifest of its folder has a digest of it, and the content is another.
    """
    owner = owner_of(path)
    if owner is None:
        return

    name = _name_in(owner, path)
    recorded = _manifest_of(owner).digests.get(name, [])
    # A digest is entered before the file is replaced: after a kill, the one before may hold.
    for position, entry in enumerate(reversed(recorded)):
        size, grows = entry.get("bytes"), entry.get("grows") is True
        is_possible = type(size) is int and (len(content) == size or (grows and position == 0))
        if is_possible and hashlib.sha256(content[:size]).hexdigest() == entry.get("sha256"):
            return
        has_grown = type(size) is int and len(content) < size <= path.stat().st_size
        # A run that goes on may have added a line between the two readings.
        if grows and not (position == 0 and has_grown):
            break

    if recorded:
        raise StoreError(
            f"{path} was altered after it was written: its checksum differs from the one in "
            f"{owner / MANIFEST}. Restore it; if you have changed it on purpose, delete the lines "
            f"of {MANIFEST} that begin with the digest of {name}."
        )


def is_ours(path: Path) -> bool:
    """Tell whether equipoise has written a file, by the manifest of its folder.

    Args:
        path: Path of the file.

    Returns:
        True if a manifest names it.
    """
    owner = owner_of(path)
    return owner is not None and _name_in(owner, path) in written_names(owner)


def remove(path: Path) -> None:
    """Delete a file that equipoise has written. A file of somebody else stays.

    Args:
        path: Path of the file, which need not exist.
    """
    owner = owner_of(path)
    if owner is not None and is_ours(path):
        path.unlink(missing_ok=True)
        _append(owner, {"removed": _name_in(owner, path)})


def move(path: Path, target: Path) -> None:
    """Move a file that equipoise has written out of its folder's manifest.

    Args:
        path: Path of the file.
        target: Its new path, on the same disk. The folder is made if it does not exist.
    """
    owner = owner_of(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    if owner is not None:
        _append(owner, {"removed": _name_in(owner, path)})


def set_aside(path: Path) -> Path:
    """Give a damaged file another name, so that it is kept but no longer read.

    Args:
        path: Path of the file.

    Returns:
        Its new path, with the further ending ``.damaged``, and a number if there is one already.
    """
    target = path.with_name(f"{path.name}.damaged")
    number = 2
    while os.path.lexists(target):
        target = path.with_name(f"{path.name}.damaged-{number}")
        number += 1

    path.rename(target)
    return target


def discard_if_empty(folder: Path, *, keep_folder: bool = False) -> None:
    """Remove a folder in which nothing was written but equipoise's own manifest and lock.

    Args:
        folder: Path of the folder.
        keep_folder: Whether the folder itself stays, empty, because it was there before.
    """
    if folder.is_dir() and is_empty(folder):
        with contextlib.suppress(OSError):
            for name in (MANIFEST, LOCK, HOLDER):
                (folder / name).unlink(missing_ok=True)
            if not keep_folder:
                folder.rmdir()


def is_empty(folder: Path) -> bool:
    """Tell whether a folder holds nothing but equipoise's manifest, lock and temporary files.

    Args:
        folder: Path of the folder.

    Returns:
        True if nothing else is there, or the folder does not exist.
    """
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(name.startswith(".equipoise") for name in os.listdir(folder))


@contextlib.contextmanager
def exclusive(folder: Path, job: str) -> Iterator[None]:
    """Let one job at a time work in a folder of ours.

    The operating system releases the lock of a process that dies. Temporary files that such a
    process has left are removed.

    Args:
        folder: Path of the folder. It becomes one of ours.
        job: What is done there, such as "training".

    Yields:
        None.

    Raises:
        StoreError: If another job works there. The message names its process and machine.
    """
    own_folder(folder)
    with _locked(folder, job):
        _remove_leftovers(folder.rglob(".equipoise-*"))
        yield


@contextlib.contextmanager
def exclusive_outputs(folder: Path, job: str) -> Iterator[None]:
    """Let one job at a time write outputs into a folder, so that those there are of one job.

    Another one waits for a minute, because the writing alone takes less.

    Args:
        folder: Path of the folder, see :func:`own_outputs`. It is made if it does not exist.
        job: What is done there, such as "sampling".

    Yields:
        None.

    Raises:
        StoreError: If another job writes there all that time. The message names its process and
            machine.
        OSError: If the folder cannot be made or written to.
    """
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    own_outputs(folder)
    with _locked(folder, job, OUTPUT_SECONDS):
        yield


@contextlib.contextmanager
def _locked(folder: Path, job: str, seconds: float = 0) -> Iterator[None]:
    """Hold the lock of a folder, after waiting for it so long, and say there who holds it."""
    lock = FileLock(folder / LOCK, timeout=seconds)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError(
            f"{folder} is in use: {_describe_holder(folder)}. Wait until it has ended, or stop it."
        ) from error

    try:
        holder = {
            "job": job,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        with _named(folder / HOLDER):
            (folder / HOLDER).write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _describe_holder(folder: Path) -> str:
    """Say which job has locked a folder."""
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return (
            f"{holder['job']} in process {holder['process']} on {holder['host']}, "
            f"since {holder['since']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        # The other process has locked the folder, but has not yet said so.
        return "another process has just begun there"


def _remove_leftovers(temporaries: Iterable[Path]) -> None:
    """Remove temporary files of processes that were killed while they wrote."""
    for path in temporaries:
        match = re.match(r"\.equipoise-(\d+)-[0-9a-f]{8}(\.|$)", path.name)
        if match is not None and not _is_alive(int(match[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Tell whether a process of this machine may still run."""
    if os.name == "nt":
        # There, this call would end the process.
        return True

    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _claim(path: Path) -> None:
    """Enter a file into the manifest of its folder, or refuse to replace somebody else's file."""
    owner = owner_of(path)
    if owner is None:
        return

    name = _name_in(owner, path)
    if name in written_names(owner):
        return
    if os.path.lexists(path):
        raise StoreError(
            f"{path} is there already, and equipoise did not write it: "
            "move it away, or choose another folder with --out."
        )
    _append(owner, {"wrote": name})


def _name_in(folder: Path, path: Path) -> str:
    return path.absolute().relative_to(folder).as_posix()


def _append(folder: Path, entry: dict[str, Any]) -> None:
    """Add a line to a manifest. A line is short enough to be written in one piece.

    It is flushed to the disk, so that after a loss of power no file is there without its claim.
    """
    manifest = folder / MANIFEST
    with _named(manifest), manifest.open("ab+") as file:
        # A line that a kill has cut off would spoil this one.
        if file.tell():
            file.seek(-1, os.SEEK_END)
        is_line_whole = file.read(1) in (b"\n", b"")

        line = json.dumps(entry).encode() + b"\n"
        file.write(line if is_line_whole else b"\n" + line)
        file.flush()
        os.fsync(file.fileno())
