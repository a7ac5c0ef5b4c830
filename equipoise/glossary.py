"""How ``evaluation.json`` reads to people, on a terminal and in the report: what its keys mean, and its numbers."""

import math
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

Keys: TypeAlias = tuple[str, ...]
"""Down to a figure, from the outside in."""


class Term(NamedTuple):
    """A key of ``evaluation.json``.

    Args:
        title: for people.
        unit: of the figure; empty if it has none.
        meaning: one sentence on what the figure says; empty for the name of a case, such as "prior".
        better: in which direction the figure is good; empty where neither is.
    """

    title: str
    unit: str = ""
    meaning: str = ""
    better: Literal["higher", "lower", ""] = ""


_BITS = "Bits that a dimension of the dequantised data costs, at most: comparable between models of the same data"
_COVERAGE = (
    "Share of the errors within {} predicted std; {} if the noise is Gaussian and its std right."
)
_INTERVAL = "Share of the errors within the interval that held {} of the held-out errors: calibrated whatever their shape."

TERMS: dict[str, Term] = {
    # likelihood
    "elbo": Term("ELBO", "nats", "Evidence lower bound on log p(x), constants included.", "higher"),
    "log_likelihood": Term(
        "Log-likelihood", "nats", "Reconstruction term of the ELBO, E log p(x|z).", "higher"
    ),
    "kl": Term(
        "KL(posterior, prior)",
        "nats",
        "Regularisation term of the ELBO: what the codes tell of the data.",
    ),
    "mse": Term(
        "Squared error",
        "(model unit)²",
        "Per dimension, with z sampled; images have the unit 1.",
        "lower",
    ),
    "noise_var": Term(
        "Noise variance", "(model unit)²", "Variance of p(x|z), mean over the dimensions."
    ),
    "noise_floor_var": Term(
        "Noise floor",
        "(model unit)²",
        "Smallest variance that the model can predict; it limits the raw likelihood.",
    ),
    "dequantised": Term("dequantised data"),
    "bits_per_dim": Term("Bits per dimension", "bits", f"{_BITS}.", "lower"),
    "bits_per_dim_mixture": Term(
        "Bits per dimension, mixture as p(z)", "bits", f"{_BITS}.", "lower"
    ),
    # samples
    "features": Term(
        "Features",
        "",
        "Network in whose features images are compared; never compare across networks.",
    ),
    "feature_dimension": Term(
        "Feature dimension", "", "Fewer samples than this bias the Fréchet distance upwards."
    ),
    "reference": Term("Reference", "", "Real images that each set is compared with."),
    "examples": Term("examples"),
    "n": Term("number"),
    "real": Term("real training data"),
    "reconstruction": Term("reconstructions"),
    "prior": Term("prior"),
    "gaussian": Term("one Gaussian"),
    "mixture": Term("mixture"),
    "flow": Term("flow"),
    "aggregate": Term("aggregate posterior"),
    "frechet_distance": Term(
        "Fréchet distance",
        "",
        "Distance of the features' means and covariances from those of real images.",
        "lower",
    ),
    "kernel_distance": Term(
        "Kernel distance",
        "",
        "Unbiased squared maximum mean discrepancy of the features; may be negative.",
        "lower",
    ),
    # latent
    "kl_mixture_prior": Term(
        "KL(mixture, prior)", "nats", "How far the codes in use are from the prior."
    ),
    "active_units": Term(
        "Active units", "", "Latent units whose posterior mean varies with the input."
    ),
    "rate_per_unit": Term(
        "Rate per unit", "nats", "Mean KL of each latent unit; they add up to the KL of the ELBO."
    ),
    "code_log_likelihood": Term(
        "Log-likelihood of the codes",
        "nats",
        "How well each density explains codes of held-out data.",
        "higher",
    ),
    "gain": Term("mixture over one Gaussian"),
    "code_gain": Term(
        "Log-likelihood over the run's mixture",
        "nats",
        "Gain on the same codes, whose error is smaller.",
        "higher",
    ),
    "memorisation": Term(
        "Distance to the training data",
        "",
        "Median distance to the nearest decoded training example, in model units.",
    ),
    "samples": Term("samples"),
    "reconstructions": Term("reconstructed test data"),
    "test": Term("test data"),
    "closer": Term(
        "Closer than reconstructions",
        "",
        "Probability that a sample singles out one training example more than a reconstructed test example does; 0.5 "
        "if nothing is copied, 1 if all is.",
    ),
    "copied": Term(
        "Copies training data", "", "Whether samples are nearer to it than chance allows."
    ),
    # noise
    "all": Term("all dimensions"),
    "varying": Term("dimensions that vary"),
    "coverage_1": Term("Within 1 std (.683)", "", _COVERAGE.format(1, 0.683)),
    "coverage_2": Term("Within 2 std (.954)", "", _COVERAGE.format(2, 0.954)),
    "coverage_3": Term("Within 3 std (.997)", "", _COVERAGE.format(3, 0.997)),
    "interval_coverage_1": Term("In the .683 interval", "", _INTERVAL.format(0.683)),
    "interval_coverage_2": Term("In the .954 interval", "", _INTERVAL.format(0.954)),
    "interval_coverage_3": Term("In the .997 interval", "", _INTERVAL.format(0.997)),
    "standardised_var": Term(
        "Standardised variance",
        "",
        "Mean of (error / predicted std)²; 1 if right, above it the std is too small.",
    ),
    "normalised_calibration_error": Term(
        "Normalised calibration error",
        "",
        "Mean relative gap of predicted std and RMSE over the bins.",
        "lower",
    ),
    "pit_histogram_error": Term(
        "PIT histogram error",
        "",
        "Distance of the probability integral transform from uniform.",
        "lower",
    ),
    "sparsification_error_area": Term(
        "Sparsification error",
        "",
        "Area between the orders by predicted std and by true error.",
        "lower",
    ),
    "random_sparsification_error_area": Term(
        "Sparsification error of a random order", "", "What a std that knows nothing would have."
    ),
    "varying_share": Term(
        "Share that varies", "", "Share of the dimensions that are not constant in the data."
    ),
    # outliers
    "against": Term("Outliers from", "", "The data that the model should find odd."),
    "n_inliers": Term("Inliers", "", "Examples of the model's own test set."),
    "n_outliers": Term("Outliers", "", "Examples of the other data."),
    "outlier_share": Term("Outliers' share", "", "Of all examples; the AUPR depends on it."),
    "negative_elbo": Term("by ELBO"),
    "standardised_residual": Term("by standardised residual"),
    "negative_mixture_log_prob": Term("by mixture density of the code"),
    "combined": Term("by the combination"),
    "auroc": Term(
        "AUROC", "", "Probability that an outlier scores above an inlier; 0.5 is chance.", "higher"
    ),
    "aupr": Term(
        "AUPR", "", "Mean precision over the recalls; chance is the outliers' share.", "higher"
    ),
}


