r"""Tables of few rows: how often errors lie within the predicted std, and the density of new rows.

    python benchmarks/small_tables.py

Rows follow a planted linear model of three factors, or are independent. VAEEstimator with its
defaults is fitted to n of them. On 1,000 fresh rows, the benchmark counts the errors of
reconstructions within 1 and 1.96 predicted std, and compares the log-density with that of
independent Gaussians, a mean and a variance for each column. Columns have units from .01 to 100.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
"""

import itertools
import warnings

import numpy as np
from experiment import Rows, arguments, one_thread
from scipy.stats import norm

from equipoise import VAEEstimator
from equipoise.estimate import Estimate

N_ROWS, N_COLUMNS, N_FRESH = (30, 50, 100, 300), (5, 50, 500, 5000), 1000
FACTORS = {"three factors": 3, "independent": 0}
WITHIN = {"1": 1.0, "1.96": 1.96}
TINY = {"stage_1_epochs": 2, "stage_2_epochs": 1}


def planted(n_factors, n_columns, n, seed):
    """Draw rows of some factors, with noise of half their std."""
    rng = np.random.default_rng((seed, n_columns))
    loadings = rng.normal(size=(n_factors, n_columns))
    units = 10 ** rng.uniform(-2, 2, n_columns)
    rows = rng.normal(size=(n, n_factors)) @ loadings + 0.5 * rng.normal(size=(n, n_columns))
    return rows * units + units


def measure(key, options, n_fresh):
    """Fit to some rows, and judge fresh ones."""
    n, n_columns, seed = key["rows"], key["columns"], key["seed"]
    table = planted(FACTORS[key["data"]], n_columns, n + n_fresh, seed)
    given, fresh = np.split(table, [n])
    model = VAEEstimator(**options, random_state=seed).fit(given)

    found = model.reconstruct(fresh)
    distance = np.abs(fresh - found.mean) / found.std
    independent = norm(given.mean(0), given.std(0)).logpdf(fresh).sum(1)
    gain = Estimate.of_mean((model.score_samples(fresh) - independent) / n_columns)
    return {
        "noise_correlation": model.noise_correlation_,
        "within": {name: round(float((distance <= k).mean()), 4) for name, k in WITHIN.items()},
        "gain_per_column": round(gain.value, 4),
        "gain_error": round(gain.standard_error, 4),
    }


def summarise(rows):
    """Average over seeds, with standard errors."""
    summary = {}
    for case in itertools.product(FACTORS, N_COLUMNS, N_ROWS):
        own = [row for row in rows if (row["data"], row["columns"], row["rows"]) == case]
        if not own:
            continue
        figures = {f"within {k}": [row["within"][k] for row in own] for k in WITHIN}
        figures["gain per column"] = [row["gain_per_column"] for row in own]
        data, columns, n = case
        summary[f"{data}, {n} x {columns}"] = {
            name: Estimate.of_mean(np.array(values))._asdict() for name, values in figures.items()
        }
    return summary


def main():
    """Measure what is not in the JSON yet, and print the averages."""
    out = "results/benchmark-small-tables.json"
    parser = arguments(__doc__.splitlines()[0], out, "--ours", {"default": {}})
    options = parser.parse_args()
    cases, n_fresh = list(itertools.product(FACTORS, N_COLUMNS, N_ROWS)), N_FRESH
    if options.tiny:
        cases, n_fresh, options.seeds = [("three factors", 5, 30)], 50, [0, 1]
        options.ours = [(name, change | TINY) for name, change in options.ours]
    one_thread()
    warnings.simplefilter("ignore")

    rows = Rows(options.out)
    for seed, (data, columns, n) in itertools.product(options.seeds, cases):
        for variant, change in options.ours:
            key = {"data": data, "rows": n, "columns": columns, "seed": seed, "variant": variant}
            rows.find_or_make(key, measure, key, change, n_fresh)

    summary = summarise(rows.rows)
    rows.write(summary=summary)
    for name, found in summary.items():
        print(name, *(f"{kind} {Estimate(**value).value:.3f}" for kind, value in found.items()))


if __name__ == "__main__":
    main()
