"""The number of threads follows from the size of a step, and a run keeps it."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import equipoise
from equipoise.model import VAE
from equipoise.noise import GlobalNoise
from equipoise.training import threads as threads_module
from equipoise.training.checkpoint import load_checkpoint
from equipoise.training.setup import make_model
from equipoise.training.threads import choose_threads, computing_with, step_operations
from equipoise.training.trainer import Trainer
from tests.test_exact_resume import CONFIG, Stop, data_of


class Hear(Stop):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(0)
        self.said = []

    def message(self, text):
        self.said.append(text)


@pytest.fixture
def two_threads(monkeypatch):
    """A machine with two cores, on which nobody has set a number."""
    monkeypatch.setattr(threads_module, "_given", None)
    with computing_with(2):
        yield


@pytest.mark.parametrize(("d", "latent_dim", "batch_size"), [(5, 2, 1), (7, 3, 64)])
def test_operations_are_those_of_the_matrix_products(d, latent_dim, batch_size):
    encoder, decoder = nn.Linear(d, 2 * latent_dim), nn.Linear(latent_dim, d)
    model = VAE(encoder, decoder, GlobalNoise(), shape=(d,), latent_dim=latent_dim)
    of_example = 2 * d * 2 * latent_dim + 2 * latent_dim * d
    assert step_operations(model, batch_size) == batch_size * of_example
    assert model.training


def test_small_steps_get_one_thread_and_large_ones_all(two_threads):
    data = data_of((6,))
    model = make_model(data, CONFIG)
    operations = step_operations(model, 1)
    few, many = (round(factor * threads_module.OPERATIONS / operations) for factor in (0.5, 2))
    assert choose_threads(model, CONFIG, few)[0] == 1
    assert choose_threads(model, CONFIG, many)[0] == 2
    assert choose_threads(model, replace(CONFIG, threads=5), few) == (5, "Threads: 5.")


def test_omp_num_threads_and_a_single_core_leave_no_choice(two_threads, monkeypatch):
    model = make_model(data_of((6,)), CONFIG)
    monkeypatch.setattr(threads_module, "_given", "2")
    assert choose_threads(model, CONFIG, 1) == (2, "")
    monkeypatch.setattr(threads_module, "_given", None)
    with computing_with(1):
        assert choose_threads(model, CONFIG, 10**9) == (1, "")


def test_a_run_keeps_its_number_and_leaves_that_of_the_program(two_threads, tmp_path, monkeypatch):
    data = data_of((6,))
    monkeypatch.setattr(threads_module, "OPERATIONS", 0)
    first = Trainer(make_model(data, CONFIG), data, CONFIG, folder=tmp_path, sinks=[Stop(2)])
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert first.threads == torch.get_num_threads() == 2
    assert load_checkpoint(tmp_path).state["threads"] == 2

    monkeypatch.setattr(threads_module, "OPERATIONS", 1e18)
    hear = Hear()
    second = Trainer(make_model(data, CONFIG), data, CONFIG, folder=tmp_path, sinks=[hear])
    assert second.threads == 1
    second.fit(resume=True)
    assert second.threads == 2
    assert "Threads: 2, as before." in hear.said

    other = replace(CONFIG, threads=1)
    third = Trainer(make_model(data, other), data, other, folder=tmp_path)
    third.fit(resume=True)
    assert third.threads == 1
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_the_command_says_it_and_takes_another(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    line = [sys.executable, "-m", "equipoise", "train", "--quiet", "--out", str(tmp_path / "run")]
    line += ["--set", "width=4", "stage_1_epochs=1", "stage_2_epochs=0", "n_components=2"]
    for more, expected in (((), "Threads: 1, because"), (("--threads", "2"), "Threads: 2.")):
        done = subprocess.run(
            [*line, *more], env=environment, capture_output=True, text=True, timeout=300
        )
        if not more and (os.cpu_count() or 1) == 1:
            continue
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        line[line.index("--out") + 1] += "-2"
    assert equipoise.Run(tmp_path / "run-2").settings()["options"]["threads"] == 2
