"""Figure 2: the prior against the mixture for all methods, in numbers and in pictures."""

from typing import Any

import torch
from matplotlib.figure import Figure

from equipoise import plots
from equipoise.aggregate import StandardNormal
from equipoise.paper.markdown import brief, cell, table
from equipoise.paper.protocol import PAPERS_FIVE, SET_TITLES, TITLES, Lab, Spec
from equipoise.paper.seeds import error_over_seeds, has_seeds, is_different, value_of
from equipoise.randomness import stream

TITLE = "Figure 2: the prior against the mixture"
TEXT = (
    "The Fréchet distance of samples of the prior to the test images, divided by that of samples "
    "of the mixture (the distances are in table 2), and samples of the model with the learned "
    "variance from both. In the paper the mixture is better for every method."
)
SHOWN = 36


def specs(lab: Lab) -> list[Spec]:
    """Models of the figure."""
    return [Spec(data, method) for data in lab.sets for method in PAPERS_FIVE]


def compute(lab: Lab) -> dict[str, Any]:
    """Collect both distances and their ratio."""
    rows: dict[str, Any] = {}
    for spec in specs(lab):
        samples = lab.evaluation(spec)["samples"]
        prior = samples["prior"]["frechet_distance"]
        mixture = samples["mixture"]["frechet_distance"]
        rows.setdefault(spec.data, {})[spec.method] = {
            "prior": prior,
            "mixture": mixture,
            "ratio": prior["value"] / mixture["value"],
        }

    return {"rows": rows}


@torch.no_grad()
def draw(lab: Lab, content: dict[str, Any]) -> None:
    """Draw bars of both distances, with their errors over seeds, and samples of each data set."""
    plots.save(_draw_bars(content["rows"]), lab.images / "figure-2.png")
    for data in lab.sets:
        plots.save(_draw_samples(lab, data), lab.images / f"figure-2-{data}.png")


def _draw_bars(rows: dict[str, Any]) -> Figure:
    """Draw bars of both distances."""
    groups, errors = {}, {}
    for data, methods in rows.items():
        figures = {
            source: [row[source] for row in methods.values()] for source in ("prior", "mixture")
        }
        groups[SET_TITLES[data]] = {name: list(map(value_of, row)) for name, row in figures.items()}
        errors[SET_TITLES[data]] = {
            name: list(map(error_over_seeds, row)) for name, row in figures.items()
        }

    titles = [TITLES[method].split(",")[0].replace(" (ours)", "") for method in PAPERS_FIVE]
    return plots.bars(groups, titles, errors)


def _draw_samples(lab: Lab, data: str) -> Figure:
    """Draw samples of the learned variance, from the prior and from the mixture."""
    spec = Spec(data, "learned")
    model = lab.model(spec)
    sources = {
        "prior": StandardNormal(model.latent_dim).to(lab.device),
        "mixture": lab.run(spec).mixture().to(lab.device),
    }

    sets = {}
    for title, source in sources.items():
        generator = stream(lab.seed, "figure_2", device=lab.device)
        sets[title] = model.generate(SHOWN, source, generator).mean.cpu().numpy()

    return plots.samples_compared(sets)


def markdown(content: dict[str, Any]) -> str:
    """Make the table of the ratios, by method and data set."""
    rows = content["rows"]
    head = ["Fréchet distance, prior / mixture", *(SET_TITLES[data] for data in rows)]

    lines = [
        [TITLES[method], *(_ratio(rows[data][method]) for data in rows)] for method in PAPERS_FIVE
    ]
    return table(head, lines)


def _ratio(row: dict[str, Any]) -> str:
    """Write a ratio; over seeds, say where the two distances do not differ."""
    ratio = row["ratio"]
    text = cell(brief(ratio, ".2f"))
    if has_seeds(ratio) and not is_different(row["prior"], row["mixture"]):
        text += " (no difference)"
    return text
