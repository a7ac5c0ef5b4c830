"""Folders as people have them: parts of their own, classes, links, and names of what comes back."""

import csv

import numpy as np
import pytest
from PIL import Image

from equipoise.cli import main
from equipoise.data import load, load_examples
from equipoise.data.folders import sort_folders

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def fill(folder, n, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + n):
        pixels = RANDOM.integers(0, 256, (9, 10), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def parts_of(data):
    return [
        {name.rpartition("/")[0] for name in part.names()}
        for part in (data.train, data.validation, data.test)
    ]


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [("train", "val", "test"), ("Training", "valid", "Testing"), ("in/train", "in/val", "in/test")],
)
def test_parts_are_used_as_such(tmp_path, train, validation, test):
    for name, n in ((train, 15), (validation, 4), (test, 6)):
        fill(tmp_path / "set" / name, n)
    data = load(tmp_path / "set")
    assert parts_of(data) == [{train}, {validation}, {test}]
    assert [len(part) for part in (data.train, data.validation, data.test)] == [15, 4, 6]
    assert data.notes[0] == (
        "the folder's own parts are used: 15 train, 4 validation, 6 test (--no-split pools them)"
    )

    pooled = load(tmp_path / "set", pool=True)
    assert len(pooled.train) + len(pooled.validation) + len(pooled.test) == 25
    assert any(len(part) > 1 for part in parts_of(pooled))
    assert "pooled" in pooled.notes[0]
    assert load(**data.loading).fingerprint == data.fingerprint
    assert [len(part) for part in (load(**pooled.loading).train, pooled.train)] == [21, 21]


def test_a_missing_part_is_taken_from_the_training(tmp_path):
    fill(tmp_path / "set" / "train" / "cat", 20)
    fill(tmp_path / "set" / "train" / "dog", 20)
    fill(tmp_path / "set" / "test" / "cat", 5)
    fill(tmp_path / "set" / "test" / "dog", 5)
    data = load(tmp_path / "set")
    train, validation, test = parts_of(data)
    assert train == {"train/cat", "train/dog"} >= validation
    assert test == {"test/cat", "test/dog"}
    assert (len(data.train), len(data.validation)) == (36, 4)
    note = "folders as of 2 classes (cat, dog): their names are not used"
    assert any(text.startswith(note) for text in data.notes)


def test_what_lies_outside_of_the_parts_is_said(tmp_path):
    fill(tmp_path / "set" / "train", 15)
    fill(tmp_path / "set" / "test", 5)
    fill(tmp_path / "set" / "unlabelled", 7)
    data = load(tmp_path / "set")
    assert "images outside the folders of the parts left out: 7" in data.notes
    assert parts_of(data)[2] == {"test"}


@pytest.mark.parametrize(
    ("names", "n_parts", "classes"),
    [
        (["a.png", "b.png"], 0, []),
        (["train/a.png", "train/b.png"], 0, []),
        (["test/a.png", "val/b.png"], 0, ["test", "val"]),
        (["train/a.png", "test/b.png", "c.png"], 3, []),
        (["cat/a.png", "dog/b.png", "c.png"], 0, []),
        (["data/cat/a.png", "data/dog/b.png"], 0, ["cat", "dog"]),
        ([], 0, []),
    ],
)
def test_the_meaning_of_folders(names, n_parts, classes):
    folders = sort_folders(names)
    assert len(folders.parts) == n_parts
    assert folders.classes == classes


def test_links_to_folders_are_followed_once(tmp_path):
    fill(tmp_path / "set" / "a", 10)
    fill(tmp_path / "elsewhere", 5, start=50)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "twin").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    data = load(tmp_path / "set")
    assert len(data.train) + len(data.validation) + len(data.test) == 15
    assert "links to folders followed: 1 (more)" in data.notes
    assert (
        "links to folders that are read anyway, not followed: 4 (loop, more/back, more/self, ...)"
        in data.notes
    )


def test_a_model_sees_the_test_part_of_a_folder_and_knows_its_files(tmp_path):
    fill(tmp_path / "set" / "train", 15)
    fill(tmp_path / "set" / "val", 3)
    (fill(tmp_path / "set" / "test", 4) / "99.png").write_bytes(b"no image")
    notes = []
    test = load_examples(tmp_path / "set", (1, 9, 10), on_note=notes.append)
    assert test.names() == [f"test/{i:02d}.png" for i in range(4)]
    assert "unreadable files skipped: 1 (test/99.png: not an image)" in notes
    with pytest.warns(UserWarning, match="unreadable") as warned:
        everything = load_examples(tmp_path / "set", (1, 9, 10), pool=True)
    assert len(everything) == 22
    assert len(warned) == 1

    one = load_examples(tmp_path / "set" / "val" / "01.png", (1, 9, 10))
    assert one.names() == ["01.png"]
    assert load_examples(np.zeros((3, 9, 10)), (1, 9, 10)).names() == ["0", "1", "2"]


def test_outputs_name_what_they_are_of(tmp_path, capsys):
    """From a folder with a file that is no image, by the command line."""
    folder = fill(tmp_path / "photos", 30)
    (folder / "07.png").write_bytes(b"no image")
    quick = ["--set", "stage_1_epochs=1", "stage_2_epochs=1", "width=2", "latent_dim=2"]
    main(["train", str(folder), "--quiet", "--out", "run", *quick])
    told = capsys.readouterr().out
    assert "Note: batch_size=auto takes 16 examples per step, 2 steps per epoch of 23" in told

    main(["reconstruct", "run", str(folder)])
    told = capsys.readouterr().out
    assert "Note: unreadable files skipped: 1 (07.png: not an image)" in told
    assert "reconstructions.csv" in told

    expected = [f"{i:02d}.png" for i in range(30) if i != 7]
    with np.load("run/reconstructions/reconstructions.npz") as arrays:
        assert arrays["name"].tolist() == expected
        error, std = arrays["error"], arrays["std"]
        pixels = np.asarray(Image.open(folder / "08.png"))
        assert np.array_equal(arrays["data"][7, 0], pixels)
    with open("run/reconstructions/reconstructions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == expected
    assert float(rows[3]["rms_error"]) == pytest.approx(np.sqrt((error[3] ** 2).mean()), rel=1e-4)
    assert float(rows[3]["rms_std"]) == pytest.approx(np.sqrt((std[3] ** 2).mean()), rel=1e-4)

    main(["reconstruct", "run", str(folder / "08.png"), "--out", "one"])
    with np.load("one/reconstructions.npz") as arrays:
        assert arrays["name"].tolist() == ["08.png"]

    (fill(tmp_path / "new", 20) / "07.png").write_bytes(b"no image")
    main(["evaluate", "run", "--data", "new", "--sections", "likelihood", "--quiet"])
    assert "unreadable files skipped: 1 (07.png" in capsys.readouterr().out


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_images_that_a_model_has_in_another_size_are_noted(tmp_path, fit):
    for i, size in enumerate([(9, 10), (9, 10), (18, 14)]):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.new("L", size, 10 * i).save(tmp_path / "set" / f"{i}.png")

    notes = []
    load_examples(tmp_path / "set", (1, 10, 9), fit=fit, on_note=notes.append)
    assert f"images of other sizes than the model's 9x10, resized with fit={fit}: 1" in notes
    notes.clear()
    (tmp_path / "set" / "2.png").unlink()
    load_examples(tmp_path / "set", (1, 10, 9), fit=fit, on_note=notes.append)
    assert not notes
