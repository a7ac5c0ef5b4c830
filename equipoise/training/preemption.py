"""SIGTERM, with which a cluster takes a machine back: training writes a checkpoint and stops.

Torch is not imported here, so that the command line knows the exit code without it.
"""

import signal
import threading
from types import FrameType, TracebackType

EXIT_CODE = 128 + signal.SIGTERM
"""143, which a shell reports for a process that SIGTERM has ended."""


class Preempted(SystemExit):
    """SIGTERM has stopped the training, after a checkpoint from which it goes on bit for bit.

    If the exception is not caught, the process ends with the exit code 143, as if the signal had
    ended it.

    Args:
        message: Where the training has stopped.
        code: Exit code. It is 0 in all processes of a distributed training except the first, which
            speaks for all of them.
    """

    def __init__(self, message: str, code: int = EXIT_CODE) -> None:
        super().__init__(message)
        self.code = code


class Sigterm:
    """Takes note of SIGTERM within a ``with`` block, instead of letting it end the process.

    Some schedulers send the signal more than once. Further signals change nothing. After the block,
    the signal has its former effect. Python handles signals in the main thread only, so that the
    block does nothing in another thread.
    """

    received = False

    def __enter__(self) -> None:
        self.received = False
        self.previous = signal.getsignal(signal.SIGTERM)

        # A handler of None was not installed by Python, and Python could not restore it.
        is_main_thread = threading.current_thread() is threading.main_thread()
        self.is_installed = self.previous is not None and is_main_thread
        if self.is_installed:
            signal.signal(signal.SIGTERM, self._note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.is_installed:
            signal.signal(signal.SIGTERM, self.previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
