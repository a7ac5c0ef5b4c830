"""Experiment trackers, one adapter each (extra ``track``).

All stay on the machine, reports to their makers included, unless the tracker's own environment variables say otherwise.
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

from equipoise.run import Row
from equipoise.store import read_json, write_json
from equipoise.training.logging import Sink

PROJECT = "equipoise"


class TrackerSink(Sink):
    """What trackers share: the options are the run's configuration, each epoch is a step.

    Args:
        folder: the run's; its name is the run's, and what is local lies in it.
        options: of the run, by name.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        self.options = options

    @abstractmethod
    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Open the tracker's run, the same one as before if this is a resume."""

    def step(
        self, done_steps: int, total_steps: int, label: str, figures: dict[str, float]
    ) -> None:
        """Do nothing: points are per epoch."""

    def epoch(self, row: Row) -> None:
        """Log every number of the row."""
        self.log(
            {name: float(value) for name, value in row.items() if isinstance(value, int | float)},
            row["epoch"],
        )

    @abstractmethod
    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Hand a point to the tracker."""

    def message(self, text: str) -> None:
        """Do nothing: trackers take figures."""

    @abstractmethod
    def close(self) -> None:
        """End the tracker's run, if it was opened."""

    def run_id(self, create: Callable[[], str]) -> str:
        """Look up the id of the tracker's run, which a resume needs.

        Args:
            create: makes it the first time; it is kept in ``tracker.json``.

        Returns:
            The id.
        """
        file = self.folder / "tracker.json"
        if not file.is_file():
            write_json(file, {"run_id": create()})
        return str(read_json(file)["run_id"])


class TensorBoardSink(TrackerSink):
    """TensorBoard: event files in ``RUN/tensorboard``."""

    writer: Any = None

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Write into the same folder; points after the last epoch of ``history`` are withdrawn."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=len(history) + 1)
        self.writer.add_text(
            "options", "\n".join(f"- {name}: {value}" for name, value in self.options.items()), 0
        )

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Write a point."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        """Flush."""
        if self.writer:
            self.writer.close()


class WandbSink(TrackerSink):
    """Weights & Biases: offline in ``RUN/wandb``, to be sent by ``wandb sync``; at once where WANDB_MODE=online."""

    run: Any = None

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Open the run and log what it lacks of ``history``: offline, where each resume has a file of its own, all."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it goes out even offline
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
        """Log a point."""
        self.run.log(figures, step=epoch)

    def close(self) -> None:
        """Finish, as failed if an exception is on its way."""
        if self.run:
            self.run.finish(exit_code=1 if sys.exception() else 0)


class MlflowSink(TrackerSink):
    """MLflow: a database of its own, ``RUN/mlflow.db``, or the server that MLFLOW_TRACKING_URI names."""

    opened_id = ""

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Create the run, or set it to running again."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is sent from the import on
        import mlflow

        uri = (
            None
            if mlflow.is_tracking_uri_set()
            else f"sqlite:///{(self.folder / 'mlflow.db').resolve()}"
        )
        self.client = mlflow.MlflowClient(uri)
        self.opened_id = self.run_id(self._create)
        self.client.update_run(self.opened_id, status="RUNNING")

    def _create(self) -> str:
        from mlflow.entities import Param

        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(project)
        experiment_id = (
            experiment.experiment_id if experiment else self.client.create_experiment(project)
        )
        run_id: str = self.client.create_run(experiment_id, run_name=self.folder.name).info.run_id
        params = [Param(key=name, value=str(value)) for name, value in self.options.items()]
        self.client.log_batch(run_id, params=params)
        return run_id

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Log a point, in one request."""
        from mlflow.entities import Metric

        now = round(1000 * time.time())  # milliseconds
        metrics = [
            Metric(key=name, value=value, timestamp=now, step=epoch)
            for name, value in figures.items()
        ]
        self.client.log_batch(self.opened_id, metrics=metrics)

    def close(self) -> None:
        """Finish, as failed if an exception is on its way."""
        if self.opened_id:
            self.client.set_terminated(self.opened_id, "FAILED" if sys.exception() else "FINISHED")


class TrackioSink(TrackerSink):
    """Trackio: the user's local database, or where TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    is_open = False

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Open the run, or go on with it."""
        import trackio

        is_remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        with nullcontext() if is_remote else _hub_offline():
            trackio.init(
                project=PROJECT,
                name=self.run_id(lambda: f"{self.folder.name}-{secrets.token_hex(4)}"),
                config=self.options,
                resume="allow",
                embed=False,
            )
        self.is_open = True

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Log a point."""
        import trackio

        trackio.log(figures, step=epoch)

    def close(self) -> None:
        """Flush."""
        if self.is_open:
            import trackio

            trackio.finish()


@contextmanager
def _hub_offline() -> Iterator[None]:
    """Keep trackio from asking the Hugging Face hub for the owner of a stored token, as it does even for local runs."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
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
    """Tell whether a tracker's library can be imported, without importing it.

    Args:
        tracker: a name in ``TRACKERS``.

    Returns:
        True if it can. A folder of that name, which trackers leave behind, is not taken for the library.
    """
    spec = importlib.util.find_spec(tracker)
    return spec is not None and spec.origin is not None
