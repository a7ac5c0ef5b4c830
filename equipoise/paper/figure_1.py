"""Figure 1: ELBO, sample quality and latent complexity against six fixed variances and the learned one."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from equipoise import plots
from equipoise.paper.markdown import table
from equipoise.paper.protocol import Lab, Spec

TITLE = "Figure 1: fixed variances against the learned one"
TEXT = (
    "MNIST, 16 latent units, one model for each variance. In the paper the learned variance has the highest ELBO, one"
    " of the best Fréchet distances, and samples of the mixture beat those of the prior, the more the smaller the "
    "variance."
)
SPECS = {
    "1": Spec("mnist", "beta-vae"),
    "0.5": Spec("mnist", "vae"),
    **{
        str(var): Spec("mnist", "fixed", (("noise_var", var),), brief=True)
        for var in (0.1, 0.02, 0.005, 0.001)
    },
    "learned": Spec("mnist", "learned"),
}


def specs(lab: Lab) -> list[Spec]:
    """Models of the figure."""
    return list(SPECS.values())


def compute(lab: Lab) -> dict[str, Any]:
    """ELBO, Fréchet distances and KL of each variance; and the figure."""
    rows = {}
    for name, spec in SPECS.items():
        found = lab.evaluation(spec)
        rows[name] = {
            "noise_var": found["likelihood"]["noise_var"]["value"],
            "elbo": found["likelihood"]["elbo"],
            "frechet_prior": found["samples"]["prior"]["frechet_distance"],
            "frechet_mixture": found["samples"]["mixture"]["frechet_distance"],
            "kl_mixture_prior": found["latent"]["kl_mixture_prior"],
        }
    plots.save(draw(rows), lab.images / "figure-1.png")
    return {"rows": rows}


def draw(rows: dict[str, Any]) -> Figure:
    """The figure: a line through the fixed variances, and a star for the learned one."""
    panels = {
        "ELBO, nats": {"test data": "elbo"},
        "Fréchet distance": {"prior": "frechet_prior", "mixture": "frechet_mixture"},
        "KL(mixture, prior), nats": {"mixture": "kl_mixture_prior"},
    }
    fixed = sorted(
        (row for name, row in rows.items() if name != "learned"), key=lambda row: row["noise_var"]
    )
    measures = {
        label: {name: np.array([row[key]["value"] for row in fixed]) for name, key in lines.items()}
        for label, lines in panels.items()
    }
    stars = {
        label: {name: rows["learned"][key]["value"] for name, key in lines.items()}
        for label, lines in panels.items()
    }
    noise_vars = np.array([row["noise_var"] for row in fixed])
    return plots.variance_sweep(noise_vars, measures, rows["learned"]["noise_var"], stars)


def markdown(found: dict[str, Any]) -> str:
    """The figure's numbers."""
    head = ["σ²", "ELBO, nats", "Fréchet, prior", "Fréchet, mixture", "KL(mixture, prior)"]
    return table(
        head,
        [
            [
                f"{row['noise_var']:.3g} (learned)" if name == "learned" else name,
                row["elbo"],
                row["frechet_prior"],
                row["frechet_mixture"],
                row["kl_mixture_prior"],
            ]
            for name, row in found["rows"].items()
        ],
    )
