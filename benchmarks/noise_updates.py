"""How should the shared variance be learned? Closed form, gradient and a fixed one, over seeds.

    python benchmarks/noise_updates.py --data-dir DATA

Models of the paper's sizes, stage 1 alone, are compared in pairs of equal seeds: by the ELBO, by
the variance over the squared error of the test set (z sampled), and by the Fréchet distance of
samples with codes of the run's mixture from as many test images. Further variants are written as in
``--variants closed-form slow:learning_rate=0.002``; differences are to the first one.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
"""

from dataclasses import replace

import numpy as np
import torch
from experiment import Rows, arguments, facts, one_thread, over_seeds, paired, trained
from tables import table

from equipoise.config import read_papers_recipe
from equipoise.data import Batches, load
from equipoise.metrics.features import cached_features, features_of, load_features
from equipoise.metrics.samples import frechet_distance
from equipoise.randomness import stream
from equipoise.sources import fit_aggregate

BATCH = 500
N_SAMPLES = 5000
VARIANTS = {
    "closed-form": {"noise_update": "closed-form"},
    "gradient": {"noise_update": "gradient"},
    "fixed": {"noise": "fixed", "noise_var": 0.005},
}
FIGURES = {
    "test_elbo": "test ELBO, nats",
    "validation_elbo": "validation ELBO",
    "var_over_mse": "variance over test squared error",
    "frechet": "Fréchet distance, mixture",
}
COMPARED = {
    "test_elbo": "test ELBO less that of the first",
    "frechet": "Fréchet distance less that of the first",
}


def measure(data, options, n_samples):
    """Train one model, fit its mixture, and compute its figures."""
    trainer, _ = trained(data, options)
    test, validation = trainer.figures(trainer.test), trainer.figures(trainer.validation)

    model = trainer.model.eval()
    device = trainer.fabric.device
    mixture = fit_aggregate(model, data, trainer.config, device).mixture
    distance = sample_distance(model, mixture, data, n_samples, trainer.config.seed, device)

    return {
        "test_elbo": test.elbo,
        "validation_elbo": validation.elbo,
        "test_kl": test.kl,
        "test_mse": test.mse,
        "noise_var": test.noise_var,
        "var_over_mse": test.noise_var / test.mse,
        "frechet": distance.value,
        "frechet_standard_error": distance.standard_error,
        "n_samples": distance.n,
        "n_components": mixture.n_components,
    }


@torch.no_grad()
def sample_distance(model, mixture, data, n, seed, device):
    """Compute the Fréchet distance of n decoded codes of the mixture from n test images."""
    generator = stream(seed, "samples", device=device)
    return distance_from_test(
        lambda x: model.generate(len(x), mixture, generator).mean, model, data, n, device
    )


def distance_from_test(make, model, data, n, device):
    """Compute the Fréchet distance of images from n test images, of whose batches they are made."""
    extractor = load_features("auto", data)
    extractor.module.to(device)
    # At random, because the test set of MNIST begins with the easier half.
    chosen = np.random.RandomState(0).permutation(len(data.test))[:n]
    test = data.test.take(np.sort(chosen))
    reference = cached_features(extractor, test, Batches(test, BATCH, device).epoch())

    batches = map(model.scaling, Batches(test, BATCH, device).epoch())
    images = (model.scaling.restore_levels(make(x)) for x in batches)
    return frechet_distance(features_of(extractor, images), reference)


def compare(name, rows, variants):
    """Lay out one data set: a row for each variant."""
    found = {variant: [row for row in rows if row["variant"] == variant] for variant, _ in variants}
    first = next(iter(found.values()))
    cells = []
    for variant, of_variant in found.items():
        figures = [over_seeds([row[figure] for row in of_variant]) for figure in FIGURES]
        gains = [
            "" if of_variant is first else paired(of_variant, first, figure) for figure in COMPARED
        ]
        cells.append([name, variant, *figures, *gains])
    return cells


def main():
    """Train what is not in the JSON yet, and print the table."""
    out = "results/benchmark-noise-updates.json"
    parser = arguments(__doc__.splitlines()[0], out, "--variants", VARIANTS)
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion-mnist"])
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, help="instead of ten")
    parser.add_argument("--examples", type=int, help="train on the first of them only")
    parser.add_argument("--samples", type=int, default=N_SAMPLES)
    options = parser.parse_args()
    if options.tiny:
        options.data, options.epochs, options.samples = ["digits"], 1, 20
        options.seeds = options.seeds[:1]
    one_thread()

    # All are loaded first, so that one that is missing is noticed before the others are trained on.
    data_sets = {name: load(name, data_dir=options.data_dir) for name in options.data}

    rows, cells = Rows(options.out), []
    for name, data in data_sets.items():
        data = replace(data, train=data.train.take(slice(options.examples)))
        recipe = read_papers_recipe(name) | {"stage_2_epochs": 0}
        recipe.pop("data")
        if options.epochs:
            recipe["stage_1_epochs"] = options.epochs

        found = []
        for seed in options.seeds:
            for variant, change in options.variants:
                settings = recipe | change | {"seed": seed}
                key = {"data": name, "variant": variant, "seed": seed, "options": settings}
                key |= facts(data) | {"samples": options.samples}
                found.append(rows.find_or_make(key, measure, data, settings, options.samples))

        cells += compare(name, found, options.variants)

    heads = ["data", "variant", *FIGURES.values(), *COMPARED.values()]
    print(table(heads, cells))


if __name__ == "__main__":
    main()
