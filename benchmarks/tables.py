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
        [f"{stage}, {precision}", name, f"{one['examples_per_second']:,.0f}", f"{one['equipoise_times_as_fast']:.2f}"]
        for precision, stages in found["rows"].items()
        for stage, others in stages.items()
        for name, one in others.items()
    ]
    return table(["", "", "examples/s", "equipoise, times as fast"], rows)


def time_to_quality(found):
    """Seconds until there are samples, and their Fréchet distance."""
    rows = [
        [name, mixture, row["training_seconds"] + mixture["seconds"]]
        for name, row in found["rows"].items()
        for mixture in row["mixtures"]
    ]
    theirs = rows[0][2]
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
    return table(["", "components", "seconds", "of pythae's", "Fréchet distance"], cells)


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


TABLES = [throughput, time_to_quality, footprint, iwae_cost, mixture_em]


def main():
    """Print those asked for, or all."""
    for make in TABLES:
        name = make.__name__.replace("_", "-")
        if not sys.argv[1:] or name in sys.argv[1:]:
            print(make(json.loads((RESULTS / f"benchmark-{name}.json").read_text())), end="\n\n")


if __name__ == "__main__":
    main()
