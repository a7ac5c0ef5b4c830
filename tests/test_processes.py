"""Operations of several processes that need only sums."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.processes import ALONE, Processes


def together(call, size):
    """Return ``call(processes)`` for each rank, with one thread for each process."""
    barrier, shared = Barrier(size), {}

    def run(rank):
        def all_reduce(values):
            shared[rank] = values.clone()
            barrier.wait()
            values.zero_()
            for other in range(size):
                values += shared[other]

            barrier.wait()

            return values

        return call(Processes(rank, size, all_reduce))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def test_broadcast_is_of_rank_0_and_leaves_the_others_values_alone():
    own = [torch.full((2, 3), float(rank + 1)) for rank in range(3)]
    for received in together(lambda processes: processes.broadcast(own[processes.rank]), 3):
        assert received.tolist() == [[1.0] * 3] * 2
    assert [values[0, 0].item() for values in own] == [1, 2, 3]


def test_broadcast_of_expanded_values():
    value = torch.tensor([[1.0, 2.0]])
    for received in together(lambda processes: processes.broadcast(value.expand(3, -1)), 2):
        assert received.tolist() == [[1.0, 2.0]] * 3


def test_gather_is_in_the_order_of_the_ranks():
    parts = torch.arange(12.0).view(6, 2).split([1, 0, 3, 2])
    for whole in together(lambda processes: processes.gather(parts[processes.rank]), 4):
        assert whole.tolist() == torch.arange(12.0).view(6, 2).tolist()


@given(
    counts=st.lists(st.integers(0, 10**12), min_size=1, max_size=9).filter(any),
    n=st.integers(0, 10**12),
)
def test_shares_add_up_and_are_in_proportion(counts, n):
    shares = [
        Processes(rank, len(counts), ALONE.all_reduce).share(n, counts)
        for rank in range(len(counts))
    ]
    n = min(n, sum(counts))

    assert sum(shares) == n
    for share, count in zip(shares, counts, strict=True):
        assert abs(share * sum(counts) - n * count) < sum(counts)
        assert share <= count


def test_alone():
    values = torch.arange(6.0).view(3, 2)
    assert ALONE.broadcast(values).tolist() == ALONE.gather(values).tolist() == values.tolist()
    assert ALONE.counts(5, values.device) == [5]
    assert ALONE.share(2, [5]) == 2


def test_wrong_ranks():
    with pytest.raises(ValueError, match=r"rank from 0 to below size = 2, got 2"):
        Processes(2, 2, ALONE.all_reduce)
    with pytest.raises(ValueError, match=r"one process of each rank from 0 to 1, got \[2, 0\]"):
        Processes(0, 2, lambda values: 2 * values).counts(5, torch.device("cpu"))
