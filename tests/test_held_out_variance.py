"""Eq. (10) over examples that the networks have not learned from, against planted truths."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import equipoise
from equipoise.config import TrainConfig
from equipoise.data import load_examples
from equipoise.estimate import Estimate
from equipoise.model import VAE, Scaling
from equipoise.noise import DimensionNoise, GlobalNoise
from equipoise.processes import ALONE
from equipoise.residuals import ResidualVariance, StandardisedVariance, overfitting_ratio
from equipoise.run import Run
from equipoise.store import save_model
from equipoise.training.passes import SplitPass
from equipoise.training.setup import make_model
from equipoise.training.stage_ends import (
    SHRINKAGES,
    HeldOutVar,
    digital_log_probabilities,
    held_out_var,
    worth_of_prediction,
)
from equipoise.training.trainer import Trainer, _describe_held_out
from tests.test_exact_resume import Stop


class Codes(nn.Module):
    """The first columns are the code, as a point."""

    def __init__(self, latent_dim):
        super().__init__()
        self.latent_dim = latent_dim

    def forward(self, x):
        mean = x[:, : self.latent_dim]
        return torch.cat([mean, torch.zeros_like(mean)], 1)


def regression(n, latent_dim, dimensions, std, rng):
    """A decoder that least squares fitted to n examples, those examples, and fresh ones."""
    weights = rng.standard_normal((latent_dim, dimensions))

    def draw(rows):
        codes = rng.standard_normal((rows, latent_dim))
        noise = std * rng.standard_normal((rows, dimensions))
        return np.hstack([codes, codes @ weights + noise])

    train, fresh = draw(n), draw(4000)
    fitted = np.linalg.lstsq(train[:, :latent_dim], train, rcond=None)[0]
    decoder = nn.Linear(latent_dim, train.shape[1], bias=False)
    decoder.weight.data = torch.from_numpy(fitted.T).float()
    return decoder, torch.from_numpy(train).float(), torch.from_numpy(fresh).float()


def pass_over(model, x):
    return SplitPass(model, load_examples(x.numpy(), model.shape), 500, ALONE)


def found_var(model, train, fresh):
    statistic = ResidualVariance(model.noise.statistic_shape)
    for terms in pass_over(model, train).terms(model, torch.Generator()):
        statistic.update(terms.residual)
    return statistic.var, held_out_var(
        model,
        statistic.var,
        len(train),
        pass_over(model, fresh),
        torch.Generator(),
        lambda tensor: tensor,
    )


@pytest.mark.parametrize(("n", "latent_dim"), [(40, 30), (60, 30), (400, 30)])
def test_a_regression_with_as_many_weights_as_examples(n, latent_dim):
    """Its training residuals have (n - p)/n of the noise, those of fresh examples n-1 over n-p-1.

    Both are known in expectation for Gaussian codes.
    """
    rng = np.random.default_rng(n)
    decoder, train, fresh = regression(n, latent_dim, 2000, std=0.5, rng=rng)
    model = VAE(
        Codes(latent_dim),
        decoder,
        GlobalNoise(),
        shape=(train.shape[1],),
        latent_dim=latent_dim,
        deterministic=True,
    ).eval()
    training_var, found = found_var(model, train, fresh)

    share = 2000 / train.shape[1]  # the other columns are the code itself
    expected_training = share * 0.25 * (n - latent_dim) / n
    expected = share * 0.25 * (n - 1) / (n - latent_dim - 1)
    assert float(training_var) == pytest.approx(expected_training, rel=0.05)
    # The mean over training sets; that of one set differs by about 2 p / (n - p)^2 of it.
    spread = 1.5 * np.sqrt(2 * latent_dim) / (n - latent_dim)
    assert float(found.var) == pytest.approx(expected, rel=0.03 + spread)

    with torch.no_grad():
        exact = float((fresh - decoder(fresh[:, :latent_dim])).square().mean())
    assert float(found.var) == pytest.approx(exact, rel=1e-3)
    assert found.ratio == pytest.approx(exact / float(training_var), rel=1e-3)
    assert found.shrinkage == 0


def test_the_statistic_is_a_mean_over_examples_and_adds_up():
    residual = torch.randn(30, 2, 5, generator=torch.Generator().manual_seed(0))
    log_var = torch.randn(30, 2, 5, generator=torch.Generator().manual_seed(1))
    whole, first, second = (StandardisedVariance() for _ in range(3))
    whole.update(residual, log_var)
    first.update(residual[:11], log_var[:11])
    second.update(residual[11:], log_var[11:])
    first.all_reduce(lambda sums: sums + second.sums)

    per_example = (residual.double().square() / log_var.double().exp()).flatten(1).mean(1)
    expected = Estimate.of_mean(per_example)
    for statistic in (whole, first):
        found = statistic.estimate()
        assert found.value == pytest.approx(expected.value, rel=1e-12)
        assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-9)
        assert found.n == 30


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="at least one held-out example"):
        StandardisedVariance().estimate()


@pytest.mark.parametrize("n", [3, 5, 10, 30, 100, 1000])
def test_the_ratio_trusts_as_many_examples_as_there_are(n):
    rng = np.random.default_rng(n)
    ratios = []
    for _ in range(300):
        per_example = 2.5 * rng.chisquare(20, n) / 20
        ratios.append(overfitting_ratio(Estimate.of_mean(per_example)))
    # Nowhere above the truth on average, and close to it from a few examples on.
    assert 2.5 * (1 - 0.4 / n) - 0.1 < np.mean(ratios) < 2.5 + 0.05


def test_one_odd_example_does_not_decide():
    ordinary = np.random.default_rng(0).chisquare(9, 30) / 9
    odd = np.append(ordinary, 125**2 / 9)
    assert Estimate.of_mean(odd).value > 50
    assert overfitting_ratio(Estimate.of_mean(odd)) < 3


def dimension_model(stds):
    """A model that decodes zero, with a variance per column."""
    decoder = nn.Linear(1, len(stds))
    nn.init.zeros_(decoder.weight)
    nn.init.zeros_(decoder.bias)
    noise = DimensionNoise((len(stds),))
    shape = (len(stds),)
    return VAE(Codes(1), decoder, noise, shape=shape, latent_dim=1, deterministic=True).eval()


def test_columns_of_different_noise_keep_it():
    stds = torch.tensor([0.1, 0.3, 1.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    train, fresh = (stds * torch.randn(n, 4, generator=generator) for n in (400, 200))
    training_var, found = found_var(dimension_model(stds), train, fresh)
    assert found.shrinkage < 0.01
    torch.testing.assert_close(found.var / training_var, torch.ones(4).double(), rtol=0.25, atol=0)


def test_a_column_that_hardly_varied_takes_from_the_common_variance():
    generator = torch.Generator().manual_seed(0)
    train, fresh = (torch.randn(n, 6, generator=generator) for n in (400, 60))
    train[:, 5] = 0.0
    fresh[:, 5] *= torch.arange(60) % 10 == 0
    training_var, found = found_var(dimension_model([1.0] * 6), train, fresh)

    assert training_var[5] < 1e-6
    assert found.shrinkage in SHRINKAGES
    assert found.shrinkage > 0.01
    worst = (fresh[:, 5].square() / found.var[5]).max()
    assert worst < 200  # with the variance of the training it is more than a million
    assert found.var[:5].min() > 0.7


SMALL = equipoise.TrainConfig(
    latent_dim=4,
    width=32,
    batch_size=16,
    learning_rate=5e-3,
    stage_1_epochs=200,
    stage_2_epochs=0,
    tolerance=0.0,
    n_components=2,
    accelerator="cpu",
    keep_weights="last",
    early_stopping=0,
)


def small_table(n=60, seed=0):
    """So few rows that networks learn them by heart."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((n, 3)) @ rng.standard_normal((3, 20))
    return equipoise.load_data(factors + 0.5 * rng.standard_normal(factors.shape))


