"""The loop, the stages it obeys, and what a kill leaves behind."""

import errno
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from equipoise.config import ConfigError, TrainConfig
from equipoise.data import load
from equipoise.digital import DigitalGaussian
from equipoise.estimate import Estimate
from equipoise.files import StoreError, write_json
from equipoise.metrics.calibration import NOMINAL_COVERAGE, varying_dimensions
from equipoise.model import VAE
from equipoise.noise import DimensionNoise, FixedNoise, GlobalNoise, PredictedNoise
from equipoise.objectives import Elbo
from equipoise.residuals import ResidualVariance
from equipoise.run import Run, read_rows
from equipoise.training import job as run_module
from equipoise.training import trainer as trainer_module
from equipoise.training.checkpoint import load_checkpoint
from equipoise.training.diagnostics import range_warning, warnings_for
from equipoise.training.figures import NotFiniteError, SplitFigures
from equipoise.training.job import _recorded_batch_size, train
from equipoise.training.logging import JsonlSink
from equipoise.training.preemption import Preempted
from equipoise.training.setup import (
    check_fit,
    choose_stage_two,
    make_model,
    parameter_groups,
)
from equipoise.training.trainer import Trainer
from tests.oracles import Ppca, epoch_row, linear_gaussian_data

QUICK = TrainConfig(
    latent_dim=4,
    width=4,
    batch_size=128,
    stage_1_epochs=3,
    stage_2_epochs=2,
    n_components=2,
    tolerance=0.0,
    accelerator="cpu",
)


class Recorder:
    """A sink that keeps what it is told, and may interrupt the run as a kill or a cluster would."""

    def __init__(self, stop_after=None, at_step=None):
        self.rows, self.messages, self.stop_after, self.at_step = [], [], stop_after, at_step or {}

    def start(self, total_steps, done_steps, history):
        self.total_steps = total_steps

    def step(self, done_steps, total_steps, label, figures):
        self.at_step.get(done_steps, lambda: None)()

    def epoch(self, row):
        self.rows.append(row)
        if self.stop_after is not None and row["epoch"] > self.stop_after:
            raise KeyboardInterrupt

    def message(self, text):
        self.messages.append(text)

    def close(self):
        pass


def fit(data, config, **kwargs):
    torch.manual_seed(config.seed)
    model = make_model(data, config)
    trainer = Trainer(model, data, config, **kwargs)
    trainer.fit()
    return model.eval(), trainer


@pytest.fixture(scope="module")
def whole(digits):
    """Fits that nothing interrupts, and where they end. Each is made once, and is only read."""

    @functools.cache
    def fit_once(config):
        model, trainer = fit(digits, config)
        return model, standing(trainer)

    return fit_once


PAPERS_STAGE_2 = {
    "floor": 1.0,
    "stage_2_network": "decoder",
    "stage_2_gradients": "stop",
    "stage_2_likelihood": "density",
    "recalibrate": "none",
}
"""What stage 2 is for images that are not digital."""


def test_both_stages_run_and_are_recorded(digits):
    recorder = Recorder()
    model, trainer = fit(digits, replace(QUICK, **PAPERS_STAGE_2), sinks=[recorder])
    assert isinstance(model.noise, PredictedNoise)
    assert [row["stage"] for row in recorder.rows] == [1, 1, 1, 2, 2]
    assert recorder.total_steps == 5 * math.ceil(len(digits.train) / 128)
    assert recorder.rows[2]["optimal_noise_var"] == pytest.approx(float(trainer.optimal_var))
    assert {"test_elbo", "test_mse"} <= recorder.rows[2].keys() & recorder.rows[4].keys()
    for row in recorder.rows:
        assert row["train_elbo"] == pytest.approx(row["train_log_likelihood"] - row["train_kl"])
    # The paper's floor: no predicted variance lies below the optimum of stage 1.
    log_var = model.noise(torch.randn(100, 4))
    assert log_var.exp().min() >= 0.999 * float(trainer.optimal_var)


def test_training_improves_the_bound_and_the_floor_is_the_exact_closed_form(digits):
    config = replace(QUICK, stage_1_epochs=15, stage_2_epochs=0, width=8)
    model, trainer = fit(digits, config)
    history = trainer.history
    assert history[-1]["validation_elbo"] > history[0]["validation_elbo"] + 20
    # Recompute eq. (10) independently, in NumPy float64, over several draws of z.
    raw = torch.from_numpy(digits.train[:])
    x = model.scaling(raw)
    errors = []
    with torch.no_grad():
        for seed in range(5):
            z = model.encode(x).sample(torch.Generator().manual_seed(seed))
            errors.append(np.square((x - model.decode_mean(z)).numpy().astype(np.float64)).mean())
    assert float(trainer.optimal_var) == pytest.approx(np.mean(errors), rel=0.02)
    assert model.noise(torch.zeros(1, 4)).exp().item() == pytest.approx(
        float(trainer.optimal_var), rel=1e-5
    )


def test_same_seed_same_model(digits, whole):
    models = [whole(QUICK)[0], fit(digits, QUICK)[0]]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name


@pytest.mark.parametrize("killed_after", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "extra", [{}, {"ema_decay": 0.9, "stage_2_gradients": "joint"}], ids=["plain", "average"]
)
def test_a_killed_run_resumes_bit_for_bit(digits, whole, tmp_path, killed_after, extra):
    """Kills fall within stage 1, at the switch, and within stage 2."""
    config = replace(QUICK, **extra)
    torch.manual_seed(0)
    folder = tmp_path / "checkpoints"
    with pytest.raises(KeyboardInterrupt):
        Trainer(
            make_model(digits, config),
            digits,
            config,
            folder=folder,
            sinks=[Recorder(stop_after=killed_after)],
        ).fit()
    torch.manual_seed(123)  # the resumed process need not have the same weights to start with
    resumed = make_model(digits, config)
    trainer = Trainer(resumed, digits, config, folder=folder)
    trainer.fit(resume=True)
    assert [row["epoch"] for row in trainer.history] == [1, 2, 3, 4, 5]
    for name, tensor in whole(config)[0].state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.fixture
