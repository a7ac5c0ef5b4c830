"""SIGTERM, by which a cluster takes a machine back: the loop finishes its step, writes a checkpoint and stops.

Torch is not imported here, so that the command line can name the exit code without it.
"""

import signal
import threading
from types import FrameType, TracebackType

EXIT_CODE = 128 + signal.SIGTERM
"""143, what a shell reports of a process that SIGTERM ended."""


class Preempted(SystemExit):
    """SIGTERM stopped the training, after a checkpoint from which it goes on bit for bit.

    Where nobody catches it, the process exits with 143, as if the signal had ended it.

    Args:
        message: where the training stopped.
        code: exit code; 0 for the other processes of a distributed training, of which the first one speaks for all.
    """

    def __init__(self, message: str, code: int = EXIT_CODE) -> None:
        super().__init__(message)
        self.code = code


class Sigterm:
    """Notes SIGTERM within a ``with`` block, instead of letting it end the process; afterwards all is as before.

    Schedulers may send it more than once: those after the first change nothing. Python hands signals to the main
    thread alone; in another one, the block leaves them as they are.
    """

    received = False

    def __enter__(self) -> None:
        self.received = False
        # A handler that is not Python's (None) could not be put back.
        self.previous = signal.getsignal(signal.SIGTERM)
        self.is_installed = (
            self.previous is not None and threading.current_thread() is threading.main_thread()
        )
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
