"""Records: the data that loading returns, a view of examples, and the split into three parts."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

from equipoise.levels import Level

Array: TypeAlias = NDArray[Any]
Channels: TypeAlias = Literal["grey", "rgb"]
Names: TypeAlias = Callable[[int], str]
"""Returns the name of the example with an index in an array, such as that of its file."""
Pages: TypeAlias = Literal["examples", "channels", "first"]
Fit: TypeAlias = Literal["crop", "pad", "stretch"]

CHECKED_AT_ONCE = 1024
"""Number of examples that are read at a time for a checksum."""

MAX_VALIDATION = 2000
"""Largest number of validation examples. More of them do not make a learning curve more precise."""


@runtime_checkable
class ExampleSet(Protocol):
    """Training examples.

    A :class:`Subset` can be read in any order, a :class:`Stream` only from front to back.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        r"""Shape of all examples, (N, \*)."""

    @property
    def at_hand(self) -> "Subset":
        """Examples that can be read in any order: all of a subset, the first ones of a stream."""

    def __len__(self) -> int: ...


@runtime_checkable
class Rows(Protocol):
    r"""Examples that are read a stretch at a time: an array, a subset, or files in a line."""

    @property
    def shape(self) -> tuple[int, ...]:
        r"""Shape of all examples, (N, \*)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Array: ...


@dataclass(frozen=True, eq=False, repr=False)
class Subset:
    r"""Some examples of an array, by their index.

    It is a view that never copies a whole memory map.

    Args:
        base: The array, (M, \*), in memory or memory-mapped.
        indices: Indices into ``base``, (N,), in the order of the examples.
        dtype: Data type to which the values are cast when they are read.
        name: Names of the examples in ``base``. None if they have numbers only.
        labels: Number of the label of each example in ``base``, (M,), -1 where it is unknown. None
            if they have no labels.

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
    name: Names | None = None
    labels: Int64[np.ndarray, " m"] | None = None

    @classmethod
    def whole(cls, base: Array, name: Names | None = None) -> "Subset":
        r"""Make a view of all examples of an array, in their order.

        Args:
            base: The array, (N, \*).
            name: Names of the examples.

        Returns:
            The view, with N examples and the data type of ``base``.
        """
        return cls(base, np.arange(len(base), dtype=np.int64), base.dtype, name)

    def take(self, rows: slice | Int64[np.ndarray, " k"]) -> "Subset":
        """Select some of the examples, as a view.

        Args:
            rows: Positions of the examples within this subset.

        Returns:
            The smaller subset.
        """
        return Subset(self.base, self.indices[rows], self.dtype, self.name, self.labels)

    def names(self) -> list[str]:
        """Name the examples.

        Returns:
            The file of each, with the page where it has several, or its row in the array.
        """
        name = self.name or str
        return [name(int(index)) for index in self.indices]

    def label_numbers(self) -> Int64[np.ndarray, " n"]:
        """Number the labels of the examples.

        Returns:
            Their numbers, (N,), -1 where a label is unknown or the examples have none.
        """
        if self.labels is None:
            return np.full(len(self), -1, np.int64)
        numbers: Int64[np.ndarray, " n"] = self.labels[self.indices]
        return numbers

    def without_labels(self) -> "Subset":
        """Forget the labels of the examples, for what is computed without.

        Returns:
            The same examples.
        """
        return replace(self, labels=None)

    def sha256(self) -> str:
        """Compute a checksum of the examples, which depends on their order.

        Returns:
            The SHA-256 over shape, dtype and values, in hexadecimal.
        """
        digest = hashlib.sha256(f"{self.dtype.str} {self.shape}".encode())

        for first in range(0, len(self), CHECKED_AT_ONCE):
            digest.update(self[first : first + CHECKED_AT_ONCE].data)
        return digest.hexdigest()

    @property
    def shape(self) -> tuple[int, ...]:
        r"""Shape of all examples, (N, \*)."""
        return (len(self.indices), *self.base.shape[1:])

    @property
    def at_hand(self) -> "Subset":
        """All examples; see :class:`ExampleSet`."""
        return self

    @property
    def nbytes(self) -> int:
        """Number of bytes that the examples take in memory when all of them are read."""
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
    """Examples in three parts, and the map from raw values to model inputs.

    The model input is x = (raw - offset) / scale.

    Args:
        name: Name of the data set in reports.
        train: Raw training examples, (N, C, H, W) uint8 or float32, or (N, D) float32. They are a
            :class:`Subset`, or a :class:`Stream` if they do not fit into memory.
        validation: Raw examples that are held out of the training part.
        test: Raw examples for the final figures. They are the set's own test part if it has one.
        kind: "image" or "table".
        shape: Shape of one example, (C, H, W) or (D,).
        offset: Raw value of x = 0, broadcastable to ``shape``.
        scale: Raw distance of one unit of x, positive, broadcastable to ``shape``.
        quantum: Distance between neighbouring grey levels, in units of x (1/255 for 8 bits). None
            if the values are continuous.
        fingerprint: SHA-256 over shape, dtype and values, in hexadecimal. For images it covers
            the decoded pixels. A copy of a folder, whose files have other modification times,
            therefore has the same fingerprint.
        source: Description of the place where the examples were found.
        notes: Sentences that a user should read.
        cautions: Those of them that say why results may be doubtful.
        has_gaps: Whether values of a table are missing, NaN.
        columns: Names of the columns of a table. Empty if they have none.
        label_names: Names of the labels that the examples carry, by their numbers. Empty if they
            have none.
        levels: Levels of the columns that are categories, by the number of the column. The values
            are the numbers of levels there, and NaN where they are missing.
        loading: Arguments of :func:`load` that find these examples again. They are those of
            :func:`load_stream` if "stream" is true among them. Empty for examples that came as
            an object in memory.
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
    cautions: tuple[str, ...] = ()
    has_gaps: bool = False
    columns: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    levels: Mapping[int, tuple[Level, ...]] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)


class Split(NamedTuple):
    """Disjoint indices that together cover all examples. Each array is sorted."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def split(count: int, test_fraction: float = 0.1, validation_fraction: float = 0.1) -> Split:
    """Split examples at random, but always in the same way.

    The permutation depends only on the number of examples.

    Args:
        count: Number of examples.
        test_fraction: Share of all examples for the test, in [0, 1).
        validation_fraction: Share of the remaining examples for validation, in [0, 1), at most
            2000 examples.

    Returns:
        The indices of each part. A positive fraction gives at least one example.

    Raises:
        ValueError: If a fraction is outside [0, 1) or no examples remain for training.

    Example:
        >>> [len(part) for part in split(1797)]
        [1455, 162, 180]
    """
    fractions = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} must be in [0, 1), not {fraction}")

    n_test = 0
    if test_fraction:
        n_test = max(1, round(test_fraction * count))

    n_validation = 0
    if validation_fraction:
        n_validation = max(1, round(validation_fraction * (count - n_test)))
        n_validation = min(n_validation, MAX_VALIDATION)

    if n_test + n_validation >= count:
        raise ValueError(
            f"{count} examples, of which {n_test} for the test and {n_validation} for validation, "
            "leave none for training: lower test_fraction or validation_fraction"
        )

    # NumPy promises that the numbers of a RandomState never change. Those of a Generator may
    # change with the version of NumPy.
    shuffled = np.random.RandomState(count % 2**32).permutation(count).astype(np.int64)
    test, validation, train = np.split(shuffled, [n_test, n_test + n_validation])
    return Split(np.sort(train), np.sort(validation), np.sort(test))
