"""The tables of docs/performance.md, from the JSON of the benchmarks.

    python benchmarks/tables.py [NAME ...]        (such as throughput, for results/benchmark-throughput.json)

A test compares them with the page, so that no figure there was typed by hand.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"


def table(heads, rows):
    """Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def throughput(found):
    """Examples per second, and ours relative to each."""
    rows = [
        [
            f"{stage}, {precision}",
            name,
            f"{one['examples_per_second']:,.0f}",
            f"{one['equipoise_times_as_fast']:.2f}",
        ]
        for precision, stages in found["rows"].items()
        for stage, others in stages.items()
        for name, one in others.items()
    ]
    return table(["", "", "examples/s", "equipoise, times as fast"], rows)


def step_profile(found):
    """Shares of a step's time."""
    columns = {
        f"{stage}, {name}": shares
        for name, stages in found["rows"].items()
        for stage, shares in stages.items()
    }
    kinds = next(iter(columns.values()))
    return table(
        ["", *columns],
        [[kind, *(f"{shares[kind]:.0%}" for shares in columns.values())] for kind in kinds],
    )


def time_to_quality(found):
    """Seconds until there are samples, and their Fréchet distance; the quickest of pythae's is the measure of time."""
    rows = [
        [name, mixture, row["training_seconds"] + mixture["seconds"]]
        for name, row in found["rows"].items()
        for mixture in row["mixtures"]
    ]
    theirs = min(seconds for name, _, seconds in rows if name.startswith("pythae"))
    cells = [
        [
            name,
            mixture["components"],
            f"{seconds:.0f}",
            f"{seconds / theirs:.2f}",
            "{value:.1f} ± {standard_error:.1f}".format(**mixture["frechet_distance"]),
        ]
        for name, mixture, seconds in rows
    ]
    return table(["", "components", "seconds", "of pythae's quickest", "Fréchet distance"], cells)


def footprint(found):
    """Start and memory."""
    start, training = found["rows"]["start"], found["rows"]["training_of_mnist"]
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


def iwae_cost(found):
    """Codes per second."""
    rows = [
        [
            stage,
            f"{max(row['decoder_codes_per_second'].values()):,}",
            f"{row['bound_codes_per_second']:,}",
            f"{row['ratio']:.2f}",
        ]
        for stage, row in found["rows"].items()
    ]
    return table(["", "bare decoder, codes/s", "bound, codes/s", "ratio"], rows)


def mixture_em(found):
    """Seconds per iteration."""
    rows = [
        [
            f"N = {row['N']:,}, d = {row['d']}, K = {row['K']}",
            f"{row['equipoise_seconds_per_iteration']:.3f}",
            f"{row['scikit_learn_seconds_per_iteration']:.3f}",
            f"{row['ratio']:.1f}",
        ]
        for row in found["speed"]
    ]
    return table(["", "equipoise, s per iteration", "scikit-learn", "times as fast"], rows)


def mixture_scale(found):
    """Seconds per iteration over all codes, memory, and what a first phase on a subsample saves."""
    rows = [
        [
            f"{found['N']:,} codes, an iteration, {size} process{'es' if size != '1' else ''}",
            f"{row['seconds_per_iteration']:.1f} s",
            f"{row['peak_anonymous_mib'] / 1024:.2f} GiB",
        ]
        for size, row in found["iteration"]["processes"].items()
    ]
    for row in found["first_phase"]:
        for name, text in {
            "without": "from the start on all",
            "with_first_phase": "first on a subsample",
        }.items():
            one = row[name]
            passes = f"{one['passes']} passes over all" + (
                "" if one["converged"] else ", not converged"
            )
            cells = [
                f"{one['seconds']:.0f} s, {passes}",
                f"{one['peak_anonymous_mib'] / 1024:.2f} GiB",
            ]
            rows.append(
                [f"{row['N']:,} codes, a fit, seed {row['seed']}, {text}, 2 processes", *cells]
            )
    return table(["", "time", "anonymous memory, peak of a process"], rows)


def cost_scaling(found):
    """Exponents."""
    rows = []
    for part, what in {"em": "an iteration of EM", "training": "a training step"}.items():
        for name, row in found[part].items():
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


def streaming_memory(found):
    """Peaks, by source and number of examples."""
    rows = [
        [
            row["source"],
            f"{row['n']:,}",
            f"{row['anonymous_before_mib']:,.0f}",
            f"{row['anonymous_peak_mib']:,.0f}",
            f"{row['resident_peak_mib']:,.0f}",
        ]
        for row in found["runs"]
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


def distributed(found):
    """Examples per second."""
    rows = [
        [
            way,
            *(
                f"{row[f'stage {stage} examples/s']:,.0f} ({row[f'stage {stage} times one']:.2f})"
                for stage in (1, 2)
            ),
            f"{row['largest relative difference']:.0e}",
        ]
        for way, row in found["rows"].items()
    ]
    return table(
        [
            "",
            "stage 1, examples/s",
            "stage 2, examples/s",
            "largest relative difference of the curve",
        ],
        rows,
    )


TABLES = [
    throughput,
    step_profile,
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
    """Print those asked for, or all."""
    for make in TABLES:
        name = make.__name__.replace("_", "-")
        if not sys.argv[1:] or name in sys.argv[1:]:
            print(make(json.loads((RESULTS / f"benchmark-{name}.json").read_text())), end="\n\n")


if __name__ == "__main__":
    main()
