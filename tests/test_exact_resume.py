"""Resuming is the run: bit for bit, for every architecture, layout and kind of data."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import equipoise
from equipoise.files import StoreError
from equipoise.training import trainer as trainer_module
from equipoise.training.checkpoint import load_checkpoint
from equipoise.training.descent import Descent
from equipoise.training.preemption import Preempted
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

CONFIG = equipoise.TrainConfig(
    latent_dim=3,
    width=4,
    stage_1_epochs=2,
    stage_2_epochs=2,
    batch_size=16,
    learning_rate=5e-3,
    tolerance=0.0,
    accelerator="cpu",
)


def data_of(shape, n=60):
    """Examples with structure, so that gradients are not noise alone."""
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((n, 3)) @ rng.standard_normal((3, int(np.prod(shape))))
    if len(shape) == 1:
        return equipoise.load_data(factors + 0.1 * rng.standard_normal(factors.shape))
    pixels = np.clip(128 + 30 * factors, 0, 255).astype(np.uint8)
    return equipoise.load_data(pixels.reshape(n, *shape))


class Stop:
    """Ends a training after an epoch, as a kill does: the checkpoint of the one before it stays."""

    def __init__(self, epoch):
        self.epoch_to_stop = epoch

    def start(self, total_steps, done_steps, history): ...
    def step(self, done_steps, total_steps, label, figures): ...
    def message(self, text): ...
    def close(self): ...

    def epoch(self, row):
        if row["epoch"] == self.epoch_to_stop:
            raise KeyboardInterrupt


class OwnEncoder(nn.Module):
    """A network of a user's own, with its weights channels last and an odd kernel."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Conv2d(channels, 4, (3, 5), padding=(1, 2))
        self.body.to(memory_format=torch.channels_last)
        self.output = nn.LazyLinear(6)

    def forward(self, x):
        return self.output(self.body(x).flatten(1))


def trainer_of(data, config, *, own=False, **options):
    torch.manual_seed(config.seed)
    if not own:
        return Trainer(make_model(data, config), data, config, **options)
    encoder = OwnEncoder(data.shape[0])
    encoder(torch.zeros(2, *data.shape))
    decoder = nn.Sequential(nn.Linear(3, int(np.prod(data.shape))), nn.Unflatten(1, data.shape))
    return Trainer(make_model(data, config, encoder, decoder), data, config, **options)


def assert_resumes(data, config, folder, stop, **options):
    whole = trainer_of(data, config, **options)
    rows = whole.fit()

    with pytest.raises(KeyboardInterrupt):
        trainer_of(data, config, folder=folder, sinks=[Stop(stop)], **options).fit()
    resumed = trainer_of(data, config, folder=folder, **options)
    resumed_rows = resumed.fit(resume=True)

    assert_same(resumed, resumed_rows, whole, rows)