CURVES = frozenset({"reliability", "sparsification", "pit_histogram"})
"""What is drawn, not printed."""


def term(key: str) -> Term:
    """Look a key up.

    Args:
        key: of ``evaluation.json``.

    Returns:
        Its entry; for a key that is not in the table, the key itself with spaces.

    Example:
        >>> term("kl_mixture_prior").title
        'KL(mixture, prior)'
        >>> term("iwae_20_first_500_mixture").title
        'IWAE-20, first 500, mixture as p(z)'
        >>> term("mixture=500").title
        'mixture of 500'
        >>> term("some_new_figure").title
        'Some new figure'
    """
    if bound := re.fullmatch(r"iwae_(\d+)(?:_first_(\d+))?(_mixture)?", key):
        n_samples, first, mixture = bound.groups()
        title = (
            f"IWAE-{n_samples}"
            + (f", first {first}" if first else "")
            + (", mixture as p(z)" if mixture else "")
        )
        meaning = f"Importance-weighted lower bound on log p(x), {n_samples} samples of z each: tighter than the ELBO."
        return Term(title, "nats", meaning, "higher")
    if mixture := re.fullmatch(r"mixture=(?:(\d+)|auto)", key):
        return Term(f"mixture of {int(mixture[1]):,}" if mixture[1] else "mixture of chosen K")
    return TERMS.get(key) or Term(key.replace("_", " ").capitalize())


def leaves(value: Any, *keys: str) -> Iterator[tuple[Keys, Any]]:  # noqa: ANN401 (any JSON value)
    """Walk down to the figures of a tree, which are all but dictionaries without a "value"; curves are left out.

    Args:
        value: JSON values.
        *keys: that have led here.

    Yields:
        Keys and figure.

    Example:
        >>> list(leaves({"prior": {"kernel_distance": {"value": 0.1}}, "n": 3}))
        [(('prior', 'kernel_distance'), {'value': 0.1}), (('n',), 3)]
    """
    if isinstance(value, dict) and "value" not in value:
        for key, child in value.items():
            if key not in CURVES:
                yield from leaves(child, *keys, key)
    else:
        yield keys, value


