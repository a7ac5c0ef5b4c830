"""The command line as a user meets it: what real processes print, write, refuse and return."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import equipoise
from equipoise.aggregate import single_gaussian
from equipoise.cli import main
from equipoise.files import LOCK, MANIFEST
from equipoise.run import Run
from equipoise.store import load_mixture

QUICK = [
    "--set",
    "latent_dim=2",
    "width=4",
    "stage_1_epochs=2",
    "stage_2_epochs=1",
    "n_components=3",
    "batch_size=128",
]


def run(*arguments, cwd=None, env=None):
    """Run the installed command."""
    return subprocess.run(
        [sys.executable, "-m", "equipoise", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        check=False,
    )


def refused(*arguments, capsys):
    """Run in this process, which is faster, and return what was printed for an exit code of 2."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert exit_.value.code == 2, printed
    return printed.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = run("train", "--out", folder, *QUICK)
    assert done.returncode == 0, done.stderr
    return Run(folder), done.stdout


def test_the_main_job_tells_what_it_does_and_where_to_look(trained):
    folder, printed = trained
    for part in (
        "1,455 training",
        "Stage 1",
        "Optimal noise variance",
        "│ IWAE-20  ",
        "equipoise evaluate",
        str(folder.folder),
        "equipoise sample",
    ):
        assert part in printed
    for file in (
        folder.config_file,
        folder.model_file,
        folder.mixture_file,
        folder.metrics_file,
        folder.evaluation_file,
    ):
        assert file.is_file()
    for name in ("training.png", "mixture.png", "reconstructions.png"):
        with Image.open(folder.figures / name) as image:
            assert np.asarray(image.convert("L")).std() > 10
    hidden = {path.name for path in folder.folder.rglob(".*")}
    assert hidden == {MANIFEST, LOCK}, "no temporary file is left"


def test_the_test_figures_are_in_the_evaluation(trained):
    section = json.loads(trained[0].evaluation_file.read_text())["likelihood"]
    assert section["elbo"]["n"] == 180
    assert section["elbo"]["value"] == pytest.approx(
        section["log_likelihood"]["value"] - section["kl"]["value"], abs=1e-3
    )
    assert section["iwae_20_first_500"]["value"] > section["elbo"]["value"]
    assert section["noise_floor_var"] > 0
    # Both evaluate the same model on the same data; only the noise differs.
    last = trained[0].history()[-1]
    assert section["elbo"]["value"] == pytest.approx(
        last["test_elbo"], abs=4 * section["elbo"]["standard_error"]
    )


@pytest.mark.parametrize("source", ["mixture", "prior", "aggregate", "gaussian", "mixture=4"])
def test_samples(trained, tmp_path, source):
    stem = source.replace("=", "-")
    for folder in (tmp_path / "a", tmp_path / "b"):
        main(
            [
                "sample",
                str(trained[0].folder),
                "--from",
                source,
                "-n",
                "7",
                "--seed",
                "3",
                "--out",
                str(folder),
            ]
        )
    samples = np.load(tmp_path / "a" / f"{stem}.npy")
    assert samples.shape == (7, 1, 8, 8)
    assert samples.dtype == np.uint8
    assert samples.max() <= 16
    assert np.array_equal(samples, np.load(tmp_path / "b" / f"{stem}.npy"))
    assert (np.load(tmp_path / "a" / f"{stem}-std.npy") > 0).all()
    assert (tmp_path / "a" / f"{stem}.png").is_file()


