"""Image files at full depth: 16 bits, real numbers, bands and pages, with all their values."""

import struct
import sys
import zlib
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from equipoise.data import load, load_examples, split
from equipoise.data.images import decode, make_plan, read_header
from equipoise.text import parse_size

tifffile = pytest.importorskip("tifffile")

RANDOM = np.random.default_rng(0)
N, HEIGHT, WIDTH = 12, 9, 11


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def values(dtype, *, bands=1, n=N, height=HEIGHT, width=WIDTH):
    """Examples of every value that a type has, (n, H, W, B)."""
    shape = (n, height, width, bands)
    if np.dtype(dtype).kind == "f":
        return RANDOM.normal(size=shape).astype(dtype) * 1000
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max, shape, dtype, endpoint=True)


def png16(pixels):
    """A PNG of 16 bits a value, as no common library of Python writes it, (H, W, B)."""
    height, width, bands = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    return content


def folder_of(path, examples, write):
    path.mkdir()
    for number, example in enumerate(examples):
        write(path / f"{number:02d}", example)
    return path


def everything(data):
    parts = [data.train, data.validation, data.test]
    rows = np.argsort(np.concatenate([part.indices for part in parts]))
    return np.concatenate([part[:] for part in parts])[rows]


def write_tiff(path, example, **options):
    bands = example.shape[2]
    photometric = "rgb" if bands == 3 else "minisblack"
    planar = {} if bands == 1 else {"planarconfig": "contig"}
    pixels = example[..., 0] if bands == 1 else example
    tifffile.imwrite(path.with_suffix(".tif"), pixels, photometric=photometric, **planar, **options)


def write_planes(path, example):
    tifffile.imwrite(
        path.with_suffix(".tif"),
        example.transpose(2, 0, 1),
        photometric="rgb" if example.shape[2] == 3 else "minisblack",
        planarconfig="separate",
    )


def write_png(path, example):
    path.with_suffix(".png").write_bytes(png16(example))


def write_pgm(path, example):
    pixels = Image.fromarray(example[..., 0])
    pixels.save(path.with_suffix(".pgm"))


@pytest.mark.parametrize(
    ("dtype", "bands", "write"),
    [
        ("uint16", 1, write_png),
        ("uint16", 3, write_png),
        ("uint16", 1, write_pgm),
        *[
            (dtype, bands, write_tiff)
            for dtype in ("uint8", "uint16", "int16", "int32", "uint32", "float32")
            for bands in (1, 2, 3, 4, 5, 40)
        ],
        ("int8", 2, write_tiff),
        ("float64", 2, write_tiff),
        ("uint8", 3, write_planes),
        ("uint16", 3, write_planes),
        ("float32", 6, write_planes),
        ("uint16", 1, lambda path, x: write_tiff(path, x, compression="zlib", predictor=2)),
        ("uint16", 3, lambda path, x: write_tiff(path, x, compression="zlib")),
        ("uint16", 5, lambda path, x: write_tiff(path, x, compression="zlib")),
        ("uint16", 1, lambda path, x: write_tiff(path, x, byteorder=">")),
        ("uint16", 3, lambda path, x: write_tiff(path, x, byteorder=">")),
        ("float32", 5, lambda path, x: write_tiff(path, x, byteorder=">")),
    ],
)
def test_every_value_of_a_file_arrives(tmp_path, dtype, bands, write):
    examples = values(dtype, bands=bands)
    data = load(folder_of(tmp_path / "deep", examples, write))
    stored = data.train.base
    assert stored.dtype == (np.float32 if dtype == "float64" else dtype)
    assert np.array_equal(stored, examples.transpose(0, 3, 1, 2).astype(stored.dtype))
    assert data.shape == (bands, HEIGHT, WIDTH)

    # The types that models take: none has less than the file.
    taken = "float32" if dtype in ("float32", "float64", "int32", "uint32") else "int32"
    assert data.train.dtype == ("uint8" if dtype == "uint8" else taken)


@pytest.mark.parametrize("bands", [2, 4])
def test_deep_transparency_is_laid_on_white(tmp_path, bands):
    examples = values("uint16", bands=bands)
    examples[..., -1] = np.where(examples[..., 0] > 30_000, 65_535, 0)
    if bands == 2:
        notes = load(folder_of(tmp_path / "grey", examples, write_png)).notes
        assert "images of more than 8 bits, reduced to 8: 12" in notes
        return

    data = load(folder_of(tmp_path / "layers", examples, write_png))
    is_white = examples[..., -1] == 0
    expected = np.where(is_white[..., None], 65_535, examples[..., :-1])
    assert np.array_equal(everything(data), expected.transpose(0, 3, 1, 2))
    assert "images with transparency, laid on white: 12" in data.notes


