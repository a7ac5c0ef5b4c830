"""A finished run goes on for longer, exactly, and keeps the results that it had."""

from dataclasses import replace

import pytest
import torch

import equipoise
from equipoise.cli import main
from equipoise.config import ConfigError, make_config
from equipoise.files import StoreError
from equipoise.run import Run
from equipoise.stages import Stage
from equipoise.training.continuation import plan_continuation
from tests.test_exact_resume import CONFIG, Stop, data_of

QUICK = replace(CONFIG, n_components=2, stage_2_gradients="stop", floor=1.0)
TABLE, IMAGES = (6,), (1, 8, 8)


class Messages:
    """Keeps the messages to a person, and the learning rates."""

    def __init__(self):
        self.texts, self.totals = [], []

    def start(self, total_steps, done_steps, history):
        self.totals.append((done_steps, total_steps))

    def step(self, done_steps, total_steps, label, figures): ...
    def epoch(self, row): ...
    def close(self): ...

    def message(self, text):
        self.texts.append(text)


@pytest.mark.parametrize(
    ("shape", "config", "more", "stages"),
    [
        (TABLE, QUICK, {"stage_1_epochs": 5}, [1, 1, 2, 2, 1, 1, 1, 2, 2]),
        (TABLE, replace(QUICK, stage_2_epochs=0), {"stage_2_epochs": 2}, [1, 1, 2, 2]),
        (IMAGES, replace(CONFIG, n_components=2), {"stage_2_epochs": 3}, [1, 1, 2, 2, 2]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (TABLE, QUICK, {"stage_2_epochs": 4}, [1, 1, 2, 2, 2, 2]),
                (
                    IMAGES,
                    replace(CONFIG, n_components=2),
                    {"stage_1_epochs": 3},
                    [1, 1, 2, 2, 1, 2, 2],
                ),
            )
        ),
    ],
)
def test_a_continuation_that_is_killed_ends_as_one_that_is_not(
    shape, config, more, stages, tmp_path
):
    data, longer = data_of(shape), replace(config, **more)
    whole = equipoise.train(data, config, tmp_path / "whole")
    before = whole.model_file.read_bytes()
    sink = Messages()
    equipoise.train(data, longer, whole.folder, resume=True, sinks=[sink])

    rows = whole.history()
    assert [row["stage"] for row in rows] == stages
    assert [row["epoch"] for row in rows] == list(range(1, len(stages) + 1))
    assert Run(whole.folder / "earlier-1").model_file.read_bytes() == before
    assert whole.config().stage_1_epochs == longer.stage_1_epochs
    assert any("goes on for" in text or "starts for" in text for text in sink.texts)
    assert any("earlier-1, which is a run of its own" in text for text in sink.texts)
    ((done, total),) = sink.totals
    assert total - done == (len(stages) - stages_before(config)) * done // stages_before(config)

    killed = equipoise.train(data, config, tmp_path / "killed")
    n = len(stages)
    for epoch, options in ((stages_before(config) + 1, longer), (n, longer), (n, longer)):
        try:
            equipoise.train(data, options, killed.folder, resume=True, sinks=[Stop(epoch)])
        except KeyboardInterrupt:
            assert not killed.is_trained()
    equipoise.train(data, longer, killed.folder, resume=True)

    assert killed.model_file.read_bytes() == whole.model_file.read_bytes()
    assert killed.mixture_file.read_bytes() == whole.mixture_file.read_bytes()
    assert [file.name for file in sorted(killed.folder.glob("earlier-*"))] == ["earlier-1"]


def stages_before(config):
    return config.stage_1_epochs + config.stage_2_epochs


def test_the_schedule_warms_up_and_decays_over_the_new_epochs(tmp_path):
    config = replace(QUICK, stage_2_epochs=0, stage_1_epochs=3)
    data = data_of(TABLE)
    run = equipoise.train(data, config, tmp_path / "run")
    equipoise.train(data, replace(config, stage_1_epochs=13), run.folder, resume=True)

    rates = [row["learning_rate"] for row in run.history()]
    assert rates[2] < 1e-3 * config.learning_rate
    assert max(rates[3:6]) > 0.9 * config.learning_rate
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 1e-3 * config.learning_rate
    # The variance of eq. (10) is that of the longer training.
    rows = run.history()
    assert rows[-1]["optimal_noise_var"] != rows[2]["optimal_noise_var"]


