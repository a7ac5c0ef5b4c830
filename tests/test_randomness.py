"""Random streams: the same on every machine, and none like another's."""

import itertools

import torch

from equipoise.randomness import stream, stream_seed

PARTS = ("weights", "training", "figures", "optimal variance", "recalibration", "mixture", "flow")


def test_a_stream_is_the_same_everywhere_and_always():
    """Pinned: a resume on another machine, or years later, must draw the same numbers."""
    assert stream_seed(0, "training") == 8816284835617419806
    assert stream_seed(7, "order", 3) == 4193694268743636176


def test_no_two_streams_of_neighbouring_seeds_are_one():
    seeds = {
        stream_seed(seed, *parts)
        for seed in range(50)
        for parts in itertools.chain(
            ((part,) for part in PARTS),
            ((epoch,) for epoch in range(50)),
            (("process", rank) for rank in range(8)),
            (("mixture", rank) for rank in range(1, 8)),
        )
    }
    assert len(seeds) == 50 * (len(PARTS) + 50 + 8 + 7)


def test_draws_of_two_streams_are_not_correlated():
    draws = torch.stack(
        [torch.randn(20_000, generator=stream(seed, part)) for seed in (0, 1) for part in PARTS]
    )
    off_diagonal = torch.corrcoef(draws) - torch.eye(len(draws))
    assert off_diagonal.abs().max() < 5 / 20_000**0.5
