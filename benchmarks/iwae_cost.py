"""Cost of the importance-weighted bound, K = 20, against a bare pass of the decoder.

    python benchmarks/iwae_cost.py

Both see the same number of codes, in turns, on images of MNIST's size with the networks of its
recipe. The networks are untrained, since their weights do not matter. After stage 2 a pass is that
of two networks, mean and variance. The decoder is tried with several numbers of codes at once, and
the fastest counts.
"""

import json
import statistics
import time

import torch
from command import Command

from equipoise.files import write_json
from equipoise.metrics.likelihood import iwae
from equipoise.model import VAE
from equipoise.provenance import provenance

N, K, ROUNDS = 500, 20, 7
AT_ONCE = (128, 256, 500, 1000)
TINY_N, TINY_ROUNDS = 20, 1


def timed(run, *arguments):
    """Return the seconds that a function takes."""
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def compare(model, networks, N, n_rounds):
    """Return the codes per second of both, and their ratio."""
    x = torch.rand(N, *model.shape)
    z = torch.randn(N * K, model.latent_dim)

    @torch.no_grad()
    def decode(n):
        for codes in z.split(n):
            for network in networks:
                network(codes)

    def one_round():
        return {"bound": timed(iwae, model, [x], K)} | {n: timed(decode, n) for n in AT_ONCE}

    rounds = [one_round() for _ in range(n_rounds + 1)][1:]  # the first one warms up
    speeds = {}
    for name in rounds[0]:
        seconds = statistics.median(one[name] for one in rounds)
        speeds[name] = round(N * K / seconds)

    best = max(AT_ONCE, key=speeds.get)
    ratios = [one[best] / one["bound"] for one in rounds]
    return {
        "bound_codes_per_second": speeds["bound"],
        "decoder_codes_per_second": {str(n): speeds[n] for n in AT_ONCE},
        "ratio": round(statistics.median(ratios), 3),
    }


def main():
    """Compare and write the JSON."""
    parser = Command(__doc__, "results/benchmark-iwae-cost.json")
    options = parser.parse_args()

    size = (TINY_N, TINY_ROUNDS) if options.tiny else (N, ROUNDS)

    torch.manual_seed(0)
    model = VAE.build((1, 28, 28), latent_dim=16, mean_bounds=(0.0, 1.0)).eval()

    rows = {"stage 1": compare(model, [model.decoder], *size)}
    model.predict_variance(torch.tensor(0.01), torch.tensor(0.01))
    rows["stage 2"] = compare(model.eval(), [model.decoder, model.noise.network], *size)
    print(json.dumps(rows, indent=2))

    about = {
        "threads": torch.get_num_threads(),
        "examples": size[0],
        "importance_samples": K,
        "rounds": size[1],
    }
    write_json(options.out, provenance() | about | {"rows": rows})


if __name__ == "__main__":
    main()
