"""`equipoise train` against the leanest hand-written PyTorch loop of the same networks, an epoch each in turn.

    python benchmarks/training_loop.py --data-dir DATA

Ours does all that the command does: validation after each epoch, checkpoints, the exact pass of eq. (10), test
figures when a stage ends, and the fit of the mixture. The hand-written loop only trains.
"""

import argparse
import copy
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from equipoise.data import load
from equipoise.provenance import provenance
from equipoise.training.config import make_config, read_recipe, shipped_recipes
from equipoise.training.run import Run, make_model, train

LOG_2PI = math.log(2 * math.pi)


class HandWritten:
    """Fused AdamW, channels-last, data as one uint8 tensor, a running variance; nothing else."""

    def __init__(self, data, config):
        torch.manual_seed(config.seed)
        model = make_model(data, config)
        self.encoder, self.decoder = model.encoder, model.decoder
        for module in (self.encoder, self.decoder):
            module.to(memory_format=torch.channels_last)
        self.x = torch.from_numpy(data.train[:])
        self.config = config
        self.dimensions = math.prod(data.shape)
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.start_stage([*self.encoder.parameters(), *self.decoder.parameters()], config.learning_rate)

    def start_stage(self, parameters, learning_rate):
        """A fresh optimiser; the schedule is left out, it costs nothing."""
        self.optimizer = torch.optim.AdamW(
            parameters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True
        )

    def start_stage_2(self):
        """A variance network that starts as the decoder."""
        self.log_var = (self.sums[0] / self.sums[1]).log().float()
        self.variance = copy.deepcopy(self.decoder)
        torch.nn.init.zeros_(self.variance.output.weight)
        torch.nn.init.zeros_(self.variance.output.bias)
        parameters = [p for m in (self.encoder, self.decoder, self.variance) for p in m.parameters()]
        self.start_stage(parameters, self.config.stage_2_learning_rate)

    def epoch(self, stage):
        """Train for an epoch."""
        for index in torch.randperm(len(self.x)).split(self.config.batch_size):
            x = self.x[index].float().div_(255).contiguous(memory_format=torch.channels_last)
            mean, log_var = self.encoder(x).chunk(2, 1)
            z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
            kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
            error = (x - self.decoder(z)).square()
            total = error.flatten(1).sum(1)
            if stage == 1:
                self.sums.mul_(0.99).add_(torch.tensor([float(total.detach().sum()), x.numel()]))
                noise = (self.sums[0] / self.sums[1]).log().float()
            else:
                noise = self.log_var
            loss = 0.5 * (total * torch.exp(-noise) + self.dimensions * (noise + LOG_2PI)) + kl
            if stage == 2:
                predicted = torch.maximum(self.log_var + self.variance(z.detach()), self.log_var)
                loss = loss + 0.5 * (error.detach() * torch.exp(-predicted) + predicted + LOG_2PI).flatten(1).sum(1)
            self.optimizer.zero_grad()
            loss.mean().backward()
            self.optimizer.step()


class Turns:
    """A sink that lets the hand-written loop train an epoch after each of ours, and keeps both clocks."""

    def __init__(self, other):
        self.other = other
        self.stage = 1
        self.seconds = {1: [], 2: []}
        self.ours = {1: [], 2: []}

    def start(self, total_steps, done_steps, history):
        """Nothing."""

    def step(self, done_steps, total_steps, label, figures):
        """Nothing."""

    def message(self, text):
        """Show it."""
        print(text, flush=True)

    def close(self):
        """Nothing."""

    def epoch(self, row):
        """Train an epoch by hand."""
        if row["stage"] == 2 and self.stage == 1:
            self.other.start_stage_2()
            self.stage = 2
        started = time.perf_counter()
        self.other.epoch(self.stage)
        self.seconds[self.stage].append(time.perf_counter() - started)
        self.ours[self.stage].append(row["seconds"])
        print(
            f"stage {row['stage']} epoch {row['epoch']}: ours {row['seconds']:.1f} s, by hand "
            f"{self.seconds[self.stage][-1]:.1f} s; validation ELBO {row['validation_elbo']:.1f}",
            flush=True,
        )


def main():
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("STAGE_1", "STAGE_2"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipe = read_recipe(shipped_recipes()[options.data])
    recipe.pop("data")
    config = replace(make_config(recipe), tolerance=0.0)
    if options.epochs:
        config = replace(config, stage_1_epochs=options.epochs[0], stage_2_epochs=options.epochs[1])
    data = load(options.data, data_dir=options.data_dir)
    turns = Turns(HandWritten(data, config))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train(data, config, Path(folder) / "run", sinks=[turns])
        by_hand = sum(map(sum, turns.seconds.values()))
        ours = time.perf_counter() - started - by_hand
        ends = [row for row in Run(Path(folder) / "run").history() if "test_elbo" in row]
    loop = sum(map(sum, turns.ours.values()))
    rows = {
        "whole job, seconds": round(ours, 1),
        "training epochs only, seconds": round(loop, 1),
        "by hand, seconds": round(by_hand, 1),
        "whole job / by hand": round(ours / by_hand, 3),
        "training epochs / by hand": round(loop / by_hand, 3),
        "median of epoch / epoch by hand": {
            f"stage {stage}": round(
                sorted(a / b for a, b in zip(turns.ours[stage], turns.seconds[stage], strict=True))[
                    len(turns.ours[stage]) // 2
                ],
                3,
            )
            for stage in (1, 2)
            if turns.ours[stage]
        },
        "test ELBO when a stage ended, nats": [round(row["test_elbo"], 1) for row in ends],
        "test MSE when a stage ended": [row["test_mse"] for row in ends],
        "optimal noise variance": ends[0]["optimal_noise_var"],
    }
    print(json.dumps(rows, indent=2))
    out = options.out or Path(f"results/benchmark-training-loop-{options.data}.json")
    out.parent.mkdir(exist_ok=True)
    found = provenance(data=data, options=config.as_dict()) | {"threads": torch.get_num_threads(), "rows": rows}
    out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
