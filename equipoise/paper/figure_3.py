"""Figure 3: reconstructions with the std that is predicted for them, and whether it is right."""

from typing import Any

import torch

from equipoise import plots
from equipoise.glossary import CURVES
from equipoise.paper.markdown import Better, brief, cell, estimate, table
from equipoise.paper.protocol import SET_TITLES, TITLES, WITH_NOISE, Lab, Spec

TITLE = "Figure 3: where reconstructions cannot be trusted"
TEXT = (
    "The picture shows test images, their reconstructions, the predicted std and the actual error. "
    "The table is over the pixels that vary. It gives the share of errors within 1, 2 and 3 "
    "predicted std (.683, .954 and .997 for a Gaussian), the same share within the intervals that "
    "are recalibrated on held-out images (`VAE.interval`), the normalised calibration error (ENCE, "
    "20 bins) and the area under the sparsification error curve (in brackets that of a random "
    "order). One variance for all pixels cannot distinguish one pixel from another."
)
BETTER: Better = {"ENCE": "lower", "sparsification error": "lower"}
METHODS = ("learned", "pixel", "pixel-low")
SHOWN = 25
PICTURED = "pixel-low"
WITHOUT_INPUTS = ("celeba",)
"""Data whose images may not be passed on: their figures show the output of the model only."""


def specs(lab: Lab) -> list[Spec]:
    """Models of the figure."""
    return [Spec(data, method, sections=WITH_NOISE) for data in lab.sets for method in METHODS]


def compute(lab: Lab) -> dict[str, Any]:
    """Collect the calibration by data set and method."""
    rows: dict[str, Any] = {}
    for spec in specs(lab):
        varying = lab.evaluation(spec)["noise"].get("varying") or {}
        rows.setdefault(spec.data, {})[spec.method] = {
            name: figure for name, figure in varying.items() if name not in CURVES
        }

    return {"rows": rows}


@torch.no_grad()
def draw(lab: Lab, content: dict[str, Any]) -> None:
    """Draw reconstructions of each data set with their std."""
    for data in lab.sets:
        model = lab.model(Spec(data, PICTURED))
        x = model.scaling(torch.from_numpy(lab.data(data).test[:SHOWN]).to(lab.device))
        reconstruction = model.reconstruct(x)

        images = [part.cpu().numpy() for part in (x, reconstruction.mean, reconstruction.std)]
        figure = plots.reconstructions(*images, show_inputs=data not in WITHOUT_INPUTS)
        plots.save(figure, lab.images / f"figure-3-{data}.png")


def markdown(content: dict[str, Any]) -> str:
    """Make the table of the calibration of the std."""
    lines = []
    for data, rows in content["rows"].items():
        for method, row in rows.items():
            coverage = []
            for prefix in ("", "interval_"):
                coverage += [estimate(row, f"{prefix}coverage_{k}") for k in (1, 2, 3)]

            ence = estimate(row, "normalised_calibration_error")
            ause = estimate(row, "sparsification_error_area")
            random = estimate(row, "random_sparsification_error_area")
            areas = None
            if ause and random:
                areas = brief(ause, ".3f"), cell(brief(random, ".3f"))

            lines.append([SET_TITLES[data], TITLES[method], *coverage, ence, areas])

    shares = ["within 1 std", "2 std", "3 std", "in .683 interval", ".954", ".997"]
    head = ["", "", *shares, "ENCE", "sparsification error"]
    return table(head, lines, BETTER, groups=[line[0] for line in lines])
