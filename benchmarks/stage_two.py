"""Which stage 2 should be the default? Trains each variant from one stage 1, and compares.

    python benchmarks/stage_two.py mnist --data-dir DATA

The comparison is on the test set. The rule: the error stays within 2 % of that of stage 1, and
among the variants for which it does, the one with the best held-out likelihood wins.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from equipoise.config import TrainConfig, make_config, read_recipe, shipped_recipes
from equipoise.data import Batches, load
from equipoise.estimate import Estimate
from equipoise.metrics.likelihood import iwae, likelihood
from equipoise.provenance import provenance
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

VARIANTS = {
    "stop, floor 1": {"stage_2_gradients": "stop", "floor": 1.0},
    "joint, floor 1": {"stage_2_gradients": "joint", "floor": 1.0},
    "stop, floor 0.001": {"stage_2_gradients": "stop", "floor": 1e-3},
    "joint, floor 0.001": {"stage_2_gradients": "joint", "floor": 1e-3},
}


def figures(model, data, seed=0):
    """Compute test ELBO, KL, MSE, IWAE-20 of the first 500 examples, and coverage at one std."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    whole = likelihood(model, Batches(data.test, 1000).epoch(), generator)

    first = Batches(data.test.take(slice(500)), 50).epoch()
    bound = Estimate.of_mean(iwae(model, first, 20, generator=generator)[0, 0])

    inside = count = 0
    with torch.no_grad():
        for raw in Batches(data.test, 1000).epoch():
            x = model.scaling(raw)
            reconstruction = model.reconstruct(x)
            inside += int(((x - reconstruction.mean).abs() <= reconstruction.std).sum())
            count += x.numel()

    return {
        "elbo": whole.elbo._asdict(),
        "kl": whole.kl._asdict(),
        "mse": whole.mse._asdict(),
        "iwae_20_first_500": bound._asdict(),
        "coverage_1": inside / count,
        "noise_floor_var": whole.floor_var,
    }


def main():
    """Train and compare, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=["mnist", "fashion-mnist", "digits"])
    parser.add_argument("--data-dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    recipe = read_recipe(shipped_recipes()[options.data])
    recipe.pop("data")
    config: TrainConfig = make_config(recipe | {"seed": options.seed})
    data = load(options.data, data_dir=options.data_dir)

    torch.manual_seed(config.seed)
    model = make_model(data, config)
    Trainer(model, data, replace(config, stage_2_epochs=0)).fit()
    rows = {"stage 1": figures(model, data)}
    print(f"{'stage 1':22}", describe(rows["stage 1"]), flush=True)

    for name, change in VARIANTS.items():
        started = time.perf_counter()
        variant = copy.deepcopy(model).train()
        Trainer(variant, data, replace(config, stage_1_epochs=0, **change)).fit()
        rows[name] = figures(variant, data) | {"seconds": round(time.perf_counter() - started, 1)}
        print(f"{name:22}", describe(rows[name]), flush=True)

    out = options.out or Path(f"results/stage-two-{options.data}.json")
    out.parent.mkdir(exist_ok=True)
    result = provenance(data=data, options=config.as_dict()) | {"rows": rows}
    out.write_text(json.dumps(result, indent=2) + "\n")


def describe(row):
    """Write the figures of one model on a line."""
    return (
        f"ELBO {row['elbo']['value']:7.1f}  KL {row['kl']['value']:5.1f}  "
        f"MSE {row['mse']['value']:.5f}  IWAE-20 {row['iwae_20_first_500']['value']:7.1f}  "
        f"within 1 std {row['coverage_1']:.3f}  "
        f"floor std {math.sqrt(row['noise_floor_var']):.4f}"
    )


if __name__ == "__main__":
    main()
