"""Reading and scoring of large tables, against the least that they could take.

    python benchmarks/table_speed.py

*Reading*: `read_table` of a CSV of 1,000,000 rows and 20 columns against `polars.read_csv` of the
same file, and `load_data`, which also converts, checks, splits and scales. *Scoring*: the scores of
200,000 rows, whose random draws follow from each row, against the same bound of all rows with one
generator. All are timed in turns in one process, with the threads that polars and torch choose.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import polars
import torch
from command import Command

from equipoise.data import load
from equipoise.data.tables import read_table
from equipoise.files import write_json
from equipoise.gaussian import standard_normal_log_prob
from equipoise.held_out import IMPORTANCE_SAMPLES, log_densities
from equipoise.model import VAE
from equipoise.objectives import importance_weighted_bound
from equipoise.provenance import provenance

N_READ, N_COLUMNS, N_SCORED, ROUNDS = 1_000_000, 20, 200_000, 3
TINY = (2000, N_COLUMNS, 500, 1)


def in_turns(jobs, n_rounds):
    """Time jobs in turns, and return the seconds of each round."""
    seconds = {name: [] for name in jobs}
    for job in jobs.values():
        job()  # warms up
    for _ in range(n_rounds):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def row_of(seconds, least):
    """Return median seconds, and the median ratio to the least."""
    found = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    ratios = {
        f"{name} over {least}": round(
            statistics.median(a / b for a, b in zip(times, seconds[least], strict=True)), 3
        )
        for name, times in seconds.items()
        if name != least
    }
    return {"seconds": found, "ratios": ratios}


def reading(folder, n, n_columns, n_rounds):
    """Read a CSV in three ways."""
    path = folder / "table.csv"
    values = np.random.default_rng(0).normal(size=(n, n_columns))
    polars.DataFrame(values, [f"c{i}" for i in range(n_columns)]).write_csv(path)
    jobs = {
        "polars.read_csv": lambda: polars.read_csv(path),
        "read_table": lambda: read_table(path),
        "load_data": lambda: load(path),
    }
    return row_of(in_turns(jobs, n_rounds), "polars.read_csv")


def scoring(n, n_columns, n_rounds):
    """Score rows in two ways."""
    torch.manual_seed(0)
    model = VAE.build((n_columns,), latent_dim=8).eval()
    raw = torch.randn(n, n_columns)

    @torch.no_grad()
    def batched():
        importance_weighted_bound(model, raw, IMPORTANCE_SAMPLES, torch.Generator())

    jobs = {
        "batched bound": batched,
        "scores": lambda: log_densities(model, raw, standard_normal_log_prob),
    }
    return row_of(in_turns(jobs, n_rounds), "batched bound")


def main():
    """Measure, print and write the JSON."""
    options = Command(__doc__, "results/benchmark-table-speed.json").parse_args()
    n_read, n_columns, n_scored, n_rounds = (
        TINY if options.tiny else (N_READ, N_COLUMNS, N_SCORED, ROUNDS)
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            "reading": reading(Path(folder), n_read, n_columns, n_rounds),
            "scoring": scoring(n_scored, n_columns, n_rounds),
        }
    print(json.dumps(rows, indent=2))
    about = {
        "rows read": n_read,
        "columns": n_columns,
        "rows scored": n_scored,
        "threads": torch.get_num_threads(),
        "rounds": n_rounds,
    }
    write_json(options.out, provenance() | about | rows)


if __name__ == "__main__":
    main()
