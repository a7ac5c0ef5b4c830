"""Where codes come from: the aggregate posterior, densities fitted to it, and the prior.

:data:`equipoise.catalogue.SOURCES` lists them. A source is either ready once a run has its mixture
(:data:`READY`), or fitted to the codes of the training set when it is first asked for and then kept
in the run folder (:data:`FITTED`). Of a mixture of either kind, :data:`TEMPERED` changes the
covariances. The exact aggregate posterior, eq. (12), is encoded anew.
"""

import re
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from equipoise.aggregate import (
    AggregatePosterior,
    GaussianMixture,
    LatentDistribution,
    StandardNormal,
    single_gaussian,
    tempered,
)
from equipoise.catalogue import SOURCES
from equipoise.config import ConfigError, TrainConfig
from equipoise.data import Data, ExampleSet, Stream, batches_of
from equipoise.files import StoreError, is_ours, set_aside
from equipoise.flow_fit import CodeFlow, FlowEpoch, fit_flow
from equipoise.gaussian import Gaussian, SharedGenerator
from equipoise.label_mixture import AnyLabel, LabelMixture, fit_label_weights
from equipoise.labels import label_number, labels_of
from equipoise.mixture_fit import EMStep, MixtureFit, fit_mixture, fit_variational_mixture
from equipoise.model import VAE, encode_all
from equipoise.processes import ALONE, Processes, choose_device
from equipoise.randomness import stream
from equipoise.run import Run
from equipoise.store import (
    load_flow,
    load_mixture,
    read_codes_digest,
    read_digest,
    save_flow,
    save_mixture,
)

ENCODED_AT_ONCE = 500
VARIATIONAL_COMPONENTS = 32
"""Components of a variational fit where their number is 'auto'. It empties those not needed."""

Progress = Callable[[str, int, int | None, str], None]
"""Takes the label of a job, its position, its total if known, and its figure of merit in words."""


