"""The section ``outliers``: how well examples of another kind are told from the test data."""

from typing import Any

from equipoise import plots
from equipoise.config import ConfigError
from equipoise.evaluation.subject import Subject
from equipoise.metrics.outliers import model_scores, outlier_detection, outlier_scores


def outliers_section(subject: Subject) -> dict[str, Any]:
    """Score test examples and the others, and compare the scores.

    Args:
        subject: What is evaluated, with examples of another kind.

    Returns:
        Figures for each score.

    Raises:
        ConfigError: if there are no examples of another kind.
    """
    if subject.against is None:
        raise ConfigError(["the section outliers needs examples of another kind"])

    parts = {
        "Validation": subject.data.validation,
        "Test": subject.test.raw,
        "Other": subject.against.raw,
    }
    scores = {}
    for name, raw in parts.items():
        # Examples of another kind have none of the labels, and are compared on equal terms.
        batches = subject.batches(f"{name} scores", raw.without_labels())
        scores[name] = model_scores(
            subject.model, subject.mixture, batches, subject.generator("scores")
        )

    inliers = outlier_scores(scores["Test"], scores["Validation"])
    outliers = outlier_scores(scores["Other"], scores["Validation"])
    figure = plots.outlier_scores(inliers.combined, outliers.combined, "combined score")
    plots.save(figure, subject.figures / "outliers.png")

    return {
        "against": subject.against.name,
        "n_inliers": len(subject.test.raw),
        "n_outliers": len(subject.against.raw),
        **outlier_detection(inliers, outliers)._asdict(),
    }
