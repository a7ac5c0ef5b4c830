"""The output of a model as files.

Programs get arrays in the user's own units, and people get pictures.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise import plots
from equipoise.categories import MixedLikelihood, joined, mode_of
from equipoise.data import Data, Subset
from equipoise.data.batches import as_tensor
from equipoise.data.tables import is_table, write_filled, write_table
from equipoise.files import exclusive_outputs, whole_file, write_array
from equipoise.imputation import Imputation
from equipoise.labels import labels_of
from equipoise.levels import level_values
from equipoise.model import VAE
from equipoise.randomness import stream
from equipoise.run import Run

SHOWN_IMAGES = 25
SHOWN_SAMPLES = 100
SHOWN_ROWS = 300
SHOWN_TRAINING_ROWS = 5000
DECODED_AT_ONCE = 1000


def write_figures(run: Run, data: Data, model: VAE) -> None:
    """Write the figures of a finished run: training curves, samples, reconstructions.

    Args:
        run: A finished training.
        data: The data that it was trained on.
        model: The model of the run, on the CPU.
    """
    seed = run.config().seed
    plots.save(plots.training_curves(run.history()), run.figures / "training.png")

    count = SHOWN_IMAGES if data.kind == "image" else SHOWN_TRAINING_ROWS
    codes = run.mixture().sample(count, stream(seed, "codes"))
    real = data.train.at_hand[:SHOWN_TRAINING_ROWS] if data.kind == "table" else None
    write_samples(
        model, codes, "mixture", run.figures, stream(seed, "noise"), real=real, arrays=False
    )

    write_reconstructions(model, data.test.take(slice(SHOWN_IMAGES)), run.figures)


@torch.no_grad()
def write_samples(
    model: VAE,
    codes: Tensor,
    name: str,
    folder: Path,
    generator: torch.Generator,
    *,
    noise: bool = False,
    real: NDArray[Any] | None = None,
    arrays: bool = True,
) -> list[Path]:
    """Decode codes, and write the samples to files.

    Args:
        model: The model, in evaluation mode, on the CPU.
        codes: The codes, (n, d).
        name: The name of the files, such as "mixture".
        folder: The folder to write to.
        generator: The source of the noise.
        noise: Whether to add the model's noise. Otherwise the means are written.
        real: Rows of the table that the model was trained on, to compare with.
        arrays: Whether to write the arrays too, and not only the picture.

    Returns:
        NAME.png, NAME.npy (rounded to the levels of digital data) and NAME-std.npy; and the labels
        in NAME-labels.npy, if the codes carry labels.
    """
    labels = _label_texts(model, codes)
    codes = codes.to(model.scaling.scale.dtype)  # mixtures draw in float64
    parts = [model.decode(chunk) for chunk in torch.split(codes, DECODED_AT_ONCE)]
    means = torch.cat([mode_of(part) for part in parts])
    std = torch.cat([part.std for part in parts])
    noisy = torch.cat([part.sample(generator) for part in parts])
    x = noisy if noise else means

    scale = float(model.scaling.scale.mean())
    if len(model.shape) == 2:
        lines, bands = model.scaling.restore(x).numpy(), model.scaling.restore_std(std).numpy()
        figure = plots.signals(lines, bands, f"samples, {name}")
    elif len(model.shape) > 2:
        shown = slice(0, SHOWN_SAMPLES)
        stds = plots.pictures(std[shown].numpy()) if model.noise.depends_on_code else None
        title = f"samples, {name}"
        if len(x) > SHOWN_SAMPLES:
            title += f" (first {SHOWN_SAMPLES} of {len(x):,})"
        figure = plots.samples(plots.pictures(x[shown].numpy()), stds, title, scale)
    else:
        # The picture of a table always has noise: means alone spread less than data do.
        generated = model.scaling.restore(noisy).numpy()
        figure = plots.table_samples(generated, real, _column_names(model))

    contents = {}
    if arrays:
        contents = {
            name: model.scaling.restore_levels(x),
            f"{name}-std": model.scaling.restore_std(std, means),
        }

    with exclusive_outputs(folder, "sampling"):
        files = [plots.save(figure, folder / f"{name}.png")]
        for file, tensor in contents.items():
            files.append(folder / f"{file}.npy")
            write_array(files[-1], tensor.numpy())
        if arrays and labels is not None:
            files.append(folder / f"{name}-labels.npy")
            write_array(files[-1], labels)
    return files


@torch.no_grad()
def write_reconstructions(model: VAE, examples: Subset, folder: Path) -> list[Path]:
    """Reconstruct examples, and write the reconstructions to files.

    Args:
        model: The model, in evaluation mode, on the CPU.
        examples: The examples in raw units, (N, *).
        folder: The folder to write to.

    Returns:
        reconstructions.npz with ``data``, ``mean``, ``std`` and ``error`` in raw units and the
        ``name`` of each example, reconstructions.csv with a row for each, and
        reconstructions.png. Of a category, ``mean`` is the number of the most probable level, and
        ``std`` and ``error`` are NaN.
    """
    raw, names = examples[:], examples.names()
    scaling, given = model.scaling, as_tensor(examples)
    scaling.check(torch.from_numpy(raw))
    scaling.warn_of_range(torch.from_numpy(raw[:DECODED_AT_ONCE]), stacklevel=2)

    restored = {name: np.empty(raw.shape, np.float32) for name in ("mean", "std", "error")}
    for start in range(0, len(raw), DECODED_AT_ONCE):
        rows = slice(start, start + DECODED_AT_ONCE)
        x = scaling(given[rows])
        reconstruction = model.reconstruct(x)
        restored["mean"][rows] = scaling.restore(mode_of(reconstruction)).numpy()
        restored["std"][rows] = scaling.restore_std(reconstruction.std, reconstruction.mean).numpy()
        restored["error"][rows] = scaling.restore_std(
            x - reconstruction.mean, reconstruction.mean
        ).numpy()

    shown = slice(0, SHOWN_ROWS if len(model.shape) == 1 else SHOWN_IMAGES)
    mean, std = restored["mean"][shown], restored["std"][shown]
    if len(model.shape) == 2:
        figure = plots.signals(mean, std, "reconstructions", raw[shown])
    elif len(model.shape) > 2:
        x = scaling(given[shown])
        reconstruction = model.reconstruct(x)
        images = (x, reconstruction.mean, reconstruction.std)
        scale = float(scaling.scale.mean())
        figure = plots.reconstructions(*[plots.pictures(it.numpy()) for it in images], scale=scale)
        if len(model.shape) == 4:
            figure.suptitle("middle slices of the volumes")
    else:
        figure = plots.table_reconstructions(
            raw[shown], mean, np.nan_to_num(std), _column_names(model)
        )

    paths = [folder / f"reconstructions.{ending}" for ending in ("npz", "csv", "png")]
    with exclusive_outputs(folder, "reconstruction"):
        with whole_file(paths[0]) as temporary:
            arrays: dict[str, Any] = {"data": raw, **restored, "name": np.array(names, np.str_)}
            labels = _label_texts(model, given)
            if labels is not None:
                arrays["label"] = labels
            np.savez_compressed(temporary, **arrays)
        with whole_file(paths[1]) as temporary:
            _write_table(temporary, names, restored["error"], restored["std"])
        plots.save(figure, paths[2])
    return paths


def _write_table(
    path: Path, names: list[str], error: NDArray[np.float32], std: NDArray[np.float32]
) -> None:
    """Write what is said of whole examples: name, root mean squared error and std, raw units."""
    axes = tuple(range(1, error.ndim))
    rms_error, rms_std = (
        np.sqrt(_mean(np.square(values, dtype=np.float64), axes)) for values in (error, std)
    )
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file)
        table.writerow(["row", "name", "rms_error", "rms_std"])
        for row, name in enumerate(names):
            table.writerow([row, name, f"{rms_error[row]:.6g}", f"{rms_std[row]:.6g}"])


def _mean(values: NDArray[np.float64], axes: tuple[int, ...]) -> NDArray[np.float64]:
    """Mean over what is observed, NaN of nothing."""
    is_there = ~np.isnan(values)
    total: NDArray[np.float64] = np.where(is_there, values, 0.0).sum(axes)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = total / is_there.sum(axes)
    return mean


@torch.no_grad()
def write_sampled_table(
    model: VAE, codes: Tensor, path: Path, generator: torch.Generator, *, noise: bool = False
) -> list[Path]:
    """Decode codes, and write them as rows of a table.

    Args:
        model: A model of a table, in evaluation mode, on the CPU.
        codes: The codes, (n, d).
        path: The file, whose ending names the format.
        generator: The source of the noise.
        noise: Whether to add the model's noise, and to draw categories by their probabilities.
            Otherwise means and most probable levels are written.

    Returns:
        The file. If the codes carry labels, its last column is "label".
    """
    labels = _label_texts(model, codes)
    parts = []
    for chunk in torch.split(codes.to(model.scaling.scale.dtype), DECODED_AT_ONCE):
        likelihood = model.decode(chunk)
        parts.append(likelihood.sample(generator) if noise else mode_of(likelihood))
    values = model.scaling.restore(torch.cat(parts)).numpy()
    return [_write_columns(path, model, values, labels)]


@torch.no_grad()
def write_reconstructed_table(model: VAE, examples: Subset, path: Path) -> list[Path]:
    """Reconstruct rows, and write means and std as tables.

    Args:
        model: A model of a table, in evaluation mode, on the CPU.
        examples: The rows in raw units, (N, D).
        path: The file of the means, whose ending names the format.

    Returns:
        The file, and the one of the std, such as x-std.csv for x.csv.
    """
    x = as_tensor(examples)
    model.scaling.check(x)
    model.scaling.warn_of_range(x, stacklevel=2)

    parts = [model.reconstruct(model.scaling(rows)) for rows in torch.split(x, DECODED_AT_ONCE)]
    likelihood = joined(parts)
    mode = model.scaling.restore(mode_of(likelihood)).numpy()
    std = model.scaling.restore_std(likelihood.std, likelihood.mean)
    probability = None
    if isinstance(likelihood, MixedLikelihood):
        _, log_probability = likelihood.categories.most_probable(likelihood.log_probs)
        probability = log_probability.exp()
    return [
        _write_columns(path, model, mode),
        _write_uncertainty(beside(path, "std"), model, std, probability),
    ]


def write_imputed(
    model: VAE, source: Path, raw: Tensor, found: Imputation, path: Path
) -> list[Path]:
    """Write a table whose gaps are filled, the std of what is filled, and the draws.

    Args:
        model: The model, which knows the names of the columns.
        source: The file that the rows come from. Its other columns are written as they are.
        raw: The rows, NaN where a value is missing, (N, D).
        found: What fills the gaps.
        path: The file of the expectations, whose ending names the format.

    Returns:
        The files: ``path``, and those beside it with -std, -1, -2 and so on.
    """
    missing = raw.isnan().numpy()
    contents = {path: found.mean.numpy(), beside(path, "std"): found.std.numpy()}
    uncertainty = beside(path, "std")
    for number, draw in enumerate(found.draws.numpy(), 1):
        contents[beside(path, str(number))] = draw

    for file, values in contents.items():
        if file == uncertainty and is_table(file):
            _write_uncertainty(file, model, found.std, found.probability)
        elif not is_table(file):
            write_array(file, values)
        elif not is_table(source):
            _write_columns(file, model, values)
        else:
            write_filled(file, source, _column_names(model), values, missing, model.scaling.levels)
    return list(contents)


def beside(path: Path, what: str) -> Path:
    """Name a file beside another one.

    Args:
        path: Path of a file.
        what: What the new one holds.

    Returns:
        The path with "-WHAT" before its endings.

    Example:
        >>> beside(Path("rows.csv.gz"), "std").name
        'rows-std.csv.gz'
    """
    stem, dot, endings = path.name.partition(".")
    return path.with_name(f"{stem}-{what}{dot}{endings}")


def _write_columns(
    path: Path, model: VAE, values: NDArray[Any], labels: NDArray[Any] | None = None
) -> Path:
    """Write a table with the names of the model's columns and levels, and labels in a last one."""
    columns: dict[str, Any] = dict(zip(_column_names(model), values.T, strict=True))
    for number, levels in model.scaling.levels.items():
        name = model.scaling.short_name_of(number)
        columns[name] = level_values(columns[name].tolist(), levels)
    if labels is not None:
        columns["label"] = labels
    return write_table(path, columns)


def _write_uncertainty(path: Path, model: VAE, std: Tensor, probability: Tensor | None) -> Path:
    """Write the std of numbers, and under names that say so, the probabilities of levels."""
    columns: dict[str, Any] = {}
    for number, name in enumerate(_column_names(model)):
        if probability is not None and number in model.scaling.levels:
            columns[f"probability of {name}"] = probability[:, number].numpy()
        else:
            columns[name] = std[:, number].numpy()
    return write_table(path, columns)


def _label_texts(model: VAE, values: Tensor) -> NDArray[Any] | None:
    """Names of the labels that examples or codes carry, "" where unknown; None without labels."""
    labels = labels_of(values)
    if labels is None or not model.label_names:
        return None
    texts: NDArray[Any] = np.array([*model.label_names, ""])[labels.cpu().numpy()]
    return texts


def _column_names(model: VAE) -> list[str]:
    return [model.scaling.short_name_of(i) for i in range(model.shape[0])]
