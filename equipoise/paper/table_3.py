"""Table 3: test log-likelihood, raw with its floor, and in bits per dimension of dequantised data."""

from typing import Any

from equipoise.paper.markdown import estimate, table
from equipoise.paper.protocol import SET_TITLES, TITLES, Lab, Spec

TITLE = "Table 3: importance-weighted log-likelihoods"
TEXT = (
    "IWAE with 20 samples on the first 500 test images, nats, with the prior or the mixture as p(z), as in the paper."
    " A raw density of 8-bit pixels has no upper bound and grows as the noise floor falls, so the floor stands beside"
    " it. Bits per dimension (IWAE-20 of dequantised data, the whole test set) are comparable between all models: "
    "lower is better, and at 8 a model knows nothing. The paper's 6037 nats lie above 784 ln 256 = 4347, the most "
    "that any model of uniformly dequantised pixels can reach."
)
METHODS = ("learned", "pixel", "pixel-low", "vae", "beta-vae", "dip-vae")
PAPER = {
    "mnist": {
        "learned": (1307, 1323),
        "pixel": (6037, 6052),
        "vae": (-462, -461),
        "beta-vae": (-730, -730),
        "dip-vae": (-461, -460),
    },
    "fashion-mnist": {
        "learned": (1145, 1157),
        "pixel": (5708, 5724),
        "vae": (-463, -462),
        "beta-vae": (-731, -731),
        "dip-vae": (-463, -462),
    },
}
"""Log-likelihoods of the paper's table 3, its signs restored: prior, approximate aggregate posterior."""
FIGURES = (
    "iwae_20_first_500",
    "iwae_20_first_500_mixture",
    "iwae_20",
    "iwae_20_mixture",
    "bits_per_dim",
    "bits_per_dim_mixture",
    "noise_floor_var",
    "elbo",
    "mse",
)


def specs(lab: Lab) -> list[Spec]:
    """Models of the table."""
    return [Spec(data, method) for data in PAPER if data in lab.sets for method in METHODS]


def compute(lab: Lab) -> dict[str, Any]:
    """Likelihoods by data set and method."""
    rows: dict[str, Any] = {}
    for spec in specs(lab):
        found = lab.evaluation(spec)["likelihood"]
        row = {name: found.get(name) for name in FIGURES}
        if spec.method not in ("pixel", "pixel-low"):
            row["noise_floor_var"] = found["noise_var"][
                "value"
            ]  # one variance for all is its own floor
        rows.setdefault(spec.data, {})[spec.method] = row
    return {"rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """A table for each data set, with the paper's figures."""
    parts = []
    for data, rows in found["rows"].items():
        lines = []
        for method, row in rows.items():
            paper = PAPER[data].get(method)
            lines.append(
                [
                    TITLES[method],
                    row["iwae_20_first_500"],
                    row["iwae_20_first_500_mixture"],
                    f"{row['noise_floor_var']:.3g}",
                    estimate(row, "bits_per_dim"),
                    estimate(row, "bits_per_dim_mixture"),
                    f"{paper[0]} / {paper[1]}" if paper else None,
                ]
            )
        head = [
            SET_TITLES[data],
            "prior",
            "mixture",
            "floor, σ²",
            "bits, prior",
            "bits, mixture",
            "paper, nats",
        ]
        parts.append(table(head, lines))
    return "\n\n".join(parts)
