"""What one process tells the others: plain values and tensors, as JSON and bytes.

Nothing is pickled, because unpickling what comes from a socket would run code of whoever sent it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equipoise.config import ConfigError
from equipoise.files import StoreError
from equipoise.training.checkpoint import Checkpoint

MAX_BYTES = 2**31
"""Largest size of the plain values of a message: far more than the history of any run."""

NAMED_TUPLES: dict[str, Any] = {"Checkpoint": Checkpoint}
"""Named tuples that may be told."""
ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        StoreError,
        ConfigError,
        ConnectionError,
        TimeoutError,
        OSError,
        ArithmeticError,
        ImportError,
        MemoryError,
        ValueError,
        RuntimeError,
    )
}
"""Errors that may be told. Of others the nearest class that is here is told, or RuntimeError."""


class Message(NamedTuple):
    """What is sent.

    Args:
        text: The plain values as JSON, and the type and shape of each tensor in its place.
        tensors: The tensors, contiguous.
    """

    text: bytes
    tensors: list[Tensor]


def pack(value: object) -> Message:
    """Make a message of a value.

    Args:
        value: None, a number, a string, a path, a tensor, an exception, or a tree of dictionaries,
            lists, tuples and :data:`NAMED_TUPLES` of them.

    Returns:
        The message.

    Raises:
        TypeError: If the value holds anything else.
    """
    tensors: list[Tensor] = []
    text = json.dumps(_flatten(value, tensors)).encode()
    if len(text) > MAX_BYTES:
        raise ValueError(f"a message of {len(text):,} bytes is too large for the other processes")
    return Message(text, tensors)


def blank_tensors(text: bytes) -> list[Tensor]:
    """Make room for the tensors of a message.

    Args:
        text: The plain values of the message.

    Returns:
        Tensors of the right types and shapes, on the CPU.
    """
    tensors: list[Tensor] = []
    _collect(json.loads(text), tensors)
    return tensors


def unpack(message: Message) -> Any:  # noqa: ANN401 (any value that was packed)
    """Read a message.

    Args:
        message: What :func:`pack` returned.

    Returns:
        The value.
    """
    return _unflatten(json.loads(message.text), iter(message.tensors))


def _flatten(value: object, tensors: list[Tensor]) -> Any:  # noqa: ANN401 (JSON)
    """Turn a tree into JSON values: each is a pair of its kind and its content."""
    if value is None or isinstance(value, bool | int | float | str):
        return ["value", value]
    if isinstance(value, Path):
        return ["path", str(value)]
    if isinstance(value, Tensor):
        tensors.append(value.detach().contiguous())
        return ["tensor", [str(value.dtype).removeprefix("torch."), list(value.shape)]]
    if isinstance(value, dict):
        # Pairs, because JSON has no keys other than strings.
        return ["dict", [[_flatten(k, tensors), _flatten(v, tensors)] for k, v in value.items()]]
    if isinstance(value, Exception):
        return ["error", _describe(value)]

    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        if hasattr(value, "_fields"):
            kind = type(value).__name__
        if kind in ("list", "tuple") or kind in NAMED_TUPLES:
            return [kind, [_flatten(part, tensors) for part in value]]

    raise TypeError(f"processes tell each other plain values and tensors, not {type(value)}")


def _unflatten(node: Any, tensors: Any) -> Any:  # noqa: ANN401 (JSON)
    """Turn what :func:`_flatten` returned back into the tree."""
    kind, content = node
    if kind == "value":
        return content
    if kind == "path":
        return Path(content)
    if kind == "tensor":
        return next(tensors)
    if kind == "error":
        return _build_error(*content)
    if kind == "dict":
        return {_unflatten(key, tensors): _unflatten(value, tensors) for key, value in content}

    parts = [_unflatten(part, tensors) for part in content]
    if kind == "list":
        return parts
    return tuple(parts) if kind == "tuple" else NAMED_TUPLES[kind](*parts)


def _collect(node: Any, tensors: list[Tensor]) -> None:  # noqa: ANN401 (JSON)
    """Make room for the tensors of a tree, in the order in which they are sent."""
    kind, content = node
    if kind == "tensor":
        name, shape = content
        dtype = getattr(torch, name)
        tensors.append(torch.empty(shape, dtype=dtype))
    elif kind == "dict":
        for pair in content:
            for part in pair:
                _collect(part, tensors)
    elif kind not in ("value", "path", "error"):
        for part in content:
            _collect(part, tensors)


def _describe(error: Exception) -> list[Any]:
    """The class of an error that the others know, and what it is made from."""
    name = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS), None)
    if isinstance(error, ConfigError):
        return ["ConfigError", [error.problems]]
    if isinstance(error, OSError) and error.errno is not None:
        file = None if error.filename is None else str(error.filename)
        return ["OSError", [error.errno, str(error.strerror), file]]
    if name is None:
        return ["RuntimeError", [f"{type(error).__name__}: {error}"]]
    return [name, [str(error)]]


def _build_error(name: str, arguments: list[Any]) -> Exception:
    """An error of one of the classes that may be told."""
    return ERRORS[name](*arguments)
