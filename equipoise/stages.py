r"""Algorithm 1 as a state machine: when a stage ends, why, and which floor the next stage gets.

Stage 1 learns one variance by the closed form, eq. (10). When it has converged, stage 2 predicts a
variance for each pixel and input, eq. (11). The variance of stage 1 sets a floor for it. This
module does not change a model. The training loop reports the figures of each epoch and follows the
decision.
"""

import math
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Floor = float | Literal["quantisation"]


class Stage(IntEnum):
    """Stage of Algorithm 1."""

    SHARED_VARIANCE = 1
    PREDICTED_VARIANCE = 2
    FINISHED = 3


class Decision(NamedTuple):
    """The decision after an epoch.

    Args:
        stage: Stage of the next epoch.
        switched: Whether this stage differs from that of the last epoch.
        reason: One sentence for the log.
    """

    stage: Stage
    switched: bool
    reason: str


class StageSchedule:
    """Decides after each epoch whether the stage continues.

    A stage has converged if the relative changes of the noise variance *and* of the validation ELBO
    are both below ``tolerance`` for ``patience`` epochs in a row. It also ends when the ELBO has
    not risen for ``early_stopping`` epochs, and at its epoch limit. A stage of zero epochs is
    skipped.

    Args:
        stage_1_epochs: Largest number of epochs of stage 1. 0 is for a model that is already
            trained.
        stage_2_epochs: Largest number of epochs of stage 2. With 0 only stage 1 is trained.
        tolerance: Relative change below which a figure counts as settled. With 0 none does.
        patience: Number of epochs in a row that must be settled.
        early_stopping: Number of epochs without a higher validation ELBO after which a stage ends.
            0 is never; None a third of the stage's epochs, and at least 10.

    Raises:
        ValueError: If an argument is outside its domain.

    Example:
        >>> schedule = StageSchedule(stage_1_epochs=2, stage_2_epochs=0)
        >>> schedule.observe(noise_var=0.02, validation_elbo=500.0).reason
        'stage 1: epoch 1 of at most 2'
        >>> decision = schedule.observe(noise_var=0.01, validation_elbo=700.0)
        >>> decision.stage, decision.reason
        (<Stage.FINISHED: 3>, 'stage 1 ended at its limit of 2 epochs')
    """

    def __init__(
        self,
        stage_1_epochs: int,
        stage_2_epochs: int,
        tolerance: float = 1e-3,
        patience: int = 3,
        early_stopping: int | None = None,
    ) -> None:
        if min(stage_1_epochs, stage_2_epochs) < 0 or stage_1_epochs + stage_2_epochs < 1:
            raise ValueError(
                "StageSchedule needs at least one epoch in one stage, "
                f"got {stage_1_epochs} and {stage_2_epochs}."
            )
        if tolerance < 0 or patience < 1:
            raise ValueError(
                "StageSchedule needs tolerance >= 0 and patience >= 1, "
                f"got {tolerance} and {patience}."
            )
        if early_stopping is not None and early_stopping < 0:
            raise ValueError(f"StageSchedule needs early_stopping >= 0, got {early_stopping}.")

        self.epochs = {
            Stage.SHARED_VARIANCE: stage_1_epochs,
            Stage.PREDICTED_VARIANCE: stage_2_epochs,
        }
        self.tolerance = tolerance
        self.patience = patience
        self.early_stopping = early_stopping

        self.stage = Stage.SHARED_VARIANCE if stage_1_epochs else Stage.PREDICTED_VARIANCE
        self.epochs_done = 0
        self.settled = 0
        self.previous: tuple[float, float] | None = None
        self.best = (0, -math.inf)

    def observe(self, noise_var: float, validation_elbo: float) -> Decision:
        """Decide what follows from the figures of an epoch.

        Args:
            noise_var: Mean noise variance, in the squared unit of the data.
            validation_elbo: Validation ELBO, in nats per example.

        Returns:
            The decision for the training loop.

        Raises:
            RuntimeError: If the schedule has already finished.
        """
        if self.stage is Stage.FINISHED:
            raise RuntimeError("The schedule has finished; make a new one to train on.")

        self.epochs_done += 1
        if self._is_settled(noise_var, validation_elbo):
            self.settled += 1
        else:
            self.settled = 0
        self.previous = (noise_var, validation_elbo)
        if validation_elbo >= self.best[1]:
            self.best = (self.epochs_done, validation_elbo)

        limit = self.epochs[self.stage]
        if self.settled >= self.patience:
            return self._advance(
                f"converged at epoch {self.epochs_done}: noise variance and validation ELBO "
                f"changed by less than {self.tolerance:g} for {self.patience} epochs"
            )
        without_gain = self.epochs_done - self.best[0]
        if not self._may_wait(without_gain, limit):
            return self._advance(
                f"stopped at epoch {self.epochs_done}: the validation ELBO has not risen for "
                f"{without_gain} epochs"
            )
        if self.epochs_done >= limit:
            return self._advance(f"ended at its limit of {limit} epochs")

        reason = f"stage {self.stage:d}: epoch {self.epochs_done} of at most {limit}"
        return Decision(self.stage, False, reason)

    def _is_settled(self, noise_var: float, validation_elbo: float) -> bool:
        if self.previous is None:
            return False

        figures = (noise_var, validation_elbo)
        return all(
            abs(new - old) < self.tolerance * max(abs(old), 1e-12)
            for new, old in zip(figures, self.previous, strict=True)
        )

    def _may_wait(self, without_gain: int, limit: int) -> bool:
        if self.early_stopping is None:
            return without_gain < max(10, limit // 3)
        return self.early_stopping == 0 or without_gain < self.early_stopping

    def _advance(self, reason: str) -> Decision:
        last_stage = self.stage
        self.stage = Stage(last_stage + 1)
        if self.stage is Stage.PREDICTED_VARIANCE and self.epochs[self.stage] == 0:
            self.stage = Stage.FINISHED

        self.epochs_done = 0
        self.settled = 0
        self.previous = None
        self.best = (0, -math.inf)

        return Decision(self.stage, True, f"stage {last_stage:d} {reason}")

    def restart(self, stage: Stage, epochs: dict[Stage, int]) -> None:
        """Begin a stage once more after the schedule has finished.

        Args:
            stage: The stage.
            epochs: Epoch limits of the stages from here on.
        """
        self.stage = stage
        self.epochs = dict(epochs)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule as JSON values."""
        return {
            "epochs": list(self.epochs.values()),
            "stage": int(self.stage),
            "epochs_done": self.epochs_done,
            "settled": self.settled,
            "previous": list(self.previous) if self.previous else None,
            # JSON has no infinity.
            "best": list(self.best) if self.best[0] else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a schedule.

        Args:
            state: Result of :meth:`state_dict`.
        """
        self.stage = Stage(state["stage"])
        # Those of a run that was continued differ from its options, which count all epochs.
        limits = state.get("epochs", self.epochs.values())
        self.epochs = dict(zip(self.epochs, limits, strict=True))
        self.epochs_done = state["epochs_done"]
        self.settled = state["settled"]
        self.previous = tuple(state["previous"]) if state["previous"] else None
        best = state.get("best")
        self.best = (best[0], best[1]) if best else (0, -math.inf)


def floor_var(floor: Floor, optimal_var: Tensor, quantum: float | None) -> Tensor:
    r"""Return the floor of the variance in stage 2.

    The floor of the paper is the optimal variance sigma_*^2 (``floor=1``). ``"quantisation"`` is
    the variance of rounding to grey levels, quantum^2 / 12. A variance below it raises the density
    on digital images only because the values are rounded.

    Args:
        floor: A positive multiple of ``optimal_var``, or "quantisation".
        optimal_var: Optimal variance sigma_*^2 of stage 1, eq. (10), of any shape, in the squared
            unit of the data.
        quantum: Distance of two neighbouring values in the unit of the data. None means continuous
            data.

    Returns:
        The floor, of the shape of ``optimal_var``.

    Raises:
        ValueError: If the floor is not positive, or if it is "quantisation" and the data are
            continuous.

    Example:
        >>> floor_var(1.0, torch.tensor(0.0064), quantum=1 / 255)
        tensor(0.0064)
    """
    if floor == "quantisation":
        if quantum is None:
            raise ValueError(
                "floor='quantisation' needs digital data (integers, as 8-bit images); "
                "give a multiple."
            )
        return torch.full_like(optimal_var, quantum**2 / 12)

    if not 0 < floor < math.inf:
        raise ValueError(
            "floor must be a positive multiple of the optimal variance or 'quantisation', "
            f"got {floor!r}."
        )
    return floor * optimal_var
