"""The protocol from end to end: what is written, that it repeats, and tells good from bad."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import equipoise
from equipoise.aggregate import GaussianMixture
from equipoise.config import ConfigError
from equipoise.data import Subset
from equipoise.evaluation import SECTIONS, Examples, evaluate
from equipoise.evaluation.samples import ROWS
from equipoise.evaluation.subject import BATCH
from equipoise.files import write_json
from equipoise.glossary import leaves, warnings_of
from equipoise.model import encode_all
from equipoise.store import save_mixture
from equipoise.training.job import train

torch.set_num_threads(1)


class Projections(torch.nn.Module):
    """Features that cost nothing: fixed random projections of the image."""

    def __init__(self, n_pixels=64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(n_pixels, 12, generator=generator) / 255)

    def forward(self, levels):
        return levels.float().flatten(1) @ self.weight


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    config = equipoise.TrainConfig(
        latent_dim=8,
        width=8,
        stage_1_epochs=15,
        stage_2_epochs=5,
        batch_size=64,
        learning_rate=5e-3,
        n_components=5,
    )
    return train(digits, config, tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture(scope="module")
def permuted(digits):
    """Digits whose pixels have been shuffled, each in its own way."""
    rng = np.random.default_rng(0)
    images = np.stack(
        [rng.permutation(image.ravel()).reshape(image.shape) for image in digits.test[:]]
    )
    return Examples("permuted digits", Subset.whole(images))


@pytest.fixture(scope="module")
def found(run, digits, permuted):
    return evaluate(run, digits, against=permuted, features=Projections())


def test_all_sections_are_written_with_finite_figures(found, run):
    assert json.loads(run.evaluation_file.read_text()) == found
    assert set(found) == {"about", *SECTIONS}
    for name in SECTIONS:
        for keys, figure in leaves(found[name]):
            if isinstance(figure, dict):
                assert math.isfinite(figure["value"]), keys
                assert figure["n"] > 1, keys
    for name in (
        "samples-compared",
        "latent",
        "reliability",
        "sparsification",
        "variance-sweep",
        "outliers",
        "training",
    ):
        with Image.open(run.figures / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_likelihoods_are_ordered_as_they_must_be(found):
    section = found["likelihood"]
    value = {
        keys[-1]: figure["value"]
        for keys, figure in leaves(section)
        if len(keys) == 1 and keys[0] != "noise_floor_var"
    }
    assert value["elbo"] == pytest.approx(value["log_likelihood"] - value["kl"], abs=1e-3)
    assert value["iwae_20"] > value["elbo"]
    assert value["iwae_20"] == pytest.approx(
        value["iwae_20_first_500"], abs=1.0
    )  # there are but 180 examples
    # D = 64, levels 1/16 apart.
    bound = section["dequantised"]["iwae_20"]["value"]
    dequantised = -(bound / 64 + math.log(1 / 16)) / math.log(2)
    assert value["bits_per_dim_dequantised"] == pytest.approx(dequantised)
    exact = -section["digital"]["iwae_20"]["value"] / 64 / math.log(2)
    assert value["bits_per_dim"] == pytest.approx(exact)
    # Better than a uniform guess of the 17 levels.
    assert 0 < value["bits_per_dim"] < value["bits_per_dim_dequantised"] < math.log2(17)


def test_samples_are_ranked_real_data_first(found):
    section = found["samples"]
    assert section["features"].startswith("Projections-")
    distance = {row: section[row]["frechet_distance"]["value"] for row in ROWS}
    assert distance["real"] == min(distance.values())
    assert distance["mixture"] < distance["prior"]
    for name in ("frechet_distance", "precision", "recall"):
        assert {section[row][name]["n"] for row in ROWS} == {180}
    for name in ("precision", "recall"):
        assert section["reconstruction"][name]["value"] >= section["prior"][name]["value"]


def test_latent_figures_agree_with_the_likelihoods(found):
    latent = found["latent"]
    rate = sum(unit["value"] for unit in latent["rate_per_unit"])
    assert rate == pytest.approx(found["likelihood"]["kl"]["value"], rel=1e-4)
    codes = {name: figure["value"] for name, figure in latent["code_log_likelihood"].items()}
    assert codes["gain"] == pytest.approx(codes["mixture"] - codes["gaussian"], abs=1e-6)
    assert latent["active_units"]["of"] == 8


def test_the_noise_is_judged_off_the_bounds_of_the_scale_too(found):
    noise = found["noise"]
    assert 0 < noise["off_bounds_share"] < 1
    coverage = {name: noise[name]["coverage_1"]["value"] for name in ("varying", "off_bounds")}
    assert coverage["off_bounds"] < coverage["varying"]
    assert 0 < noise["off_bounds"]["digital_coverage_1"]["value"] < 1


def test_permuted_digits_are_outliers(found):
    assert found["outliers"]["combined"]["auroc"]["value"] > 0.95
    assert found["outliers"]["against"] == "permuted digits"


def test_the_same_seed_gives_the_same_figures_whatever_else_is_computed(
    run, digits, permuted, found
):
    for name in SECTIONS:
        again = evaluate(run, digits, against=permuted, features=Projections(), sections=[name])
        assert again[name] == found[name]
        assert set(again) == {"about", *SECTIONS}  # the others are kept


def test_figures_of_another_model_or_mixture_are_not_kept_nor_those_of_a_torn_file(
    run, digits, found
):
    before = run.evaluation_file.read_text()
    try:
        for other in (
            before.replace(found["about"]["model"], "0" * 64),
            before.replace(found["about"]["mixture"], "0" * 64),
        ):
            write_json(run.evaluation_file, json.loads(other))
            assert set(evaluate(run, digits, sections=["noise"])) == {"about", "noise"}
        for damaged in (before[:1000], "[]"):
            run.evaluation_file.write_text(damaged)
            with pytest.warns(UserWarning, match=r"altered.* kept as"):
                assert set(evaluate(run, digits, sections=["noise"])) == {"about", "noise"}
    finally:
        write_json(run.evaluation_file, json.loads(before))


def test_other_examples_are_judged_beside_the_runs_own(run, digits, found):
    before = run.evaluation_file.read_text()
    picture = (run.figures / "reliability.png").read_bytes()
    half = Examples("a/half.npy", digits.test.take(slice(90)))
    assert (
        evaluate(run, digits, test=half, sections=["noise"])["noise"]["all"]["coverage_1"]["n"]
        == 90
    )
    assert run.evaluation_file.read_text() == before
    assert (run.figures / "reliability.png").read_bytes() == picture
    assert "noise" in json.loads((run.folder / "evaluation-half.npy.json").read_text())


def test_each_section_says_when_and_by_which_command_it_was_made(run, digits, found):
    again = evaluate(run, digits, sections=["noise"], seed=7, command=["equipoise", "evaluate"])[
        "about"
    ]["sections"]
    assert again["noise"]["seed"] == 7
    assert again["noise"]["command"] == ["equipoise", "evaluate"]
    assert again["likelihood"]["seed"] == 0
    assert again["likelihood"]["created"] <= again["noise"]["created"]


def test_another_seed_draws_anew_and_agrees_within_the_standard_errors(run, digits, found):
    """Neighbouring seeds share no stream: figures of seed 1 once were those of seed 0."""
    other = evaluate(
        run, digits, seed=1, features=Projections(), sections=["likelihood", "samples", "latent"]
    )
    same, gaps = set(), []
    for name in ("likelihood", "samples", "latent"):
        theirs = dict(leaves(other[name]))
        for keys, figure in leaves(found[name]):
            if isinstance(figure, dict) and figure.get("standard_error"):
                gaps.append((theirs[keys]["value"] - figure["value"]) / figure["standard_error"])
                same.add(gaps[-1] == 0)
    assert len(gaps) > 20
    assert max(map(abs, gaps)) < 5
    values = [
        found["likelihood"]["iwae_20"]["value"],
        other["likelihood"]["iwae_20_first_500"]["value"],
    ]
    assert values[0] != values[1]


def test_copies_are_found_where_codes_are_noisy(digits, tmp_path):
    """With a large fixed variance, posteriors are wide, and samples unlike training data."""
    config = equipoise.TrainConfig(
        latent_dim=8, width=8, noise="fixed", noise_var=0.05, stage_1_epochs=15, stage_2_epochs=0,
        batch_size=64,
        learning_rate=5e-3, n_components=5,
    )  # fmt: skip
    run = train(digits, config, tmp_path / "run")
    honest = evaluate(run, digits, sections=["latent"])["latent"]["memorisation"]
    assert honest["closer"]["value"] == pytest.approx(0.5, abs=0.1)
    assert not honest["copied"]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_images_of_real_numbers_and_in_colour(shape, tmp_path):
    rng = np.random.default_rng(0)
    data = equipoise.load_data(rng.random((120, *shape), dtype=np.float32))
    config = equipoise.TrainConfig(
        latent_dim=2, width=4, stage_1_epochs=1, stage_2_epochs=1, n_components=2
    )
    run = train(data, config, tmp_path / "run")
    found = evaluate(run, data, features=Projections(n_pixels=math.prod(shape)))
    assert set(found) == {"about", "likelihood", "samples", "latent", "noise"}
    assert (run.figures / "samples-compared.png").is_file()


def test_an_interruption_keeps_what_was_done(run, digits, found):
    run.evaluation_file.unlink()

    def interrupt(label, _done, _total):
        if label.startswith("Features"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(run, digits, features=Projections(), progress=interrupt)
    assert set(json.loads(run.evaluation_file.read_text())) == {"about", "likelihood"}


def test_progress_ends_at_its_total(run, digits):
    told = {}
    evaluate(
        run,
        digits,
        sections=["likelihood"],
        progress=lambda label, done, total: told.update({label: (done, total)}),
    )
    assert {"ELBO", "IWAE of the paper", "IWAE-20"} <= told.keys()
    assert all(done == total > 0 for done, total in told.values())


@pytest.mark.slow
def test_a_mixture_of_one_component_per_training_example_is_found_out(run, digits, tmp_path):
    """The paper's Table 4 with K = N: such a mixture hands out the training set."""
    honest = evaluate(run, digits, sections=["latent"], features=Projections())["latent"][
        "memorisation"
    ]
    assert not honest["copied"]
    model, mixture_file = run.model(), run.mixture_file.read_bytes()
    posterior = encode_all(model, [torch.from_numpy(digits.train[:])])
    weights = torch.full((len(posterior.mean),), 1 / len(posterior.mean), dtype=torch.float64)
    copying = GaussianMixture(weights, posterior.mean.double(), posterior.var.double().diag_embed())
    try:
        save_mixture(run.mixture_file, copying, {})
        found = evaluate(run, digits, sections=["latent"], features=Projections())["latent"][
            "memorisation"
        ]
    finally:
        run.mixture_file.write_bytes(mixture_file)
    assert found["copied"]
    assert found["closer"]["value"] > honest["closer"]["value"]


