"""The paper's comparison: its methods, data and epochs, and how a model of it is made.

Methods differ only in objective and variance. Networks, data, order of the examples, optimiser,
rate and number of epochs belong to the data set, and are the same for all methods.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from equipoise.catalogue import OBJECTIVES
from equipoise.config import (
    ConfigError,
    TrainConfig,
    make_config,
    read_papers_recipe,
)
from equipoise.data import Data, load
from equipoise.evaluation import evaluate
from equipoise.model import VAE
from equipoise.processes import choose_device
from equipoise.run import Run
from equipoise.training.job import train
from equipoise.training.logging import Sink

METHODS: dict[str, dict[str, Any]] = {
    "learned": {"stage_2_epochs": 0},
    "vae": {"objective": "vae"},
    "beta-vae": {"objective": "beta-vae"},
    "dip-vae": {"objective": "dip-vae-ii"},
    "wae": {"objective": "wae-mmd"},
    "dip-vae-i": {"objective": "dip-vae-i"},
    "sigma-vae": {"objective": "sigma-vae"},
    "gradient": {"stage_2_epochs": 0, "noise_update": "gradient"},
    "rae": {"objective": "rae-l2"},
    "fixed": {"noise": "fixed", "stage_2_epochs": 0},
    "pixel": {},
    "pixel-joint": {"stage_2_gradients": "joint"},
    "pixel-low": {"floor": "quantisation"},
}
"""The options of each method. They replace those in the recipe of its data set."""

PAPERS_STAGE_2: dict[str, Any] = {
    "floor": 1.0,
    "stage_2_network": "decoder",
    "stage_2_gradients": "stop",
    "stage_2_likelihood": "density",
    "recalibrate": "none",
    "stage_2_learning_rate": 1e-3,
}
"""A second decoder and a floor of sigma*^2, where a method does not say otherwise."""

TITLES = {
    "learned": "learned variance (ours)",
    "vae": "VAE, variance 0.5",
    "beta-vae": "beta-VAE, variance 1",
    "dip-vae": "DIP-VAE-II",
    "wae": "WAE-MMD",
    "dip-vae-i": "DIP-VAE-I",
    "sigma-vae": "sigma-VAE, variance per batch",
    "gradient": "variance learned by gradient",
    "rae": "RAE-L2, deterministic",
    "fixed": "fixed variance",
    "pixel": "variance per pixel (ours)",
    "pixel-joint": "variance per pixel, joint gradients (the paper's)",
    "pixel-low": "variance per pixel, floor of rounding",
}
PAPERS_FIVE = ("learned", "vae", "beta-vae", "dip-vae", "wae")
NEIGHBOURS = ("dip-vae-i", "sigma-vae", "gradient", "rae")
TWO_STAGES = ("pixel", "pixel-joint", "pixel-low")


@dataclass(frozen=True)
class Budget:
    """How much is trained.

    Args:
        sets: The data sets that stand for those of the paper, by the paper's name. Others of the
            paper are left out.
        epochs: The epochs of every method, by the paper's name of the data set. Methods with two
            stages share them among the stages.
        components: The numbers of components in table 4.
        codes: The largest number of samples of the aggregate posterior that table 4 fits to.
        mixture_iterations: The largest number of iterations of EM in table 4.
    """

    sets: Mapping[str, str]
    epochs: Mapping[str, int]
    components: Sequence[int]
    codes: int
    mixture_iterations: int


SET_TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "celeba": "CelebA"}
_THREE = {name: name for name in SET_TITLES}
_COMPONENTS = (32, 100, 500, 1000, 2000, 10_000)
BUDGETS = {
    "tiny": Budget({"mnist": "digits"}, {"mnist": 4}, (2, 8), 2000, 10),
    "small": Budget(_THREE, dict.fromkeys(_THREE, 6), _COMPONENTS, 20_000, 8),
    "full": Budget(_THREE, dict.fromkeys(_THREE, 40), _COMPONENTS, 50_000, 50),
}
SHARE_OF_STAGE_1 = 0.7
"""Share of the epochs in stage 1, for methods with two stages."""

SECTIONS = ("likelihood", "samples", "latent")
WITH_NOISE = (*SECTIONS, "noise")
FEATURES = "efficientnet-lite0"


@dataclass(frozen=True)
class Spec:
    """A model of the comparison.

    Args:
        data: The paper's name of the data set.
        method: The name of one of :data:`METHODS`.
        options: Further options, which replace those of the method.
        brief: Whether to leave out the importance-weighted bound over the whole test set, which
            costs the most.
        sections: The sections of the evaluation that are needed.
        sources: Further densities of codes to judge, see :func:`equipoise.sources.code_source`.
    """

    data: str
    method: str
    options: tuple[tuple[str, Any], ...] = ()
    brief: bool = False
    sections: tuple[str, ...] = SECTIONS
    sources: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the run folder."""
        options = [f"{key}={value}" for key, value in self.options]
        return "-".join([self.data, self.method, *options])


