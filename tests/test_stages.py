import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.stages import Stage, StageSchedule, floor_var


def run(schedule, figures):
    return [schedule.observe(*pair) for pair in figures]


def test_a_settled_stage_ends_early_and_says_why():
    schedule = StageSchedule(stage_1_epochs=50, stage_2_epochs=5, tolerance=1e-3, patience=2)
    decisions = run(schedule, [(0.1, 100.0), (0.01, 800.0), (0.01, 800.1), (0.01, 800.1)])

    assert [d.switched for d in decisions] == [False, False, False, True]
    assert decisions[-1].stage is Stage.PREDICTED_VARIANCE
    assert "converged at epoch 4" in decisions[-1].reason


@pytest.mark.parametrize(
    "moving",
    [[(0.01, 800.0 + 50 * i) for i in range(6)], [(0.01 + 0.01 * i, 800.0) for i in range(6)]],
)
def test_both_figures_must_settle(moving):
    schedule = StageSchedule(stage_1_epochs=50, stage_2_epochs=5, patience=2)
    assert not any(d.switched for d in run(schedule, moving))


def test_patience_starts_again_after_a_jump():
    schedule = StageSchedule(stage_1_epochs=50, stage_2_epochs=5, patience=2)
    figures = [(0.01, 800.0), (0.01, 800.0), (0.01, 900.0), (0.01, 900.0)]
    assert not any(d.switched for d in run(schedule, figures))


def test_the_epoch_limit_ends_a_stage():
    schedule = StageSchedule(stage_1_epochs=2, stage_2_epochs=1)
    decisions = run(schedule, [(1.0, 1.0), (0.5, 2.0), (0.4, 3.0)])

    assert [d.stage for d in decisions] == [
        Stage.SHARED_VARIANCE,
        Stage.PREDICTED_VARIANCE,
        Stage.FINISHED,
    ]
    with pytest.raises(RuntimeError, match="finished"):
        schedule.observe(0.4, 3.0)


def test_negative_bounds_are_compared_by_their_size():
    schedule = StageSchedule(stage_1_epochs=50, stage_2_epochs=0, patience=1, tolerance=0.01)
    assert not run(schedule, [(0.5, -500.0), (0.5, -480.0)])[-1].switched
    assert schedule.observe(0.5, -480.1).switched


@given(
    st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(-1e3, 1e3)), min_size=1, max_size=30),
    st.integers(0, 29),
)
def test_a_restored_schedule_decides_the_same(figures, cut):
    def fresh():
        return StageSchedule(stage_1_epochs=6, stage_2_epochs=4, tolerance=0.1, patience=2)

    one, other = fresh(), fresh()

    for i, pair in enumerate(figures):
        if one.stage is Stage.FINISHED:
            break
        if i == cut:
            restored = fresh()
            restored.load_state_dict(json.loads(json.dumps(other.state_dict())))
            other = restored
        assert one.observe(*pair) == other.observe(*pair)


def test_a_trained_model_skips_stage_1():
    schedule = StageSchedule(stage_1_epochs=0, stage_2_epochs=1)
    assert schedule.stage is Stage.PREDICTED_VARIANCE
    assert schedule.observe(0.01, 800.0).stage is Stage.FINISHED


@given(st.integers(1, 8), st.integers(0, 8))
def test_without_tolerance_every_epoch_is_run(first, second):
    schedule = StageSchedule(first, second, tolerance=0.0)
    epochs = 0
    while schedule.stage is not Stage.FINISHED:
        schedule.observe(0.01, 800.0)
        epochs += 1

    assert epochs == first + second


def test_floors():
    var = torch.tensor([0.01, 0.02])

    assert torch.equal(floor_var(1.0, var, None), var)
    torch.testing.assert_close(floor_var(1e-3, var, None), var * 1e-3)
    torch.testing.assert_close(
        floor_var("quantisation", var, 1 / 255), torch.full((2,), 1 / 255**2 / 12)
    )


@pytest.mark.parametrize("floor", [0.0, -1.0, float("inf"), float("nan")])
def test_wrong_floors(floor):
    with pytest.raises(ValueError, match="floor"):
        floor_var(floor, torch.tensor(0.01), 1 / 255)


def test_continuous_data_have_no_quantisation():
    with pytest.raises(ValueError, match="digital"):
        floor_var("quantisation", torch.tensor(0.01), None)


@pytest.mark.parametrize("arguments", [(0, 0), (1, -1), (-1, 1), (1, 1, -0.1), (1, 1, 0.1, 0)])
def test_wrong_schedules(arguments):
    with pytest.raises(ValueError, match="StageSchedule needs"):
        StageSchedule(*arguments)
