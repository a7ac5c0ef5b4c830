"""Beyond the paper: the effect of more width, depth, latent units and epochs."""

from typing import Any

from equipoise.paper.markdown import Better, table
from equipoise.paper.protocol import Lab, Spec

TITLE = "Beyond the paper: what larger models and longer training buy"
TEXT = (
    "MNIST, learned variance, one change at a time. The first row is the model of the other tables."
)
BETTER: Better = {
    "ELBO, nats": "higher",
    "MSE": "lower",
    "Fréchet, rec.": "lower",
    "Fréchet, mixture": "lower",
}
CHANGES: dict[str, tuple[tuple[str, Any], ...]] = {
    "16 latent units, width 32": (),
    "8 latent units": (("latent_dim", 8),),
    "32 latent units": (("latent_dim", 32),),
    "width 64": (("width", 64),),
    "residual blocks": (("architecture", "residual"),),
    "residual blocks, 32 latent units": (("architecture", "residual"), ("latent_dim", 32)),
}


def changes(lab: Lab) -> dict[str, tuple[tuple[str, Any], ...]]:
    """The changes by name, with half and twice the epochs among them."""
    epochs = lab.epochs_of("mnist")
    others: dict[str, tuple[tuple[str, Any], ...]] = {}
    for n in (max(1, epochs // 2), 2 * epochs):
        others[f"{n} epochs"] = (("stage_1_epochs", n),)

    return CHANGES | others


def specs(lab: Lab) -> list[Spec]:
    """Models of the table."""
    return [Spec("mnist", "learned", options, brief=True) for options in changes(lab).values()]


def compute(lab: Lab) -> dict[str, Any]:
    """Collect likelihood, error, samples, parameters and seconds of each change."""
    rows = {}
    for name, options in changes(lab).items():
        spec = Spec("mnist", "learned", options)
        run, evaluation = lab.run(spec), lab.evaluation(spec)
        likelihood, samples = evaluation["likelihood"], evaluation["samples"]

        rows[name] = {
            "parameters": run.settings()["parameters"],
            "seconds": round(sum(row["seconds"] for row in run.history()), 1),
            "elbo": likelihood["elbo"],
            "mse": likelihood["mse"],
            "active_units": evaluation["latent"]["active_units"]["value"],
            "frechet_reconstruction": samples["reconstruction"]["frechet_distance"],
            "frechet_mixture": samples["mixture"]["frechet_distance"],
        }

    return {"rows": rows}


def markdown(content: dict[str, Any]) -> str:
    """Make the table."""
    head = [
        "",
        "parameters",
        "training, s",
        "ELBO, nats",
        "MSE",
        "active units",
        "Fréchet, rec.",
        "Fréchet, mixture",
    ]
    lines = [[name, *row.values()] for name, row in content["rows"].items()]
    return table(head, lines, BETTER)
