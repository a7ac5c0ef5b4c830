"""Batches: a pure function of seed and epoch, wherever the examples are stored."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.data import Batches, Subset, epoch_order

SEEDS = st.integers(0, 2**64)
EPOCHS = st.integers(0, 10_000)


def numbers(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float32)[:, None]


def seen(batches: Batches, epoch: int = 0, start: int = 0) -> list[list[float]]:
    return [batch.ravel().tolist() for batch in batches.epoch(epoch, start)]


@given(st.integers(0, 300), SEEDS, EPOCHS)
def test_epoch_order_is_a_pure_permutation(n, seed, epoch):
    state = torch.get_rng_state()
    order = epoch_order(n, seed, epoch)
    assert torch.equal(order, epoch_order(n, seed, epoch))
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(state, torch.get_rng_state())


def test_epoch_order_mixes_seed_and_epoch():
    orders = {
        tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)
    }
    assert len(orders) == 100


@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 4),
    st.one_of(st.none(), SEEDS),
    st.booleans(),
    EPOCHS,
)
def test_processes_share_each_epoch_evenly(n, batch_size, world_size, seed, drop_last, epoch):
    fewest = n // world_size
    if fewest < (batch_size if drop_last else 1):
        with pytest.raises(ValueError, match="make no batch"):
            Batches(numbers(n), batch_size, seed=seed, drop_last=drop_last, world_size=world_size)
        return
    ranks = [
        Batches(
            numbers(n), batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    visits = [seen(batches, epoch) for batches in ranks]
    assert {len(visit) for visit in visits} == {len(ranks[0])}
    for batch in range(len(ranks[0])):
        assert ranks[-1].size(batch) == sum(len(visit[batch]) for visit in visits)
    sizes = [len(batch) for visit in visits for batch in visit]
    assert 0 < min(sizes) <= max(sizes) <= batch_size + 1 + (world_size > 1)
    if min(batch_size, fewest) > 1:
        assert min(sizes) > 1
    visited = sorted(x for visit in visits for batch in visit for x in batch)
    if drop_last:
        assert set(sizes) == {batch_size}
        assert len(set(visited)) == len(visited) == len(ranks[0]) * batch_size * world_size
    else:
        assert visited == list(range(n))


def test_two_processes_see_the_batches_of_one():
    alone = seen(Batches(numbers(24), 8, seed=1), 5)
    ranks = [seen(Batches(numbers(24), 4, seed=1, rank=rank, world_size=2), 5) for rank in range(2)]
    assert [sorted(batch) for batch in alone] == [
        sorted(a + b) for a, b in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("start", [0, 2, 5])
def test_resident_and_streamed_batches_are_identical(tmp_path, seed, drop_last, start):
    pixels = np.random.default_rng(0).integers(0, 256, (53, 3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    examples = Subset(
        np.load(tmp_path / "a.npy", mmap_mode="r"), np.arange(52, -1, -1), np.dtype(np.uint8)
    )
    resident = Batches(examples, 10, seed=seed, drop_last=drop_last)
    streamed = Batches(examples, 10, seed=seed, drop_last=drop_last, resident_bytes=0)
    assert resident.resident is not None
    assert streamed.resident is None
    pairs = list(zip(resident.epoch(7, start), streamed.epoch(7, start), strict=True))
    assert len(pairs) == len(resident) - start
    for a, b in pairs:
        assert a.dtype == b.dtype == torch.uint8
        assert torch.equal(a, b)


@pytest.mark.parametrize("resident_bytes", [0, 1000])
def test_start_resumes_within_an_epoch(resident_bytes):
    batches = Batches(numbers(23), 5, seed=0, resident_bytes=resident_bytes)
    assert seen(batches, 2, 3) == seen(batches, 2)[3:]
    assert seen(batches, 2, len(batches)) == []


def test_in_order_without_a_seed():
    assert seen(Batches(numbers(5), 3)) == [[0, 1, 2], [3, 4]]
    assert seen(Batches(numbers(5), 2)) == [[0, 1], [2, 3, 4]]  # never one alone
    assert seen(Batches(numbers(1), 2)) == [[0]]
    assert seen(Batches(numbers(5), 2, drop_last=True), 9) == [[0, 1], [2, 3]]


def test_shuffled_epochs_differ():
    batches = Batches(numbers(64), 64, seed=0)
    assert seen(batches, 0) == seen(batches, 0) != seen(batches, 1)


def test_an_abandoned_stream_ends_its_thread():
    before = threading.active_count()
    stream = Batches(numbers(100), 2, resident_bytes=0).epoch()
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_error_while_gathering_reaches_the_caller():
    batches = Batches(
        Subset(numbers(5), np.array([0, 99]), np.dtype(np.float32)), 1, resident_bytes=0
    )
    with pytest.raises(IndexError):
        list(batches.epoch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": 6, "drop_last": True}, "make no batch of 6 .* with drop_last"),
        ({"batch_size": 2, "world_size": 6}, "make no batch"),
        ({"batch_size": 2, "rank": 1}, "rank must be in 0..0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Batches(numbers(5), **options)


@pytest.mark.parametrize("start", [-1, 4])
def test_start_is_checked_at_once(start):
    with pytest.raises(ValueError, match=r"start must be in 0\.\.3"):
        Batches(numbers(6), 2).epoch(0, start)
