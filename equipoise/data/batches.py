"""Batches of raw examples on a device, in an order that is a pure function of seed and epoch."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice, repeat

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from equipoise.data.dataset import Array, ExampleSet, Subset
from equipoise.data.stream import Stream
from equipoise.randomness import stream


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
    return torch.randperm(n, generator=stream(seed, epoch))


def batches_of(
    examples: ExampleSet,
    batch_size: int,
    device: torch.device | str = "cpu",
    *,
    seed: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> "EpochBatches":
    """Batches of whatever training examples are.

    Args:
        examples: a subset or a stream.
        batch_size: examples per batch and process.
        device: where the batches go.
        seed: shuffle by this seed and the epoch; None for the order of ``examples``.
        rank: number of this process.
        world_size: number of processes.

    Returns:
        Its batches, epoch by epoch.

    Example:
        >>> import numpy as np
        >>> batches = batches_of(Subset.whole(np.arange(5.0)[:, None]), batch_size=2, seed=0)
        >>> len(batches), sum(len(batch) for batch in batches.epoch())
        (3, 5)
    """
    if isinstance(examples, Stream):
        return StreamBatches(
            examples, batch_size, device, seed=seed, rank=rank, world_size=world_size
        )
    return Batches(
        examples.at_hand, batch_size, device, seed=seed, rank=rank, world_size=world_size
    )


def examples(part: ExampleSet, n: int, device: torch.device | str = "cpu") -> Tensor:
    r"""Take a few examples: evenly spread over an array, or over the first ones of a stream.

    Args:
        part: One split of the data.
        n: Number of examples to take. All are taken if there are fewer.
        device: Device of the result.

    Returns:
        Raw data, (n, \*).
    """
    array = part.at_hand
    index = np.linspace(0, len(array) - 1, min(n, len(array))).astype(np.int64)
    return torch.from_numpy(array[index]).to(device)


class EpochBatches(ABC):
    r"""Batches of raw examples, epoch by epoch, of which each process gets its part.

    All processes get the same number of batches, none empty, and each example is visited once an epoch (unless
    ``drop_last``); so the last batch may be longer by one than ``batch_size`` for some of them.

    Args:
        n: number of examples.
        batch_size: examples per batch and process.
        device: where the batches go.
        seed: shuffle by this seed and the epoch; None for the order of the examples, as for evaluation.
        rank: number of this process.
        world_size: number of processes.
        drop_last: leave out the last batch if it is incomplete.

    Raises:
        ValueError: if there would be no batch, or an argument is out of its range.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        device: torch.device | str,
        seed: int | None,
        rank: int,
        world_size: int,
        *,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank must be in 0..{world_size - 1} for a world_size of {world_size}, not {rank}"
            )
        fewest = n // world_size  # some processes have one more
        self.count = fewest // batch_size if drop_last else -(-fewest // batch_size)
        if not self.count:
            raise ValueError(
                f"{n} examples make no batch of {batch_size} for {world_size} processes"
                + (" with drop_last" if drop_last else "")
            )
        self.n = n
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size

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
        return self.n - usual * batch if is_last else usual

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        r"""Go through the examples once.

        Args:
            epoch: which pass, for the order.
            start: number of batches to leave out, as when resuming within an epoch; a stream reads them all the same.

        Returns:
            Batches of raw examples on the device, (B, \*).

        Raises:
            ValueError: if ``start`` is not in 0..len(self).
        """
        if not 0 <= start <= self.count:
            raise ValueError(f"start must be in 0..{self.count}, not {start}")
        return self._epoch(epoch, start)

    @abstractmethod
    def _epoch(self, epoch: int, start: int) -> Iterator[Tensor]:
        """As :meth:`epoch`, whose arguments have been checked."""


