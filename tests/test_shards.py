"""Sharded sources: the order of one process, each example once, and no more read than needed."""

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise
from equipoise.data import batches_of, load_stream
from equipoise.data import shard_batches as shard_batches_module
from equipoise.data import shards as shards_module
from equipoise.data.shard_batches import ShardBatches, _ahead, segment
from equipoise.data.shard_files import NpyShard
from equipoise.data.shard_tables import ParquetShard
from equipoise.data.shards import READERS, choose_readers, find_shards, read_rows

SIZES = (70, 1, 230, 0, 64, 135)


def numbers(rows):
    """The number of each example, which stands in its first column."""
    return torch.as_tensor(rows)[:, 0].long().tolist()


def values_of(n, d=3):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(n, d)).astype(np.float32)
    table[:, 0] = np.arange(n)
    return table


def write_npy(folder, sizes=SIZES):
    folder.mkdir()
    table, first = values_of(sum(sizes)), 0
    for number, n in enumerate(sizes):
        np.save(folder / f"part-{number:03}.npy", table[first : first + n])
        first += n
    return folder


def write_parquet(folder, sizes=SIZES, group=16, *, as_lists=False):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    table, first = values_of(sum(sizes)), 0
    for number, n in enumerate(sizes):
        part = table[first : first + n]
        columns = {f"x{i}": part[:, i] for i in range(part.shape[1])}
        if as_lists:
            columns = {"name": ["a"] * n, "x": list(part)}
        pq.write_table(
            pa.table(columns), folder / f"part-{number:03}.parquet", row_group_size=group
        )
        first += n
    return folder


@pytest.fixture(params=["npy", "parquet", "lists"])
def folder(request, tmp_path):
    if request.param == "npy":
        return write_npy(tmp_path / "parts")
    return write_parquet(tmp_path / "parts", as_lists=request.param == "lists")


def whole_batches(stream, world_size, epoch=0, start=0, seed=0, batch_size=48):
    """The batches of all processes, put together as one process would have them."""
    parts = [
        ShardBatches(stream, batch_size // world_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for batches in zip(*(part.epoch(epoch, start) for part in parts), strict=True):
        whole = torch.empty(sum(map(len, batches)), *batches[0].shape[1:])
        for rank, batch in enumerate(batches):
            whole[rank::world_size] = batch
        yield whole


def test_everything_is_there_once_whatever_the_number_of_processes(folder):
    stream = load_stream(folder, test=20, validation=30, buffer_size=200).train
    one = list(whole_batches(stream, 1))
    seen = list(itertools.chain.from_iterable(map(numbers, one)))
    assert sorted(seen) == list(range(50, 500))
    assert seen != sorted(seen)
    for world_size in (2, 3, 4, 8):
        several = list(whole_batches(stream, world_size))
        assert len(several) == len(one)
        assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


def test_the_values_are_those_of_the_files(folder):
    stream = load_stream(folder, test=20, validation=30).train
    rows = torch.cat(list(whole_batches(stream, 2)))
    expected = torch.from_numpy(values_of(500))[numbers(rows)]
    assert torch.equal(rows, expected)
    assert torch.equal(
        torch.cat([*map(torch.from_numpy, stream.batches())]),
        expected.new_tensor(values_of(500)[50:]),
    )


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
    stream = load_stream(write_npy(tmp_path / "parts"), test=20, validation=30).train
    orders = [
        tuple(numbers(torch.cat(list(whole_batches(stream, 1, epoch, seed=seed)))))
        for epoch, seed in ((0, 0), (1, 0), (0, 1), (0, None), (0, 0))
    ]
    assert orders[0] == orders[4]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_epoch_goes_on(folder, world_size):
    stream = load_stream(folder, test=20, validation=30, buffer_size=150).train
    whole = list(whole_batches(stream, world_size))
    for start in range(len(whole) + 1):
        rest = list(whole_batches(stream, world_size, start=start))
        assert len(rest) == len(whole) - start
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 4)), max_size=5))
def test_any_sequence_of_processes_and_kills_has_the_batches_of_one(tmp_path_factory, attempts):
    """Each attempt has a number of processes, and is killed after some batches."""
    folder = tmp_path_factory.mktemp("parts") / "parts"
    stream = load_stream(write_npy(folder), test=20, validation=30, buffer_size=150).train
    whole, seen = list(whole_batches(stream, 1)), []
    for world_size, n_batches in [*attempts, (2, len(whole))]:
        rest = whole_batches(stream, world_size, start=len(seen))
        seen += itertools.islice(rest, n_batches)
    assert len(seen) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(whole, seen, strict=True))


