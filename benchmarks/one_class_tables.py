r"""Eleven tables of one class: density of held-out rows, and AUROC of rows of other classes.

    pip install -c constraints.txt -e ".[benchmarks]"
    python benchmarks/one_class_tables.py --ours default noise:noise=dimension

The inlier class is split: 70 % of its rows are given, and the others are tested beside all rows of
the other classes, the outliers of the AUROC. There are three seeds of splits. scikit-learn's
detectors get columns that are standardised by the given rows; VAEEstimator gets the table as it is.

The density is in nats per row, in the table's own units: log p(x) of the test inliers, and for
VAEEstimator the importance-weighted bound of 50 codes. Where values tie, a density may grow without
limit at them. There the probability of the cell around a row is fair, the product of the columns'
resolutions q times the mean density in the cell:

    log P(x) = log E_u p(x + u) + sum_i log q_i,    u_i uniform in [-q_i / 2, q_i / 2]

by 16 draws u. q_i is the smallest distance of two values of column i. For this figure each method
is fitted to given rows with a draw u added, and for all others to the rows as they are.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
"""

import json
import math
import warnings

import numpy as np
from experiment import Rows, arguments, one_thread, over_seeds
from one_class_data import TABLES, measured, resolutions, swapped
from scipy.special import logsumexp
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import KernelDensity, LocalOutlierFactor
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM
from tables import table

from equipoise import VAEEstimator

GIVEN = 0.7
DRAWS = 16
CODES = 50
FLOORS = (1e-6, 1e-4, 1e-2)
BANDWIDTHS = np.geomspace(0.03, 5, 23)
TINY = {"stage_1_epochs": 2, "stage_2_epochs": 1}
OURS = "equipoise, {}"


def gaussian_mixture(z, seed):
    """Fit mixtures of Gaussians: BIC chooses among them, and held-out rows the variances' floor."""
    part, held_out = train_test_split(z, test_size=0.2, random_state=seed)
    floor = max(FLOORS, key=lambda floor: by_bic(part, floor, seed).score(held_out))
    return by_bic(z, floor, seed)


