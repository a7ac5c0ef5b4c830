"""Images from folders, CelebA and the hub: their format, unreadable files, and the cache."""

import errno
import json
import os
import subprocess
import sys
import types
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from equipoise.data import encoded, load
from equipoise.data.cache import read_part

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (24, 12, 10, 3), dtype=np.uint8)


def everything(data):
    parts = [data.train, data.validation, data.test]
    rows = np.argsort(np.concatenate([part.indices for part in parts]))
    return np.concatenate([part[:] for part in parts])[rows]


def fill(folder, images=COLOUR, kind="png", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:03d}.{kind}", **options)
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "pictures")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test, and none of the data sets of this machine."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


# What images become


def test_small_images_of_one_size_are_taken_as_they_are(folder):
    data = load(folder)
    assert (data.name, data.kind, data.shape, data.source) == (
        "pictures",
        "image",
        (3, 12, 10),
        str(folder),
    )
    assert (data.train.dtype, data.scale, data.quantum, data.notes) == (np.uint8, 255, 1 / 255, ())
    assert isinstance(data.train.base, np.memmap)
    assert np.array_equal(everything(data), COLOUR.transpose(0, 3, 1, 2))
    assert (
        data.fingerprint
        == load(COLOUR).fingerprint
        == load(COLOUR.transpose(0, 3, 1, 2)).fingerprint
    )


def test_folders_are_searched_in_sorted_order_without_hidden_files(tmp_path):
    fill(tmp_path / "in" / "b", COLOUR[12:])
    fill(tmp_path / "in" / "a" / "deep", COLOUR[:12])
    fill(tmp_path / "in" / ".thumbnails", COLOUR[:2])
    (tmp_path / "in" / "._000.png").write_bytes(b"resource fork")
    (tmp_path / "in" / "labels.csv").write_text("a,b")
    data = load(tmp_path / "in", strict=True)
    assert np.array_equal(everything(data), COLOUR.transpose(0, 3, 1, 2))
    assert data.notes == (
        "folders as of 2 classes (a, b): their names are not used (--label folder makes labels of "
        "them)",
        "other files ignored: 1 (labels.csv)",
    )


def test_grey_stays_grey_only_if_all_are(tmp_path):
    fill(tmp_path / "grey", COLOUR[..., 0])
    assert load(tmp_path / "grey").shape == (1, 12, 10)
    assert load(tmp_path / "grey", channels="rgb").shape == (3, 12, 10)
    fill(tmp_path / "grey", COLOUR[:1])
    mixed = load(tmp_path / "grey")
    n = len(COLOUR) - 1
    assert f"{n} grey and 1 colour images: all become RGB" in mixed.notes[0]
    notes = load(tmp_path / "grey", channels="grey").notes
    assert f"{n} grey and 1 colour images: all become grey" in notes
    assert mixed.shape == (3, 12, 10)
    assert np.array_equal(everything(mixed)[5], np.stack([COLOUR[5, ..., 0]] * 3))
    assert load(tmp_path / "grey", channels="grey").shape == (1, 12, 10)


def replaced(folder, image, name="003.png", **options):
    image.save(folder / name, **options)
    data = load(folder)
    return everything(data)[3], data.notes


def test_transparency_is_laid_on_white(folder):
    layer = np.dstack([COLOUR[3], np.zeros((12, 10), np.uint8)])
    layer[:6, :, 3] = 255
    pixels, notes = replaced(folder, Image.fromarray(layer))
    assert np.array_equal(pixels[:, :6], COLOUR[3, :6].transpose(2, 0, 1))
    assert (pixels[:, 6:] == 255).all()
    assert notes == ("images with transparency, laid on white: 1",)


def test_palettes_become_colours(folder):
    image = Image.fromarray(COLOUR[3]).quantize(8)
    pixels, notes = replaced(folder, image)
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    assert notes == ()


def test_transparent_palettes_are_laid_on_white(folder):
    image = Image.fromarray(COLOUR[3]).quantize(8)
    pixels, _ = replaced(folder, image, transparency=0)
    assert (pixels[:, np.asarray(image) == 0] == 255).all()


def test_the_camera_orientation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    fill(tmp_path / "turned", COLOUR, exif=exif)
    data = load(tmp_path / "turned")
    assert data.shape == (3, 10, 12)
    assert np.array_equal(everything(data)[0], np.rot90(COLOUR[0], -1).transpose(2, 0, 1))


