"""Experiment trackers, one adapter each (extra ``track``).

All of them keep their records on this machine, and send no usage reports, unless the environment
variables of the tracker say otherwise.
"""

import importlib.util
import os
import secrets
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from equipoise.files import write_json
from equipoise.records import TrackerRecord, read_record
from equipoise.run import Row
from equipoise.training.logging import Sink

PROJECT = "equipoise"


class TrackerSink(Sink):
    """What all trackers share: the options are the configuration, and each epoch is a step.

    Args:
        folder: Run folder. Its name is the name of the tracker's run, and local records lie in it.
        options: Options of the training, by name.
    """

    is_open = False

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        self.options = options

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Open the tracker's run. A resumed training goes on with the same run."""
        self.open(history)
        self.is_open = True

    def step(
        self, done_steps: int, total_steps: int, label: str, figures: dict[str, float]
    ) -> None:
        """Do nothing, because trackers take one point per epoch."""

    def epoch(self, row: Row) -> None:
        """Log every number of the row."""
        figures = {
            name: float(value) for name, value in row.items() if isinstance(value, int | float)
        }
        self.log(figures, row["epoch"])

    def message(self, text: str) -> None:
        """Do nothing, because trackers take numbers."""

    def close(self) -> None:
        """End the tracker's run, if it is open. It has failed if an exception is being handled."""
        if self.is_open:
            self.end(has_failed=sys.exception() is not None)

    def run_id(self, create: Callable[[], str]) -> str:
        """Find the id of the tracker's run, with which a resumed training goes on.

        Args:
            create: Function that returns a new id. It is called the first time only, and the id is
                kept in ``tracker.json``.

        Returns:
            The id.
        """
        file = self.folder / "tracker.json"
        if not file.is_file():
            write_json(file, {"run_id": create()})
        return str(read_record(file, TrackerRecord)["run_id"])

    @abstractmethod
    def open(self, history: list[Row]) -> None:
        """Open the tracker's run, given the rows of the epochs that were done before."""

    @abstractmethod
    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Send one point to the tracker."""

    @abstractmethod
    def end(self, has_failed: bool) -> None:
        """End the tracker's run."""


class TensorBoardSink(TrackerSink):
    """TensorBoard: event files in ``RUN/tensorboard``."""

    def open(self, history: list[Row]) -> None:
        """Write to the same folder as before. Points of epochs after the history are withdrawn."""
        from torch.utils.tensorboard import SummaryWriter

        options = "\n".join(f"- {name}: {value}" for name, value in self.options.items())
        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=len(history) + 1)
        self.writer.add_text("options", options, 0)

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Write the point."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, epoch)

    def end(self, has_failed: bool) -> None:
        """Write what is in memory, and close the file."""
        self.writer.close()


class WandbSink(TrackerSink):
    """Weights & Biases: files in ``RUN/wandb``, which ``wandb sync`` sends.

    With WANDB_MODE=online they are sent at once.
    """

    def open(self, history: list[Row]) -> None:
        """Open the run, and log the epochs of the history that it does not have.

        Offline, each resumed training has a file of its own, which has no epoch yet.
        """
        # Reports of errors would be sent even offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            mode=os.environ.get("WANDB_MODE", "offline"),
            name=self.folder.name,
            id=self.run_id(lambda: secrets.token_hex(8)),
            resume="allow",
            dir=self.folder,
            config=self.options,
            reinit="create_new",
            settings=wandb.Settings(console="off", quiet=True),
        )
        for row in history[max(0, self.run.step - 1) :]:
            self.epoch(row)

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Log the point."""
        self.run.log(figures, step=epoch)

    def end(self, has_failed: bool) -> None:
        """Finish the run."""
        self.run.finish(exit_code=int(has_failed))


class MlflowSink(TrackerSink):
    """MLflow: the database ``RUN/mlflow.db``, or the server that MLFLOW_TRACKING_URI names."""

    def open(self, history: list[Row]) -> None:
        """Create the run, or set it to running again."""
        # The library sends usage reports as soon as it is imported.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        uri = None
        if not mlflow.is_tracking_uri_set():
            uri = f"sqlite:///{(self.folder / 'mlflow.db').resolve()}"

        self.client = mlflow.MlflowClient(uri)
        self.id = self.run_id(self._create)
        self.client.update_run(self.id, status="RUNNING")

    def _create(self) -> str:
        """Create the run with its options, and the experiment that it belongs to if it is new."""
        from mlflow.entities import Param

        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(project)
        if experiment is None:
            experiment_id = self.client.create_experiment(project)
        else:
            experiment_id = experiment.experiment_id

        run_id: str = self.client.create_run(experiment_id, run_name=self.folder.name).info.run_id
        params = [Param(key=name, value=str(value)) for name, value in self.options.items()]
        self.client.log_batch(run_id, params=params)
        return run_id

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Log the point in one request."""
        from mlflow.entities import Metric

        milliseconds = round(1000 * time.time())
        metrics = [
            Metric(key=name, value=value, timestamp=milliseconds, step=epoch)
            for name, value in figures.items()
        ]
        self.client.log_batch(self.id, metrics=metrics)

    def end(self, has_failed: bool) -> None:
        """Set the final status of the run."""
        self.client.set_terminated(self.id, "FAILED" if has_failed else "FINISHED")


class TrackioSink(TrackerSink):
    """Trackio: the user's local database.

    TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL name another place.
    """

    def open(self, history: list[Row]) -> None:
        """Open the run, or go on with it."""
        import trackio

        is_remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        hub = nullcontext() if is_remote else _hub_offline()
        with hub:
            trackio.init(
                project=PROJECT,
                name=self.run_id(lambda: f"{self.folder.name}-{secrets.token_hex(4)}"),
                config=self.options,
                resume="allow",
                embed=False,
            )

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Log the point."""
        import trackio

        trackio.log(figures, step=epoch)

    def end(self, has_failed: bool) -> None:
        """Wait until all points are written."""
        import trackio

        trackio.finish()


@contextmanager
def _hub_offline() -> Iterator[None]:
    """Keep trackio from the Hugging Face hub.

    Even for a local run, it asks the hub who owns the token that is stored on this machine.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


TRACKERS: dict[str, type[TrackerSink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
    "trackio": TrackioSink,
}
"""Adapters by the name of their library, which is also the value of the option ``tracker``."""


def is_installed(tracker: str) -> bool:
    """Tell whether the library of a tracker can be imported, without importing it.

    Args:
        tracker: Name in :data:`TRACKERS`.

    Returns:
        True if it can be imported. A folder of the same name, such as trackers leave behind, is not
        taken for the library.
    """
    spec = importlib.util.find_spec(tracker)
    return spec is not None and spec.origin is not None
