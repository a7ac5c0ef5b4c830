"""Batches of raw examples on a device, in an order that is a pure function of seed and epoch."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor

from equipoise.data.dataset import Array, Subset


def epoch_order(n: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """Shuffle n examples: the same order for the same arguments, so that resuming needs no stored state.

    Args:
        n: number of examples.
        seed: of the run.
        epoch: number of the pass over the data.

    Returns:
        A permutation of 0, ..., n - 1, on the CPU.

    Example:
        >>> torch.equal(epoch_order(5, seed=0, epoch=3), epoch_order(5, seed=0, epoch=3))
        True
    """
    # A hash, because neighbouring seeds and epochs must not share orders, as seed + epoch would.
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little"))
    return torch.randperm(n, generator=generator)


class Batches:
    r"""Batches of raw examples: uint8 stays uint8 until the model scales it on the device.

    Examples that fit are copied to the device once and gathered there; others are gathered from the memory
    map by a thread that is one batch ahead. Which of the two happens does not change what is yielded.

    With several processes, each gets every ``world_size``-th example of the same order. All get the same
    number of batches, none empty, and each example is visited once an epoch (unless ``drop_last``); so the
    last batch may be longer by one than ``batch_size`` for some of them.

    Args:
        examples: raw examples, (N, \*).
        batch_size: examples per batch and process.
        device: where the batches go.
        seed: shuffle by this seed and the epoch; None for the order of ``examples``, as for evaluation.
        drop_last: leave out the last batch if it is incomplete.
        resident_bytes: largest size of ``examples`` that is copied to the device as a whole.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: if there would be no batch, or an argument is out of its range.

    Example:
        >>> import numpy as np
        >>> batches = Batches(np.arange(5.0)[:, None], batch_size=2)
        >>> [batch.ravel().tolist() for batch in batches.epoch()]
        [[0.0, 1.0], [2.0, 3.0], [4.0]]
    """

    def __init__(
        self,
        examples: Subset | Array,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        seed: int | None = None,
        drop_last: bool = False,
        resident_bytes: int = 2 << 30,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1} for a world_size of {world_size}, not {rank}")
        self.examples = examples if isinstance(examples, Subset) else Subset.whole(examples)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        fewest = len(self.examples) // world_size  # some processes have one more
        self.count = fewest // batch_size if drop_last else -(-fewest // batch_size)
        if not self.count:
            raise ValueError(
                f"{len(self.examples)} examples make no batch of {batch_size} for {world_size} processes"
                + (" with drop_last" if drop_last else "")
            )
        fits = self.examples.nbytes <= resident_bytes
        self.resident = torch.from_numpy(self.examples[:]).to(self.device) if fits else None

    def __len__(self) -> int:
        return self.count

    def size(self, batch: int) -> int:
        """Examples in a batch, those of all processes together.

        Args:
            batch: from 0.

        Returns:
            ``batch_size * world_size``, but for the last batch, which has what is left.
        """
        usual = self.batch_size * self.world_size
        is_last = batch == self.count - 1 and not self.drop_last
        return len(self.examples) - usual * batch if is_last else usual

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        r"""Go through the examples once.

        Args:
            epoch: which pass, for the order.
            start: number of batches to leave out, as when resuming within an epoch.

        Returns:
            Batches of raw examples on the device, (B, \*).

        Raises:
            ValueError: if ``start`` is not in 0..len(self).
        """
        if not 0 <= start <= self.count:
            raise ValueError(f"start must be in 0..{self.count}, not {start}")
        rows = self._rows(epoch)[start:]
        if self.resident is None:
            return self._stream(rows)
        return map(partial(self.resident.index_select, 0), rows)

    def _rows(self, epoch: int) -> list[Tensor]:
        n = len(self.examples)
        order = torch.arange(n) if self.seed is None else epoch_order(n, self.seed, epoch)
        mine = order[self.rank :: self.world_size]
        if self.drop_last:
            mine = mine[: self.batch_size * self.count]
        if self.resident is not None:
            mine = mine.to(self.device)
        return list(mine.tensor_split([self.batch_size * batch for batch in range(1, self.count)]))

    def _stream(self, rows: list[Tensor]) -> Iterator[Tensor]:
        ahead: Future[Tensor] | None = None
        with ThreadPoolExecutor(max_workers=1) as thread:
            for row in rows:
                ready, ahead = ahead, thread.submit(self._gather, row)
                if ready is not None:
                    yield ready.result().to(self.device, non_blocking=True)
            if ahead is not None:
                yield ahead.result().to(self.device, non_blocking=True)

    def _gather(self, row: Tensor) -> Tensor:
        batch = torch.from_numpy(self.examples[row.numpy()])
        return batch.pin_memory() if self.device.type == "cuda" else batch
