"""Signals and volumes: the same networks along one and three axes, from arrays to figures."""

import numpy as np
import pytest
import torch
from torch import nn

from equipoise import plots
from equipoise.cli import main
from equipoise.data import load, load_examples
from equipoise.metrics.features import features_of, load_features
from equipoise.model import VAE
from equipoise.networks import build_decoder, build_encoder, build_head, default_architecture

SHAPES = [(1, 8), (2, 37), (7, 256), (1, 8, 8, 8), (2, 9, 16, 11), (3, 8, 12, 8)]


@pytest.mark.parametrize("architecture", ["mlp", "conv", "residual"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_size_goes_in_and_comes_out(architecture, shape):
    assert default_architecture(shape) == "conv"
    encoder = build_encoder(architecture, shape, latent_dim=3, width=2)
    decoder = build_decoder(architecture, shape, latent_dim=3, width=2)
    head = build_head(architecture, shape, width=2)
    codes = encoder(torch.zeros(2, *shape))[:, :3]
    assert decoder(codes).shape == head(decoder.hidden(codes)).shape == (2, *shape)


def test_signals_and_volumes_have_the_pyramid_of_images():
    """Layers of the same kernel, stride and channels, along another number of axes."""
    layers = []
    for n_axes, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        encoder = build_encoder("residual", (3, *[20] * n_axes), 2, 4)
        found = [layer for layer in encoder.modules() if isinstance(layer, kind)]
        layers.append(
            [(it.in_channels, it.out_channels, it.kernel_size[0], it.stride[0]) for it in found]
        )
    assert layers[0] == layers[1] == layers[2]
    assert layers[0][0] == (3, 4, 4, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_starts_at_the_mean_of_the_data(shape):
    model = VAE.build(shape, 2, architecture="conv", width=2)
    mean = torch.rand(shape)
    model.start_at_data(mean, torch.tensor(0.3))
    decoded = model.decode(torch.zeros(1, 2)).mean[0]
    expected = mean.flatten(1).mean(1)
    assert torch.allclose(decoded.flatten(1).mean(1), expected, atol=0.2)


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        ((20, 1, 50), (1, 50)),
        ((20, 50, 1), (1, 50)),
        ((20, 7, 8), (7, 8)),
        ((20, 64, 3), (3, 64)),
        ((20, 8, 50), (1, 8, 50)),
        ((20, 1, 9, 10, 11), (1, 9, 10, 11)),
        ((20, 9, 10, 11, 2), (2, 9, 10, 11)),
        ((20, 40, 9, 10, 11), (40, 9, 10, 11)),
    ],
)
def test_the_meaning_of_axes(array, shape):
    values = np.random.default_rng(0).random(array).astype(np.float32)
    data = load(values)
    assert (data.shape, data.kind) == (shape, "image")
    word = {2: "signals", 3: "images", 4: "volumes"}[len(shape)]
    assert any(note.startswith(word) for note in data.notes) == (len(shape) != 3)
    examples = load_examples(values, shape)[:]
    is_first = shape in (array[1:], (1, *array[1:]))
    moved = values if is_first else np.moveaxis(values, -1, 1)
    assert np.array_equal(examples, moved.reshape(examples.shape))


@pytest.mark.parametrize("shape", [(20, 1, 7), (20, 1, 7, 9, 9), (20, 2, 9, 9, 5), (2,) * 6])
def test_too_short_sides_are_refused(shape):
    with pytest.raises(ValueError, match=r"at least 8|expected a table"):
        load(np.random.default_rng(0).random(shape))


@pytest.mark.parametrize("shape", [(3, 40), (2, 9, 10, 12)])
def test_they_have_features_and_pictures(shape):
    data = load(np.random.default_rng(0).random((40, *shape)).astype(np.float32))
    extractor = load_features("auto", data)
    rows = features_of(extractor, [torch.from_numpy(data.test[:])])
    assert extractor.name == "pooled"
    assert rows.shape == (4, shape[0] * (256 if len(shape) == 2 else 512))
    with pytest.raises(ValueError, match="give 'pooled'"):
        load_features("efficientnet-lite0", data)

    seen = plots.pictures(data.test[:])
    if len(shape) == 2:
        assert np.array_equal(seen[:, 0, ::8], data.test[:])
    else:
        assert np.array_equal(seen, data.test[:][:, :, 4])


def test_signals_are_drawn_with_one_std_on_either_side():
    rng = np.random.default_rng(0)
    x = rng.random((4, 2, 30))
    figure = plots.signals(x, np.full_like(x, 0.25), "reconstructions", x + 1)
    axis = figure.axes[0]
    mean, data = (line.get_ydata() for line in axis.lines[:2])
    assert np.array_equal(mean, x[0, 0])
    assert np.array_equal(data, x[0, 0] + 1)
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(x[0, 0].max() + 0.25)
    assert [axis.axison for axis in figure.axes] == [True] * 4 + [False] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["signals", "volumes"])
def test_from_the_command_line_to_reconstructions(tmp_path, monkeypatch, capsys, kind):
    """The bumps of a small set are found again, better than by the mean of all."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    sides = (48,) if kind == "signals" else (8, 8, 8)
    place = np.indices(sides)[None]
    centres = rng.uniform(2, 6, (300, len(sides), *[1] * len(sides)))
    bumps = np.exp(-((place / (sides[0] / 8) - centres) ** 2).sum(1) / 2)
    np.save("x.npy", (1000 * bumps[:, None]).astype(np.uint16))

    options = ["stage_1_epochs=12", "stage_2_epochs=2", "latent_dim=3", "width=8"]
    main(["train", "x.npy", "--quiet", "--out", "run", "--set", *options])
    assert f" {kind}, from x.npy" in capsys.readouterr().out
    main(["reconstruct", "run", "x.npy"])
    with np.load("run/reconstructions/reconstructions.npz") as arrays:
        assert arrays["data"].shape == arrays["std"].shape == (300, 1, *sides)
        assert arrays["error"].var() < 0.3 * arrays["data"].var(0).mean()
    main(["sample", "run", "-n", "4"])
    assert np.load("run/samples/mixture.npy").shape == (4, 1, *sides)
    main(["evaluate", "run", "--quiet", "-n", "20", "--sections", "samples", "noise"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["explore", "run", "--no-browser"])
    assert "for images and tables" in capsys.readouterr().err
