"""Training throughput of equipoise, of hand-written loops, and of pythae.

    python benchmarks/throughput.py --data-dir DATA

It needs the extra `benchmarks`. Every loop trains the networks of `make_model`
of the paper's sizes on MNIST with batches of 256, for a segment of --steps each, in turns. A ratio
is the median over the rounds of the ratio within a round.

- Ours is `Trainer.fit` itself, with its running means, clipping, schedule and closed form. A
  segment is an epoch of it.
- The leanest hand-written loop has the same modules, fused AdamW, channels-last and a running
  variance. It runs once without and once with `clip_grad_norm_`.
- The usual hand-written loop has torch's own layers, and Adam.
- pythae has the same, and trains by the `train_step` of its trainer. It always computes in float32,
  since its mixed precision is for GPUs.

Only the leanest loops take part in stage 2. The ceiling is the speed that no loop can exceed: the
convolutions and matrix products of a step, counted by torch, at the rate of one large matrix
product in the same precision, which is measured in each round.
"""

import copy
import logging
import math
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version

import torch
from command import TINY, Command
from experiment import scaled, start
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

from equipoise.config import make_config, read_papers_recipe
from equipoise.data import load
from equipoise.files import write_json
from equipoise.networks import GELU, ConvTranspose2d
from equipoise.paper.protocol import PAPERS_STAGE_2
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
    """A loop by hand: data as one uint8 tensor, and a running variance.

    The lean one also has fused AdamW and channels-last.
    """

    def __init__(self, data, config, *, lean=True, clip=False):
        torch.manual_seed(config.seed)
        model = make_model(data, config)
        if not lean:
            use_layers_of_torch(model)

        self.config = config
        self.device = choose_device(config.accelerator)
        self.is_lean, self.is_clipped = lean, clip
        self.layout = torch.channels_last if lean else torch.contiguous_format
        self.encoder, self.decoder = model.encoder.to(self.device), model.decoder.to(self.device)
        for module in (self.encoder, self.decoder):
            module.to(memory_format=self.layout)

        self.x = torch.from_numpy(data.train[:]).to(self.device)
        self.dimensions = math.prod(data.shape)
        self.error, self.count = torch.zeros((), dtype=torch.float64, device=self.device), 0.0

        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.start_stage(parameters, config.learning_rate)

    def start_stage(self, parameters, learning_rate):
        """Make a new optimiser. The schedule is left out, since it costs nothing."""
        self.parameters = parameters
        if self.is_lean:
            self.optimizer = torch.optim.AdamW(
                parameters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True
            )
        else:
            self.optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def start_stage_2(self):
        """Make a variance network that starts as a copy of the decoder."""
        self.log_var = (self.error / self.count).log().float()
        self.variance = copy.deepcopy(self.decoder)
        torch.nn.init.zeros_(self.variance.output.weight)
        torch.nn.init.zeros_(self.variance.output.bias)

        modules = (self.encoder, self.decoder, self.variance)
        parameters = [parameter for module in modules for parameter in module.parameters()]
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
                change = self._through(self.variance, z.detach())
                predicted = torch.maximum(self.log_var + change, self.log_var)
                weighted = error.detach() * torch.exp(-predicted)
                loss = loss + 0.5 * (weighted + predicted + LOG_2PI).flatten(1).sum(1)

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
    """Replace our layers by those of torch that they are derived from, which compute the same."""
    for module in model.modules():
        if type(module) in (GELU, ConvTranspose2d):
            module.__class__ = type(module).__base__


class Pythae:
    """The VAE of pythae, trained by its BaseTrainer."""

    def __init__(self, data, config, folder):
        from pythae.data.datasets import BaseDataset
        from pythae.trainers import BaseTrainer
        from pythae_models import VAE, BaseTrainerConfig, Decoder, Encoder, VAEConfig

        ours = start(data, config)
        self.device = choose_device(config.accelerator)
        use_layers_of_torch(ours)
        model_config = VAEConfig(input_dim=data.shape, latent_dim=ours.latent_dim)
        training_config = BaseTrainerConfig(
            output_dir=folder,
            per_device_train_batch_size=config.batch_size,
            optimizer_cls="Adam",
            no_cuda=self.device.type == "cpu",
        )

        x = scaled(ours, data.train)
        self.trainer = BaseTrainer(
            VAE(model_config, Encoder(ours), Decoder(ours)),
            BaseDataset(x, torch.ones(len(x))),
            training_config=training_config,
        )
        self.trainer.prepare_training()
        self.epochs = 0

    def epoch(self, stage):
        """Train for an epoch."""
        self.epochs += 1
        self.trainer.train_step(self.epochs)


