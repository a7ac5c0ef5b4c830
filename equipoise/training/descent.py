"""What a stage descends with: objective, optimiser, learning rate, clipping and average."""

import warnings
from functools import partial
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from equipoise.config import TrainConfig
from equipoise.gaussian import Randomness, SharedGenerator
from equipoise.model import VAE
from equipoise.objectives import Terms
from equipoise.stages import Stage
from equipoise.training.clipping import RelativeClipping
from equipoise.training.engine import all_reduce_with_gradient
from equipoise.training.setup import choose_stage_two, make_objective, parameter_groups

PASSED = 2
"""Examples of a process in the pass from which the order of gradients is learned."""


class Descent:
    """One stage's way down: AdamW with warm-up and cosine decay.

    Args:
        model: The model, on the engine's device and in its layout.
        config: Options of the optimiser.
        stage: Stage of Algorithm 1.
        n_steps: Steps of the stage if it does not end early.
        fabric: The engine.
    """

    def __init__(
        self, model: VAE, config: TrainConfig, stage: Stage, n_steps: int, fabric: Fabric
    ) -> None:
        self.model = model
        self.config = config
        self.fabric = fabric

        peak = config.learning_rate
        self.frozen: list[nn.Parameter] = []
        if stage is Stage.PREDICTED_VARIANCE:
            stage_two = choose_stage_two(model, config)
            peak = stage_two.learning_rate
            if stage_two.gradients == "frozen":
                self.frozen = _freeze(model)
        groups = parameter_groups(model, peak, config.weight_decay)
        is_on_gpu = fabric.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            groups, lr=peak, betas=(0.9, 0.99), fused=True, capturable=is_on_gpu
        )

        warm_up = max(1, round(config.warm_up * n_steps))
        self.scheduler = SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up),
                CosineAnnealingLR(optimizer, T_max=max(1, n_steps - warm_up)),
            ],
            milestones=[warm_up],
        )

        objective = make_objective(model, config, stage)
        if fabric.world_size > 1:
            objective.all_reduce = partial(all_reduce_with_gradient, fabric)
        self.objective: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.objective, self.optimizer = fabric.setup(objective, optimizer)
        self.parameters = list(self.objective.parameters())
        if fabric.world_size > 1:
            self._settle()
        self.rates: list[Tensor] | None = None
        if is_on_gpu:
            self.rates = [torch.zeros((), device=fabric.device) for _ in groups]
            self._tell_rates()
        self.clipping = RelativeClipping(config.clip).to(fabric.device)

        self.average: AveragedModel | None = None
        if config.ema_decay:
            decay = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(model, multi_avg_fn=decay)

    def step(self, x: Tensor, generator: Randomness, batch_size: int) -> Terms:
        r"""Take a step on the networks.

        Nothing in it waits for the device or depends on the number of steps done, so that it can be
        recorded and replayed. :meth:`advance` follows it.

        Args:
            x: This process's part of a batch, in model units, (B, \*).
            generator: Source of one sample of z per example.
            batch_size: Examples of the batch, over all processes.

        Returns:
            The terms of the objective, from before the step.
        """
        self.optimizer.zero_grad()
        terms: Terms = self.objective(x, generator)

        # The engine averages over processes, so this is the mean over the whole batch.
        mean_part = batch_size / self.fabric.world_size
        self.fabric.backward(terms.loss.sum() / mean_part)

        if self.config.clip:
            self.clipping.clip(self.parameters)
        self._update()
        return terms

    def advance(self) -> None:
        """Take the weights into their average, and move on in the schedule of the rate."""
        if self.average is not None:
            self.average.update_parameters(self.model)

        with warnings.catch_warnings():
            # Up to torch 2.8, SequentialLR itself makes the call that this warning is about.
            warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step", UserWarning)
            self.scheduler.step()
        self._tell_rates()

    @property
    def evaluated_model(self) -> VAE:
        """The model with averaged weights where there are some, else the model itself."""
        if self.average is None:
            return self.model

        averaged: VAE = self.average.module  # type: ignore[assignment] # a copy of the model
        return averaged

    @property
    def learning_rate(self) -> float:
        """Learning rate of the networks at the next step."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def take_average(self) -> None:
        """Put the averaged weights in place of the model's, at the end of the stage."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
            self.average = None

    def release(self) -> None:
        """Let the parameters learn again that stood still in this stage."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides the model.

        Returns:
            A tree of numbers and tensors.
        """
        return {
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "clipping": self.clipping.state_dict(),
        }

    def layouts(self) -> list[list[int]]:
        """Memory layouts on which the next step depends, besides the numbers.

        Returns:
            For each parameter with moments, the strides of the parameter and of its moments, over
            the dimensions that are longer than 1.
        """
        layouts = []
        for parameter, moments in self.optimizer.state.items():
            for tensor in (parameter, *moments.values()):
                sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
                layouts.append([stride for size, stride in sizes_and_strides if size > 1])
        return layouts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where :meth:`state_dict` was taken.

        Args:
            state: What it returned.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["capturable"] = self.rates is not None  # not as on the device of the file
        self._lay_out_moments()
        self.scheduler.load_state_dict(state["scheduler"])
        self.clipping.load_state_dict(state["clipping"])
        self._tell_rates()
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _settle(self) -> None:
        """Let the processes find the order in which gradients arrive, before the first step.

        They sum gradients in blocks of this order, which they learn from their first pass, and the
        order in which numbers are added follows from their place in the block. Otherwise the first
        step of a training that goes on would round other sums than that of one that never stopped.
        """
        model, device = self.model, self.fabric.device
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        x = torch.zeros(PASSED, *model.shape, device=device)
        if model.memory_format is torch.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        n, rank = PASSED * self.fabric.world_size, self.fabric.global_rank
        drawn = torch.Generator(device).manual_seed(0)

        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # which dropout draws from
            terms = self.objective(x, SharedGenerator(drawn, n, rank, self.fabric.world_size))
            self.fabric.backward(terms.loss.sum())
        self.optimizer.zero_grad()
        for name, value in model.named_buffers():
            value.copy_(buffers[name])

    def _update(self) -> None:
        """Let the optimiser step, on a GPU with the rates that are there."""
        groups = self.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates or scheduled, strict=True):
            group["lr"] = rate

        self.optimizer.step()
        for group, rate in zip(groups, scheduled, strict=True):
            group["lr"] = rate

    def _tell_rates(self) -> None:
        """Write the scheduled rates to the GPU, where a recorded step reads them."""
        for group, rate in zip(self.optimizer.param_groups, self.rates or [], strict=False):
            rate.fill_(group["lr"])

    def _lay_out_moments(self) -> None:
        """Bring the optimiser's moments into the memory layout of their parameters.

        The fused AdamW goes through weights and moments in the order of their memory. Files hold
        every tensor in the usual order, but weights of convolutions may be channels last.
        """
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == parameter.shape:
                    laid_out = torch.empty_like(parameter, dtype=moment.dtype)
                    moments[name] = laid_out.copy_(moment)


def _freeze(model: VAE) -> list[nn.Parameter]:
    """Take encoder and decoder out of what is trained; return the parameters that were in it."""
    networks = nn.ModuleList([model.encoder, model.decoder])
    frozen = [parameter for parameter in networks.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
        # What stage 1 left there would count in the norm by which gradients are clipped.
        parameter.grad = None
    return frozen
