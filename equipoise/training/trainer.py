"""The loop: the only one, and without a formula. It obeys the stage schedule and writes what happened.

One optimiser step is: forward through the objective, backward, step, closed form. Nothing in it waits for the
device: running sums stay there and are read about once a second, for the display, and when an epoch ends.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from equipoise.data import Data, EpochBatches, ExampleSet, batches_of
from equipoise.data.varying import varying_dimensions
from equipoise.gaussian import SharedGenerator
from equipoise.model import VAE
from equipoise.noise import (
    DimensionNoise,
    GlobalNoise,
    PredictedNoise,
    ResidualQuantiles,
    ResidualVariance,
)
from equipoise.objectives import (
    BatchVarianceElbo,
    DetachedVarianceElbo,
    DipVaeI,
    DipVaeII,
    Elbo,
    Objective,
    RaeL2,
    Terms,
    WaeMmd,
)
from equipoise.stages import Decision, Stage, StageSchedule, floor_var
from equipoise.store import StoreError, build_noise
from equipoise.training.checkpoint import load_checkpoint, save_checkpoint
from equipoise.training.clipping import RelativeClipping
from equipoise.training.compilation import begin_step, compile_networks, restore_networks
from equipoise.training.config import PLACEMENT, ConfigError, TrainConfig
from equipoise.training.diagnostics import SplitFigures, range_warning, warnings_for
from equipoise.training.engine import all_reduce, in_main_process, make_fabric, processes_of
from equipoise.training.logging import Row, Sink
from equipoise.training.preemption import Preempted, Sigterm

DISPLAY_SECONDS = 1.0
EVALUATION_BATCH = 500
VARYING_EXAMPLES = 2000
AGREEMENT_STEPS = 10
"""Processes ask each other every so many steps whether one of them is to stop, or a checkpoint is due."""


class NotFiniteError(ArithmeticError):
    """The loss became NaN or infinite."""


class Position(NamedTuple):
    """How far a run is.

    Args:
        epoch: epochs done since the start.
        step: optimiser steps done since the start.
        stage_step: optimiser steps done in this stage.
        batch: batches done in the epoch under way.
    """

    epoch: int = 0
    step: int = 0
    stage_step: int = 0
    batch: int = 0


class RunningMeans:
    """Sums over an epoch that stay on the device until they are read, and the time they took.

    Args:
        device: of the batches.
    """

    NAMES = ("elbo", "log_likelihood", "kl", "squared_error", "noise_var")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.count = 0
        self.log_var_range = torch.tensor([math.inf, -math.inf], device=device)
        self.first_bad_step = -1
        self.started = time.perf_counter()
        self._checks: list[tuple[int, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, terms: Terms, step: int) -> None:
        """Add a batch; what can wait is left to :meth:`read`, for every little operation takes its time.

        Args:
            terms: its objective.
            step: optimiser steps done, to name the one at which the loss stopped being finite.
        """
        noise_var = terms.log_var.exp().mean().expand_as(terms.kl)
        values = (
            terms.elbo,
            terms.log_likelihood,
            terms.kl,
            terms.squared_error,
            noise_var,
            terms.loss,
        )
        sums = torch.stack(values).sum(1, dtype=torch.float64)
        self.sums += sums[:-1]
        self.count += len(terms.kl)
        self._checks.append((step, sums[-1], *torch.aminmax(terms.log_var)))

    def _check(self) -> None:
        """Take in the batches since the last look: range of the log-variance, first loss that was not finite."""
        if not self._checks:
            return
        steps, losses, lows, highs = zip(*self._checks, strict=True)
        self._checks = []
        low = torch.stack(lows).nan_to_num(math.inf, math.inf, -math.inf).min()
        high = torch.stack(highs).nan_to_num(-math.inf, math.inf, -math.inf).max()
        low, high = (
            torch.minimum(self.log_var_range[0], low),
            torch.maximum(self.log_var_range[1], high),
        )
        self.log_var_range = torch.stack([low, high])
        bad = torch.stack(losses).isfinite().logical_not().tolist()
        if self.first_bad_step < 0 and any(bad):
            self.first_bad_step = steps[bad.index(True)]

    def read(
        self, dimensions: int, stage: Stage, all_reduce: Callable[..., Tensor]
    ) -> dict[str, float]:
        """Averages so far, over all processes; the only place that waits for the device.

        Args:
            dimensions: of one example, to turn the squared error into an error per dimension.
            stage: for the error message.
            all_reduce: combines a tensor over processes, by "sum" or "max".

        Returns:
            elbo, log_likelihood, kl in nats per example; mse, noise_var and noise_std in model units; n, the number of
            examples.

        Raises:
            NotFiniteError: if a loss was not finite.
        """
        self._check()
        count, is_bad = (
            self.sums.new_tensor([self.count]),
            self.sums.new_tensor([self.first_bad_step >= 0]),
        )
        *sums, n, n_bad = all_reduce(torch.cat([self.sums, count, is_bad])).tolist()
        if n_bad:
            signs = self.log_var_range.new_tensor(
                [-1.0, 1.0]
            )  # the lowest is the highest of the negatives
            low, high = (all_reduce(self.log_var_range * signs, "max") * signs).tolist()
            bad_step = int(all_reduce(self.sums.new_tensor([self.first_bad_step]), "max"))
            raise NotFiniteError(
                f"The loss stopped being finite in stage {stage:d} at step {bad_step}; until then the log-variance of "
                f"the noise lay in [{low:.2f}, {high:.2f}]. Checkpoints are from before it. Try a lower "
                "learning_rate, or, in stage 2, a higher floor."
            )
        means = {name: value / n for name, value in zip(self.NAMES, sums, strict=True)}
        means["mse"] = means.pop("squared_error") / dimensions
        means["noise_std"] = math.sqrt(means["noise_var"])
        return means | {"n": n}

    @property
    def seconds(self) -> float:
        """Time since the first batch, without that between an interruption and :meth:`unpack`."""
        return time.perf_counter() - self.started

    def pack(self) -> Tensor:
        """Everything in one tensor, which is exact, (10,), float64."""
        self._check()
        others = [self.count, self.first_bad_step, self.seconds]
        return torch.cat(
            [self.sums, self.log_var_range.double(), self.sums.new_tensor(others)]
        ).cpu()

    def unpack(self, packed: Tensor) -> None:
        """Go on where :meth:`pack` was called.

        Args:
            packed: what it returned, (P, 10), of one process, or of several to take over from.
        """
        n = len(self.NAMES)
        self.sums.copy_(packed[:, :n].sum(0))
        self.log_var_range.copy_(torch.stack([packed[:, n].min(), packed[:, n + 1].max()]))
        self.count = int(packed[:, n + 2].sum())
        self.first_bad_step = int(packed[:, n + 3].max())
        self.started = time.perf_counter() - float(packed[:, n + 4].max())


class Trainer:
    """Train a model by Algorithm 1.

    Args:
        model: the model; changed in place.
        data: what to train on.
        config: options.
        folder: where checkpoints go; None keeps none.
        sinks: what takes in the figures.
        fabric: engine, launched; made from the configuration if None.

    Raises:
        ConfigError: if the objective or the batch cannot be divided among processes.
        ValueError: if the data are too few or too small for the configuration.
    """

    def __init__(
        self,
        model: VAE,
        data: Data,
        config: TrainConfig,
        *,
        folder: Path | None = None,
        sinks: Sequence[Sink] = (),
        fabric: Fabric | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.config = config
        self.folder = folder
        self.sinks = sinks
        self.fabric = fabric or make_fabric(config)
        self.schedule = StageSchedule(
            config.stage_1_epochs, config.stage_2_epochs, config.tolerance, config.patience
        )
        self.position = Position()
        self.sigterm = Sigterm()
        self.objective: Any = None
        self.optimizer: Any = None
        self.history: list[Row] = []
        self.optimal_var: Tensor | None = None
        self.average: AveragedModel | None = None
        self.processes = processes_of(self.fabric)
        self.all_reduce = partial(all_reduce, self.fabric)
        self.sum_over_processes = self.all_reduce if self.fabric.world_size > 1 else None
        device = self.fabric.device
        model.to(device)
        if problems := config.problems_of_sharing(
            self.fabric.world_size
        ):  # a number that torchrun may have chosen
            raise ConfigError(problems)
        self.train_batches = self._batches(
            data.train, min(config.batch_size, len(data.train)), seed=config.seed
        )
        self.validation_batches = self._batches(data.validation, EVALUATION_BATCH)
        self.test_batches = self._batches(data.test, EVALUATION_BATCH)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.means = RunningMeans(device)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return len(self.train_batches)

    def fit(self, *, resume: bool = False) -> list[Row]:
        """Train until the schedule has finished.

        With a folder, and in the main thread, SIGTERM stops it after the step in hand and a checkpoint.

        Args:
            resume: go on from the newest whole checkpoint in the folder; from the start if there is none yet.

        Returns:
            One row per epoch, those before a resume included.

        Raises:
            StoreError: if all checkpoints are damaged, or were made with other data or options.
            Preempted: on SIGTERM.
        """
        with self.sigterm if self.folder else nullcontext():
            return self._fit(resume)

    def _fit(self, resume: bool) -> list[Row]:
        self._look_at_data()
        is_restored = resume and self._restore()
        try:
            for sink in self.sinks:
                sink.start(self._total_steps(), self.position.step, self.history)
            if not is_restored and self.schedule.stage is Stage.PREDICTED_VARIANCE:
                self.optimal_var = self._exact_optimal_var()
                self._hand_over()
            elif not is_restored:
                self._enter_stage()
            while self.schedule.stage is not Stage.FINISHED:
                self._epoch()
        finally:
            if self.config.compile:
                restore_networks(self.model)
            for sink in self.sinks:
                sink.close()
        return self.history

    def evaluate(self, batches: EpochBatches) -> SplitFigures:
        """Average the model's figures over a split, always with the same noise.

        Args:
            batches: of the split, in order.

        Returns:
            The averages.
        """
        model = self._evaluated_model()
        objective = Elbo(model).eval()
        generator = torch.Generator(self.fabric.device).manual_seed(self.config.seed + 1)
        means = RunningMeans(self.fabric.device)
        floor_share = torch.zeros((), dtype=torch.float64, device=self.fabric.device)
        unit_sums = torch.zeros(2, model.latent_dim, dtype=torch.float64, device=self.fabric.device)
        with torch.no_grad():
            for batch, raw in enumerate(self._steps(batches.epoch(0))):
                terms = objective(
                    self._to_model_units(raw), self._shared(generator, batches, batch)
                )
                means.add(terms, self.position.step)
                floor_share += model.noise.floor_share(terms.log_var) * len(raw)
                posterior_mean = terms.posterior.mean.double()
                unit_sums += torch.stack([posterior_mean.sum(0), posterior_mean.square().sum(0)])
        objective.train()
        figures = means.read(math.prod(model.shape), self.schedule.stage, self.all_reduce)
        n = int(figures["n"])
        unit_sum, unit_squares = self.all_reduce(unit_sums)
        return SplitFigures(
            n=n,
            elbo=figures["elbo"],
            log_likelihood=figures["log_likelihood"],
            kl=figures["kl"],
            mse=figures["mse"],
            noise_var=figures["noise_var"],
            floor_share=float(self.all_reduce(floor_share)) / n,
            unit_var=((unit_squares - unit_sum.square() / n) / (n - 1)).float().cpu(),
        )

    def _batches(
        self, examples: ExampleSet, batch_size: int, seed: int | None = None
    ) -> EpochBatches:
        """This process's part of batches that have ``batch_size`` examples over all processes."""
        rank, size = self.processes.rank, self.processes.size
        return batches_of(
            examples,
            math.ceil(batch_size / size),
            self.fabric.device,
            seed=seed,
            rank=rank,
            world_size=size,
        )

    def _steps(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Batches, of which each begins a step for compiled networks."""
        for raw in batches:
            if self.config.compile:
                begin_step()
            yield raw

    def _shared(
        self, generator: torch.Generator, batches: EpochBatches, batch: int
    ) -> SharedGenerator:
        """The source of a batch's draws, which do not depend on the number of processes."""
        return SharedGenerator(
            generator, batches.size(batch), self.processes.rank, self.processes.size
        )

    def _agree(self, *wishes: bool) -> list[bool]:
        """What any process wishes, so that all do the same."""
        if self.fabric.world_size == 1:
            return list(wishes)
        return (
            self.all_reduce(
                torch.tensor(wishes, dtype=torch.int32, device=self.fabric.device), "max"
            )
            .bool()
            .tolist()
        )

    def _look_at_data(self) -> None:
        """Note the data's variance, and compare their range with what the decoder can reach."""
        sample = self.model.scaling(examples(self.data.train, 2000, self.fabric.device))
        self.data_var = float(sample.var(0).mean())
        warning = range_warning(self.model.decoder, float(sample.min()), float(sample.max()))
        if warning:
            self._message(f"Warning: {warning}")

    def _to_model_units(self, raw: Tensor) -> Tensor:
        x: Tensor = self.model.scaling(raw)
        return x.contiguous(memory_format=torch.channels_last) if self._is_channels_last else x

    @property
    def _is_channels_last(self) -> bool:
        """Faster for our convolutions; a user's own networks get the usual layout, which their views rely on."""
        return self.model.architecture in ("conv", "residual")

    def _place_model(self) -> None:
        self.model.to(self.fabric.device)
        if self._is_channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _enter_stage(self) -> None:
        """Make the objective, optimiser and learning-rate schedule of the stage."""
        config, stage = self.config, self.schedule.stage
        objective = make_objective(self.model, config, stage)
        peak = (
            config.learning_rate if stage is Stage.SHARED_VARIANCE else config.stage_2_learning_rate
        )
        groups = parameter_groups(self.model, peak, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), fused=True)
        total = self.schedule.epochs[stage] * self.steps_per_epoch
        warm_up = max(1, round(config.warm_up * total))
        self.scheduler = SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up),
                CosineAnnealingLR(optimizer, T_max=max(1, total - warm_up)),
            ],
            milestones=[warm_up],
        )
        self._place_model()
        if config.compile:
            compile_networks(self.model, self.fabric.device, self.fabric.world_size)
        self.objective = self.optimizer = (
            None  # hooks of the stage before, which synchronise gradients, go with them
        )
        gc.collect()
        self.objective, self.optimizer = self.fabric.setup(objective, optimizer)
        self.clipping = RelativeClipping(config.clip).to(self.fabric.device)
        self.average = None
        if config.ema_decay:
            decayed = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.model, multi_avg_fn=decayed)

    def _epoch(self) -> None:
        """Train for an epoch, validate, let the schedule decide, and write it all down."""
        stage = self.schedule.stage
        self._train_epoch()
        train = self._read_and_show()
        n, seconds = train.pop("n"), self.means.seconds
        figures = self.evaluate(self.validation_batches)
        decision = self.schedule.observe(figures.noise_var, figures.elbo)
        row: Row = {
            "epoch": self.position.epoch,
            "stage": int(stage),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "examples_per_second": round(n / seconds, 1),
            **{f"train_{name}": value for name, value in train.items()},
            **{f"validation_{name}": getattr(figures, name) for name in _LOGGED},
            "validation_noise_std": math.sqrt(figures.noise_var),
            "validation_floor_share": figures.floor_share,
            "active_units": figures.active_units,
            "decision": decision.reason,
        }
        said: list[str] = []
        if decision.switched:
            at_end, said = self._end_stage(stage, decision, figures)
            row |= at_end
            if self.schedule.stage is Stage.PREDICTED_VARIANCE:
                self._hand_over()
        self.history.append(row)
        for sink in self.sinks:
            sink.epoch(row)
        for text in said:
            self._message(text)
        self._save()

    def _train_epoch(self) -> None:
        """Train on the batches of the epoch that are left."""
        model, batches, processes = self.model, self.train_batches, self.fabric.world_size
        if self.position.batch == 0:
            self.means = RunningMeans(self.fabric.device)
        parameters = list(self.objective.parameters())
        shown = saved = time.monotonic()
        for raw in self._steps(batches.epoch(self.position.epoch, self.position.batch)):
            epoch, step, stage_step, batch = self.position
            self.optimizer.zero_grad()
            terms: Terms = self.objective(
                self._to_model_units(raw), self._shared(self.generator, batches, batch)
            )
            # The engine averages over processes: this is the mean over the whole batch, whatever the parts.
            self.fabric.backward(terms.loss.sum() / (batches.size(batch) / processes))
            if self.config.clip:
                self.clipping.clip(parameters)
            self.optimizer.step()
            self.scheduler.step()
            # Before the closed form moves on: the terms refer to the variance they were computed with.
            self.means.add(terms, step)
            model.noise.update(terms.residual, self.sum_over_processes)
            if self.average:
                self.average.update_parameters(model)
            self.position = Position(epoch, step + 1, stage_step + 1, batch + 1)
            if processes > 1 and (batch + 1) % AGREEMENT_STEPS:
                continue
            now = time.monotonic()
            is_save_due, is_show_due = self._agree(
                self.sigterm.received or 0 < self.config.checkpoint_seconds < now - saved,
                now - shown > DISPLAY_SECONDS,
            )
            if is_save_due or is_show_due:
                self._read_and_show()  # and refuse to save what comes of a loss that is not finite
                shown = now
            if is_save_due:
                self._save()
                saved = now
        self.position = self.position._replace(epoch=self.position.epoch + 1, batch=0)

    def _end_stage(
        self, ended: Stage, decision: Decision, figures: SplitFigures
    ) -> tuple[dict[str, float], list[str]]:
        """Average weights, find the exact closed form or recalibrate; return test figures and what to tell."""
        said = [decision.reason[0].upper() + decision.reason[1:] + "."]
        if self.average:
            self.model.load_state_dict(self._evaluated_model().state_dict())
            self.average = None
        at_end: dict[str, float] = {}
        if ended is Stage.SHARED_VARIANCE:
            self.optimal_var = self._exact_optimal_var()
            self.model.noise.set_var(self.optimal_var)
            at_end["optimal_noise_var"] = var = float(self.optimal_var.mean())
            said.append(
                f"Optimal noise variance, eq. (10): {var:.4g} (std {math.sqrt(var):.4g}), an exact pass over "
                f"{len(self.data.train):,} examples."
            )
        else:
            said += self._recalibrate()
        test = self.evaluate(self.test_batches)
        on_floor = (
            f", {test.floor_share:.0%} of the variances on their floor" if test.floor_share else ""
        )
        said.append(
            f"Test set, {test.n:,} examples: ELBO {test.elbo:.1f} nats, KL {test.kl:.1f}, MSE {test.mse:.5f}{on_floor}."
        )
        is_floor_expected = ended is Stage.PREDICTED_VARIANCE
        said += [
            f"Warning: {warning}"
            for warning in warnings_for(figures, self.data_var, is_floor_expected)
        ]
        return at_end | {f"test_{name}": getattr(test, name) for name in _LOGGED}, said

    def _hand_over(self) -> None:
        """Algorithm 1's step from stage 1 to stage 2: a predicted variance, bounded below by the optimal one."""
        reference = cast(Tensor, self.optimal_var).clamp_min(self.model.noise.floor_var.double())
        self.model.predict_variance(
            reference,
            floor_var(self.config.floor, reference, self.model.scaling.quantum),
            calibration_shape=self.model.shape if self.config.recalibrate == "dimension" else (),
        )
        self.position = self.position._replace(stage_step=0)
        self._enter_stage()

    def _exact_optimal_var(self) -> Tensor:
        """Eq. (10) in one pass over the training set, with the networks standing still."""
        generator = torch.Generator(self.fabric.device).manual_seed(self.config.seed + 2)
        statistic = ResidualVariance(self.model.noise.statistic_shape).to(self.fabric.device)
        for terms in self._terms(self.train_batches, generator):
            statistic.update(terms.residual)
        statistic.all_reduce(self.all_reduce)
        return statistic.var

    def _recalibrate(self) -> list[str]:
        """Fit what the options ask for, and the intervals in any case, to held-out data."""
        noise = cast(PredictedNoise, self.model.noise)
        held_out, said = f"{len(self.data.validation):,} held-out examples", []
        if self.config.recalibrate in ("scale", "dimension"):
            generator = torch.Generator(self.fabric.device).manual_seed(self.config.seed + 3)
            statistic = ResidualVariance(tuple(noise.calibration.shape)).to(self.fabric.device)
            for terms in self._terms(self.validation_batches, generator):
                statistic.update(terms.residual * torch.exp(-0.5 * terms.log_var))
            statistic.all_reduce(self.all_reduce)
            noise.recalibrate(statistic)
        varying = varying_dimensions(
            examples(self.data.train, VARYING_EXAMPLES, self.fabric.device)
        )
        if varying.any():
            noise.calibrate_intervals(
                self._standardised(varying), rescale=self.config.recalibrate == "coverage"
            )
            factors = ", ".join(f"{noise.interval_factor(k):.2f}" for k in (1.0, 2.0, 3.0))
            said.append(
                f"Within {factors} predicted std lie .683, .954 and .997 of the errors of {held_out}."
            )
        if self.config.recalibrate != "none":
            scale = float((0.5 * noise.calibration).exp().mean())
            said.insert(0, f"Recalibrated the predicted std on {held_out}: x {scale:.3f}.")
        return said

    @torch.no_grad()
    def _standardised(self, varying: Tensor) -> ResidualQuantiles:
        """Residuals of the reconstructions, beside which std and intervals are shown, and not of samples of z."""
        statistic = ResidualQuantiles().to(self.fabric.device)
        self.model.eval()
        for raw in self._steps(self.validation_batches.epoch(0)):
            x = self._to_model_units(raw)
            seen = self.model.reconstruct(x)
            statistic.update(((x - seen.mean) / seen.std)[:, varying])
        statistic.all_reduce(self.all_reduce)
        self.model.train()
        return statistic

    @torch.no_grad()
    def _terms(self, batches: EpochBatches, generator: torch.Generator) -> Iterator[Terms]:
        objective = Elbo(self.model).eval()
        for batch, raw in enumerate(self._steps(batches.epoch(0))):
            yield objective(self._to_model_units(raw), self._shared(generator, batches, batch))
        objective.train()

    def _evaluated_model(self) -> VAE:
        return cast(VAE, self.average.module) if self.average else self.model

    def _total_steps(self) -> int:
        """Steps of the whole run if no stage ends early; shrinks when one has."""
        ahead = [
            epochs for stage, epochs in self.schedule.epochs.items() if stage > self.schedule.stage
        ]
        here = (
            self.schedule.epochs.get(self.schedule.stage, 0) * self.steps_per_epoch
            - self.position.stage_step
        )
        return self.position.step + here + sum(ahead) * self.steps_per_epoch

    def _read_and_show(self) -> dict[str, float]:
        stage = self.schedule.stage
        figures = self.means.read(math.prod(self.model.shape), stage, self.all_reduce)
        in_stage = max(1, math.ceil(self.position.stage_step / self.steps_per_epoch))
        label = f"stage {stage:d} epoch {in_stage}/{self.schedule.epochs[stage]}"
        for sink in self.sinks:
            sink.step(self.position.step, self._total_steps(), label, figures)
        return figures

    def _message(self, text: str) -> None:
        for sink in self.sinks:
            sink.message(text)

    def _save(self) -> None:
        """Write a checkpoint, and stop there if SIGTERM has come."""
        if self.folder is None:
            return
        finished = self.schedule.stage is Stage.FINISHED
        state = {
            "position": list(self.position),
            "means": self._of_each(self.means.pack()),
            "schedule": self.schedule.state_dict(),
            "history": self.history,
            "optimal_var": self.optimal_var,
            "noise": self.model.noise.description(),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average and not finished else None,
            "optimizer": None if finished else self.optimizer.state_dict(),
            "scheduler": None if finished else self.scheduler.state_dict(),
            "clipping": None if finished else self.clipping.state_dict(),
            "generator": self.generator.get_state(),
            # The global ones serve a user's own networks, such as dropout.
            "global_generators": self._of_each(torch.get_rng_state()),
            "cuda_generators": (
                self._of_each(torch.cuda.get_rng_state())
                if self.fabric.device.type == "cuda"
                else None
            ),
            "config": self.config.as_dict(),
            "fingerprint": self.data.fingerprint,
        }
        path = in_main_process(
            self.fabric, partial(save_checkpoint, self.folder, self.position.step, state)
        )
        (is_stopped,) = self._agree(self.sigterm.received)
        if is_stopped:
            message = (
                f"stopped by SIGTERM after step {self.position.step}, with the checkpoint {path}"
            )
            raise Preempted(message) if self.fabric.is_global_zero else Preempted(message, code=0)

    def _restore(self) -> bool:
        """Stand where the newest whole checkpoint was taken, if there is one."""
        if self.folder is None:
            raise StoreError("There is no folder to resume from.")
        checkpoint = in_main_process(self.fabric, partial(load_checkpoint, self.folder))
        if checkpoint is None:
            self._message("The run was stopped before its first checkpoint: starting anew.")
            return False
        path, state, refused = checkpoint
        for reason in refused:
            self._message(f"Passed over a damaged checkpoint: {reason}")
        if state["fingerprint"] != self.data.fingerprint:
            raise StoreError(
                f"{path} was trained on other data (fingerprint {state['fingerprint'][:12]}...); give the same."
            )
        was = TrainConfig().as_dict() | state["config"]  # which an older version may have written
        changed = [
            name
            for name, value in self.config.as_dict().items()
            if was[name] != value and name not in PLACEMENT
        ]
        if changed:
            raise StoreError(
                f"{path} was trained with other values of {', '.join(changed)}; resume with the same."
            )
        self.position = Position(*state["position"])
        if self.position.batch:
            self._restore_means(state["means"])
        self.schedule.load_state_dict(state["schedule"])
        self.history = state["history"]
        self.optimal_var = state["optimal_var"]
        self.model.noise = build_noise(state["noise"], self.model)
        self.model.load_state_dict(state["model"])
        self._place_model()  # in the layout, too: convolutions round by it, and the mixture is still to be fitted
        self.generator.set_state(state["generator"])
        if self.schedule.stage is not Stage.FINISHED:
            self._enter_stage()
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.clipping.load_state_dict(state["clipping"])
            if self.average:
                self.average.load_state_dict(state["average"])
        self._restore_generators(state)
        within = (
            f" and {self.position.batch} of {len(self.train_batches)} batches"
            if self.position.batch
            else ""
        )
        self._message(f"Resumed {path.name}, after {self.position.epoch} epochs{within}.")
        return True

    def _of_each(self, values: Tensor) -> Tensor:
        """A tensor of every process, as rows."""
        return self.processes.gather(values[None])

    def _restore_means(self, packed: Tensor) -> None:
        """Take back this process's sums, or, where the processes are as many no longer, leave all to the first."""
        rank = self.fabric.global_rank
        if len(packed) == self.fabric.world_size:
            self.means.unpack(packed[rank : rank + 1])
        elif rank == 0:
            self.means.unpack(packed)

    def _restore_generators(self, state: dict[str, Any]) -> None:
        """Take back this process's global generators; processes that are new keep those of their start."""
        rank, states = self.fabric.global_rank, state["global_generators"]
        if len(states) != self.fabric.world_size:
            self._message(
                f"The checkpoint was written by {len(states)} processes, now there are {self.fabric.world_size}: the "
                "same batches and draws, summed in another order."
            )
        if rank < len(states):
            torch.set_rng_state(
                states[rank].clone()
            )  # torch reads from the start of the storage, row or not
            if state["cuda_generators"] is not None and self.fabric.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_generators"][rank].clone())


