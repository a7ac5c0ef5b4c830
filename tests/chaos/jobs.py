"""The jobs that are killed: their commands, how a user goes on, and what their result is."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

VOLATILE = {"seconds", "examples_per_second", "created", "date", "train_seconds"}
"""Figures that differ between any two runs."""
TINY = [
    "--quiet",
    "--set",
    "latent_dim=2",
    "stage_1_epochs=2",
    "stage_2_epochs=2",
    "batch_size=16",
    "n_components=2",
    "tolerance=0",
    "learning_rate=0.01",
    "accelerator=cpu",
]


class Job(NamedTuple):
    """A whole job.

    Args:
        command: Arguments of ``equipoise``, or a function for a job in Python.
        data: Name of the data: "table" or "images".
        needs: Jobs that make what this one starts from.
        again: What a user tries after it was stopped, the first that is not refused.
        processes: Number of processes.
        is_slow: Whether it is left out of the quick tests.
    """

    command: list[str] | Callable[[], None]
    data: str = "table"
    needs: tuple[str, ...] = ()
    again: tuple[list[str], ...] = ()
    processes: int = 1
    is_slow: bool = False


def _training(data, *options, processes=1):
    command = ["train", f"../{data}.npy", "--out", "run", *TINY, *options]
    # A run that has not come far enough to be resumed is trained again.
    again = (["train", "--resume", "run", "--quiet"], command)
    return Job(command, data, again=again, processes=processes)


def _save_estimator():
    """Save an estimator over an older one, as a program would."""
    import equipoise

    estimator = equipoise.VAEEstimator.load("first.safetensors")
    estimator.save("estimator.safetensors")


def _fit_estimator():
    import equipoise

    rows = np.load("../table.npy")
    for name, epochs in (("first", 2), ("estimator", 1)):
        estimator = equipoise.VAEEstimator(
            random_state=0, stage_1_epochs=epochs, stage_2_epochs=1, width=1, latent_dim=2
        )
        estimator.fit(rows).save(f"{name}.safetensors")


JOBS = {
    "train": _training("table", "width=1"),
    "train-images": _training("images", "architecture=conv", "width=2"),
    "train-two": _training("table", "width=1", processes=2),
    "train-images-two": _training("images", "architecture=conv", "width=2", processes=2),
    "evaluate": Job(
        [
            "evaluate",
            "run",
            "--quiet",
            "-n",
            "20",
            "--importance-samples",
            "2",
            "--from",
            "mixture=2",
        ],
        needs=("train",),
    ),
    "evaluate-images": Job(
        [
            "evaluate",
            "run",
            "--quiet",
            "--importance-samples",
            "2",
            "--sections",
            "likelihood",
            "latent",
            "noise",
        ],
        "images",
        needs=("train-images",),
    ),
    "sample": Job(["sample", "run", "-n", "8", "--from", "mixture=3"], needs=("train",)),
    "sample-images": Job(["sample", "run", "-n", "8"], "images", needs=("train-images",)),
    "reconstruct": Job(["reconstruct", "run"], needs=("train",)),
    "reconstruct-images": Job(["reconstruct", "run"], "images", needs=("train-images",)),
    "report": Job(["report", "run"], needs=("train", "evaluate")),
    "export-torch": Job(["export", "run", "--to", "torch"], needs=("train",)),
    "export-onnx": Job(["export", "run", "--to", "onnx"], needs=("train",), is_slow=True),
    "estimator-fit": Job(_fit_estimator),
    "estimator-save": Job(_save_estimator, needs=("estimator-fit",)),
}
KILLED = [name for name in JOBS if name != "estimator-fit"]


def write_data(folder):
    """Write the data of all jobs.

    Args:
        folder: Folder in which each job's working folder lies.
    """
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 3))
    rows = rows + 0.1 * rng.standard_normal(rows.shape)
    np.save(folder / "table.npy", rows.astype(np.float32))
    np.save(folder / "images.npy", rng.integers(0, 256, (40, 16, 16), dtype=np.uint8))


def action_of(command):
    """Make a function of a command, as the command line would run it.

    Args:
        command: Arguments of ``equipoise``, or a function that raises what the library does.

    Returns:
        A function without arguments.
    """

    def call():
        try:
            command()
        except (OSError, ValueError) as error:
            sys.exit(f"equipoise: {error}")

    def run():
        from equipoise.cli import main

        sys.argv = ["equipoise", *command]
        main(command)

    return call if callable(command) else run


def fresh(folder, start):
    """Make a working folder anew.

    Args:
        folder: The folder.
        start: Folder that is copied into it, or None.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if start is None:
        folder.mkdir(parents=True)
    else:
        shutil.copytree(start, folder)


