"""Places such as s3://: streams are read from them, runs are kept there and go on from there."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from functools import partial

import fsspec
import numpy as np
import pytest

import equipoise
from equipoise.data import load_stream
from equipoise.files import StoreError
from equipoise.places import Place, is_place, locate, scrubbed
from equipoise.remote import INDEX, RemoteRun, fetch
from equipoise.run import Run
from equipoise.training.trainer import Trainer
from tests.test_shards import SIZES, values_of, whole_batches, write_npy, write_parquet
from tests.test_training import assert_same_files, without_times

OPTIONS = {
    "latent_dim": 1,
    "width": 2,
    "stage_1_epochs": 2,
    "stage_2_epochs": 1,
    "batch_size": 50,
    "n_components": 2,
    "accelerator": "cpu",
    "tolerance": 0.0,
}


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A new place in memory, with the work in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return Place("memory://bucket/photos")


def copy(folder, place):
    for file in folder.iterdir():
        (place / file.name).upload(file)


def table(folder):
    """Shards of a table that a model can learn from."""
    parts = write_npy(folder)
    for file in parts.iterdir():
        values = np.load(file)
        values[:, 0] /= 100
        np.save(file, values)
    return parts


def test_a_place_is_a_folder_of_files(place, tmp_path):
    assert not place.is_dir()
    assert place.iterdir() == []
    (place / "a.txt").write(b"0123456789")
    (place / "deep" / "b.txt").write(b"x")
    assert [file.name for file in place.iterdir()] == ["a.txt", "deep"]
    assert (place / "a.txt").read(2, 5) == b"234"
    with (place / "a.txt").open() as one, (place / "a.txt").open() as other:
        one.seek(7)
        assert (one.read(2), other.read(2), one.read(9), one.read(9)) == (b"78", b"01", b"9", b"")
    (place / "a.txt").download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    (place / "a.txt").remove()
    (place / "a.txt").remove()
    assert [file.name for file in place.iterdir()] == ["deep"]
    with pytest.raises(StoreError, match=r"There is no memory://bucket/photos/a\.txt"):
        (place / "a.txt").read()


@pytest.mark.parametrize(
    "address", ["s3://KEY:hidden@bucket/x", "https://host/x?X-Amz-Signature=hidden"]
)
def test_an_address_with_a_password_is_refused_without_repeating_it(address):
    assert is_place(address)
    with pytest.raises(StoreError, match="log in") as raised:
        locate(address)
    assert "hidden" not in str(raised.value)


def test_messages_of_libraries_lose_their_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    text = scrubbed("Forbidden: wJalrXUtnFEMI at https://h/?X-Amz-Signature=abc123&x=1")
    assert "wJalrXUtnFEMI" not in text
    assert "abc123" not in text
    assert "Forbidden" in text


def test_places_without_a_library_or_of_no_kind_are_told():
    with pytest.raises(StoreError, match="no place of this kind"):
        Place("nowhere://x/y").read()
    assert locate("file:///a/b").as_posix() == "/a/b"


@pytest.mark.parametrize("write", [write_npy, write_parquet])
def test_a_stream_at_a_place_is_that_of_the_folder(place, tmp_path, write):
    folder = write(tmp_path / "photos")
    copy(folder, place)
    here, there = (load_stream(s, test=20, validation=30) for s in (folder, str(place)))
    assert there.fingerprint == here.fingerprint
    assert there.name == "photos"
    pairs = zip(whole_batches(here.train, 2), whole_batches(there.train, 4), strict=True)
    assert all((a == b).all() for a, b in pairs)
    assert there.loading["source"] == "memory://bucket/photos"


def test_shards_at_a_place_are_read_in_no_more_bytes_than_they_have(place, tmp_path, monkeypatch):
    folder = write_npy(tmp_path / "photos", (1000,) * 4)
    copy(folder, place)
    stream = load_stream(str(place), test=20, validation=30).train
    n_bytes = []
    read = Place.read
    monkeypatch.setattr(Place, "read", lambda self, a, b: n_bytes.append(b - a) or read(self, a, b))
    assert sum(map(len, whole_batches(stream, 4))) == len(stream)
    assert sum(n_bytes) == len(stream) * 3 * 4


def test_a_shard_that_shrinks_at_a_place_is_noticed(place, tmp_path):
    copy(write_npy(tmp_path / "photos"), place)
    stream = load_stream(str(place), test=20, validation=30).train
    np.save(tmp_path / "other.npy", values_of(SIZES[2] - 1))
    (place / "part-002.npy").upload(tmp_path / "other.npy")
    with pytest.raises(ValueError, match=r"part-002.npy has changed"):
        list(whole_batches(stream, 1))


@pytest.fixture
def data(tmp_path):
    return load_stream(table(tmp_path / "parts"), test=50, validation=50)


def stop_after(monkeypatch, n_checkpoints):
    """Let the process die after so many checkpoints, and leave nothing of this machine."""
    save, left = Trainer._save, [n_checkpoints]

    def saved(self):
        save(self)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", saved)


def test_a_run_goes_on_at_another_machine_from_the_place(place, data, monkeypatch, tmp_path):
    train = partial(equipoise.train, data, equipoise.TrainConfig(**OPTIONS), resume="auto")
    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(str(place))
    index = json.loads((place / INDEX).read())
    assert {"config.json", "metrics.jsonl"} < index["files"].keys()
    assert sum(name.startswith("checkpoints/") for name in index["files"]) == 2

    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    run = train(str(place))
    assert_same_files(run, whole)
    assert without_times(run.history()) == without_times(whole.history())

    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    assert_same_files(Run(str(place)), whole)
    again = train(str(place))
    assert again.history() == run.history()
    with pytest.raises(StoreError, match="holds a run already"):
        equipoise.train(data, equipoise.TrainConfig(**OPTIONS), str(place))


def test_a_checkpoint_that_was_cut_off_is_passed_over(place, data, monkeypatch, tmp_path):
    train = partial(equipoise.train, data, equipoise.TrainConfig(**OPTIONS), resume="auto")
    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(str(place))
    newest = (place / "checkpoints").iterdir()[-1]
    newest.write(newest.read()[:-100])
    (place / "checkpoints" / "step-999999999.safetensors").write(b"not named in the index")

    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    remote = RemoteRun(str(place))
    assert remote.download() == [f"checkpoints/{newest.name}"]
    assert len(list((remote.folder / "checkpoints").iterdir())) == 1
    run = train(str(place))
    assert_same_files(run, whole)


@pytest.mark.parametrize("name", ["../../mine.txt", "/mine.txt", "a/../../b", ".bashrc", "a//b"])
def test_an_index_that_names_files_outside_the_run_is_refused(place, tmp_path, name):
    mine = tmp_path / "runs" / "memory" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    known = {"bytes": 3, "sha256": "0"}
    (place / INDEX).write(json.dumps({"writer": "w", "files": {name: known}}).encode())
    with pytest.raises(StoreError, match=INDEX):
        fetch(str(place))
    assert mine.read_text() == "mine"


def test_a_job_that_was_given_up_for_lost_stops(place, data, monkeypatch):
    save = Trainer._save

    def another_takes_over(self):
        RemoteRun(str(place)).take_over()
        save(self)

    monkeypatch.setattr(Trainer, "_save", another_takes_over)
    with pytest.raises(StoreError, match="another job has gone on with memory://bucket/photos"):
        equipoise.train(data, equipoise.TrainConfig(**OPTIONS), str(place))


def test_a_place_that_does_not_answer_for_a_while_does_not_stop_the_training(
    place, data, monkeypatch
):
    upload, calls = RemoteRun.upload, []

    def sometimes(self):
        calls.append(0)
        if len(calls) == 1:
            raise ConnectionError("memory:// cannot be reached")
        upload(self)

    monkeypatch.setattr(RemoteRun, "upload", sometimes)
    run = equipoise.train(data, equipoise.TrainConfig(**OPTIONS), str(place))
    assert len(calls) > 2
    assert run.model_file.read_bytes() == (place / "model.safetensors").read()


def test_what_the_place_has_is_what_counts(place, data, tmp_path):
    config = equipoise.TrainConfig(**OPTIONS)
    run = equipoise.train(data, config, str(place))
    own = run.folder / "notes.txt"
    own.write_text("of the user")
    fsspec.filesystem("memory").store.clear()
    assert RemoteRun(str(place)).download() == []
    assert not run.config_file.exists()
    assert own.read_text() == "of the user"
    with pytest.raises(StoreError, match="is not a run"):
        Run(str(place))


@pytest.fixture(scope="module")
def server():
    """An object store of this machine, with a bucket."""
    pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="0.0.0.0", port=0)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "loopback-key-id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "loopback-secret")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="module")
def google():
    """A stand-in for Google's object store on this machine, with a bucket."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        # Read as gcsfs is imported. Otherwise it asks Google of what kind each bucket is.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs")
        server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        server.start()
        yield "gs://bucket"
        server.stop()


