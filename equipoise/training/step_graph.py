"""A training step as one CUDA graph, so that the host starts one graph and not every kernel.

The networks of small images leave a GPU idle most of the time: a step is many small kernels, and
Python needs longer to start them than the GPU to run them. A graph is recorded once and replayed
with each batch. It runs the same kernels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Steps that are taken as usual before the first is recorded: libraries choose their kernels in
them, and the optimiser makes its moments."""


class StepGraph:
    r"""Takes steps, by a CUDA graph from the fourth on.

    Only batches of the full size are recorded and replayed. Others are taken as usual.

    Args:
        work: Takes a step with a batch, (B, \*), and returns figures that stay on the device. All
            that it computes must be done by the device: what it does in Python happens only when
            it is recorded.
        batch_size: Number of examples in a full batch.
        generator: Source of all random numbers in ``work``, on the GPU.
        say: Called with a sentence if a step cannot be recorded. The steps are then taken as usual.
    """

    def __init__(
        self,
        work: Callable[[Tensor], Tensor],
        batch_size: int,
        generator: torch.Generator,
        say: Callable[[str], None],
    ) -> None:
        self.work = work
        self.batch_size = batch_size
        self.generator = generator
        self.say = say
        self.n_usual = 0
        self.is_possible = True
        self.graph: torch.cuda.CUDAGraph | None = None
        self.x: Tensor
        self.figures: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        r"""Take a step.

        Args:
            x: The batch, (B, \*).

        Returns:
            The figures, which later steps leave as they are.
        """
        is_replayed = self.is_possible and len(x) == self.batch_size
        if self.n_usual < WARM_UP or not is_replayed:
            self.n_usual += 1
            return self.work(x)

        graph = self.graph
        if graph is None:
            states = [generator.get_state() for generator in self._generators()]
            try:
                graph = self.graph = self._record(x)
            except RuntimeError as error:
                self.is_possible = False
                self._mend_generators(states)
                reason = str(error).partition("\n")[0]
                self.say(f"Training steps cannot be replayed as a CUDA graph ({reason}).")
                return self.work(x)

        self.x.copy_(x)
        graph.replay()
        return self.figures.clone()

    def _record(self, x: Tensor) -> torch.cuda.CUDAGraph:
        """Record a step, which does not take it."""
        self.x = x.clone(memory_format=torch.preserve_format)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)

        with torch.cuda.graph(graph):
            self.figures = self.work(self.x)
        return graph

    def _generators(self) -> list[torch.Generator]:
        """Return the generators that take part in a recording: ours, and the device's."""
        return [self.generator, torch.cuda.default_generators[self.generator.device.index or 0]]

    def _mend_generators(self, states: list[Tensor]) -> None:
        """Let the generators draw again, which they refuse after a recording that has failed."""
        for generator, state in zip(self._generators(), states, strict=True):
            fresh = torch.Generator(generator.device)
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
