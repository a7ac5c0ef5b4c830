"""Names, folders, arrays and Hugging Face data sets, as one record; batches in a reproducible order.

:func:`load` finds and checks the examples and returns a :class:`Data`; :class:`Batches` feeds them to a
device. ``Batches`` and ``epoch_order`` are resolved on first use: they need torch, loading does not.
"""

from typing import TYPE_CHECKING

from equipoise.data.dataset import Data, Split, Subset, split
from equipoise.data.loading import load, load_examples
from equipoise.data.named import NAMES

if TYPE_CHECKING:
    from equipoise.data.batches import Batches, epoch_order

__all__ = ["NAMES", "Batches", "Data", "Split", "Subset", "epoch_order", "load", "load_examples", "split"]


def __getattr__(name: str) -> object:
    if name in {"Batches", "epoch_order"}:
        from equipoise.data import batches

        return getattr(batches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
