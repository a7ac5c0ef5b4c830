"""Cost against work: EM against N, K and d, training against N, D and d, each swept alone, with fitted exponents.

    python benchmarks/cost_scaling.py [--parts em training] [--out results/benchmark-cost-scaling.json]

An exponent is the slope of log seconds against log size by least squares, with its standard error. EM reads float32
codes from disk; a training step is what an epoch of the command's own loop takes, divided by its steps. One thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from equipoise.aggregate import GaussianMixture
from equipoise.config import make_config
from equipoise.data import load
from equipoise.mixture_fit import fit_mixture
from equipoise.provenance import provenance
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

SEED = 0
EM_CODES, EM_COMPONENTS, EM_DIMENSION = 200_000, 32, 16
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


def exponent(sizes, seconds):
    """Return the slope of log seconds against log size, its standard error, and the slope of the last two."""
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
    """Return seconds per iteration over codes on disk, from a start at random codes."""
    generator = torch.Generator().manual_seed(SEED)
    path = Path(folder) / f"{d}.npy"
    if not path.exists():
        largest = max(EM_SWEEPS["N"]) if d == EM_DIMENSION else EM_CODES
        np.save(path, np.random.default_rng(SEED).standard_normal((largest, d), np.float32))
    codes = np.load(path, mmap_mode="r")[:N]
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
        """Nothing."""

    def step(self, done_steps, total_steps, label, figures):
        """Nothing."""

    def message(self, text):
        """Nothing."""

    def close(self):
        """Nothing."""

    def epoch(self, row):
        """Keep the time, which leaves validation out."""
        self.epochs.append(row["seconds"])


def epoch_seconds(N, side, d):
    """Return seconds of an epoch of stage 1 of N grey images, the first epoch left out."""
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


def em_costs():
    """Sweep EM."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in EM_SWEEPS.items():
            fixed = {"N": EM_CODES, "K": EM_COMPONENTS, "d": EM_DIMENSION}
            seconds = [em_seconds(folder, **fixed | {name: size}) for size in sizes]
            fixed.pop(name)
            found[name] = {"fixed": fixed, "sizes": sizes, "seconds_per_iteration": seconds}
            found[name] |= exponent(sizes, seconds)
            report("EM", name, found[name])
    return found


def training_costs():
    """Sweep a training step against D and d, and an epoch against N."""
    found = {}
    for name, sizes in TRAINING_SWEEPS.items():
        fixed = TRAINING | ({"side": SIDE_OF_DIGITS} if name == "N" else {})
        measured = [epoch_seconds(**fixed | {name: size}) for size in sizes]
        seconds = [epoch if name == "N" else epoch / steps for epoch, steps in measured]
        fixed.pop(name)
        if name == "side":
            name, sizes = "D", [side**2 for side in sizes]
        unit = "seconds_per_epoch" if name == "N" else "seconds_per_step"
        found[name] = {"fixed": fixed | {"batch_size": BATCH}, "sizes": sizes, unit: seconds}
        found[name] |= exponent(sizes, seconds)
        report("training", name, found[name])
    return found


def report(what, name, row):
    """Print an exponent."""
    print(
        f"{what}, {name} = {row['sizes'][0]} to {row['sizes'][-1]}: exponent {row['exponent']:.3f} "
        f"± {row['standard_error']:.3f}, {row['last_two']:.3f} between the last two",
        flush=True,
    )


def main():
    """Run the benchmark and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-cost-scaling.json"))
    parser.add_argument(
        "--parts", nargs="+", choices=["em", "training"], default=["em", "training"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    costs = {part: {"em": em_costs, "training": training_costs}[part]() for part in options.parts}
    result = provenance() | {"seed": SEED, "threads": 1, **costs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