def trained(data, config, **options):
    torch.manual_seed(0)
    trainer = Trainer(make_model(data, config), data, config, **options)
    return trainer, trainer.fit()


@pytest.mark.slow
def test_training_for_too_long_does_no_harm():
    data = small_table()
    falls, factors = {}, {}
    for source in ("training", "held-out"):
        trainer, rows = trained(data, replace(SMALL, variance_from=source))
        elbos = [row["validation_elbo"] for row in rows]
        falls[source] = max(elbos) - trainer.figures(trainer.validation).elbo
        test = trainer.figures(trainer.test)
        factors[source] = test.noise_var / test.mse
    assert falls["training"] > 10 > 3 > falls["held-out"]
    assert factors["training"] < 0.4 < 0.7 < factors["held-out"] < 1.4
    assert trainer.overfitting > 2
    assert rows[-1]["overfitting"] == trainer.overfitting
    assert rows[-1]["optimal_noise_var"] == pytest.approx(
        trainer.overfitting * rows[-1]["training_noise_var"]
    )


@pytest.mark.parametrize(
    "options", [{"noise": "fixed", "noise_var": 0.05}, {"noise_update": "gradient"}], ids=str
)
def test_a_variance_without_closed_form_has_no_ratio_within_epochs(options):
    """It is not multiplied by a ratio, so that one relative to it would grow without end."""
    trainer, rows = trained(small_table(), replace(SMALL, stage_1_epochs=12, **options))
    assert [row["overfitting"] for row in rows[:-1]] == [1.0] * 11
    assert 1 <= trainer.overfitting < 3