def test_black_and_white_and_cmyk(tmp_path):
    fill(tmp_path / "two", COLOUR[..., 0] > 128)
    assert set(np.unique(everything(load(tmp_path / "two")))) == {0, 255}
    fill(tmp_path / "print", [], "jpg")
    for number in range(10):
        Image.fromarray(COLOUR[number]).convert("CMYK").save(tmp_path / "print" / f"{number}.jpg")
    assert load(tmp_path / "print").shape == (3, 12, 10)


def test_larger_images_are_cut_to_a_centred_square_and_resized(tmp_path):
    wide = np.zeros((12, 100, 200, 3), np.uint8)
    wide[:, :, 50:150] = np.arange(1, 13, dtype=np.uint8)[:, None, None, None] * 20
    fill(tmp_path / "wide", wide, "bmp")
    pixels = everything(load(tmp_path / "wide", image_size=16))
    assert pixels.shape == (12, 3, 16, 16)
    assert (pixels == 20 * np.arange(1, 13)[:, None, None, None]).all()  # nothing black is left


def test_shrinking_antialiases(tmp_path):
    checks = np.indices((256, 256)).sum(0) % 2 * 255
    fill(
        tmp_path / "checks",
        [np.roll(checks, n // 128, 0).astype(np.uint8) + (n % 2) for n in range(10)],
    )
    image = np.uint8(checks)
    folder = fill(
        tmp_path / "fine",
        [np.clip(image.astype(int) + n, 0, 255).astype(np.uint8) for n in range(10)],
    )
    pixels = everything(load(folder, image_size=32))
    assert pixels.min() > 120
    assert pixels.max() < 140


def test_a_fast_jpeg_is_nearly_a_slow_one(tmp_path):
    smooth = np.uint8(127 + 100 * np.sin(np.indices((512, 640)).sum(0) / 40))
    images = [np.roll(smooth, 9 * n, 1) for n in range(10)]
    fast = everything(load(fill(tmp_path / "jpg", images, "jpg", quality=95), image_size=32))
    slow = everything(load(fill(tmp_path / "png", images), image_size=32))
    assert np.abs(fast.astype(int) - slow).max() <= 4


def test_enlarged_images_are_counted(folder):
    assert "images smaller than 32 pixels, enlarged: 24" in load(folder, image_size=32).notes


def test_sizes_that_differ_need_a_choice(folder):
    Image.new("RGB", (40, 30)).save(folder / "030.png")
    with pytest.raises(ValueError, match=r"10x12 \(24\), 40x30 \(1\); .* set image_size"):
        load(folder)
    assert load(folder, image_size=8).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((200, 20), {}, r"200x20 \(12\); .* set image_size"),
        ((7, 20), {}, "7x20; each side must be at least 8"),
        ((20, 20), {"image_size": 7}, "image_size must be at least 8"),
    ],
)
def test_unusable_sizes_are_refused(tmp_path, size, options, message):
    pixels = RANDOM.integers(0, 256, (12, *size[::-1]), dtype=np.uint8)
    with pytest.raises(ValueError, match=message):
        load(fill(tmp_path / "in", pixels), **options)


# What is skipped


def spoil(folder):
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:200])
    (folder / "002.png").write_text("not an image at all")
    (folder / "004.png").write_bytes(b"")
    (folder / "005.png").unlink()
    (folder / "005.png").symlink_to("nowhere.png")
    Image.fromarray(COLOUR[6, ..., 0].astype(np.float32)).save(folder / "006.tif")
    (folder / "006.png").unlink()


def test_unreadable_files_are_skipped_and_named(folder):
    spoil(folder)
    for _ in range(2):  # decoded, and from the cache
        data = load(folder)
        assert len(everything(data)) == 19
        assert np.array_equal(everything(data)[1], COLOUR[3].transpose(2, 0, 1))
        (note,) = data.notes
        assert note.startswith(
            "unreadable files skipped: 5 (002.png: not an image, 004.png: not an image, 005.png: "
        )
        with pytest.raises(ValueError, match=r"002\.png"):
            load(folder, strict=True)


