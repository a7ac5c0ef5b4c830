"""Batches of raw examples on a device, in an order that depends only on seed and epoch."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice, repeat

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from equipoise.data.dataset import Array, ExampleSet, Subset
from equipoise.data.shards import ShardedStream
from equipoise.data.stream import Stream
from equipoise.labels import labelled
from equipoise.randomness import stream


def epoch_order(n: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """Draw the order of n examples in an epoch.

    The same arguments give the same order, so that a run can be resumed without stored state.

    Args:
        n: Number of examples.
        seed: Seed of the run.
        epoch: Number of the pass over the data.

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
    """Make the batches of a subset or of a stream.

    Args:
        examples: A subset or a stream.
        batch_size: Number of examples per batch and process.
        device: Device of the batches.
        seed: Seed that, with the epoch, determines the order. None keeps the order of ``examples``.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Returns:
        The batches, epoch by epoch.

    Example:
        >>> import numpy as np
        >>> batches = batches_of(Subset.whole(np.arange(5.0)[:, None]), batch_size=3, seed=0)
        >>> len(batches), sum(len(batch) for batch in batches.epoch())
        (2, 5)
    """
    if isinstance(examples, ShardedStream):
        from equipoise.data.shard_batches import ShardBatches  # which is made of this module

        return ShardBatches(
            examples, batch_size, device, seed=seed, rank=rank, world_size=world_size
        )
    if isinstance(examples, Stream):
        return StreamBatches(
            examples, batch_size, device, seed=seed, rank=rank, world_size=world_size
        )

    return Batches(
        examples.at_hand, batch_size, device, seed=seed, rank=rank, world_size=world_size
    )


def examples(part: ExampleSet, n: int, device: torch.device | str = "cpu") -> Tensor:
    r"""Take a few examples, evenly spread over an array or over the first examples of a stream.

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


def as_tensor(part: Subset, rows: slice = slice(None)) -> Tensor:
    r"""Read examples, with the labels that they carry.

    Args:
        part: The examples.
        rows: Those to read, by their position.

    Returns:
        Raw data, (n, \*), on the CPU.
    """
    labels = None if part.labels is None else torch.from_numpy(part.label_numbers()[rows])
    return labelled(torch.from_numpy(part[rows]), labels)


class EpochBatches(ABC):
    r"""Batches of raw examples, epoch by epoch. Each process gets its part of every batch.

    All processes get the same number of batches, and no batch is empty. No batch has a single
    example either where there are others, because some losses and layers, such as batch
    normalisation, need two: the last batch takes it. Each example is visited once an epoch, unless
    ``drop_last`` is set. Therefore the last batch of a process may have one example more than
    ``batch_size``, or two where there are several processes.

    Args:
        n: Number of examples.
        batch_size: Number of examples per batch and process.
        device: Device of the batches.
        seed: Seed that, with the epoch, determines the order. None keeps the order of the examples,
            as in evaluation.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        drop_last: Whether the last batch is left out if it is incomplete.

    Raises:
        ValueError: If there would be no batch, or if an argument is out of its range.
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

        # Some processes have one example more than this.
        fewest = n // world_size
        count = fewest // batch_size
        left = fewest % batch_size
        if left and not drop_last and (left > 1 or not count):
            count += 1
        if count == 0:
            condition = " with drop_last" if drop_last else ""
            raise ValueError(
                f"{n} examples make no batch of {batch_size} for {world_size} processes{condition}"
            )

        self.count = count
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
        """Count the examples in a batch of all processes together.

        Args:
            batch: Number of the batch, from 0.

        Returns:
            ``batch_size * world_size``. If ``drop_last`` is not set, the last batch has all
            examples that are left.
        """
        full_size = self.batch_size * self.world_size
        if batch == self.count - 1 and not self.drop_last:
            return self.n - full_size * batch
        return full_size

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        r"""Go through the examples once.

        Args:
            epoch: Number of the pass over the data, which determines the order.
            start: Number of batches to leave out, for a run that is resumed within an epoch. A
                stream reads these batches but does not return them.

        Returns:
            Batches of raw examples on the device, (B, \*).

        Raises:
            ValueError: If ``start`` is not in 0..len(self).
        """
        if not 0 <= start <= self.count:
            raise ValueError(f"start must be in 0..{self.count}, not {start}")
        return self._epoch(epoch, start)

    @abstractmethod
    def _epoch(self, epoch: int, start: int) -> Iterator[Tensor]:
        """Do what :meth:`epoch` documents. The arguments have been checked."""


