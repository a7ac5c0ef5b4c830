"""From options and data to what is trained: model, noise, objective and parameter groups."""

import copy
import json
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from equipoise.catalogue import ARCHITECTURES, NOISES, OBJECTIVES
from equipoise.config import ConfigError, TrainConfig
from equipoise.correlated_noise import CorrelatedNoise
from equipoise.data import Data
from equipoise.data.batches import examples
from equipoise.data.varying import counted_columns
from equipoise.gaps import column_means, column_vars, observed_values
from equipoise.model import VAE, PowerScaling, Scaling
from equipoise.networks import build_decoder, build_head, default_architecture
from equipoise.noise import (
    NOISE_BUILDERS,
    FixedNoise,
    NoiseModel,
    NoiseOptions,
    build_noise,
    describe_noise,
    noise_class,
)
from equipoise.noise_fit import choose_form, problem_of_form
from equipoise.objectives import (
    OBJECTIVE_CLASSES,
    DetachedVarianceElbo,
    FrozenMeanElbo,
    Objective,
)
from equipoise.powers import choose_powers, yeo_johnson
from equipoise.residuals import ResidualVariance
from equipoise.stages import Floor, Stage
from equipoise.training.trackers import TRACKERS, is_installed

MIN_TRAIN = 20
"""Fewer training examples than this do not make a mixture, let alone a model."""
MAX_MEMORY = 100
"""Most batches over which the running estimate of the noise variance extends."""
CHECKED_AT_ONCE = 1000
"""Examples whose units are compared together."""
SCALE_EXAMPLES = 10_000
"""Examples that give the mean and std at which untrained networks start."""


