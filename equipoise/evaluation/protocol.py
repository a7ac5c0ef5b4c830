"""The protocol: every figure of a trained run on held-out data, into ``evaluation.json``."""

import copy
import datetime
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from equipoise.aggregate import GaussianMixture, LatentDistribution
from equipoise.config import ConfigError
from equipoise.data import Data, ExampleSet, Subset, batches_of
from equipoise.evaluation.latent import latent_section
from equipoise.evaluation.likelihood import PAPER_SAMPLES, likelihood_section
from equipoise.evaluation.noise import noise_section
from equipoise.evaluation.outliers import outliers_section
from equipoise.evaluation.samples import ROWS, samples_section
from equipoise.evaluation.subject import BATCH, Examples, Progress, Subject
from equipoise.files import StoreError, is_ours, set_aside, write_json
from equipoise.metrics.features import FeatureExtractor, load_features
from equipoise.model import VAE
from equipoise.outputs import write_figures
from equipoise.processes import choose_device
from equipoise.provenance import versions
from equipoise.records import FORMAT
from equipoise.run import Run, read_evaluation
from equipoise.sources import check_source, code_source
from equipoise.store import read_digest


class Section(NamedTuple):
    """A part of the evaluation.

    Args:
        compute: Computes it, as records and JSON values, and draws its pictures.
        min_examples: Fewest examples and samples that it needs.
        needs_sources: Whether further sources of codes are judged in it.
        needs_features: Whether samples are compared in features.
    """

    compute: Callable[[Subject], dict[str, Any]]
    min_examples: int
    needs_sources: bool = False
    needs_features: bool = False


SECTIONS: dict[str, Section] = {
    "likelihood": Section(likelihood_section, min_examples=2),
    "samples": Section(samples_section, min_examples=4, needs_sources=True, needs_features=True),
    "latent": Section(latent_section, min_examples=2, needs_sources=True),
    "noise": Section(noise_section, min_examples=1),
    "outliers": Section(outliers_section, min_examples=2),
}
MAX_SHARED = 0.1
"""Share of the examples to judge by that may be in the training data, where duplicates are."""


def _report_nothing(label: str, done: int, total: int | None) -> None:
    """Take the progress of an evaluation, and show nothing."""


def _keep_silent(name: str, section: dict[str, Any]) -> None:
    """Take a section that is done, and show nothing."""


