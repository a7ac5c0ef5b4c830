"""Figures, with one function for each.

Every function returns a matplotlib figure, which :func:`save` writes to a file.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from equipoise.files import whole_file

Images: TypeAlias = Num[np.ndarray, "n channels height width"]
Table: TypeAlias = Num[np.ndarray, "n columns"]

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 120,
}
UNCERTAINTY_MAP = "magma"
"""Perceptually uniform and monotone in lightness, so it can be read without colours."""
DENSITY_MAP = "Blues"
SETTLED_FROM = 10
"""Number of epochs from which training curves have no markers and leave out the steep start."""
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#7f7f7f"
LINES = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, ":", "^"))
"""Colour, dashes and marker of each series of a panel. Series differ in more than their colour."""
NATS_BELOW_PEAK = 10.0
"""Range of the log-densities that are drawn, nats; exp(-10) is about 1/22,000."""


def save(figure: Figure, path: Path) -> Path:
    """Write a figure to a file, which is never left half written.

    Args:
        figure: any figure of this module.
        path: path of the file, whose ending determines the format.

    Returns:
        The path of the file.
    """
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, bbox_inches="tight")

    return path


def tile(
    images: Images, columns: int | None = None, gap: int = 1, fill: float = 1.0
) -> Num[np.ndarray, "grid_height grid_width channels"]:
    """Arrange images in a grid.

    Args:
        images: images, (N, C, H, W).
        columns: number of columns of the grid; None for a grid that is about square, in which
            strips are stacked.
        gap: number of pixels between images.
        fill: value of the gaps and of the empty places.

    Returns:
        The grid as one image, (H', W', C).
    """
    n, channels, height, width = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n * height / width)))
    rows = math.ceil(n / columns)

    grid_height = rows * (height + gap) - gap
    grid_width = columns * (width + gap) - gap
    grid = np.full((grid_height, grid_width, channels), fill, images.dtype)

    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top = row * (height + gap)
        left = column * (width + gap)
        grid[top : top + height, left : left + width] = image.transpose(1, 2, 0)

    return grid


def pictures(values: Num[np.ndarray, "n channels *space"]) -> Num[np.ndarray, "n bands h w"]:
    """Make images of what has no two sides.

    Args:
        values: images (N, C, H, W), volumes (N, C, D, H, W) or signals (N, C, L).

    Returns:
        Images as they are, the middle slice of volumes, and signals as strips, one row of 8 pixels
        for each channel.
    """
    if values.ndim == 5:
        return values[:, :, values.shape[2] // 2]
    if values.ndim == 3:
        return np.repeat(values, 8, axis=1)[:, None]
    return values


def signals(
    means: Num[np.ndarray, "n channels length"],
    stds: Num[np.ndarray, "n channels length"],
    title: str,
    x: Num[np.ndarray, "n channels length"] | None = None,
) -> Figure:
    """Signals as lines, with a band of one predicted std on either side.

    Args:
        means: reconstructions or samples, (N, C, L), of which the first nine are drawn.
        stds: predicted standard deviations, of the same shape and unit.
        title: title of the figure.
        x: the data, of the same shape; None for samples.

    Returns:
        The figure. Channels are drawn below each other.
    """
    n = min(9, len(means))
    spread = float(np.ptp(means)) or 1.0
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.2 * math.ceil(n / 3)), layout="constrained")
        axes = figure.subplots(math.ceil(n / 3), 3, squeeze=False, sharex=True, sharey=True)
        for i, axis in enumerate(axes.flat):
            if i >= n:
                axis.set_axis_off()
                continue
            for channel in range(means.shape[1]):
                shift = -channel * spread
                mean, std = means[i, channel] + shift, stds[i, channel]
                steps = np.arange(len(mean))
                axis.fill_between(steps, mean - std, mean + std, color=BLUE, alpha=0.25, lw=0)
                axis.plot(steps, mean, color=BLUE, lw=1, label="mean ± std" if not channel else "")
                if x is not None:
                    label = "data" if not channel else ""
                    axis.plot(steps, x[i, channel] + shift, color=ORANGE, lw=0.7, label=label)
        axes[0, 0].legend(frameon=False, fontsize=7)
        figure.suptitle(title)
    return figure


def band_colours(reference: Images) -> Callable[[Images], NDArray[Any]]:
    """Choose how bands become colours: those of one set of images serve others, to compare them.

    Args:
        reference: images, (N, C, H, W).

    Returns:
        A function of images, (N, C, H, W). Grey images and colours, C of 1 or 3, stay as they are.
        Two bands are red and cyan, so that equal ones are grey. Of others the principal three of
        the reference are red, green and blue, each over the range of 98 % of its pixels.
    """
    channels = reference.shape[1]
    if channels in (1, 3):
        return lambda images: images
    if channels == 2:
        return lambda images: images[:, [0, 1, 1]]

    pixels = np.moveaxis(reference, 1, -1).reshape(-1, channels).astype(np.float64)
    mean = pixels.mean(0)
    _, vectors = np.linalg.eigh((pixels - mean).T @ (pixels - mean))
    axes = vectors[:, ::-1][:, :3]
    # More of all bands together is brighter.
    axes = axes * np.where(axes.sum(0) < 0, -1.0, 1.0)
    low, high = np.quantile((pixels - mean) @ axes, [0.01, 0.99], axis=0)

    def colours(images: Images) -> NDArray[Any]:
        scores = (np.moveaxis(images, 1, -1).astype(np.float64) - mean) @ axes
        return np.moveaxis((scores - low) / np.maximum(high - low, 1e-12), -1, 1)

    return colours


def _band_note(images: Images) -> str:
    """Says for the title which bands are shown."""
    channels = images.shape[1]
    if channels in (1, 3):
        return ""
    return "\nred, cyan: 2 bands" if channels == 2 else f"\nprincipal 3 of {channels} bands"


def samples(means: Images, stds: Images | None, title: str, scale: float | None = None) -> Figure:
    """Samples and the predicted std beside them (the paper's figure 4).

    Args:
        means: means of the samples, (N, C, H, W) in [0, 1].
        stds: predicted standard deviations of the same shape and unit; None to show the means only.
        title: title of the samples, which names their source.
        scale: the unit of the data that is 1 here, for the colour bar; None leaves it at 1.

    Returns:
        The figure.
    """
    maps = {}
    if stds is not None:
        maps["predicted std"] = stds

    return _side_by_side({title: means}, maps, scale)


def reconstructions(
    x: Images,
    means: Images,
    stds: Images,
    *,
    show_inputs: bool = True,
    scale: float | None = None,
) -> Figure:
    """Inputs, their reconstructions, predicted std and actual error (the paper's figure 3).

    Args:
        x: inputs, (N, C, H, W) in [0, 1].
        means: reconstructions, of the same shape.
        stds: predicted standard deviations, of the same shape and unit.
        show_inputs: whether to show the inputs. False is for data that may not be shown.
        scale: the unit of the data that is 1 here, for the colour bar; None leaves it at 1.

    Returns:
        The figure. Both maps share one colour bar, so that a good std map looks like the error.
    """
    images = {"reconstruction": means}
    if show_inputs:
        images = {"input": x, "reconstruction": means}

    return _side_by_side(images, {"predicted std": stds, "|error|": np.abs(x - means)}, scale)


def channel_rms(maps: Images) -> Num[np.ndarray, "n 1 height width"]:
    """Root mean square over the channels, which gives one map for each image.

    Args:
        maps: maps, (N, C, H, W).

    Returns:
        Root mean squares, (N, 1, H, W).
    """
    rms: Images = np.sqrt(np.mean(np.square(maps.astype(np.float64)), axis=1, keepdims=True))
    return rms


def _side_by_side(
    images: dict[str, Images], maps: dict[str, Images], scale: float | None = None
) -> Figure:
    """Grids of images, then grids of maps with a common scale and colour bar.

    The common scale makes the maps comparable.
    """
    with mpl.rc_context(STYLE):
        panels = len(images) + len(maps)
        figure = Figure(figsize=(3.3 * panels + 0.6, 3.6), layout="constrained")
        row = figure.subplots(1, panels, squeeze=False)[0]
        axes = dict(zip([*images, *maps], row, strict=True))
        for title, axis in axes.items():
            axis.set_title(title)
            axis.set_axis_off()

        colours = band_colours(next(iter(images.values())))
        for title, values in images.items():
            axes[title].set_title(title + _band_note(values))
            _show_images(axes[title], colours(values))

        if maps:
            _show_maps(figure, {axes[title]: values for title, values in maps.items()}, scale)

    return figure


def _show_images(axis: Axes, images: Images) -> None:
    grid = tile(np.clip(images.astype(np.float64), 0, 1))
    if grid.shape[-1] == 1:
        grid = grid.squeeze(-1)

    axis.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _show_maps(figure: Figure, maps: dict[Axes, Images], scale: float | None) -> None:
    unit = 1.0 if scale is None else scale
    rms = {axis: channel_rms(values) * unit for axis, values in maps.items()}

    top = max(_top_of(values) for values in rms.values())
    for axis, values in rms.items():
        grid = tile(values, fill=np.nan).squeeze((2,))
        image = axis.imshow(grid, cmap=UNCERTAINTY_MAP, vmin=0, vmax=top, interpolation="nearest")

    quantity = "std" if len(rms) == 1 else "std and error"
    of_what = "1 = full scale" if scale is None else "unit of the data"
    is_cut = max(float(values.max()) for values in rms.values()) > top
    figure.colorbar(
        image,
        ax=list(rms),
        shrink=0.8,
        label=f"{quantity} ({of_what})",
        extend="max" if is_cut else "neither",
    )


def _top_of(maps: Images) -> float:
    """End of a colour scale on which neither a few pixels nor one image make all others dark."""
    of_each = np.quantile(maps.reshape(len(maps), -1), 0.995, axis=1)
    return float(min(np.quantile(maps, 0.995), 3 * np.median(of_each))) or float(maps.max())


def samples_compared(sets: dict[str, Images]) -> Figure:
    """Grids of images beside each other, to compare the quality of samples by eye.

    Args:
        sets: images by title, such as "test data", "prior" and "mixture"; (N, C, H, W) in [0, 1].

    Returns:
        The figure, with at most three grids in a row.
    """
    across = min(3, len(sets))
    rows = math.ceil(len(sets) / across)

    with mpl.rc_context(STYLE | {"figure.constrained_layout.wspace": 0.06}):
        figure = Figure(figsize=(2.7 * across, 2.9 * rows), layout="constrained")

        colours = band_colours(next(iter(sets.values())))
        for i, (title, images) in enumerate(sets.items()):
            axis = figure.add_subplot(rows, across, i + 1, title=title + _band_note(images))
            axis.set_axis_off()
            _show_images(axis, colours(images))

    return figure


def training_curves(rows: list[dict[str, Any]]) -> Figure:
    """ELBO, KL, squared error and learned variance over the epochs, with the starts of stages.

    Args:
        rows: rows of ``metrics.jsonl``, one for each epoch.

    Returns:
        The figure.
    """
    switches = [
        (after["epoch"], after["stage"])
        for before, after in pairwise(rows)
        if before["stage"] != after["stage"]
    ]
    labels = {
        "elbo": "ELBO, nats",
        "kl": "KL, nats",
        "mse": "squared error per dimension",
        "noise_var": "noise variance",
    }

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        panels = figure.subplots(2, 2)

        for axis, (name, label) in zip(panels.flat, labels.items(), strict=True):
            _training_curve(axis, rows, name)
            axis.set(xlabel="epoch", ylabel=label)
            for epoch, _ in switches:
                axis.axvline(epoch - 0.5, color=GREY, lw=0.8, ls=":")

        panels[0, 0].legend(frameon=False)
        for epoch, stage in switches:
            panels[0, 1].annotate(
                f" stage {stage}",
                (epoch - 0.5, 0.02),
                xycoords=("data", "axes fraction"),
                color=GREY,
            )

    return figure


def _training_curve(axis: Axes, rows: list[dict[str, Any]], name: str) -> None:
    """Draw one quantity over the epochs, on training and validation data."""
    epochs = [row["epoch"] for row in rows]
    train = [row[f"train_{name}"] for row in rows]
    validation = [row[f"validation_{name}"] for row in rows]
    is_settled = len(rows) >= SETTLED_FROM
    marker = "" if is_settled else "."

    axis.plot(epochs, train, color=BLUE, marker=marker, label="train")
    axis.plot(epochs, validation, color=ORANGE, ls="--", marker=marker, label="validation")

    if name in ("mse", "noise_var"):
        axis.set_yscale("log")
    if name == "elbo" and is_settled:
        # The steep rise of the first epochs would flatten the rest of the curve.
        axis.set_ylim(bottom=min(validation[len(rows) // 10 :]))


def latent_densities(
    x: Float[np.ndarray, " nx"],
    y: Float[np.ndarray, " ny"],
    log_densities: dict[str, Float[np.ndarray, "ny nx"]],
    codes: Float[np.ndarray, "n 2"] | None,
    axis_names: tuple[str, str],
) -> Figure:
    """Densities over one plane of the latent space, in one colour scale (the paper's Table 1).

    Args:
        x: grid along the first axis, (nx,), ascending.
        y: grid along the second axis, (ny,), ascending.
        log_densities: log-densities by title, such as "aggregate posterior", "mixture" and "prior";
            (ny, nx), nats, or -inf.
        codes: codes that are drawn over each density, (N, 2); None to draw none.
        axis_names: names of the two axes.

    Returns:
        The figure. The colours cover 10 nats below the highest of all densities.
    """
    n = len(log_densities)
    top = max(float(values.max()) for values in log_densities.values())

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.5 * n + 0.8, 2.9), layout="constrained")
        axes = figure.subplots(1, n, sharex=True, sharey=True, squeeze=False)[0]

        for axis, (title, values) in zip(axes, log_densities.items(), strict=True):
            mesh = _show_density(axis, x, y, values, top)
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
        figure.colorbar(mesh, ax=list(axes), shrink=0.8, extend="min", label="log density, nats")

    return figure


def _show_density(
    axis: Axes,
    x: Float[np.ndarray, " nx"],
    y: Float[np.ndarray, " ny"],
    log_density: Float[np.ndarray, "ny nx"],
    top: float,
) -> QuadMesh:
    """Draw a log-density in colours from ``top`` down by 10 nats."""
    bottom = top - NATS_BELOW_PEAK
    clipped = np.maximum(log_density, bottom)

    return axis.pcolormesh(x, y, clipped, vmin=bottom, vmax=top, cmap=DENSITY_MAP, rasterized=True)


def density_rows(
    x: Float[np.ndarray, " nx"],
    y: Float[np.ndarray, " ny"],
    rows: dict[str, dict[str, Float[np.ndarray, "ny nx"]]],
) -> Figure:
    """Log-densities of several models on one plane, with a row for each (the paper's Table 1).

    Args:
        x: grid along the first latent unit, (nx,), ascending.
        y: grid along the second latent unit, (ny,), ascending.
        rows: log-densities by title of the model, then by title of the density; (ny, nx), nats.

    Returns:
        The figure. The colours of each row cover 10 nats below its highest density.
    """
    across = max(map(len, rows.values()))

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.3 * across + 0.6, 2.2 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), across, sharex=True, sharey=True, squeeze=False)

        for row, (axes, (title, densities)) in enumerate(zip(grid, rows.items(), strict=True)):
            top = max(float(values.max()) for values in densities.values())

            for axis, (name, values) in zip(axes, densities.items(), strict=True):
                _show_density(axis, x, y, values, top)
                axis.set(aspect="equal", title=name if row == 0 else "")

            axes[0].set_ylabel(title)

    return figure


def bars(
    groups: dict[str, dict[str, list[float]]],
    names: list[str],
    errors: dict[str, dict[str, list[float]]] | None = None,
) -> Figure:
    """Bars in one panel for each group (the paper's figure 2).

    Args:
        groups: values by title of the panel, then by name of the series. Each series has one value
            for each of ``names``.
        names: labels under the bars.
        errors: standard errors of the values, in the same form. Those above 0 are drawn.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(groups), 3.3), layout="constrained")
        axes = figure.subplots(1, len(groups), squeeze=False)[0]

        for axis, (title, series) in zip(axes, groups.items(), strict=True):
            width = 0.8 / len(series)
            styles = zip(series.items(), LINES, strict=False)
            for i, ((name, values), (color, _, _)) in enumerate(styles):
                offset = (i - (len(series) - 1) / 2) * width
                places = np.arange(len(values)) + offset
                axis.bar(places, values, width, color=color, label=name)
                if errors:
                    _draw_errors(axis, places, values, errors[title][name], "black")

            axis.set_xticks(
                range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor"
            )
            axis.set(title=title, ylabel="Fréchet distance")

        figure.axes[0].legend(frameon=False)

    return figure


def _draw_errors(
    axis: Axes, places: ArrayLike, values: ArrayLike, errors: ArrayLike, color: str
) -> None:
    """Draw error bars at the points whose errors are above 0."""
    points = np.stack([np.asarray(part, dtype=float) for part in (places, values, errors)])
    known = points[:, points[2] > 0]
    if known.size:
        x, y, error = known
        axis.errorbar(x, y, error, fmt="none", ecolor=color, elinewidth=1, capsize=2)


class NoiseCurves(NamedTuple):
    """Calibration of one set of dimensions, which :func:`reliability` draws.

    Args:
        predicted_std: root mean predicted variance of each bin, (bins,), model units.
        observed_rmse: root mean squared error of the same bins, (bins,), model units.
        pit_histogram: counts or shares of the probability integral transforms in equal intervals of
            [0, 1], (intervals,).
        coverage: share of the errors within 1, 2 and 3 predicted std, (3,).
        interval_coverage: share of the errors within the calibrated intervals that should hold the
            shares of a Gaussian within 1, 2 and 3 std, (3,); None if there are none.
    """

    predicted_std: Float[np.ndarray, " bins"]
    observed_rmse: Float[np.ndarray, " bins"]
    pit_histogram: Num[np.ndarray, " intervals"]
    coverage: Float[np.ndarray, "3"]
    interval_coverage: Float[np.ndarray, "3"] | None = None


def reliability(series: dict[str, NoiseCurves]) -> Figure:
    """Predicted std and observed error, compared by size, by distribution and by coverage.

    Args:
        series: one to three sets of values by name, such as "all pixels", "pixels that vary" and
            "those off the bounds".

    Returns:
        The figure. The panel of the std is logarithmic if it spans more than a decade.
    """
    predicted = [curves.predicted_std for curves in series.values()]
    observed = [curves.observed_rmse for curves in series.values()]
    stds = np.concatenate([*predicted, *observed])
    limits = (0.9 * float(stds.min()), 1.1 * float(stds.max()))
    n_std = np.arange(1, 4)
    nominal = [math.erf(k / math.sqrt(2)) for k in n_std]

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        axes = figure.subplot_mosaic([["std", "pit"], ["std", "coverage"]], width_ratios=[1.25, 1])
        std, pit, coverage = axes["std"], axes["pit"], axes["coverage"]

        std.plot(limits, limits, color=GREY, lw=0.8)
        pit.axhline(1, color=GREY, lw=0.8)
        coverage.plot(n_std, nominal, "_", color="black", ms=28, label="Gaussian")

        styles = zip(series.items(), LINES, strict=False)
        for i, ((name, curves), (color, dashes, marker)) in enumerate(styles):
            std.plot(
                curves.predicted_std,
                curves.observed_rmse,
                marker,
                ls=dashes,
                ms=4,
                lw=0.8,
                color=color,
                label=name,
            )

            density = curves.pit_histogram * len(curves.pit_histogram) / curves.pit_histogram.sum()
            edges = np.linspace(0, 1, len(density) + 1)
            pit.stairs(density, edges, baseline=None, color=color, ls=dashes)

            places = n_std + 0.16 * (i - (len(series) - 1) / 2)
            coverage.plot(places, curves.coverage, marker, ms=5, color=color)
            if curves.interval_coverage is not None:
                coverage.plot(
                    places, curves.interval_coverage, marker, ms=8, color=color, fillstyle="none"
                )

        _finish_std_panel(std, limits)
        pit.set(
            xlabel="probability integral transform", ylabel="density", xlim=(0, 1), ylim=(0, None)
        )

        coverage.set(xlim=(0.5, 3.5), ylim=(None, 1.02), ylabel="share within")
        coverage.set_xticks(n_std, [f"{k} std" for k in n_std])
        if any(curves.interval_coverage is not None for curves in series.values()):
            coverage.plot([], [], "o", ms=8, color=GREY, fillstyle="none", label="intervals")
        coverage.legend(frameon=False, loc="lower right")

    return figure


def _finish_std_panel(axis: Axes, limits: tuple[float, float]) -> None:
    """Set scale, limits and labels of the panel of predicted std and observed error."""
    low, high = limits
    if 0 < 10 * low < high:
        axis.set(xscale="log", yscale="log")

    axis.set(xlabel="predicted std, model units", ylabel="RMSE found, model units", aspect="equal")
    axis.set(xlim=limits, ylim=limits)
    axis.legend(frameon=False)


def sparsification(
    fractions: Float[np.ndarray, " n"],
    model: Float[np.ndarray, " n"],
    oracle: Float[np.ndarray, " n"],
) -> Figure:
    """Error of the values that remain when the most uncertain ones are removed.

    Args:
        fractions: share of the values that is removed, (n,), in [0, 1].
        model: RMSE of the rest over the RMSE of all, with the largest predicted std removed first,
            (n,).
        oracle: RMSE of the rest over the RMSE of all, with the largest errors removed first, (n,).

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


def spectra(curves: dict[str, Float[np.ndarray, " bands"]]) -> Figure:
    """Variance of standardised residuals by frequency.

    Args:
        curves: mean variance of each band of frequencies by name, such as "residuals" and
            "whitened residuals", lowest first, (bands,), positive.

    Returns:
        The figure, on a logarithmic scale.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.add_subplot(
            xlabel="frequency, half waves across the image", ylabel="variance / std²", yscale="log"
        )

        axis.axhline(1, color=GREY, lw=0.8, label="white")
        for (name, curve), (color, dashes, _) in zip(curves.items(), LINES, strict=False):
            axis.plot(np.arange(len(curve)), curve, color=color, ls=dashes, label=name)
        axis.legend(frameon=False)

    return figure


def variance_sweep(
    noise_vars: Float[np.ndarray, " n"],
    measures: dict[str, dict[str, Float[np.ndarray, " n"]]],
    learned_var: float,
    learned: dict[str, dict[str, float]] | None = None,
    errors: dict[str, dict[str, Float[np.ndarray, " n_and_learned"]]] | None = None,
) -> Figure:
    """Measures against the noise variance, with the learned one marked (the paper's figure 1).

    Args:
        noise_vars: noise variances, (n,), ascending, squared model units. They belong to the closed
            form of one model, or to n trained models.
        measures: values by label and unit of the panel, such as "Fréchet distance", then by name of
            the line. Each panel has up to three lines, (n,).
        learned_var: the learned variance, eq. (10), squared model units.
        learned: values of a model that learned its variance, by label and name as in ``measures``.
            They are drawn as stars.
        errors: standard errors of ``measures`` and, last, of ``learned``, in the same form,
            (n + 1,). Those above 0 are drawn.

    Returns:
        The figure. Points have markers if there are fewer than 10 variances.
    """
    across = min(2, len(measures))
    if len(measures) == 3:
        across = 3
    rows = math.ceil(len(measures) / across)
    width = 3.6 * across
    if across == 1:
        width += 1
    is_sparse = len(noise_vars) < SETTLED_FROM

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, 2.8 * rows), layout="constrained")

        for i, (label, lines) in enumerate(measures.items()):
            axis = figure.add_subplot(
                rows, across, i + 1, xscale="log", xlabel="noise variance", ylabel=label
            )
            axis.axvline(learned_var, color=GREY, lw=0.8, label=f"learned, {learned_var:.3g}")

            for (name, values), (color, dashes, marker) in zip(lines.items(), LINES, strict=False):
                axis.plot(
                    noise_vars,
                    values,
                    color=color,
                    ls=dashes,
                    marker=marker if is_sparse else "",
                    label=name,
                )
                if learned:
                    value = learned[label][name]
                    axis.plot(learned_var, value, "*", ms=13, mfc=color, mec="white", zorder=3)
                if learned and errors:
                    places = [*noise_vars, learned_var]
                    heights = [*values, learned[label][name]]
                    _draw_errors(axis, places, heights, errors[label][name], color)

            axis.legend(frameon=False)

    return figure


def outlier_scores(
    inliers: Float[np.ndarray, " n"], outliers: Float[np.ndarray, " m"], name: str
) -> Figure:
    """Histograms of an outlier score of both kinds of data, with the area under its ROC curve.

    Args:
        inliers: scores of the inliers, (N,). Higher is odder.
        outliers: scores of the outliers, (M,).
        name: name of the score.

    Returns:
        The figure.
    """
    from sklearn.metrics import roc_auc_score

    scores = np.concatenate([inliers, outliers])
    is_outlier = np.repeat([0, 1], [len(inliers), len(outliers)])
    auroc = roc_auc_score(is_outlier, scores)

    # A few extreme scores would press all others into one bar. They are counted in the outer bars.
    low, high = np.quantile(scores, [0.005, 0.995])
    bins = np.histogram_bin_edges(scores, 50, (low, high))
    inlier_counts, _ = np.histogram(np.clip(inliers, low, high), bins)
    outlier_counts, _ = np.histogram(np.clip(outliers, low, high), bins)
    inlier_shares = inlier_counts / len(inliers)
    outlier_shares = outlier_counts / len(outliers)

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axis = figure.add_subplot(
            title=f"AUROC {auroc:.3f}", xlabel=f"{name}, higher is odder", ylabel="share"
        )
        axis.stairs(inlier_shares, bins, fill=True, color=BLUE, alpha=0.6, label="inliers")
        axis.stairs(outlier_shares, bins, color=ORANGE, lw=1.5, label="outliers")
        axis.legend(frameon=False)

    return figure


def table_samples(
    generated: Table, real: Num[np.ndarray, "m columns"] | None, names: list[str]
) -> Figure:
    """Histograms of the first columns of a table, for samples and data.

    Args:
        generated: samples, (N, D), raw units.
        real: data, (M, D), raw units; None to show the samples only.
        names: names of the columns.

    Returns:
        The figure.
    """

    def draw(axis: Axes, i: int) -> None:
        samples_of_column = generated[:, i]
        reference = samples_of_column
        if real is not None:
            reference = real[:, i][~np.isnan(real[:, i])]
        bins = np.histogram_bin_edges(reference, bins=40).tolist()

        if real is not None:
            axis.hist(reference, bins=bins, density=True, color=GREY, alpha=0.6, label="data")
        axis.hist(
            samples_of_column, bins=bins, density=True, histtype="step", color=BLUE, label="samples"
        )
        axis.set(xlabel=names[i], yticks=[])

    figure = _per_column(draw, generated.shape[1])
    figure.axes[0].legend(frameon=False)

    return figure


def table_reconstructions(x: Table, means: Table, stds: Table, names: list[str]) -> Figure:
    """Reconstructions against data for the first columns of a table.

    The predicted std are the error bars.

    Args:
        x: data, (N, D), raw units.
        means: reconstructions, (N, D), raw units.
        stds: predicted standard deviations, (N, D), raw units.
        names: names of the columns.

    Returns:
        The figure.
    """

    def draw(axis: Axes, i: int) -> None:
        seen = ~np.isnan(x[:, i])
        values, mean, std = (part[seen, i] for part in (x, means, stds))
        axis.errorbar(values, mean, std, fmt=".", ms=3, lw=0.5, color=BLUE, ecolor=GREY)

        if len(values):
            ends = [float(values.min()), float(values.max())]
            axis.plot(ends, ends, color=ORANGE, lw=0.8)
        axis.set(xlabel=f"{names[i]}, data", ylabel="reconstruction ± std")

    return _per_column(draw, x.shape[1])


def _per_column(draw: Callable[[Axes, int], None], columns: int, maximum: int = 9) -> Figure:
    """A small plot for each of the first columns of a table, three in a row."""
    n_plots = min(maximum, columns)
    across = min(3, columns)
    rows = math.ceil(n_plots / across)

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3 * across, 2.5 * rows), layout="constrained")
        for i in range(n_plots):
            draw(figure.add_subplot(rows, across, i + 1), i)

    return figure
