"""The estimator as a detector of PyOD, whose scores are higher for odder rows."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float64
from sklearn.base import clone

from equipoise.estimator import VAEEstimator


def pyod_detector(estimator: VAEEstimator | None = None, *, contamination: float = 0.1) -> Any:  # noqa: ANN401 (a class of PyOD)
    """Make a ``BaseDetector`` of PyOD, which needs ``pip install pyod``.

    Args:
        estimator: The unfitted :class:`equipoise.VAEEstimator` whose copy is fitted. None takes the
            default.
        contamination: Share of the table that is outliers, see :class:`equipoise.VAEEstimator`.

    Returns:
        The unfitted detector. Its ``decision_scores_`` are minus the ``table_scores_`` of the
        estimator, and ``estimator_`` is the fitted one.

    Example:
        >>> detector = pyod_detector(contamination=0.05).fit(x)  # doctest: +SKIP
        >>> detector.labels_, detector.predict(x_new)  # doctest: +SKIP
    """
    return _detector_class()(contamination, estimator)


@functools.cache
def _detector_class() -> Any:  # noqa: ANN401 (a class of PyOD)
    """Derive the class when it is asked for, because PyOD is no dependency."""
    from pyod.models.base import BaseDetector

    class VAEDetector(BaseDetector):  # type: ignore[misc, unused-ignore]
        """A detector by the density of a variational autoencoder."""

        def __init__(
            self, contamination: float = 0.1, estimator: VAEEstimator | None = None
        ) -> None:
            super().__init__(contamination=contamination)
            self.estimator = estimator

        def fit(self, X: object, y: object = None) -> "VAEDetector":
            """Fit to a table, and score its rows. As in PyOD, y is not learned from."""
            model = clone(VAEEstimator() if self.estimator is None else self.estimator)
            if model.conditional:
                raise ValueError(
                    "detectors of PyOD read no labels of rows: take an estimator without "
                    "conditional, or VAEEstimator(contamination=...).fit_predict(x, y)"
                )
            model.set_params(contamination=self.contamination, false_alarm_rate=None)
            self.estimator_ = model.fit(X)
            self._set_n_classes(y)
            self.decision_scores_ = -self.estimator_.table_scores_
            self._process_decision_scores()
            return self

        def decision_function(self, X: object) -> Float64[np.ndarray, " n"]:
            """Score rows; higher is odder."""
            scores: Float64[np.ndarray, " n"] = -self.estimator_.score_samples(X)
            return scores

    return VAEDetector