def test_a_fourth_band_is_transparency_only_if_the_file_says_so(tmp_path):
    examples = values("uint8", bands=4)
    bands = load(folder_of(tmp_path / "bands", examples, write_tiff))
    assert np.array_equal(everything(bands), examples.transpose(0, 3, 1, 2))

    def write(path, example):
        tifffile.imwrite(
            path.with_suffix(".tif"), example, photometric="rgb", extrasamples=["unassalpha"]
        )

    assert load(folder_of(tmp_path / "layers", examples, write)).shape == (3, HEIGHT, WIDTH)


def test_eight_bits_beside_sixteen_become_sixteen(tmp_path):
    folder = folder_of(tmp_path / "mixed", values("uint16"), write_png)
    eight = values("uint8")[0, ..., 0]
    Image.fromarray(eight).save(folder / "99.png")
    data = load(folder)
    assert np.array_equal(everything(data)[-1, 0], eight.astype(int) * 257)
    note = "images of 8 bits taken as those of 16, multiplied by 257: 1"
    assert note in data.notes

    # A model takes them in the same way, whichever files lie beside them.
    said = []
    for source in (folder / "99.png", folder):
        found = load_examples(source, data.shape, is_wide=True, on_note=said.append)
        assert np.array_equal(found[:][-1, 0], eight.astype(int) * 257)
    assert said.count(note) == 2
    narrow = load_examples(folder / "99.png", data.shape)
    assert np.array_equal(narrow[:][0, 0], eight)


def test_images_that_do_not_go_together(tmp_path):
    """A few of another kind are left out by name; where they are many, the user has to choose."""
    folder = folder_of(tmp_path / "mixed", values("uint8", n=20), write_tiff)
    write_tiff(folder / "98", values("float32")[0])
    write_tiff(folder / "99", values("uint8", bands=5)[0])
    note = load(folder).notes[0]
    assert note.startswith("unreadable files skipped: 2 (98.tif: has float32 values where the oth")
    assert "99.tif: has 5 bands where the others have 1" in note

    for number in range(60, 70):
        write_tiff(folder / str(number), values("float32")[0])
    with pytest.raises(
        ValueError, match=r"do not go together: grey and colour, 8 or 16 bits \(20\)"
    ):
        load(folder)
    with pytest.raises(ValueError, match="5 bands do not become rgb"):
        load(folder_of(tmp_path / "b", values("uint8", bands=5), write_tiff), channels="rgb")


def test_deep_images_are_resized_in_their_own_unit(tmp_path):
    ramp = np.linspace(30_000, 31_020, 40).round().astype(np.uint16)
    examples = np.tile(ramp[None, None, :, None], (N, 20, 1, 1))
    examples += np.arange(N, dtype=np.uint16)[:, None, None, None]
    data = load(folder_of(tmp_path / "ramps", examples, write_png), image_size="20x10")
    small = everything(data).astype(int)
    assert small.shape == (N, 1, 10, 20)
    inner = small[:, 0, :, 1:-1] - np.arange(N)[:, None, None]
    assert np.abs(inner - ramp.reshape(20, 2).mean(1).round()[1:-1]).max() <= 1
    assert small.min() >= 30_000
    assert small.max() <= 31_020 + N

    grey = load(
        folder_of(tmp_path / "colour", values("uint16", bands=3), write_png), channels="grey"
    )
    assert grey.shape == (1, HEIGHT, WIDTH)
    assert len(np.unique(everything(grey))) > 500


@pytest.mark.parametrize(
    ("dtype", "bands", "write"),
    [("uint16", 5, write_tiff), ("uint16", 3, write_tiff), ("uint16", 3, write_png)],
)
def test_files_in_memory_are_read_as_those_on_disk(tmp_path, dtype, bands, write):
    """As those that are dropped on the explorer's page, and those of a table."""
    (example,) = values(dtype, bands=bands, n=1)
    write(tmp_path / "one", example)
    (path,) = tmp_path.glob("one.*")
    upload = BytesIO(path.read_bytes())
    header = read_header(upload)
    plan = make_plan(Counter([header]), None, None, None, "the image")
    for file in (upload, path):
        assert np.array_equal(decode(file, plan), example.transpose(2, 0, 1)[None])


