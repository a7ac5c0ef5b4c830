"""Start-up time and peak memory.

    python benchmarks/footprint.py --data-dir DATA

The times are those of `equipoise --help` and of `import equipoise`, each the median of several
fresh processes. The start of Python itself is part of the first, and shown beside it. The memory is
the peak resident memory of `equipoise train mnist` on the CPU, with an epoch for each stage: both
stages, the mixture, and the whole evaluation.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from equipoise.provenance import provenance

REPEATS = 7
IMPORT = """
import sys, time
started = time.perf_counter()
import equipoise
print(time.perf_counter() - started, "torch" in sys.modules)
"""


def seconds(*arguments):
    """Return the median time of a Python process."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - started)

    return round(statistics.median(times), 3)


def start_up():
    """Time the start."""
    imports = []
    for _ in range(REPEATS):
        process = subprocess.run(
            [sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True
        )
        imports.append(process.stdout.split())

    return {
        "python_seconds": seconds("-c", "pass"),
        "help_seconds": seconds("-m", "equipoise", "--help"),
        "import_seconds": round(statistics.median(float(time) for time, _ in imports), 3),
        "import_brings_torch": any(torch == "True" for _, torch in imports),
    }


def training_memory(data_dir):
    """Return the peak memory of a whole training command.

    Call it before any other measurement: a process starts with the peak of its parent.
    """
    sizes = {"stage_1_epochs": 1, "stage_2_epochs": 1}
    command = [sys.executable, "-m", "equipoise", "train", "mnist", "--quiet"]
    command += ["--set", "accelerator=cpu", *(f"{key}={value}" for key, value in sizes.items())]
    if data_dir:
        command += ["--data-dir", data_dir]

    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([*command, "--out", f"{folder}/run"])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command} failed")

        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()

    last = json.loads(lines[-1])
    return sizes | {"epochs": last["epoch"], "peak_gib": round(usage.ru_maxrss / 2**20, 3)}


def main():
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-footprint.json"))
    options = parser.parse_args()

    rows = {"training_of_mnist": training_memory(options.data_dir), "start": start_up()}
    print(json.dumps(rows, indent=2))

    result = provenance() | {"repeats": REPEATS, "rows": rows}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
