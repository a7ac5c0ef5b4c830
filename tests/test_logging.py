"""Where a run's figures go: the protocol, and each tracker's adapter.

Each adapter is tested against a stand-in for its library, which records its calls. Where the real
library is installed, the signatures of the stand-in are compared with the real ones.
"""

import inspect
import json
import os
import sys
from collections import namedtuple
from dataclasses import replace
from importlib import import_module
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType, SimpleNamespace

import pytest

from equipoise.config import ConfigError, TrainConfig
from equipoise.training import setup
from equipoise.training.job import train
from equipoise.training.logging import JsonlSink, Sink
from equipoise.training.trackers import TRACKERS, is_installed

QUICK = TrainConfig(
    latent_dim=2,
    width=2,
    batch_size=1024,
    stage_1_epochs=2,
    stage_2_epochs=1,
    n_components=2,
    tolerance=0.0,
    accelerator="cpu",
)


class Wandb(ModuleType):
    """Stand-in for wandb and its run.

    Online it knows the points of a run by its id. Offline each init begins a new run.
    """

    def __init__(self):
        super().__init__("wandb")
        self.opened, self.points, self.exit_codes = [], [], []

    def Settings(self, console, quiet):  # noqa: N802 (its name)
        return {"console": console, "quiet": quiet}

    def init(self, project, dir, id, name, config, mode, reinit, resume, settings):  # noqa: A002
        self.opened.append(locals())
        known = [step for run_id, step, _ in self.points if run_id == id and mode == "online"]
        self.id, self.step = id, max(known, default=-1) + 1
        return self

    def log(self, data, step):
        self.points.append((self.id, step, data))

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