# Pages


def write_pages(path, example):
    tifffile.imwrite(path.with_suffix(".tif"), example.transpose(2, 0, 1), photometric="minisblack")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_pages_are_examples_channels_or_the_first_alone(tmp_path, dtype):
    examples = values(dtype, bands=5)
    folder = folder_of(tmp_path / "stacks", examples, write_pages)
    pages = examples.transpose(0, 3, 1, 2)

    each = load(folder)
    assert np.array_equal(everything(each), pages.reshape(60, 1, HEIGHT, WIDTH))
    assert "12 files have 60 pages; each page is an example" in each.notes[0]
    part = each.validation
    assert part.names() == [f"{i // 5:02d}.tif, page {i % 5 + 1}" for i in part.indices]

    channels = load(folder, pages="channels")
    assert np.array_equal(everything(channels), pages)
    assert "the pages of a file are the channels" in channels.notes[0]

    first = load(folder, pages="first")
    assert np.array_equal(everything(first), pages[:, :1])
    assert "only the first page is read" in first.notes[0]
    assert load_examples(folder, (5, HEIGHT, WIDTH), pages="channels", on_note=str).names() == [
        f"{i:02d}.tif" for i in range(N)
    ]


@pytest.mark.parametrize("own", [(), ("test",), ("val", "test")])
def test_all_pages_of_a_file_are_in_one_part(tmp_path, own):
    examples = values("uint8", bands=5)
    if not own:
        folder_of(tmp_path / "stacks", examples, write_pages)
    else:
        (tmp_path / "stacks").mkdir()
    for part in ("train", *own) if own else ():
        folder_of(tmp_path / "stacks" / part, examples, write_pages)

    data = load(tmp_path / "stacks")
    files = [{name.split(",")[0] for name in part.names()} for part in parts_of(data)]
    assert all(files)
    assert sum(map(len, files)) == len(set.union(*files)) == N * (1 + len(own))
    assert any("all pages of a file are in the same part" in note for note in data.notes) == (
        len(own) < 2
    )


def test_pages_of_few_files_are_split_with_a_note(tmp_path):
    folder = folder_of(tmp_path / "stacks", values("uint8", bands=5)[:9], write_pages)
    data = load(folder)
    assert [len(part) for part in parts_of(data)] == [len(part) for part in split(45)]
    assert any("pages of the same file are in several parts" in note for note in data.notes)


def parts_of(data):
    return data.train, data.validation, data.test


def test_files_of_different_numbers_of_pages_are_no_channels(tmp_path):
    folder = folder_of(tmp_path / "stacks", values("uint8", bands=5), write_pages)
    write_pages(folder / "99", values("uint8", bands=4)[0])
    assert len(everything(load(folder))) == 64
    with pytest.raises(ValueError, match="files of 4, 5 pages; as channels, all need the same"):
        load(folder, pages="channels")


def test_all_frames_of_an_animation(tmp_path):
    examples = values("uint8", bands=3, n=30)
    (tmp_path / "moving").mkdir()
    frames = [Image.fromarray(example) for example in examples]
    for number in range(10):
        first, *others = frames[3 * number : 3 * number + 3]
        path = tmp_path / "moving" / f"{number}.webp"
        first.save(path, save_all=True, append_images=others, lossless=True)
    data = load(tmp_path / "moving")
    assert np.array_equal(everything(data), examples.transpose(0, 3, 1, 2))
    assert "10 files have 30 pages" in data.notes[0]


@pytest.mark.parametrize(
    ("axes", "shape", "n", "channels"),
    [("ZYX", (3, 9, 11), 3, 1), ("TCYX", (4, 2, 9, 11), 4, 2), ("CYX", (7, 9, 11), 1, 7)],
)
@pytest.mark.parametrize("kind", ["ome", "imagej"])
def test_axes_with_names_are_those_that_they_are(tmp_path, axes, shape, n, channels, kind):
    stacks = RANDOM.integers(0, 2**16, (N, *shape), dtype=np.uint16)
    (tmp_path / "stacks").mkdir()
    for number, stack in enumerate(stacks):
        path = tmp_path / "stacks" / f"{number:02d}.ome.tif"
        tifffile.imwrite(path, stack, metadata={"axes": axes}, **{kind: True})
    data = load(tmp_path / "stacks")
    assert np.array_equal(everything(data), stacks.reshape(N * n, channels, 9, 11))


