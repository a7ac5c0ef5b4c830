"""Figure 1: ELBO, samples and latent complexity for six fixed variances and the learned one."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from equipoise import plots
from equipoise.paper.markdown import Better, brief, cell, table
from equipoise.paper.protocol import Lab, Spec
from equipoise.paper.seeds import error_over_seeds, value_of

TITLE = "Figure 1: fixed variances against the learned one"
TEXT = (
    "MNIST, 16 latent units, one model for each variance. In the paper the learned variance has "
    "the highest ELBO and one of the best Fréchet distances. Samples of the mixture are better "
    "there than those of the prior, and the difference grows as the variance gets smaller."
)
BETTER: Better = {
    "ELBO, nats": "higher",
    "Fréchet, prior": "lower",
    "Fréchet, mixture": "lower",
}
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
    """Collect ELBO, Fréchet distances and KL of each variance."""
    rows = {}
    for name, spec in SPECS.items():
        evaluation = lab.evaluation(spec)
        likelihood, samples = evaluation["likelihood"], evaluation["samples"]
        rows[name] = {
            "noise_var": likelihood["noise_var"]["value"],
            "elbo": likelihood["elbo"],
            "frechet_prior": samples["prior"]["frechet_distance"],
            "frechet_mixture": samples["mixture"]["frechet_distance"],
            "kl_mixture_prior": evaluation["latent"]["kl_mixture_prior"],
        }

    return {"rows": rows}


def draw(lab: Lab, content: dict[str, Any]) -> None:
    """Draw a line through the fixed variances and a star for the learned one, with its errors."""
    plots.save(_draw(content["rows"]), lab.images / "figure-1.png")


def _draw(rows: dict[str, Any]) -> Figure:
    panels = {
        "ELBO, nats": {"test data": "elbo"},
        "Fréchet distance": {"prior": "frechet_prior", "mixture": "frechet_mixture"},
        "KL(mixture, prior), nats": {"mixture": "kl_mixture_prior"},
    }
    learned = rows["learned"]
    fixed = [row for name, row in rows.items() if name != "learned"]
    fixed.sort(key=lambda row: value_of(row["noise_var"]))

    measures, stars, errors = {}, {}, {}
    for label, lines in panels.items():
        measures[label] = {
            name: np.array([value_of(row[key]) for row in fixed]) for name, key in lines.items()
        }
        stars[label] = {name: value_of(learned[key]) for name, key in lines.items()}
        errors[label] = {
            name: np.array([error_over_seeds(row[key]) for row in [*fixed, learned]])
            for name, key in lines.items()
        }

    noise_vars = np.array([value_of(row["noise_var"]) for row in fixed])
    learned_var = value_of(learned["noise_var"])
    return plots.variance_sweep(noise_vars, measures, learned_var, stars, errors)


def markdown(content: dict[str, Any]) -> str:
    """Make the table of the figure's numbers."""
    head = ["σ²", "ELBO, nats", "Fréchet, prior", "Fréchet, mixture", "KL(mixture, prior)"]
    lines = []
    for name, row in content["rows"].items():
        title = name
        if name == "learned":
            title = f"{cell(brief(row['noise_var'], '.3g'))} (learned)"

        lines.append(
            [
                title,
                row["elbo"],
                row["frechet_prior"],
                row["frechet_mixture"],
                row["kl_mixture_prior"],
            ]
        )

    return table(head, lines, BETTER)
