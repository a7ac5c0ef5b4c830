"""Figures, one function each. Every function returns a matplotlib figure; :func:`save` writes it whole."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from jaxtyping import Num
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from equipoise.store import whole_file

Images: TypeAlias = Num[np.ndarray, "n channels height width"]
Table: TypeAlias = Num[np.ndarray, "n columns"]

STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120}
UNCERTAINTY_MAP = "magma"
"""Perceptually uniform and monotone in lightness: readable in grey and in colour blindness."""
SETTLED_FROM = 10
"""Epochs from which training curves are drawn without markers, and without their first plunge."""
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#7f7f7f"


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
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), fill, images.dtype)
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


def reconstructions(x: Images, means: Images, stds: Images) -> Figure:
    """Inputs, their reconstructions, predicted std and actual error (the paper's figure 3).

    Args:
        x: (N, C, H, W) in [0, 1].
        means: reconstructions.
        stds: predicted standard deviations, in the same unit.

    Returns:
        The figure; both maps share one colour bar, so that a good std map looks like the error.
    """
    return _side_by_side({"input": x, "reconstruction": means}, {"predicted std": stds, "|error|": np.abs(x - means)})


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
        axes = dict(zip([*images, *maps], figure.subplots(1, panels, squeeze=False)[0], strict=True))
        for title, axis in axes.items():
            axis.set_title(title)
            axis.set_axis_off()
        for title, values in images.items():
            grid = tile(np.clip(values.astype(np.float64), 0, 1))
            axes[title].imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        rms = {title: channel_rms(values) for title, values in maps.items()}
        # The few largest values would leave the rest in the dark.
        top = max((float(np.quantile(values, 0.995)) for values in rms.values()), default=1.0)
        for title, values in rms.items():
            grid = tile(values, fill=np.nan).squeeze()
            shown = axes[title].imshow(grid, cmap=UNCERTAINTY_MAP, vmin=0, vmax=top, interpolation="nearest")
        if rms:
            label = "std" if len(rms) == 1 else "std and error"
            figure.colorbar(shown, ax=[axes[title] for title in rms], shrink=0.8, label=f"{label} (1 = full scale)")
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
            axis.plot(epochs, [row[f"train_{name}"] for row in rows], color=BLUE, marker=marker, label="train")
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
            panels[0, 1].annotate(" stage 2", (switch - 0.5, 0.02), xycoords=("data", "axes fraction"), color=GREY)
    return figure


def table_samples(generated: Table, real: Num[np.ndarray, "m columns"] | None, names: list[str]) -> Figure:
    """Histograms of a table's first columns, samples against data.

    Args:
        generated: (N, D), raw units.
        real: (M, D), raw units; None shows the samples alone.
        names: of the columns.

    Returns:
        The figure.
    """

    def draw(axis: Axes, i: int) -> None:
        bins = np.histogram_bin_edges(generated[:, i] if real is None else real[:, i], bins=40).tolist()
        if real is not None:
            axis.hist(real[:, i], bins=bins, density=True, color=GREY, alpha=0.6, label="data")
        axis.hist(generated[:, i], bins=bins, density=True, histtype="step", color=BLUE, label="samples")
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
        axis.errorbar(x[:, i], means[:, i], stds[:, i], fmt=".", ms=3, lw=0.5, color=BLUE, ecolor=GREY)
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
