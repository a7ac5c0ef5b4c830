"""Every option of a training run, its meaning, its default, and the contradictions that are refused.

One flat record is the Python signature, the recipe file and ``--set key=value`` at once. The string under each
field is its help.
"""

import ast
import difflib
import functools
import inspect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

import yaml

Objective = Literal[
    "elbo", "vae", "beta-vae", "dip-vae-i", "dip-vae-ii", "wae-mmd", "sigma-vae", "rae-l2"
]

_SQUARED_ERROR: dict[str, Any] = {"noise": "fixed", "noise_var": 0.5, "stage_2_epochs": 0}
OBJECTIVE_OPTIONS: dict[str, dict[str, Any]] = {
    "elbo": {},
    "vae": _SQUARED_ERROR,
    "beta-vae": _SQUARED_ERROR | {"noise_var": 1.0},
    "dip-vae-i": _SQUARED_ERROR,
    "dip-vae-ii": _SQUARED_ERROR,
    "wae-mmd": _SQUARED_ERROR,
    "sigma-vae": {"stage_2_epochs": 0},
    "rae-l2": _SQUARED_ERROR,
}
"""What each objective sets unless the user does: 'squared error + KL' is a variance of 0.5, the paper's beta-VAE one of
1."""
DETERMINISTIC = ("wae-mmd", "rae-l2")
"""Objectives whose encoder is no distribution."""
PLACEMENT = ("devices", "num_nodes")
"""Options that may change when a run is resumed: they say where it runs, not what it does."""
COUPLED = ("dip-vae-i", "dip-vae-ii", "wae-mmd", "sigma-vae")
"""Objectives with a term of a whole batch, which a process with a part of it cannot compute."""
PENALISED = ("dip-vae-i", "dip-vae-ii", "wae-mmd", "rae-l2")


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run."""

    latent_dim: int | Literal["auto"] = "auto"
    """Number of latent units d; 'auto' is 16, or half the data's dimensions if there are fewer than 32. Units that the
    data do not need switch themselves off."""
    architecture: Literal["auto", "mlp", "conv", "residual"] = "auto"
    """Networks: 'auto' takes 'conv' for images and 'mlp' for tables; 'residual' is slower and stronger."""
    width: int = 32
    """Size of the networks: channels of the first convolution, 1/8 of the units of a fully connected layer."""

    objective: Objective = "elbo"
    """What is trained: 'elbo' is the bound with whatever noise is chosen. The others are for comparison and set noise
    and stage_2_epochs as they need: 'vae' (variance 0.5), 'beta-vae' (variance 1, or another noise_var or beta),
    'dip-vae-i', 'dip-vae-ii', 'wae-mmd', 'sigma-vae' (the optimal variance of each batch), 'rae-l2' (a deterministic
    autoencoder)."""
    beta: float = 1.0
    """Weight of the KL in the loss of the bound; 1 is the bound itself, and beta-VAEs with a fixed variance take
    more."""
    penalty: float | None = None
    """Weight of what an objective adds to its loss: the covariance of dip-vae (null: 10), the distance of wae-mmd
    (200), the squared codes of rae-l2 (0.0001)."""
    noise: Literal["global", "channel", "dimension", "fixed"] = "global"
    """Noise variance of stage 1: one learned for all ('global'), one per channel, one per pixel or column
    ('dimension'), or 'fixed' at noise_var."""
    noise_var: float | None = None
    """The variance when noise=fixed, in squared model units (images are scaled to [0, 1]): 0.5 is the usual VAE."""
    noise_update: Literal["closed-form", "gradient"] = "closed-form"
    """How the learned variance of stage 1 moves: eq. (10), or by gradient."""
    floor: float | Literal["quantisation"] = 1.0
    """Smallest variance in stage 2: a multiple of stage 1's optimum (1.0 is the paper's), or 'quantisation', the
    variance of rounding to grey levels."""
    stage_2_gradients: Literal["stop", "joint"] = "stop"
    """Stage 2: 'stop' keeps the predicted variance from bending the mean; 'joint' trains all on eq. (11), as the
    paper does."""
    recalibrate: Literal["none", "scale", "dimension", "coverage"] = "none"
    """After stage 2, rescale the predicted std on the validation set: one scale or one per dimension of highest
    likelihood, or one that has .683 of the errors within one std ('coverage')."""

    stage_1_epochs: int = 10
    """Epoch limit of stage 1, one learned variance. From Python, 0 adds stage 2 to a model trained before."""
    stage_2_epochs: int = 5
    """Epoch limit of stage 2, a variance per pixel and input; 0 leaves it out."""
    tolerance: float = 1e-3
    """A stage has converged when noise variance and validation ELBO both change by less than this, relatively, ..."""
    patience: int = 3
    """... for this many epochs in a row. tolerance=0 always runs to the epoch limits."""

    batch_size: int = 256
    """Examples per step, over all processes."""
    learning_rate: float = 2e-3
    """Peak of the learning rate of stage 1: linear warm-up, cosine decay."""
    stage_2_learning_rate: float = 1e-3
    """The same for stage 2."""
    warm_up: float = 0.1
    """Share of a stage's steps over which the learning rate warms up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 3.0
    """Largest norm of the gradient, as a multiple of its average over the last 100 steps; 0 never clips."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, used in place of them at the end; 0 has none."""

    n_components: int | Literal["auto"] = "auto"
    """Components of the mixture that approximates the aggregate posterior; 'auto' chooses by held-out likelihood."""
    mixture_fit: Literal["em", "variational"] = "em"
    """Fit of the mixture: expectation maximisation, or variational Bayes (scikit-learn's, slower)."""
    mixture_from: Literal["samples", "moments"] = "samples"
    """Fit to samples of q(z|x), or to its exact second moments."""

    seed: int = 0
    """Seed of weights, order and noise: same seed, same machine, same result."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the networks; likelihoods and noise statistics stay in float32 and float64."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device: 'auto' takes a CUDA GPU where there is one."""
    devices: int | Literal["auto"] = 1
    """Processes on this machine, one per GPU, or per share of the CPU; each takes its part of every batch. 'auto' takes
    all GPUs."""
    num_nodes: int = 1
    """Machines with as many processes each; see the guide on scaling for how they find one another."""
    compile: bool = False
    """Compile the networks with torch.compile, which delays the start of each stage; on one GPU with CUDA graphs."""
    checkpoint_seconds: float = 0.0
    """In epochs longer than this, also write a checkpoint within the epoch every so many seconds; 0 writes one after
    each epoch only. SIGTERM brings one at once in any case."""
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Experiment tracker that takes the options and each epoch's figures, besides metrics.jsonl (needs the 'track'
    extra). All are local unless their own environment variables, such as WANDB_MODE=online, say otherwise."""

    image_size: int | None = None
    """Folders of images: centre-crop to a square and resize to this many pixels a side."""
    channels: Literal["grey", "rgb"] | None = None
    """Folders of images: convert to grey or RGB; otherwise as they are."""
    test_fraction: float = 0.1
    """Share of the examples held out as test set where the data bring none."""
    validation_fraction: float = 0.1
    """Share of the training examples held out to decide on stages, K and calibration; at most 2,000 examples."""

    def problems(self) -> list[str]:
        """Everything that is out of its domain or contradicts something else.

        Returns:
            One sentence each, with what to do; empty if all is well.
        """
        found = [
            f"{name} must be {type_name(name)}, got {value!r}"
            for name in TrainConfig.__annotations__
            if isinstance(value := getattr(self, name), str) and value not in _literals(name)
        ]
        found += [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in _AT_LEAST.items()
            if (value := getattr(self, name)) is not None
            and not isinstance(value, str)
            and value < least
        ]
        found += [
            f"{name} must be above 0, got {getattr(self, name)}"
            for name in (
                "learning_rate",
                "stage_2_learning_rate",
                "floor",
                "noise_var",
                "beta",
                "penalty",
            )
            if isinstance(getattr(self, name), int | float) and not getattr(self, name) > 0
        ]
        found += [
            f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
            for name in ("warm_up", "ema_decay")
            if not 0 <= getattr(self, name) < 1
        ]
        found += [
            f"{name} must be above 0 and below 1, got {getattr(self, name)}"
            for name in ("test_fraction", "validation_fraction")
            if not 0 < getattr(self, name) < 1
        ]
        if self.stage_1_epochs == 0 and self.stage_2_epochs == 0:
            found.append("stage_1_epochs and stage_2_epochs cannot both be 0")
        if 0 < self.clip <= 1:
            found.append(
                f"clip={self.clip:g} would shrink every gradient: give a multiple above 1, or 0"
            )
        if self.noise == "fixed" and self.noise_var is None:
            found.append(
                "noise=fixed needs noise_var (0.5 is the usual VAE, 1 the paper's beta-VAE)"
            )
        if self.noise != "fixed" and self.noise_var is not None:
            found.append(
                f"noise_var={self.noise_var:g} needs noise=fixed; noise={self.noise} learns its variance"
            )
        if self.noise == "fixed" and self.stage_2_epochs > 0:
            found.append(
                "noise=fixed has no learned variance to hand to stage 2; set stage_2_epochs=0"
            )
        found += self._problems_of_objective()
        if isinstance(self.devices, int) and self.devices > 0:
            found += self.problems_of_sharing(self.devices * self.num_nodes)
        if self.recalibrate != "none" and self.stage_2_epochs == 0:
            found.append(
                f"recalibrate={self.recalibrate} rescales the variance of stage 2, but stage_2_epochs=0"
            )
        return found

    def problems_of_sharing(self, processes: int) -> list[str]:
        """What keeps a batch from being divided among processes.

        Args:
            processes: how many.

        Returns:
            One sentence each, with what to do; empty if all is well.
        """
        found = []
        if processes > 1 and self.objective in COUPLED:
            found.append(
                f"objective={self.objective} needs whole batches; train it in one process (devices=1)"
            )
        if processes > 0 and self.batch_size % processes:
            found.append(
                f"batch_size={self.batch_size} must be a multiple of the {processes} processes"
            )
        return found

    def _problems_of_objective(self) -> list[str]:
        objective, found = self.objective, []
        if objective != "elbo" and self.stage_2_epochs > 0:
            found.append(f"objective={objective} has no stage 2; set stage_2_epochs=0")
        if "noise" in OBJECTIVE_OPTIONS.get(objective, {}) and self.noise != "fixed":
            found.append(
                f"objective={objective} is one with a fixed variance; leave noise out, or take objective=elbo"
            )
        if objective == "sigma-vae" and (self.noise, self.noise_update) != (
            "global",
            "closed-form",
        ):
            found.append(
                "objective=sigma-vae has one variance, optimal for each batch; leave noise and noise_update out"
            )
        if objective not in ("elbo", "vae", "beta-vae") and self.beta != 1:
            found.append(f"objective={objective} has no beta; beta goes with elbo and beta-vae")
        if self.penalty is not None and objective not in PENALISED:
            found.append(
                f"penalty={self.penalty:g} goes with {', '.join(PENALISED)}; objective={objective} has none"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """All options as JSON values.

        Returns:
            By field name.
        """
        return asdict(self)


_AT_LEAST: dict[str, float] = {
    "latent_dim": 1,
    "width": 1,
    "stage_1_epochs": 0,
    "stage_2_epochs": 0,
    "tolerance": 0,
    "patience": 1,
    "batch_size": 1,
    "weight_decay": 0,
    "clip": 0,
    "n_components": 1,
    "seed": 0,
    "devices": 1,
    "num_nodes": 1,
    "checkpoint_seconds": 0,
    "image_size": 8,
}


class ConfigError(ValueError):
    """All problems of a configuration in one message."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        one = len(self.problems) == 1
        super().__init__(
            self.problems[0] if one else "several problems:\n  - " + "\n  - ".join(self.problems)
        )