def test_resuming_with_a_ratio_is_the_run(tmp_path):
    data, config = small_table(), replace(SMALL, stage_1_epochs=60)
    whole, rows = trained(data, config)
    with pytest.raises(KeyboardInterrupt):
        trained(data, config, folder=tmp_path, sinks=[Stop(50)])
    torch.manual_seed(0)
    resumed = Trainer(make_model(data, config), data, config, folder=tmp_path)
    resumed_rows = resumed.fit(resume=True)

    assert rows[48]["overfitting"] > 1.2
    assert [row["validation_elbo"] for row in resumed_rows] == [
        row["validation_elbo"] for row in rows
    ]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_split_of_fresh_examples_is_passed_over_in_order():
    data = small_table()
    model = make_model(data, SMALL)
    held_out = SplitPass(model, data.validation, 500, ALONE)
    found = held_out_var(
        model, torch.tensor(0.5).double(), 50, held_out, torch.Generator(), lambda tensor: tensor
    )
    assert found.measured.n == len(data.validation)


@pytest.mark.slow
def test_the_user_is_told_how_much_was_learned_by_heart(tmp_path):
    said = []

    class Ear(Stop):
        def message(self, text):
            said.append(text)

    config = replace(SMALL, stage_1_epochs=150)
    run = equipoise.train(small_table(), config, tmp_path / "run", sinks=[Ear(0)])
    (sentence,) = [text for text in said if "eq. (10)" in text]
    assert "held-out examples, whose squared error is" in sentence
    assert any("learned by heart" in text for text in said if text.startswith("Warning"))
    assert run.history()[-1]["overfitting"] > 2

    from equipoise.report import write_report

    assert "times the squared error" in write_report(run.folder).read_text()


@pytest.mark.parametrize(
    ("measured", "ratio", "says"),
    [
        (Estimate(0.0, 0.0, 5), 1.0, "is less by chance, so that 1.00"),
        (Estimate(0.8, 0.1, 5), 1.0, "is less by chance, so that 1.00"),
        (Estimate(1.5, 1.4, 5), 1.0, "is so uncertain that 1.00"),
        (Estimate(1.5, 0.01, 5), 1.5, None),
    ],
)
def test_the_reason_of_a_ratio_is_told(measured, ratio, says):
    """Without any held-out error, as for black images, there is nothing to divide by."""
    text = _describe_held_out(HeldOutVar(torch.tensor(0.1), ratio, measured, 0.0), 50)
    assert says in text if says else "taken" not in text


def test_runs_from_before_the_option_keep_their_meaning_and_their_model(tmp_path):
    """Their model is tied to the options that there were, and a new option must not untie it."""
    config = replace(SMALL, stage_1_epochs=1, variance_from="training")
    run = equipoise.train(small_table(), config, tmp_path / "run")
    model, settings = run.model(), json.loads(run.config_file.read_text())
    del settings["options"]["variance_from"]
    equipoise.files.write_json(run.config_file, settings)
    fingerprint = settings["data"]["fingerprint"]
    origin = equipoise.run.origin_of(settings["options"], fingerprint)
    save_model(run.model_file, model, origin)

    earlier = Run(run.folder)
    assert earlier.config() == config
    assert earlier.model().shape == (20,)


# What a predicted variance is worth


@pytest.mark.parametrize("shape", [(6,), (1, 8, 8)])
@pytest.mark.parametrize("error", [0.0, 2.0])
def test_the_worth_of_a_prediction_is_a_difference_of_log_densities(shape, error):
    """It is computed from sums over examples; here, example by example."""
    x = torch.randn(90, *shape, generator=torch.Generator().manual_seed(0))
    model = VAE.build(shape, latent_dim=2, architecture="mlp", width=2).eval()
    model.requires_grad_(False)
    model.predict_variance(torch.tensor(0.7), torch.tensor(1e-3))
    nn.init.normal_(model.noise.network.output.bias, std=error)
    found = worth_of_prediction(
        model, pass_over(model, x), torch.Generator().manual_seed(1), lambda tensor: tensor
    )

    (terms,) = pass_over(model, x).terms(model, torch.Generator().manual_seed(1))
    var = terms.residual.square().mean()
    terms = terms._replace(log_likelihood=terms.log_likelihood.detach())
    reference = torch.tensor(0.7).log()
    shared = equipoise.gaussian.Gaussian(torch.zeros_like(x), reference).log_prob(terms.residual)
    expected = Estimate.of_mean(terms.log_likelihood - shared)
    assert float(found.shared_var) == pytest.approx(float(var), rel=1e-5)
    assert found.gain.value == pytest.approx(expected.value, abs=1e-3)
    assert found.gain.standard_error == pytest.approx(expected.standard_error, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 9)])
