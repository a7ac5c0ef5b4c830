"""A part of the fuzz of every reader; the whole is ``just fuzz``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.limits import run_case

ROOT = Path(__file__).parents[2]


def fuzz(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_file_is_read_or_refused():
    """By a message of a few lines, in bounded time and memory, whatever the file holds."""
    done = fuzz("--cases", "150")
    assert done.returncode == 0, done.stdout + done.stderr


def attempt_badly(reader, seed, folder):
    """Stands for a reader with a fault of each kind."""
    faults = {
        "raises": lambda: {}["key"],
        "segfaults": lambda: os.kill(os.getpid(), 11),
        "exits": lambda: os._exit(3),
        "fills memory": lambda: bytearray(2**31),
        "says nothing": lambda: (_ for _ in ()).throw(ValueError),
        "is fine": lambda: None,
    }
    return run_case(iter([(reader, faults[reader])]), (ValueError,))


def test_every_kind_of_fault_is_found_and_the_cases_after_it_are_tried():
    names = ["raises", "segfaults", "exits", "is fine", "fills memory", "says nothing", "is fine"]
    script = (
        "from tests.fuzz.limits import try_all\n"
        "from tests.fuzz.test_fuzz import attempt_badly\n"
        f"cases = [(name, 0) for name in {names}]\n"
        "for outcome in try_all(cases, attempt_badly): print(*outcome[2:4], sep=': ')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(names)
    for line, words in zip(
        lines,
        ["KeyError", "SIGSEGV", "code 3", "read", "MemoryError", "without a message", "read"],
        strict=True,
    ):
        assert words in line
        assert line.startswith("read" if words == "read" else "fault")