def test_a_flow_is_fitted_once_drawn_from_and_judged(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained[0].folder, folder)
    main(["sample", str(folder), "--from", "flow", "-n", "7", "--out", str(tmp_path / "a")])
    assert np.load(tmp_path / "a" / "flow.npy").shape == (7, 1, 8, 8)
    fitted = (folder / "flow.safetensors").read_bytes()
    main(["evaluate", str(folder), "--from", "mixture=4", "flow", "--sections", "latent"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (folder / "flow.safetensors").read_bytes() == fitted
    for part in ("Log-likelihood of the codes, flow", "Closer than reconstructions, mixture of 4"):
        assert part in printed
    found = json.loads((folder / "evaluation.json").read_text())["latent"]
    assert found["code_log_likelihood"]["flow"]["n"] == 180


def test_a_source_that_is_none_is_refused_with_the_choices(trained, capsys):
    for command in (["sample"], ["evaluate"]):
        printed = refused(*command, trained[0].folder, "--from", "mixture=0", capsys=capsys)
        assert "no source of codes 'mixture=0'; choose from prior, gaussian, mixture" in printed


@pytest.mark.parametrize("command", ["sample", "reconstruct"])
def test_fewer_than_one_example_is_refused(trained, capsys, command):
    for n in ("0", "-3"):
        printed = refused(command, trained[0].folder, "-n", n, capsys=capsys)
        assert "-n must be at least 1" in printed


def test_pixel_noise_is_added_on_demand(trained, tmp_path):
    for name, flag in (("means", []), ("noisy", ["--noise"])):
        main(["sample", str(trained[0].folder), "-n", "50", "--out", str(tmp_path / name), *flag])
    means, noisy = (
        np.load(tmp_path / name / "mixture.npy").astype(float) for name in ("means", "noisy")
    )
    std = np.load(tmp_path / "means" / "mixture-std.npy")
    inside = (means > 4) & (means < 12)  # away from the ends, where values are clamped
    assert np.std((noisy - means)[inside]) == pytest.approx(std[inside].mean(), rel=0.2)


def test_reconstructions(trained, tmp_path):
    main(["reconstruct", str(trained[0].folder), "--out", str(tmp_path)])
    with np.load(tmp_path / "reconstructions.npz") as arrays:
        assert arrays["data"].shape == arrays["mean"].shape == arrays["std"].shape == (180, 1, 8, 8)
        np.testing.assert_allclose(arrays["error"], arrays["data"] - arrays["mean"], atol=1e-4)
    assert (tmp_path / "reconstructions.png").is_file()


def test_reconstructing_other_data(trained, tmp_path, capsys):
    np.save(
        tmp_path / "digits.npy",
        np.random.default_rng(0).integers(0, 17, (20, 8, 8)).astype(np.uint8),
    )
    main(
        [
            "reconstruct",
            str(trained[0].folder),
            str(tmp_path / "digits.npy"),
            "-n",
            "5",
            "--out",
            str(tmp_path),
        ]
    )
    with np.load(tmp_path / "reconstructions.npz") as arrays:
        assert len(arrays["data"]) == 5
    numbered = np.zeros((30, 8, 8), np.uint8)
    numbered[:, 0, 0] = np.arange(30) // 2
    np.save(tmp_path / "numbered.npy", numbered)
    main(
        [
            "reconstruct",
            str(trained[0].folder),
            str(tmp_path / "numbered.npy"),
            "--out",
            str(tmp_path),
        ]
    )
    with np.load(tmp_path / "reconstructions.npz") as arrays:
        np.testing.assert_array_equal(
            arrays["data"][:, 0], numbered
        )  # all of them, in the order of the file
    np.save(tmp_path / "unit.npy", np.random.default_rng(0).random((3, 8, 8)).astype(np.float32))
    assert "whole numbers within [0, 16]" in refused(
        "reconstruct", trained[0].folder, tmp_path / "unit.npy", capsys=capsys
    )
    np.save(
        tmp_path / "other.npy",
        np.random.default_rng(0).integers(0, 255, (20, 9, 9)).astype(np.uint8),
    )
    printed = refused("reconstruct", trained[0].folder, tmp_path / "other.npy", capsys=capsys)
    assert "(1, 9, 9), the model was trained on (1, 8, 8)" in printed


def test_a_table_from_end_to_end(table, tmp_path):
    np.save(tmp_path / "codes.npy", table)
    main(
        [
            "train",
            str(tmp_path / "codes.npy"),
            "--out",
            str(tmp_path / "run"),
            *QUICK,
            "stage_1_epochs=30",
        ]
    )
    main(["sample", str(tmp_path / "run"), "-n", "2000"])
    samples = np.load(tmp_path / "run" / "samples" / "mixture.npy")
    assert samples.dtype == np.float32
    assert samples.shape == (2000, 6)
    # In the units of the table, which differ by a factor of 100,000: column by column.
    assert (np.abs(samples.mean(0) - table.mean(0)) < 0.3 * table.std(0)).all()
    assert (samples.std(0) < 1.5 * table.std(0)).all()
    main(["reconstruct", str(tmp_path / "run")])
    with np.load(tmp_path / "run" / "reconstructions" / "reconstructions.npz") as arrays:
        assert (arrays["error"].std(0) < arrays["data"].std(0)).all()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as the command does in a process
def test_a_folder_of_images_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (16, 12, 3)).astype(np.uint8)).save(
            folder / f"{i}.png"
        )
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "broken.tif").write_bytes(b"II*\0" + b"\xff" * 20)
    done = run("train", folder, "--out", tmp_path / "run", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stdout
    assert "broken.tif" in done.stdout
    assert "PIL" not in done.stderr
    assert Run(tmp_path / "run").model().shape == (3, 16, 12)
    assert "is a run of images" in refused("impute", tmp_path / "run", folder, capsys=capsys)
    one = folder / "7.png"
    score = ["score", str(tmp_path / "run")]
    main([*score, str(folder), str(one), "--false-alarm-rate", "0.3"])
    printed = capsys.readouterr()
    assert "broken.png" in printed.out + printed.err
    with (tmp_path / "run" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["image"] == one.name
    assert rows[-1]["source"] == str(one)
    first = next(row for row in rows if row["image"] == one.name)
    # Equal but for rounding, which depends on the size of the batch.
    assert float(rows[-1]["score"]) == pytest.approx(float(first["score"]), rel=1e-6)
    # It needs no data but its own: what is usual is kept with the run.
    kept = tmp_path / "run" / "held-out.safetensors"
    before = kept.read_bytes()
    folder.rename(tmp_path / "elsewhere")
    main([*score, str(tmp_path / "elsewhere"), "--false-alarm-rate", "0.3"])
    with (tmp_path / "run" / "scores.csv").open() as file:
        assert [row["p_value"] for row in csv.DictReader(file)] == [
            row["p_value"] for row in rows[:-1]
        ]
    kept.unlink()
    refused(*score, tmp_path / "elsewhere", capsys=capsys)
    (tmp_path / "elsewhere").rename(folder)
    main([*score, str(folder), "--false-alarm-rate", "0.3"])
    assert kept.read_bytes() == before
    assert re.fullmatch(r"y \d+-\d+, x \d+-\d+: [\d.]+ nats", rows[0]["worst_region"])
    monkeypatch.chdir(tmp_path)
    assert "broken.png" in refused("train", folder, "--strict", capsys=capsys)
    assert not (tmp_path / "runs").exists()


def test_resume_goes_on_with_the_runs_own_data_and_options(trained, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained[0].folder, copy)
    (copy / "model.safetensors").unlink()
    main(["train", "--resume", str(copy)])
    assert (copy / "model.safetensors").is_file()
    assert len(Run(copy).history()) == 3
    printed = refused("train", "mnist", "--resume", copy, "--strict", capsys=capsys)
    assert "leave out --strict, mnist" in printed
    printed = refused("train", "--resume", copy, "--set", "width=3", capsys=capsys)
    assert "width cannot change with --resume" in printed
    assert "leave out --strict" in refused("train", "--resume", copy, "--strict", capsys=capsys)
    assert "not a run" in refused("train", "--resume", tmp_path / "nowhere", capsys=capsys)


def test_resume_auto_starts_goes_on_and_has_enough(trained, tmp_path, capsys):
    """The same line does all three, and refuses what the run was not trained with."""
    folder = tmp_path / "run"
    line = ["train", "digits", "--out", str(folder), *QUICK, "--resume", "auto"]
    main(line)
    started = Run(folder)
    assert started.history()[-1]["train_elbo"] == trained[0].history()[-1]["train_elbo"]

    weights = started.model_file.read_bytes()
    started.model_file.unlink()
    capsys.readouterr()
    main(line)
    assert "Resumed step-" in capsys.readouterr().out
    assert started.model_file.read_bytes() == weights

    written = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    main(line)
    assert "is trained already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == written

    other = [*line, "--set", "width=3"]
    assert "other values of width" in refused(*other, capsys=capsys)
    started.model_file.unlink()
    assert "other values of width" in refused(*other, capsys=capsys)
    np.save(tmp_path / "other.npy", np.random.default_rng(0).normal(size=(200, 8)))
    elsewhere = [str(tmp_path / "other.npy") if part == "digits" else part for part in line]
    assert "Give the same data" in refused(*elsewhere, capsys=capsys)
    assert "needs --out" in refused("train", "--resume", "auto", capsys=capsys)
    assert "--resume auto" in refused("train", "--out", folder, *QUICK, capsys=capsys)


def test_a_run_from_python_does_not_take_other_data_for_its_own(tmp_path, capsys):
    import equipoise

    data = equipoise.load_data(np.random.default_rng(0).normal(size=(60, 5)))
    config = equipoise.TrainConfig(
        latent_dim=2, width=4, stage_1_epochs=2, stage_2_epochs=1, n_components=2
    )
    run_from_python = equipoise.train(data, config, tmp_path / "run")
    main(["sample", str(run_from_python.folder), "-n", "4"])  # needs no data
    assert np.load(tmp_path / "run" / "samples" / "mixture.npy").shape == (4, 5)
    for command in (
        ["sample", "--from", "aggregate"],
        ["sample", "--from", "flow"],
        ["reconstruct"],
        ["train", "--resume"],
    ):
        name, *rest = command
        arguments = (
            [name, *rest, run_from_python.folder]
            if name == "train"
            else [name, run_from_python.folder, *rest]
        )
        assert "trained from Python" in refused(*arguments, capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["train", ""], "data"),
        (["train", "--resume", ""], "resume"),
        (["train", "--out", ""], "out"),
        (["train", "--data-dir", ""], "data-dir"),
        (["train", "--set", ""], "set"),
        (["sample", ""], "run"),
        (["evaluate", "runs/x", "--data", ""], "data"),
        (["evaluate", "runs/x", "--sections", "noise", ""], "sections"),
    ],
)
def test_an_empty_argument_does_not_stand_for_the_default(arguments, name, capsys):
    assert f"{name} is empty" in refused(*arguments, capsys=capsys)