def encode_examples(
    model: VAE, examples: ExampleSet, device: torch.device, processes: Processes = ALONE
) -> Gaussian:
    """Encode every example, or this process's part of the examples, to its posterior q(z|x).

    The posteriors take 8 d bytes per example, which is 1.3 GB for ten million codes of d = 16.

    Args:
        model: A model in evaluation mode, on the device.
        examples: Raw examples.
        device: Where to compute.
        processes: The processes that share the work. Each takes every ``size``-th example.

    Returns:
        Means and log-variances, (N, d).
    """
    batches = batches_of(
        examples, ENCODED_AT_ONCE, device, rank=processes.rank, world_size=processes.size
    )
    return encode_all(model, batches.epoch())


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
        model: A trained model in evaluation mode, on the device.
        data: The training set is encoded. The validation set chooses K where it is 'auto'.
        config: Options ``n_components``, ``mixture_fit``, ``mixture_from`` and ``seed``.
        device: Where to compute.
        on_iteration: Called with each iteration of EM.
        processes: The processes that share the work, each with its part of the examples.

    Returns:
        The mixture and how it was found.
    """
    generator = stream(config.seed, "mixture", device=device)

    def encode(examples: ExampleSet) -> tuple[Gaussian, Tensor]:
        """Encode this process's part, and draw a code of each posterior.

        The draws are the same whatever the number of processes.
        """
        posterior = encode_examples(model, examples, device, processes)
        shared = SharedGenerator(generator, len(examples), processes.rank, processes.size)
        return posterior, posterior.sample(shared)

    posterior, codes = encode(data.train)

    def by_label(fit: MixtureFit) -> MixtureFit:
        """Give each label its own weights, if the model has labels."""
        labels = labels_of(codes)
        if labels is None:
            return fit
        mixture = fit_label_weights(
            fit.mixture, processes.gather(codes), processes.gather(labels), len(model.label_names)
        )
        return fit._replace(mixture=mixture)

    if config.mixture_fit == "variational":
        n_components = min(VARIATIONAL_COMPONENTS, len(data.train))
        if config.n_components != "auto":
            n_components = config.n_components
        everything = processes.gather(codes)
        return by_label(fit_variational_mixture(everything, n_components, generator=generator))

    held_out = None
    if config.n_components == "auto":
        held_out = encode(data.validation)[1]

    if processes.rank:
        # For the draws of random subsets, to which each process gives a share of its own.
        generator = stream(config.seed, "mixture", processes.rank, device=device)

    is_exact = config.mixture_from == "moments"
    fit = fit_mixture(
        posterior.mean if is_exact else codes,
        config.n_components,
        log_vars=posterior.log_var if is_exact else None,
        held_out=held_out,
        generator=generator,
        on_iteration=on_iteration,
        processes=processes,
    )
    return by_label(fit)


def describe_mixture(fit: MixtureFit, config: TrainConfig) -> dict[str, Any]:
    """Describe how a mixture was fitted, for its file.

    Args:
        fit: What :func:`fit_aggregate` returned.
        config: The options of that fit.

    Returns:
        JSON values.
    """
    held_out = [
        {"n_components": n_components, **log_likelihood._asdict()}
        for n_components, log_likelihood in fit.held_out.items()
    ]
    return {
        "fit": config.mixture_fit,
        "from": config.mixture_from,
        "n_components": fit.mixture.n_components,
        "log_likelihood": fit.log_likelihoods[-1],
        "iterations": fit.n_iterations,
        "converged": fit.converged,
        "components_floored": fit.n_floored,
        "flat_directions": fit.n_flat,
        "held_out": held_out,
    }


def mixture_warnings(fit: MixtureFit) -> list[str]:
    """Find what makes the density of a mixture doubtful.

    Args:
        fit: What :func:`fit_aggregate` returned.

    Returns:
        A sentence for each problem.
    """
    warnings = []
    if fit.n_floored:
        # 'auto' has compared numbers of components on held-out codes.
        remedy = "give a lower n_components" if fit.held_out else "lower it, or n_components=auto"
        warnings.append(
            f"{fit.n_floored} of the mixture's {fit.mixture.n_components} components have shrunk "
            "to their floor; its density is not to be trusted. There are too many components for "
            f"the codes: {remedy}."
        )
    if fit.n_flat:
        warnings.append(
            f"The codes do not vary in {fit.n_flat} of {fit.mixture.latent_dim} directions, where "
            "the mixture has a std of a thousandth of the largest: units that are not used or that "
            "copy others, or too few examples. Lower latent_dim."
        )
    return warnings


def any_label(density: LatentDistribution, mixture: GaussianMixture) -> LatentDistribution:
    """Let the samples of a density carry labels, if the codes of a mixture do.

    Args:
        density: A density of codes.
        mixture: The run's mixture, whose labels have their shares.

    Returns:
        The density, or one of codes with labels.
    """
    if isinstance(mixture, LabelMixture):
        return AnyLabel(density, mixture.label_shares)
    return density


READY: dict[str, Callable[[GaussianMixture], LatentDistribution]] = {
    "prior": lambda mixture: any_label(
        StandardNormal(mixture.latent_dim).to(mixture.means.device), mixture
    ),
    "gaussian": lambda mixture: any_label(single_gaussian(mixture), mixture),
    "mixture": lambda mixture: mixture,
}
"""Sources that the run's own mixture is all that is needed for, by their rows in the catalogue."""


class FitTask(NamedTuple):
    """What a source is fitted with.

    Args:
        run: The run whose codes are fitted. It has finished training.
        model: The run's model, in evaluation mode, on the device.
        data: The data that the run was trained on. The validation set ends the fit.
        config: The run's options, of which the seed is used.
        device: Where to compute.
        argument: What stands behind the source's name and "=", such as "500".
        progress: Called with each step of the fit.
    """

    run: Run
    model: VAE
    data: Data
    config: TrainConfig
    device: torch.device
    argument: str
    progress: Progress


class FittedSource(ABC):
    """A density that is fitted to the codes of the training set, and kept in the run folder."""

    starts_from_mixture = False
    """Whether the fit depends on the run's mixture, and must be repeated when that changes."""

    @abstractmethod
    def fit(self, task: FitTask) -> tuple[LatentDistribution, dict[str, Any]]:
        """Fit the density.

        Args:
            task: What to fit it with.

        Returns:
            The density on the device of the task, and JSON values that say how it was fitted.
        """

    @abstractmethod
    def save(self, path: Path, density: LatentDistribution, description: dict[str, Any]) -> None:
        """Write the density and its description into one file."""

    @abstractmethod
    def load(self, path: Path) -> tuple[LatentDistribution, dict[str, Any]]:
        """Read what :meth:`save` wrote; a ``StoreError`` if it is absent or damaged."""


