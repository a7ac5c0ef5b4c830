"""The main job: data in, a run folder out. Trains, fits the mixture, and keeps everything needed to go on."""

import datetime
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.aggregate import GaussianMixture
from equipoise.data import Data, ExampleSet, Stream, batches_of
from equipoise.gaussian import Gaussian, SharedGenerator
from equipoise.hub import run_folder
from equipoise.mixture_fit import EMStep, MixtureFit, fit_mixture, fit_variational_mixture
from equipoise.model import VAE, Scaling, encode_all
from equipoise.networks import Architecture, default_architecture
from equipoise.noise import DimensionNoise, FixedNoise, GlobalNoise, NoiseModel
from equipoise.processes import ALONE, Processes
from equipoise.provenance import data_record, versions
from equipoise.store import (
    StoreError,
    load_mixture,
    load_model,
    read_json,
    save_mixture,
    save_model,
    write_json,
)
from equipoise.training.config import DETERMINISTIC, ConfigError, TrainConfig, make_config
from equipoise.training.engine import in_main_process, launch, make_fabric, processes_of
from equipoise.training.logging import JsonlSink, Row, Sink, read_rows
from equipoise.training.trackers import TRACKERS, is_installed
from equipoise.training.trainer import EVALUATION_BATCH, Trainer, examples

MIN_TRAIN = 20
"""Fewer training examples than this do not make a mixture, let alone a model."""


