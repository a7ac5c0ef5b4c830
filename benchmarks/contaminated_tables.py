r"""Outliers within the table that a detector is fitted to: AUROC of eleven tables.

    python benchmarks/contaminated_tables.py

Rows of other classes are added to those of the inlier class until they are 5 % of the table. Each
method is fitted to the whole table, and scores the same rows. scikit-learn's detectors get columns
that are standardised by the table, and VAEEstimator the table as it is: once by default, and once
with ``contamination=0.05``, of which ``table_scores_`` count. Three seeds choose the outliers.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
"""

import json
import warnings

import numpy as np
from experiment import Rows, arguments, one_thread, over_seeds
from one_class_data import TABLES, measured, swapped
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor
from sklearn.preprocessing import StandardScaler
from tables import table

from equipoise import VAEEstimator

SHARE = 0.05
MARGIN = 0.03
TINY = {"stage_1_epochs": 2, "stage_2_epochs": 1}
VARIANTS = {"default": {}, "contamination": {"contamination": SHARE}}


def local_outlier_factor(z, seed):
    """Score the rows that the detector is fitted to."""
    return LocalOutlierFactor().fit(z).negative_outlier_factor_


OTHERS = {
    "LocalOutlierFactor": local_outlier_factor,
    "IsolationForest": lambda z, seed: IsolationForest(random_state=seed).fit(z).score_samples(z),
    "one Gaussian": lambda z, seed: GaussianMixture(1).fit(z).score_samples(z),
}


def contaminated(data, seed):
    """Add outliers to the inliers until they are 5 % of all rows."""
    rng = np.random.default_rng(seed)
    outliers = swapped(data.inliers, rng) if data.outliers is None else data.outliers
    n = round(SHARE / (1 - SHARE) * len(data.inliers))
    chosen = outliers[rng.permutation(len(outliers))[:n]]
    x = np.concatenate([data.inliers, chosen])
    order = rng.permutation(len(x))
    return x[order], (np.arange(len(x)) >= len(data.inliers))[order]


def measure(data, method, seed, options):
    """Fit a method to a contaminated table, and score its rows."""
    x, is_outlier = contaminated(data, seed)
    if method in OTHERS:
        scores = OTHERS[method](StandardScaler().fit_transform(x), seed)
    else:
        model = VAEEstimator(**options, random_state=seed).fit(x)
        is_robust = model.contamination is not None
        scores = model.table_scores_ if is_robust else model.score_samples(x)
    auroc = float(roc_auc_score(is_outlier, -scores))
    return {"auroc": round(auroc, 5), "n": len(x), "n_outliers": int(is_outlier.sum())}


def summarise(tables, ours):
    """Count the tables on which a variant of ours is within .03 of the best of the others."""
    gaps = {}
    for name, found in tables.items():
        mean = {method: np.mean([row["auroc"] for row in rows]) for method, rows in found.items()}
        gaps[name] = round(float(mean[ours] - max(mean[other] for other in OTHERS)), 5)
    near = sum(gap >= -MARGIN for gap in gaps.values())
    return {"within_.03_of_best": near, "tables": len(gaps), "gap_to_best": gaps}


def main():
    """Compute what is not in the JSON yet, and print the table."""
    out = "results/benchmark-contaminated-tables.json"
    parser = arguments(__doc__.splitlines()[0], out, "--ours", VARIANTS)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    options = parser.parse_args()
    if options.tiny:
        options.tables, options.seeds = ["iris"], options.seeds[:1]
        options.ours = [(name, change | TINY) for name, change in options.ours]
    one_thread()
    warnings.simplefilter("ignore")

    methods = {f"equipoise, {name}": change for name, change in options.ours}
    methods |= {name: {} for name in OTHERS}
    rows = Rows(options.out)
    tables = measured(rows, options.tables, options.seeds, methods, measure)

    summary = {method: summarise(tables, method) for method in methods if method not in OTHERS}
    rows.write(summary=summary)
    body = [
        [name, *(over_seeds([row["auroc"] for row in found[method]]) for method in methods)]
        for name, found in tables.items()
    ]
    print(table(["AUROC", *methods], body), json.dumps(summary, indent=2), sep="\n\n")


if __name__ == "__main__":
    main()