def assert_same(resumed, resumed_rows, whole, rows):
    for ours, theirs in zip(resumed_rows, rows, strict=True):
        for name in theirs.keys() - {"seconds", "examples_per_second"}:
            assert ours[name] == theirs[name], name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    moments = whole.descent.optimizer.state_dict()["state"]
    resumed_moments = resumed.descent.optimizer.state_dict()["state"]
    torch.testing.assert_close(resumed_moments, moments, rtol=0, atol=0)


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    ("shape", "architecture"),
    [
        ((7,), "mlp"),
        ((28, 28), "mlp"),
        ((28, 28), "conv"),
        ((3, 31, 45), "conv"),
        ((3, 28, 28), "residual"),
        ((64, 64), "conv"),
        ((1, 8, 8), "conv"),
        ((3, 8, 8), "residual"),
        ((4, 31, 45), "mlp"),
    ],
)
def test_each_shape_and_architecture(tmp_path, shape, architecture, stop):
    """A stop before the checkpoint of epoch 2 (stage 1) and of epoch 4 (stage 2)."""
    config = replace(CONFIG, architecture=architecture)
    assert_resumes(data_of(shape), config, tmp_path, stop)


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.9},
        {"precision": "bf16-mixed"},
        {"weight_decay": 0.01, "noise": "channel"},
        {"noise": "dimension", "noise_update": "gradient"},
        {"stage_2_gradients": "joint", "recalibrate": "dimension"},
        {"stage_2_gradients": "frozen", "weight_decay": 0.1, "ema_decay": 0.9},
        {"stage_2_network": "head", "ema_decay": 0.9, "recalibrate": "monotone"},
        {"stage_2_network": "head", "stage_2_gradients": "frozen"},
        {"clip": 0.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_each_option_that_keeps_a_state(tmp_path, options):
    assert_resumes(data_of((3, 16, 16)), replace(CONFIG, **options), tmp_path, stop=4)


@pytest.mark.parametrize("stop", [2, 4])
def test_networks_of_ones_own(tmp_path, stop):
    assert_resumes(data_of((3, 12, 20)), CONFIG, tmp_path, stop, own=True)


@pytest.mark.parametrize(
    "gradients", ["stop", "frozen", pytest.param("joint", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("shape", "architecture"), [((7,), "mlp"), ((3, 31, 45), "conv"), ((28, 28), "residual")]
)
def test_heads(tmp_path, shape, architecture, gradients):
    """A stop before the checkpoint of epoch 4, in stage 2."""
    head = {"stage_2_network": "head", "stage_2_gradients": gradients}
    assert_resumes(data_of(shape), replace(CONFIG, architecture=architecture, **head), tmp_path, 4)


class StopWithin(Stop):
    """Sends SIGTERM to its own process at a step within an epoch, as a cluster does."""

    def __init__(self, step):
        self.step_to_stop = step

    def epoch(self, row): ...

    def step(self, done_steps, total_steps, label, figures):
        if done_steps == self.step_to_stop:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [2, pytest.param(6, marks=pytest.mark.slow), 10])
@pytest.mark.parametrize("shape", [(7,), (28, 28), (3, 31, 45)])
def test_a_stop_within_an_epoch(tmp_path, monkeypatch, shape, step):
    """Of three steps an epoch: in the first, in the last of stage 1's, in stage 2."""
    monkeypatch.setattr(trainer_module, "DISPLAY_SECONDS", -1.0)
    data = data_of(shape)
    whole = trainer_of(data, CONFIG)
    rows = whole.fit()

    stopped = trainer_of(data, CONFIG, folder=tmp_path, sinks=[StopWithin(step)])
    with pytest.raises(Preempted):
        stopped.fit()
    assert stopped.position.step < whole.position.step
    resumed = trainer_of(data, CONFIG, folder=tmp_path)
    assert_same(resumed, resumed.fit(resume=True), whole, rows)


def test_moments_in_another_layout_are_refused(tmp_path, monkeypatch):
    """The fault that this guard is for: moments that come back in the order of the file."""
    data = data_of((28, 28))
    with pytest.raises(KeyboardInterrupt):
        trainer_of(data, CONFIG, folder=tmp_path, sinks=[Stop(2)]).fit()
    monkeypatch.setattr(Descent, "_lay_out_moments", lambda self: None)
    with pytest.raises(StoreError, match="memory layout are not as they were written"):
        trainer_of(data, CONFIG, folder=tmp_path).fit(resume=True)


@pytest.mark.parametrize("part", ["model", "descent", "optimal_var", "generator"])
def test_a_state_that_came_back_otherwise_is_refused(tmp_path, monkeypatch, part):
    data = data_of((7,))
    with pytest.raises(KeyboardInterrupt):
        trainer_of(data, CONFIG, folder=tmp_path, sinks=[Stop(4)]).fit()

    def altered(folder):
        checkpoint = load_checkpoint(folder)
        node = checkpoint.state
        path = {"descent": ["descent", "optimizer", "state", 0, "exp_avg"], "model": ["model"]}
        keys = path.get(part, [part])
        for key in keys[:-1]:
            node = node[key]
        if part == "model":
            node, keys = node["model"], [next(iter(node["model"]))]
        node[keys[-1]] = node[keys[-1]].clone()
        node[keys[-1]].view(-1)[0] += 1
        return checkpoint

    monkeypatch.setattr(trainer_module, "load_checkpoint", altered)
    with pytest.raises(StoreError, match="not as they were written"):
        trainer_of(data, CONFIG, folder=tmp_path).fit(resume=True)


TWO_PROCESSES = """
import sys
import numpy as np
import equipoise
from equipoise.config import make_config
out, mode, shape = sys.argv[1], sys.argv[2], tuple(map(int, sys.argv[3].split("x")))
rng = np.random.default_rng(0)
data = equipoise.load_data(rng.integers(0, 256, (60, *shape)).astype(np.uint8))
config = make_config(dict(
    latent_dim=3, width=4, stage_1_epochs=2, stage_2_epochs=2, batch_size=16, tolerance=0.0,
    n_components=1, accelerator="cpu", devices=2,
))

class Stop:
    def start(self, total_steps, done_steps, history): ...
    def step(self, done_steps, total_steps, label, figures): ...
    def message(self, text): ...
    def close(self): ...
    def epoch(self, row):
        if mode == "stop" and row["epoch"] == 4:
            raise RuntimeError("stopped here")

equipoise.train(data, config, out, resume=mode == "resume", sinks=[Stop()])
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["28x28", "3x31x45"])
def test_two_processes(tmp_path, shape):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)

    def run(folder, mode):
        call = [sys.executable, str(script), str(tmp_path / folder), mode, shape]
        return subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)

    assert run("whole", "new").returncode == 0
    assert run("stopped", "stop").returncode != 0
    done = run("stopped", "resume")
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "aggregate.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "stopped" / name
        ).read_bytes()