class MixtureSource(FittedSource):
    """A mixture of another number of components than the run's own."""

    def fit(self, task: FitTask) -> tuple[LatentDistribution, dict[str, Any]]:
        """Fit it by EM. The argument is K, or 'auto' for the K of highest held-out likelihood."""
        config = replace(task.config, n_components="auto", mixture_fit="em")
        if task.argument != "auto":
            config = replace(config, n_components=int(task.argument))

        def report(step: EMStep) -> None:
            label = f"mixture of {step.n_components}"
            task.progress(label, step.iteration, None, f"{step.log_likelihood:.3f} nats per code")

        fit = fit_aggregate(task.model, task.data, config, task.device, report)
        return fit.mixture, describe_mixture(fit, config)

    def save(self, path: Path, density: LatentDistribution, description: dict[str, Any]) -> None:
        """Write the mixture."""
        save_mixture(path, cast(GaussianMixture, density), description)

    def load(self, path: Path) -> tuple[LatentDistribution, dict[str, Any]]:
        """Read the mixture."""
        return load_mixture(path)


class FlowSource(FittedSource):
    """A normalising flow whose base is the run's mixture."""

    starts_from_mixture = True

    def fit(self, task: FitTask) -> tuple[LatentDistribution, dict[str, Any]]:
        """Fit it by gradient, until held-out codes gain no more."""
        if task.model.label_names:
            raise ConfigError(["a flow knows no labels: take --from mixture, or mixture=500"])
        generator = stream(task.config.seed, "flow", device=task.device)
        training = encode_examples(task.model, task.data.train, task.device)
        validation = encode_examples(task.model, task.data.validation, task.device)

        def report(step: FlowEpoch) -> None:
            task.progress("flow", step.epoch, step.epochs, f"{step.held_out:.3f} nats per code")

        fit = fit_flow(
            training,
            validation.sample(generator),
            task.run.mixture().to(task.device),
            generator=generator,
            on_epoch=report,
        )
        return fit.flow, {
            "epochs": len(fit.history),
            "best_epoch": fit.best_epoch,
            "held_out": fit.held_out,
        }

    def save(self, path: Path, density: LatentDistribution, description: dict[str, Any]) -> None:
        """Write the flow."""
        save_flow(path, cast(CodeFlow, density), description)

    def load(self, path: Path) -> tuple[LatentDistribution, dict[str, Any]]:
        """Read the flow."""
        return load_flow(path)


FITTED: dict[str, FittedSource] = {
    "mixture=K": MixtureSource(),
    "mixture=auto": MixtureSource(),
    "flow": FlowSource(),
}
"""Sources that are fitted when they are first asked for, by their rows in the catalogue."""

TEMPERED = "mixture@T"
"""The row in the catalogue of a mixture at a temperature."""


_MIXTURE_OF_K = r"mixture=[1-9]\d*"
_PATTERNS = {
    "mixture=K": _MIXTURE_OF_K,
    # The part behind "@" is a decimal number above 0.
    TEMPERED: rf"(mixture|mixture=auto|{_MIXTURE_OF_K})@(?=.*[1-9])\d{{1,9}}(\.\d{{1,9}})?",
}
"""What the names in rows with a variable part look like."""


def check_source(name: str) -> str:
    """Find the row of the catalogue that a source's name belongs to.

    Args:
        name: Name that the user gave.

    Returns:
        The row in :data:`equipoise.catalogue.SOURCES`. "mixture=500" belongs to "mixture=K", and
        "mixture=500@0.8" to "mixture@T".

    Raises:
        ConfigError: with the choices, if there is no such source.

    Example:
        >>> check_source("mixture=500")
        'mixture=K'
        >>> check_source("mixture@0.8")
        'mixture@T'
        >>> check_source("mixture=0")
        Traceback (most recent call last):
        ...
        equipoise.config.ConfigError: there is no source of codes 'mixture=0'; choose from ...
    """
    for row in SOURCES:
        if re.fullmatch(_PATTERNS.get(row, re.escape(row)), name):
            return row

    raise ConfigError([f"there is no source of codes {name!r}; choose from {', '.join(SOURCES)}"])


