"""Table 2: how much samples of each method look like the data, from the prior and from the mixture."""

from typing import Any

from equipoise.paper.markdown import estimate, table
from equipoise.paper.protocol import NEIGHBOURS, PAPERS_FIVE, SET_TITLES, TITLES, Lab, Spec

TITLE = "Table 2: Fréchet distances of samples"
TEXT = (
    "Decoder means of 10,000 codes (CelebA: 1,000) against as many test images. The features are "
    "EfficientNet-Lite0's, not Inception's: only the order can be compared with the paper's column, whose codes come "
    "from the mixture for its own method and from the prior for the others. *Reconstructions* is what no source of "
    "codes can much improve on. Below the line of the paper's five are neighbours: RAE-L2 is an autoencoder without "
    "noise, and DIP-VAE-II, WAE and RAE weigh their penalties as their authors do."
)
PAPER = {
    "mnist": dict(zip(PAPERS_FIVE, (8.9, 74.9, 438.1, 114.9, 142.8), strict=True)) | {"real": 1.9},
    "fashion-mnist": dict(zip(PAPERS_FIVE, (10.6, 123.8, 281.5, 103.6, 149.5), strict=True))
    | {"real": 0.7},
    "celeba": dict(zip(PAPERS_FIVE, (74.7, 78.4, 106.4, 87.5, 85.4), strict=True)) | {"real": 2.9},
}
"""Inception distances of the paper's table 2."""
SOURCES = ("prior", "mixture", "reconstruction")
ELSEWHERE = ("sigma-vae", "rae")
"""Neighbours on the other sets than MNIST."""


def methods(data: str) -> tuple[str, ...]:
    """Methods on a data set, the paper's first."""
    return PAPERS_FIVE + (NEIGHBOURS if data == "mnist" else ELSEWHERE)


def specs(lab: Lab) -> list[Spec]:
    """Models of the table."""
    return [Spec(data, method) for data in lab.sets for method in methods(data)]


def compute(lab: Lab) -> dict[str, Any]:
    """Fréchet and kernel distances by data set and method."""
    rows: dict[str, Any] = {}
    for data in lab.sets:
        for method in methods(data):
            samples = lab.evaluation(Spec(data, method))["samples"]
            rows.setdefault(data, {})[method] = {source: samples[source] for source in SOURCES}
        rows[data]["real"] = samples["real"]
        rows[data]["features"] = samples["features"]
    return {"rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """A table for each data set: Fréchet distances, the kernel distance of the mixture's samples, the paper's."""
    parts = []
    for data, rows in found["rows"].items():
        real = rows["real"]
        lines = [
            [
                "real training images",
                None,
                None,
                None,
                real["frechet_distance"],
                PAPER[data]["real"],
            ]
        ]
        for method in methods(data):
            distances = [estimate(rows, method, source, "frechet_distance") for source in SOURCES]
            kernel = estimate(rows, method, "mixture", "kernel_distance")
            lines.append(
                [TITLES[method], *distances[:2], kernel, distances[2], PAPER[data].get(method)]
            )
        lines[0] = [
            "real training images",
            real["frechet_distance"],
            None,
            real["kernel_distance"],
            None,
            lines[0][-1],
        ]
        head = [
            SET_TITLES[data],
            "prior",
            "mixture",
            "mixture, kernel distance",
            "reconstructions",
            "paper (Inception)",
        ]
        parts.append(table(head, lines))
    return "\n\n".join(parts)
