"""Figures, one function each. Every function returns a matplotlib figure; :func:`save` writes it whole."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from equipoise.store import whole_file

Images: TypeAlias = Num[np.ndarray, "n channels height width"]
Table: TypeAlias = Num[np.ndarray, "n columns"]

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 120,
}
UNCERTAINTY_MAP = "magma"
"""Perceptually uniform and monotone in lightness: readable in grey and in colour blindness."""
DENSITY_MAP = "Blues"
SETTLED_FROM = 10
"""Epochs from which training curves are drawn without markers, and without their first plunge."""
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#7f7f7f"
LINES = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, ":", "^"))
"""Colour, dashes and marker of the series of one panel, told apart without the colour."""
NATS_BELOW_PEAK = 10.0
"""Depth to which log-densities are drawn: 1/22,000 of the highest density."""


def save(figure: Figure, path: Path) -> Path:
    """Write a figure whole.

    Args:
        figure: any figure of this module.
        path: the file; its ending is the format.

    Returns:
        The file.
    """
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, bbox_inches="tight")
    return path


def tile(
    images: Images, columns: int | None = None, gap: int = 1, fill: float = 1.0
) -> Num[np.ndarray, "grid_height grid_width channels"]:
    """Lay images out in a grid.

    Args:
        images: (N, C, H, W) with C = 1 or 3.
        columns: of the grid; about square if None.
        gap: pixels between images.
        fill: value of the gaps and of missing images.

    Returns:
        (H', W', C).
    """
    n, channels, height, width = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    grid = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), fill, images.dtype
    )
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return grid


def samples(means: Images, stds: Images | None, title: str) -> Figure:
    """Samples, and beside them where the model is unsure of them (the paper's figure 4).

    Args:
        means: (N, C, H, W) in [0, 1].
        stds: predicted standard deviations of the same shape and unit; None shows the means alone.
        title: what was sampled.

    Returns:
        The figure.
    """
    return _side_by_side({title: means}, {} if stds is None else {"predicted std": stds})


def reconstructions(x: Images, means: Images, stds: Images, *, show_inputs: bool = True) -> Figure:
    """Inputs, their reconstructions, predicted std and actual error (the paper's figure 3).

    Args:
        x: (N, C, H, W) in [0, 1].
        means: reconstructions.
        stds: predicted standard deviations, in the same unit.
        show_inputs: leave the inputs out where they may not be shown.

    Returns:
        The figure; both maps share one colour bar, so that a good std map looks like the error.
    """
    images = {"input": x, "reconstruction": means} if show_inputs else {"reconstruction": means}
    return _side_by_side(images, {"predicted std": stds, "|error|": np.abs(x - means)})


def channel_rms(maps: Images) -> Num[np.ndarray, "n 1 height width"]:
    """Root mean square over the channels: one map per image, colour or not.

    Args:
        maps: (N, C, H, W).

    Returns:
        (N, 1, H, W).
    """
    rms: Images = np.sqrt(np.mean(np.square(maps.astype(np.float64)), axis=1, keepdims=True))
    return rms


def _side_by_side(images: dict[str, Images], maps: dict[str, Images]) -> Figure:
    """Grids of images, then grids of maps that share one scale and one colour bar, so that they can be compared."""
    with mpl.rc_context(STYLE):
        panels = len(images) + len(maps)
        figure = Figure(figsize=(3.3 * panels + 0.6, 3.6), layout="constrained")
        axes = dict(
            zip([*images, *maps], figure.subplots(1, panels, squeeze=False)[0], strict=True)
        )
        for title, axis in axes.items():
            axis.set_title(title)
            axis.set_axis_off()
        for title, values in images.items():
            _show_images(axes[title], values)
        rms = {title: channel_rms(values) for title, values in maps.items()}
        # The few largest values would leave the rest in the dark.
        top = max((float(np.quantile(values, 0.995)) for values in rms.values()), default=1.0)
        for title, values in rms.items():
            grid = tile(values, fill=np.nan).squeeze()
            shown = axes[title].imshow(
                grid, cmap=UNCERTAINTY_MAP, vmin=0, vmax=top, interpolation="nearest"
            )
        if rms:
            label = "std" if len(rms) == 1 else "std and error"
            figure.colorbar(
                shown,
                ax=[axes[title] for title in rms],
                shrink=0.8,
                label=f"{label} (1 = full scale)",
            )
    return figure


def _show_images(axis: Axes, images: Images) -> None:
    grid = tile(np.clip(images.astype(np.float64), 0, 1))
    axis.imshow(
        grid.squeeze(-1) if grid.shape[-1] == 1 else grid,
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )


def samples_compared(sets: dict[str, Images]) -> Figure:
    """Grids of images beside each other, so that the eye sees what the Fréchet distance says.

    Args:
        sets: by title, such as "test data", "prior" and "mixture"; (N, C, H, W) in [0, 1].

    Returns:
        The figure, three grids in a row at most.
    """
    across = min(3, len(sets))
    rows = math.ceil(len(sets) / across)
    with mpl.rc_context(STYLE | {"figure.constrained_layout.wspace": 0.06}):
        figure = Figure(figsize=(2.7 * across, 2.9 * rows), layout="constrained")
        for i, (title, images) in enumerate(sets.items()):
            axis = figure.add_subplot(rows, across, i + 1, title=title)
            axis.set_axis_off()
            _show_images(axis, images)
    return figure


def training_curves(rows: list[dict[str, Any]]) -> Figure:
    """ELBO, KL, squared error and the learned variance over the epochs, with the switch of stages.

    Args:
        rows: of ``metrics.jsonl``.

    Returns:
        The figure.
    """
    epochs = [row["epoch"] for row in rows]
    marker = "." if len(rows) < SETTLED_FROM else ""
    switch = next((row["epoch"] for row in rows if row["stage"] == 2), None)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        panels = figure.subplots(2, 2)
        for axis, (name, label) in zip(
            panels.flat,
            (
                ("elbo", "ELBO, nats"),
                ("kl", "KL, nats"),
                ("mse", "squared error per dimension"),
                ("noise_var", "noise variance"),
            ),
            strict=True,
        ):
            axis.plot(
                epochs,
                [row[f"train_{name}"] for row in rows],
                color=BLUE,
                marker=marker,
                label="train",
            )
            axis.plot(
                epochs,
                [row[f"validation_{name}"] for row in rows],
                color=ORANGE,
                ls="--",
                marker=marker,
                label="validation",
            )
            axis.set(xlabel="epoch", ylabel=label)
            if name in ("mse", "noise_var"):
                axis.set_yscale("log")
            if name == "elbo" and len(rows) >= SETTLED_FROM:
                # The first epochs' plunge would flatten all that follows.
                axis.set_ylim(bottom=min(row["validation_elbo"] for row in rows[len(rows) // 10 :]))
            if switch:
                axis.axvline(switch - 0.5, color=GREY, lw=0.8, ls=":")
        panels[0, 0].legend(frameon=False)
        if switch:
            panels[0, 1].annotate(
                " stage 2", (switch - 0.5, 0.02), xycoords=("data", "axes fraction"), color=GREY
            )
    return figure


def latent_densities(
    x: Float[np.ndarray, " nx"],
    y: Float[np.ndarray, " ny"],
    log_densities: dict[str, Float[np.ndarray, "ny nx"]],
    codes: Float[np.ndarray, "n 2"] | None,
    axis_names: tuple[str, str],
) -> Figure:
    """Densities over one plane of the latent space, in one colour scale (the paper's Table 1).

    Args:
        x: (nx,), ascending.
        y: (ny,), ascending.
        log_densities: by title, such as "aggregate posterior", "mixture" and "prior"; (ny, nx), nats, or -inf.
        codes: (N, 2), drawn over each density; None for none.
        axis_names: of the plane.

    Returns:
        The figure; the colours go from the highest density of all down by 10 nats.
    """
    top = max(float(values.max()) for values in log_densities.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.5 * len(log_densities) + 0.8, 2.9), layout="constrained")
        axes = figure.subplots(1, len(log_densities), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (title, values) in zip(axes, log_densities.items(), strict=True):
            shown = axis.pcolormesh(
                x,
                y,
                np.maximum(values, top - NATS_BELOW_PEAK),
                vmin=top - NATS_BELOW_PEAK,
                vmax=top,
                cmap=DENSITY_MAP,
                rasterized=True,
            )
            if codes is not None:
                axis.plot(*codes.T, ".", ms=2.5, mew=0, alpha=0.8, color=ORANGE)
            axis.set(
                title=title,
                xlabel=axis_names[0],
                aspect="equal",
                xlim=(x[0], x[-1]),
                ylim=(y[0], y[-1]),
            )
        axes[0].set_ylabel(axis_names[1])
        figure.colorbar(shown, ax=list(axes), shrink=0.8, extend="min", label="log density, nats")
    return figure


def density_rows(
    x: Float[np.ndarray, " nx"],
    y: Float[np.ndarray, " ny"],
    rows: dict[str, dict[str, Float[np.ndarray, "ny nx"]]],
) -> Figure:
    """Log densities of several models on one plane of two latent units, a row for each (the paper's Table 1).

    Args:
        x: (nx,), ascending.
        y: (ny,), ascending.
        rows: by title of the model, then of the density; (ny, nx), nats.

    Returns:
        The figure; each row has its own colours, from its highest density down by 10 nats.
    """
    across = max(map(len, rows.values()))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.3 * across + 0.6, 2.2 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), across, sharex=True, sharey=True, squeeze=False)
        for row, (axes, (title, densities)) in enumerate(zip(grid, rows.items(), strict=True)):
            top = max(float(values.max()) for values in densities.values())
            for axis, (name, values) in zip(axes, densities.items(), strict=True):
                clipped = np.maximum(values, top - NATS_BELOW_PEAK)
                axis.pcolormesh(
                    x,
                    y,
                    clipped,
                    vmin=top - NATS_BELOW_PEAK,
                    vmax=top,
                    cmap=DENSITY_MAP,
                    rasterized=True,
                )
                axis.set(aspect="equal", title="" if row else name)
            axes[0].set_ylabel(title)
    return figure


def bars(groups: dict[str, dict[str, list[float]]], names: list[str]) -> Figure:
    """Bars, a panel for each group (the paper's figure 2).

    Args:
        groups: by title of the panel, then of the series; one value for each of ``names``.
        names: under the bars.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(groups), 3.3), layout="constrained")
        for axis, (title, series) in zip(
            figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
        ):
            width = 0.8 / len(series)
            for i, ((name, values), (color, _, _)) in enumerate(
                zip(series.items(), LINES, strict=False)
            ):
                places = np.arange(len(values)) + (i - (len(series) - 1) / 2) * width
                axis.bar(places, values, width, color=color, label=name)
            axis.set_xticks(
                range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor"
            )
            axis.set(title=title, ylabel="Fréchet distance")
        figure.axes[0].legend(frameon=False)
    return figure


class NoiseCurves(NamedTuple):
    """What :func:`reliability` draws of one set of dimensions.

    Args:
        predicted_std: (bins,), root mean predicted variance of each bin, model units.
        observed_rmse: (bins,), root mean squared error of the same bins, model units.
        pit_histogram: (intervals,), counts or shares of the probability integral transforms, equal intervals of [0, 1].
        coverage: (3,), share of the errors within 1, 2 and 3 predicted std.
        interval_coverage: (3,), share within the calibrated intervals that should hold as much; None if there are none.
    """

    predicted_std: Float[np.ndarray, " bins"]
    observed_rmse: Float[np.ndarray, " bins"]
    pit_histogram: Num[np.ndarray, " intervals"]
    coverage: Float[np.ndarray, "3"]
    interval_coverage: Float[np.ndarray, "3"] | None = None


def reliability(series: dict[str, NoiseCurves]) -> Figure:
    """Whether the predicted std is the error that is found: by size, by distribution and by coverage.

    Args:
        series: one to three, by name, such as "all pixels" and "pixels that vary".

    Returns:
        The figure; the std panel is logarithmic where it spans more than a decade.
    """
    stds = np.concatenate(
        [std for one in series.values() for std in (one.predicted_std, one.observed_rmse)]
    )
    low, high = 0.9 * float(stds.min()), 1.1 * float(stds.max())
    n_std = np.arange(1, 4)
    nominal = [math.erf(k / math.sqrt(2)) for k in n_std]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        axes = figure.subplot_mosaic([["std", "pit"], ["std", "coverage"]], width_ratios=[1.25, 1])
        std, pit, coverage = axes["std"], axes["pit"], axes["coverage"]
        std.plot([low, high], [low, high], color=GREY, lw=0.8)
        pit.axhline(1, color=GREY, lw=0.8)
        coverage.plot(n_std, nominal, "_", color="black", ms=28, label="Gaussian")
        for i, ((name, one), (color, dashes, marker)) in enumerate(
            zip(series.items(), LINES, strict=False)
        ):
            std.plot(
                one.predicted_std,
                one.observed_rmse,
                marker,
                ls=dashes,
                ms=4,
                lw=0.8,
                color=color,
                label=name,
            )
            density = one.pit_histogram * len(one.pit_histogram) / one.pit_histogram.sum()
            pit.stairs(
                density, np.linspace(0, 1, len(density) + 1), baseline=None, color=color, ls=dashes
            )
            place = n_std + 0.16 * (i - (len(series) - 1) / 2)
            coverage.plot(place, one.coverage, marker, ms=5, color=color)
            if one.interval_coverage is not None:
                coverage.plot(
                    place, one.interval_coverage, marker, ms=8, color=color, fillstyle="none"
                )
        if 0 < 10 * low < high:
            std.set(xscale="log", yscale="log")
        std.set(
            xlabel="predicted std, model units", ylabel="RMSE found, model units", aspect="equal"
        )
        std.set(xlim=(low, high), ylim=(low, high))
        std.legend(frameon=False)
        pit.set(
            xlabel="probability integral transform", ylabel="density", xlim=(0, 1), ylim=(0, None)
        )
        coverage.set(xlim=(0.5, 3.5), ylim=(None, 1.02), ylabel="share within")
        coverage.set_xticks(n_std, [f"{k} std" for k in n_std])
        if any(one.interval_coverage is not None for one in series.values()):
            coverage.plot([], [], "o", ms=8, color=GREY, fillstyle="none", label="intervals")
        coverage.legend(frameon=False, loc="lower right")
    return figure


def sparsification(
    fractions: Float[np.ndarray, " n"],
    model: Float[np.ndarray, " n"],
    oracle: Float[np.ndarray, " n"],
) -> Figure:
    """Error of what is left when the most uncertain dimensions are removed first.

    Args:
        fractions: (n,), removed share in [0, 1].
        model: (n,), RMSE of the rest over the RMSE of all, the largest predicted std removed first.
        oracle: (n,), the same, the largest error removed first.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.add_subplot(
            xlabel="removed share", ylabel="RMSE of the rest / RMSE of all", xlim=(0, 1)
        )
        axis.axhline(1, color=GREY, ls=":", label="in random order")
        axis.plot(fractions, model, color=BLUE, label="by predicted std")
        axis.plot(fractions, oracle, color=ORANGE, ls="--", label="by true error")
        axis.fill_between(fractions, oracle, model, color=BLUE, alpha=0.12, lw=0)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    return figure


def variance_sweep(
    noise_vars: Float[np.ndarray, " n"],
    measures: dict[str, dict[str, Float[np.ndarray, " n"]]],
    learned_var: float,
    learned: dict[str, dict[str, float]] | None = None,
) -> Figure:
    """Measures against the noise variance, with the learned one marked (the paper's figure 1).

    Args:
        noise_vars: (n,), ascending, squared model units; of one model's closed form, or of n trained models.
        measures: a panel each, by label and unit such as "Fréchet distance"; up to three lines each, by name, (n,).
        learned_var: the optimum, eq. (10), squared model units.
        learned: values of a model that learned its variance, by label and name as in ``measures``, drawn as stars.

    Returns:
        The figure; the points are marked where they are few.
    """
    across = 3 if len(measures) == 3 else min(2, len(measures))
    rows = math.ceil(len(measures) / across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * across + (across == 1), 2.8 * rows), layout="constrained")
        for i, (label, lines) in enumerate(measures.items()):
            axis = figure.add_subplot(
                rows, across, i + 1, xscale="log", xlabel="noise variance", ylabel=label
            )
            axis.axvline(learned_var, color=GREY, lw=0.8, label=f"learned, {learned_var:.3g}")
            for (name, values), (color, dashes, marker) in zip(lines.items(), LINES, strict=False):
                few = len(noise_vars) < SETTLED_FROM
                axis.plot(
                    noise_vars,
                    values,
                    color=color,
                    ls=dashes,
                    marker=marker if few else "",
                    label=name,
                )
                if learned:
                    axis.plot(
                        learned_var,
                        learned[label][name],
                        "*",
                        ms=13,
                        mfc=color,
                        mec="white",
                        zorder=3,
                    )
            axis.legend(frameon=False)
    return figure


def outlier_scores(
    inliers: Float[np.ndarray, " n"], outliers: Float[np.ndarray, " m"], name: str
) -> Figure:
    """Histograms of an outlier score of both kinds of data, with the area under its ROC curve.

    Args:
        inliers: (N,), scores, higher is odder.
        outliers: (M,).
        name: of the score.

    Returns:
        The figure.
    """
    scores = np.concatenate([inliers, outliers])
    auroc = roc_auc_score(np.repeat([0, 1], [len(inliers), len(outliers)]), scores)
    # A few extreme scores would press the rest into one bar: they are counted at the ends.
    low, high = np.quantile(scores, [0.005, 0.995])
    bins = np.histogram_bin_edges(scores, 50, (low, high))
    shares = [np.histogram(np.clip(x, low, high), bins)[0] / len(x) for x in (inliers, outliers)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axis = figure.add_subplot(
            title=f"AUROC {auroc:.3f}", xlabel=f"{name}, higher is odder", ylabel="share"
        )
        axis.stairs(shares[0], bins, fill=True, color=BLUE, alpha=0.6, label="inliers")
        axis.stairs(shares[1], bins, color=ORANGE, lw=1.5, label="outliers")
        axis.legend(frameon=False)
    return figure


def table_samples(
    generated: Table, real: Num[np.ndarray, "m columns"] | None, names: list[str]
) -> Figure:
    """Histograms of a table's first columns, samples against data.

    Args:
        generated: (N, D), raw units.
        real: (M, D), raw units; None shows the samples alone.
        names: of the columns.

    Returns:
        The figure.
    """

    def draw(axis: Axes, i: int) -> None:
        bins = np.histogram_bin_edges(
            generated[:, i] if real is None else real[:, i], bins=40
        ).tolist()
        if real is not None:
            axis.hist(real[:, i], bins=bins, density=True, color=GREY, alpha=0.6, label="data")
        axis.hist(
            generated[:, i], bins=bins, density=True, histtype="step", color=BLUE, label="samples"
        )
        axis.set(xlabel=names[i], yticks=[])

    figure = _per_column(draw, generated.shape[1])
    figure.axes[0].legend(frameon=False)
    return figure


def table_reconstructions(x: Table, means: Table, stds: Table, names: list[str]) -> Figure:
    """Reconstruction against data for a table's first columns, with the predicted std as error bars.

    Args:
        x: (N, D), raw units.
        means: (N, D), raw units.
        stds: (N, D), raw units.
        names: of the columns.

    Returns:
        The figure.
    """

    def draw(axis: Axes, i: int) -> None:
        axis.errorbar(
            x[:, i], means[:, i], stds[:, i], fmt=".", ms=3, lw=0.5, color=BLUE, ecolor=GREY
        )
        ends = [float(x[:, i].min()), float(x[:, i].max())]
        axis.plot(ends, ends, color=ORANGE, lw=0.8)
        axis.set(xlabel=f"{names[i]}, data", ylabel="reconstruction ± std")

    return _per_column(draw, x.shape[1])


def _per_column(draw: Callable[[Axes, int], None], columns: int, most: int = 9) -> Figure:
    """A small plot for each of a table's first columns, three in a row."""
    shown, across = min(most, columns), min(3, columns)
    rows = math.ceil(shown / across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3 * across, 2.5 * rows), layout="constrained")
        for i in range(shown):
            draw(figure.add_subplot(rows, across, i + 1), i)
    return figure
