"""The protocol: every figure of a trained run on held-out data, into ``evaluation.json``, with its pictures."""

import datetime
import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from equipoise import plots
from equipoise.aggregate import ACTIVE_UNIT_VAR, GaussianMixture, LatentDistribution, StandardNormal
from equipoise.data import Batches, Data, ExampleSet, Stream, Subset, batches_of
from equipoise.estimate import Estimate
from equipoise.gaussian import Gaussian, standard_normal_log_prob
from equipoise.glossary import term
from equipoise.metrics.calibration import noise_calibration, varying_dimensions
from equipoise.metrics.features import FeatureExtractor, cached_features, features_of, load_features
from equipoise.metrics.latent import (
    code_log_likelihood,
    latent_plane,
    latent_units,
    single_gaussian,
)
from equipoise.metrics.likelihood import Likelihood, bits_per_dimension, iwae, likelihood
from equipoise.metrics.memorisation import as_vectors, memorisation
from equipoise.metrics.outliers import model_scores, outlier_detection, outlier_scores
from equipoise.metrics.samples import sample_quality
from equipoise.model import VAE, encode_all
from equipoise.noise import PredictedNoise
from equipoise.outputs import write_figures
from equipoise.provenance import versions
from equipoise.sources import check_source, code_source
from equipoise.store import StoreError, file_checksum, read_json, write_json
from equipoise.training.config import ConfigError
from equipoise.training.engine import choose_device
from equipoise.training.run import Run

SECTIONS = ("likelihood", "samples", "latent", "noise", "outliers")
PAPER_SAMPLES, PAPER_EXAMPLES = 20, 500
"""The protocol of the paper's Table 3: 20 importance samples on 500 test examples."""
BATCH = 500
SHOWN_IMAGES, SHOWN_CODES = 36, 1000
ROWS = ("real", "reconstruction", "prior", "gaussian", "mixture")
"""Of the table of samples: training data, decoded test data, and three sources of codes; more on demand."""
MAX_SHARED = 0.1
"""Share of the examples to judge by that may be in the training data, as duplicates are."""
COPIES_SOUGHT = 1000
"""Samples among which copies of the training data are sought."""
PLANE_POINTS, PLANE_EXAMPLES, VARYING_EXAMPLES = 96, 5000, 5000
SWEEP = np.geomspace(0.1, 10, 81)
"""Multiples of the optimal variance at which the closed-form curve is drawn."""

Progress = Callable[[str, int, int | None], None]


class Examples(NamedTuple):
    """Examples and what to call them.

    Args:
        name: in tables.
        raw: in the units of the run's own data.
    """

    name: str
    raw: Subset


