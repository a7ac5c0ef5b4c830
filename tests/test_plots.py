import numpy as np
import pytest
from PIL import Image

from equipoise import plots


def images(n, channels=1, seed=0):
    return np.random.default_rng(seed).random((n, channels, 6, 5))


@pytest.mark.parametrize(
    ("n", "columns", "shape"),
    [(1, None, (6, 5)), (5, None, (13, 17)), (4, 4, (6, 23)), (3, 9, (6, 17))],
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
    maps = [
        axis.images[0] for axis in figure.axes if axis.get_title() in ("predicted std", "|error|")
    ]
    assert len(maps) == 2
    assert maps[0].get_clim() == maps[1].get_clim()
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert any("std" in label for label in labels)


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n_sets", [1, 3, 5])
def test_sets_of_samples_are_shown_as_they_are(n_sets, channels):
    sets = {f"set {i}": images(1 + i, channels, seed=i) for i in range(n_sets)}
    figure = plots.samples_compared(sets)
    assert titles(figure) == list(sets)
    for axis, x in zip(figure.axes, sets.values(), strict=True):
        np.testing.assert_allclose(
            axis.images[0].get_array().reshape(plots.tile(x).shape), plots.tile(x)
        )
        assert axis.images[0].get_clim() == (0, 1)


@pytest.mark.parametrize("codes", [None, np.array([[0.5, -0.5], [1.0, 0.0]])])
def test_densities_share_colours_and_axes(codes):
    x, y = np.linspace(-2, 2, 7), np.linspace(-1, 1, 5)
    prior = -0.5 * (x**2 + y[:, None] ** 2)
    narrow = prior + 3
    narrow[0, 0] = -np.inf
    figure = plots.latent_densities(x, y, {"mixture": narrow, "prior": prior}, codes, ("z1", "z2"))
    panels = figure.axes[:2]
    assert titles(figure)[:2] == ["mixture", "prior"]
    assert [axis.get_xlabel() for axis in panels] == ["z1", "z1"]
    assert panels[0].get_ylabel() == "z2"
    for axis, values in zip(panels, (narrow, prior), strict=True):
        assert axis.get_xlim() == (-2, 2)
        assert axis.get_ylim() == (-1, 1)
        assert axis.collections[0].get_clim() == (-7, 3)
        np.testing.assert_allclose(
            axis.collections[0].get_array().reshape(5, 7), np.maximum(values, -7)
        )
        assert len(axis.lines) == (codes is not None)
        for line in axis.lines:
            np.testing.assert_array_equal(line.get_xydata(), codes)
    assert "nats" in figure.axes[2].get_ylabel()


NOMINAL = [0.6827, 0.9545, 0.9973]


def curves(predicted_std, observed_rmse, pit_histogram=(1, 2, 1)):
    return plots.NoiseCurves(
        np.array(predicted_std),
        np.array(observed_rmse),
        np.array(pit_histogram),
        np.array([0.7, 0.9, 1.0]),
    )


def test_reliability_shows_size_distribution_and_coverage():
    series = {
        "all pixels": curves([0.1, 0.2], [0.1, 0.25], (3, 1)),
        "pixels that vary": curves([0.15], [0.12]),
    }
    figure = plots.reliability(series)
    std, pit, coverage = figure.axes
    assert "model units" in std.get_xlabel()
    assert "model units" in std.get_ylabel()
    assert std.get_xlim() == std.get_ylim()
    diagonal, first, second = (line.get_xydata() for line in std.lines)
    np.testing.assert_allclose(diagonal[:, 0], diagonal[:, 1])
    np.testing.assert_allclose(first, [[0.1, 0.1], [0.2, 0.25]])
    np.testing.assert_allclose(second, [[0.15, 0.12]])
    assert [text.get_text() for text in std.get_legend().get_texts()] == list(series)
    np.testing.assert_allclose(pit.patches[0].get_data().values, [1.5, 0.5])
    np.testing.assert_allclose(pit.patches[1].get_data().values, [0.75, 1.5, 0.75])
    assert pit.lines[0].get_ydata() == [1, 1]
    np.testing.assert_allclose(coverage.lines[0].get_ydata(), [0.6827, 0.9545, 0.9973], atol=5e-5)
    for line in coverage.lines[1:]:
        np.testing.assert_allclose(line.get_ydata(), [0.7, 0.9, 1.0])
        np.testing.assert_allclose(line.get_xdata(), [1, 2, 3], atol=0.1)
    assert [line.get_marker() for line in std.lines[1:]] == ["o", "s"], "told apart without colour"


def test_reliability_shows_intervals_beside_the_std_hollow():
    series = {
        "all": curves([0.1], [0.1]),
        "some": curves([0.1], [0.1])._replace(interval_coverage=np.array(NOMINAL)),
    }
    coverage = plots.reliability(series).axes[2]
    hollow = [
        line for line in coverage.lines if line.get_fillstyle() == "none" and len(line.get_ydata())
    ]
    assert [line.get_marker() for line in hollow] == ["s"]
    np.testing.assert_allclose(hollow[0].get_ydata(), NOMINAL)
    np.testing.assert_allclose(hollow[0].get_xdata(), coverage.lines[2].get_xdata())
    assert [text.get_text() for text in coverage.get_legend().get_texts()] == [
        "Gaussian",
        "intervals",
    ]


@pytest.mark.parametrize(
    ("largest", "smallest_error", "scale"),
    [(0.2, 0.05, "linear"), (2.0, 0.05, "log"), (2.0, 0.0, "linear")],
)
def test_reliability_is_logarithmic_where_it_must_and_can(largest, smallest_error, scale):
    figure = plots.reliability({"all": curves([0.1, largest], [smallest_error, largest])})
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == scale


def test_sparsification_has_model_oracle_and_random_order():
    fractions = np.array([0.0, 0.5, 0.9])
    model, oracle = np.array([1.0, 0.8, 0.5]), np.array([1.0, 0.4, 0.1])
    axis = plots.sparsification(fractions, model, oracle).axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines) == ["in random order", "by predicted std", "by true error"]
    assert lines["in random order"].get_ydata() == [1, 1]
    np.testing.assert_array_equal(
        lines["by predicted std"].get_xydata(), np.stack([fractions, model], 1)
    )
    np.testing.assert_array_equal(
        lines["by true error"].get_xydata(), np.stack([fractions, oracle], 1)
    )
    assert len({line.get_linestyle() for line in axis.lines}) == 3, "told apart without colour"


