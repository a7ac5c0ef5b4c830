"""Are the maps of the std right? Compares floors and likelihoods of stage 2, and recalibrations.

    python benchmarks/calibration.py mnist --data-dir DATA --stage-1-epochs 6 --stage-2-epochs 3

From one stage 1, a stage 2 is trained for each floor, and recalibrated in each way. Those of
``--digital-floors`` descend the probability of the levels, and are not recalibrated. The comparison
is on the test set. Over the pixels that vary, and over those off the bounds of the scale, it gives
the shares of the errors within 1, 2 and 3 predicted std, and within the intervals that were
calibrated on the validation set for the same shares. Bits per dimension, IWAE-20, are those of the
levels and of the dequantised data.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path

import torch
from command import TINY, Command

from equipoise.config import make_config, read_papers_recipe
from equipoise.data import Batches, load
from equipoise.data.varying import varying_mask
from equipoise.estimate import Estimate
from equipoise.files import write_json
from equipoise.metrics.calibration import noise_calibration
from equipoise.metrics.likelihood import bits_per_dimension, iwae, likelihood
from equipoise.paper.protocol import PAPERS_STAGE_2
from equipoise.provenance import provenance
from equipoise.store import load_model, save_model
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

RECALIBRATIONS = ("none", "scale", "coverage")
SHARES = (1.0, 2.0, 3.0)


def main():
    """Train and compare, and write the JSON."""
    parser = Command(__doc__, "results/calibration-{data}.json")
    parser.add_argument("data", choices=["mnist", "fashion-mnist", "celeba", "digits"])
    parser.add_argument("--data-dir")
    parser.add_argument("--stage-1-epochs", type=int)
    parser.add_argument("--stage-2-epochs", type=int)
    parser.add_argument("--floors", nargs="+", default=["1.0", "0.01", "quantisation"])
    parser.add_argument("--digital-floors", nargs="*", default=[])
    parser.add_argument("--recalibrations", nargs="+", default=RECALIBRATIONS)
    parser.add_argument("--train-examples", type=int, help="training examples; all if not given")
    parser.add_argument("--examples", type=int, default=2000, help="test examples")
    parser.add_argument("--iwae-examples", type=int, default=500, help="test examples for IWAE-20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--models",
        type=Path,
        help="folder to keep the models in; models in it are not trained again",
    )
    options = parser.parse_args()

    recipe = read_papers_recipe(options.data)
    recipe.pop("data")
    if options.tiny:
        recipe |= TINY
        options.examples, options.iwae_examples = 100, 20
    changes = {
        "stage_1_epochs": options.stage_1_epochs,
        "stage_2_epochs": options.stage_2_epochs,
        "seed": options.seed,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    config = make_config(recipe | PAPERS_STAGE_2 | changes)
    data = load(options.data, data_dir=options.data_dir)
    if options.train_examples:
        data = replace(data, train=data.train.take(slice(options.train_examples)))

    def load_or_train(name, train):
        file = options.models and options.models / f"{name}.safetensors"
        if file and file.is_file():
            return load_model(file)

        model = train().eval()
        if file:
            save_model(file, model)

        return model

    def stage_1():
        torch.manual_seed(config.seed)
        model = make_model(data, config)
        Trainer(model, data, replace(config, stage_2_epochs=0)).fit()
        return model

    def stage_2(**changes):
        model = copy.deepcopy(base).train()
        Trainer(model, data, replace(config, stage_1_epochs=0, **changes)).fit()
        return model

    base = load_or_train("stage1", stage_1)
    varying = varying_mask(data.train)

    rows = {}
    heads = [("density", floor) for floor in options.floors]
    heads += [("digital", floor) for floor in options.digital_floors]
    for head, text in heads:
        floor = text if text == "quantisation" else float(text)
        changes = {"floor": floor, "stage_2_likelihood": head}
        prefix = "" if head == "density" else f"{head}-"
        model = load_or_train(f"{prefix}floor-{text}", lambda changes=changes: stage_2(**changes))

        for recalibrate in options.recalibrations if head == "density" else ["none"]:
            # The same as at the end of a training with this option.
            variant = copy.deepcopy(model)
            Trainer(variant, data, replace(config, recalibrate=recalibrate)).recalibrate()

            name = f"{head} floor={text} recalibrate={recalibrate}"
            rows[name] = figures(variant.eval(), data, varying, options)
            print(f"{name:46}", describe(rows[name]), flush=True)

    about = provenance(data=data, options=config.as_dict())
    about |= {"examples": options.examples, "iwae_examples": options.iwae_examples}
    about["train_examples"] = len(data.train)
    about["varying_share"] = float(varying.float().mean())

    write_json(options.out, about | {"rows": rows})


def figures(model, data, varying, options):
    """Compute the figures of one model on the first test examples."""
    test = data.test.take(slice(options.examples))
    generator = torch.Generator().manual_seed(options.seed)
    mse = likelihood(model, Batches(test, 500).epoch(), generator).mse

    first = Batches(data.test.take(slice(options.iwae_examples)), 50).epoch()
    bounds = iwae(model, first, 20, generator=generator, dequantised=True, digital=True)
    dimensions, quantum = math.prod(model.shape), model.scaling.quantum
    dequantised = bits_per_dimension(Estimate.of_mean(bounds[1, 0]), dimensions, quantum)
    exact = bits_per_dimension(Estimate.of_mean(bounds[2, 0]), dimensions)

    calibration = noise_calibration(model, Batches(test, 500).epoch(), varying, generator)
    row = {
        "scale": float((0.5 * model.noise.calibration).exp().mean()),
        "interval_factors": [model.noise.interval_factor(k) for k in SHARES],
        "mse": mse._asdict(),
        "bits_per_dim": exact._asdict(),
        "bits_per_dim_dequantised": dequantised._asdict(),
    }
    row |= _estimates(calibration.varying_dimensions)
    row["off_bounds"] = _estimates(calibration.off_bounds)
    row["off_bounds_share"] = calibration.off_bounds_share

    return row


def _estimates(part):
    """Take the figures of a calibration, without its curves."""
    figures = part._asdict().items()
    return {name: figure._asdict() for name, figure in figures if isinstance(figure, Estimate)}


def describe(row):
    """Write the figures of one model on a line."""

    def shares(part, prefix=""):
        return " ".join(f"{part[f'{prefix}coverage_{k}']['value']:.3f}" for k in (1, 2, 3))

    off_bounds = row["off_bounds"]
    factors = ", ".join(f"{factor:.2f}" for factor in row["interval_factors"])

    return (
        f"x {row['scale']:.3f}  MSE {row['mse']['value']:.5f}  "
        f"bits {row['bits_per_dim']['value']:.3f} "
        f"(dequantised {row['bits_per_dim_dequantised']['value']:.3f})  "
        f"std {shares(row)}  as levels {shares(row, 'digital_')}  "
        f"intervals {shares(row, 'interval_')} ({factors} std)  "
        f"ENCE {row['normalised_calibration_error']['value']:.3f}  "
        f"off the bounds ({row['off_bounds_share']:.3f}): "
        f"std {shares(off_bounds)}  as levels {shares(off_bounds, 'digital_')}  "
        f"ENCE {off_bounds['normalised_calibration_error']['value']:.3f}  "
        f"AUSE {row['sparsification_error_area']['value']:.3f}"
    )


if __name__ == "__main__":
    main()
