"""Figure 3: reconstructions with the std that was predicted for them, and whether that std is right."""

from typing import Any

import torch

from equipoise import plots
from equipoise.glossary import CURVES
from equipoise.paper.markdown import estimate, table
from equipoise.paper.protocol import SET_TITLES, TITLES, WITH_NOISE, Lab, Spec

TITLE = "Figure 3: where reconstructions cannot be trusted"
TEXT = (
    "Test images, their reconstructions, the predicted std and the actual error; and, over the pixels that vary, the "
    "share of errors within 1, 2 and 3 predicted std (a Gaussian has .683, .954, .997), the same for the intervals "
    "that are recalibrated on held-out images (`VAE.interval`), the normalised calibration error (ENCE, 20 bins) and "
    "the area under the sparsification error curve (in brackets that of a random order). One variance for all cannot "
    "tell one pixel from another."
)
METHODS = ("learned", "pixel", "pixel-low")
SHOWN = 25
PICTURED = "pixel-low"
WITHOUT_INPUTS = ("celeba",)
"""Data whose images may not be handed on: their figures show what the model makes of them only."""


def specs(lab: Lab) -> list[Spec]:
    """Models of the figure."""
    return [Spec(data, method, sections=WITH_NOISE) for data in lab.sets for method in METHODS]


@torch.no_grad()
def compute(lab: Lab) -> dict[str, Any]:
    """Calibration by data set and method; and the figures."""
    rows: dict[str, Any] = {}
    for spec in specs(lab):
        found = lab.evaluation(spec)["noise"].get("varying") or {}
        rows.setdefault(spec.data, {})[spec.method] = {
            name: part for name, part in found.items() if name not in CURVES
        }
    for data in lab.sets:
        model = lab.model(Spec(data, PICTURED))
        x = model.scaling(torch.from_numpy(lab.data(data).test[:SHOWN]).to(lab.device))
        seen = model.reconstruct(x)
        images = [values.cpu().numpy() for values in (x, seen.mean, seen.std)]
        figure = plots.reconstructions(*images, show_inputs=data not in WITHOUT_INPUTS)
        plots.save(figure, lab.images / f"figure-3-{data}.png")
    return {"rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """Calibration of the std."""
    lines = []
    for data, rows in found["rows"].items():
        for method, row in rows.items():
            coverage = [
                estimate(row, f"{prefix}coverage_{k}")
                for prefix in ("", "interval_")
                for k in (1, 2, 3)
            ]
            ence = estimate(row, "normalised_calibration_error")
            ause, random = (
                estimate(row, f"{prefix}sparsification_error_area") for prefix in ("", "random_")
            )
            value = f"{ause['value']:.3f} ({random['value']:.3f})" if ause and random else None
            lines.append([SET_TITLES[data], TITLES[method], *coverage, ence, value])
    intervals = ["in .683 interval", ".954", ".997"]
    return table(
        ["", "", "within 1 std", "2 std", "3 std", *intervals, "ENCE", "sparsification error"],
        lines,
    )
