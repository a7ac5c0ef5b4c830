"""Scores of single rows: their density, its rarity among held-out rows, and where they differ."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from equipoise.categories import MixedLikelihood, numeric_part
from equipoise.conformal import conformal_p_values
from equipoise.held_out import (
    FEWEST_AT_ONCE,
    MIN_REFERENCE,
    Reference,
    held_out_by_gaps,
    log_densities,
)
from equipoise.metrics.explanation import worst_regions
from equipoise.model import VAE
from equipoise.objectives import LogPrior

WORST_COLUMNS = 3
"""Columns that are named for each row."""


class RowScores(NamedTuple):
    """What is known of each row.

    Args:
        score: Bound on the log-density of the observed values, raw units, nats, (n,).
        p_value: Share of held-out rows that are as odd, (n,), see
            :func:`equipoise.conformal.conformal_p_values`.
        worst: The columns that differ most from their reconstruction, in predicted std; of
            categories, in nats. Of an image, the region.
    """

    score: Float64[np.ndarray, " n"]
    p_value: Float64[np.ndarray, " n"]
    worst: list[str]


def score_rows(
    model: VAE,
    raw: Tensor,
    reference: Tensor | None,
    log_prior: LogPrior,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    complete: Reference | None = None,
    fewest: int = MIN_REFERENCE,
) -> RowScores:
    r"""Score rows of a table, or images, and compare them with held-out ones of the same gaps.

    Args:
        model: The model, in evaluation mode.
        raw: Rows or images, (n, \*), raw units.
        reference: Rows that the model was not trained on, raw units, of which 1000 are used. None
            if their scores are known, and no row has gaps.
        log_prior: Density of codes p(z).
        progress: Called with the number of patterns of gaps that are done, and of all.
        complete: Scores that complete examples are compared with, if they are known.
        fewest: See :func:`held_out_by_gaps`.

    Returns:
        Scores, p-values, and the worst columns or regions.
    """
    score = log_densities(model, raw, log_prior)
    p_value = np.empty(len(raw))
    parts = held_out_by_gaps(
        model, raw, reference, log_prior, progress, complete=complete, fewest=fewest
    )
    for rows, held_out in parts:
        p_value[rows] = conformal_p_values(score[rows], held_out)
    name_worst = worst_columns if len(model.shape) == 1 else worst_regions
    return RowScores(score, p_value, name_worst(model, raw))


@torch.no_grad()
def worst_columns(model: VAE, raw: Tensor, n: int = WORST_COLUMNS) -> list[str]:
    r"""Name the columns of each row that are furthest from their reconstruction.

    A number is as far as its distance u in predicted std. A category of the probability p is as far
    as the distance that has the same log-density below that of the best value: :math:`u^2/2 =
    \log p_\mathrm{max} - \log p`.

    Args:
        model: The model, in evaluation mode.
        raw: Rows, (N, D), raw units.
        n: Number of columns to name.

    Returns:
        For each row such as "income +8.1, kind 3.2 nats": the distances in predicted std, and minus
        log p of categories, the largest first. Missing values are not among them.
    """
    x = model.scaling(raw)
    found, sizes = [], []
    for rows in torch.split(x, FEWEST_AT_ONCE):
        reconstruction = model.reconstruct(rows)
        numeric, numbers = numeric_part(reconstruction, rows)
        distance = (numbers - numeric.mean) / numeric.std
        size = distance.abs()
        if isinstance(reconstruction, MixedLikelihood):
            own, best = reconstruction.own_and_best(rows)
            is_category = reconstruction.categories.is_category
            distance = torch.where(is_category, -own, distance)
            # The best level is as near as a number at its mean.
            size = torch.where(is_category, (2 * (best - own)).clamp_min(0).sqrt(), size)
        found.append(distance)
        sizes.append(size)
    distance = torch.cat(found)

    size = torch.cat(sizes).nan_to_num(-1.0, posinf=torch.inf)
    largest = size.topk(min(n, x.shape[1]), dim=1).indices
    texts = []
    for row, columns in zip(distance.tolist(), largest.tolist(), strict=True):
        parts = [
            f"{model.scaling.short_name_of(i)} {row[i]:.1f} nats"
            if i in model.scaling.levels
            else f"{model.scaling.short_name_of(i)} {row[i]:+.1f}"
            for i in columns
            if row[i] == row[i]
        ]
        texts.append(", ".join(parts))
    return texts
