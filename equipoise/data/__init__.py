"""Data sets by name, folders, arrays, streams and Hugging Face data sets, as one record.

:func:`load` and :func:`load_stream` find the examples, check them and return a :class:`Data`.
:func:`batches_of` brings them to a device in batches, in a reproducible order. The names of the
module ``batches`` are imported on first use, because they need torch and loading does not.
"""

from typing import TYPE_CHECKING

from equipoise.data.dataset import Data, ExampleSet, Split, Subset, split
from equipoise.data.loading import is_packed_source, load, load_examples, load_stream
from equipoise.data.named import NAMES
from equipoise.data.stream import Stream

if TYPE_CHECKING:
    from equipoise.data.batches import Batches, EpochBatches, StreamBatches, batches_of, epoch_order

__all__ = [
    "NAMES",
    "Batches",
    "Data",
    "EpochBatches",
    "ExampleSet",
    "Split",
    "Stream",
    "StreamBatches",
    "Subset",
    "batches_of",
    "epoch_order",
    "is_packed_source",
    "load",
    "load_examples",
    "load_stream",
    "split",
]


def __getattr__(name: str) -> object:
    if name in {"Batches", "EpochBatches", "StreamBatches", "batches_of", "epoch_order"}:
        from equipoise.data import batches

        return getattr(batches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
