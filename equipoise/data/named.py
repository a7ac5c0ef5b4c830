"""Data sets with a name (digits, mnist, fashion-mnist, celeba) and the places of their files."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from equipoise.data.arrays import Found, Part
from equipoise.data.encoded import ImageReader, Listing, list_images
from equipoise.data.gate import DEFAULT_LIMITS, Limits
from equipoise.data.idx import read_idx_images, read_idx_labels
from equipoise.files import StoreError, expanded
from equipoise.records import read_bytes

NAMES = ("digits", "mnist", "fashion-mnist", "celeba")

IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
IDX_LABELS = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
"""Folder in which torchvision puts each data set."""

CELEBA_FOLDERS = ("", "img_align_celeba", "celeba/img_align_celeba")
CELEBA_CROP = 140 / 178
"""Side of the usual centre crop as a share of the width: 140 of 178 pixels at full size."""
MAX_PARTITION_BYTES = 100_000_000
"""Longest list of CelebA's parts that is read. The usual one has 5 MB."""


def digits(*, with_labels: bool = False) -> Found:
    """Load the 1,797 digits of 8 x 8 pixels and 17 grey levels that come with scikit-learn.

    Args:
        with_labels: Whether to load the labels, too.

    Returns:
        The images, (1797, 8, 8).
    """
    from sklearn.datasets import load_digits

    content = load_digits()
    images = Part(content.images.astype(np.uint8))
    if with_labels:
        images = images._replace(labels=content.target)
    return Found("digits", "sklearn.datasets.load_digits", images, white=16)


def idx_set(
    name: str,
    data_dir: Path | None,
    limits: Limits = DEFAULT_LIMITS,
    *,
    with_labels: bool = False,
) -> Found:
    """Load MNIST or Fashion-MNIST from plain or gzipped idx files, with their own test part.

    Args:
        name: "mnist" or "fashion-mnist".
        data_dir: The first folder in which the files are looked for.
        limits: The most that a compressed file may unpack to.
        with_labels: Whether to load the labels, too.

    Returns:
        The images, (60000, 28, 28) and (10000, 28, 28).

    Raises:
        FileNotFoundError: If the files are not found. The message lists the places.
    """
    torchvision = TORCHVISION[name]
    inside = ("", "raw", f"{torchvision}/raw", f"{name}/{torchvision}/raw", name, torchvision)
    searched = places(data_dir, inside)
    for folder in searched:
        train, test = (_plain_or_gzipped(folder / stem) for stem in IDX_FILES)
        if not _may_hold(folder, name) or (train is None and test is None):
            continue

        if train is None or test is None:
            raise FileNotFoundError(
                f"{folder} holds only one of {' and '.join(IDX_FILES)}; add the other"
            )
        parts = [Part(read_idx_images(path, limits)) for path in (train, test)]
        if with_labels:
            paths = [_plain_or_gzipped(folder / stem) for stem in IDX_LABELS]
            parts = [
                part._replace(labels=read_idx_labels(path, limits))
                for part, path in zip(parts, paths, strict=True)
                if path is not None
            ]
            if len(parts) < len(paths):
                raise FileNotFoundError(f"{folder} lacks {' or '.join(IDX_LABELS)}; add both")
        return Found(name, str(folder), train=parts[0], test=parts[1])

    advice = f"put {' and '.join(IDX_FILES)} (plain or .gz) in one of these"
    if name == "fashion-mnist":
        advice += ", or install the Debian package dataset-fashion-mnist"
    advice += ", or fetch it with --download (download=True)"
    raise FileNotFoundError(_not_found(name, searched, advice))


def _may_hold(folder: Path, name: str) -> bool:
    """Whether the path of a folder fits one of the two sets with idx files.

    Both sets use the same file names. The last component of the path that contains "mnist" tells
    which of the two sets the folder holds.
    """
    components = [part.lower() for part in folder.absolute().parts if "mnist" in part.lower()]
    if not components:
        return True

    is_fashion = "fashion" in components[-1]
    return is_fashion == (name == "fashion-mnist")


