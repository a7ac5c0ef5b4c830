"""What stands beside every figure: command, data, seed, versions, machine and date."""

import datetime
import itertools
import os
import platform
import shlex
import sys
from importlib.metadata import version


def provenance(data=None, options=None):
    """JSON values that say where a figure comes from."""
    found = {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *_without_paths(sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("equipoise", "torch", "numpy", "scikit-learn")},
        },
    }
    if data is not None:
        found["data"] = {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "n_train": len(data.train),
            "n_validation": len(data.validation),
            "n_test": len(data.test),
        }
    if options is not None:
        found["options"] = options
    return found


def _without_paths(arguments):
    """Where data and runs lie on this machine is nobody's concern."""
    pairs = itertools.pairwise(["", *arguments])
    places = {"--data-dir": "DATA", "--run": "RUN", "--models": "MODELS"}
    return [places.get(before, argument) for before, argument in pairs]
