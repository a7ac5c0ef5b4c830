"""The cache of decoded images is said, listed and cleared, and other files in it stay."""

import os
import shutil
import time
from collections import namedtuple

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from equipoise.cli import main
from equipoise.data import load
from equipoise.data.cache import cached_images, in_bytes, remove_images


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("n", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (6_100_000_000, "6.1 GB"), (10**16, "1e+04 TB")],
)
def test_sizes_in_words(n, words):
    assert in_bytes(n) == words


def test_size_and_place_are_said_before_and_listed_afterwards(photos, tmp_path):
    cache = tmp_path / "cache"
    said = []

    def say(text):
        said.append((text, list(cache.glob("*.npy"))))

    load(photos, image_size=16, cache_dir=cache, say=say)
    ((text, there),) = said
    assert "40 images into 30.7 kB in " in text
    assert there == []
    load(photos, image_size=16, cache_dir=cache, say=say)
    assert len(said) == 1
    load(photos, image_size=8, cache_dir=cache)

    large, small = cached_images(cache)
    assert (large.shape, small.shape) == ((40, 3, 16, 16), (40, 3, 8, 8))
    assert large.source == small.source == str(photos)
    assert large.n_bytes >= 40 * 3 * 16 * 16


def test_too_little_space_is_said_before_anything_is_written(photos, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 10**6, 10_000))
    with pytest.raises(OSError, match=r"30.7 kB are needed, and 10 kB are free"):
        load(photos, image_size=16, cache_dir=tmp_path / "cache")
    assert cached_images(tmp_path / "cache") == []


def test_clearing_leaves_other_files_and_what_is_being_written(photos, tmp_path):
    cache = tmp_path / "cache"
    for size in (8, 16):
        load(photos, image_size=size, cache_dir=cache)
    (cache / "features").mkdir()
    (cache / "mine.npy").touch()
    (cache / "0123456789abcdefxyz.tmp").write_bytes(b"half")
    first, second, leftover = cached_images(cache)
    assert leftover.shape is None

    with FileLock(cache / f"{first.key}.lock"):
        removed = remove_images(cache, [first, second, leftover])
        assert removed == second.n_bytes + leftover.n_bytes
    assert [images.key for images in cached_images(cache)] == [first.key]
    remove_images(cache, [first])
    names = {file.name for file in cache.iterdir() if file.suffix != ".lock"}
    assert names == {"features", "mine.npy"}


def test_only_what_was_not_used_for_long(photos, tmp_path):
    cache = tmp_path / "cache"
    for size in (8, 16):
        load(photos, image_size=size, cache_dir=cache)
    (old, new) = cached_images(cache)
    before = time.time() - 10 * 86_400
    for ending in ("npy", "json"):
        os.utime(cache / f"{old.key}.{ending}", (before, before))
    assert [images.key for images in cached_images(cache, 9.0)] == [old.key]
    assert cached_images(cache, 11.0) == []
    assert len(cached_images(cache)) == 2
    assert new.used > old.used.replace(year=2000)


def test_the_command(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    main(["cache"])
    assert "No decoded images in" in capsys.readouterr().out
    load(photos, image_size=8)
    main(["cache", "list"])
    out = capsys.readouterr().out
    assert "40 x 3 x 8 x 8" in out
    assert str(photos) in out
    main(["cache", "clear", "--older-than", "1"])
    assert "No decoded images" in capsys.readouterr().out
    main(["cache", "clear"])
    assert "Removed 8" in capsys.readouterr().out
    assert cached_images(tmp_path / "cache") == []
    with pytest.raises(SystemExit):
        main(["cache", "--older-than", "-1"])


def test_training_says_it(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    line = ["train", str(photos), "--out", str(tmp_path / "run"), "--set", "image_size=8"]
    main([*line, "width=2", "stage_1_epochs=1", "stage_2_epochs=0", "n_components=1"])
    assert "Decoding 40 images into 7.68 kB in" in capsys.readouterr().out
