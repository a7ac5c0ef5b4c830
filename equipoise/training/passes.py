"""One pass over a split of the data, in model units, with draws that every process agrees on."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from equipoise.data import ExampleSet, batches_of
from equipoise.gaussian import SharedGenerator
from equipoise.model import VAE, PowerScaling
from equipoise.objectives import Elbo, Terms
from equipoise.processes import Processes
from equipoise.residuals import AllReduce

EVALUATION_BATCH = 500
"""Examples per batch where nothing is trained, over all processes."""


class SplitPass:
    """This process's part of a split, to go through as often as needed.

    A batch's random draws do not depend on the number of processes.

    Args:
        model: The model whose units the batches are in.
        examples: One split of the data.
        batch_size: Examples per batch, over all processes.
        processes: This process among those that share the work.
        seed: Shuffle by this seed and the epoch. None keeps the order of the examples.
    """

    def __init__(
        self,
        model: VAE,
        examples: ExampleSet,
        batch_size: int,
        processes: Processes,
        *,
        seed: int | None = None,
    ) -> None:
        self.model = model
        self.processes = processes
        self.device = model.scaling.scale.device
        self._mean_log_slope: float | None = None
        self.batches = batches_of(
            examples,
            math.ceil(batch_size / processes.size),
            self.device,
            seed=seed,
            rank=processes.rank,
            world_size=processes.size,
        )

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    @property
    def n_examples(self) -> int:
        """Number of examples, over all processes."""
        return self.batches.n

    @torch.no_grad()
    def mean_log_slope(self, all_reduce: AllReduce) -> float:
        """Mean log-slope of the power transform, by which a bound becomes one of the raw data.

        Args:
            all_reduce: Sums over processes.

        Returns:
            Nats per example, 0 without a transform.
        """
        if not isinstance(self.model.scaling, PowerScaling):
            return 0.0
        if self._mean_log_slope is None:
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for raw in self.batches.epoch(0, 0):
                total += self.model.scaling.log_transform_slope(raw).double().sum()
            self._mean_log_slope = float(all_reduce(total)) / self.n_examples
        return self._mean_log_slope

    def size(self, batch: int) -> int:
        """Return the number of examples in a batch, over all processes.

        Args:
            batch: Number of the batch, from 0.

        Returns:
            The number; the last batch may have fewer.
        """
        return self.batches.size(batch)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        r"""Go through the split once.

        Args:
            epoch: Number of the pass, which decides on the order.
            start: Number of batches to leave out.

        Yields:
            Data in model units, in the memory layout of the model, (B, \*).
        """
        memory_format = self.model.memory_format

        for raw in self.batches.epoch(epoch, start):
            x: Tensor = self.model.scaling(raw)
            if memory_format is torch.channels_last:
                x = x.contiguous(memory_format=memory_format)
            yield x

    def draws(self, generator: torch.Generator, batch: int) -> SharedGenerator:
        """Return the source of a batch's draws.

        Args:
            generator: Generator that all processes have in the same state.
            batch: Number of the batch, from 0.

        Returns:
            The source of this process's share of the draws.
        """
        rank, size = self.processes.rank, self.processes.size
        return SharedGenerator(generator, self.size(batch), rank, size)

    @torch.no_grad()
    def terms(self, model: VAE, generator: torch.Generator) -> Iterator[Terms]:
        """Evaluate the evidence lower bound of every batch, with the networks standing still.

        Args:
            model: The model to evaluate, which is in training mode before and afterwards.
            generator: Source of one sample of z per example.

        Yields:
            The terms of the bound, per example.
        """
        objective = Elbo(model).eval()

        for batch, x in enumerate(self.epoch()):
            yield objective(x, self.draws(generator, batch))

        objective.train()
