"""Bugs of equipoise: the traceback goes to a file, and a person reads one line."""

import datetime
import os
import traceback
from collections.abc import Sequence

VERSIONED = ("equipoise", "torch", "lightning-fabric", "numpy", "pillow", "safetensors")


def bug_report(error: BaseException, command: Sequence[str]) -> str:
    """Write the traceback of an unexpected error to a new file, and say which.

    The file is in the folder of temporary files, or in the working folder if that one cannot be
    written. It can be read by its owner only, because it holds the command. What that takes is
    imported only here, since hardly any command comes here.

    Args:
        error: What was raised.
        command: The words of the command that is running.

    Returns:
        One sentence for the user.
    """
    name = type(error).__name__
    try:
        path = _write(_content(error, command))
    except Exception:  # such as a disk that is full, or no memory: the sentence must still come
        place = _place(error)
        return f"this is a bug of equipoise: {name}{place}; no file could hold its traceback"

    return f"this is a bug of equipoise: {name}; please report it with the traceback in {path}"


def _content(error: BaseException, command: Sequence[str]) -> str:
    """Everything that a report of a bug needs."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    lines = [
        f"command    {' '.join(map(repr, command))}",
        f"date       {datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}",
        f"system     {platform.platform()}",
        f"python     {platform.python_version()}",
    ]
    for package in VERSIONED:
        try:
            lines.append(f"{package:10} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package:10} not installed")

    frames = "".join(traceback.format_exception(error))
    return "\n".join([*lines, "", frames])


def _write(content: str) -> str:
    """Write a new file, and return its absolute path."""
    import tempfile

    try:
        return _write_in(tempfile.gettempdir(), content)
    except OSError:
        return _write_in(os.getcwd(), content)


def _write_in(folder: str, content: str) -> str:
    """Write a new file in a folder, or none at all."""
    import tempfile

    descriptor, path = tempfile.mkstemp(".txt", "equipoise-bug-", folder)
    try:
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(content)
    except OSError:
        os.unlink(path)
        raise
    return path


def _place(error: BaseException) -> str:
    """The line of code that has raised an error."""
    place = error.__traceback__
    if place is None:
        return ""

    while place.tb_next is not None:
        place = place.tb_next
    return f" in {os.path.basename(place.tb_frame.f_code.co_filename)}, line {place.tb_lineno}"
