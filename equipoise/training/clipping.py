"""Gradient clipping without a number to tune: relative to the gradient's own recent norm."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

MEMORY = 100
"""Steps over which the average norm extends."""


class RelativeClipping(nn.Module):
    """Limit the gradient's norm to a multiple of its running average.

    A fixed limit would have to follow the objective: in nats, its gradient grows with the number of dimensions and
    as the noise variance falls, by orders of magnitude within a run. Nothing here waits for the device.
    After AutoClip (Seetharaman et al., 2020, arXiv 2007.14469), with an average in place of a percentile.

    Args:
        factor: multiple of the average norm at which to clip; infinity never clips.
    """

    average: Tensor
    steps: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter]) -> None:
        """Scale the gradients down if their norm is far above what it has been.

        Args:
            parameters: whose gradients to clip, in place.
        """
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm(
            [parameter.grad for parameter in with_gradient if parameter.grad is not None]
        )
        limit = torch.where(self.steps > 0, self.factor * self.average, norm)
        # On the CPU a look at the norm is free and saves a pass over the gradients; elsewhere it would wait.
        if norm.device.type != "cpu" or norm > limit:
            clip_grads_with_norm_(with_gradient, limit, norm)  # type: ignore[arg-type] # a tensor serves
        self.steps.add_(1).clamp_(max=MEMORY)
        self.average.lerp_(torch.minimum(norm, limit), 1 / self.steps)
