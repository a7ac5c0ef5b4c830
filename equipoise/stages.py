r"""Algorithm 1 as a pure state machine: when to leave a stage, why, and which floor to hand over.

Stage 1 learns one variance by the closed form (10). When it has converged, stage 2 predicts a variance per
pixel and input (11), bounded below by what stage 1 found. Nothing here touches a model: the loop reports an
epoch's figures and obeys the decision.
"""

import math
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Floor = float | Literal["quantisation"]


class Stage(IntEnum):
    """Where Algorithm 1 stands."""

    SHARED_VARIANCE = 1
    PREDICTED_VARIANCE = 2
    FINISHED = 3


class Decision(NamedTuple):
    """What follows from an epoch.

    Args:
        stage: the stage that the next epoch belongs to.
        switched: whether it differs from the epoch before.
        reason: one sentence for the log.
    """

    stage: Stage
    switched: bool
    reason: str


class StageSchedule:
    """Decide after each epoch whether the stage goes on.

    A stage has converged once the relative changes of the noise variance *and* of the validation ELBO have both
    stayed below ``tolerance`` for ``patience`` epochs in a row; it also ends at its epoch limit. A stage of zero
    epochs is skipped.

    Args:
        stage_1_epochs: epoch limit of stage 1; 0 for a model that is trained already.
        stage_2_epochs: epoch limit of stage 2; 0 trains stage 1 only.
        tolerance: relative change below which a figure counts as settled; 0 never ends a stage early.
        patience: epochs in a row that must be settled.

    Raises:
        ValueError: if an argument is out of its domain.

    Example:
        >>> schedule = StageSchedule(stage_1_epochs=2, stage_2_epochs=0)
        >>> schedule.observe(noise_var=0.02, validation_elbo=500.0).reason
        'stage 1: epoch 1 of at most 2'
        >>> schedule.observe(noise_var=0.01, validation_elbo=700.0)
        Decision(stage=<Stage.FINISHED: 3>, switched=True, reason='stage 1 ended at its limit of 2 epochs')
    """

    def __init__(
        self, stage_1_epochs: int, stage_2_epochs: int, tolerance: float = 1e-3, patience: int = 3
    ) -> None:
        if min(stage_1_epochs, stage_2_epochs) < 0 or stage_1_epochs + stage_2_epochs < 1:
            raise ValueError(
                f"StageSchedule needs at least one epoch in one stage, got {stage_1_epochs} and {stage_2_epochs}."
            )
        if tolerance < 0 or patience < 1:
            raise ValueError(
                f"StageSchedule needs tolerance >= 0 and patience >= 1, got {tolerance} and {patience}."
            )
        self.epochs = {
            Stage.SHARED_VARIANCE: stage_1_epochs,
            Stage.PREDICTED_VARIANCE: stage_2_epochs,
        }
        self.tolerance = tolerance
        self.patience = patience
        self.stage = Stage.SHARED_VARIANCE if stage_1_epochs else Stage.PREDICTED_VARIANCE
        self.epochs_done = 0
        self.settled = 0
        self.previous: tuple[float, float] | None = None

    def observe(self, noise_var: float, validation_elbo: float) -> Decision:
        """Take in an epoch's figures.

        Args:
            noise_var: mean noise variance, in the squared unit of the data.
            validation_elbo: nats per example.

        Returns:
            What the loop does next.

        Raises:
            RuntimeError: if the schedule has finished already.
        """
        if self.stage is Stage.FINISHED:
            raise RuntimeError("The schedule has finished; make a new one to train on.")
        self.epochs_done += 1
        self.settled = self.settled + 1 if self._is_settled(noise_var, validation_elbo) else 0
        self.previous = (noise_var, validation_elbo)
        limit = self.epochs[self.stage]
        if self.settled >= self.patience:
            change = f"changed by less than {self.tolerance:g} for {self.patience} epochs"
            return self._advance(
                f"converged at epoch {self.epochs_done}: noise variance and validation ELBO {change}"
            )
        if self.epochs_done >= limit:
            return self._advance(f"ended at its limit of {limit} epochs")
        return Decision(
            self.stage, False, f"stage {self.stage:d}: epoch {self.epochs_done} of at most {limit}"
        )

    def _is_settled(self, noise_var: float, validation_elbo: float) -> bool:
        if self.previous is None:
            return False
        now, before = (noise_var, validation_elbo), self.previous
        return all(
            abs(new - old) < self.tolerance * max(abs(old), 1e-12)
            for new, old in zip(now, before, strict=True)
        )

    def _advance(self, how: str) -> Decision:
        ended = self.stage
        self.stage = Stage(ended + 1)
        if self.stage is Stage.PREDICTED_VARIANCE and self.epochs[self.stage] == 0:
            self.stage = Stage.FINISHED
        self.epochs_done = self.settled = 0
        self.previous = None
        return Decision(self.stage, True, f"stage {ended:d} {how}")

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, as JSON values."""
        return {
            "stage": int(self.stage),
            "epochs_done": self.epochs_done,
            "settled": self.settled,
            "previous": list(self.previous) if self.previous else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where :meth:`state_dict` was taken.

        Args:
            state: what :meth:`state_dict` returned.
        """
        self.stage = Stage(state["stage"])
        self.epochs_done = state["epochs_done"]
        self.settled = state["settled"]
        self.previous = tuple(state["previous"]) if state["previous"] else None


def floor_var(floor: Floor, optimal_var: Tensor, quantum: float | None) -> Tensor:
    r"""Floor that stage 1 hands to stage 2.

    The paper's is the optimal variance sigma_*^2 itself (``floor=1``). ``"quantisation"`` is the variance of
    rounding to grey levels, quantum^2 / 12: below it, a density on digital images is rewarded for nothing but
    knowing the rounding.

    Args:
        floor: a positive multiple of ``optimal_var``, or "quantisation".
        optimal_var: sigma_*^2 of stage 1, eq. (10), of any shape, in the squared unit of the data.
        quantum: distance of two neighbouring values in the unit of the data; None for continuous data.

    Returns:
        The floor, of the shape of ``optimal_var``.

    Raises:
        ValueError: if the floor is not positive, or "quantisation" is asked of continuous data.

    Example:
        >>> floor_var(1.0, torch.tensor(0.0064), quantum=1 / 255)
        tensor(0.0064)
    """
    if floor == "quantisation":
        if quantum is None:
            raise ValueError(
                "floor='quantisation' needs digital data (integers, as 8-bit images); give a multiple."
            )
        return torch.full_like(optimal_var, quantum**2 / 12)
    if not 0 < floor < math.inf:
        raise ValueError(
            f"floor must be a positive multiple of the optimal variance or 'quantisation', got {floor!r}."
        )
    return floor * optimal_var
