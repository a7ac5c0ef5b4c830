"""Table 4: how many components the mixture needs, and when more of them copy the training data."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from equipoise.aggregate import AggregatePosterior, GaussianMixture
from equipoise.data import Batches
from equipoise.gaussian import Gaussian
from equipoise.metrics.features import cached_features, features_of, load_features
from equipoise.metrics.memorisation import as_vectors, memorisation
from equipoise.metrics.samples import sample_quality
from equipoise.mixture_fit import fit_mixture
from equipoise.model import encode_all
from equipoise.paper.markdown import table
from equipoise.paper.protocol import Lab, Spec

TITLE = "Table 4: number of components of the mixture"
TEXT = (
    "The model with the learned variance. The mixtures are fitted to samples of q(z|x), several of each training "
    "image where more codes are wanted than there are images. *Held out* is the log-likelihood of codes of test "
    "images: where it falls, the mixture has learned the training codes by heart. *Copies* is the probability that a "
    "sample singles out one training image more than the reconstruction of a test image does (0.5: nothing is copied,"
    " 1: all is). The paper sees its distance fall with 10,000 components and suspects the same."
)
PAPER = {500: 79.9, 1000: 79.2, 2000: 78.4, 10_000: 73.1}
"""Inception distances of the paper's table 4, CelebA."""
BATCH, JUDGED = 500, 1000
FROM_RANDOM_CODES = 1000
"""K from which EM starts at random codes: k-means would take longer than all of EM."""


def spec_of(lab: Lab) -> Spec:
    """The model: CelebA's, or that of the last data set there is."""
    return Spec(lab.sets[-1], "learned", brief=True, sections=("likelihood",))


def specs(lab: Lab) -> list[Spec]:
    """The one model of the table."""
    return [spec_of(lab)]


@torch.no_grad()
def compute(lab: Lab) -> dict[str, Any]:
    """Fréchet distance, held-out likelihood and share of copies by number of components."""
    spec, size, device = spec_of(lab), lab.size, lab.device
    data, model = lab.data(spec.data), lab.model(spec)
    generator = torch.Generator(device).manual_seed(lab.seed)
    training, test = (
        encode_all(model, Batches(part.at_hand, BATCH, device).epoch())
        for part in (data.train, data.test)
    )
    repeats = -(-size.codes // len(data.train))
    drawn = Gaussian(training.mean.repeat(repeats, 1), training.log_var.repeat(repeats, 1)).sample(
        generator
    )
    codes, held_out = drawn[: size.codes], test.sample(generator)

    extractor = load_features(lab.features, data)
    extractor.module.to(device)
    n = min(10_000, len(data.test))
    some = data.test.take(slice(n))
    reference = cached_features(extractor, some, Batches(some, BATCH, device).epoch()).to(device)
    n_judged = min(JUDGED, n)
    training_images = as_vectors(map(model.decode_mean, torch.split(training.mean, BATCH)))
    unseen = as_vectors([model.decode_mean(held_out[:n_judged])])
    test_images = as_vectors([model.scaling(torch.from_numpy(data.test[:n_judged]).to(device))])

    rows: dict[str, Any] = {}
    for K in (K for K in size.components if len(codes) >= K):
        started = time.perf_counter()
        start = _at_random_codes(codes, K, generator) if K >= FROM_RANDOM_CODES else None
        fit = fit_mixture(
            codes, K, start=start, max_iter=size.mixture_iterations, generator=generator
        )
        rows[str(K)] = {
            "seconds": round(time.perf_counter() - started, 1),
            "components_floored": fit.n_floored,
        } | (_judge(model, fit.mixture, n, extractor, reference, held_out, generator))
        shown = as_vectors([model.generate(n_judged, fit.mixture, generator).mean])
        rows[str(K)]["copies"] = memorisation(
            shown, training_images, unseen, test_images
        ).closer._asdict()
    exact = AggregatePosterior(*training)
    rows["exact, one per image"] = _judge(
        model, exact, n, extractor, reference, held_out, generator
    )
    shown = as_vectors([model.generate(n_judged, exact, generator).mean])
    rows["exact, one per image"]["copies"] = memorisation(
        shown, training_images, unseen, test_images
    ).closer._asdict()
    return {
        "set": spec.data,
        "n_codes": len(codes),
        "n_images": len(data.train),
        "n_samples": n,
        "rows": rows,
    }


def _at_random_codes(codes: Tensor, K: int, generator: torch.Generator) -> GaussianMixture:
    """Mixture to start EM from: K of the codes, with a ball about as large as its share of the codes' volume."""
    rows = torch.randperm(len(codes), generator=generator, device=codes.device)[:K]
    covariance = codes.double().mT.cov() * K ** (-2 / codes.shape[1])
    weights = torch.full((K,), 1 / K, dtype=torch.float64, device=codes.device)
    return GaussianMixture(weights, codes[rows].double(), covariance.expand(K, -1, -1))


def _judge(
    model: Any,  # noqa: ANN401 (a VAE; the rest likewise)
    density: Any,  # noqa: ANN401
    n: int,
    extractor: Any,  # noqa: ANN401
    reference: Tensor,
    held_out: Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Distances of samples, and the log-likelihood of held-out codes."""

    def images() -> Iterator[Tensor]:
        for first in range(0, n, BATCH):
            yield model.scaling.restore_levels(
                model.generate(min(BATCH, n - first), density, generator).mean
            )

    quality = sample_quality(features_of(extractor, images()).to(reference.device), reference)
    log_prob = density.log_prob(held_out).double()
    return {
        "frechet_distance": quality.frechet._asdict(),
        "kernel_distance": quality.kernel._asdict(),
        "held_out_log_likelihood": {
            "value": float(log_prob.mean()),
            "standard_error": float(log_prob.std() / len(log_prob) ** 0.5),
            "n": len(log_prob),
        },
    }


def markdown(found: dict[str, Any]) -> str:
    """The table, with the paper's distances."""
    head = [
        "K",
        "Fréchet",
        "kernel distance",
        "held out, nats",
        "copies",
        "floored",
        "fit, s",
        "paper (Inception)",
    ]
    return table(
        head,
        [
            [
                K,
                row["frechet_distance"],
                row["kernel_distance"],
                row["held_out_log_likelihood"],
                row["copies"],
                row.get("components_floored"),
                row.get("seconds"),
                PAPER.get(int(K)) if K.isdigit() else None,
            ]
            for K, row in found["rows"].items()
        ],
    )
