"""The command line: parses, calls, prints, and decides nothing.

Each command is a file of its own. Hardly anything is imported at the top, so that an interruption
during the imports is answered like any other.
"""

import os
import shlex
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from equipoise.bugs import bug_report
from equipoise.cli.failures import INTERRUPTED, describe
from equipoise.cli.interruption import Interruption
from equipoise.cli.streams import lasting_streams
from equipoise.text import visible
from equipoise.training.preemption import EXIT_CODE as PREEMPTED
from equipoise.training.preemption import Preempted

if TYPE_CHECKING:
    from threading import ExceptHookArgs
    from typing import TextIO

INTERRUPTION = Interruption()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    The exit code is

    - 0 if all went well,
    - 1 for a failure on the way, such as a full disk, too little memory or a lost partner process,
    - 2 for wrong input,
    - 70 for a bug of equipoise, whose traceback is in a file that the message names,
    - 130 if the user interrupted the command,
    - 141 if all went well, but the output went into a pipe that was closed,
    - 143 if SIGTERM stopped a training.

    Output that cannot be printed never stops the work; see :mod:`equipoise.cli.streams`.

    Args:
        arguments: Arguments without the program's name. None takes those of the process, whose
            streams and signals are then cared for, too.
    """
    if arguments is not None:
        _run(arguments)
        return

    # Torch's own log writes traces of its C++ code beside the exceptions, which say the same.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    # Threads that wait sleep. Otherwise they take the cores from those that they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # What Pillow would say of damaged files does not name them. The notes on the data do.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.showwarning = _show_warning
    INTERRUPTION.watch()
    sys.unraisablehook = _note_unraisable
    threading.excepthook = _note_in_thread
    with lasting_streams():
        try:
            _run(None)
        finally:
            INTERRUPTION.let_end()


def _run(arguments: Sequence[str] | None) -> None:
    """Run a command, and end with one message and its code if it fails."""
    name, after_interruption = None, "nothing was done"
    try:
        try:
            from equipoise.cli.parser import COMMANDS, make_parser, refuse_empty

            parser = make_parser()
            options = parser.parse_args(arguments)
            name = options.command
            if name is None:
                parser.print_help()
                return

            refuse_empty(options)
            command = COMMANDS[name]
            after_interruption = command.after_interruption
            folder = getattr(options, "resume", None)
            if folder in (None, "auto"):
                folder = getattr(options, "out", None)
            if folder and name == "train":
                after_interruption = after_interruption.replace("RUN", shlex.quote(folder))
            command.run(options)
        except Preempted as error:
            # Of several processes, only the first has this code. The others end without a message.
            if error.code == PREEMPTED:
                _fail(f"{error}; {after_interruption}", PREEMPTED)
        except Exception as error:
            if INTERRUPTION.received:
                raise KeyboardInterrupt from error
            message, code = describe(error, name)
            if getattr(error, "is_told", False):
                sys.exit(code)  # the first process of the training has told it
            _fail(message, code)
    except KeyboardInterrupt:
        INTERRUPTION.ignore()
        # The terminal interrupts all processes of a training at once: the first speaks for all.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(INTERRUPTED)
        _fail(f"interrupted; {after_interruption}", INTERRUPTED)


def _fail(message: str, code: int) -> None:
    """Print an error message, and end the process."""
    print(f"equipoise: {visible(message)}", file=sys.stderr)  # noqa: T201 (the terminal)
    sys.exit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: "TextIO | None" = None,
    line: str | None = None,
) -> None:
    """Print a warning for users as one line, and others with their place in the code."""
    text = f"Warning: {visible(str(message))}\n"
    if category is not UserWarning:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def _note_unraisable(event: "sys.UnraisableHookArgs") -> None:
    """Answer an exception that Python cannot raise, such as one in the removal of an object."""
    if isinstance(event.exc_value, KeyboardInterrupt):
        INTERRUPTION.send_again()
    elif event.exc_value is not None:
        _note_bug(event.exc_value)


def _note_in_thread(event: "ExceptHookArgs") -> None:
    """Answer an exception that has ended a thread."""
    if event.exc_value is not None:
        _note_bug(event.exc_value)


def _note_bug(error: BaseException) -> None:
    """Print where the traceback of an exception is that ends nothing but itself."""
    message = bug_report(error, ["equipoise", *sys.argv[1:]])
    print(f"equipoise: {visible(message)}", file=sys.stderr)  # noqa: T201 (the terminal)
