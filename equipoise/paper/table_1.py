"""Table 1: two latent units on MNIST, the variance from large to small, and what the codes then look like."""

from typing import Any

import numpy as np
import torch

from equipoise import plots
from equipoise.aggregate import AggregatePosterior, StandardNormal
from equipoise.data import Batches
from equipoise.model import encode_all
from equipoise.paper.markdown import table
from equipoise.paper.protocol import Lab, Spec

TITLE = "Table 1: the noise variance decides how far the codes are from the prior"
TEXT = (
    "MNIST, two latent units. KL is KL(mixture, prior), Monte Carlo with 10,000 codes; the mixture is fitted to "
    "samples of q(z|x). The picture shows log densities on the plane of the codes: of the exact aggregate posterior, "
    "eq. (12), of its mixture, eq. (13), and of the prior."
)
PAPER = {
    "1": "0.094 ± 0.003",
    "0.5": "0.132 ± 0.003",
    "learned": "0.422 ± 0.011 (0.035)",
    "0.01": "1.552 ± 0.034",
}
"""KL of the paper's table 1, nats."""
D2 = ("latent_dim", 2)
NEEDED: dict[str, Any] = {"brief": True, "sections": ("likelihood", "latent")}
SPECS = {
    "1": Spec("mnist", "fixed", (D2, ("noise_var", 1.0)), **NEEDED),
    "0.5": Spec("mnist", "fixed", (D2, ("noise_var", 0.5)), **NEEDED),
    "learned": Spec("mnist", "learned", (D2,), **NEEDED),
    "0.01": Spec("mnist", "fixed", (D2, ("noise_var", 0.01)), **NEEDED),
}
REACH, POINTS = 8.0, 160
"""The plane that is shown: half its side, and grid points along it."""


def specs(lab: Lab) -> list[Spec]:
    """Models of the table."""
    return list(SPECS.values())


@torch.no_grad()
def compute(lab: Lab) -> dict[str, Any]:
    """KL, ELBO and squared error of each variance; and the picture of the densities."""
    grid = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64, device=lab.device)
    points = torch.cartesian_prod(grid, grid).flip(1)
    rows, densities = {}, {}
    for name, spec in SPECS.items():
        found, model, mixture = (
            lab.evaluation(spec),
            lab.model(spec),
            lab.run(spec).mixture().to(lab.device),
        )
        rows[name] = {
            "noise_var": found["likelihood"]["noise_var"]["value"],
            "kl_mixture_prior": found["latent"]["kl_mixture_prior"],
            "elbo": found["likelihood"]["elbo"],
            "kl": found["likelihood"]["kl"],
            "mse": found["likelihood"]["mse"],
        }
        posterior = encode_all(
            model, Batches(lab.data(spec.data).train.at_hand, 1000, lab.device).epoch()
        )
        shown = {
            "aggregate posterior": AggregatePosterior(*posterior),
            f"mixture of {mixture.n_components}": mixture,
            "prior": StandardNormal(2).to(lab.device, torch.float64),
        }
        densities[
            f"σ² = {rows[name]['noise_var']:.2g}" + (" (learned)" if name == "learned" else "")
        ] = {
            title: density.log_prob(points).reshape(POINTS, POINTS).cpu().numpy()
            for title, density in shown.items()
        }
    axis = np.asarray(grid.cpu())
    plots.save(plots.density_rows(axis, axis, densities), lab.images / "table-1.png")
    return {"rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """The table, with the paper's KL."""
    head = ["σ²", "KL(mixture, prior)", "the paper's", "ELBO, nats", "KL(q(z\\|x), prior)", "MSE"]
    return table(
        head,
        [
            [
                f"{row['noise_var']:.3g} (learned)" if name == "learned" else name,
                row["kl_mixture_prior"],
                PAPER[name],
                row["elbo"],
                row["kl"],
                row["mse"],
            ]
            for name, row in found["rows"].items()
        ],
    )