@settings(max_examples=40)
@given(st.integers(0, 3000), st.integers(0, 6), st.integers(0, 6))
def test_segments_are_a_partition_and_those_of_a_process_are_neighbours(n, bits, process_bits):
    readers, processes = 2**bits, 2 ** min(bits, process_bits)
    parts = [segment(n, readers, reader) for reader in range(readers)]
    assert sorted(parts)[0][0] == 0
    assert sorted(parts)[-1][1] == n
    assert all(a[1] == b[0] for a, b in itertools.pairwise(sorted(parts)))
    assert [b - a for a, b in parts] == [
        len(range(reader, n, readers)) for reader in range(readers)
    ]
    for rank in range(processes):
        mine = sorted(parts[rank::processes])
        assert all(a[1] == b[0] for a, b in itertools.pairwise(mine))


def count_reads(monkeypatch):
    """Count the examples that are read of each file."""
    read = []

    def counted(shard, start, stop):
        read.append((shard.path.name, start, stop))
        return read_rows(shard, start, stop)

    monkeypatch.setattr(shards_module, "read_rows", counted)
    return read


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_process_reads_its_share_alone(tmp_path, monkeypatch, world_size):
    stream = load_stream(write_npy(tmp_path / "parts", (300,) * 8), test=20, validation=30).train
    read = count_reads(monkeypatch)
    for rank in range(world_size):
        read.clear()
        batches = ShardBatches(stream, 10, seed=0, rank=rank, world_size=world_size)
        n = sum(len(batch) for batch in batches.epoch())
        assert (
            sum(stop - start for _, start, stop in read)
            == n
            == len(range(rank, len(stream), world_size))
        )


def test_a_resumed_epoch_reads_what_is_left_alone(tmp_path, monkeypatch):
    parts = write_npy(tmp_path / "parts", (1000,) * 10)
    stream = load_stream(parts, test=20, validation=30, buffer_size=640).train
    read = count_reads(monkeypatch)
    batches = ShardBatches(stream, 100, seed=0)
    left = sum(len(batch) for batch in batches.epoch(0, 80))
    assert left == len(stream) - 8000
    # Besides what was read of the window in which it stopped.
    assert sum(stop - start for _, start, stop in read) <= left + 640


def test_readers_have_row_groups_enough(tmp_path):
    shard = ParquetShard(tmp_path / "a.parquet", 1000, (10,) * 100, ("x",))
    assert choose_readers([shard]) == 8
    assert choose_readers([shard] * 100) == READERS
    assert choose_readers([replace(shard, rows_of_groups=(1000,))]) == 1
    npy = NpyShard(tmp_path / "a.npy", 1000, 128, np.dtype(np.float32), (3,))
    assert choose_readers([npy]) == READERS


def test_few_row_groups_are_told(tmp_path):
    data = load_stream(write_parquet(tmp_path / "parts", group=50), test=20, validation=30)
    assert any("row groups, up to 1 processes" in note for note in data.notes)


