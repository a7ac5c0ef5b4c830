r"""Scores of examples, and of the held-out ones that they are compared with.

The score of an example is a bound on its log-density. What a usual score is, held-out examples
tell. They are scored at the end of a training and kept with the model, so that later examples are
judged without the data, see :mod:`equipoise.conformal`. An example with gaps has the density of
what is observed, which is another number than that of a complete one: it is compared with held-out
examples of the same gaps. These themselves are needed for that, and are kept in a file of their
own, which is not published, if the table has gaps. An example whose label is known has the density
log p(x|y), and is compared with those of held-out examples with labels.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from equipoise.conformal import fewest_held_out
from equipoise.data import Data
from equipoise.data.batches import as_tensor
from equipoise.data.dataset import Array
from equipoise.files import StoreError, remove
from equipoise.gaps import missing_values
from equipoise.gaussian import RowGenerators, sum_dimensions
from equipoise.labels import has_label, joined, labelled, labels_of, unlabelled
from equipoise.model import VAE
from equipoise.objectives import LogPrior, importance_weighted_bound
from equipoise.records import HeldOutDescription
from equipoise.run import Run
from equipoise.store import read_digest, read_tensors, restore_labels, write_tensors

FEWEST_AT_ONCE, MOST_AT_ONCE, VALUES_AT_ONCE = 256, 4096, 1 << 18
"""Codes that are decoded at once for scores: as many as have so many values, within bounds. Caches
of CPUs hold few images, and small tables would wait for Python otherwise."""
IMPORTANCE_SAMPLES = 20
MAX_REFERENCE = 1000
"""Most held-out examples that others are compared with."""
MIN_REFERENCE = 100
"""Held-out rows that rows of rare gaps are compared with at least, where there are so many."""
FEWEST_ALIKE = 20
"""Held-out rows that have all values of a pattern, below which those with more gaps join in."""
REFERENCE_SCORES = 100_000
"""Held-out rows that are scored for all patterns of gaps together, if each gets its fewest."""

KIND, KIND_OF_ROWS = "table of held-out scores", "table of held-out rows"

Judges = Iterable[tuple[NDArray[np.int64], VAE]]
"""Numbers of validation examples, and a model whose noise they did not decide on."""


class Reference(NamedTuple):
    """Scores that complete examples are compared with.

    Args:
        plain: Bounds on log p(x), (m,), for examples without a label.
        labelled: Bounds on log p(x|y), for examples with one. None if the model reads no labels.
    """

    plain: Float64[np.ndarray, " m"]
    labelled: Float64[np.ndarray, " k"] | None = None

    def of(self, *, with_label: bool) -> Array:
        """Choose the scores for examples with or without a label."""
        return self.labelled if with_label and self.labelled is not None else self.plain


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
    if not len(raw):
        return np.empty(0)
    log_slopes = model.scaling.log_slope(raw)
    missing = missing_values(raw)
    if missing is not None:
        log_slopes = torch.where(missing, 0.0, log_slopes)
    log_slope: Array = sum_dimensions(log_slopes).numpy()

    x = model.scaling(raw)
    n_values = math.prod(model.shape)
    at_once = min(MOST_AT_ONCE, max(FEWEST_AT_ONCE, VALUES_AT_ONCE // n_values))
    rows = max(1, at_once // importance_samples)
    bounds = [
        importance_weighted_bound(
            model,
            examples,
            importance_samples,
            RowGenerators.of(examples),
            log_prior=log_prior,
            max_rows=at_once,
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
    complete: Reference | None = None,
    fewest: int = MIN_REFERENCE,
) -> Iterator[tuple[NDArray[np.bool_], Float64[np.ndarray, " m"]]]:
    r"""Score held-out examples with the gaps of each pattern that occurs.

    Each pattern takes scores of its own, and so do examples whose label is known. The more patterns
    there are, the fewer held-out rows each is compared with, so that 100,000 are scored in all, but
    at least ``fewest``.

    Args:
        model: The model, in evaluation mode.
        raw: Examples to compare, (n, \*), raw units.
        reference: Examples that the model was not trained on, (m, \*), raw units, of which 1000 are
            used. None if nothing but ``complete`` is known of them.
        log_prior: Density of codes p(z).
        progress: Called with the number of patterns that are done, and of all.
        complete: Scores that complete examples are compared with, if they are known, see
            :func:`of_complete`.
        fewest: Held-out rows that a pattern gets at least, where there are so many.

    Yields:
        Which of the examples have the pattern, (n,), and the scores to compare them with.

    Raises:
        ValueError: If there are gaps, and no reference.
    """
    missing = missing_values(raw)
    if missing is None:
        missing = torch.zeros(len(raw), 1, dtype=torch.bool)
    of_row = torch.cat([has_label(raw)[:, None], missing], 1)
    patterns, number = torch.unique(of_row, dim=0, return_inverse=True)
    each = min(MAX_REFERENCE, max(fewest, REFERENCE_SCORES // max(1, len(patterns))))

    for k, (with_label, *_) in enumerate(patterns.tolist()):
        gaps, rows = patterns[k, 1:], (number == k).numpy()
        if not gaps.any() and complete is not None:
            yield rows, complete.of(with_label=with_label)
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
            among = reference[has_label(reference)] if with_label else unlabelled(reference)
            if missing_values(among) is not None:
                # Rows that lack more would be compared by fewer columns.
                is_enough = ~(among.isnan() & ~gaps).any(1)
                if int(is_enough.sum()) >= FEWEST_ALIKE:
                    among = among[is_enough]
            if gaps.any():
                among = among[:each]
                among = labelled(among.masked_fill(gaps, torch.nan), labels_of(among))
            yield rows, log_densities(model, among[:each], log_prior)
        progress(k + 1, len(patterns))


def of_complete(
    scores: Float64[np.ndarray, " m"], is_complete: NDArray[np.bool_], rate: float | None = None
) -> Float64[np.ndarray, " c"]:
    """Choose the scores that complete examples are compared with.

    Examples with gaps have densities of fewer values, which are other numbers.

    Args:
        scores: Scores of held-out examples as they are.
        is_complete: Which of these have no gaps, (m,).
        rate: Rate of false alarms that they have to be enough for. None asks for none.

    Returns:
        Those of complete examples, where there are at least 20 and enough for the rate; all
        otherwise.
    """
    fewest = max(FEWEST_ALIKE, 0 if rate is None else fewest_held_out(rate))
    return scores[is_complete] if np.count_nonzero(is_complete) >= fewest else scores


def without_gaps(raw: Tensor) -> NDArray[np.bool_]:
    r"""Tell which examples are complete.

    Args:
        raw: Examples, (n, \*), raw units.

    Returns:
        True where no value is missing, (n,).
    """
    missing = missing_values(raw)
    return np.ones(len(raw), bool) if missing is None else ~missing.any(1).numpy()


class HeldOut(NamedTuple):
    """Scores of examples that a model was not trained on.

    Args:
        scores: Bounds on log p(x) of the validation set, and then of the test set, (m,), at most
            1000.
        n_validation: How many are of the validation set.
        is_complete: Which have no gaps, (m,).
        labelled: Bounds on log p(x|y), (m,), NaN where no label is known. None if the model reads
            none.
    """

    scores: Float64[np.ndarray, " m"]
    n_validation: int
    is_complete: NDArray[np.bool_]
    labelled: Float64[np.ndarray, " m"] | None = None

    def known(self, rate: float | None = None, *, validation: bool = False) -> Reference:
        """Choose what complete examples are compared with, see :func:`of_complete`.

        Args:
            rate: Rate of false alarms that they have to be enough for.
            validation: Whether the test set is left out, because it is what is judged.

        Returns:
            The scores.
        """
        n = self.n_validation if validation else len(self.scores)
        plain = of_complete(self.scores[:n], self.is_complete[:n], rate)
        if self.labelled is None:
            return Reference(plain)
        scores = self.labelled[:n]
        given = ~np.isnan(scores)
        return Reference(plain, of_complete(scores[given], self.is_complete[:n][given], rate))


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

    If rows of a table have gaps, the held-out rows are written, too, into a second file.

    Args:
        run: A run that has its model and its mixture.
        model: The model, in evaluation mode, on the CPU.
        log_prior: Density of codes p(z) under the run's mixture.
        data: The data that it was trained on.
        judges: See :func:`judged_scores`. None takes the model for all.

    Returns:
        The scores.
    """
    judges = [(np.arange(len(data.validation)), model)] if judges is None else list(judges)
    validation = as_tensor(data.validation.take(slice(MAX_REFERENCE)))
    test = as_tensor(data.test.take(slice(MAX_REFERENCE - len(validation))))
    both = joined([validation, test])

    def scores_of(validation: Tensor, test: Tensor) -> Array:
        judged = judged_scores(judges, validation, log_prior)
        return np.concatenate([judged, log_densities(model, test, log_prior)])

    labelled_scores = None
    if model.label_names:
        given = has_label(both).numpy()
        labelled_scores = np.where(given, scores_of(validation, test), np.nan)
    scores = scores_of(unlabelled(validation), unlabelled(test))
    found = HeldOut(scores, len(validation), without_gaps(both), labelled_scores)

    tensors = {
        "scores": torch.from_numpy(scores),
        "is_complete": torch.from_numpy(found.is_complete),
    }
    if labelled_scores is not None:
        tensors["labelled"] = torch.from_numpy(labelled_scores)
    model_digest, mixture_digest = _digests(run)
    description: HeldOutDescription = {
        "model": model_digest,
        "mixture": mixture_digest,
        "n_validation": found.n_validation,
    }
    write_tensors(run.held_out_file, KIND, tensors, description)

    remove(run.held_out_rows_file)  # those of an earlier model
    if not found.is_complete.all():
        rows = {"rows": unlabelled(both).float().contiguous()}
        labels = labels_of(both)
        if labels is not None:
            rows["labels"] = labels
        write_tensors(run.held_out_rows_file, KIND_OF_ROWS, rows, description)
    return found


