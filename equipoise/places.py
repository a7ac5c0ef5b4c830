"""Places besides the folders of this machine: object stores and others, through fsspec.

``s3://``, ``gs://``, ``hf://``, ``memory://`` and whatever else fsspec has a library for. How to
log in is the business of that library, by the environment or by files of its own. Addresses with a
password or a signature are refused, because addresses are recorded and shown, and messages of the
libraries are passed on without the values of secrets.
"""

import io
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from equipoise.files import StoreError, expanded

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL)
LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub"}
"""The library that fsspec needs for a protocol."""
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "hf")
"""Protocols by which a file that is uploaded appears complete or not at all."""

SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|KEY|CREDENTIAL", re.IGNORECASE)
SECRET_ARGUMENT = re.compile(
    r"((?:signature|credential|token|accesskeyid|secret|password)[\w-]*\s*[=:]\s*)[^&\s,;\"'<>]+",
    re.IGNORECASE,
)
SHORTEST_SECRET = 6


@dataclass(frozen=True)
class Place:
    """A file or folder at a place that fsspec reaches.

    It has the methods of :class:`pathlib.Path` that are needed, and each of them asks the place
    anew.

    Args:
        address: Its address, with the protocol.

    Example:
        >>> folder = Place("memory://example")
        >>> (folder / "a.txt").write(b"hello")
        >>> [file.name for file in folder.iterdir()], (folder / "a.txt").read(1, 3)
        (['a.txt'], b'el')
    """

    address: str

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Ending of the name."""
        return Path(self.name).suffix

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.address.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.address

    def iterdir(self) -> list["Place"]:
        """List what lies in the folder, by name.

        Returns:
            Files and folders; none if there is no such folder.
        """
        with explained(self.address):
            files, path = self._found()
            files.invalidate_cache()
            if not files.isdir(path):
                return []
            entries = files.ls(path, detail=False)
        names = {entry.rstrip("/").rpartition("/")[2] for entry in entries}
        return [self / name for name in sorted(names) if name]

    def is_dir(self) -> bool:
        """Tell whether it is a folder that holds something."""
        with explained(self.address):
            files, path = self._found()
            files.invalidate_cache()
            return bool(files.isdir(path))

    def is_file(self) -> bool:
        """Tell whether there is such a file."""
        with explained(self.address):
            files, path = self._found()
            files.invalidate_cache()
            return bool(files.isfile(path))

    def open(self, read_ahead: int = 0) -> Any:  # noqa: ANN401 (a binary file)
        """Open the file for reading, so that a read fetches what it asks for and no more.

        Args:
            read_ahead: Bytes that are fetched beyond it.

        Returns:
            A file that can be sought in.
        """
        with explained(self.address):
            files, path = self._found()
            files.invalidate_cache()
            file = _RemoteFile(self, int(files.size(path)))
        return io.BufferedReader(file, read_ahead) if read_ahead else file

    def read(self, start: int | None = None, stop: int | None = None) -> bytes:
        """Read the file, or some of its bytes.

        Args:
            start: Number of the first byte.
            stop: Number of the byte after the last.

        Returns:
            The bytes.
        """
        with explained(self.address):
            files, path = self._found()
            return bytes(files.cat_file(path, start=start, end=stop))

    def write(self, content: bytes) -> None:
        """Write the file, which appears complete or not at all.

        Args:
            content: What it shall hold.
        """
        self._put(lambda files, path: files.pipe_file(path, content))

    def upload(self, file: Path) -> None:
        """Copy a file of this machine here; it appears complete or not at all.

        Args:
            file: The file.
        """
        self._put(lambda files, path: files.put_file(str(file), path))

    def download(self, file: Path) -> None:
        """Copy the file to this machine.

        Args:
            file: Where it goes.
        """
        with explained(self.address):
            files, path = self._found()
            files.get_file(path, str(file))

    def remove(self) -> None:
        """Delete the file, if there is one."""
        with explained(self.address):
            files, path = self._found()
            try:
                files.rm_file(path)
            except FileNotFoundError:
                return

    def _put(self, write: Any) -> None:  # noqa: ANN401 (a function of a class of fsspec)
        """Write a file under a temporary key first, where it would grow before everyone's eyes."""
        with explained(self.address):
            files, path = self._found()
            protocol = self.address.partition("://")[0]
            if protocol in OBJECT_STORES:
                write(files, path)
            else:
                files.makedirs(files._parent(path), exist_ok=True)
                temporary = f"{path}.{secrets.token_hex(4)}.tmp"
                write(files, temporary)
                files.mv(temporary, path)
            files.invalidate_cache()

    def _found(self) -> tuple[Any, str]:
        """The file system of fsspec, and the path in it."""
        import fsspec

        files, path = fsspec.core.url_to_fs(self.address)
        return files, str(path)


