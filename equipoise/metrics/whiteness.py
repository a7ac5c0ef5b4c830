"""Whether the errors of a model are white, and what the knowledge of their correlation is worth."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.categories import numeric_part
from equipoise.correlation import BandCovariance, CorrelatedGaussian
from equipoise.estimate import Estimate
from equipoise.gaussian import Gaussian
from equipoise.model import VAE


class Whiteness(NamedTuple):
    """Spectra of standardised residuals, and the gain by their correlation.

    Args:
        before: mean variance of (x - m(z)) / s(z) in each band of frequencies, lowest first,
            (bands,). It is one everywhere if the errors are independent and the std s(z) is right.
            None for tables.
        after: the same of the whitened residuals, one everywhere if the correlation is right. None
            for tables, and for models whose errors are independent.
        correlation_gain: log p(x|z) less that of independent errors of the same std, nats. None for
            models whose errors are independent.
    """

    before: NDArray[np.float64] | None
    after: NDArray[np.float64] | None
    correlation_gain: Estimate | None


@torch.no_grad()
def whiteness(
    model: VAE, batches: Iterable[Tensor], generator: torch.Generator | None = None
) -> Whiteness:
    r"""Compare the residuals of a model before and after whitening.

    Args:
        model: the model, in evaluation mode.
        batches: raw data, (B, \*) each, on the model's device.
        generator: source of randomness for one sample of z per example.

    Returns:
        Spectra and gain.
    """
    has_bands = len(model.shape) == 3
    spectra: list[BandCovariance] = []
    if has_bands:
        spectra = [BandCovariance(model.shape).to(model.scaling.scale.device) for _ in range(2)]

    gains = []
    for raw in batches:
        x = model.scaling(raw)
        decoded = model.decode(model.encode(x).sample(generator))
        likelihood, x = numeric_part(decoded, x)
        residuals = [(x - likelihood.mean) / likelihood.std]

        if isinstance(likelihood, CorrelatedGaussian):
            independent = Gaussian(likelihood.mean, likelihood.log_var)
            gains.append(likelihood.log_prob(x) - independent.log_prob(x))
            residuals.append(likelihood.correlation.whiten(residuals[0]))
        for spectrum, residual in zip(spectra, residuals, strict=False):
            spectrum.update(residual)

    of_bands = [_mean_over_colours(spectrum) for spectrum in spectra if spectrum.count > 0]
    before, after = (*of_bands, None, None)[:2]
    gain = Estimate.of_mean(torch.cat(gains)) if gains else None
    return Whiteness(before, after, gain)


def _mean_over_colours(spectrum: BandCovariance) -> NDArray[np.float64]:
    values: NDArray[np.float64] = spectrum.covariance.diagonal(dim1=1, dim2=2).mean(1).cpu().numpy()
    return values
