import numpy as np
import pytest
from PIL import Image

from equipoise import plots


def images(n, channels=1, seed=0):
    return np.random.default_rng(seed).random((n, channels, 6, 5))


@pytest.mark.parametrize(
    ("n", "columns", "shape"), [(1, None, (6, 5)), (5, None, (13, 17)), (4, 4, (6, 23)), (3, 9, (6, 17))]
)
def test_tiles_lie_where_they_should(n, columns, shape):
    x = images(n)
    grid = plots.tile(x, columns)
    assert grid.shape == (*shape, 1)
    np.testing.assert_array_equal(grid[:6, :5, 0], x[0, 0])
    columns = (grid.shape[1] + 1) // 6
    last = n - 1
    top, left = last // columns * 7, last % columns * 6
    np.testing.assert_array_equal(grid[top : top + 6, left : left + 5, 0], x[last, 0])


def test_the_gaps_have_the_fill():
    grid = plots.tile(images(4), fill=0.25)
    assert (grid[6] == 0.25).all()
    assert (grid[:, 5] == 0.25).all()


def test_channels_are_averaged_as_squares():
    maps = np.stack([np.full((6, 5), 3.0), np.full((6, 5), 4.0)])[None]
    np.testing.assert_allclose(plots.channel_rms(maps), np.sqrt(12.5))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_maps_of_std_and_error_share_their_scale(channels):
    """A pixel of the same value must have the same colour in both, or they cannot be compared."""
    x, means = images(4, channels), images(4, channels, seed=1)
    figure = plots.reconstructions(x, means, 0.1 * images(4, channels, seed=2))
    maps = [axis.images[0] for axis in figure.axes if axis.get_title() in ("predicted std", "|error|")]
    assert len(maps) == 2
    assert maps[0].get_clim() == maps[1].get_clim()
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert any("std" in label for label in labels)


def rows(epochs, switch):
    return [
        {"epoch": e, "stage": 1 + (e >= switch)}
        | {
            f"{split}_{name}": float(e)
            for split in ("train", "validation")
            for name in ("elbo", "kl", "mse", "noise_var")
        }
        for e in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("epochs", [1, 2, 12])
def test_training_curves_mark_the_switch(epochs):
    figure = plots.training_curves(rows(epochs, switch=8))
    assert [axis.get_xlabel() for axis in figure.axes] == ["epoch"] * 4
    for axis in figure.axes:
        bottom, top = axis.get_ylim()
        assert bottom < top
        assert bottom <= rows(epochs, switch=8)[-1]["train_elbo"] <= top
    marks = [line.get_xdata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and epochs > 2]
    assert marks == ([7.5] if epochs == 12 else [])


def test_tables():
    rng = np.random.default_rng(0)
    real, other = rng.normal(size=(50, 11)), rng.normal(size=(30, 11))
    names = [f"column {i}" for i in range(11)]
    figure = plots.table_samples(other, real, names)
    assert [axis.get_xlabel() for axis in figure.axes] == names[:9]
    figure = plots.table_reconstructions(real[:, :2], real[:, :2], np.abs(real[:, :2]), names[:2])
    assert figure.axes[0].get_xlabel() == "column 0, data"


def test_figures_are_written_whole(tmp_path):
    path = plots.save(plots.samples(images(3), None, "samples"), tmp_path / "figures" / "s.png")
    with Image.open(path) as image:
        assert image.size[0] > 100
    assert [p.name for p in path.parent.iterdir()] == ["s.png"]
