"""Figure 4: samples with the std that is predicted for them."""

from typing import Any

import torch
from torch import Tensor

from equipoise import plots
from equipoise.categories import Likelihood
from equipoise.paper.markdown import table
from equipoise.paper.protocol import SET_TITLES, Lab, Spec
from equipoise.randomness import stream

TITLE = "Figure 4: where samples cannot be trusted"
TEXT = (
    "Samples of the mixture, shown as decoder means, and the std that the model predicts for each "
    "of their pixels."
)
SHOWN, AVERAGED = 25, 1000
"""Images in the picture, and images that the std is averaged over."""
METHOD = "pixel-low"


def specs(lab: Lab) -> list[Spec]:
    """Models of the figure."""
    return [Spec(data, METHOD, sections=("likelihood",), brief=True) for data in lab.sets]


@torch.no_grad()
def compute(lab: Lab) -> dict[str, Any]:
    """Compute the mean predicted std of samples and of reconstructions."""
    rows = {}
    for spec in specs(lab):
        model = lab.model(spec)
        test = lab.data(spec.data).test
        raw = torch.from_numpy(test[: min(AVERAGED, len(test))]).to(lab.device)
        reconstructions = model.reconstruct(model.scaling(raw))

        rows[spec.data] = {
            "samples": _mean_std(_samples(lab, spec).std),
            "reconstructions": _mean_std(reconstructions.std),
        }

    return {"rows": rows}


@torch.no_grad()
def draw(lab: Lab, content: dict[str, Any]) -> None:
    """Draw samples of each data set with their std."""
    for spec in specs(lab):
        samples = _samples(lab, spec)
        shown_means, shown_stds = samples.mean[:SHOWN], samples.std[:SHOWN]
        figure = plots.samples(
            shown_means.cpu().numpy(), shown_stds.cpu().numpy(), "samples, mixture"
        )
        plots.save(figure, lab.images / f"figure-4-{spec.data}.png")


def _samples(lab: Lab, spec: Spec) -> Likelihood:
    """Draw samples of the mixture."""
    mixture = lab.run(spec).mixture().to(lab.device)
    generator = stream(lab.seed, "figure_4", device=lab.device)
    return lab.model(spec).generate(AVERAGED, mixture, generator)


def _mean_std(std: Tensor) -> dict[str, float]:
    """The mean over the images of their mean predicted std, and its standard error."""
    of_image = std.flatten(1).mean(1)
    return {
        "value": float(of_image.mean()),
        "standard_error": float(of_image.std() / len(of_image) ** 0.5),
        "n": len(of_image),
    }


def markdown(content: dict[str, Any]) -> str:
    """Make the table of the mean predicted std."""
    head = ["mean predicted std (1 = full scale)", "samples", "reconstructions of test images"]
    lines = [
        [SET_TITLES[data], row["samples"], row["reconstructions"]]
        for data, row in content["rows"].items()
    ]
    return table(head, lines)
