"""Shards in tar files and in Arrow: the same examples as from .npy, and bad members by name."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from equipoise.data import load, load_stream, shard_tars
from equipoise.data.shards import find_shards, read_rows
from tests.test_shards import SIZES, numbers, values_of, whole_batches, write_npy


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def npy(values):
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def png(values, kind="png"):
    content = io.BytesIO()
    Image.fromarray(values).save(content, kind)
    return content.getvalue()


def images_of(n):
    return np.random.default_rng(0).integers(0, 256, (n, 9, 11), dtype=np.uint8)


def write_tars(folder, contents, ending, n_each=40):
    """Tar files as WebDataset writes them, with other members between the examples."""
    folder.mkdir()
    for first in range(0, len(contents), n_each):
        with tarfile.open(folder / f"part-{first:05}.tar", "w") as tar:
            for number in range(first, min(first + n_each, len(contents))):
                add(tar, f"{number:05}.{ending}", contents[number])
                add(tar, f"{number:05}.json", b'{"label": 3}')
                add(tar, f"{number:05}.pyd", pickle.dumps(print))
    return folder


def write_index(file):
    with tarfile.open(file) as tar:
        members = [(m.name, m.offset_data, m.size) for m in tar]
    lines = {}
    for name, offset, size in members:
        key, _, ending = name.partition(".")
        lines.setdefault(key, []).append(f"{ending} {offset} {size} {name}")
    text = "\n".join([f"v1.2 {len(lines)}", *(" ".join(line) for line in lines.values())])
    file.with_suffix(".idx").write_text(text + "\n")


def test_arrays_in_tar_files_are_those_of_npy_files(tmp_path):
    folder = write_tars(tmp_path / "tars", [npy(row) for row in values_of(sum(SIZES))], "npy")
    tars = load_stream(folder, test=20, validation=30)
    arrays = load_stream(write_npy(tmp_path / "parts"), test=20, validation=30)
    assert any(".npy members; 13 have no index" in note for note in tars.notes)
    assert (tars.offset == arrays.offset).all()
    for world_size in (1, 4):
        rows = np.concatenate(list(whole_batches(tars.train, world_size)))
        assert (rows == values_of(500)[numbers(rows)]).all()
        assert sorted(numbers(rows)) == list(range(50, 500))


def test_images_in_tar_files_are_those_of_a_folder(tmp_path):
    images = images_of(130)
    folder = write_tars(tmp_path / "tars", [png(image) for image in images], "png")
    data = load_stream(folder, test=15, validation=15, channels="grey")
    assert data.kind == "image"
    assert data.shape == (1, 9, 11)
    assert data.train.dtype == np.uint8
    rows = np.concatenate(list(data.train.batches()))
    assert (rows[:, 0] == images[30:]).all()
    resized = load_stream(folder, test=15, validation=15, image_size=8)
    assert resized.shape == (1, 8, 8)


def test_an_index_spares_the_pass_over_the_headers(tmp_path, monkeypatch):
    folder = write_tars(tmp_path / "tars", [npy(row) for row in values_of(100)], "npy")
    expected = find_shards(folder, None)
    for file in folder.glob("*.tar"):
        write_index(file)
    monkeypatch.setattr(shard_tars, "_read_headers", None)
    shards = find_shards(folder, None)
    assert [shard.members for shard in shards] == [shard.members for shard in expected]
    assert all(shard.has_index for shard in shards)
    index = next(folder.glob("*.idx"))
    index.write_text(index.read_text().replace("npy 512 ", "npy 99999999 "))
    with pytest.raises(ValueError, match=r"its index part-.*\.idx is of another file"):
        find_shards(folder, None)
    index.write_text("v1.1 3\nnpy 512 3\n")
    with pytest.raises(ValueError, match=r"its index .* cannot be read"):
        find_shards(folder, None)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"no array", "no .npy file"),
        (npy(np.zeros(3))[:-4], "announces 24 bytes, where 20"),
        (npy(np.array([print], dtype=object)), "Python objects, which are never loaded"),
    ],
)
def test_a_bad_member_is_named(tmp_path, bad, reason):
    contents = [npy(row) for row in values_of(100)]
    contents[57] = bad
    (*_, shard) = find_shards(write_tars(tmp_path / "tars", contents, "npy", 100), None)
    with pytest.raises(
        ValueError, match=rf"part-00000\.tar: 00057\.npy cannot be read: .*{reason}"
    ):
        list(read_rows(shard, 0, 100))


def test_a_bad_image_is_named(tmp_path):
    contents = [png(image) for image in images_of(60)]
    contents[45] = contents[45][:60]
    folder = write_tars(tmp_path / "tars", contents, "png", 60)
    with pytest.raises(ValueError, match=r"part-00000\.tar: 00045\.png cannot be read"):
        load_stream(folder, test=5, validation=5)


def test_which_members_are_the_examples(tmp_path):
    (tmp_path / "two").mkdir()
    with tarfile.open(tmp_path / "two" / "a.tar", "w") as tar:
        for number, row in enumerate(values_of(30)):
            add(tar, f"x/{number}.in.npy", npy(row))
            add(tar, f"x/{number}.out.npy", npy(row * 0))
    with pytest.raises(ValueError, match=r"members of several kinds, in\.npy, out\.npy"):
        find_shards(tmp_path / "two", None)
    (shard,) = find_shards(tmp_path / "two", "in.npy")
    assert (np.concatenate(list(read_rows(shard, 3, 20))) == values_of(30)[3:20]).all()
    with pytest.raises(ValueError, match=r"ending \.jpg"):
        find_shards(tmp_path / "two", "jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.pkl", pickle.dumps(print))
    with pytest.raises(ValueError, match=r"no images or \.npy arrays .* \.pkl \(1\)"):
        find_shards([tmp_path / "a.tar"], None)
    (tmp_path / "a.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(ValueError, match="no tar file without compression"):
        find_shards([tmp_path / "a.tar"], None)


def test_arrow_files_are_those_of_npy_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    feather = pytest.importorskip("pyarrow.feather")
    (tmp_path / "arrow").mkdir()
    table, first = values_of(500), 0
    for number, n in enumerate(SIZES):
        part = table[first : first + n]
        columns = pa.table({f"x{i}": part[:, i] for i in range(3)})
        file = tmp_path / "arrow" / f"part-{number:03}.feather"
        feather.write_feather(columns, file, chunksize=16, compression="lz4")
        first += n
    here, there = (
        load_stream(folder, test=20, validation=30)
        for folder in (write_npy(tmp_path / "parts"), tmp_path / "arrow")
    )
    assert (here.offset == there.offset).all()
    rows = np.concatenate(list(whole_batches(there.train, 2)))
    assert (rows == table[numbers(rows)]).all()
    assert len(rows) == 450

    with pa.ipc.new_stream(tmp_path / "stream.arrow", columns.schema) as stream:
        stream.write_table(columns)
    with pytest.raises(ValueError, match="Arrow streams"):
        find_shards([tmp_path / "stream.arrow"], None)


def test_one_large_table_is_a_stream_of_its_row_groups(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = values_of(400)
    columns = pa.table({f"x{i}": table[:, i] for i in range(3)})
    parquet.write_table(columns, tmp_path / "a.parquet", row_group_size=10)
    data = load_stream(tmp_path / "a.parquet", test=20, validation=30)
    assert data.name == "a.parquet"
    assert data.train.readers == 4
    whole = load(tmp_path / "a.parquet")
    assert whole.shape == data.shape
    gaps = columns.set_column(1, "x1", pa.array([None, *table[1:, 1].tolist()], pa.float32()))
    parquet.write_table(gaps, tmp_path / "a.parquet", row_group_size=10)
    (shard,) = find_shards(tmp_path / "a.parquet", None)
    assert np.isnan(next(read_rows(shard, 0, 1))).tolist() == [[False, True, False]]
