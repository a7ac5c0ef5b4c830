"""Every option of a training run: its meaning, its default, and what contradicts it.

One flat record is the Python signature, the recipe file and ``--set key=value`` at once. The string
under each field is its help.
"""

import ast
import difflib
import functools
import inspect
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

import msgspec
import yaml

from equipoise.catalogue import ARCHITECTURES, NOISES, OBJECTIVES
from equipoise.text import parse_size

PLACEMENT = ("devices", "num_nodes", "threads", "cuda_graphs")
"""Options that may change when a run is resumed: they say where it runs, not what it does."""

CONTINUED = ("stage_1_epochs", "stage_2_epochs")
"""Options that may change when a finished run is resumed: it goes on for more epochs."""

MACHINE = (*PLACEMENT, "accelerator", "compile", "deterministic", "tracker", "checkpoint_seconds")
"""Options that say where and how a run is computed, and not what comes out."""

EARLIER_VALUES: dict[str, Any] = {
    "variance_from": "training",
    "stage_2_network": "decoder",
    "stage_2_likelihood": "density",
    "noise_correlation": "none",
    "keep_weights": "last",
    "early_stopping": 0,
    "deterministic": False,
    "power_transform": False,
    "label_dropout": 0.1,
}
"""Values that options had in effect before there were such options, for runs of that time."""

AUTO_STEPS, AUTO_SIZES = 32, (16, 256)
"""Steps of an epoch that batch_size=auto makes at least, and the sizes that it chooses from."""