@pytest.fixture
def store(request):
    """The object store that a test names."""
    return request.getfixturevalue(request.param)


def start(folder, address, *more, inside=(), **variables):
    """Train from the object store into it, on a machine that has only this folder."""
    folder.mkdir(exist_ok=True)
    options = [f"{name}={value}" for name, value in OPTIONS.items()]
    source = f"{address.rpartition('/')[0]}/parts"
    line = [sys.executable, "-m", "equipoise", "train", source, "--stream", "--quiet"]
    line += [*more, "--resume", "auto", "--out", address, "--set", *options, "stage_1_epochs=8"]
    return subprocess.Popen(
        [*inside, *line],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(address, processes):
    index = Place(f"{address}/{INDEX}")
    while not (index.is_file() and b"checkpoints" in index.read()):
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.05)


def ended(*processes):
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), told
    return told[0]


@pytest.mark.slow
@pytest.mark.parametrize("store", ["server", "google"], indirect=True)
def test_a_killed_process_goes_on_from_an_object_store(store, tmp_path):
    """SIGKILL at any moment, and another machine without the folder of the first."""
    copy(table(tmp_path / "parts"), Place(f"{store}/parts"))
    with start(tmp_path / "one", f"{store}/run") as killed:
        wait_for_checkpoint(f"{store}/run", [killed])
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL

    told = ended(start(tmp_path / "two", f"{store}/run"))
    told += ended(start(tmp_path / "whole", f"{store}/whole"))
    assert "Resumed step-" in told
    assert "loopback-secret" not in told
    copies = f"runs/{store.partition(':')[0]}/bucket"
    runs = [Run(tmp_path / "two" / copies / "run"), Run(tmp_path / "whole" / copies / "whole")]
    assert_same_files(*runs)
    assert b"loopback" not in b"".join(
        file.read_bytes() for file in runs[0].folder.rglob("*.json*") if file.is_file()
    )


