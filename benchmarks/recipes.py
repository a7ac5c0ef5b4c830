"""Which options make the best recipe? Compares them over seeds, in stage 1.

    python benchmarks/recipes.py --data-dir DATA --examples 10000 --epochs 5

Screening is on few examples and epochs; those that survive it are compared at their full length:

    python benchmarks/recipes.py --data-dir DATA --variants paper \
        "d 32:latent_dim=32,learning_rate=0.01,batch_size=128"

A variant is what it changes in the recipe of the paper's sizes. Each model is judged by the test
ELBO, by the Fréchet distance of its reconstructions, and for each number of components of the
mixture by the Fréchet distance of its samples and by the log-density of held-out codes; a mixture
that memorises gains in the one and loses in the other. Log-densities compare at equal d only.
Distances are from as many test images as there are samples. Differences are to the first variant,
with equal seeds.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
"""

import math
from dataclasses import replace

import torch
from experiment import Rows, arguments, facts, one_thread, over_seeds, paired, trained
from noise_updates import BATCH, N_SAMPLES, distance_from_test, sample_distance
from tables import table

from equipoise.config import read_papers_recipe
from equipoise.data import Batches, load
from equipoise.model import encode_all
from equipoise.randomness import stream
from equipoise.sources import fit_aggregate

BASE = {"latent_dim": 32, "learning_rate": 0.01, "batch_size": 256}
VARIANTS = {
    "paper": {"latent_dim": 16, "learning_rate": 0.005},
    "d 32": BASE,
    "d 64": BASE | {"latent_dim": 64},
    "rate .005": BASE | {"learning_rate": 0.005},
    "rate .02": BASE | {"learning_rate": 0.02},
    "EMA .99": BASE | {"ema_decay": 0.99},
    "EMA .999": BASE | {"ema_decay": 0.999},
    "batch 128": BASE | {"batch_size": 128},
    "width 48": BASE | {"width": 48},
    "weight decay .1": BASE | {"weight_decay": 0.1},
    "residual": BASE | {"architecture": "residual"},
}
"""What is screened: the paper's setting, and one change at a time from 32 units at rate .01."""
COMPONENTS = (32, 256)


def measure(data, options, components, n_samples):
    """Train one model in stage 1, and judge it with mixtures of several sizes."""
    trainer, history = trained(data, options)
    test = trainer.figures(trainer.test)
    model, device = trainer.model.eval(), trainer.fabric.device
    row = {
        "test_elbo": test.elbo,
        "test_mse": test.mse,
        "noise_var": test.noise_var,
        "active_units": test.active_units,
        "kept_epoch": history[-1]["kept_epoch"],
        "training_seconds": round(sum(epoch["seconds"] for epoch in history), 1),
    }

    seed = trainer.config.seed
    row["reconstructions"] = reconstruction_distance(model, data, n_samples, seed, device).value
    codes = held_out_codes(model, data, seed, device)
    for k in components:
        config = replace(trainer.config, n_components=k)
        mixture = fit_aggregate(model, data, config, device).mixture
        name = f"mixture {k}"
        distance = sample_distance(model, mixture, data, n_samples, seed, device)
        row[name] = distance.value
        row[f"{name}, error"] = distance.standard_error
        row[f"{name}, codes"] = float(mixture.log_prob(codes).mean())
    return row


@torch.no_grad()
def reconstruction_distance(model, data, n, seed, device):
    """Compute the Fréchet distance of the reconstructions of n test images from these."""
    generator = stream(seed, "reconstructions", device=device)
    return distance_from_test(
        lambda x: model.decode(model.encode(x).sample(generator)).mean, model, data, n, device
    )


@torch.no_grad()
def held_out_codes(model, data, seed, device):
    """Draw a code of each test image."""
    generator = stream(seed, "codes", device=device)
    return encode_all(model, Batches(data.test, BATCH, device).epoch()).sample(generator)


def compare(name, rows, variants, components):
    """Lay out one data set: a row for each variant."""
    found = {variant: [row for row in rows if row["variant"] == variant] for variant, _ in variants}
    first = next(iter(found.values()))
    columns = ["test_elbo", "reconstructions", *(f"mixture {k}" for k in components)]

    cells = []
    for variant, of_variant in found.items():
        cell = [name, variant]
        for column in columns:
            text = over_seeds([row[column] for row in of_variant])
            if of_variant is not first:
                text += f" ({paired(of_variant, first, column)})"
            cell.append(text)
        cell += [over_seeds([row[f"mixture {k}, codes"] for row in of_variant]) for k in components]
        seconds = math.fsum(row["training_seconds"] for row in of_variant) / len(of_variant)
        cells.append([*cell, f"{seconds:.0f}"])
    return cells


def main():
    """Train what is not in the JSON yet, and print the table."""
    out = "results/benchmark-recipes.json"
    parser = arguments(__doc__.splitlines()[0], out, "--variants", VARIANTS)
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion-mnist"])
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's and the variants'")
    parser.add_argument("--examples", type=int, help="train on the first of them only")
    parser.add_argument("--components", type=int, nargs="+", default=COMPONENTS)
    parser.add_argument("--samples", type=int, default=N_SAMPLES)
    options = parser.parse_args()
    if options.tiny:
        options.data, options.epochs, options.samples = ["digits"], 1, 20
        options.seeds = options.seeds[:1]
        options.variants, options.components = options.variants[:2], [4]
    one_thread()

    # All are loaded first, so that one that is missing is noticed before the others are trained on.
    data_sets = {name: load(name, data_dir=options.data_dir) for name in options.data}

    rows, cells = Rows(options.out), []
    for name, data in data_sets.items():
        data = replace(data, train=data.train.take(slice(options.examples)))
        recipe = read_papers_recipe(name)
        recipe.pop("data")

        found = []
        for seed in options.seeds:
            for variant, change in options.variants:
                settings = recipe | change | {"seed": seed, "stage_2_epochs": 0}
                if options.epochs:
                    settings["stage_1_epochs"] = options.epochs
                key = {"data": name, "variant": variant, "seed": seed, "options": settings}
                key |= facts(data) | {"samples": options.samples}
                make = (data, settings, options.components, options.samples)
                found.append(rows.find_or_make(key, measure, *make))
        cells += compare(name, found, options.variants, options.components)

    sizes = [f"Fréchet distance, K = {k}" for k in options.components]
    codes = [f"log-density of codes, K = {k}" for k in options.components]
    heads = ["data", "variant", "test ELBO, nats", "reconstructions", *sizes, *codes, "seconds"]
    print(table(heads, cells))


if __name__ == "__main__":
    main()
