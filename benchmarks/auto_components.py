"""How often ``n_components="auto"`` finds the number of clusters that were planted.

    python benchmarks/auto_components.py [--tiny]

The clusters are round, of a std of .05, and lie on a square grid of distance 1, which is turned in
d dimensions at random. There are 100 codes per cluster, 20 per cluster and dimension, and at least
600 in all. A tenth of them is held out, as always.
"""

import math
import time

import torch
from command import Command
from experiment import Rows, one_thread, over_seeds
from rich.console import Console
from rich.table import Table

from equipoise.mixture_fit import fit_mixture
from equipoise.randomness import stream

CLUSTERS, DIMENSIONS, SEEDS = (2, 4, 9, 16, 25), (2, 4, 8, 12, 16), (0, 1)
STD = 0.05


def grid(K, d, seed):
    """Draw codes from K clusters on a grid in d dimensions."""
    generator = stream(seed, f"grid of {K} in {d}")
    side = math.ceil(math.sqrt(K))
    n = max(600, K * max(100, 20 * d))
    labels = torch.randint(K, (n,), generator=generator)

    codes = STD * torch.randn(len(labels), d, generator=generator, dtype=torch.float64)
    codes[:, 0] += labels % side
    codes[:, 1] += labels // side
    square = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return codes @ torch.linalg.qr(square).Q


def search(K, d, seed):
    """Choose the number of components, and say what was tried."""
    codes = grid(K, d, seed)
    began = time.process_time()
    fit = fit_mixture(codes, "auto", generator=torch.Generator().manual_seed(seed))
    return {
        "found": fit.mixture.n_components,
        "tried": {str(K): score.value for K, score in fit.held_out.items()},
        "cpu_seconds": time.process_time() - began,
    }


def main():
    """Run the grids, keep the rows, and print a table."""
    parser = Command(__doc__, "results/benchmark-auto-components.json")
    options = parser.parse_args()
    one_thread()
    search(2, 2, 0)  # imports scikit-learn

    clusters, dimensions, seeds = CLUSTERS, DIMENSIONS, SEEDS
    if options.tiny:
        clusters, dimensions, seeds = (2,), (2,), (0,)

    table = Table(title="Grids of clusters: runs that find their number, and CPU seconds of a fit")
    for heading in ("clusters", "found", "of", "seconds"):
        table.add_column(heading, justify="right")

    results, n_found, n_all, seconds = Rows(options.out), 0, 0, 0.0
    for K in clusters:
        rows = [
            results.find_or_make({"clusters": K, "dimensions": d, "seed": seed}, search, K, d, seed)
            for d in dimensions
            for seed in seeds
        ]
        found = sum(row["found"] == K for row in rows)
        times = [row["cpu_seconds"] for row in rows]
        table.add_row(str(K), str(found), str(len(rows)), over_seeds(times))
        n_found, n_all, seconds = n_found + found, n_all + len(rows), seconds + sum(times)

    results.write(summary={"found": n_found, "runs": n_all, "cpu_seconds": seconds})
    Console().print(table)


if __name__ == "__main__":
    main()