def test_a_run_beside_its_data_has_a_name_of_its_own(tmp_path, monkeypatch):
    inside = tmp_path / "photos" / "inside"
    inside.mkdir(parents=True)
    images = load_digits().images.astype(np.uint8)
    for number, image in enumerate(images[:30]):
        Image.fromarray(image).save(inside.parent / f"{number}.png")

    monkeypatch.chdir(inside)
    main(["train", "..", *QUICK])
    assert [path.name for path in (inside / "runs").iterdir()] == ["photos"]

    inside.parent.rename(tmp_path / "others")
    monkeypatch.chdir(tmp_path / "others" / "inside")
    for number, image in enumerate(images[30:60]):
        Image.fromarray(image).save(Path("..") / f"{number}.png")
    monkeypatch.setattr(Run, "data", lambda *_: equipoise.load_data(images[60:90]))
    monkeypatch.setattr(Run, "check_data", lambda *_: None)
    main(["evaluate", "runs/photos", "--data", "..", "--sections", "noise"])
    assert Path("runs/photos/evaluation-others.json").is_file()
    assert list(Path("runs/photos").glob("*.png")) == []


def test_a_folder_does_not_hide_a_named_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    main(["train", "digits", "--out", str(tmp_path / "run"), *QUICK])
    assert Run(tmp_path / "run").settings()["data"]["load"]["source"] == "digits"


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(
        "train", "--out", tmp_path / "file" / "run", *QUICK, capsys=capsys
    )


