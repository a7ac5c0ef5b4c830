"""Several processes, each with a part of the examples, that exchange values by sums alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those that work together.

    All processes must call the same methods in the same order.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
        all_reduce: Function that returns the sum of a tensor over all processes, in all of them. It
            may sum in place. The tensors are on the device of the examples, and their dtype is
            int64 or float64.

    Raises:
        ValueError: If the rank is not in the range from 0 to ``size`` - 1.

    Example:
        With ``torch.distributed``, after its process group is initialised:

        >>> from torch import distributed
        >>> def all_reduce(values):
        ...     distributed.all_reduce(values)
        ...     return values
        >>> def processes():
        ...     return Processes(distributed.get_rank(), distributed.get_world_size(), all_reduce)

        With Lightning Fabric:

        >>> from functools import partial
        >>> def processes(fabric):
        ...     all_reduce = partial(fabric.all_reduce, reduce_op="sum")
        ...     return Processes(fabric.global_rank, fabric.world_size, all_reduce)
    """

    rank: int
    size: int
    all_reduce: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"expected a rank from 0 to below size = {self.size}, got {self.rank}")

    def broadcast(self, values: Tensor) -> Tensor:
        """Return the values of rank 0, in all processes.

        Args:
            values: Tensor of the same shape and dtype in all processes.

        Returns:
            A new tensor.
        """
        own = values.clone(memory_format=torch.contiguous_format)
        if self.rank != 0:
            own.zero_()
        return self.all_reduce(own)

    def counts(self, n: int, device: torch.device) -> list[int]:
        """Tell all processes how many examples each of them has.

        Args:
            n: Number of examples in this process.
            device: Device of the tensor that is summed.

        Returns:
            The numbers of examples, in the order of the ranks.

        Raises:
            ValueError: If the ranks are not 0, 1, ..., ``size`` - 1.
        """
        own = torch.zeros(2, self.size, dtype=torch.int64, device=device)
        own[0, self.rank] = 1
        own[1, self.rank] = n

        present, counts = self.all_reduce(own).tolist()
        if present != [1] * self.size:
            raise ValueError(
                f"expected one process of each rank from 0 to {self.size - 1}, got {present}"
            )
        return counts  # type: ignore[no-any-return]

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of the ranks, in all of them.

        Args:
            values: Rows of this process, (n, ...). n may differ between processes.

        Returns:
            All rows, (n_0 + n_1 + ..., ...).
        """
        counts = self.counts(len(values), values.device)
        first = sum(counts[: self.rank])

        rows = values.new_zeros(sum(counts), *values.shape[1:])
        rows[first : first + len(values)] = values

        return self.all_reduce(rows)

    def share(self, n: int, counts: list[int]) -> int:
        """Return the share of this process in a selection of n examples.

        The shares are in proportion to the numbers of examples.

        Args:
            n: Number of examples in the selection. If there are fewer, the selection is all of
                them.
            counts: Number of examples in each process.

        Returns:
            The number of examples from this process. The shares of all processes add up to n.
        """
        total = sum(counts)
        before = sum(counts[: self.rank])
        n = min(n, total)

        first = n * before // total
        last = n * (before + counts[self.rank]) // total
        return last - first


ALONE = Processes(rank=0, size=1, all_reduce=lambda values: values)
"""A single process that has all examples."""


def choose_device(accelerator: Literal["auto", "cpu", "cuda"] = "auto") -> torch.device:
    """Choose the device on which one process computes.

    Args:
        accelerator: Option of that name. "auto" takes a CUDA GPU where there is one. It never takes
            Apple's MPS, which has no float64, the type in which eq. (10) is summed.

    Returns:
        The CPU, or the current CUDA GPU.

    Raises:
        ValueError: if CUDA is asked for and absent.
    """
    has_cuda = torch.cuda.is_available()
    if accelerator == "cuda" and not has_cuda:
        raise ValueError(
            "accelerator=cuda, but torch finds no CUDA GPU; use accelerator=auto or cpu."
        )

    if accelerator == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