def test_strict_refuses_what_only_decoding_finds(folder):
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot read 001\.png: "):
        load(folder, strict=True)
    assert len(everything(load(folder))) == 23


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), MemoryError()])
@pytest.mark.parametrize("step", ["read_header", "decode"])
def test_what_the_system_refuses_is_tried_again_the_next_time(folder, monkeypatch, error, step):
    work = getattr(encoded, step)

    def refuse(file, *arguments, **options):
        if file.name == "003.png":
            raise error
        return work(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(encoded, step, refuse)
        data = load(folder)
        assert len(everything(data)) == 23
        assert "unreadable files skipped: 1 (003.png" in data.notes[0]
    assert len(everything(load(folder))) == 24


def test_no_image_is_left_out_because_other_files_are_open(folder, monkeypatch):
    def refuse(file, *arguments, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(encoded, "decode", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        load(folder)


def test_a_header_that_lies_about_the_size_is_skipped(folder, monkeypatch):
    def lie(file, limits):
        header = encoded_read_header(file, limits)
        return header._replace(width=10, height=12)

    encoded_read_header = encoded.read_header
    Image.new("RGB", (11, 12)).save(folder / "030.png")
    monkeypatch.setattr(encoded, "read_header", lie)
    assert "030.png: is 11x12 where its header and the others say 10x12" in load(folder).notes[0]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "it is empty"),
        (1, "too few training examples: 1 of at least 10"),
        (9, "too few training examples: 9"),
    ],
)
def test_too_few_images_are_refused(tmp_path, count, message):
    with pytest.raises(ValueError, match=message):
        load(fill(tmp_path / "few", COLOUR[:count]))


def test_folders_without_readable_images_are_refused(tmp_path, cache):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"no image files \(.bmp .*; it holds a.txt"):
        load(tmp_path / "text")
    (tmp_path / "text" / "a.png").write_text("hello")
    with pytest.raises(ValueError, match=r"none of the images can be read: a\.png: not an image"):
        load(tmp_path / "text")
    half = fill(tmp_path / "half")
    for path in half.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"none of the images can be read: 000\.png"):
        load(half)
    assert not list(cache.glob("*"))


def test_images_that_are_all_the_same_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to learn"):
        load(fill(tmp_path / "same", [COLOUR[0]] * 12))


def test_a_single_image_is_too_few(folder):
    with pytest.raises(ValueError, match="too few training examples: 1 of at least 10"):
        load(folder / "000.png")


# The cache


def never(*_):
    raise AssertionError("must not be called")


def test_the_second_load_decodes_nothing(folder, monkeypatch, cache):
    first = load(folder)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]
    monkeypatch.setattr(encoded, "read_header", never)
    monkeypatch.setattr(encoded, "decode", never)
    second = load(folder)
    assert np.array_equal(everything(first), everything(second))
    assert (first.fingerprint, first.notes) == (second.fingerprint, second.notes)


@pytest.mark.parametrize("options", [{"image_size": 16}, {"channels": "grey"}])
def test_other_options_are_another_cache(folder, options):
    assert load(folder).shape != load(folder, **options).shape


def test_a_changed_file_is_decoded_again(folder):
    first = load(folder)
    Image.fromarray(255 - COLOUR[0]).save(folder / "000.png")
    second = load(folder)
    assert np.array_equal(everything(second)[0], 255 - COLOUR[0].transpose(2, 0, 1))
    assert first.fingerprint != second.fingerprint


def test_a_touched_copy_keeps_its_fingerprint(folder):
    first = load(folder)
    os.utime(folder / "000.png", (0, 0))
    assert load(folder).fingerprint == first.fingerprint


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_damaged_cache_is_made_again(folder, cache, suffix):
    expected = everything(load(folder))
    (path,) = cache.glob(f"*{suffix}")
    path.write_bytes(path.read_bytes()[:90])
    assert np.array_equal(everything(load(folder)), expected)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(folder, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(
                OSError, match=r"cannot write the cache .*No space left.*cache_dir"
            ) as caught:
                load(folder)
        assert caught.value.errno == errno.ENOSPC
        assert not list(cache.iterdir())
    assert len(everything(load(folder))) == 24


DECODING = """
import os, sys, time
from pathlib import Path
from equipoise.data import encoded, load

decode, waiting = encoded.ImageReader._decode, Path(sys.argv[2])
def slow(reader, images, key):
    print("decoded")
    while len(list(waiting.iterdir())) < 2:  # until the other one has seen that there is no cache
        time.sleep(0.01)
    time.sleep(0.5)
    return decode(reader, images, key)
read = encoded.read_part
def note(folder, key):
    part = read(folder, key)
    (waiting / str(os.getpid())).touch()
    return part
encoded.ImageReader._decode, encoded.read_part = slow, note
print(len(load(sys.argv[1]).train))
"""


def test_of_processes_that_start_together_one_decodes(folder, cache, tmp_path):
    (tmp_path / "waiting").mkdir()
    command = [sys.executable, "-c", DECODING, folder, tmp_path / "waiting"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(map(len, said)) == [1, 2]
    assert said[0][-1] == said[1][-1]
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]


def test_an_interrupt_leaves_nothing(folder, cache):
    def interrupt(done, total):
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, progress=interrupt)
    assert not list(cache.iterdir())


