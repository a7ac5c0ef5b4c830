"""Examples that come in batches, pass after pass, and never become an array."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise.data.arrays import as_array, examples
from equipoise.data.dataset import Array, Subset


@dataclass(frozen=True, eq=False, repr=False)
class Stream:
    r"""Training examples that are read from front to back, once an epoch; made by :func:`equipoise.load_stream`.

    Every pass must give the same examples in the same order. That is checked on the first of them, and on the number
    of all: a pass that gives fewer or more is an error.

    Args:
        read: begins a pass; the numbers of the batches, and raw examples, (B, \*).
        first: what each pass begins with, (F, \*).
        set_aside: how many of these are not for training.
        count: number of training examples, those that follow.
        at_hand: the first of these, which can be read in any order.
        buffer_size: examples among which the next one is drawn when an epoch is shuffled.
        source: what to call the stream in an error.
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
        r"""(N, \*)."""
        return (self.count, *self.at_hand.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values as they are handed out."""
        return self.at_hand.dtype

    def batches(self) -> Iterator[Array]:
        r"""Go through the training examples once, in the order and in the batches of the source.

        Yields:
            Raw examples, (B, \*), as copies that the source cannot change.

        Raises:
            ValueError: if the pass is not what it was when the stream was loaded; the message names the batch.
        """
        total, before = self.set_aside + self.count, 0
        for index, batch in self.read():
            known = self.first[before : before + len(batch)]
            if not np.array_equal(known, batch[: len(known)]):
                raise ValueError(
                    f"{self.source}, batch {index}: not the examples that were there when the stream was loaded, so "
                    "that examples held out would be trained on. Every pass must have the same order: leave the "
                    "shuffling to the stream, or give the source a fixed seed"
                )
            training = batch[max(0, self.set_aside - before) :]
            before += len(batch)
            if before > total:
                raise ValueError(
                    f"{self.source}, batch {index}: goes on after the {total} examples that were declared or counted. "
                    "Declare their number with count, or end each pass there (itertools.islice)"
                )
            if len(training):
                yield self._cast(training, index)
        if before < total:
            raise ValueError(
                f"{self.source}: the pass ended after {before} examples; {total} were declared or counted. "
                f"Give count={before}, or leave count out to have them counted"
            )

    def _cast(self, values: Array, index: int) -> Array:
        where = f"{self.source}, batch {index}"
        is_narrowed = self.dtype == np.uint8 and values.dtype != np.uint8
        if is_narrowed and (
            values.dtype.kind not in "bui" or values.min() < 0 or values.max() > 255
        ):
            raise ValueError(
                f"{where}: {values.dtype} values from {values.min():g} to {values.max():g}; expected whole numbers in "
                "0..255, as the first examples are"
            )
        with np.errstate(over="ignore"):
            cast = np.array(values, dtype=self.dtype, order="C")
        if cast.dtype.kind == "f" and not np.isfinite(cast).all():
            raise ValueError(
                f"{where}: values that are NaN, infinite or too large for float32; leave those examples out"
            )
        return cast

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"Stream(shape={self.shape}, dtype={self.dtype}, buffer_size={self.buffer_size})"


def reader(source: object, name: str) -> Callable[[], Iterator[tuple[int, Array]]]:
    r"""Turn what a user holds into something that begins a pass.

    Args:
        source: an iterable of batches, or a function that makes one. A batch is an array or tensor, (B, D), (B, H, W),
            (B, C, H, W) or (B, H, W, C), or a tuple that starts with one.
        name: what to call it in an error.

    Returns:
        A function without arguments; what it returns gives the number of each batch and its examples, (B, D) or
        (B, C, H, W), all of one shape. Empty batches are passed over.

    Raises:
        ValueError: if the source is no iterable, or can be gone through only once.
    """
    if isinstance(source, Iterator):
        raise ValueError(
            f"{name} can be gone through only once, but each epoch is a pass. Give the function that makes it, "
            "load_stream(make_batches) and not load_stream(make_batches()), or an object whose __iter__ begins anew"
        )
    if not isinstance(source, Iterable) and not callable(source):
        raise ValueError(f"{name}; expected an iterable of batches, or a function that makes one")

    def read() -> Iterator[tuple[int, Array]]:
        shape: tuple[int, ...] | None = None
        for index, batch in enumerate(_undisturbed(source)):
            where = f"{name}, batch {index}"
            if isinstance(batch, dict):
                raise ValueError(
                    f"{where}: a dictionary with the keys {', '.join(map(str, batch))}; expected the examples "
                    "themselves, or a tuple that starts with them"
                )
            values = as_array(batch[0] if isinstance(batch, tuple | list) and batch else batch)
            if values.ndim and not len(values):
                continue
            values = examples(values, where)
            if shape not in (None, values.shape[1:]):
                raise ValueError(
                    f"{where}: examples of shape {values.shape[1:]}; those before are of shape {shape}"
                )
            shape = values.shape[1:]
            yield index, values

    return read


def first_examples(batches: Iterator[tuple[int, Array]], n: int) -> Array:
    r"""Keep the beginning of a pass.

    Args:
        batches: their numbers, and examples, (B, \*).
        n: number of examples.

    Returns:
        (n, \*), or fewer if there are no more.
    """
    parts: list[Array] = []
    for _, batch in batches:
        parts.append(np.array(batch[:n]))  # a copy: the source may use its array again
        n -= len(parts[-1])
        if n <= 0:
            break
    return np.concatenate(parts) if parts else np.empty(0)


def _undisturbed(source: Any) -> Iterator[Any]:  # noqa: ANN401
    """One pass, with a state of its own for torch's global generator.

    A ``DataLoader`` draws from it, and some shuffle by it. So each pass has the same order, and training, which draws
    from it too, takes no notice: a resumed run may begin more passes than one that was never interrupted.
    """
    import torch  # not above: arrays are loaded without it

    inside, iterator = torch.Generator().manual_seed(0).get_state(), None
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
