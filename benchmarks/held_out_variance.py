r"""Does the learned variance hold on new data, and does training that is too long do harm?

    python benchmarks/held_out_variance.py --data-dir DATA \
        --variants training:variance_from=training held-out:variance_from=held-out

Each case is trained for long, in stage 1 alone, with three seeds and without early stopping. It
ends with the last weights, unless a variant says ``keep_weights=best``. The split into training,
validation and test set is the same for all seeds. The case ``factors`` has 50 rows of 500 columns,
which are three factors and noise of variance .25, and 200 rows for the test.

The figures are the test ELBO, the variance sigma*^2 over the squared error of the test set (with z
sampled), and the validation ELBO at the end less that of the best epoch.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from experiment import Rows, arguments, facts, one_thread, over_seeds, paired, trained
from sklearn import datasets
from tables import table

from equipoise.config import read_recipe, shipped_recipes
from equipoise.data import Subset, load

RECIPES = shipped_recipes()
MNIST = {"latent_dim": 32, "learning_rate": 0.01}


class Case(NamedTuple):
    """Data, the number of epochs, and options that are not those of the recipe or the default."""

    data: str
    epochs: int
    options: dict[str, Any] = MappingProxyType({})

    def __str__(self):
        return f"{self.data}, {self.epochs}"


CASES = [
    Case("digits", 60),
    Case("digits", 200),
    Case("breast-cancer", 300),
    Case("wine", 300),
    Case("diabetes", 300),
    Case("factors", 300),
    Case("mnist", 15, MNIST),
    Case("mnist", 40, MNIST),
]
TINY = [Case("digits", 1), Case("factors", 2)]
TABLES = {
    "breast-cancer": datasets.load_breast_cancer,
    "wine": datasets.load_wine,
    "diabetes": datasets.load_diabetes,
}
FIGURES = {
    "test_elbo": "test ELBO, nats",
    "var_over_mse": "sigma*^2 over test squared error",
    "fall": "validation ELBO, end less best",
}


def settings_of(case):
    """Put together the options of a case."""
    recipe = read_recipe(RECIPES[case.data]) if case.data in RECIPES else {}
    recipe.pop("data", None)
    fixed = {
        "stage_1_epochs": case.epochs,
        "stage_2_epochs": 0,
        "tolerance": 0.0,
        "early_stopping": 0,
        "keep_weights": "last",
    }
    return recipe | fixed | dict(case.options)


def examples(name, data_dir):
    """Load the data of a case."""
    if name in TABLES:
        return load(TABLES[name]().data.astype(np.float32))
    if name == "factors":
        return factors()
    return load(name, data_dir=data_dir)


def factors(n=50, n_test=200, d=500):
    """Draw rows of three factors with noise of variance .25."""
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(3, d))
    x = rng.normal(size=(n + n_test, 3)) @ loadings + 0.5 * rng.normal(size=(n + n_test, d))
    given, test = np.split(x.astype(np.float32), [n])
    return replace(load(given, test_fraction=0.0), test=Subset.whole(test))


def measure(data, options):
    """Train one model, and compute its figures."""
    trainer, history = trained(data, options)
    test, validation = trainer.figures(trainer.test), trainer.figures(trainer.validation)
    curve = [row["validation_elbo"] for row in history]

    return {
        "test_elbo": test.elbo,
        "test_kl": test.kl,
        "test_mse": test.mse,
        "noise_var": test.noise_var,
        "var_over_mse": test.noise_var / test.mse,
        "validation_elbo": validation.elbo,
        "best_epoch": int(np.argmax(curve)) + 1,
        "fall": validation.elbo - max(curve),
    }


def compare(rows, variants, key):
    """Lay out one case: a row for each variant, and its test ELBO less that of the first."""
    found = {name: [row for row in rows if row["variant"] == name] for name, _ in variants}
    first = next(iter(found.values()))
    cells = []
    for name, of_variant in found.items():
        figures = [over_seeds([row[figure] for row in of_variant]) for figure in FIGURES]
        gain = "" if of_variant is first else paired(of_variant, first, "test_elbo")
        cells.append([key, name, *figures, gain])
    return cells


def main():
    """Train what is not in the JSON yet, and print the table."""
    out = "results/benchmark-held-out-variance.json"
    parser = arguments(__doc__.splitlines()[0], out, "--variants", {"default": {}})
    parser.add_argument("--data-dir")
    parser.add_argument("--cases", nargs="+", choices=list(map(str, CASES)), metavar="DATA, EPOCHS")
    options = parser.parse_args()
    one_thread()

    cases, seeds = CASES, options.seeds
    if options.tiny:
        cases, seeds = TINY, options.seeds[:1]
    elif options.cases:
        cases = [case for case in CASES if str(case) in options.cases]

    # All are loaded first, so that one that is missing is noticed before the others are trained on.
    data_sets = {case.data: examples(case.data, options.data_dir) for case in cases}

    rows, cells = Rows(options.out), []
    for case in cases:
        data = data_sets[case.data]
        found = []
        for seed in seeds:
            for name, change in options.variants:
                settings = settings_of(case) | change | {"seed": seed}
                key = {"case": str(case), "variant": name, "seed": seed, "options": settings}
                key |= facts(data)
                found.append(rows.find_or_make(key, measure, data, settings))

        cells += compare(found, options.variants, str(case))

    heads = ["case, epochs", "variant", *FIGURES.values(), "test ELBO less that of the first"]
    print(table(heads, cells))


if __name__ == "__main__":
    main()
