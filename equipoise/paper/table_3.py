"""Table 3: test log-likelihoods, raw with their floor, and in bits of the levels."""

from typing import Any

from equipoise.paper.markdown import Better, bits, brief, table
from equipoise.paper.protocol import SET_TITLES, TITLES, Lab, Spec

TITLE = "Table 3: importance-weighted log-likelihoods"
TEXT = (
    "IWAE with 20 samples on the first 500 test images, in nats, with the prior or the mixture as "
    "p(z), as in the paper. A raw density of 8-bit pixels has no upper bound. It grows as the "
    "noise floor falls, so the floor stands beside it. Bits per dimension (IWAE-20 of the levels, "
    "the whole test set, and in brackets those of dequantised data) can be compared between all "
    "models: lower is better, and levels that are guessed cost 8. The paper's 6037 nats lie above "
    "784 ln 256 = 4347, the most that any model of uniformly dequantised pixels can reach."
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
"""Log-likelihoods in the paper's table 3, with their signs restored.

The first is with the prior, the second with the approximate aggregate posterior.
"""
BETTER: Better = dict.fromkeys(
    ("bits, prior (dequantised)", "bits, mixture (dequantised)"), "lower"
)
FIGURES = (
    "iwae_20_first_500",
    "iwae_20_first_500_mixture",
    "iwae_20",
    "iwae_20_mixture",
    "bits_per_dim",
    "bits_per_dim_mixture",
    "bits_per_dim_dequantised",
    "bits_per_dim_dequantised_mixture",
    "noise_floor_var",
    "elbo",
    "mse",
)


def specs(lab: Lab) -> list[Spec]:
    """Models of the table."""
    return [Spec(data, method) for data in PAPER if data in lab.sets for method in METHODS]


def compute(lab: Lab) -> dict[str, Any]:
    """Collect likelihoods by data set and method."""
    rows: dict[str, Any] = {}
    for spec in specs(lab):
        likelihood = lab.evaluation(spec)["likelihood"]
        row = {name: likelihood.get(name) for name in FIGURES}
        if spec.method not in ("pixel", "pixel-low"):
            # A model with one variance for all pixels cannot go below it: it is its own floor.
            row["noise_floor_var"] = likelihood["noise_var"]["value"]

        rows.setdefault(spec.data, {})[spec.method] = row

    return {"rows": rows}


def markdown(content: dict[str, Any]) -> str:
    """Make a table for each data set, with the paper's figures."""
    columns = [
        "prior",
        "mixture",
        "floor, σ²",
        "bits, prior (dequantised)",
        "bits, mixture (dequantised)",
        "paper, nats",
    ]
    parts = []
    for data, rows in content["rows"].items():
        lines = []
        for method, row in rows.items():
            in_paper = None
            if method in PAPER[data]:
                prior, mixture = PAPER[data][method]
                in_paper = f"{prior} / {mixture}"

            lines.append(
                [
                    TITLES[method],
                    row["iwae_20_first_500"],
                    row["iwae_20_first_500_mixture"],
                    brief(row["noise_floor_var"], ".3g"),
                    bits(row),
                    bits(row, "_mixture"),
                    in_paper,
                ]
            )

        parts.append(table([SET_TITLES[data], *columns], lines, BETTER))

    return "\n\n".join(parts)
