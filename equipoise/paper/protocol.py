"""The paper's comparison: which methods, on which data, for how long; and how a model of it is trained and evaluated.

Methods differ in objective and variance alone. Networks, data, order of the examples, optimiser, rate and number of
epochs are those of the data set, the same for all.
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
    read_recipe,
    shipped_recipes,
)
from equipoise.data import Data, load
from equipoise.evaluation import evaluate
from equipoise.model import VAE
from equipoise.processes import choose_device
from equipoise.run import Run
from equipoise.store import read_json
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
"""Options of each method, over the recipe of its data set."""

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
        sets: stand-ins for the paper's data sets, by the paper's name; those missing are left out.
        epochs: of every method, by the paper's name of the data set. Those with two stages share them.
        components: K of table 4.
        codes: samples of the aggregate posterior that table 4 fits to, at most.
        mixture_iterations: of EM in table 4, at most.
    """

    sets: Mapping[str, str]
    epochs: Mapping[str, int]
    components: Sequence[int]
    codes: int
    mixture_iterations: int


SET_TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "celeba": "CelebA"}
_THREE = {name: name for name in SET_TITLES}
BUDGETS = {
    "tiny": Budget({"mnist": "digits"}, {"mnist": 4}, (2, 8), 2000, 10),
    "small": Budget(
        _THREE, dict.fromkeys(_THREE, 6), (32, 100, 500, 1000, 2000, 10_000), 20_000, 8
    ),
    "full": Budget(
        _THREE, dict.fromkeys(_THREE, 40), (32, 100, 500, 1000, 2000, 10_000), 50_000, 50
    ),
}
SHARE_OF_STAGE_1 = 0.7

SECTIONS = ("likelihood", "samples", "latent")
WITH_NOISE = (*SECTIONS, "noise")
FEATURES = "efficientnet-lite0"


@dataclass(frozen=True)
class Spec:
    """A model of the comparison.

    Args:
        data: the paper's name of the data set.
        method: one of :data:`METHODS`.
        options: more options, over those of the method.
        brief: leave out the importance-weighted bound over the whole test set, which costs the most.
        sections: of the evaluation that are needed.
        sources: more densities of codes to judge, see :func:`equipoise.sources.code_source`.
    """

    data: str
    method: str
    options: tuple[tuple[str, Any], ...] = ()
    brief: bool = False
    sections: tuple[str, ...] = SECTIONS
    sources: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return "-".join(
            [self.data, self.method, *(f"{key}={value}" for key, value in self.options)]
        )


def _silent(_: str) -> None:
    """Say nothing; a function that other processes can be handed."""


