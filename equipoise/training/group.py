"""How the processes of a training find each other, and notice that one of them has ended."""

import contextlib
import functools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import ParamSpec, TypeVar

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import distributed

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long processes wait for each other, at the start and in each exchange."""
LOOPBACK = "127.0.0.1"
STARTER = "EQUIPOISE_STARTER"
"""Environment variable that tells a process the id of the one that has started it."""
GO_ON = "go on from the last checkpoint with 'equipoise train --resume RUN'"
INTERRUPTED = 130
"""Exit code of a process that the user has interrupted, as all processes of the terminal."""
GRACE, PERIOD = 3.0, 0.5
"""Seconds in which a process may find out by itself that another has ended; between two looks."""
LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "socket timeout")
"""What the messages of torch have in common if another process cannot be reached."""


class Group(DDPStrategy):
    """Fabric's processes with a gradient that is their average.

    On a single machine without GPUs, they listen on the loopback interface only, so that nobody
    else can reach them. Processes that were started by another program, such as torchrun, or that
    are on several machines, meet as they were told to.
    """

    def __init__(self) -> None:
        super().__init__(timeout=PATIENCE)

    def waits_for(self) -> str | None:
        """Say whom this process will wait for; None if all processes are its own."""
        if self.num_nodes == 1:
            return None

        return (
            f"Waiting for {self.num_nodes} machines to meet at {self._place()}, for up to "
            f"{_in_words(PATIENCE)}. This is machine {self._environment().node_rank()}."
        )

    def setup_environment(self) -> None:
        """Connect the processes."""
        processes = getattr(self.launcher, "procs", [])
        _WATCH.begin(list(processes))
        # The observer of Fabric would kill this process without a word.
        processes.clear()

        try:
            if self._is_private():
                self._meet_on_loopback()
            elif distributed.is_torchelastic_launched():
                self._meet_by_torchrun()
            super().setup_environment()
        except (distributed.DistError, OSError) as error:
            raise self._explained(error) from error

    def _environment(self) -> ClusterEnvironment:
        """What tells where the processes meet."""
        return self.cluster_environment or LightningEnvironment()

    def _place(self) -> str:
        """Where the processes meet."""
        return f"{self._environment().main_address}, port {self._environment().main_port}"

    def _is_private(self) -> bool:
        """Tell whether all processes are on this machine, and were started by this program."""
        return (
            self.num_nodes == 1
            and self.root_device.type == "cpu"
            and isinstance(self.cluster_environment, LightningEnvironment)
            and self.cluster_environment.main_address in (LOOPBACK, "localhost")
            and not distributed.is_torchelastic_launched()
        )

    def _meet_on_loopback(self) -> None:
        """Start the process group; torch itself would listen on all interfaces."""
        port = self._environment().main_port
        loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        if loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])

        descriptor = None
        if self.local_rank == 0:
            # Torch closes the descriptor itself, at the end.
            descriptor = socket.create_server((LOOPBACK, port)).detach()

        store = distributed.TCPStore(  # type: ignore[attr-defined] # documented
            LOOPBACK,
            port,
            self.num_processes,
            is_master=self.local_rank == 0,
            timeout=PATIENCE,
            master_listen_fd=descriptor,
        )
        distributed.init_process_group(
            "gloo",
            store=store,
            rank=self.local_rank,
            world_size=self.num_processes,
            timeout=PATIENCE,
        )

    def _meet_by_torchrun(self) -> None:
        """Start the process group under the name of this attempt.

        torchrun keeps one store for all of its restarts, in which processes would find the
        addresses of those that are no more, and wait for them.
        """
        meeting = distributed.rendezvous  # type: ignore[attr-defined] # documented
        store, rank, size = next(meeting("env://", timeout=PATIENCE))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own_store = distributed.PrefixStore  # type: ignore[attr-defined] # documented
        distributed.init_process_group(
            "nccl" if self.root_device.type == "cuda" else "gloo",
            store=own_store(f"attempt-{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )

    def _explained(self, error: Exception) -> OSError:
        """Say who did not come."""
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        if "timed out" not in reason.lower():
            return ConnectionError(f"the processes cannot meet at {self._place()}: {reason}")

        problem = ""
        try:
            socket.getaddrinfo(self._environment().main_address, None)
        except OSError:
            problem = "; no machine of that name can be found"
        return TimeoutError(
            f"not all {self.num_nodes * self.num_processes} processes have come to "
            f"{self._place()}, within {_in_words(PATIENCE)}{problem}: start the command on every "
            "machine, with its own NODE_RANK and the same MASTER_ADDR and MASTER_PORT"
        )


class _Watch:
    """Looks after the other processes on this machine that belong to the same training.

    If one of them fails, this process ends too, because it would wait for the other in vain.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()

    def begin(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """Look after the processes that this one has started, or after the one that started it."""
        self.ended = threading.Event()
        starter = os.environ.get(STARTER)
        if processes:
            self._start(lambda: _first_failure(processes), processes)
        elif starter and starter != str(os.getpid()):
            self._start(lambda: _loss_of_starter(int(starter)), [])

    def end(self) -> None:
        """Let the processes end as they like."""
        self.ended.set()

    def _start(
        self, look: Callable[[], str | None], processes: list[subprocess.Popen[bytes]]
    ) -> None:
        """Look now and then, in a thread."""
        arguments = (look, processes, self.ended)
        threading.Thread(target=self._run, args=arguments, daemon=True).start()

    def _run(
        self,
        look: Callable[[], str | None],
        processes: list[subprocess.Popen[bytes]],
        ended: threading.Event,
    ) -> None:
        """End this process and those that it has started, some time after one has failed."""
        while not ended.wait(PERIOD):
            loss = look()
            if loss is None or ended.wait(GRACE):
                continue

            message = f"equipoise: {loss}; {GO_ON}"
            print(message, file=sys.stderr, flush=True)  # noqa: T201 (the process ends here)
            for process in processes:
                process.kill()
            os._exit(INTERRUPTED if loss == "interrupted" else 1)


def _first_failure(processes: list[subprocess.Popen[bytes]]) -> str | None:
    """Say which of the processes that this one has started has failed."""
    for rank, process in enumerate(processes, 1):
        if process.poll():
            code = process.returncode
            if code == INTERRUPTED:
                return "interrupted"
            return f"process {rank} of {len(processes) + 1} has ended with the code {code}"
    return None


def _loss_of_starter(starter: int) -> str | None:
    """Say that the process which has started this one is no more."""
    return None if os.getppid() == starter else "the first process of the training has ended"


_WATCH = _Watch()


def noticing_losses(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function that works with other processes end with one sentence if one of them is lost.

    Args:
        function: The function.

    Returns:
        The same function, which raises ConnectionError in place of the errors of torch.
    """

    @functools.wraps(function)
    def notices(*args: P.args, **kwargs: P.kwargs) -> T:
        with _explained_losses():
            return function(*args, **kwargs)

    return notices


@contextlib.contextmanager
def _explained_losses() -> Iterator[None]:
    """Turn the errors of torch about other processes into one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not distributed.is_initialized() or not _is_loss(error):
            raise
        rank, size = distributed.get_rank(), distributed.get_world_size()
        raise ConnectionError(
            f"process {rank} of {size} has lost another one, which says why if it could; {GO_ON}"
        ) from error
    finally:
        _WATCH.end()


def _is_loss(error: RuntimeError) -> bool:
    """Tell whether an error of torch is about another process."""
    text = str(error).lower()
    return isinstance(error, distributed.DistError) or any(part in text for part in LOST)


def _in_words(duration: timedelta) -> str:
    """A duration, such as "30 minutes"."""
    seconds = round(duration.total_seconds())
    return f"{seconds // 60} minutes" if seconds >= 120 else f"{seconds} seconds"
