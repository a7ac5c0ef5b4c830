"""Titles, units and explanations of the keys in ``evaluation.json``, for terminal and report."""

import math
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

Keys: TypeAlias = tuple[str, ...]
"""The keys that lead to a figure, from the outermost to the innermost."""


class Term(NamedTuple):
    """A key of ``evaluation.json``.

    Args:
        title: Title for readers.
        unit: Unit of the figure. It is empty if the figure has none.
        meaning: Explanation of the figure in one or more sentences. It is empty for the name of a
            case, such as "prior".
        better: Direction in which the figure is better. It is empty if there is none.
    """

    title: str
    unit: str = ""
    meaning: str = ""
    better: Literal["higher", "lower", ""] = ""


_BITS = (
    "Bits per dimension that the levels of the data need, an upper bound from the importance "
    "weights. It can be compared between models of the same data."
)
_DEQUANTISED_BITS = (
    "The same from the density of data with uniform noise in place of their rounding: never less, "
    "and far more where the std is below a level."
)
_COVERAGE = (
    "Share of the errors within {} predicted std. "
    "It is {} if the noise is Gaussian and its std is correct."
)
_INTERVAL = (
    "Share of the errors within an interval that contains {} of the held-out errors. "
    "The errors need not be Gaussian."
)

_DIGITAL = (
    "Share of the data within {} predicted std if each is taken to be anywhere in its level, as "
    "the model says. It is {} if the levels are as probable as the model says."
)