def make_scaling(data: Data, config: TrainConfig) -> Scaling:
    """Make the map between the data's own units and those of the model.

    Args:
        data: The data.
        config: Option ``power_transform``.

    Returns:
        The scaling. If no column of a table is to be transformed, it is linear.
    """
    offset, scale = torch.as_tensor(data.offset), torch.as_tensor(data.scale)
    linear = Scaling(offset, scale, data.quantum, data.columns, data.levels)
    if not config.power_transform or len(data.shape) != 1:
        return linear

    x = linear(examples(data.train, SCALE_EXAMPLES)).double()
    columns = [column[~column.isnan()].numpy() for column in x.T]
    for i in data.levels:
        columns[i] = columns[i][:0]
    powers = torch.from_numpy(choose_powers(columns))
    if bool((powers == 1).all()):
        return linear

    transformed = yeo_johnson(x, powers)
    changed = powers != 1
    centre = torch.where(changed, column_means(transformed), 0.0)
    spread = torch.where(changed, column_vars(transformed).sqrt(), 1.0)
    return PowerScaling(
        linear.offset, linear.scale, powers, centre, spread, data.columns, data.levels
    )


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
        ConfigError: if only one of encoder and decoder is given, or the noise model could not be
            trained, saved and loaded.
    """
    if (encoder is None) != (decoder is None):
        raise ConfigError(["encoder and decoder go together: give both of your own, or neither"])

    if data.label_names and (encoder is not None or noise is not None):
        raise ConfigError(
            ["networks and noise models of your own read no labels: leave out the label"]
        )
    scaling = make_scaling(data, config)
    traits: dict[str, Any] = {
        "width": config.width,
        "scaling": scaling,
        # Digital data reach from offset to offset + scale.
        "mean_bounds": None if data.quantum is None else (0.0, 1.0),
        "deterministic": OBJECTIVES[config.objective].is_deterministic,
    }
    latent_dim = choose_latent_dim(data, config)
    if noise is None:
        noise = make_noise(data, config)
    else:
        check_own_noise(noise, data, config)

    if encoder is not None and decoder is not None:
        if data.levels:
            raise ConfigError(
                [
                    "networks of your own read no categories: leave out the columns of text and "
                    "flags, or give numbers in their place"
                ]
            )
        problem = _problem_of_tensors(nn.ModuleList([encoder, decoder]))
        if problem:
            raise ConfigError([f"the pair of encoder and decoder {problem}"])
        layers = [*encoder.modules(), *decoder.modules()]
        if config.step_size(len(data.train)) < 2 and any(isinstance(m, _BatchNorm) for m in layers):
            raise ConfigError(["batch normalisation of one example: batch_size is at least 2"])
        return VAE(encoder, decoder, noise, shape=data.shape, latent_dim=latent_dim, **traits)

    architecture = config.architecture
    if architecture == "auto":
        architecture = default_architecture(data.shape)
    traits |= {"architecture": architecture, "noise": noise, "reads_gaps": data.has_gaps}
    traits["label_names"] = data.label_names
    model = VAE.build(data.shape, latent_dim, **traits)

    sample = scaling(examples(data.train, SCALE_EXAMPLES))
    if model.categories is None:
        model.start_at_data(column_means(sample).nan_to_num(0.0), observed_values(sample).std())
        return model

    numbers = model.categories.hide(sample)
    observed = observed_values(numbers)
    std = observed.std() if len(observed) > 1 else torch.ones(())
    logits = model.categories.log_frequencies(sample)
    model.start_at_data(column_means(numbers).nan_to_num(0.0), std, logits)
    return model


def check_units(model: VAE, data: Data) -> None:
    """Refuse data of which a part cannot be in the units of the model, before it is trained.

    Otherwise its own test set would be refused after the training.

    Args:
        model: The untrained model.
        data: The data.

    Raises:
        ConfigError: with the part, and what is wrong.
    """
    problems = []
    parts = {"training": data.train.at_hand, "validation": data.validation, "test": data.test}
    for name, part in parts.items():
        try:
            for first in range(0, len(part), CHECKED_AT_ONCE):
                model.scaling.check(torch.from_numpy(part[first : first + CHECKED_AT_ONCE]))
        except ValueError as error:
            problems.append(f"the {name} examples of {data.source} do not fit the others: {error}")
    if problems:
        raise ConfigError(problems)


def check_own_noise(noise: object, data: Data, config: TrainConfig) -> None:
    """Refuse a user's noise model that would fail in training, or be unreadable afterwards.

    A copy of it computes log-variances, takes in a batch, and is built again from its description.

    Args:
        noise: What the user gave.
        data: Data whose shape it is for.
        config: Options that it goes with.

    Raises:
        ConfigError: with what is wrong, and what to do.
    """
    if not isinstance(noise, NoiseModel):
        came = f"the class {noise.__name__}" if isinstance(noise, type) else repr(noise)
        raise ConfigError(
            [f"noise must be an instance of a NoiseModel, got {came}; names go into TrainConfig"]
        )

    problems = []
    if isinstance(noise, CorrelatedNoise):
        problems.append(
            "training never uses a correlation of the errors: give the noise model that it is of, "
            "noise.marginal, and noise_correlation=auto"
        )
    if config.noise != "global":
        problems.append(
            f"noise={config.noise} and a noise model of your own exclude each other; "
            "leave the option out, or the objective that sets it"
        )
    elif "noise" in OBJECTIVES[config.objective].requires:
        problems.append(
            f"objective={config.objective} has a noise model of its own; take objective=elbo"
        )

    name = type(noise).__name__
    try:
        with torch.random.fork_rng(devices=[]):
            problem = _problem_of_own_noise(copy.deepcopy(noise), data, config)
    except Exception as error:  # a user's own code may raise anything
        problem = f"fails when it is tried: {type(error).__name__}: {error}"
    if problem:
        problems.append(f"the noise model {name} {problem}")
    if problems:
        raise ConfigError(problems)


@torch.no_grad()
def _problem_of_own_noise(noise: NoiseModel, data: Data, config: TrainConfig) -> str | None:
    """Try a noise model as training, saving and loading would; None if all is well."""
    name = type(noise).__name__
    if noise_class(name) is not type(noise):
        return (
            "was made by a class that another one of the same name has replaced since; models are "
            "built again by this name, so give each class a name of its own"
        )

    latent_dim = choose_latent_dim(data, config)
    for n in (2, 3):
        batch = (n, *data.shape)
        log_var = noise(torch.zeros(n, latent_dim))
        try:
            is_of_batch = torch.zeros(batch).add(log_var).shape == batch
        except RuntimeError:
            is_of_batch = False
        if not is_of_batch:
            return f"gives log-variances {tuple(log_var.shape)}, which do not broadcast to {batch}"
        if not bool(log_var.isfinite().all()):
            return "gives log-variances that are not finite, for codes of zero"

    if noise.floor_var.numel() != 1:
        return f"has a floor_var of the shape {tuple(noise.floor_var.shape)}; it must be one number"
    problem = _problem_of_tensors(noise)
    if problem:
        return problem

    batch = (2, *data.shape)
    statistic = ResidualVariance(noise.statistic_shape)
    statistic.update(torch.ones(batch))
    noise.update(torch.ones(batch))
    noise.set_var(statistic.var)

    try:
        description = json.loads(json.dumps(describe_noise(noise), allow_nan=False))
    except (TypeError, ValueError) as error:
        return f"must describe itself by JSON values in description(): {error}"

    def make_network(*, reads_features: bool = False) -> nn.Module:
        architecture = config.architecture
        if architecture == "auto":
            architecture = default_architecture(data.shape)
        if reads_features:
            return build_head(architecture, data.shape, config.width)
        return build_decoder(architecture, data.shape, latent_dim, config.width)

    try:
        again = build_noise(description, make_network)
    except Exception as error:
        return f"cannot be built from its description() {description['arguments']}: {error}"

    expected, built = noise.state_dict(), again.state_dict()
    shapes = [{key: (v.shape, v.dtype) for key, v in state.items()} for state in (expected, built)]
    if shapes[0] != shapes[1]:
        differ = sorted(
            key for key in {*expected, *built} if shapes[0].get(key) != shapes[1].get(key)
        )
        return (
            "has other tensors than the model that is built from its description(): "
            f"{', '.join(differ)}. Register buffers in the constructor, with their shapes"
        )

    again.load_state_dict(expected)
    code = torch.linspace(-1, 1, 2 * latent_dim).reshape(2, latent_dim)
    if not torch.equal(noise(code), again(code)):
        return (
            "gives other variances after it was saved and loaded: keep everything that it learns "
            "in parameters and buffers"
        )
    return None


def _problem_of_tensors(module: nn.Module) -> str | None:
    """What keeps a module of a user's own from being trained and saved; None if all is well."""
    addresses = [tensor.data_ptr() for tensor in module.state_dict().values() if tensor.numel()]
    if len(set(addresses)) < len(addresses):
        return "has a tensor under two names, which no file can hold; keep one of the names"

    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            return f"has the parameter {name} of the type {parameter.dtype}; convert it by .float()"
    return None


