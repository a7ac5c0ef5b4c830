"""EM over codes on disk: seconds per iteration, memory, and the gain of the first phase.

    python benchmarks/mixture_scale.py [--codes 10000000]

The codes are float32 of d = 16, from a planted mixture of 64 clusters that overlap. 32 components
are fitted, from k-means: the codes of a trained model have no true number of components either, and
EM is slow there. One and two processes are compared, in turns within each round. Each process has
one thread and its share of the codes, and sums go through gloo.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from command import Command

DIMENSION, CLUSTERS, COMPONENTS = 16, 64, 32
ITERATIONS, ROUNDS = 4, 2
FEWER_CODES, SEEDS = 2_000_000, (0, 1, 2)
TINY_CODES = 2000
SEED = 0


def write_planted_codes(path, N, d, K):
    """Write codes of K clusters of equal size and different shapes, one chunk at a time."""
    generator = np.random.default_rng(SEED)
    centres = 0.6 * generator.standard_normal((K, d))
    shapes = 0.5 * np.eye(d) + 0.5 / d**0.5 * generator.standard_normal((K, d, d))

    codes = np.lib.format.open_memmap(path, "w+", np.float32, (N, d))
    for first in range(0, N, 100_000):
        chunk = generator.standard_normal((min(100_000, N - first), d), np.float32)
        labels = np.arange(len(chunk)) % K
        for k in range(K):
            chunk[labels == k] = centres[k] + chunk[labels == k] @ shapes[k].T

        codes[first : first + len(chunk)] = chunk

    codes.flush()


def anonymous_mebibytes():
    """Return the resident memory of this process that no file backs.

    Codes that are mapped from a file do not count towards it.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


