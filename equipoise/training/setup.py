"""From options and data to what is trained: model, noise, objective and parameter groups."""

import math
from typing import Any

import torch
from torch import nn

from equipoise.catalogue import ARCHITECTURES, NOISES, OBJECTIVES
from equipoise.config import ConfigError, TrainConfig
from equipoise.data import Data
from equipoise.data.batches import examples
from equipoise.model import VAE, Scaling
from equipoise.networks import default_architecture
from equipoise.noise import NOISE_BUILDERS, NoiseModel, NoiseOptions
from equipoise.objectives import OBJECTIVE_CLASSES, DetachedVarianceElbo, Objective
from equipoise.stages import Stage
from equipoise.training.trackers import TRACKERS, is_installed

MIN_TRAIN = 20
"""Fewer training examples than this do not make a mixture, let alone a model."""
MAX_MEMORY = 100
"""Most batches over which the running estimate of the noise variance extends."""
SCALE_EXAMPLES = 10_000
"""Examples that give the mean and std at which untrained networks start."""


def make_model(
    data: Data,
    config: TrainConfig,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    noise: NoiseModel | None = None,
) -> VAE:
    """Build the untrained model that suits the data.

    Args:
        data: Data whose shape and units the model gets.
        config: Options of the networks and the noise.
        encoder: Your own encoder; give a decoder with it.
        decoder: Your own decoder; give an encoder with it.
        noise: Your own noise model of stage 1, in place of the option ``noise``.

    Returns:
        The model, its networks fitted to the data's scale.

    Raises:
        ConfigError: if only one of encoder and decoder is given.
    """
    if (encoder is None) != (decoder is None):
        raise ConfigError(["encoder and decoder go together: give both of your own, or neither"])

    scaling = Scaling(torch.as_tensor(data.offset), torch.as_tensor(data.scale), data.quantum)
    traits: dict[str, Any] = {
        "width": config.width,
        "scaling": scaling,
        # Digital data reach from offset to offset + scale.
        "mean_bounds": None if data.quantum is None else (0.0, 1.0),
        "deterministic": OBJECTIVES[config.objective].is_deterministic,
    }
    noise = noise or make_noise(data, config)
    latent_dim = choose_latent_dim(data, config)

    if encoder is not None and decoder is not None:
        return VAE(encoder, decoder, noise, shape=data.shape, latent_dim=latent_dim, **traits)

    architecture = config.architecture
    if architecture == "auto":
        architecture = default_architecture(data.shape)
    model = VAE.build(data.shape, latent_dim, architecture=architecture, noise=noise, **traits)

    sample = scaling(examples(data.train, SCALE_EXAMPLES))
    model.start_at_data(sample.mean(0), sample.std())
    return model


def make_noise(data: Data, config: TrainConfig) -> NoiseModel:
    """Build the noise model of stage 1.

    Args:
        data: Data whose shape and rounding the model gets.
        config: Options ``noise``, ``noise_var`` and ``noise_update``.

    Returns:
        The noise model.
    """
    steps_per_epoch = math.ceil(len(data.train) / config.batch_size)
    options = NoiseOptions(
        shape=data.shape,
        latent_dim=choose_latent_dim(data, config),
        update=config.noise_update,
        memory=min(MAX_MEMORY, steps_per_epoch),
        var=config.noise_var,
        quantum=data.quantum,
    )
    return NOISE_BUILDERS[config.noise](options)


