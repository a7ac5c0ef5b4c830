"""What does the correlation of the errors gain? Compares its forms on one trained model.

    python benchmarks/correlated_noise.py --data-dir DATA

A model is trained with one variance, then with a predicted one. At both points each form of
correlation is estimated on the validation set, while the networks stand still. The comparison is on
test images: log p(x|z) and the bound with z ~ q(z|x), and bits per dimension of the dequantised
data, IWAE-20.
"""

import copy
import math
import time
from dataclasses import replace

import torch
from command import Command

from equipoise.config import make_config
from equipoise.data import Batches, load
from equipoise.estimate import Estimate
from equipoise.files import write_json
from equipoise.metrics.likelihood import bits_per_dimension, iwae, likelihood
from equipoise.noise_fit import fit_correlation
from equipoise.paper.protocol import PAPERS_STAGE_2
from equipoise.provenance import provenance
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

SETTINGS = {
    "mnist": {
        "forms": ("none", "bands", "full", "auto"),
        "sizes": (10_000, 2000, 1000),
        "options": {
            "latent_dim": 16,
            "learning_rate": 0.005,
            "stage_1_epochs": 4,
            "stage_2_epochs": 2,
            "floor": "quantisation",
        },
    },
    "celeba": {
        "forms": ("none", "bands", "auto"),
        "sizes": (2000, 500, 200),
        "options": {
            "latent_dim": 64,
            "batch_size": 64,
            "stage_1_epochs": 6,
            "stage_2_epochs": 2,
            "floor": "quantisation",
        },
    },
}
TINY = {
    "digits": {
        "forms": ("none", "bands", "full", "low-rank", "auto"),
        "sizes": (500, 100, 50),
        "options": {"latent_dim": 4, "width": 4, "stage_1_epochs": 1, "stage_2_epochs": 1},
    }
}


def main():
    """Train, estimate and compare, and write the JSON."""
    parser = Command(__doc__, "results/benchmark-correlated-noise.json")
    parser.add_argument("--data-dir")
    parser.add_argument("--data", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = TINY if options.tiny else {name: SETTINGS[name] for name in options.data}

    about = provenance() | {"seed": options.seed}
    for name, setting in settings.items():
        n_train, n_validation, n_test = setting["sizes"]
        whole = load(name, data_dir=options.data_dir)
        data = replace(
            whole,
            train=whole.train.take(slice(n_train)),
            validation=whole.validation.take(slice(n_validation)),
            test=whole.test.take(slice(n_test)),
        )
        about[name] = provenance(data=data, options=setting["options"]) | {
            "rows": compare(data, setting, options.seed)
        }
        write_json(options.out, about)


def compare(data, setting, seed):
    """Compute the figures of each stage and form."""
    config = make_config(PAPERS_STAGE_2 | setting["options"] | {"seed": seed, "tolerance": 0.0})
    torch.manual_seed(seed)
    model = make_model(data, config)

    stages = {
        "one variance": replace(config, stage_2_epochs=0),
        "predicted variance": replace(config, stage_1_epochs=0),
    }
    rows = {}
    for stage, of_stage in stages.items():
        Trainer(model.train(), data, of_stage).fit()
        for form in setting["forms"]:
            variant = copy.deepcopy(model).eval()
            started = time.perf_counter()
            fit = fit_correlation(variant, data, form, seed=seed)
            seconds = time.perf_counter() - started

            name = f"{stage}, {form}"
            rows[name] = figures(variant, data, seed) | fit.record()
            rows[name]["seconds_of_fit"] = round(seconds, 1)
            print(f"{data.name:8}{name:26}", describe(rows[name]), flush=True)
    return rows


def figures(model, data, seed):
    """Compute test log-likelihoods, and bits per dimension of dequantised data."""
    generator = torch.Generator().manual_seed(seed)
    whole = likelihood(model, Batches(data.test, 100).epoch(), generator)

    first = Batches(data.test.take(slice(200)), 20).epoch()
    bounds = iwae(model, first, 20, generator=generator, dequantised=True)
    dequantised = Estimate.of_mean(bounds[1, 0])
    bits = bits_per_dimension(dequantised, math.prod(model.shape), model.scaling.quantum)

    return {
        "log_likelihood": whole.log_likelihood._asdict(),
        "elbo": whole.elbo._asdict(),
        "iwae_20_first_200": Estimate.of_mean(bounds[0, 0])._asdict(),
        "bits_per_dim_first_200": bits._asdict(),
        "noise_floor_var": whole.floor_var,
        "mse": whole.mse._asdict(),
    }


def describe(row):
    """Write the main figures in a line."""
    log_likelihood, elbo, bits = (
        row[name]["value"] for name in ("log_likelihood", "elbo", "bits_per_dim_first_200")
    )
    return (
        f"log p(x|z) {log_likelihood:10.1f}  ELBO {elbo:10.1f}  bits per dimension {bits:.3f}  "
        f"{row['setting']}  {row['seconds_of_fit']:.1f} s"
    )


if __name__ == "__main__":
    main()
