"""The user's interruption (Ctrl-C), which may come at any time and shall not get lost.

A terminal window that is closed (SIGHUP) is like SIGTERM: a training writes a checkpoint and stops.
"""

import signal
import threading
from types import FrameType

REDELIVERY = 0.01
"""Seconds after which an interruption that Python had to ignore is sent again."""
PATIENCE = 2.0
"""Seconds after which an interruption is sent again that has not ended the command.

Some libraries catch every exception while they are imported, that of an interruption included.
"""


class Interruption:
    """Takes note of SIGINT, and raises KeyboardInterrupt as Python does.

    Libraries that are interrupted while they are imported may raise any other exception in its
    place. The note tells what the cause was.
    """

    received = False
    is_answered = False
    is_watching = False

    def watch(self) -> None:
        """Take the signals from now on, unless this process was started to ignore them."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self.is_watching = True

        hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
        if hang_up is not None and signal.getsignal(hang_up) is signal.SIG_DFL:
            signal.signal(hang_up, lambda *_: signal.raise_signal(signal.SIGTERM))

    def ignore(self) -> None:
        """Ignore further interruptions, while the first one is answered."""
        self.is_answered = True
        if self.is_watching:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def let_end(self) -> None:
        """Let an interruption end the process at once and without a word: its work is done."""
        self.is_answered = True
        if self.is_watching:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def send_again(self, delay: float = REDELIVERY) -> None:
        """Send an interruption again, unless it is answered until then."""
        again = threading.Timer(delay, self._send)
        again.daemon = True
        again.start()

    def _send(self) -> None:
        if not self.is_answered:
            _interrupt_main_thread()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.send_again(PATIENCE)
        raise KeyboardInterrupt


def _interrupt_main_thread() -> None:
    """Send SIGINT to the main thread, so that it wakes up if it waits for something."""
    thread = threading.main_thread().ident
    if thread is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)
