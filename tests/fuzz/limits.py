"""Cases in processes with limits: a case that dies, hangs or takes too much memory is a fault."""

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SECONDS = 10
"""Longest time that a case may compute. It may take three times as long, on a busy machine."""
MEMORY = 2**30
"""Largest address space that a case may add to that of an idle process, bytes."""
MAX_LINES, MAX_CHARACTERS = 25, 6000
"""Longest message of a refusal."""


DATA = (ValueError, OSError, ImportError)
"""Kinds of errors that are refusals of data."""


class Outcome(NamedTuple):
    """What became of a case.

    Args:
        reader: Name of the reader.
        seed: Its seed.
        verdict: "read", "refused" or "fault".
        detail: The message of a refusal, or what is wrong.
        seconds: How long it computed.
    """

    reader: str
    seed: int
    verdict: str
    detail: str
    seconds: float = 0.0


def judge(error: BaseException, allowed: tuple[type[BaseException], ...]) -> str:
    """Say what is wrong with an error that a reader raised; nothing if it is a refusal."""
    name = type(error).__name__
    message = str(error)
    if not isinstance(error, allowed):
        last = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/equipoise/" in f.filename]
        place = own[-1] if own else last
        where = f"{Path(place.filename).name}:{place.lineno}"
        return f"{name} in {where}: {message[:200]}"

    if not message.strip():
        return f"{name} without a message"
    if "allocate memory" in message or "MemoryError" in message or "bad alloc" in message:
        return f"too much memory was asked for: {message[:300]}"
    if len(message.splitlines()) > MAX_LINES or len(message) > MAX_CHARACTERS:
        return f"a message of {len(message)} characters: {message[:200]!r}"
    return ""


def run_case(
    steps: Iterator[tuple[str, Callable[[], object]]],
    allowed: tuple[type[BaseException], ...],
) -> tuple[str, str]:
    """Take all steps of a reading, and judge each that fails.

    Args:
        steps: Names and functions. A step is tried whether or not those before it were refused.
        allowed: Kinds of errors that are refusals.

    Returns:
        Verdict and detail.
    """
    verdict, detail = "read", ""
    for name, step in steps:
        try:
            step()
        except BaseException as error:
            # What is wrong with data has other kinds of errors than what is with a run.
            problem = judge(error, DATA if name == "data" else allowed)
            if problem:
                return "fault", f"{name}: {problem}"
            if verdict == "read":
                verdict, detail = "refused", f"{name}: {type(error).__name__}: {error}"
    return verdict, detail


def _work(
    cases: Sequence[tuple[str, int]],
    attempt: Callable[[str, int, Path], tuple[str, str]],
    log: Path,
    folder: Path,
) -> None:
    """In a process of its own: try cases one after the other, and write a line about each."""
    with Path("/proc/self/statm").open() as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    with log.open("a") as lines, log.with_suffix(".trace").open("w") as trace:
        faulthandler.enable(trace)
        # Pillow's libraries write about damaged images there.
        os.dup2(trace.fileno(), 2)
        for reader, seed in cases:
            print(json.dumps([reader, seed]), file=lines, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            trace.truncate(0)
            # If Python itself cannot speak any more, the alarm ends the process.
            signal.alarm(4 * SECONDS)
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=trace)
            before = time.process_time()
            verdict, detail = attempt(reader, seed, folder)
            seconds = time.process_time() - before
            faulthandler.cancel_dump_traceback_later()
            signal.alarm(0)
            if seconds > SECONDS:
                verdict, detail = "fault", f"{seconds:.0f} s of computing; {detail}"
            print(json.dumps([verdict, detail, seconds]), file=lines, flush=True)


def try_all(
    cases: Sequence[tuple[str, int]],
    attempt: Callable[[str, int, Path], tuple[str, str]],
    *,
    batch: int = 100,
) -> Iterator[Outcome]:
    """Try cases in processes with limits, one process for a batch or until one dies.

    Args:
        cases: Reader and seed of each.
        attempt: Makes the files of a case in a folder, reads them, and returns verdict and detail.
        batch: Number of cases after which a new process begins.

    Yields:
        An outcome for each case, in order.
    """
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    log, done = work / "log", 0
    try:
        while done < len(cases):
            log.write_text("")
            sys.stdout.flush()
            child = os.fork()
            if not child:
                code = 1
                try:
                    _work(cases[done : done + batch], attempt, log, work / "case")
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            status = os.waitpid(child, 0)[1]

            lines = [json.loads(line) for line in log.read_text().splitlines()]
            for case, outcome in zip(lines[::2], lines[1::2], strict=False):
                yield Outcome(*case, *outcome)
            done += len(lines) // 2
            if status:
                if len(lines) % 2 == 0:
                    raise RuntimeError("the process of the cases died between two of them")
                yield Outcome(*lines[-1], "fault", _death(status, log.with_suffix(".trace")))
                done += 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _death(status: int, trace: Path) -> str:
    """Say how a process died, and where it was."""
    text = trace.read_text(errors="replace")
    own = [line.strip() for line in text.splitlines() if "/equipoise/" in line]
    where = f" at {own[0]}" if own else ""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGALRM:
        return f"the process died of {signal.Signals(os.WTERMSIG(status)).name}{where}"
    if "Timeout" in text or os.WIFSIGNALED(status):
        return f"longer than {3 * SECONDS} s{where}"
    last = (text.splitlines() or [""])[-1]
    return f"the process ended with the code {os.WEXITSTATUS(status)}: {last}{where}"


def rng_of(reader: str, seed: int) -> random.Random:
    """The generator of a case."""
    return random.Random(f"{reader}:{seed}")