def by_bic(z, floor, seed):
    """Fit mixtures of each size and kind of covariance, and take that of the lowest BIC.

    Each component has 20 rows, or twice as many as columns if its covariance is full: BIC would
    take components that have collapsed.
    """
    fits = []
    for kind in ("full", "tied", "diag", "spherical"):
        rows_each = max(20, 2 * z.shape[1]) if kind == "full" else 20
        for n in range(1, max(1, min(10, len(z) // rows_each)) + 1):
            mixture = GaussianMixture(n, covariance_type=kind, reg_covar=floor, random_state=seed)
            fits.append(mixture.fit(z))
    return min(fits, key=lambda fit: fit.bic(z))


def kernel_density(z, seed):
    """Estimate a density by kernels, whose bandwidth is cross-validated."""
    search = GridSearchCV(KernelDensity(), {"bandwidth": BANDWIDTHS}, cv=5)
    return search.fit(z).best_estimator_


def ppca(z):
    """Fit probabilistic PCA with the number of units that latent_dim="auto" takes."""
    n_units = max(1, min(16, z.shape[1] // 2))
    return PCA(min(n_units, len(z) - 1)).fit(z)


DENSITIES = {
    "GMM by BIC": gaussian_mixture,
    "one Gaussian": lambda z, seed: GaussianMixture(1).fit(z),  # the floor is 1e-6
    "KDE": kernel_density,
}
DETECTORS = DENSITIES | {
    "IsolationForest": lambda z, seed: IsolationForest(random_state=seed).fit(z),
    "LocalOutlierFactor": lambda z, seed: LocalOutlierFactor(novelty=True).fit(z),
    "OneClassSVM": lambda z, seed: OneClassSVM().fit(z),
}
LINEAR = "PPCA"
METHODS = DETECTORS | {LINEAR: lambda z, seed: ppca(z)}
"""With the linear model of as many factors as VAEEstimator has units, which takes no rank."""


def fit(method, given, seed, options):
    """Fit a method; return its score of rows, which is a log-density in own units if it is one."""
    if method not in METHODS:
        model = VAEEstimator(**options, random_state=seed).fit(given)
        return lambda x: model.score_samples(x, CODES)

    scaler = StandardScaler().fit(given)
    detector = METHODS[method](scaler.transform(given), seed)
    log_scale = np.log(scaler.scale_).sum()
    return lambda x: detector.score_samples(scaler.transform(x)) - log_scale


def cell_log_prob(score, x, quanta, rng):
    """Log probability of the cell around each row, by the mean density of draws in it."""
    u = rng.uniform(-0.5, 0.5, (DRAWS, *x.shape)) * quanta
    log_densities = score((x + u).reshape(-1, x.shape[1])).reshape(DRAWS, -1)
    return logsumexp(log_densities, 0) - math.log(DRAWS) + np.log(quanta).sum()


def measure(data, method, seed, options):
    """Fit a method to one split, and score the test rows."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(data.inliers))
    given, test = np.split(data.inliers[rows], [round(GIVEN * len(rows))])
    outliers = swapped(test, rng) if data.outliers is None else data.outliers

    score = fit(method, given, seed, options)
    inlier_scores, outlier_scores = score(test), score(outliers)
    is_outlier = np.repeat([0, 1], [len(test), len(outliers)])
    auroc = roc_auc_score(is_outlier, -np.concatenate([inlier_scores, outlier_scores]))
    figures = {"auroc": auroc, "n_given": len(given), "n_outliers": len(outliers)}

    if method in DETECTORS.keys() - DENSITIES.keys():
        return figures
    figures["density"] = inlier_scores.round(3).tolist()
    if data.ties:
        quanta = resolutions(data)
        dequantised = given + rng.uniform(-0.5, 0.5, given.shape) * quanta
        score = fit(method, dequantised, seed, options)
        figures["cell"] = cell_log_prob(score, test, quanta, rng).round(3).tolist()
    return figures


def densities(rows):
    """Take the figures of held-out rows, (seeds, rows): of cells where values tie."""
    return np.array([row.get("cell", row["density"]) for row in rows])


def with_error(values):
    """Average values, (seeds, rows), with the standard error over the rows of one split.

    The splits share rows, so that three of them are not taken for three times the rows.
    """
    errors = values.std(1, ddof=1) / math.sqrt(values.shape[1])
    return values.mean(), math.sqrt(np.square(errors).mean())


def summarise(tables, ours):
    """Compare one variant of ours with the others.

    Returns:
        Mean rank by AUROC; on how many tables the AUROC is within .01 of the best; on how many
        the density is the best or less than one standard error of the difference below it, and on
        how many that is so with the linear model alone.
    """
    ranks, near, dense, as_linear = [], 0, 0, 0
    for found in tables.values():
        names = [ours, *DETECTORS]
        aurocs = [np.mean([row["auroc"] for row in found[name]]) for name in names]
        ranks.append(rankdata(-np.array(aurocs))[0])
        near += int(aurocs[0] >= max(aurocs) - 0.01)

        gaps = {
            name: with_error(densities(found[ours]) - densities(found[name]))
            for name in (*DENSITIES, LINEAR)
        }
        is_level = {name: gap > -error for name, (gap, error) in gaps.items()}
        dense += int(all(is_level[name] for name in DENSITIES))
        as_linear += int(is_level[LINEAR])

    return {
        "mean_rank": float(np.mean(ranks)),
        "auroc_within_.01": near,
        "density_best_or_within_error": dense,
        "density_at_least_ppca_or_within_error": as_linear,
        "tables": len(tables),
    }


def show(tables, methods):
    """Make the tables of densities and of AUROCs."""
    dense = [name for name in methods if name not in DETECTORS.keys() - DENSITIES.keys()]
    density_rows, auroc_rows = [], []
    for name, found in tables.items():
        mark = ", cells" if "cell" in found[dense[0]][0] else ""
        values = [with_error(densities(found[method])) for method in dense]
        density_rows.append(
            [name + mark, *(f"{value:.2f} ± {error:.2f}" for value, error in values)]
        )
        aurocs = [over_seeds([row["auroc"] for row in found[method]]) for method in methods]
        auroc_rows.append([name, *aurocs])

    densities_table = table(["nats per held-out row", *dense], density_rows)
    return f"{densities_table}\n\n{table(['AUROC', *methods], auroc_rows)}"


def main():
    """Compute what is not in the JSON yet, and print the tables."""
    out = "results/benchmark-one-class-tables.json"
    parser = arguments(__doc__.splitlines()[0], out, "--ours", {"default": {}})
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    options = parser.parse_args()
    if options.tiny:
        options.tables, options.seeds = ["iris", "glass"], options.seeds[:1]
        options.ours = [(name, change | TINY) for name, change in options.ours]
    one_thread()
    warnings.simplefilter("ignore", ConvergenceWarning)

    methods = {OURS.format(name): change for name, change in options.ours}
    methods |= {name: {} for name in METHODS}

    rows = Rows(options.out)
    tables = measured(rows, options.tables, options.seeds, methods, measure)

    summary = {method: summarise(tables, method) for method in methods if method not in METHODS}
    rows.write(summary=summary)
    print(show(tables, methods), json.dumps(summary, indent=2), sep="\n\n")


if __name__ == "__main__":
    main()
