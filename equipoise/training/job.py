"""The main job: data in, a run folder out."""

import datetime
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from equipoise.config import (
    CONTINUED,
    EARLIER_VALUES,
    MACHINE,
    PLACEMENT,
    ConfigError,
    TrainConfig,
)
from equipoise.data import Data
from equipoise.files import (
    StoreError,
    check_text,
    discard_if_empty,
    is_empty,
    remove,
    write_json,
)
from equipoise.held_out import keep_held_out
from equipoise.mixture_fit import EMStep, MixtureFit
from equipoise.model import VAE
from equipoise.noise import NoiseModel, describe_noise
from equipoise.noise_fit import (
    CorrelationFit,
    choose_form,
    fit_correlation,
    without_each_fold,
)
from equipoise.places import is_place
from equipoise.provenance import data_record, versions
from equipoise.randomness import stream_seed
from equipoise.records import FORMAT, ContinuationRecord
from equipoise.remote import RemoteRun
from equipoise.run import Run, origin_of
from equipoise.sources import describe_mixture, fit_aggregate, mixture_warnings
from equipoise.stages import Stage
from equipoise.store import read_correlation_form, read_digest, save_mixture, save_model
from equipoise.training.checkpoint import has_checkpoint
from equipoise.training.continuation import (
    changed_epochs,
    keep_earlier_results,
    plan_continuation,
)
from equipoise.training.engine import (
    broadcast,
    in_main_process,
    launch,
    make_fabric,
    processes_of,
)
from equipoise.training.group import noticing_losses
from equipoise.training.logging import JsonlSink, Sink
from equipoise.training.setup import check_fit, check_units, latent_dim_of_varying, make_model
from equipoise.training.threads import computing_with
from equipoise.training.trackers import TRACKERS
from equipoise.training.trainer import Trainer