class Mlflow(ModuleType):
    """Stand-in for mlflow, its entities and its client: one tracking server."""

    Metric = namedtuple("Metric", "key value timestamp step")
    Param = namedtuple("Param", "key value")

    def __init__(self):
        super().__init__("mlflow")
        self.uris, self.experiments, self.runs, self.status, self.points, self.params = (
            [],
            {},
            [],
            [],
            [],
            {},
        )

    def is_tracking_uri_set(self):
        return "MLFLOW_TRACKING_URI" in os.environ

    def MlflowClient(self, tracking_uri):  # noqa: N802 (its name)
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name):
        return (
            SimpleNamespace(experiment_id=self.experiments[name])
            if name in self.experiments
            else None
        )

    def create_experiment(self, name):
        self.experiments[name] = str(len(self.experiments))
        return self.experiments[name]

    def create_run(self, experiment_id, run_name):
        self.runs.append((experiment_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run-{len(self.runs)}"))

    def update_run(self, run_id, status):
        self.status.append((run_id, status))

    def log_batch(self, run_id, metrics=(), params=()):
        self.params |= {param.key: param.value for param in params}
        if metrics:
            assert len({(metric.timestamp, metric.step) for metric in metrics}) == 1
            self.points.append(
                (run_id, metrics[0].step, {metric.key: metric.value for metric in metrics})
            )

    def set_terminated(self, run_id, status):
        self.status.append((run_id, status))


class Trackio(ModuleType):
    """Stand-in for trackio.

    Like trackio, it asks the hub for the user when a run is opened.
    """

    def __init__(self):
        super().__init__("trackio")
        self.opened, self.points, self.finished = [], [], 0

    def init(self, project, name, config, resume, embed):
        from huggingface_hub import constants

        self.opened.append({**locals(), "offline": constants.is_offline_mode()})

    def log(self, metrics, step):
        self.points.append((self.opened[-1]["name"], step, metrics))

    def finish(self):
        self.finished += 1


STAND_INS = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Without a user's own settings, and with what the adapters set taken back."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    for name in ("WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def stand_in(request, monkeypatch):
    module = STAND_INS[request.param]()
    module.__spec__ = ModuleSpec(request.param, None, origin="stand-in")
    monkeypatch.setitem(sys.modules, request.param, module)
    if request.param == "mlflow":
        monkeypatch.setitem(sys.modules, "mlflow.entities", module)
    return module


def use(name):
    return pytest.mark.parametrize("stand_in", [name], indirect=True)


class Interruption:
    """A sink before the tracker's, which interrupts the run when an epoch has ended."""

    def __init__(self, at):
        self.at = at

    def start(self, total_steps, done_steps, history):
        pass

    def step(self, done_steps, total_steps, label, figures):
        pass

    def epoch(self, row):
        if row["epoch"] == self.at:
            raise KeyboardInterrupt

    def message(self, text):
        pass

    def close(self):
        pass


def interrupted_and_resumed(digits, tracker, folder):
    config = replace(QUICK, tracker=tracker)
    with pytest.raises(KeyboardInterrupt):
        train(digits, config, folder, sinks=[Interruption(at=3)])
    return train(digits, config, folder, resume=True)


@pytest.mark.parametrize("stand_in", list(STAND_INS), indirect=True)
def test_a_tracker_gets_the_numbers_of_each_epoch_at_its_step(digits, tmp_path, stand_in):
    run = train(digits, replace(QUICK, tracker=stand_in.__name__), tmp_path / "run")
    rows = run.history()
    assert [step for _, step, _ in stand_in.points] == [1, 2, 3]
    for row, (_, _, figures) in zip(rows, stand_in.points, strict=True):
        assert figures == {name: value for name, value in row.items() if name != "decision"}
    assert "test_elbo" in stand_in.points[-1][2]


@pytest.mark.parametrize("stand_in", list(STAND_INS), indirect=True)
def test_a_resume_goes_on_with_the_trackers_run(digits, tmp_path, stand_in):
    interrupted_and_resumed(digits, stand_in.__name__, tmp_path / "run")
    train(digits, replace(QUICK, tracker=stand_in.__name__), tmp_path / "other" / "run")
    mine, others = (
        {step: run_id for run_id, step, _ in points}
        for points in (stand_in.points[:-3], stand_in.points[-3:])
    )
    assert list(mine) == list(others) == [1, 2, 3]
    assert len(set(mine.values())) == 1
    assert set(mine.values()).isdisjoint(
        others.values()
    )  # a folder of the same name is another run


@use("wandb")
def test_wandb_stays_offline_in_the_run_folder(digits, tmp_path, stand_in):
    config = replace(QUICK, tracker="wandb")
    train(digits, config, tmp_path / "run")
    (opened,) = stand_in.opened
    assert opened["mode"] == "offline"
    assert opened["dir"] == tmp_path / "run"
    assert opened["project"] == "equipoise"
    assert opened["config"] == config.as_dict()
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert stand_in.exit_codes == [0]


@use("wandb")
def test_wandb_follows_the_users_settings(digits, tmp_path, stand_in, monkeypatch):
    for name, value in {"MODE": "online", "PROJECT": "mine", "ERROR_REPORTING": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    train(digits, replace(QUICK, tracker="wandb"), tmp_path / "run")
    assert stand_in.opened[0]["mode"] == "online"
    assert stand_in.opened[0]["project"] == "mine"
    assert os.environ["WANDB_ERROR_REPORTING"] == "true"


@use("wandb")
@pytest.mark.parametrize(("mode", "steps"), [("offline", [1, 2, 1, 2, 3]), ("online", [1, 2, 3])])
def test_wandb_is_told_of_the_epochs_it_lacks(digits, tmp_path, stand_in, monkeypatch, mode, steps):
    monkeypatch.setenv("WANDB_MODE", mode)
    interrupted_and_resumed(digits, "wandb", tmp_path / "run")
    assert [step for _, step, _ in stand_in.points] == steps
    assert stand_in.exit_codes == [1, 0]


@use("mlflow")
def test_mlflow_writes_a_database_in_the_run_folder(digits, tmp_path, stand_in):
    config = replace(QUICK, tracker="mlflow")
    train(digits, config, tmp_path / "run")
    assert stand_in.uris == [f"sqlite:///{(tmp_path / 'run').resolve()}/mlflow.db"]
    assert stand_in.runs == [("0", "run")]
    assert list(stand_in.experiments) == ["equipoise"]
    assert stand_in.params == {name: str(value) for name, value in config.as_dict().items()}
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


@use("mlflow")
def test_mlflow_follows_the_users_settings(digits, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    stand_in.create_experiment("other")
    stand_in.create_experiment("mine")
    train(digits, replace(QUICK, tracker="mlflow"), tmp_path / "run")
    assert stand_in.uris == [None]  # the library's own choice, which is the server
    assert stand_in.runs == [("1", "run")]


@use("mlflow")
def test_mlflow_tells_how_a_run_ended(digits, tmp_path, stand_in):
    interrupted_and_resumed(digits, "mlflow", tmp_path / "run")
    assert stand_in.status == [
        ("run-1", state) for state in ("RUNNING", "FAILED", "RUNNING", "FINISHED")
    ]


@use("mlflow")
def test_a_tracker_that_cannot_be_reached_is_the_error_one_sees(
    digits, tmp_path, stand_in, monkeypatch
):
    def unreachable(name):
        raise ConnectionError("no such server")

    monkeypatch.setattr(stand_in, "get_experiment_by_name", unreachable)
    with pytest.raises(ConnectionError, match="no such server"):
        train(digits, replace(QUICK, tracker="mlflow"), tmp_path / "run")


@use("trackio")
@pytest.mark.parametrize(("space", "offline"), [(None, True), ("me/space", False)])
def test_trackio_asks_the_hub_only_for_a_space(
    digits, tmp_path, stand_in, monkeypatch, space, offline
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if space:
        monkeypatch.setenv("TRACKIO_SPACE_ID", space)
    config = replace(QUICK, tracker="trackio")
    train(digits, config, tmp_path / "run")
    (opened,) = stand_in.opened
    assert opened["offline"] is offline
    assert not constants.is_offline_mode()
    assert opened["config"] == config.as_dict()
    assert opened["name"].startswith("run-")
    assert stand_in.finished == 1


def test_tensorboard_resumes_without_a_trace_of_the_epoch_that_was_lost(digits, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = interrupted_and_resumed(digits, "tensorboard", tmp_path / "run")
    sink = TRACKERS["tensorboard"](run.folder, {})
    sink.start(
        10, 10, run.history()[:1]
    )  # as if epochs 2 and 3 had been logged, and then a kill came
    sink.log({"validation_elbo": -1.0}, 2)
    sink.close()
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    elbos = [(event.step, event.value) for event in events.Scalars("validation_elbo")]
    assert elbos == [(1, pytest.approx(run.history()[0]["validation_elbo"])), (2, -1.0)]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_told_before_anything_is_written(digits, tmp_path, monkeypatch, name):
    monkeypatch.setattr(setup, "is_installed", lambda _tracker: False)
    with pytest.raises(
        ConfigError, match=rf"tracker={name} .* pip install {name}, or 'equipoise\[track\]'"
    ):
        train(digits, replace(QUICK, tracker=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_a_tracker_left_is_not_its_library(tmp_path, monkeypatch):
    (tmp_path / "tracks_of_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("tracks_of_a_tracker")
    assert not is_installed("no_such_tracker")
    assert is_installed("numpy")


def test_a_sink_that_never_started_can_be_closed(tmp_path):
    for tracker in TRACKERS.values():
        sink = tracker(tmp_path, {})
        assert isinstance(sink, Sink)
        sink.message("a warning about the data, before the start")
        sink.close()
    assert not list(tmp_path.iterdir())


def test_every_run_has_its_rows_as_json(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    assert isinstance(sink, Sink)
    sink.start(10, 0, [{"epoch": 1}])
    sink.epoch({"epoch": 2})
    assert [json.loads(line) for line in sink.path.read_text().splitlines()] == [
        {"epoch": 1},
        {"epoch": 2},
    ]


CALLS = {
    "wandb": ("init", "Settings", "Run.log", "Run.finish"),
    "trackio": ("init", "log", "finish"),
    "mlflow": (
        "is_tracking_uri_set",
        "entities.Metric",
        "entities.Param",
        "MlflowClient.get_experiment_by_name",
        "MlflowClient.create_experiment",
        "MlflowClient.create_run",
        "MlflowClient.update_run",
        "MlflowClient.log_batch",
        "MlflowClient.set_terminated",
    ),
}


@pytest.mark.parametrize(
    ("library", "call"), [(name, call) for name, calls in CALLS.items() for call in calls]
)
@pytest.mark.filterwarnings("ignore")  # what the libraries warn of is theirs
def test_the_real_libraries_take_what_the_stand_ins_take(library, call, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    pytest.importorskip(library)
    real = attrgetter(call)(import_module(library))
    stand_in = getattr(
        STAND_INS[library](), call.rpartition(".")[2]
    )  # module, client and run are one object
    assert set(inspect.signature(stand_in).parameters) <= set(inspect.signature(real).parameters)