class Ceiling:
    """The seconds of an epoch's matrix products, at the rate of a large one. It is not a loop."""

    def __init__(self, data, config):
        self.device = choose_device(config.accelerator)
        self.n = len(data.train)
        self.dtype = torch.bfloat16 if config.precision == "bf16-mixed" else torch.float32
        self.flops = {stage: flops_of_an_example(data, config, stage) for stage in (1, 2)}

    def seconds(self, stage):
        """Return the seconds of an epoch."""
        return self.n * self.flops[stage] / self.rate()

    def rate(self, side=2048, least_seconds=0.3):
        """Measure the floating-point operations per second of a matrix product."""
        left, right = torch.randn(2, side, side, device=self.device).to(self.dtype)
        left @ right
        synchronise(self.device)

        at_once = 10 if self.device.type == "cpu" else 1000
        started, n, seconds = time.perf_counter(), 0, 0.0
        while seconds < least_seconds:
            for _ in range(at_once):
                left @ right

            n += at_once
            synchronise(self.device)
            seconds = time.perf_counter() - started

        return 2 * side**3 * n / seconds


def flops_of_an_example(data, config, stage):
    """Count the operations of a step per example, forwards and backwards.

    They are those of the convolutions and matrix products, with torch's own layers.
    """
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
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Silent:
    """A sink that does nothing."""

    def start(self, total_steps, done_steps, history):
        """Do nothing."""

    def step(self, done_steps, total_steps, label, figures):
        """Do nothing."""

    def epoch(self, row):
        """Do nothing."""

    def message(self, text):
        """Do nothing."""

    def close(self):
        """Do nothing."""


class Turns(Silent):
    """A sink that lets other loops train an epoch after each of ours, and keeps the seconds."""

    def __init__(self, others, ceiling=None):
        self.others = others
        self.ceiling = ceiling
        self.seconds = {1: [], 2: []}
        self.stage = 1

    def message(self, text):
        """Print the message."""
        print(text, flush=True)

    def epoch(self, row):
        """Let the other loops train an epoch; in stage 2 only the leanest ones."""
        if row["stage"] == 2 and self.stage == 1:
            self.start_stage_2()

        seconds = {OURS: row["seconds"]}
        for name, other in self.others.items():
            started = time.perf_counter()
            other.epoch(self.stage)
            synchronise(other.device)
            seconds[name] = time.perf_counter() - started

        if self.ceiling is not None:
            seconds[CEILING] = self.ceiling.seconds(self.stage)
        self.seconds[self.stage].append(seconds)

        times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        print(f"stage {self.stage}: {times}", flush=True)

    def start_stage_2(self):
        """Keep the leanest loops, and start their second stage."""
        self.stage = 2
        self.others = {name: self.others[name] for name in self.others if name in (LEAN, CLIPPED)}
        for other in self.others.values():
            other.start_stage_2()


def compare(data, config, rounds):
    """Let all loops train in turns, and return the rows of one precision."""
    # The first round of a stage warms up, and does not count. The time between epochs does not
    # count either.
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

    n = len(data.train)
    return {f"stage {stage}": summary(turns.seconds[stage][1:], n) for stage in (1, 2)}


def summary(rounds, n):
    """Return examples per second, and the speed of ours relative to each loop."""
    rows = {}
    for name in rounds[0]:
        seconds = [one[name] for one in rounds]
        ratios = [one[name] / one[OURS] for one in rounds]
        rows[name] = {
            "examples_per_second": round(n / statistics.median(seconds), 1),
            "equipoise_times_as_fast": round(statistics.median(ratios), 3),
            "seconds": [round(value, 4) for value in seconds],
        }

    return rows


def main():
    """Compare and write the JSON."""
    parser = Command(__doc__, "results/benchmark-throughput.json", "mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=30, help="steps of a segment")
    parser.add_argument(
        "--rounds", type=int, nargs=2, default=(10, 5), metavar=("STAGE_1", "STAGE_2")
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--compile", action="store_true", help="compile the networks of ours")
    options = parser.parse_args()
    logging.disable(logging.INFO)

    recipe = read_papers_recipe(options.data) | PAPERS_STAGE_2
    if options.tiny:
        recipe, options.steps, options.rounds = recipe | TINY, 2, (1, 1)
    data = load(recipe.pop("data"), data_dir=options.data_dir)
    machine = {"accelerator": options.accelerator, "compile": options.compile}
    config = make_config(recipe | machine)
    small = replace(
        data,
        train=data.train.take(slice(options.steps * config.batch_size)),
        validation=data.validation.take(slice(500)),
        test=data.test.take(slice(500)),
    )

    rows = {}
    for name in options.precisions:
        rows[name] = compare(small, replace(config, precision=PRECISIONS[name]), options.rounds)

    result = provenance(data=data, options=config.as_dict())
    result["versions"]["pythae"] = version("pythae")
    result |= {
        "threads": torch.get_num_threads(),
        "steps_of_a_segment": options.steps,
        "rounds": list(options.rounds),
        "rows": rows,
    }
    write_json(options.out, result)

    for precision, stages in rows.items():
        for stage, loops in stages.items():
            for name, row in loops.items():
                print(
                    f"{precision} {stage} {name}: {row['examples_per_second']:,.0f} examples/s; "
                    f"equipoise x {row['equipoise_times_as_fast']:.3f}"
                )


if __name__ == "__main__":
    main()
