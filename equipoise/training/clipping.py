"""Gradient clipping relative to the recent norm of the gradient, which needs no tuning."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

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
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        limit = torch.where(self.steps > 0, self.factor * self.average, norm)

        # On the CPU the comparison saves a pass over the gradients. Another device would have to
        # be waited for.
        if norm.device.type != "cpu" or norm > limit:
            # torch's clip_grads_with_norm_ would wait for the device to read the limit.
            factor = (limit * (norm + 1e-6).reciprocal()).clamp_(max=1.0)
            torch._foreach_mul_(gradients, factor)

        self.steps.add_(1).clamp_(max=MEMORY)
        self.average.lerp_(torch.minimum(norm, limit), 1 / self.steps)
