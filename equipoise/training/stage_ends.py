"""What ends a stage of Algorithm 1: the exact closed form (10), and recalibration."""

from collections.abc import Iterator

import torch
from torch import Tensor

from equipoise.gaussian import Gaussian
from equipoise.model import VAE
from equipoise.noise import MIN_VAR
from equipoise.residuals import AllReduce, ErrorsByStd, ResidualQuantiles, ResidualVariance
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
    """Calibrate the predicted std on held-out data as asked for, and then the intervals.

    Args:
        model: The model, whose noise is changed.
        held_out: Data that the model was not trained on.
        varying: True for the dimensions that vary, of one example's shape. The intervals are
            calibrated on these, and a monotone map on their values off the bounds.
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

    if option == "monotone":
        noise.forget_calibration()
        errors = _errors_by_std(model, held_out, varying, all_reduce)
        if not errors.count:
            return [
                "The predicted std are not recalibrated: no held-out value that varies lies off "
                "the bounds of the data."
            ]
        quantum = model.scaling.quantum
        noise.calibrate_std(errors, MIN_VAR if quantum is None else quantum**2 / 12)

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
    """Collect the residuals of the dimensions that vary, in predicted std."""
    quantiles = ResidualQuantiles().to(held_out.device)
    for x, reconstruction in _reconstructions(model, held_out):
        standardised = (x - reconstruction.mean) / reconstruction.std
        quantiles.update(standardised[:, varying])

    quantiles.all_reduce(all_reduce)
    return quantiles


@torch.no_grad()
def _errors_by_std(
    model: VAE, held_out: SplitPass, varying: Tensor, all_reduce: AllReduce
) -> ErrorsByStd:
    """Collect the residuals of the dimensions that vary, where they are off the bounds."""
    errors = ErrorsByStd().to(held_out.device)
    for x, reconstruction in _reconstructions(model, held_out):
        counts = varying & model.off_bounds(x, reconstruction.mean)
        std = reconstruction.std.expand_as(x)
        errors.update((x - reconstruction.mean)[counts], std[counts])

    errors.all_reduce(all_reduce)
    return errors


def _reconstructions(model: VAE, held_out: SplitPass) -> Iterator[tuple[Tensor, Gaussian]]:
    """Reconstruct a split, as std and intervals are shown: of posterior means, not samples of z."""
    model.eval()
    for x in held_out.epoch():
        yield x, model.reconstruct(x)
    model.train()
