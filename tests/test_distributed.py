"""Several processes, on one host and on two.

They give the same curve as one process, and resume bit for bit after they were killed.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from lightning_fabric import Fabric

from equipoise.config import ConfigError, make_config
from equipoise.data import load
from equipoise.gaussian import Gaussian, SharedGenerator
from equipoise.noise import GlobalNoise, PredictedNoise
from equipoise.objectives import Elbo
from equipoise.run import Run
from equipoise.stages import Stage
from equipoise.training.figures import RunningMeans, batch_sums
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer
from tests.test_training import assert_same_files, without_times

TRAIN = [sys.executable, "-m", "equipoise", "train"]
# 1,455 examples in batches of 96: the last one has 15, which two processes cannot halve.
OPTIONS = [
    *(
        "--quiet",
        "--set",
        "latent_dim=4",
        "width=4",
        "batch_size=96",
        "stage_1_epochs=3",
        "stage_2_epochs=3",
    ),
    *("tolerance=0", "recalibrate=monotone", "n_components=4", "accelerator=cpu"),
    "stage_2_network=head",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run_command(*command):
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def trained(folder, *more):
    done = run_command(*TRAIN, "--out", folder, *OPTIONS, *more)
    assert done.returncode == 0, done.stderr
    return Run(folder)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("two") / "run", "--devices", "2")


def assert_close_runs(ours, theirs, tolerance=1e-4):
    for row, other in zip(
        without_times(ours.history()), without_times(theirs.history()), strict=True
    ):
        assert row.pop("decision") == other.pop("decision")
        assert row == pytest.approx(other, rel=tolerance)
    weights, others = ours.model().state_dict(), theirs.model().state_dict()
    torch.testing.assert_close(weights, others, rtol=1e-2, atol=1e-3)
    # Fits from different random starts may end at different mixtures, but their moments are those
    # of the codes in any case.
    torch.testing.assert_close(
        ours.mixture().moments(), theirs.mixture().moments(), rtol=1e-2, atol=1e-2
    )


def test_two_processes_give_the_curve_of_one(by_two, tmp_path):
    """The loss, eq. (10), both stages, recalibration, evaluation and mixture are the same.

    The last batch has an odd number of examples.
    """
    one = trained(tmp_path / "one")
    assert_close_runs(by_two, one)
    assert [row["stage"] for row in one.history()] == [1, 1, 1, 2, 2, 2]
    assert by_two.settings()["options"] == one.settings()["options"] | {"devices": 2}


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["2", "4"])
def test_processes_stopped_and_killed_resume_bit_for_bit(request, processes, tmp_path):
    """Training goes on where it ended, after SIGTERM in stage 1 and SIGKILL in stage 2.

    SIGTERM ends all processes with a checkpoint at the current step. A sum of two numbers has one
    order, and one of four has several.
    """
    if processes == "2":
        whole = request.getfixturevalue("by_two")
    else:
        whole = trained(tmp_path / "whole", "--devices", processes)
    run = Run(tmp_path / "run")
    arguments = ["--out", run.folder, *OPTIONS, "--devices", processes]
    for rows, number, code in ((1, signal.SIGTERM, 143), (4, signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen(
            [*TRAIN, *map(str, arguments)],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while len(run.history()) < rows:
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            time.sleep(random.uniform(0, run.history()[-1]["seconds"]))
            process.send_signal(number)
            told = process.communicate()[1]
        assert process.returncode == code, told
        assert number is signal.SIGKILL or "stopped by SIGTERM after step" in told
        assert not run.model_file.exists()
        arguments = ["--quiet", "--resume", run.folder]
    done = run_command(*TRAIN, *arguments)
    assert done.returncode == 0, done.stderr
    assert_same_files(run, whole)
    assert without_times(run.history()) == without_times(whole.history())


def workers_of(process):
    """The processes that torchrun has started, by their rank."""
    ranks = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks |= {
            int(variable[5:]): int(child) for variable in variables if variable.startswith(b"RANK=")
        }
    return ranks


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    "killed", [pytest.param(1, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow)]
)
def test_torchrun_starts_again_what_was_killed(by_two, tmp_path, killed):
    """One of two processes is killed; the same line goes on and ends bit for bit."""
    run = Run(tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    line = ["-m", "equipoise", "train", "--out", run.folder, *OPTIONS, "--resume", "auto"]
    with subprocess.Popen(
        [*torchrun, "--max-restarts", "3", *map(str, line)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while len(run.history()) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        os.kill(workers_of(process)[killed], signal.SIGKILL)
        try:
            told = process.communicate(timeout=120)[0]
        finally:
            process.terminate()
    assert process.returncode == 0, told
    assert "Resumed step-" in told
    assert_same_files(run, by_two)
    assert without_times(run.history()) == without_times(by_two.history())


class Interruptions(RuleBasedStateMachine):
    """A run that is stopped and goes on with another number of processes, again and again."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.run = Run(Path(self.folder.name) / "run")

    def line(self, processes):
        return [
            *(*TRAIN, "--out", str(self.run.folder), *OPTIONS),
            *("--resume", "auto", "--devices", str(processes)),
        ]

    @rule(
        processes=st.integers(1, 3),
        number=st.sampled_from([signal.SIGTERM, signal.SIGKILL]),
        more_epochs=st.integers(0, 2),
        wait=st.floats(0, 1),
    )
    def interrupted(self, processes, number, more_epochs, wait):
        rows = len(self.run.history()) if self.run.folder.exists() else 0
        with subprocess.Popen(
            self.line(processes), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            while process.poll() is None and len(self.run.history()) < rows + more_epochs:
                time.sleep(0.01)
            time.sleep(wait)
            process.send_signal(number)
            told = process.communicate(timeout=300)[1]
        assert process.returncode in (0, 143, -number), told

    def teardown(self):
        done = run_command(*self.line(2))
        assert done.returncode == 0, done.stderr
        assert_close_runs(self.run, self.expected)
        self.folder.cleanup()


@pytest.mark.slow
def test_any_sequence_of_processes_and_kills_gives_the_curve_of_one(by_two):
    Interruptions.expected = by_two
    run_state_machine_as_test(
        Interruptions,
        settings=settings(
            max_examples=4, stateful_step_count=4, deadline=None, derandomize=True, database=None
        ),
    )


@pytest.mark.slow
def test_another_number_of_processes_may_go_on(by_two, tmp_path):
    run = Run(tmp_path / "run")
    with subprocess.Popen(
        [*TRAIN, "--out", run.folder, *OPTIONS], env=ENVIRONMENT, stdout=subprocess.DEVNULL
    ) as one:
        while len(run.history()) < 2:
            assert one.poll() is None
            time.sleep(0.005)
        one.send_signal(signal.SIGTERM)
    done = run_command(*TRAIN, "--quiet", "--resume", run.folder, "--devices", "2")
    assert done.returncode == 0, done.stderr
    assert "written by 1 processes, now there are 2" in done.stdout
    assert_close_runs(run, by_two)


@pytest.mark.slow
def test_torchrun_is_another_way_to_start(by_two, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = run_command(*torchrun, "-m", "equipoise", "train", "--out", tmp_path / "run", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert_same_files(Run(tmp_path / "run"), by_two)
    assert done.stdout.count("Test set") == 2, "one process speaks, once per stage"


@pytest.mark.parametrize(
    ("objective", "processes"),
    [
        pytest.param("dip-vae-ii", 3, marks=pytest.mark.slow),
        pytest.param("sigma-vae", 2, marks=pytest.mark.slow),
        pytest.param("sigma-vae", 3, marks=pytest.mark.slow),
        pytest.param("dip-vae-i", 2, marks=pytest.mark.slow),
        pytest.param("wae-mmd", 2, marks=pytest.mark.slow),
        pytest.param("wae-mmd", 3, marks=pytest.mark.slow),
    ],
)
def test_objectives_of_whole_batches_give_the_curve_of_one_process(objective, processes, tmp_path):
    """1,455 examples: the last batch has 15 of them, or 5 per process."""
    options = [
        *("--quiet", "--set", f"objective={objective}", "latent_dim=4", "width=4"),
        *("batch_size=96", "stage_1_epochs=3", "n_components=2", "accelerator=cpu"),
    ]
    one, several = Run(tmp_path / "one"), Run(tmp_path / "several")
    for run, devices in ((one, 1), (several, processes)):
        done = run_command(*TRAIN, "--out", run.folder, *options, f"devices={devices}")
        assert done.returncode == 0, done.stderr
    for row, other in zip(
        without_times(one.history()), without_times(several.history()), strict=True
    ):
        assert row.pop("decision") == other.pop("decision")
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_parts_of_a_folder_give_the_curve_of_one_process(tmp_path):
    """Each process reads its own files. The curve is the same."""
    rng = np.random.default_rng(0)
    (tmp_path / "parts").mkdir()
    mixing = rng.normal(size=(3, 8))
    for number in range(6):
        values = rng.normal(size=(300, 3)) @ mixing + 0.3 * rng.normal(size=(300, 8))
        np.save(tmp_path / "parts" / f"{number}.npy", values.astype(np.float32))
    options = [
        *("--stream", "--quiet", "--set", "latent_dim=3", "width=2", "batch_size=64"),
        *("stage_1_epochs=3", "stage_2_epochs=1", "n_components=2", "accelerator=cpu"),
    ]
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    for run, devices in ((one, "1"), (two, "2")):
        line = [*TRAIN, tmp_path / "parts", "--out", run.folder, *options]
        done = run_command(*line, "--devices", devices)
        assert done.returncode == 0, done.stderr
    for row, other in zip(without_times(one.history()), without_times(two.history()), strict=True):
        assert row.pop("decision") == other.pop("decision")
        assert row == pytest.approx(other, rel=1e-4)
    done = run_command(*TRAIN, tmp_path / "parts", "--out", tmp_path / "none")
    assert "--stream" in done.stderr


SHARED_GRADIENTS = """
import sys
import torch
from functools import partial
from lightning_fabric import Fabric
from equipoise.gaussian import SharedGenerator
from equipoise.noise import GlobalNoise
from equipoise.objectives import BatchVarianceElbo, DipVaeI, DipVaeII, WaeMmd
from equipoise.training.engine import all_reduce_with_gradient, launch
from equipoise.training.group import Group
from tests.test_objectives import small_vae

fabric = Fabric(accelerator="cpu", devices=3, strategy=Group())
launch(fabric)
rank = fabric.global_rank
x = torch.rand(17, 1, 8, 8, generator=torch.Generator().manual_seed(1))  # 6, 6 and 5 examples


def gradients(objective, x, generator, n):
    objective.zero_grad()
    loss = objective(x, generator).loss.sum() / n
    loss.backward()
    parameters = [p for p in objective.parameters() if p.grad is not None]
    return torch.cat([p.grad.flatten() for p in parameters])


for make in (BatchVarianceElbo, DipVaeI, DipVaeII, WaeMmd):
    whole = gradients(make(small_vae(GlobalNoise())), x, torch.Generator().manual_seed(0), 17)
    objective = make(small_vae(GlobalNoise()))
    objective.all_reduce = partial(all_reduce_with_gradient, fabric)
    draws = SharedGenerator(torch.Generator().manual_seed(0), 17, rank, 3)
    part = gradients(objective, x[rank::3], draws, 17 / 3)
    torch.distributed.all_reduce(part)
    torch.testing.assert_close(part / 3, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
if rank == 0:
    print("equal")
"""


@pytest.mark.slow
def test_gradients_of_whole_batches_are_those_of_one_process(tmp_path):
    """Over parts of 6, 6 and 5 examples, averaged by the engine."""
    script = tmp_path / "gradients.py"
    script.write_text(SHARED_GRADIENTS)
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


def test_wrong_input_is_told_before_there_are_processes(tmp_path):
    done = run_command(*TRAIN, "--out", tmp_path / "run", "--devices", "2", "--set", "batch_size=9")
    assert done.returncode == 2
    assert "batch_size=9 must be a multiple of the 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


class SecondOfTwo(Fabric):
    """Process 1 of 2; process 0 is made up."""

    world_size, is_global_zero = 2, False

    def __init__(self):
        super().__init__(accelerator="cpu", devices=1)


def test_a_number_of_processes_chosen_by_torchrun_is_checked_too():
    data = load("digits")
    config = make_config({"batch_size": 9})
    with pytest.raises(ConfigError, match="must be a multiple of the 2 processes"):
        Trainer(make_model(data, config), data, config, fabric=SecondOfTwo())


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**32))
def test_draws_do_not_depend_on_the_number_of_processes(n, world_size, seed):
    def draw(generator, rows):
        return Gaussian(torch.zeros(rows, 3), torch.zeros(())).sample(generator)

    whole = draw(torch.Generator().manual_seed(seed), n)
    for rank in range(world_size):
        shared = SharedGenerator(torch.Generator().manual_seed(seed), n, rank, world_size)
        mine = whole[rank::world_size]
        assert torch.equal(draw(shared, len(mine)), mine)


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_eq_10_over_parts_is_eq_10_over_the_whole(n, seed):
    residual = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    parts = [residual[::2], residual[1::2]]
    whole, shared = GlobalNoise(), GlobalNoise()
    whole.update(residual)
    sums = [
        torch.stack([part.double().square().sum(), torch.tensor(float(part.numel()) / 1)])
        for part in parts
    ]
    shared.update(parts[0], lambda mine: mine + sums[1])
    torch.testing.assert_close(
        shared(torch.zeros(1, 2)), whole(torch.zeros(1, 2)), rtol=1e-6, atol=1e-6
    )


def test_running_means_survive_a_checkpoint_exactly_and_a_change_of_processes():
    model = make_model(load("digits"), make_config({"width": 4}))
    each = []
    for part in range(2):
        means = RunningMeans()
        for step in range(3):
            x = torch.rand(
                5 + part, 1, 8, 8, generator=torch.Generator().manual_seed(10 * part + step)
            )
            terms = Elbo(model)(x, torch.Generator().manual_seed(step))
            means.add(batch_sums(terms), len(x), step)
        each.append(means)
    packed = torch.stack([means.pack() for means in each])
    again, joined = RunningMeans(), RunningMeans()
    again.unpack(packed[:1])
    joined.unpack(packed)

    def read(means):
        return means.read(64, Stage.SHARED_VARIANCE, lambda values, operation="sum": values)

    assert torch.equal(again.pack()[:-1], packed[0, :-1])  # all but the seconds
    assert read(again) == read(each[0])
    n = [read(means)["n"] for means in each]
    assert read(joined)["n"] == sum(n) == 33
    expected = sum(read(means)["elbo"] * count for means, count in zip(each, n, strict=True)) / sum(
        n
    )
    assert read(joined)["elbo"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(
    os.name != "posix" or not shutil.which("ip") or os.geteuid() != 0,
    reason="makes network namespaces",
)
def test_two_hosts(by_two, tmp_path):
    """Two network namespaces joined by a cable stand for two hosts with their own folders."""
    names = [f"eq-{uuid.uuid4().hex[:6]}" for _ in range(2)]
    ends = [f"veth{name[3:]}" for name in names]
    try:
        for name in names:
            if (made := run_command("ip", "netns", "add", name)).returncode:
                pytest.skip(f"network namespaces are not allowed here: {made.stderr}")
        run_command("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        hosts = []
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            run_command("ip", "link", "set", end, "netns", name)
            inside = ["ip", "netns", "exec", name]
            run_command(*inside, "ip", "addr", "add", f"10.77.0.{number + 1}/24", "dev", end)
            for device in (end, "lo"):
                run_command(*inside, "ip", "link", "set", device, "up")
            environment = ENVIRONMENT | {
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": "29500",
                "NODE_RANK": str(number),
                "GLOO_SOCKET_IFNAME": end,
            }
            out = tmp_path / f"host-{number}" / "run"
            command = [
                *inside,
                *TRAIN,
                "--out",
                str(out),
                *OPTIONS,
                "--devices",
                "1",
                "--num-nodes",
                "2",
            ]
            hosts.append(
                subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            )
        for host in hosts:
            told = host.communicate(timeout=300)[1]
            assert host.returncode == 0, told
    finally:
        for name in names:
            run_command("ip", "netns", "del", name)
    assert_same_files(Run(tmp_path / "host-0" / "run"), by_two)
    assert not (tmp_path / "host-1").exists(), "only the first process writes"


def test_the_run_of_two_processes_is_like_any_other(by_two):
    assert isinstance(by_two.model().noise, PredictedNoise)
    assert by_two.mixture().n_components == 4
