"""Beyond the paper: better codes to sample from than those of 32 components."""

from typing import Any

from equipoise.paper.markdown import estimate, table
from equipoise.paper.protocol import SET_TITLES, Lab, Spec

TITLE = "Beyond the paper: better codes to sample from"
TEXT = (
    "The model with the learned variance, and densities fitted to its codes: `equipoise sample RUN --from NAME`. For "
    "`mixture=auto` held-out codes choose K; `flow` is a normalising flow that starts from the run's mixture. *Held "
    "out* is the log-likelihood of codes of test images, *copies* as in table 4. Reconstructions are what better "
    "codes cannot much improve on."
)
SOURCES = ("mixture=auto", "flow")
ROWS = ("reconstruction", "prior", "gaussian", "mixture", *SOURCES)


def specs(lab: Lab) -> list[Spec]:
    """Models of the table."""
    return [Spec(data, "learned", sources=SOURCES) for data in lab.sets]


def compute(lab: Lab) -> dict[str, Any]:
    """Distances, held-out likelihood and copies by data set and source of codes."""
    rows: dict[str, Any] = {}
    for spec in specs(lab):
        found = lab.evaluation(spec)
        latent, about = found["latent"], found["about"]
        for row in ROWS:
            copies = (
                latent["memorisation"] if row == "mixture" else latent["memorisation"].get(row, {})
            )
            rows.setdefault(spec.data, {})[row] = found["samples"][row] | {
                "held_out_log_likelihood": latent["code_log_likelihood"].get(row),
                "closer": copies.get("closer"),
            }
        rows[spec.data]["n_components"] = {
            "mixture": about["n_components"],
            "mixture=auto": about["sources"]["mixture=auto"]["n_components"],
        }
    return {"rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """A table for each data set."""
    head = ["Fréchet", "kernel distance", "held out, nats", "copies"]
    parts = []
    for data, rows in found["rows"].items():
        K = rows["n_components"]
        titles = {
            "reconstruction": "reconstructions",
            "gaussian": "one Gaussian",
            "mixture": f"mixture of {K['mixture']}",
            "mixture=auto": f"mixture=auto, K = {K['mixture=auto']}",
        }
        lines = [
            [
                titles.get(row, row),
                rows[row]["frechet_distance"],
                rows[row]["kernel_distance"],
                estimate(rows[row], "held_out_log_likelihood"),
                estimate(rows[row], "closer"),
            ]
            for row in ROWS
        ]
        parts.append(table([SET_TITLES[data], *head], lines))
    return "\n\n".join(parts)
