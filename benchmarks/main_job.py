"""Run `equipoise train` as a user would, and keep its figures.

    python benchmarks/main_job.py mnist --data-dir DATA --run RUN --out results/main-job-mnist.json

The options `--set latent_dim=2` give the plane of the paper's table 1.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from command import TINY, Command

from equipoise.files import write_json
from equipoise.provenance import provenance
from equipoise.run import Run


def main():
    """Run the command and write the JSON."""
    parser = Command(__doc__)
    parser.add_argument("data")
    parser.add_argument("--data-dir")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--run", type=Path, required=True, help="run folder to write")
    options = parser.parse_args()

    command = [sys.executable, "-m", "equipoise", "train", options.data, "--out", str(options.run)]
    if options.data_dir:
        command += ["--data-dir", options.data_dir]
    changes = [f"{key}={value}" for key, value in TINY.items()] if options.tiny else []
    if changes or options.set:
        command += ["--set", *changes, *options.set]

    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started

    run = Run(options.run)
    settings = run.settings()
    ends = [row for row in run.history() if "test_elbo" in row]
    stages = [{key: row[key] for key in row if not key.startswith("train_")} for row in ends]

    keys = ("name", "fingerprint", "n_train", "n_validation", "n_test")
    result = provenance() | {
        "data": {key: settings["data"][key] for key in keys},
        "options": settings["options"],
        "seconds": round(seconds, 1),
        "n_components": run.mixture().n_components,
        "stages": stages,
        "evaluation": json.loads(run.evaluation_file.read_text()),
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
