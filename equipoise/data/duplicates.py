"""Examples that are in two parts of a data set: what is held out has then been trained on."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from equipoise.data.dataset import Array, Subset

HASHED_VALUES = 256
"""Most values of an example that are looked at first, evenly spread over it."""
HASHED_AT_ONCE = 1 << 20
"""Values that are hashed together."""
CAUTION_SHARE = 0.1
"""Share of a part from which its figures are doubtful. Small tables of few levels repeat rows."""


def shared_rows(held_out: Subset, training: Subset) -> Int64[np.ndarray, " shared"]:
    """Find the held-out examples that equal a training example.

    Rows are compared by a hash of 256 of their values, and those that agree by a hash of all.

    Args:
        held_out: Raw examples, of the same shape and type as those of the training.
        training: Raw training examples.

    Returns:
        Positions within ``held_out``, increasing.

    Example:
        >>> values = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
        >>> shared_rows(Subset.whole(values[2:]), Subset.whole(values[:2]))
        array([0])
    """
    width = int(np.prod(held_out.shape[1:]))
    some = np.linspace(0, width - 1, min(width, HASHED_VALUES)).astype(np.int64)
    sought, others = _hashes(held_out, some), _hashes(training, some)
    found = np.flatnonzero(_is_in(sought, others))
    if width <= HASHED_VALUES or not len(found):
        return found

    candidates = training.take(np.flatnonzero(_is_in(others, sought[found])))
    every = np.arange(width)
    is_shared = _is_in(_hashes(held_out.take(found), every), _hashes(candidates, every))
    return found[is_shared]


def describe_shared(held_out: Subset, training: Subset, name: str) -> tuple[str | None, bool]:
    """Say how many held-out examples have been trained on.

    Args:
        held_out: Raw examples.
        training: Raw training examples.
        name: Name of the part that is held out.

    Returns:
        A sentence, None if there are none, and whether they are so many that figures are doubtful.
    """
    if not len(held_out) or not len(training):
        return None, False
    n = len(shared_rows(held_out, training))
    if not n:
        return None, False

    share = n / len(held_out)
    text = f"{n} of {len(held_out)} {name} examples ({share:.0%}) are training examples, too"
    if share < CAUTION_SHARE:
        return text, False
    return f"{text}, so that figures over them are too good: leave the duplicates out", True


def _is_in(values: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell which values are among others; for a million of them far faster than ``np.isin``."""
    if not len(others):
        return np.zeros(len(values), bool)
    ordered = np.sort(others)
    place = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    is_in: NDArray[np.bool_] = ordered[place] == values
    return is_in


def _hashes(part: Subset, columns: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash some values of each example: a sum with random odd weights, modulo 2^64."""
    weights = np.random.RandomState(0).bytes(8 * len(columns))
    odd = np.frombuffer(weights, np.uint64) | np.uint64(1)
    hashes = [(block.astype(np.uint64) * odd).sum(1) for block in _blocks(part, columns)]
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64)


def _blocks(part: Subset, columns: NDArray[np.int64]) -> Iterator[Array]:
    """Read some values of all examples as whole numbers, block by block."""
    rows = max(1, HASHED_AT_ONCE // int(np.prod(part.shape[1:])))
    for first in range(0, len(part), rows):
        block = part[first : first + rows].reshape(-1, int(np.prod(part.shape[1:])))[:, columns]
        if block.dtype.kind == "f":
            # Zeros of both signs are equal, but not their bits.
            block = np.ascontiguousarray(block + block.dtype.type(0)).view(
                f"u{block.dtype.itemsize}"
            )
        yield block