def make_config(values: Mapping[str, Any], over: Mapping[str, Any] | None = None) -> TrainConfig:
    """Make a configuration from names and values, which may be the strings of a command line.

    Args:
        values: by option name, such as a recipe's.
        over: more of them, which win; an objective among these brings what it needs, see :data:`OBJECTIVE_OPTIONS`.

    Returns:
        The configuration.

    Raises:
        ConfigError: with every unknown name, every value of the wrong type and every contradiction.

    Example:
        >>> make_config({"latent_dim": "8", "floor": "quantisation"}).latent_dim
        8
        >>> make_config({"stage_2_epochs": 5}, {"objective": "dip-vae-ii"}).stage_2_epochs
        0
    """
    from jsonargparse import ArgumentError, ArgumentParser

    over = over or {}
    # An objective named on top of a recipe brings its options over the recipe's; in one mapping all given stays.
    of_recipe, of_user = (
        OBJECTIVE_OPTIONS.get(str(given.get("objective")), {}) for given in (values, over)
    )
    values = {**of_recipe, **values, **of_user, **over}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    known = {field.name for field in fields(TrainConfig)}
    problems, parsed = [], {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            problems.append(
                f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else "")
            )
            continue
        try:
            parsed[name] = getattr(parser.parse_object({name: value}), name)
        except ArgumentError:
            problems.append(f"{name} must be {type_name(name)}, got {value!r}")
    try:
        config = TrainConfig(**parsed)
    except TypeError as error:  # pragma: no cover (names were checked above)
        raise ConfigError([str(error)]) from error
    problems += config.problems()
    if problems:
        raise ConfigError(problems)
    return config


