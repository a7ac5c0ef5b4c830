"""Find malignant breast tumours with a model that was trained on benign ones only.

The model learns 30 measurements of benign cells; the data set comes with scikit-learn. Each new row
then gets a tail probability, which is the probability that a benign row is at least as odd.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer

from equipoise import VAEEstimator, plots
from equipoise.metrics.outliers import ModelScores, auroc, model_scores, outlier_scores

TRAINING, REFERENCE = 0.7, 0.15
"""Shares of the benign rows to train on and to compare with. The rest are test rows."""


def main() -> None:
    """Train a model, score rows, print how many are found, and draw the scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--epochs", type=int, default=200, help="epochs of stage 1, twice those of stage 2 (200)"
    )
    parser.add_argument(
        "--false-alarms", type=float, default=0.1, help="share of benign rows to flag (0.1)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("anomalies.png"), help="picture to write (anomalies.png)"
    )
    options = parser.parse_args()

    cells = load_breast_cancer()
    benign, malignant = cells.data[cells.target == 1], cells.data[cells.target == 0]
    shuffled = np.random.default_rng(0).permutation(benign)
    cuts = [int(TRAINING * len(benign)), int((TRAINING + REFERENCE) * len(benign))]
    train, reference_rows, test = np.split(shuffled, cuts)

    vae = VAEEstimator(
        noise="dimension",
        stage_1_epochs=options.epochs,
        stage_2_epochs=options.epochs // 2,
        random_state=0,
    ).fit(train)

    reference = scores(vae, reference_rows)
    inliers = outlier_scores(scores(vae, test), reference)
    outliers = outlier_scores(scores(vae, malignant), reference)

    area = auroc(inliers.combined, outliers.combined)
    print(
        f"AUROC {area.value:.3f} ± {area.standard_error:.3f} "
        f"over {area.n} rows that were not trained on"
    )
    for name, result in (("benign", inliers), ("malignant", outliers)):
        flagged = np.mean(result.tail_probability <= options.false_alarms)
        print(f"{name:9} {flagged:6.1%} flagged at a tail probability of {options.false_alarms:g}")

    figure = plots.outlier_scores(
        np.log(inliers.combined), np.log(outliers.combined), "log of the combined score"
    )
    print(f"wrote {plots.save(figure, options.out)}")


def scores(vae: VAEEstimator, rows: NDArray[np.float64]) -> ModelScores:
    """Score rows with each part of the model.

    Args:
        vae: The fitted estimator.
        rows: The rows, (n, features).

    Returns:
        A score of each part for each row.
    """
    batch = torch.tensor(rows, dtype=torch.float32)
    return model_scores(vae.model_, vae.mixture_, [batch], torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
