"""Golden runs: twenty optimiser steps give the same figures and weights as ever, bit for bit.

Rounding differs between processors and releases of torch, so that ``golden.json`` holds the figures
of each platform on which they were made. Where a change of the arithmetic is meant, or on another
platform, ``python -m tests.test_golden --update`` makes those of this machine anew.
"""

import hashlib
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import equipoise
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

FILE = Path(__file__).with_name("golden.json")
UPDATE = "python -m tests.test_golden --update"
CONFIG = equipoise.TrainConfig(
    latent_dim=3,
    width=4,
    stage_1_epochs=2,
    stage_2_epochs=2,
    batch_size=16,
    tolerance=0.0,
    learning_rate=5e-3,
    accelerator="cpu",
)
RUNS = {
    "table, mlp": ((7,), "mlp"),
    "28 x 28, conv": ((1, 28, 28), "conv"),
    "3 x 32 x 32, residual": ((3, 32, 32), "residual"),
}
STEPS = 20
TIMES = {"seconds", "examples_per_second"}


def platform_name():
    """What the last bits depend on: processor, its instructions, and the release of torch."""
    vendor = platform.processor() or "unknown"
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("vendor_id"):
                vendor = line.partition(":")[2].strip()
                break

    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {vendor} {capability}, torch {torch.__version__}"


def examples(shape, n=96):
    """Examples that are the same on every platform: made of whole numbers, without a sum."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    factors = rng.integers(0, 4, (n, *(1 for _ in shape)), dtype=np.uint8)
    values = (values // 4 + 48 * factors).astype(np.uint8)
    return values.astype(np.float32) / 256 if len(shape) == 1 else values


class Weights:
    """Notes a digest of the weights after each epoch."""

    def __init__(self):
        self.model, self.digests = None, []

    def start(self, total_steps, done_steps, history): ...
    def step(self, done_steps, total_steps, label, figures): ...
    def message(self, text): ...
    def close(self): ...

    def epoch(self, row):
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        self.digests.append(digest.hexdigest())


def figures_of(shape, architecture):
    """Train for twenty steps, ten in each stage, and return all that is to stay."""
    data = equipoise.load_data(examples(shape))
    config = replace(CONFIG, architecture=architecture)
    torch.manual_seed(0)
    weights = Weights()
    weights.model = make_model(data, config)

    trainer = Trainer(weights.model, data, config, sinks=[weights])
    rows = trainer.fit()
    assert trainer.position.step == STEPS
    assert [row["stage"] for row in rows] == [1, 1, 2, 2]

    for row, digest in zip(rows, weights.digests, strict=True):
        row["weights"] = digest
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_are_what_they_were(name):
    golden = json.loads(FILE.read_text()).get(platform_name())
    if golden is None:
        pytest.skip(f"no golden run of {platform_name()} yet; add it with: {UPDATE}")

    for found, expected in zip(figures_of(*RUNS[name]), golden[name], strict=True):
        assert found == expected, f"if this change of the arithmetic is meant: {UPDATE}"


def update():
    """Write the figures of this platform, besides those of others."""
    torch.set_num_threads(1)
    golden = json.loads(FILE.read_text()) if FILE.is_file() else {}
    golden[platform_name()] = {name: figures_of(*run) for name, run in RUNS.items()}
    FILE.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    print(f"{FILE}: {platform_name()}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(f"usage: {UPDATE}")
    update()
