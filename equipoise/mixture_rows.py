"""Codes as EM reads them: in chunks, from memory or from disk, all or those of a mask."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from equipoise.gaussian import Gaussian
from equipoise.processes import Processes


@runtime_checkable
class Codes(Protocol):
    """N codes of dimension d: a tensor, an array, or an object with a shape and slices of rows."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, d)."""

    def __getitem__(self, rows: slice, /) -> Any:  # noqa: ANN401 - or an array
        """Return a slice of rows."""


@dataclass(frozen=True)
class Rows:
    """The codes (or posteriors) of this process, or those that a mask selects, read in chunks.

    Args:
        codes: Codes, or means of posteriors, (N, d).
        log_vars: Log-variances of the posteriors, (N, d). None for codes.
        chunk_size: Number of rows that are read at once.
        device: Device of what is read.
        count: Number of rows that are selected.
        mask: The rows that are selected, (N,), on the CPU. None selects all.
    """

    codes: Codes
    log_vars: Codes | None
    chunk_size: int
    device: torch.device
    count: int
    mask: Tensor | None = None

    @classmethod
    def of(
        cls,
        codes: Codes,
        log_vars: Codes | None,
        chunk_size: int | None,
        device: torch.device | str | None,
    ) -> "Rows":
        """Select all rows.

        Args:
            codes: Codes, or means of posteriors, (N, d).
            log_vars: Log-variances of the posteriors, (N, d). None for codes.
            chunk_size: Number of rows that are read at once. None means 2048 on the CPU, because of
                its caches, and 16384 on other devices.
            device: Device of what is read. None means that of the codes.

        Returns:
            The rows.

        Raises:
            ValueError: If a shape or the size of the chunks cannot be.
        """
        shape = tuple(codes.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"expected codes of shape (N, d), neither zero, got {shape}; "
                "flatten each to a vector"
            )
        if log_vars is not None and tuple(log_vars.shape) != shape:
            raise ValueError(
                f"expected log_vars of the codes' shape {shape}, got {tuple(log_vars.shape)}"
            )

        if device is None:
            device = codes.device if isinstance(codes, Tensor) else "cpu"
        device = torch.device(device)

        if chunk_size is None:
            chunk_size = 2048 if device.type == "cpu" else 16384
        if chunk_size < 1:
            raise ValueError(f"expected chunk_size >= 1, got {chunk_size}")

        return cls(codes, log_vars, min(chunk_size, shape[0]), device, shape[0])

    @property
    def dim(self) -> int:
        """Dimension d of a code."""
        return self.codes.shape[1]

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Read the rows.

        Yields:
            Codes, and log-variances if there are any, (B, d) each, float64.
        """
        for first in range(0, self.codes.shape[0], self.chunk_size):
            part = slice(first, first + self.chunk_size)

            mask = None
            if self.mask is not None:
                mask = self.mask[part]
                if not mask.any():
                    continue

            log_vars = None
            codes = _to_float64(self.codes[part], mask, self.device)
            if self.log_vars is not None:
                log_vars = _to_float64(self.log_vars[part], mask, self.device)
            yield codes, log_vars

    def chunks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Read the rows.

        Yields:
            Codes, and variances if there are any, (B, d) each, float64.
        """
        for codes, log_vars in self.parts():
            yield codes, None if log_vars is None else log_vars.exp()

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """Read all rows at once.

        Args:
            generator: Source of randomness, for one sample of each posterior.

        Returns:
            The codes, (count, d), float64.
        """
        samples = [self._none()]
        for z, log_var in self.parts():
            if log_var is not None:
                z = Gaussian(z, log_var).sample(generator)
            samples.append(z)

        return torch.cat(samples)

    def load(self) -> "Rows":
        """Read all rows into memory.

        Returns:
            The same rows.
        """
        codes = [self._none()]
        log_vars = []
        for z, log_var in self.parts():
            codes.append(z)
            if log_var is not None:
                log_vars.append(log_var)

        return replace(
            self,
            codes=torch.cat(codes),
            log_vars=torch.cat(log_vars) if log_vars else None,
            mask=None,
        )

    def split(self, n: int, generator: torch.Generator | None) -> tuple["Rows", "Rows"]:
        """Split into random rows and the others.

        Args:
            n: Number of random rows; all if there are fewer.
            generator: Source of randomness.

        Returns:
            The random rows, and the others.
        """
        n = min(n, self.count)
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(self.count, generator=generator, device=device)

        mask = torch.zeros(self.count, dtype=torch.bool)
        mask[order[:n].cpu()] = True
        rest = ~mask

        if self.mask is not None:
            # Both masks are over the rows in use. Extend them to all rows.
            none = torch.zeros_like(self.mask)
            mask = none.masked_scatter(self.mask, mask)
            rest = none.masked_scatter(self.mask, rest)

        return replace(self, mask=mask, count=n), replace(self, mask=rest, count=self.count - n)

    def _none(self) -> Tensor:
        return torch.empty(0, self.dim, dtype=torch.float64, device=self.device)


def split_rows(
    rows: Rows, n: int, processes: Processes, generator: torch.Generator | None
) -> tuple[Rows, Rows]:
    """Split the rows of all processes into random ones and the others.

    Args:
        rows: The rows of this process.
        n: Number of random rows, over all processes.
        processes: The processes.
        generator: Source of randomness.

    Returns:
        This process's random rows, and its others.
    """
    counts = processes.counts(rows.count, rows.device)
    return rows.split(processes.share(n, counts), generator)


def _to_float64(
    values: Any,  # noqa: ANN401 - a tensor or an array
    mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Return the rows, or those that a mask selects, on the device."""
    if isinstance(values, Tensor):
        rows = values.detach()
        if mask is not None:
            rows = rows[mask]
        return rows.to(device, torch.float64)

    array = np.asarray(values)
    if mask is not None:
        array = array[mask.numpy()]

    # np.array makes a copy. Without it torch warns of arrays that are read-only, such as
    # memory-mapped ones.
    rows = torch.from_numpy(np.array(array, np.float64))
    if device.type == "cuda":
        # Pinned memory lets the copy to the device and the work there go on while the next chunk is
        # read.
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)