@pytest.fixture
def hosts(server):
    """Two network namespaces and a bridge to this machine stand for two hosts and a store."""
    if os.name != "posix" or not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("makes network namespaces")

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    mark = uuid.uuid4().hex[:6]
    bridge, names = f"br{mark}", [f"eq{mark}{number}" for number in range(2)]
    try:
        if (made := ip("link", "add", bridge, "type", "bridge")).returncode:
            pytest.skip(f"bridges are not allowed here: {made.stderr}")
        ip("addr", "add", "10.78.0.254/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        found = []
        for number, name in enumerate(names):
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"network namespaces are not allowed here: {made.stderr}")
            ip("link", "add", f"o{name}", "type", "veth", "peer", "name", f"i{name}")
            ip("link", "set", f"o{name}", "master", bridge, "up")
            ip("link", "set", f"i{name}", "netns", name)
            inside = ["ip", "netns", "exec", name]
            ip("-n", name, "addr", "add", f"10.78.0.{number + 1}/24", "dev", f"i{name}")
            for device in (f"i{name}", "lo"):
                ip("-n", name, "link", "set", device, "up")
            variables = {
                "MASTER_ADDR": "10.78.0.1",
                "MASTER_PORT": "29500",
                "NODE_RANK": str(number),
                "GLOO_SOCKET_IFNAME": f"i{name}",
                "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"].replace(
                    "127.0.0.1", "10.78.0.254"
                ),
            }
            found.append((inside, variables))
        yield found
    finally:
        for name in names:
            ip("netns", "del", name)
        ip("link", "del", bridge)


@pytest.mark.slow
def test_two_hosts_train_from_one_object_store(hosts, server, tmp_path):
    """The second is killed, the first ends with a line; both start again, the first anew."""
    copy(table(tmp_path / "parts"), Place(f"{server}/parts"))
    address = f"{server}/by-two"

    def start_both(*folders):
        return [
            start(tmp_path / folder, address, "--num-nodes", "2", inside=inside, **variables)
            for folder, (inside, variables) in zip(folders, hosts, strict=True)
        ]

    first, second = start_both("host-0", "host-1")
    wait_for_checkpoint(address, [first, second])
    second.send_signal(signal.SIGKILL)
    second.communicate()
    told = first.communicate(timeout=300)[0]
    assert first.returncode == 1, told
    assert "has lost another one" in told

    told = ended(*start_both("host-0-again", "host-1"))
    assert "Resumed step-" in told
    ended(start(tmp_path / "one", f"{server}/by-one"))
    one = Run(tmp_path / "one/runs/s3/bucket/by-one")
    two = Run(tmp_path / "host-0-again/runs/s3/bucket/by-two")
    for row, other in zip(without_times(two.history()), without_times(one.history()), strict=True):
        assert row.pop("decision") == other.pop("decision")
        assert row == pytest.approx(other, rel=1e-4)
    assert not (tmp_path / "host-1" / "runs").exists(), "only the first process writes"
