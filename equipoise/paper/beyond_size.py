"""Beyond the paper: what more width, depth, latent units and epochs buy."""

from typing import Any

from equipoise.paper.markdown import table
from equipoise.paper.protocol import Lab, Spec

TITLE = "Beyond the paper: what larger models and longer training buy"
TEXT = (
    "MNIST, learned variance, one change at a time; the first row is the model of the other tables."
)
CHANGES: dict[str, tuple[tuple[str, Any], ...]] = {
    "16 latent units, width 32": (),
    "8 latent units": (("latent_dim", 8),),
    "32 latent units": (("latent_dim", 32),),
    "width 64": (("width", 64),),
    "residual blocks": (("architecture", "residual"),),
    "residual blocks, 32 latent units": (("architecture", "residual"), ("latent_dim", 32)),
}


def changes(lab: Lab) -> dict[str, tuple[tuple[str, Any], ...]]:
    """Changes by name, and half and twice the epochs."""
    epochs = lab.epochs_of("mnist")
    return CHANGES | {
        f"{n} epochs": (("stage_1_epochs", n),) for n in (max(1, epochs // 2), 2 * epochs)
    }


def specs(lab: Lab) -> list[Spec]:
    """Models of the table."""
    return [Spec("mnist", "learned", options, brief=True) for options in changes(lab).values()]


def compute(lab: Lab) -> dict[str, Any]:
    """Likelihood, error, samples, parameters and seconds of each change."""
    rows = {}
    for name, options in changes(lab).items():
        spec = Spec("mnist", "learned", options)
        found, run = lab.evaluation(spec), lab.run(spec)
        rows[name] = {
            "parameters": run.settings()["parameters"],
            "seconds": round(sum(row["seconds"] for row in run.history()), 1),
            "elbo": found["likelihood"]["elbo"],
            "mse": found["likelihood"]["mse"],
            "active_units": found["latent"]["active_units"]["value"],
            "frechet_reconstruction": found["samples"]["reconstruction"]["frechet_distance"],
            "frechet_mixture": found["samples"]["mixture"]["frechet_distance"],
        }
    return {"rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """The table."""
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
    return table(head, [[name, *row.values()] for name, row in found["rows"].items()])