def every_step(monkeypatch):
    """Sinks are told of every step, and not about once a second."""
    monkeypatch.setattr(trainer_module, "DISPLAY_SECONDS", -1.0)


def sigterm():
    """Twice, as from schedulers that signal a process and then its group."""
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    raise KeyboardInterrupt


def without_times(rows):
    times = ("seconds", "examples_per_second")
    return [{name: value for name, value in row.items() if name not in times} for row in rows]


def standing(trainer):
    """Where a trainer ended: tensors, and plain values."""
    optimizer = trainer.descent.optimizer.state_dict()
    tensors = {
        "model": trainer.model.state_dict(),
        "optimizer": optimizer["state"],
        "clipping": trainer.descent.clipping.state_dict(),
        "generators": [trainer.generator.get_state(), torch.get_rng_state()],
    }
    values = [
        optimizer["param_groups"],
        trainer.descent.scheduler.state_dict(),
        trainer.schedule.state_dict(),
    ]
    return tensors, values, trainer.position, without_times(trainer.history)


def assert_same_standing(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    assert ours[1:] == theirs[1:]


def assert_same_files(ours, theirs):
    for name in ("model_file", "mixture_file"):
        assert getattr(ours, name).read_bytes() == getattr(theirs, name).read_bytes()


def resume(data, config, folder, recorder=None):
    torch.manual_seed(123)  # the resumed process need not have the same weights to start with
    trainer = Trainer(
        make_model(data, config), data, config, folder=folder, sinks=[recorder or Recorder()]
    )
    trainer.fit(resume=True)
    return trainer


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"ema_decay": 0.9, "noise": "dimension", "stage_2_gradients": "stop"},
    ],
    ids=["plain", "average"],
)
def test_a_preempted_run_stops_at_a_step_and_resumes_bit_for_bit(
    digits, whole, tmp_path, every_step, extra
):
    """SIGTERM comes in both stages, in the last step of each, and in validations."""
    config = replace(QUICK, **extra)
    for signalled, stopped, epoch, batch in (
        (1, 2, 0, 2),
        (16, 17, 1, 5),
        (24, 24, 2, 0),  # as the epoch ends
        (35, 36, 2, 12),  # in the last step of stage 1
        (36, 36, 3, 0),  # as the epoch ends at which the stage switches
        (40, 41, 3, 5),
        (59, 60, 4, 12),
    ):
        folder, before = tmp_path / str(signalled), signal.getsignal(signal.SIGTERM)
        with pytest.raises(
            Preempted, match=rf"stopped by SIGTERM after step {stopped}, .*step-0+{stopped}\."
        ) as caught:
            fit(digits, config, folder=folder, sinks=[Recorder(at_step={signalled: sigterm})])
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is before
        position = load_checkpoint(folder).state["position"]
        assert (position[0], position[1], position[3]) == (epoch, stopped, batch)
        assert_same_standing(standing(resume(digits, config, folder)), whole(config)[1])


def test_sigterm_in_the_last_validation_stops_before_the_mixture_is_fitted(
    digits, tmp_path, every_step
):
    with pytest.raises(Preempted, match="after step 60"):
        train(digits, QUICK, tmp_path / "run", sinks=[Recorder(at_step={60: sigterm})])
    assert not (tmp_path / "run" / "aggregate.safetensors").exists()
    run = train(digits, QUICK, tmp_path / "run", resume=True)
    whole = train(digits, QUICK, tmp_path / "whole")
    assert_same_files(run, whole)


@pytest.mark.parametrize("where", ["thread", "no folder"])
def test_sigterm_is_left_alone_where_it_cannot_be_taken(digits, tmp_path, every_step, where):
    before, seen = signal.getsignal(signal.SIGTERM), []
    recorder = Recorder(at_step={1: lambda: seen.append(signal.getsignal(signal.SIGTERM))})
    config = replace(QUICK, stage_1_epochs=1, stage_2_epochs=0)
    if where == "thread":
        thread = threading.Thread(
            target=fit, args=(digits, config), kwargs={"folder": tmp_path, "sinks": [recorder]}
        )
        thread.start()
        thread.join()
    else:
        fit(digits, config, sinks=[recorder])
    assert seen == [before]
    assert len(recorder.rows) == 1


@pytest.mark.parametrize("is_torn", [False, True])
def test_checkpoints_within_an_epoch_save_all_steps_but_the_last_from_a_kill(
    digits, whole, tmp_path, every_step, is_torn
):
    config = replace(QUICK, checkpoint_seconds=1e-9)
    with pytest.raises(KeyboardInterrupt):
        fit(digits, config, folder=tmp_path, sinks=[Recorder(at_step={40: interrupt})])
    if is_torn:
        newest = max(tmp_path.glob("step-*"))
        newest.write_bytes(newest.read_bytes()[:-100])
    recorder = Recorder()
    resumed = standing(resume(digits, config, tmp_path, recorder))
    told = "\n".join(recorder.messages)
    assert f"after 3 epochs and {2 if is_torn else 3} of 12 batches" in told
    assert ("Passed over a damaged checkpoint" in told) == is_torn
    assert_same_standing(resumed, whole(QUICK)[1])


@pytest.mark.parametrize("trouble", ["full disk", "not finite"])
def test_sigterm_in_trouble_keeps_the_checkpoint_before(
    digits, whole, tmp_path, every_step, monkeypatch, trouble
):
    torch.manual_seed(0)
    model = make_model(digits, QUICK)

    def full_disk():
        monkeypatch.setattr(
            "os.fsync", lambda _fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
        )
        sigterm()

    @torch.no_grad()
    def not_finite():
        model.decoder.output.bias.fill_(math.nan)
        monkeypatch.setattr(
            trainer_module, "DISPLAY_SECONDS", math.inf
        )  # only the checkpoint makes it look
        sigterm()

    at_step = {16: full_disk if trouble == "full disk" else not_finite}
    trainer = Trainer(model, digits, QUICK, folder=tmp_path, sinks=[Recorder(at_step=at_step)])
    with pytest.raises((OSError, NotFiniteError), match=r"no space left|at step 16"):
        trainer.fit()
    monkeypatch.undo()
    assert [file.stem for file in tmp_path.glob("[!.]*")] == ["step-000000012"]
    assert_same_standing(standing(resume(digits, QUICK, tmp_path)), whole(QUICK)[1])


