"""Time and memory of images of 16 bits and of five channels, against 8 bits of as many values.

    python benchmarks/depth_cost.py

Each kind is a folder of TIFF files of 4,800 values. A process of its own decodes them into an empty
cache and trains two epochs of stage 1; its peak of memory is that of the whole process, libraries
included. The kinds take turns. Needs the extra 'images'.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from command import Command

from equipoise.files import write_json
from equipoise.provenance import provenance

KINDS = {
    "8 bits, 3 channels": (np.uint8, (40, 40, 3)),
    "16 bits, 3 channels": (np.uint16, (40, 40, 3)),
    "8 bits, 5 channels": (np.uint8, (32, 30, 5)),
    "16 bits, 5 channels": (np.uint16, (32, 30, 5)),
}
LEAST = "8 bits, 3 channels"
N, ROUNDS = 2000, 3
TINY = (30, 1)
WIDTH = 16


def write(folder, dtype, shape, n):
    """Write images of a bright spot on noise."""
    import tifffile

    folder.mkdir()
    rng = np.random.default_rng(0)
    rows, columns = np.indices(shape[:2])
    top = np.iinfo(dtype).max
    for number in range(n):
        y, x = rng.uniform(8, 24, 2)
        spot = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 40)[..., None]
        values = top * (0.7 * spot * rng.uniform(0.5, 1, shape[2]) + 0.2 * rng.random(shape))
        photometric = "rgb" if shape[2] == 3 else "minisblack"
        tifffile.imwrite(
            folder / f"{number:05}.tif",
            values.astype(dtype),
            photometric=photometric,
            planarconfig="contig",
        )


def measure(folder):
    """Decode and train in this process, and print what it took."""
    import torch

    from equipoise.config import make_config
    from equipoise.data import load
    from equipoise.training.setup import make_model
    from equipoise.training.trainer import Trainer

    torch.set_num_threads(1)
    started = time.perf_counter()
    data = load(folder)
    decoded = time.perf_counter()
    options = {"latent_dim": 8, "width": WIDTH, "stage_1_epochs": 2, "stage_2_epochs": 0}
    config = make_config(options | {"batch_size": 32})
    Trainer(make_model(data, config), data, config).fit()
    trained = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"decoding": decoded - started, "training": trained - decoded, "peak_mib": peak}
    print(json.dumps(found))


def one(folder):
    """Measure one kind in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"EQUIPOISE_CACHE": cache}
        line = [sys.executable, __file__, "--measure", str(folder)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Measure all kinds, and write medians and ratios as JSON."""
    parser = Command(__doc__, "results/benchmark-depth-cost.json")
    parser.add_argument("--measure", type=Path, help="folder that this process measures")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return

    n, n_rounds = TINY if options.tiny else (N, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        folders = {}
        kinds = dict(list(KINDS.items())[:2]) if options.tiny else KINDS
        for number, (name, (dtype, shape)) in enumerate(kinds.items()):
            folders[name] = Path(folder) / str(number)
            write(folders[name], dtype, shape, n)
        rounds = [
            {name: one(folder_of) for name, folder_of in folders.items()} for _ in range(n_rounds)
        ]

    rows = {}
    for name in kinds:
        rows[name] = {
            figure: {
                "median": round(statistics.median(found[name][figure] for found in rounds), 2),
                "over 8 bits, 3 channels": round(
                    statistics.median(
                        found[name][figure] / found[LEAST][figure] for found in rounds
                    ),
                    3,
                ),
            }
            for figure in ("decoding", "training", "peak_mib")
        }
    print(json.dumps(rows, indent=2))
    write_json(options.out, provenance() | {"n": n, "rounds": n_rounds, "rows": rows})


if __name__ == "__main__":
    main()