TERMS: dict[str, Term] = {
    # likelihood
    "elbo": Term("ELBO", "nats", "Evidence lower bound on log p(x), constants included.", "higher"),
    "log_likelihood": Term(
        "Log-likelihood", "nats", "Reconstruction term of the ELBO, E log p(x|z).", "higher"
    ),
    "kl": Term(
        "KL(posterior, prior)",
        "nats",
        "Regularisation term of the ELBO: the information in the codes about the data.",
    ),
    "mse": Term(
        "Squared error",
        "(model unit)²",
        "Mean over the dimensions, with z sampled. Images have the unit 1.",
        "lower",
    ),
    "mse_mean_example": Term(
        "Squared error of the mean example",
        "(model unit)²",
        "That of the mean of the training examples, which knows nothing of an example.",
    ),
    "mse_pca": Term(
        "Squared error of PCA",
        "(model unit)²",
        "That of as many principal components of the training as the codes have units.",
    ),
    "noise_var": Term(
        "Noise variance", "(model unit)²", "Variance of p(x|z), mean over the dimensions."
    ),
    "noise_floor_var": Term(
        "Noise floor",
        "(model unit)²",
        "Smallest variance that the model can predict. It limits the raw likelihood.",
    ),
    "dequantised": Term("dequantised data"),
    "digital": Term("levels of the data"),
    "bits_per_dim": Term("Bits per dimension", "bits", _BITS, "lower"),
    "bits_per_dim_mixture": Term("Bits per dimension, mixture as p(z)", "bits", _BITS, "lower"),
    "bits_per_dim_dequantised": Term(
        "Bits per dimension, dequantised", "bits", _DEQUANTISED_BITS, "lower"
    ),
    "bits_per_dim_dequantised_mixture": Term(
        "Bits per dimension, dequantised, mixture as p(z)", "bits", _DEQUANTISED_BITS, "lower"
    ),
    # samples
    "features": Term(
        "Features",
        "",
        "Network whose features compare images. Figures of two networks are not comparable.",
    ),
    "feature_dimension": Term(
        "Feature dimension", "", "With fewer samples than this, the Fréchet distance is too large."
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
        "Unbiased squared maximum mean discrepancy of the features. It may be negative.",
        "lower",
    ),
    "precision": Term(
        "Precision",
        "",
        "Share of the samples whose features are within the manifold of real images, the balls "
        "around them that reach to the third nearest.",
        "higher",
    ),
    "recall": Term(
        "Recall",
        "",
        "Share of the real images whose features are within the manifold of the samples. A sampler "
        "that leaves some kinds of images out has a low recall.",
        "higher",
    ),
    # latent
    "kl_mixture_prior": Term(
        "KL(mixture, prior)", "nats", "Distance of the density of the codes from the prior."
    ),
    "active_units": Term(
        "Active units", "", "Latent units whose posterior mean varies with the input."
    ),
    "rate_per_unit": Term(
        "Rate per unit",
        "nats",
        "Mean KL of each latent unit. The sum over the units is the KL of the ELBO.",
    ),
    "code_log_likelihood": Term(
        "Log-likelihood of the codes",
        "nats",
        "Mean log-density of the codes of held-out data.",
        "higher",
    ),
    "gain": Term("mixture over one Gaussian"),
    "code_gain": Term(
        "Log-likelihood over the run's mixture",
        "nats",
        "Gain over the mixture on the same codes. Its standard error is smaller than theirs.",
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
        "Probability that the distance to the nearest training example, in units of that to the "
        "second nearest, is smaller for a sample than for a reconstructed test example. It is 0.5 "
        "if there are no copies, and 1 if all samples are copies.",
    ),
    "copied": Term(
        "Copies training data",
        "",
        "Whether samples single out training examples more than chance explains.",
    ),
    # noise
    "all": Term("all dimensions"),
    "varying": Term("dimensions that vary"),
    "off_bounds": Term("values off the bounds"),
    "coverage_1": Term("Within 1 std (.683)", "", _COVERAGE.format(1, 0.683)),
    "coverage_2": Term("Within 2 std (.954)", "", _COVERAGE.format(2, 0.954)),
    "coverage_3": Term("Within 3 std (.997)", "", _COVERAGE.format(3, 0.997)),
    "interval_coverage_1": Term("In the .683 interval", "", _INTERVAL.format(0.683)),
    "interval_coverage_2": Term("In the .954 interval", "", _INTERVAL.format(0.954)),
    "interval_coverage_3": Term("In the .997 interval", "", _INTERVAL.format(0.997)),
    "digital_coverage_1": Term("Within 1 std as levels (.683)", "", _DIGITAL.format(1, 0.683)),
    "digital_coverage_2": Term("Within 2 std as levels (.954)", "", _DIGITAL.format(2, 0.954)),
    "digital_coverage_3": Term("Within 3 std as levels (.997)", "", _DIGITAL.format(3, 0.997)),
    "standardised_var": Term(
        "Standardised variance",
        "",
        "Mean of (error / predicted std)². It is 1 if the std is correct, and larger if the std "
        "is too small.",
    ),
    "normalised_calibration_error": Term(
        "Normalised calibration error",
        "",
        "Mean relative difference of predicted std and RMSE over the bins.",
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
        "Area between the curves ordered by predicted std and by true error.",
        "lower",
    ),
    "random_sparsification_error_area": Term(
        "Sparsification error of a random order",
        "",
        "Sparsification error of a std without information.",
    ),
    "correlation_gain": Term(
        "Gain by correlation",
        "nats",
        "log p(x|z) less that of independent errors of the same std.",
        "higher",
    ),
    "varying_share": Term(
        "Share that varies", "", "Share of the dimensions that are not constant in the data."
    ),
    "off_bounds_share": Term(
        "Share off the bounds",
        "",
        "Share of the values that vary whose mean and datum are not both on the same bound of the "
        "scale, such as black.",
    ),
    # outliers
    "against": Term("Outliers from", "", "Data that the model should recognise as outliers."),
    "n_inliers": Term("Inliers", "", "Examples of the model's own test set."),
    "n_outliers": Term("Outliers", "", "Examples of the other data."),
    "outlier_share": Term(
        "Outliers' share", "", "Share of the outliers among all examples. The AUPR depends on it."
    ),
    "negative_elbo": Term("by ELBO"),
    "standardised_residual": Term("by standardised residual"),
    "negative_mixture_log_prob": Term("by mixture density of the code"),
    "combined": Term("by the combination"),
    "auroc": Term(
        "AUROC", "", "Probability that an outlier scores above an inlier. 0.5 is chance.", "higher"
    ),
    "aupr": Term(
        "AUPR",
        "",
        "Mean precision over the recalls. Chance is the share of the outliers.",
        "higher",
    ),
}