def file_stem(name: str) -> str:
    """Name the files of a source.

    Args:
        name: Name of the source.

    Returns:
        The stem of its file in the run folder, and of the files of samples drawn from it.

    Example:
        >>> file_stem("mixture=500")
        'mixture-500'
    """
    return name.replace("=", "-")


def ready_source(name: str, mixture: GaussianMixture) -> LatentDistribution:
    """Find a source that needs no other fit than the mixture.

    Args:
        name: "prior", "gaussian", "mixture", or "mixture@T" for a temperature T.
        mixture: The mixture fitted to the aggregate posterior, eq. (13).

    Returns:
        The density, on the device of the mixture.

    Raises:
        ValueError: if there is no such source, or it is not ready.
    """
    base, at, temperature = name.partition("@")
    if base == "mixture" and at:
        check_source(name)
        return tempered(mixture, float(temperature))

    if name not in READY:
        names = ", ".join(map(repr, [*READY, TEMPERED]))
        raise ValueError(f"expected a source of codes among {names}, got {name!r}")
    return READY[name](mixture)


def _report_nothing(label: str, done: int, total: int | None, text: str) -> None:
    """Take the progress of a fit, and show nothing."""


def code_source(
    run: Run,
    model: VAE,
    name: str,
    data: Callable[[], Data],
    progress: Progress = _report_nothing,
) -> LatentDistribution:
    """Find a source of codes by its name; fit it if it is asked for the first time.

    A source that is fitted starts from the run's seed. It is kept in the run folder, and fitted
    anew if the model has changed since.

    Args:
        run: A run that has finished training.
        model: The run's model, in evaluation mode.
        name: One of :data:`equipoise.catalogue.SOURCES`.
        data: Returns the data that the run was trained on. It is called only where they are needed.
        progress: Called with each step of a fit.

    Returns:
        The density, on the device of the model.

    Raises:
        ConfigError: if there is no source of that name.
        StoreError: if the data are not those of the run.
        ImportError: if the flow's library, of the extra ``flow``, is missing.
    """
    row = check_source(name)
    if row == TEMPERED:
        # The mixture itself is found, or fitted and kept, under its own name.
        base, _, temperature = name.partition("@")
        mixture = code_source(run, model, base, data, progress)
        return tempered(cast(GaussianMixture, mixture), float(temperature))

    home = model.scaling.scale.device
    if row in READY:
        return READY[row](run.mixture().to(home))

    if row in FITTED:
        stored = _load_fitted(run, name)
        if stored is not None:
            return stored.to(home)

    training_data = data()
    run.check_data(training_data)
    config = run.config()
    device = choose_device(config.accelerator)

    model.to(device)
    try:
        if row not in FITTED:
            return AggregatePosterior(*encode_examples(model, training_data.train, device)).to(home)

        argument = name.partition("=")[2]
        task = FitTask(run, model, training_data, config, device, argument, progress)
        started = time.perf_counter()
        density, description = FITTED[row].fit(task)
        seconds = round(time.perf_counter() - started, 1)
    finally:
        model.to(home)

    description = {**_fitted_to(run, row), **description, "seconds": seconds}
    FITTED[row].save(_fitted_file(run, name), density, description)
    return density.to(home)


def exportable_mixture(
    run: Run,
    model: VAE,
    name: str,
    data: Callable[[], Data],
    progress: Progress = _report_nothing,
) -> GaussianMixture:
    """Find a source of codes that is a Gaussian mixture; fit it if it is asked for the first time.

    Args:
        run: A run that has finished training.
        model: The run's model, in evaluation mode.
        name: Name of a source for which :data:`equipoise.catalogue.SOURCES` says ``is_mixture``.
        data: Returns the data that the run was trained on. It is called only where they are needed.
        progress: Called with each step of a fit.

    Returns:
        The mixture, on the device of the model. The prior is a mixture of one component.

    Raises:
        ConfigError: If there is no source of that name, or if it is not a mixture.
        StoreError: If the data are not those of the run.
    """
    if not SOURCES[check_source(name)].is_mixture:
        mixtures = ", ".join(row for row, source in SOURCES.items() if source.is_mixture)
        raise ConfigError(
            [
                f"only a Gaussian mixture can be exported, and {name!r} is none; "
                f"choose from {mixtures}"
            ]
        )

    density = code_source(run, model, name, data, progress)
    if isinstance(density, AnyLabel):
        density = density.density
    if isinstance(density, StandardNormal):
        mean = density.mean[None]
        return GaussianMixture(mean.new_ones(1), mean, torch.eye(mean.shape[1]).to(mean)[None])
    return cast(GaussianMixture, density)