def evaluate(
    run: Run,
    data: Data,
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
    progress: Progress = lambda label, done, total: None,
    on_section: Callable[[str, dict[str, Any]], None] = lambda name, section: None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a run by the fixed protocol, and write ``evaluation.json`` and its figures into the run folder.

    The file is written after each section, so that an interruption keeps what was done; sections of an earlier
    evaluation of the same model on the same examples are kept, too.

    Args:
        run: finished training.
        data: what it was trained on.
        test: other examples to judge it on; the data's own test part if None.
        against: examples of another kind, for the section ``outliers``.
        sections: some of :data:`SECTIONS`; if empty, all, ``outliers`` only with ``against``.
        sources: more densities of codes to judge in the sections ``samples`` and ``latent``, by the names of
            :func:`equipoise.sources.code_source`; what is not there yet is fitted.
        features: of the Fréchet distances, see :func:`equipoise.metrics.features.load_features`; 'auto' takes
            'efficientnet-lite0' for images and 'columns' for tables.
        n_samples: images in each row of the section ``samples``, or as many as there are test examples, or training
            examples at hand, if they are fewer.
        importance_samples: K of the importance-weighted bound over the whole test set.
        brief: of the likelihood, only what takes seconds: no importance-weighted bounds over the whole test set.
        seed: of all random draws; that of the run if None.
        model: the run's model, where it has networks of the user's own.
        download: fetch the weights of ``features="inception"`` if they are not there.
        progress: told of the position in each long part: label, done, total if known.
        on_section: told of each section when it is done: its name and JSON values.
        command: command line, kept in the file.

    Returns:
        What was written: JSON values. An estimate is ``{"value", "standard_error", "n"}``.

    Raises:
        ConfigError: if an argument is out of its domain.
        ImportError: if a source of codes needs a library that is missing.
    """
    config = run.config()
    test, seed = test or Examples("test", data.test), config.seed if seed is None else seed
    chosen = tuple(sections) or tuple(
        name for name in SECTIONS if name != "outliers" or against is not None
    )
    run.check_data(data)
    _refuse(chosen, sources, test, against, data, n_samples, importance_samples, seed)
    model = (model or run.model()).eval().cpu()
    for examples in filter(None, (test, against)):
        for first in range(0, len(examples.raw), BATCH):
            model.scaling.check(torch.from_numpy(examples.raw[first : first + BATCH]))
    place = run if test.raw is data.test else _Elsewhere(run, test.name)
    write_figures(run, data, model)
    device = choose_device(config)
    if model.architecture in ("conv", "residual"):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # faster
    model.to(device)
    judged = [
        name
        for name in dict.fromkeys(sources)
        if name not in ROWS and {"samples", "latent"} & set(chosen)
    ]
    evaluation = _Evaluation(
        run=run,
        data=data,
        model=model,
        mixture=run.mixture().to(device),
        more={
            name: code_source(
                run,
                model,
                name,
                lambda: data,
                lambda label, done, total, _: progress(f"Fitting {label}", done, total),
            )
            for name in judged
        },
        device=device,
        test=test,
        against=against,
        features=features,
        download=download,
        n_samples=min(n_samples, len(test.raw), len(data.train.at_hand)),
        importance_samples=0 if brief else importance_samples,
        seed=seed,
        progress=progress,
        figures=place.figures,
    )
    found = {"about": evaluation.about()}
    found = _kept(place.evaluation_file, found["about"]) or found
    for name in chosen:
        started = time.perf_counter()
        with torch.no_grad():
            found[name] = _as_json(getattr(evaluation, name)())
        found["about"]["sections"][name] = {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 1),
            "seed": seed,
            "command": list(command),
        }
        write_json(place.evaluation_file, found)
        on_section(name, found[name])
    return found


class _Elsewhere:
    """Where the evaluation on other examples goes, so that the run's own stays."""

    def __init__(self, run: Run, name: str) -> None:
        stem = re.sub(r"[^\w.-]+", "-", Path(name).name) or "other"
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
    """Everything that would fail later, or give figures that mean something else than they say."""
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
    least = {"samples": 4, "latent": 2, "outliers": 2, "likelihood": 2, "noise": 1}
    n = min(n_samples, len(test.raw))
    problems += [
        f"the section {name} needs at least {least[name]} examples and samples, there are {n}"
        for name in sections
        if n < least.get(name, 0)
    ]
    given = [examples for examples in (test, against) if examples and examples.raw is not data.test]
    pairs = [(examples, "the training data", data.train) for examples in given]
    pairs += [(against, "the run's own test data", data.test)] if against else []
    for examples, what, own in pairs:
        if (shared := _shared(examples.raw, own)) > MAX_SHARED:
            problems.append(
                f"{shared:.0%} of {examples.name!r} are in {what}: their figures would not be of new data. "
                "Leave it out to judge the run on its own test data"
            )
    if problems:
        raise ConfigError(problems)


def _shared(examples: Subset, others: ExampleSet) -> float:
    """Share of examples that are among others, value for value; in memory for the examples alone."""

    def hashes(part: ExampleSet) -> Iterator[int]:
        return (
            hash(row.numpy().tobytes())
            for batch in batches_of(part, BATCH).epoch()
            for row in batch
        )

    sought = list(hashes(examples))
    found = set(sought).intersection(hashes(others))
    return sum(each in found for each in sought) / len(sought)


def _kept(file: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier evaluation of the same model and mixture on the same examples; None if there is none to go on with."""
    try:
        before = read_json(file)
        same = all(before["about"][key] == about[key] for key in ("model", "mixture", "data"))
        # What is computed now has today's versions; each section keeps its own date and command.
        earlier = {
            name: before["about"].get(name, {}) | about[name] for name in ("sections", "sources")
        }
        return before | {"about": about | earlier} if same else None
    except (OSError, StoreError, KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """One model, one set of examples, one protocol: a method for each section, named as in the file."""

    run: Run
    data: Data
    model: VAE
    mixture: GaussianMixture
    more: dict[str, LatentDistribution]
    device: torch.device
    test: Examples
    against: Examples | None
    features: str | nn.Module
    download: bool
    n_samples: int
    importance_samples: int
    seed: int
    progress: Progress
    figures: Path
    found_features: dict[str, Tensor] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """What was evaluated, and with what."""
        return {
            "data": {
                "name": self.data.name,
                "fingerprint": self.data.fingerprint,
                "test": self.test.name,
                "test_sha256": self.test.raw.sha256(),
                "n_test": len(self.test.raw),
            },
            "model": file_checksum(self.run.model_file),
            "mixture": file_checksum(self.run.mixture_file),
            "n_components": self.mixture.n_components,
            "device": str(self.device),
            "versions": versions(),
            "sections": {},
            "sources": {
                name: {"n_components": density.n_components}
                if isinstance(density, GaussianMixture)
                else {}
                for name, density in self.more.items()
            },
        }

    def likelihood(self) -> dict[str, Any]:
        """Bounds on log p(x), raw and, of digital data, dequantised; with the prior and with the mixture as p(z)."""
        raw = likelihood(self.model, self._batches("ELBO", self.test.raw), self._generator("elbo"))
        found: dict[str, Any] = raw._asdict()
        found["noise_floor_var"] = found.pop("floor_var")
        log_priors = [standard_normal_log_prob, self.mixture.log_prob]
        first = self._batches("IWAE of the paper", self.test.raw.take(slice(PAPER_EXAMPLES)))
        paper = iwae(self.model, first, PAPER_SAMPLES, log_priors, self._generator("paper"))
        found |= _by_prior("iwae_20_first_500", paper[0])
        self._draw_variance_sweep(raw)
        K, quantum = self.importance_samples, self.model.scaling.quantum
        if K == 0:
            return found
        whole = self._batches(f"IWAE-{K}", self.test.raw)
        is_digital = quantum is not None
        bounds = iwae(
            self.model, whole, K, log_priors, self._generator("iwae"), dequantised=is_digital
        )
        found |= _by_prior(f"iwae_{K}", bounds[0])
        if quantum is not None:
            spread = _by_prior(f"iwae_{K}", bounds[1])
            bits = (
                bits_per_dimension(bound, math.prod(self.model.shape), quantum)
                for bound in spread.values()
            )
            found |= {
                "dequantised": spread,
                **dict(zip(("bits_per_dim", "bits_per_dim_mixture"), bits, strict=True)),
            }
        return found

    def _draw_variance_sweep(self, found: Likelihood) -> None:
        """ELBO of the networks as they are, eq. (9), for any one variance: highest at their squared error, eq. (10)."""
        D, mse = math.prod(self.model.shape), found.mse.value
        var = SWEEP * mse
        elbo = -D / 2 * (np.log(2 * math.pi * var) + mse / var) - found.kl.value
        noise = self.model.noise
        learned = (
            noise.reference_log_var.exp()
            if isinstance(noise, PredictedNoise)
            else torch.tensor(found.noise_var.value)
        )
        figure = plots.variance_sweep(
            var, {"ELBO with one variance, nats": {"test data": elbo}}, float(learned.mean())
        )
        plots.save(figure, self.figures / "variance-sweep.png")

    def samples(self) -> dict[str, Any]:
        """Fréchet and kernel distances of real training data, reconstructions and samples from the test data."""
        reference = self._features("test")
        found: dict[str, Any] = {
            "features": self.extractor.name,
            "feature_dimension": self.extractor.dimension,
            "reference": {"examples": self.test.name, "n": len(reference)},
        }
        rows = (*ROWS, *self.more)
        for done, row in enumerate(rows):
            features = self._features(row)
            self.progress(f"Distances of {row}", done, len(rows))
            quality = sample_quality(features, reference, self.seed)
            found[row] = {"frechet_distance": quality.frechet, "kernel_distance": quality.kernel}
        self.progress("Distances", len(rows), len(rows))
        if self.data.kind == "image":
            self._draw_samples()
        return found

    def _draw_samples(self) -> None:
        """Test data beside samples from the prior, from the mixture and from further sources."""
        shown = {
            "test data": torch.from_numpy(self._some(self.test.raw, SHOWN_IMAGES)[:]).to(
                self.device
            )
        }
        for row in ("prior", "mixture", *self.more):
            shown[term(row).title] = next(self._generated(row, SHOWN_IMAGES))
        sets = {title: self.model.scaling(raw).cpu().numpy() for title, raw in shown.items()}
        plots.save(plots.samples_compared(sets), self.figures / "samples-compared.png")

    def latent(self) -> dict[str, Any]:
        """What the codes are like, and whether the mixture copies training data."""
        posterior = encode_all(self.model, self._batches("Encoding test data", self.test.raw))
        units = latent_units(posterior)
        codes = posterior.sample(self._generator("codes"))
        found = {
            "kl_mixture_prior": self.mixture.kl_to_prior(generator=self._generator("kl")),
            "active_units": {
                "value": sum(unit.is_active for unit in units),
                "of": len(units),
                "threshold": ACTIVE_UNIT_VAR,
                "n": len(self.test.raw),
            },
            "rate_per_unit": [unit.rate for unit in units],
            **self._code_log_likelihood(codes),
            "memorisation": self._memorisation(),
        }
        if self.model.latent_dim > 1:
            plane = latent_plane(
                encode_all(
                    self.model,
                    self._batches(
                        "Encoding training data",
                        self._some(self.data.train.at_hand, PLANE_EXAMPLES),
                    ),
                ),
                self.mixture,
                self._generator("plane"),
                PLANE_POINTS,
            )
            kind = "unit" if self.model.latent_dim == 2 else "principal axis"
            figure = plots.latent_densities(
                plane.x,
                plane.y,
                {
                    "aggregate posterior": plane.aggregate_log_prob,
                    f"mixture of {self.mixture.n_components}": plane.mixture_log_prob,
                    "prior": plane.prior_log_prob,
                },
                plane.codes[:SHOWN_CODES],
                (f"latent {kind} 1", f"latent {kind} 2"),
            )
            plots.save(figure, self.figures / "latent.png")
        return found

    def _code_log_likelihood(self, codes: Tensor) -> dict[str, Any]:
        """Codes of the test data under each density, and the gain of further ones over the mixture, code by code."""
        found: dict[str, Any] = code_log_likelihood(codes, self.mixture)._asdict()
        log_probs = {name: source.log_prob(codes) for name, source in self.more.items()}
        found |= {name: Estimate.of_mean(log_prob) for name, log_prob in log_probs.items()}
        mixed = self.mixture.log_prob(codes)
        gains = {name: Estimate.of_mean(log_prob - mixed) for name, log_prob in log_probs.items()}
        return {"code_log_likelihood": found, **({"code_gain": gains} if gains else {})}

    def _memorisation(self) -> dict[str, Any]:
        """Distances between decoded means, in model units: there a copy is a copy, for blur is on either side.

        Of a stream, only the training examples at hand are compared with.
        """
        test, model, generator = (
            self._some(self.test.raw, COPIES_SOUGHT),
            self.model,
            self._generator("copies"),
        )
        training = (
            model.encode(model.scaling(x)).mean
            for x in self._batches("Decoding training data", self.data.train.at_hand)
        )
        # Drawn, not their means: codes of the mixture have the noise of the posteriors in them, too.
        unseen = encode_all(model, self._batches("Encoding test data", test)).sample(generator)
        judge = partial(
            memorisation,
            training=as_vectors(map(model.decode_mean, training)),
            test_reconstructions=as_vectors(map(model.decode_mean, torch.split(unseen, BATCH))),
            test=as_vectors(model.scaling(x) for x in self._batches("Test data", test)),
        )

        def samples(source: LatentDistribution, generator: torch.Generator) -> Tensor:
            return as_vectors([model.generate(COPIES_SOUGHT, source, generator).mean])

        found: dict[str, Any] = judge(samples(self.mixture, generator))._asdict()
        if isinstance(self.data.train, Stream):  # copies of the others are not found
            found["n_training"] = len(self.data.train.at_hand)
        for name, source in self.more.items():
            of_source = judge(samples(source, self._generator(f"copies {name}")))
            found[name] = {
                "samples": of_source.samples,
                "closer": of_source.closer,
                "copied": of_source.copied,
            }
        return found

    def noise(self) -> dict[str, Any]:
        """Whether the predicted std is the error that is found, over all dimensions and over those that vary."""
        varying = varying_dimensions(
            torch.from_numpy(self._some(self.data.train.at_hand, VARYING_EXAMPLES)[:])
        )
        found = noise_calibration(self.model, self._batches("Noise", self.test.raw), varying)
        parts = {"all": found.all_dimensions, "varying": found.varying_dimensions}
        series = {name: part for name, part in parts.items() if part is not None}
        curves = {
            f"{name} {'pixels' if self.data.kind == 'image' else 'columns'}": plots.NoiseCurves(
                part.reliability.predicted_std,
                part.reliability.observed_rmse,
                part.pit_histogram,
                np.array([part.coverage_1.value, part.coverage_2.value, part.coverage_3.value]),
                np.array([getattr(part, f"interval_coverage_{k}").value for k in (1, 2, 3)]),
            )
            for name, part in series.items()
        }
        plots.save(plots.reliability(curves), self.figures / "reliability.png")
        plots.save(
            plots.sparsification(
                *(found.varying_dimensions or found.all_dimensions).sparsification
            ),
            self.figures / "sparsification.png",
        )
        return {
            "varying_share": float(varying.float().mean()),
            **{name: part._asdict() for name, part in series.items()},
        }

    def outliers(self) -> dict[str, Any]:
        """How well examples of another kind are told from the test data."""
        if self.against is None:  # pragma: no cover (evaluate() has refused it)
            raise ConfigError(["the section outliers needs examples of another kind"])
        parts = {
            "Validation": self.data.validation,
            "Test": self.test.raw,
            "Other": self.against.raw,
        }
        scores = {
            name: model_scores(
                self.model,
                self.mixture,
                self._batches(f"{name} scores", raw),
                self._generator("scores"),
            )
            for name, raw in parts.items()
        }
        inliers, outliers = (
            outlier_scores(scores[name], scores["Validation"]) for name in ("Test", "Other")
        )
        plots.save(
            plots.outlier_scores(inliers.combined, outliers.combined, "combined score"),
            self.figures / "outliers.png",
        )
        sizes = {
            "against": self.against.name,
            "n_inliers": len(self.test.raw),
            "n_outliers": len(self.against.raw),
        }
        return sizes | outlier_detection(inliers, outliers)._asdict()

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """Features that samples are compared in."""
        default = "efficientnet-lite0" if self.data.kind == "image" else "columns"
        extractor = load_features(
            default if self.features == "auto" else self.features, self.data, download=self.download
        )
        extractor.module.to(self.device)
        return extractor

    def _features(self, row: str) -> Tensor:
        """Features of one row of the table of samples, or of the test data; computed once."""
        if row not in self.found_features:
            n, label = self.n_samples, f"Features of {row}"
            if row == "test":
                features = self._real_features(label, self._some(self.test.raw, n))
            elif row == "real":
                features = self._real_features(label, self._some(self.data.train.at_hand, n))
            else:
                images = (
                    self._reconstructed(n) if row == "reconstruction" else self._generated(row, n)
                )
                features = features_of(
                    self.extractor, self._track(label, images, math.ceil(n / BATCH))
                )
            self.found_features[row] = features.to(self.device)
        return self.found_features[row]

    def _real_features(self, label: str, raw: Subset) -> Tensor:
        return cached_features(self.extractor, raw, self._batches(label, raw))

    def _some(self, examples: Subset, n: int) -> Subset:
        """Some examples, drawn at random, for they may lie class by class; all of them if there are no more than n."""
        return examples.take(
            np.sort(np.random.RandomState(self.seed).permutation(len(examples))[:n])
        )

    def _reconstructed(self, n: int) -> Iterator[Tensor]:
        generator = self._generator("reconstruction")
        for raw in Batches(self._some(self.test.raw, n), BATCH, self.device).epoch():
            yield self._observed(self.model.reconstruct(self.model.scaling(raw)), generator)

    def _generated(self, row: str, n: int) -> Iterator[Tensor]:
        sources: dict[str, LatentDistribution] = {
            "prior": StandardNormal(self.model.latent_dim).to(self.device),
            "gaussian": single_gaussian(self.mixture),
            "mixture": self.mixture,
            **self.more,
        }
        generator = self._generator("samples")
        for first in range(0, n, BATCH):
            yield self._observed(
                self.model.generate(min(BATCH, n - first), sources[row], generator), generator
            )

    def _observed(self, likelihood: Gaussian, generator: torch.Generator) -> Tensor:
        """Decoded codes as the data would be: means of images, but tables with their noise, for means spread less."""
        x = likelihood.mean if self.data.kind == "image" else likelihood.sample(generator)
        return self.model.scaling.restore_levels(x)

    def _batches(self, label: str, raw: Subset) -> Iterator[Tensor]:
        batches = Batches(raw, BATCH, self.device)
        return self._track(label, batches.epoch(), len(batches))

    def _track(self, label: str, batches: Iterable[Tensor], total: int) -> Iterator[Tensor]:
        for done, batch in enumerate(batches):
            self.progress(label, done, total)
            yield batch
        self.progress(label, total, total)

    def _generator(self, part: str) -> torch.Generator:
        """A stream of its own for each part and seed: no figure depends on which others are computed."""
        mixed = hashlib.sha256(f"{self.seed} {part}".encode()).digest()[:8]
        return torch.Generator(self.device).manual_seed(int.from_bytes(mixed, "little"))


def _by_prior(name: str, bounds: Tensor) -> dict[str, Estimate]:
    return {
        f"{name}{suffix}": Estimate.of_mean(row)
        for suffix, row in zip(("", "_mixture"), bounds, strict=True)
    }


def _as_json(value: Any) -> Any:  # noqa: ANN401 (any record)
    """Records as dictionaries, arrays as lists."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
