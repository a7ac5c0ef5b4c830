"""Untrusted input: what claims too much, is no file, or starts other programs is refused."""

import gzip
import inspect
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

import equipoise
from equipoise.cli import main
from equipoise.data import load, load_stream
from equipoise.data.cache import one_writer, read_part
from equipoise.data.encoded import ImageReader, list_images
from equipoise.data.gate import DECODING, ByteBudget, Limits, open_image
from equipoise.data.idx import read_idx_images
from equipoise.files import MANIFEST, StoreError, own_folder, write_json
from equipoise.records import LoadArguments, StreamArguments, check_record


def pictures(folder, n=12, size=(10, 9)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(n):
        pixels = rng.integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def png_that_claims(width, height):
    """A PNG of a few hundred bytes whose header announces any size."""
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "png")
    whole = bytearray(content.getvalue())
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    return bytes(whole)


def npy_bytes(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


NPY_HEADERS = [
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,)}",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 5)}",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
    b"{'descr': 'nonsense', 'fortran_order': False, 'shape': (3,)}",
    b"{'descr': '<f4', 'fortran_order': 1, 'shape': [3]}",
    b"(" * 4000,
    b"'''",
    b"\xff\xfe",
    b"",
]


@pytest.mark.parametrize("header", NPY_HEADERS, ids=range(len(NPY_HEADERS)))
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_a_header_that_lies_or_cannot_be_parsed(tmp_path, header, ending):
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + bytes(40)
    path = tmp_path / f"x{ending}"
    if ending == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    with pytest.raises(ValueError, match=f"x{ending} cannot be read") as caught:
        load(path)
    assert len(str(caught.value)) < 600


