"""Packed examples: each once, the unit of all of them, and a packing that goes on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import equipoise
from equipoise.cli import main
from equipoise.data import load, load_stream
from equipoise.data.packed import INDEX, UNFINISHED
from equipoise.data.packing import Order, pack
from equipoise.files import StoreError
from tests.test_places import place  # noqa: F401 (a fixture)
from tests.test_shard_formats import images_of, npy, write_tars
from tests.test_shards import numbers, values_of, whole_batches, write_npy, write_parquet


def write_images(folder, n=130, start=0):
    folder.mkdir(parents=True)
    for number, image in enumerate(images_of(n)):
        image[0, 0] = (start + number) % 256
        Image.fromarray(image).save(folder / f"{number:04}.png")
    return folder


def content(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.npy")}


def everything(data):
    stream = np.concatenate(list(data.train.batches()))
    return np.concatenate([data.test[:], data.validation[:], stream])


@settings(max_examples=30)
@given(st.integers(30, 30_000), st.booleans(), st.integers(1, 5000))
def test_the_order_has_every_example_once(n, has_parts, size):
    parts = None
    if has_parts:
        of = np.random.default_rng(n).integers(0, 3, n)
        names = ("test", "validation", "train")
        parts = {name: np.flatnonzero(of == i) for i, name in enumerate(names)}
    order = Order(n, parts)
    found = [
        stretch
        for part, count in order.count.items()
        for first in range(0, count, size)
        for stretch in order.numbers(part, first, min(count, first + size))
    ]
    assert all((np.diff(stretch) > 0).all() for stretch in found)
    together = np.sort(np.concatenate(found))
    assert len(together) == n - sum(order.left_out.values()) == sum(order.count.values())
    assert len(np.unique(together)) == len(together)
    if parts:
        training = np.concatenate(order.numbers("train", 0, order.count["train"]))
        assert set(training) <= set(parts["train"])


@pytest.mark.parametrize("kind", ["npy", "parquet", "tar"])
def test_a_packed_table_has_each_row_once_and_the_unit_of_all(tmp_path, kind):
    rows = values_of(500)
    if kind == "npy":
        source = write_npy(tmp_path / "parts")
    elif kind == "parquet":
        source = write_parquet(tmp_path / "parts")
    else:
        source = write_tars(tmp_path / "parts", [npy(row) for row in rows], "npy")
    pack(source, tmp_path / "packed", shard_bytes=1000)
    data = load_stream(tmp_path / "packed")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [400, 50, 50]
    seen = everything(data)
    assert sorted(numbers(seen)) == list(range(500))
    assert (seen == rows[numbers(seen)]).all()
    assert data.name == "parts"
    assert data.columns == (("x0", "x1", "x2") if kind == "parquet" else ())

    training = rows[numbers(np.concatenate(list(data.train.batches())))].astype(np.float64)
    np.testing.assert_allclose(data.offset, training.mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.scale, training.std(0), rtol=1e-6)
    one, four = (list(whole_batches(data.train, n)) for n in (1, 4))
    assert all((a == b).all() for a, b in zip(one, four, strict=True))
    assert load_stream(tmp_path / "packed").fingerprint == data.fingerprint


def test_packed_images_are_decoded_once(tmp_path):
    source = write_images(tmp_path / "photos")
    (source / "bad.png").write_bytes(b"no image")
    said = []
    pack(source, tmp_path / "packed", shard_bytes=2000, say=said.append)
    assert any(
        text.startswith("Packing 131 examples of 1 x 9 x 11 uint8 into 13 kB") for text in said
    )
    data = load_stream(tmp_path / "packed")
    assert any("unreadable files skipped: 1 (bad.png" in note for note in data.notes)
    assert data.kind == "image"
    assert data.quantum == pytest.approx(1 / 255)
    assert data.train.dtype == np.uint8
    whole = load(source)
    assert (float(data.offset), float(data.scale)) == (float(whole.offset), float(whole.scale))
    expected = np.concatenate([whole.train[:], whole.validation[:], whole.test[:]])
    assert sorted(map(bytes, everything(data))) == sorted(map(bytes, expected))


def test_the_own_parts_of_a_folder_stay_parts(tmp_path):
    for part, n in (("train", 60), ("test", 12), ("val", 11)):
        write_images(tmp_path / "photos" / part, n, start=n)
    pack(tmp_path / "photos", tmp_path / "packed", image_size=8)
    data = load_stream(tmp_path / "packed")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [60, 11, 12]
    assert data.shape == (1, 8, 8)


def test_other_data_keep_their_split_and_unit(tmp_path, digits):
    pack("digits", tmp_path / "packed")
    data = load_stream(tmp_path / "packed")
    assert (data.test[:] == digits.test[:]).all()
    assert (data.validation[:] == digits.validation[:]).all()
    assert np.concatenate(list(data.train.batches())).shape == digits.train.shape
    assert float(data.scale) == float(digits.scale) == 16
    assert data.quantum == digits.quantum


def write_csv(path, n=300):
    rows = values_of(n)
    lines = ["x;name;flag;y"]
    for number, row in enumerate(rows):
        y = "" if number % 10 == 3 else f"{row[1]:.4f}".replace(".", ",")
        lines.append(f"{number};row {number};{'true' if number % 2 else 'false'};{y}")
    path.write_text("\n".join(lines) + "\n")
    return rows


def test_a_table_of_text_goes_through_parquet_and_keeps_names_and_gaps(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    rows = write_csv(tmp_path / "table.csv")
    with pytest.raises(ValueError, match="the columns name are no numbers"):
        pack(tmp_path / "table.csv", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    pack(tmp_path / "table.csv", tmp_path / "packed", drop=["name"])
    assert list((tmp_path / "cache").iterdir()) == []
    data = load_stream(tmp_path / "packed")
    assert data.columns == ("x", "flag", "y")
    assert data.has_gaps
    seen = everything(data)
    order = numbers(seen)
    assert sorted(order) == list(range(300))
    assert (seen[:, 1] == np.array(order) % 2).all()
    is_gap = np.array(order) % 10 == 3
    assert (np.isnan(seen[:, 2]) == is_gap).all()
    np.testing.assert_allclose(seen[~is_gap, 2], rows[order, 1][~is_gap], atol=1e-4)


def stopped_after(n):
    """A progress that stops the process after so many examples."""

    def progress(done, total):
        if done >= n:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("n", [0, 60, 230, 499])
def test_a_packing_that_was_stopped_keeps_its_whole_files(tmp_path, n):
    source = write_npy(tmp_path / "parts")
    pack(source, tmp_path / "whole", shard_bytes=600)
    out = tmp_path / "packed"
    with pytest.raises(KeyboardInterrupt):
        pack(source, out, shard_bytes=600, progress=stopped_after(n))
    assert (out / UNFINISHED).is_file()
    with pytest.raises(StoreError, match="was not packed to the end"):
        load_stream(out)
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*.npy")}
    said = []
    pack(source, out, shard_bytes=600, say=said.append)
    assert all(file.stat().st_mtime_ns == changed for file, changed in kept.items())
    assert not kept or any(f"{len(kept)} files are there already" in text for text in said)
    assert content(out) == content(tmp_path / "whole")
    assert (out / INDEX).read_bytes() == (tmp_path / "whole" / INDEX).read_bytes()
    assert not (out / UNFINISHED).exists()
    pack(source, out, shard_bytes=600, say=said.append)
    assert said[-1].startswith(f"{out} is packed already, and its ")


def test_a_damaged_file_is_noticed_when_it_is_loaded_and_when_it_is_packed_again(tmp_path):
    source, out = write_npy(tmp_path / "parts"), tmp_path / "packed"
    pack(source, out, shard_bytes=600)
    file = sorted(out.glob("train-*.npy"))[2]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    for again in (load_stream, lambda folder: pack(source, folder, shard_bytes=600)):
        with pytest.raises(StoreError, match=rf"1 packed files are damaged .*{file.name}"):
            again(out)


def test_packed_examples_are_trained_on_without_being_called_a_stream(tmp_path, capsys):
    source, out = write_npy(tmp_path / "parts"), tmp_path / "packed"
    pack(source, out)
    main(["train", str(out), "--dry-run"])
    assert "packed examples, which are read as a stream" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"load_stream"):
        load(out)
    with pytest.raises(ValueError, match=r"load_stream"):
        load("memory://nowhere/x.npy")
    assert load((tmp_path / "parts").as_uri() + "/part-000.npy").shape == load_stream(out).shape


def test_a_packing_that_was_killed_goes_on_by_the_same_line(tmp_path):
    source = write_images(tmp_path / "photos", 600)
    line = [sys.executable, "-m", "equipoise", "pack", source, "--quiet"]
    line = [*line[:5], tmp_path / "packed", *line[5:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = (
        "import sys; from equipoise.data import packing; packing.SHARD_BYTES = 2000;"
        "packing.pack.__kwdefaults__['shard_bytes'] = 2000;"
        "from equipoise.cli import main; main(sys.argv[1:])"
    )
    line = [sys.executable, "-c", script, *map(str, line[3:])]
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL) as process:
        while len(list((tmp_path / "packed").glob("*.npy"))) < 3:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "files are there already" in done.stdout
    assert f"equipoise train {tmp_path / 'packed'} --stream" in done.stdout
    pack(source, tmp_path / "whole", shard_bytes=2000)
    assert content(tmp_path / "packed") == content(tmp_path / "whole")


def test_what_is_there_is_not_replaced(tmp_path):
    source = write_npy(tmp_path / "parts")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("of the user")
    with pytest.raises(StoreError, match="is not empty, and holds no packed examples"):
        pack(source, tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    pack(source, tmp_path / "packed")
    with pytest.raises(StoreError, match="other packed examples"):
        pack(source, tmp_path / "packed", shard_bytes=700)
    with pytest.raises(ValueError, match="leave out"):
        load_stream(tmp_path / "packed", test=5)
    np.save(source / "part-000.npy", values_of(71))
    with pytest.raises(StoreError, match="other packed examples"):
        pack(source, tmp_path / "packed")


@pytest.mark.parametrize("name", ["../other.npy", "/other.npy"])
def test_an_index_that_names_files_outside_the_folder_is_refused(tmp_path, name):
    pack(write_npy(tmp_path / "parts"), tmp_path / "packed")
    index = json.loads((tmp_path / "packed" / INDEX).read_text())
    index["shards"][0]["name"] = name
    (tmp_path / "packed" / INDEX).write_text(json.dumps(index))
    with pytest.raises(StoreError, match=r"index\.json"):
        load_stream(tmp_path / "packed")


def test_examples_are_packed_at_a_place(place, tmp_path):  # noqa: F811 (the fixture)
    source = write_npy(tmp_path / "parts")
    pack(source, tmp_path / "here")
    with pytest.raises(KeyboardInterrupt):
        pack(source, str(place), shard_bytes=600, progress=stopped_after(100))
    with pytest.raises(StoreError, match="begun with other examples or other options"):
        pack(source, str(place))
    pack(source, str(place), shard_bytes=600)
    here, there = load_stream(tmp_path / "here"), load_stream(str(place))
    assert (everything(here) == everything(there)).all()
    names = {file.name for file in place.iterdir()}
    assert INDEX in names
    assert UNFINISHED not in names
    pack(str(place), tmp_path / "again")
    assert len(load_stream(tmp_path / "again").train) == 400


def test_training_on_packed_examples(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(400, 2)) @ rng.normal(size=(2, 4)) + 0.1 * rng.normal(size=(400, 4))
    np.save(tmp_path / "table.npy", table)
    pack(tmp_path / "table.npy", tmp_path / "packed", shard_bytes=900)
    data = load_stream(tmp_path / "packed")
    config = equipoise.TrainConfig(
        latent_dim=1,
        width=2,
        stage_1_epochs=2,
        stage_2_epochs=0,
        batch_size=50,
        n_components=2,
        accelerator="cpu",
    )
    run = equipoise.train(data, config, tmp_path / "run")
    assert run.data().fingerprint == data.fingerprint
    index = json.loads((tmp_path / "packed" / INDEX).read_text())
    index["offset"][0] = "a"
    (tmp_path / "packed" / INDEX).write_text(json.dumps(index))
    with pytest.raises(StoreError, match="was altered after it was written"):
        run.data()
