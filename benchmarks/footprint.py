"""Start-up time and peak memory.

    python benchmarks/footprint.py --data-dir DATA

The times are those of `equipoise --help` and of `import equipoise`, each the median of several
fresh processes. The start of Python itself is part of the first, and shown beside it. The memory is
the peak resident memory of `equipoise train mnist` on the CPU, with an epoch for each stage: both
stages, the mixture, and the whole evaluation.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from command import TINY, Command

from equipoise.files import write_json
from equipoise.provenance import provenance

REPEATS = 7
IMPORT = """
import sys, time
started = time.perf_counter()
import equipoise
print(time.perf_counter() - started, "torch" in sys.modules)
"""


def seconds(repeats, *arguments):
    """Return the median time of a Python process."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - started)

    return round(statistics.median(times), 3)


def start_up(repeats):
    """Time the start."""
    imports = []
    for _ in range(repeats):
        process = subprocess.run(
            [sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True
        )
        imports.append(process.stdout.split())

    return {
        "python_seconds": seconds(repeats, "-c", "pass"),
        "help_seconds": seconds(repeats, "-m", "equipoise", "--help"),
        "import_seconds": round(statistics.median(float(time) for time, _ in imports), 3),
        "import_brings_torch": any(torch == "True" for _, torch in imports),
    }


def training_memory(data, changes, data_dir):
    """Return the peak memory of a whole training command.

    Call it before any other measurement: a process starts with the peak of its parent.
    """
    command = [sys.executable, "-m", "equipoise", "train", data, "--quiet"]
    command += ["--set", "accelerator=cpu", *(f"{key}={value}" for key, value in changes.items())]
    if data_dir:
        command += ["--data-dir", data_dir]

    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([*command, "--out", f"{folder}/run"])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command} failed")

        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()

    last = json.loads(lines[-1])
    return changes | {"epochs": last["epoch"], "peak_gib": round(usage.ru_maxrss / 2**20, 3)}


def main():
    """Measure and write the JSON."""
    parser = Command(__doc__, "results/benchmark-footprint.json", "mnist")
    parser.add_argument("--data-dir")
    options = parser.parse_args()

    changes, repeats = {"stage_1_epochs": 1, "stage_2_epochs": 1}, REPEATS
    if options.tiny:
        changes, repeats = TINY, 1

    memory = training_memory(options.data, changes, options.data_dir)
    rows = {f"training_of_{options.data}": memory, "start": start_up(repeats)}
    print(json.dumps(rows, indent=2))

    result = provenance() | {"repeats": repeats, "rows": rows}
    write_json(options.out, result)


if __name__ == "__main__":
    main()
