"""A part of the fuzz of every reader; the whole is ``just fuzz``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.readers import OWN_READERS, READERS

# Those that draw maps, train or parse many options take most of the time.
SLOW = ("config", "run-tensors", "checkpoint", "options")
GROUPS = {
    "own files": ([name for name in OWN_READERS if name not in SLOW], 330),
    "slow ones": (SLOW, 32),
    "data": ([name for name in READERS if name not in OWN_READERS], 150),
}


@pytest.mark.parametrize("group", GROUPS)
def test_every_file_is_read_or_refused(group):
    """By a message of a few lines, in bounded time and memory, whatever the file holds."""
    names, cases = GROUPS[group]
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(cases), "--readers", *names]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
