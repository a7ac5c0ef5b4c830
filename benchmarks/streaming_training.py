"""A training of several processes on many rows in Parquet, with and without a kill in the middle.

    python benchmarks/streaming_training.py

Rows of 16 float32 are written into the parts of a folder. ``equipoise train`` goes through them
twice: once as it is, and once killed (SIGKILL, the first process) in the middle of the second epoch
and started again by the same line. Then the curves of both are compared.

Bytes are what Linux counts for all processes (rchar of /proc/PID/io) between the ends of two
epochs, so that each has a pass over the training examples and one over 2,000 held-out ones in
memory. Memory is the anonymous memory of the process that has the most, at the end of each epoch
and at any time; at the end, the process has its part of the codes to which the mixture is fitted.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from command import Command
from streaming_scale import BATCH, PARQUET, write

from equipoise.files import write_json
from equipoise.provenance import provenance
from equipoise.run import Run

OPTIONS = ("latent_dim=4", "width=1", "n_components=2", "accelerator=cpu", "tolerance=0")
FIGURES = ("train_elbo", "validation_elbo", "validation_noise_var", "validation_kl")


def start(parts, run, options):
    """Start the training, as a user does."""
    line = [sys.executable, "-m", "equipoise", "train", str(parts), "--stream", "--quiet"]
    line += ["--devices", str(options.processes), "--out", str(run), "--resume", "auto", "--set"]
    line += [*OPTIONS, f"batch_size={options.batch}", "stage_2_epochs=0"]
    line += [f"stage_1_epochs={options.epochs}", f"checkpoint_seconds={options.seconds:g}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)


def family(process):
    """The process and those that it has started."""
    ids = [process.pid]
    for number in ids:
        path = Path(f"/proc/{number}/task/{number}/children")
        ids += [int(child) for child in path.read_text().split()] if path.exists() else []
    return ids


def used(process):
    """Bytes read so far by all processes, and MiB of the one that has the most memory."""
    n_bytes, kib = 0, [0]
    for number in family(process):
        try:
            lines = Path(f"/proc/{number}/io").read_text().splitlines()
            n_bytes += int(lines[0].split()[1])
            status = Path(f"/proc/{number}/status").read_text().splitlines()
            kib += [int(line.split()[1]) for line in status if line.startswith("RssAnon")]
        except OSError:
            continue  # it has just ended
    return n_bytes, max(kib) / 1024


def train(parts, folder, options, killed_after=None):
    """Train to the end, perhaps killed so many seconds into the second epoch.

    Returns what was used up to the end of each epoch, the most memory at any time, and the seconds
    of the training.
    """
    run, rows, most, began = Run(folder), [], 0.0, time.perf_counter()
    process = start(parts, folder, options)
    while process.poll() is None:
        most = max(most, used(process)[1])
        n_done = len(run.history()) if run.metrics_file.exists() else 0
        if n_done > len(rows):
            n_bytes, mib = used(process)
            rows.append({"bytes": n_bytes, "mib": mib})
        if n_done and killed_after is not None:
            time.sleep(killed_after)
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed_after = None
            time.sleep(5)  # the others notice it and end
            process = start(parts, folder, options)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"the training has failed with the code {process.returncode}")
    return rows, most, time.perf_counter() - began


def main():
    """Run the benchmark, print the figures and write the JSON."""
    parser = Command(__doc__, "results/benchmark-streaming-training.json")
    parser.add_argument("--examples", type=int, default=3_000_000)
    parser.add_argument("--parts", type=int, default=64)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8 * BATCH, help="of all processes")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="between checkpoints")
    options = parser.parse_args()
    if options.tiny:
        options.examples, options.parts, options.processes = 20_000, 4, 1
        options.batch, options.epochs, options.seconds = BATCH, 3, 1.0

    with tempfile.TemporaryDirectory() as place:
        parts = Path(place) / "parts"
        n_bytes = write(parts, PARQUET, options.examples, options.parts)
        epochs, most, seconds = train(parts, Path(place) / "whole", options)
        whole = Run(Path(place) / "whole").history()
        killed_after = whole[1]["seconds"] / 2
        train(parts, Path(place) / "killed", options, killed_after)
        killed = Run(Path(place) / "killed").history()

    difference = max(
        abs(ours[name] - theirs[name]) / abs(theirs[name])
        for ours, theirs in zip(killed, whole, strict=True)
        for name in FIGURES
    )
    ratios = [
        (after["bytes"] - before["bytes"]) / n_bytes for before, after in itertools.pairwise(epochs)
    ]
    result = provenance() | {
        "examples": options.examples,
        "bytes_of_the_data": n_bytes,
        "processes": options.processes,
        "batch_size": options.batch,
        "bytes_read_per_epoch_over_bytes_of_the_data": ratios,
        "anonymous_mib_of_the_largest_process": [row["mib"] for row in epochs],
        "the_same_at_most_until_the_codes_are_fitted": most,
        "examples_per_second": [row["examples_per_second"] for row in whole],
        "seconds": seconds,
        "killed_after_seconds_of_the_second_epoch": killed_after,
        "largest_relative_difference_of_the_curves": difference,
        "curve": [{name: row[name] for name in FIGURES} for row in whole],
        "load": os.getloadavg(),
    }
    print(json.dumps({key: result[key] for key in result if key != "curve"}, indent=2))
    write_json(options.out, result)


if __name__ == "__main__":
    main()
