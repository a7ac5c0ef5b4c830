"""Warnings about a trained model: what its figures say is wrong, and what to do about it."""

import torch
from torch import nn

from equipoise.training.figures import SplitFigures

LARGE_SHARE = 0.98
"""Share of the data's variance from which an error or a noise variance is suspicious."""
FEW_STEPS = 500
"""Number of steps below which a model that is not good is one that has hardly begun."""
LARGE_RATIO = 2.0
"""Ratio of held-out to training residuals' variance from which it is worth a word."""


def warnings_for(
    figures: SplitFigures,
    data_var: float,
    floor_is_expected: bool,
    overfitting: float = 1.0,
    counted_share: float = 1.0,
    n_steps: int = FEW_STEPS,
) -> list[str]:
    """Find what looks wrong with a model at the end of a stage.

    Args:
        figures: Figures on the validation set.
        data_var: Variance of the data, averaged over the dimensions that are not constant, in
            squared model units.
        floor_is_expected: Whether stage 1 has set the floor, so that some pixels lie on it by
            design.
        overfitting: How many times as large as the training residuals' variance that of held-out
            residuals is, see :func:`equipoise.residuals.overfitting_ratio`.
        counted_share: Share of the dimensions that are not constant.
        n_steps: Number of steps of the training so far.

    Returns:
        One warning for each problem.
    """
    warnings = []
    remedy = "train longer, or lower learning_rate"
    if n_steps < FEW_STEPS:
        remedy = f"{n_steps} steps are too few: raise stage_1_epochs, or lower batch_size"

    mse = figures.mse / counted_share
    if mse >= LARGE_SHARE * data_var:
        warnings.append(
            f"Collapse: the reconstruction error {mse:.4g} is no smaller than the data's "
            f"variance {data_var:.4g}, so the model ignores its codes. If the noise variance is "
            f"fixed, lower it; otherwise {remedy}."
        )

    if figures.noise_var >= LARGE_SHARE * data_var:
        warnings.append(
            f"The noise variance {figures.noise_var:.4g} is at or above the data's variance "
            f"{data_var:.4g}, so that the model gains little from its codes. If it is fixed, lower "
            "it, or let it be learned with noise=global."
        )

    if overfitting >= LARGE_RATIO:
        warnings.append(
            f"Overfitting: held-out examples have {overfitting:.1f} times the squared error of the "
            "training examples, which the networks have partly learned by heart. More examples, "
            "weight_decay, a smaller width or fewer epochs lower that."
        )

    if figures.active_units == 0:
        warnings.append(
            "All latent units are inactive: every input is encoded to the prior. Lower the noise "
            f"variance if it is fixed; otherwise {remedy}."
        )

    if figures.floor_share > 0 and not floor_is_expected:
        warnings.append(
            f"The noise variance lies on its floor in {figures.floor_share:.0%} of the dimensions. "
            "The likelihood of these dimensions depends on the floor, not on the data. Constant "
            "dimensions are the usual reason."
        )
    return warnings


_RANGES: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.Hardtanh: (-1.0, 1.0),
    nn.ReLU: (0.0, torch.inf),
    nn.Softplus: (0.0, torch.inf),
}


def range_warning(decoder: nn.Module, low: float, high: float) -> str | None:
    """Check whether the last layer of a decoder can reach all values of the data.

    The decoders of equipoise end in a linear layer, which always can.

    Args:
        decoder: Any decoder.
        low: Smallest value of the data, in model units.
        high: Largest value of the data, in model units.

    Returns:
        A warning, or None if the layer reaches the data or is of an unknown kind.
    """
    last = list(decoder.modules())[-1]
    if type(last) not in _RANGES:
        return None

    lowest, highest = _RANGES[type(last)]
    if lowest <= low and high <= highest:
        return None
    return (
        f"The decoder ends in {type(last).__name__}, which reaches [{lowest:g}, {highest:g}], but "
        f"the data cover [{low:g}, {high:g}]. Values outside the range of the decoder can never be "
        "reconstructed. Rescale the data, or remove that layer."
    )
