"""The weights of the best epoch are kept, and training stops when it does not get better."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from equipoise.config import TrainConfig
from equipoise.data import load
from equipoise.estimate import Estimate
from equipoise.stages import Stage, StageSchedule
from equipoise.training.best import BestWeights, paired_gain
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

LEARNS_BY_HEART = TrainConfig(
    latent_dim=2,
    stage_1_epochs=50,
    early_stopping=0,
    stage_2_epochs=0,
    batch_size=16,
    learning_rate=0.03,
    variance_from="training",
    tolerance=0.0,
    n_components=1,
)
"""So fast, and by the variance of its own residuals, that held-out examples become less likely."""


def examples(kind):
    generator = np.random.default_rng(0)
    if kind == "table":
        return generator.normal(size=(80, 6))
    return generator.integers(0, 256, (50, 9, 8), dtype=np.uint8)


def train(data, config, **arguments):
    torch.manual_seed(0)
    trainer = Trainer(make_model(data, config), data, config, **arguments)
    return trainer, trainer.fit()


@pytest.mark.parametrize("kind", ["table", "images"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_stage_ends_with_the_weights_of_its_best_epoch(kind, ema_decay, monkeypatch):
    data = load(examples(kind), test_fraction=0.2, validation_fraction=0.3)
    config = replace(LEARNS_BY_HEART, ema_decay=ema_decay)
    after_epoch = {}
    look = Trainer._look_at_weights

    def copied(self, validation):
        model = self.descent.evaluated_model
        state = {name: value.clone() for name, value in model.state_dict().items()}
        after_epoch[self.position.epoch] = state
        look(self, validation)

    monkeypatch.setattr(Trainer, "_look_at_weights", copied)
    trainer, rows = train(data, config)

    elbos = [row["validation_elbo"] for row in rows]
    best = 1 + int(np.argmax(elbos))
    assert best < len(rows)
    assert rows[-1]["kept_epoch"] == best

    state = trainer.model.state_dict()
    for name, expected in after_epoch[best].items():
        if name.startswith(("encoder", "decoder")):
            assert torch.equal(state[name], expected)

    # The variance is that of the weights that were kept, and so are the figures of the test set.
    torch.testing.assert_close(trainer.optimal_var.float(), trainer.model.noise.log_var.exp())
    assert trainer.figures(trainer.test).elbo == pytest.approx(rows[-1]["test_elbo"], rel=1e-6)


def test_the_last_weights_can_be_kept():
    data = load(examples("table"), test_fraction=0.2, validation_fraction=0.3)
    _, best = train(data, LEARNS_BY_HEART)
    _, last = train(data, replace(LEARNS_BY_HEART, keep_weights="last"))

    assert last[-1]["kept_epoch"] == len(last) > best[-1]["kept_epoch"]
    assert best[-1]["test_elbo"] > last[-1]["test_elbo"]


@pytest.mark.parametrize("stop_after", [20, 38])
def test_the_best_weights_survive_an_interruption(tmp_path, stop_after):
    data = load(examples("images"), test_fraction=0.2, validation_fraction=0.3)
    config = replace(LEARNS_BY_HEART, stage_1_epochs=40)
    whole, rows = train(data, config)

    class InterruptedRunError(Exception):
        pass

    torch.manual_seed(0)
    half = Trainer(make_model(data, config), data, config, folder=tmp_path)
    look = half._look_at_overfitting

    def interrupt(validation):
        look(validation)
        if half.position.epoch == stop_after:
            raise InterruptedRunError

    half._look_at_overfitting = interrupt
    with pytest.raises(InterruptedRunError):
        half.fit()
    again = Trainer(make_model(data, config), data, config, folder=tmp_path)
    resumed = again.fit(resume=True)

    assert resumed[-1]["kept_epoch"] == rows[-1]["kept_epoch"] < 40
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_a_best_epoch_within_the_error_of_the_last_is_not_kept(monkeypatch):
    data = load(examples("table"), test_fraction=0.2, validation_fraction=0.3)
    config = replace(LEARNS_BY_HEART, stage_1_epochs=3)
    kept = []
    for gains in ([0.5, 1.5], [-0.5, 1.5]):  # 1.0 ± 0.5, then 0.5 ± 1.0
        figures = iter([torch.zeros(2), torch.tensor(gains)])
        monkeypatch.setattr(Trainer, "_validation_elbos", lambda self, f=figures: next(f))
        monkeypatch.setattr(BestWeights, "observe", observe_first)
        kept.append(train(data, config)[1][-1]["kept_epoch"])
    assert kept == [1, 3]


def observe_first(self, epoch, elbo, model, observe=BestWeights.observe):
    """Take the first epoch for the best."""
    observe(self, epoch, -float(epoch), model)


def test_a_paired_gain_is_the_mean_difference():
    first, second = torch.randn(50), torch.randn(50)
    gain = paired_gain(first, second, lambda sums: sums)
    expected = Estimate.of_mean(second.double() - first.double())
    assert gain.n == 50
    assert gain[:2] == pytest.approx(expected[:2])

    # Two processes with half of the examples each.
    halves = [(first[:20], second[:20]), (first[20:], second[20:])]
    sums = []
    for a, b in halves:
        paired_gain(a, b, lambda part: sums.append(part) or part)
    assert paired_gain(first[:20], second[:20], lambda part: sum(sums)) == pytest.approx(gain)


@pytest.mark.parametrize(("early_stopping", "last"), [(2, 5), (4, 7), (0, 20), (None, 13)])
def test_a_stage_stops_when_the_elbo_does_not_rise(early_stopping, last):
    schedule = StageSchedule(20, 0, tolerance=0.0, early_stopping=early_stopping)
    elbos = [1.0, 2.0, 3.0] + [2.0] * 17

    decisions = []
    while schedule.stage is not Stage.FINISHED:
        decisions.append(schedule.observe(0.1, elbos[len(decisions)]))

    assert len(decisions) == last
    if last < 20:
        assert f"has not risen for {last - 3} epochs" in decisions[-1].reason


def test_a_stage_counts_anew():
    schedule = StageSchedule(20, 20, tolerance=0.0, early_stopping=3)
    for elbo in [5.0, 1.0, 1.0, 1.0]:
        decision = schedule.observe(0.1, elbo)
    assert decision.stage is Stage.PREDICTED_VARIANCE

    # Stage 2's first epoch may be worse than stage 1's best.
    for elbo in [-5.0, -4.0, -3.0]:
        assert not schedule.observe(0.1, elbo).switched
    assert schedule.best == (3, -3.0)

    restored = StageSchedule(20, 20, tolerance=0.0, early_stopping=3)
    restored.load_state_dict(schedule.state_dict())
    assert restored.best == schedule.best
    assert restored.state_dict() == schedule.state_dict()
    assert math.isinf(StageSchedule(1, 1).best[1])
