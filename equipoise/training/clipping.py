"""Gradient clipping relative to the recent norm of the gradient, which needs no tuning."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

MEMORY = 100
"""Number of steps over which the norm is averaged."""


class RelativeClipping(nn.Module):
    """Limits the norm of the gradient to a multiple of its running average.

    A fixed limit would have to follow the objective. The gradient of an objective in nats grows
    with the number of dimensions and with falling noise variance, by orders of magnitude within a
    run. The method is AutoClip (Seetharaman et al., 2020, arXiv 2007.14469), with an average in
    place of a percentile. It does not wait for the device.

    Args:
        factor: Multiple of the average norm at which gradients are clipped. Infinity never clips.
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
        """Scale the gradients down if their norm is far above its average.

        Args:
            parameters: Parameters whose gradients are clipped in place.
        """
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm(
            [parameter.grad for parameter in with_gradient if parameter.grad is not None]
        )
        limit = torch.where(self.steps > 0, self.factor * self.average, norm)

        # On the CPU the comparison saves a pass over the gradients. Another device would have to
        # be waited for.
        if norm.device.type != "cpu" or norm > limit:
            clip_grads_with_norm_(with_gradient, limit, norm)  # type: ignore[arg-type] # a tensor

        self.steps.add_(1).clamp_(max=MEMORY)
        self.average.lerp_(torch.minimum(norm, limit), 1 / self.steps)
