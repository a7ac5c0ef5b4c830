"""What ends a stage of Algorithm 1: the exact closed form (10), and recalibration."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.categories import Likelihood
from equipoise.digital import DigitalGaussian
from equipoise.estimate import Estimate
from equipoise.gaps import observed_values, row_means
from equipoise.gaussian import LOG_2PI
from equipoise.model import VAE
from equipoise.noise import MIN_VAR
from equipoise.residuals import (
    AllReduce,
    ErrorsByStd,
    ResidualQuantiles,
    ResidualVariance,
    StandardisedVariance,
    overfitting_ratio,
)
from equipoise.training.passes import SplitPass


def statistic_residual(model: VAE, residual: Tensor, shape: tuple[int, ...]) -> Tensor:
    r"""Leave the constant columns of a table out of a statistic of residuals.

    Args:
        model: The model.
        residual: x - m(z), (B, \*).
        shape: Shape of the statistic, () or one example's.

    Returns:
        For a statistic over all dimensions, the residuals of those that are not constant. For one
        of each dimension, all residuals; those of a constant column are as large as the others of
        the example are on average, since a variance of zero would outweigh all other columns.
    """
    if model.counted is None:
        return residual
    counted = model.pooled(residual)
    if not shape:
        return counted
    common = row_means(counted.square())[:, None].sqrt()
    return torch.where(model.counted, residual, common)


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
    has_gaps = len(model.shape) == 1
    statistic = ResidualVariance(model.noise.statistic_shape, has_gaps=has_gaps)
    statistic = statistic.to(training.device)
    for terms in training.terms(model, generator):
        statistic.update(statistic_residual(model, terms.residual, model.noise.statistic_shape))

    statistic.all_reduce(all_reduce)
    return statistic.var


SHRINKAGES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Weights of the common variance that are tried where there is a variance per dimension."""


class HeldOutVar(NamedTuple):
    """The closed form (10) over examples that the networks have not learned from.

    Args:
        var: The variance, of the shape of the noise model's statistic, float64, squared model
            units.
        ratio: By how much it was multiplied for that, see
            :func:`equipoise.residuals.overfitting_ratio`.
        measured: The same ratio as it was found, with its standard error over examples.
        shrinkage: Weight of the variance that all dimensions have in common, 0 where there is one
            variance only.
    """

    var: Tensor
    ratio: float
    measured: Estimate
    shrinkage: float


def held_out_var(
    model: VAE,
    training_var: Tensor,
    n_training: int,
    held_out: SplitPass,
    generator: torch.Generator,
    all_reduce: AllReduce,
) -> HeldOutVar:
    r"""Bring eq. (10) of the training residuals to the size of held-out residuals.

    .. math:: \sigma_i^2 = r_a \bigl((1 - a)\,\sigma_{*i}^2
        + a\,\overline{\sigma_*^2}\bigr)

    Here :math:`\sigma_{*i}^2` is the variance of the training residuals, and r the ratio of
    :func:`equipoise.residuals.overfitting_ratio`. With one variance for all, the result is eq. (10)
    over the held-out examples. With one per dimension there are too few of these for that. They
    decide on two numbers: r, and the weight a of the common variance, which is that of highest
    held-out likelihood

    .. math:: -\tfrac12 \Bigl(\frac1D \sum_i \log\sigma_i^2 + \frac{c_a}{r_a}\Bigr)

    No variance lies below what a single residual of the common size would make it, which is
    :math:`\overline{\sigma_*^2} / (N + 1)` for N training examples. Otherwise a dimension that was
    constant there would decide on the density of every example in which it is not.

    Args:
        model: The model, with the networks standing still.
        training_var: What :func:`exact_optimal_var` returned.
        n_training: Number of examples that it comes from.
        held_out: Examples that the networks were not trained on.
        generator: Source of one sample of z per example.
        all_reduce: Sums over processes.

    Returns:
        The variance, and how it was found.
    """
    weights = SHRINKAGES if training_var.numel() > 1 else SHRINKAGES[:1]

    def counted(var: Tensor) -> Tensor:
        """Select the variances of the dimensions that are not constant."""
        return model.pooled(var[None])[0] if var.shape == model.shape else var

    common = counted(training_var).mean()
    floor = model.noise.floor_var.double().to(training_var.device)
    smallest = torch.maximum(floor, common / (n_training + 1))
    smallest = smallest.clamp_min(torch.finfo(torch.float64).tiny)
    candidates = [
        ((1 - weight) * training_var + weight * common).clamp_min(smallest) for weight in weights
    ]

    statistics = [StandardisedVariance().to(held_out.device) for _ in candidates]
    for terms in held_out.terms(model, generator):
        for statistic, var in zip(statistics, candidates, strict=True):
            statistic.update(model.pooled(terms.residual), counted(var).log())

    found: list[tuple[float, HeldOutVar]] = []
    for statistic, var, weight in zip(statistics, candidates, weights, strict=True):
        statistic.all_reduce(all_reduce)
        measured = statistic.estimate()
        ratio = overfitting_ratio(measured)
        log_likelihood = -float((ratio * counted(var)).log().mean()) - measured.value / ratio
        found.append((log_likelihood, HeldOutVar(ratio * var, ratio, measured, weight)))
    return max(found, key=lambda pair: pair[0])[1]


