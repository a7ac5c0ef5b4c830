"""Densities to draw codes from, by name: those a run comes with, and others, fitted when first asked for and kept."""

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from equipoise.aggregate import AggregatePosterior, LatentDistribution, StandardNormal
from equipoise.data import Data
from equipoise.flow_fit import fit_flow
from equipoise.metrics.latent import single_gaussian
from equipoise.model import VAE
from equipoise.store import (
    StoreError,
    file_checksum,
    load_flow,
    load_mixture,
    save_flow,
    save_mixture,
)
from equipoise.training.config import ConfigError
from equipoise.training.engine import choose_device
from equipoise.training.run import Run, describe_mixture, encode_examples, fit_aggregate

CHOICES = "mixture, mixture=K such as mixture=500, mixture=auto, flow, gaussian, prior, aggregate"

Progress = Callable[[str, int, int | None, str], None]
"""Label, position, total if known, and the figure of merit in words."""


def check_source(name: str) -> None:
    """Refuse what is not the name of a source.

    Args:
        name: as the user gave it.

    Raises:
        ConfigError: with the choices.

    Example:
        >>> check_source("mixture=0")
        Traceback (most recent call last):
        ...
        equipoise.training.config.ConfigError: there is no source of codes 'mixture=0'; choose from mixture, ...
    """
    if not re.fullmatch(r"mixture(=([1-9]\d*|auto))?|flow|gaussian|prior|aggregate", name):
        raise ConfigError([f"there is no source of codes {name!r}; choose from {CHOICES}"])


def file_stem(name: str) -> str:
    """Name a source's files.

    Args:
        name: of the source.

    Returns:
        The stem of its file in the run folder, and of the samples drawn from it.

    Example:
        >>> file_stem("mixture=500")
        'mixture-500'
    """
    return name.replace("=", "-")


def code_source(
    run: Run,
    model: VAE,
    name: str,
    data: Callable[[], Data],
    progress: Progress = lambda label, done, total, text: None,
) -> LatentDistribution:
    """Find a source of codes by its name.

    ``mixture`` is the run's own, ``gaussian`` has its mean and covariance, ``prior`` is N(0, I). ``aggregate`` is the
    exact aggregate posterior, eq. (12), which hands out the training data again. ``flow`` and ``mixture=K`` are fitted
    to the codes of the training set, with the run's seed; the flow starts from the run's mixture. The validation set
    ends its fit, and chooses K for ``mixture=auto``. They are kept in the run folder, and fitted anew if the
    model has changed since.

    Args:
        run: finished training.
        model: the run's, in evaluation mode.
        name: one of the above.
        data: gives what the run was trained on; not called where that is not needed.
        progress: told of each step of a fit.

    Returns:
        The density, on the device of the model.

    Raises:
        ConfigError: if there is no source of that name.
        StoreError: if the data are not those of the run.
        ImportError: if the flow's library, of the extra ``flow``, is missing.
    """
    check_source(name)
    home = model.scaling.scale.device
    if name == "prior":
        return StandardNormal(model.latent_dim).to(home)
    if name in ("mixture", "gaussian"):
        mixture = run.mixture().to(home)
        return mixture if name == "mixture" else single_gaussian(mixture)
    path = run.folder / f"{file_stem(name)}.safetensors"
    fitted_to = {"model": file_checksum(run.model_file)}
    if name == "flow":  # which starts from the mixture
        fitted_to["mixture"] = file_checksum(run.mixture_file)
    with contextlib.suppress(StoreError):  # absent, damaged, or of another version
        kept, description = load_flow(path) if name == "flow" else load_mixture(path)
        if description.items() >= fitted_to.items():
            return kept.to(home)
    config, given, device = run.config(), data(), choose_device(run.config())
    run.check_data(given)
    model.to(device)
    try:
        if name == "aggregate":
            return AggregatePosterior(*encode_examples(model, given.train, device)).to(home)
        started = time.perf_counter()

        def told(what: dict[str, Any]) -> dict[str, Any]:
            return fitted_to | what | {"seconds": round(time.perf_counter() - started, 1)}

        if name == "flow":
            generator = torch.Generator(device).manual_seed(config.seed + 4)
            flow_fit = fit_flow(
                encode_examples(model, given.train, device),
                encode_examples(model, given.validation, device).sample(generator),
                run.mixture().to(device),
                generator=generator,
                on_epoch=lambda step: progress(
                    "flow", step.epoch, step.epochs, f"{step.held_out:.3f} nats per code"
                ),
            )
            _, history, best_epoch, held_out = flow_fit
            save_flow(
                path,
                flow_fit.flow,
                told({"epochs": len(history), "best_epoch": best_epoch, "held_out": held_out}),
            )
            return flow_fit.flow.to(home)
        count = name.removeprefix("mixture=")
        options = replace(
            config, n_components="auto" if count == "auto" else int(count), mixture_fit="em"
        )
        mixture_fit = fit_aggregate(
            model,
            given,
            options,
            device,
            lambda step: progress(
                f"mixture of {step.n_components}",
                step.iteration,
                None,
                f"{step.log_likelihood:.3f} nats per code",
            ),
        )
        save_mixture(path, mixture_fit.mixture, told(describe_mixture(mixture_fit, options)))
        return mixture_fit.mixture.to(home)
    finally:
        model.to(home)