SourceFile: TypeAlias = Path | Place
"""A file or folder of this machine, or at a place."""


class _RemoteFile(io.RawIOBase):
    """A file at a place, each read of which fetches exactly what it asks for.

    Files of fsspec are not used, because those of some places share their position.

    Args:
        place: The file.
        size: Its length, in bytes.
    """

    def __init__(self, place: Place, size: int) -> None:
        self.place = place
        self.size = size
        self.position = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be sought in."""
        return True

    def tell(self) -> int:
        """Tell where the next read begins."""
        return self.position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move to another position."""
        self.position = max(0, (0, self.position, self.size)[whence] + offset)
        return self.position

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 (Python 3.11 has no Buffer)
        """Fetch as many bytes as the buffer holds, or as there are."""
        stop = min(self.size, self.position + len(buffer))
        if stop <= self.position:
            return 0
        content = self.place.read(self.position, stop)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def is_place(source: object) -> bool:
    """Tell whether a source is an address of a place, such as s3://bucket/folder.

    Args:
        source: Anything.

    Returns:
        True for a text that begins with a protocol.

    Example:
        >>> [is_place(text) for text in ("s3://b/x", "hf:owner/name", "runs/a", "C:/x")]
        [True, False, False, False]
    """
    return isinstance(source, str) and ADDRESS.match(source) is not None


def locate(source: str | Path) -> SourceFile:
    """Find what an address or path names.

    Args:
        source: An address, or a path. ``file://`` addresses are paths.

    Returns:
        A path of this machine, or a place.

    Raises:
        StoreError: If the address carries a password or a signature.
    """
    match = ADDRESS.match(source) if isinstance(source, str) else None
    if match is None:
        return expanded(source)

    protocol, rest = match[1], match[2]
    host = rest.partition("/")[0]
    if "@" in host or "?" in rest:
        raise StoreError(
            f"{protocol}://...: an address with a password or a signature would be recorded in "
            "the run: give the plain address, and log in as the library of the place expects "
            "(environment variables or its own files)"
        )
    if protocol in ("file", "local"):
        return Path(rest)
    return Place(f"{protocol}://{rest.rstrip('/')}")


def scrubbed(text: str) -> str:
    """Take the values of secrets out of a message.

    Args:
        text: A message of a library.

    Returns:
        The text on one line, with stars for the values of environment variables whose names are
        those of secrets, and of arguments such as signatures.
    """
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return " ".join(SECRET_ARGUMENT.sub(r"\1***", text).split())[:300]


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn the errors of a library, of which there are many kinds, into one that says what to do.

    Args:
        address: The address of what is read or written.

    Yields:
        None.

    Raises:
        ImportError: If the library of the protocol is not installed.
        StoreError: If there is no such file, or it may not be read or written.
        ConnectionError: If the place does not answer.
    """
    protocol = address.partition("://")[0]
    try:
        yield
    except StoreError:
        raise
    except ImportError:
        library = LIBRARIES.get(protocol, f"the library of {protocol}:// for fsspec")
        raise ImportError(f"{address} needs {library}: pip install {library}") from None
    except FileNotFoundError:
        raise StoreError(f"There is no {address}.") from None
    except Exception as error:  # each library has errors of its own
        reason = scrubbed(str(error)) or type(error).__name__
        kind = type(error).__name__
        if isinstance(error, PermissionError) or "Credentials" in kind:
            raise StoreError(
                f"{address} may not be read or written ({reason}): log in as {protocol}:// "
                "expects it, by the environment or by files of its library"
            ) from None
        if isinstance(error, ValueError) and "rotocol" in reason:
            raise StoreError(
                f"{address}: no place of this kind is known; expected s3://, gs://, hf://, "
                "file:// or memory://"
            ) from None
        raise ConnectionError(f"{address} cannot be reached or used ({kind}: {reason})") from None