def read_held_out(run: Run, model: VAE) -> HeldOut | None:
    """Read the scores that :func:`keep_held_out` wrote.

    Args:
        run: The run.
        model: Its model.

    Returns:
        The scores. None if there is no such file, if it is of another model or mixture, or if it is
        of an earlier release, which did not tell densities with a label from those without.

    Raises:
        StoreError: If the file is damaged.
    """
    found = _read(run, run.held_out_file, KIND)
    if found is None:
        return None
    tensors, n_validation = found
    scores, is_complete = tensors.pop("scores", None), tensors.pop("is_complete", None)
    labelled_scores = tensors.pop("labelled", None)
    damaged = StoreError(f"{run.held_out_file} holds no scores: delete it, and they are made anew.")
    if scores is None or is_complete is None or tensors or is_complete.dtype != torch.bool:
        raise damaged
    for values in (scores, labelled_scores):
        if values is not None and (values.dtype != torch.float64 or values.ndim != 1):
            raise damaged
        if values is not None and values.shape != is_complete.shape:
            raise damaged

    if (labelled_scores is None) != (not model.label_names):
        return None
    return HeldOut(
        scores.numpy(),
        min(n_validation, len(scores)),
        is_complete.numpy(),
        None if labelled_scores is None else labelled_scores.numpy(),
    )


