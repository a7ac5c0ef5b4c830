"""How long until samples are as good as the best of pythae after ten epochs of MNIST?

    python benchmarks/time_to_quality.py --data-dir DATA

It needs the extra `benchmarks`. Among the models of pythae, WAE-MMD with its
Gaussian mixture has the lowest Fréchet distance, see results/benchmark-peers-mnist.json. Here it is
trained again, by the function of peers.py, with the latent units of the recipe and with twice that
number. Ours is trained for budgets of a few epochs, each with its whole schedule, from the same
networks.

Seconds are those of training, validation and fit of the mixture. The mixture has 32 components for
both, as in the recipe, or 64. A row is not made again if it is already in the JSON with the same
versions, options, data and threads.
"""

import json
import logging
from dataclasses import replace
from importlib.metadata import version

import torch
from command import TINY, Command
from experiment import start
from peers import BATCH, N_SAMPLES, fit_equipoise, samples
from tables import time_to_quality
from throughput import PRECISIONS

from equipoise.config import make_config, read_recipe, shipped_recipes
from equipoise.data import Batches, load
from equipoise.files import write_json
from equipoise.metrics.features import cached_features, features_of, load_features
from equipoise.metrics.samples import sample_quality
from equipoise.processes import choose_device
from equipoise.provenance import provenance
from equipoise.sources import fit_aggregate

COMPONENTS = (32, 64)
LEARNING_RATE = 0.01
"""Learning rate of ours: a schedule of a few epochs can take more than the recipe's 0.005."""


def name_of(method, epochs, latent_dim):
    """Return the name of a row."""
    return f"{method}, {epochs} epochs, d = {latent_dim}"


def make_theirs(data, config):
    """Train the model of pythae; return its seconds, and samples and seconds of each mixture."""
    from pythae_models import fit_pythae, fit_pythae_mixture, optimiser

    model, clock = fit_pythae("wae-mmd", data, config, optimiser(config, is_scheduled=False))
    n, found = min(N_SAMPLES, len(data.test)), {}

    for K in COMPONENTS:
        clock.lap("")
        mixture = fit_pythae_mixture(model, data, K)
        clock.lap("mixture")
        found[K] = mixture.sample(n).cpu(), clock.seconds["mixture"]

    return clock.seconds["training"], found


def make_ours(data, config):
    """Train our model; return its seconds, and samples and seconds of each mixture."""
    model, clock = fit_equipoise(data, config)
    device = choose_device(config.accelerator)
    n, found = min(N_SAMPLES, len(data.test)), {}

    for K in COMPONENTS:
        clock.lap("")
        mixture = fit_aggregate(model, data, replace(config, n_components=K), device).mixture
        clock.lap("mixture")

        generator = torch.Generator(device).manual_seed(config.seed)
        with torch.no_grad():
            found[K] = samples(model, n, mixture, generator), clock.seconds["mixture"]

    return clock.seconds["training"], found


def main():
    """Make the rows that are missing."""
    parser = Command(__doc__, "results/benchmark-time-to-quality.json", "mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", nargs="+", type=int, default=[4, 8], help="epochs of ours")
    parser.add_argument("--latent-dims", nargs="+", type=int, default=[16, 32])
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="precision of ours")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args()
    logging.disable(logging.INFO)

    recipe = read_recipe(shipped_recipes()[options.data])
    data = load(recipe.pop("data"), data_dir=options.data_dir)
    if options.tiny:
        recipe, options.epochs, options.latent_dims = recipe | TINY, [1], [2]
    changes = {
        "stage_1_epochs": 1 if options.tiny else 10,
        "stage_2_epochs": 0,
        "tolerance": 0.0,
        "accelerator": options.accelerator,
    }
    config = make_config(recipe | changes)

    about = provenance(data=data, options=config.as_dict())
    about["versions"]["pythae"] = version("pythae")
    about |= {"threads": torch.get_num_threads(), "n_samples": min(N_SAMPLES, len(data.test))}
    about = json.loads(json.dumps(about))  # as it will read in the file

    before = json.loads(options.out.read_text()) if options.out.is_file() else {}
    is_same = all(
        before.get(key) == value for key, value in about.items() if key not in ("command", "date")
    )
    rows = before["rows"] if is_same else {}

    extractor = load_features("efficientnet-lite0", data)
    reference = cached_features(extractor, data.test, Batches(data.test, BATCH).epoch())
    scaling = start(data, config).scaling

    models = {}
    for d in options.latent_dims:
        theirs = replace(config, latent_dim=d)
        models[name_of("pythae WAE-MMD", theirs.stage_1_epochs, d)] = make_theirs, theirs

        for epochs in options.epochs:
            ours = replace(
                theirs,
                stage_1_epochs=epochs,
                precision=PRECISIONS[options.precision],
                learning_rate=LEARNING_RATE,
            )
            models[name_of(f"equipoise {options.precision}", epochs, d)] = make_ours, ours

    for name, (make, its_config) in models.items():
        if name in rows:
            continue

        training_seconds, found = make(data, its_config)
        mixtures = []
        for K, (means, seconds) in found.items():
            features = features_of(extractor, scaling.restore_levels(means).split(BATCH))
            frechet = sample_quality(features, reference, config.seed).frechet
            mixtures.append(
                {"components": K, "seconds": seconds, "frechet_distance": frechet._asdict()}
            )

        rows[name] = {"training_seconds": training_seconds, "mixtures": mixtures}
        rows = {name: rows[name] for name in (*models, *rows) if name in rows}

        write_json(options.out, about | {"rows": rows})
        print(name, json.dumps(rows[name]), flush=True)

    print(time_to_quality(about | {"rows": rows}))


if __name__ == "__main__":
    main()
