"""The weights of the best epoch of a stage, by the validation ELBO."""

import math
from typing import Any

from torch import Tensor

from equipoise.model import VAE


class BestWeights:
    """Remembers the weights of the epoch with the highest validation ELBO.

    The validation examples and their noise are the same in all epochs, so that the comparison is
    one of weights. Of equal epochs the later one counts, because its learning rate was lower.

    Attributes:
        elbo: The highest validation ELBO so far, nats per example.
        epoch: Its epoch, counted from the start of the run; 0 before the first.
        weights: The model's state after that epoch.
    """

    def __init__(self) -> None:
        self.elbo = -math.inf
        self.epoch = 0
        self.weights: dict[str, Tensor] | None = None

    def observe(self, epoch: int, elbo: float, model: VAE) -> None:
        """Look at an epoch that has ended.

        Args:
            epoch: Its number, counted from the start of the run.
            elbo: Its validation ELBO, nats per example.
            model: The model that has this ELBO, which is copied if it is the best.
        """
        if elbo < self.elbo:
            return
        self.elbo, self.epoch = elbo, epoch
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    def put_back(self, model: VAE) -> None:
        """Give a model the best weights, with the noise variance that belongs to them.

        Args:
            model: The model, which is changed in place.
        """
        if self.weights is not None:
            model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as numbers and tensors, after the first epoch.

        Returns:
            A tree for :meth:`load_state_dict`.
        """
        return {"elbo": self.elbo, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where :meth:`state_dict` was taken.

        Args:
            state: What it returned.
        """
        self.elbo, self.epoch, self.weights = state["elbo"], state["epoch"], state["weights"]
