"""Arrays, tables, .npy and .npz: what is taken, in which unit, and what is refused."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from equipoise.data import Data, Subset, load, split
from equipoise.data import arrays as arrays_module
from equipoise.data.arrays import level_scale
from equipoise.model import Scaling

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (40, 9, 12), dtype=np.uint8)
TABLE = RANDOM.normal(3, 2, (50, 4))


def everything(data: Data) -> np.ndarray:
    return np.concatenate([data.train[:], data.validation[:], data.test[:]])


def units(data: Data, raw: np.ndarray) -> np.ndarray:
    return (raw - data.offset) / data.scale


# Split


@given(
    st.integers(10, 5000),
    st.floats(0, 0.4, allow_nan=False),
    st.floats(0, 0.4, allow_nan=False),
)
def test_split_is_disjoint_and_covering(count, test_fraction, validation_fraction):
    parts = split(count, test_fraction, validation_fraction)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))
    assert all(np.array_equal(part, np.sort(part)) for part in parts)
    assert (len(parts.test) > 0) == (test_fraction > 0)
    assert (len(parts.validation) > 0) == (validation_fraction > 0)


def test_split_depends_on_the_count_only_and_never_changes():
    assert all(np.array_equal(a, b) for a, b in zip(split(500), split(500), strict=True))
    assert split(20).test.tolist() == [13, 16]  # pinned: published figures rest on it


def test_validation_has_at_most_2000_examples():
    assert [len(part) for part in split(100_000)] == [88_000, 2000, 10_000]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((1.0, 0.1), "test_fraction must be"),
        ((0.1, -0.1), "validation_fraction must be"),
        ((0.6, 0.99), "none"),
    ],
)
def test_split_refuses(fractions, message):
    with pytest.raises(ValueError, match=message):
        split(10, *fractions)


# Subset


def test_subset_is_a_view_that_reads_like_an_array():
    base = np.arange(20.0).reshape(10, 2)
    view = Subset(base, np.array([7, 1, 3]), np.dtype(np.float32))
    assert len(view) == 3
    assert view.shape == (3, 2)
    assert view.nbytes == 24
    assert np.array_equal(view[np.array([2, 0])], base[[3, 7]])
    assert np.array_equal(view[1:], base[[1, 3]])
    assert np.array_equal(view[0], base[7])
    assert np.asarray(view).dtype == np.float32
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(view, copy=False)


# Images


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (GREY, (1, 9, 12)),
        (GREY[:, None], (1, 9, 12)),
        (GREY[..., None], (1, 9, 12)),
        (np.stack([GREY] * 3, 1), (3, 9, 12)),
        (np.stack([GREY] * 3, -1), (3, 9, 12)),
        (np.stack([GREY] * 4, -1), (4, 9, 12)),
    ],
)
def test_image_axes(array, shape):
    data = load(array)
    assert (data.kind, data.shape, data.train.dtype) == ("image", shape, np.uint8)
    assert (data.offset, data.scale, data.quantum) == (0, 255, 1 / 255)
    assert len(data.train) + len(data.validation) + len(data.test) == 40
    assert data.train[:].flags.c_contiguous
    assert np.array_equal(np.sort(everything(data)[:, 0].sum((1, 2))), np.sort(GREY.sum((1, 2))))


@pytest.mark.parametrize(("high", "one"), [(65535, 65535), (52085, 65536)])
def test_the_note_says_which_value_becomes_one(high, one):
    images = np.arange(20 * 64).reshape(20, 8, 8)
    images[-1, -1, -1] = high
    data = load(images.astype(np.uint16))
    assert data.scale == one
    note = next(note for note in data.notes if f"values from 0 to {high}" in note)
    assert ("0 to 65536 become [0, 1]" in note) == (one != high)


def test_float_images_in_the_unit_interval_stay_as_they_are():
    data = load(GREY / 255)
    assert data.train.dtype == np.float32
    assert (data.offset, data.scale, data.quantum, data.notes) == (0, 1, None, ())


def test_float_images_outside_are_rescaled_and_come_back():
    raw = GREY / 100.0 - 1
    data = load(raw)
    assert "rescaled" in data.notes[0]
    x = units(data, everything(data))
    assert x.min() == 0
    assert x.max() == pytest.approx(1)
    assert np.allclose(x * data.scale + data.offset, everything(data))


def test_integers_in_range_become_uint8_with_a_note():
    data = load(GREY.astype(np.int64))
    assert data.train.dtype == np.uint8
    assert data.quantum == 1 / 255
    assert "int64" in data.notes[0]
    assert np.array_equal(everything(data), everything(load(GREY)))


def test_wide_integers_are_rescaled_and_keep_their_quantum():
    data = load(GREY.astype(np.uint16) * 200)
    assert data.train.dtype == np.int32
    assert data.quantum == pytest.approx(1 / float(data.scale))
    assert units(data, everything(data)).max() == pytest.approx(51_000 / 65_536, abs=0.25)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (np.uint8, 0, 255),
        (np.int8, -128, 127),
        (np.uint16, 0, 65_535),
        (np.uint16, 30_000, 31_020),
        (np.uint16, 0, 4_095),
        (np.int16, -32_768, 32_767),
        (np.int16, -1_000, 3_071),
        (np.int32, -(2**23), 2**23 - 1),
        (np.int32, 2**31 - 1_042, 2**31 - 1),
        (np.uint32, 2**30, 2**30 + 40_000),
        (np.int64, -41, 300),
        (np.uint64, 0, 100_000),
        (np.dtype(">u2"), 5, 999),
    ],
)
def test_every_level_comes_back_to_the_bit(dtype, low, high):
    levels = np.random.default_rng(0).integers(low, high, (40, 9, 12), endpoint=True)
    levels[0, 0, :2] = low, high
    data = load(levels.astype(dtype))
    scaling = Scaling(torch.from_numpy(data.offset), torch.from_numpy(data.scale), data.quantum)
    raw = torch.from_numpy(everything(data))
    parts = (data.train, data.validation, data.test)
    levels = levels[np.concatenate([part.indices for part in parts])]

    scaling.check(raw)
    x = scaling(raw)
    assert x.min() >= 0
    assert 0.74 < x.max() <= 1 + 1e-6
    assert np.array_equal(scaling.restore_levels(x)[:, 0], levels)
    if max(-low, high) <= 2**24:
        assert np.array_equal(scaling.restore(x)[:, 0], levels)


def test_more_levels_than_float32_has_are_real_numbers_with_a_caution():
    levels = np.random.default_rng(0).integers(0, 2**31, (40, 9, 12), dtype=np.uint32)
    data = load(levels)
    assert (data.train.dtype, data.quantum) == (np.float32, None)
    assert "float32 does not resolve so many levels" in data.cautions[0]


@pytest.mark.parametrize("n_steps", [*range(1, 200), 1_000, 40_001, 65_535, 100_000])
def test_the_scale_of_levels_is_exact_and_at_most_a_third_too_large(n_steps):
    scale = np.float32(level_scale(n_steps))
    levels = np.arange(n_steps + 1, dtype=np.float32)
    assert np.array_equal((levels / scale) * scale, levels)
    assert n_steps <= scale <= n_steps * 4 / 3 + 1


def test_two_valued_images():
    data = load(GREY > 128)
    assert (data.train.dtype, data.scale, data.quantum) == (np.uint8, 1, 1)


def test_dark_images_are_pointed_out():
    assert "nearly black" in load((GREY > 128).astype(np.uint8)).notes[0]


def test_constant_pixels_are_counted():
    array = GREY.copy()
    array[:, 0, :5] = 7
    assert "pixel values that are the same in all images: 5 of 108" in load(array).notes


def test_nothing_is_copied_as_a_whole(tmp_path):
    np.save(tmp_path / "big.npy", np.stack([GREY] * 3, -1).astype(np.float64))
    data = load(tmp_path / "big.npy")
    assert data.train.shape == (32, 3, 9, 12)
    assert isinstance(data.train.base, np.memmap)
    assert data.test.base.base is not None
    assert np.shares_memory(data.train.base, data.test.base)


def test_chunks_do_not_change_the_summary(monkeypatch):
    whole = load(TABLE)
    monkeypatch.setattr(arrays_module, "CHUNK_BYTES", 64)
    chunked = load(TABLE)
    assert whole.fingerprint == chunked.fingerprint
    assert np.allclose(whole.scale, chunked.scale)


def test_fingerprint_is_of_shape_dtype_and_values():
    other = GREY.copy()
    other[-1, -1, -1] ^= 1
    arrays = [GREY, other, GREY.reshape(40, 12, 9), GREY.astype(np.int16), GREY.reshape(40, 108)]
    assert len({load(array).fingerprint for array in arrays}) == len(arrays)
    assert load(GREY).fingerprint == load(np.asfortranarray(GREY)).fingerprint
    assert load(TABLE).fingerprint == load(TABLE.astype(">f8")).fingerprint


# Tables


def test_table_is_standardised_by_its_training_part():
    data = load(TABLE)
    assert (data.kind, data.shape, data.quantum) == ("table", (4,), None)
    x = units(data, data.train[:])
    assert np.allclose(x.mean(0), 0, atol=1e-6)
    assert np.allclose(x.std(0), 1, atol=1e-6)
    assert not np.allclose(units(data, data.test[:]).mean(0), 0, atol=1e-6)


def test_constant_columns_are_named_and_keep_a_scale_of_one():
    table = TABLE.copy()
    table[:, 1], table[:, 3] = 0.1, -5
    data = load(table)
    assert "constant columns: 1, 3" in data.notes
    assert data.scale[[1, 3]].tolist() == [1, 1]
    assert np.allclose(units(data, everything(data))[:, [1, 3]], 0, atol=1e-7)


def test_columns_beyond_the_resolution_of_float32_are_named():
    table = TABLE.copy()
    table[:, 2] = 1.7e9 + np.arange(50) * 200
    assert any(note.startswith("columns 2 vary by less") for note in load(table).notes)


# Refusals


def with_value(value: float) -> np.ndarray:
    table = TABLE.copy()
    table[3, 2] = table[7, 0] = value
    return table


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array(3.0), "expected a table"),
        (np.zeros(20), "expected a table"),
        (np.zeros((20, 3, 8, 8, 8, 8)), "expected a table"),
        (np.zeros((20, 0)), "holds no values"),
        (np.zeros((20, 9, 9, 9)), "cannot tell the channels"),
        (np.zeros((20, 3, 32, 3)), "cannot tell the channels"),
        (GREY[:, None, :7], "12x7; each side must be at least 8"),
        (GREY[:9], "too few training examples: 9 of at least 10"),
        (np.full((20, 8, 8), 5, np.uint8), "nothing to learn"),
        (np.full((20, 4), 5.0), "nothing to learn"),
        (np.full((20, 8, 8), np.nan), r"1280 values are NaN, infinite .* at index \(0, 0, 0, 0\)"),
        (with_value(np.inf), r"2 values are infinite .* first at index \(3, 2\)"),
        (with_value(1e300), "too large for float32"),
        (TABLE.astype(complex), "complex128"),
        (TABLE.astype(str), "<U32"),
        (TABLE.astype(object)[:, 0], "object"),
        (TABLE.astype("M8[s]"), "datetime64"),
    ],
)
def test_unusable_arrays_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        load(array)


def test_image_options_do_not_apply_to_arrays():
    assert load(GREY, channels="grey").shape == (1, 9, 12)
    for source, options in (
        (GREY, {"image_size": 32}),
        (GREY, {"channels": "rgb"}),
        (TABLE, {"image_size": 8}),
    ):
        with pytest.raises(ValueError, match="convert image files only"):
            load(source, **options)


# Other objects


class Items(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class ArrayLike:
    def __array__(self, dtype=None, copy=None):
        return GREY


@pytest.mark.parametrize(
    "source",
    [
        torch.from_numpy(GREY),
        ArrayLike(),
        GREY.tolist(),
        Items(GREY),
        Items([(image, 3) for image in GREY]),
        torch.utils.data.TensorDataset(torch.from_numpy(GREY), torch.arange(40)),
    ],
)
def test_objects_that_hold_the_same_give_the_same(source):
    assert np.array_equal(everything(load(source)), everything(load(GREY)))


def test_tensors_with_gradients_and_of_half_precision():
    assert np.allclose(
        everything(load(torch.tensor(TABLE, requires_grad=True))), everything(load(TABLE))
    )
    assert load(torch.tensor(TABLE).bfloat16()).train.dtype == np.float32


def test_items_are_fetched_once():
    fetched = []

    class Counting(Items):
        def __getitem__(self, index):
            fetched.append(index)
            return self.items[index]

    load(Counting(TABLE))
    assert fetched == list(range(50))


@pytest.mark.parametrize("first", [TABLE[0].astype(int), TABLE[0].astype(np.float16)])
def test_items_are_not_cut_off_to_fit_the_first(first):
    items = [first, *TABLE[1:]]
    assert np.array_equal(everything(load(Items(items))), everything(load(np.array(items))))


def test_a_masked_array_without_masked_values_is_an_array():
    assert np.array_equal(everything(load(np.ma.array(TABLE))), everything(load(TABLE)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Items([]), "is empty"),
        (Items([*TABLE, TABLE[0][:2]]), r"item 50 .* \(2,\), item 0 \(4,\)"),
        (Items([{"image": image} for image in GREY]), "dictionary with the keys image"),
        (iter(TABLE), "expected an array"),
        (7, "expected an array"),
        ([[1.0], [1.0, 2.0]], "inhomogeneous"),
        ({"a": TABLE, "b": TABLE}, "dictionary with the keys a, b; give one"),
        (np.ma.masked_greater(TABLE, 1), "masked array"),
        (Items([np.ma.masked_greater(row, 1) for row in TABLE]), "masked array"),
        (scipy.sparse.csr_array(TABLE), r"toarray\(\)"),
        (torch.from_numpy(TABLE).to_sparse(), "does not become an array"),
        (torch.zeros(20, 3, device="meta"), "does not become an array"),
        (Items([Image.fromarray(image).convert("P") for image in GREY]), "palette"),
    ],
)
def test_unusable_objects_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load(source)


# Files


def test_npy_is_memory_mapped_and_equal(tmp_path):
    np.save(tmp_path / "faces.npy", GREY)
    data = load(tmp_path / "faces.npy")
    assert (data.name, data.source) == ("faces", str(tmp_path / "faces.npy"))
    assert isinstance(data.train.base, np.memmap)
    assert np.array_equal(everything(data), everything(load(GREY)))
    assert data.fingerprint == load(GREY).fingerprint


@pytest.mark.parametrize("key", ["x", "data", "images", "whatever"])
def test_npz_with_one_array(tmp_path, key):
    np.savez(tmp_path / "a.npz", **{key: GREY})
    assert np.array_equal(everything(load(tmp_path / "a.npz")), everything(load(GREY)))


def test_npz_prefers_the_examples_to_the_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY, labels=np.arange(40))
    assert load(tmp_path / "a.npz").shape == (1, 9, 12)


@pytest.mark.parametrize("keys", [("train", "validation", "test"), ("x_train", "x_val", "x_test")])
def test_npz_keeps_its_own_parts(tmp_path, keys):
    np.savez_compressed(
        tmp_path / "a.npz",
        y_train=np.arange(20),
        **dict(zip(keys, (GREY[:20], GREY[20:25], GREY[25:]), strict=True)),
    )
    data = load(tmp_path / "a.npz")
    assert np.array_equal(data.train[:][:, 0], GREY[:20])
    assert np.array_equal(data.validation[:][:, 0], GREY[20:25])
    assert np.array_equal(data.test[:][:, 0], GREY[25:])


def test_npz_with_train_and_test_splits_off_the_validation(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=GREY[:30], x_test=GREY[30:])
    data = load(tmp_path / "a.npz")
    assert [len(data.train), len(data.validation), len(data.test)] == [27, 3, 10]


class Exploit:
    def __reduce__(self):
        raise AssertionError("must not be pickled")


@pytest.fixture
def bad_files(tmp_path):
    np.savez(tmp_path / "two.npz", a=GREY, b=GREY)
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "differ.npz", train=GREY, test=GREY[:, :, :9])
    np.save(tmp_path / "objects.npy", TABLE.astype(object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", TABLE.astype(object))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps([1, 2]))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    np.save(tmp_path / "cut.npy", GREY)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-100])
    (tmp_path / "table.xlsx").write_text("1,2\n")
    (tmp_path / "table.csv").write_text("1,2\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two.npz", "it holds a, b; expected"),
        ("none.npz", "it holds no arrays"),
        ("differ.npz", "the parts differ in the shape"),
        ("objects.npy", "cannot be read"),
        ("objects.npz", "cannot be read"),
        ("pickle.npy", "cannot be read"),
        ("empty.npy", "cannot be read"),
        ("broken.npz", "cannot be read"),
        ("cut.npy", "cannot be read"),
        ("table.xlsx", "type that cannot be read; expected one of digits"),
        ("tabel.xlsx", "did you mean .*table.xlsx"),
        ("table.csv", "too few training examples"),
    ],
)
def test_unusable_files_are_refused_by_name(bad_files, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(bad_files / name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("mnits", "mnist"), ("fashion_mnist", "fashion-mnist"), ("Digits", "digits")],
)
def test_unknown_names_suggest_a_close_one(name, meant):
    with pytest.raises(ValueError, match=f"did you mean .*{meant}.* Expected one of digits, mnist"):
        load(name)


def test_digits_need_no_files():
    data = load()
    assert (data.name, data.shape, data.train.dtype) == ("digits", (1, 8, 8), np.uint8)
    assert (data.scale, data.quantum, len(data.train), len(data.test)) == (16, 1 / 16, 1455, 180)


def test_loading_does_not_import_torch():
    code = (
        "import sys, equipoise.data as d; d.load; "
        "print('torch' in sys.modules, d.Batches.__module__)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "equipoise.data.batches"]


@pytest.mark.parametrize("name", ["x_test", "test", "x_val", "validation", "anything"])
def test_the_only_array_of_a_file_is_not_its_own_test_part(tmp_path, name):
    rows = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    np.savez(tmp_path / "one.npz", **{name: rows})
    data = load(tmp_path / "one.npz")
    parts = [data.train[:], data.validation[:], data.test[:]]
    assert sum(map(len, parts)) == 100
    assert len(np.unique(np.concatenate(parts), axis=0)) == 100


def test_masked_values_within_a_list_are_refused():
    rows = [np.ma.masked_greater(row, 0.5) for row in np.random.default_rng(0).random((20, 3))]
    with pytest.raises(ValueError, match="masked array"):
        load(rows)


@pytest.mark.parametrize("shape", [(3,), (1, 32, 32)])
def test_examples_on_both_sides_of_the_split_are_counted(shape):
    """Against all pairs of rows: also rows that agree in all but one of many values."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, *shape)).astype(np.float32)
    values[50:120] = values[:70]
    values[120:150] = values[:30]
    values[120:150].reshape(30, -1)[:, 1] += 1
    data = load(values)

    training = {row.tobytes() for row in data.train[:]}
    texts = []
    for name, part in (("validation", data.validation), ("test", data.test)):
        n = sum(row.tobytes() in training for row in part[:])
        assert 2 < n < len(part)
        texts.append(f"{n} of {len(part)} {name} examples")
        assert any(note.startswith(texts[-1]) for note in data.notes)
    assert [text.startswith(start) for text, start in zip(data.cautions, texts, strict=True)]


def test_zeros_of_both_signs_are_the_same_example():
    values = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    values[:20, 0] = 0.0
    values[20:] = values[:20] * np.float32([-1, 1])
    assert load(values).cautions
