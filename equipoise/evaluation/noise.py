"""The section ``noise``: whether the predicted std is the error that is found."""

from typing import Any

import numpy as np

from equipoise import plots
from equipoise.data.varying import varying_mask
from equipoise.evaluation.subject import Subject
from equipoise.metrics.calibration import Calibration, noise_calibration
from equipoise.metrics.whiteness import whiteness


def noise_section(subject: Subject) -> dict[str, Any]:
    """Calibrate over all dimensions, those that vary, and off the bounds; are the errors white?

    Args:
        subject: What is evaluated.

    Returns:
        Figures of each, the share of the dimensions that vary, and of values off the bounds.
    """
    varying = varying_mask(subject.data.train)
    batches = subject.batches("Noise", subject.test.raw)
    calibration = noise_calibration(subject.model, batches, varying, subject.generator("noise"))

    parts = {"all": calibration.all_dimensions}
    if calibration.varying_dimensions is not None:
        parts["varying"] = calibration.varying_dimensions
    if calibration.off_bounds is not None:
        parts["off_bounds"] = calibration.off_bounds

    dimensions = "pixels" if subject.is_image else "columns"
    titles = {"all": f"all {dimensions}", "varying": f"{dimensions} that vary"}
    titles["off_bounds"] = "those off the bounds"
    curves = {titles[name]: _curves(part) for name, part in parts.items()}
    plots.save(plots.reliability(curves), subject.figures / "reliability.png")

    part = calibration.varying_dimensions or calibration.all_dimensions
    plots.save(plots.sparsification(*part.sparsification), subject.figures / "sparsification.png")

    section: dict[str, Any] = {"varying_share": float(varying.float().mean())}
    if calibration.off_bounds_share is not None:
        section["off_bounds_share"] = calibration.off_bounds_share
    section |= _whiteness(subject)
    for name, part in parts.items():
        figures = part._asdict()
        section[name] = {key: figure for key, figure in figures.items() if figure is not None}
    return section


def _whiteness(subject: Subject) -> dict[str, Any]:
    """Compare the spectra of the residuals before and after whitening, and draw them."""
    batches = subject.batches("Correlation of the noise", subject.test.raw)
    found = whiteness(subject.model, batches, subject.generator("whiteness"))

    spectra = {"residuals": found.before, "whitened residuals": found.after}
    curves = {name: curve for name, curve in spectra.items() if curve is not None}
    if curves:
        plots.save(plots.spectra(curves), subject.figures / "spectrum.png")

    section: dict[str, Any] = {}
    if found.correlation_gain is not None:
        section["correlation_gain"] = found.correlation_gain
    if curves:
        section["spectra"] = curves
    return section


def _curves(part: Calibration) -> plots.NoiseCurves:
    """Collect what is drawn of a calibration."""
    coverage = [part.coverage_1, part.coverage_2, part.coverage_3]
    intervals = [
        part.interval_coverage_1,
        part.interval_coverage_2,
        part.interval_coverage_3,
    ]
    return plots.NoiseCurves(
        part.reliability.predicted_std,
        part.reliability.observed_rmse,
        part.pit_histogram,
        np.array([share.value for share in coverage]),
        np.array([share.value for share in intervals]),
    )