@noticing_losses
def train(
    data: Data,
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    *,
    resume: bool | Literal["auto"] = False,
    sinks: Sequence[Sink] = (),
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    noise: NoiseModel | None = None,
    force: bool = False,
    command: Sequence[str] | None = None,
    on_mixture: Callable[[EMStep], None] | None = None,
) -> Run:
    r"""Train a model by Algorithm 1, fit a mixture to its aggregate posterior, and keep both.

    A configuration that does not fit the data is a ``ConfigError``, and then no folder is made.

    With several ``devices``, the program that calls this is started again for each, unless
    ``torchrun`` or ``fabric run`` has done so. All of them return. The first one alone has written
    the folder and called the sinks.

    Args:
        data: What :func:`equipoise.load_data` or :func:`equipoise.load_stream` returned.
        config: Options; the defaults if None.
        out: The run folder. None takes ``runs/NAME``, or the next free name after it. With an
            address such as s3://bucket/run, the run is uploaded there after each checkpoint, see
            :mod:`equipoise.remote`.
        resume: Go on with the run in ``out``. A run that is trained to its end goes on for longer
            if ``config`` has more ``stage_1_epochs`` or ``stage_2_epochs``, and nothing else
            changed; its results are kept in ``RUN/earlier-1``. "auto" goes on if there is a run,
            starts it if there is none, and returns it as it is if it is trained, so that a program
            which is started again and again needs no other argument. It needs ``out``.
        sinks: What takes in the figures, besides ``metrics.jsonl``.
        encoder: Your own module from (B, \*) to (B, 2 d); give a decoder with it.
        decoder: Your own module from (B, d) to (B, \*); give an encoder with it.
        noise: Your own noise model of stage 1, in place of the option ``noise``.
        force: Use a folder that holds other files, too. None of them is replaced: where a file of
            the run would have its name, the training is refused.
        command: The command line, kept in ``config.json``.
        on_mixture: Called with each iteration of the mixture's fit.

    Returns:
        The run.

    Raises:
        StoreError: if the folder holds a run or other files already, if there is nothing to resume,
            or if another job works in the folder.
        Preempted: if SIGTERM came during an epoch. The run goes on from there with
            ``resume=True``.

    Example:
        >>> run = equipoise.train(equipoise.load_data("digits"))  # doctest: +SKIP
        >>> run.model().noise.floor_var  # doctest: +SKIP
    """
    config = config or TrainConfig()
    _check_arguments(data, config)
    if resume == "auto" and not out:
        raise ConfigError(
            ["resume=auto needs the folder to look into: give out, the same each time"]
        )
    check_fit(data, config)
    fabric = make_fabric(config)

    def say(text: str) -> None:
        for sink in sinks:
            sink.message(text)

    launch(fabric, say)
    remote = None
    if is_place(out):
        remote = RemoteRun(str(out))
        in_main_process(fabric, partial(_download, remote, say, is_new=not resume))
        out = remote.folder
    if config.batch_size == "auto":
        # Recorded as a number, so that the run goes on with it whatever the number of processes.
        recorded = in_main_process(fabric, partial(_recorded_batch_size, out if resume else None))
        size = recorded or config.step_size(len(data.train), fabric.world_size)
        config = replace(config, batch_size=size)
        say(_describe_batches(size, len(data.train)))

    if config.latent_dim == "auto":
        choose = partial(_latent_dim, out if resume else None, data)
        config = replace(config, latent_dim=in_main_process(fabric, choose))

    if broadcast(fabric, data.fingerprint) != data.fingerprint:
        raise StoreError(
            f"Process {fabric.global_rank} has found other data in {data.source} than process 0."
        )

    torch.manual_seed(stream_seed(config.seed, "weights"))
    model = make_model(data, config, encoder, decoder, noise)

    check_units(model, data)

    is_resumed = resume is True
    if resume == "auto" and out:
        # Told to all, because not every machine may see the folder.
        is_resumed, is_trained = in_main_process(
            fabric, partial(_find_progress, Run(out), data, config)
        )
        if is_trained:
            say(f"{out} is trained already.")
            return Run(out)

    # Everything that can refuse the input has run: only now does a folder appear.
    run = Run(in_main_process(fabric, partial(_choose_folder, data, out, is_resumed, force)))
    if is_resumed:
        in_main_process(fabric, partial(_check_noise, run, model, is_given=noise is not None))
        in_main_process(fabric, partial(_check_continuation, run, model, config))

    was_there = True

    with ExitStack() as stack:

        def begin() -> None:
            nonlocal was_there
            was_there = bool(out) and run.folder.is_dir()
            try:
                stack.enter_context(run.exclusive("training"))
            except OSError:
                discard_if_empty(run.folder, keep_folder=was_there)
                raise
            if is_resumed:
                if not has_checkpoint(run.checkpoints):
                    # It starts anew, and may do so with other options.
                    write_json(run.config_file, _settings(data, config, model, command))
                elif run.is_trained() and _continued_by(run, config):
                    say(_begin_continuation(run, config, command))
                return

            # Another training may have come and gone since the folder was chosen.
            _refuse_run(run)
            try:
                write_json(run.config_file, _settings(data, config, model, command))
            except Exception:
                stack.close()
                discard_if_empty(run.folder, keep_folder=was_there)
                raise

        in_main_process(fabric, begin)
        all_sinks: list[Sink] = []
        if fabric.is_global_zero:
            all_sinks = [JsonlSink(run.metrics_file), *sinks]
            if remote is not None:
                remote.take_over()
            if config.tracker != "none":
                all_sinks.append(TRACKERS[config.tracker](run.folder, config.as_dict()))
        else:
            # Dropout in a user's own networks shall differ between processes.
            torch.manual_seed(stream_seed(config.seed, "process", fabric.global_rank))

        trainer = Trainer(
            model,
            data,
            config,
            folder=run.checkpoints,
            sinks=all_sinks,
            fabric=fabric,
            on_save=None if remote is None else partial(_upload, remote, say),
        )
        try:
            trainer.fit(resume=is_resumed)
        except Exception:
            if fabric.is_global_zero and not is_resumed:
                stack.callback(_discard_unstarted, run, was_there)
            raise
        stack.enter_context(computing_with(trainer.threads))
        in_main_process(fabric, partial(_note_options, run, config))
        # Its copy of the training examples on the device goes, too: they are encoded from their
        # source.
        del trainer

        model.eval()
        processes = processes_of(fabric)
        correlation_fit = None
        form = choose_form(config.noise_correlation, data.shape)
        if form != "none":
            correlation_fit = fit_correlation(
                model, data, form, seed=config.seed, processes=processes
            )

        fit = fit_aggregate(model, data, config, fabric.device, on_mixture, processes)
        model.cpu()

        replaced = _describe_replaced(run, correlation_fit) if is_resumed else []
        in_main_process(fabric, partial(_save, run, model, fit, config, data, correlation_fit))
        if remote is not None:
            run.remote = remote
            in_main_process(fabric, remote.upload)
        messages = _describe_fit(fit)
        if correlation_fit is not None:
            messages.insert(0, correlation_fit.message)
        messages += replaced
        for sink in all_sinks:
            for text in messages:
                sink.message(text)
    return run