def test_a_single_file_of_many_pages_is_a_data_set(tmp_path):
    pages = values("uint16", bands=20)[0]
    write_pages(tmp_path / "film", pages)
    data = load(tmp_path / "film.tif")
    assert np.array_equal(everything(data)[:, 0], pages.transpose(2, 0, 1))


# What may not be read


def test_without_tifffile_the_message_says_what_to_install(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "bands", values("uint8", bands=5), write_tiff)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"pip install 'equipoise\[images\]'"):
        load(folder)


def test_a_stack_that_unpacks_to_more_than_it_shows_is_skipped(tmp_path):
    folder = folder_of(tmp_path / "bands", values("uint8", bands=5), write_tiff)
    write_tiff(folder / "98", values("uint8", bands=5)[0], compression="zlib", rowsperstrip=HEIGHT)
    whole = (folder / "98.tif").read_bytes()
    with tifffile.TiffFile(folder / "98.tif") as tiff:
        page = tiff.pages[0]
        offset, count = page.dataoffsets[0], page.databytecounts[0]
        place = page.tags["StripOffsets"].valueoffset, page.tags["StripByteCounts"].valueoffset
        assert offset + count <= len(whole)
    bomb = zlib.compress(bytes(20_000_000))
    content = bytearray(whole + bomb)
    struct.pack_into("<I", content, place[0], len(whole))
    struct.pack_into("<I", content, place[1], len(bomb))
    (folder / "98.tif").write_bytes(content)
    assert "98.tif: a part of it unpacks to more than its place" in load(folder).notes[0]

    tifffile.imwrite(folder / "99.tif", np.zeros((5, 9, 11), np.uint8), photometric="minisblack")
    assert "98.tif" in load(folder, max_pixels=10_000).notes[0]
    with pytest.raises(ValueError, match="pixels, more than 50"):
        load(folder, max_pixels=50)


@pytest.mark.parametrize("image_size", [None, 8])
def test_files_with_values_that_are_no_numbers_are_named(tmp_path, image_size):
    examples = values("float32", n=20)
    examples[7, 3, 4] = np.nan
    folder = folder_of(tmp_path / "float", examples, write_tiff)
    note = load(folder, image_size=image_size).notes[0]
    assert note == "unreadable files skipped: 1 (07.tif: has 1 values that are NaN or infinite)"


@pytest.mark.parametrize("content", [b"II*\0garbage", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_files_are_named_and_nothing_else_is_printed(tmp_path, capfd, content):
    folder = folder_of(tmp_path / "bands", values("uint8", bands=5), write_tiff)
    (folder / "99.tif").write_bytes(content)
    assert load(folder).notes[0].startswith("unreadable files skipped: 1 (99.tif: not an image")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{"pages": "channels"}, {"fit": "pad"}])
def test_options_of_files_are_refused_for_arrays(options):
    with pytest.raises(ValueError, match="are for image files"):
        load(np.zeros((20, 9, 9)), **options)


@pytest.mark.parametrize(("size", "sides"), [(64, (64, 64)), ("64", (64, 64)), ("64x48", (64, 48))])
def test_sizes_are_one_side_or_two(size, sides):
    assert parse_size(size) == sides


@pytest.mark.parametrize("size", ["64x", "x", "axb", "1x2x3", "-4", "٣"])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        parse_size(size)


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_the_three_ways_to_fit(tmp_path, mode):
    """A white image of 40 x 20 with a black left half, at 20 x 20."""
    white = 255 if mode == "L" else 65_535
    pixels = np.zeros((N, 20, 40), np.uint8 if mode == "L" else np.uint16)
    pixels[:, :, 20:] = white
    pixels[:, 0, 12] = np.arange(N)
    folder = tmp_path / "wide"
    folder.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")

    def image_of(fit):
        return everything(load(folder, image_size=20, fit=fit))[0, 0].astype(int)

    cropped, padded, stretched = map(image_of, ("crop", "pad", "stretch"))
    assert np.array_equal(cropped[:, [0, -1]], [[0, white]] * 20)
    assert cropped[:, 10:].min() == white
    assert padded[[0, 4, 15, 19]].max() == 0
    assert padded[5:15, 12:].min() == white
    assert stretched[:, 12:].min() == white
    assert stretched[2:, :8].max() == 0
    assert (
        "images of other proportions, with black bars: 12"
        in load(folder, image_size=20, fit="pad").notes
    )
