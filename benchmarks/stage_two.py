"""Which stage 2 should be the default? Trains each variant from one stage 1, and compares.

    python benchmarks/stage_two.py mnist --data-dir DATA

The comparison is on the test set. The rule: the error stays within 2 % of that of stage 1, and
among the variants for which it does, the one with the best held-out likelihood wins.

    python benchmarks/stage_two.py mnist --data-dir DATA --speed

measures the examples per second of a step in stage 1, and of each network and each kind of
gradients in stage 2. The kinds take turns, a few steps each, and the quickest turn counts, so that
other work of the machine changes no ratio.
"""

import copy
import math
import time
from dataclasses import replace

import torch
from command import TINY, Command

from equipoise.config import TrainConfig, make_config, read_papers_recipe
from equipoise.data import Batches, load
from equipoise.estimate import Estimate
from equipoise.files import write_json
from equipoise.metrics.likelihood import iwae, likelihood
from equipoise.paper.protocol import PAPERS_STAGE_2
from equipoise.provenance import provenance
from equipoise.stages import Stage
from equipoise.training.descent import Descent
from equipoise.training.engine import make_fabric
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


SPEED = "benchmark-stage-two-speed"
SPEEDS = {
    "stage 1": {},
    **{
        f"{network}, {gradients}": {
            "stage_2_network": network,
            "stage_2_gradients": gradients,
        }
        for network in ("decoder", "head")
        for gradients in ("joint", "stop", "frozen")
    },
}


def speeds(data, config, rounds=20, steps=3):
    """Measure examples per second of each kind of step, and the ratio to stage 1."""
    torch.manual_seed(config.seed)
    base = make_model(data, config)
    raw = torch.from_numpy(data.train[: config.batch_size])
    x = base.scaling(raw).contiguous(memory_format=base.memory_format)

    descents = {}
    for name, change in SPEEDS.items():
        model, options = copy.deepcopy(base), replace(config, **change)
        stage = Stage.SHARED_VARIANCE
        if change:
            stage = Stage.PREDICTED_VARIANCE
            var = torch.tensor(0.01)
            model.predict_variance(var, var, network=options.stage_2_network)
        fabric = make_fabric(options)
        model.place(fabric.device)
        descents[name] = Descent(model, options, stage, 1000, fabric)

    generator = torch.Generator().manual_seed(config.seed)
    seconds = dict.fromkeys(SPEEDS, math.inf)
    for _ in range(rounds):
        for name, descent in descents.items():
            started = time.perf_counter()
            for _ in range(steps):
                descent.step(x, generator, len(x))
            seconds[name] = min(seconds[name], time.perf_counter() - started)

    return {
        name: {
            "examples_per_second": round(steps * len(x) / took),
            "over_stage_1": round(seconds["stage 1"] / took, 3),
        }
        for name, took in seconds.items()
    }


def main():
    """Train and compare, and write the JSON."""
    parser = Command(__doc__, "results/{result}-{data}.json")
    parser.add_argument("data", choices=["mnist", "fashion-mnist", "digits"])
    parser.add_argument("--data-dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--speed",
        action="store_const",
        dest="result",
        const=SPEED,
        default="stage-two",
        help="measure steps, and train nothing",
    )
    parser.add_argument("--threads", type=int, default=1, help="of --speed")
    parser.add_argument("--architecture", default="auto", help="of --speed")
    options = parser.parse_args()

    recipe = read_papers_recipe(options.data)
    recipe.pop("data")
    if options.tiny:
        recipe |= TINY
    config: TrainConfig = make_config(recipe | PAPERS_STAGE_2 | {"seed": options.seed})
    data = load(options.data, data_dir=options.data_dir)

    if options.result == SPEED:
        torch.set_num_threads(options.threads)
        config = replace(config, architecture=options.architecture, accelerator="cpu")
        rows = speeds(data, config, *((1, 1) if options.tiny else ()))
        for name, row in rows.items():
            print(f"{name:18} {row['examples_per_second']:6}/s  {row['over_stage_1']:.2f}")

        about = provenance(data=data, options=config.as_dict()) | {"threads": options.threads}
        write_json(options.out, about | {"rows": rows})
        return

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

    result = provenance(data=data, options=config.as_dict()) | {"rows": rows}
    write_json(options.out, result)


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
