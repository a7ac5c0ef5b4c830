r"""The threshold of an estimator: below which score an example is odd, and by which others.

It is set by the scores of held-out examples, see :mod:`equipoise.conformal`, and is kept with them,
so that examples are judged by a p-value, too. Examples with gaps or with a label have densities of
their own, and thresholds that follow from held-out examples of the same kind, see
:mod:`equipoise.held_out`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from equipoise.conformal import FALSE_ALARM_RATE, conformal_threshold
from equipoise.data.dataset import Array
from equipoise.files import StoreError
from equipoise.held_out import Reference, held_out_by_gaps, of_complete, without_gaps
from equipoise.labels import has_label, labels_of, unlabelled
from equipoise.model import VAE
from equipoise.objectives import LogPrior
from equipoise.store import restore_labels


@dataclass(frozen=True, eq=False)
class Threshold:
    r"""A threshold on scores, and the held-out examples that it follows from.

    Args:
        offset: Score below which a complete example without a label is odd, nats.
        rate: Rate of false alarms that the threshold has. NaN if it was set otherwise.
        known: Scores of complete held-out examples, in ascending order.
        rows: The held-out rows themselves, (m, D), raw units, for rows with gaps. None if they are
            images, or if they were not kept.
        labelled_offset: The same as ``offset`` for examples with a label, where it does not follow
            from the rate.
    """

    offset: float
    rate: float
    known: Reference
    rows: Tensor | None
    labelled_offset: float | None = None

    @classmethod
    def of(
        cls,
        scores_of: Callable[[Tensor], Float64[np.ndarray, " m"]],
        raw: Tensor,
        rate: float | None,
    ) -> "Threshold":
        r"""Set a threshold by held-out examples.

        Args:
            scores_of: Gives their scores, with labels or without.
            raw: The examples, (m, \*), raw units.
            rate: Rate of false alarms. None takes 0.05, or the smallest that is possible.

        Returns:
            The threshold.

        Raises:
            ValueError: If there are too few examples for the rate.
        """
        is_complete, given = without_gaps(raw), has_label(raw).numpy()
        plain = np.sort(of_complete(scores_of(unlabelled(raw)), is_complete, rate))
        with_label = np.empty(0)
        if given.any():
            with_label = np.sort(of_complete(scores_of(raw)[given], is_complete[given]))

        if rate is None:
            rate = max(FALSE_ALARM_RATE, 1 / (1 + len(plain)))
        offset = conformal_threshold(plain, rate)
        return cls(offset, rate, Reference(plain, with_label), raw if raw.ndim == 2 else None)

    @classmethod
    def restore(
        cls,
        offset: float,
        rate: float,
        tensors: dict[str, Tensor],
        model: VAE,
        what: str,
        labelled_offset: float | None = None,
    ) -> "Threshold":
        """Make the threshold that a file holds.

        Args:
            offset: See :class:`Threshold`.
            rate: See :class:`Threshold`.
            tensors: What :meth:`tensors` returned.
            model: The model of the file.
            what: Name of the file, for error messages.
            labelled_offset: See :class:`Threshold`.

        Returns:
            The threshold.

        Raises:
            StoreError: If the tensors are not those of a threshold of the model.
        """
        left = dict(tensors)
        scores, rows, labels = (left.pop(name, None) for name in ("scores", "rows", "labels"))
        # Files of earlier releases, and of models without labels, have no such scores.
        with_label = left.pop("labelled", torch.empty(0, dtype=torch.float64))
        if scores is None or left:
            raise StoreError(f"{what} has no held-out scores beside its threshold.")
        if any(part.dtype != torch.float64 or part.ndim != 1 for part in (scores, with_label)):
            raise StoreError(f"{what} has no held-out scores beside its threshold.")
        if rows is not None:
            if rows.dtype != torch.float32 or rows.shape[1:] != model.shape:
                raise StoreError(f"{what} has held-out rows of another shape than the model's.")
            rows = restore_labels(rows, labels, model.label_names, what)
        known = Reference(np.sort(scores.numpy()), np.sort(with_label.numpy()))
        return cls(offset, rate, known, rows, labelled_offset)

    def tensors(self) -> dict[str, Tensor]:
        """Lay out what is saved: the scores, and the rows if some have gaps."""
        tensors = {"scores": torch.from_numpy(self.known.plain)}
        if self.known.labelled is not None and len(self.known.labelled) > 0:
            tensors["labelled"] = torch.from_numpy(self.known.labelled)
        if self.rows is not None and bool(self.rows.isnan().any()):
            tensors["rows"] = unlabelled(self.rows)
            labels = labels_of(self.rows)
            if labels is not None:
                tensors["labels"] = labels
        return tensors

    def moved_to(self, offset: float, labelled_offset: float | None) -> "Threshold":
        """Set another threshold, whose rate of false alarms is not known.

        Args:
            offset: The threshold for examples without a label.
            labelled_offset: That for examples with one. None if the model reads none.

        Returns:
            The threshold, by the same held-out examples.
        """
        return replace(self, offset=offset, rate=math.nan, labelled_offset=labelled_offset)

    def by_kind(
        self, model: VAE, raw: Tensor, log_prior: LogPrior
    ) -> Iterator[tuple[NDArray[np.bool_], Array]]:
        r"""Find the held-out scores that examples are compared with.

        Args:
            model: The model, in evaluation mode.
            raw: Examples, (n, \*), raw units.
            log_prior: Density of codes p(z).

        Yields:
            Which of the examples have the same gaps, and a label or none, (n,), and the scores.

        Raises:
            ValueError: If there are gaps or labels, and no held-out examples for them.
        """
        has_labelled = self.known.labelled is not None and len(self.known.labelled) > 0
        if not has_labelled and bool(has_label(raw).any()):
            raise ValueError(
                "no held-out example has a label to compare with: leave out y, or set the "
                "threshold by calibrate(x, y) with examples that have one"
            )
        yield from held_out_by_gaps(model, raw, self.rows, log_prior, complete=self.known)

    def below(self, held_out: Float64[np.ndarray, " m"], *, with_label: bool) -> float:
        """Set a threshold on other scores as ``offset`` is set on those of complete examples.

        Args:
            held_out: Scores that examples of some kind are compared with, of :meth:`by_kind`.
            with_label: Whether these examples have a label.

        Returns:
            The threshold for examples of this kind.
        """
        if not math.isnan(self.rate):
            if held_out is self.known.plain:
                return self.offset
            return conformal_threshold(held_out, max(self.rate, 1 / (1 + len(held_out))))

        complete, offset = self.known.of(with_label=with_label), self.offset
        if with_label and self.labelled_offset is not None:
            offset = self.labelled_offset
        if held_out is complete:
            return offset
        return float(np.quantile(held_out, (complete < offset).mean()))
