r"""False alarms on fresh rows, by thresholds of the validation rows and of rows of their own.

    python benchmarks/false_alarms.py

The validation rows also decide on the noise variance, the correlation of the errors, the mixture
and the epoch that is kept. "validation" is the threshold by their scores as they are;
"cross-fitted", which VAEEstimator uses, takes the correlation of each score from the other rows;
"separate" takes as many rows that decided on nothing. All are of the same fitted models.

A threshold of m rows at the rate a flags floor(a (1 + m)) / (1 + m) of fresh rows in the mean over
splits, if it is exact. The excess is the flagged share minus that.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
"""

import math
import warnings

import numpy as np
from experiment import Rows, arguments, one_thread
from one_class_data import TABLES
from sklearn.datasets import load_digits

from equipoise import VAEEstimator
from equipoise.conformal import conformal_threshold, fewest_held_out
from equipoise.estimate import Estimate

RATES = (0.01, 0.05, 0.1)
CASES = {
    "diamonds, 200 rows": ("diamonds", 200),
    "diamonds, 1000 rows": ("diamonds", 1000),
    "digits, 400 rows": ("digits", 400),
    "breast cancer, 150 rows": ("breast cancer", 150),
    "Pima, 200 rows": ("Pima", 200),
}
TINY = {"stage_1_epochs": 2, "stage_2_epochs": 1}


def rows_of(name):
    """All rows of one kind."""
    return load_digits().data if name == "digits" else TABLES[name]().inliers


def measure(table, n, seed, options):
    """Fit to some rows, and count the fresh ones that thresholds of held-out rows flag."""
    order = np.random.default_rng(seed).permutation(len(table))
    given, fresh = np.split(table[order], [n])
    model = VAEEstimator(**options, random_state=seed).fit(given)

    cross_fitted, scores = model.held_out_scores_, model.score_samples(fresh)
    separate, scores = np.split(scores, [len(cross_fitted)])
    validation = model.score_samples(model._threshold.rows.numpy())
    held_out = {"validation": validation, "cross-fitted": cross_fitted, "separate": separate}
    return {
        "n_validation": len(validation),
        "n_fresh": len(scores),
        **{name: false_alarms(of, scores) for name, of in held_out.items()},
    }


def false_alarms(held_out, scores):
    """Share of fresh rows below the threshold of each rate that so many rows allow."""
    found = {}
    for rate in RATES:
        if len(held_out) >= fewest_held_out(rate):
            expected = math.floor(rate * (1 + len(held_out)) + 1e-9) / (1 + len(held_out))
            flagged = float((scores < conformal_threshold(held_out, rate)).mean())
            found[f"{rate:g}"] = {"flagged": round(flagged, 5), "expected": round(expected, 5)}
    return found


def summarise(rows):
    """Average flagged and expected shares over all tables and seeds, with standard errors."""
    summary = {}
    for source in ("validation", "cross-fitted", "separate"):
        for rate in RATES:
            found = [row[source][f"{rate:g}"] for row in rows if f"{rate:g}" in row[source]]
            if found:
                flagged = np.array([each["flagged"] for each in found])
                excess = flagged - [each["expected"] for each in found]
                summary[f"{source} {rate:g}"] = {
                    "flagged": Estimate.of_mean(flagged)._asdict(),
                    "excess": Estimate.of_mean(excess)._asdict(),
                }
    return summary


def main():
    """Measure what is not in the JSON yet, and print the shares."""
    out = "results/benchmark-false-alarms.json"
    parser = arguments(__doc__.splitlines()[0], out, "--ours", {"default": {}})
    parser.set_defaults(seeds=list(range(6)))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    if options.tiny:
        options.cases, options.seeds = ["digits, 400 rows"], options.seeds[:2]
        options.ours = [(name, change | TINY) for name, change in options.ours]
    one_thread()
    warnings.simplefilter("ignore")

    rows = Rows(options.out)
    for seed in options.seeds:
        for case in options.cases:
            name, n = CASES[case]
            for variant, change in options.ours:
                key = {"case": case, "seed": seed, "variant": variant, "options": change}
                rows.find_or_make(key, measure, rows_of(name), n, seed, change)

    summary = summarise(rows.rows)
    rows.write(summary=summary)
    for name, found in summary.items():
        flagged, excess = Estimate(**found["flagged"]), Estimate(**found["excess"])
        error = f" ± {excess.standard_error:.4f}" if excess.standard_error else ""
        print(f"{name}: flagged {flagged.value:.4f}, beyond expected {excess.value:+.4f}{error}")


if __name__ == "__main__":
    main()