def test_a_prediction_of_levels_is_judged_by_their_probability(shape):
    levels = torch.randint(0, 17, (70, *shape), generator=torch.Generator().manual_seed(0))
    scaling = Scaling(torch.tensor(0.0), torch.tensor(16.0), quantum=1 / 16)
    model = VAE.build(shape, latent_dim=2, width=2, scaling=scaling, mean_bounds=(0.0, 1.0)).eval()
    model.requires_grad_(False)
    model.predict_variance(torch.tensor(0.3), torch.tensor(1e-3))
    nn.init.normal_(model.noise.network.output.bias)
    raw = levels.to(torch.uint8)
    shared, predicted = digital_log_probabilities(
        model, pass_over(model, raw), torch.Generator().manual_seed(1)
    )

    (terms,) = pass_over(model, raw).terms(model, torch.Generator().manual_seed(1))
    mean = (levels / 16 - terms.residual).double().numpy() * 16
    for found, var in ((shared, torch.tensor(0.3)), (predicted, terms.log_var.exp())):
        std = 16 * var.double().sqrt().expand(levels.shape).numpy()
        below = scipy.stats.norm.cdf((levels.numpy() - 0.5 - mean) / std)
        above = scipy.stats.norm.cdf((levels.numpy() + 0.5 - mean) / std)
        cell = np.where(levels == 16, 1, above) - np.where(levels == 0, 0, below)
        expected = np.log(cell).reshape(70, -1).sum(1)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-3)


class Spoil(Stop):
    """Makes the predicted variance absurd at the beginning of the last epoch."""

    trainer = None

    def epoch(self, row):
        if row["epoch"] == self.epoch_to_stop:
            noise = self.trainer.model.noise
            assert noise.depends_on_code
            nn.init.normal_(noise.network.output.bias, std=3)
            self.trainer.config = replace(self.trainer.config, stage_2_learning_rate=1e-12)


def test_a_prediction_of_levels_that_is_worse_than_stage_1_is_refused():
    data = equipoise.load_data("digits")
    config = TrainConfig(latent_dim=4, width=4, stage_1_epochs=3, stage_2_epochs=2, batch_size=256)
    config = replace(config, stage_2_learning_rate=1e-12, recalibrate="none", accelerator="cpu")
    spoil, said = Spoil(4), []
    spoil.message = said.append
    torch.manual_seed(0)
    trainer = Trainer(make_model(data, config), data, config, sinks=[spoil])
    assert trainer.stage_two.likelihood == "digital"
    spoil.trainer = trainer
    trainer.fit()

    assert not trainer.model.noise.depends_on_code
    assert any("stage 2 is refused" in text for text in said)
    var = float(trainer.model.noise.shared_log_var.exp())
    assert var == pytest.approx(float(trainer.optimal_var))


@pytest.mark.parametrize("noise", ["global", "dimension"])
def test_a_stage_2_that_is_worse_than_stage_1_is_refused(noise):
    data = small_table()
    config = replace(SMALL, noise=noise, stage_1_epochs=30, stage_2_epochs=2, floor=1e-4)
    config = replace(config, stage_2_learning_rate=1e-12)
    spoil, said = Spoil(31), []
    spoil.message = said.append
    torch.manual_seed(0)
    trainer = Trainer(make_model(data, config), data, config, sinks=[spoil])
    spoil.trainer = trainer
    rows = trainer.fit()

    assert not trainer.model.noise.depends_on_code
    assert any("stage 2 is refused" in text for text in said)
    assert not any("predicted std lie" in text for text in said)  # there is none any more
    figures = trainer.figures(trainer.validation)
    assert figures.standardised_var.value == pytest.approx(1.0, rel=0.3)
    assert figures.elbo > rows[-1]["validation_elbo"]


def test_a_good_stage_2_stays():
    data = equipoise.load_data("digits")
    config = replace(SMALL, width=16, stage_1_epochs=4, stage_2_epochs=2, floor=0.01)
    trainer, _ = trained(data, config)
    assert trainer.model.noise.depends_on_code