class Prediction(NamedTuple):
    """What a variance for each input is worth, against the one variance that it came from.

    Args:
        gain: Log-likelihood of held-out examples over that with the variance of stage 1, nats per
            example.
        shared_var: The shared variance, eq. (10) over the held-out examples, of the shape of the
            reference, float64.
    """

    gain: Estimate
    shared_var: Tensor


@torch.no_grad()
def worth_of_prediction(
    model: VAE, held_out: SplitPass, generator: torch.Generator, all_reduce: AllReduce
) -> Prediction:
    r"""Compare the predicted variance with a shared one, around the same means.

    .. math:: \log p(x_n|z_n) + \tfrac12 \Bigl(\sum_i \log 2\pi\sigma_{*i}^2 + D\,c_n\Bigr)

    sigma_*^2 is the variance of stage 1, and c_n the mean squared residual of an example in its
    units. The shared variance that may take the place of the prediction is
    :math:`\bar c\,\sigma_*^2`, eq. (10) for the means as they are now.

    Args:
        model: A model with a predicted variance, and the networks standing still.
        held_out: Examples that the networks were not trained on.
        generator: Source of one sample of z per example.
        all_reduce: Sums over processes.

    Returns:
        The gain, and the shared variance.

    Raises:
        ValueError: if the model's noise has no shared variance.
    """
    reference = model.noise.shared_log_var
    if reference is None:
        raise ValueError("the noise model has no shared variance to compare with")

    dimensions = math.prod(model.shape)
    is_table = len(model.shape) == 1
    normalisers = reference.double() + LOG_2PI
    moments = torch.zeros(3, 3, dtype=torch.float64, device=held_out.device)
    counted = torch.zeros(2, dtype=torch.float64, device=held_out.device)
    for terms in held_out.terms(model, generator):
        squared = terms.residual.double().square() * torch.exp(-reference.double())
        if is_table:
            sizes = observed_values(row_means(model.pooled(squared))[:, None])
            counted += torch.stack([sizes.sum(), counted.new_tensor(float(len(sizes)))])
        # A missing value adds nothing to either of the likelihoods.
        size = torch.where(squared.isnan(), -normalisers, squared).flatten(1).mean(1)
        density = terms.log_likelihood.double() - terms.log_probability
        row = torch.stack([torch.ones_like(size), density, size])
        moments += row @ row.mT

    moments = all_reduce(moments)
    n = int(moments[0, 0])
    mean_size = moments[0, 2] / n
    if is_table:
        total, n_counted = all_reduce(counted)
        mean_size = total / n_counted
    normaliser = normalisers.mean()

    # The gain is linear in the two figures of an example.
    weights = moments.new_tensor([float(normaliser) * dimensions / 2, 1.0, dimensions / 2])
    mean = float(weights @ moments[0] / n)
    square = float(weights @ moments @ weights / n)
    error = math.sqrt(max(0.0, square - mean**2) / (n - 1)) if n > 1 else None
    return Prediction(Estimate(mean, error, n), mean_size * reference.double().exp())


@torch.no_grad()
def digital_log_probabilities(
    model: VAE, held_out: SplitPass, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""Compute the log-probabilities of levels under the predicted variance and under a shared one.

    .. math:: \log P(x_n|m(z_n), \sigma_*^2) \quad\text{and}\quad \log P(x_n|m(z_n), \sigma^2(z_n))

    A prediction that was trained for levels is judged by them: its density may be far too narrow.

    Args:
        model: A model of digital data with a predicted variance, the networks standing still.
        held_out: Examples that the networks were not trained on.
        generator: Source of one sample of z per example.

    Returns:
        With the variance sigma_*^2 of stage 1, and with the predicted one, (N,) each, nats.

    Raises:
        ValueError: if the data are not digital, or the noise has no shared variance.
    """
    levels, reference = model.levels, model.noise.shared_log_var
    if levels is None or reference is None:
        raise ValueError("levels of digital data and a shared variance are needed")

    shared: list[Tensor] = []
    predicted: list[Tensor] = []
    model.eval()
    for batch, x in enumerate(held_out.epoch()):
        z = model.encode(x).sample(held_out.draws(generator, batch))
        mean, context = model.mean_and_context(z)
        log_vars = (reference.expand_as(mean), model.noise(context).expand_as(mean))
        for log_var, found in zip(log_vars, (shared, predicted), strict=True):
            found.append(DigitalGaussian(mean, log_var, levels).log_prob(x))
    model.train()
    return torch.cat(shared), torch.cat(predicted)


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
        has_gaps = len(model.shape) == 1
        statistic = ResidualVariance(noise.calibration_shape, has_gaps=has_gaps)
        statistic = statistic.to(held_out.device)
        for terms in held_out.terms(model, generator):
            standardised = terms.residual * torch.exp(-0.5 * terms.log_var)
            statistic.update(statistic_residual(model, standardised, noise.calibration_shape))
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
        counts = varying.expand_as(x) & ~x.isnan()
        if model.levels is not None:
            counts = counts & ~model.levels.agree_on_bound(x, reconstruction.mean)
        std = reconstruction.std.expand_as(x)
        errors.update((x - reconstruction.mean)[counts], std[counts])

    errors.all_reduce(all_reduce)
    return errors


def _reconstructions(model: VAE, held_out: SplitPass) -> Iterator[tuple[Tensor, Likelihood]]:
    """Reconstruct a split, as std and intervals are shown: of posterior means, not samples of z."""
    model.eval()
    for x in held_out.epoch():
        yield x, model.reconstruct(x)
    model.train()
