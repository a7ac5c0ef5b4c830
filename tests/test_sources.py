"""Densities by name: what each is, that fits are kept, but not for another model."""

import pytest
import torch

import equipoise
from equipoise.aggregate import AggregatePosterior, GaussianMixture, StandardNormal
from equipoise.files import StoreError
from equipoise.flow_fit import CodeFlow
from equipoise.run import Run
from equipoise.sources import (
    check_source,
    code_source,
    encode_examples,
    exportable_mixture,
    file_stem,
    ready_source,
)
from equipoise.store import load_mixture, save_mixture, save_model
from equipoise.training.job import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return equipoise.load_data("digits")


@pytest.fixture
def run(data, trained, tmp_path):
    """A copy, for fits are kept in it."""
    for file in trained.folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return Run(tmp_path)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    config = equipoise.TrainConfig(
        latent_dim=3,
        width=8,
        stage_1_epochs=12,
        stage_2_epochs=0,
        batch_size=64,
        learning_rate=5e-3,
        n_components=3,
    )
    return train(data, config, tmp_path_factory.mktemp("sources") / "run")


def no_data():
    pytest.fail("the data are not needed")


def test_each_name_is_its_density(run, data):
    model = run.model()
    sources = {
        name: code_source(
            run, model, name, no_data if name in ("mixture", "gaussian", "prior") else lambda: data
        )
        for name in (
            "mixture",
            "gaussian",
            "prior",
            "mixture=7",
            "mixture=auto",
            "flow",
            "aggregate",
        )
    }
    assert isinstance(sources["prior"], StandardNormal)
    assert torch.equal(sources["mixture"].means, run.mixture().means)
    assert sources["gaussian"].n_components == 1
    torch.testing.assert_close(sources["gaussian"].moments(), run.mixture().moments())
    assert sources["mixture=7"].n_components == 7
    assert isinstance(sources["mixture=auto"], GaussianMixture)
    assert isinstance(sources["flow"], CodeFlow)
    assert isinstance(sources["aggregate"], AggregatePosterior)
    posterior = encode_examples(model, data.train, CPU)
    assert torch.equal(sources["aggregate"].means, posterior.mean)
    codes = encode_examples(model, data.validation, CPU).sample(torch.Generator().manual_seed(1))
    fit = {name: source.log_prob(codes).mean().item() for name, source in sources.items()}
    # Held-out codes chose both, and the run's own K was given. The tolerance is for the draws.
    assert fit["flow"] > fit["mixture"] - 0.02 > fit["gaussian"] > fit["prior"]
    _, description = load_mixture(run.folder / "mixture-auto.safetensors")
    scores = {score["n_components"]: score["value"] for score in description["held_out"]}
    assert description["n_components"] == sources["mixture=auto"].n_components in scores
    for source in sources.values():
        assert source.sample(5, torch.Generator()).shape == (5, 3)


@pytest.mark.parametrize("name", ["flow", "mixture=4"])
def test_a_fit_is_kept_until_the_model_changes(run, data, name):
    steps = []
    first = code_source(run, run.model(), name, lambda: data, lambda *step: steps.append(step))
    assert steps
    assert all(
        label in ("flow", "mixture of 4") and "nats per code" in text for label, _, _, text in steps
    )
    file = run.folder / f"{file_stem(name)}.safetensors"
    kept = file.read_bytes()
    again = code_source(run, run.model(), name, no_data)
    assert torch.equal(again.sample(9, torch.Generator()), first.sample(9, torch.Generator()))
    # Damaged: fitted anew, to the same bits but for the seconds it took.
    file.write_bytes(kept[:1000])
    with pytest.warns(UserWarning, match="kept as"):
        again = code_source(run, run.model(), name, lambda: data)
    assert file.with_name(f"{file.name}.damaged").read_bytes() == kept[:1000]
    assert torch.equal(again.sample(9, torch.Generator()), first.sample(9, torch.Generator()))
    # Another model: codes twice as far out.
    model = run.model()
    with torch.no_grad():
        for parameter in model.encoder.output.parameters():
            parameter[: model.latent_dim] *= 2
    save_model(run.model_file, model)
    save_mixture(run.mixture_file, load_mixture(run.mixture_file)[0], {})
    stale = file.read_bytes()
    moved = code_source(run, run.model(), name, lambda: data)
    assert file.read_bytes() != stale
    if name != "flow":  # which starts from the run's mixture, and bends it
        ratio = moved.moments().covariance.trace() / first.moments().covariance.trace()
        assert ratio > 2


def test_a_temperature_is_no_new_fit(run, data):
    mixture = run.mixture()
    colder = code_source(run, run.model(), "mixture@0.5", no_data)
    assert torch.equal(colder.weights, mixture.weights)
    assert torch.equal(colder.means, mixture.means)
    assert torch.equal(colder.covariances, 0.5 * mixture.covariances)

    # Of another K, only the mixture itself is fitted, once.
    fitted = code_source(run, run.model(), "mixture=4", lambda: data)
    files = set(run.folder.iterdir())
    colder = code_source(run, run.model(), "mixture=4@0.5", no_data)
    assert torch.equal(colder.covariances, 0.5 * fitted.covariances)
    assert set(run.folder.iterdir()) == files
    assert exportable_mixture(run, run.model(), "mixture=4@0.5", no_data).n_components == 4


def test_a_ready_mixture_takes_a_temperature(run):
    mixture = run.mixture()
    assert torch.equal(ready_source("mixture@1", mixture).covariances, mixture.covariances)
    for name in ("mixture@0", "mixture=4@0.5", "flow"):
        with pytest.raises(ValueError, match="source of codes"):
            ready_source(name, mixture)


def test_other_data_are_refused(run, data):
    other = equipoise.load_data(torch.randint(0, 17, (100, 1, 8, 8), dtype=torch.uint8).numpy())
    with pytest.raises(StoreError, match="was trained on"):
        code_source(run, run.model(), "mixture=4", lambda: other)
    assert not (run.folder / "mixture-4.safetensors").exists()


def test_more_components_than_codes_are_refused(run, data):
    with pytest.raises(ValueError, match="1455 codes for 5000"):
        code_source(run, run.model(), "mixture=5000", lambda: data)


@pytest.mark.parametrize(
    "name",
    [
        *("mixture=0", "mixture=", "mixture=2.5", "mixture=many", "flows", "", "prior=3"),
        *("mixture@", "mixture@0", "mixture@0.00", "mixture@-1", "mixture@nan", "mixture@1e3"),
        *("flow@0.8", "aggregate@0.8", "mixture@0.8@0.8", "mixture=0@0.8"),
    ],
)
def test_other_names_are_refused_with_the_choices(name):
    with pytest.raises(
        ValueError,
        match=r"no source of codes .*gaussian, mixture, mixture=K, mixture=auto, mixture@T, flow",
    ):
        check_source(name)