def _silent(_: str) -> None:
    """Say nothing. Unlike a lambda, this function can be sent to other processes."""


@dataclass(frozen=True)
class Lab:
    """Trains and evaluates the models that are missing, and gives access to all of them.

    Args:
        budget: The name of one of :data:`BUDGETS`.
        runs: The folder of the run folders.
        data_dir: Where to look for the data sets first.
        jobs: The number of models that are trained at once, each in a process of its own.
        epochs: The epochs of every method on every data set, instead of those of the budget. None
            means those of the budget.
        seeds: The seeds with which every model is trained. The items are computed for one of them
            at a time, see :meth:`of_seed`, and pictures of images are drawn for the first.
        features: The features that samples are compared in, see
            :func:`equipoise.metrics.features.load_features`.
        images: The folder of the figures.
        sinks: Where training figures go, if one model is trained at a time.
        message: Called with a sentence on what happens.
        loaded: The data sets that were loaded before, by the paper's name.
    """

    budget: str
    runs: Path
    data_dir: str | None = None
    jobs: int = 1
    epochs: int | None = None
    seeds: tuple[int, ...] = (0,)
    features: str = FEATURES
    images: Path = Path("docs/images/paper")
    sinks: tuple[Sink, ...] = ()
    message: Callable[[str], None] = _silent
    loaded: dict[str, Data] = field(default_factory=dict)

    @property
    def size(self) -> Budget:
        """The budget."""
        return BUDGETS[self.budget]

    @property
    def sets(self) -> tuple[str, ...]:
        """The paper's names of the data sets in the budget."""
        return tuple(self.size.sets)

    @property
    def seed(self) -> int:
        """The first seed."""
        return self.seeds[0]

    def of_seed(self, seed: int) -> "Lab":
        """The same comparison with one seed.

        Args:
            seed: The seed.

        Returns:
            The lab. It shares the data that are loaded.
        """
        return replace(self, seeds=(seed,))

    @property
    def device(self) -> torch.device:
        """The device on which models are evaluated."""
        return choose_device()

    def model(self, spec: Spec) -> VAE:
        """Load a model.

        Args:
            spec: A model that was prepared.

        Returns:
            The model, in evaluation mode, on :attr:`device`.
        """
        return self.run(spec).model().to(self.device)

    def data(self, name: str) -> Data:
        """Load a data set. It is read once, and then kept.

        Args:
            name: The paper's name of the data set.

        Returns:
            The data.
        """
        if name not in self.loaded:
            self.loaded[name] = load(self.size.sets[name], data_dir=self.data_dir)

        return self.loaded[name]

    def config(self, spec: Spec) -> TrainConfig:
        """Options of a model, from the recipe of its data set, the budget and the method.

        Args:
            spec: The model.

        Returns:
            The configuration.
        """
        recipe = read_papers_recipe(self.size.sets[spec.data])
        recipe.pop("data")

        epochs = self.epochs_of(spec.data)
        first = epochs
        if spec.method in TWO_STAGES:
            first = round(SHARE_OF_STAGE_1 * epochs)

        stages = {
            "stage_1_epochs": first,
            "stage_2_epochs": epochs - first,
            "tolerance": 0.0,
            **PAPERS_STAGE_2,
            # Eq. (10) as the paper has it.
            "variance_from": "training",
            "keep_weights": "last",
            "early_stopping": 0,
            "seed": self.seed,
        }
        return make_config(recipe | stages, METHODS[spec.method] | dict(spec.options))

    def epochs_of(self, data: str) -> int:
        """Number of epochs of every method on a data set.

        Args:
            data: The paper's name of the data set.

        Returns:
            The epochs of both stages together.
        """
        return self.epochs or self.size.epochs[data]

    def run(self, spec: Spec) -> Run:
        """The run folder of a model, trained with the first seed.

        Args:
            spec: The model.

        Returns:
            The run. It may not exist yet.
        """
        name = f"{spec.name}-seed={self.seed}" if self.seed else spec.name
        return Run(self.runs / self.budget / name)

    def evaluation(self, spec: Spec) -> dict[str, Any]:
        """The result of a model's evaluation.

        Args:
            spec: A model that was prepared.

        Returns:
            The content of its ``evaluation.json``.
        """
        return self.run(spec).evaluation()

    def prepare(self, specs: Iterable[Spec]) -> None:
        """Train and evaluate the models that are missing, and resume those that were interrupted.

        This is done seed by seed, so that an interruption leaves whole comparisons behind.

        Args:
            specs: The models.

        Raises:
            ConfigError: If a run folder holds a model with other options.
        """
        needed = _without_repeats(spec for spec in specs if spec.data in self.size.sets)
        labs = [self.of_seed(seed) for seed in self.seeds]
        missing = [(lab, spec) for lab in labs for spec in needed if not lab._is_done(spec)]
        # Of a seed the longest first, so that none is left to run alone at the end.
        missing.sort(key=lambda model: (self.seeds.index(model[0].seed), -self._steps(model[1])))

        if self.jobs == 1 or len(missing) < 2:
            for number, (lab, spec) in enumerate(missing, 1):
                self.message(f"Model {number} of {len(missing)}: {lab.run(spec).folder.name}")
                lab._make(spec)
        else:
            self._make_at_once(missing)

    def _make_at_once(self, models: "list[tuple[Lab, Spec]]") -> None:
        """Make models in several processes. If some fail, the others are still made."""
        n_processes = min(self.jobs, len(models))
        with ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as pool:
            futures = {}
            for lab, spec in models:
                alone = replace(lab, jobs=1, sinks=(), message=_silent, loaded={})
                future = pool.submit(_make_alone, alone, spec, self.jobs)
                futures[future] = lab.run(spec).folder.name

            problems = []
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    name, error = futures[future], future.exception()
                    title = f"Model {number} of {len(models)}: {name}"
                    if error:
                        problems.append(f"{name}: {error}")
                        self.message(f"{title} failed: {error}")
                    else:
                        self.message(f"{title}, {future.result():.0f} s")
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise

            if problems:
                raise ConfigError(problems)

    def _steps(self, spec: Spec) -> int:
        """Number of training steps of a model."""
        config = self.config(spec)
        epochs = config.stage_1_epochs + config.stage_2_epochs
        n = len(self.data(spec.data).train)
        return epochs * n // config.step_size(n)

    def _is_done(self, spec: Spec) -> bool:
        """Whether a model is trained, and evaluated as far as it is needed."""
        run = self.run(spec)
        if not run.model_file.is_file() or not run.evaluation_file.is_file():
            return False

        self._check(run, spec)

        evaluation = self.evaluation(spec)
        has_bound = "iwae_20" in evaluation.get("likelihood", {})
        has_sources = all(source in evaluation.get("samples", {}) for source in spec.sources)
        has_sections = all(section in evaluation for section in spec.sections)
        return (has_bound or self._is_brief(spec)) and has_sources and has_sections

    def _is_brief(self, spec: Spec) -> bool:
        """Whether the evaluation leaves the importance-weighted bound out.

        If q(z|x) is a point, it has no density, and the bound has no meaning.
        """
        return spec.brief or OBJECTIVES[self.config(spec).objective].is_deterministic

    def _check(self, run: Run, spec: Spec) -> None:
        """Raise an error if a run was made with other options than those of its model."""
        actual, expected = run.config().as_dict(), self.config(spec).as_dict()
        changed = [name for name, value in expected.items() if actual[name] != value]
        if changed:
            problem = (
                f"{run.folder} was made with other values of {', '.join(changed)}: "
                "remove it, or give another --runs"
            )
            raise ConfigError([problem])

    def _make(self, spec: Spec) -> None:
        """Train a model if needed, and evaluate it."""
        run, data, config = self.run(spec), self.data(spec.data), self.config(spec)
        if run.config_file.is_file():
            self._check(run, spec)

        if not run.model_file.is_file():
            train(
                data,
                config,
                run.folder,
                resume=run.config_file.is_file(),
                sinks=self.sinks,
                command=["equipoise", "paper"],
            )

        evaluate(
            run,
            data,
            sections=spec.sections,
            sources=spec.sources,
            features=self.features,
            brief=self._is_brief(spec),
        )


def _without_repeats(specs: Iterable[Spec]) -> list[Spec]:
    """Merge the specs of the same run into one, with everything that any of them needs."""
    merged: dict[str, Spec] = {}
    for spec in specs:
        other = merged.get(spec.name, spec)
        merged[spec.name] = replace(
            spec,
            brief=spec.brief and other.brief,
            sections=tuple(dict.fromkeys(other.sections + spec.sections)),
            sources=tuple(dict.fromkeys(other.sources + spec.sources)),
        )

    return list(merged.values())


def _make_alone(lab: Lab, spec: Spec, jobs: int) -> float:
    """Make a model in a process of its own, with its share of the cores; return the seconds."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    torch.set_num_threads(threads)

    started = time.perf_counter()
    with threadpool_limits(threads):
        lab._make(spec)

    return time.perf_counter() - started