def make_noise(data: Data, config: TrainConfig) -> NoiseModel:
    """Build the noise model of stage 1.

    Args:
        data: Data whose shape and rounding the model gets.
        config: Options ``noise``, ``noise_var`` and ``noise_update``.

    Returns:
        The noise model.
    """
    steps_per_epoch = math.ceil(len(data.train) / config.step_size(len(data.train)))
    if len(data.levels) == math.prod(data.shape):
        # Probabilities of categories have no noise variance.
        return FixedNoise(1.0)
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
        return max(1, min(16, _n_dimensions(data) // 2))
    return config.latent_dim


def _n_dimensions(data: Data) -> int:
    """Number of dimensions of an example; a category of L levels has L - 1."""
    return math.prod(data.shape) + sum(len(levels) - 2 for levels in data.levels.values())


def latent_dim_of_varying(data: Data) -> int | Literal["auto"]:
    """Choose the number of latent units of a table of which some columns are constant.

    They carry nothing that a code could say. Runs of earlier versions counted them, and go on so,
    which is why :func:`choose_latent_dim` does.

    Args:
        data: The data.

    Returns:
        d: half the number of dimensions that vary, at most 16. 'auto' where all of them do.
    """
    counted = counted_columns(data.train)
    if counted is None:
        return "auto"
    return max(1, min(16, (_n_dimensions(data) - int((~counted).sum())) // 2))


class StageTwo(NamedTuple):
    """How stage 2 predicts the variance: the options of these names, none of them null."""

    network: Literal["decoder", "head"]
    gradients: str
    likelihood: str
    floor: Floor
    recalibrate: str
    learning_rate: float


def choose_stage_two(model: VAE, config: TrainConfig) -> StageTwo:
    """Choose how stage 2 predicts the variance, by the data where an option is null.

    Args:
        model: The model, whose networks and data decide.
        config: Options ``stage_2_network``, ``stage_2_gradients``, ``stage_2_likelihood``,
            ``floor``, ``recalibrate`` and ``stage_2_learning_rate``.

    Returns:
        What stage 2 does.
    """
    is_table = len(model.shape) == 1
    is_digital = model.scaling.quantum is not None and not is_table
    if is_digital:
        chosen = StageTwo("head", "frozen", "digital", "quantisation", "monotone", 5e-3)
    else:
        chosen = StageTwo("decoder", "stop", "density", 0.1 if is_table else 1.0, "none", 1e-3)

    if config.stage_2_gradients == "joint":
        chosen = chosen._replace(likelihood="density")
    if config.recalibrate not in (None, "none", "monotone"):
        # These fit the std to residuals of levels, which a std below rounding does not describe.
        chosen = chosen._replace(likelihood="density")

    given: dict[str, Any] = {
        "network": config.stage_2_network,
        "gradients": config.stage_2_gradients,
        "likelihood": config.stage_2_likelihood,
        "floor": config.floor,
        "recalibrate": config.recalibrate,
    }
    chosen = chosen._replace(**{name: value for name, value in given.items() if value is not None})
    if model.architecture is None:
        chosen = chosen._replace(network="decoder")

    rate = config.stage_2_learning_rate
    if rate is None:
        rate = 5e-3 if chosen[:2] == ("head", "frozen") else 1e-3
    return chosen._replace(learning_rate=rate)


def make_objective(model: VAE, config: TrainConfig, stage: Stage) -> Objective:
    """Make what a stage descends.

    Args:
        model: The model to train. Methods differ in nothing but the objective.
        config: Options ``objective``, ``beta`` and ``penalty``, and those of stage 2.
        stage: Stage of Algorithm 1. Objectives other than the bound have the first only.

    Returns:
        The objective.
    """
    if stage is Stage.PREDICTED_VARIANCE:
        stage_two = choose_stage_two(model, config)
        levels = model.levels if stage_two.likelihood == "digital" else None
        if stage_two.gradients == "frozen":
            return FrozenMeanElbo(model, levels)
        if stage_two.gradients == "stop":
            return DetachedVarianceElbo(model, config.beta, levels)

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
        model: The model. Parameters that need no gradient are left out.
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
        if id(parameter) in own_ids or not parameter.requires_grad:
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

    if config.objective == "wae-mmd" and config.step_size(n_train) < 2:
        problems.append("objective=wae-mmd compares the codes of a batch: batch_size is at least 2")

    if data.levels and config.objective in ("sigma-vae", "wae-mmd", "rae-l2"):
        problems.append(
            f"objective={config.objective} knows squared errors alone, and the table has "
            "categories: take objective=elbo, or leave these columns out"
        )

    dimensions = _n_dimensions(data)
    latent_dim = choose_latent_dim(data, config)
    if dimensions == 1:
        problems.append(
            "the data have one dimension, or there is nothing to compress: give a table of two "
            "columns or more"
        )
    elif latent_dim >= dimensions:
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

    if config.stage_2_likelihood == "digital" and data.quantum is None:
        problems.append(
            "stage_2_likelihood=digital needs digital data such as 8-bit images; "
            "take stage_2_likelihood=density"
        )

    form = choose_form(config.noise_correlation, data.shape)
    problem = problem_of_form(form, data.shape)
    if problem:
        problems.append(problem)

    is_image = len(data.shape) > 1
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