class Batches(EpochBatches):
    r"""Batches of an array of raw examples.

    The examples keep their type: uint8 stays uint8 until the model scales it on the device. If all
    examples fit, they are copied to the device once, and batches are gathered there. Otherwise a
    thread, which is one batch ahead, gathers them from the memory map. The batches are the same in
    both cases.

    With several processes, each gets every ``world_size``-th example of the same order, see
    :class:`EpochBatches`.

    Args:
        examples: Raw examples, (N, \*).
        batch_size: Number of examples per batch and process.
        device: Device of the batches.
        seed: Seed that, with the epoch, determines the order. None keeps the order of ``examples``,
            as in evaluation.
        drop_last: Whether the last batch is left out if it is incomplete.
        resident_bytes: Largest size of ``examples``, in bytes, that is copied to the device as a
            whole.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: If there would be no batch, or if an argument is out of its range.

    Example:
        >>> import numpy as np
        >>> batches = Batches(np.arange(5.0)[:, None], batch_size=2)
        >>> [batch.ravel().tolist() for batch in batches.epoch()]
        [[0.0, 1.0], [2.0, 3.0, 4.0]]
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
        if not isinstance(examples, Subset):
            examples = Subset.whole(examples)
        self.examples = examples

        self.resident: Tensor | None = None
        if examples.nbytes <= resident_bytes:
            self.resident = torch.from_numpy(examples[:]).to(self.device)
        self.labels: Tensor | None = None
        if examples.labels is not None:
            self.labels = torch.from_numpy(examples.label_numbers()).to(self.device)

    def _epoch(self, epoch: int, start: int) -> Iterator[Tensor]:
        rows = self._rows(epoch)[start:]

        resident, labels = self.resident, self.labels
        if resident is None:
            batches = self._gather_ahead(rows)
        else:
            batches = (resident.index_select(0, row) for row in rows)
        if labels is None:
            return batches
        pairs = zip(batches, rows, strict=True)
        return (labelled(batch, labels[row.to(labels.device)]) for batch, row in pairs)

    def _rows(self, epoch: int) -> list[Tensor]:
        """Return the numbers of the examples in each batch of this process."""
        n = len(self.examples)
        order = torch.arange(n) if self.seed is None else epoch_order(n, self.seed, epoch)

        order = order[self.rank :: self.world_size]
        if self.drop_last:
            order = order[: self.batch_size * self.count]
        if self.resident is not None:
            order = order.to(self.device)

        starts = [self.batch_size * batch for batch in range(1, self.count)]
        return list(order.tensor_split(starts))

    def _gather_ahead(self, rows: list[Tensor]) -> Iterator[Tensor]:
        """Gather each batch in a thread while the batch before it is used."""
        ahead: Future[Tensor] | None = None

        with ThreadPoolExecutor(max_workers=1) as thread:
            for row in rows:
                ready = ahead
                ahead = thread.submit(self._gather, row)
                if ready is not None:
                    yield ready.result().to(self.device, non_blocking=True)

            if ahead is not None:
                yield ahead.result().to(self.device, non_blocking=True)

    def _gather(self, row: Tensor) -> Tensor:
        return pinned(self.examples[row.numpy()], self.device)


class StreamBatches(EpochBatches):
    r"""Batches of a stream, which is read from front to back and shuffled through its buffer.

    The order depends on the seed, the epoch, the size of the buffer and the order of the source. It
    does not depend on the sizes of the arrays in which the source gives the examples. If the buffer
    holds all examples, the order is that of :class:`Batches`.

    With several processes, each reads the whole stream and gets every ``world_size``-th example of
    the same shuffled order. All processes get the same number of batches, see
    :class:`EpochBatches`.

    The stream is read in the thread that takes the batches. If the source is slow, its work is best
    done in the workers of a ``DataLoader``.

    Args:
        stream: Stream of raw examples.
        batch_size: Number of examples per batch and process.
        device: Device of the batches.
        seed: Seed that, with the epoch, determines the order. None keeps the order of the source.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: If there would be no batch, or if an argument is out of its range.
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
        # The last batch of this process has what the full batches before it leave.
        n = len(range(self.rank, len(self.stream), self.world_size))
        last_size = n - self.batch_size * (self.count - 1)
        sizes = chain(repeat(self.batch_size, self.count - 1), [last_size])

        batches = islice(recut(self._pieces(epoch), sizes), start, None)
        return (pinned(batch, self.device).to(self.device, non_blocking=True) for batch in batches)

    def _pieces(self, epoch: int) -> Iterator[Array]:
        """Yield every ``world_size``-th example of the epoch's order, in arrays of any size."""
        pieces = self.stream.batches()
        if self.seed is not None:
            generator = stream(self.seed, epoch)
            pieces = _shuffled(pieces, len(self.stream), self.stream.buffer_size, generator)

        n_before = 0
        for piece in pieces:
            first = (self.rank - n_before) % self.world_size
            yield piece[first :: self.world_size]
            n_before += len(piece)