ESTIMATE = frozenset({"value", "standard_error", "error_over_seeds", "of_seeds", "n"})
"""Keys of a figure that are its value, its errors, and what these are computed from."""
CURVES = frozenset({"reliability", "sparsification", "spectra", "pit_histogram", "unit_is_active"})
"""Keys of curves and of what bars are drawn from, which are plotted and not printed."""


def term(key: str) -> Term:
    """Look up a key.

    Args:
        key: Key of ``evaluation.json``.

    Returns:
        The entry of the key. For a key that is not in the table, the title is the key with spaces.

    Example:
        >>> term("kl_mixture_prior").title
        'KL(mixture, prior)'
        >>> term("iwae_20_first_500_mixture").title
        'IWAE-20, first 500, mixture as p(z)'
        >>> term("mixture=500").title
        'mixture of 500'
        >>> term("mixture@0.8").title
        'mixture at temperature 0.8'
        >>> term("some_new_figure").title
        'Some new figure'
        >>> term("label Cat_1").title
        'label Cat_1'
    """
    bound = re.fullmatch(r"iwae_(\d+)(?:_first_(\d+))?(_mixture)?", key)
    if bound:
        n_samples, first, mixture_prior = bound.groups()
        title = f"IWAE-{n_samples}"
        if first:
            title += f", first {first}"
        if mixture_prior:
            title += ", mixture as p(z)"
        meaning = (
            f"Importance-weighted lower bound on log p(x), {n_samples} samples of z per example. "
            "It is tighter than the ELBO."
        )
        return Term(title, "nats", meaning, "higher")

    mixture = re.fullmatch(r"mixture=(?:(\d+)|auto)", key)
    if mixture:
        K = mixture[1]
        return Term(f"mixture of {int(K):,}" if K else "mixture of chosen K")

    base, is_tempered, temperature = key.partition("@")
    if is_tempered:
        return Term(f"{term(base).title} at temperature {temperature}")

    if key in TERMS:
        return TERMS[key]
    if key.startswith("label "):
        return Term(key)
    return Term(key.replace("_", " ").capitalize())


