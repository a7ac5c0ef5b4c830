"""The n-th call of the operating system fails, as on a full disk or without a permission.

:func:`install` replaces ``open`` and the functions of ``os`` in this process. It is meant for a
process that was forked for it: nothing is put back. Files that native code writes by itself are not
seen; real limits stand in for that, the faults "limit" and "full".
"""

import builtins
import errno
import io
import os
from functools import wraps
from pathlib import Path

ERRORS = {
    "open to write": ("ENOSPC", "EIO", "EMFILE", "EACCES"),
    "open to read": ("EIO", "EMFILE", "EACCES"),
    "write": ("ENOSPC", "EIO"),
    "read": ("EIO",),
    "fsync": ("ENOSPC", "EIO"),
    "rename": ("ENOSPC", "EIO", "EACCES"),
    "mkdir": ("ENOSPC", "EIO", "EACCES"),
    "unlink": ("EIO", "EACCES"),
}
"""Errors that the manual pages name, for each kind of call."""


class Calls:
    """Counts the calls that touch a folder, and lets one of them fail.

    Args:
        folder: Calls on files in this folder are counted.
        log: File to which each call is written: its kind, and the name of its file.
        failing: Number of the call that fails, from 1 on. None lets none fail.
        error: Name of its error, such as "ENOSPC".
    """

    def __init__(self, folder, log, failing=None, error="EIO"):
        self.folder = os.path.abspath(folder) + os.sep
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.failing, self.error = failing, getattr(errno, error)
        self.count = 0
        self.write_bytes = os.write

    def is_watched(self, path):
        """Tell whether a path, or an open file's number, is in the folder."""
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return (os.path.abspath(os.fsdecode(path)) + os.sep).startswith(self.folder)

    def happens(self, kind, path):
        """Count a call, and raise its error if it is the one that fails."""
        if not self.is_watched(path):
            return

        self.count += 1
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
        self.write_bytes(self.log, f"{kind}\t{os.path.basename(name)}\n".encode())
        if self.count == self.failing:
            raise OSError(self.error, os.strerror(self.error), *_named(kind, path))


def _named(kind, path):
    """The file's name, which the system tells for calls on paths, but not for those on numbers."""
    return [] if isinstance(path, int) or kind in ("read", "write", "fsync") else [os.fspath(path)]


def install(calls):
    """Let this process count its calls, and fail at one of them.

    Args:
        calls: The counter.
    """

    class File(io.FileIO):
        """A file whose reads and writes are counted. Buffers and text layers stand on it."""

        def write(self, data):
            calls.happens("write", self.fileno())
            return super().write(data)

        def readinto(self, buffer):
            calls.happens("read", self.fileno())
            return super().readinto(buffer)

        def readall(self):
            calls.happens("read", self.fileno())
            return super().readall()

        def read(self, size=-1):
            calls.happens("read", self.fileno())
            return super().read(size)

    real_open = builtins.open

    def open_file(
        file,
        mode="r",
        buffering=-1,
        encoding=None,
        errors=None,
        newline=None,
        closefd=True,
        opener=None,
    ):
        if not calls.is_watched(file):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)

        is_written = any(letter in mode for letter in "wax+")
        if not isinstance(file, int):
            calls.happens("open to write" if is_written else "open to read", file)

        raw = File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        if "+" in mode:
            buffered = io.BufferedRandom(raw)
        else:
            buffered = (io.BufferedWriter if is_written else io.BufferedReader)(raw)
        if "b" in mode:
            return buffered

        text = io.TextIOWrapper(buffered, encoding, errors, newline)
        text.mode = mode
        return text

    builtins.open = io.open = open_file

    def count(name, kind):
        real = getattr(os, name)

        @wraps(real)
        def counted(path, *more, **options):
            calls.happens(kind(*more) if callable(kind) else kind, path)
            return real(path, *more, **options)

        setattr(os, name, counted)

    def kind_of_open(flags=0, *more):
        return "open to write" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "open to read"

    count("open", kind_of_open)
    count("write", "write")
    count("read", "read")
    for name in ("fsync", "fdatasync"):
        count(name, "fsync")
    for name in ("rename", "replace", "link"):
        count(name, "rename")
    count("mkdir", "mkdir")
    for name in ("unlink", "remove", "rmdir"):
        count(name, "unlink")


def events_of(log):
    """Read the calls that were counted.

    Args:
        log: The file that :class:`Calls` wrote.

    Returns:
        Kind and file name of each call.
    """
    return [tuple(line.split("\t")) for line in Path(log).read_text().splitlines()]
