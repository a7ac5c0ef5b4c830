r"""Run `equipoise evaluate` as a user would, and compare the figures of several runs.

    python benchmarks/evaluation.py evaluate mnist --data-dir DATA --run RUN \
        --against fashion-mnist --out results/evaluation-mnist.json
    python benchmarks/evaluation.py table results/evaluation-{mnist,fashion-mnist}.json
    python benchmarks/evaluation.py spread results/evaluation-digits-seed-{0,1,2}.json

A run that does not exist is trained first.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from command import TINY

from equipoise.files import write_json
from equipoise.glossary import CURVES, leaves, measure, term
from equipoise.paper.markdown import NONE, estimate
from equipoise.provenance import provenance
from equipoise.run import Run

ROWS = {
    "ELBO, nats": "likelihood.elbo",
    "bits per dimension, IWAE-20": "likelihood.bits_per_dim",
    "bits per dimension, dequantised, IWAE-20": "likelihood.bits_per_dim_dequantised",
    "Fréchet distance, real training data": "samples.real.frechet_distance",
    "Fréchet distance, reconstructions": "samples.reconstruction.frechet_distance",
    "Fréchet distance, prior": "samples.prior.frechet_distance",
    "Fréchet distance, one Gaussian": "samples.gaussian.frechet_distance",
    "Fréchet distance, mixture": "samples.mixture.frechet_distance",
    "KL(mixture, prior), nats": "latent.kl_mixture_prior",
    "pixels that vary within 1 std (.683)": "noise.varying.coverage_1",
    "normalised calibration error": "noise.varying.normalised_calibration_error",
    "sparsification error (random order)": "noise.varying.sparsification_error_area",
    "AUROC of the other set, ELBO": "outliers.negative_elbo.auroc",
    "AUROC, mixture density": "outliers.negative_mixture_log_prob.auroc",
    "AUROC, combined": "outliers.combined.auroc",
}
"""Rows of the table in docs/results-summary.md, and where their figures are."""


def evaluate(options):
    """Train the run if needed, evaluate it, and write the JSON."""
    data = "digits" if options.tiny else options.data
    places = ["--data-dir", options.data_dir] if options.data_dir else []
    if not (options.run / "model.safetensors").is_file():
        train = ["train", data, "--out", str(options.run), *places]
        if options.tiny:
            train += ["--set", *(f"{key}={value}" for key, value in TINY.items())]
        subprocess.run([sys.executable, "-m", "equipoise", *train], check=True)

    command = ["evaluate", str(options.run), *places]
    if options.against:
        command += ["--against", options.against]
    if options.seed is not None:
        command += ["--seed", str(options.seed)]
    if options.tiny:
        command += ["-n", "20", "--importance-samples", "2"]

    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "equipoise", *command], check=True)
    seconds = {"whole command": round(time.perf_counter() - started, 1)}

    run = Run(options.run)
    settings, evaluation = run.settings(), json.loads(run.evaluation_file.read_text())
    sections = evaluation.pop("about")["sections"]
    seconds |= {name: section["seconds"] for name, section in sections.items()}
    stage_1 = next((row for row in run.history() if "optimal_noise_var" in row), {})

    keys = ("name", "fingerprint", "n_train", "n_validation", "n_test")
    result = provenance() | {
        "data": {key: settings["data"][key] for key in keys},
        "options": settings["options"],
        "seconds": seconds,
        "evaluation_seed": sections["samples"]["seed"],
        "optimal_noise_var": stage_1.get("optimal_noise_var"),
        "evaluation": _without_curves(evaluation),
    }
    write_json(options.out, result)


def _without_curves(value):
    if not isinstance(value, dict):
        return value

    return {key: _without_curves(part) for key, part in value.items() if key not in CURVES}


def table(paths):
    """Make a Markdown table with a column for each file."""
    contents = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    lines = ["| | " + " | ".join(content["data"]["name"] for content in contents) + " |"]
    lines.append("|---" * (1 + len(contents)) + "|")

    for title, path in ROWS.items():
        figures = [estimate(content["evaluation"], *path.split(".")) for content in contents]
        if not any(figures):
            continue

        cells = []
        for content, figure in zip(contents, figures, strict=True):
            cell = _format(figure) if figure else NONE
            if "sparsification" in path:
                noise = content["evaluation"]["noise"]["varying"]
                cell += f" ({noise['random_sparsification_error_area']['value']:.2f})"

            cells.append(cell)

        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    return "\n".join(lines)


def _format(figure):
    """Write a figure with the digits that its standard error, of two digits, supports."""
    value, error = figure["value"], figure["standard_error"]
    if not error:
        return f"{value:.3f}"

    decimals = min(5, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def spread(paths):
    """Print how far the figures of other seeds lie from those of the first.

    The unit is the standard error of the difference.
    """
    first, *others = (
        dict(leaves(json.loads(Path(path).read_text(encoding="utf-8"))["evaluation"]))
        for path in paths
    )

    rows = []
    for keys, figure in first.items():
        if not (isinstance(figure, dict) and figure.get("standard_error")):
            continue

        gaps = []
        for other in others:
            error = math.hypot(figure["standard_error"], other[keys]["standard_error"])
            gaps.append((other[keys]["value"] - figure["value"]) / error)

        key, case = measure(keys[1:])
        name = ", ".join([keys[0], term(key).title, *(term(part).title for part in case)])
        rows.append((max(map(abs, gaps)), name, gaps))

    for _, name, gaps in sorted(rows, reverse=True):
        print(f"{name:90s} " + " ".join(f"{gap:+.2f}" for gap in gaps))

    sizes = [abs(gap) for _, _, gaps in rows for gap in gaps]
    print(
        f"{len(sizes)} differences: {sum(size < 1 for size in sizes)} below 1 standard error, "
        f"{sum(size < 2 for size in sizes)} below 2, largest {max(sizes):.2f}"
    )


def main():
    """Run the command that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("evaluate")
    one.add_argument("data")
    one.add_argument("--data-dir")
    one.add_argument(
        "--run", type=Path, required=True, help="run folder; trained first if it is not there"
    )
    one.add_argument("--against")
    one.add_argument("--seed", type=int, help="seed of the evaluation")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument(
        "--tiny", action="store_true", help="the smallest size, on digits, to see that it runs"
    )

    for name in ("table", "spread"):
        commands.add_parser(name).add_argument("files", nargs="+")

    options = parser.parse_args()
    if options.command == "evaluate":
        evaluate(options)
    elif options.command == "table":
        print(table(options.files))
    else:
        spread(options.files)


if __name__ == "__main__":
    main()
