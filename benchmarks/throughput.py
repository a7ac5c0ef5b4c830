"""Training throughput of equipoise, of the leanest and the usual hand-written loop, and of pythae, in turns.

    python benchmarks/throughput.py --data-dir DATA        (in the environment that peers.py describes)

Everyone trains the networks of `make_model` on MNIST with batches of 256, for a segment of --steps each in turn; a
ratio is the median over the rounds of the ratio within a round. Ours is `Trainer.fit` itself, with its running means,
clipping, schedule and closed form, whose epoch is a segment. The leanest hand-written loop has the same modules, fused
AdamW, channels-last and a running variance, once without and once with `clip_grad_norm_`. The usual one has torch's own
layers and Adam, and so has pythae, which trains by the `train_step` of its trainer, in float32 always: its mixed
precision is for GPUs. Stage 2 is compared with the leanest loops alone. The ceiling is what no loop can exceed: the
convolutions and matrix products of a step, counted by torch, at the rate of one large matrix product in the same
precision, which is measured in each round.
"""

import argparse
import copy
import json
import logging
import math
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

from equipoise.config import make_config, read_recipe, shipped_recipes
from equipoise.data import load
from equipoise.networks import GELU, ConvTranspose2d
from equipoise.processes import choose_device
from equipoise.provenance import provenance
from equipoise.stages import Stage
from equipoise.training.setup import make_model, make_objective
from equipoise.training.trainer import Trainer

LOG_2PI = math.log(2 * math.pi)
OURS, LEAN, CLIPPED, PLAIN, PYTHAE, CEILING = (
    "equipoise",
    "leanest loop by hand",
    "the same, clipping gradients",
    "usual loop by hand",
    "pythae 0.1.2",
    "ceiling: matrix products alone",
)
PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed"}


class HandWritten:
    """Data as one uint8 tensor and a running variance; the lean one has fused AdamW and channels-last as well."""

    def __init__(self, data, config, *, lean=True, clip=False):
        torch.manual_seed(config.seed)
        model = make_model(data, config)
        if not lean:
            use_layers_of_torch(model)
        self.device = choose_device(config)
        self.encoder, self.decoder = model.encoder.to(self.device), model.decoder.to(self.device)
        self.is_lean, self.is_clipped = lean, clip
        self.layout = torch.channels_last if lean else torch.contiguous_format
        for module in (self.encoder, self.decoder):
            module.to(memory_format=self.layout)
        self.x = torch.from_numpy(data.train[:]).to(self.device)
        self.config = config
        self.dimensions = math.prod(data.shape)
        self.error, self.count = torch.zeros((), dtype=torch.float64, device=self.device), 0.0
        self.start_stage(
            [*self.encoder.parameters(), *self.decoder.parameters()], config.learning_rate
        )

    def start_stage(self, parameters, learning_rate):
        """A fresh optimiser; the schedule is left out, it costs nothing."""
        self.parameters = parameters
        if self.is_lean:
            self.optimizer = torch.optim.AdamW(
                parameters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True
            )
        else:
            self.optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def start_stage_2(self):
        """A variance network that starts as the decoder."""
        self.log_var = (self.error / self.count).log().float()
        self.variance = copy.deepcopy(self.decoder)
        torch.nn.init.zeros_(self.variance.output.weight)
        torch.nn.init.zeros_(self.variance.output.bias)
        parameters = [
            p for m in (self.encoder, self.decoder, self.variance) for p in m.parameters()
        ]
        self.start_stage(parameters, self.config.stage_2_learning_rate)

    def epoch(self, stage):
        """Train for an epoch."""
        for index in torch.randperm(len(self.x), device=self.device).split(self.config.batch_size):
            x = self.x[index].float().div_(255).contiguous(memory_format=self.layout)
            mean, log_var = self._through(self.encoder, x).chunk(2, 1)
            z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
            kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
            error = mse_loss(self._through(self.decoder, z), x, reduction="none")
            total = error.flatten(1).sum(1)
            if stage == 1:
                self.error = 0.99 * self.error + total.detach().sum()
                self.count = 0.99 * self.count + x.numel()
                noise = (self.error / self.count).log().float()
            else:
                noise = self.log_var
            loss = 0.5 * (total * torch.exp(-noise) + self.dimensions * (noise + LOG_2PI)) + kl
            if stage == 2:
                predicted = torch.maximum(
                    self.log_var + self._through(self.variance, z.detach()), self.log_var
                )
                loss = loss + 0.5 * (
                    error.detach() * torch.exp(-predicted) + predicted + LOG_2PI
                ).flatten(1).sum(1)
            self.optimizer.zero_grad()
            loss.mean().backward()
            if self.is_clipped:
                torch.nn.utils.clip_grad_norm_(self.parameters, 1e6)
            self.optimizer.step()

    def _through(self, module, x):
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16-mixed"
        ):
            y = module(x)
        return y.float()


