"""The record that loading returns, the view it is made of, and the split into three parts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Channels: TypeAlias = Literal["grey", "rgb"]

CHECKED_AT_ONCE = 1024
MAX_VALIDATION = 2000
"""More validation examples than this buy no precision that a learning curve could show."""


@runtime_checkable
class ExampleSet(Protocol):
    """Training examples: a :class:`Subset`, read in any order, or a :class:`Stream`, read from front to back."""

    @property
    def shape(self) -> tuple[int, ...]:
        r"""(N, \*)."""

    @property
    def at_hand(self) -> "Subset":
        """Those that can be read in any order: all of a subset, the first ones of a stream."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False, repr=False)
class Subset:
    r"""Some examples of an array, by index: a view that never copies a memory map as a whole.

    Args:
        base: (M, \*), in memory or memory-mapped.
        indices: which examples of ``base``, in which order, (N,).
        dtype: what the values are cast to when they are read.

    Example:
        >>> evens = Subset(np.arange(10.0)[:, None], np.arange(0, 10, 2), np.dtype("float32"))
        >>> evens
        Subset(shape=(5, 1), dtype=float32)
        >>> evens[np.array([0, 4])].ravel()
        array([0., 8.], dtype=float32)
    """

    base: Array
    indices: Int64[np.ndarray, " n"]
    dtype: np.dtype[Any]

    @classmethod
    def whole(cls, base: Array) -> "Subset":
        r"""All examples of an array, in order.

        Args:
            base: (N, \*).

        Returns:
            The view of length N, of the dtype of ``base``.
        """
        return cls(base, np.arange(len(base), dtype=np.int64), base.dtype)

    def take(self, rows: slice | Int64[np.ndarray, " k"]) -> "Subset":
        """Some of the examples, as a view.

        Args:
            rows: which, counted within this subset.

        Returns:
            The smaller subset.
        """
        return Subset(self.base, self.indices[rows], self.dtype)

    def sha256(self) -> str:
        """Checksum of the examples, in their order.

        Returns:
            In hexadecimal.
        """
        digest = hashlib.sha256(f"{self.dtype.str} {self.shape}".encode())
        for first in range(0, len(self), CHECKED_AT_ONCE):
            digest.update(self[first : first + CHECKED_AT_ONCE].data)
        return digest.hexdigest()

    @property
    def shape(self) -> tuple[int, ...]:
        r"""(N, \*)."""
        return (len(self.indices), *self.base.shape[1:])

    @property
    def at_hand(self) -> "Subset":
        """All of them; see :class:`ExampleSet`."""
        return self

    @property
    def nbytes(self) -> int:
        """Size in bytes that the examples take once they are read."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: int | slice | Int64[np.ndarray, " k"]) -> Array:
        return np.ascontiguousarray(self.base[self.indices[rows]], dtype=self.dtype)

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a Subset cannot become an array without a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"Subset(shape={self.shape}, dtype={self.dtype})"


@dataclass(frozen=True, eq=False)
class Data:
    """Examples, split in three, and how raw values become model inputs: x = (raw - offset) / scale.

    Args:
        name: what the data set is called in reports.
        train: raw training examples, (N, C, H, W) uint8 or float32, or (N, D) float32: a :class:`Subset`, or
            a :class:`Stream` of what is too much to keep.
        validation: raw examples held out of the training part.
        test: raw examples for the final figures: the set's own test part where it has one.
        kind: "image" or "table".
        shape: of one example, (C, H, W) or (D,).
        offset: raw value of x = 0, broadcastable to ``shape``.
        scale: raw distance of one unit of x, positive, broadcastable to ``shape``.
        quantum: distance of two neighbouring grey levels, in units of x (1/255 for 8 bits); None where the
            values are continuous.
        fingerprint: SHA-256 over shape, dtype and values, in hexadecimal. Of images it is that of the decoded
            pixels, so that a copy of a folder, whose files have other times, is known for the same data.
        source: where the examples were found.
        notes: sentences that a user should read.
        loading: Arguments of :func:`load` with which these examples are found again; those of
            :func:`load_stream` if "stream" is true among them. Empty for examples that came as an
            object in memory.
    """

    name: str
    train: ExampleSet
    validation: Subset
    test: Subset
    kind: Literal["image", "table"]
    shape: tuple[int, ...]
    offset: Float32[np.ndarray, "*shape"]
    scale: Float32[np.ndarray, "*shape"]
    quantum: float | None
    fingerprint: str
    source: str
    notes: tuple[str, ...] = ()
    loading: Mapping[str, Any] = field(default_factory=dict)


class Split(NamedTuple):
    """Disjoint indices that together cover all examples, each sorted."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def split(count: int, test_fraction: float = 0.1, validation_fraction: float = 0.1) -> Split:
    """Split examples at random, but always in the same way: the permutation depends on their number only.

    Args:
        count: number of examples.
        test_fraction: share of all examples for the test, in [0, 1).
        validation_fraction: share of what remains for validation, in [0, 1), at most 2000 examples.

    Returns:
        The indices of each part; a positive fraction gives at least one example.

    Raises:
        ValueError: if a fraction is outside [0, 1) or nothing remains for training.

    Example:
        >>> [len(part) for part in split(1797)]
        [1455, 162, 180]
    """
    for name, fraction in (
        ("test_fraction", test_fraction),
        ("validation_fraction", validation_fraction),
    ):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} must be in [0, 1), not {fraction}")
    # RandomState, because NumPy promises that its stream never changes; a Generator's may, with the version.
    shuffled = np.random.RandomState(count % 2**32).permutation(count).astype(np.int64)
    tests = max(1, round(test_fraction * count)) if test_fraction else 0
    validations = max(1, round(validation_fraction * (count - tests))) if validation_fraction else 0
    validations = min(validations, MAX_VALIDATION)
    if tests + validations >= count:
        raise ValueError(
            f"{count} examples, of which {tests} for the test and {validations} for validation, "
            "leave none for training: lower test_fraction or validation_fraction"
        )
    test, validation, train = np.split(shuffled, [tests, tests + validations])
    return Split(np.sort(train), np.sort(validation), np.sort(test))
