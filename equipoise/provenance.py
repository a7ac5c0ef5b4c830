"""What stands beside every figure: command, data, seed, versions, machine and date."""

import datetime
import itertools
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.data import Data

VERSIONED = ("equipoise", "torch", "lightning-fabric", "numpy", "scikit-learn", "safetensors")
PLACES = {"--data-dir": "DATA", "--run": "RUN", "--runs": "RUNS", "--models": "MODELS"}
"""Options whose values are nobody's concern: where data and runs lie on this machine."""


def versions() -> dict[str, str]:
    """Versions of what a figure depends on.

    Returns:
        By name, Python's included.
    """
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}}


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command that is running, as another person would type it.

    Args:
        arguments: of the process if None, program first.

    Returns:
        One line, without the paths of this machine.
    """
    program, *rest = sys.argv if arguments is None else arguments
    name = os.path.basename(program)
    start = (
        ["python", os.path.relpath(program)]
        if name.endswith(".py") and name != "__main__.py"
        else ["equipoise"]
    )
    pairs = itertools.pairwise(["", *rest])
    return shlex.join([*start, *(PLACES.get(before, argument) for before, argument in pairs)])


def machine() -> str:
    """What the figures were computed on.

    Returns:
        Graphics processor, if any, and processor cores.
    """
    import torch

    cores = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return f"{torch.cuda.get_device_name()}, {cores}" if torch.cuda.is_available() else cores


def data_record(data: "Data") -> dict[str, Any]:
    """What tells one data set from another.

    Args:
        data: the set.

    Returns:
        JSON values.
    """
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "n_train": len(data.train),
        "n_validation": len(data.validation),
        "n_test": len(data.test),
    }


def provenance(data: "Data | None" = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Say where a figure comes from.

    Args:
        data: what it was measured on.
        options: what it was measured with.

    Returns:
        JSON values, to stand beside the figure.
    """
    return {
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        **({} if data is None else {"data": data_record(data)}),
        **({} if options is None else {"options": options}),
    }
