"""The data sets with a name: digits, mnist, fashion-mnist, celeba; and where they are looked for."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from equipoise.data.arrays import Found, Part
from equipoise.data.encoded import ImageReader, Listing, list_images
from equipoise.data.idx import read_idx_images

NAMES = ("digits", "mnist", "fashion-mnist", "celeba")

IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
CELEBA_FOLDERS = ("", "img_align_celeba", "celeba/img_align_celeba")
CELEBA_CROP = 140 / 178
"""Side of the usual centre crop as a share of the width: 140 of 178 pixels at full size."""


def digits() -> Found:
    """Find the 1,797 digits of 8 x 8 pixels and 17 grey levels that come with scikit-learn.

    Returns:
        The images, (1797, 8, 8).
    """
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.uint8)
    return Found("digits", "sklearn.datasets.load_digits", Part(images), white=16)


def idx_set(name: str, data_dir: Path | None) -> Found:
    """Find MNIST or Fashion-MNIST, as plain or gzipped idx files, with the canonical test set.

    Args:
        name: "mnist" or "fashion-mnist".
        data_dir: the first place to look in.

    Returns:
        The images, (60000, 28, 28) and (10000, 28, 28).

    Raises:
        FileNotFoundError: if the files are nowhere; the message lists the places.
    """
    theirs = TORCHVISION[name]
    searched = places(data_dir, ("", "raw", f"{theirs}/raw", f"{name}/{theirs}/raw", name, theirs))
    for folder in searched:
        # Both sets use the same file names, so that a folder that is named for the other is not taken.
        whose = next(
            (part for part in reversed(folder.absolute().parts) if "mnist" in part.lower()), name
        )
        files = [_plain_or_gzipped(folder / stem) for stem in IDX_FILES]
        if ("fashion" in whose.lower()) != (name == "fashion-mnist") or files == [None, None]:
            continue
        if files[0] is None or files[1] is None:
            raise FileNotFoundError(
                f"{folder} holds only one of {' and '.join(IDX_FILES)}; add the other"
            )
        train, test = Part(read_idx_images(files[0])), Part(read_idx_images(files[1]))
        return Found(name, str(folder), train, test=test)
    advice = f"put {' and '.join(IDX_FILES)} (plain or .gz) in one of these"
    if name == "fashion-mnist":
        advice += ", or install the Debian package dataset-fashion-mnist"
    raise FileNotFoundError(
        _not_found(name, searched, f"{advice}, or fetch it with --download (download=True)")
    )


def celeba(data_dir: Path | None, reader: ImageReader) -> Found:
    """Find the aligned CelebA faces, at full size (178 x 218) or any other, and cut out the usual square.

    With ``list_eval_partition.txt`` (or ``.csv``) in the folder of the images or above it, its three parts;
    without one, or if one of its parts is empty here, the last eighth by file name is the test set.

    Args:
        data_dir: the first place to look in.
        reader: with the size wanted; 64 and RGB where it names none.

    Returns:
        The images, (N, 3, 64, 64).

    Raises:
        FileNotFoundError: if there is no ``img_align_celeba``; the message lists the places.
    """
    searched = places(data_dir, CELEBA_FOLDERS)
    for folder in searched:
        if folder.absolute().name == "img_align_celeba" and folder.is_dir():
            listing = list_images(folder)
            reader = replace(
                reader,
                image_size=reader.image_size or 64,
                channels=reader.channels or "rgb",
                crop=CELEBA_CROP,
            )
            train, *held_out = _celeba_parts(listing)
            first = reader.read(listing.encoded(train))
            validation, test = (
                reader.read(listing.encoded(names)) if names else None for names in held_out
            )
            return Found("celeba", str(folder), first, validation, test)
    advice = (
        "put the folder img_align_celeba (and list_eval_partition.txt beside it) from "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html in one of these"
    )
    raise FileNotFoundError(_not_found("celeba", searched, advice))


def _celeba_parts(listing: Listing) -> Sequence[list[str]]:
    """File names of the training, validation and test part; the second empty where it is to be split off."""
    for folder in (listing.folder, listing.folder.absolute().parent):
        for path in folder.glob("list_eval_partition.*"):
            lines = path.read_text().replace(",", " ").splitlines()
            part = dict(fields for line in lines if len(fields := line.split()) == 2)
            parts = [
                [n for n in listing.names if part.get(n.rpartition("/")[2]) == k] for k in "012"
            ]
            if all(parts):
                return parts
    cut = len(listing.names) - len(listing.names) // 8
    return listing.names[:cut], [], listing.names[cut:]


def places(data_dir: Path | None, inside: tuple[str, ...]) -> list[Path]:
    """List where a named set may be, in the order of the search.

    Args:
        data_dir: the first place.
        inside: folders to look at within each place.

    Returns:
        Folders within ``data_dir``, $EQUIPOISE_DATA, ./data, ~/data, ~/.cache/equipoise/data and
        /usr/share/datasets.
    """
    given = (data_dir, os.environ.get("EQUIPOISE_DATA"))
    usual = ("data", "~/data", "~/.cache/equipoise/data", "/usr/share/datasets")
    return [
        Path(root).expanduser() / folder for root in (*given, *usual) if root for folder in inside
    ]


def _not_found(name: str, searched: list[Path], advice: str) -> str:
    listed = "".join(f"\n  {folder}" for folder in searched)
    return (
        f"{name} was not found in any of{listed}\n"
        f"{advice}, or name another place with --data-dir (data_dir) or $EQUIPOISE_DATA"
    )


def _plain_or_gzipped(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)
