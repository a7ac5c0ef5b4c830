"""Where a training step spends its time: shares by kind of operation, of the loop itself.

    python benchmarks/step_profile.py --data-dir DATA

In each stage and precision, torch's profiler records one epoch of --steps batches of MNIST, after
an epoch that warms up. On a CPU the time of an operation is its time on the calling thread, and the
rest of the epoch is that of Python and of the dispatch of operations. On a GPU the time is that of
the kernels, and the rest is the time in which no kernel ran.
"""

import time
from dataclasses import replace

import torch
from command import TINY, Command
from tables import step_profile
from throughput import PRECISIONS, Silent
from torch.profiler import ProfilerActivity, profile

from equipoise.config import make_config, read_papers_recipe
from equipoise.data import load
from equipoise.files import write_json
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
    """Return the kind of an operation by its name, such as aten::addmm."""
    name = operation.lower()
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind

    return OTHER


class Recorder(Silent):
    """A sink that records the second epoch of each stage."""

    def __init__(self, device):
        self.device = device
        self.shares = {}
        self.epochs = 0

    def epoch(self, row):
        """Start the profiler after the first epoch of a stage, and stop it after the second."""
        stage = f"stage {row['stage']}"
        self.epochs = self.epochs + 1 if stage not in self.shares else 0

        if self.epochs == 1:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities)
            self.profiler.start()
            self.started = time.perf_counter()
        elif self.epochs == 2:
            seconds = time.perf_counter() - self.started
            self.profiler.stop()
            self.shares[stage] = shares_of(self.profiler, seconds, self.device)


def shares_of(profiler, seconds, device):
    """Return the shares of the time by kind of operation."""
    kinds = dict.fromkeys([*KINDS, OTHER], 0.0)
    for operation in profiler.key_averages():
        on_cpu = operation.device_type.name == "CPU"
        if on_cpu != (device.type == "cpu"):
            continue

        if not on_cpu:
            kinds[kind_of(operation.key)] += operation.self_device_time_total / 1e6
        elif operation.key.startswith("aten::"):
            kinds[kind_of(operation.key)] += operation.self_cpu_time_total / 1e6

    kinds[REST] = max(0.0, seconds - sum(kinds.values()))
    total = sum(kinds.values())
    return {kind: round(value / total, 4) for kind, value in kinds.items()}


def main():
    """Record and write the JSON."""
    parser = Command(__doc__, "results/benchmark-step-profile.json", "mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=60, help="steps of an epoch")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args()

    recipe = read_papers_recipe(options.data)
    data = load(recipe.pop("data"), data_dir=options.data_dir)
    if options.tiny:
        recipe, options.steps = recipe | TINY, 2
    epochs = {"stage_1_epochs": 3, "stage_2_epochs": 3, "tolerance": 0.0}
    config = make_config(recipe | epochs | {"accelerator": options.accelerator})
    small = replace(
        data,
        train=data.train.take(slice(options.steps * config.batch_size)),
        validation=data.validation.take(slice(10)),
        test=data.test.take(slice(10)),
    )

    rows = {}
    for name, precision in PRECISIONS.items():
        torch.manual_seed(config.seed)
        recorder = Recorder(choose_device(config.accelerator))
        config = replace(config, precision=precision)
        Trainer(make_model(small, config), small, config, sinks=[recorder]).fit()
        rows[name] = recorder.shares

    result = provenance(data=data, options=config.as_dict())
    result |= {"threads": torch.get_num_threads(), "steps": options.steps, "rows": rows}
    write_json(options.out, result)
    print(step_profile(result))


if __name__ == "__main__":
    main()
