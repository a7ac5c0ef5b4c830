"""Batches of a sharded stream, in an order that no number of processes changes."""

import threading
from collections.abc import Iterator
from itertools import chain, repeat
from queue import Empty, Full, Queue
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from equipoise.data.batches import EpochBatches, pinned, recut
from equipoise.data.dataset import Array
from equipoise.data.shard_files import Shard
from equipoise.data.shards import ShardedStream
from equipoise.randomness import stream as random_stream

T = TypeVar("T")

AHEAD = 4
"""Batches that are read ahead of the step, in a thread."""
POLL_SECONDS = 0.1


class Piece(NamedTuple):
    """Some examples of a file, one after another."""

    shard: Shard
    start: int
    stop: int


class ShardBatches(EpochBatches):
    r"""Batches of a sharded stream. Each process reads the files, or parts of files, of its own.

    In every epoch the files are put into a new order, in one line. The line is cut into R segments
    of equal length, one for each reader. Example g of the epoch comes from reader g mod R, so that
    every batch has examples from R distant places. A reader goes through its segment from front to
    back and shuffles it window by window, with ``buffer_size`` / R examples in a window.

    All of this follows from the seed and the epoch. Process p of P takes the examples g with
    g mod P = p, which are those of every P-th reader. These readers have neighbouring segments, by
    the order of the reversed bits of their numbers, so that a process reads one stretch of the
    line. If P is not a power of two, or is larger than R, every process reads all segments.

    The place of an example in the files follows from its number. A run that goes on begins to read
    in the window in which it was stopped.

    A thread reads up to :data:`AHEAD` batches ahead.

    Args:
        stream: The examples.
        batch_size: Number of examples per batch and process.
        device: Device of the batches.
        seed: Seed that, with the epoch, determines the order. None always gives the same order.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: If there would be no batch, or if an argument is out of its range.
    """

    def __init__(
        self,
        stream: ShardedStream,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(len(stream), batch_size, device, seed, rank, world_size)
        self.stream = stream
        self.is_shared = stream.readers % world_size == 0
        self.window = max(1, stream.buffer_size // stream.readers)

    def _epoch(self, epoch: int, start: int) -> Iterator[Tensor]:
        if start == self.count:
            return iter(())

        n = len(range(self.rank, self.n, self.world_size))
        last_size = n - self.batch_size * (self.count - 1)
        sizes = chain(repeat(self.batch_size, self.count - 1 - start), [last_size])

        batches = recut(self._examples(epoch, start * self.batch_size), sizes)
        return (
            pinned(batch, self.device).to(self.device, non_blocking=True)
            for batch in _ahead(batches)
        )

    def _examples(self, epoch: int, skipped: int) -> Iterator[Array]:
        """Yield this process's examples after the first ones, in arrays of any size."""
        readers = range(self.stream.readers)
        if self.is_shared:
            readers = readers[self.rank :: self.world_size]
        else:
            skipped *= self.world_size

        position = skipped
        full, within = divmod(skipped, len(readers))
        line = self._line(epoch)
        sources = [self._read(line, reader, epoch, full) for reader in readers]

        for all_rows in _in_turns(sources):
            rows = all_rows[within:]
            within = max(0, within - len(all_rows))
            if self.is_shared:
                yield rows
            else:
                yield rows[(self.rank - position) % self.world_size :: self.world_size]
            position += len(rows)

    def _line(self, epoch: int) -> list[Piece]:
        """Put the training examples of the files into the order of the epoch."""
        pieces, left = [], self.stream.set_aside
        for shard in self.stream.shards:
            if left < shard.n:
                pieces.append(Piece(shard, left, shard.n))
            left = max(0, left - shard.n)
        if self.seed is None:
            return pieces

        order = torch.randperm(len(pieces), generator=random_stream(self.seed, epoch, "shards"))
        return [pieces[number] for number in order.tolist()]

    def _read(self, line: list[Piece], reader: int, epoch: int, skipped: int) -> Iterator[Array]:
        """Yield the windows of a reader, each shuffled, after the first examples."""
        first, last = segment(self.n, self.stream.readers, reader)
        window = skipped // self.window
        start = first + window * self.window
        sizes = [min(self.window, last - begin) for begin in range(start, last, self.window)]
        if not sizes:
            return

        within = skipped - window * self.window
        for rows in recut(_read_line(self.stream, line, start, last), iter(sizes)):
            shuffled = rows
            if self.seed is not None:
                generator = random_stream(self.seed, epoch, "window", reader, window)
                shuffled = rows[torch.randperm(len(rows), generator=generator).numpy()]
            yield shuffled[within:]
            window, within = window + 1, 0


def segment(n: int, readers: int, reader: int) -> tuple[int, int]:
    """Return the part of a line that a reader goes through.

    Args:
        n: Number of examples in the line.
        readers: Number of readers, a power of two.
        reader: Number of the reader, from 0.

    Returns:
        Numbers of its first example and of the one after its last. Reader r has as many as there
        are numbers g below n with g mod ``readers`` = r.

    Example:
        >>> [segment(10, 4, reader) for reader in range(4)]
        [(0, 3), (5, 8), (3, 5), (8, 10)]
    """
    place = _reversed_bits(reader, readers)
    # Readers below the remainder have one example more.
    least, rest = divmod(n, readers)
    before = sum(_reversed_bits(earlier, readers) < rest for earlier in range(place))
    first = place * least + before
    return first, first + least + (reader < rest)


def _reversed_bits(number: int, below: int) -> int:
    """Reverse the bits of a number below a power of two."""
    bits = below.bit_length() - 1
    return int(f"{number:0{bits}b}"[::-1], 2) if bits else 0


def _read_line(stream: ShardedStream, line: list[Piece], start: int, stop: int) -> Iterator[Array]:
    """Read the examples of a line from one number to before another."""
    before = 0
    for piece in line:
        n = piece.stop - piece.start
        first, last = max(start - before, 0), min(stop - before, n)
        before += n
        if first < last:
            yield from stream.rows(piece.shard, piece.start + first, piece.start + last)


def _in_turns(sources: list[Iterator[Array]]) -> Iterator[Array]:
    """Take an example from each source in turns; at the end, the first may have one more.

    All sources yield arrays of equal lengths but for their last examples.
    """
    while True:
        arrays = [next(source, None) for source in sources]
        held = [array for array in arrays if array is not None]
        if not held:
            return

        n = min(len(array) for array in held) if len(held) == len(arrays) else 0
        if n:
            rows = np.stack([array[:n] for array in held], axis=1)
            yield rows.reshape(n * len(held), *rows.shape[2:])
        rest = [array[n:] for array in held if len(array) > n]
        if rest:
            yield np.concatenate(rest)


class _End:
    """The end of what is read ahead, and the error at which it ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Compute items in a thread, a few of them before they are needed."""
    ready: Queue[T | _End] = Queue(AHEAD)
    stopped = threading.Event()

    def put(item: T | _End) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
            except Full:
                continue
            return

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
        except BaseException as caught:  # raised again where the items are taken
            error = caught
        put(_End(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = ready.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join()