def leaves(value: Any, *keys: str) -> Iterator[tuple[Keys, Any]]:  # noqa: ANN401 (any JSON value)
    """Iterate over the figures of a tree, without curves.

    A dictionary without the key "value" is a branch. Any other value is a figure.

    Args:
        value: JSON value, the tree.
        *keys: The keys that lead to ``value``.

    Yields:
        The keys of a figure, and the figure.

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
    """Separate the key of the measure from the keys of the case.

    Args:
        keys: Keys from within a section of ``evaluation.json`` to a figure, at least one.

    Returns:
        The key of the measure, which is the last one with a meaning, and the keys of the case,
        which have no meaning.

    Example:
        >>> measure(("mixture", "frechet_distance"))
        ('frechet_distance', ('mixture',))
        >>> measure(("code_log_likelihood", "mixture"))
        ('code_log_likelihood', ('mixture',))
    """
    index = len(keys) - 1
    for i in reversed(range(len(keys))):
        if term(keys[i]).meaning:
            index = i
            break

    others = keys[:index] + keys[index + 1 :]
    return keys[index], tuple(key for key in others if not term(key).meaning)


def title(keys: Keys) -> str:
    """Return the title of a figure in one line, with the measure first and then the case.

    Args:
        keys: Keys from within a section of ``evaluation.json`` to a figure, at least one.

    Returns:
        The title.

    Example:
        >>> title(("mixture", "frechet_distance"))
        'Fréchet distance, mixture'
    """
    key, case = measure(keys)
    return ", ".join(term(part).title for part in (key, *case))


def format_figure(figure: Any) -> str:  # noqa: ANN401 (any JSON value)
    r"""Format a figure.

    The standard error has two digits. The value has the same number of decimals. A figure over
    seeds, see :func:`equipoise.paper.seeds.over_seeds`, has its error over seeds before that over
    examples, and its value has the decimals of the larger one.

    Args:
        figure: An estimate as a dictionary, any other JSON value, or a list of them.

    Returns:
        Text without the unit, with a no-break space after the sign ±.

    Example:
        >>> format_figure({"value": 50.00225, "standard_error": 1.4725, "n": 180})
        '50.0 ±\xa01.5'
        >>> format_figure({"value": 16, "of": 16, "threshold": 0.01, "n": 180})
        '16 (of 16, threshold 0.01)'
        >>> format_figure({"value": 1.5, "error_over_seeds": 0.25, "of_seeds": [1.25, 1.75]})
        '1.50 ±\xa00.25'
    """
    if isinstance(figure, list):
        values = [item["value"] if isinstance(item, dict) else item for item in figure]
        return ", ".join(format_figure(value) for value in values)

    if isinstance(figure, dict):
        errors = [figure[key] for key in ("error_over_seeds", "standard_error") if key in figure]
        text = _format_estimate(figure["value"], [error for error in errors if error is not None])
        others = [
            f"{key.replace('_', ' ')} {format_figure(other)}"
            for key, other in figure.items()
            if key not in ESTIMATE
        ]
        return f"{text} ({', '.join(others)})" if others else text

    if isinstance(figure, bool):
        return "yes" if figure else "no"
    if isinstance(figure, float):
        return f"{figure:.4g}"
    if isinstance(figure, int):
        return f"{figure:,}"
    return str(figure)


def _format_estimate(value: Any, errors: list[float]) -> str:  # noqa: ANN401 (any JSON value)
    if not any(errors):
        return format_figure(value)

    decimals = max(0, 1 - math.floor(math.log10(max(errors))))
    shown = f"{value:,.{decimals}f}" if decimals < 8 else f"{value:.4g}"
    return " ±\u00a0".join([shown, *map(_format_error, errors)])


def _format_error(error: float) -> str:
    if not error:
        return "0"

    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{error:,.{decimals}f}" if decimals < 8 else f"{error:.2g}"


def warnings_of(evaluation: dict[str, Any]) -> Iterator[str]:
    """Return warnings that a reader of the figures must know.

    Args:
        evaluation: Content of ``evaluation.json``.

    Yields:
        One warning, of one or more sentences.
    """
    likelihood = evaluation.get("likelihood", {})
    floor_var, noise_var = likelihood.get("noise_floor_var"), likelihood.get("noise_var")
    if floor_var and noise_var and noise_var["value"] < 2 * floor_var:
        yield (
            f"The mean noise variance, {noise_var['value']:.3g}, is near its floor, "
            f"{floor_var:.3g}. The raw likelihood depends on the floor as much as on the model. "
            "Quote it together with the floor."
        )

    if "bits_per_dim_dequantised" in likelihood and "bits_per_dim" not in likelihood:
        yield (
            "The bits per dimension are those of the dequantised data, an upper bound. The exact "
            "probability of a level has no closed form if the noise of pixels hangs together."
        )

    samples = evaluation.get("samples", {})
    distances = [row.get("frechet_distance") for row in samples.values() if isinstance(row, dict)]
    numbers = [distance.get("n") for distance in distances if isinstance(distance, dict)]
    counts = [n for n in numbers if isinstance(n, int)]
    n_features = samples.get("feature_dimension", 0)
    if counts and min(counts) <= n_features:
        yield (
            f"The Fréchet distances are from {min(counts):,} examples and {n_features:,} features. "
            "If there are no more examples than features, they are far too high. "
            "Compare them only at the same number of examples."
        )

    memorisation = evaluation.get("latent", {}).get("memorisation", {})
    if "n_training" in memorisation:
        yield (
            "The search for copies is limited to the first "
            f"{memorisation['n_training']:,} training examples of the stream."
        )

    parts = {key: part for key, part in memorisation.items() if isinstance(part, dict)}
    for source, part in {"mixture": memorisation, **parts}.items():
        if part.get("copied"):
            yield (
                f"Samples ({term(source).title}) single out training examples more than "
                "reconstructions of unseen data do. They may be copies."
            )
