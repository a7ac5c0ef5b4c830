"""Table 1: the codes of MNIST with two latent units, from a large variance to a small one."""

from typing import Any

import numpy as np
import torch

from equipoise import plots
from equipoise.aggregate import AggregatePosterior, StandardNormal
from equipoise.data import Batches
from equipoise.model import encode_all
from equipoise.paper.markdown import Better, brief, cell, table
from equipoise.paper.protocol import Lab, Spec

TITLE = "Table 1: the noise variance decides how far the codes are from the prior"
TEXT = (
    "MNIST, two latent units. KL is KL(mixture, prior), Monte Carlo with 10,000 codes. The mixture "
    "is fitted to samples of q(z|x). The picture shows log-densities on the plane of the codes: of "
    "the exact aggregate posterior, eq. (12), of its mixture, eq. (13), and of the prior."
)
PAPER = {
    "1": "0.094 ± 0.003",
    "0.5": "0.132 ± 0.003",
    "learned": "0.422 ± 0.011 (0.035)",
    "0.01": "1.552 ± 0.034",
}
"""KL in the paper's table 1, in nats."""
D2 = ("latent_dim", 2)
NEEDED: dict[str, Any] = {"brief": True, "sections": ("likelihood", "latent")}
SPECS = {
    "1": Spec("mnist", "fixed", (D2, ("noise_var", 1.0)), **NEEDED),
    "0.5": Spec("mnist", "fixed", (D2, ("noise_var", 0.5)), **NEEDED),
    "learned": Spec("mnist", "learned", (D2,), **NEEDED),
    "0.01": Spec("mnist", "fixed", (D2, ("noise_var", 0.01)), **NEEDED),
}
BETTER: Better = {"ELBO, nats": "higher", "MSE": "lower"}
REACH, POINTS = 8.0, 160
"""Half the side of the plane that is shown, and the number of grid points along the side."""


def specs(lab: Lab) -> list[Spec]:
    """Models of the table."""
    return list(SPECS.values())


def compute(lab: Lab) -> dict[str, Any]:
    """Collect KL, ELBO and squared error of each variance."""
    rows = {}
    for name, spec in SPECS.items():
        evaluation = lab.evaluation(spec)
        likelihood = evaluation["likelihood"]
        rows[name] = {
            "noise_var": likelihood["noise_var"]["value"],
            "kl_mixture_prior": evaluation["latent"]["kl_mixture_prior"],
            "elbo": likelihood["elbo"],
            "kl": likelihood["kl"],
            "mse": likelihood["mse"],
        }

    return {"rows": rows}


@torch.no_grad()
def draw(lab: Lab, content: dict[str, Any]) -> None:
    """Draw the densities of the codes."""
    grid = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64, device=lab.device)
    points = torch.cartesian_prod(grid, grid).flip(1)

    pictures = {}
    for name, spec in SPECS.items():
        train = lab.data(spec.data).train.at_hand
        posterior = encode_all(lab.model(spec), Batches(train, 1000, lab.device).epoch())
        mixture = lab.run(spec).mixture().to(lab.device)
        densities = {
            "aggregate posterior": AggregatePosterior(*posterior),
            f"mixture of {mixture.n_components}": mixture,
            "prior": StandardNormal(2).to(lab.device, torch.float64),
        }

        noise_var = lab.evaluation(spec)["likelihood"]["noise_var"]["value"]
        title = f"σ² = {noise_var:.2g}"
        if name == "learned":
            title += " (learned)"

        pictures[title] = {
            label: density.log_prob(points).reshape(POINTS, POINTS).cpu().numpy()
            for label, density in densities.items()
        }

    axis = np.asarray(grid.cpu())
    plots.save(plots.density_rows(axis, axis, pictures), lab.images / "table-1.png")


def markdown(content: dict[str, Any]) -> str:
    """Make the table, with the paper's KL."""
    head = ["σ²", "KL(mixture, prior)", "the paper's", "ELBO, nats", "KL(q(z\\|x), prior)", "MSE"]
    lines = []
    for name, row in content["rows"].items():
        title = name
        if name == "learned":
            title = f"{cell(brief(row['noise_var'], '.3g'))} (learned)"

        lines.append(
            [title, row["kl_mixture_prior"], PAPER[name], row["elbo"], row["kl"], row["mse"]]
        )

    return table(head, lines, BETTER)
