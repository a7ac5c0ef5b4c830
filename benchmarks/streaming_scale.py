"""Bytes that all processes read in an epoch over the bytes of the data, by number of processes.

    python benchmarks/streaming_scale.py

Examples are rows of float32 in the parts of a folder. As many processes as are named go through
the batches of one epoch at the same time, each with its part of them, and train nothing. What a
process reads is counted by Linux (rchar of /proc/self/io), with what is read ahead and read twice,
and so is its anonymous memory.

"Whole stream" is the same data from a function that yields all examples, as a stream that is not of
files is read: every process reads everything. "From the middle" begins at half of the batches, as a
training that was stopped there.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from command import Command

from equipoise.files import write_json
from equipoise.provenance import provenance

DIMENSIONS, BATCH = 16, 512
NPY, PARQUET, STREAM = "npy", "parquet", "whole stream"


def write(folder, kind, n, n_parts):
    """Write n random rows into parts; return the bytes of the files."""
    import numpy as np

    folder.mkdir()
    rng = np.random.default_rng(0)
    for part in range(n_parts):
        rows = len(range(part, n, n_parts))
        values = rng.standard_normal((rows, DIMENSIONS), dtype=np.float32)
        if kind == PARQUET:
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns = {f"x{i}": values[:, i] for i in range(DIMENSIONS)}
            # 16 groups in each part, without compression, since noise cannot be compressed.
            pq.write_table(
                pa.table(columns),
                folder / f"part-{part:04}.parquet",
                row_group_size=max(1, rows // 16),
                compression="none",
                use_dictionary=False,
            )
        else:
            np.save(folder / f"part-{part:04}.npy", values)
    return sum(file.stat().st_size for file in folder.iterdir())


def measure(kind, folder, world_size, rank, from_the_middle):
    """Go through an epoch, and print what it took, as JSON."""
    import numpy as np
    import torch
    from streaming_memory import status

    from equipoise.data import batches_of, load_stream

    torch.set_num_threads(1)
    files = sorted(Path(folder).iterdir())

    def everything():
        for file in files:
            yield np.fromfile(file, np.float32, offset=128).reshape(-1, DIMENSIONS)

    if kind == STREAM:
        count = sum((file.stat().st_size - 128) // (4 * DIMENSIONS) for file in files)
        data = load_stream(everything, count=count)
    else:
        data = load_stream(folder)

    batches = batches_of(data.train, BATCH // world_size, seed=0, rank=rank, world_size=world_size)
    before, began = read_bytes(), time.perf_counter()
    memory = peak = status("RssAnon")[0]
    n = 0
    start = len(batches) // 2 if from_the_middle else 0
    for number, batch in enumerate(batches.epoch(0, start)):
        n += len(batch)
        if number % 100 == 0:
            peak = max(peak, status("RssAnon")[0])
    row = {
        "examples": n,
        "bytes": read_bytes() - before,
        "seconds": time.perf_counter() - began,
        "anonymous_mib_more": max(peak, status("RssAnon")[0]) - memory,
    }
    print(json.dumps(row))


def read_bytes():
    """Bytes that this process has read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def together(kind, folder, world_size, from_the_middle):
    """Let all processes read at the same time, and add up."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, __file__, "--measure", kind, str(folder)),
                *(str(world_size), str(rank), str(int(from_the_middle))),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    rows = []
    for process in processes:
        output = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"a process has failed with the code {process.returncode}")
        rows.append(json.loads(output))
    return rows


def main():
    """Run the benchmark, print a table and write the JSON."""
    parser = Command(__doc__, "results/benchmark-streaming-scale.json")
    parser.add_argument("--examples", type=int, default=5_000_000)
    parser.add_argument("--parts", type=int, default=32)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--kinds", nargs="+", choices=(NPY, PARQUET, STREAM), default=[NPY, PARQUET, STREAM]
    )
    parser.add_argument("--measure", nargs=5, help="what the subprocess runs")
    options = parser.parse_args()

    if options.measure:
        kind, folder, world_size, rank, from_the_middle = options.measure
        measure(kind, folder, int(world_size), int(rank), from_the_middle == "1")
        return
    if options.tiny:
        options.examples, options.parts = 20_000, 4
        options.processes, options.kinds = [1, 2], [NPY, STREAM]

    rows = []
    with tempfile.TemporaryDirectory() as place:
        for kind in options.kinds:
            folder = Path(place) / ("npy" if kind == STREAM else kind)
            if not folder.exists():
                write(folder, kind, options.examples, options.parts)
            size = sum(file.stat().st_size for file in folder.iterdir())

            for world_size in options.processes:
                for from_the_middle in (False, True):
                    measured = together(kind, folder, world_size, from_the_middle)
                    n = sum(row["examples"] for row in measured)
                    row = {
                        "source": kind,
                        "processes": world_size,
                        "from_the_middle": from_the_middle,
                        "examples": n,
                        "bytes_read_over_bytes_of_the_data": sum(r["bytes"] for r in measured)
                        / size,
                        "examples_per_second": n / max(r["seconds"] for r in measured),
                        "anonymous_mib_more": max(r["anonymous_mib_more"] for r in measured),
                    }
                    rows.append(row)
                    where = ", from the middle" if from_the_middle else ""
                    print(
                        f"{kind}, {world_size} processes{where}: "
                        f"{row['bytes_read_over_bytes_of_the_data']:.3f} of the data, "
                        f"{row['examples_per_second']:,.0f} examples per second, "
                        f"{row['anonymous_mib_more']:.0f} MiB",
                        flush=True,
                    )

    result = provenance() | {
        "examples": options.examples,
        "parts": options.parts,
        "bytes_of_the_data": options.examples * DIMENSIONS * 4,
        "load": os.getloadavg(),
        "rows": rows,
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
