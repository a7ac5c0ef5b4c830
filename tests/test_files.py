"""Who owns a file: nothing of somebody else is replaced or deleted, and one job works at a time."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from equipoise import files
from equipoise.files import (
    HOLDER,
    LOCK,
    MANIFEST,
    StoreError,
    adopt,
    discard_if_empty,
    exclusive,
    exclusive_outputs,
    is_empty,
    is_ours,
    own_folder,
    own_outputs,
    owner_of,
    remove,
    set_aside,
    whole_file,
    write_array,
    write_json,
    written_names,
)
from equipoise.records import read_bytes


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in (MANIFEST, LOCK))


@pytest.mark.parametrize("inside", ["a.json", "figures/a.json", "a b/ü/[x].json"])
def test_what_we_wrote_is_replaced_and_what_others_wrote_is_not(tmp_path, inside):
    own_folder(tmp_path)
    path = tmp_path / inside
    for value in (1, 2):
        write_json(path, value)
        assert json.loads(path.read_text()) == value
        assert is_ours(path)

    other = path.with_name("other.json")
    other.write_text("mine")
    with pytest.raises(StoreError, match="is there already, and equipoise did not write it"):
        write_json(other, 3)
    remove(other)
    assert other.read_text() == "mine"
    assert not is_ours(other)


def test_a_link_that_leads_nowhere_is_somebody_elses_too(tmp_path):
    own_folder(tmp_path)
    (tmp_path / "a.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="did not write it"):
        write_json(tmp_path / "a.json", 1)
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_we_removed_is_no_longer_ours(tmp_path):
    own_folder(tmp_path)
    path = tmp_path / "a.json"
    write_json(path, 1)
    remove(path)
    assert not path.exists()
    path.write_text("mine")
    remove(path)
    with pytest.raises(StoreError):
        write_json(path, 2)
    assert path.read_text() == "mine"


def test_the_innermost_folder_owns(tmp_path):
    own_folder(tmp_path)
    own_outputs(tmp_path / "samples")
    assert owner_of(tmp_path / "samples" / "a.npy") == tmp_path
    own_folder(tmp_path / "run")
    assert owner_of(tmp_path / "run" / "figures" / "a.png") == tmp_path / "run"
    assert owner_of(tmp_path.parent / "a") != tmp_path


def test_without_a_manifest_the_named_file_is_written(tmp_path):
    (tmp_path / "a.json").write_text("old")
    write_json(tmp_path / "a.json", 1)
    assert names_in(tmp_path) == ["a.json"]


def test_a_manifest_that_is_damaged_loses_claims_and_nothing_else(tmp_path):
    own_folder(tmp_path)
    write_json(tmp_path / "a.json", 1)
    write_json(tmp_path / "b.json", 1)
    manifest = tmp_path / MANIFEST
    whole = manifest.read_bytes()
    for length in range(len(whole)):
        manifest.write_bytes(whole[:length])
        assert written_names(tmp_path) <= {"a.json", "b.json"}
    deep = b"[" * 100_000 + b'\n{"wrote": 3}\n[]\n\xff\n'
    manifest.write_bytes(deep + b'{"wrote": "a.json"}\n')
    assert written_names(tmp_path) == {"a.json"}
    with pytest.raises(StoreError):
        write_json(tmp_path / "b.json", 2)
    assert json.loads((tmp_path / "b.json").read_text()) == 1


def test_a_folder_that_was_copied_is_adopted_by_name(tmp_path):
    (tmp_path / "a.json").write_text("1")
    adopt(tmp_path, ["a.json", "absent.json"])
    write_json(tmp_path / "a.json", 2)
    assert written_names(tmp_path) == {"a.json"}


def test_set_aside_keeps_each_under_a_name_of_its_own(tmp_path):
    own_folder(tmp_path)
    path = tmp_path / "a.json"
    for number in (1, 2, 3):
        write_json(path, number)
        set_aside(path)
    assert names_in(tmp_path) == ["a.json.damaged", "a.json.damaged-2", "a.json.damaged-3"]
    assert json.loads((tmp_path / "a.json.damaged-3").read_text()) == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.open"])
def test_a_failing_call_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, code, call):
    own_folder(tmp_path)
    path = tmp_path / "a.npy"
    write_array(path, np.arange(3))

    def fail(*_args, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(call, fail)
    if call == "os.replace":
        monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match=r"a\.npy") as caught:
        write_array(path, np.arange(4))
    monkeypatch.undo()
    assert caught.value.errno == code
    assert ".equipoise-" not in str(caught.value)
    assert np.load(path).tolist() == [0, 1, 2]
    assert names_in(tmp_path) == ["a.npy"]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.asfortranarray(np.random.default_rng(0).normal(size=(4, 5, 6))),
        np.zeros((0, 3), np.uint8),
        np.float32(2.5),
        np.arange(10)[::2],
    ],
    ids=str,
)
def test_an_array_is_read_by_numpy_as_it_was(tmp_path, array):
    write_array(tmp_path / "a.npy", np.asarray(array))
    read = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert read.dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(read, array)


def test_one_job_at_a_time_and_the_other_is_named(tmp_path):
    with exclusive(tmp_path, "training"):
        other = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from pathlib import Path; from equipoise.files import exclusive\n"
                "with exclusive(Path(sys.argv[1]), 'evaluation'): print('in')",
                str(tmp_path),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert other.returncode
        assert f"training in process {os.getpid()} on " in other.stderr
        assert "in\n" not in other.stdout

    assert not (tmp_path / HOLDER).exists()
    with exclusive(tmp_path, "training"):
        pass


HOLD = """
import sys, time
from pathlib import Path
from equipoise.files import exclusive, whole_file
with exclusive(Path(sys.argv[1]), "training"), whole_file(Path(sys.argv[1], "a.json")) as temporary:
    temporary.write_text("half")
    print("holding", flush=True)
    time.sleep(60)
