"""Figure 4: samples with the std that is predicted for them."""

from typing import Any

import torch

from equipoise import plots
from equipoise.paper.markdown import table
from equipoise.paper.protocol import SET_TITLES, Lab, Spec

TITLE = "Figure 4: where samples cannot be trusted"
TEXT = "Samples of the mixture, decoder means, and the std that the model predicts for each of their pixels."
SHOWN = 25
METHOD = "pixel-low"


def specs(lab: Lab) -> list[Spec]:
    """Models of the figure."""
    return [Spec(data, METHOD, sections=("likelihood",), brief=True) for data in lab.sets]


@torch.no_grad()
def compute(lab: Lab) -> dict[str, Any]:
    """Mean predicted std of samples and of reconstructions; and the figures."""
    rows = {}
    for spec in specs(lab):
        model, mixture = lab.model(spec), lab.run(spec).mixture().to(lab.device)
        made = model.generate(1000, mixture, torch.Generator(lab.device).manual_seed(lab.seed))
        test = lab.data(spec.data).test
        seen = model.reconstruct(
            model.scaling(torch.from_numpy(test[: min(1000, len(test))]).to(lab.device))
        )
        rows[spec.data] = {
            name: {
                "value": float(std.mean()),
                "standard_error": float(std.std() / len(std) ** 0.5),
                "n": len(std),
            }
            for name, std in {
                "samples": made.std.flatten(1).mean(1),
                "reconstructions": seen.std.flatten(1).mean(1),
            }.items()
        }
        figure = plots.samples(
            made.mean[:SHOWN].cpu().numpy(), made.std[:SHOWN].cpu().numpy(), "samples, mixture"
        )
        plots.save(figure, lab.images / f"figure-4-{spec.data}.png")
    return {"rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """Mean predicted std."""
    lines = [
        [SET_TITLES[data], row["samples"], row["reconstructions"]]
        for data, row in found["rows"].items()
    ]
    return table(
        ["mean predicted std (1 = full scale)", "samples", "reconstructions of test images"], lines
    )
