"""What a model makes, as files: an array in the user's own units for programs, a picture for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise import plots
from equipoise.data import Data
from equipoise.model import VAE
from equipoise.noise import PredictedNoise
from equipoise.store import whole_file

SHOWN_IMAGES = 25
SHOWN_ROWS = 300
DECODED_AT_ONCE = 1000


@torch.no_grad()
def write_samples(
    model: VAE, data: Data, codes: Tensor, name: str, folder: Path, noise: torch.Generator | None = None
) -> list[Path]:
    """Decode codes and write what comes out.

    Args:
        model: in evaluation mode, on the CPU.
        data: what the model was trained on, for comparison.
        codes: (n, d).
        name: of the files, such as "mixture".
        folder: where to write.
        noise: source of pixel noise to add; None writes the means.

    Returns:
        NAME.npy (rounded to the levels of digital data), NAME-std.npy and NAME.png.
    """
    codes = codes.to(model.scaling.scale.dtype)  # mixtures draw in float64
    parts = [model.decode(chunk) for chunk in torch.split(codes, DECODED_AT_ONCE)]
    x = torch.cat([part.sample(noise) if noise is not None else part.mean for part in parts])
    std = torch.cat([part.std for part in parts])
    raw = model.scaling.restore_levels(x).numpy()
    files = [folder / f"{name}.npy", folder / f"{name}-std.npy", folder / f"{name}.png"]
    _save_array(files[0], raw)
    _save_array(files[1], model.scaling.restore_std(std).numpy())
    if data.kind == "image":
        stds = std[:SHOWN_IMAGES].numpy() if isinstance(model.noise, PredictedNoise) else None
        figure = plots.samples(x[: SHOWN_IMAGES if stds is not None else 100].numpy(), stds, f"samples, {name}")
    else:
        figure = plots.table_samples(data.train[:5000], raw, _column_names(data.shape))
    plots.save(figure, files[2])
    return files


@torch.no_grad()
def write_reconstructions(model: VAE, raw: NDArray[Any], folder: Path) -> list[Path]:
    """Reconstruct examples and write what comes out.

    Args:
        model: in evaluation mode, on the CPU.
        raw: examples in raw units, (N, *).
        folder: where to write.

    Returns:
        reconstructions.npz with ``data``, ``mean``, ``std`` and ``error`` in raw units, and reconstructions.png.
    """
    means, stds = [], []
    for chunk in torch.split(torch.from_numpy(raw), DECODED_AT_ONCE):
        likelihood = model.reconstruct(model.scaling(chunk))
        means.append(likelihood.mean)
        stds.append(likelihood.std)
    x, mean, std = model.scaling(torch.from_numpy(raw)), torch.cat(means), torch.cat(stds)
    arrays = {
        "data": raw,
        "mean": model.scaling.restore(mean).numpy(),
        "std": model.scaling.restore_std(std).numpy(),
        "error": model.scaling.restore_std(x - mean).numpy(),
    }
    path, picture = folder / "reconstructions.npz", folder / "reconstructions.png"
    with whole_file(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type] # NumPy types **kwds as its flag
    if len(model.shape) == 3:
        shown = slice(0, SHOWN_IMAGES)
        figure = plots.reconstructions(x[shown].numpy(), mean[shown].numpy(), std[shown].numpy())
    else:
        shown = slice(0, SHOWN_ROWS)
        columns = [arrays[name][shown] for name in ("data", "mean", "std")]
        figure = plots.table_reconstructions(columns[0], columns[1], columns[2], _column_names(model.shape))
    return [path, plots.save(figure, picture)]


def _save_array(path: Path, array: NDArray[Any]) -> None:
    with whole_file(path) as temporary:
        np.save(temporary, array)


def _column_names(shape: Sequence[int]) -> list[str]:
    return [f"column {i}" for i in range(shape[0])]