def type_name(option: str) -> str:
    """Type of an option as a user would write it.

    Args:
        option: field name.

    Returns:
        For instance "a number or 'quantisation'".
    """
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    annotation = TrainConfig.__annotations__[option]

    def describe(part: Any) -> list[str]:  # noqa: ANN401 (a typing construct)
        if part in names:
            return [names[part]]
        nested = getattr(part, "__args__", ())
        if getattr(part, "__origin__", None) is Literal:
            return [repr(value) for value in nested]
        return [text for inner in nested for text in describe(inner)]

    return " or ".join(describe(annotation))


def _literals(option: str) -> set[object]:
    """Strings that an option may be."""
    parts = [TrainConfig.__annotations__[option]]
    return {
        value
        for part in (*parts, *get_args(parts[0]))
        if get_origin(part) is Literal
        for value in get_args(part)
    }


@functools.cache
def _option_texts() -> dict[str, str]:
    """Strings under the fields of :class:`TrainConfig`, by field name."""
    body = ast.parse(inspect.getsource(TrainConfig)).body[0]
    texts = {}
    for field, text in itertools.pairwise(cast(ast.ClassDef, body).body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            texts[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(text.value)).split())
    return texts


def option_help(option: str) -> str:
    """What an option means.

    Args:
        option: field name.

    Returns:
        The string under the field.
    """
    return _option_texts()[option]


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe: YAML with option names as keys, and optionally ``data``.

    Args:
        path: the file, or the name of a recipe that comes with the package, such as "mnist".

    Returns:
        Values by name, not yet checked.

    Raises:
        ConfigError: if there is no such file, or it is not a mapping.
    """
    if not path.is_file():
        raise ConfigError(
            [
                f"there is no recipe {path}; those that come with equipoise are {', '.join(shipped_recipes())}"
            ]
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError([f"recipe {path} is not valid YAML: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"recipe {path} must be a mapping of options, such as 'latent_dim: 16'"])
    return values


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name.

    Returns:
        Name, such as "mnist", to file.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return {}