class Run:
    """A run folder, and what is in it.

    Args:
        folder: its path, or "hf:owner/name" of one on the Hugging Face hub, see :func:`equipoise.hub.run_folder`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = run_folder(folder)
        self.config_file = self.folder / "config.json"
        self.model_file = self.folder / "model.safetensors"
        self.mixture_file = self.folder / "aggregate.safetensors"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.evaluation_file = self.folder / "evaluation.json"
        self.checkpoints = self.folder / "checkpoints"
        self.figures = self.folder / "figures"

    def settings(self) -> dict[str, Any]:
        """Everything in ``config.json``: options, data, versions, command.

        Returns:
            JSON values.

        Raises:
            StoreError: if the folder is not a run.
        """
        if not self.config_file.is_file():
            raise StoreError(
                f"{self.folder} is not a run: it has no config.json. Runs are made by 'equipoise train'."
            )
        settings: dict[str, Any] = read_json(self.config_file)
        return settings

    def config(self) -> TrainConfig:
        """Options the run was trained with.

        Returns:
            The configuration; options that this version no longer knows are left out.
        """
        known = TrainConfig.__annotations__
        return make_config(
            {name: value for name, value in self.settings()["options"].items() if name in known}
        )

    def model(self, encoder: nn.Module | None = None, decoder: nn.Module | None = None) -> VAE:
        """Load the trained model, in evaluation mode, on the CPU.

        Args:
            encoder: the user's own, if the model was trained with one.
            decoder: likewise.

        Returns:
            The model.

        Raises:
            StoreError: if the run has not finished training.
        """
        self.settings()
        if not self.model_file.is_file():
            raise StoreError(
                f"{self.folder} has no trained model yet; finish it with 'equipoise train --resume {self.folder}'."
            )
        return load_model(self.model_file, encoder, decoder)

    def check_data(self, data: Data) -> None:
        """Refuse other data than the run was trained on.

        Args:
            data: what is to be used.

        Raises:
            StoreError: if its fingerprint differs.
        """
        trained_on = self.settings()["data"]
        if data.fingerprint != trained_on["fingerprint"]:
            raise StoreError(
                f"{self.folder} was trained on {trained_on['name']!r} with the fingerprint "
                f"{trained_on['fingerprint'][:12]}; {data.source} has {data.fingerprint[:12]}. Give the same data."
            )

    def mixture(self) -> GaussianMixture:
        """Load the mixture fitted to the aggregate posterior.

        Returns:
            The mixture, eq. (13).
        """
        return load_mixture(self.mixture_file)[0]

    def history(self) -> list[Row]:
        """Rows of ``metrics.jsonl``.

        Returns:
            One per epoch.
        """
        return read_rows(self.metrics_file)


def train(
    data: Data,
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    sinks: Sequence[Sink] = (),
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    data_options: dict[str, Any] | None = None,
    command: Sequence[str] | None = None,
    on_mixture: Callable[[EMStep], None] | None = None,
) -> Run:
    r"""Train a model by Algorithm 1, fit a mixture to its aggregate posterior, and keep both in a run folder.

    A configuration that does not fit the data is a ``ConfigError``, and then no folder is made.

    With several ``devices``, the program that calls this is started again for each, unless ``torchrun`` or ``fabric
    run`` has done so; all of them return, and the first one alone has written the folder and told the sinks.

    Args:
        data: what :func:`equipoise.load_data` or :func:`equipoise.load_stream` returned.
        config: options; the defaults if None.
        out: the run folder; ``runs/NAME``, or the next free name after it, if None.
        resume: go on with the run in ``out``.
        sinks: what takes in the figures, besides ``metrics.jsonl``.
        encoder: own module from (B, \*) to (B, 2 d); give a decoder with it.
        decoder: own module from (B, d) to (B, \*).
        data_options: how the data were loaded, kept in ``config.json`` for a later resume.
        command: command line, kept in ``config.json``.
        on_mixture: told of each iteration of the mixture's fit.

    Returns:
        The run.

    Raises:
        StoreError: if the folder holds a run already, or there is nothing to resume.
        Preempted: if SIGTERM came while an epoch was under way; the run goes on from there with ``resume=True``.

    Example:
        >>> run = equipoise.train(equipoise.load_data("digits"))  # doctest: +SKIP
        >>> run.model().noise.floor_var  # doctest: +SKIP
    """
    config = config or TrainConfig()
    check_fit(data, config)
    fabric = make_fabric(config)
    launch(fabric)
    run = Run(in_main_process(fabric, partial(_open_folder, data, out, resume)))
    if fabric.broadcast(data.fingerprint) != data.fingerprint:
        raise StoreError(
            f"Process {fabric.global_rank} has found other data in {data.source} than process 0."
        )
    # Everything that can refuse the input has run: only now does a folder appear.
    torch.manual_seed(config.seed)
    model = make_model(data, config, encoder, decoder)
    all_sinks: list[Sink] = []
    if fabric.is_global_zero:
        if not resume:
            write_json(run.config_file, _settings(data, config, model, data_options, command))
        all_sinks = [JsonlSink(run.metrics_file), *sinks]
        if config.tracker != "none":
            all_sinks.append(TRACKERS[config.tracker](run.folder, config.as_dict()))
    else:
        torch.manual_seed(
            config.seed + fabric.global_rank
        )  # dropout in own networks differs between processes
    trainer = Trainer(model, data, config, folder=run.checkpoints, sinks=all_sinks, fabric=fabric)
    trainer.fit(resume=resume)
    del (
        trainer
    )  # and the training examples that it holds on the device: they are encoded from their source
    model.eval()
    fit = fit_aggregate(model, data, config, fabric.device, on_mixture, processes_of(fabric))
    model.cpu()

    def save() -> None:
        save_model(run.model_file, model)
        save_mixture(run.mixture_file, fit.mixture, describe_mixture(fit, config))

    in_main_process(fabric, save)
    for sink in all_sinks:
        for text in _fit_messages(fit):
            sink.message(text)
    return run


def _open_folder(data: Data, out: str | Path | None, resume: bool) -> Path:
    """Choose the folder of a run, and refuse one that is not for it."""
    run = Run(out) if out else Run(_free_folder(data.name))
    if resume:
        run.check_data(data)
        if run.model_file.is_file() and not run.checkpoints.is_dir():
            raise StoreError(
                f"{run.folder} is trained and has no checkpoints to go on from; train into another --out."
            )
    elif run.config_file.exists():
        raise StoreError(
            f"{run.folder} holds a run already: resume it with --resume, or choose another --out."
        )
    return run.folder


def make_model(
    data: Data,
    config: TrainConfig,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
) -> VAE:
    """Build the untrained model that suits the data.

    Args:
        data: its shape and units.
        config: options of the networks and the noise.
        encoder: the user's own; give a decoder with it.
        decoder: likewise.

    Returns:
        The model, its networks fitted to the data's scale.

    Raises:
        ConfigError: if only one of encoder and decoder is given.
    """
    if (encoder is None) != (decoder is None):
        raise ConfigError(["encoder and decoder go together: give both of your own, or neither"])
    scaling = Scaling(torch.as_tensor(data.offset), torch.as_tensor(data.scale), data.quantum)
    noise = make_noise(data, config)
    shape, latent_dim = data.shape, _latent_dim(data, config)
    traits: dict[str, Any] = {
        "mean_bounds": None
        if data.quantum is None
        else (0.0, 1.0),  # digital data reach from offset to offset + scale
        "deterministic": config.objective in DETERMINISTIC,
    }
    if encoder is not None and decoder is not None:
        return VAE(
            encoder,
            decoder,
            noise,
            shape=shape,
            latent_dim=latent_dim,
            scaling=scaling,
            width=config.width,
            **traits,
        )
    architecture: Architecture = (
        default_architecture(shape) if config.architecture == "auto" else config.architecture
    )
    model = VAE.build(
        shape,
        latent_dim,
        architecture=architecture,
        width=config.width,
        noise=noise,
        scaling=scaling,
        **traits,
    )
    sample = scaling(examples(data.train, 10_000, torch.device("cpu")))
    model.start_at_data(sample.mean(0), sample.std())
    return model


def make_noise(data: Data, config: TrainConfig) -> NoiseModel:
    """Build the noise model of stage 1.

    Args:
        data: its shape, and the rounding of its values.
        config: options ``noise``, ``noise_var`` and ``noise_update``.

    Returns:
        The noise model.
    """
    if config.noise == "fixed":
        return FixedNoise(float(config.noise_var or 0.0))
    memory = min(100, math.ceil(len(data.train) / config.batch_size))
    if config.noise == "global":
        return GlobalNoise(config.noise_update, memory=memory)
    shape = (
        (data.shape[0], *(1 for _ in data.shape[1:])) if config.noise == "channel" else data.shape
    )
    if data.quantum is None:
        return DimensionNoise(shape, config.noise_update, memory=memory)
    return DimensionNoise(shape, config.noise_update, memory=memory, min_var=data.quantum**2 / 12)


def sample_aggregate(
    model: VAE, training: ExampleSet, n: int, generator: torch.Generator
) -> Tensor:
    """Draw from the exact aggregate posterior, eq. (12): a random example each, and a sample of its q(z|x).

    Args:
        model: in evaluation mode, on the generator's device.
        training: the training set; only the examples that are drawn are encoded, but all those of a stream.
        n: number of codes.
        generator: source of randomness.

    Returns:
        Codes, (n, d).
    """
    rows = torch.randint(len(training), (n,), generator=generator, device=generator.device).cpu()
    if isinstance(training, Stream):
        posterior = encode_examples(model, training, generator.device)
        return Gaussian(*(parameter[rows.to(generator.device)] for parameter in posterior)).sample(
            generator
        )
    return encode_examples(model, training.at_hand.take(rows.numpy()), generator.device).sample(
        generator
    )


def fit_aggregate(
    model: VAE,
    data: Data,
    config: TrainConfig,
    device: torch.device,
    on_iteration: Callable[[EMStep], None] | None = None,
    processes: Processes = ALONE,
) -> MixtureFit:
    """Fit a Gaussian mixture to the aggregate posterior of the training set, eq. (13).

    Args:
        model: trained, in evaluation mode, on the device.
        data: the training set is encoded; the validation set judges 'auto'.
        config: options ``n_components``, ``mixture_fit`` and ``mixture_from``.
        device: where to compute.
        on_iteration: told of each iteration of EM.
        processes: those that share the work, each encoding its part of the examples.

    Returns:
        The mixture and how it was found.
    """
    generator = torch.Generator(device).manual_seed(config.seed + 4)

    def encode(examples: ExampleSet) -> tuple[Gaussian, Tensor]:
        """Posteriors of this process's part, and a sample of each, the same whatever the number of processes."""
        posterior = encode_examples(model, examples, device, processes)
        return posterior, posterior.sample(
            SharedGenerator(generator, len(examples), processes.rank, processes.size)
        )

    posterior, codes = encode(data.train)
    if config.mixture_fit == "variational":
        n_components = (
            min(32, len(data.train)) if config.n_components == "auto" else config.n_components
        )
        return fit_variational_mixture(processes.gather(codes), n_components, generator=generator)
    held_out = encode(data.validation)[1] if config.n_components == "auto" else None
    exact = config.mixture_from == "moments"
    if processes.rank:
        generator.manual_seed(
            config.seed + 4 + processes.rank
        )  # for random subsets, to which each gives a share
    return fit_mixture(
        posterior.mean if exact else codes,
        config.n_components,
        log_vars=posterior.log_var if exact else None,
        held_out=held_out,
        generator=generator,
        on_iteration=on_iteration,
        processes=processes,
    )


