"""The loop: the only one, and without a formula. It obeys the stage schedule and keeps checkpoints.

An optimiser step is: forward through the objective, backward, step, closed form. Nothing in it
waits for the device: running sums stay there, and are read about once a second for the display, and
when an epoch ends.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor

from equipoise.config import CONTINUED, EARLIER_VALUES, PLACEMENT, ConfigError, TrainConfig
from equipoise.correlated_noise import CorrelatedNoise, marginal_of
from equipoise.data import Data, ExampleSet
from equipoise.data.batches import examples
from equipoise.data.varying import counted_columns, varying_mask
from equipoise.estimate import Estimate
from equipoise.files import StoreError
from equipoise.gaps import column_vars, observed_values
from equipoise.gaussian import random_like
from equipoise.labels import labels_of, withhold
from equipoise.model import VAE
from equipoise.noise import build_noise, describe_noise
from equipoise.randomness import stream
from equipoise.records import check_record
from equipoise.residuals import overfitting_ratio
from equipoise.run import Row
from equipoise.stages import Decision, Stage, StageSchedule, floor_var
from equipoise.training.best import BestWeights, paired_gain
from equipoise.training.checkpoint import (
    CheckpointState,
    digest_of,
    load_checkpoint,
    save_checkpoint,
)
from equipoise.training.compilation import compile_networks, restore_networks
from equipoise.training.continuation import Continuation, plan_continuation
from equipoise.training.descent import Descent
from equipoise.training.diagnostics import range_warning, warnings_for
from equipoise.training.engine import (
    all_reduce,
    broadcast,
    in_main_process,
    make_fabric,
    processes_of,
)
from equipoise.training.figures import (
    RunningMeans,
    SplitFigures,
    batch_sums,
    of_raw_data,
    split_figures,
)
from equipoise.training.logging import Sink
from equipoise.training.passes import EVALUATION_BATCH, SplitPass
from equipoise.training.preemption import Preempted, Sigterm
from equipoise.training.setup import choose_stage_two
from equipoise.training.stage_ends import (
    HeldOutVar,
    digital_log_probabilities,
    exact_optimal_var,
    held_out_var,
    recalibrate,
    statistic_residual,
    worth_of_prediction,
)
from equipoise.training.step_graph import StepGraph
from equipoise.training.threads import choose_threads, computing_with

DISPLAY_SECONDS = 1.0
AGREEMENT_STEPS = 10
"""Steps after which processes ask each other whether one must stop, or a checkpoint is due."""
NEGLIGIBLE_SHRINKAGE = 0.05
"""Relative change of the overfitting ratio, by its error, that goes without saying."""
RANGE_EXAMPLES = 2000
"""Examples whose variance and range stand for those of the data."""


class Position(NamedTuple):
    """How far a run is.

    Args:
        epoch: Epochs done since the start.
        step: Optimiser steps done since the start.
        stage_step: Optimiser steps done in this stage.
        batch: Batches done in the current epoch.
    """

    epoch: int = 0
    step: int = 0
    stage_step: int = 0
    batch: int = 0

    def next_step(self) -> "Position":
        """Return the position after one more step."""
        return Position(self.epoch, self.step + 1, self.stage_step + 1, self.batch + 1)


class Trainer:
    """Train a model by Algorithm 1.

    Args:
        model: The model, which is changed in place.
        data: Data to train on.
        config: Options.
        folder: Where checkpoints go. None keeps none.
        sinks: What takes in the figures.
        fabric: The engine, launched. None makes it from the configuration.
        on_save: Called by the first process after each checkpoint.

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
        on_save: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.config = config
        self.folder = folder
        self.sinks = sinks
        self.fabric = fabric or make_fabric(config)
        self.on_save = on_save
        self.processes = processes_of(self.fabric)
        self.all_reduce = partial(all_reduce, self.fabric)

        # The number of processes may be torchrun's choice, and not the configuration's.
        problems = config.problems_of_sharing(self.processes.size)
        if problems:
            raise ConfigError(problems)

        # Trained with, it would take from the networks what it explains.
        self.leaves_out = isinstance(model.noise, CorrelatedNoise)
        model.noise = marginal_of(model.noise)
        model.counted = counted_columns(data.train, data.levels)
        model.to(self.fabric.device)
        n = len(data.train)
        batch_size = min(config.step_size(n, self.processes.size), n)
        self.training = self._pass(data.train, batch_size, seed=config.seed)
        self.validation = self._pass(data.validation, EVALUATION_BATCH)
        self.test = self._pass(data.test, EVALUATION_BATCH)

        # Told to all, because the engine has set OMP_NUM_THREADS for the processes it started.
        share = math.ceil(batch_size / self.processes.size)
        self.threads, self.about_threads = broadcast(
            self.fabric, choose_threads(model, config, share)
        )

        self.stage_two = choose_stage_two(model, config)
        self.schedule = StageSchedule(
            config.stage_1_epochs,
            config.stage_2_epochs if model.has_numbers else 0,
            config.tolerance,
            config.patience,
            config.early_stopping,
        )
        self.position = Position()
        self.history: list[Row] = []
        self.data_var = math.nan
        self.optimal_var: Tensor | None = None
        self.overfitting = 1.0
        self.ratio = torch.ones((), dtype=torch.float64, device=self.fabric.device)
        self.stage_1_noise: dict[str, Any] | None = None
        if not model.noise.depends_on_code:
            self.stage_1_noise = describe_noise(model.noise)
        self.descent: Descent | None = None
        self.graph: StepGraph | None = None
        self.best = BestWeights()
        self.generator = self._stream("training")
        self.means = RunningMeans()
        self.sigterm = Sigterm()
        self.continuation: Continuation | None = None

    def fit(self, *, resume: bool = False) -> list[Row]:
        """Train until the schedule has finished.

        With a folder, and in the main thread, SIGTERM stops it after the current step, with a
        checkpoint.

        Args:
            resume: Go on from the newest whole checkpoint in the folder, or from the start if there
                is none yet. A run that has finished goes on for more epochs if the configuration
                has more of them, see :mod:`equipoise.training.continuation`.

        Returns:
            One row per epoch, including those before a resume.

        Raises:
            StoreError: if all checkpoints are damaged, or were made with other data or options.
            Preempted: on SIGTERM.
        """
        before = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = before or self.config.deterministic
        try:
            with self.sigterm if self.folder else nullcontext(), computing_with(self.threads):
                return self._fit(resume)
        finally:
            torch.backends.cudnn.deterministic = before

    def figures(self, split: SplitPass) -> SplitFigures:
        """Average the model's figures over a split, always with the same noise.

        Args:
            split: One of :attr:`training`, :attr:`validation` and :attr:`test`.

        Returns:
            The averages.
        """
        model = self.model if self.descent is None else self.descent.evaluated_model
        return split_figures(
            model,
            split,
            self._stream("figures"),
            step=self.position.step,
            stage=self.schedule.stage,
            all_reduce=self.all_reduce,
        )

    def recalibrate(self) -> list[str]:
        """Fit the predicted std, as the options ask for, and the intervals to the validation set.

        Returns:
            Sentences that say what was done.
        """
        varying = varying_mask(self.data.train).to(self.fabric.device)
        if self.model.categories is not None:
            varying &= self.model.categories.is_numeric
        return recalibrate(
            self.model,
            self.validation,
            varying,
            self.stage_two.recalibrate,
            self._stream("recalibration"),
            self.all_reduce,
        )

    def _fit(self, resume: bool) -> list[Row]:
        self._look_at_data()
        if self.leaves_out:
            self._message("Training leaves out the model's correlation; fit it anew afterwards.")
        is_restored = resume and self._restore()
        if self.continuation:
            is_predicted = self.model.noise.depends_on_code
            self._message(self.continuation.describe(is_predicted=is_predicted))
        if self.about_threads:
            self._message(self.about_threads)

        try:
            if self.continuation:
                self._continue(self.continuation)
            for sink in self.sinks:
                sink.start(self._total_steps(), self.position.step, self.history)

            if not is_restored:
                if self.schedule.stage is Stage.PREDICTED_VARIANCE:
                    self._find_optimal_var()
                    self._predict_variance()
                self._enter_stage()

            while self.schedule.stage is not Stage.FINISHED:
                self._epoch()
        finally:
            if self.config.compile:
                restore_networks(self.model)
            if self.descent is not None:
                self.descent.release()
            self.graph = None
            self.model.noise.overfitting = self.overfitting
            for sink in self.sinks:
                sink.close()

        return self.history

    def _pass(self, part: ExampleSet, batch_size: int, seed: int | None = None) -> SplitPass:
        return SplitPass(
            self.model,
            part,
            batch_size,
            self.processes,
            seed=seed,
        )

    def _stream(self, part: str) -> torch.Generator:
        return stream(self.config.seed, part, device=self.fabric.device)

    def _look_at_data(self) -> None:
        """Note the data's variance, and compare their range with what the decoder can reach."""
        sample = examples(self.data.train, RANGE_EXAMPLES, self.fabric.device)
        sample = self.model.scaling(sample)
        counted = self.model.pooled(sample)
        if self.model.has_numbers:
            self.data_var = float(column_vars(counted).nanmean())
        n_numeric = sample[0].numel() - len(self.data.levels)
        self.counted_share = counted[0].numel() / n_numeric if n_numeric else 1.0

        observed = observed_values(sample)
        warning = range_warning(self.model.decoder, float(observed.min()), float(observed.max()))
        if warning:
            self._message(f"Warning: {warning}")

    def _enter_stage(self) -> None:
        """Make what the stage descends with."""
        self.model.place(self.fabric.device)
        if self.config.compile:
            compile_networks(self.model)

        # Hooks of the stage before, which synchronise gradients, go with its objective. Reference
        # cycles hold them; one process has none, and is spared a search through all of its objects.
        self.descent = None
        if self.processes.size > 1:
            gc.collect()

        stage = self.schedule.stage
        n_steps = self.schedule.epochs[stage] * len(self.training)
        self.descent = Descent(self.model, self.config, stage, n_steps, self.fabric)
        self.graph = None
        if self._replays_steps():
            batch_size = self.training.size(0)
            self.graph = StepGraph(self._step, batch_size, self.generator, self._message)
        if not self._is_judged_by_elbo():
            self.schedule.early_stopping = 0

    def _continue(self, continuation: Continuation) -> None:
        """Begin a stage once more, from the weights that the run has ended with."""
        self.schedule.restart(continuation.stage, continuation.epochs)
        self.position = self.position._replace(stage_step=0)
        if continuation.stage is Stage.SHARED_VARIANCE:
            self._share_variance(self.optimal_var)
        elif self.model.noise.depends_on_code:
            self.model.noise.forget_calibration()
        else:
            self._predict_variance()
        self._enter_stage()

    def _epoch(self) -> None:
        """Train for an epoch, validate, let the schedule decide, and write it all down."""
        stage = self.schedule.stage
        learning_rate = self._train_epoch()
        train = self._read_and_show()
        n, seconds = train.pop("n"), self.means.seconds

        validation = self.figures(self.validation)
        self._look_at_overfitting(validation)
        self._look_at_weights(validation)
        decision = self.schedule.observe(validation.noise_var, validation.elbo)
        row: Row = {
            "epoch": self.position.epoch,
            "stage": int(stage),
            "learning_rate": learning_rate,
            "seconds": round(seconds, 3),
            "examples_per_second": round(n / seconds, 1),
            **{f"train_{name}": value for name, value in train.items()},
            **validation.row("validation", self._log_slope(self.validation)),
            "validation_noise_std": math.sqrt(validation.noise_var),
            "validation_floor_share": validation.floor_share,
            "active_units": validation.active_units,
            "decision": decision.reason,
        }

        if self.config.variance_from == "held-out":
            row["overfitting"] = self.overfitting

        messages: list[str] = []
        if decision.switched:
            row_of_stage, messages = self._end_stage(stage, decision, validation)
            row |= row_of_stage
            if self.schedule.stage is Stage.PREDICTED_VARIANCE:
                self._predict_variance()
                self._enter_stage()

        self.history.append(row)
        for sink in self.sinks:
            sink.epoch(row)
        for text in messages:
            self._message(text)
        self._save()

    def _train_epoch(self) -> float:
        """Train on the batches of the epoch that are left; return the learning rate at its end."""
        descent = self._entered()
        is_shared = self.processes.size > 1
        step = self.graph or self._step

        if self.position.batch == 0:
            self.means = RunningMeans()
        shown = saved = time.monotonic()

        for x in self.training.epoch(self.position.epoch, self.position.batch):
            self.means.add(step(x), len(x), self.position.step)
            descent.advance()
            self.position = self.position.next_step()

            if is_shared and self.position.batch % AGREEMENT_STEPS:
                continue
            now = time.monotonic()
            is_due = 0 < self.config.checkpoint_seconds < now - saved
            is_save_due, is_show_due = self._agree(
                self.sigterm.received or is_due, now - shown > DISPLAY_SECONDS
            )

            if is_save_due or is_show_due:
                # Also before a checkpoint, which is refused to a loss that is not finite.
                self._read_and_show()
                shown = now
            if is_save_due:
                self._save()
                saved = now

        self.position = self.position._replace(epoch=self.position.epoch + 1, batch=0)
        return descent.learning_rate

    def _step(self, x: Tensor) -> Tensor:
        """Take a step on a batch, with all that the device does in it; return the batch's sums."""
        batch = self.position.batch
        draws = self.training.draws(self.generator, batch)
        if labels_of(x) is not None:
            uniform = x.new_empty(len(x), dtype=torch.float32)
            uniform = random_like(uniform, lambda u, source: u.uniform_(generator=source), draws)
            x = withhold(x, uniform < self.config.label_dropout)
        terms = self._entered().step(x, draws, self.training.size(batch))

        # Before the closed form moves on, because the terms refer to the variance before it.
        sums = batch_sums(terms)
        noise = self.model.noise
        residual = statistic_residual(self.model, terms.residual, noise.statistic_shape)
        noise.update(residual, self.all_reduce if self.processes.size > 1 else None)
        return sums

    def _entered(self) -> Descent:
        """Return what the stage descends with."""
        if self.descent is None:
            raise RuntimeError("A stage must be entered before it is trained.")
        return self.descent

    def _replays_steps(self) -> bool:
        """Tell whether a step can be recorded as a CUDA graph.

        Networks and noise models of the user's own may do something in Python at each step, which a
        graph would leave out without a word, so that they are recorded only when asked for.
        """
        if self.fabric.device.type != "cuda" or self.processes.size > 1:
            return False
        if self.model.label_names:
            return False  # a recorded step reads one tensor, and not the labels that it carries
        if self.config.cuda_graphs is not None:
            return self.config.cuda_graphs
        is_own_noise = not type(self.model.noise).__module__.startswith("equipoise.")
        return self.model.architecture is not None and not is_own_noise

    def _end_stage(
        self, ended: Stage, decision: Decision, validation: SplitFigures
    ) -> tuple[Row, list[str]]:
        """Put the weights to keep in place, end the stage by its formula, look at the test set.

        Returns figures for the epoch's row, and what a person should read.
        """
        messages = [decision.reason[0].upper() + decision.reason[1:] + "."]
        if self.descent is not None:
            self.descent.take_average()

        figures: Row = {"kept_epoch": self.position.epoch}
        if 0 < self.best.epoch < self.position.epoch:
            messages += self._put_back_best(figures)
            validation = self.figures(self.validation)
        self.best = BestWeights()

        if ended is Stage.SHARED_VARIANCE:
            more_figures, text = self._find_optimal_var()
            figures |= more_figures
            messages.append(text)
        else:
            calibration = self.recalibrate()
            refusal = self._refuse_worse_prediction()
            # Of a prediction that is refused, no calibration is left.
            messages += calibration + refusal if self.model.noise.depends_on_code else refusal

        test = self.figures(self.test)
        slope = self._log_slope(self.test)
        messages.append(_describe_test(test._replace(elbo=test.elbo + slope)))
        is_floor_expected = ended is Stage.PREDICTED_VARIANCE
        warnings = warnings_for(
            validation,
            self.data_var,
            is_floor_expected,
            self.overfitting,
            self.counted_share,
            self.position.step,
        )
        for warning in warnings:
            messages.append(f"Warning: {warning}")
        return figures | test.row("test", slope), messages

    def _is_judged_by_elbo(self) -> bool:
        """Tell whether the ELBO, which is one of densities, is what the stage descends."""
        is_digital = self.stage_two.likelihood == "digital"
        return not (is_digital and self.schedule.stage is Stage.PREDICTED_VARIANCE)

    def _look_at_weights(self, validation: SplitFigures) -> None:
        """Remember the weights if they are the stage's best so far."""
        is_best_kept = self.config.keep_weights == "best" and self._is_judged_by_elbo()
        if is_best_kept and self.descent is not None:
            model = self.descent.evaluated_model
            self.best.observe(self.position.epoch, validation.elbo, model)

    def _put_back_best(self, figures: Row) -> list[str]:
        """Go back to the stage's best epoch if it is better than the last beyond the error.

        Its number goes into the figures. Returns what a person should read.
        """
        last = {name: value.clone() for name, value in self.model.state_dict().items()}
        elbo_of_last = self._validation_elbos()
        self.best.put_back(self.model)
        gain = paired_gain(elbo_of_last, self._validation_elbos(), self.all_reduce)

        # The last epoch had the lowest learning rate, and is not the best of many by chance.
        if gain.standard_error is None or gain.value <= gain.standard_error:
            self.model.load_state_dict(last)
            return []

        figures["kept_epoch"] = self.best.epoch
        return [
            f"Kept the weights of epoch {self.best.epoch}, because those of the last have a "
            f"validation ELBO that is {_with_error(gain)} nats lower."
        ]

    def _validation_elbos(self) -> Tensor:
        """Compute the ELBO of this process's validation examples, always with the same noise."""
        batches = self.validation.terms(self.model, self._stream("figures"))
        return torch.cat([terms.elbo for terms in batches])

    def _look_at_overfitting(self, validation: SplitFigures) -> None:
        """Note by how much held-out residuals exceed those of the training, for the next epoch."""
        if self.model.noise.is_closed_form and self.config.variance_from == "held-out":
            # The model's variance has been multiplied by the ratio of the epoch before.
            measured = validation.standardised_var.times(self.overfitting)
            self._set_overfitting(overfitting_ratio(measured))

    def _set_overfitting(self, ratio: float) -> None:
        self.overfitting = ratio
        # A step that is replayed reads it from this place.
        self.model.noise.overfitting = self.ratio.fill_(ratio)

    def _find_optimal_var(self) -> tuple[dict[str, float], str]:
        """Set the noise variance of stage 1 to its exact optimum, eq. (10).

        Returns figures for the epoch's row, and a sentence.
        """
        model, n_training = self.model, len(self.data.train)
        if not model.has_numbers:
            return {}, "The table has categories alone, which have no noise variance."
        generator = self._stream("optimal variance")
        var = exact_optimal_var(model, self.training, generator, self.all_reduce)
        figures = {"training_noise_var": float(var.mean())}
        source = f"an exact pass over {n_training:,} examples"

        if self.config.variance_from == "held-out":
            found = held_out_var(
                model,
                var,
                n_training,
                self.validation,
                self._stream("held-out variance"),
                self.all_reduce,
            )
            var = found.var
            self._set_overfitting(found.ratio)
            figures["overfitting"] = found.ratio
            source = _describe_held_out(found, n_training)

        model.noise.set_var(var)
        self.optimal_var = var
        mean = float(var.mean())
        figures["optimal_noise_var"] = mean
        std = math.sqrt(mean)
        return figures, f"Optimal noise variance, eq. (10): {mean:.4g} (std {std:.4g}), {source}."

    def _predict_variance(self) -> None:
        """Take Algorithm 1's step to stage 2: a predicted variance, bounded below."""
        if self.optimal_var is None:
            raise RuntimeError("Stage 2 starts from the optimal variance of stage 1.")
        reference = self.optimal_var.clamp_min(self.model.noise.floor_var.double())
        stage_two = self.stage_two
        floor = floor_var(stage_two.floor, reference, self.model.scaling.quantum)

        is_per_dimension = stage_two.recalibrate == "dimension"
        calibration_shape = self.model.shape if is_per_dimension else ()
        if self.config.stage_2_network == "head" and stage_two.network == "decoder":
            self._message(
                "The decoder is your own, and has no features that a head could read: the variance "
                "is predicted by a second decoder (stage_2_network=decoder)."
            )
        self.model.predict_variance(reference, floor, calibration_shape, stage_two.network)
        self.position = self.position._replace(stage_step=0)

    def _refuse_worse_prediction(self) -> list[str]:
        """Go back to the shared variance if the predicted one is worse on held-out examples.

        Returns what a person should read.
        """
        generator = self._stream("worth of prediction")
        if self.stage_two.likelihood == "digital":
            log_probs = digital_log_probabilities(self.model, self.validation, generator)
            gain, shared_var = paired_gain(*log_probs, self.all_reduce), self.optimal_var
        else:
            gain, shared_var = worth_of_prediction(
                self.model, self.validation, generator, self.all_reduce
            )
        if gain.standard_error is None or gain.value + gain.standard_error >= 0:
            return []

        loss = _with_error(gain.times(-1.0))
        if self.stage_1_noise is None or shared_var is None:
            return [
                f"Warning: the predicted variance loses {loss} nats per held-out example against "
                "one variance; train without stage 2."
            ]
        self._share_variance(shared_var)
        return [
            f"Warning: the predicted variance lost {loss} nats per held-out example against one "
            "variance, so that stage 2 is refused and the variance is shared again. There may be "
            "too few examples for a prediction."
        ]

    def _share_variance(self, var: Tensor | None) -> None:
        """Go back from a predicted variance to the noise model of stage 1."""
        if not self.model.noise.depends_on_code:
            return
        if self.stage_1_noise is None or var is None:
            raise RuntimeError("There is no noise model of stage 1 to go back to.")
        self.model.noise = build_noise(self.stage_1_noise, self.model.blank_variance_network)
        self.model.noise.to(self.fabric.device)
        self.model.noise.set_var(var)

    def _agree(self, *wishes: bool) -> list[bool]:
        """Combine what each process wishes, so that all of them do the same."""
        if self.processes.size == 1:
            return list(wishes)

        votes = torch.tensor(wishes, dtype=torch.int32, device=self.fabric.device)
        agreed: list[bool] = self.all_reduce(votes, "max").bool().tolist()
        return agreed

    def _total_steps(self) -> int:
        """Count the steps of the whole run if no stage ends early; fewer once one has."""
        stage, steps_per_epoch = self.schedule.stage, len(self.training)

        later_epochs = sum(
            epochs for other, epochs in self.schedule.epochs.items() if other > stage
        )
        epochs = self.schedule.epochs.get(stage, 0)
        left_in_stage = epochs * steps_per_epoch - self.position.stage_step
        return self.position.step + left_in_stage + later_epochs * steps_per_epoch

    def _read_and_show(self) -> dict[str, float]:
        stage = self.schedule.stage
        figures = self.means.read(math.prod(self.model.shape), stage, self.all_reduce)
        figures = of_raw_data(figures, self._log_slope(self.training))

        epoch = max(1, math.ceil(self.position.stage_step / len(self.training)))
        label = f"stage {stage:d} epoch {epoch}/{self.schedule.epochs[stage]}"
        for sink in self.sinks:
            sink.step(self.position.step, self._total_steps(), label, figures)
        return figures

    def _log_slope(self, split: SplitPass) -> float:
        """Mean log-slope of the power transform over a split, 0 without a transform."""
        return split.mean_log_slope(self.all_reduce)

    def _message(self, text: str) -> None:
        for sink in self.sinks:
            sink.message(text)

    def _save(self) -> None:
        """Write a checkpoint, and stop there if SIGTERM has come."""
        if self.folder is None:
            return

        path = in_main_process(
            self.fabric,
            partial(save_checkpoint, self.folder, self.position.step, self._state()),
        )
        if self.on_save is not None:
            in_main_process(self.fabric, self.on_save)

        (is_stopped,) = self._agree(self.sigterm.received)
        if is_stopped:
            message = f"stopped by SIGTERM after step {self.position.step}, "
            message += f"with the checkpoint {path}"
            if self.fabric.is_global_zero:
                raise Preempted(message)
            raise Preempted(message, code=0)

    def _state(self) -> dict[str, Any]:
        """Everything that a run needs to go on as if it had never stopped."""
        descent = None
        if self.descent is not None and self.schedule.stage is not Stage.FINISHED:
            descent = self.descent.state_dict()

        cuda_generators = None
        if self.fabric.device.type == "cuda":
            cuda_generators = self._gather(torch.cuda.get_rng_state())

        return {
            "position": list(self.position),
            "means": self._gather(self.means.pack()),
            "schedule": self.schedule.state_dict(),
            "history": self.history,
            "optimal_var": self.optimal_var,
            "noise": describe_noise(self.model.noise),
            "model": self.model.state_dict(),
            "descent": descent,
            "best": None if self.best.weights is None else self.best.state_dict(),
            "generator": self.generator.get_state(),
            # The global ones serve a user's own networks, such as those with dropout.
            "global_generators": self._gather(torch.get_rng_state()),
            "cuda_generators": cuda_generators,
            "threads": self.threads,
            "config": self.config.as_dict(),
            "fingerprint": self.data.fingerprint,
            "digest": self._digest(),
        }

    def _digest(self) -> str:
        """Digest of everything that the next step computes with, layouts included."""
        descent = self.descent
        if self.schedule.stage is Stage.FINISHED:
            descent = None
        best = {} if self.best.weights is None else {"best": self.best.state_dict()}

        return digest_of(
            {
                "model": self.model.state_dict(),
                "optimal_var": self.optimal_var,
                "descent": None if descent is None else descent.state_dict(),
                "layouts": None if descent is None else descent.layouts(),
                "generator": self.generator.get_state(),
            }
            | best
        )

    def _restore(self) -> bool:
        """Stand where the newest whole checkpoint was taken; False if there is none."""
        if self.folder is None:
            raise StoreError("There is no folder to resume from.")
        checkpoint = in_main_process(self.fabric, partial(load_checkpoint, self.folder))
        if checkpoint is None:
            self._message("The run was stopped before its first checkpoint: starting anew.")
            return False

        path, state, refused = checkpoint
        for reason in refused:
            self._message(f"Passed over a damaged checkpoint: {reason}")
        self._check_state(path, state)

        try:
            self._take_state(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise StoreError(f"{path} does not fit this training: {reason}") from error
        if self._digest() != state["digest"]:
            raise StoreError(
                f"{path} was read, but weights, optimiser or their memory layout are not as they "
                "were written, so the run would not go on exactly. Resume it with the versions in "
                "its config.json, and with networks that are built in the same way."
            )

        within = ""
        if self.position.batch:
            within = f" and {self.position.batch} of {len(self.training)} batches"
        self._message(f"Resumed {path.name}, after {self.position.epoch} epochs{within}.")
        return True

    def _take_state(self, state: dict[str, Any]) -> None:
        """Stand where a state was taken."""
        self._keep_threads(state)
        self.position = Position(*state["position"])
        self.schedule.load_state_dict(state["schedule"])
        self.history = state["history"]
        self.optimal_var = state["optimal_var"]
        if self.position.batch:
            self._restore_means(state["means"])

        noise = build_noise(state["noise"], self.model.blank_variance_network)
        self.model.noise = noise
        if self.history:
            self._set_overfitting(self.history[-1].get("overfitting", 1.0))
        self.model.load_state_dict(state["model"])
        # In the layout, too, by which convolutions round: the mixture is still to be fitted.
        self.model.place(self.fabric.device)

        self.generator.set_state(state["generator"])
        if self.schedule.stage is not Stage.FINISHED:
            self._enter_stage()
            if self.descent is not None:
                self.descent.load_state_dict(state["descent"])
            if state.get("best"):
                self.best.load_state_dict(state["best"])
        self._restore_generators(state)

    def _check_state(self, path: Path, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of other data or of other options."""
        check_record(state, CheckpointState, str(path))
        fingerprint = state["fingerprint"]
        if fingerprint != self.data.fingerprint:
            raise StoreError(
                f"{path} was trained on other data (fingerprint {fingerprint[:12]}...); "
                "give the same."
            )

        earlier = EARLIER_VALUES | state["config"]
        changed = [
            name
            for name, value in self.config.as_dict().items()
            if earlier.get(name) != value and name not in PLACEMENT
        ]
        is_finished = state["schedule"].get("stage") == Stage.FINISHED
        if changed and is_finished and set(changed) <= set(CONTINUED):
            self.continuation = plan_continuation(state["history"], earlier, self.config)
        elif changed:
            raise StoreError(
                f"{path} was trained with other values of {', '.join(changed)}; "
                "resume with the same."
            )

    def _gather(self, values: Tensor) -> Tensor:
        """Collect a tensor of every process, as rows."""
        return self.processes.gather(values[None])

    def _restore_means(self, packed: Tensor) -> None:
        """Take back this process's sums.

        Where the number of processes has changed, the first of them takes all.
        """
        rank = self.processes.rank
        if len(packed) == self.processes.size:
            self.means.unpack(packed[rank : rank + 1])
        elif rank == 0:
            self.means.unpack(packed)

    def _keep_threads(self, state: dict[str, Any]) -> None:
        """Compute with as many threads as before, on which the rounding of sums depends."""
        is_as_before = len(state["global_generators"]) == self.processes.size
        if self.config.threads is None and is_as_before and self.fabric.device.type == "cpu":
            # Runs of earlier versions had all threads.
            kept = state.get("threads", torch.get_num_threads())
            if kept != self.threads:
                self.about_threads = f"Threads: {kept}, as before."
            self.threads = kept
            torch.set_num_threads(kept)

    def _restore_generators(self, state: dict[str, Any]) -> None:
        """Take back this process's global generators; new processes keep those of their start."""
        rank, states = self.processes.rank, state["global_generators"]
        if len(states) != self.processes.size:
            self._message(
                f"The checkpoint was written by {len(states)} processes, now there are "
                f"{self.processes.size}: the same batches and draws, summed in another order."
            )
        if rank >= len(states):
            return

        # Cloned, because torch reads from the start of the storage, whatever the row.
        torch.set_rng_state(states[rank].clone())
        cuda_states = state["cuda_generators"]
        if cuda_states is not None and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(cuda_states[rank].clone())


def _with_error(estimate: Estimate) -> str:
    """Write an estimate with its standard error, if that is known."""
    if estimate.standard_error is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ± {estimate.standard_error:.2f}"


def _describe_held_out(found: HeldOutVar, n_training: int) -> str:
    """Say over which examples eq. (10) was taken, and by how much they differ from the others."""
    measured = found.measured
    text = (
        f"over {measured.n:,} held-out examples, whose squared error is {_with_error(measured)} "
        f"times that of the {n_training:,} of the training"
    )
    if abs(found.ratio - measured.value) > NEGLIGIBLE_SHRINKAGE * measured.value:
        reason = "is so uncertain that" if measured.value > 1 else "is less by chance, so that"
        text += f", which {reason} {found.ratio:.2f} is taken"
    if found.shrinkage:
        text += f"; {found.shrinkage:.1%} of each is the mean over the dimensions"
    return text


def _describe_test(test: SplitFigures) -> str:
    """Put the figures of the test set into a sentence."""
    floor = ""
    if test.floor_share:
        floor = f", {test.floor_share:.0%} of the variances on their floor"
    return (
        f"Test set, {test.n:,} examples: ELBO {test.elbo:.1f} nats, KL {test.kl:.1f}, "
        f"MSE {test.mse:.5f}{floor}."
    )
