"""Two processes against one: examples per second, in turns, and how far their curves are apart.

    python benchmarks/distributed.py --data-dir DATA

Both train on MNIST for one epoch of each stage, with the same batches; two processes have a core each, one process has
one core or both. The processes speak by gloo over the loopback device.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from equipoise.config import make_config, read_recipe, shipped_recipes
from equipoise.data import load
from equipoise.provenance import provenance
from equipoise.run import Run

SHORT = {"stage_1_epochs": 1, "stage_2_epochs": 1, "tolerance": 0, "n_components": 8}
WAYS = {
    "one process, one thread": (1, 1),
    "one process, two threads": (1, 2),
    "two processes, one thread each": (2, 1),
}
ONE, TWO = "one process, one thread", "two processes, one thread each"


def train(folder, devices, threads, data_dir):
    """Run the command; the rows of its epochs."""
    options = [f"{name}={value}" for name, value in SHORT.items()]
    command = [
        sys.executable,
        "-m",
        "equipoise",
        "train",
        "mnist",
        "--quiet",
        "--out",
        folder,
        "--set",
        *options,
    ]
    command += ["--devices", str(devices), *(["--data-dir", data_dir] if data_dir else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return Run(folder).history()


def largest_difference(rows, others):
    """Largest relative difference of any figure of the curves."""
    return max(
        abs(row[name] - other[name]) / abs(row[name])
        for row, other in zip(rows, others, strict=True)
        for name in row
        if name.startswith(("train_", "validation_", "test_")) and row[name]
    )


def main():
    """Train in turns and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-distributed.json"))
    options = parser.parse_args()
    data = load("mnist", data_dir=options.data_dir)
    recipe = read_recipe(shipped_recipes()["mnist"])
    recipe.pop("data")
    speeds, curves = {way: ([], []) for way in WAYS}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for way, (devices, threads) in WAYS.items():
                rows = train(f"{folder}/{number} {way}", devices, threads, options.data_dir)
                curves.setdefault(way, rows)
                for speed, row in zip(speeds[way], rows, strict=True):
                    speed.append(row["examples_per_second"])
                print(way, [row["examples_per_second"] for row in rows], flush=True)
    rows = {
        way: {
            f"stage {stage} examples/s": statistics.median(values)
            for stage, values in enumerate(each, 1)
        }
        | {
            f"stage {stage} times one": round(
                statistics.median(a / b for a, b in zip(values, base, strict=True)), 3
            )
            for stage, (values, base) in enumerate(zip(each, speeds[ONE], strict=True), 1)
        }
        | {"largest relative difference": largest_difference(curves[ONE], curves[way])}
        for way, each in speeds.items()
    }
    print(json.dumps(rows, indent=2))
    found = provenance(data=data, options=make_config(recipe | SHORT).as_dict())
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(
        json.dumps(found | {"rounds": options.rounds, "rows": rows}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
