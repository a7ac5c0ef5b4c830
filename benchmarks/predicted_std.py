r"""Can the predicted std be believed, and what does that depend on?

    python benchmarks/predicted_std.py --data-dir DATA

From one stage 1 for each data set, a stage 2 is trained for each variant: another network, other
gradients, floors, likelihoods, learning rates, lengths, and other examples. Each is judged on the
test set as it is, and after the monotone calibration by held-out examples. The shares of the errors
within 1, 2 and 3 std, and the calibration error (ENCE), are of the pixels that vary, off the bounds
of the scale. Bits per dimension are of the levels, IWAE-20.

The validation set is halved. The variant ``unseen`` trains its head on the first half, which stage
1 has not learned by heart. All are calibrated on the second.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
"""

import copy
import functools
import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from experiment import Rows, arguments, facts, one_thread, trained
from tables import table

from equipoise.config import make_config
from equipoise.data import Batches, load
from equipoise.data.varying import varying_mask
from equipoise.estimate import Estimate
from equipoise.metrics.calibration import noise_calibration
from equipoise.metrics.likelihood import bits_per_dimension, iwae, likelihood
from equipoise.paper.protocol import PAPERS_STAGE_2
from equipoise.training.trainer import Trainer

N_TEST, N_IWAE = 2000, 200


class Case(NamedTuple):
    """Data, the number of training examples, and options that are not the default."""

    data: str
    n_train: int
    options: dict[str, Any] = MappingProxyType({})


DIGITS = {"latent_dim": 16, "learning_rate": 0.005, "stage_1_epochs": 5}
FACES = {"latent_dim": 64, "batch_size": 64, "stage_1_epochs": 8}
CASES = [
    Case("mnist", 20_000, DIGITS),
    Case("fashion-mnist", 20_000, DIGITS),
    Case("celeba", 3_000, FACES),
]
TINY = [Case("digits", 300, {"latent_dim": 4, "width": 4, "stage_1_epochs": 1})]

HEAD = PAPERS_STAGE_2 | {
    "stage_2_network": "head",
    "stage_2_gradients": "frozen",
    "stage_2_learning_rate": 5e-3,
    "stage_2_epochs": 6,
    "floor": "quantisation",
}
VARIANTS = {
    "as before": PAPERS_STAGE_2 | {"stage_2_epochs": 3},
    "head": HEAD,
    "digital": HEAD | {"stage_2_likelihood": "digital"},
    "second decoder": HEAD | {"stage_2_network": "decoder", "stage_2_learning_rate": 1e-3},
    "stop": HEAD | {"stage_2_gradients": "stop"},
    "floor 1": HEAD | {"floor": 1.0},
    "floor .1": HEAD | {"floor": 0.1},
    "floor .01": HEAD | {"floor": 0.01},
    "rate .001": HEAD | {"stage_2_learning_rate": 1e-3},
    "rate .02": HEAD | {"stage_2_learning_rate": 2e-2},
    "2 epochs": HEAD | {"stage_2_epochs": 2},
    "18 epochs": HEAD | {"stage_2_epochs": 18},
    "unseen": HEAD | {"stage_2_epochs": 100, "unseen": True},
    "digital, second decoder": HEAD
    | {
        "stage_2_likelihood": "digital",
        "stage_2_network": "decoder",
        "stage_2_learning_rate": 1e-3,
    },
}
"""Options of stage 2, and ``unseen`` for a head that is trained on validation examples."""
ON_ALL = ("as before", "head", "digital")
"""Variants for every data set. The others are for MNIST alone, unless they are asked for."""


def halved(data):
    """Divide the validation set: examples to train a head on, and data to calibrate with."""
    middle = len(data.validation) // 2
    unseen = replace(data, train=data.validation.take(slice(0, middle)))
    calibrated = {"validation": data.validation.take(slice(middle, None))}
    return replace(unseen, **calibrated), replace(data, **calibrated)


def measure(base, data, options, sizes):
    """Train a stage 2 on a copy of the model, and judge it with and without calibration."""
    unseen, data_of_calibration = halved(data)
    options = dict(options)
    seen = unseen if options.pop("unseen", False) else data_of_calibration
    config = make_config({**options, "stage_1_epochs": 0, "tolerance": 0.0})

    model = copy.deepcopy(base).train()
    history = Trainer(model, seen, config).fit()
    steps = history[-1]["examples_per_second"]

    row = {"examples_per_second": steps, "mse_before": float(mse(base, data, sizes).value)}
    for option in ("none", "monotone"):
        calibrated = copy.deepcopy(model)
        calibration = replace(config, recalibrate=option)
        Trainer(calibrated, data_of_calibration, calibration).recalibrate()
        row[option] = figures(calibrated.eval(), data, sizes)
    return row