def test_resuming_within_an_epoch_goes_on_with_the_dropout_of_own_networks(
    table, tmp_path, every_step
):
    data, config = load(table), replace(QUICK, latent_dim=2)

    def model():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 4))
        return make_model(data, config, encoder, nn.Linear(2, 6))

    trainer = Trainer(model(), data, config)
    trainer.fit()
    whole, steps = standing(trainer), len(trainer.training)
    for signalled in (
        1,
        3 * steps - 1,
        3 * steps + 1,
    ):  # stops in stage 1, in the last step before the switch, stage 2
        folder = tmp_path / str(signalled)
        with pytest.raises(Preempted):
            Trainer(
                model(), data, config, folder=folder, sinks=[Recorder(at_step={signalled: sigterm})]
            ).fit()
        resumed = Trainer(model(), data, config, folder=folder)
        torch.rand(7)
        resumed.fit(resume=True)
        assert_same_standing(standing(resumed), whole)


def test_resuming_restores_the_random_states_of_own_networks(table, tmp_path):
    """Dropout and the weights of the variance network draw from the global generator."""
    data, config = load(table), replace(QUICK, latent_dim=2)

    def model():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 4))
        return make_model(data, config, encoder, nn.Linear(2, 6))

    whole = model()
    Trainer(whole, data, config).fit()
    with pytest.raises(KeyboardInterrupt):
        Trainer(model(), data, config, folder=tmp_path, sinks=[Recorder(stop_after=2)]).fit()
    resumed = model()
    torch.rand(7)
    Trainer(resumed, data, config, folder=tmp_path).fit(resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_run_stopped_within_its_first_epoch_starts_anew(digits, tmp_path):
    torch.manual_seed(0)
    recorder = Recorder()
    trainer = Trainer(make_model(digits, QUICK), digits, QUICK, folder=tmp_path, sinks=[recorder])
    assert len(trainer.fit(resume=True)) == 5
    assert "starting anew" in recorder.messages[0]


def test_resuming_with_other_data_or_options_is_refused(digits, tmp_path):
    folder = tmp_path / "checkpoints"
    fit(digits, QUICK, folder=folder)
    other = replace(QUICK, batch_size=64, learning_rate=1e-4)
    with pytest.raises(StoreError, match="batch_size, learning_rate"):
        Trainer(make_model(digits, other), digits, other, folder=folder).fit(resume=True)
    shuffled = load(digits.train[:][::-1].copy())
    with pytest.raises(StoreError, match="other data"):
        Trainer(make_model(shuffled, QUICK), shuffled, QUICK, folder=folder).fit(resume=True)
    with pytest.raises(StoreError, match="no folder"):
        Trainer(make_model(digits, QUICK), digits, QUICK).fit(resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(digits, tmp_path):
    config = replace(QUICK, stage_2_epochs=0)
    model = make_model(digits, config)

    class Poison(Recorder):
        def epoch(self, row):
            if row["epoch"] == 1:
                with torch.no_grad():
                    model.decoder.output.bias.fill_(math.nan)

    trainer = Trainer(model, digits, config, folder=tmp_path, sinks=[Poison()])
    steps = len(trainer.training)
    with pytest.raises(NotFiniteError, match=rf"stage 1 at step {steps};.*log-variance.*\[-?\d"):
        trainer.fit()
    state = load_checkpoint(tmp_path).state
    assert state["position"][0] == 1


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"noise": "fixed", "noise_var": 0.5}, FixedNoise),
        ({"noise": "global", "noise_update": "gradient"}, GlobalNoise),
        ({"noise": "dimension"}, DimensionNoise),
        ({"noise": "channel"}, DimensionNoise),
    ],
)
def test_every_noise_model_trains(digits, options, kind):
    model, trainer = fit(digits, replace(QUICK, stage_2_epochs=0, **options))
    assert isinstance(model.noise, kind)
    assert math.isfinite(trainer.history[-1]["validation_elbo"])
    if options["noise"] == "fixed":
        assert trainer.history[-1]["validation_noise_var"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"noise": "dimension", "recalibrate": "dimension"},
        {"floor": "quantisation", "recalibrate": "scale"},
        {"stage_2_gradients": "joint", "floor": 0.01},
        {"precision": "bf16-mixed"},
        {"clip": 2.0, "weight_decay": 1e-3},
        {"architecture": "residual"},
        {"architecture": "mlp"},
        {"stage_2_network": "head", "recalibrate": "monotone"},
        {"stage_2_network": "head", "stage_2_gradients": "joint", "architecture": "mlp"},
        {"stage_2_network": "head", "precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_options_of_the_loop(digits, options):
    model, trainer = fit(digits, replace(QUICK, **options))
    assert math.isfinite(trainer.history[-1]["validation_elbo"])
    assert torch.isfinite(model.reconstruct(torch.rand(2, 1, 8, 8)).std).all()


@pytest.mark.parametrize("architecture", ["mlp", "conv", "residual"])
@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.1, "stage_2_network": "head"}, {"ema_decay": 0.7, "clip": 0.0}],
    ids=str,
)
def test_a_frozen_mean_is_the_same_to_the_bit(digits, architecture, options):
    """Neither decay nor averages of weights move what stands still, over several epochs."""
    config = replace(QUICK, architecture=architecture, stage_2_gradients="frozen", **options)
    config = replace(config, stage_2_likelihood="density")
    x = torch.rand(50, 1, 8, 8)
    model, _ = fit(digits, replace(config, stage_2_epochs=0))
    with torch.no_grad():
        before = model.reconstruct(x)
    weights = {name: value.clone() for name, value in model.encoder.state_dict().items()}

    config = replace(config, stage_1_epochs=0, stage_2_epochs=3)
    trainer = Trainer(model.train(), digits, config)
    trainer.fit()
    with torch.no_grad():
        after = model.eval().reconstruct(x)
    assert torch.equal(after.mean, before.mean)
    assert all(torch.equal(value, weights[n]) for n, value in model.encoder.state_dict().items())
    assert after.std.std() > 0  # the variance has learned all the same
    elbos = [row["validation_elbo"] for row in trainer.history]
    assert elbos[-1] > elbos[0]
    assert all(parameter.requires_grad for parameter in model.parameters())  # to train on