@pytest.mark.slow
def test_further_sources_are_judged_beside_the_runs_own(run, digits, found):
    sources = ["mixture=3", "flow", "mixture=1455", "prior", "mixture@0.5"]
    more = evaluate(
        run,
        digits,
        sections=["samples", "latent"],
        sources=sources,
        features=Projections(),
        progress=lambda *step: None,
    )
    judged = ["mixture=3", "flow", "mixture=1455", "mixture@0.5"]
    assert more["about"]["sources"] == {
        "mixture=3": {"n_components": 3},
        "flow": {},
        "mixture=1455": {"n_components": 1455},
        "mixture@0.5": {"n_components": 5},
    }
    for name in judged:
        assert more["samples"][name]["frechet_distance"]["n"] == 180
    colder, own = more["samples"]["mixture@0.5"], found["samples"]["mixture"]
    assert colder["recall"]["value"] < own["recall"]["value"]
    assert {row: more["samples"][row] for row in ROWS} == {
        row: found["samples"][row] for row in ROWS
    }
    latent = more["latent"]
    codes, gain = latent["code_log_likelihood"], latent["code_gain"]
    assert list(gain) == judged
    for name in judged:
        assert gain[name]["value"] == pytest.approx(
            codes[name]["value"] - codes["mixture"]["value"], abs=1e-4
        )
    assert gain["flow"]["value"] > -3 * gain["flow"]["standard_error"]  # it starts from the mixture
    assert (
        gain["mixture=1455"]["value"] < 0
    )  # a component per code: overfitted, and found out below
    memorised = latent["memorisation"]
    assert memorised["mixture=1455"]["copied"]
    assert not memorised["flow"]["copied"]
    assert memorised["closer"] == found["latent"]["memorisation"]["closer"]
    warnings = list(warnings_of(more))
    assert any("(mixture of 1,455) single out" in text for text in warnings)
    assert not any("(flow) single out" in text for text in warnings)
    kept = evaluate(run, digits, sections=["noise"])
    assert kept["about"]["sources"] == more["about"]["sources"]
    assert kept["samples"] == more["samples"]