def test_more_epochs_of_stage_1_go_on_from_the_shared_variance(tmp_path):
    """A head on networks that stand still leaves them as stage 1 did: so does its continuation."""
    data, config = data_of(IMAGES), replace(CONFIG, n_components=2)
    with_stage_2 = equipoise.train(data, config, tmp_path / "two")
    without = equipoise.train(data, replace(config, stage_2_epochs=0), tmp_path / "one")
    first, other = with_stage_2.model().decoder, without.model().decoder
    for name, value in first.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_what_belongs_to_the_old_weights_is_kept_as_a_run_of_its_own(tmp_path):
    data = data_of(TABLE)
    run = equipoise.train(data, QUICK, tmp_path / "run")
    equipoise.evaluate(run, data, sections=["likelihood"])
    (run.folder / "notes.txt").write_text("mine")
    for n, epochs in enumerate((3, 4), 1):
        longer = replace(QUICK, stage_2_epochs=epochs)
        equipoise.train(data, longer, run.folder, resume=True)
        assert run.evaluation() == {}
        earlier = Run(run.folder / f"earlier-{n}")
        assert earlier.config().stage_2_epochs == epochs - 1
        assert len(earlier.history()) == epochs + 1
        assert earlier.mixture().n_components == 2

    assert "likelihood" in Run(run.folder / "earlier-1").evaluation()
    assert (run.folder / "notes.txt").read_text() == "mine"
    records = run.settings()["continued"]
    assert [record["earlier_results"] for record in records] == ["earlier-1", "earlier-2"]
    assert [record["epochs_before"]["stage_2_epochs"] for record in records] == [2, 3]


@pytest.mark.slow
def test_the_command_continues_and_names_what_it_refuses(tmp_path, capsys):
    folder = str(tmp_path / "run")
    values = ["latent_dim=2", "width=4", "stage_1_epochs=1", "stage_2_epochs=0", "n_components=2"]
    main(["train", "digits", "--out", folder, "--set", *values])
    resume = ["train", "--resume", folder, "--set"]

    refused = {
        "width=8": "width cannot change with --resume",
        "stage_1_epochs=1": "give more epochs",
        "stage_1_epochs": "--set needs KEY=VALUE",
    }
    for item, reason in refused.items():
        with pytest.raises(SystemExit):
            main([*resume, item])
        assert reason in capsys.readouterr().err
    assert Run(folder).is_trained()

    main([*resume, "stage_1_epochs=2"])
    printed = capsys.readouterr().out
    assert "Stage 1 goes on for at most 1 epoch" in printed
    assert "earlier-1" in printed
    assert len(Run(folder).history()) == 2


def test_epochs_that_were_done_are_no_continuation():
    rows = [{"stage": 1}] * 4 + [{"stage": 2}] * 3 + [{"stage": 1}] * 2 + [{"stage": 2}]
    before = {"stage_1_epochs": 6, "stage_2_epochs": 3}
    with pytest.raises(ConfigError, match="of which the run has 6"):
        plan_continuation(rows, before, make_config({"stage_1_epochs": 5, "stage_2_epochs": 3}))
    plan = plan_continuation(rows, before, make_config({"stage_1_epochs": 6, "stage_2_epochs": 9}))
    assert (plan.stage, plan.epochs[Stage.PREDICTED_VARIANCE]) == (Stage.PREDICTED_VARIANCE, 8)


def test_a_run_that_was_stopped_is_finished_first(tmp_path):
    data = data_of(TABLE)
    with pytest.raises(KeyboardInterrupt):
        equipoise.train(data, QUICK, tmp_path / "run", sinks=[Stop(2)])
    with pytest.raises(StoreError, match="finish it first"):
        equipoise.train(data, replace(QUICK, stage_1_epochs=9), tmp_path / "run", resume=True)
    run = equipoise.train(data, QUICK, tmp_path / "run", resume=True)
    assert len(run.history()) == 4
