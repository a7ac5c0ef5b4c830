"""A run folder is one owned object: nobody's files are lost, nothing of two runs is mixed."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import equipoise
from equipoise.cli import main
from equipoise.files import StoreError, exclusive, is_ours, write_json
from equipoise.report import write_report
from equipoise.run import Run
from equipoise.store import read_digest, save_model, write_tensors

SETTINGS = {
    "latent_dim": 2,
    "width": 1,
    "stage_1_epochs": 2,
    "stage_2_epochs": 1,
    "n_components": 1,
    "batch_size": 32,
    "tolerance": 0.0,
    "accelerator": "cpu",
}
CONFIG = equipoise.TrainConfig(**SETTINGS)
OPTIONS = [f"{name}={value}" for name, value in SETTINGS.items()]


def table(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(80, 2)) @ rng.normal(size=(2, 5)) + 0.1 * rng.normal(size=(80, 5))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "x.npy", table())
    data = equipoise.load_data(folder / "x.npy")
    run = equipoise.train(data, CONFIG, folder / "run")
    equipoise.evaluate(run, data, sections=["likelihood", "latent"])
    return run


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    return Run(tmp_path / "run")


def start(*arguments, cwd=None):
    return subprocess.Popen(
        [sys.executable, "-m", "equipoise", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def refusal_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def contents_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("[!.]*")) if path.is_file()}


def test_a_folder_with_somebody_elses_files_is_refused(tmp_path, capsys):
    for name in ("model.safetensors", "metrics.jsonl", "checkpoints/step-000000001.safetensors"):
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = contents_of(tmp_path / "mine")

    arguments = ("train", "--out", tmp_path / "mine", "--set", *OPTIONS)
    assert "is not empty, and holds no run" in refusal_of(capsys, *arguments)
    assert "equipoise did not write it" in refusal_of(capsys, *arguments, "--force")
    after = contents_of(tmp_path / "mine")
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_file_in_the_place_of_the_folder_stays(tmp_path, capsys, force):
    (tmp_path / "mine").write_text("mine")
    assert "is no folder" in refusal_of(capsys, "train", "--out", tmp_path / "mine", *force)
    assert (tmp_path / "mine").read_text() == "mine"


def test_an_empty_folder_of_somebody_elses_stays(tmp_path, monkeypatch):
    def no_permission(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("equipoise.training.job.write_json", no_permission)
    with pytest.raises(PermissionError):
        equipoise.train(equipoise.load_data(table()), CONFIG, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []

    with pytest.raises(PermissionError):
        equipoise.train(equipoise.load_data(table()), CONFIG, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_names_that_no_reader_could_open_are_refused_before_anything_is_written(tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    np.save(f"{odd}.npy", table())
    with pytest.raises(ValueError, match="is not UTF-8: rename it"):
        equipoise.load_data(f"{odd}.npy")
    with pytest.raises(StoreError, match="is not UTF-8: rename it"):
        equipoise.train(equipoise.load_data(table()), CONFIG, odd)
    with pytest.raises(StoreError, match="is not UTF-8: rename it"):
        write_tensors(odd, "model", {}, {})
    assert not odd.exists()

    text = tmp_path / "café \U0001f600"
    np.save(f"{text}.npy", table())
    run = equipoise.train(equipoise.load_data(f"{text}.npy"), CONFIG, text)
    assert run.data().name == text.name
    assert run.model().latent_dim == 2


def test_force_writes_beside_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run = equipoise.train(equipoise.load_data(table()), CONFIG, tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert run.mixture().n_components == 1


def test_a_run_that_lost_its_configuration_is_not_trained_over(run, capsys):
    run.config_file.unlink()
    before = contents_of(run.folder)
    assert "is not empty" in refusal_of(capsys, "train", "--out", run.folder)
    assert contents_of(run.folder) == before


@pytest.mark.parametrize("name", ["step-2000.safetensors", "step-000002000.safetensors"])
def test_a_users_file_among_the_checkpoints_stays_and_costs_none(tmp_path, name):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / name).write_text("mine")
    run = equipoise.train(equipoise.load_data(table()), CONFIG, folder, force=True)
    assert (run.checkpoints / name).read_text() == "mine"
    ours = [path for path in run.checkpoints.iterdir() if is_ours(path)]
    assert len(ours) == 2


def test_outputs_replace_their_own_files_and_say_so_but_no_others(run, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["sample", str(run.folder), "-n", "3", "--out", str(out)]
    main(arguments)
    assert "(replaced)" not in capsys.readouterr().out
    main(arguments)
    assert capsys.readouterr().out.count("(replaced)") == 3

    other = tmp_path / "other"
    other.mkdir()
    for name in ("mixture.npy", "reconstructions.npz", "decoder.pt2"):
        (other / name).write_text("mine")
    for command in (["sample"], ["reconstruct"], ["export", "--to", "torch"]):
        error = refusal_of(capsys, command[0], run.folder, *command[1:], "--out", other)
        assert "equipoise did not write it" in error
    for name in ("mixture.npy", "reconstructions.npz", "decoder.pt2"):
        assert (other / name).read_text() == "mine"


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_an_estimator_does_not_replace_another_programs_file(tmp_path):
    estimator = equipoise.VAEEstimator(latent_dim=2, width=4, stage_1_epochs=1, stage_2_epochs=0)
    estimator.fit(table().astype(np.float32))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"no file of equipoise's"):
        estimator.save(path)
    assert path.read_bytes() == b"mine"
    path.unlink()
    estimator.save(path)
    estimator.save(path)
    assert equipoise.VAEEstimator.load(path).latent_dim == 2


@pytest.mark.slow
def test_two_trainings_at_once_take_two_folders_or_one_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", table())
    both = [start("train", "x.npy", "--set", *OPTIONS, cwd=tmp_path) for _ in range(2)]
    for process in both:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["x", "x-2"]
    for name in ("x", "x-2"):
        assert [row["epoch"] for row in Run(tmp_path / "runs" / name).history()] == [1, 2, 3]

    arguments = ("train", "x.npy", "--out", "same", "--set", *OPTIONS)
    both = [start(*arguments, cwd=tmp_path) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    (error,) = filter(None, errors)
    assert "is in use: training in process" in error or "holds a run already" in error
    assert [row["epoch"] for row in Run(tmp_path / "same").history()] == [1, 2, 3]


def test_what_is_in_use_is_refused_and_a_report_is_not(run, capsys):
    before = contents_of(run.folder)
    with exclusive(run.folder, "training"):
        for arguments in (
            ("train", "--resume", run.folder),
            ("evaluate", run.folder, "--sections", "likelihood"),
        ):
            assert "is in use: training in process" in refusal_of(capsys, *arguments)
        assert contents_of(run.folder) == before
        assert write_report(run.folder).is_file()


def test_resuming_a_finished_run_keeps_its_evaluation_and_its_bytes(run):
    before = {
        path: path.read_bytes()
        for path in (run.model_file, run.mixture_file, run.metrics_file, run.config_file)
    }
    sections = set(run.evaluation())
    main(["train", "--resume", str(run.folder), "--quiet"])
    assert {path: path.read_bytes() for path in before} == before
    assert set(run.evaluation()) == sections >= {"latent"}


def other_run(tmp_path, seed=1):
    return equipoise.train(equipoise.load_data(table(seed)), CONFIG, tmp_path / "other")


def test_files_of_another_run_are_noticed(run, tmp_path):
    other = other_run(tmp_path)
    shutil.copy(other.mixture_file, run.mixture_file)
    with pytest.raises(StoreError, match="belongs to another run"):
        run.mixture()
    with pytest.raises(StoreError, match="of another model or mixture"):
        run.evaluation()
    shutil.copy(other.model_file, run.model_file)
    assert run.mixture().n_components == 1
    with pytest.raises(StoreError, match="belongs to another run, or was altered"):
        run.model()


def test_a_checkpoint_of_another_run_is_refused(run, tmp_path):
    other = other_run(tmp_path)
    newest = max(run.checkpoints.glob("step-*"))
    shutil.copy(max(other.checkpoints.glob("step-*")), newest)
    with pytest.raises(StoreError, match="was trained on other data"):
        equipoise.train(run.data(), CONFIG, run.folder, resume=True)


def test_options_that_were_altered_are_noticed_and_those_of_the_machine_may_be(run):
    settings = json.loads(run.config_file.read_text())
    settings["options"] |= {"accelerator": "auto", "devices": 2}
    write_json(run.config_file, settings)
    assert run.model().latent_dim == 2
    settings["options"]["learning_rate"] = 0.5
    write_json(run.config_file, settings)
    with pytest.raises(StoreError, match="other data or options"):
        run.model()


def test_weights_that_are_not_finite_are_refused(run):
    model = run.model()
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(float("nan"))
    save_model(run.model_file, model, run.origin())
    with pytest.raises(StoreError, match="NaN or infinite, in decoder"):
        run.model()


def test_a_run_that_was_copied_without_its_manifest_goes_on(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run.folder, bare, ignore=shutil.ignore_patterns(".*"))
    main(["train", "--resume", str(bare), "--quiet"])
    assert read_digest(bare / "model.safetensors") == read_digest(run.model_file)


def test_outputs_lie_within_a_run_as_its_own(run):
    main(["sample", str(run.folder), "-n", "3"])
    main(["report", str(run.folder)])
    for path in (Path("samples/mixture.npy"), Path("report.html"), Path("figures/training.png")):
        assert is_ours(run.folder / path), path


def test_a_training_that_was_killed_while_it_wrote_its_first_file_starts_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (folder / f".equipoise-{dead}-0123abcd.json").write_text("{")
    run = equipoise.train(equipoise.load_data(table()), CONFIG, folder)
    assert run.mixture().n_components == 1
    assert not list(folder.glob(".equipoise-*"))
