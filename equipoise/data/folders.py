"""What the folders of a data set mean: its own parts, and classes."""

import os
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
        class_of: Class of each file; empty if there are no classes.
    """

    parts: list[str | None]
    classes: list[str]
    class_of: list[str]


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
        Folders(parts=[], classes=['cat', 'dog'], class_of=['cat', 'dog'])
    """
    common = os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""
    steps = [name[len(common) :].strip("/").split("/") for name in names]

    part_of = {folder: part for part, folders in PARTS.items() for folder in folders}
    parts = [part_of.get(step[0].lower()) if len(step) > 1 else None for step in steps]
    has_parts = "train" in parts and ("test" in parts or "validation" in parts)
    pairs = list(zip(steps, parts, strict=True))
    if has_parts:
        pairs = [(step[1:], part) for step, part in pairs]

    class_of = [step[0] if len(step) > 1 else "" for step, _ in pairs]
    # Files outside the parts are left out.
    classes = {
        name
        for name, part in zip(class_of, parts, strict=True)
        if part is not None or not has_parts
    }
    has_classes = len(classes) > 1 and "" not in classes
    return Folders(
        parts if has_parts else [],
        sorted(classes) if has_classes else [],
        class_of if has_classes else [],
    )


def read_folder(
    listing: Listing, name: str, reader: ImageReader, *, pool: bool, with_labels: bool = False
) -> Found:
    """Read the images of a folder, in its own parts if it has them.

    Args:
        listing: The files of the folder.
        name: Name of the data set.
        reader: Reader that decodes the images.
        pool: Whether to take the parts together.
        with_labels: Whether the classes are labels.

    Returns:
        The images, with notes on the meaning of the folders.

    Raises:
        ValueError: If the classes are to be labels, and there are none.
    """
    part = reader.read(listing.encoded())
    folders = sort_folders(listing.names)

    # Several rows may come from one file.
    files = range(len(listing.names)) if part.rows is None else [file for file, _ in part.rows]
    notes = []
    if with_labels:
        if not folders.classes:
            raise ValueError(
                f"{listing.folder}: the label 'folder' needs images in at least two folders, one "
                "for each class, such as cat/1.png and dog/2.png"
            )
        part = part._replace(labels=[folders.class_of[file] for file in files])
    elif folders.classes:
        notes.append(
            f"folders as of {len(folders.classes)} classes ({first_names(folders.classes)}): their "
            "names are not used (--label folder makes labels of them)"
        )
    found = Found(name, str(listing.folder), _with_notes(part, notes), axis=1)
    if not folders.parts:
        return found

    if pool:
        notes.append("folders of parts (train and others) pooled, and split anew")
        return replace(found, train=_with_notes(part, notes))

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
