"""Processes that start in milliseconds: forks of one that has imported everything already.

A start of Python with torch takes seconds, and the chaos driver needs thousands. The parent
computes nothing, so that it has no threads that a fork would lose.
"""

import atexit
import gc
import os
import signal
import socket
import sys
import time
import traceback
from typing import NamedTuple

TIMEOUT = 180.0
"""Seconds after which a process is taken to hang."""
PEER_SECONDS = 20.0
"""Seconds that a process has after another one of its training has died, as torchrun's have."""


class Ended(NamedTuple):
    """A process that has ended.

    Args:
        code: Exit code, negative for a signal. None if it hung and was killed.
        out: What it printed.
        err: What it printed as errors.
    """

    code: int | None
    out: str
    err: str


def import_everything():
    """Import what the commands import, so that the forks need not."""
    import importlib
    import pkgutil

    import matplotlib.font_manager
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import safetensors.torch  # noqa: F401
    import sklearn.mixture  # noqa: F401
    import torch

    import equipoise

    torch.set_num_threads(1)
    matplotlib.font_manager.findfont("DejaVu Sans")
    for module in pkgutil.walk_packages(equipoise.__path__, "equipoise."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)

    # What is there now is no garbage: the collections of the forks need not copy its pages.
    gc.collect()
    gc.freeze()


def run(action, folder, processes=1, before=None):
    """Run a function in forks of this process, and wait for their end.

    Args:
        action: Function without arguments, which runs in the folder.
        folder: Working folder.
        processes: Number of processes of one training, as torchrun starts them.
        before: Function that process 0 calls before the action.

    Returns:
        How process 0 has ended.
    """
    # Pipes, because a limit on the size of files holds for files of output, too.
    out, err = os.pipe(), os.pipe()
    port = _free_port() if processes > 1 else 0
    nowhere = os.open(os.devnull, os.O_WRONLY)
    children = []
    for rank in range(processes):
        rank_0 = rank == 0
        outputs = (out[1], err[1]) if rank_0 else (nowhere,) * 2
        variables = _variables(rank, processes, port) if processes > 1 else {}
        children.append(_start(action, folder, outputs, variables, before if rank_0 else None))

    codes = _wait(children)
    os.close(nowhere)
    return Ended(codes[0], _drain(out), _drain(err))


def _drain(pipe):
    """Read what is in a pipe, and close it."""
    reading, writing = pipe
    os.close(writing)
    os.set_blocking(reading, False)
    with open(reading, "rb") as file:
        return (file.read() or b"").decode(errors="replace")


def _variables(rank, processes, port):
    """The environment that torchrun gives to a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "chaos",
    }


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _start(action, folder, outputs, variables, before):
    """Fork one process."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child

    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(outputs[0], 1)
        os.dup2(outputs[1], 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        os.environ |= variables
        if before:
            before()
        code = _finish(action)
    finally:
        os._exit(code)


def _finish(action):
    """Call a function, and end as Python does: exit functions, output flushed, an exit code."""
    code = 0
    try:
        action()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1

    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(children):
    """Wait for all processes. Those that outlive another one's failure are killed after a while."""
    codes = {}
    killed = set()
    deadline = time.monotonic() + TIMEOUT

    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child] != 0:
                    deadline = min(deadline, time.monotonic() + PEER_SECONDS)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.killpg(child, signal.SIGKILL)
                killed.add(child)
            deadline += TIMEOUT
        time.sleep(0.005)

    return [None if child in killed else codes[child] for child in children]
