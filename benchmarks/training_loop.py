"""`equipoise train` against the leanest hand-written PyTorch loop, an epoch each in turn.

    python benchmarks/training_loop.py --data-dir DATA

Both train the same networks. Ours does everything that the command does: validation after each
epoch, checkpoints, the exact pass of eq. (10), test figures when a stage ends, and the fit of the
mixture. The hand-written loop, that of throughput.py, only trains.
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from command import TINY, Command
from throughput import LEAN, OURS, HandWritten, Turns

from equipoise.config import make_config, read_recipe, shipped_recipes
from equipoise.data import load
from equipoise.files import write_json
from equipoise.paper.protocol import PAPERS_STAGE_2
from equipoise.provenance import provenance
from equipoise.run import Run
from equipoise.training.job import train


def main():
    """Train and compare, and write the JSON."""
    parser = Command(__doc__, "results/benchmark-training-loop-{data}.json")
    parser.add_argument("data", nargs="?", default="mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("STAGE_1", "STAGE_2"))
    options = parser.parse_args()

    recipe = read_recipe(shipped_recipes()[options.data]) | PAPERS_STAGE_2
    recipe.pop("data")
    if options.tiny:
        recipe |= TINY
    config = replace(make_config(recipe), tolerance=0.0)
    if options.epochs:
        config = replace(config, stage_1_epochs=options.epochs[0], stage_2_epochs=options.epochs[1])

    data = load(options.data, data_dir=options.data_dir)
    turns = Turns({LEAN: HandWritten(data, config)})
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train(data, config, Path(folder) / "run", sinks=[turns])
        seconds = time.perf_counter() - started
        ends = [row for row in Run(Path(folder) / "run").history() if "test_elbo" in row]

    epochs = [epoch for stage in turns.seconds.values() for epoch in stage]
    loop = sum(epoch[OURS] for epoch in epochs)
    by_hand = sum(epoch[LEAN] for epoch in epochs)
    ours = seconds - by_hand

    medians = {}
    for stage, its_epochs in turns.seconds.items():
        if its_epochs:
            ratios = [epoch[OURS] / epoch[LEAN] for epoch in its_epochs]
            medians[f"stage {stage}"] = round(statistics.median(ratios), 3)

    rows = {
        "whole job, seconds": round(ours, 1),
        "training epochs only, seconds": round(loop, 1),
        "by hand, seconds": round(by_hand, 1),
        "whole job / by hand": round(ours / by_hand, 3),
        "training epochs / by hand": round(loop / by_hand, 3),
        "median of epoch / epoch by hand": medians,
        "test ELBO when a stage ended, nats": [round(row["test_elbo"], 1) for row in ends],
        "test MSE when a stage ended": [row["test_mse"] for row in ends],
        "optimal noise variance": ends[0]["optimal_noise_var"],
    }
    print(json.dumps(rows, indent=2))

    result = provenance(data=data, options=config.as_dict())
    result |= {"threads": torch.get_num_threads(), "rows": rows}
    write_json(options.out, result)


if __name__ == "__main__":
    main()
