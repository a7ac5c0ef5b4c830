"""How many threads a training computes with on the CPU: one where its steps are small.

Every operation waits for its slowest thread. Where a step takes a millisecond, this costs more than
the other threads save, and on a shared machine, whose threads are taken away now and then, it costs
many times the step. The number follows from the size of a step alone and not from a measurement,
because sums are rounded differently by another number of threads: the same training on the same
machine has to give the same bits, whatever else the machine does.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from equipoise.config import TrainConfig
from equipoise.model import VAE

OPERATIONS = 2e8
"""Floating-point operations of a forward pass from which on all threads are used; see the figures
of ``benchmarks/threads.py``."""
GIVEN = "OMP_NUM_THREADS"
"""Environment variable that decides where it is set."""
# Read once, because the engine sets it for the processes that it starts.
_given = os.environ.get(GIVEN)


def choose_threads(model: VAE, config: TrainConfig, batch_size: int) -> tuple[int, str]:
    """Choose the number of threads of a training.

    Args:
        model: The model, on the device of the training.
        config: Option ``threads``, which wins over OMP_NUM_THREADS, which wins over the rule.
        batch_size: Examples of a step in this process.

    Returns:
        The number, and a sentence about it, which is empty if there was nothing to choose.
    """
    every = torch.get_num_threads()
    if config.threads is not None:
        return config.threads, f"Threads: {config.threads}."
    if _given or every == 1 or model.scaling.scale.device.type != "cpu":
        return every, ""

    operations = step_operations(model, batch_size)
    size = f"{operations / 1e6:,.0f} million operations of the networks in a step"
    if operations < OPERATIONS:
        return 1, f"Threads: 1, because of only {size}; --threads sets another number."
    return every, f"Threads: {every}, because of {size}; --threads sets another number."


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Compute with a number of threads on the CPU within a block.

    Args:
        threads: The number.

    Yields:
        None.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def step_operations(model: VAE, batch_size: int) -> int:
    """Count the floating-point operations of a forward pass through encoder and decoder.

    Those of matrix products and convolutions are counted, two for a product and its sum.

    Args:
        model: The model. It is evaluated on an example of zeros.
        batch_size: Examples of a step.

    Returns:
        The number.
    """
    was_training = model.training
    model.eval()
    example = torch.zeros(1, *model.shape, device=model.scaling.scale.device)
    with FlopCounterMode(display=False) as counter:
        model.decode_mean(model.encode(example).mean)
    model.train(was_training)
    of_example: int = counter.get_total_flops()
    return batch_size * of_example