def encode_examples(
    model: VAE, examples: ExampleSet, device: torch.device, processes: Processes = ALONE
) -> Gaussian:
    """Posterior q(z|x) of every example, or of this process's part of them.

    What is kept is 8 d bytes each, 1.3 GB for ten million codes of d = 16.

    Args:
        model: in evaluation mode, on the device.
        examples: raw.
        device: where to compute.
        processes: each takes every ``size``-th example.

    Returns:
        Means and log-variances, (N, d).
    """
    batches = batches_of(
        examples, EVALUATION_BATCH, device, rank=processes.rank, world_size=processes.size
    )
    return encode_all(model, batches.epoch())


def check_fit(data: Data, config: TrainConfig, min_train: int = MIN_TRAIN) -> None:
    """Refuse a configuration that contradicts the data.

    Args:
        data: what is to be trained on.
        config: options.
        min_train: fewest training examples.

    Raises:
        ConfigError: with every contradiction.
    """
    problems = config.problems()
    dimensions = int(np.prod(data.shape))
    if config.stage_1_epochs == 0:
        problems.append(
            "stage_1_epochs=0 is for models trained before: give one to Trainer in Python"
        )
    if (
        min(len(data.train), len(data.validation), len(data.test)) < 2
        or len(data.train) < min_train
    ):
        problems.append(
            f"too few examples: {len(data.train)} for training, {len(data.validation)} for validation and "
            f"{len(data.test)} for the test; at least {min_train}, 2 and 2 are needed"
        )
    if _latent_dim(data, config) >= dimensions:
        problems.append(
            f"latent_dim={_latent_dim(data, config)} must be smaller than the data's {dimensions} dimensions, or "
            "there is nothing to compress"
        )
    if isinstance(config.n_components, int) and config.n_components > len(data.train):
        problems.append(
            f"n_components={config.n_components} exceeds the {len(data.train)} training examples"
        )
    if config.floor == "quantisation" and data.quantum is None:
        problems.append(
            "floor=quantisation needs digital data such as 8-bit images; give a multiple such as 1.0"
        )
    if config.noise == "channel" and len(data.shape) != 3:
        problems.append("noise=channel needs images; for tables use noise=dimension")
    if config.architecture in ("conv", "residual") and len(data.shape) != 3:
        problems.append(
            f"architecture={config.architecture} needs images; for tables use architecture=mlp"
        )
    if config.tracker in TRACKERS and not is_installed(config.tracker):
        problems.append(
            f"tracker={config.tracker} needs the library of that name: pip install {config.tracker}, or "
            "'equipoise[track]' for all trackers"
        )
    if problems:
        raise ConfigError(problems)


