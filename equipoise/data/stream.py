"""Examples that come in batches, in one pass after another, and are never collected in an array."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise.data.arrays import as_array, examples
from equipoise.data.dataset import Array, Subset


@dataclass(frozen=True, eq=False, repr=False)
class Stream:
    r"""Training examples that are read from front to back, once in each epoch.

    :func:`equipoise.load_stream` makes a stream. Every pass must give the same examples in the
    same order. This is checked for the first examples and for the number of all examples.

    Args:
        read: Function that begins a pass. Each item of the pass is the number of a batch and its
            raw examples, (B, \*).
        first: The examples at the beginning of each pass, (F, \*).
        set_aside: How many of the first examples are not used for training.
        count: Number of training examples, which follow those that are set aside.
        at_hand: The first training examples. They stay in memory and can be read in any order.
        buffer_size: Number of examples in the buffer from which the next example is drawn when an
            epoch is shuffled.
        source: Name of the stream in error messages.
    """

    read: Callable[[], Iterator[tuple[int, Array]]]
    first: Array
    set_aside: int
    count: int
    at_hand: Subset
    buffer_size: int
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        r"""Shape of all training examples, (N, \*)."""
        return (self.count, *self.at_hand.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the examples in a batch."""
        return self.at_hand.dtype

    def batches(self) -> Iterator[Array]:
        r"""Read the training examples once, in the order and in the batches of the source.

        Yields:
            Raw examples, (B, \*). They are copies, which the source cannot change.

        Raises:
            ValueError: If the pass differs from the one when the stream was loaded. The message
                names the batch.
        """
        total = self.set_aside + self.count
        before = 0
        for index, batch in self.read():
            expected = self.first[before : before + len(batch)]
            if not np.array_equal(expected, batch[: len(expected)], equal_nan=True):
                raise ValueError(
                    f"{self.source}, batch {index}: not the examples that were there when the "
                    "stream was loaded, so that examples held out would be trained on. Every pass "
                    "must have the same order: leave the shuffling to the stream, or give the "
                    "source a fixed seed"
                )

            training = batch[max(0, self.set_aside - before) :]
            before += len(batch)
            if before > total:
                raise ValueError(
                    f"{self.source}, batch {index}: goes on after the {total} examples that were "
                    "declared or counted. Declare their number with count, or end each pass there "
                    "(itertools.islice)"
                )

            if len(training):
                yield self._cast(training, f"{self.source}, batch {index}")

        if before < total:
            raise ValueError(
                f"{self.source}: the pass ended after {before} examples; {total} were declared or "
                f"counted. Give count={before}, or leave count out to have them counted"
            )

    def _cast(self, values: Array, label: str) -> Array:
        if self.dtype.kind in "ui" and values.dtype != self.dtype:
            low, high = np.iinfo(self.dtype).min, np.iinfo(self.dtype).max
            is_integer = values.dtype.kind in "bui"
            if not is_integer or values.min() < low or values.max() > high:
                raise ValueError(
                    f"{label}: {values.dtype} values from {values.min():g} to {values.max():g}; "
                    f"expected whole numbers in {low}..{high}, as the first examples are"
                )

        with np.errstate(over="ignore"):
            cast = np.array(values, dtype=self.dtype, order="C")
        # NaN in the rows of a table is a missing value.
        has_gaps = cast.ndim == 2
        if cast.dtype.kind == "f" and not (np.isfinite(cast) | (has_gaps & np.isnan(cast))).all():
            what = "infinite" if has_gaps else "NaN, infinite"
            raise ValueError(
                f"{label}: values that are {what} or too large for float32; leave those examples "
                "out"
            )
        return cast

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"Stream(shape={self.shape}, dtype={self.dtype}, buffer_size={self.buffer_size})"


def reader(source: object, name: str) -> Callable[[], Iterator[tuple[int, Array]]]:
    r"""Make a function that begins a pass over the source of a user.

    Args:
        source: An iterable of batches, or a function that returns one. A batch is an array or
            tensor, (B, D), (B, H, W), (B, C, H, W) or (B, H, W, C), or a tuple that starts with
            one.
        name: Name of the source in error messages.

    Returns:
        A function without arguments. It returns an iterator over the number of each batch and its
        examples, (B, D) or (B, C, H, W). All examples have the same shape. Empty batches are
        skipped.

    Raises:
        ValueError: If the source is not iterable, or can be read only once.
    """
    if isinstance(source, Iterator):
        raise ValueError(
            f"{name} can be gone through only once, but each epoch is a pass. Give the function "
            "that makes it, load_stream(make_batches) and not load_stream(make_batches()), or an "
            "object whose __iter__ begins anew"
        )
    if not isinstance(source, Iterable) and not callable(source):
        raise ValueError(f"{name}; expected an iterable of batches, or a function that makes one")

    def read() -> Iterator[tuple[int, Array]]:
        shape: tuple[int, ...] | None = None
        for index, batch in enumerate(_undisturbed(source)):
            label = f"{name}, batch {index}"
            if isinstance(batch, dict):
                raise ValueError(
                    f"{label}: a dictionary with the keys {', '.join(map(str, batch))}; expected "
                    "the examples themselves, or a tuple that starts with them"
                )
            if isinstance(batch, tuple | list) and batch:
                batch = batch[0]

            values = as_array(batch)
            if values.ndim and not len(values):
                continue

            values = examples(values, label)
            if shape not in (None, values.shape[1:]):
                raise ValueError(
                    f"{label}: examples of shape {values.shape[1:]}; those before are of shape "
                    f"{shape}"
                )
            shape = values.shape[1:]
            yield index, values

    return read


def first_examples(batches: Iterator[tuple[int, Array]], n: int) -> Array:
    r"""Collect the examples at the beginning of a pass.

    Args:
        batches: The number of each batch and its examples, (B, \*).
        n: Number of examples.

    Returns:
        The first examples, (n, \*), or all of them if the pass has fewer.
    """
    parts: list[Array] = []
    for _, batch in batches:
        # A copy, because the source may use its array again.
        part = np.array(batch[:n])
        parts.append(part)

        n -= len(part)
        if n <= 0:
            break

    return np.concatenate(parts) if parts else np.empty(0)


def _undisturbed(source: Any) -> Iterator[Any]:  # noqa: ANN401
    """Read the source once, with a separate state of torch's global generator.

    A ``DataLoader`` draws from this generator, and may shuffle by it. With a separate state each
    pass has the same order. Training draws from the generator, too, and is not affected. It must
    not be, because a resumed run may begin more passes than a run without an interruption.
    """
    import torch  # imported here, because arrays are loaded without torch

    inside = torch.Generator().manual_seed(0).get_state()
    iterator = None
    while True:
        outside = torch.get_rng_state()
        torch.set_rng_state(inside)
        try:
            if iterator is None:
                iterator = iter(source if isinstance(source, Iterable) else source())
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            inside = torch.get_rng_state()
            torch.set_rng_state(outside)

        yield batch