def test_what_a_stream_of_files_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="found none of them"):
        load_stream(tmp_path)
    (tmp_path / "_SUCCESS").touch()
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    with pytest.raises(ValueError, match="column is for"):
        find_shards(tmp_path, "x")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"found .npy, .parquet"):
        find_shards(tmp_path, None)
    np.save(tmp_path / "f.npy", np.asfortranarray(np.ones((4, 3))))
    with pytest.raises(ValueError, match="ascontiguousarray"):
        find_shards([tmp_path / "f.npy"], None)
    np.save(tmp_path / "empty.npy", np.zeros((0, 3)))
    with pytest.raises(ValueError, match="no examples"):
        find_shards([tmp_path / "empty.npy"], None)


def test_columns_of_names_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"name": ["a", "b"], "x": [1.0, 2.0]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the columns name are no numbers"):
        find_shards(tmp_path, None)
    with pytest.raises(ValueError, match="no column 'y'"):
        find_shards(tmp_path, "y")
    ragged = pa.table({"x": [[1.0, 2.0], [3.0]]})
    pq.write_table(ragged, tmp_path / "a.parquet")
    (shard,) = find_shards(tmp_path, None)
    with pytest.raises(ValueError, match="different lengths"):
        list(read_rows(shard, 0, 2))


def test_files_that_change_are_noticed(tmp_path):
    parts = write_npy(tmp_path / "parts")
    stream = load_stream(parts, test=20, validation=30).train
    file = parts / "part-002.npy"
    values = np.load(file)
    np.save(file, values[:-1])
    with pytest.raises(ValueError, match=r"part-002.npy has changed"):
        list(whole_batches(stream, 1))
    values[100] = np.inf
    np.save(file, values)
    with pytest.raises(ValueError, match=r"part-002.npy: values that are infinite"):
        list(whole_batches(stream, 1))


def test_rows_with_gaps_are_a_stream(tmp_path):
    rows = values_of(100)
    rows[::7, 1] = np.nan
    np.save(tmp_path / "a.npy", rows)
    data = load_stream(tmp_path, test=10, validation=10)
    assert data.has_gaps
    assert np.array_equal(np.concatenate(list(data.train.batches())), rows[20:], equal_nan=True)


def test_the_order_of_the_files_belongs_to_the_data(tmp_path):
    parts = write_npy(tmp_path / "parts")
    first = load_stream(parts, test=20, validation=30)
    files = sorted(parts.glob("*.npy"))
    assert load_stream(files, test=20, validation=30).fingerprint == first.fingerprint
    (parts / "part-004.npy").rename(parts / "part-009.npy")
    assert load_stream(parts, test=20, validation=30).fingerprint != first.fingerprint


def test_reading_ahead_is_bounded_and_ends():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    before = threading.active_count()
    ahead = _ahead(items())
    assert next(ahead) == 0
    for _ in range(100):
        if len(taken) == shard_batches_module.AHEAD + 2:
            break
        threading.Event().wait(0.02)
    threading.Event().wait(0.05)
    assert len(taken) == shard_batches_module.AHEAD + 2
    ahead.close()
    assert threading.active_count() == before
    assert list(_ahead(iter(range(20)))) == list(range(20))

    def fails():
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(_ahead(fails()))


def test_training_on_parts_is_training_on_a_stream(tmp_path):
    config = equipoise.TrainConfig(
        latent_dim=1,
        width=2,
        stage_1_epochs=2,
        stage_2_epochs=1,
        batch_size=50,
        n_components=2,
        accelerator="cpu",
        tolerance=0.0,
    )
    parts = write_npy(tmp_path / "parts")
    for file in parts.iterdir():
        values = np.load(file)
        values[:, 0] /= 100
        np.save(file, values)
    data = load_stream(parts, test=50, validation=50)
    run = equipoise.train(data, config, tmp_path / "run")
    again = equipoise.Run(tmp_path / "run").data()
    assert again.fingerprint == data.fingerprint
    assert len(again.train) == 400
    assert len(run.history()) == 3
    assert isinstance(batches_of(again.train, 10), ShardBatches)
    assert replace(again, notes=()).shape == (3,)
