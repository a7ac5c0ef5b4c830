"""A run in plain words: is it good, what is not, and what to do about it.

The sentences are computed from the figures of the epochs and of the evaluation. Each belongs to a
question that a reader asks first: did it converge, does it overfit, are units collapsed, and are
the predicted std right?
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from equipoise.run import Row

NEGLIGIBLE_RATIO, LARGE_RATIO = 1.25, 2.0
"""Ratios of held-out to training squared error below which nothing, and from which much, is learned
by heart."""
NOMINAL_COVERAGE = 0.6827
"""Share of Gaussian errors that lie within one std."""
SMALL_MISS = 0.05
"""Difference of coverages that goes without advice."""


class Finding(NamedTuple):
    """The answer to one question.

    Args:
        is_good: Whether nothing need be done. None if it is not known.
        text: Sentences, with what to do.
    """

    is_good: bool | None
    text: str


class Verdict(NamedTuple):
    """All answers, and one sentence about them.

    Args:
        headline: The sentence.
        findings: The answers, in the order of the questions.
    """

    headline: str
    findings: list[Finding]


def verdict(rows: Sequence[Row], evaluation: dict[str, Any], run: str = "RUN") -> Verdict:
    """Judge a run by its figures.

    Args:
        rows: Rows of ``metrics.jsonl``.
        evaluation: Content of ``evaluation.json``. Empty if there is none.
        run: The folder of the run, for commands.

    Returns:
        The verdict.

    Example:
        >>> row = {"stage": 1, "decision": "stage 1 converged at epoch 9", "active_units": 3}
        >>> row |= {"validation_elbo": 5.0, "overfitting": 1.1}
        >>> verdict([row], {}).headline
        'The training is in order, as far as it is known: run the commands below for the rest.'
    """
    if not rows:
        return Verdict("The run has no epochs yet.", [])

    findings = [
        _convergence(rows, run),
        _overfitting(rows[-1]),
        _units(rows[-1], evaluation),
        *_reconstructions(evaluation),
        *_samples(evaluation),
        _calibration(evaluation, run),
    ]
    bad = [finding for finding in findings if finding.is_good is False]
    if bad:
        topics = [finding.text.partition(":")[0] for finding in bad]
        listed = " and ".join(topic if topic == topics[0] else topic.lower() for topic in topics)
        verb = "needs" if len(bad) == 1 else "need"
        headline = f"{listed} {verb} attention: see below what to do."
    elif any(finding.is_good is None for finding in findings):
        headline = (
            "The training is in order, as far as it is known: run the commands below for the rest."
        )
    else:
        headline = "The model has converged, and nothing that was measured needs attention."
        likelihood = evaluation.get("likelihood", {})
        if "mse_pca" in likelihood:
            share = _value(likelihood["mse"]) / _value(likelihood["mse_pca"])
            headline = (
                f"The model has converged, its reconstructions have {share:.0%} of the squared "
                "error of PCA of as many numbers, and nothing that was measured needs attention."
            )
    return Verdict(headline, findings)


def _convergence(rows: Sequence[Row], run: str) -> Finding:
    """Did the last stage converge, or did it end at its limit?"""
    last = rows[-1]
    stage = last["stage"]
    decision = last["decision"]
    of_stage = sum(row["stage"] == stage for row in rows)
    if "converged" in decision or "has not risen" in decision:
        return Finding(True, f"Convergence: {decision}.")
    if "ended at its limit" not in decision:
        return Finding(
            None,
            f"Convergence: the training has not ended; 'equipoise train --resume {run}' goes on.",
        )
    return Finding(
        False,
        f"Convergence: {decision}, before noise variance and ELBO had settled. More epochs may "
        f"give a better model: equipoise train --resume {run} --set "
        f"stage_{stage}_epochs={3 * of_stage}",
    )


def _overfitting(last: Row) -> Finding:
    """Is the noise of the training examples smaller because they were learned by heart?"""
    ratio = last.get("overfitting")
    if ratio is None:
        return Finding(
            None, "Overfitting: not measured, which variance_from=held-out does in training."
        )
    text = f"Overfitting: held-out examples have {ratio:.2f} times the error of the training"
    if ratio < NEGLIGIBLE_RATIO:
        return Finding(True, f"{text} examples, so that hardly anything was learned by heart.")
    if ratio < LARGE_RATIO:
        return Finding(True, f"{text} examples. The learned variance is that of held-out ones.")
    return Finding(
        False,
        f"{text} examples, which were partly learned by heart. More examples, weight_decay, a "
        "smaller width or fewer epochs lower that.",
    )


def _units(last: Row, evaluation: dict[str, Any]) -> Finding:
    """Do codes say anything about the data?"""
    active = evaluation.get("latent", {}).get("active_units") or {"value": last["active_units"]}
    n, of = active["value"], active.get("of")
    share = f"{n} of {of}" if of else f"{n}"
    if not n:
        return Finding(
            False,
            "Latent units: none is active, so that the model ignores its codes. Lower the noise "
            "variance if it is fixed; otherwise train longer, or lower learning_rate.",
        )
    if n == of:
        return Finding(
            True,
            f"Latent units: all {of} are active. A larger latent_dim may give a higher ELBO.",
        )
    rest = " The others are switched off, which costs nothing." if of else ""
    return Finding(True, f"Latent units: {share} carry information about the data.{rest}")


def _value(estimate: Any) -> float:  # noqa: ANN401 (an estimate as JSON values)
    value: float = estimate["value"]
    return value


def _reconstructions(evaluation: dict[str, Any]) -> list[Finding]:
    """Are reconstructions better than what needs no network?"""
    likelihood = evaluation.get("likelihood", {})
    if "mse_pca" not in likelihood:
        return []
    mse = _value(likelihood["mse"])
    of_mean, of_pca = (_value(likelihood[f"mse_{name}"]) for name in ("mean_example", "pca"))
    text = (
        f"Reconstructions: a squared error of {mse:.3g}, where the mean example has {of_mean:.3g} "
        f"and PCA of as many numbers {of_pca:.3g}"
    )
    if mse >= of_mean:
        advice = "the codes say nothing. Train longer, or lower learning_rate"
        return [Finding(False, f"{text}: {advice}.")]
    if mse > of_pca:
        advice = "a linear model is nearer. Train longer, or give a larger width"
        return [Finding(False, f"{text}: {advice}.")]
    return [Finding(True, f"{text}.")]


def _samples(evaluation: dict[str, Any]) -> list[Finding]:
    """Are samples near real examples, as far as the decoder can draw them?"""
    samples = evaluation.get("samples", {})
    rows = ("real", "reconstructions", "prior", "mixture")
    if not all("frechet_distance" in samples.get(row, {}) for row in rows):
        return []
    real, decoded, prior, mixture = (_value(samples[row]["frechet_distance"]) for row in rows)
    text = (
        f"Samples: those of the mixture have a Fréchet distance of {mixture:.3g} to test examples, "
        f"those of the prior {prior:.3g}, reconstructions {decoded:.3g} and training examples "
        f"{real:.3g}"
    )
    if mixture > prior:
        return [Finding(False, f"{text}: the mixture fits badly. Give n_components=auto.")]
    limit = "the codes" if mixture - decoded > decoded - real else "the pictures of the decoder"
    return [Finding(True, f"{text}. What is left is more in {limit} than elsewhere.")]


def _calibration(evaluation: dict[str, Any], run: str) -> Finding:
    """Are errors as large as their predicted std says?"""
    noise = evaluation.get("noise", {})
    part = noise.get("varying") or noise.get("all") or {}
    coverage = part.get("coverage_1", {}).get("value")
    if coverage is None:
        return Finding(
            None, f"Calibration: not measured yet, which 'equipoise evaluate {run}' does."
        )
    miss = coverage - NOMINAL_COVERAGE
    text = (
        f"Calibration: {coverage:.1%} of the errors lie within one predicted std, where "
        f"{NOMINAL_COVERAGE:.1%} of Gaussian errors do"
    )
    if abs(miss) <= SMALL_MISS:
        return Finding(True, f"{text}: within {100 * SMALL_MISS:.0f} points.")

    interval = part.get("interval_coverage_1", {}).get("value")
    are = "too large" if miss > 0 else "too small"
    if interval is not None and abs(interval - NOMINAL_COVERAGE) <= SMALL_MISS:
        return Finding(
            True,
            f"{text}: the std are {are} for most errors, which are not Gaussian. The intervals "
            f"that were calibrated on held-out data hold {interval:.1%}: use them.",
        )
    return Finding(
        False,
        f"{text}: the std are {are} for most errors. Another noise model or recalibrate=coverage "
        "may help, or a larger validation_fraction, if that set is small.",
    )