MAX_RECIPE_BYTES = 100_000
"""Longest recipe that is read."""

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": tuple(OBJECTIVES),
    "noise": tuple(NOISES),
    "architecture": ("auto", *ARCHITECTURES),
}
"""Options whose values are the rows of a table in ``catalogue.py``."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run."""

    latent_dim: int | Literal["auto"] = "auto"
    """Number of latent units d. 'auto' is 16, or half the data's dimensions if there are fewer than
    32, of which constant columns of a table do not count. Units that the data do not need switch
    themselves off."""
    architecture: str = "auto"
    """Networks. 'auto' takes 'conv' for images and 'mlp' for tables."""
    width: int = 32
    """Size of the networks: the channels of the first convolution, or an eighth of the units of a
    fully connected layer."""

    objective: str = "elbo"
    """What training descends. Objectives other than 'elbo' are for comparison. Recipes, --set and
    equipoise.make_config() set noise and stage_2_epochs as they need them."""
    beta: float = 1.0
    """Weight of the KL in the loss. The bound has 1. A beta-VAE with a fixed variance has more."""
    penalty: float | None = None
    """Weight of what an objective adds to its loss. null takes the objective's own default."""
    noise: str = "global"
    """Noise variance of stage 1."""
    noise_var: float | None = None
    """The variance when noise=fixed, in squared model units. Images are scaled to [0, 1], where the
    usual VAE has 0.5."""
    noise_update: Literal["closed-form", "gradient"] = "closed-form"
    """How the learned variance of stage 1 moves: by eq. (10), or by gradient."""
    variance_from: Literal["held-out", "training"] = "held-out"
    """Whose residuals the learned variance is the mean square of, eq. (10). Those of the training
    examples, as in the paper, shrink as the networks learn them by heart. 'held-out' takes those of
    the validation set at the end of a stage. Within an epoch it multiplies those of the training by
    the ratio of the two after the epoch before."""
    floor: float | Literal["quantisation"] | None = None
    """Smallest variance in stage 2. A number is a multiple of stage 1's optimum. 'quantisation' is
    the variance of rounding to grey levels. null takes 'quantisation' for digital images, as those
    of 8 bits, 1.0 for others, which is the paper's choice, and 0.1 for tables."""
    stage_2_gradients: Literal["stop", "frozen", "joint"] | None = None
    """Gradients in stage 2. 'stop' trains the mean on as in stage 1, and keeps the predicted
    variance from bending it. 'frozen' trains the variance only, so that the mean stays the same to
    the bit. 'joint' trains everything on eq. (11), as the paper does. null takes 'frozen' for
    digital images, and otherwise 'stop'."""
    stage_2_network: Literal["decoder", "head"] | None = None
    """What predicts the variance in stage 2: a second decoder, or a small head on the features that
    the decoder has before its last layer. Networks of your own have a second decoder. null takes
    'head' for digital images, and otherwise 'decoder'."""
    stage_2_likelihood: Literal["density", "digital"] | None = None
    """What the predicted variance of stage 2 descends: minus the log-density of eq. (11), or, for
    digital data such as 8-bit images, minus the log-probability of the levels, with which the floor
    may be far below rounding, as floor=1e-6. The mean keeps descending stage 1's density. null
    takes 'digital' for digital images unless stage_2_gradients=joint."""
    recalibrate: Literal["none", "monotone", "scale", "dimension", "coverage"] | None = None
    """How the predicted std is calibrated on the validation set after stage 2: by an increasing map
    from the std to the error that was found ('monotone'), by the one factor of highest likelihood
    ('scale'), by one per dimension ('dimension'), or by the factor with which .683 of all errors
    lie within one std ('coverage'), which is for data without bounds: most errors of images are
    those of backgrounds. null takes 'monotone' for digital images, and otherwise 'none'."""
    power_transform: bool = False
    """Make skewed columns of a table symmetric by a power transform, where held-out values become
    more likely by it. Densities of rows, and evaluations, contain its slope, and so do the
    figures that are shown during training, so that they compare with those of a model without."""
    noise_correlation: Literal["none", "full", "low-rank", "bands", "auto"] | None = None
    """Correlation of the errors, estimated on the validation set when training has ended: any
    matrix ('full', up to 2048 dimensions), common factors ('low-rank'), or a variance per band of
    frequencies and colour axis ('bands', for images). 'auto' takes the form of highest held-out
    likelihood, and none where it gains nothing beyond its error. null takes 'auto' for tables, and
    'none' for images, whose grey levels have an exact probability without. Training never uses
    it."""

    label_dropout: float = 0.1
    """For data with labels: share of the examples of a batch whose label is withheld, so that the
    model also describes examples without one. 0 never withholds one."""

    stage_1_epochs: int = 10
    """Epoch limit of stage 1, which learns one variance. From Python, 0 adds stage 2 to a model
    that was trained before."""
    stage_2_epochs: int = 5
    """Epoch limit of stage 2, which predicts a variance per pixel and input. 0 leaves it out."""
    tolerance: float = 1e-3
    """Relative change below which a figure counts as settled. A stage has converged when its noise
    variance and its validation ELBO are both settled. 0 never calls it converged."""
    patience: int = 3
    """Number of epochs in a row for which both figures must be settled."""
    keep_weights: Literal["best", "last"] = "best"
    """Which weights a stage ends with: those of the epoch with the highest validation ELBO if that
    exceeds the last epoch's by more than the standard error of the difference, or always those of
    the last epoch. The variance of eq. (10) and the mixture are fitted to them. Neither this nor
    early_stopping applies where stage 2 descends something else (stage_2_likelihood=digital)."""
    early_stopping: int | None = None
    """Number of epochs without a higher validation ELBO after which a stage ends. 0 never ends it
    so. null takes a third of the stage's epoch limit, and at least 10."""

    batch_size: int | Literal["auto"] = "auto"
    """Examples per step, over all processes together. 'auto' takes so many that an epoch has at
    least 32 steps, as a power of two from 16 to 256."""
    learning_rate: float = 2e-3
    """Peak of the learning rate of stage 1. It warms up linearly and decays as a cosine."""
    stage_2_learning_rate: float | None = None
    """Peak of the learning rate of stage 2. null takes 5e-3 for a head on networks that stand
    still, and otherwise 1e-3."""
    warm_up: float = 0.1
    """Share of a stage's steps over which the learning rate warms up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 3.0
    """Largest norm of the gradient, as a multiple of its average over the last 100 steps. 0 never
    clips."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, which replaces them at the
    end of a stage. 0 keeps no average."""

    n_components: int | Literal["auto"] = "auto"
    """Components of the mixture that approximates the aggregate posterior. 'auto' chooses their
    number by held-out likelihood."""
    mixture_fit: Literal["em", "variational"] = "em"
    """How the mixture is fitted: by expectation maximisation, or by scikit-learn's variational
    Bayes, which is slower."""
    mixture_from: Literal["samples", "moments"] = "samples"
    """What the mixture is fitted to: samples of q(z|x), or its exact second moments."""

    seed: int = 0
    """Seed of weights, order and noise. The same seed on the same machine gives the same result."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the networks. Likelihoods and noise statistics stay in float32 and float64."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. 'auto' takes a CUDA GPU where there is one."""
    devices: int | Literal["auto"] = 1
    """Processes on this machine, one per GPU, or per share of the CPU. Each takes its part of every
    batch. 'auto' takes all GPUs."""
    threads: int | None = None
    """Threads with which each process computes on the CPU. null takes OMP_NUM_THREADS where it is
    set, and otherwise one thread where a step is so small that several would wait for each other,
    and all threads where it is not. A run that goes on keeps its number, to the last bit."""
    num_nodes: int = 1
    """Number of machines. Each runs the same number of processes. The guide on scaling says how
    they find one another."""
    compile: bool = False
    """Compile the networks with torch.compile, which delays the start of each stage."""
    cuda_graphs: bool | None = None
    """Replay each training step as one CUDA graph, on one GPU, which computes the same. By default
    (null) it is done unless networks or noise model are your own, whose Python would be left
    out."""
    deterministic: bool = False
    """On a GPU, ask cuDNN for kernels that add in the same order each time, so that a run and its
    repetition, or its resumption, do not differ in the last digits. On CPUs they never do."""
    checkpoint_seconds: float = 0.0
    """Seconds between checkpoints within an epoch that takes longer than this. 0 writes one after
    each epoch only. SIGTERM writes one at once in any case."""
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Experiment tracker that takes the options and each epoch's figures, beside metrics.jsonl. It
    needs the extra 'track'. Trackers stay local unless their own environment variables, such as
    WANDB_MODE=online, say otherwise."""

    image_size: int | str | None = None
    """For folders of images: resize them to this many pixels a side, or to WIDTHxHEIGHT pixels as
    in 64x48."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How images of other proportions get the size: 'crop' cuts out the centre, 'pad' adds black
    bars, and 'stretch' distorts them."""
    channels: Literal["grey", "rgb"] | None = None
    """For folders of images: convert them to grey or RGB. null keeps them as they are."""
    pages: Literal["examples", "channels", "first"] | None = None
    """What becomes of image files of several pages, such as TIFF and GIF: each page is an example,
    the pages of a file are the channels of one example, or only the first is read. null takes
    'examples'."""
    test_fraction: float = 0.1
    """Share of the examples held out as the test set where the data bring none."""
    validation_fraction: float = 0.1
    """Share of the training examples held out to decide on stages, K and calibration. At most 2,000
    examples are held out."""

    def __post_init__(self) -> None:
        """Turn NumPy's numbers, such as the seeds of a sweep, into Python's, which JSON knows."""
        for name in TrainConfig.__annotations__:
            value = getattr(self, name)
            if type(value).__module__ == "numpy" and hasattr(value, "item"):
                object.__setattr__(self, name, value.item())

    def problems(self) -> list[str]:
        """Find every value that is of another type, out of its domain, or contradicts another.

        Returns:
            One sentence for each, with what to do. Empty if all is well.
        """
        problems_of_types = self._problems_of_types()
        if problems_of_types:
            return problems_of_types

        return [
            *self._problems_of_values(),
            *self._problems_of_stages(),
            *self._problems_of_objective(),
            *self._problems_of_processes(),
        ]

    def problems_of_sharing(self, processes: int) -> list[str]:
        """Find what keeps a batch from being divided among processes.

        Args:
            processes: Number of processes.

        Returns:
            One sentence for each problem, with what to do. Empty if all is well.
        """
        if processes > 0 and self.batch_size != "auto" and self.batch_size % processes:
            return [f"batch_size={self.batch_size} must be a multiple of the {processes} processes"]
        return []

    def step_size(self, n: int, processes: int = 1) -> int:
        """Choose the number of examples per step.

        Args:
            n: Number of training examples.
            processes: Number of processes that share a batch.

        Returns:
            ``batch_size``. Where it is 'auto', the largest power of two with which an epoch has at
            least 32 steps, from 16 to 256, or the next multiple of the number of processes.

        Example:
            >>> [TrainConfig().step_size(n) for n in (100, 1620, 60_000)]
            [16, 32, 256]
        """
        if self.batch_size != "auto":
            return self.batch_size
        fewest, most = AUTO_SIZES
        size = 1 << max(0, (n // AUTO_STEPS).bit_length() - 1)
        return -(-min(max(size, fewest), most) // processes) * processes

    def as_dict(self) -> dict[str, Any]:
        """Return all options as JSON values.

        Returns:
            Values by field name.
        """
        return asdict(self)

    def _problems_of_types(self) -> list[str]:
        """Find values of another type than that of their option."""
        problems = []
        for name, annotation in TrainConfig.__annotations__.items():
            value = getattr(self, name)
            try:
                msgspec.convert(value, annotation)
            except msgspec.ValidationError:
                is_wrong = True
            else:
                # A whole number of type float would not be read back from the run's file.
                types = (annotation, *get_args(annotation))
                is_wrong = isinstance(value, float) and float not in types

            if is_wrong:
                problems.append(f"{name} must be {type_name(name)}, got {value!r}")
        return problems

    def _problems_of_values(self) -> list[str]:
        """Find values that are out of their own domain."""
        problems = []

        for name in TrainConfig.__annotations__:
            value = getattr(self, name)
            if (
                isinstance(value, str)
                and name != "image_size"
                and value not in _possible_strings(name)
            ):
                problems.append(f"{name} must be {type_name(name)}, got {_shown(value)}")

        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and value < least:
                problems.append(f"{name} must be at least {least}, got {_shown(value)}")

        for name in TrainConfig.__annotations__:
            value, most = getattr(self, name), _AT_MOST.get(name, LARGEST)
            if isinstance(value, int) and value > most:
                problems.append(f"{name} must be at most {most}, got {_shown(value)}")
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{name} must be a finite number, got {value}")

        if isinstance(self.image_size, str):
            problems += _problems_of_size(self.image_size)

        for name in _POSITIVE:
            value = getattr(self, name)
            # Not the same as value <= 0: NaN is refused, too.
            if isinstance(value, int | float) and not value > 0:
                problems.append(f"{name} must be above 0, got {_shown(value)}")

        for name in ("warm_up", "ema_decay", "label_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                problems.append(f"{name} must be at least 0 and below 1, got {value}")

        for name in ("test_fraction", "validation_fraction"):
            value = getattr(self, name)
            if not 0 < value < 1:
                problems.append(f"{name} must be above 0 and below 1, got {value}")

        if 0 < self.clip <= 1:
            problems.append(
                f"clip={self.clip:g} would shrink every gradient: give a multiple above 1, or 0"
            )
        return problems

    def _problems_of_stages(self) -> list[str]:
        """Find contradictions between noise, variance and the two stages."""
        problems = []

        if self.stage_1_epochs == 0 and self.stage_2_epochs == 0:
            problems.append("stage_1_epochs and stage_2_epochs cannot both be 0")

        if self.noise == "fixed" and self.noise_var is None:
            problems.append(
                "noise=fixed needs noise_var (0.5 is the usual VAE, 1 the paper's beta-VAE)"
            )
        if self.noise != "fixed" and self.noise_var is not None:
            problems.append(
                f"noise_var={self.noise_var:g} needs noise=fixed; "
                f"noise={self.noise} learns its variance"
            )
        if self.noise == "fixed" and self.stage_2_epochs > 0:
            problems.append(
                "noise=fixed has no learned variance to hand to stage 2; set stage_2_epochs=0"
            )

        if self.stage_2_likelihood == "digital":
            if self.stage_2_epochs == 0:
                problems.append(
                    "stage_2_likelihood=digital is for the variance of stage 2, "
                    "but stage_2_epochs=0"
                )
            if self.stage_2_gradients == "joint":
                problems.append(
                    "stage_2_likelihood=digital trains the predicted variance alone; "
                    "set stage_2_gradients=stop or frozen"
                )
            if self.recalibrate not in (None, "none", "monotone"):
                problems.append(
                    f"recalibrate={self.recalibrate} fits the std to residuals of levels, which a "
                    "std below rounding does not describe; leave it out with "
                    "stage_2_likelihood=digital"
                )

        if self.recalibrate not in (None, "none") and self.stage_2_epochs == 0:
            problems.append(
                f"recalibrate={self.recalibrate} rescales the variance of stage 2, "
                "but stage_2_epochs=0"
            )
        return problems

    def _problems_of_objective(self) -> list[str]:
        """Find options that the objective does not have, or cannot have at this value."""
        name = self.objective
        if name not in OBJECTIVES:
            return []
        objective = OBJECTIVES[name]
        problems = []

        if "stage_2_epochs" in objective.requires and self.stage_2_epochs > 0:
            problems.append(f"objective={name} has no stage 2; set stage_2_epochs=0")

        for option, value in objective.requires.items():
            if option != "stage_2_epochs" and getattr(self, option) != value:
                problems.append(
                    f"objective={name} goes with {option}={value}, not {getattr(self, option)}; "
                    f"set that, or leave {option} to equipoise.make_config, or take objective=elbo"
                )

        if self.beta != 1 and not objective.has_beta:
            with_beta = [row for row in OBJECTIVES if OBJECTIVES[row].has_beta]
            problems.append(f"objective={name} has no beta; beta goes with {', '.join(with_beta)}")

        if self.penalty is not None and objective.penalty is None:
            with_penalty = [row for row in OBJECTIVES if OBJECTIVES[row].penalty is not None]
            problems.append(
                f"penalty={self.penalty:g} goes with {', '.join(with_penalty)}; "
                f"objective={name} has none"
            )
        return problems

    def _problems_of_processes(self) -> list[str]:
        """Find what keeps a batch from being divided among the processes that are asked for."""
        size = 1 if self.batch_size == "auto" else self.batch_size
        numbers = (self.devices, self.num_nodes, size)
        if not all(isinstance(number, int) and 1 <= number <= LARGEST for number in numbers):
            return []
        return self.problems_of_sharing(int(self.devices) * self.num_nodes)


def _problems_of_size(image_size: str) -> list[str]:
    """Find what is wrong with the two sides of images."""
    try:
        sides = parse_size(image_size)
    except ValueError as error:
        return [str(error)]
    least, most = int(_AT_LEAST["image_size"]), _AT_MOST["image_size"]
    if not least <= min(sides) <= max(sides) <= most:
        return [f"image_size must be from {least} to {most} pixels a side, got {image_size}"]
    return []


_AT_LEAST: dict[str, float] = {
    "latent_dim": 1,
    "width": 1,
    "stage_1_epochs": 0,
    "stage_2_epochs": 0,
    "tolerance": 0,
    "patience": 1,
    "early_stopping": 0,
    "batch_size": 1,
    "weight_decay": 0,
    "clip": 0,
    "n_components": 1,
    "seed": 0,
    "devices": 1,
    "threads": 1,
    "num_nodes": 1,
    "checkpoint_seconds": 0,
    "image_size": 8,
}
LARGEST = 2**53
"""Largest whole number of an option, as in the JSON of a run."""
# A covariance has latent_dim^2 values, the largest layer 128 width^2: both stay below 10^9.
_AT_MOST: dict[str, int] = {
    "latent_dim": 10_000,
    "width": 2048,
    "stage_1_epochs": 1_000_000,
    "stage_2_epochs": 1_000_000,
    "patience": 1_000_000,
    "early_stopping": 1_000_000,
    "batch_size": 10_000_000,
    "n_components": 1_000_000,
    "seed": 2**32 - 1,
    "devices": 1024,
    "threads": 1024,
    "num_nodes": 4096,
    "image_size": 4096,
}
_POSITIVE = ("learning_rate", "stage_2_learning_rate", "floor", "noise_var", "beta", "penalty")


LISTED, LONGEST = 20, 250
"""Number of problems that an error lists, and the longest of them in characters."""
VALUE_LENGTH = 80
"""Characters of a wrong value that an error shows."""


def _shown(value: object) -> str:
    """Write a wrong value, or its beginning if it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # of nested lists, and of numbers with too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= VALUE_LENGTH else f"{text[:VALUE_LENGTH]}..."


class ConfigError(ValueError):
    """All problems of a configuration in one message.

    Args:
        problems: One sentence for each.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)

        shown = [problem[:LONGEST] for problem in self.problems[:LISTED]]
        if len(self.problems) > LISTED:
            shown.append(f"and {len(self.problems) - LISTED} more")

        message = shown[0]
        if len(shown) > 1:
            message = "several problems:\n  - " + "\n  - ".join(shown)
        super().__init__(message)


def make_config(values: Mapping[str, Any], over: Mapping[str, Any] | None = None) -> TrainConfig:
    """Make a configuration from names and values, which may be the strings of a command line.

    An objective brings the options that it needs, see :data:`equipoise.catalogue.OBJECTIVES`. One
    that is named in ``over`` brings them over ``values``, and one in ``values`` beneath them.

    Args:
        values: Values by option name, such as those of a recipe.
        over: Values by option name that win over ``values``, such as those of a user.

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
    from jsonargparse import ArgumentError

    over = over or {}
    values = {**_options_of_objective(values), **values, **_options_of_objective(over), **over}

    parser = _parser()
    names = {field.name for field in fields(TrainConfig)}

    problems, accepted = [], {}
    for name, value in values.items():
        if name not in names:
            close = difflib.get_close_matches(str(name)[:VALUE_LENGTH], names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"unknown option {str(name)[:VALUE_LENGTH]}{hint}")
            continue

        # No option takes more; the parser of YAML, which reads strings, dies of deep nesting.
        is_long = isinstance(value, str) and len(value) > VALUE_LENGTH
        if is_long or isinstance(value, Mapping | list | tuple | set):
            problems.append(f"{name} must be {type_name(name)}, got {_shown(value)}")
            continue

        accepted[name] = value

    try:
        parsed = _parsed(parser, accepted)
    except (ArgumentError, OverflowError):
        # One by one, which takes longer, to find all that are wrong.
        parsed = {}
        for name, value in accepted.items():
            try:
                parsed |= _parsed(parser, {name: value})
            except (ArgumentError, OverflowError):
                problems.append(f"{name} must be {type_name(name)}, got {_shown(value)}")

    config = TrainConfig(**parsed)
    problems += config.problems()
    if problems:
        raise ConfigError(problems)
    return config


@functools.cache
def _parser() -> Any:  # noqa: ANN401 (a type of jsonargparse, which is imported when it is needed)
    """Make the parser of all options."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    return parser


def _parsed(parser: Any, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 (see _parser)
    """Convert values to the types of their options."""
    found = parser.parse_object(values)
    return {name: getattr(found, name) for name in values}


def _options_of_objective(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options that the objective among ``values`` sets; none if there is no such objective."""
    objective = OBJECTIVES.get(str(values.get("objective")))
    return objective.options if objective else {}


def type_name(option: str) -> str:
    """Write the type of an option as a user would.

    Args:
        option: Field name.

    Returns:
        For instance "a number or 'quantisation'".
    """
    if option in CHOICES:
        return " or ".join(repr(choice) for choice in CHOICES[option])

    names = {
        int: "a whole number",
        float: "a number",
        str: "WIDTHxHEIGHT",
        bool: "true or false",
        type(None): "null",
    }

    def describe(part: Any) -> list[str]:  # noqa: ANN401 (a typing construct)
        if part in names:
            return [names[part]]
        if get_origin(part) is Literal:
            return [repr(value) for value in get_args(part)]
        return [text for inner in get_args(part) for text in describe(inner)]

    return " or ".join(describe(TrainConfig.__annotations__[option]))


def _possible_strings(option: str) -> set[object]:
    """Strings that an option may be."""
    if option in CHOICES:
        return set(CHOICES[option])

    annotation = TrainConfig.__annotations__[option]
    strings: set[object] = set()
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal:
            strings.update(get_args(part))
    return strings


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
    """Explain an option.

    Args:
        option: Field name.

    Returns:
        The string under the field, and what each choice is where a table has them.
    """
    text = _option_texts()[option]

    tables: dict[str, Mapping[str, Any]] = {
        "objective": OBJECTIVES,
        "noise": NOISES,
        "architecture": ARCHITECTURES,
    }
    for name, choice in tables.get(option, {}).items():
        text += f" {name!r}: {choice.summary}."

    if option == "penalty":
        for name, objective in OBJECTIVES.items():
            if objective.penalty is not None:
                text += f" {name}: {objective.penalty:g}."
    return text


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe: YAML with option names as keys, and optionally ``data``.

    Args:
        path: The file, or the name of a recipe that comes with the package, such as "mnist".

    Returns:
        Values by name, not yet checked.

    Raises:
        ConfigError: if there is no such file, or it is not a mapping.
    """
    if not path.is_file():
        raise ConfigError(
            [
                f"there is no recipe {path}; "
                f"those that come with equipoise are {', '.join(shipped_recipes())}"
            ]
        )
    # Not by the size that the system tells, which is 0 for some files that never end.
    with path.open("rb") as file:
        content = file.read(MAX_RECIPE_BYTES + 1)
    if len(content) > MAX_RECIPE_BYTES:
        raise ConfigError(
            [f"recipe {path} is longer than the {MAX_RECIPE_BYTES:,} bytes that are read"]
        )

    try:
        text = content.decode("utf-8")
        values = yaml.load(text, _RecipeLoader)  # noqa: S506 (a SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError([f"recipe {path} is not UTF-8 text: {error}"]) from error
    except Exception as error:  # values of impossible dates and tags raise nearly anything
        reason = str(error) or type(error).__name__
        raise ConfigError([f"recipe {path} is not valid YAML: {reason}"]) from error

    if not isinstance(values, dict):
        raise ConfigError([f"recipe {path} must be a mapping of options, such as 'latent_dim: 16'"])

    problems = []
    for name, value in values.items():
        if name == "data" and not isinstance(value, str):
            expected = "a name or a path"
        elif name != "data" and not isinstance(value, bool | int | float | str | None):
            expected = "a number, a word or null"
        else:
            continue
        problems.append(f"recipe {path}: {_shown(name)} must be {expected}, got {_shown(value)}")
    problems += [
        f"recipe {path}: the names of options are words, got {_shown(name)}"
        for name in values
        if not isinstance(name, str)
    ]
    if problems:
        raise ConfigError(problems)
    return values


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which each value stands where it is meant, and each key once.

    By aliases, a short text may stand for a very long one. Of two values of one key, YAML would
    take the last without a word.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 (as in its base)
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError("anchors (&name) and aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ANN401
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.YAMLError(f"{_shown(key.value)} stands there more than once")
                names.add(key.value)

        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values


def shipped_recipes() -> dict[str, Path]:
    """Find the recipes that come with the package.

    Returns:
        Name, such as "mnist", to file.
    """
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return {}


def read_papers_recipe(name: str) -> dict[str, Any]:
    """Read the recipe of a data set with the paper's sizes, which comparisons are made with.

    Args:
        name: Name of the data set.

    Returns:
        The options of the recipe ``NAME-paper``, or of NAME where there is one recipe only.
    """
    recipes = shipped_recipes()
    return read_recipe(recipes.get(f"{name}-paper", recipes[name]))