def _latent_dim(data: Data, config: TrainConfig) -> int:
    """Number of latent units, chosen by the data if the option leaves it open."""
    if config.latent_dim == "auto":
        return max(1, min(16, math.prod(data.shape) // 2))
    return config.latent_dim


def _free_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2, runs/NAME-3, ... where that is taken."""
    base = Path("runs") / name.replace("/", "-")
    taken, number = base, 2
    while taken.exists():
        taken = base.with_name(f"{base.name}-{number}")
        number += 1
    return taken


def _settings(
    data: Data,
    config: TrainConfig,
    model: VAE,
    data_options: dict[str, Any] | None,
    command: Sequence[str] | None,
) -> dict[str, Any]:
    return {
        "command": list(command or []),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": {
            **data_record(data),
            "source": data.source,
            "load": data_options or {},
            "shape": list(data.shape),
        },
        "options": config.as_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": versions(),
    }


def _fit_messages(fit: MixtureFit) -> list[str]:
    """What a person should know of the mixture."""
    count = fit.mixture.n_components
    said = []
    if len(fit.held_out) > 1:
        tried = ", ".join(f"{k}: {score.value:.2f}" for k, score in fit.held_out.items())
        said.append(
            f"Mixture of {count} components, by held-out log-likelihood of codes ({tried} nats)."
        )
    if fit.n_floored:
        said.append(
            f"Warning: {fit.n_floored} of the mixture's {count} components have shrunk to their floor; its density is "
            "not to be trusted. There are too many components for the codes: lower n_components, or n_components=auto."
        )
    return said


def describe_mixture(fit: MixtureFit, config: TrainConfig) -> dict[str, Any]:
    """Say how a mixture was fitted, for its file.

    Args:
        fit: what :func:`fit_aggregate` returned.
        config: its options.

    Returns:
        JSON values.
    """
    return {
        "fit": config.mixture_fit,
        "from": config.mixture_from,
        "n_components": fit.mixture.n_components,
        "log_likelihood": fit.log_likelihoods[-1],
        "iterations": fit.n_iterations,
        "converged": fit.converged,
        "components_floored": fit.n_floored,
        "held_out": [
            {"n_components": k, **log_likelihood._asdict()}
            for k, log_likelihood in fit.held_out.items()
        ],
    }