def test_the_description_comes_last(folder, cache, monkeypatch):
    replace = os.replace

    def fail_at_description(source, target):
        if str(target).endswith(".json"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail_at_description)
        with pytest.raises(OSError, match="Input/output error"):
            load(folder)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]
    assert len(everything(load(folder))) == 24


def test_without_a_home_folder_only_the_cache_needs_a_place(folder, cache, monkeypatch):
    def no_user(_number):
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", no_user)
    monkeypatch.delenv("HOME")
    load(folder)
    monkeypatch.delenv("EQUIPOISE_CACHE")
    load(COLOUR)
    with pytest.raises(FileNotFoundError, match="mnist was not found"):
        load("mnist", data_dir=cache)
    with pytest.raises(ValueError, match=r"no place for the cache.*in \$EQUIPOISE_CACHE"):
        load(folder)
    load(folder, cache_dir=cache)


@pytest.mark.parametrize(
    "arguments",
    [
        {"source": "~nobody-of-that-name/pictures"},
        {"source": "mnist", "data_dir": "~nobody-of-that-name"},
        {"source": "digits", "cache_dir": "~nobody-of-that-name"},
    ],
)
def test_the_home_of_nobody_is_refused_by_name(arguments):
    with pytest.raises(ValueError, match=r"~nobody-of-that-name.*give the whole path"):
        load(**arguments)


