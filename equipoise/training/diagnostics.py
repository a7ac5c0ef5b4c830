"""Warnings that save a day: what a trained model's figures say is wrong, and what to do about it."""

import torch
from torch import nn

from equipoise.training.figures import SplitFigures


def warnings_for(figures: SplitFigures, data_var: float, floor_is_expected: bool) -> list[str]:
    """What looks wrong with a model at the end of a stage.

    Args:
        figures: on the validation set.
        data_var: mean over the dimensions of the data's variance, squared model units.
        floor_is_expected: whether the floor was set by stage 1, so that pixels on it are by design.

    Returns:
        One sentence each.
    """
    found = []
    if figures.mse >= 0.98 * data_var:
        found.append(
            f"Collapse: the reconstruction error {figures.mse:.4g} is no smaller than the data's variance "
            f"{data_var:.4g}, so the model ignores its codes. If the noise variance is fixed, lower it; otherwise "
            "train longer, or lower learning_rate."
        )
    if figures.noise_var >= 0.98 * data_var:
        found.append(
            f"The noise variance {figures.noise_var:.4g} is at or above the data's variance {data_var:.4g}: little "
            "makes the model use its codes. If it is fixed, lower it, or let it be learned with noise=global."
        )
    if figures.active_units == 0:
        found.append(
            "All latent units are inactive: every input is encoded to the prior. Lower the noise variance or "
            "learning_rate, or train longer."
        )
    if figures.floor_share > 0 and not floor_is_expected:
        found.append(
            f"The noise variance lies on its floor in {figures.floor_share:.0%} of the dimensions; the likelihood "
            "there tells of the floor, not of the data. Constant dimensions are the usual reason."
        )
    return found


_RANGES: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.Hardtanh: (-1.0, 1.0),
    nn.ReLU: (0.0, torch.inf),
    nn.Softplus: (0.0, torch.inf),
}


def range_warning(decoder: nn.Module, low: float, high: float) -> str | None:
    """Tell whether the decoder's last layer can reach the data; ours are linear and always can.

    Args:
        decoder: any decoder.
        low: smallest value of the data, model units.
        high: largest value of the data, model units.

    Returns:
        A sentence, or None if the range is fine or unknown.
    """
    last = list(decoder.modules())[-1]
    reach = _RANGES.get(type(last))
    if reach is None or (reach[0] <= low and high <= reach[1]):
        return None
    return (
        f"The decoder ends in {type(last).__name__}, which reaches [{reach[0]:g}, {reach[1]:g}], but the data cover "
        f"[{low:g}, {high:g}]: what lies outside can never be reconstructed. Rescale the data or drop that layer."
    )
