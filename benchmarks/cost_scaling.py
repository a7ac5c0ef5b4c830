"""Cost against work: fitted exponents of EM over N, K and d, and of training over N, D and d.

    python benchmarks/cost_scaling.py [--parts em training]

Each size is changed alone. An exponent is the slope of log seconds against log size by least
squares, with its standard error. EM reads float32 codes from disk. The time of a training step is
that of an epoch of the command's own loop, divided by its steps. There is one thread.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from command import Command

from equipoise.aggregate import GaussianMixture
from equipoise.config import make_config
from equipoise.data import load
from equipoise.files import write_json
from equipoise.mixture_fit import fit_mixture
from equipoise.provenance import provenance
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

SEED = 0
EM = {"N": 200_000, "K": 32, "d": 16}
EM_SWEEPS = {
    "N": [50_000, 100_000, 200_000, 400_000, 800_000, 1_600_000, 3_200_000],
    "K": [8, 16, 32, 64, 128, 256],
    "d": [8, 16, 32, 64],
}
EM_ITERATIONS = 4
BATCH, STEPS, EPOCHS = 256, 2, 4
TRAINING = {"N": BATCH * STEPS, "side": 32, "d": 16}
TRAINING_SWEEPS = {
    "side": [16, 32, 64],
    "d": [8, 16, 32, 64, 128, 256],
    "N": [2048, 4096, 8192, 16384],
}
SIDE_OF_DIGITS = 8
TINY = {
    "em": (
        {"N": 400, "K": 2, "d": 2},
        {"N": [200, 400, 800], "K": [2, 4, 8], "d": [1, 2, 4]},
    ),
    "training": (
        {"N": BATCH, "side": 8, "d": 2},
        {"side": [8, 12, 16], "d": [1, 2, 4], "N": [256, 512, 768]},
    ),
}


def exponent(sizes, seconds):
    """Fit log seconds against log size.

    The result has the slope, its standard error, and the slope between the two largest sizes.
    """
    x, y = np.log(sizes), np.log(seconds)
    slope, constant = np.polyfit(x, y, 1)

    residuals = y - slope * x - constant
    error = np.sqrt(residuals @ residuals / (len(x) - 2) / np.sum((x - x.mean()) ** 2))

    return {
        "exponent": slope,
        "standard_error": error,
        "last_two": (y[-1] - y[-2]) / (x[-1] - x[-2]),
    }


def em_seconds(folder, N, K, d):
    """Time an iteration of EM over codes on disk, which starts at random means."""
    generator = torch.Generator().manual_seed(SEED)

    path = Path(folder) / f"{N}-{d}.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(SEED).standard_normal((N, d), np.float32))

    codes = np.load(path, mmap_mode="r")
    start = GaussianMixture(
        torch.full((K,), 1 / K, dtype=torch.float64),
        torch.randn(K, d, generator=generator, dtype=torch.float64),
        torch.eye(d, dtype=torch.float64).repeat(K, 1, 1),
    )

    times = []
    fit_mixture(
        codes,
        K,
        start=start,
        tol=0.0,
        max_iter=EM_ITERATIONS,
        on_iteration=lambda _: times.append(time.perf_counter()),
    )

    return statistics.median(np.diff(times))


class Seconds:
    """A sink that keeps the seconds of each epoch's training."""

    def __init__(self):
        self.epochs = []

    def start(self, total_steps, done_steps, history):
        """Do nothing."""

    def step(self, done_steps, total_steps, label, figures):
        """Do nothing."""

    def message(self, text):
        """Do nothing."""

    def close(self):
        """Do nothing."""

    def epoch(self, row):
        """Keep the time of the epoch, which does not include validation."""
        self.epochs.append(row["seconds"])


def epoch_seconds(N, side, d):
    """Time an epoch of stage 1 over N grey images, the first epoch left out; and its steps."""
    images = np.random.default_rng(SEED).integers(0, 256, (N + 20, 1, side, side), np.uint8)
    share = 10 / len(images)

    config = make_config(
        {
            "architecture": "conv",
            "latent_dim": d,
            "batch_size": BATCH,
            "stage_1_epochs": EPOCHS,
            "stage_2_epochs": 0,
            "tolerance": 0.0,
            "test_fraction": share,
            "validation_fraction": share,
            "accelerator": "cpu",
        }
    )
    data = load(images, test_fraction=share, validation_fraction=share)

    seconds = Seconds()
    torch.manual_seed(SEED)
    Trainer(make_model(data, config), data, config, sinks=[seconds]).fit()

    return statistics.median(seconds.epochs[1:]), -(-len(data.train) // BATCH)


def em_costs(usual, sweeps):
    """Change N, K and d of EM."""
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in sweeps.items():
            fixed = dict(usual)
            seconds = [em_seconds(folder, **fixed | {name: size}) for size in sizes]

            fixed.pop(name)
            row = {"fixed": fixed, "sizes": sizes, "seconds_per_iteration": seconds}
            costs[name] = row | exponent(sizes, seconds)
            report("EM", name, costs[name])

    return costs


def training_costs(usual, sweeps):
    """Change D and d of a training step, and N of an epoch."""
    costs = {}
    for name, sizes in sweeps.items():
        fixed = dict(usual)
        if name == "N":
            fixed["side"] = SIDE_OF_DIGITS

        epochs = [epoch_seconds(**fixed | {name: size}) for size in sizes]
        if name == "N":
            unit, seconds = "seconds_per_epoch", [epoch for epoch, _ in epochs]
        else:
            unit, seconds = "seconds_per_step", [epoch / steps for epoch, steps in epochs]

        fixed.pop(name)
        if name == "side":
            name, sizes = "D", [side**2 for side in sizes]

        row = {"fixed": fixed | {"batch_size": BATCH}, "sizes": sizes, unit: seconds}
        costs[name] = row | exponent(sizes, seconds)
        report("training", name, costs[name])

    return costs


def report(what, name, row):
    """Print an exponent."""
    sizes = row["sizes"]
    print(
        f"{what}, {name} = {sizes[0]} to {sizes[-1]}: exponent {row['exponent']:.3f} "
        f"± {row['standard_error']:.3f}, {row['last_two']:.3f} between the last two",
        flush=True,
    )


def main():
    """Run the benchmark and write the JSON."""
    parser = Command(__doc__, "results/benchmark-cost-scaling.json")
    parser.add_argument(
        "--parts", nargs="+", choices=["em", "training"], default=["em", "training"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)

    parts = {"em": em_costs, "training": training_costs}
    sizes = {"em": (EM, EM_SWEEPS), "training": (TRAINING, TRAINING_SWEEPS)}
    if options.tiny:
        sizes = TINY
    costs = {part: parts[part](*sizes[part]) for part in options.parts}

    result = provenance() | {"seed": SEED, "threads": 1, **costs}
    write_json(options.out, result)


if __name__ == "__main__":
    main()
