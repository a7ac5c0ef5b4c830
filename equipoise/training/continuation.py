"""Going on with a finished run for more epochs: where it restarts, and what becomes of its results.

A continuation begins at the last checkpoint. The stage that gets more epochs starts its schedule
anew: warm-up and cosine decay over the epochs that are added, a new optimiser, and the stage's
formulas again at its end. Which epochs those are follows from the checkpoint and the options alone,
so that a continuation that is killed before its first checkpoint begins again in the same place.
"""

import shutil
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.config import CONTINUED, ConfigError, TrainConfig
from equipoise.files import adopt, move, written_names
from equipoise.run import Row, Run
from equipoise.stages import Stage

KEPT_IN_PLACE = ("config.json", "metrics.jsonl", "tracker.json")
"""Files that the run goes on with. The earlier results get a copy of the first two."""


class Continuation(NamedTuple):
    """What is trained after the end of a run.

    Args:
        stage: The stage that goes on.
        epochs: Epoch limits of the stages, of which those before this one do not matter.
    """

    stage: Stage
    epochs: dict[Stage, int]

    def describe(self, *, is_predicted: bool) -> str:
        """Say in sentences what follows.

        Args:
            is_predicted: Whether the run has a predicted variance. Stage 2 starts without one.

        Returns:
            The sentences.
        """
        n = self.epochs[self.stage]
        starts = self.stage is Stage.PREDICTED_VARIANCE and not is_predicted
        text = (
            f"Stage {self.stage:d} {'starts' if starts else 'goes on'} for at most "
            f"{_epochs(n)}, with a new optimiser, warm-up and decay over them."
        )
        later = self.epochs[Stage.PREDICTED_VARIANCE]
        if self.stage is Stage.SHARED_VARIANCE and later:
            text += f" Then stage 2 is trained anew from its result, for at most {_epochs(later)}."
        return text


def changed_epochs(before: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Names of the options by which a run is continued, if these alone have other values.

    Args:
        before: Options that the run was trained with.
        config: Options to go on with.

    Returns:
        The names.
    """
    return [name for name in CONTINUED if before.get(name) != getattr(config, name)]


def plan_continuation(
    history: Sequence[Row], before: Mapping[str, Any], config: TrainConfig
) -> Continuation:
    """Decide what a run does that has finished, and gets other epoch limits.

    A limit counts all epochs of its stage, so that a run of 10 goes on for 30 more with
    ``stage_1_epochs=40``. More epochs of stage 1 make stage 2 start anew, because its variance and
    its floor belong to the optimum of stage 1.

    Args:
        history: The rows of all its epochs.
        before: Options that it was trained with.
        config: Options to go on with.

    Returns:
        What is trained.

    Raises:
        ConfigError: If a limit does not exceed the epochs that were done.

    Example:
        >>> rows = [{"stage": 1}] * 10 + [{"stage": 2}] * 5
        >>> plan = plan_continuation(rows, {}, TrainConfig(stage_1_epochs=40, stage_2_epochs=5))
        >>> plan.describe(is_predicted=True).partition(",")[0]
        'Stage 1 goes on for at most 30 epochs'
    """
    changed = changed_epochs(before, config)
    stage_1_done = sum(row["stage"] == 1 for row in history)
    # Those of a stage 2 that was trained anew are the last ones.
    stage_2_done = sum(1 for _ in takewhile(lambda row: row["stage"] == 2, reversed(history)))

    if "stage_1_epochs" in changed:
        stage, done, limit = Stage.SHARED_VARIANCE, stage_1_done, config.stage_1_epochs
    else:
        stage, done, limit = Stage.PREDICTED_VARIANCE, stage_2_done, config.stage_2_epochs
    if limit <= done:
        raise ConfigError(
            [
                f"stage_{stage:d}_epochs={limit} counts all epochs of the stage, of which the run "
                f"has {done}: give more, or train another run"
            ]
        )

    epochs = {
        Stage.SHARED_VARIANCE: config.stage_1_epochs,
        Stage.PREDICTED_VARIANCE: config.stage_2_epochs,
        stage: limit - done,
    }
    return Continuation(stage, epochs)


def keep_earlier_results(run: Run) -> Path:
    """Move what belongs to the old weights into a run folder of its own, within the run.

    Model, mixture, evaluations, figures and whatever else equipoise has written into the run go
    there, and copies of its options and epochs.

    Args:
        run: The run, which no other job works in.

    Returns:
        The folder, RUN/earlier-1 or the next free number.
    """
    number = 1
    while (run.folder / f"earlier-{number}").exists():
        number += 1
    folder = run.folder / f"earlier-{number}"
    folder.mkdir()

    names = sorted(
        name
        for name in written_names(run.folder)
        if name not in KEPT_IN_PLACE
        and not name.startswith(("checkpoints/", "earlier-"))
        and (run.folder / name).is_file()
    )
    copies = [name for name in KEPT_IN_PLACE[:2] if (run.folder / name).is_file()]
    for name in copies:
        shutil.copy2(run.folder / name, folder / name)
    for name in names:
        move(run.folder / name, folder / name)
    adopt(folder, [*copies, *names])
    return folder


def _epochs(n: int) -> str:
    """Write a number of epochs."""
    return "1 epoch" if n == 1 else f"{n} epochs"
