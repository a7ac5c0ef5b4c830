"""EM of equipoise against scikit-learn's GaussianMixture: seconds per iteration and peak memory.

    python benchmarks/mixture_em.py [--threads 1]

Both fit the same float64 codes from the same mixture, in turns, without a covariance floor, for the
same number of iterations. The time of an iteration is the difference between a longer and a shorter
fit, so that the preparation does not count. Each has one thread by default, since more threads on a
shared machine would measure the other users.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
import warnings

# torch, scikit-learn and equipoise are imported in the functions. A subprocess starts with the peak
# memory of its parent, which therefore stays small until memory has been measured.
from command import Command

from equipoise.files import write_json
from equipoise.provenance import provenance

SIZES = ((60_000, 16, 256), (60_000, 16, 32), (20_000, 64, 200))
SHORT, LONG, ROUNDS = 1, 4, 3
MANY = 1_000_000
TINY_SIZES, TINY_MANY = ((400, 2, 3), (200, 3, 2)), 1000
SEED = 0


def planted_codes(N, d, K):
    """Make codes of K overlapping clusters of equal size, and a mixture near the truth."""
    import torch

    from equipoise.aggregate import GaussianMixture

    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres = normal(K, d)
    shapes = torch.eye(d, dtype=torch.float64) * 0.5 + normal(K, d, d) * 0.5 / d**0.5
    labels = torch.arange(N) % K

    codes = normal(N, d)
    for k in range(K):
        codes[labels == k] = centres[k] + codes[labels == k] @ shapes[k].T

    weights = torch.full((K,), 1 / K, dtype=torch.float64)
    covariances = (0.5 * torch.eye(d, dtype=torch.float64)).expand(K, d, d)
    return codes, GaussianMixture(weights, centres + 0.1 * normal(K, d), covariances)


def run_equipoise(codes, start, max_iter):
    """Return the seconds of a fit, and the mean log-likelihood of each iteration."""
    from equipoise.mixture_fit import fit_mixture

    began = time.perf_counter()
    fit = fit_mixture(codes, start.n_components, start=start, floor=0.0, tol=0.0, max_iter=max_iter)
    return time.perf_counter() - began, fit.log_likelihoods


def run_scikit_learn(codes, start, max_iter):
    """Return the same for scikit-learn."""
    import torch
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(
        start.n_components,
        tol=0.0,
        reg_covar=0.0,
        max_iter=max_iter,
        weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=torch.linalg.inv(start.covariances).numpy(),
    )

    array = codes.numpy()
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is fixed
        model.fit(array)

    return time.perf_counter() - began, [float(bound) for bound in model.lower_bounds_]


def compare(N, d, K, rounds):
    """Time both in turns, and compare the likelihoods of the last iteration."""
    codes, start = planted_codes(N, d, K)
    seconds = {run_equipoise: [], run_scikit_learn: []}
    last = {}

    for _ in range(rounds):
        for run, times in seconds.items():
            short, _ = run(codes, start, SHORT)
            long, log_likelihoods = run(codes, start, LONG)
            times.append((long - short) / (LONG - SHORT))
            last[run] = log_likelihoods[-1]

    ours = statistics.median(seconds[run_equipoise])
    theirs = statistics.median(seconds[run_scikit_learn])
    return {
        "N": N,
        "d": d,
        "K": K,
        "equipoise_seconds_per_iteration": ours,
        "scikit_learn_seconds_per_iteration": theirs,
        "ratio": theirs / ours,
        "equipoise_all": seconds[run_equipoise],
        "scikit_learn_all": seconds[run_scikit_learn],
        "log_likelihood": last[run_equipoise],
        "log_likelihood_difference": last[run_equipoise] - last[run_scikit_learn],
    }


def peak_mebibytes():
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fit_many(N):
    """Fit N float32 codes of d = 16 with K = 32, and print the peak memory.

    The fit includes its start. It runs in a process of its own.
    """
    import torch

    from equipoise.mixture_fit import fit_mixture

    torch.set_num_threads(1)
    codes = torch.randn(N, 16, generator=torch.Generator().manual_seed(SEED))
    before = peak_mebibytes()

    fit_mixture(codes, 32, max_iter=3, generator=torch.Generator().manual_seed(SEED))
    print(json.dumps({"peak_mib": peak_mebibytes(), "with_codes_before_fit_mib": before}))


def main():
    """Run the benchmark, print a table and write the JSON."""
    parser = Command(__doc__, "results/benchmark-mixture-em.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-only", type=int, metavar="N", help="what the subprocess runs")
    options = parser.parse_args()

    if options.memory_only:
        fit_many(options.memory_only)
        return

    sizes, many, rounds = SIZES, MANY, ROUNDS
    if options.tiny:
        sizes, many, rounds = TINY_SIZES, TINY_MANY, 1

    command = [sys.executable, __file__, "--memory-only", str(many)]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    memory = json.loads(child.stdout)

    import torch
    from rich.console import Console
    from rich.table import Table
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        rows = [compare(*size, rounds) for size in sizes]

    table = Table(title=f"EM, seconds per iteration, {options.threads} thread(s)")
    headings = ("N", "d", "K", "equipoise", "scikit-learn", "ratio", "log-likelihood difference")
    for heading in headings:
        table.add_column(heading, justify="right")

    for row in rows:
        table.add_row(
            *(str(row[name]) for name in "NdK"),
            f"{row['equipoise_seconds_per_iteration']:.3f}",
            f"{row['scikit_learn_seconds_per_iteration']:.3f}",
            f"{row['ratio']:.1f}",
            f"{row['log_likelihood_difference']:.1e}",
        )

    console = Console()
    console.print(table)
    console.print(
        f"{many:,} codes of d = 16, K = 32: peak resident memory {memory['peak_mib']:.0f} MiB"
    )

    result = provenance() | {
        "seed": SEED,
        "threads": options.threads,
        "iterations_timed": LONG - SHORT,
        "rounds": rounds,
        "speed": rows,
        "memory_of_a_million_codes": memory,
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
