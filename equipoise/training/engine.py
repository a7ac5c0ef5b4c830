"""The engine, Lightning Fabric: the device, the processes, and what the processes exchange.

All functions work in the same way with a single process, where they cost nothing.
"""

import atexit
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from equipoise.config import TrainConfig
from equipoise.processes import Processes, choose_device
from equipoise.training.exchange import MAX_BYTES, Message, blank_tensors, pack, unpack
from equipoise.training.group import STARTER, Group

T = TypeVar("T")


def make_fabric(config: TrainConfig) -> Fabric:
    """Make the engine. Its other processes are started by :func:`launch`.

    Args:
        config: Options ``accelerator``, ``precision``, ``devices`` and ``num_nodes``. ``torchrun``
            and ``fabric run`` have started the processes already, and decide on their number.

    Returns:
        Fabric, with distributed data parallelism if there are several processes.

    Raises:
        ValueError: If the configuration needs CUDA, and there is no CUDA device.
    """
    accelerator = choose_device(config.accelerator).type
    num_nodes = config.num_nodes
    devices = config.devices
    if devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "cuda" else 1

    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices

    with warnings.catch_warnings():
        # Fabric proposes srun wherever it is installed, whoever starts the processes.
        warnings.filterwarnings("ignore", "The `srun` command is available", UserWarning)
        return Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            precision=config.precision,
            strategy=Group() if devices * num_nodes > 1 else "auto",
        )


def launch(fabric: Fabric, say: Callable[[str], None] = lambda text: None) -> None:
    """Start the other processes on this machine, and connect to those on other machines.

    Each of them runs the command of this program. ``fabric run`` has started them already.

    Args:
        fabric: The engine.
        say: Called with a sentence about the machines that this one waits for.

    Raises:
        TimeoutError: If not all processes have come in time.
        ConnectionError: If the processes cannot reach each other.
    """
    if isinstance(fabric.strategy, Group):
        waits_for = fabric.strategy.waits_for()
        if waits_for and fabric.strategy.local_rank == 0:
            say(waits_for)
        if "LOCAL_RANK" not in os.environ:
            os.environ[STARTER] = str(os.getpid())

    if "LT_CLI_USED" not in os.environ:
        fabric.launch()
    if fabric.world_size > 1:
        atexit.register(_leave_group)


def _leave_group() -> None:
    """End the threads by which processes talk, which otherwise may abort a process at its exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_main_process() -> bool:
    """Tell whether this process is the one that writes files and shows progress.

    Returns:
        True in process 0 of a distributed training, and in a single process.
    """
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def all_reduce(fabric: Fabric, values: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
    """Combine a tensor over the processes.

    ``Fabric.all_reduce`` is not used, because it waits for the device at every call.

    Args:
        fabric: The engine.
        values: Tensor of this process. It does not change.
        operation: How the tensors are combined.

    Returns:
        A tensor that is the same in all processes, on the device of ``values``.
    """
    if fabric.world_size == 1:
        return values

    operations = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
    combined = values.to(fabric.device, copy=True)
    torch.distributed.all_reduce(combined, operations[operation])
    return combined.to(values.device)


def all_reduce_with_gradient(fabric: Fabric, values: Tensor) -> Tensor:
    r"""Sum a tensor over the processes, so that gradients pass through the sum.

    Each process has its own loss :math:`L_p(s)` of the sum :math:`s = \sum_p s_p`, and the engine
    averages the gradients of the losses. The gradient of all losses by :math:`s_p` is
    :math:`\sum_q \partial L_q / \partial s`, again a sum over the processes.

    Args:
        fabric: The engine.
        values: Tensor of this process.

    Returns:
        The sum, the same in all processes.
    """
    summed: Tensor = _SumOverProcesses.apply(values, fabric)  # type: ignore[no-untyped-call]
    return summed


class _SumOverProcesses(torch.autograd.Function):
    """A sum over the processes, whose gradient is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, fabric: Fabric) -> Tensor:  # noqa: ANN401
        ctx.fabric = fabric
        return all_reduce(fabric, values.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return all_reduce(ctx.fabric, gradient.contiguous()), None


def processes_of(fabric: Fabric) -> Processes:
    """Describe the processes of the engine to functions that do not know the engine.

    Args:
        fabric: The engine.

    Returns:
        This process among the others.
    """
    return Processes(fabric.global_rank, fabric.world_size, partial(all_reduce, fabric))


def broadcast(fabric: Fabric, value: T) -> T:
    """Tell all processes a value of process 0.

    ``Fabric.broadcast`` is not used, because it unpickles what comes from the network.

    Args:
        fabric: The engine.
        value: Plain values and tensors, see :func:`equipoise.training.exchange.pack`. Those of
            other processes than process 0 are not looked at.

    Returns:
        The value of process 0, in all processes.
    """
    if fabric.world_size == 1:
        return value

    message = pack(value) if fabric.is_global_zero else Message(b"", [])
    length = _send(fabric, torch.tensor([len(message.text)]))
    n_bytes = int(length.item())
    if not 0 < n_bytes <= MAX_BYTES:
        raise ConnectionError(f"process 0 has sent a message of {n_bytes:,} bytes")

    text = torch.zeros(n_bytes, dtype=torch.uint8)
    if fabric.is_global_zero:
        text = torch.frombuffer(bytearray(message.text), dtype=torch.uint8)
    content = _send(fabric, text).numpy().tobytes()

    tensors = message.tensors if fabric.is_global_zero else blank_tensors(content)
    received = [_send(fabric, tensor) for tensor in tensors]
    if fabric.is_global_zero:
        return value
    told: T = unpack(Message(content, received))
    return told


def _send(fabric: Fabric, tensor: Tensor) -> Tensor:
    """Send a tensor of process 0; in the others, it gives the type and shape."""
    if tensor.numel() == 0:
        return tensor

    # As bytes, because not every type can be sent.
    whole = tensor.reshape(-1).view(torch.uint8).to(fabric.device)
    torch.distributed.broadcast(whole, src=0)
    return whole.to(tensor.device).view(tensor.dtype).reshape(tensor.shape)


def in_main_process(fabric: Fabric, action: Callable[[], T]) -> T:
    """Call a function in process 0 only.

    An exception of the function is raised in all processes, so that none waits for another in vain.

    Args:
        fabric: The engine.
        action: The function. Its result can be told to other processes, see
            :func:`equipoise.training.exchange.pack`.

    Returns:
        The result of the function, in all processes.
    """
    if fabric.world_size == 1:
        return action()

    result: T | None = None
    error: Exception | None = None
    if fabric.is_global_zero:
        try:
            result = action()
        except Exception as exception:
            error = exception

    told, told_error = broadcast(fabric, (result, error))
    if error is not None:
        raise error  # as it was raised, with its traceback
    if told_error is not None:
        told_error.is_told = True  # type: ignore[attr-defined] # by process 0, to the user
        raise told_error
    return told  # type: ignore[return-value] # None only if the function has returned None