def test_networks_that_are_frozen_compute_as_in_evaluation(digits):
    """Dropout is off, the statistics of batches stay, and what a user has frozen stays frozen."""

    def networks():
        encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8)
        )
        decoder = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Unflatten(1, (1, 8, 8)))
        encoder[1].requires_grad_(False)
        return encoder, decoder

    torch.manual_seed(0)
    config = replace(QUICK, stage_2_gradients="frozen", weight_decay=0.1)
    model = make_model(digits, config, *networks())
    stage_1 = replace(config, stage_2_epochs=0)
    Trainer(model, digits, stage_1).fit()
    x = torch.rand(20, 1, 8, 8)
    with torch.no_grad():
        before = model.eval().reconstruct(x).mean

    trainer = Trainer(model.train(), digits, replace(config, stage_1_epochs=0))
    trainer.fit()
    with torch.no_grad():
        assert torch.equal(model.eval().reconstruct(x).mean, before)
    assert [p.requires_grad for p in model.encoder[1].parameters()] == [False, False]
    assert all(p.requires_grad for p in model.decoder.parameters())


def test_a_variance_of_levels_costs_fewer_bits_and_leaves_the_mean(digits):
    """Its floor is far below rounding, where a density would follow single levels."""
    bits, errors = [], []
    for options in ({"floor": "quantisation"}, {"stage_2_likelihood": "digital", "floor": 1e-6}):
        config = replace(QUICK, **(PAPERS_STAGE_2 | options), stage_1_epochs=6, stage_2_epochs=6)
        model, trainer = fit(digits, config)
        x = model.scaling(torch.from_numpy(digits.test[:]))
        with torch.no_grad():
            likelihood = model.reconstruct(x)
            digital = DigitalGaussian.of(likelihood, model.levels)
            bits.append(-float(digital.log_prob(x).mean()) / 64 / math.log(2))
        errors.append(trainer.history[-1]["test_mse"])
        assert math.isfinite(trainer.history[-1]["validation_elbo"])
    assert bits[1] < bits[0]
    # The clipping of gradients, which goes by the norm of all, is all that they share.
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize(
    ("examples", "options", "expected"),
    [
        ("digital", {}, ("head", "frozen", "digital", "quantisation", "monotone", 5e-3)),
        ("float", {}, ("decoder", "stop", "density", 1.0, "none", 1e-3)),
        ("table", {}, ("decoder", "stop", "density", 0.1, "none", 1e-3)),
        (
            "digital",
            {"stage_2_gradients": "joint"},
            ("head", "joint", "density", "quantisation", "monotone", 1e-3),
        ),
        (
            "digital",
            {"recalibrate": "scale", "floor": 0.5},
            ("head", "frozen", "density", 0.5, "scale", 5e-3),
        ),
        (
            "digital",
            {"stage_2_network": "decoder", "stage_2_learning_rate": 0.1},
            ("decoder", "frozen", "digital", "quantisation", "monotone", 0.1),
        ),
    ],
)
def test_stage_2_suits_the_data(examples, options, expected):
    rng = np.random.default_rng(0)
    data = load(
        {
            "digital": rng.integers(0, 256, (60, 8, 8), dtype=np.uint8),
            "float": rng.normal(size=(60, 1, 8, 8)).astype(np.float32),
            "table": rng.normal(size=(60, 5)),
        }[examples]
    )
    config = replace(QUICK, latent_dim=2, **options)
    assert not config.problems()
    assert choose_stage_two(make_model(data, config), config) == expected


def test_gradients_of_stage_1_do_not_count_in_the_clipping_of_a_frozen_stage_2(digits):
    config = replace(QUICK, stage_2_gradients="frozen")
    model, _ = fit(digits, replace(config, stage_2_epochs=0))
    assert any(parameter.grad is not None for parameter in model.encoder.parameters())

    again = Trainer(model.train(), digits, replace(config, stage_1_epochs=0, stage_2_epochs=1))
    again.fit()
    frozen = [*model.encoder.parameters(), *model.decoder.parameters()]
    assert all(parameter.grad is None for parameter in frozen)


def test_levels_need_digital_data():
    data = load(np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32))
    config = replace(QUICK, latent_dim=2, stage_2_likelihood="digital")
    with pytest.raises(ConfigError, match="stage_2_likelihood=digital needs digital data"):
        check_fit(data, config)


def test_recalibration_makes_held_out_residuals_standard(digits):
    config = replace(QUICK, stage_1_epochs=6, stage_2_epochs=4, recalibrate="scale")
    model, _ = fit(digits, config)
    x = model.scaling(torch.from_numpy(digits.validation[:]))
    with torch.no_grad():
        ratios = []
        for seed in range(20):
            likelihood = model.decode(model.encode(x).sample(torch.Generator().manual_seed(seed)))
            ratios.append(((x - likelihood.mean) / likelihood.std).square().mean())
    assert torch.stack(ratios).mean() == pytest.approx(1.0, rel=0.05)


def standardised(model, split, varying):
    x = model.scaling(torch.from_numpy(split[:]))
    with torch.no_grad():
        seen = model.reconstruct(x)
    return ((x - seen.mean) / seen.std)[:, varying].abs()


