r"""Labels: what an example is known to be, such as its class, beside its values.

A conditional model has a posterior q(z|x, y), a likelihood p(x|z, y) and the bound

.. math:: \log p(x|y) \ge \mathrm{E}_{q(z|x,y)}[\log p(x|z,y)] - \mathrm{KL}(q(z|x,y), p(z))

A label travels with the example, and then with its code, as NaN travels in a row with gaps: it is
carried by the tensor. Networks read it as one-hot numbers, which are all zero where it is unknown.
Sohn, Lee and Yan (2015), *Learning structured output representation using deep conditional
generative models*. In training, labels of a random share of the examples are withheld, so that the
model is one of unlabelled examples, too, as in Ho and Salimans (2022), *Classifier-free diffusion
guidance*.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

UNKNOWN = -1
"""Number of an unknown label."""


class Labelled(Tensor):
    r"""Examples or codes with the number of the label of each row, (B, \*).

    The results of arithmetic are plain tensors. What only selects, repeats, converts or moves rows
    keeps their labels. :func:`labelled` makes it.

    Example:
        >>> z = labelled(torch.zeros(3, 2), torch.tensor([0, 1, UNKNOWN]))
        >>> labels_of(z[1:]), labels_of(z + 1) is None
        (tensor([ 1, -1]), True)
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    labels: Tensor

    def __getitem__(self, rows: Any) -> Tensor:  # noqa: ANN401 (whatever selects rows)
        """Select rows."""
        values = super().__getitem__(rows)
        is_rows = isinstance(rows, slice) or (isinstance(rows, Tensor) and rows.ndim == 1)
        return labelled(values, self.labels[rows]) if is_rows else values

    def split(self, split_size: Any, dim: int = 0) -> tuple[Tensor, ...]:  # noqa: ANN401
        """Divide into blocks of rows."""
        values = super().split(split_size, dim)  # type: ignore[no-untyped-call]
        if dim != 0:
            return tuple(values)
        labels = self.labels.split(split_size)  # type: ignore[no-untyped-call]
        return tuple(labelled(*pair) for pair in zip(values, labels, strict=True))

    def repeat_interleave(
        self,
        repeats: Any,  # noqa: ANN401
        dim: int | None = None,
        **more: Any,  # noqa: ANN401
    ) -> Tensor:
        """Repeat each row."""
        values = super().repeat_interleave(repeats, dim, **more)
        return labelled(values, self.labels.repeat_interleave(repeats)) if dim == 0 else values

    def to(self, *args: Any, **more: Any) -> Tensor:  # noqa: ANN401
        """Move or convert the values, and move the labels with them."""
        values = super().to(*args, **more)
        return labelled(values, self.labels.to(values.device))

    def float(self, *args: Any, **more: Any) -> Tensor:  # noqa: ANN401
        """Convert the values to float32."""
        return self.to(torch.float32)

    def cpu(self, *args: Any, **more: Any) -> Tensor:  # noqa: ANN401
        """Move to the CPU."""
        return self.to("cpu")

    def contiguous(self, *args: Any, **more: Any) -> Tensor:  # noqa: ANN401
        """Lay out the values in another order."""
        return labelled(super().contiguous(*args, **more), self.labels)


def labelled(values: Tensor, labels: Tensor | None) -> Tensor:
    r"""Let examples or codes carry labels.

    Args:
        values: Examples or codes, (B, \*).
        labels: Number of the label of each, (B,), int64; :data:`UNKNOWN` where there is none. None
            leaves the values as they are.

    Returns:
        The same values, (B, \*).

    Raises:
        ValueError: If there is not one label for each row.
    """
    if labels is None:
        return values
    if labels.shape != values.shape[:1]:
        raise ValueError(f"{tuple(labels.shape)} labels for {len(values)} examples; give one each")
    result = values.as_subclass(Labelled)
    result.labels = labels
    return result


def labels_of(values: Tensor) -> Tensor | None:
    """Read the labels that examples or codes carry.

    Args:
        values: Examples or codes.

    Returns:
        Their numbers, (B,), or None if they carry none.
    """
    return values.labels if isinstance(values, Labelled) else None


def unlabelled(values: Tensor) -> Tensor:
    r"""Take the labels off.

    Args:
        values: Examples or codes, (B, \*).

    Returns:
        The same values, which carry no labels.

    Example:
        >>> z = labelled(torch.zeros(3, 2), torch.tensor([0, 1, UNKNOWN]))
        >>> labels_of(unlabelled(z)) is None
        True
    """
    return values.as_subclass(Tensor)


def has_label(values: Tensor) -> Bool[Tensor, " batch"]:
    r"""Tell whose label is known.

    Args:
        values: Examples or codes, (B, \*).

    Returns:
        True where there is a label, (B,).
    """
    labels = labels_of(values)
    if labels is None:
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    return labels >= 0


def joined(parts: Sequence[Tensor]) -> Tensor:
    r"""Put batches of examples or codes one behind the other, with the labels that they carry.

    Args:
        parts: The batches, (B, \*) each. Either all carry labels, or none does.

    Returns:
        All rows, (N, \*).
    """
    known = [numbers for numbers in map(labels_of, parts) if numbers is not None]
    return labelled(torch.cat(list(parts)), torch.cat(known) if known else None)


def one_hot(values: Tensor, n_labels: int) -> Float[Tensor, "batch labels"]:
    r"""Write the labels that examples or codes carry as networks read them.

    Args:
        values: Examples or codes, (B, \*).
        n_labels: Number of labels L.

    Returns:
        One at the number of the label, and zeros, (B, L). Zeros alone where it is unknown.
    """
    labels = labels_of(values)
    if labels is None:
        return values.new_zeros(len(values), n_labels)
    return nn.functional.one_hot(labels + 1, n_labels + 1)[:, 1:].to(values.dtype)


def withhold(x: Tensor, is_withheld: Tensor) -> Tensor:
    r"""Make the labels of some examples unknown.

    Args:
        x: Examples that carry labels, (B, \*).
        is_withheld: True for those whose label is withheld, (B,).

    Returns:
        The same examples.
    """
    labels = labels_of(x)
    return x if labels is None else labelled(x, labels.masked_fill(is_withheld, UNKNOWN))


def label_number(names: tuple[str, ...], name: str) -> int:
    """Find the number of a label.

    Args:
        names: The labels of a model.
        name: The label that is sought.

    Returns:
        Its number, from 0.

    Raises:
        ValueError: If there is no such label. The message lists those that there are.

    Example:
        >>> label_number(("cat", "dog"), "dog")
        1
    """
    if not names:
        raise ValueError("the model has no labels: train it with some, see docs/guides/labels.md")
    if name not in names:
        shown = ", ".join(names[:50]) + (", ..." if len(names) > 50 else "")
        raise ValueError(f"there is no label {name!r}; choose from {shown}")
    return names.index(name)


def numbers_of(labels: Tensor, n_labels: int) -> Int64[Tensor, " labels"]:
    """Count the examples of each label.

    Args:
        labels: Numbers of labels, (N,), with :data:`UNKNOWN` for some.
        n_labels: Number of labels L.

    Returns:
        The counts, (L,).
    """
    return torch.bincount(labels[labels >= 0], minlength=n_labels)
