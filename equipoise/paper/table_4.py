"""Table 4: how many components the mixture needs, and when they copy the training data."""

import math
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
from equipoise.paper.markdown import Better, cell, table
from equipoise.paper.protocol import Lab, Spec
from equipoise.randomness import stream

TITLE = "Table 4: number of components of the mixture"
TEXT = (
    "The model with the learned variance. The mixtures are fitted to samples of q(z|x), several of "
    "each training image if there are fewer images than codes. *Held out* is the log-likelihood of "
    "codes of test images: where it falls, the mixture has memorised the training codes. *Copies* "
    "is the probability that a sample singles out one training image more than the reconstruction "
    "of a test image does (0.5: nothing is copied, 1: everything is). In the paper the distance "
    "falls with 10,000 components, and the authors suspect copies too."
)
PAPER = {500: 79.9, 1000: 79.2, 2000: 78.4, 10_000: 73.1}
"""Inception distances in the paper's table 4, on CelebA."""
BETTER: Better = {"Fréchet": "lower", "kernel distance": "lower", "held out, nats": "higher"}
EXACT = "exact, one per image"
"""The row of the aggregate posterior itself, which copies every image and is not compared."""
BATCH, JUDGED = 500, 1000
"""Images in a batch, and samples that are searched for copies."""
FROM_RANDOM_CODES = 1000
"""Number of components from which EM starts at random codes.

With so many, k-means would take longer than all of EM.
"""


def spec_of(lab: Lab) -> Spec:
    """The model of the table: that of the last data set, which is CelebA if it is available."""
    return Spec(lab.sets[-1], "learned", brief=True, sections=("likelihood",))


def specs(lab: Lab) -> list[Spec]:
    """The one model of the table."""
    return [spec_of(lab)]


@torch.no_grad()
def compute(lab: Lab) -> dict[str, Any]:
    """Compute distance, held-out likelihood and copies by number of components."""
    spec, size, device = spec_of(lab), lab.size, lab.device
    data, model = lab.data(spec.data), lab.model(spec)
    generator = stream(lab.seed, "table_4", device=device)

    # Codes to fit to, and codes of test images.
    training, test = (
        encode_all(model, Batches(part.at_hand, BATCH, device).epoch())
        for part in (data.train, data.test)
    )
    repeats = math.ceil(size.codes / len(data.train))
    repeated = Gaussian(training.mean.repeat(repeats, 1), training.log_var.repeat(repeats, 1))
    codes = repeated.sample(generator)[: size.codes]
    held_out = test.sample(generator)

    # Features of test images, for the distances.
    extractor = load_features(lab.features, data)
    extractor.module.to(device)
    n = min(10_000, len(data.test))
    references = data.test.take(slice(n))
    batches = Batches(references, BATCH, device).epoch()
    reference = cached_features(extractor, references, batches).to(device)

    # Images to compare samples with, in the search for copies.
    n_judged = min(JUDGED, n)
    training_images = as_vectors(map(model.decode_mean, torch.split(training.mean, BATCH)))
    unseen = as_vectors([model.decode_mean(held_out[:n_judged])])
    test_images = as_vectors([model.scaling(torch.from_numpy(data.test[:n_judged]).to(device))])

    def judge(density: Any) -> dict[str, Any]:  # noqa: ANN401 (a density of codes)
        figures = _judge(model, density, n, extractor, reference, held_out, generator)
        samples = as_vectors([model.generate(n_judged, density, generator).mean])
        copies = memorisation(samples, training_images, unseen, test_images).closer
        return figures | {"copies": copies._asdict()}

    rows: dict[str, Any] = {}
    for K in size.components:
        if len(codes) < K:
            continue

        started = time.perf_counter()
        start = _at_random_codes(codes, K, generator) if K >= FROM_RANDOM_CODES else None
        fit = fit_mixture(
            codes, K, start=start, max_iter=size.mixture_iterations, generator=generator
        )
        seconds = round(time.perf_counter() - started, 1)

        about = {"seconds": seconds, "components_floored": fit.n_floored}
        rows[str(K)] = about | judge(fit.mixture)

    rows[EXACT] = judge(AggregatePosterior(*training))

    return {
        "set": spec.data,
        "n_codes": len(codes),
        "n_images": len(data.train),
        "n_samples": n,
        "rows": rows,
    }


def _at_random_codes(codes: Tensor, K: int, generator: torch.Generator) -> GaussianMixture:
    """Make a mixture to start EM from, whose K means are random codes.

    The volume of each component is about its share of the volume of all codes.
    """
    rows = torch.randperm(len(codes), generator=generator, device=codes.device)[:K]
    covariance = codes.double().mT.cov() * K ** (-2 / codes.shape[1])
    weights = torch.full((K,), 1 / K, dtype=torch.float64, device=codes.device)
    return GaussianMixture(weights, codes[rows].double(), covariance.expand(K, -1, -1))


def _judge(
    model: Any,  # noqa: ANN401 (a VAE)
    density: Any,  # noqa: ANN401 (a density of codes)
    n: int,
    extractor: Any,  # noqa: ANN401 (a network of features)
    reference: Tensor,
    held_out: Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Compute distances of samples, and the log-likelihood of held-out codes."""

    def images() -> Iterator[Tensor]:
        for first in range(0, n, BATCH):
            samples = model.generate(min(BATCH, n - first), density, generator)
            yield model.scaling.restore_levels(samples.mean)

    features = features_of(extractor, images()).to(reference.device)
    quality = sample_quality(features, reference)
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


def markdown(content: dict[str, Any]) -> str:
    """Make the table, with the paper's distances."""
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
    lines = []
    for K, row in content["rows"].items():
        judged = [
            row[name] for name in ("frechet_distance", "kernel_distance", "held_out_log_likelihood")
        ]
        lines.append(
            [
                K,
                *(map(cell, judged) if K == EXACT else judged),
                row["copies"],
                row.get("components_floored"),
                row.get("seconds"),
                PAPER.get(int(K)) if K.isdigit() else None,
            ]
        )

    return table(head, lines, BETTER)
