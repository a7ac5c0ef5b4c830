"""Jobs survive kills, failing calls and full disks: some points here, all with ``just chaos``."""

import subprocess
import sys

import pytest

from tests.chaos.jobs import KILLED


def chaos(*arguments):
    command = [sys.executable, "-m", "tests.chaos", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_some_points_of_some_jobs_survive():
    done = chaos("--jobs", "train", "sample", "estimator-save", "--sample", "1", "--total", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 survived" in done.stdout


@pytest.mark.slow
def test_a_training_survives_a_kill_while_its_first_file_is_written():
    """Three such kills once left a folder that could neither resume nor start again."""
    points = map(str, range(8, 11))
    done = chaos("--jobs", "train", "--faults", "before", "--points", *points)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 survived" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("job", KILLED)
def test_more_points_of_every_job_survive(job):
    done = chaos("--jobs", job, "--sample", "6", "--offset", "3")
    assert done.returncode == 0, done.stdout + done.stderr
