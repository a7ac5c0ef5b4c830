"""A run from Python: its data come back as they were loaded; evaluation borrows its model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import equipoise
from equipoise.config import ConfigError
from equipoise.files import StoreError

CONFIG = equipoise.TrainConfig(
    latent_dim=2, width=2, stage_1_epochs=1, stage_2_epochs=0, n_components=1, batch_size=32
)


def levels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def assert_same_data(ours, theirs):
    assert ours.fingerprint == theirs.fingerprint
    for part in ("train", "validation", "test"):
        assert np.array_equal(getattr(ours, part)[:], getattr(theirs, part)[:])


def test_named_data_come_back(tmp_path):
    data = equipoise.load_data("digits", test_fraction=0.2)
    run = equipoise.train(data, CONFIG, tmp_path / "run")
    assert_same_data(run.data(), data)


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_file_comes_back_from_another_folder(tmp_path, monkeypatch, fraction):
    monkeypatch.chdir(tmp_path)
    arrays = {"train": levels(80, 9, 9), "test": levels(20, 9, 9, seed=1)}
    np.savez("images.npz", **arrays)
    data = equipoise.load_data("images.npz", test_fraction=fraction)
    run = equipoise.train(data, CONFIG, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_same_data(run.data(), data)


def test_a_folder_of_images_comes_back_with_its_size_and_channels(tmp_path):
    (tmp_path / "photos").mkdir()
    for number, pixels in enumerate(levels(40, 12, 20, 3)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    data = equipoise.load_data(
        tmp_path / "photos", image_size=8, channels="grey", cache_dir=tmp_path / "cache"
    )
    run = equipoise.train(data, CONFIG, tmp_path / "run")
    assert data.shape == (1, 8, 8)
    assert_same_data(run.data(), data)


def test_data_that_have_changed_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", levels(60, 8, 8))
    run = equipoise.train(equipoise.load_data(tmp_path / "x.npy"), CONFIG, tmp_path / "run")
    np.save(tmp_path / "x.npy", levels(60, 8, 8, seed=5))
    with pytest.raises(StoreError, match="Give the same data"):
        run.data()


def test_an_array_cannot_come_back(tmp_path):
    run = equipoise.train(equipoise.load_data(levels(60, 8, 8)), CONFIG, tmp_path / "run")
    with pytest.raises(ConfigError, match="was trained from Python, on an array"):
        run.data()


@pytest.mark.parametrize("is_training", [False, True])
def test_an_evaluation_leaves_the_callers_model_alone(tmp_path, is_training):
    data = equipoise.load_data("digits")
    run = equipoise.train(data, CONFIG, tmp_path / "run")
    model = run.model().double().train(is_training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strides = {name: value.stride() for name, value in model.state_dict().items()}
    equipoise.evaluate(run, data, model=model.float(), sections=["noise"])
    assert model.training is is_training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name].float() if value.is_floating_point() else value)
        assert value.stride() == strides[name]
        assert value.device.type == "cpu"


def test_a_path_is_never_the_name_of_a_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    for number, pixels in enumerate(levels(40, 8, 8)):
        Image.fromarray(pixels).save(tmp_path / "digits" / f"{number}.png")
    data = equipoise.load_data(Path("digits"), cache_dir=tmp_path / "cache")
    run = equipoise.train(data, CONFIG, tmp_path / "run")
    assert_same_data(run.data(), data)


def test_data_that_are_gone_are_named(tmp_path):
    np.save(tmp_path / "x.npy", levels(60, 8, 8))
    run = equipoise.train(equipoise.load_data(tmp_path / "x.npy"), CONFIG, tmp_path / "run")
    (tmp_path / "x.npy").unlink()
    with pytest.raises(StoreError, match=r"x\.npy, which is not there any more"):
        run.data()


def test_an_image_size_of_none_at_all_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", levels(60, 8, 8))
    with pytest.raises(ValueError, match="image_size must be from 1 to 4096 pixels, not 0"):
        equipoise.load_data(tmp_path / "x.npy", image_size=0)


def test_own_networks_that_share_a_tensor_or_are_double_are_refused(tmp_path):
    data = equipoise.load_data(np.random.default_rng(0).normal(size=(60, 4)))
    shared = torch.nn.Linear(2, 2)
    encoder = torch.nn.Sequential(torch.nn.Linear(4, 2), shared, torch.nn.Linear(2, 4))
    decoder = torch.nn.Sequential(shared, torch.nn.Linear(2, 4))
    for pair in ((encoder, decoder), (torch.nn.Linear(4, 4), torch.nn.Linear(2, 4).double())):
        with pytest.raises(ConfigError, match=r"under two names|torch\.float64"):
            equipoise.train(data, CONFIG, tmp_path / "run", encoder=pair[0], decoder=pair[1])
    assert not (tmp_path / "run").exists()


def test_a_folder_and_no_data_are_enough_to_evaluate(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 4)))
    run = equipoise.train(equipoise.load_data(tmp_path / "x.npy"), CONFIG, tmp_path / "run")
    evaluation = equipoise.evaluate(str(run.folder), sections=["likelihood"])
    assert evaluation["likelihood"] == run.evaluation()["likelihood"]
    equipoise.save_model(str(tmp_path / "copy.safetensors"), run.model())
    assert equipoise.load_model(str(tmp_path / "copy.safetensors")).latent_dim == 2


def test_features_are_refused_before_anything_is_computed(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 4)))
    run = equipoise.train(equipoise.load_data(tmp_path / "x.npy"), CONFIG, tmp_path / "run")
    for features in ("inception", "a.b:c", "os.path:join"):
        with pytest.raises(ValueError, match=r"of images|unknown features|cannot be called"):
            equipoise.evaluate(run, features=features)
    assert not run.evaluation_file.exists()


def test_limits_of_ones_own_come_back(tmp_path):
    (tmp_path / "photos").mkdir()
    for number, pixels in enumerate(levels(40, 9, 10, 3)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    options = {"cache_dir": tmp_path / "cache", "max_pixels": 90, "max_bytes": 1000}
    data = equipoise.load_data(tmp_path / "photos", **options)
    run = equipoise.train(data, CONFIG, tmp_path / "run")
    assert_same_data(run.data(), data)


def test_a_raised_limit_takes_in_what_was_skipped(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(30):
        side = 20 if number < 3 else 10
        pixels = levels(side, side, 3, seed=number)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    options = {"cache_dir": tmp_path / "cache", "image_size": 8}
    few = equipoise.load_data(tmp_path / "photos", **options, max_pixels=100)
    all_of_them = equipoise.load_data(tmp_path / "photos", **options, max_pixels=400)
    counts = [len(d.train) + len(d.validation) + len(d.test) for d in (few, all_of_them)]
    assert counts == [27, 30]