class PeakMemory(threading.Thread):
    """Watches the anonymous memory of this process until ``stopped`` is set."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0.0
        self.stopped = threading.Event()

    def run(self):
        """Look at the memory fifty times a second."""
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, anonymous_mebibytes())


def fit_part(task):
    """Fit this process's part of the codes, and print the figures of the fit as JSON."""
    import torch
    from torch import distributed

    from equipoise.mixture_fit import fit_mixture
    from equipoise.processes import Processes

    torch.set_num_threads(1)

    rank, size = task["rank"], task["size"]
    distributed.init_process_group(
        "gloo", init_method=f"file://{task['store']}", rank=rank, world_size=size
    )

    def all_reduce(values):
        distributed.all_reduce(values)
        return values

    codes = np.load(task["path"], mmap_mode="r")[: task["N"]]
    codes = codes[task["N"] * rank // size : task["N"] * (rank + 1) // size]

    memory = PeakMemory()
    before = anonymous_mebibytes()
    memory.start()

    distributed.barrier()
    began, steps = time.perf_counter(), []

    def note(step):
        steps.append((step.n_codes, time.perf_counter() - began, step.log_likelihood))

    fit = fit_mixture(
        codes,
        COMPONENTS,
        max_iter=task["max_iter"],
        subsample=task["subsample"],
        processes=Processes(rank, size, all_reduce),
        generator=torch.Generator().manual_seed(task["seed"] * size + rank),
        on_iteration=note,
    )
    seconds = time.perf_counter() - began
    memory.stopped.set()
    distributed.destroy_process_group()

    passes = [(when, value) for n_codes, when, value in steps if n_codes == task["N"]]
    result = {
        "seconds": seconds,
        "iterations_on_subsample": len(steps) - len(passes),
        "passes": len(passes),
        "converged": fit.converged,
        "seconds_at_pass": [when for when, _ in passes],
        "log_likelihoods": [value for _, value in passes],
        "peak_anonymous_mib": memory.peak,
        "anonymous_mib_before_fit": before,
    }
    print(json.dumps(result))


def run(size, path, N, *, max_iter, subsample, seed=SEED):
    """Fit in ``size`` processes; return the figures of rank 0, and the largest memory of any."""
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "size": size,
            "path": str(path),
            "N": N,
            "max_iter": max_iter,
            "subsample": subsample,
            "seed": seed,
        }
        task["store"] = f"{folder}/store"

        command = [sys.executable, __file__, "--task"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        children = [
            subprocess.Popen(
                [*command, json.dumps(task | {"rank": rank})],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(size)
        ]
        results = [json.loads(child.communicate()[0]) for child in children]

    peak = max(result["peak_anonymous_mib"] for result in results)
    return results[0] | {"peak_anonymous_mib": peak}


def time_iterations(path, N, rounds):
    """Time an iteration of one process and of two, in turns; return seconds and memory."""
    seconds, memory = {1: [], 2: []}, {}
    for _ in range(rounds):
        for size in seconds:
            result = run(size, path, N, max_iter=ITERATIONS, subsample=None)
            seconds[size] += np.diff(result["seconds_at_pass"]).tolist()
            memory[size] = {key: value for key, value in result.items() if "anonymous" in key}

            print(
                f"{size} process(es): {statistics.median(seconds[size]):.2f} s per iteration",
                memory[size],
                flush=True,
            )

    medians = {size: statistics.median(times) for size, times in seconds.items()}
    rows = {
        str(size): {"seconds_per_iteration": medians[size], "all": seconds[size], **memory[size]}
        for size in seconds
    }
    return {"processes": rows, "ratio": medians[1] / medians[2]}


def compare_phases(path, N, seed, processes):
    """Fit until convergence with a first phase and without one."""
    results = {}
    for name, subsample in {"with_first_phase": "auto", "without": None}.items():
        result = run(processes, path, N, max_iter=200, subsample=subsample, seed=seed)
        results[name] = result
        print(
            f"{N:,} codes, seed {seed}, {name}: "
            f"{result['iterations_on_subsample']} iterations on the subsample, "
            f"{result['passes']} passes, {result['seconds']:.1f} s, "
            f"{result['log_likelihoods'][-1]:.4f} nats per code",
            flush=True,
        )

    first, without = results["with_first_phase"], results["without"]
    difference = first["log_likelihoods"][-1] - without["log_likelihoods"][-1]

    # The time at which each reached the likelihood that both reach in the end.
    goal = min(first["log_likelihoods"][-1], without["log_likelihoods"][-1])
    key = "seconds_to_same_log_likelihood"
    for result in results.values():
        reached = next(i for i, value in enumerate(result["log_likelihoods"]) if value >= goal)
        result[key] = result["seconds_at_pass"][reached]

    return {
        "N": N,
        "seed": seed,
        **results,
        "ratio_of_seconds": without["seconds"] / first["seconds"],
        "ratio_of_seconds_to_same_log_likelihood": without[key] / first[key],
        "log_likelihood_difference": difference,
    }


def main():
    """Run the benchmark, print a table and write the JSON."""
    parser = Command(__doc__, "results/benchmark-mixture-scale.json")
    parser.add_argument("--codes", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=SEEDS, help="seeds of the fits to convergence"
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="also fit all codes to convergence, which takes a quarter of an hour",
    )
    parser.add_argument("--task", type=json.loads, help="what a subprocess does")
    options = parser.parse_args()

    if options.task:
        fit_part(options.task)
        return
    if options.tiny:
        options.codes, options.rounds, options.seeds = TINY_CODES, 1, (0,)

    from equipoise.files import write_json
    from equipoise.provenance import provenance

    N, processes = options.codes, 1 if options.tiny else 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes.npy"
        write_planted_codes(path, N, DIMENSION, CLUSTERS)

        iteration = time_iterations(path, N, options.rounds)
        sizes = [(N, SEED)] if options.whole else []
        sizes += [(min(N, FEWER_CODES), seed) for seed in options.seeds]
        first_phase = [compare_phases(path, n, seed, processes) for n, seed in sizes]

        result = provenance() | {
            "seed": SEED,
            "N": N,
            "d": DIMENSION,
            "K": COMPONENTS,
            "clusters": CLUSTERS,
            "mib_on_disk": path.stat().st_size / 2**20,
            "threads_per_process": 1,
            "iteration": iteration,
            "first_phase": first_phase,
        }

    print(f"one process / two: {result['iteration']['ratio']:.2f}")
    for row in result["first_phase"]:
        print(
            f"{row['N']:,} codes, seed {row['seed']}: "
            f"without / with a first phase {row['ratio_of_seconds']:.1f}"
        )

    write_json(options.out, result)


if __name__ == "__main__":
    main()
