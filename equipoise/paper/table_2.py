"""Table 2: distances of each method's samples to the data, from the prior and from the mixture."""

from typing import Any

from equipoise.paper.markdown import Better, cell, estimate, table
from equipoise.paper.protocol import NEIGHBOURS, PAPERS_FIVE, SET_TITLES, TITLES, Lab, Spec

TITLE = "Table 2: Fréchet distances of samples"
TEXT = (
    "Decoder means of 10,000 codes (CelebA: 1,000) against the same number of test images. The "
    "features are those of EfficientNet-Lite0, not of Inception, so that only the order can be "
    "compared with the paper's column. The paper's codes come from the mixture for its own method, "
    "and from the prior for the others. No source of codes can improve much on *reconstructions*. "
    "Below the paper's five methods are neighbours. RAE-L2 is an autoencoder without noise. "
    "DIP-VAE-II, WAE and RAE weigh their penalties as their authors do."
)


def _in_paper(distances: tuple[float, ...], real: float) -> dict[str, float]:
    return dict(zip(PAPERS_FIVE, distances, strict=True)) | {"real": real}


PAPER = {
    "mnist": _in_paper((8.9, 74.9, 438.1, 114.9, 142.8), 1.9),
    "fashion-mnist": _in_paper((10.6, 123.8, 281.5, 103.6, 149.5), 0.7),
    "celeba": _in_paper((74.7, 78.4, 106.4, 87.5, 85.4), 2.9),
}
"""Inception distances in the paper's table 2."""
BETTER: Better = dict.fromkeys(
    ("prior", "mixture", "mixture, kernel distance", "reconstructions"), "lower"
)
SOURCES = ("prior", "mixture", "reconstruction")
ELSEWHERE = ("sigma-vae", "rae")
"""The neighbours that are trained on data sets other than MNIST."""


def methods(data: str) -> tuple[str, ...]:
    """The methods on a data set, those of the paper first."""
    return PAPERS_FIVE + (NEIGHBOURS if data == "mnist" else ELSEWHERE)


def specs(lab: Lab) -> list[Spec]:
    """Models of the table."""
    return [Spec(data, method) for data in lab.sets for method in methods(data)]


def compute(lab: Lab) -> dict[str, Any]:
    """Collect Fréchet and kernel distances by data set and method."""
    rows: dict[str, Any] = {}
    for data in lab.sets:
        for method in methods(data):
            samples = lab.evaluation(Spec(data, method))["samples"]
            rows.setdefault(data, {})[method] = {source: samples[source] for source in SOURCES}

        # These do not depend on the method.
        rows[data]["real"] = samples["real"]
        rows[data]["features"] = samples["features"]

    return {"rows": rows}


def markdown(content: dict[str, Any]) -> str:
    """Make a table for each data set.

    It has the Fréchet distances, the kernel distance of the mixture's samples, and the distances in
    the paper.
    """
    columns = [
        "prior",
        "mixture",
        "mixture, kernel distance",
        "reconstructions",
        "paper (Inception)",
    ]
    parts = []
    for data, rows in content["rows"].items():
        real, in_paper = rows["real"], PAPER[data]
        # As text, because real images are no method, and not compared with them.
        lines = [
            [
                "real training images",
                cell(real["frechet_distance"]),
                None,
                cell(real["kernel_distance"]),
                None,
                in_paper["real"],
            ]
        ]

        for method in methods(data):
            prior, mixture, reconstruction = (
                estimate(rows, method, source, "frechet_distance") for source in SOURCES
            )
            kernel = estimate(rows, method, "mixture", "kernel_distance")
            lines.append(
                [TITLES[method], prior, mixture, kernel, reconstruction, in_paper.get(method)]
            )

        parts.append(table([SET_TITLES[data], *columns], lines, BETTER))

    return "\n\n".join(parts)