@pytest.mark.parametrize("n", [1, 7, 50])
def test_a_sweep_has_a_panel_for_each_measure_and_marks_what_was_learned(n):
    noise_vars = np.geomspace(0.001, 1, n)
    measures = {
        "ELBO": {"test": -noise_vars},
        "Fréchet distance": {"prior": noise_vars, "mixture": noise_vars / 2},
    }
    figure = plots.variance_sweep(noise_vars, measures, 0.0064)
    assert [axis.get_ylabel() for axis in figure.axes] == list(measures)
    for axis, values in zip(figure.axes, measures.values(), strict=True):
        assert axis.get_xscale() == "log"
        mark, *lines = axis.lines
        assert mark.get_xdata() == [0.0064, 0.0064]
        assert "0.0064" in mark.get_label()
        assert [line.get_label() for line in lines] == list(values)
        for line in lines:
            np.testing.assert_array_equal(
                line.get_xydata(), np.stack([noise_vars, values[line.get_label()]], 1)
            )
            assert (line.get_marker() == "") == (n == 50), (
                "single models are points, a closed form is a line"
            )


@pytest.mark.parametrize(
    ("inliers", "outliers", "auroc"),
    [
        ([0.0, 1.0, 2.0], [3.0, 4.0], "1.000"),
        ([0.0, 2.0], [1.0, 1e9], "0.750"),
        ([1.0], [1.0], "0.500"),
    ],
)
def test_outlier_histograms_count_everyone_once(inliers, outliers, auroc):
    axis = plots.outlier_scores(np.array(inliers), np.array(outliers), "ELBO").axes[0]
    assert auroc in axis.get_title()
    assert "ELBO" in axis.get_xlabel()
    first, second = (patch.get_data() for patch in axis.patches)
    assert first.values.sum() == pytest.approx(1)
    assert second.values.sum() == pytest.approx(1)
    np.testing.assert_array_equal(first.edges, second.edges)
    assert np.average(second.edges[:-1], weights=second.values) >= np.average(
        first.edges[:-1], weights=first.values
    )


