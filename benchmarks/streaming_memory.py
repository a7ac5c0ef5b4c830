"""Peak memory of training, and of listing files, as the number of examples grows.

    python benchmarks/streaming_memory.py

Examples are 28 x 28 bytes. They come as a stream of batches that are made when they are needed, or
from an .npy file that is memory-mapped. Each run is a process of its own. It loads the data, trains
a small network for one epoch, and fits a mixture of two components to the codes of all examples.
One kind of run only goes through the batches of an epoch.

Resident memory counts the pages of the mapped file that happen to be in memory. Anonymous memory,
of Linux's /proc, is what the process needs. It is sampled every 10 ms.

An .npy file of at most 2 GiB is copied to the device as a whole, for speed; here the device has the
same memory. That limit is therefore also set to zero, which is how larger files are trained on.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# torch and equipoise.data are imported in the functions, since a child reports the memory that it
# needs beyond its imports.
from command import Command

from equipoise.provenance import provenance

SIZES = (50_000, 200_000, 800_000)
NAMES = (20_000, 200_000)
TINY_SIZES, TINY_NAMES = (200, 400), (20, 40)
PIXELS = 28 * 28
BATCH = 1000
MAPPED, RESIDENT, STREAM, LISTING = (
    "npy, mapped",
    "npy, copied to the device",
    "stream",
    "names in a folder",
)
PASS = "stream, its batches alone"
KINDS = (PASS, LISTING, STREAM, MAPPED, RESIDENT)


def made(n):
    """Return a function that makes n images in batches, the same images each time."""
    import numpy as np

    def batches():
        rng = np.random.default_rng(0)
        for first in range(0, n, BATCH):
            yield rng.integers(0, 256, (min(BATCH, n - first), 28, 28), dtype=np.uint8)

    return batches


def status(*names):
    """Return fields of /proc/self/status in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) / 1024 for name in names]


class Peak(threading.Thread):
    """Measures the largest anonymous and resident memory while a block runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = status("RssAnon", "VmRSS")
        self.peak = list(self.before)
        self.done = threading.Event()

    def run(self):
        """Sample the memory until ``done`` is set."""
        while not self.done.wait(0.01):
            now = status("RssAnon", "VmRSS")
            self.peak = [max(pair) for pair in zip(self.peak, now, strict=True)]

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()


def measure(kind, n, folder):
    """Print the peaks of one run, as JSON. It is called in a process of its own."""
    if kind == LISTING:
        from equipoise.data.encoded import list_images

        with Peak() as peak:
            listing = list_images(folder)

        n = len(listing.names)
    elif kind == PASS:
        from equipoise.data import batches_of, load_stream

        with Peak() as peak:
            data = load_stream(made(n), count=n)
            count = sum(len(batch) for batch in batches_of(data.train, BATCH, seed=0).epoch())

        assert count == len(data.train)
    else:
        peak = train(kind, n, folder)

    anonymous, resident = peak.peak
    row = {
        "n": n,
        "anonymous_before_mib": peak.before[0],
        "anonymous_peak_mib": anonymous,
        "resident_peak_mib": resident,
    }
    print(json.dumps(row))


def train(kind, n, folder):
    """Load, train for an epoch and fit the mixture; return the peaks."""
    import torch

    from equipoise.config import TrainConfig
    from equipoise.data import Batches, load, load_stream
    from equipoise.training.job import train as run

    torch.set_num_threads(1)
    if kind == MAPPED:
        Batches.__init__.__kwdefaults__["resident_bytes"] = 0

    config = TrainConfig(
        architecture="mlp",
        latent_dim=16,
        width=4,
        batch_size=BATCH,
        stage_1_epochs=1,
        stage_2_epochs=0,
        n_components=2,
        accelerator="cpu",
    )
    with Peak() as peak, tempfile.TemporaryDirectory() as out:
        data = load_stream(made(n), count=n) if kind == STREAM else load(folder / f"{n}.npy")
        run(data, config, Path(out) / "run")

    return peak


def write_npy(file, n):
    """Write n images to a file, without holding them all in memory."""
    import numpy as np

    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(n, 28, 28))
    for first, batch in zip(range(0, n, BATCH), made(n)(), strict=True):
        array[first : first + BATCH] = batch

    array.flush()


def child(kind, n, folder):
    """Measure in a new process, so that no run inherits the memory of another."""
    command = [sys.executable, __file__, "--measure", kind, str(n), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    began = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = round(time.perf_counter() - began, 1)
    if process.returncode:
        raise SystemExit(process.stderr)

    row = {"source": kind} | json.loads(process.stdout) | {"seconds": seconds}
    print(
        f"{kind}, {n:,}: {row['anonymous_peak_mib']:.0f} MiB anonymous, {seconds} s",
        flush=True,
    )
    return row


def slope(rows):
    """Return bytes of anonymous memory per further example, between smallest and largest run."""
    first, last = rows[0], rows[-1]
    mebibytes = last["anonymous_peak_mib"] - first["anonymous_peak_mib"]
    return mebibytes * 2**20 / (last["n"] - first["n"])


def main():
    """Run the benchmark, print a table and write the JSON."""
    parser = Command(__doc__, "results/benchmark-streaming-memory.json")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to measure (all)"
    )
    parser.add_argument(
        "--measure", nargs=3, metavar=("KIND", "N", "FOLDER"), help="what the subprocess runs"
    )
    options = parser.parse_args()

    if options.measure:
        kind, n, folder = options.measure
        measure(kind, int(n), Path(folder))
        return

    names, sizes = NAMES, options.sizes
    if options.tiny:
        names, sizes = TINY_NAMES, TINY_SIZES

    runs = {kind: [] for kind in options.kinds}
    with tempfile.TemporaryDirectory() as place:
        for n in names if LISTING in runs else ():
            folder = Path(place) / str(n)
            folder.mkdir()
            for number in range(n):
                (folder / f"{number:08d}.png").touch()

            runs[LISTING].append(child(LISTING, n, folder))

        for n in sizes:
            file = Path(place) / f"{n}.npy"
            if {MAPPED, RESIDENT} & runs.keys():
                write_npy(file, n)

            for kind in runs:
                if kind != LISTING:
                    runs[kind].append(child(kind, n, place))

            file.unlink(missing_ok=True)

    from rich.console import Console
    from rich.table import Table

    from equipoise.files import write_json

    table = Table(title="Peak memory of a process, MiB")
    for heading in (
        "source",
        "examples",
        "their size",
        "anonymous before",
        "anonymous",
        "resident",
    ):
        table.add_column(heading, justify="right")

    for rows in runs.values():
        for row in rows:
            size = "" if row["source"] == LISTING else f"{row['n'] * PIXELS / 2**20:.0f}"
            names = ("anonymous_before", "anonymous_peak", "resident_peak")
            values = [f"{row[f'{name}_mib']:.0f}" for name in names]
            table.add_row(row["source"], f"{row['n']:,}", size, *values)

    console = Console()
    console.print(table)
    slopes = {kind: slope(rows) for kind, rows in runs.items()}
    for kind, value in slopes.items():
        console.print(f"{kind}: {value:.0f} bytes per further example or name")

    result = provenance() | {
        "bytes_of_an_example": PIXELS,
        "bytes_per_further_example": slopes,
        "runs": [row for rows in runs.values() for row in rows],
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
