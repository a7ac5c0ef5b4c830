"""What the command line says of a failure, and the exit code that goes with it."""

import errno
import sys

from equipoise.bugs import bug_report

FAILURE, USAGE_ERROR, BUG, INTERRUPTED = 1, 2, 70, 130
"""Exit codes."""

TO_SAVE_MEMORY = {
    "train": "lower batch_size, width or image_size, or take fewer examples",
    "evaluate": "lower -n or --importance-samples, or take fewer examples",
    "sample": "lower -n",
    "paper": "lower --jobs, or take a smaller --budget",
}
"""What to change in a command that has run out of memory."""
OF_MEMORY = (
    "DefaultCPUAllocator",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
)
"""Parts of torch's messages about memory, which have no class of their own on the CPU."""


def describe(error: Exception, command: str | None) -> tuple[str, int]:
    """Say what went wrong, in one line where equipoise itself has no more to say.

    Args:
        error: What ended the command.
        command: The name of the command; None if it was not read yet.

    Returns:
        The message and the exit code.
    """
    if _is_of_memory(error):
        # What the frames hold may be what fills the memory.
        error.__traceback__ = None
        advice = TO_SAVE_MEMORY.get(command or "", "take a smaller model or fewer examples")
        return f"out of memory; {advice}", FAILURE

    if isinstance(error, OSError):
        return _describe_os_error(error), _code_of_os_error(error)
    if isinstance(error, ArithmeticError):
        return str(error), FAILURE
    if isinstance(error, ValueError | ImportError) and str(error):
        return str(error), USAGE_ERROR
    return bug_report(error, ["equipoise", *sys.argv[1:]]), BUG


def _is_of_memory(error: Exception) -> bool:
    """Tell whether the memory of this machine or of its graphics processor was too small."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OF_MEMORY)


def _describe_os_error(error: OSError) -> str:
    """Say what the operating system refused, and for which file."""
    if error.filename:
        name = str(error.filename).replace("\n", "\\n")
        return f"{error.strerror}: {name}"
    return error.strerror or str(error) or type(error).__name__


def _code_of_os_error(error: OSError) -> int:
    """A full disk and a lost partner are failures on the way; the rest is wrong input."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FAILURE
    return FAILURE if isinstance(error, ConnectionError | TimeoutError) else USAGE_ERROR