def read_held_out_rows(run: Run, model: VAE, *, validation: bool = False) -> Tensor | None:
    """Read the held-out rows that :func:`keep_held_out` wrote, for rows with gaps.

    Args:
        run: The run.
        model: Its model.
        validation: Whether the test set is left out, because it is what is judged.

    Returns:
        The rows, (m, D), raw units, with their labels if the model reads some. None if there is no
        such file, or if it is of another model or mixture.

    Raises:
        StoreError: If the file is damaged.
    """
    path = run.held_out_rows_file
    found = _read(run, path, KIND_OF_ROWS)
    if found is None:
        return None
    tensors, n_validation = found
    rows, labels = tensors.pop("rows", None), tensors.pop("labels", None)
    if rows is None or rows.shape[1:] != model.shape or rows.dtype != torch.float32 or tensors:
        raise StoreError(f"{path} holds no rows of the model's: delete it.")
    restored = restore_labels(rows, labels, model.label_names, str(path))
    return restored[slice(n_validation if validation else None)]


def _digests(run: Run) -> tuple[str, str]:
    """Tell which model and mixture a file of the run belongs to."""
    return read_digest(run.model_file), read_digest(run.mixture_file)


def _read(run: Run, path: Path, kind: str) -> tuple[dict[str, Tensor], int] | None:
    """Read a file of the run's model and mixture: its tensors, and the number of validation."""
    if not path.is_file():
        return None
    tensors, about = read_tensors(path, kind, HeldOutDescription)
    if (about["model"], about["mixture"]) != _digests(run):
        return None
    return tensors, about["n_validation"]