def test_a_cache_that_cannot_be_made(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write the cache"):
        load(folder, cache_dir=tmp_path / "file" / "inside")


def test_progress_counts_headers_and_pixels(folder, monkeypatch):
    monkeypatch.setattr(encoded, "IN_FLIGHT", 7)
    (folder / "004.png").write_bytes(b"")
    calls = []
    load(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == [
        (done, 48) for done in range(1, 49) if done != 25
    ]  # the unreadable one has no pixels


# CelebA


def faces(folder, count=40, size=(89, 109)):
    noise = RANDOM.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return fill(folder, [np.asarray(Image.fromarray(face).resize(size)) for face in noise], "jpg")


def test_celeba_without_a_partition_tests_on_the_last_eighth(tmp_path):
    faces(tmp_path / "celeba" / "img_align_celeba")
    for place in (tmp_path, tmp_path / "celeba", tmp_path / "celeba" / "img_align_celeba"):
        data = load("celeba", data_dir=place)
        assert (data.name, data.shape) == ("celeba", (3, 64, 64))
        assert [len(part) for part in (data.train, data.validation, data.test)] == [31, 4, 5]


@pytest.mark.parametrize("name", ["list_eval_partition.txt", "list_eval_partition.csv"])
def test_celeba_with_a_partition(tmp_path, name):
    faces(tmp_path / "celeba" / "img_align_celeba")
    separator = " " if name.endswith("txt") else ","
    lines = [f"{n:03d}.jpg{separator}{2 if n < 6 else 1 if n < 9 else 0}" for n in range(40)] + [
        "999.jpg 0"
    ]
    (tmp_path / "celeba" / name).write_text(
        "\n".join(["image_id,partition"] * (separator == ",") + lines)
    )
    data = load("celeba", data_dir=tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [31, 3, 6]
    whole = everything(load(tmp_path / "celeba" / "img_align_celeba", image_size=64))
    assert np.abs(data.test[:].mean((1, 2, 3)) - whole[:6].mean((1, 2, 3))).max() < 20


@pytest.mark.parametrize(("size", "crop"), [((178, 218), 140), ((89, 109), 70)])
def test_celeba_cuts_the_usual_square(tmp_path, size, crop):
    (width, height), margin = size, 2
    images = RANDOM.integers(0, 30, (12, height, width, 3), dtype=np.uint8)
    left, top = (width - crop) // 2 - margin, (height - crop) // 2 - margin
    images[:, top : height - top, left : width - left] += 220
    fill(tmp_path / "img_align_celeba", images, "jpg", quality=98)
    data = load("celeba", data_dir=tmp_path)
    assert (
        data.train[:].min() > 150
    )  # nothing of the dark frame, which begins two pixels further out
    assert load("celeba", data_dir=tmp_path, image_size=32, channels="grey").shape == (1, 32, 32)


def test_celeba_that_is_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="img_align_celeba") as caught:
        load("celeba", data_dir=tmp_path, download=True)
    assert str(tmp_path / "celeba" / "img_align_celeba") in str(caught.value)
    assert "--download" not in str(caught.value)


# Hugging Face


class FakeTable:
    _fingerprint = "1234"

    def __init__(self, columns, rows):
        self.features, self.rows = columns, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]

    def cast_column(self, column, feature):
        assert not feature.decode
        return self


@pytest.fixture
def hub(monkeypatch):
    """A module called datasets, whose load_dataset answers from a dictionary."""
    module = types.ModuleType("datasets")

    class FakeImage:
        def __init__(self, decode=True):
            self.decode = decode

    def load_dataset(address, data_files=None):
        if address not in module.sets:
            raise FileNotFoundError(f"Dataset '{address}' doesn't exist on the Hub")
        return module.sets[address]

    def table(images, columns=("image",)):
        rows = []
        for pixels in images:
            content = BytesIO()
            Image.fromarray(pixels).save(content, "PNG")
            rows.append({column: {"bytes": content.getvalue(), "path": None} for column in columns})
        return FakeTable({"label": "int64"} | dict.fromkeys(columns, FakeImage()), rows)

    module.sets, module.Image, module.load_dataset, module.table = (
        {},
        FakeImage,
        load_dataset,
        table,
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_images_with_their_own_parts(hub, monkeypatch):
    hub.sets["a/b"] = {"train": hub.table(COLOUR[:12]), "test": hub.table(COLOUR[12:])}
    data = load("hf:a/b")
    assert (data.name, data.source, data.shape) == ("a/b", "hf:a/b", (3, 12, 10))
    assert np.array_equal(data.test[:], COLOUR[12:].transpose(0, 3, 1, 2))
    assert [len(data.train), len(data.validation)] == [11, 1]
    monkeypatch.setattr(encoded, "read_header", never)
    assert load("hf:a/b").fingerprint == data.fingerprint


def test_hub_images_by_path_and_a_single_part(hub, folder):
    table = hub.table(COLOUR)
    table.rows = [
        {"image": {"bytes": None, "path": str(path)}} for path in sorted(folder.iterdir())
    ]
    table.rows[3]["image"]["path"] = "gone.png"
    hub.sets["a/b"] = {"all": table}
    data = load("hf:a/b")
    assert np.array_equal(everything(data), np.delete(COLOUR, 3, 0).transpose(0, 3, 1, 2))
    assert "train row 3" in data.notes[0]


def test_hub_names_the_column_it_takes(hub):
    hub.sets["a/b"] = {"train": hub.table(COLOUR, ("mask", "image"))}
    assert "of the image columns mask, image, image is used" in load("hf:a/b").notes


def test_hub_refusals(hub):
    hub.sets["no/image"] = {"train": FakeTable({"label": "int64", "text": "string"}, [])}
    hub.sets["no/train"] = {"one": hub.table(COLOUR), "two": hub.table(COLOUR)}
    for address, message in [
        ("no/image", r"no column of images; its columns are label \(int64\), text \(string\)"),
        ("no/train", "no part called train, only one, two"),
        ("no/set", "could not be loaded: .*doesn't exist on the Hub"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(f"hf:{address}")


def test_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'equipoise\[hub\]'"):
        load("hf:a/b")


def test_named_sets_are_fetched_only_if_asked(hub):
    hub.sets["ylecun/mnist"] = {
        "train": hub.table(COLOUR[:14, ..., 0]),
        "test": hub.table(COLOUR[14:, ..., 0]),
    }
    with pytest.raises(FileNotFoundError, match="--download"):
        load("mnist")
    data = load("mnist", download=True)
    assert (data.name, data.source, data.shape, len(data.test)) == (
        "mnist",
        "hf:ylecun/mnist",
        (1, 12, 10),
        10,
    )


def test_a_part_of_the_cache_without_values_is_made_anew(tmp_path):
    part = tmp_path / "key.npy"
    np.save(part, np.zeros((5, 1, 0, 8), np.uint8))
    about = {"digest": "", "low": 0.0, "high": 0.0, "n_constant": 0, "notes": []}
    (tmp_path / "key.json").write_text(json.dumps(about))
    assert read_part(tmp_path, "key") is None