def test_recalibration_by_coverage(digits):
    """The mean stays, one std holds .683 of the errors, and intervals hold their share."""
    config = replace(QUICK, width=16, learning_rate=5e-3, stage_1_epochs=12, stage_2_epochs=8)
    config = replace(config, **(PAPERS_STAGE_2 | {"floor": 0.01}))
    varying = varying_dimensions(torch.from_numpy(digits.train[:]))
    assert 0.5 < varying.float().mean() < 0.9  # some pixels never vary: they do not count
    plain, recorder = fit(digits, config)[0], Recorder()
    model, _ = fit(digits, replace(config, recalibrate="coverage"), sinks=[recorder])
    x = model.scaling(torch.from_numpy(digits.test[:]))
    with torch.no_grad():
        assert torch.equal(model.reconstruct(x).mean, plain.reconstruct(x).mean)
        scale = model.reconstruct(x).std / plain.reconstruct(x).std
        for ours, theirs in zip(model.interval(x, 0.9), plain.interval(x, 0.9), strict=True):
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(scale, scale[0, 0, 0, 0].expand_as(scale))
    assert scale.mean() == pytest.approx(plain.noise.interval_factor(1.0), rel=1e-4)
    assert any(
        "Recalibrated the predicted std on 162 held-out examples" in text
        for text in recorder.messages
    )
    validation, test = (
        standardised(model, split, varying) for split in (digits.validation, digits.test)
    )
    for k, nominal in enumerate(NOMINAL_COVERAGE, start=1):
        factor = model.noise.interval_factor(float(k))
        assert (validation <= factor).float().mean() == pytest.approx(nominal, abs=2e-3)
        assert (test <= factor).float().mean() == pytest.approx(nominal, abs=0.02)
    assert (test <= 1).float().mean() == pytest.approx(0.683, abs=0.02)


def test_recalibration_by_a_monotone_map(digits):
    """Off the bounds, the root mean squared error is the std, for small std and for large ones."""
    config = replace(QUICK, width=16, learning_rate=5e-3, stage_1_epochs=8, floor="quantisation")
    config = replace(config, stage_2_network="head", stage_2_gradients="frozen", stage_2_epochs=6)
    varying = varying_dimensions(torch.from_numpy(digits.train[:]))
    recorder = Recorder()
    figures = []
    for option in ("none", "monotone"):
        model, _ = fit(digits, replace(config, recalibrate=option), sinks=[recorder])
        x = model.scaling(torch.from_numpy(digits.test[:]))
        with torch.no_grad():
            seen = model.reconstruct(x)
        counts = varying & ~model.levels.agree_on_bound(x, seen.mean)
        std, error = seen.std[counts], (x - seen.mean)[counts]
        quarters = std.argsort().tensor_split(4)
        ratios = [float(error[q].square().mean().sqrt() / std[q].mean()) for q in quarters]
        figures.append((max(abs(ratio - 1) for ratio in ratios), std))
    (before, plain), (after, mapped) = figures
    assert after < min(0.15, before)
    in_order = mapped[plain.argsort()]  # which stays, up to rounding
    assert (in_order.diff() > -1e-6 * in_order[1:]).all()
    assert any("Recalibrated the predicted std on 162 held" in text for text in recorder.messages)


def test_a_head_on_networks_of_ones_own_is_a_second_decoder_and_said_to_be(digits):
    recorder = Recorder()
    config = replace(QUICK, stage_1_epochs=1, stage_2_epochs=1, stage_2_network="head")
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    decoder = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8)))
    model = make_model(digits, config, encoder, decoder)
    Trainer(model, digits, config, sinks=[recorder]).fit()
    assert not model.noise.reads_features
    assert any("by a second decoder" in text for text in recorder.messages)


def test_a_trained_model_takes_stage_2_only(digits):
    model, first = fit(digits, replace(QUICK, stage_2_epochs=0))
    before = first.figures(first.validation)
    config = replace(QUICK, **PAPERS_STAGE_2, stage_1_epochs=0, stage_2_epochs=1)
    trainer = Trainer(model.train(), digits, config)
    trainer.fit()
    assert isinstance(model.noise, PredictedNoise)
    assert [row["stage"] for row in trainer.history] == [2]
    assert float(trainer.optimal_var) == pytest.approx(float(first.optimal_var), rel=0.05)
    assert trainer.history[0]["validation_elbo"] > before.elbo


def test_a_linear_vae_finds_the_noise_variance_of_probabilistic_pca():
    x = linear_gaussian_data(n=4000).float()
    data = load(x)
    config = TrainConfig(
        latent_dim=3,
        batch_size=128,
        learning_rate=0.02,
        stage_1_epochs=60,
        stage_2_epochs=0,
        tolerance=0.0,
        variance_from="training",  # as PPCA
    )
    torch.manual_seed(0)
    model = make_model(data, config, encoder=_LinearEncoder(8, 3), decoder=nn.Linear(3, 8))
    trainer = Trainer(model, data, config)
    trainer.fit()
    scaled = model.scaling(torch.from_numpy(data.train[:])).double()
    ppca = Ppca.fit(scaled, 3)
    assert float(trainer.optimal_var) == pytest.approx(float(ppca.var), rel=0.02)
    held_out = model.scaling(torch.from_numpy(data.test[:])).double()
    draws = [Elbo(model)(held_out.float()).elbo.mean().detach() for _ in range(50)]
    assert float(torch.stack(draws).mean()) == pytest.approx(
        float(ppca.log_prob(held_out).mean()), abs=0.05
    )


class _LinearEncoder(nn.Module):
    """Mean linear in x, one variance per unit: the family that holds PPCA's posterior."""

    def __init__(self, dimensions, latent_dim):
        super().__init__()
        self.mean = nn.Linear(dimensions, latent_dim)
        self.log_var = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x):
        mean = self.mean(x)
        return torch.cat([mean, self.log_var.expand_as(mean)], 1)


# The run folder


