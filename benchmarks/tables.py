"""Print the tables of docs/performance.md, from the JSON of the benchmarks.

    python benchmarks/tables.py [NAME ...]

A name is for example throughput, for results/benchmark-throughput.json. A test compares the tables
with the page, so that no figure on it was typed by hand.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"


def table(heads, rows):
    """Make a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def throughput(content):
    """Examples per second of each loop, and the speed of ours relative to it."""
    rows = []
    for precision, stages in content["rows"].items():
        for stage, loops in stages.items():
            for name, row in loops.items():
                speed = f"{row['examples_per_second']:,.0f}"
                ratio = f"{row['equipoise_times_as_fast']:.2f}"
                rows.append([f"{stage}, {precision}", name, speed, ratio])

    return table(["", "", "examples/s", "equipoise, times as fast"], rows)


def throughput_gpu(content):
    """The same on a GPU, without the ceiling, from which small kernels are far away."""
    rows = {
        precision: {
            stage: {name: row for name, row in loops.items() if not name.startswith("ceiling")}
            for stage, loops in stages.items()
        }
        for precision, stages in content["rows"].items()
    }
    return throughput({"rows": rows})


def step_profile(content):
    """Shares of a step's time, by kind of operation."""
    columns = {}
    for name, stages in content["rows"].items():
        for stage, shares in stages.items():
            columns[f"{stage}, {name}"] = shares

    kinds = next(iter(columns.values()))
    rows = [[kind, *(f"{shares[kind]:.0%}" for shares in columns.values())] for kind in kinds]
    return table(["", *columns], rows)


def time_to_quality(content):
    """Seconds until there are samples, and the Fréchet distance of the samples.

    The unit of time is the quickest of pythae's models.
    """
    rows = []
    for name, row in content["rows"].items():
        for mixture in row["mixtures"]:
            seconds = row["training_seconds"] + mixture["seconds"]
            rows.append([name, mixture, seconds])

    quickest = min(seconds for name, _, seconds in rows if name.startswith("pythae"))

    cells = []
    for name, mixture, seconds in rows:
        distance = "{value:.1f} ± {standard_error:.1f}".format(**mixture["frechet_distance"])
        ratio = f"{seconds / quickest:.2f}"
        cells.append([name, mixture["components"], f"{seconds:.0f}", ratio, distance])

    return table(["", "components", "seconds", "of pythae's quickest", "Fréchet distance"], cells)


def footprint(content):
    """Start-up time and memory."""
    start, training = content["rows"]["start"], content["rows"]["training_of_mnist"]
    return table(
        ["", ""],
        [
            ["`equipoise --help`", f"{start['help_seconds']:.2f} s"],
            ["of which Python itself", f"{start['python_seconds']:.2f} s"],
            ["`import equipoise`", f"{start['import_seconds']:.3f} s"],
            ["imports torch", "yes" if start["import_brings_torch"] else "no"],
            ["`equipoise train mnist`, peak resident memory", f"{training['peak_gib']:.2f} GiB"],
        ],
    )


def iwae_cost(content):
    """Codes per second of the decoder and of the bound."""
    rows = [
        [
            stage,
            f"{max(row['decoder_codes_per_second'].values()):,}",
            f"{row['bound_codes_per_second']:,}",
            f"{row['ratio']:.2f}",
        ]
        for stage, row in content["rows"].items()
    ]
    return table(["", "bare decoder, codes/s", "bound, codes/s", "ratio"], rows)


def mixture_em(content):
    """Seconds per iteration of EM."""
    rows = [
        [
            f"N = {row['N']:,}, d = {row['d']}, K = {row['K']}",
            f"{row['equipoise_seconds_per_iteration']:.3f}",
            f"{row['scikit_learn_seconds_per_iteration']:.3f}",
            f"{row['ratio']:.1f}",
        ]
        for row in content["speed"]
    ]
    return table(["", "equipoise, s per iteration", "scikit-learn", "times as fast"], rows)


def mixture_scale(content):
    """Seconds and memory of iterations over all codes, and of fits with and without first phase."""
    rows = []
    for size, row in content["iteration"]["processes"].items():
        processes = "1 process" if size == "1" else f"{size} processes"
        rows.append(
            [
                f"{content['N']:,} codes, an iteration, {processes}",
                f"{row['seconds_per_iteration']:.1f} s",
                f"{row['peak_anonymous_mib'] / 1024:.2f} GiB",
            ]
        )

    ways = {"without": "from the start on all", "with_first_phase": "first on a subsample"}
    for row in content["first_phase"]:
        for key, way in ways.items():
            fit = row[key]
            time = f"{fit['seconds']:.0f} s, {fit['passes']} passes over all"
            if not fit["converged"]:
                time += ", not converged"

            rows.append(
                [
                    f"{row['N']:,} codes, a fit, seed {row['seed']}, {way}, 2 processes",
                    time,
                    f"{fit['peak_anonymous_mib'] / 1024:.2f} GiB",
                ]
            )

    return table(["", "time", "anonymous memory, peak of a process"], rows)


def cost_scaling(content):
    """Exponents of the cost, with the sizes that they were fitted to."""
    rows = []
    for part, what in {"em": "an iteration of EM", "training": "a training step"}.items():
        for name, row in content[part].items():
            fixed = ", ".join(f"{key} = {value:,}" for key, value in row["fixed"].items())
            cost = "an epoch of training" if "seconds_per_epoch" in row else what
            rows.append(
                [
                    f"{cost}, {name}",
                    f"{row['sizes'][0]:,} to {row['sizes'][-1]:,}",
                    fixed.replace("batch_size", "batch"),
                    f"{row['exponent']:.2f} ± {row['standard_error']:.2f}",
                    f"{row['last_two']:.2f}",
                ]
            )

    return table(["cost of", "from, to", "at", "exponent", "of the last two"], rows)


def streaming_memory(content):
    """Peaks of the memory, by source and number of examples."""
    rows = [
        [
            row["source"],
            f"{row['n']:,}",
            f"{row['anonymous_before_mib']:,.0f}",
            f"{row['anonymous_peak_mib']:,.0f}",
            f"{row['resident_peak_mib']:,.0f}",
        ]
        for row in content["runs"]
    ]
    return table(
        [
            "source",
            "examples",
            "anonymous before, MiB",
            "anonymous peak, MiB",
            "resident peak, MiB",
        ],
        rows,
    )


def distributed(content):
    """Examples per second of one and two processes."""
    rows = []
    for way, row in content["rows"].items():
        speeds = []
        for stage in (1, 2):
            speed, ratio = row[f"stage {stage} examples/s"], row[f"stage {stage} times one"]
            speeds.append(f"{speed:,.0f} ({ratio:.2f})")

        rows.append([way, *speeds, f"{row['largest relative difference']:.0e}"])

    heads = [
        "",
        "stage 1, examples/s",
        "stage 2, examples/s",
        "largest relative difference of the curve",
    ]
    return table(heads, rows)


TABLES = [
    throughput,
    step_profile,
    throughput_gpu,
    time_to_quality,
    footprint,
    iwae_cost,
    mixture_em,
    mixture_scale,
    cost_scaling,
    streaming_memory,
    distributed,
]


def main():
    """Print the tables that the arguments name, or all."""
    for make in TABLES:
        name = make.__name__.replace("_", "-")
        if not sys.argv[1:] or name in sys.argv[1:]:
            content = json.loads((RESULTS / f"benchmark-{name}.json").read_text())
            print(make(content), end="\n\n")


if __name__ == "__main__":
    main()