def newest_checkpoint(folder):
    """Find the newest whole checkpoint of the run in a folder.

    Args:
        folder: A working folder.

    Returns:
        Its name, or None.
    """
    for path in sorted((folder / "run" / "checkpoints").glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                file.metadata()
        except Exception:
            continue
        return path.name
    return None


def hidden_files(folder):
    """List hidden files: a lock, a manifest, or what an unfinished write has left behind.

    Args:
        folder: A working folder.

    Returns:
        Their paths relative to it.
    """
    return {str(path.relative_to(folder)) for path in folder.rglob(".*") if path.is_file()}


def result_of(folder):
    """Digest what a job has left: every file by its content, without times and dates.

    Args:
        folder: A working folder.

    Returns:
        Digests by file and part. A file that cannot be read has its error as its digest.
    """
    from equipoise.run import Run

    result = {}
    run = Run(folder / "run")
    newest = newest_checkpoint(folder)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_older_checkpoint = path.parent.name == "checkpoints" and path.name != newest
        if path.is_dir() or path.name.startswith(".") or is_older_checkpoint:
            continue
        try:
            parts = _parts_of(path)
        except Exception as error:
            parts = {"": f"{type(error).__name__}: {error}"}
        result |= {f"{name} {part}".strip(): value for part, value in parts.items()}

    if run.folder.is_dir():
        # Once more, by the library's own readers.
        model, mixture = run.model(), run.mixture()
        result |= {f"Run.model {k}": _digest(v) for k, v in model.state_dict().items()}
        for part in ("weights", "means", "covariances"):
            result[f"Run.mixture {part}"] = _digest(getattr(mixture, part))
        result["Run.history"] = _steady(run.history())
    return result


def _parts_of(path):
    """Digest one file, part by part."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # The running sums of a checkpoint hold the seconds of its epoch.
        return {name: _digest(value) for name, value in tensors.items() if name != "/means"}
    if path.suffix == ".json":
        return _steady(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return {"": [_steady(json.loads(line)) for line in path.read_text().splitlines()]}
    if path.suffix == ".npy":
        return {"": _digest(torch.from_numpy(np.load(path)))}
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: _digest(torch.from_numpy(value)) for name, value in arrays.items()}
    if path.suffix == ".pt2":
        program = torch.export.load(path)
        tensors = {**program.state_dict, **program.constants}
        return {name: _digest(value) for name, value in tensors.items()}
    return {"": hashlib.sha256(path.read_bytes()).hexdigest()}


def _digest(tensor):
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def _steady(value):
    """Leave out times and dates."""
    if isinstance(value, dict):
        return {key: _steady(part) for key, part in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [_steady(part) for part in value]
    return value


def differences(result, expected):
    """Name what differs between two results.

    Args:
        result: What :func:`result_of` found.
        expected: What it found after an undisturbed job.

    Returns:
        One line for each of the first differences.
    """
    lines = [
        f"{name}: {result.get(name, 'absent')!s:.200} "
        f"instead of {expected.get(name, 'nothing')!s:.200}"
        for name in sorted(result.keys() | expected.keys())
        if result.get(name) != expected.get(name)
    ]
    return lines[:3]