def use_layers_of_torch(model):
    """Compute the same with the layers from which ours are derived."""
    for module in model.modules():
        if type(module) in (GELU, ConvTranspose2d):
            module.__class__ = type(module).__base__


class Pythae:
    """pythae's VAE and BaseTrainer."""

    def __init__(self, data, config, folder):
        from peers import VAE, BaseTrainerConfig, Decoder, Encoder, VAEConfig, scaled, start
        from pythae.data.datasets import BaseDataset
        from pythae.trainers import BaseTrainer

        ours = start(data, config)
        is_cpu = choose_device(config).type == "cpu"
        use_layers_of_torch(ours)
        x = scaled(ours, data.train)
        self.trainer = BaseTrainer(
            VAE(
                VAEConfig(input_dim=data.shape, latent_dim=ours.latent_dim),
                Encoder(ours),
                Decoder(ours),
            ),
            BaseDataset(x, torch.ones(len(x))),
            training_config=BaseTrainerConfig(
                output_dir=folder,
                per_device_train_batch_size=config.batch_size,
                optimizer_cls="Adam",
                no_cuda=is_cpu,
            ),
        )
        self.trainer.prepare_training()
        self.epochs = 0

    def epoch(self, stage):
        """Train for an epoch."""
        self.epochs += 1
        self.trainer.train_step(self.epochs)


class Ceiling:
    """No loop: how long the matrix products of an epoch take at the rate of a large one."""

    def __init__(self, data, config):
        self.device = choose_device(config)
        self.n = len(data.train)
        self.dtype = torch.bfloat16 if config.precision == "bf16-mixed" else torch.float32
        self.flops = {stage: flops_of_an_example(data, config, stage) for stage in (1, 2)}

    def seconds(self, stage):
        """Of an epoch."""
        return self.n * self.flops[stage] / self.rate()

    def rate(self, side=2048, least_seconds=0.3):
        """Floating-point operations a second."""
        left, right = torch.randn(2, side, side, device=self.device).to(self.dtype)
        left @ right
        synchronise(self.device)
        started, n = time.perf_counter(), 0
        while (seconds := time.perf_counter() - started) < least_seconds:
            for _ in range(10 if self.device.type == "cpu" else 1000):
                left @ right
                n += 1
            synchronise(self.device)
        return 2 * side**3 * n / seconds


def flops_of_an_example(data, config, stage):
    """Of the convolutions and matrix products of a step, forwards and backwards, with torch's own layers."""
    model = make_model(data, config)
    if stage == 2:
        model.predict_variance(torch.tensor(0.01), torch.tensor(0.01))
    use_layers_of_torch(model)
    x = model.scaling(torch.from_numpy(data.train[: config.batch_size]))
    objective = make_objective(model, config, Stage(stage))
    with FlopCounterMode(display=False) as counter:
        objective(x, torch.Generator().manual_seed(0)).loss.mean().backward()
    return counter.get_total_flops() / len(x)


def synchronise(device):
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Silent:
    """A sink that does nothing."""

    def start(self, total_steps, done_steps, history):
        """Nothing."""

    def step(self, done_steps, total_steps, label, figures):
        """Nothing."""

    def epoch(self, row):
        """Nothing."""

    def message(self, text):
        """Nothing."""

    def close(self):
        """Nothing."""


