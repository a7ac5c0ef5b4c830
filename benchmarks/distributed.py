"""Two processes against one: examples per second, and how far their curves are apart.

    python benchmarks/distributed.py --data-dir DATA

Both train on MNIST for one epoch of each stage, in turns and with the same batches. Two processes
have a core each. One process has one core or both. The processes communicate by gloo over the
loopback device.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

from command import TINY, Command

from equipoise.config import make_config, read_papers_recipe
from equipoise.data import load
from equipoise.files import write_json
from equipoise.provenance import provenance
from equipoise.run import Run

SHORT = {"stage_1_epochs": 1, "stage_2_epochs": 1, "tolerance": 0, "n_components": 8}
WAYS = {
    "one process, one thread": (1, 1),
    "one process, two threads": (1, 2),
    "two processes, one thread each": (2, 1),
}
ONE, TWO = "one process, one thread", "two processes, one thread each"


def train(data, changes, folder, devices, threads, data_dir):
    """Run the command, and return the rows of its epochs."""
    command = [sys.executable, "-m", "equipoise", "train", data, "--quiet", "--out", folder]
    command += ["--set", *(f"{name}={value}" for name, value in changes.items())]
    command += ["--devices", str(devices)]
    if data_dir:
        command += ["--data-dir", data_dir]

    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return Run(folder).history()


def largest_difference(rows, others):
    """Return the largest relative difference of any figure of two curves."""
    return max(
        abs(row[name] - other[name]) / abs(row[name])
        for row, other in zip(rows, others, strict=True)
        for name in row
        if name.startswith(("train_", "validation_", "test_")) and row[name]
    )


def main():
    """Train in turns and compare."""
    parser = Command(__doc__, "results/benchmark-distributed.json", "mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    data = load(options.data, data_dir=options.data_dir)
    recipe = read_papers_recipe(options.data)
    recipe.pop("data")
    changes, rounds, ways = SHORT, options.rounds, dict(WAYS)
    if options.tiny:
        changes, rounds, ways = SHORT | TINY, 1, {way: WAYS[way] for way in (ONE, TWO)}

    speeds, curves = {way: ([], []) for way in ways}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for way, (devices, threads) in ways.items():
                run = f"{folder}/{number} {way}"
                rows = train(options.data, changes, run, devices, threads, options.data_dir)
                curves.setdefault(way, rows)

                for speed, row in zip(speeds[way], rows, strict=True):
                    speed.append(row["examples_per_second"])

                print(way, [row["examples_per_second"] for row in rows], flush=True)

    rows = {}
    for way, stages in speeds.items():
        row = {}
        for stage, values in enumerate(stages, 1):
            row[f"stage {stage} examples/s"] = statistics.median(values)

        for stage, (values, base) in enumerate(zip(stages, speeds[ONE], strict=True), 1):
            ratios = [a / b for a, b in zip(values, base, strict=True)]
            row[f"stage {stage} times one"] = round(statistics.median(ratios), 3)

        row["largest relative difference"] = largest_difference(curves[ONE], curves[way])
        rows[way] = row

    print(json.dumps(rows, indent=2))
    result = provenance(data=data, options=make_config(recipe | changes).as_dict())
    result |= {"rounds": rounds, "rows": rows}
    write_json(options.out, result)


if __name__ == "__main__":
    main()
