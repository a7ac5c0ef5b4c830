"""Figure 2: prior against mixture for all methods, and what that looks like."""

from typing import Any

import torch
from matplotlib.figure import Figure

from equipoise import plots
from equipoise.aggregate import StandardNormal
from equipoise.paper.markdown import table
from equipoise.paper.protocol import PAPERS_FIVE, SET_TITLES, TITLES, Lab, Spec

TITLE = "Figure 2: the prior against the mixture"
TEXT = (
    "How many times as far from the test images samples of the prior are as samples of the mixture (Fréchet distances"
    " of table 2), and samples of the model with the learned variance from both. In the paper the mixture is better "
    "for every method."
)
SHOWN = 36


def specs(lab: Lab) -> list[Spec]:
    """Models of the figure."""
    return [Spec(data, method) for data in lab.sets for method in PAPERS_FIVE]


@torch.no_grad()
def compute(lab: Lab) -> dict[str, Any]:
    """Both distances and their ratio; bars, and samples of the last data set, CelebA where it is at hand."""
    rows: dict[str, Any] = {}
    for spec in specs(lab):
        samples = lab.evaluation(spec)["samples"]
        prior, mixture = (samples[source]["frechet_distance"] for source in ("prior", "mixture"))
        ratio = prior["value"] / mixture["value"]
        rows.setdefault(spec.data, {})[spec.method] = {
            "prior": prior,
            "mixture": mixture,
            "ratio": ratio,
        }
    plots.save(draw(rows), lab.images / "figure-2.png")
    for data in lab.sets:
        spec = Spec(data, "learned")
        model, mixture = lab.model(spec), lab.run(spec).mixture().to(lab.device)
        sets = {}
        for title, source in {
            "prior": StandardNormal(model.latent_dim).to(lab.device),
            "mixture": mixture,
        }.items():
            generator = torch.Generator(lab.device).manual_seed(lab.seed)
            sets[title] = model.generate(SHOWN, source, generator).mean.cpu().numpy()
        plots.save(plots.samples_compared(sets), lab.images / f"figure-2-{data}.png")
    return {"rows": rows}


def draw(rows: dict[str, Any]) -> Figure:
    """Bars of both distances."""
    groups = {
        SET_TITLES[data]: {
            source: [row[source]["value"] for row in found.values()]
            for source in ("prior", "mixture")
        }
        for data, found in rows.items()
    }
    return plots.bars(
        groups, [TITLES[method].split(",")[0].replace(" (ours)", "") for method in PAPERS_FIVE]
    )


def markdown(found: dict[str, Any]) -> str:
    """Prior over mixture, by method and data set."""
    rows = found["rows"]
    head = ["Fréchet distance, prior / mixture", *(SET_TITLES[data] for data in rows)]
    return table(
        head,
        [
            [TITLES[method], *(f"{rows[data][method]['ratio']:.2f}" for data in rows)]
            for method in PAPERS_FIVE
        ],
    )