def zip_of(path, flags=0, method=zipfile.ZIP_DEFLATED, size=None):
    """An archive with one array whose entries in the directory are then patched."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", npy_bytes(np.zeros((50, 4), np.float32)))
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.index(signature)
        content[start + at] |= flags
        if size is not None:
            content[start + at + 16 : start + at + 20] = struct.pack("<I", size)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flags": 1}, "encrypted"),
        ({"method": zipfile.ZIP_BZIP2}, "compressed in an unusual way"),
        ({"method": zipfile.ZIP_LZMA}, "compressed in an unusual way"),
        ({"size": 4_000_000_000}, "unpacks to 4,000,000,000 bytes"),
        ({"size": 10}, "x: "),
    ],
)
def test_archives_that_were_patched(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load(zip_of(tmp_path / "x.npz", **options))


def test_a_header_of_hundreds_of_megabytes_is_not_read(tmp_path):
    """It deflates to less than a megabyte, and NumPy would read all of it before it refuses."""
    n_bytes = 300_000_000
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        file.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", n_bytes))
        for _ in range(30):
            file.write(b" " * (n_bytes // 30))

    with pytest.raises(ValueError, match="announces more than 10000 bytes of itself"):
        load(tmp_path / "x.npz")


def test_names_in_an_archive_do_not_fill_the_screen(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a\n\x1b[31mb.npy", b"")
        for number in range(3000):
            archive.writestr(f"{'n' * 500}{number}.npy", b"")
    with pytest.raises(ValueError, match=r"it holds a\\n\\x1b\[31mb, nnn") as caught:
        load(tmp_path / "x.npz")
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("kind", ["pipe", "large", "no text"])
def test_a_list_of_parts_that_cannot_be_read(tmp_path, kind):
    folder = pictures(tmp_path / "celeba" / "img_align_celeba")
    path = folder / "list_eval_partition.txt"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"\xff\xfe")
    if kind == "large":
        os.truncate(path, 10_000_000_000)
    message = {"pipe": "not a regular file", "large": "more than", "no text": "is no text"}[kind]
    with pytest.raises(ValueError, match=message):
        load("celeba", data_dir=tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for _ in range(2):
            archive.writestr("x.npy", npy_bytes(np.zeros((50, 4), np.float32)))
    with pytest.raises(ValueError, match="two of its arrays have the same name"):
        load(tmp_path / "x.npz")


def test_what_unpacks_to_too_much_is_refused_and_may_be_allowed(tmp_path):
    path = tmp_path / "x.npz"
    table = np.tile(np.random.default_rng(0).normal(size=(100, 10)), (200, 1)).astype(np.float32)
    np.savez_compressed(path, x=table)
    with pytest.raises(ValueError, match=r"give max_bytes=\d+"):
        load(path, max_bytes=1000)
    assert load(path, max_bytes=table.nbytes + 1000).shape == (10,)


def test_a_gzip_that_announces_more_than_it_may(tmp_path):
    path = tmp_path / "x.gz"
    for shape in ((2**31, 2, 2), (2**32 - 1,) * 3):
        path.write_bytes(gzip.compress(struct.pack(">4I", 0x0803, *shape) + bytes(100)))
        with pytest.raises(ValueError, match="unpacks to"):
            read_idx_images(path)


def test_a_gzip_is_unpacked_as_far_as_announced(tmp_path):
    """A bomb behind a small header: what follows is not unpacked."""
    path = tmp_path / "x.gz"
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">4I", 0x0803, 2, 3, 4))
        for _ in range(50):
            file.write(bytes(10_000_000))
    with pytest.raises(ValueError, match="holds 41 bytes where its header"):
        read_idx_images(path)


@pytest.mark.parametrize("side", [8000, 13_000, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_claims_many_pixels_is_skipped(tmp_path, side):
    folder = pictures(tmp_path / "photos")
    (folder / "bomb.png").write_bytes(png_that_claims(side, side))
    data = load(folder, image_size=8, cache_dir=tmp_path / "cache")
    assert any("unreadable files skipped: 1 (bomb.png" in note for note in data.notes)
    assert len(data.train) + len(data.validation) + len(data.test) == 12


def test_a_limit_of_ones_own(tmp_path):
    folder = pictures(tmp_path / "photos")
    with pytest.raises(ValueError, match="more than 50; make it smaller, or raise max_pixels"):
        load(folder, image_size=8, cache_dir=tmp_path / "cache", max_pixels=50)
    data = load(folder, image_size=8, cache_dir=tmp_path / "cache", max_pixels=90)
    assert data.loading["max_pixels"] == 90


def test_a_limit_that_is_raised_lets_in_what_was_skipped(tmp_path):
    """The cache knows with which limit its images were chosen."""
    folder, cache = pictures(tmp_path / "photos"), tmp_path / "cache"
    Image.new("RGB", (100, 100)).save(folder / "big.png")

    def count(**limits):
        data = load(folder, image_size=8, cache_dir=cache, **limits)
        return len(data.train) + len(data.validation) + len(data.test)

    assert [count(max_pixels=5000), count(), count(max_pixels=5000)] == [12, 13, 12]


def test_a_run_finds_its_data_again_with_its_own_limits(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "photos", n=30)
    Image.new("RGB", (100, 100)).save(folder / "big.png")
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    call = ["train", str(folder), "--out", str(tmp_path / "run"), "--max-pixels", "5000"]
    call += ["--max-bytes", "1000000", "--set", "image_size=8", "width=1", "latent_dim=2"]
    main([*call, "stage_1_epochs=1", "stage_2_epochs=0", "n_components=1"])

    run = equipoise.Run(tmp_path / "run")
    data = run.data()
    assert data.fingerprint == run.settings()["data"]["fingerprint"]
    assert data.loading["max_pixels"] == 5000
    assert data.loading["max_bytes"] == 1_000_000


@pytest.mark.parametrize(
    ("function", "record", "own"),
    [(load, LoadArguments, {"source"}), (load_stream, StreamArguments, {"source", "stream"})],
)
def test_whatever_is_recorded_of_a_loading_can_be_read_back(function, record, own):
    """A new argument that its record lacks would make runs that no command can read."""
    # Names of columns, labels and levels are given for arrays in memory, which are not recorded.
    of_the_moment = {"cache_dir", "progress", "say", "names", "labels", "levels"}
    arguments = set(inspect.signature(function).parameters) - of_the_moment
    assert arguments | own == set(record.__annotations__)


def test_a_recorded_limit_that_was_altered_is_refused(tmp_path):
    for value in (0, -1, "many", 2.5, True, 10**30):
        with pytest.raises(StoreError, match="max_pixels"):
            check_record({"source": "digits", "max_pixels": value}, LoadArguments, "config.json")


def test_a_stream_of_batches_has_no_limit_on_pixels():
    with pytest.raises(ValueError, match="max_pixels are for Hugging Face data"):
        load_stream(lambda: iter([np.zeros((20, 3))]), max_pixels=10)


def test_a_limit_that_a_stream_does_not_have_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "hf:x", "--stream", "--max-bytes", "5"])
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert "--max-bytes is for .npz and .gz files" in printed
    assert "Traceback" not in printed


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("content", ["large", "broken", "none"])
def test_an_image_that_a_stream_cannot_read_is_named(tmp_path, content):
    datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    cells = []
    for side in (10,) * 30:
        file = io.BytesIO()
        Image.new("L", (side, side)).save(file, "png")
        cells.append({"bytes": file.getvalue(), "path": None})
    cells[7] = {
        "large": {"bytes": png_that_claims(9000, 9000), "path": None},
        "broken": {"bytes": b"\x89PNG\r\n\x1a\n" + b"x" * 50, "path": None},
        "none": None,
    }[content]

    features = datasets.Features({"image": datasets.Image(decode=False)})
    table = datasets.Dataset.from_dict({"image": cells}, features=features)
    table = table.cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="the image in row 7 cannot be read"):
        load_stream(table, image_size=8)
    if content == "large":
        with pytest.raises(ValueError, match="the image in row 0 cannot be read: it has 10 x 10"):
            load_stream(table, image_size=8, max_pixels=50)


@pytest.mark.parametrize("name", ["eps", "PostScript in a .png"])
def test_postscript_is_never_started(tmp_path, name):
    folder = pictures(tmp_path / "photos")
    content = io.BytesIO()
    Image.new("RGB", (10, 9)).save(content, "eps")
    (folder / "evil.png").write_bytes(content.getvalue())
    data = load(folder, cache_dir=tmp_path / "cache")
    assert any("skipped: 1 (evil.png: not an image" in note for note in data.notes)
    with pytest.raises(ValueError, match="no image that can be read"):
        open_image(io.BytesIO(content.getvalue())).__enter__()


def test_pipes_devices_and_sockets_are_left_out_by_name(tmp_path):
    folder = pictures(tmp_path / "photos")
    os.mkfifo(folder / "pipe.png")
    (folder / "null.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "s.png"))
        data = load(folder, cache_dir=tmp_path / "cache")
    (note,) = [note for note in data.notes if "pipes" in note]
    assert note == "pipes, devices and sockets ignored: 3 (null.jpg, pipe.png, s.png)"


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is not a regular file"):
        load(tmp_path / name)


def test_links_that_lead_nowhere_are_named(tmp_path):
    folder = pictures(tmp_path / "photos")
    (folder / "broken.png").symlink_to(folder / "none")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "folder.png").symlink_to(folder)
    data = load(folder, cache_dir=tmp_path / "cache")
    (note,) = [note for note in data.notes if "unreadable" in note]
    assert note.startswith("unreadable files skipped: 2 (broken.png: ")
    assert "self.png: " in note
    assert "links to folders that are read anyway, not followed: 1 (folder.png)" in data.notes
    assert len(data.train) + len(data.validation) + len(data.test) == 12


def test_a_photo_of_several_pictures_is_read(tmp_path):
    """Cameras write such files (MPO) with the ending of JPEG."""
    folder = pictures(tmp_path / "photos")
    picture = Image.new("RGB", (10, 9), "red")
    picture.save(folder / "99.jpg", "mpo", save_all=True, append_images=[picture])
    assert load(folder, cache_dir=tmp_path / "cache").notes == ()


def png_of(*chunks):
    """A grey PNG of 10 x 9 pixels with further chunks before its pixels."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    rows = b"".join(bytes(11) for _ in range(9))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 10, 9, 8, 0, 0, 0, 0))
        + b"".join(chunk(kind, content) for kind, content in chunks)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff_of(*entries):
    """A TIFF of nothing but a directory."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(404)


BOMB = zlib.compress(bytes(20_000_000))
LYING = {
    "iccp.png": png_of((b"iCCP", b"x\0\0" + BOMB)),
    "ztxt.png": png_of(*[(b"zTXt", b"x\0\0" + BOMB)] * 20),
    "itxt.png": png_of(*[(b"iTXt", b"x\0\1\0\0\0" + BOMB)] * 20),
    "frame.gif": b"GIF89a"
    + struct.pack("<HH", 10, 9)
    + b"\x80\0\0\0\0\0\xff\xff\xff,"
    + struct.pack("<HHHH", 0, 0, 65535, 65535)
    + b"\0\2\2\x44\1\0;",
    "short.ppm": b"P5 7000 7000 255\n" + bytes(100),
    "comment.ppm": b"P1 7000 7000\n# " + b"x" * 5_000_000,
    "digits.ppm": b"P2 10 9 255\n" + b"9" * 3_000_000,
    "short.bmp": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 7000, -7000, 1, 8, 1, 0, 0, 0, 0, 0),
    "circle.tif": b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 256, 4, 1, 10, 8),
    "tags.tif": tiff_of((256, 4, 1, 10), (257, 4, 1, 9), (258, 3, 0xFFFFFF, 8), (277, 3, 1, 65535)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LYING)
def test_a_picture_that_unpacks_to_more_than_it_shows_is_skipped(tmp_path, name):
    folder = pictures(tmp_path / "photos")
    (folder / name).write_bytes(LYING[name])
    data = load(folder, image_size=8, cache_dir=tmp_path / "cache")
    assert any(f"unreadable files skipped: 1 ({name}: " in note for note in data.notes)
    assert DECODING.taken == 0


def test_deep_folders_and_circles_of_links(tmp_path):
    folder = pictures(tmp_path / "photos", n=3)
    (folder / "circle").symlink_to(folder)
    inside = str(folder)
    for _ in range(1100):
        inside += "/d"
        os.mkdir(inside)
    shutil.copy(folder / "00.png", inside + "/deep.png")
    try:
        listing = list_images(folder)
        assert len(listing.names) == 4
        assert sum(name.endswith("deep.png") for name in listing.names) == 1
    finally:
        # pytest would recurse.
        subprocess.run(["rm", "-rf", str(folder / "d")], check=True)


def test_folders_deeper_than_a_path_can_say(tmp_path):
    folder = pictures(tmp_path / "photos")
    handle = os.open(folder, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=handle)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)

    try:
        data = load(folder, cache_dir=tmp_path / "cache")
        (note,) = [note for note in data.notes if "cannot be read" in note]
        assert note.startswith("files and folders that cannot be read ignored: 1 (ddd")
        assert note.endswith("File name too long)")
        assert len(note) < 500
        with pytest.raises(ValueError, match="cannot read ddd"):
            load(folder, cache_dir=tmp_path / "cache", strict=True)
    finally:
        subprocess.run(["rm", "-rf", str(folder / ("d" * 200))], check=True)


@pytest.mark.parametrize("call", ["listdir", "lstat"])
def test_what_cannot_be_entered_or_has_gone_is_named(tmp_path, monkeypatch, call):
    folder = pictures(tmp_path / "photos")
    pictures(folder / "locked", n=2)
    original = getattr(os, call)

    def refuse(path, *args, **kwargs):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, call, refuse)
    listing = list_images(folder)
    assert len(listing.names) == 12
    assert listing.unreadable == ("locked: Permission denied",)
    assert listing.notes == (
        "files and folders that cannot be read ignored: 1 (locked: Permission denied)",
    )


def test_a_name_with_a_line_end_stays_on_its_line(tmp_path):
    folder = pictures(tmp_path / "photos")
    (folder / "a\nequipoise: all is well.png").write_bytes(b"x")
    data = load(folder, cache_dir=tmp_path / "cache")
    assert all("\n" not in note for note in data.notes)
    assert any("a\\nequipoise: all is well.png: not an image" in note for note in data.notes)


def test_a_manifest_that_is_a_pipe_or_no_manifest(tmp_path):
    os.mkfifo(pictures(tmp_path / "pipe") / MANIFEST)
    (pictures(tmp_path / "link") / MANIFEST).symlink_to("/dev/zero")
    deep = b'{"wrote":' + b"[" * 100_000
    for number, content in enumerate(
        (b"\xff\xfe", b"[1]", b'{"wrote": 3}', deep, b'{"wrote": "../x"}')
    ):
        (pictures(tmp_path / str(number)) / MANIFEST).write_bytes(content)
    for folder in tmp_path.iterdir():
        assert len(list_images(folder).names) == 12


def test_the_order_of_a_listing(tmp_path):
    for name in ("b.png", "a/z.png", "a/b/c.png", "a.png", "c/a.png", ".hidden/x.png", "a-b.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert list_images(tmp_path).names == [
        "a/b/c.png",
        "a/z.png",
        "a-b.png",
        "a.png",
        "b.png",
        "c/a.png",
    ]


def test_what_equipoise_wrote_is_not_trained_on(tmp_path, monkeypatch, capsys):
    folder = pictures(tmp_path / "photos", n=30, size=(12, 12))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    call = ["train", ".", "--set", "width=1", "latent_dim=2", "stage_1_epochs=1"]
    for _ in range(2):
        main([*call, "stage_2_epochs=0", "n_components=1", "batch_size=8"])
    first, second = (equipoise.Run(folder / "runs" / name) for name in ("photos", "photos-2"))
    assert list(first.figures.glob("*.png"))
    assert second.settings()["data"]["fingerprint"] == first.settings()["data"]["fingerprint"]
    assert capsys.readouterr().out.count("files that equipoise has written ignored") == 1


def test_a_users_file_in_a_folder_of_ours_is_data(tmp_path):
    folder = pictures(tmp_path / "photos")
    own_folder(folder)
    write_json(folder / "a.json", 1)
    with (folder / MANIFEST).open("a") as manifest:
        manifest.write('{"wrote": "00.png"}\n')
    listing = list_images(folder)
    assert "00.png" not in listing.names
    assert len(listing.names) == 11


@pytest.mark.parametrize("damage", ["values", "digest", "types", "shape", "json"])
def test_a_damaged_cache_is_noticed_and_made_anew(tmp_path, damage):
    folder, cache = pictures(tmp_path / "photos"), tmp_path / "cache"
    before = load(folder, cache_dir=cache)
    (values,), (about,) = cache.glob("*.npy"), cache.glob("*.json")
    content = bytearray(values.read_bytes())
    record = json.loads(about.read_text())
    if damage == "values":
        content[-5] ^= 1
        values.write_bytes(content)
    elif damage == "shape":
        np.save(values, np.load(values)[:-1])
    elif damage == "json":
        about.write_text(about.read_text()[:-3])
    else:
        record |= {"digest": "0"} if damage == "digest" else {"notes": 3}
        about.write_text(json.dumps(record))

    assert read_part(cache, values.stem) is None
    again = load(folder, cache_dir=cache)
    assert again.fingerprint == before.fingerprint
    assert "the decoded images in the cache were damaged, and are decoded anew" in again.notes
    assert load(folder, cache_dir=cache).notes == before.notes


def test_a_held_lock_is_waited_for_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr("equipoise.data.cache.SILENT_SECONDS", 0.1)
    is_held, may_go = threading.Event(), threading.Event()

    def hold():
        with one_writer(tmp_path, "key"):
            is_held.set()
            may_go.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait(10)
    threading.Timer(0.5, may_go.set).start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with one_writer(tmp_path, "key"):
            pass
    holder.join()
    assert "waiting for another process that decodes the same images" in str(caught[0].message)


def test_the_memory_of_all_threads_is_bounded():
    budget, taken, most = ByteBudget(100), [], []
    lock = threading.Lock()

    def work(size):
        with budget.take(size):
            with lock:
                taken.append(min(size, 100))
                most.append(sum(taken))
            threading.Event().wait(0.002)
            with lock:
                taken.remove(min(size, 100))

    threads = [threading.Thread(target=work, args=(size,)) for size in (30, 60, 50, 500, 10) * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert max(most) <= 100
    assert budget.taken == 0
    assert len(most) == len(threads)


def test_a_failing_decoder_gives_its_memory_back(tmp_path):
    path = tmp_path / "cut.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40))
    Image.fromarray(noise.astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:300])
    reader = ImageReader(image_size=8, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="none of the images can be read"):
        reader.read(list_images(tmp_path).encoded())
    assert DECODING.taken == 0
    assert Limits().max_pixels == 50_000_000
