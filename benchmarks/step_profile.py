"""Where a training step spends its time: shares by kind of operation, of the loop itself.

    python benchmarks/step_profile.py --data-dir DATA

One epoch of --steps batches of MNIST is recorded by torch's profiler in each stage and precision, after one that warms
up. On a CPU the time of an operation is that on the thread which calls it, and what is left to Python and to the
dispatch of operations is measured as the rest of the epoch; on a GPU it is that of the kernels, beside the time in
which there was none.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from tables import step_profile
from throughput import PRECISIONS, Silent
from torch.profiler import ProfilerActivity, profile

from equipoise.config import make_config, read_recipe, shipped_recipes
from equipoise.data import load
from equipoise.processes import choose_device
from equipoise.provenance import provenance
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

KINDS = {
    "convolutions": ("conv",),
    "matrix products": ("mm", "gemm", "linear"),
    "GELU": ("gelu",),
    "optimiser": ("adam",),
    "copies, other layouts and precisions": ("copy", "::to", "layout"),
}
OTHER, REST = "other small operations", "Python and dispatch"


def kind_of(operation):
    """Of an operation by its name, such as aten::addmm."""
    name = operation.lower()
    return next(
        (kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER
    )


class Recorder(Silent):
    """A sink that records the second epoch of each stage."""

    def __init__(self, device):
        self.device = device
        self.shares = {}
        self.epochs = 0

    def epoch(self, row):
        """Start or stop."""
        self.epochs = self.epochs + 1 if f"stage {row['stage']}" not in self.shares else 0
        if self.epochs == 1:
            self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self.profiler.start()
            self.started = time.perf_counter()
        elif self.epochs == 2:
            seconds = time.perf_counter() - self.started
            self.profiler.stop()
            self.shares[f"stage {row['stage']}"] = shares_of(self.profiler, seconds, self.device)


def shares_of(profiler, seconds, device):
    """Of the time, by kind."""
    kinds = dict.fromkeys([*KINDS, OTHER], 0.0)
    for one in profiler.key_averages():
        is_cpu = one.device_type.name == "CPU"
        if is_cpu == (device.type == "cpu") and (one.key.startswith("aten::") or not is_cpu):
            kinds[kind_of(one.key)] += (
                one.self_cpu_time_total if is_cpu else one.self_device_time_total
            ) / 1e6
    kinds[REST] = max(0.0, seconds - sum(kinds.values()))
    return {kind: round(value / sum(kinds.values()), 4) for kind, value in kinds.items()}


def main():
    """Record and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=60, help="of an epoch")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-step-profile.json"))
    options = parser.parse_args()
    recipe = read_recipe(shipped_recipes()["mnist"])
    data = load(recipe.pop("data"), data_dir=options.data_dir)
    epochs = {"stage_1_epochs": 3, "stage_2_epochs": 3, "tolerance": 0.0}
    config = make_config(recipe | epochs | {"accelerator": options.accelerator})
    few = {"validation": data.validation.take(slice(10)), "test": data.test.take(slice(10))}
    small = replace(data, train=data.train.take(slice(options.steps * config.batch_size)), **few)
    rows = {}
    for name, precision in PRECISIONS.items():
        torch.manual_seed(config.seed)
        recorder = Recorder(choose_device(config))
        config = replace(config, precision=precision)
        Trainer(make_model(small, config), small, config, sinks=[recorder]).fit()
        rows[name] = recorder.shares
    found = provenance(data=data, options=config.as_dict())
    found |= {"threads": torch.get_num_threads(), "steps": options.steps, "rows": rows}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(step_profile(found))


if __name__ == "__main__":
    main()