def test_the_run_folder_is_complete_and_its_parts_agree(digits, tmp_path):
    run = train(digits, QUICK, tmp_path / "run", command=["test"])
    settings = json.loads(run.config_file.read_text())
    assert settings["options"] == QUICK.as_dict()
    assert settings["data"]["fingerprint"] == digits.fingerprint
    assert torch.__version__.startswith(settings["versions"]["torch"])  # which has no "+cpu"
    assert run.config() == QUICK
    assert run.mixture().n_components == 2
    assert run.mixture().latent_dim == run.model().latent_dim
    rows = run.history()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    for split in ("train", "validation"):
        for name in ("elbo", "log_likelihood", "kl", "mse", "noise_var"):
            assert f"{split}_{name}" in rows[0]
    assert {"examples_per_second", "stage", "decision"} <= rows[0].keys()


def test_a_taken_folder_is_not_overwritten(digits, tmp_path, monkeypatch):
    train(digits, QUICK, tmp_path / "run")
    with pytest.raises(StoreError, match="holds a run already"):
        train(digits, QUICK, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert train(digits, QUICK).folder == Path("runs/digits")
    assert train(digits, QUICK).folder == Path("runs/digits-2")


@pytest.mark.parametrize(
    "options",
    [
        {"n_components": "auto"},
        {"mixture_from": "moments"},
        {"mixture_fit": "variational", "n_components": 3},
    ],
    ids=str,
)
def test_every_fit_of_the_mixture(digits, tmp_path, options):
    run = train(digits, replace(QUICK, **options), tmp_path / "run")
    codes = run.mixture().sample(100, torch.Generator().manual_seed(0))
    assert torch.isfinite(codes).all()


def test_a_table_keeps_its_units(table, tmp_path):
    data = load(table)
    run = train(data, replace(QUICK, latent_dim=2, width=8, stage_1_epochs=40), tmp_path / "run")
    model = run.model()
    raw = torch.from_numpy(data.test[:])
    with torch.no_grad():
        back = model.scaling.restore(model.reconstruct(model.scaling(raw)).mean)
    explained = 1 - (raw - back).square().mean(0) / raw.var(0)
    assert (explained > 0.3).all(), explained
    assert model.architecture == "mlp"


def test_own_networks_train_and_load(table, tmp_path):
    def networks():
        return nn.Linear(6, 4), nn.Linear(2, 6)

    data = load(table)
    encoder, decoder = networks()
    config = replace(QUICK, latent_dim=2)
    run = train(data, config, tmp_path / "run", encoder=encoder, decoder=decoder)
    assert run.model(*networks()).latent_dim == 2
    with pytest.raises(ConfigError, match="go together"):
        train(data, config, tmp_path / "other", encoder=encoder)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_dim": 64}, "latent_dim=64 must be smaller than the data's 64 dimensions"),
        ({"n_components": 5000}, "exceeds the 1455 training examples"),
        ({"stage_1_epochs": 0}, "trained before"),
    ],
)
def test_a_configuration_that_does_not_fit_the_data_leaves_no_folder(
    digits, tmp_path, change, message
):
    with pytest.raises(ConfigError, match=message):
        train(digits, replace(QUICK, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_data_than_the_runs_own_are_refused(digits, tmp_path):
    run = train(digits, QUICK, tmp_path / "run")
    shuffled = load(digits.train[:][::-1].copy())
    with pytest.raises(StoreError, match="Give the same data"):
        train(shuffled, QUICK, run.folder, resume=True)


def test_own_networks_may_rely_on_the_usual_memory_layout(tmp_path):
    """Channels-last would break a view of a colour image."""

    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 8 * 8, 4)

        def forward(self, x):
            return self.linear(x.view(len(x), -1))

    data = load(np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3)).astype(np.uint8))
    decoder = nn.Sequential(nn.Linear(2, 3 * 8 * 8), nn.Unflatten(1, (3, 8, 8)))
    config = replace(QUICK, latent_dim=2)
    run = train(data, config, tmp_path / "run", encoder=Viewing(), decoder=decoder)
    assert len(run.history()) == 5