_LOGGED = ("elbo", "log_likelihood", "kl", "mse", "noise_var")


def examples(part: ExampleSet, n: int, device: torch.device) -> Tensor:
    r"""Take a few examples, evenly spread over an array, or over the first ones of a stream.

    Args:
        part: one split of the data.
        n: how many, or all if there are fewer.
        device: where to put them.

    Returns:
        Raw data, (n, \*).
    """
    array = part.at_hand
    index = np.linspace(0, len(array) - 1, min(n, len(array))).astype(np.int64)
    return torch.from_numpy(array[index]).to(device)


def make_objective(model: VAE, config: TrainConfig, stage: Stage) -> Objective:
    """Choose what a stage descends.

    Args:
        model: what is trained; the objective is all that methods differ in.
        config: options ``objective``, ``beta``, ``penalty`` and ``stage_2_gradients``.
        stage: of Algorithm 1; objectives other than the bound have the first only.

    Returns:
        The objective.
    """
    if config.objective in ("elbo", "vae", "beta-vae"):
        detached = stage is Stage.PREDICTED_VARIANCE and config.stage_2_gradients == "stop"
        return (DetachedVarianceElbo if detached else Elbo)(model, config.beta)
    if config.objective == "sigma-vae":
        return BatchVarianceElbo(model)
    penalised: dict[str, Callable[..., Objective]] = {
        "dip-vae-i": DipVaeI,
        "dip-vae-ii": DipVaeII,
        "wae-mmd": WaeMmd,
        "rae-l2": RaeL2,
    }
    return penalised[config.objective](model, *([] if config.penalty is None else [config.penalty]))


def parameter_groups(model: VAE, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the parameters by how the optimiser treats them.

    Args:
        model: the model.
        learning_rate: of the networks.
        weight_decay: of the networks' weights; biases and variances are not pulled towards zero.

    Returns:
        Groups for a torch optimiser. A variance learned by gradient has ten times the rate of the networks: its
        logarithm has a long way to go, and follows residuals that shrink all the while.
    """
    noise = model.noise
    variances = (
        [noise.log_var]
        if isinstance(noise, GlobalNoise | DimensionNoise) and noise.log_var.requires_grad
        else []
    )
    known = {id(parameter) for parameter in variances}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {
            "params": [p for p in others if p.ndim >= 2],
            "lr": learning_rate,
            "weight_decay": weight_decay,
        },
        {"params": [p for p in others if p.ndim < 2], "lr": learning_rate, "weight_decay": 0.0},
        {"params": variances, "lr": 10 * learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
