"""In which values an example is odd: what each of them costs in nats."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from equipoise.categories import MixedLikelihood, numeric_part
from equipoise.model import VAE

ENCODED_AT_ONCE = 256
"""Examples that are explained at once."""
REGIONS = 8
"""Regions along each side of an image, of which the one that costs most is named."""
AXES = {1: ("t",), 2: ("y", "x"), 3: ("z", "y", "x")}
"""Names of the axes of signals, images and volumes."""


class Explanation(NamedTuple):
    r"""What makes examples odd.

    Args:
        nats: What each value costs of the log-density of its example, (n, \*), at least 0. A
            missing value costs nothing.
        code: What the code costs, KL(q(z|x), N(0, I)), (n,): the part of an example that is
            reconstructed, however unusual it is.
        names: Names of the columns of a table, or their numbers; empty for images.
    """

    nats: Float32[np.ndarray, "n *event"]
    code: Float32[np.ndarray, " n"]
    names: tuple[str, ...]


@torch.no_grad()
def explain(model: VAE, raw: Tensor) -> Explanation:
    r"""Divide the distance of examples from their reconstructions among their values.

    .. math:: \tfrac12 \frac{(x_i - m_i)^2}{\sigma_i^2} = \max_{x'} \log N(x'; m_i, \sigma_i^2)
        - \log N(x_i; m_i, \sigma_i^2)

    A category costs :math:`\log p_\mathrm{max} - \log p`, the difference from its most probable
    level. Mean, std and p are those of p(x|z) at the posterior mean. The std are of single
    values, also if the errors of a row are correlated.

    Args:
        model: The model, in evaluation mode.
        raw: Examples in raw units, (n, \*).

    Returns:
        Nats per value and per code.

    Example:
        >>> vae = VAE.build((3,), latent_dim=1).eval()
        >>> found = explain(vae, torch.tensor([[0.0, 9.0, torch.nan]]))
        >>> found.nats[0].argmax(), found.nats[0, 2], found.names
        (np.int64(1), np.float32(0.0), ('0', '1', '2'))
    """
    nats, code = [], []
    for x in torch.split(model.scaling(raw), ENCODED_AT_ONCE):
        posterior = model.encode(x)
        likelihood = model.decode(posterior.mean)
        numeric, numbers = numeric_part(likelihood, x)
        cost = ((numbers - numeric.mean) / numeric.std).square() / 2
        if isinstance(likelihood, MixedLikelihood):
            own, best = likelihood.own_and_best(x)
            cost = torch.where(likelihood.categories.is_category, best - own, cost)
        nats.append(torch.where(x.isnan(), 0.0, cost))
        code.append(posterior.kl())

    names: tuple[str, ...] = ()
    if len(model.shape) == 1:
        names = model.scaling.columns or tuple(map(str, range(model.shape[0])))
    return Explanation(torch.cat(nats).numpy(), torch.cat(code).numpy(), names)


def worst_regions(model: VAE, raw: Tensor) -> list[str]:
    r"""Name the region of each image, signal or volume that costs most, of 8 along each side.

    Args:
        model: The model, in evaluation mode, of examples (C, \*).
        raw: Examples in raw units, (n, C, \*).

    Returns:
        For each such as "y 12-15, x 4-7: 31.2 nats", with the numbers of the first and the last
        pixel. The nats are those of :func:`explain`, summed over channels and pixels.

    Example:
        >>> vae = VAE.build((1, 16, 16), latent_dim=1, width=4).eval()
        >>> image = torch.zeros(1, 1, 16, 16)
        >>> image[0, 0, 12, 5] = 9.0
        >>> worst_regions(vae, image)[0].partition(":")[0]
        'y 12-13, x 4-5'
    """
    nats = explain(model, raw).nats.sum(1)
    sides = nats.shape[1:]
    starts = [np.arange(min(REGIONS, side)) * side // min(REGIONS, side) for side in sides]
    for axis, its_starts in enumerate(starts, 1):
        nats = np.add.reduceat(nats, its_starts, axis)

    texts = []
    for example in nats:
        place = np.unravel_index(int(example.argmax()), example.shape)
        parts = []
        for name, k, its_starts, side in zip(AXES[len(sides)], place, starts, sides, strict=True):
            end = its_starts[k + 1] if k + 1 < len(its_starts) else side
            parts.append(f"{name} {its_starts[k]}-{end - 1}")
        texts.append(f"{', '.join(parts)}: {example[place]:.1f} nats")
    return texts