def choose_latent_dim(data: Data, config: TrainConfig) -> int:
    """Choose the number of latent units, by the data where the option is 'auto'.

    Args:
        data: The data.
        config: Option ``latent_dim``.

    Returns:
        d: 16, or half the data's dimensions if there are fewer than 32, where it is 'auto'.
    """
    if config.latent_dim == "auto":
        return max(1, min(16, math.prod(data.shape) // 2))
    return config.latent_dim


def make_objective(model: VAE, config: TrainConfig, stage: Stage) -> Objective:
    """Make what a stage descends.

    Args:
        model: The model to train. Methods differ in nothing but the objective.
        config: Options ``objective``, ``beta``, ``penalty`` and ``stage_2_gradients``.
        stage: Stage of Algorithm 1. Objectives other than the bound have the first only.

    Returns:
        The objective.
    """
    if stage is Stage.PREDICTED_VARIANCE and config.stage_2_gradients == "stop":
        return DetachedVarianceElbo(model, config.beta)

    row = OBJECTIVES[config.objective]
    weights = []
    if row.has_beta:
        weights.append(config.beta)
    if row.penalty is not None:
        weights.append(row.penalty if config.penalty is None else config.penalty)
    return OBJECTIVE_CLASSES[config.objective](model, *weights)


def parameter_groups(model: VAE, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the parameters by how the optimiser treats them.

    Args:
        model: The model.
        learning_rate: Learning rate of the networks.
        weight_decay: Weight decay of the networks' weights. Biases, and parameters that are
            variances themselves, are not pulled towards zero.

    Returns:
        Groups for a torch optimiser.
    """
    own_rates = model.noise.learning_rate_factors()
    own_parameters = {
        name: parameter for name, parameter in model.noise.named_parameters() if name in own_rates
    }
    own_ids = {id(parameter) for parameter in own_parameters.values()}

    weights, biases = [], []
    for parameter in model.parameters():
        if id(parameter) in own_ids:
            continue
        if parameter.ndim >= 2:
            weights.append(parameter)
        else:
            biases.append(parameter)

    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": biases, "lr": learning_rate, "weight_decay": 0.0},
    ]
    for name, parameter in own_parameters.items():
        rate = own_rates[name] * learning_rate
        groups.append({"params": [parameter], "lr": rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def check_fit(data: Data, config: TrainConfig, min_train: int = MIN_TRAIN) -> None:
    """Refuse a configuration that contradicts the data.

    Args:
        data: Data to train on.
        config: Options.
        min_train: Fewest training examples.

    Raises:
        ConfigError: with every contradiction.
    """
    problems = config.problems()

    if config.stage_1_epochs == 0:
        problems.append(
            "stage_1_epochs=0 is for models trained before: give one to Trainer in Python"
        )

    n_train, n_validation, n_test = len(data.train), len(data.validation), len(data.test)
    if min(n_train, n_validation, n_test) < 2 or n_train < min_train:
        problems.append(
            f"too few examples: {n_train} for training, {n_validation} for validation and "
            f"{n_test} for the test; at least {min_train}, 2 and 2 are needed"
        )

    dimensions = math.prod(data.shape)
    latent_dim = choose_latent_dim(data, config)
    if latent_dim >= dimensions:
        problems.append(
            f"latent_dim={latent_dim} must be smaller than the data's {dimensions} dimensions, "
            "or there is nothing to compress"
        )

    if isinstance(config.n_components, int) and config.n_components > n_train:
        problems.append(
            f"n_components={config.n_components} exceeds the {n_train} training examples"
        )

    if config.floor == "quantisation" and data.quantum is None:
        problems.append(
            "floor=quantisation needs digital data such as 8-bit images; "
            "give a multiple such as 1.0"
        )

    is_image = len(data.shape) == 3
    noise = NOISES.get(config.noise)
    if noise is not None and noise.needs_images and not is_image:
        problems.append(f"noise={config.noise} needs images; for tables use noise=dimension")
    networks = ARCHITECTURES.get(config.architecture)
    if networks is not None and networks.needs_images and not is_image:
        problems.append(
            f"architecture={config.architecture} needs images; for tables use architecture=mlp"
        )

    if config.tracker in TRACKERS and not is_installed(config.tracker):
        problems.append(
            f"tracker={config.tracker} needs the library of that name: "
            f"pip install {config.tracker}, or 'equipoise[track]' for all trackers but trackio"
        )

    if problems:
        raise ConfigError(problems)
