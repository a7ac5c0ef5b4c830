"""EM on a GPU: seconds per iteration over codes in memory and on disk, and the same likelihood.

    python benchmarks/mixture_gpu.py [--codes 10000000]

The codes are those of mixture_scale.py, float32 with d = 16. Each device fits the same number of
iterations from the same start, in float64, with all its threads. A second is that of the slope
between a short and a long fit, so that reading the codes once for the start does not count.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from command import Command
from mixture_scale import DIMENSION, write_planted_codes

from equipoise.files import write_json
from equipoise.mixture_fit import fit_mixture
from equipoise.provenance import provenance

SHORT, LONG = 2, 6


def fit(codes, start, device, iterations):
    """Return the seconds and the last log-likelihood."""
    began = time.perf_counter()
    fitted = fit_mixture(
        codes,
        start.n_components,
        start=start,
        tol=0.0,
        max_iter=iterations,
        subsample=None,
        device=device,
    )
    return time.perf_counter() - began, fitted.log_likelihoods[-1]


def measure(codes, start, device):
    """Return the seconds of an iteration and the last log-likelihood."""
    fit(codes[:1000], start, device, 1)
    short, _ = fit(codes, start, device, SHORT)
    long, log_likelihood = fit(codes, start, device, LONG)
    return (long - short) / (LONG - SHORT), log_likelihood


def main():
    """Measure and write the JSON."""
    parser = Command(__doc__, "results/benchmark-mixture-gpu.json")
    parser.add_argument("--codes", type=int, default=10_000_000)
    parser.add_argument("--components", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cuda")
    options = parser.parse_args()
    if options.tiny:
        options.codes, options.components, options.accelerator = 2000, [2], "cpu"

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "codes.npy")
        write_planted_codes(path, options.codes, DIMENSION, 64)
        mapped = np.load(path, mmap_mode="r")
        for k in options.components:
            generator = torch.Generator().manual_seed(0)
            start = fit_mixture(
                np.array(mapped[:20_000]), k, max_iter=1, generator=generator
            ).mixture
            in_memory = torch.from_numpy(np.array(mapped)).to(options.accelerator)
            for place, codes, device in (
                ("on the device", in_memory, options.accelerator),
                ("on disk", mapped, options.accelerator),
                ("on disk", mapped, "cpu"),
            ):
                seconds, log_likelihood = measure(codes, start, device)
                row = {
                    "codes": options.codes,
                    "components": k,
                    "place": place,
                    "device": device,
                    "seconds_per_iteration": round(seconds, 4),
                    "log_likelihood": log_likelihood,
                }
                rows.append(row)
                print(row, flush=True)

    result = provenance(data=None, options={"dimension": DIMENSION})
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    result |= {"threads": torch.get_num_threads(), "peak_gpu_gib": peak, "rows": rows}
    write_json(options.out, result)


if __name__ == "__main__":
    main()