def _now() -> str:
    """Write the date and time."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _download(remote: RemoteRun, say: Callable[[str], None], *, is_new: bool) -> None:
    """Bring the folder of this machine to what the place has."""
    if is_new and remote.exists():
        raise StoreError(
            f"{remote.place} holds a run already: resume it with --resume, or choose another "
            "--out. '--resume auto' starts a run or goes on with it."
        )
    for name in remote.download():
        say(f"Passed over {remote.place / name}, which was not uploaded to its end.")


def _upload(remote: RemoteRun, say: Callable[[str], None]) -> None:
    """Upload a checkpoint. The training goes on if the place does not answer for a while."""
    try:
        remote.upload()
    except ConnectionError as error:
        say(f"Warning: the checkpoint was not uploaded, and goes with the next one: {error}")


def _recorded_batch_size(out: str | Path | None) -> int | None:
    """Read the size of batches that a run has; None if there is no run yet."""
    if out is None or not Run(out).config_file.exists():
        return None
    size = Run(out).settings()["options"].get("batch_size")
    return size if isinstance(size, int) else None


def _latent_dim(out: str | Path | None, data: Data) -> int | Literal["auto"]:
    """Choose the number of latent units as the run has it; that of a new run by what varies."""
    if out is None or not Run(out).config_file.exists():
        return latent_dim_of_varying(data)
    recorded = Run(out).settings()["options"].get("latent_dim")
    return recorded if isinstance(recorded, int) else "auto"


def _describe_batches(size: int, n: int) -> str:
    """Say which size of batches batch_size=auto has chosen."""
    size = min(size, n)
    return (
        f"Note: batch_size=auto takes {size} examples per step, {math.ceil(n / size)} steps per "
        f"epoch of {n:,} examples."
    )


def _discard_unstarted(run: Run, was_there: bool) -> None:
    """Remove the files of a run that failed before its first checkpoint, for another try."""
    if has_checkpoint(run.checkpoints):
        return
    for file in (run.config_file, run.metrics_file):
        remove(file)
    discard_if_empty(run.folder, keep_folder=was_there)


def _note_options(run: Run, config: TrainConfig) -> None:
    """Keep the options that a resumed run went on with, where it may have others."""
    settings = run.settings()
    if settings["options"] != config.as_dict():
        write_json(run.config_file, {**settings, "options": config.as_dict()})


def _continued_by(run: Run, config: TrainConfig) -> list[str]:
    """Names of the options by which a run is continued, if these alone have other values."""
    before = EARLIER_VALUES | run.settings()["options"]
    changed = [name for name, value in config.as_dict().items() if before.get(name) != value]
    return changed_epochs(before, config) if {*changed} <= {*CONTINUED, *PLACEMENT} else []


def _check_continuation(run: Run, model: VAE, config: TrainConfig) -> None:
    """Refuse more epochs for a run that cannot go on with them, before anything is moved."""
    changed = _continued_by(run, config)
    if not changed or not has_checkpoint(run.checkpoints):
        return
    if not run.is_trained():
        raise StoreError(
            f"{run.folder} is not trained to its end, which {' and '.join(changed)} would move: "
            f"finish it first, by 'equipoise train --resume {run.folder}' alone."
        )

    plan = plan_continuation(run.history(), run.settings()["options"], config)
    kind = run.settings()["noise_model"]["kind"]
    if plan.stage is Stage.SHARED_VARIANCE and kind != describe_noise(model.noise)["kind"]:
        raise StoreError(
            f"stage 1 of {run.folder} has the noise model {kind} of your own: continue it from "
            "Python, and give an instance with noise="
        )


def _begin_continuation(run: Run, config: TrainConfig, command: Sequence[str] | None) -> str:
    """Keep the results of a finished run, and note that it goes on; return what a person reads."""
    settings = run.settings()
    folder = keep_earlier_results(run)
    record: ContinuationRecord = {
        "command": list(command or []),
        "created": _now(),
        "epochs_before": {name: settings["options"][name] for name in CONTINUED},
        "earlier_results": folder.name,
    }
    continued = [*settings.get("continued", []), record]
    write_json(run.config_file, {**settings, "options": config.as_dict(), "continued": continued})
    return (
        f"Note: the model, the mixture, the evaluations and the figures so far were moved to "
        f"{folder}, which is a run of its own. Those of {run.folder} come anew."
    )


def _check_arguments(data: object, config: object) -> None:
    """Refuse what is not data or options, and say how they are made."""
    if not isinstance(data, Data):
        raise ConfigError(
            [f"data must come from equipoise.load_data or load_stream, got a {type(data).__name__}"]
        )
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            [
                "config must be an equipoise.TrainConfig, as equipoise.make_config makes it of a "
                f"dictionary, got a {type(config).__name__}"
            ]
        )


def _save(
    run: Run,
    model: VAE,
    fit: MixtureFit,
    config: TrainConfig,
    data: Data,
    correlation_fit: CorrelationFit | None,
) -> None:
    """Write model, mixture and held-out scores, and tie them to each other and to the run."""
    record = None if correlation_fit is None else correlation_fit.record()
    origin = origin_of(config.as_dict(), data.fingerprint)
    save_model(run.model_file, model, origin, correlation_fit=record)

    description = {**describe_mixture(fit, config), "model": read_digest(run.model_file)}
    save_mixture(run.mixture_file, fit.mixture, description)

    judges = None if correlation_fit is None else without_each_fold(model, correlation_fit)
    keep_held_out(run, model, fit.mixture.cpu().log_prob, data, judges)


def _choose_folder(data: Data, out: str | Path | None, resume: bool, force: bool) -> str:
    """Choose the folder of a run, and refuse one that cannot be used for it."""
    check_text(out or data.name)
    if not out:
        return str(_free_folder(data.name))
    run = Run(out)

    if resume:
        run.check_data(data)
        if run.model_file.is_file() and not run.checkpoints.is_dir():
            raise StoreError(
                f"{run.folder} is trained and has no checkpoints to go on from; "
                "train into another --out."
            )
        return str(run.folder)

    _refuse_run(run)
    if os.path.lexists(run.folder) and not run.folder.is_dir():
        raise StoreError(f"{run.folder} is no folder: choose another --out.")
    if not is_empty(run.folder) and not force:
        raise StoreError(
            f"{run.folder} is not empty, and holds no run: choose another --out. With --force the "
            "run is written beside the files that are there; none of them is replaced."
        )
    return str(run.folder)


def _find_progress(run: Run, data: Data, config: TrainConfig) -> tuple[bool, bool]:
    """Tell whether there is a run to go on with, and whether it is trained to the end.

    Refuses a run of other data, and a trained one of other options. Those of a run that is not
    trained are compared with its checkpoint.
    """
    if not run.config_file.exists():
        return False, False
    run.check_data(data)
    if not run.is_trained():
        return True, False

    options = EARLIER_VALUES | run.settings()["options"]
    changed = [
        name
        for name, value in config.as_dict().items()
        if options.get(name) != value and name not in MACHINE
    ]
    if changed:
        raise StoreError(
            f"{run.folder} was trained with other values of {', '.join(changed)}; "
            "give the same, or choose another --out. 'equipoise train --resume RUN --set "
            "stage_1_epochs=N' continues a run for more epochs."
        )
    try:
        run.mixture()
    except StoreError:
        return True, False  # a kill came between the two files, or they are damaged
    return True, True


def _refuse_run(run: Run) -> None:
    """Refuse to train over a run."""
    if run.config_file.exists():
        raise StoreError(
            f"{run.folder} holds a run already: resume it with --resume, or choose another --out. "
            "'--resume auto' starts a run or goes on with it."
        )


def _check_noise(run: Run, model: VAE, *, is_given: bool) -> None:
    """Refuse to resume with another noise model than the run began with.

    One of a user's own need not be given again where a checkpoint tells how to build it.
    """
    recorded = run.settings()["noise_model"]
    if describe_noise(model.noise) == recorded:
        return

    kind = recorded["kind"]
    if is_given:
        raise StoreError(f"{run.folder} began with another noise model, {recorded}; give that one.")
    if not has_checkpoint(run.checkpoints):
        raise StoreError(
            f"{run.folder} began with the noise model {kind} of your own and was stopped before "
            "its first checkpoint: train it again from Python with noise=, into another folder."
        )


def _free_folder(name: str) -> Path:
    """Make the folder runs/NAME, or runs/NAME-2, runs/NAME-3, ... where that is taken."""
    name = name.replace("/", "-")
    if not name.strip("."):
        name = "data"  # "" and ".." are other folders
    base = Path("runs") / name
    base.parent.mkdir(parents=True, exist_ok=True)

    folder, number = base, 2
    while True:
        try:
            # Of two trainings that start at once, one alone succeeds.
            folder.mkdir()
        except FileExistsError:
            folder = base.with_name(f"{base.name}-{number}")
            number += 1
        else:
            return folder


def _settings(
    data: Data, config: TrainConfig, model: VAE, command: Sequence[str] | None
) -> dict[str, Any]:
    """Everything that ``config.json`` holds."""
    return {
        "format": FORMAT,
        "command": list(command or []),
        "created": _now(),
        "data": {
            **data_record(data),
            "source": data.source,
            "load": dict(data.loading),
            "shape": list(data.shape),
        },
        "noise_model": describe_noise(model.noise),
        "options": config.as_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": versions(),
    }


def _describe_replaced(run: Run, correlation_fit: CorrelationFit | None) -> list[str]:
    """Say if the run had another correlation, which its own options do not ask for."""
    try:
        before = read_correlation_form(run.model_file)
    except StoreError:
        return []  # not written yet, or damaged, and now written anew
    after = "none" if correlation_fit is None else correlation_fit.form
    if before == after:
        return []
    return [
        f"Warning: the correlation of the errors that the run had ({before}) is replaced by that "
        f"of its own options ({after}). 'equipoise fit-noise' estimates another."
    ]


def _describe_fit(fit: MixtureFit) -> list[str]:
    """Say what a person should know of the mixture."""
    n_components = fit.mixture.n_components
    messages = []

    if len(fit.held_out) > 1:
        scores = ", ".join(f"{k}: {score.value:.2f}" for k, score in fit.held_out.items())
        messages.append(
            f"Mixture of {n_components} components, "
            f"by held-out log-likelihood of codes ({scores} nats)."
        )

    messages += [f"Warning: {text}" for text in mixture_warnings(fit)]
    return messages