def test_a_table_is_compared_in_its_columns(table, tmp_path):
    data = equipoise.load_data(table)
    config = equipoise.TrainConfig(
        latent_dim=2, width=4, stage_1_epochs=10, stage_2_epochs=0, n_components=2
    )
    run = train(data, config, tmp_path / "run")
    found = evaluate(run, data)
    assert found["samples"]["features"] == "columns"
    # Real numbers have no levels, and no bounds.
    assert not {"bits_per_dim", "bits_per_dim_dequantised"} & set(found["likelihood"])
    assert "off_bounds" not in found["noise"]
    assert "digital_coverage_1" not in found["noise"]["all"]
    assert found["latent"]["active_units"]["of"] == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, on the way
def test_a_figure_that_is_not_finite_is_named(table, tmp_path):
    data = equipoise.load_data(table)
    config = equipoise.TrainConfig(
        latent_dim=2, width=4, stage_1_epochs=1, stage_2_epochs=0, n_components=1
    )
    run = train(data, config, tmp_path / "run")

    far = Examples("far", Subset.whole(data.test[:] * np.float32(1e30)))
    with (
        pytest.warns(UserWarning, match="Are they in the same unit"),
        pytest.raises(ArithmeticError, match=r"^(noise|likelihood)\.\S+ is (nan|-?inf)"),
    ):
        evaluate(run, data, test=far, sections=["noise", "likelihood"])
    assert not (run.folder / "evaluation-far.json").exists()


