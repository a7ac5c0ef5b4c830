"""Damaged files: how many flipped bits and truncations of each kind of file are noticed.

    python benchmarks/damage.py

Every bit of each header, a sample of the bits of the tensors, and every truncation of a small file
of each kind; for JSON files every bit. A damaged file counts as noticed if it is refused by a
StoreError. Of checkpoints it is counted, too, how often the older one then serves. ``--every 50``
tries every fiftieth only.
"""

import tempfile
from pathlib import Path

import torch
from command import Command

from equipoise.files import StoreError, write_json
from equipoise.provenance import provenance
from equipoise.training.checkpoint import load_checkpoint, save_checkpoint
from tests.test_damage import JSON_FILES, READERS, evaluated_run, header_size


def count(path, content, read, every, n_header):
    """Damage a file in each way, and count how often that is noticed."""
    tensor_bits = range(
        8 * n_header, 8 * len(content), max(1, 8 * (len(content) - n_header) // 2000)
    )
    flips = [*range(0, 8 * n_header, every), *tensor_bits[::every]]
    cuts = range(0, len(content), every)

    noticed = {"flips": 0, "truncations": 0}
    for position in flips:
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        noticed["flips"] += is_refused(path, damaged, read)
    for length in cuts:
        noticed["truncations"] += is_refused(path, content[:length], read)

    path.write_bytes(content)
    tried = {"flips": len(flips), "truncations": len(cuts)}
    return {kind: {"tried": tried[kind], "noticed": noticed[kind]} for kind in tried}


def is_refused(path, content, read):
    """Write a file, and tell whether it is refused."""
    path.write_bytes(content)
    try:
        read(path)
    except StoreError:
        return True
    return False


def tensor_files(folder, every):
    """Damage a file of tensors of each kind."""
    rows = {}
    for kind, (write, read) in READERS.items():
        torch.manual_seed(0)
        path = folder / f"{kind}.safetensors"
        write(path)
        content = path.read_bytes()
        rows[kind] = count(path, content, read, every, header_size(content))
    return rows


def json_files(folder, every):
    """Damage each JSON file of a run."""
    run = evaluated_run(folder)

    rows = {}
    for name, read in JSON_FILES.items():
        path = run.folder / name
        content = path.read_bytes()
        rows[name] = count(path, content, lambda _, read=read: read(run), every, len(content))
    return rows


def older_checkpoints(folder, every):
    """Damage the newest checkpoint, and count how often the older one serves."""
    tried = served = 0
    save_checkpoint(folder, 1, {"epoch": 1, "weight": torch.ones(3)})
    newest = save_checkpoint(folder, 2, {"epoch": 2, "weight": torch.zeros(3)})
    content = newest.read_bytes()
    for position in range(0, 8 * len(content), every):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        newest.write_bytes(damaged)
        tried += 1
        served += load_checkpoint(folder).state["epoch"] == 1
        for aside in folder.glob("*.damaged*"):
            aside.unlink()
    return {"tried": tried, "served": served}


def main():
    """Damage files of each kind, and write what was noticed."""
    parser = Command(__doc__, "results/reliability-damage.json")
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    if options.tiny:
        options.every = 400

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = tensor_files(folder, options.every) | json_files(folder, options.every)
        older = older_checkpoints(folder / "checkpoints", options.every)

    content = {**provenance(), "every": options.every, "files": files, "older_checkpoint": older}
    write_json(options.out, content)
    for kind, row in files.items():
        print(kind, row)
    print("older checkpoint", older)


if __name__ == "__main__":
    main()