def test_an_unfinished_run_says_how_to_finish_it(trained, tmp_path, capsys):
    import shutil

    shutil.copytree(trained[0].folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    assert "equipoise train --resume" in refused("sample", tmp_path / "copy", capsys=capsys)


# Bad input: a clear error each, and no run folder


def array(tmp_path, values):
    np.save(tmp_path / "data.npy", values)
    return tmp_path / "data.npy"


def images(tmp_path, *sizes):
    folder = tmp_path / "folder"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 255, size).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def with_inf():
    x = np.random.default_rng(0).normal(size=(50, 4))
    x[3, 2] = np.inf
    return x


BAD = {
    "empty folder": (lambda p: images(p), "no image"),
    "one image": (lambda p: images(p, (9, 9)), "1"),
    "images of different sizes": (lambda p: images(p, *[(9, 9)] * 12, (12, 9)), "image_size"),
    "infinite": (lambda p: array(p, with_inf()), "infinite"),
    "a column without a value": (lambda p: array(p, np.full((50, 4), [1, 2, 3, np.nan])), "value"),
    "constant images": (lambda p: array(p, np.full((50, 9, 9), 7, np.uint8)), "same|constant"),
    "text": (lambda p: array(p, np.array([["a", "b"]] * 50)), "dtype|type"),
    "complex numbers": (lambda p: array(p, np.ones((50, 4), complex)), "dtype|type"),
    "more latent units than columns": (
        lambda p: array(p, np.random.default_rng(0).normal(size=(50, 2))),
        "latent_dim=2",
    ),
    "a dozen rows": (
        lambda p: array(p, np.random.default_rng(0).normal(size=(12, 4))),
        "too few examples",
    ),
    "five axes": (lambda p: array(p, np.zeros((20, 2, 3, 9, 9))), "axes|dimensions|shape"),
    "no such file": (lambda p: p / "nowhere.npy", "neither"),
    "a misspelt name": (lambda p: "mnst", "mnist"),
    "a text file": (lambda p: _text(p), "cannot be read"),
}