@dataclass(frozen=True)
class Lab:
    """Trains and evaluates what is missing, and hands out what is there.

    Args:
        budget: name of one of :data:`BUDGETS`.
        runs: folder of the run folders.
        data_dir: where to look for the data sets first.
        jobs: models that are trained at once, in processes of their own.
        epochs: of every method on every data set, in place of the budget's; None keeps those.
        seed: of all of them.
        features: that samples are compared in, see :func:`equipoise.metrics.features.load_features`.
        images: folder for figures.
        sinks: what takes in training figures, where one model is trained at a time.
        message: told in a sentence what happens.
    """

    budget: str
    runs: Path
    data_dir: str | None = None
    jobs: int = 1
    epochs: int | None = None
    seed: int = 0
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
        """The paper's names of the data sets at hand."""
        return tuple(self.size.sets)

    @property
    def device(self) -> torch.device:
        """Where models are evaluated."""
        return choose_device()

    def model(self, spec: Spec) -> VAE:
        """Load a model.

        Args:
            spec: one that was prepared.

        Returns:
            The model, in evaluation mode, on :attr:`device`.
        """
        return self.run(spec).model().to(self.device)

    def data(self, name: str) -> Data:
        """Load a data set, once.

        Args:
            name: the paper's name.

        Returns:
            The data.
        """
        if name not in self.loaded:
            self.loaded[name] = load(self.size.sets[name], data_dir=self.data_dir)
        return self.loaded[name]

    def config(self, spec: Spec) -> TrainConfig:
        """Options of a model: the recipe of its data set, the epochs of the budget, the method.

        Args:
            spec: the model.

        Returns:
            The configuration.
        """
        recipe = read_recipe(shipped_recipes()[self.size.sets[spec.data]])
        recipe.pop("data")
        epochs = self.epochs_of(spec.data)
        first = round(SHARE_OF_STAGE_1 * epochs) if spec.method in TWO_STAGES else epochs
        stages = {
            "stage_1_epochs": first,
            "stage_2_epochs": epochs - first,
            "tolerance": 0.0,
            "seed": self.seed,
        }
        return make_config(recipe | stages, METHODS[spec.method] | dict(spec.options))

    def epochs_of(self, data: str) -> int:
        """Epochs of every method on a data set.

        Args:
            data: the paper's name.

        Returns:
            Those of both stages together.
        """
        return self.epochs or self.size.epochs[data]

    def run(self, spec: Spec) -> Run:
        """The run folder of a model.

        Args:
            spec: the model.

        Returns:
            The run; it may not be there yet.
        """
        return Run(self.runs / self.budget / spec.name)

    def evaluation(self, spec: Spec) -> dict[str, Any]:
        """What the evaluation found.

        Args:
            spec: a model that was prepared.

        Returns:
            Content of its ``evaluation.json``.
        """
        found: dict[str, Any] = read_json(self.run(spec).evaluation_file)
        return found

    def prepare(self, specs: Iterable[Spec]) -> None:
        """Train and evaluate what is missing, resuming what was cut off.

        Args:
            specs: the models.

        Raises:
            ConfigError: if a run folder holds a model with other options.
        """
        wanted = _without_repeats(spec for spec in specs if spec.data in self.size.sets)
        # The longest first, so that none is left to run alone at the end.
        missing = sorted(
            (spec for spec in wanted if not self._is_done(spec)), key=self._steps, reverse=True
        )
        if self.jobs == 1 or len(missing) < 2:
            for number, spec in enumerate(missing, 1):
                self.message(f"Model {number} of {len(missing)}: {spec.name}")
                self._make(spec)
            return
        with ProcessPoolExecutor(
            min(self.jobs, len(missing)), mp_context=get_context("spawn")
        ) as pool:
            lab = replace(self, jobs=1, sinks=(), message=_silent, loaded={})
            futures = {pool.submit(_make_alone, lab, spec, self.jobs): spec for spec in missing}
            problems = []
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    name = f"Model {number} of {len(missing)}: {futures[future].name}"
                    if error := future.exception():  # the others go on
                        problems.append(f"{futures[future].name}: {error}")
                        self.message(f"{name} failed: {error}")
                    else:
                        self.message(f"{name}, {future.result():.0f} s")
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
            if problems:
                raise ConfigError(problems)

    def _steps(self, spec: Spec) -> int:
        config = self.config(spec)
        return (
            (config.stage_1_epochs + config.stage_2_epochs)
            * len(self.data(spec.data).train)
            // config.batch_size
        )

    def _is_done(self, spec: Spec) -> bool:
        run = self.run(spec)
        if not run.model_file.is_file() or not run.evaluation_file.is_file():
            return False
        self._check(run, spec)
        found = self.evaluation(spec)
        whole = (
            spec.brief
            or OBJECTIVES[self.config(spec).objective].is_deterministic
            or "iwae_20" in found.get("likelihood", {})
        )
        judged = all(source in found.get("samples", {}) for source in spec.sources)
        return whole and judged and all(section in found for section in spec.sections)

    def _check(self, run: Run, spec: Spec) -> None:
        was, wanted = run.config(), self.config(spec)
        if was != wanted:
            changed = [
                name for name, value in wanted.as_dict().items() if was.as_dict()[name] != value
            ]
            raise ConfigError(
                [
                    f"{run.folder} was made with other values of {', '.join(changed)}: remove it, or give another --runs"
                ]
            )

    def _make(self, spec: Spec) -> None:
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
            # Without a density, q(z|x) being a point, the bound tells nothing.
            brief=spec.brief or OBJECTIVES[config.objective].is_deterministic,
        )


def _without_repeats(specs: Iterable[Spec]) -> list[Spec]:
    """Each run once, with all that anyone needs of it."""
    found: dict[str, Spec] = {}
    for spec in specs:
        other = found.get(spec.name, spec)
        sources = tuple(dict.fromkeys(other.sources + spec.sources))
        sections = tuple(dict.fromkeys(other.sections + spec.sections))
        found[spec.name] = replace(
            spec, brief=spec.brief and other.brief, sections=sections, sources=sources
        )
    return list(found.values())


def _make_alone(lab: Lab, spec: Spec, jobs: int) -> float:
    """Make a model in a process of its own, with its share of the cores; return the seconds."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    torch.set_num_threads(threads)
    started = time.perf_counter()
    with threadpool_limits(threads):
        lab._make(spec)
    return time.perf_counter() - started
