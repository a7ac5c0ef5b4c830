"""What processes tell each other, where they listen, and what they say when one is lost."""

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.utilities.rank_zero import rank_zero_only

from equipoise.config import ConfigError, TrainConfig
from equipoise.files import StoreError
from equipoise.run import Run
from equipoise.training import engine
from equipoise.training.checkpoint import Checkpoint
from equipoise.training.engine import broadcast, in_main_process
from equipoise.training.exchange import Message, blank_tensors, pack, unpack
from equipoise.training.figures import NotFiniteError

TRAIN = [sys.executable, "-m", "equipoise", "train", "--quiet"]
OPTIONS = [
    *("--devices", "2", "--set", "latent_dim=2", "width=4", "batch_size=128", "accelerator=cpu"),
    *("stage_1_epochs=2", "stage_2_epochs=1", "n_components=2"),
]

# ---- messages

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))
    | st.builds(Path, st.just("a/b")),
    lambda parts: (
        st.lists(parts, max_size=4)
        | st.lists(parts, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(), parts, max_size=4)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_arrive_as_they_were_sent(value):
    assert unpack(pack(value)) == value


@given(
    st.sampled_from(
        [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    ),
    st.lists(st.integers(0, 3), max_size=4),
)
def test_room_is_made_for_every_tensor(dtype, shape):
    sent = {"a": [torch.ones(shape).to(dtype), 3], 7: torch.zeros(2)}
    message = pack(sent)
    blank = blank_tensors(message.text)
    assert [(t.dtype, t.shape) for t in blank] == [(t.dtype, t.shape) for t in message.tensors]
    for room, tensor in zip(blank, message.tensors, strict=True):
        room.copy_(tensor)
    found = unpack(Message(message.text, blank))
    assert torch.equal(found["a"][0], sent["a"][0])
    assert torch.equal(found[7], sent[7])
    assert found["a"][1] == 3


def test_tensors_in_another_layout_keep_their_values():
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    message = pack(image)
    assert torch.equal(unpack(message), image)


def test_a_checkpoint_stays_one():
    checkpoint = Checkpoint(Path("step"), {"model": {"w": torch.ones(2)}, 3: None}, ["damaged"])
    found = unpack(pack(checkpoint))
    assert isinstance(found, Checkpoint)
    assert found.path == Path("step")
    assert torch.equal(found.state["model"]["w"], torch.ones(2))


class OwnError(StoreError):
    pass


class Foreign(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(28, "No space left on device", "f"), OSError, "No space left on device: 'f'"),
        (FileNotFoundError(2, "No such file", "f"), FileNotFoundError, "No such file: 'f'"),
        (ConfigError(["one", "two"]), ConfigError, "several problems:\n  - one\n  - two"),
        (StoreError("damaged"), StoreError, "^damaged$"),
        (OwnError("locked"), StoreError, "^locked$"),
        (NotFiniteError("diverged"), ArithmeticError, "^diverged$"),
        (TimeoutError("late"), TimeoutError, "^late$"),
        (KeyError("a"), RuntimeError, "^KeyError: 'a'$"),
        (Foreign("\udcff"), RuntimeError, "Foreign"),
    ],
)
def test_errors_arrive_as_the_nearest_class_that_is_allowed(error, kind, text):
    found = unpack(pack(error))
    assert type(found) is kind
    with pytest.raises(kind, match=text):
        raise found


@pytest.mark.parametrize("value", [object(), {1, 2}, len, [OwnError], b"bytes"])
def test_nothing_else_is_told(value):
    with pytest.raises(TypeError, match="plain values and tensors"):
        pack(value)


@given(st.binary(max_size=60))
def test_bytes_from_elsewhere_run_nothing(content):
    for sent in (content, pickle.dumps({"a": content})):
        with pytest.raises((ValueError, TypeError)):
            unpack(Message(sent, []))