def _text(path):
    (path / "data.txt").write_text("1 2 3")
    return path / "data.txt"


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_reason_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    make, message = BAD[case]
    source = make(tmp_path)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    printed = refused("train", source, *QUICK, capsys=capsys)
    assert printed.startswith("equipoise: ")
    assert any(part in printed for part in message.split("|")), printed
    assert "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


def test_what_needs_no_stream_is_refused_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "digits needs no stream" in refused("train", "digits", "--stream", capsys=capsys)
    assert not (tmp_path / "runs").exists()


def test_a_named_set_that_is_nowhere_says_what_to_put_where(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    printed = refused("train", "celeba", "--data-dir", tmp_path, capsys=capsys)
    assert "img_align_celeba" in printed
    assert not (tmp_path / "runs").exists()


def test_problems_of_recipe_and_options_come_together(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("width: wide\nlearning_rates: 1\n")
    printed = refused(
        "train", "--recipe", tmp_path / "r.yaml", "--set", "floor=-1", "nonsense", capsys=capsys
    )
    for part in (
        "width must be",
        "unknown option learning_rates; did you mean learning_rate",
        "floor must",
        "'nonsense'",
    ):
        assert part in printed


def test_wrong_arguments_exit_with_2(capsys):
    assert "nonsense" in refused("nonsense", capsys=capsys)
    assert "-n must be at least 1" in refused("sample", ".", "-n", "0", capsys=capsys)
    assert "not a run" in refused("sample", Path(__file__).parent, capsys=capsys)


def test_a_full_disk_is_reported_in_one_line(tmp_path, capsys, monkeypatch):
    import errno

    def no_space(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--out", str(tmp_path / "run"), *QUICK])
    assert exit_.value.code == 1
    assert "no space left" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_evaluate_and_report_from_the_command_line(trained, tmp_path, monkeypatch, capsys):
    """The whole protocol as a user runs it, with the features that are part of the package.

    The other data set is the same digits, upside down.
    """
    folder = tmp_path / "run"
    shutil.copytree(trained[0].folder, folder)
    other = tmp_path / "upside-down.npy"
    np.save(other, load_digits().images[:60, ::-1].astype(np.uint8))
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    line = ["evaluate", str(folder), "-n", "40", "--against", str(other)]
    monkeypatch.setattr(sys, "argv", ["equipoise", *line])
    main(line)
    printed = capsys.readouterr().out
    for part in (
        "Bits per dimension",
        "Fréchet distance, mixture",
        "Active units",
        "Within 1 std",
        "AUROC",
        "180",
    ):
        assert part in printed
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["samples"]["features"] == "efficientnet-lite0"
    assert found["samples"]["mixture"]["frechet_distance"]["n"] == 40
    assert found["about"]["sections"]["samples"]["command"][:2] == ["equipoise", "evaluate"]
    assert (
        len(list((tmp_path / "cache" / "features").iterdir())) == 2
    )  # of test and of training data
    main(["report", str(folder)])
    page = (folder / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert "Bits per dimension" in page
    assert len(page) < 5e6


def test_evaluating_other_examples(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained[0].folder, folder)
    other = tmp_path / "other.npy"
    np.save(other, 16 - load_digits().images[:30].astype(np.uint8))
    main(["evaluate", str(folder), "--data", str(other), "--sections", "noise"])
    found = json.loads((folder / "evaluation-other.npy.json").read_text())
    assert found["noise"]["all"]["coverage_1"]["n"] == 30
    assert found["about"]["data"]["test"] == str(other)
    assert "are in the training data" in refused(
        "evaluate", folder, "--data", "digits", capsys=capsys
    )
    np.save(other, np.zeros((30, 9, 9), np.uint8))
    assert "the model was trained on (1, 8, 8)" in refused(
        "evaluate", folder, "--data", other, capsys=capsys
    )
    assert "choose from likelihood" in refused(
        "evaluate", folder, "--sections", "nose", capsys=capsys
    )
    assert "give --against" in refused("evaluate", folder, "--sections", "outliers", capsys=capsys)
    assert "'inception' need" in refused(
        "evaluate", folder, "--features", "inception", capsys=capsys
    )


@pytest.mark.slow
def test_export_from_the_command_line(trained, tmp_path, capsys):
    main(["export", str(trained[0].folder), "--to", "torch", "--out", str(tmp_path)])
    assert sorted(path.suffix for path in tmp_path.glob("[!.]*")) == [".pt2"] * 4
    assert capsys.readouterr().out.count("largest relative deviation") == 4


def exported_sampler(run, source, folder):
    main(["export", str(run.folder), "--to", "torch", "--from", source, "--out", str(folder)])
    sampler = torch.export.load(folder / "sampler.pt2").module()
    uniform, normal = torch.rand(500), torch.randn(500, 2)
    return normal, sampler(uniform, normal)[0]


@pytest.mark.slow
def test_the_sampler_of_another_mixture_is_exported(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0].folder, folder)

    normal, codes = exported_sampler(Run(folder), "prior", tmp_path / "prior")
    torch.testing.assert_close(codes, normal)

    normal, codes = exported_sampler(Run(folder), "gaussian", tmp_path / "gaussian")
    gaussian = single_gaussian(Run(folder).mixture())
    expected = gaussian.means + normal.double() @ gaussian.scale_trils[0].double().mT
    torch.testing.assert_close(codes.double(), expected.double(), atol=1e-5, rtol=1e-5)

    exported_sampler(Run(folder), "mixture=2", tmp_path / "mixture")
    mixture, _ = load_mixture(folder / "mixture-2.safetensors")
    sampler = torch.export.load(tmp_path / "mixture" / "sampler.pt2")
    assert mixture.n_components == 2
    torch.testing.assert_close(
        sampler.state_dict["means"].double(), mixture.means.double(), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("source", ["flow", "aggregate"])
def test_only_mixtures_are_exported(trained, tmp_path, capsys, source):
    arguments = ["export", trained[0].folder, "--to", "torch", "--from", source, "--out", tmp_path]
    printed = refused(*arguments, capsys=capsys)
    assert f"only a Gaussian mixture can be exported, and '{source}' is none" in printed
    assert "choose from prior, gaussian, mixture, mixture=K, mixture=auto" in printed
    assert not list(tmp_path.iterdir())
    assert not (trained[0].folder / "flow.safetensors").exists()


def test_explore_serves_a_page_until_it_is_interrupted(trained):
    command = [sys.executable, "-m", "equipoise", "explore", str(trained[0].folder), "--no-browser"]
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=unbuffered) as explorer:
        url = explorer.stdout.readline().removeprefix("Page").strip()
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url) as page:
            assert b"<canvas" in page.read()
        explorer.send_signal(signal.SIGINT)
        assert explorer.wait() == 0


def test_a_trained_run_without_checkpoints_is_not_trained_over(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained[0].folder, folder, ignore=shutil.ignore_patterns("checkpoints"))
    assert "no checkpoints to go on from" in refused("train", "--resume", folder, capsys=capsys)


def test_help_teaches_every_option():
    from dataclasses import fields

    from equipoise.config import TrainConfig

    assert "train" in run("--help").stdout
    shown = run("train", "--help").stdout
    for field in fields(TrainConfig):
        assert f"  {field.name}=" in shown


def test_neither_help_nor_import_loads_torch():
    code = (
        "import sys, equipoise, equipoise.cli.parser\n"
        "equipoise.cli.parser.make_parser().format_help()\n"
        "names = ('torch', 'sklearn', 'matplotlib', 'lightning_fabric')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_live_terminal_shows_the_bar_with_time_left_and_figures(tmp_path):
    """Through a pseudo-terminal, as a person would see it."""
    import pty

    master, slave = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "equipoise", "train", "--out", "live", *QUICK, "stage_1_epochs=4"],
        stdout=slave,
        stderr=slave,
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(master)
    assert done.wait() == 0
    text = shown.decode(errors="replace")
    for part in (
        "training",
        "ELBO",
        "KL",
        "MSE",
        "noise std",
        "%",
        "mixture of",
        "Optimal noise variance",
    ):
        assert part in text


def test_warnings_are_one_line_without_the_code(tmp_path):
    """As of data in another unit than the training's, which are warned of from within torch."""
    code = (
        "import sys, warnings, equipoise.cli as cli; "
        "cli._run = lambda _: warnings.warn('Same unit?', stacklevel=2); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "Warning: Same unit?\n"


@pytest.mark.parametrize(
    "line", [["--resume", "runs/x"], ["digits", "--out", "runs/x", "--resume", "auto"]]
)
def test_an_interrupted_training_says_the_line_that_goes_on(line, monkeypatch, capsys):
    from equipoise.cli import parser, train

    def interrupt(_):
        raise KeyboardInterrupt

    command = train.COMMAND._replace(run=interrupt)
    monkeypatch.setitem(parser.COMMANDS, "train", command)
    with pytest.raises(SystemExit):
        main(["train", *line])
    assert "'equipoise train --resume runs/x'" in capsys.readouterr().err


def test_quiet_is_taken_where_something_is_written(trained, tmp_path, capsys):
    folder = str(trained[0].folder)
    main(["sample", folder, "-n", "4", "--quiet", "--out", str(tmp_path)])
    main(["reconstruct", folder, "-n", "4", "--quiet", "--out", str(tmp_path)])
    main(["report", folder, "--quiet"])
    assert "report.html" in capsys.readouterr().out


def test_a_bound_is_printed_once_where_the_first_examples_are_all():
    from equipoise.terminal import format_section

    def estimate(n):
        return {"value": -1.0, "standard_error": 0.1, "n": n}

    section = {"iwae_20_first_500": estimate(180), "iwae_20_first_500_mixture": estimate(180)}
    assert format_section("likelihood", section).count("IWAE-20") == 2
    section |= {"iwae_20": estimate(180), "iwae_20_mixture": estimate(180)}
    assert format_section("likelihood", section).count("IWAE-20") == 2
    section |= {"iwae_20_first_500": estimate(500), "iwae_20": estimate(900)}
    assert "IWAE-20, first 500" in format_section("likelihood", section)
