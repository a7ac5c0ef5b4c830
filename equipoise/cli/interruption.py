"""The user's interruption (Ctrl-C), which may come at any time and shall not get lost."""

import signal
import threading
from types import FrameType

REDELIVERY = 0.01
"""Seconds after which an interruption that Python had to ignore is sent again."""


class Interruption:
    """Takes note of SIGINT, and raises KeyboardInterrupt as Python does.

    Libraries that are interrupted while they are imported may raise any other exception in its
    place. The note tells what the cause was.
    """

    received = False
    is_watching = False

    def watch(self) -> None:
        """Take the signal from now on, unless this process was started to ignore it."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self.is_watching = True

    def ignore(self) -> None:
        """Ignore further interruptions, while the first one is answered."""
        if self.is_watching:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def let_end(self) -> None:
        """Let an interruption end the process at once and without a word: its work is done."""
        if self.is_watching:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def send_again(self) -> None:
        """Send an interruption again that came when Python could not raise it."""
        again = threading.Timer(REDELIVERY, _interrupt_main_thread)
        again.daemon = True
        again.start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        raise KeyboardInterrupt


def _interrupt_main_thread() -> None:
    """Send SIGINT to the main thread, so that it wakes up if it waits for something."""
    thread = threading.main_thread().ident
    if thread is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)
