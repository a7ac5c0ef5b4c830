"""equipoise against pythae on MNIST, judged by one protocol.

    python benchmarks/peers.py --data-dir DATA --threads 1

Networks, start, data, batch size and epochs are the same. pythae comes with the extra `benchmarks`:

    pip install -c constraints.txt -e ".[benchmarks]"

That also installs the package dataclasses, a backport that pythae asks for. Python does not import
it, since its own module of that name comes first.

Every model starts from the networks of `make_model` with the recipe of the data. The models of
pythae have its default weights of the loss, and its own trainer, which keeps the epoch with the
best validation loss:

- ``pythae-*``: Adam at a constant 1e-3;
- ``pythae-*-scheduled``: the optimiser of equipoise, AdamW with betas (.9, .99), its peak rate,
  warm-up over the first epoch and cosine decay. pythae changes the rate once an epoch, so the first
  epoch has the mean rate of the warm-up. pythae does not clip gradients.

Samples and reconstructions (of the mean code) are the decoder's means, as 8-bit images. A model is
not trained again if it is already in the JSON with the same options, data, versions and start.
"""

import hashlib
import json
import logging
from dataclasses import replace
from importlib.metadata import version

import torch
from command import TINY, Command
from experiment import Clock, scaled, start

from equipoise.aggregate import StandardNormal
from equipoise.config import make_config, read_papers_recipe
from equipoise.data import Batches, load
from equipoise.files import write_json
from equipoise.metrics.features import cached_features, features_of, load_features
from equipoise.metrics.samples import sample_quality
from equipoise.processes import choose_device
from equipoise.provenance import provenance
from equipoise.sources import fit_aggregate
from equipoise.training.trainer import Trainer

BATCH = 500
N_SAMPLES = 10_000
PYTHAE = ("vae", "wae-mmd", "rae-l2")
OURS = "equipoise"
TWO_STAGES = "equipoise-two-stages"
MODELS = [
    OURS,
    *(f"pythae-{kind}" for kind in PYTHAE),
    *(f"pythae-{kind}-scheduled" for kind in PYTHAE),
    TWO_STAGES,
]


class Images:
    """Images of a trained model in model units, and the seconds that its training took."""

    def __init__(self, reconstruction, prior, mixture, seconds):
        self.rows = {"reconstruction": reconstruction, "prior": prior, "mixture": mixture}
        self.seconds = seconds


def fit_equipoise(data, config):
    """Train a model by Algorithm 1; return it and the clock of the training."""
    model = start(data, config)

    clock = Clock()
    Trainer(model, data, config).fit()
    clock.lap("training")

    return model.eval(), clock


def samples(model, n, source, generator):
    """Decode codes of a source, a batch at a time."""
    sizes = [min(BATCH, n - first) for first in range(0, n, BATCH)]
    return torch.cat([model.generate(size, source, generator).mean.cpu() for size in sizes])


def train_equipoise(data, config):
    """Train by Algorithm 1, fit a mixture to the aggregate posterior, and make images."""
    model, clock = fit_equipoise(data, config)
    device = choose_device(config.accelerator)
    mixture = fit_aggregate(model, data, config, device).mixture
    clock.lap("mixture")

    generator = torch.Generator(device).manual_seed(config.seed)
    n = min(N_SAMPLES, len(data.test))

    def sample(source):
        return samples(model, n, source, generator)

    with torch.no_grad():
        prior = sample(StandardNormal(model.latent_dim).to(device))
        from_mixture = sample(mixture)

        reconstructions = [
            model.reconstruct(model.scaling(raw)).mean.cpu()
            for raw in Batches(data.test, BATCH, device).epoch()
        ]

    return Images(torch.cat(reconstructions), prior, from_mixture, clock.seconds)


def train_pythae(kind, data, config, settings):
    """Train by the pipeline of pythae, fit its mixture, and make images."""
    from pythae.samplers import NormalSampler
    from pythae_models import fit_pythae, fit_pythae_mixture

    model, clock = fit_pythae(kind, data, config, settings)
    mixture = fit_pythae_mixture(model, data, config.n_components)
    clock.lap("mixture")

    test = scaled(model.decoder.model, data.test)
    n = min(N_SAMPLES, len(data.test))
    with torch.no_grad():
        reconstructions = [
            model.predict(x.to(mixture.device)).recon_x.cpu() for x in test.split(BATCH)
        ]
        prior = NormalSampler(model).sample(n).cpu()
        from_mixture = mixture.sample(n).cpu()

    return Images(torch.cat(reconstructions), prior, from_mixture, clock.seconds)