"""


def test_a_killed_job_leaves_neither_a_lock_nor_a_temporary_file(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "holding\n"
        with pytest.raises(StoreError, match=f"training in process {process.pid} on "):
            exclusive(tmp_path, "training").__enter__()
        process.send_signal(signal.SIGKILL)

    assert len(list(tmp_path.glob(".equipoise-*.json"))) == 1
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with exclusive(tmp_path, "training"):
                assert not list(tmp_path.glob(".equipoise-*.json"))
            break
        except StoreError:
            time.sleep(0.1)
    else:
        pytest.fail("the lock of a dead process was not released")


@pytest.mark.parametrize("inside", [False, True], ids=["of its own", "within a run"])
def test_outputs_of_two_jobs_are_not_mixed(tmp_path, inside, monkeypatch):
    folder = tmp_path / "samples"
    if inside:
        own_folder(tmp_path)

    def write(job):
        for _ in range(10):
            with exclusive_outputs(folder, job):
                for name in ("a.json", "b.json"):
                    write_json(folder / name, job)
                assert read_bytes(folder / "a.json") == read_bytes(folder / "b.json")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert owner_of(folder / "a.json") == (tmp_path if inside else folder)

    monkeypatch.setattr(files, "OUTPUT_SECONDS", 0.1)
    with (
        exclusive_outputs(folder, "sampling"),
        pytest.raises(StoreError, match=f"in use: sampling in process {os.getpid()}"),
    ):
        exclusive_outputs(folder, "export").__enter__()


def test_an_empty_folder_of_ours_is_discarded_and_another_is_not(tmp_path):
    folder = tmp_path / "run"
    with exclusive(folder, "training"):
        assert is_empty(folder)
    discard_if_empty(folder)
    assert not folder.exists()

    own_folder(folder)
    discard_if_empty(folder, keep_folder=True)
    assert list(folder.iterdir()) == []

    own_folder(folder)
    (folder / "mine.txt").write_text("")
    discard_if_empty(folder)
    assert (folder / "mine.txt").exists()
    assert not is_empty(folder)


def test_a_write_that_fails_within_leaves_no_temporary_file(tmp_path):
    own_folder(tmp_path)

    def write():
        with whole_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert names_in(tmp_path) == []


def test_a_name_that_is_no_text_can_be_written(tmp_path):
    write_json(tmp_path / "a.json", {"name": os.fsdecode(b"photo-\xff.png")})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"name": "photo-?.png"}


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path):
    own_folder(tmp_path)
    write_json(tmp_path / "a.json", 1)
    manifest = tmp_path / MANIFEST
    whole = manifest.read_bytes()
    for length in range(len(whole)):
        manifest.write_bytes(whole[:length])
        path = tmp_path / f"{length}.txt"
        with whole_file(path) as temporary:
            temporary.write_text("")
        assert is_ours(path)


def test_what_another_process_adds_or_rewrites_is_seen(tmp_path):
    own_folder(tmp_path)
    for number in range(50):
        write_json(tmp_path / f"{number}.json", number)
    assert len(written_names(tmp_path)) == 50
    manifest = tmp_path / MANIFEST
    with manifest.open("a") as file:
        file.write('{"wrote": "other.json"}\n{"removed": "3.json"}\n{"wrote": "half')
    assert written_names(tmp_path) == {f"{n}.json" for n in range(50) if n != 3} | {"other.json"}
    manifest.write_text("\n" * 10_000 + '{"wrote": "new.json"}\n')
    assert written_names(tmp_path) == {"new.json"}
    manifest.unlink()
    assert written_names(tmp_path) == set()