def mse(model, data, sizes):
    """Compute the squared error of the test set, z sampled."""
    device = model.scaling.scale.device
    batches = Batches(data.test.take(slice(sizes[0])), 500, device).epoch()
    return likelihood(model.eval(), batches, torch.Generator(device).manual_seed(0)).mse


def figures(model, data, sizes):
    """Compute the figures of one model on the first test examples."""
    test = data.test.take(slice(sizes[0]))
    device = model.scaling.scale.device
    generator = torch.Generator(device).manual_seed(0)
    whole = likelihood(model, Batches(test, 500, device).epoch(), generator)

    first = Batches(data.test.take(slice(sizes[1])), 50, device).epoch()
    bounds = iwae(model, first, 20, generator=generator, digital=True)
    bits = bits_per_dimension(Estimate.of_mean(bounds[-1, 0]), math.prod(model.shape))

    varying = varying_mask(data.train).to(device)
    calibration = noise_calibration(model, Batches(test, 500, device).epoch(), varying, generator)
    parts = {"varying": calibration.varying_dimensions, "off_bounds": calibration.off_bounds}
    found = {
        name: {key: figure for key, figure in part._asdict().items() if is_figure(figure)}
        for name, part in parts.items()
        if part is not None
    }
    row = {"mse": whole.mse, "elbo": whole.elbo, "bits_per_dim": bits, **found}
    return to_json(row) | {"off_bounds_share": calibration.off_bounds_share}


def is_figure(value):
    """Tell a figure from a curve, and from one that is not there."""
    return isinstance(value, Estimate)


def to_json(node):
    """Turn estimates into values with their standard errors."""
    if isinstance(node, Estimate):
        return [round(node.value, 6), round(node.standard_error or 0.0, 6)]
    return {name: to_json(value) for name, value in node.items()}


def shares(part, prefix=""):
    """Write the shares within 1, 2 and 3 std."""
    return " ".join(f"{part[f'{prefix}coverage_{k}'][0]:.3f}".removeprefix("0") for k in (1, 2, 3))


def cells_of(row):
    """Lay out a row: as predicted, and calibrated."""
    for option in ("none", "monotone"):
        judged = row[option]
        off_bounds, varying = judged["off_bounds"], judged["varying"]
        yield [
            row["case"],
            row["variant"],
            option,
            f"{judged['mse'][0]:.5f}",
            f"{judged['elbo'][0]:.0f}",
            f"{judged['bits_per_dim'][0]:.3f}",
            shares(off_bounds),
            f"{off_bounds['normalised_calibration_error'][0]:.3f}",
            f"{off_bounds['standardised_var'][0]:.2f}",
            shares(varying, "digital_"),
        ]


HEADS = [
    "data",
    "variant",
    "recalibrate",
    "MSE",
    "ELBO, nats",
    "bits per dimension",
    "off the bounds: within 1, 2, 3 std",
    "ENCE",
    "standardised variance",
    "varying, as levels: within 1, 2, 3 std",
]


def main():
    """Train what is not in the JSON yet, and print the table."""
    out = "results/benchmark-predicted-std.json"
    parser = arguments(__doc__.splitlines()[0], out, "--variants", VARIANTS)
    parser.add_argument("--data-dir")
    parser.add_argument("--cases", nargs="+", choices=[case.data for case in CASES])
    parser.set_defaults(seeds=[0])
    options = parser.parse_args()
    one_thread()

    cases, sizes = CASES, (N_TEST, N_IWAE)
    if options.tiny:
        cases, sizes = TINY, (60, 10)
    elif options.cases:
        cases = [case for case in CASES if case.data in options.cases]

    rows, cells = Rows(options.out), []
    for case in cases:
        data = load(case.data, data_dir=options.data_dir)
        data = replace(data, train=data.train.take(slice(case.n_train)))

        variants = options.variants
        if case not in (CASES[0], *TINY) and variants == list(VARIANTS.items()):
            variants = [(name, VARIANTS[name]) for name in ON_ALL]
        for seed in options.seeds:
            cells += compare(rows, case, data, variants, seed, sizes)

    print(table(HEADS, cells))


def compare(rows, case, data, variants, seed, sizes):
    """Judge each variant of stage 2 from one stage 1, which is trained when it is first needed."""
    settings = dict(case.options) | {"seed": seed, "tolerance": 0.0}
    base = functools.cache(lambda: trained(data, settings | {"stage_2_epochs": 0})[0].model)

    cells = []
    for name, change in variants:
        of_variant = settings | change
        if case in TINY:
            of_variant["stage_2_epochs"] = 1
        key = {"case": case.data, "variant": name, "seed": seed, "options": of_variant}
        key |= facts(data)
        row = rows.find_or_make(key, lambda o=of_variant: measure(base(), data, o, sizes))
        cells += cells_of(row)
    return cells


if __name__ == "__main__":
    main()