def train(name, data, config):
    """Train the model of a name, and make images."""
    if name == OURS:
        return train_equipoise(data, config)

    if name == TWO_STAGES:
        first = round(0.7 * config.stage_1_epochs)
        epochs = {"stage_1_epochs": first, "stage_2_epochs": config.stage_1_epochs - first}
        return train_equipoise(data, replace(config, **epochs))

    from pythae_models import optimiser

    kind = name.removeprefix("pythae-").removesuffix("-scheduled")
    return train_pythae(kind, data, config, optimiser(config, name.endswith("-scheduled")))


def judge(images, data, scaling, extractor, reference, seed):
    """Compute the figures of a model from its images."""
    x = scaling(torch.from_numpy(data.test[:]))
    row = {
        "test_mse": float((images.rows["reconstruction"] - x).square().mean()),
        "seconds": images.seconds,
    }

    for source, means in images.rows.items():
        features = features_of(extractor, scaling.restore_levels(means).split(BATCH))
        quality = sample_quality(features, reference, seed)
        row[source] = {
            "frechet_distance": quality.frechet._asdict(),
            "kernel_distance": quality.kernel._asdict(),
        }

    return row


def fingerprint(model, data):
    """Return a hash of the output of untrained networks for a few images and codes."""
    with torch.no_grad():
        posterior = model.encode(scaled(model, data.test.take(slice(8))))
        outputs = (posterior.mean, posterior.log_var, model.decode_mean(posterior.mean))
        numbers = torch.cat([output.flatten() for output in outputs])

    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]


def table(rows):
    """Make a Markdown table; the numbers in brackets are ratios to ours."""
    lines = [
        "| | test MSE | Fréchet distance, reconstructions | prior | mixture "
        "| kernel distance, mixture | training, s |",
        "|---|---|---|---|---|---|---|",
    ]

    for name, row in rows.items():
        cells = [f"{row['test_mse']:.5f}{_ratio(row, rows, lambda row: row['test_mse'])}"]

        for source in ("reconstruction", "prior", "mixture"):
            distance = row[source]["frechet_distance"]
            ratio = _ratio(
                row, rows, lambda row, source=source: row[source]["frechet_distance"]["value"]
            )
            cells.append(f"{distance['value']:.1f} ± {distance['standard_error']:.1f}{ratio}")

        kernel = row["mixture"]["kernel_distance"]
        cells.append(f"{kernel['value']:.4f} ± {kernel['standard_error']:.4f}")

        ratio = _ratio(row, rows, lambda row: row["seconds"]["training"])
        cells.append(f"{row['seconds']['training']:.0f}{ratio}")

        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    return "\n".join(lines)


def _ratio(row, rows, figure):
    if OURS not in rows or row is rows[OURS]:
        return ""

    return f" ({figure(row) / figure(rows[OURS]):.2f})"


def main():
    """Train the models that are not in the JSON yet, and compare."""
    parser = Command(__doc__, "results/benchmark-peers-{data}.json", "mnist")
    parser.add_argument("--data-dir")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=MODELS,
        metavar="MODEL",
        help=", ".join(MODELS),
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    from pythae_models import optimiser

    recipe = read_papers_recipe(options.data)
    data = load(recipe.pop("data"), data_dir=options.data_dir)
    if options.tiny:
        recipe, options.epochs = recipe | TINY, 1
    changes = {
        "stage_1_epochs": options.epochs,
        "stage_2_epochs": 0,
        "tolerance": 0.0,
        "accelerator": options.accelerator,
    }
    config = make_config(recipe | changes)

    model = start(data, config)
    extractor = load_features("efficientnet-lite0", data)

    about = provenance(data=data, options=config.as_dict())
    about["versions"]["pythae"] = version("pythae")
    about |= {
        "threads": options.threads,
        "n_samples": min(N_SAMPLES, len(data.test)),
        "features": extractor.name,
        "start": fingerprint(model, data),
        "pythae_optimisers": {
            "": optimiser(config, is_scheduled=False),
            "scheduled": optimiser(config, is_scheduled=True),
        },
    }
    about = json.loads(json.dumps(about))  # as it will read in the file

    before = json.loads(options.out.read_text()) if options.out.is_file() else {}
    is_same = all(
        before.get(key) == value for key, value in about.items() if key not in ("command", "date")
    )
    rows = before["rows"] if is_same else {}

    reference = cached_features(extractor, data.test, Batches(data.test, BATCH).epoch())
    for name in options.models:
        if name in rows:
            continue

        images = train(name, data, config)
        rows[name] = judge(images, data, model.scaling, extractor, reference, config.seed)
        rows = {name: rows[name] for name in MODELS if name in rows}

        write_json(options.out, about | {"rows": rows})
        print(name, json.dumps(rows[name]), flush=True)

    print(table(rows))


if __name__ == "__main__":
    main()
