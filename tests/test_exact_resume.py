"""Resuming is the run: bit for bit, for every architecture, layout and kind of data."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import equipoise
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

    for ours, theirs in zip(resumed_rows, rows, strict=True):
        for name in theirs.keys() - {"seconds", "examples_per_second"}:
            assert ours[name] == theirs[name], name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    moments = whole.descent.optimizer.state_dict()["state"]
    resumed_moments = resumed.descent.optimizer.state_dict()["state"]
    torch.testing.assert_close(resumed_moments, moments, rtol=0, atol=0)


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize(
    ("shape", "architecture"),
    [
        ((7,), "mlp"),
        ((28, 28), "mlp"),
        ((28, 28), "conv"),
        ((3, 31, 45), "conv"),
        ((3, 28, 28), "residual"),
        ((64, 64), "conv"),
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
        {"clip": 0.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_each_option_that_keeps_a_state(tmp_path, options):
    assert_resumes(data_of((3, 16, 16)), replace(CONFIG, **options), tmp_path, stop=4)


@pytest.mark.parametrize("stop", [2, 4])
def test_networks_of_ones_own(tmp_path, stop):
    assert_resumes(data_of((3, 12, 20)), CONFIG, tmp_path, stop, own=True)
