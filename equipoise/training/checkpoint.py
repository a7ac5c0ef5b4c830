"""Checkpoints: everything that a run needs to go on as if it had never stopped.

The state is a tree of dictionaries, lists, numbers and tensors, and becomes one safetensors file.
The tensors are stored under their path in the tree, and everything else is stored in the file's
JSON description, so that nothing is pickled. Each file is written as a whole. The last two files
are kept, so that there is still one if the newest is damaged.
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from equipoise.store import StoreError, read_tensors, write_tensors

KEPT = 2
"""Number of checkpoints that are kept."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read.

    Args:
        path: The file.
        state: The tree that was saved.
        refused: Messages about newer checkpoints that are damaged, one for each.
    """

    path: Path
    state: dict[str, Any]
    refused: list[str]


def save_checkpoint(folder: Path, steps_done: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint, then remove all but the last two.

    Args:
        folder: Folder of the checkpoints, usually RUN/checkpoints.
        steps_done: Number of optimiser steps since the start, which names the file.
        state: A tree of dictionaries, lists, tuples, numbers, strings and tensors.

    Returns:
        The file.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "", tensors)
    path = folder / f"step-{steps_done:09d}.safetensors"
    write_tensors(path, "checkpoint", tensors, tree)

    for old in _files(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is not damaged.

    Args:
        folder: Folder of the checkpoints, usually RUN/checkpoints.

    Returns:
        The checkpoint, with its tensors on the CPU. None if there is no checkpoint yet.

    Raises:
        StoreError: If all checkpoints are damaged.
    """
    refused: list[str] = []
    for path in reversed(_files(folder)):
        try:
            tensors, tree = read_tensors(path, "checkpoint")
        except StoreError as error:
            refused.append(str(error))
            continue
        return Checkpoint(path, _unflatten(tree, tensors), refused)

    if refused:
        reasons = "\n  ".join(refused)
        raise StoreError(
            f"Every checkpoint is damaged; train anew into another folder.\n  {reasons}"
        )
    return None


def has_checkpoint(folder: Path) -> bool:
    """Tell whether there is a checkpoint, damaged or not.

    Args:
        folder: Folder of the checkpoints, usually RUN/checkpoints.

    Returns:
        True if there is one.
    """
    return bool(_files(folder))


def _files(folder: Path) -> list[Path]:
    """Checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def _flatten(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 (JSON)
    """Turn a tree into JSON values, and collect its tensors by their path.

    Dictionaries become lists of pairs, because optimisers use integer keys, which JSON lacks.
    """
    if isinstance(node, Tensor):
        # A copy, because safetensors refuses tensors that share memory.
        tensors[path] = node.detach().cpu().clone()
        return {"tensor": path}

    if isinstance(node, dict):
        pairs = [[key, _flatten(value, f"{path}/{key}", tensors)] for key, value in node.items()]
        return {"dict": pairs}

    if isinstance(node, list | tuple):
        kind = "tuple" if isinstance(node, tuple) else "list"
        return {kind: [_flatten(value, f"{path}/{i}", tensors) for i, value in enumerate(node)]}

    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise TypeError(
        f"A checkpoint holds tensors and plain values only, {path} is a {type(node).__name__}."
    )


def _unflatten(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 (JSON)
    """Turn what :func:`_flatten` returned back into the tree."""
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in content}
    if kind == "value":
        return content

    values = [_unflatten(value, tensors) for value in content]
    return tuple(values) if kind == "tuple" else values
