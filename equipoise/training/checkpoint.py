"""Checkpoints: everything a run needs to go on as if it had never stopped, in one safetensors file.

The state is a tree of dictionaries, lists, numbers and tensors. Tensors go into the file by their path, the rest
into its JSON description, so nothing is pickled. Files are written whole, and the last two are kept: should the
newest be damaged, the one before it serves.
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from equipoise.store import StoreError, read_tensors, write_tensors

KEPT = 2


class Checkpoint(NamedTuple):
    """A checkpoint that was read.

    Args:
        path: its file.
        state: the tree that was saved.
        refused: damaged newer checkpoints that were passed over, with the reason.
    """

    path: Path
    state: dict[str, Any]
    refused: list[str]


def save_checkpoint(folder: Path, steps_done: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint whole, then remove all but the last two.

    Args:
        folder: usually RUN/checkpoints.
        steps_done: optimiser steps since the start; names the file.
        state: tree of dictionaries, lists, tuples, numbers, strings and tensors.

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
    """Read the newest checkpoint that is whole.

    Args:
        folder: usually RUN/checkpoints.

    Returns:
        The checkpoint, its tensors on the CPU; None if there is none yet.

    Raises:
        StoreError: if all are damaged.
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
        raise StoreError(
            "Every checkpoint is damaged; train anew into another folder.\n  "
            + "\n  ".join(refused)
        )
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


def _flatten(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 (a JSON tree)
    """Replace tensors by their names; dictionaries become pair lists, since optimisers use integer keys."""
    if isinstance(node, Tensor):
        # A copy: safetensors refuses tensors that share memory, as buffers of one storage may.
        tensors[path] = node.detach().cpu().clone()
        return {"tensor": path}
    if isinstance(node, dict):
        return {
            "dict": [
                [key, _flatten(value, f"{path}/{key}", tensors)] for key, value in node.items()
            ]
        }
    if isinstance(node, list | tuple):
        kind = "tuple" if isinstance(node, tuple) else "list"
        return {kind: [_flatten(value, f"{path}/{i}", tensors) for i, value in enumerate(node)]}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise TypeError(
        f"A checkpoint holds tensors and plain values only, {path} is a {type(node).__name__}."
    )


def _unflatten(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 (a JSON tree)
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in content}
    if kind == "value":
        return content
    values = [_unflatten(value, tensors) for value in content]
    return tuple(values) if kind == "tuple" else values