def test_too_few_examples_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="too few examples: 10 for training, 1 for validation"):
        train(load(np.random.default_rng(0).normal(size=(12, 4))), QUICK, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_small_data_set_trains_with_every_default(tmp_path):
    rng = np.random.default_rng(0)
    data = load(rng.integers(0, 256, (30, 8, 8)).astype(np.uint8))
    config = TrainConfig(stage_1_epochs=2, stage_2_epochs=1, width=4)
    assert train(data, config, tmp_path / "run").mixture().n_components >= 1
    config = replace(config, mixture_fit="variational")
    assert train(data, config, tmp_path / "variational").mixture().n_components <= 30


def test_components_on_their_floor_are_told_of(tmp_path):
    data = load(np.random.default_rng(0).integers(0, 256, (30, 8, 8)).astype(np.uint8))
    recorder = Recorder()
    train(data, replace(QUICK, n_components=20), tmp_path / "run", sinks=[recorder])
    assert any("shrunk to their floor" in message for message in recorder.messages)


def test_weight_decay_pulls_at_weights_only(digits):
    model = make_model(digits, replace(QUICK, noise_update="gradient"))
    groups = parameter_groups(model, 1e-3, 0.3)
    assert {p.ndim >= 2 for p in groups[0]["params"]} == {True}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.0]
    assert [id(p) for p in groups[2]["params"]] == [id(model.noise.log_var)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_variance_learned_by_gradient_follows_the_closed_form(digits):
    config = replace(
        QUICK,
        stage_1_epochs=30,
        stage_2_epochs=0,
        width=8,
        weight_decay=0.3,
        noise_update="gradient",
    )
    _, trainer = fit(digits, config)
    in_force = trainer.history[-1]["train_noise_var"]
    assert in_force == pytest.approx(trainer.history[-1]["train_mse"], rel=0.25)


def test_options_for_images_are_refused_for_tables(table, tmp_path):
    with pytest.raises(ConfigError) as caught:
        train(
            load(table),
            replace(
                QUICK, latent_dim=2, floor="quantisation", noise="channel", architecture="conv"
            ),
            tmp_path / "run",
        )
    assert len(caught.value.problems) == 3


def test_a_full_disk_stops_the_run_with_its_last_checkpoint(digits, tmp_path, monkeypatch):
    real, calls = trainer_module.save_checkpoint, []

    def full(folder, steps_done, state):
        calls.append(steps_done)
        if len(calls) == 3:
            monkeypatch.setattr(
                "os.fsync", lambda _fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
            )
        return real(folder, steps_done, state)

    monkeypatch.setattr(trainer_module, "save_checkpoint", full)
    with pytest.raises(OSError, match="no space left"):
        train(digits, QUICK, tmp_path / "run")
    monkeypatch.undo()
    run = train(digits, QUICK, tmp_path / "run", resume=True)
    assert len(run.history()) == 5


def test_the_history_follows_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.start(30, 0, [])
    for epoch in (1, 2, 3):
        sink.epoch(epoch_row(epoch))
    with path.open("a") as file:
        file.write('{"epoch": 4, "tr')  # a kill in the middle of a line
    assert [row["epoch"] for row in read_rows(path)] == [1, 2, 3]
    JsonlSink(path).start(30, 20, [epoch_row(1), epoch_row(2)])
    assert [row["epoch"] for row in read_rows(path)] == [1, 2]


KILLED = """
import sys
from equipoise.data import load
from equipoise.estimate import Estimate
from equipoise.config import make_config
from equipoise.training.job import _recorded_batch_size, train
options = dict(
    latent_dim=4, width=4, stage_1_epochs=8, stage_2_epochs=4, n_components=2, tolerance=0.0
)
train(load("digits"), make_config(options), sys.argv[1], resume=sys.argv[2] == "resume")
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_resumes_to_the_same_model(tmp_path):
    def start(folder, mode):
        return subprocess.Popen([sys.executable, "-c", KILLED, str(folder), mode])

    with start(tmp_path / "whole", "new") as process:
        assert process.wait() == 0
    killed, mode = Run(tmp_path / "killed"), "new"
    for rows in (2, 9):  # once in each stage
        with start(killed.folder, mode) as process:
            while len(killed.history()) < rows or not list(killed.checkpoints.glob("step-*")):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        mode = "resume"
    with start(killed.folder, "resume") as process:
        assert process.wait() == 0
    whole = Run(tmp_path / "whole").model().state_dict()
    for name, tensor in killed.model().state_dict().items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.slow
def test_a_process_preempted_at_any_moment_resumes_to_the_same_run(tmp_path):
    """The command itself: exit code, message, and the model and mixture, byte by byte."""
    command = [sys.executable, "-m", "equipoise", "train"]
    small = [
        "latent_dim=2",
        "width=4",
        "batch_size=8",
        "stage_1_epochs=3",
        "stage_2_epochs=3",
        "tolerance=0",
    ]
    options = ["--quiet", "--set", "n_components=2", "accelerator=cpu", *small]
    subprocess.run(
        [*command, "--out", tmp_path / "whole", *options], check=True, capture_output=True
    )
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "preempted")
    arguments = ["--out", run.folder, *options]
    for rows in (1, 4):  # once in each stage
        with subprocess.Popen(
            [*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            while len(run.history()) < rows:
                assert process.poll() is None
                time.sleep(0.01)
            delay = random.uniform(0, run.history()[-1]["seconds"])
            time.sleep(delay)
            process.send_signal(signal.SIGTERM)
            told = process.communicate()[1]
        assert process.returncode == 143, (delay, told)
        assert "stopped by SIGTERM after step" in told
        assert (
            f"go on from the last checkpoint with 'equipoise train --resume {run.folder}'" in told
        )
        arguments = ["--quiet", "--resume", run.folder]
    subprocess.run([*command, *arguments], check=True, capture_output=True)
    assert_same_files(run, whole)
    assert without_times(run.history()) == without_times(whole.history())


# Warnings that save a day


def figures(**changes):
    values = {
        "n": 10,
        "elbo": 1.0,
        "log_likelihood": 2.0,
        "kl": 1.0,
        "mse": 0.01,
        "noise_var": 0.01,
        "floor_share": 0.0,
        "standardised_var": Estimate(1.0, 0.1, 10),
        "unit_var": torch.ones(4),
    }
    return SplitFigures(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "expected", "message"),
    [
        ({"mse": 0.1}, False, "Collapse"),
        ({"unit_var": torch.zeros(4)}, False, "inactive"),
        ({"floor_share": 0.25}, False, "floor in 25%"),
    ],
)
def test_warnings(changes, expected, message):
    (warning,) = warnings_for(figures(**changes), data_var=0.1, floor_is_expected=expected)
    assert message in warning


def test_what_was_learned_by_heart_is_warned_of():
    (warning,) = warnings_for(figures(), 0.1, floor_is_expected=False, overfitting=2.5)
    assert "2.5 times the squared error" in warning


@pytest.mark.parametrize(
    ("n_steps", "advice"),
    [
        (70, "70 steps are too few: raise stage_1_epochs, or lower batch_size"),
        (700, "train longer"),
    ],
)
def test_the_advice_for_a_collapse_is_of_its_cause(n_steps, advice):
    collapsed = figures(mse=0.1)
    (warning,) = warnings_for(collapsed, 0.1, floor_is_expected=False, n_steps=n_steps)
    assert advice in warning


def test_a_healthy_model_has_no_warnings():
    assert warnings_for(figures(), data_var=0.1, floor_is_expected=False) == []
    assert warnings_for(figures(floor_share=0.5), data_var=0.1, floor_is_expected=True) == []


def test_a_collapsing_run_is_told_of(digits):
    """A huge fixed variance makes the prior win: codes are ignored."""
    recorder = Recorder()
    fit(digits, replace(QUICK, noise="fixed", noise_var=1e4, stage_2_epochs=0), sinks=[recorder])
    assert any("Collapse" in message for message in recorder.messages)
    assert any("inactive" in message for message in recorder.messages)


@pytest.mark.parametrize(
    ("last", "low", "high", "warned"),
    [
        (nn.Sigmoid(), 0.0, 1.0, False),
        (nn.Sigmoid(), -0.5, 1.0, True),
        (nn.Tanh(), -1.0, 2.0, True),
        (nn.Softplus(), 0.0, 300.0, False),
        (nn.Linear(2, 2), -1e3, 1e3, False),
    ],
)
def test_what_the_decoder_cannot_reach_is_told(last, low, high, warned):
    warning = range_warning(nn.Sequential(nn.Linear(2, 2), last), low, high)
    assert (warning is not None) == warned


def test_the_public_names_resolve():
    import equipoise

    for name in equipoise.__all__:
        assert getattr(equipoise, name) is not None
    assert equipoise.VAE is VAE
    assert run_module.train is equipoise.train
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = equipoise.nonsense


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [1, 2])
def test_sums_are_as_good_as_float64_whatever_the_networks_compute_in(precision, stage):
    """ELBO, its parts and eq. (10) from the very means and variances that the networks gave."""
    rng = np.random.default_rng(0)
    data = load(rng.integers(0, 256, (600, 3, 32, 32), dtype=np.uint8))
    epochs = (
        {"stage_1_epochs": 1, "stage_2_epochs": 1}
        if stage == 2
        else {"stage_1_epochs": 1, "stage_2_epochs": 0}
    )
    config = replace(QUICK, precision=precision, **epochs)
    seen = []

    class Seen(Recorder):
        def step(self, done_steps, total_steps, label, figures):
            self.figures = figures

    trainer = Trainer(make_model(data, config), data, config, sinks=[recorder := Seen()])
    batch_sums = trainer_module.batch_sums

    def keep(terms):
        # The shared variance is a buffer, which the closed form moves in place.
        seen.append((trainer.schedule.stage, terms._replace(log_var=terms.log_var.clone())))
        return batch_sums(terms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "batch_sums", keep)
        trainer.fit()
    terms = [each for at, each in seen if at == stage]
    assert len(terms) == 4  # of 600 examples 486 are left for training, in batches of 128
    residual = torch.cat([each.residual for each in terms]).double()
    log_var = torch.cat([each.log_var.expand_as(each.residual) for each in terms]).double()
    mean, code_log_var = (
        torch.cat([each.posterior[i] for each in terms]).detach().double() for i in range(2)
    )
    log_likelihood = -0.5 * (
        residual.square() / log_var.exp() + log_var + math.log(2 * math.pi)
    ).flatten(1).sum(1)
    kl = 0.5 * (mean.square() + code_log_var.exp() - 1 - code_log_var).sum(1)
    figures = recorder.figures
    assert figures["log_likelihood"] == pytest.approx(float(log_likelihood.mean()), rel=1e-6)
    assert figures["kl"] == pytest.approx(float(kl.mean()), rel=1e-5, abs=1e-6)
    assert figures["elbo"] == pytest.approx(float((log_likelihood - kl).mean()), rel=1e-6)
    assert figures["mse"] == pytest.approx(float(residual.square().mean()), rel=1e-6)
    statistic = ResidualVariance()
    for each in terms:
        statistic.update(each.residual)
    assert float(statistic.var) == pytest.approx(float(residual.square().mean()), rel=1e-7)


# A last batch of one example, and what a failed start leaves behind


def test_no_last_batch_of_one_example():
    """WAE-MMD divides by n (n - 1), and batch normalisation has no variance of one example."""
    rows = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    data = load(rows)
    assert len(data.train) % 16 == 1
    config = replace(QUICK, batch_size=16, stage_1_epochs=2, stage_2_epochs=0, latent_dim=2)

    wae = replace(config, objective="wae-mmd", noise="fixed", noise_var=0.5)
    history = Trainer(make_model(data, wae), data, wae).fit()
    assert all(np.isfinite(row["train_elbo"]) for row in history)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model = make_model(data, config, encoder, nn.Linear(2, 6))
    assert len(Trainer(model, data, config).fit()) == 2

    single = replace(config, batch_size=1)
    with pytest.raises(ConfigError, match="batch_size is at least 2"):
        check_fit(data, replace(single, objective="wae-mmd"))
    with pytest.raises(ConfigError, match="batch_size is at least 2"):
        make_model(data, single, encoder, nn.Linear(2, 6))


class Failing(nn.Module):
    """A network that fails in its third batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 4), 0

    def forward(self, x):
        self.calls += 1
        if self.training and self.calls > 3:
            raise RuntimeError("as in BatchNorm")
        return self.layer(x)