def test_each_batch_of_a_table_gets_noise_of_its_own(tmp_path):
    """Rows that repeat after each batch: reconstructions would, too, were the noise the same."""
    rows = np.random.default_rng(0).normal(size=(BATCH, 4))
    data = equipoise.load_data(np.concatenate([rows] * 24))
    config = equipoise.TrainConfig(
        latent_dim=2, width=4, stage_1_epochs=1, stage_2_epochs=0, n_components=2
    )
    run = train(data, config, tmp_path / "run")
    seen = {}

    class Recording(torch.nn.Module):
        def forward(self, columns):
            seen.setdefault(len(seen), columns.clone())
            return columns

    test = Examples("twice", Subset.whole(np.concatenate([rows + 0.1] * 2).astype(np.float32)))
    evaluate(run, data, test=test, sections=["samples"], features=Recording())
    values = torch.cat(list(seen.values())).numpy().round(5)
    # Of the test data each row is there twice, of the reconstructions none may be.
    _, counts = np.unique(values, axis=0, return_counts=True)
    assert (counts > 1).sum() < 2.2 * BATCH


def test_wrong_arguments_are_refused_before_anything_is_written(run, digits):
    before = run.evaluation_file.stat().st_mtime_ns if run.evaluation_file.exists() else None
    with pytest.raises(
        ConfigError,
        match=r"(?s)no section 'latnet'.*source of codes 'flows'.*at least 1.*the seed.*at least 4",
    ) as error:
        evaluate(
            run,
            digits,
            sections=["latnet", "samples"],
            sources=["flows"],
            n_samples=3,
            importance_samples=0,
            seed=-1,
        )
    assert "likelihood, samples, latent, noise, outliers" in str(error.value)
    with pytest.raises(ConfigError, match="--against"):
        evaluate(run, digits, sections=["outliers"])
    with pytest.raises(ConfigError, match=r"100% of 'again' are in the training data"):
        evaluate(run, digits, test=Examples("again", digits.train.take(slice(50))))
    with pytest.raises(ConfigError, match=r"100% of 'own' are in the run's own test data"):
        evaluate(run, digits, against=Examples("own", digits.test.take(slice(50))))
    late = np.concatenate(
        [np.zeros((600, 1, 8, 8), np.uint8), np.full((1, 1, 8, 8), 200, np.uint8)]
    )
    with pytest.raises(ValueError, match=r"within \[0, 16\]; these are from 0 to 200"):
        evaluate(run, digits, test=Examples("too bright", Subset.whole(late)))
    with pytest.raises(ValueError, match=r"whole numbers within \[0, 16\]"):
        evaluate(
            run, digits, test=Examples("floats", Subset.whole(np.zeros((5, 1, 8, 8), np.float32)))
        )
    with pytest.raises(ValueError, match="was trained on"):
        evaluate(
            run,
            equipoise.load_data(
                np.zeros((100, 1, 8, 8), np.uint8)
                + np.arange(100, dtype=np.uint8)[:, None, None, None]
            ),
        )
    after = run.evaluation_file.stat().st_mtime_ns if run.evaluation_file.exists() else None
    assert before == after
