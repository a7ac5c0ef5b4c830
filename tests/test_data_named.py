"""Named sets: the idx format, the places of the files, and the real sets if they are present."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from equipoise.data import load
from equipoise.data.idx import read_idx_images

RANDOM = np.random.default_rng(0)
TRAIN = RANDOM.integers(0, 256, (30, 28, 28), dtype=np.uint8)
TEST = RANDOM.integers(0, 256, (12, 28, 28), dtype=np.uint8)
STEMS = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


def idx(images):
    return struct.pack(">4I", 0x0803, *images.shape) + images.tobytes()


def write(folder, gz=True, train=TRAIN, test=TEST):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, images in zip(STEMS, (train, test), strict=True):
        if gz:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(idx(images)))
        else:
            (folder / stem).write_bytes(idx(images))
    return folder


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No data set in any of the usual places but the system's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize("gz", [True, False])
def test_idx_round_trip(tmp_path, gz):
    write(tmp_path, gz)
    (path,) = tmp_path.glob("train*")
    images = read_idx_images(path)
    assert np.array_equal(images, TRAIN)
    assert isinstance(images, np.memmap) != gz


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes long"),
        (idx(TRAIN)[:10], "10 bytes long"),
        (idx(TRAIN)[:-5], "holds 23531 bytes .* announces 23536"),
        (idx(TRAIN) + b"x", "announces 23536"),
        (struct.pack(">2I", 0x0801, 8) + bytes(8), "starts with 0x00000801; an idx file of images"),
    ],
)
@pytest.mark.parametrize("gz", [True, False])
def test_damaged_idx_files_are_named(tmp_path, content, message, gz):
    path = tmp_path / ("images-idx3-ubyte" + ".gz" * gz)
    path.write_bytes(gzip.compress(content) if gz else content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx_images(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip", "empty"])
def test_damaged_gzip_files_are_named(tmp_path, damage):
    folder = write(tmp_path / "MNIST" / "raw")
    path = folder / f"{STEMS[0]}.gz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
            "not gzip": b"<html>404</html>" * 10,
            "empty": b"",
        }[damage]
    )
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is"):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *[
            ("mnist", layout)
            for layout in ("", "raw", "MNIST/raw", "mnist/MNIST/raw", "mnist", "MNIST")
        ],
        *[("fashion-mnist", layout) for layout in ("", "FashionMNIST/raw", "fashion-mnist", "raw")],
    ],
)
@pytest.mark.parametrize("gz", [True, False])
def test_every_layout_is_found(alone, name, layout, gz):
    write(alone / "place" / layout, gz)
    data = load(name, data_dir=alone / "place")
    assert (data.name, data.shape, data.quantum) == (name, (1, 28, 28), 1 / 255)
    assert Path(data.source) == alone / "place" / layout
    assert np.array_equal(data.test[:][:, 0], TEST)
    assert len(data.train) == 27


def test_the_order_of_the_search(alone, monkeypatch):
    write(alone / "work" / "data" / "MNIST" / "raw")
    assert load("mnist").source == "data/MNIST/raw"
    write(alone / "env" / "MNIST" / "raw")
    monkeypatch.setenv("EQUIPOISE_DATA", str(alone / "env"))
    assert load("mnist").source == str(alone / "env/MNIST/raw")
    write(alone / "given" / "MNIST" / "raw")
    assert load("mnist", data_dir=str(alone / "given")).source == str(alone / "given/MNIST/raw")
    assert load("mnist", data_dir=alone / "nowhere").source == str(alone / "env/MNIST/raw")


def test_the_two_sets_are_not_confused(alone):
    write(alone / "FashionMNIST" / "raw")
    for data_dir in (alone, alone / "FashionMNIST", alone / "FashionMNIST" / "raw"):
        with pytest.raises(FileNotFoundError):
            load("mnist", data_dir=data_dir)
    write(alone / "MNIST" / "raw", train=TRAIN[::-1])
    assert load("mnist", data_dir=alone).source == str(alone / "MNIST/raw")


def test_a_missing_set_says_where_it_was_looked_for(alone):
    with pytest.raises(FileNotFoundError) as caught:
        load("mnist", data_dir=alone / "given")
    message = str(caught.value)
    for part in (
        str(alone / "given/MNIST/raw"),
        str(alone / "home/data/MNIST/raw"),
        *STEMS,
        "--data-dir",
    ):
        assert part in message


def test_half_a_set_is_an_error(alone):
    (write(alone / "MNIST" / "raw") / f"{STEMS[1]}.gz").unlink()
    with pytest.raises(FileNotFoundError, match="holds only one of"):
        load("mnist", data_dir=alone)


# The real sets


def real(name, **options):
    try:
        return load(name, **options)
    except FileNotFoundError:
        pytest.skip(f"the files of {name} are not on this machine; point EQUIPOISE_DATA to them")


@pytest.mark.parametrize(
    ("name", "train_mean", "test_mean"),
    [("mnist", 33.3184, 33.7912), ("fashion-mnist", 72.9404, 73.1466)],
)
def test_real_idx_sets(name, train_mean, test_mean):
    data = real(name)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [
        58_000,
        2000,
        10_000,
    ]
    assert data.train.base.mean() == pytest.approx(train_mean, abs=1e-4)
    assert data.test[:].mean() == pytest.approx(test_mean, abs=1e-4)


def test_real_celeba(tmp_path):
    if not os.environ.get("EQUIPOISE_DATA"):
        pytest.skip("decoding CelebA takes seconds; set EQUIPOISE_DATA to try it")
    data = real("celeba", cache_dir=tmp_path)
    assert (data.shape, data.kind) == ((3, 64, 64), "image")
    assert 80 < data.test[:1000].mean() < 150
    assert real("celeba", cache_dir=tmp_path).fingerprint == data.fingerprint
