"""What ends a stage of Algorithm 1: the exact closed form (10), and recalibration."""

import torch
from torch import Tensor

from equipoise.model import VAE
from equipoise.residuals import AllReduce, ResidualQuantiles, ResidualVariance
from equipoise.training.passes import SplitPass


def exact_optimal_var(
    model: VAE, training: SplitPass, generator: torch.Generator, all_reduce: AllReduce
) -> Tensor:
    r"""Compute eq. (10) in one pass over the training set, with the networks standing still.

    .. math:: \sigma_*^2 = \frac1{ND} \sum_n \mathrm{E}_{q(z|x_n)} \sum_i (x_{ni} - m_i(z))^2

    Args:
        model: The model.
        training: The training set.
        generator: Source of one sample of z per example.
        all_reduce: Sums over processes.

    Returns:
        The variance, of the shape of the noise model's statistic, float64, squared model units.
    """
    statistic = ResidualVariance(model.noise.statistic_shape).to(training.device)
    for terms in training.terms(model, generator):
        statistic.update(terms.residual)

    statistic.all_reduce(all_reduce)
    return statistic.var


def recalibrate(
    model: VAE,
    held_out: SplitPass,
    varying: Tensor,
    option: str,
    generator: torch.Generator,
    all_reduce: AllReduce,
) -> list[str]:
    """Rescale the predicted std on held-out data as asked for, and calibrate the intervals.

    Args:
        model: The model, whose noise is changed.
        held_out: Data that the model was not trained on.
        varying: True for the dimensions that vary, of one example's shape. The intervals are
            calibrated on these.
        option: Option ``recalibrate``.
        generator: Source of one sample of z per example.
        all_reduce: Sums over processes.

    Returns:
        Sentences that say what was done.
    """
    noise = model.noise
    examples = f"{held_out.n_examples:,} held-out examples"

    if option in ("scale", "dimension"):
        statistic = ResidualVariance(noise.calibration_shape).to(held_out.device)
        for terms in held_out.terms(model, generator):
            statistic.update(terms.residual * torch.exp(-0.5 * terms.log_var))
        statistic.all_reduce(all_reduce)
        noise.recalibrate(statistic)

    messages = []
    if varying.any():
        quantiles = _standardised_residuals(model, held_out, varying, all_reduce)
        noise.calibrate_intervals(quantiles, rescale=option == "coverage")
        factors = ", ".join(f"{noise.interval_factor(n_std):.2f}" for n_std in (1.0, 2.0, 3.0))
        messages.append(
            f"Within {factors} predicted std lie .683, .954 and .997 of the errors of {examples}."
        )

    if option != "none":
        scale = noise.calibration_scale
        messages.insert(0, f"Recalibrated the predicted std on {examples}: x {scale:.3f}.")
    return messages


@torch.no_grad()
def _standardised_residuals(
    model: VAE, held_out: SplitPass, varying: Tensor, all_reduce: AllReduce
) -> ResidualQuantiles:
    """Collect the residuals of reconstructions, which std and intervals are shown beside.

    Reconstructions decode the posterior mean, and not a sample of z.
    """
    quantiles = ResidualQuantiles().to(held_out.device)

    model.eval()
    for x in held_out.epoch():
        reconstruction = model.reconstruct(x)
        standardised = (x - reconstruction.mean) / reconstruction.std
        quantiles.update(standardised[:, varying])
    model.train()

    quantiles.all_reduce(all_reduce)
    return quantiles