class SecondOfTwo(Fabric):
    """Process 1 of 2; process 0 is made up."""

    world_size, is_global_zero = 2, False

    def __init__(self, told, monkeypatch):
        super().__init__(accelerator="cpu", devices=1)
        message = pack(told)
        content = torch.frombuffer(bytearray(message.text), dtype=torch.uint8)
        sent = iter([torch.tensor([len(content)]), content, *message.tensors])
        monkeypatch.setattr(engine, "_send", lambda fabric, tensor: next(sent))


def test_an_error_of_the_main_process_is_raised_in_all(monkeypatch):
    def never():
        raise AssertionError("process 1 has nothing to do")

    full = OSError(28, "No space left on device", "file")
    with pytest.raises(OSError, match="No space left on device: 'file'") as caught:
        in_main_process(SecondOfTwo((None, full), monkeypatch), never)
    assert caught.value.is_told
    assert in_main_process(SecondOfTwo((Path("path"), None), monkeypatch), never) == Path("path")
    tree = {"a": torch.arange(3)}
    assert broadcast(SecondOfTwo(tree, monkeypatch), None)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("length", [-1, 0, 2**40])
def test_a_message_of_an_impossible_length_is_refused(length, monkeypatch):
    fabric = SecondOfTwo(None, monkeypatch)
    monkeypatch.setattr(engine, "_send", lambda fabric, tensor: torch.tensor([length]))
    with pytest.raises(ConnectionError, match="has sent a message of"):
        broadcast(fabric, None)


# ---- real processes


NO_PICKLE = """
import pickle


def refuse(*_, **__):
    raise AssertionError("something was unpickled")


class InC(pickle.Unpickler):
    load = refuse


pickle.load = pickle.loads = pickle._load = pickle._loads = pickle._Unpickler.load = refuse
pickle.Unpickler = InC
"""


