"""Standard output and error of the process, which may be closed, full, or plain ASCII.

A closed pipe, a full disk or a terminal that went away never stops the work: what cannot be printed
is dropped, and the exit code tells of it at the end.
"""

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

CLOSED_PIPE = 128 + 13
"""141, which a shell reports for a process that SIGPIPE has ended."""
FULL = 1

IN_ASCII = {
    "±": "+-",
    "²": "^2",
    "\u00a0": " ",
    "…": "...",
    "—": "-",
    "\u2013": "-",
    "·": "*",
    "→": "->",
}
"""How characters are written where the terminal lacks them; others become escapes."""


class LastingFile(io.RawIOBase):
    """A file descriptor to which writing never fails.

    Args:
        raw: The file to write to.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self.raw = raw
        self.failure: OSError | None = None
        """Why the first part that is missing could not be written; None if all was."""

    def write(self, data: Any, /) -> int:  # noqa: ANN401 (any bytes; Python 3.11 has no Buffer)
        """Write some bytes, or drop them once writing has failed."""
        while self.failure is None:
            try:
                written = self.raw.write(data)
            except OSError as error:
                self.failure = error
                break

            if written is not None:
                return written
            # Another program has set the terminal to answer at once.
            select.select([], [self.raw.fileno()], [])

        return memoryview(data).nbytes

    def writable(self) -> bool:
        """Tell that it can be written to."""
        return True

    def fileno(self) -> int:
        """The number of the descriptor."""
        return self.raw.fileno()

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        return self.raw.isatty()


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Keep standard output and error from failing, and end the process with a code that tells.

    A command that went well ends with 141 and without a word if its output went into a closed pipe,
    and with 1 and one line if the output could not be written for another reason. Output that was
    closed from the start is not missed.

    Raises:
        SystemExit: With the exit code.
    """
    _open_descriptors()
    output = _make_last("stdout")
    _make_last("stderr")

    code: Any = 0
    try:
        yield
    except SystemExit as end:
        code = end.code

    sys.stdout.flush()
    failure = output.failure if output else None
    if failure is not None and not code:
        code = CLOSED_PIPE
        if failure.errno != errno.EPIPE:
            code = FULL
            reason = f"standard output cannot be written ({failure.strerror})"
            print(f"equipoise: {reason}; the work itself is done", file=sys.stderr)  # noqa: T201
    sys.stderr.flush()
    sys.exit(code)


def _open_descriptors() -> None:
    """Open those of the descriptors 0, 1 and 2 that are closed.

    Otherwise the next file that is opened gets the number of standard output, and what any library
    prints goes into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is this one, since those below are open.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)


def _make_last(name: str) -> LastingFile | None:
    """Replace a stream of this process by one to which writing never fails.

    Characters that its encoding lacks are written by others.
    """
    stream: TextIO | None = getattr(sys, name)
    if stream is None:
        # Python has found it closed.
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        return None

    if not isinstance(stream, io.TextIOWrapper):
        return None  # another program shows what is printed

    stream.flush()
    raw = getattr(stream.buffer, "raw", stream.buffer)
    lasting = LastingFile(cast("io.RawIOBase", raw))
    errors = stream.errors
    if errors in ("strict", "surrogateescape"):
        codecs.register_error("equipoise", _in_ascii)
        errors = "equipoise"

    text = io.TextIOWrapper(
        io.BufferedWriter(lasting),
        encoding=stream.encoding,
        errors=errors,
        line_buffering=True,
    )
    setattr(sys, name, text)
    return lasting


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write characters that an encoding lacks by characters that it has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error

    lacking = error.object[error.start : error.end]
    replaced = (
        IN_ASCII.get(character) or character.encode("ascii", "backslashreplace").decode()
        for character in lacking
    )
    return "".join(replaced), error.end
