r"""Scores of single rows: their density, how rare it is among held-out rows, and where they differ.

The score of a row is a bound on its log-density in the unit of the data. A row with gaps has the
density of what is observed, which is another number than that of a complete row. It is therefore
compared with held-out rows of the same gaps.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from equipoise.categories import MixedLikelihood, numeric_part
from equipoise.conformal import conformal_p_values
from equipoise.data.dataset import Array
from equipoise.gaps import missing_values
from equipoise.gaussian import RowGenerators, sum_dimensions
from equipoise.labels import labelled, labels_of
from equipoise.metrics.explanation import worst_regions
from equipoise.model import VAE
from equipoise.objectives import LogPrior, importance_weighted_bound

DECODED_AT_ONCE = 256
"""Most codes that are decoded at once for a score: as many as caches of CPUs hold."""
IMPORTANCE_SAMPLES = 20
WORST_COLUMNS = 3
"""Columns that are named for each row."""
MAX_REFERENCE = 1000
"""Most held-out rows that others are compared with."""
MIN_REFERENCE = 100
"""Held-out rows that rows of rare gaps are compared with at least, where there are so many."""
FEWEST_ALIKE = 20
"""Held-out rows that have all values of a pattern, below which those with more gaps join in."""
REFERENCE_SCORES = 100_000
"""Held-out rows that are scored for all patterns of gaps together, if each gets its fewest."""


@torch.no_grad()
def log_densities(
    model: VAE, raw: Tensor, log_prior: LogPrior, importance_samples: int = IMPORTANCE_SAMPLES
) -> Float64[np.ndarray, " n"]:
    r"""Bound the log-density of each example from below by importance weighting.

    .. math:: \log p(x) \ge \log \frac1K \sum_k \frac{p(x|z_k)\, p(z_k)}{q(z_k|x)}
        + \sum_i \log \frac{\mathrm dx_i}{\mathrm d\,\mathrm{raw}_i}

    The random draws of an example follow from its values, so that its score does not depend on the
    others. Missing values, NaN, are left out of p(x|z) and of the sum over i.

    Args:
        model: The model, in evaluation mode.
        raw: Examples in raw units, (n, \*).
        log_prior: Density of codes p(z).
        importance_samples: Number of samples K per example.

    Returns:
        The bounds, (n,), nats.
    """
    log_slopes = model.scaling.log_slope(raw)
    missing = missing_values(raw)
    if missing is not None:
        log_slopes = torch.where(missing, 0.0, log_slopes)
    log_slope: Array = sum_dimensions(log_slopes).numpy()

    x = model.scaling(raw)
    rows = max(1, DECODED_AT_ONCE // importance_samples)
    bounds = [
        importance_weighted_bound(
            model,
            examples,
            importance_samples,
            RowGenerators.of(examples),
            log_prior=log_prior,
            max_rows=DECODED_AT_ONCE,
        )
        for examples in torch.split(x, rows)
    ]
    scores: Float64[np.ndarray, " n"] = torch.cat(bounds).numpy() + log_slope
    return scores


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
    reference: Tensor,
    log_prior: LogPrior,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    complete: Float64[np.ndarray, " m"] | None = None,
    fewest: int = MIN_REFERENCE,
) -> RowScores:
    r"""Score rows of a table, or images, and compare them with held-out ones of the same gaps.

    Args:
        model: The model, in evaluation mode.
        raw: Rows or images, (n, \*), raw units.
        reference: Rows that the model was not trained on, raw units, of which 1000 are used.
        log_prior: Density of codes p(z).
        progress: Called with the number of patterns of gaps that are done, and of all.
        complete: Scores of the reference as it is, if they are known.
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


def held_out_by_gaps(
    model: VAE,
    raw: Tensor,
    reference: Tensor | None,
    log_prior: LogPrior,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    complete: Float64[np.ndarray, " m"] | None = None,
    fewest: int = MIN_REFERENCE,
) -> Iterator[tuple[NDArray[np.bool_], Float64[np.ndarray, " m"]]]:
    r"""Score held-out examples with the gaps of each pattern that occurs.

    Each pattern takes scores of its own. The more patterns there are, the fewer held-out rows each
    is compared with, so that 100,000 are scored in all, but at least ``fewest``.

    Args:
        model: The model, in evaluation mode.
        raw: Examples to compare, (n, \*), raw units.
        reference: Examples that the model was not trained on, (m, \*), raw units, of which 1000 are
            used. None if nothing but ``complete`` is known of them.
        log_prior: Density of codes p(z).
        progress: Called with the number of patterns that are done, and of all.
        complete: Scores of the reference as it is, if they are known.
        fewest: Held-out rows that a pattern gets at least, where there are so many.

    Yields:
        Which of the examples have the pattern, (n,), and the scores to compare them with.

    Raises:
        ValueError: If there are gaps, and no reference.
    """
    missing = missing_values(raw)
    if missing is None:
        missing = torch.zeros(len(raw), 1, dtype=torch.bool)
    patterns, number = torch.unique(missing, dim=0, return_inverse=True)
    each = min(MAX_REFERENCE, max(fewest, REFERENCE_SCORES // max(1, len(patterns))))

    for k, gaps in enumerate(patterns):
        rows = (number == k).numpy()
        if not gaps.any() and complete is not None:
            yield rows, complete
        elif reference is None:
            raise ValueError(
                f"{int(rows.sum())} rows have gaps, the first is row {int(rows.argmax())}: they "
                "are compared with held-out rows of the same gaps, which are not in the file of "
                "an estimator that was fitted to a table without gaps; fit it to rows with gaps, "
                "or fill them"
            )
        elif gaps.all() and gaps.numel() == raw[0].numel():
            # Rows without any value are all alike, and only rounding tells their scores apart.
            yield rows, np.full(min(len(reference), MAX_REFERENCE), -np.inf)
        else:
            among = reference
            if gaps.any():
                # Rows that lack more would be compared by fewer columns.
                is_enough = ~(reference.isnan() & ~gaps).any(1)
                if int(is_enough.sum()) >= FEWEST_ALIKE:
                    among = reference[is_enough]
                among = among[:each]
                among = labelled(among.masked_fill(gaps, torch.nan), labels_of(among))
            yield rows, log_densities(model, among[:each], log_prior)
        progress(k + 1, len(patterns))


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
    for rows in torch.split(x, DECODED_AT_ONCE):
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
