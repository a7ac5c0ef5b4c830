"""Streams: each example once an epoch, in a reproducible order, in constant memory."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise
from equipoise.cli import main
from equipoise.config import TrainConfig
from equipoise.data import Batches, Stream, StreamBatches, Subset, batches_of, load, load_stream
from equipoise.evaluation import evaluate
from equipoise.records import JsonObject, read_record
from equipoise.run import Run
from equipoise.sources import encode_examples, sample_aggregate
from equipoise.training.job import train
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

QUICK = TrainConfig(
    latent_dim=2,
    width=4,
    batch_size=64,
    stage_1_epochs=2,
    stage_2_epochs=1,
    n_components=2,
    tolerance=0.0,
    accelerator="cpu",
)


def table_of(n, width=2):
    """Rows that tell their number."""
    rows = np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)
    rows[:, 0] = np.arange(n)
    return rows


def cut(array, sizes):
    """A function that gives an array in batches of the given sizes, over and over."""

    def batches():
        first, turn = 0, 0
        while first < len(array):
            size = sizes[turn % len(sizes)]
            yield array[first : first + size]
            first, turn = first + size, turn + 1

    return batches


def numbers(batches, epoch=0, start=0):
    return [batch[:, 0].int().tolist() for batch in batches.epoch(epoch, start)]


@settings(max_examples=60)
@given(
    st.integers(12, 90),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 120),
    st.integers(1, 20),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(0, 2**64)),
)
def test_each_example_is_visited_once_an_epoch(n, sizes, buffer_size, batch_size, world_size, seed):
    data = load_stream(cut(table_of(n), sizes), buffer_size=buffer_size, test=1, validation=1)
    ranks = [
        StreamBatches(data.train, batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    visits = [numbers(batches, 3) for batches in ranks]
    assert {len(visit) for visit in visits} == {len(ranks[0])}
    for batch in range(len(ranks[0])):
        assert ranks[0].size(batch) == sum(len(visit[batch]) for visit in visits)
    lengths = [len(batch) for visit in visits for batch in visit]
    assert 0 < min(lengths) <= max(lengths) <= batch_size + 1 + (world_size > 1)
    assert sorted(x for visit in visits for batch in visit for x in batch) == list(range(2, n))
    # The same batches as of an array of as many, and of the source cut otherwise.
    like = Batches(table_of(n)[2:], batch_size, world_size=world_size)
    assert [len(batch) for batch in visits[0]] == [len(batch) for batch in like.epoch()]
    whole = load_stream(cut(table_of(n), [n]), buffer_size=buffer_size, test=1, validation=1)
    assert (
        numbers(StreamBatches(whole.train, batch_size, seed=seed, world_size=world_size), 3)
        == visits[0]
    )


@pytest.mark.parametrize("buffer_size", [1, 10, 1000])
def test_the_order_is_a_function_of_seed_and_epoch(buffer_size):
    stream = load_stream(cut(table_of(200), [7]), buffer_size=buffer_size).train
    batches = batches_of(stream, 16, seed=0)
    assert isinstance(batches, StreamBatches)
    assert numbers(batches, 1) == numbers(batches_of(stream, 16, seed=0), 1)
    orders = {
        str(numbers(batches_of(stream, 16, seed=seed), epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == (1 if buffer_size == 1 else 4)
    for start in range(len(batches) + 1):
        assert numbers(batches, 1, start) == numbers(batches, 1)[start:]
    with pytest.raises(ValueError, match=r"start must be in 0\.\.10"):
        batches.epoch(0, 11)


def test_a_small_buffer_mixes_neighbours_and_a_large_one_all():
    rows = table_of(3000)

    def spread(buffer_size):
        stream = load_stream(cut(rows, [64]), buffer_size=buffer_size).train
        seen = np.concatenate(
            [batch[:, 0].numpy() for batch in batches_of(stream, 64, seed=0).epoch()]
        )
        return np.abs(seen - np.sort(seen)).mean() / len(seen)

    # Uniform shuffles move an example by a third of the set on average; a buffer by about its size.
    assert spread(100) == pytest.approx(100 / 2400, rel=0.5)
    assert spread(3000) == pytest.approx(1 / 3, rel=0.1)


def test_a_buffer_for_all_gives_the_order_of_an_array():
    data = load_stream(cut(table_of(100), [9]))
    array = Subset.whole(table_of(100)[20:])
    for epoch in range(3):
        ours, theirs = batches_of(data.train, 8, seed=5), batches_of(array, 8, seed=5)
        for a, b in zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True):
            assert torch.equal(a, b)


def test_parts_and_what_is_kept(monkeypatch):
    monkeypatch.setattr("equipoise.data.loading.AT_HAND", 30)
    rows = table_of(100)
    data = load_stream(cut(rows, [8]), test=5, validation=10, name="rows")
    assert isinstance(data.train, Stream)
    assert np.array_equal(data.test[:], rows[:5])
    assert np.array_equal(data.validation[:], rows[5:15])
    assert np.array_equal(data.train.at_hand[:], rows[15:45])
    assert (len(data.train), data.train.shape, data.name, data.shape) == (85, (85, 2), "rows", (2,))
    assert np.allclose(data.offset, rows[15:45].mean(0))
    assert (
        load_stream(cut(rows, [8]), count=100, test=5, validation=10).fingerprint
        == data.fingerprint
    )
    assert load_stream(cut(rows, [5]), test=5, validation=11).fingerprint != data.fingerprint
    given = load_stream(cut(rows, [8]), test=rows[:7] + 1000, validation=torch.ones(3, 2))
    assert (len(given.train), len(given.validation)) == (100, 3)
    assert np.array_equal(given.test[:], rows[:7] + 1000)


def test_images_of_a_data_loader_that_shuffles():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(60)
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(pixels), torch.arange(60))
    state = torch.get_rng_state()
    data = load_stream(torch.utils.data.DataLoader(pairs, 7, shuffle=True))
    assert (data.kind, data.quantum, data.train.dtype) == ("image", 1 / 255, np.uint8)
    passes = [np.concatenate(list(data.train.batches()))[:, 0, 0, 0] for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(*passes)
    held_out = [*data.test[:][:, 0, 0, 0], *data.validation[:][:, 0, 0, 0]]
    assert sorted([*passes[0], *held_out]) == list(range(60))
    assert passes[0].tolist() != sorted(passes[0])


def test_an_array_that_the_source_uses_again_is_copied():
    rows, same = table_of(64), np.empty((8, 2), np.float32)

    def batches():
        for first in range(0, 64, 8):
            same[:] = rows[first : first + 8]
            yield same

    data = load_stream(batches, test=4, validation=4)
    assert np.array_equal(data.train.at_hand[:], rows[8:])
    assert numbers(batches_of(data.train, 56)) == [list(range(8, 64))]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            iter([table_of(50)]),
            {},
            r"only once.*load_stream\(make_batches\) and not load_stream\(make_batches\(\)\)",
        ),
        (table_of(50), {}, "needs no stream: load_data"),
        ("photos", {}, "needs no stream"),
        (7, {}, "int; expected an iterable"),
        ([table_of(50)], {"buffer_size": 0}, "buffer_size must be"),
        ([table_of(50)], {"image_size": 8}, "convert the batches"),
        (
            [table_of(50)],
            {"test": 30, "validation": 15},
            "50 examples, of which 30 .* fewer than the 10 needed",
        ),
        ([table_of(50)], {"count": 60}, "only 50 examples, where count=60"),
        ([{"x": table_of(50)}], {}, "batch 0: a dictionary with the keys x"),
        (
            [table_of(50), table_of(50, 3)],
            {},
            r"batch 1: examples of shape \(3,\); those before are of shape \(2,\)",
        ),
        ([table_of(50)], {"test": table_of(5, 3)}, "parts differ in the shape"),
        ([np.full((50, 2), np.inf)], {}, "infinite"),
    ],
)
def test_refusals(source, options, message):
    with pytest.raises(ValueError, match=message):
        load_stream(source, **options)


def test_a_pass_that_is_not_as_it_was_is_refused(monkeypatch):
    monkeypatch.setattr("equipoise.data.loading.AT_HAND", 20)
    rows = table_of(100)

    def passes(later, sizes=(10,), **options):
        held = [rows]
        data = load_stream(lambda: cut(held[0], sizes)(), **options)
        held[0] = later
        return list(batches_of(data.train, 10, seed=0).epoch())

    assert len(passes(rows)) == 8
    for later, message in [
        (rows[:95], r"ended after 95 examples; 100 .* Give count=95"),
        (np.concatenate([rows, rows[:1]]), "batch 10: goes on after the 100 examples"),
        (rows[::-1], "batch 0: not the examples that were there .* fixed seed"),
        (np.where(rows == 77, np.inf, rows), "batch 7: values that are infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            passes(later)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8))
    later = pixels.copy()
    later[88] = 256
    held = [pixels]
    data = load_stream(lambda: cut(held[0], [10])())
    held[0] = later
    with pytest.raises(
        ValueError, match=r"batch 8: int64 values from 0 to 256; expected whole numbers in 0\.\.255"
    ):
        list(data.train.batches())


def assert_same_weights(ours, theirs):
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def trained(data, **options):
    torch.manual_seed(0)
    model = make_model(data, QUICK)
    trainer = Trainer(model, data, QUICK, **options)
    trainer.fit()
    return model


def test_training_from_a_stream_equals_training_from_the_array(table):
    streamed = load_stream(cut(table, [37]))
    array = replace(streamed, train=Subset(table[120:], np.arange(480), np.dtype(np.float32)))
    assert_same_weights(trained(streamed), trained(array))


class Stop:
    """A sink that interrupts at a step, as a kill would."""

    def __init__(self, step):
        self.last = step

    def start(self, total_steps, done_steps, history):
        pass

    def step(self, done_steps, total_steps, label, figures):
        if done_steps == self.last:
            raise KeyboardInterrupt

    def epoch(self, row):
        pass

    def message(self, text):
        pass

    def close(self):
        pass


def test_a_killed_run_on_a_stream_resumes_bit_for_bit(table, tmp_path, monkeypatch):
    """The run stops within an epoch. The DataLoader and the networks use the same generator."""
    monkeypatch.setattr("equipoise.training.trainer.DISPLAY_SECONDS", -1.0)
    rows = torch.utils.data.TensorDataset(torch.from_numpy(table))

    def data():
        return load_stream(torch.utils.data.DataLoader(rows, 50, shuffle=True), buffer_size=100)

    whole = trained(data())
    config = replace(QUICK, checkpoint_seconds=1e-9)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        Trainer(make_model(data(), config), data(), config, folder=tmp_path, sinks=[Stop(11)]).fit()
    torch.manual_seed(123)
    resumed = make_model(data(), config)
    Trainer(resumed, data(), config, folder=tmp_path).fit(resume=True)
    assert_same_weights(whole, resumed)


def test_from_a_stream_to_an_evaluation(table, tmp_path, monkeypatch):
    monkeypatch.setattr("equipoise.data.loading.AT_HAND", 100)
    data = equipoise.load_stream(cut(table, [50]), buffer_size=64)
    assert len(data.train.at_hand) < len(data.train)
    run = train(data, QUICK, tmp_path / "run")
    model = run.model()
    assert (
        len(encode_examples(model, data.train, torch.device("cpu")).mean) == len(data.train) == 480
    )
    assert sample_aggregate(model, data.train, 7, torch.Generator().manual_seed(0)).shape == (7, 2)
    other = np.random.default_rng(1).normal(size=(50, 6)) * table.std(0) * 3
    found = evaluate(
        run, data, against=equipoise.evaluation.Examples("other", load(other).train), brief=True
    )
    assert {"likelihood", "samples", "latent", "noise", "outliers"} <= found.keys()
    assert found["latent"]["memorisation"]["n_training"] == 100
    shared = equipoise.evaluation.Examples("copies", Subset.whole(table[500:].astype(np.float32)))
    with pytest.raises(ValueError, match=r"100% of 'copies' are in the training data"):
        evaluate(run, data, test=shared, brief=True)
    with pytest.raises(equipoise.store.StoreError, match="Give the same data"):
        run.check_data(equipoise.load_stream(cut(table[:-1], [50])))


# Hugging Face


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="the extra 'hub' is not installed")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("how", ["parquet", "streaming", "held"])
def test_hugging_face_images(datasets, tmp_path, how):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 9, 11), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": list(pixels), "label": list(range(60))}
    table = datasets.Dataset.from_dict(columns, features=features)
    path = str(tmp_path / "images.parquet")
    table.to_parquet(path)
    source = {
        "parquet": f"hf:{path}",
        "streaming": datasets.load_dataset(
            "parquet", data_files=path, split="train", streaming=True
        ),
        "held": table,
    }[how]
    data = load_stream(source, buffer_size=16)
    assert (data.shape, data.quantum, len(data.train)) == ((1, 9, 11), 1 / 255, 48)
    assert np.array_equal(data.test[:][:, 0], pixels[:6])
    for _ in range(2):
        assert np.array_equal(np.concatenate(list(data.train.batches()))[:, 0], pixels[12:])
    small = load_stream(source, image_size=8, channels="rgb")
    assert small.shape == (3, 8, 8)
    whole = load(f"hf:{path}", cache_dir=tmp_path / "cache")
    assert len(whole.train) + len(whole.validation) + len(whole.test) == 60


@pytest.mark.filterwarnings("default")
def test_hugging_face_columns_of_arrays(datasets):
    rows = table_of(40, 3)
    table = datasets.Dataset.from_dict(
        {"x": rows.tolist(), "y": list(range(40))}
    ).to_iterable_dataset()
    data = load_stream(table)
    assert data.shape == (3,)
    assert np.allclose(np.concatenate(list(data.train.batches())), rows[8:])
    with pytest.raises(ValueError, match="name the column to train on"):
        load_stream(datasets.Dataset.from_dict({"y": list(range(40))}))


@pytest.mark.filterwarnings("default")
def test_the_command_streams_and_finds_its_data_again(datasets, tmp_path):
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image()})
    columns = {"image": list(rng.integers(0, 256, (80, 8, 8), dtype=np.uint8))}
    path = str(tmp_path / "images.parquet")
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    run = tmp_path / "run"
    small = [
        "--set",
        "width=2",
        "latent_dim=2",
        "stage_1_epochs=1",
        "stage_2_epochs=0",
        "n_components=1",
    ]
    main(["train", f"hf:{path}", "--stream", "--quiet", "--out", str(run), *small])
    loading = Run(run).settings()["data"]["load"]
    assert (loading["stream"], loading["source"]) == (True, f"hf:{path}")
    main(["evaluate", str(run), "--sections", "latent", "--quiet"])
    assert "latent" in read_record(run / "evaluation.json", JsonObject)


def test_streaming_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'equipoise\[hub\]'"):
        load_stream("hf:a/b")


@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_stream_that_holds_out_nothing_is_refused(part):
    with pytest.raises(ValueError, match=f"{part}=0 holds nothing out; give at least 1"):
        load_stream(lambda: iter([np.ones((60, 3))]), **{part: 0})
