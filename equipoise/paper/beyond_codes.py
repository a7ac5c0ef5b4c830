"""Beyond the paper: better codes to sample from than those of 32 components."""

from typing import Any

from equipoise.paper.markdown import Better, cell, estimate, table
from equipoise.paper.protocol import SET_TITLES, Lab, Spec

TITLE = "Beyond the paper: better codes to sample from"
TEXT = (
    "The model with the learned variance, and densities that are fitted to its codes: "
    "`equipoise sample RUN --from NAME`. For `mixture=auto` held-out codes choose K. `flow` is a "
    "normalising flow that starts from the run's mixture. *Held out* is the log-likelihood of "
    "codes of test images, and *copies* is explained at table 4. Better codes cannot improve much "
    "on reconstructions."
)
SOURCES = ("mixture=auto", "flow")
BETTER: Better = {"Fréchet": "lower", "kernel distance": "lower", "held out, nats": "higher"}
ROWS = ("reconstruction", "prior", "gaussian", "mixture", *SOURCES)


def specs(lab: Lab) -> list[Spec]:
    """Models of the table."""
    return [Spec(data, "learned", sources=SOURCES) for data in lab.sets]


def compute(lab: Lab) -> dict[str, Any]:
    """Compute distances, held-out likelihood and copies by data set and source of codes."""
    rows: dict[str, Any] = {}
    for spec in specs(lab):
        evaluation = lab.evaluation(spec)
        latent, about = evaluation["latent"], evaluation["about"]
        rows[spec.data] = {}

        for row in ROWS:
            copies = latent["memorisation"]
            if row != "mixture":  # the figures of the mixture are not nested under its name
                copies = copies.get(row, {})

            rows[spec.data][row] = evaluation["samples"][row] | {
                "held_out_log_likelihood": latent["code_log_likelihood"].get(row),
                "closer": copies.get("closer"),
            }

        rows[spec.data]["n_components"] = {
            "mixture": about["n_components"],
            "mixture=auto": about["sources"]["mixture=auto"]["n_components"],
        }

    return {"rows": rows}


def markdown(content: dict[str, Any]) -> str:
    """Make a table for each data set."""
    head = ["Fréchet", "kernel distance", "held out, nats", "copies"]
    parts = []
    for data, rows in content["rows"].items():
        K = rows["n_components"]
        titles = {
            "reconstruction": "reconstructions",
            "gaussian": "one Gaussian",
            "mixture": f"mixture of {cell(K['mixture'])}",
            "mixture=auto": f"mixture=auto, K = {cell(K['mixture=auto'])}",
        }

        lines = []
        for row in ROWS:
            figures = rows[row]
            distances = [figures["frechet_distance"], figures["kernel_distance"]]
            if row == "reconstruction":  # no source of codes, and not compared with them
                distances = [cell(distance) for distance in distances]

            lines.append(
                [
                    titles.get(row, row),
                    *distances,
                    estimate(figures, "held_out_log_likelihood"),
                    estimate(figures, "closer"),
                ]
            )

        parts.append(table([SET_TITLES[data], *head], lines, BETTER))

    return "\n\n".join(parts)