class Turns(Silent):
    """A sink that lets others train an epoch after each of ours, and keeps the clocks."""

    def __init__(self, others, ceiling):
        self.others = others
        self.ceiling = ceiling
        self.seconds = {1: [], 2: []}
        self.stage = 1

    def message(self, text):
        """Show it."""
        print(text, flush=True)

    def epoch(self, row):
        """Let the others train; in stage 2 the leanest loops alone."""
        if row["stage"] == 2 and self.stage == 1:
            self.stage = 2
            self.others = {
                name: other for name, other in self.others.items() if name in (LEAN, CLIPPED)
            }
            for other in self.others.values():
                other.start_stage_2()
        seconds = {OURS: row["seconds"]}
        for name, other in self.others.items():
            started = time.perf_counter()
            other.epoch(self.stage)
            synchronise(self.ceiling.device)
            seconds[name] = time.perf_counter() - started
        seconds[CEILING] = self.ceiling.seconds(self.stage)
        self.seconds[self.stage].append(seconds)
        print(
            f"stage {self.stage}: "
            + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()),
            flush=True,
        )


def compare(data, config, rounds):
    """Rows of one precision."""
    # The first round of a stage warms up; nothing that happens between epochs is timed.
    config = replace(
        config, stage_1_epochs=rounds[0] + 1, stage_2_epochs=rounds[1] + 1, tolerance=0.0
    )
    torch.manual_seed(config.seed)
    model = make_model(data, config)
    with tempfile.TemporaryDirectory() as folder:
        others = {
            LEAN: HandWritten(data, config),
            CLIPPED: HandWritten(data, config, clip=True),
            PYTHAE: Pythae(data, config, folder),
        }
        if config.precision == PRECISIONS["float32"]:
            others[PLAIN] = HandWritten(data, config, lean=False)
        turns = Turns(others, Ceiling(data, config))
        Trainer(model, data, config, sinks=[turns]).fit()
    return {
        f"stage {stage}": summary(turns.seconds[stage][1:], len(data.train)) for stage in (1, 2)
    }


def summary(rounds, n):
    """Examples per second, and how often as fast ours is."""
    return {
        name: {
            "examples_per_second": round(n / statistics.median(one[name] for one in rounds), 1),
            "equipoise_times_as_fast": round(
                statistics.median(one[name] / one[OURS] for one in rounds), 3
            ),
            "seconds": [round(one[name], 4) for one in rounds],
        }
        for name in rounds[0]
    }


def main():
    """Compare and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=30, help="of a segment")
    parser.add_argument(
        "--rounds", type=int, nargs=2, default=(10, 5), metavar=("STAGE_1", "STAGE_2")
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-throughput.json"))
    options = parser.parse_args()
    logging.disable(logging.INFO)
    recipe = read_recipe(shipped_recipes()["mnist"])
    data = load(recipe.pop("data"), data_dir=options.data_dir)
    config = make_config(recipe | {"accelerator": options.accelerator})
    small = replace(
        data,
        train=data.train.take(slice(options.steps * config.batch_size)),
        validation=data.validation.take(slice(500)),
        test=data.test.take(slice(500)),
    )
    rows = {
        name: compare(small, replace(config, precision=PRECISIONS[name]), options.rounds)
        for name in options.precisions
    }
    found = provenance(data=data, options=config.as_dict())
    found["versions"]["pythae"] = version("pythae")
    found |= {
        "threads": torch.get_num_threads(),
        "steps_of_a_segment": options.steps,
        "rounds": list(options.rounds),
        "rows": rows,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    for precision, stages in rows.items():
        for stage, row in stages.items():
            for name, one in row.items():
                print(
                    f"{precision} {stage} {name}: {one['examples_per_second']:,.0f} examples/s; equipoise x "
                    f"{one['equipoise_times_as_fast']:.3f}"
                )


if __name__ == "__main__":
    main()