def test_a_failed_start_is_not_in_the_way(tmp_path):
    data = load(np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32))
    config = replace(QUICK, batch_size=16, stage_1_epochs=1, stage_2_epochs=0, latent_dim=2)
    with pytest.raises(RuntimeError, match="as in BatchNorm"):
        train(data, config, tmp_path / "run", encoder=Failing(), decoder=nn.Linear(2, 6))
    assert not (tmp_path / "run").exists()
    run = train(data, config, tmp_path / "run")
    assert run.model_file.is_file()


def test_config_json_has_the_options_that_the_run_went_on_with(tmp_path):
    """A run without a checkpoint starts anew, with the options of the resume."""
    data = load(np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32))
    config = replace(QUICK, batch_size=16, stage_1_epochs=1, stage_2_epochs=0, latent_dim=2)
    run = train(data, config, tmp_path / "run")
    shutil.rmtree(run.checkpoints)
    run.model_file.unlink()
    again = replace(config, width=8, seed=5)
    run = train(data, again, run.folder, resume=True)
    assert run.config() == again
    assert run.model().width == 8


def test_the_size_of_batches_that_auto_chose_is_kept(table, tmp_path):
    """Also where another number of processes, or more examples, would choose another."""
    config = TrainConfig(latent_dim=2, width=4, stage_1_epochs=1, stage_2_epochs=0)
    assert config.batch_size == "auto"
    data = load(table)
    run = train(data, config, tmp_path / "run")
    assert run.config().batch_size == config.step_size(len(data.train))
    settings = json.loads(run.config_file.read_text())
    settings["options"]["batch_size"] = 18
    write_json(run.config_file, settings)
    assert _recorded_batch_size(run.folder) == 18
    assert _recorded_batch_size(tmp_path / "none") is None
    assert _recorded_batch_size(None) is None
