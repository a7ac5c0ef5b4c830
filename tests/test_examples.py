"""The examples as a user runs them, with small settings and without a network."""

import gzip
import importlib.util
import os
import re
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parent.parent / "examples"


def run_process(name, cwd):
    """Run an example where no data lie in the usual places, and return what it printed."""
    done = subprocess.run(
        [sys.executable, FOLDER / name],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HOME": str(cwd), "EQUIPOISE_DATA": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Do the same in this process, with arguments. A process takes seconds to import torch."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("EQUIPOISE_DATA", "")
        monkeypatch.chdir(tmp_path)
        try:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        return capsys.readouterr().out

    return run


def is_picture(path):
    with Image.open(path) as image:
        return min(image.size) > 100 and np.asarray(image.convert("L")).std() > 10


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_every_example_explains_itself(path, run):
    if path.name == "uncertain_faces.py":
        pytest.importorskip("skimage", reason="the faces come inside scikit-image")
    printed = run(path.name, "--help")
    for option in ("--epochs", "--out"):
        assert option in printed


def test_malignant_cells_are_odder_than_benign_ones(run, tmp_path):
    printed = run("anomalies_in_a_table.py", "--epochs", 40)
    area, benign, malignant = (
        float(x) for x in re.findall(r"AUROC ([\d.]+)|([\d.]+)%", printed) for x in x if x
    )
    assert area > 0.8
    assert malignant > 2 * benign
    assert is_picture(tmp_path / "anomalies.png")


@pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None, reason="the faces come inside scikit-image"
)
def test_the_std_of_faces_is_right_for_faces_only(run, tmp_path):
    printed = run("uncertain_faces.py", "--epochs", 10)
    faces, others = (float(x) for x in re.findall(r"faces +([\d.]+)%", printed))
    assert 55 < faces < 80
    assert others < faces
    assert is_picture(tmp_path / "faces.png")


def test_mnist_from_files(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (240, 28, 28), dtype=np.uint8)
    for stem in ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"):
        (tmp_path / stem).write_bytes(
            gzip.compress(struct.pack(">4I", 0x0803, *images.shape) + images.tobytes())
        )
    printed = run("mnist.py", "--data-dir", tmp_path, "-n", 100, "--epochs", 1)
    learned = float(re.search(r"learned: ([\d.]+)", printed)[1])
    assert learned == pytest.approx(
        1 / 12, abs=0.03
    )  # the variance of uniform noise: nothing can be explained
    assert is_picture(tmp_path / "mnist.png")


@pytest.mark.skipif(
    Path("/usr/share/datasets/mnist").exists(), reason="MNIST is installed for everyone"
)
def test_mnist_is_skipped_where_it_is_missing(tmp_path):
    printed = run_process("mnist.py", tmp_path)
    assert printed.startswith("Skipped: mnist was not found")
    assert "--data-dir" in printed