def test_extreme_scores_do_not_hide_the_others():
    scores = np.linspace(0, 1, 1000)
    axis = plots.outlier_scores(scores, np.append(scores, 1e6), "score").axes[0]
    assert axis.get_xlim()[1] < 2


def test_degenerate_figures_are_drawn(tmp_path):
    """One image, one bin, one point, constant maps: matplotlib's warnings are errors here."""
    one = np.zeros((1, 1, 6, 5))
    flat = np.zeros((2, 2))
    for i, figure in enumerate(
        [
            plots.samples_compared({"test data": one}),
            plots.reconstructions(one, one, one),
            plots.latent_densities(
                np.arange(2.0), np.arange(2.0), {"prior": flat}, np.zeros((1, 2)), ("z1", "z2")
            ),
            plots.reliability({"all": curves([0.1], [0.0], (5,))}),
            plots.reliability({"all": curves([0.1], [0.1], (5,))}),
            plots.sparsification(np.zeros(1), np.ones(1), np.ones(1)),
            plots.variance_sweep(np.array([0.1]), {"ELBO, nats": {"test": np.zeros(1)}}, 0.1),
            plots.outlier_scores(np.ones(1), np.ones(1), "ELBO"),
        ]
    ):
        assert plots.save(figure, tmp_path / f"{i}.png").stat().st_size > 1000


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
    marks = [
        line.get_xdata()[0]
        for line in figure.axes[0].lines
        if len(line.get_xdata()) == 2 and epochs > 2
    ]
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


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 200])
def test_any_number_of_bands_becomes_colours(channels):
    """Four bands are not colours and transparency; grey scenes stay grey in two bands."""
    x = np.random.default_rng(0).random((6, channels, 9, 8))
    shown = plots.band_colours(x)(x)
    assert shown.shape == (6, 1 if channels == 1 else 3, 9, 8)
    if channels in (1, 3):
        np.testing.assert_array_equal(shown, x)

    figure = plots.reconstructions(x, x, x)
    for axis in figure.axes[:2]:
        assert axis.images[0].get_array().shape[2:] == (() if channels == 1 else (3,))
    assert (str(channels) in figure.axes[0].get_title()) == (channels not in (1, 3))


def test_principal_bands_show_what_varies_most():
    """A pattern over 50 bands is the first colour, whatever little noise there is, and bright."""
    rng = np.random.default_rng(0)
    pattern, spectrum = rng.random((8, 1, 9, 9)), 0.5 + rng.random((1, 50, 1, 1))
    x = pattern * spectrum + 0.01 * rng.normal(size=(8, 50, 9, 9))
    red = plots.band_colours(x)(x)[:, 0]
    assert np.corrcoef(red.ravel(), pattern.ravel())[0, 1] > 0.999
    assert np.mean((red > 0) & (red < 1)) > 0.97


@pytest.mark.parametrize(
    ("height", "width", "grid"), [(12, 300, (5, 1)), (300, 12, (1, 5)), (9, 9, (2, 3))]
)
def test_strips_are_stacked(height, width, grid):
    rows, columns = grid
    tiled = plots.tile(np.zeros((5, 1, height, width)))
    assert tiled.shape[:2] == (rows * (height + 1) - 1, columns * (width + 1) - 1)


def test_one_bright_image_does_not_darken_the_maps_of_the_others():
    maps = np.full((25, 1, 8, 8), 0.1)
    maps[3] = 40.0
    figure = plots.samples(maps, maps, "samples", scale=255.0)
    (shown,) = figure.axes[1].images
    assert shown.get_clim() == (0, pytest.approx(3 * 25.5))
    assert "unit of the data" in figure.axes[2].get_ylabel()