class Batches(EpochBatches):
    r"""Batches of raw examples: uint8 stays uint8 until the model scales it on the device.

    Examples that fit are copied to the device once and gathered there; others are gathered from the memory
    map by a thread that is one batch ahead. Which of the two happens does not change what is yielded.

    With several processes, each gets every ``world_size``-th example of the same order; see :class:`EpochBatches`.

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
        super().__init__(
            len(examples), batch_size, device, seed, rank, world_size, drop_last=drop_last
        )
        self.examples = examples if isinstance(examples, Subset) else Subset.whole(examples)
        fits = self.examples.nbytes <= resident_bytes
        self.resident = torch.from_numpy(self.examples[:]).to(self.device) if fits else None

    def _epoch(self, epoch: int, start: int) -> Iterator[Tensor]:
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
        return _pinned(self.examples[row.numpy()], self.device)


class StreamBatches(EpochBatches):
    r"""Batches of a stream, which is read from front to back and shuffled through its buffer.

    The order depends on seed, epoch, buffer size and the order of the source, and not on the batches in which the
    source gives the examples. With a buffer for all of them it is that of :class:`Batches`. With several processes,
    each reads the whole stream, and gets every ``world_size``-th example of the same shuffled order, in as many
    batches as the others, as from :class:`Batches`.

    It is read in the thread that takes the batches: the work of a source that is slow is best done in the workers of
    a ``DataLoader``.

    Args:
        stream: raw examples.
        batch_size: examples per batch and process.
        device: where the batches go.
        seed: shuffle by this seed and the epoch; None for the order of the source.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: if there would be no batch, or an argument is out of its range.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(len(stream), batch_size, device, seed, rank, world_size)
        self.stream = stream

    def _epoch(self, epoch: int, start: int) -> Iterator[Tensor]:
        mine = len(range(self.rank, len(self.stream), self.world_size))
        last = mine - self.batch_size * (self.count - 1)
        sizes = chain(repeat(self.batch_size, self.count - 1), [last])
        batches = islice(_recut(self._mine(epoch), sizes), start, None)
        return (_pinned(batch, self.device).to(self.device, non_blocking=True) for batch in batches)

    def _mine(self, epoch: int) -> Iterator[Array]:
        """Every ``world_size``-th example of the epoch's order."""
        pieces = self.stream.batches()
        if self.seed is not None:
            pieces = _shuffled(
                pieces,
                len(self.stream),
                self.stream.buffer_size,
                stream(self.seed, epoch),
            )
        before = 0
        for piece in pieces:
            yield piece[(self.rank - before) % self.world_size :: self.world_size]
            before += len(piece)


def _shuffled(
    pieces: Iterator[Array], n: int, buffer_size: int, generator: torch.Generator
) -> Iterator[Array]:
    """Fill a buffer; then hand out and replace an eighth of it at a time, drawn at random; then what is left."""
    buffered = min(buffer_size, n)
    # An eighth: drawing costs the same for any buffer size, and an example stays as long as if drawn one by one.
    step = max(1, buffered // 8)
    full, rest = divmod(n - buffered, step)
    recut = _recut(pieces, chain([buffered], repeat(step, full), [rest] if rest else []))
    buffer = next(recut)
    for incoming in recut:
        drawn = torch.randperm(buffered, generator=generator)[: len(incoming)].numpy()
        outgoing = buffer[drawn]
        buffer[drawn] = incoming
        yield outgoing
    order = torch.randperm(buffered, generator=generator).numpy()
    for first in range(0, buffered, step):
        yield buffer[order[first : first + step]]


def _recut(pieces: Iterator[Array], sizes: Iterable[int]) -> Iterator[Array]:
    """Consecutive examples in arrays of other sizes, which together are as many; then let the pieces end, too."""
    piece = next(pieces)
    for size in sizes:
        whole, filled = np.empty((size, *piece.shape[1:]), piece.dtype), 0
        while filled < size:
            if not len(piece):
                piece = next(pieces)
            taken, piece = np.split(piece, [size - filled])
            whole[filled : filled + len(taken)] = taken
            filled += len(taken)
        yield whole
    next(pieces, None)  # a stream that has more than it should says so here


def _pinned(values: Array, device: torch.device) -> Tensor:
    batch = torch.from_numpy(values)
    return batch.pin_memory() if device.type == "cuda" else batch