def _fitted_file(run: Run, name: str) -> Path:
    return run.folder / f"{file_stem(name)}.safetensors"


def _fitted_to(run: Run, row: str) -> dict[str, str]:
    """Checksums of what a fit depends on, which are kept in its file."""
    checksums = {"model": read_codes_digest(run.model_file)}
    if FITTED[row].starts_from_mixture:
        checksums["mixture"] = read_digest(run.mixture_file)
    return checksums


def _load_fitted(run: Run, name: str) -> LatentDistribution | None:
    """Load a density that was fitted to this very model; None if there is none that can be read."""
    row = check_source(name)
    file = _fitted_file(run, name)
    if not file.exists():
        return None

    try:
        density, description = FITTED[row].load(file)
    except StoreError as error:
        if is_ours(file):
            warnings.warn(f"{error} It is kept as {set_aside(file)}.", stacklevel=3)
        return None

    is_of_run = description.items() >= _fitted_to(run, row).items()
    return density if is_of_run else None


def draw_codes(
    run: Run,
    model: VAE,
    name: str,
    n: int,
    generator: torch.Generator,
    data: Callable[[], Data],
    progress: Progress = _report_nothing,
    label: str | None = None,
) -> Tensor:
    """Draw codes from a source.

    Of the aggregate posterior, only the examples that are drawn are encoded.

    Args:
        run: A run that has finished training.
        model: The run's model, in evaluation mode.
        name: One of :data:`equipoise.catalogue.SOURCES`.
        n: Number of codes.
        generator: Source of randomness, on the model's device.
        data: Returns the data that the run was trained on. It is called only where they are needed.
        progress: Called with each step of a fit.
        label: Label of all codes. None draws labels by their share, if the model has some.

    Returns:
        Codes, (n, d), with their labels if the model has some.

    Raises:
        ValueError: If the model has no such label.
    """
    number = None if label is None else label_number(model.label_names, label)
    if name == "aggregate":
        training_data = data()
        run.check_data(training_data)
        return sample_aggregate(model, training_data.train, n, generator, number)
    source = code_source(run, model, name, data, progress)
    return sample_source(source, n, generator, number)


def sample_source(
    source: LatentDistribution,
    n: int,
    generator: torch.Generator | None = None,
    label: int | None = None,
) -> Tensor:
    """Draw codes of one label, or of any.

    Args:
        source: A density of codes.
        n: Number of codes.
        generator: Source of randomness.
        label: Number of the label of all codes. None leaves it to the source.

    Returns:
        Codes, (n, d).

    Raises:
        ValueError: If a label is given, and the source knows none.
    """
    if label is None:
        return source.sample(n, generator)
    if not isinstance(source, LabelMixture | AnyLabel):
        raise ValueError("this source of codes knows no labels: take the mixture")
    labels = torch.full((n,), label, device=source.label_shares.device)
    return source.sample_given(labels, generator)


def sample_aggregate(
    model: VAE,
    training: ExampleSet,
    n: int,
    generator: torch.Generator,
    label: int | None = None,
) -> Tensor:
    """Draw from the exact aggregate posterior, eq. (12): a random example, then a code of it.

    Args:
        model: A model in evaluation mode, on the generator's device.
        training: The training set. Only the examples that are drawn are encoded, but a stream is
            encoded as a whole.
        n: Number of codes.
        generator: Source of randomness.
        label: Number of the label of the examples that are drawn. None draws from all.

    Returns:
        Codes, (n, d).

    Raises:
        ValueError: If no example has the label.
    """
    device = generator.device
    if label is not None:
        has_label = np.flatnonzero(training.at_hand.label_numbers() == label)
        if not len(has_label):
            raise ValueError("no training example has this label: take --from mixture")
        training = training.at_hand.take(has_label.astype(np.int64))
    rows = torch.randint(len(training), (n,), generator=generator, device=device).cpu()

    if isinstance(training, Stream):
        everything = encode_examples(model, training, device)
        posterior = Gaussian(*(parameter[rows.to(device)] for parameter in everything))
    else:
        posterior = encode_examples(model, training.at_hand.take(rows.numpy()), device)
    return posterior.sample(generator)
