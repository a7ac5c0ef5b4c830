"""Where a figure comes from: its command, data, versions, machine and date.

This record stands beside every figure in a JSON file.
"""

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
"""Options whose values are paths on this machine, and the words that stand for them."""


def versions() -> dict[str, str]:
    """Versions of the software that a figure depends on.

    Returns:
        The versions by name, including Python's.
    """
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}}


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command that is running, as another person would type it.

    Args:
        arguments: The arguments of a process, the program first; if None, those of this process.

    Returns:
        One line, without the paths of this machine.
    """
    program, *rest = sys.argv if arguments is None else arguments
    name = os.path.basename(program)

    words = ["equipoise"]
    if name.endswith(".py") and name != "__main__.py":
        words = ["python", os.path.relpath(program)]

    for option, argument in itertools.pairwise(["", *rest]):
        words.append(PLACES.get(option, argument))

    return shlex.join(words)


def machine() -> str:
    """The machine that the figures were computed on.

    Returns:
        The graphics processor, if there is one, and the processor cores.
    """
    import torch

    cores = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {cores}"

    return cores


def data_record(data: "Data") -> dict[str, Any]:
    """The facts that distinguish one data set from another.

    Args:
        data: The data set.

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
        data: The data that it was measured on.
        options: The options that it was measured with.

    Returns:
        JSON values, to stand beside the figure.
    """
    record: dict[str, Any] = {
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
    }
    if data is not None:
        record["data"] = data_record(data)
    if options is not None:
        record["options"] = options

    return record
