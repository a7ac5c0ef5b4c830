"""What the folders of a data set mean: its own parts, and classes."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from equipoise.data.arrays import Found, Part
from equipoise.data.dataset import Split
from equipoise.data.encoded import ImageReader, Listing, first_names

PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
"""Names of the folders that hold the parts of a data set, in any case."""


class Folders(NamedTuple):
    """The folders of the files of a data set.

    Args:
        parts: Part of each file, or None for a file outside; empty if the set has no parts.
        classes: Names of the folders within which the files lie, besides those of the parts.
    """

    parts: list[str | None]
    classes: list[str]


def sort_folders(names: Sequence[str]) -> Folders:
    """Find the parts of a data set by the names of its folders.

    Args:
        names: Paths of the files within the folder of the data set.

    Returns:
        Its parts, if there is a folder for the training and one for the test or the validation,
        and its classes, if all other files lie within at least two folders.

    Example:
        >>> sort_folders(["train/a.png", "val/b.png"]).parts
        ['train', 'validation']
        >>> sort_folders(["cat/1.png", "dog/2.png"])
        Folders(parts=[], classes=['cat', 'dog'])
    """
    common = os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""
    steps = [name[len(common) :].strip("/").split("/") for name in names]

    part_of = {folder: part for part, folders in PARTS.items() for folder in folders}
    parts = [part_of.get(step[0].lower()) if len(step) > 1 else None for step in steps]
    has_parts = "train" in parts and ("test" in parts or "validation" in parts)
    if has_parts:
        pairs = zip(steps, parts, strict=True)
        steps = [step[1:] for step, part in pairs if part is not None]

    classes = Counter(step[0] if len(step) > 1 else "" for step in steps)
    has_classes = len(classes) > 1 and "" not in classes
    return Folders(parts if has_parts else [], sorted(classes) if has_classes else [])


def read_folder(listing: Listing, name: str, reader: ImageReader, *, pool: bool) -> Found:
    """Read the images of a folder, in its own parts if it has them.

    Args:
        listing: The files of the folder.
        name: Name of the data set.
        reader: Reader that decodes the images.
        pool: Whether to take the parts together.

    Returns:
        The images, with notes on the meaning of the folders.
    """
    part = reader.read(listing.encoded())
    folders = sort_folders(listing.names)

    notes = []
    if folders.classes:
        notes.append(
            f"folders as of {len(folders.classes)} classes ({first_names(folders.classes)}): their "
            "names are not used"
        )
    found = Found(name, str(listing.folder), _with_notes(part, notes), axis=1)
    if not folders.parts:
        return found

    if pool:
        notes.append("folders of parts (train and others) pooled, and split anew")
        return replace(found, train=_with_notes(part, notes))

    # Several rows may come from one file.
    files = range(len(listing.names)) if part.rows is None else [file for file, _ in part.rows]
    of_row = np.array([folders.parts[file] or "" for file in files])
    pieces = {
        kind: np.flatnonzero(of_row == kind).astype(np.int64)
        for kind in ("train", "validation", "test")
    }
    listed = ", ".join(f"{len(rows)} {kind}" for kind, rows in pieces.items() if len(rows))
    notes.insert(0, f"the folder's own parts are used: {listed} (--no-split pools them)")
    n_outside = int(np.count_nonzero(of_row == ""))
    if n_outside:
        notes.insert(1, f"images outside the folders of the parts left out: {n_outside}")
    return replace(found, train=_with_notes(part, notes), pieces=Split(**pieces))


def _with_notes(part: Part, notes: list[str]) -> Part:
    return part._replace(notes=(*notes, *part.notes))