def evaluate(
    run: Run | str | Path,
    data: Data | None = None,
    *,
    test: Examples | None = None,
    against: Examples | None = None,
    sections: Sequence[str] = (),
    sources: Sequence[str] = (),
    features: str | nn.Module = "auto",
    n_samples: int = 10_000,
    importance_samples: int = PAPER_SAMPLES,
    brief: bool = False,
    seed: int | None = None,
    model: VAE | None = None,
    download: bool = False,
    progress: Progress = _report_nothing,
    on_section: Callable[[str, dict[str, Any]], None] = _keep_silent,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a run by the fixed protocol; write ``evaluation.json`` and figures into its folder.

    The file is written after each section, so that an interruption keeps the sections that were
    done. Sections of an earlier evaluation of the same model on the same examples are kept, too.

    Args:
        run: A run that has finished training, or its folder.
        data: The data that it was trained on. None loads them as they were loaded then.
        test: Other examples to judge it on. None takes the data's own test part.
        against: Examples of another kind, for the section ``outliers``.
        sections: Some of :data:`SECTIONS`. If empty, all; ``outliers`` only with ``against``.
        sources: More densities of codes to judge in the sections ``samples`` and ``latent``, by the
            names in :data:`equipoise.catalogue.SOURCES`. What is not there yet is fitted.
        features: Features of the Fréchet distances, see
            :func:`equipoise.metrics.features.load_features`. 'auto' takes 'efficientnet-lite0' for
            images and 'columns' for tables.
        n_samples: Images in each row of the section ``samples``. There are fewer if there are fewer
            test examples, or training examples at hand.
        importance_samples: K of the importance-weighted bound over the whole test set.
        brief: Compute only what takes seconds of the likelihood: no importance-weighted bounds over
            the whole test set.
        seed: Seed of all random draws. None takes that of the run.
        model: The run's model, where it has networks of your own. It is left as it is.
        download: Whether to fetch the weights of ``features="inception"`` if they are not there.
        progress: Called with the position in each long part: label, done, total if known.
        on_section: Called with each section when it is done: its name and JSON values.
        command: The command line, kept in the file.

    Returns:
        What was written, as JSON values. An estimate is ``{"value", "standard_error", "n"}``.

    Raises:
        ArithmeticError: if a figure is not finite, so that its section is not written.
        ConfigError: if an argument is out of its domain.
        ImportError: if a source of codes needs a library that is missing.
    """
    if not isinstance(run, Run):
        run = Run(run)
    if data is None:
        data = run.data()
    for name, examples in (("test", test), ("against", against)):
        if examples is not None and not isinstance(examples, Examples):
            raise ConfigError([f"{name} must be equipoise.Examples(name, data.test), or the like"])

    config = run.config()
    seed = config.seed if seed is None else seed
    test = test or Examples("test", data.test)
    chosen = tuple(sections)
    if not chosen:
        chosen = tuple(name for name in SECTIONS if name != "outliers" or against is not None)

    run.check_data(data)
    _refuse(chosen, sources, test, against, data, n_samples, importance_samples, seed)
    extractor: FeatureExtractor | None = None
    if any(SECTIONS[name].needs_features for name in chosen):
        # Before the other sections are computed, which take minutes.
        extractor = load_features(features, data, download=download)

    # A copy, so that the caller's model stays where it is and as it is.
    model = run.model() if model is None else copy.deepcopy(model).eval().cpu()
    _check_units(model, test, against)

    with run.exclusive("evaluation"):
        write_figures(run, data, model)

        device = choose_device(config.accelerator)
        model.place(device)
        place = run if test.raw is data.test else _Elsewhere(run, test.name)
        subject = Subject(
            data=data,
            model=model,
            mixture=run.mixture().to(device),
            sources=_find_sources(run, model, data, chosen, sources, progress),
            test=test,
            against=against,
            extractor=extractor,
            n_samples=min(n_samples, len(test.raw), len(data.train.at_hand)),
            importance_samples=0 if brief else importance_samples,
            seed=seed,
            device=device,
            figures=place.figures,
            progress=progress,
        )

        about = _about(run, subject)
        evaluation = _earlier(place.evaluation_file, about) or {"about": about}
        for name in chosen:
            started = time.perf_counter()
            with torch.no_grad():
                section = _as_json(SECTIONS[name].compute(subject))
            _check_finite(section, name)
            evaluation[name] = section

            evaluation["about"]["sections"][name] = {
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - started, 1),
                "seed": seed,
                "command": list(command),
            }
            write_json(place.evaluation_file, evaluation)
            on_section(name, evaluation[name])
        return evaluation


class _Elsewhere:
    """Where the evaluation on other examples goes, so that the run's own stays."""

    def __init__(self, run: Run, name: str) -> None:
        last = os.path.basename(os.path.abspath(name))  # of "..", too
        stem = re.sub(r"[^\w.-]+", "-", last) or "other"
        self.evaluation_file = run.folder / f"evaluation-{stem}.json"
        self.figures = run.figures / stem


def _refuse(
    sections: Sequence[str],
    sources: Sequence[str],
    test: Examples,
    against: Examples | None,
    data: Data,
    n_samples: int,
    importance_samples: int,
    seed: int,
) -> None:
    """Refuse what would fail later, or would give figures that mean something else."""
    problems = [
        f"there is no section {name!r}; choose from {', '.join(SECTIONS)}"
        for name in sections
        if name not in SECTIONS
    ]
    for name in sources:
        try:
            check_source(name)
        except ConfigError as error:
            problems += error.problems

    if "outliers" in sections and against is None:
        problems.append(
            "the section outliers needs examples of another kind: give --against OTHER_DATA"
        )
    if importance_samples < 1:
        problems.append(f"importance_samples must be at least 1, got {importance_samples}")
    if not 0 <= seed < 2**32:
        problems.append(f"the seed must be in 0..{2**32 - 1}, got {seed}")

    n = min(n_samples, len(test.raw))
    for name in sections:
        if name in SECTIONS and n < SECTIONS[name].min_examples:
            problems.append(
                f"the section {name} needs at least {SECTIONS[name].min_examples} examples "
                f"and samples, there are {n}"
            )

    problems += _problems_of_shared_examples(test, against, data)
    if problems:
        raise ConfigError(problems)


def _problems_of_shared_examples(test: Examples, against: Examples | None, data: Data) -> list[str]:
    """Find examples to judge by that are in the training data, or in the run's own test data."""
    pairs: list[tuple[Examples, str, ExampleSet]] = []
    if test.raw is not data.test:
        pairs.append((test, "the training data", data.train))
    if against is not None:
        if against.raw is not data.test:
            pairs.append((against, "the training data", data.train))
        pairs.append((against, "the run's own test data", data.test))

    problems = []
    for examples, what, others in pairs:
        share = _share_among(examples.raw, others)
        if share > MAX_SHARED:
            problems.append(
                f"{share:.0%} of {examples.name!r} are in {what}: their figures would not be of "
                "new data. Leave it out to judge the run on its own test data"
            )
    return problems


def _share_among(examples: Subset, others: ExampleSet) -> float:
    """Share of examples that are among others, value for value.

    The memory that it takes is that of the hashes of ``examples`` alone.
    """

    def hashes(part: ExampleSet) -> Iterator[int]:
        for batch in batches_of(part, BATCH).epoch():
            for row in batch:
                yield hash(row.numpy().tobytes())

    sought = list(hashes(examples))
    shared = set(sought).intersection(hashes(others))
    return sum(value in shared for value in sought) / len(sought)


def _check_units(model: VAE, test: Examples, against: Examples | None) -> None:
    """Refuse examples in another unit than the model's."""
    text = model.scaling.range_warning(torch.from_numpy(test.raw[:BATCH]))
    if text is not None:
        warnings.warn(f"{test.name}: {text}", stacklevel=3)
    for examples in filter(None, (test, against)):
        for first in range(0, len(examples.raw), BATCH):
            model.scaling.check(torch.from_numpy(examples.raw[first : first + BATCH]))


def _find_sources(
    run: Run,
    model: VAE,
    data: Data,
    sections: Sequence[str],
    names: Sequence[str],
    progress: Progress,
) -> dict[str, LatentDistribution]:
    """Find, or fit, the sources that are judged besides those that always are."""

    def report(label: str, done: int, total: int | None, text: str) -> None:
        progress(f"Fitting {label}", done, total)

    if not any(SECTIONS[section].needs_sources for section in sections):
        return {}
    return {
        name: code_source(run, model, name, lambda: data, report)
        for name in dict.fromkeys(names)
        if name not in ROWS
    }


def _about(run: Run, subject: Subject) -> dict[str, Any]:
    """Say what is evaluated, and with what."""
    sources: dict[str, Any] = {}
    for name, density in subject.sources.items():
        is_mixture = isinstance(density, GaussianMixture)
        sources[name] = {"n_components": density.n_components} if is_mixture else {}

    return {
        "format": FORMAT,
        "data": {
            "name": subject.data.name,
            "fingerprint": subject.data.fingerprint,
            "test": subject.test.name,
            "test_sha256": subject.test.raw.sha256(),
            "n_test": len(subject.test.raw),
        },
        "model": read_digest(run.model_file),
        "mixture": read_digest(run.mixture_file),
        "n_components": subject.mixture.n_components,
        "device": str(subject.device),
        "versions": versions(),
        "sections": {},
        "sources": sources,
    }


def _earlier(file: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Read an earlier evaluation of the same model, mixture and examples; None if there is none.

    A file that is damaged is kept under another name.
    """
    if not file.is_file():
        return None
    try:
        earlier = read_evaluation(file)
    except StoreError as error:
        if is_ours(file):
            warnings.warn(f"{error} It is kept as {set_aside(file)}.", stacklevel=3)
        return None

    if any(earlier["about"][key] != about[key] for key in ("model", "mixture", "data")):
        return None

    # What is computed now has today's versions; each section keeps its own date and command.
    merged = {name: earlier["about"][name] | about[name] for name in ("sections", "sources")}
    return {**earlier, "about": about | merged}


def _as_json(value: Any) -> Any:  # noqa: ANN401 (any record)
    """Turn records into dictionaries, and arrays into lists."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def _check_finite(value: Any, name: str) -> None:  # noqa: ANN401 (any JSON value)
    """Refuse figures that are NaN or infinite, which a file of JSON cannot hold."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_finite(part, f"{name}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ArithmeticError(
            f"{name} is {value}, so that its section is not written: the examples to judge by may "
            "have values far from those of the training data; the other sections can be computed "
            "by --sections"
        )