def celeba(data_dir: Path | None, reader: ImageReader) -> Found:
    """Load the aligned CelebA faces, and cut out the usual square.

    The faces may have the full size (178 x 218) or any other. If
    ``list_eval_partition.txt`` (or ``.csv``) is in the folder of the images or in its parent, it
    gives the three parts. Without this file, or if one of its parts has no images here, the last
    eighth of the images by file name is the test part.

    Args:
        data_dir: The first folder in which the images are looked for.
        reader: Reader that decodes the images. If it has no image size or no channels, these are
            64 and RGB.

    Returns:
        The images, (N, 3, 64, 64).

    Raises:
        FileNotFoundError: If there is no folder ``img_align_celeba``. The message lists the
            places.
    """
    searched = places(data_dir, CELEBA_FOLDERS)
    for folder in searched:
        if folder.absolute().name != "img_align_celeba" or not folder.is_dir():
            continue

        reader = replace(
            reader,
            image_size=reader.image_size or 64,
            channels=reader.channels or "rgb",
            crop=CELEBA_CROP,
        )
        listing = list_images(folder)
        train, *held_out = _celeba_parts(listing)

        train_part = reader.read(listing.encoded(train))
        validation_part, test_part = (
            reader.read(listing.encoded(names)) if names else None for names in held_out
        )
        return Found("celeba", str(folder), train_part, validation_part, test_part)

    advice = (
        "put the folder img_align_celeba (and list_eval_partition.txt beside it) from "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html in one of these"
    )
    raise FileNotFoundError(_not_found("celeba", searched, advice))


def _celeba_parts(listing: Listing) -> Sequence[list[str]]:
    """File names of the training, the validation and the test part.

    The validation part is empty if it has to be split off the training part.
    """
    for folder in (listing.folder, listing.folder.absolute().parent):
        for path in folder.glob("list_eval_partition.*"):
            partition = _read_partition(path)
            parts = [
                [name for name in listing.names if partition.get(name.rpartition("/")[2]) == number]
                for number in "012"
            ]
            if all(parts):
                return parts

    n_train = len(listing.names) - len(listing.names) // 8
    return listing.names[:n_train], [], listing.names[n_train:]


def _read_partition(path: Path) -> dict[str, str]:
    """Number of the part to which each file of CelebA belongs."""
    content = read_bytes(path, MAX_PARTITION_BYTES)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}); fetch it again") from error

    partition = {}
    for line in text.replace(",", " ").splitlines():
        fields = line.split()
        if len(fields) == 2:
            file_name, number = fields
            partition[file_name] = number

    return partition


def places(data_dir: Path | None, inside: tuple[str, ...]) -> list[Path]:
    """List the folders that may hold a named set, in the order of the search.

    Args:
        data_dir: The first place.
        inside: Folders within each place.

    Returns:
        Folders within ``data_dir``, $EQUIPOISE_DATA, ./data, ~/data, ~/.cache/equipoise/data and
        /usr/share/datasets.
    """
    roots = (
        data_dir,
        os.environ.get("EQUIPOISE_DATA"),
        "data",
        "~/data",
        "~/.cache/equipoise/data",
        "/usr/share/datasets",
    )
    found = []
    for root in roots:
        # There may be no home.
        with contextlib.suppress(StoreError):
            if root:
                found += [expanded(root) / folder for folder in inside]
    return found


def _not_found(name: str, searched: list[Path], advice: str) -> str:
    listed = "".join(f"\n  {folder}" for folder in searched)
    return (
        f"{name} was not found in any of{listed}\n"
        f"{advice}, or name another place with --data-dir (data_dir) or $EQUIPOISE_DATA"
    )


def _plain_or_gzipped(path: Path) -> Path | None:
    gzipped = path.with_name(path.name + ".gz")
    for candidate in (path, gzipped):
        if candidate.is_file():
            return candidate
    return None
