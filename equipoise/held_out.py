r"""Scores of examples, and of the held-out ones that they are compared with.

The score of an example is a bound on its log-density. What a usual score is, held-out examples
tell. They are scored at the end of a training and kept with the model, so that later examples are
judged without the data, see :mod:`equipoise.conformal`. An example with gaps has the density of
what is observed, which is another number than that of a complete one: it is compared with held-out
examples of the same gaps, for which the data are needed.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from equipoise.data import Data
from equipoise.data.batches import as_tensor
from equipoise.data.dataset import Array
from equipoise.files import StoreError
from equipoise.gaps import missing_values
from equipoise.gaussian import RowGenerators, sum_dimensions
from equipoise.labels import labelled, labels_of
from equipoise.model import VAE
from equipoise.objectives import LogPrior, importance_weighted_bound
from equipoise.records import HeldOutDescription
from equipoise.run import Run
from equipoise.store import read_digest, read_tensors, write_tensors

DECODED_AT_ONCE = 256
"""Most codes that are decoded at once for a score: as many as caches of CPUs hold."""
IMPORTANCE_SAMPLES = 20
MAX_REFERENCE = 1000
"""Most held-out examples that others are compared with."""
MIN_REFERENCE = 100
"""Held-out rows that rows of rare gaps are compared with at least, where there are so many."""
FEWEST_ALIKE = 20
"""Held-out rows that have all values of a pattern, below which those with more gaps join in."""
REFERENCE_SCORES = 100_000
"""Held-out rows that are scored for all patterns of gaps together, if each gets its fewest."""

KIND = "table of held-out scores"

Judges = Iterable[tuple[NDArray[np.int64], VAE]]
"""Numbers of validation examples, and a model whose noise they did not decide on."""


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


class HeldOut(NamedTuple):
    """Scores of examples that a model was not trained on.

    Args:
        scores: Those of the validation set, and then of the test set, (m,), at most 1000.
        n_validation: How many are of the validation set.
    """

    scores: Float64[np.ndarray, " m"]
    n_validation: int


def judged_scores(judges: Judges, raw: Tensor, log_prior: LogPrior) -> Float64[np.ndarray, " m"]:
    r"""Score validation examples, each by the model whose noise it did not decide on.

    Args:
        judges: Numbers of examples, and the model for them. Numbers beyond ``raw`` are left out.
        raw: The first validation examples, (m, \*), raw units.
        log_prior: Density of codes p(z).

    Returns:
        The scores, (m,), see :func:`log_densities`.
    """
    scores = np.empty(len(raw))
    for numbers, judge in judges:
        rows = numbers[numbers < len(raw)]
        scores[rows] = log_densities(judge, raw[torch.from_numpy(rows)], log_prior)
    return scores


def keep_held_out(
    run: Run, model: VAE, log_prior: LogPrior, data: Data, judges: Judges | None = None
) -> HeldOut:
    """Score held-out examples of a run, and write the scores into its folder.

    Args:
        run: A run that has its model and its mixture.
        model: The model, in evaluation mode, on the CPU.
        log_prior: Density of codes p(z) under the run's mixture.
        data: The data that it was trained on.
        judges: See :func:`judged_scores`. None takes the model for all.

    Returns:
        The scores.
    """
    if judges is None:
        judges = [(np.arange(len(data.validation)), model)]
    validation = as_tensor(data.validation.take(slice(MAX_REFERENCE)))
    test = as_tensor(data.test.take(slice(MAX_REFERENCE - len(validation))))
    parts = [judged_scores(judges, validation, log_prior), log_densities(model, test, log_prior)]
    scores = np.concatenate(parts)

    description: HeldOutDescription = {
        "model": read_digest(run.model_file),
        "mixture": read_digest(run.mixture_file),
        "n_validation": len(validation),
    }
    write_tensors(run.held_out_file, KIND, {"scores": torch.from_numpy(scores)}, description)
    return HeldOut(scores, len(validation))


def read_held_out(run: Run) -> HeldOut | None:
    """Read what :func:`keep_held_out` wrote.

    Args:
        run: The run.

    Returns:
        The scores. None if there is no such file, or if it is of another model or mixture.

    Raises:
        StoreError: If the file is damaged.
    """
    path = run.held_out_file
    if not path.is_file():
        return None

    tensors, about = read_tensors(path, KIND, HeldOutDescription)
    of_run = (read_digest(run.model_file), read_digest(run.mixture_file))
    if (about["model"], about["mixture"]) != of_run:
        return None

    scores = tensors.pop("scores", None)
    if scores is None or scores.dtype != torch.float64 or scores.ndim != 1 or tensors:
        raise StoreError(f"{path} holds no scores: delete it, and they are computed anew.")
    return HeldOut(scores.numpy(), min(about["n_validation"], len(scores)))