def _shuffled(
    pieces: Iterator[Array], n: int, buffer_size: int, generator: torch.Generator
) -> Iterator[Array]:
    """Shuffle n examples through a buffer.

    First the buffer is filled. Then an eighth of it at a time is drawn at random, yielded, and
    replaced by new examples. At the end the examples in the buffer are yielded in random order.

    With an eighth, the cost per example of drawing does not depend on the size of the buffer, and
    an example stays in the buffer for as long as if examples were drawn one by one.
    """
    buffered = min(buffer_size, n)
    step = max(1, buffered // 8)
    n_full_steps, rest = divmod(n - buffered, step)
    sizes = chain([buffered], repeat(step, n_full_steps))
    if rest:
        sizes = chain(sizes, [rest])

    arrays = recut(pieces, sizes)
    buffer = next(arrays)
    for incoming in arrays:
        drawn = torch.randperm(buffered, generator=generator)[: len(incoming)].numpy()
        outgoing = buffer[drawn]
        buffer[drawn] = incoming
        yield outgoing

    order = torch.randperm(buffered, generator=generator).numpy()
    for first in range(0, buffered, step):
        yield buffer[order[first : first + step]]


def recut(pieces: Iterator[Array], sizes: Iterable[int]) -> Iterator[Array]:
    r"""Yield the same examples in the same order, in arrays of the given sizes.

    The sizes must add up to the number of examples. At the end the pieces are asked for one more,
    so that a stream that has more examples than it should can raise its error.

    Args:
        pieces: Arrays of examples, (B, \*) each, not all empty.
        sizes: Numbers of examples of the new arrays.

    Yields:
        The new arrays.
    """
    piece = next(pieces)

    for size in sizes:
        array = np.empty((size, *piece.shape[1:]), piece.dtype)
        n_filled = 0
        while n_filled < size:
            if len(piece) == 0:
                piece = next(pieces)

            taken, piece = np.split(piece, [size - n_filled])
            array[n_filled : n_filled + len(taken)] = taken
            n_filled += len(taken)
        yield array

    next(pieces, None)


def pinned(values: Array, device: torch.device) -> Tensor:
    r"""Convert a batch to a tensor, in pinned memory if it goes to a GPU.

    Args:
        values: Raw examples, (B, \*).
        device: Device to which it will go.

    Returns:
        The tensor, on the CPU.
    """
    batch = torch.from_numpy(values)
    return batch.pin_memory() if device.type == "cuda" else batch
