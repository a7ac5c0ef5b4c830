"""The weights of the best epoch of a stage, by the validation ELBO, and what they gain."""

import math
from typing import Any

import torch
from torch import Tensor

from equipoise.estimate import Estimate
from equipoise.model import VAE
from equipoise.residuals import AllReduce


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

        Raises:
            ValueError: if no epoch was observed.
        """
        if self.weights is None:
            raise ValueError("no epoch was observed, and there are no weights to put back")
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


def paired_gain(first: Tensor, second: Tensor, all_reduce: AllReduce) -> Estimate:
    r"""Average the difference of two figures of the same examples.

    .. math:: \bar d = \frac1N \sum_n (b_n - a_n), \qquad
        \mathrm{se}^2 = \frac{\overline{d^2} - \bar d^2}{N - 1}

    Args:
        first: The figure a of each example of this process, (N_p,).
        second: The figure b of the same examples, (N_p,).
        all_reduce: Sums over processes.

    Returns:
        The mean difference over all processes, with its standard error over examples.
    """
    gains = second.double() - first.double()
    sums = torch.stack([torch.ones_like(gains).sum(), gains.sum(), gains.square().sum()])
    n, total, squares = all_reduce(sums).tolist()

    mean = total / n
    error = math.sqrt(max(0.0, squares / n - mean**2) / (n - 1)) if n > 1 else None
    return Estimate(mean, error, int(n))
