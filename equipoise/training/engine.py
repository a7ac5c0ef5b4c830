"""The engine, Lightning Fabric: on which device, in how many processes, and what these say to each other.

Everything here is the same with one process, where it costs nothing.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from equipoise.config import TrainConfig
from equipoise.processes import Processes, choose_device

T = TypeVar("T")


def make_fabric(config: TrainConfig) -> Fabric:
    """Make the engine; its other processes begin to exist with :func:`launch`.

    Args:
        config: options ``accelerator``, ``precision``, ``devices`` and ``num_nodes``. Under ``torchrun`` and ``fabric
            run``, which have started the processes already, theirs is the number.

    Returns:
        Fabric, with distributed data parallelism where there is more than one process.

    Raises:
        ValueError: if CUDA is asked for and absent.
    """
    accelerator = choose_device(config.accelerator).type
    devices, num_nodes = config.devices, config.num_nodes
    if devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "cuda" else 1
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        precision=config.precision,
        strategy="ddp" if devices * num_nodes > 1 else "auto",
    )


def launch(fabric: Fabric) -> None:
    """Start the other processes on this machine, each with this program's command, and find those on others.

    Nothing is to be done under ``fabric run``, which has.

    Args:
        fabric: the engine.
    """
    if "LT_CLI_USED" not in os.environ:
        fabric.launch()


def is_main_process() -> bool:
    """Tell whether this process, of all of a distributed training, is the one that writes and shows.

    Returns:
        True in process 0, and without other processes.
    """
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def all_reduce(fabric: Fabric, values: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
    """Combine a tensor over processes.

    Not by ``Fabric.all_reduce``, which waits for the device each time.

    Args:
        fabric: the engine.
        values: of this process; left as they are.
        operation: how.

    Returns:
        The same in all processes.
    """
    if fabric.world_size == 1:
        return values
    combined = values.to(fabric.device, copy=True)
    operations = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
    torch.distributed.all_reduce(combined, operations[operation])
    return combined.to(values.device)


def processes_of(fabric: Fabric) -> Processes:
    """Name the processes to the mathematics, which knows no engine.

    Args:
        fabric: the engine.

    Returns:
        This process among them.
    """
    return Processes(fabric.global_rank, fabric.world_size, partial(all_reduce, fabric))


def in_main_process(fabric: Fabric, action: Callable[[], T]) -> T:
    """Do something in process 0 alone.

    Args:
        fabric: the engine.
        action: what; an error of it is raised in all processes, so that none waits for another in vain.

    Returns:
        What it returned, in all processes.
    """
    if fabric.world_size == 1:
        return action()
    result: T | None = None
    error: Exception | None = None
    if fabric.is_global_zero:
        try:
            result = action()
        except Exception as raised:
            error = raised
    result, error = fabric.broadcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value] # None only if the action's own result is
