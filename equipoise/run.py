"""A run: the folder that a training leaves behind, and everything that can be read from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from equipoise.aggregate import GaussianMixture
from equipoise.config import ConfigError, TrainConfig, make_config
from equipoise.data import Data, load, load_stream
from equipoise.hub import run_folder
from equipoise.model import VAE
from equipoise.store import StoreError, load_mixture, load_model, read_json

Row = dict[str, Any]
"""The figures of one epoch: epoch, stage, seconds, examples_per_second, learning_rate, decision,
and elbo, log_likelihood, kl, mse and noise_var of both splits as ``train_elbo``,
``validation_elbo`` and so on."""


class Run:
    """A run folder, and what is in it.

    Args:
        folder: Path of the folder, or "hf:owner/name" of a run on the Hugging Face hub, see
            :func:`equipoise.hub.run_folder`.

    Example:
        >>> run = Run("runs/digits")
        >>> run.mixture_file.name
        'aggregate.safetensors'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = run_folder(folder)
        self.config_file = self.folder / "config.json"
        self.model_file = self.folder / "model.safetensors"
        self.mixture_file = self.folder / "aggregate.safetensors"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.evaluation_file = self.folder / "evaluation.json"
        self.checkpoints = self.folder / "checkpoints"
        self.figures = self.folder / "figures"

    def settings(self) -> dict[str, Any]:
        """Read ``config.json``: options, data, versions and command.

        Returns:
            JSON values.

        Raises:
            StoreError: if the folder is not a run.
        """
        if not self.config_file.is_file():
            raise StoreError(
                f"{self.folder} is not a run: it has no config.json. "
                "Runs are made by 'equipoise train'."
            )

        settings: dict[str, Any] = read_json(self.config_file)
        return settings

    def config(self) -> TrainConfig:
        """Read the options that the run was trained with.

        Returns:
            The configuration.
        """
        return make_config(self.settings()["options"])

    def data(
        self,
        data_dir: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Data:
        """Load the data that the run was trained on, in the way in which they were loaded then.

        Args:
            data_dir: Where to look first for a named data set. None looks where training did.
            progress: Called with (done, total) while images are decoded.

        Returns:
            The data, with the same split.

        Raises:
            ConfigError: if the run was trained on an object in memory, which no file can give back.
            StoreError: if the data are no longer those of the run.
        """
        record = self.settings()["data"]
        loading = dict(record["load"])
        if not loading:
            raise ConfigError(
                [
                    f"{self.folder} was trained from Python, on {record['source']}: "
                    "go on with it there"
                ]
            )

        source = Path(loading["source"])
        if source.is_absolute() and not source.exists():
            raise StoreError(
                f"the data of {self.folder} were in {source}, which is not there any more; "
                "put them back, or give the path of other data where the command takes one"
            )

        if loading.pop("stream", False):
            data = load_stream(**loading)
        else:
            if data_dir is not None:
                loading["data_dir"] = data_dir
            data = load(**loading, progress=progress)

        self.check_data(data)
        return data

    def check_data(self, data: Data) -> None:
        """Refuse other data than the run was trained on.

        Args:
            data: The data that are about to be used with the run.

        Raises:
            StoreError: if their fingerprint differs.
        """
        record = self.settings()["data"]
        if data.fingerprint != record["fingerprint"]:
            raise StoreError(
                f"{self.folder} was trained on {record['name']!r} with the fingerprint "
                f"{record['fingerprint'][:12]}; {data.source} has {data.fingerprint[:12]}. "
                "Give the same data."
            )

    def model(self, encoder: nn.Module | None = None, decoder: nn.Module | None = None) -> VAE:
        """Load the trained model, in evaluation mode, on the CPU.

        Args:
            encoder: Your own encoder, if the model was trained with one.
            decoder: Your own decoder, if the model was trained with one.

        Returns:
            The model.

        Raises:
            StoreError: if the run has not finished training.
        """
        self.settings()
        if not self.model_file.is_file():
            raise StoreError(
                f"{self.folder} has no trained model yet; "
                f"finish it with 'equipoise train --resume {self.folder}'."
            )

        return load_model(self.model_file, encoder, decoder)

    def mixture(self) -> GaussianMixture:
        """Load the mixture that was fitted to the aggregate posterior.

        Returns:
            The mixture, eq. (13).
        """
        return load_mixture(self.mixture_file)[0]

    def history(self) -> list[Row]:
        """Read the figures of each epoch from ``metrics.jsonl``.

        Returns:
            One row per epoch.
        """
        return read_rows(self.metrics_file)


def read_rows(path: Path) -> list[Row]:
    """Read ``metrics.jsonl``. A last line that was cut off by a kill is left out.

    Args:
        path: The file.

    Returns:
        One row per epoch; none if there is no file.
    """
    if not path.is_file():
        return []

    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
