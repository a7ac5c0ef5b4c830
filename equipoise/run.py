"""A run: the folder that a training leaves behind, and everything that can be read from it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from equipoise.aggregate import GaussianMixture
from equipoise.config import (
    EARLIER_VALUES,
    MACHINE,
    ConfigError,
    TrainConfig,
    make_config,
)
from equipoise.data import Data, load, load_stream
from equipoise.files import MANIFEST, StoreError, adopt, exclusive
from equipoise.hub import RUN_FILES, run_folder
from equipoise.model import VAE
from equipoise.places import is_place
from equipoise.records import (
    EpochRow,
    Evaluation,
    LoadArguments,
    Settings,
    StreamArguments,
    check_figures,
    check_format,
    check_record,
    decode_record,
    read_bytes,
    read_record,
)
from equipoise.remote import RemoteRun, fetch
from equipoise.store import load_mixture, load_model, read_codes_digest, read_digest

Row = dict[str, Any]
"""The figures of one epoch: epoch, stage, seconds, examples_per_second, learning_rate, decision,
and elbo, log_likelihood, kl, mse and noise_var of both splits as ``train_elbo``,
``validation_elbo`` and so on."""


OUTPUTS = (
    "checkpoints/step-*.safetensors",
    "evaluation-*.json",
    "figures/**/*.*",
    "flow.safetensors",
    "held-out-rows.safetensors",
    "imputed/*.*",
    "mixture-*.safetensors",
    "report.html",
    "scores.csv",
    "tracker.json",
)
"""Names of the files in a run folder, besides those that are published."""


class Run:
    """A run folder, and what is in it.

    Args:
        folder: Path of the folder; or "hf:owner/name" of a run on the Hugging Face hub, see
            :func:`equipoise.hub.run_folder`; or the address of a run at a place such as
            s3://bucket/run, see :mod:`equipoise.remote`. The run is then copied here.

    Example:
        >>> run = Run("runs/digits")
        >>> run.mixture_file.name
        'aggregate.safetensors'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = fetch(str(folder)) if is_place(folder) else run_folder(folder)
        self.remote: RemoteRun | None = None
        """The place to which the training that made the run has uploaded it."""
        self.config_file = self.folder / "config.json"
        self.model_file = self.folder / "model.safetensors"
        self.mixture_file = self.folder / "aggregate.safetensors"
        self.held_out_file = self.folder / "held-out.safetensors"
        self.held_out_rows_file = self.folder / "held-out-rows.safetensors"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.evaluation_file = self.folder / "evaluation.json"
        self.checkpoints = self.folder / "checkpoints"
        self.figures = self.folder / "figures"

    def exclusive(self, job: str) -> AbstractContextManager[None]:
        """Let one job at a time write into the run folder.

        Files of a run that was copied here without its manifest become the run's own.

        Args:
            job: What is done, such as "evaluation", for the message to another job.

        Returns:
            A context, within which the folder is locked.

        Raises:
            StoreError: on entering it, if another job works there.
        """
        if self.config_file.is_file() and not (self.folder / MANIFEST).exists():
            files = [file for pattern in OUTPUTS for file in self.folder.glob(pattern)]
            names = [file.relative_to(self.folder).as_posix() for file in files]
            adopt(self.folder, (*RUN_FILES, *names))
        return exclusive(self.folder, job)

    def is_trained(self) -> bool:
        """Tell whether the run is trained to its end: it has a model, and a mixture."""
        return self.model_file.is_file() and self.mixture_file.is_file()

    def settings(self) -> Settings:
        """Read ``config.json``: options, data, versions and command.

        Returns:
            JSON values.

        Raises:
            StoreError: if the folder is not a run, or the file is damaged.
        """
        if not self.config_file.is_file():
            raise StoreError(
                f"{self.folder} is not a run: it has no config.json. "
                "Runs are made by 'equipoise train'."
            )

        return read_record(self.config_file, Settings)

    def config(self) -> TrainConfig:
        """Read the options that the run was trained with.

        Returns:
            The configuration.
        """
        try:
            return make_config(EARLIER_VALUES | self.settings()["options"])
        except ConfigError as error:
            raise StoreError(f"{self.config_file}: options: {error}") from error

    def origin(self) -> str:
        """Digest of what the run's model comes from: the options, and the data.

        Options that only say where the run is computed are left out. The file of the model carries
        this digest, so that a model of another run is noticed.

        Returns:
            SHA-256, hexadecimal.
        """
        settings = self.settings()
        return origin_of(settings["options"], settings["data"]["fingerprint"])

    def data(
        self,
        data_dir: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Data:
        """Load the data that the run was trained on, in the way in which they were loaded then.

        Args:
            data_dir: Where to look first for a named data set. None looks where training did.
            progress: Called with (done, total) while images are decoded.
            say: Called with the size and place of a cache before it is written.

        Returns:
            The data, with the same split.

        Raises:
            ConfigError: if the run was trained on an object in memory, which no file can give back.
            StoreError: if the data are no longer those of the run.
        """
        record = self.settings()["data"]
        loading: dict[str, Any] = dict(record["load"])
        if not loading:
            raise ConfigError(
                [
                    f"{self.folder} was trained from Python, on {record['source']}: "
                    "go on with it there, and give the data: equipoise.evaluate(run, data)"
                ]
            )

        self._check_loading(loading)
        source = Path(loading["source"])
        if source.is_absolute() and not source.exists():
            raise StoreError(
                f"the data of {self.folder} were in {source}, which is not there any more; "
                "put them back, or give the path of other data where the command takes one"
            )

        if loading.pop("stream", False):
            data = load_stream(**loading)
        else:
            # Runs of earlier releases have no categories, and take flags for numbers.
            loading.setdefault("categorical", False)
            if data_dir is not None:
                loading["data_dir"] = data_dir
            data = load(**loading, progress=progress, say=say)

        self.check_data(data)
        return data

    def _check_loading(self, loading: dict[str, Any]) -> None:
        """Refuse arguments that the functions which load data do not have."""
        record = StreamArguments if loading.get("stream") else LoadArguments
        what = f"{self.config_file}: data.load"
        check_record(loading, record, what)

        unknown = sorted(loading.keys() - record.__annotations__.keys())
        if unknown:
            raise StoreError(f"{what} has {unknown[0][:100]!r}, which this version does not know.")

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

        return load_model(self.model_file, encoder, decoder, self.origin())

    def mixture(self) -> GaussianMixture:
        """Load the mixture that was fitted to the aggregate posterior.

        Returns:
            The mixture, eq. (13).

        Raises:
            StoreError: if it was fitted to the codes of another model.
        """
        mixture, description = load_mixture(self.mixture_file)

        model = read_codes_digest(self.model_file)
        if description.get("model", model) != model:
            raise StoreError(
                f"{self.mixture_file} was fitted to the codes of another model than "
                f"{self.model_file}: one of the two files belongs to another run."
            )
        return mixture

    def history(self) -> list[Row]:
        """Read the figures of each epoch from ``metrics.jsonl``.

        Returns:
            One row per epoch.
        """
        return read_rows(self.metrics_file)

    def evaluation(self, file: Path | None = None) -> dict[str, Any]:
        """Read what :func:`equipoise.evaluate` has written.

        Args:
            file: Another file than ``evaluation.json``, such as that of other data.

        Returns:
            "about", and the sections by name, as JSON values. Empty if there is no file.

        Raises:
            StoreError: if the file is damaged, or is of another model or mixture than the run's.
        """
        file = file or self.evaluation_file
        if not file.is_file():
            return {}

        evaluation = read_evaluation(file)
        about = evaluation["about"]

        of_run = (read_digest(self.model_file), read_digest(self.mixture_file))
        if (about["model"], about["mixture"]) != of_run:
            raise StoreError(
                f"{file} is of another model or mixture than those in {self.folder}: "
                f"write it anew with 'equipoise evaluate {self.folder}', or delete it."
            )
        return evaluation


def origin_of(options: Mapping[str, Any], fingerprint: str) -> str:
    """Digest of what a model comes from, see :meth:`Run.origin`.

    Args:
        options: The options that it was trained with, as they are in ``config.json``: those that
            came with a later release are not among them.
        fingerprint: That of the data.

    Returns:
        SHA-256, hexadecimal.
    """
    relevant = {name: value for name, value in options.items() if name not in MACHINE}
    text = json.dumps([relevant, fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_evaluation(file: Path) -> dict[str, Any]:
    """Read an evaluation by its schema, whatever model it is of.

    Args:
        file: The file.

    Returns:
        "about", and the sections by name, as JSON values.

    Raises:
        StoreError: if there is no such file, or it is damaged.
    """
    evaluation = read_record(file, Evaluation)
    check_format(evaluation["about"]["format"], str(file))

    sections: dict[str, Any] = {key: part for key, part in evaluation.items() if key != "about"}
    for name, section in sections.items():
        check_figures(section, f"{file}: {name[:100]}")
    return dict(evaluation)


def read_rows(path: Path) -> list[Row]:
    """Read ``metrics.jsonl``. A last line that was cut off by a kill is left out.

    Args:
        path: The file.

    Returns:
        One row per epoch; none if there is no file.

    Raises:
        StoreError: if another line is damaged.
    """
    if not path.is_file():
        return []

    lines = read_bytes(path).split(b"\n")
    # What follows the last line break is nothing, or a line that was not written to its end.
    return [
        dict(decode_record(line, EpochRow, f"{path}, line {number}"))
        for number, line in enumerate(lines[:-1], 1)
    ]
