"""Checkpoints: everything that a run needs to go on as if it had never stopped.

The state is a tree of dictionaries, lists, numbers and tensors, and becomes one safetensors file.
The tensors are stored under their path in the tree, and everything else is stored in the file's
JSON description, so that nothing is pickled. Each file is written as a whole. The last two files
are kept, so that there is still one if the newest is damaged. A damaged file is kept under another
name.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import torch
from msgspec import Meta
from torch import Tensor

from equipoise.files import StoreError, is_ours, own_outputs, remove, set_aside
from equipoise.records import Count, Digest, JsonObject, NoiseRecord
from equipoise.store import read_tensors, write_tensors

KEPT = 2
"""Number of checkpoints that are kept."""
MAX_DEPTH = 50
"""Deepest level of the tree of a checkpoint."""


class CheckpointState(TypedDict):
    """What the trainer writes into a checkpoint, beside its tensors."""

    position: Annotated[list[Count], Meta(min_length=4, max_length=4)]
    schedule: dict[str, Any]
    history: list[dict[str, Any]]
    noise: NoiseRecord
    model: dict[str, Any]
    descent: dict[str, Any] | None
    best: NotRequired[dict[str, Any] | None]
    threads: NotRequired[Annotated[int, Meta(ge=1)]]
    config: dict[str, Any]
    fingerprint: Digest
    digest: Digest


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
    own_outputs(folder)
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "", tensors)
    path = folder / f"step-{steps_done:09d}.safetensors"
    write_tensors(path, "checkpoint", tensors, tree)

    # Of the files that this run has written; what else lies there is somebody else's.
    for old in [file for file in _files(folder) if is_ours(file)][:-KEPT]:
        remove(old)
    return path


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is not damaged. Newer ones that are damaged are set aside.

    Args:
        folder: Folder of the checkpoints, usually RUN/checkpoints.

    Returns:
        The checkpoint, with its tensors on the CPU. None if there is no checkpoint yet.

    Raises:
        StoreError: If all checkpoints are damaged.
    """
    damaged: dict[Path, StoreError] = {}
    for path in reversed(_files(folder)):
        try:
            tensors, tree = read_tensors(path, "checkpoint", JsonObject)
            state = _unflatten(tree, tensors, str(path))
            if not isinstance(state, dict):
                raise StoreError(f"{path} does not hold the state of a training.")
        except StoreError as error:
            damaged[path] = error
            continue

        return Checkpoint(path, state, [_keep(file, error) for file, error in damaged.items()])

    set_aside_before = sorted(folder.glob("step-*.damaged*"))
    if damaged or set_aside_before:
        reasons = [str(error) for error in damaged.values()] + [
            f"{file} was set aside before." for file in set_aside_before
        ]
        raise StoreError(
            "Every checkpoint is damaged; train anew into another folder.\n  "
            + "\n  ".join(reasons)
        )
    return None


def _keep(path: Path, error: StoreError) -> str:
    """Give a damaged checkpoint another name, if this run has written it, and say so."""
    if not is_ours(path):
        return str(error)
    return f"{error} It is kept as {set_aside(path)}."


def digest_of(tree: Any) -> str:  # noqa: ANN401 (a tree)
    """Digest of a tree of tensors and plain values, whatever device and layout the tensors have.

    Args:
        tree: A tree of dictionaries, lists, tuples, numbers, strings and tensors.

    Returns:
        SHA-256, hexadecimal.
    """
    tensors: dict[str, Tensor] = {}
    values = _flatten(tree, "", tensors)
    digest = hashlib.sha256(json.dumps(values).encode())

    for name, tensor in tensors.items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    if not folder.is_dir():
        return []
    return sorted(
        file for file in folder.iterdir() if re.fullmatch(r"step-\d{9,}\.safetensors", file.name)
    )


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


def _unflatten(
    node: Any,  # noqa: ANN401 (JSON)
    tensors: dict[str, Tensor],
    what: str,
    depth: int = 0,
) -> Any:  # noqa: ANN401 (any value of a tree)
    """Turn what :func:`_flatten` returned back into the tree."""
    if not isinstance(node, dict) or len(node) != 1 or depth > MAX_DEPTH:
        raise StoreError(f"{what} does not hold the tree of a checkpoint.")
    ((kind, content),) = node.items()

    if kind == "value" and (content is None or isinstance(content, bool | int | float | str)):
        return content
    if kind == "tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]

    if kind == "dict" and isinstance(content, list):
        pairs = {}
        for pair in content:
            is_pair = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int | str)
            if not is_pair:
                raise StoreError(f"{what} does not hold the tree of a checkpoint.")
            pairs[pair[0]] = _unflatten(pair[1], tensors, what, depth + 1)
        return pairs

    if kind in ("list", "tuple") and isinstance(content, list):
        values = [_unflatten(value, tensors, what, depth + 1) for value in content]
        return tuple(values) if kind == "tuple" else values
    raise StoreError(f"{what} does not hold the tree of a checkpoint.")