def listeners(pids):
    """Addresses at which processes listen, from /proc."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except OSError:
                continue
            inodes |= set(re.findall(r"socket:\[(\d+)\]", target))

    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.append(words[1].split(":")[0])
    return found


def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="there is no /proc")
def test_nothing_is_unpickled_and_only_this_machine_is_listened_to(tmp_path):
    """Stopped in the middle and resumed, so that checkpoints are told, too."""
    (tmp_path / "sitecustomize.py").write_text(NO_PICKLE)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = Run(tmp_path / "run")
    seen = set()
    arguments = ["--out", run.folder, *OPTIONS, "stage_1_epochs=9"]
    with subprocess.Popen(
        [*TRAIN, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        while len(run.history()) < 2:
            assert process.poll() is None, process.communicate()
            seen |= set(listeners([process.pid, *children(process)]))
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert "stopped by SIGTERM" in process.communicate()[1]
    assert seen == {"0100007F"}, "127.0.0.1 alone"
    resumed = [*TRAIN, "--resume", str(run.folder)]
    done = subprocess.run(resumed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(run.history()) == 10


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second"])
def test_the_loss_of_a_process_ends_the_other_with_one_line(victim, tmp_path):
    arguments = ["--out", tmp_path / "run", *OPTIONS, "stage_1_epochs=500"]
    with subprocess.Popen(
        [*TRAIN, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while len(Run(tmp_path / "run").history()) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        (other,) = children(process)
        os.kill(process.pid if victim == "first" else int(other), signal.SIGKILL)
        # The pipe is closed only when both have ended.
        told = process.communicate(timeout=60)[1]
    assert re.fullmatch(r"equipoise: [^\n]*(lost another|has ended)[^\n]*--resume RUN'\n", told)
    assert process.returncode == (-signal.SIGKILL if victim == "first" else 1)


@pytest.mark.slow
def test_the_loss_of_a_process_at_any_time(tmp_path):
    for trial in range(20):
        arguments = ["--out", tmp_path / f"{trial}", *OPTIONS, "stage_1_epochs=500"]
        with subprocess.Popen(
            [*TRAIN, *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while not children(process):
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            (other,) = children(process)
            time.sleep(trial / 3)
            os.kill(int(other) if trial % 2 else process.pid, signal.SIGKILL)
            told = process.communicate(timeout=60)[1]
        assert re.fullmatch(r"equipoise: [^\n]*(lost another|has ended)[^\n]*--resume RUN'\n", told)


@pytest.mark.slow
def test_an_error_of_the_first_process_is_told_once(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    done = subprocess.run(
        [*TRAIN, "--out", str(run), *OPTIONS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.count("equipoise: ") == 1
    assert "holds a run already" in done.stderr


SHORT_OF_PATIENCE = """
import os, sys
os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
from datetime import timedelta
import equipoise.training.group as group
group.PATIENCE = timedelta(seconds=2)
from equipoise.cli import main
main()
"""


@pytest.mark.parametrize(
    ("machine", "address", "problem"),
    [
        pytest.param(0, "127.0.0.1", "within 2 seconds: start", marks=pytest.mark.slow),
        pytest.param(1, "127.0.0.1", "within 2 seconds: start", marks=pytest.mark.slow),
        (1, "absent.invalid", "no machine of that name can be found"),
    ],
)
def test_machines_that_do_not_come_are_waited_for_with_a_word(machine, address, problem, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["train", "--out", tmp_path / "run", *OPTIONS, "num_nodes=2", "devices=1"]
    arguments = [argument for argument in arguments if argument not in ("--devices", "2")]
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_PATIENCE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ
        | {"NODE_RANK": str(machine), "MASTER_ADDR": address, "MASTER_PORT": str(port)},
    )
    assert done.returncode == 1
    place = f"{address}, port {port}"
    waiting = f"Waiting for 2 machines to meet at {place}, for up to 2 seconds. "
    assert f"{waiting}This is machine {machine}." in done.stdout
    assert done.stderr.count("\n") == 1
    assert f"not all 2 processes have come to {place}" in done.stderr
    assert problem in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*TRAIN, "--out", str(tmp_path / "run"), *OPTIONS],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
    assert done.returncode == 1
    assert f"cannot meet at 127.0.0.1, port {port}: " in done.stderr
    assert "Address already in use" in done.stderr


# ---- Slurm

TASK = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TASK |= {"SLURM_NODEID": "0", "SLURM_NTASKS": "1"}


def engine_within(monkeypatch, variables, **options):
    # Fabric keeps the rank for the rest of the process.
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return engine.make_fabric(TrainConfig(accelerator="cpu", **options))


def test_a_machine_that_has_srun_trains_without_it_and_without_a_word(monkeypatch, tmp_path):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine_within(monkeypatch, {}).world_size == 1


def test_the_shell_of_a_batch_job_starts_its_processes_itself(monkeypatch):
    fabric = engine_within(monkeypatch, TASK, devices=2)
    assert isinstance(fabric.strategy.cluster_environment, LightningEnvironment)


def test_processes_of_srun_take_their_ranks_from_slurm(monkeypatch):
    tasks = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
    tasks |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "2"}
    fabric = engine_within(monkeypatch, TASK | tasks, devices=2, num_nodes=2)
    environment = fabric.strategy.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    ranks = environment.global_rank(), environment.local_rank(), environment.node_rank()
    assert (environment.world_size(), *ranks) == (4, 3, 1, 1)


@pytest.mark.parametrize("more", [{}, {"SLURM_NTASKS_PER_NODE": "2"}])
@pytest.mark.parametrize("devices", [1, 4])
def test_another_number_of_processes_than_srun_has_started_is_refused(monkeypatch, more, devices):
    tasks = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"} | more
    with pytest.raises(ConfigError, match=rf"started 2 processes.*--ntasks-per-node={devices}"):
        engine_within(monkeypatch, TASK | tasks, devices=devices)