def measure(keys: Keys) -> tuple[str, Keys]:
    """Tell what is measured from the case that it is measured for.

    Args:
        keys: from within a section of ``evaluation.json`` down to a figure, at least one.

    Returns:
        The key of the measure, which is the last one with a meaning, and the keys of the case, which have none.

    Example:
        >>> measure(("mixture", "frechet_distance"))
        ('frechet_distance', ('mixture',))
        >>> measure(("code_log_likelihood", "mixture"))
        ('code_log_likelihood', ('mixture',))
    """
    found = next((i for i in reversed(range(len(keys))) if term(keys[i]).meaning), len(keys) - 1)
    return keys[found], tuple(
        key for i, key in enumerate(keys) if i != found and not term(key).meaning
    )


def title(keys: Keys) -> str:
    """Name a figure in one line: what is measured, and of which case.

    Args:
        keys: from within a section of ``evaluation.json`` down to a figure, at least one.

    Returns:
        The title.

    Example:
        >>> title(("mixture", "frechet_distance"))
        'Fréchet distance, mixture'
    """
    key, case = measure(keys)
    return ", ".join(term(part).title for part in (key, *case))


def format_figure(figure: Any) -> str:  # noqa: ANN401 (any JSON value)
    r"""Write a figure: its standard error with two digits, its value with as many decimals.

    Args:
        figure: an estimate as a dictionary, any other JSON value, or a list of them.

    Returns:
        Text without the unit, with a no-break space after the sign.

    Example:
        >>> format_figure({"value": 50.00225, "standard_error": 1.4725, "n": 180})
        '50.0 ±\xa01.5'
        >>> format_figure({"value": 16, "of": 16, "threshold": 0.01, "n": 180})
        '16 (of 16, threshold 0.01)'
    """
    if isinstance(figure, list):
        return ", ".join(
            format_figure(item["value"] if isinstance(item, dict) else item) for item in figure
        )
    if isinstance(figure, dict):
        value, error = figure["value"], figure.get("standard_error")
        others = [
            f"{key.replace('_', ' ')} {format_figure(other)}"
            for key, other in figure.items()
            if key not in ("value", "standard_error", "n")
        ]
        if not error:
            text = format_figure(value)
        elif (decimals := max(0, 1 - math.floor(math.log10(error)))) < 8:
            text = f"{value:,.{decimals}f} ±\u00a0{error:,.{decimals}f}"
        else:
            text = f"{value:.4g} ±\u00a0{error:.2g}"
        return f"{text} ({', '.join(others)})" if others else text
    if isinstance(figure, bool):
        return "yes" if figure else "no"
    if isinstance(figure, float):
        return f"{figure:.4g}"
    return f"{figure:,}" if isinstance(figure, int) else str(figure)


def warnings_of(evaluation: dict[str, Any]) -> Iterator[str]:
    """Say what a reader of the figures must know.

    Args:
        evaluation: content of ``evaluation.json``.

    Yields:
        Sentences.
    """
    likelihood, samples = evaluation.get("likelihood", {}), evaluation.get("samples", {})
    floor_var, noise_var = likelihood.get("noise_floor_var"), likelihood.get("noise_var")
    if floor_var and noise_var and noise_var["value"] < 2 * floor_var:
        yield (
            f"The mean noise variance, {noise_var['value']:.3g}, is near its floor, {floor_var:.3g}: the raw "
            "likelihood says as much of the floor as of the model. Quote it together with the floor."
        )
    rows = [row for row in samples.values() if isinstance(row, dict) and "frechet_distance" in row]
    n = min((row["frechet_distance"]["n"] for row in rows), default=None)
    if n is not None and n <= samples.get("feature_dimension", 0):
        yield (
            f"The Fréchet distances rest on {n:,} examples and {samples['feature_dimension']:,} features: with no more "
            "examples than features they are far too high. Compare them only at the same N."
        )
    memorisation = evaluation.get("latent", {}).get("memorisation", {})
    if "n_training" in memorisation:
        yield f"Copies were sought among the first {memorisation['n_training']:,} training examples of the stream only."
    by_source = {"mixture": memorisation} | {
        key: part for key, part in memorisation.items() if isinstance(part, dict)
    }
    for source, part in by_source.items():
        if part.get("copied"):
            yield (
                f"Samples ({term(source).title}) single out training examples more than reconstructions of unseen data "
                "do: they may be copies."
            )
