"""Missing values: NaN in tables is unobserved, in densities, statistics, scores and imputations."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import equipoise
from equipoise import gaussian, objectives, residuals
from equipoise.aggregate import GaussianMixture
from equipoise.correlation import CorrelatedGaussian, FullCorrelation, LowRankCorrelation
from equipoise.data import load
from equipoise.data.arrays import table_unit
from equipoise.data.dataset import Subset
from equipoise.data.varying import counted_columns, varying_dimensions
from equipoise.explorer.views import View
from equipoise.gaps import n_observed, observed_difference
from equipoise.gaussian import Gaussian
from equipoise.imputation import impute
from equipoise.metrics.outliers import model_scores
from equipoise.model import VAE
from equipoise.noise import DimensionNoise, FixedNoise
from equipoise.noise_fit import fit_correlation
from equipoise.objectives import Elbo, importance_weighted_bound
from equipoise.residuals import ResidualCovariance, ResidualVariance, StandardisedVariance
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

NAN = float("nan")
D, LATENT, VAR = 5, 2, 0.3
LOADINGS = torch.randn(D, LATENT, generator=torch.Generator().manual_seed(3))
COVARIANCE = LOADINGS @ LOADINGS.T + VAR * torch.eye(D)


def with_gaps(n=64, share=0.3, seed=0):
    """Rows of the linear-Gaussian model, and the same with gaps; one row has no value."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, LATENT, generator=generator)
    x = z @ LOADINGS.T + VAR**0.5 * torch.randn(n, D, generator=generator)
    gaps = torch.rand(n, D, generator=generator) < share
    gaps[0], gaps[1] = True, False
    return x, x.masked_fill(gaps, NAN)


def linear_gaussian(noise=None):
    """Decode by known loadings; the encoder knows nothing."""
    decoder = nn.Linear(LATENT, D)
    with torch.no_grad():
        decoder.weight.copy_(LOADINGS)
        decoder.bias.zero_()
    encoder = nn.Linear(D, 2 * LATENT)
    nn.init.zeros_(encoder.weight)
    nn.init.zeros_(encoder.bias)
    noise = noise or FixedNoise(VAR)
    return VAE(encoder, decoder, noise, shape=(D,), latent_dim=LATENT).eval()


def standard_mixture():
    return GaussianMixture(torch.ones(1), torch.zeros(1, LATENT), torch.eye(LATENT)[None])


class TestDensities:
    @pytest.mark.parametrize("shape", [(), (D,), (64, D)])
    def test_a_gaussian_sums_over_what_is_observed(self, shape):
        x, holed = with_gaps()
        log_var = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found = Gaussian(0.1 * x, log_var).log_prob(holed)

        for row in range(len(x)):
            seen = ~holed[row].isnan()
            log_vars = log_var.expand(64, D)[row : row + 1, seen]
            values = x[row : row + 1, seen]
            expected = Gaussian(0.1 * values, log_vars).log_prob(values)
            torch.testing.assert_close(found[row : row + 1], expected)
        assert found[0] == 0

    @pytest.mark.parametrize("shape", [(), (D,), (64, D)])
    def test_gaps_of_others_change_no_bit_of_a_complete_row(self, shape):
        x, holed = with_gaps()
        density = Gaussian(0.1 * x, torch.full(shape, -0.7))
        complete = ~holed.isnan().any(1)
        assert complete.any()
        assert torch.equal(density.log_prob(holed)[complete], density.log_prob(x)[complete])

    def test_gradients_of_gaps_are_zero(self):
        _, holed = with_gaps()
        mean = torch.zeros(64, D, requires_grad=True)
        log_var = torch.zeros(64, D, requires_grad=True)
        Gaussian(mean, log_var).log_prob(holed).sum().backward()
        missing = holed.isnan()
        assert not mean.grad[missing].any()
        assert not log_var.grad[missing].any()
        assert torch.equal(mean.grad[~missing], holed[~missing])

    @pytest.mark.parametrize("form", ["full", "low-rank"])
    def test_a_correlated_gaussian_is_the_marginal_and_the_conditional(self, form):
        x, holed = (part.double() for part in with_gaps())
        covariance = LOADINGS.double() @ LOADINGS.double().T + VAR * torch.eye(D).double()
        if form == "full":
            var, axes = torch.linalg.eigh(covariance)
            correlation = FullCorrelation((D,), axes, var.log())
        else:
            correlation = LowRankCorrelation.of(
                (D,), LOADINGS.double(), torch.full((D,), VAR, dtype=torch.float64)
            )
        torch.testing.assert_close(correlation.covariance, covariance)

        std = torch.linspace(0.5, 2, D).double()
        density = CorrelatedGaussian(0.1 * x, 2 * std.log(), correlation)
        joint = std[:, None] * covariance * std
        log_prob, distance = density.log_prob(holed), density.squared_distance(holed)
        mean, var = density.given(holed)

        for row in range(len(x)):
            seen = ~holed[row].isnan()
            residual, block = (0.9 * x[row])[seen], joint[seen][:, seen]
            if seen.any():
                marginal = MultivariateNormal(torch.zeros(len(block)).double(), block)
                torch.testing.assert_close(log_prob[row], marginal.log_prob(residual))
                expected = residual @ torch.linalg.solve(block, residual)
                torch.testing.assert_close(distance[row], expected)

            gain = torch.linalg.solve(block, joint[seen]).T
            expected = torch.where(seen, x[row], 0.1 * x[row] + gain @ residual)
            torch.testing.assert_close(mean[row], expected)
            left = (joint - gain @ joint[seen]).diagonal()
            torch.testing.assert_close(var[row], left.masked_fill(seen, 0.0), atol=1e-9, rtol=1e-6)

    def test_draws_have_the_conditional_moments(self):
        var, axes = torch.linalg.eigh(COVARIANCE)
        correlation = FullCorrelation((D,), axes, var.log())
        row = torch.tensor([0.4, NAN, -1.0, NAN, 0.2]).expand(40_000, D)
        density = CorrelatedGaussian(torch.zeros(40_000, D), torch.zeros(()), correlation)
        draws = density.sample_given(row, torch.Generator().manual_seed(0))
        mean, expected_var = density.given(row[:1])
        assert torch.equal(draws[:, 0], row[:, 0])
        torch.testing.assert_close(draws.mean(0), mean[0], atol=0.03, rtol=0)
        torch.testing.assert_close(draws.var(0), expected_var[0], atol=0.03, rtol=0.03)


class TestStatistics:
    def test_eq_10_counts_observed_entries_only(self):
        _, holed = with_gaps(200)
        values = holed.double().numpy()
        one, each = ResidualVariance(), ResidualVariance((D,), has_gaps=True)
        for batch in holed.split(17):
            one.update(batch)
            each.update(batch)
        assert float(one.var) == pytest.approx(np.nanmean(values**2))
        np.testing.assert_allclose(each.var, np.nanmean(values**2, 0), rtol=1e-6)

    def test_a_running_estimate_per_dimension_is_near_it(self):
        _, holed = with_gaps(4000)
        running = ResidualVariance((D,))
        for batch in holed.split(50):
            running.update(batch)
        expected = np.nanmean(holed.numpy() ** 2, 0)
        np.testing.assert_allclose(running.var, expected, rtol=0.03)

    def test_a_dimension_that_a_batch_does_not_have_stays_as_it_is(self):
        running = ResidualVariance((2,))
        running.update(torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
        running.update(torch.tensor([[NAN, 1.0], [NAN, 1.0]]))
        assert running.var.tolist() == [4.0, 1.0]

    def test_a_covariance_is_over_pairs_and_positive_definite(self):
        _, holed = with_gaps(20_000)
        statistic = ResidualCovariance(D, has_gaps=True)
        for batch in holed.split(3000):
            statistic.update(batch)
        torch.testing.assert_close(statistic.covariance.float(), COVARIANCE, atol=0.1, rtol=0.05)

        few = ResidualCovariance(D, has_gaps=True)
        few.update(holed[2:6])
        assert bool((torch.linalg.eigvalsh(few.covariance) > 0).all())

    def test_a_row_counts_by_its_observed_values(self):
        statistic = StandardisedVariance()
        statistic.update(torch.tensor([[2.0, NAN], [NAN, NAN], [0.0, 2.0]]), torch.zeros(()))
        assert statistic.estimate().value == 3.0
        assert statistic.estimate().n == 2

    def test_numbers_and_differences(self):
        x = torch.tensor([[1.0, NAN], [NAN, NAN], [1.0, 2.0]])
        assert n_observed(x).tolist() == [1, 0, 2]
        assert observed_difference(x, torch.ones(3, 2)).tolist() == [[0, 0], [0, 0], [0, 1]]


class TestData:
    def test_units_are_those_of_observed_values(self):
        _, holed = (part.numpy() for part in with_gaps(500))
        unit = table_unit(Subset.whole(holed))
        np.testing.assert_allclose(unit.offset, np.nanmean(holed, 0), atol=1e-6)
        np.testing.assert_allclose(unit.scale, np.nanstd(holed, 0), rtol=1e-5)

    def test_a_note_says_how_much_is_missing(self):
        _, holed = with_gaps(100)
        data = load(holed)
        assert data.has_gaps
        assert "of the values are missing, in 5 of 5 columns" in data.notes[0]
        assert not load(with_gaps(100)[0]).has_gaps

    def test_a_column_without_a_value_is_refused(self):
        _, holed = with_gaps(100)
        holed[:, 3] = NAN
        with pytest.raises(ValueError, match="columns 3 have no value"):
            load(holed)

    def test_images_with_nan_are_refused(self):
        with pytest.raises(ValueError, match="NaN"):
            load(np.full((20, 8, 8), np.nan))

    def test_columns_that_vary(self):
        x = torch.tensor([[1.0, NAN, NAN], [1.0, 2.0, 5.0], [NAN, 3.0, NAN], [1.0, 9.0, 5.0]])
        assert varying_dimensions(x).tolist() == [False, True, False]
        assert counted_columns(Subset.whole(x.numpy())).tolist() == [False, True, False]


class TestBounds:
    def test_a_column_that_is_missing_is_a_model_without_its_likelihood(self):
        x, _ = with_gaps()
        holed = x.clone()
        holed[:, 2] = NAN
        kept = [0, 1, 3, 4]

        log_var = torch.linspace(-1, 0.5, D)
        noise, smaller_noise = DimensionNoise((D,)), DimensionNoise((D - 1,))
        noise.set_var(log_var.exp())
        smaller_noise.set_var(log_var[kept].exp())
        model, smaller = linear_gaussian(noise), nn.Linear(LATENT, D - 1)
        with torch.no_grad():
            smaller.weight.copy_(LOADINGS[kept])
            smaller.bias.zero_()
        encoder = nn.Linear(D - 1, 2 * LATENT)
        nn.init.zeros_(encoder.weight)
        nn.init.zeros_(encoder.bias)
        without = VAE(encoder, smaller, smaller_noise, shape=(D - 1,), latent_dim=LATENT).eval()

        for bound in (
            lambda m, x: Elbo(m)(x, torch.Generator().manual_seed(0)).elbo,
            lambda m, x: importance_weighted_bound(m, x, 10, torch.Generator().manual_seed(0)),
        ):
            found, expected = bound(model, holed), bound(without, x[:, kept])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)

    def test_the_bound_of_a_row_with_gaps_reaches_its_density(self):
        x, holed = with_gaps()
        bounds = importance_weighted_bound(
            linear_gaussian(), holed, 20_000, torch.Generator().manual_seed(0)
        )
        for row in range(10):
            seen = ~holed[row].isnan()
            expected = torch.zeros(())
            if seen.any():
                covariance = COVARIANCE[seen][:, seen]
                expected = MultivariateNormal(torch.zeros(len(covariance)), covariance).log_prob(
                    x[row, seen]
                )
            assert float(bounds[row]) == pytest.approx(float(expected), abs=0.15)

    def test_scores_of_odd_rows_know_gaps(self):
        _, holed = with_gaps()
        scores = model_scores(linear_gaussian(), standard_mixture(), [holed])
        assert all(np.isfinite(part).all() for part in scores)
        assert scores.standardised_residual[0] == 1.0
        assert scores.negative_elbo[0] >= 0


class TestImputation:
    def test_moments_are_those_of_the_linear_gaussian_model(self):
        _, holed = with_gaps(12)
        found = impute(linear_gaussian(), standard_mixture(), holed, n_samples=8000)

        for row in range(len(holed)):
            seen = ~holed[row].isnan()
            gain = torch.linalg.solve(COVARIANCE[seen][:, seen], COVARIANCE[seen]).T
            expected = torch.where(seen, holed[row], gain @ holed[row, seen])
            var = (COVARIANCE - gain @ COVARIANCE[seen]).diagonal().masked_fill(seen, 0.0)
            torch.testing.assert_close(found.mean[row], expected, atol=0.08, rtol=0.05)
            torch.testing.assert_close(
                found.std[row], var.clamp_min(0).sqrt(), atol=0.08, rtol=0.05
            )

    def test_draws_have_these_moments_and_what_is_observed(self):
        _, holed = with_gaps(6)
        found = impute(linear_gaussian(), standard_mixture(), holed, n_samples=500, n_draws=400)
        missing = holed.isnan()
        assert torch.equal(found.draws[7][~missing], holed[~missing])
        error = found.std / 400**0.5
        assert bool(((found.draws.mean(0) - found.mean).abs() <= 5 * error + 1e-6).all())
        torch.testing.assert_close(found.draws.std(0), found.std, atol=0.05, rtol=0.2)

    def test_a_row_does_not_depend_on_the_others(self):
        _, holed = with_gaps(30)
        model, mixture = linear_gaussian(), standard_mixture()
        together = impute(model, mixture, holed, n_draws=2)
        alone = impute(model, mixture, holed[[0, 9]], n_draws=2)
        torch.testing.assert_close(alone.mean, together.mean[[0, 9]])
        torch.testing.assert_close(alone.draws, together.draws[:, [0, 9]])
        assert torch.equal(impute(model, mixture, holed[1:2]).mean, holed[1:2])

    def test_images_and_other_widths_are_refused(self):
        with pytest.raises(ValueError, match="missing values are imputed in rows"):
            impute(linear_gaussian(), standard_mixture(), torch.zeros(3, D + 1))
        with pytest.raises(ValueError, match="n_samples must be at least 2"):
            impute(linear_gaussian(), standard_mixture(), torch.zeros(3, D), n_samples=1)


@pytest.fixture(scope="module")
def fitted():
    """An imputer of 400 rows of which three tenths are missing, and the rows."""
    x, holed = (part.numpy() for part in with_gaps(400))
    estimator = equipoise.VAEEstimator(
        latent_dim=LATENT, noise="dimension", stage_1_epochs=150, stage_2_epochs=0, random_state=0
    )
    return equipoise.VAEImputer(estimator, random_state=0).fit(holed), x, holed


class TestTraining:
    def test_an_imputer_is_near_the_best_possible_one(self, fitted):
        imputer, x, holed = fitted
        filled, std = imputer.transform(holed, return_std=True)
        missing = np.isnan(holed)
        assert np.array_equal(filled[~missing], holed[~missing])
        assert not std[~missing].any()

        best = np.array(holed, np.float64)
        for row, seen in zip(best, ~missing, strict=True):
            block, cross = COVARIANCE.numpy()[np.ix_(seen, seen)], COVARIANCE.numpy()[:, seen]
            row[~seen] = (cross @ np.linalg.solve(block, row[seen]))[~seen]
        errors = {
            name: np.sqrt(np.square(table - x)[missing].mean())
            for name, table in (("ours", filled), ("best", best), ("mean", np.zeros_like(x)))
        }
        assert errors["ours"] < 1.1 * errors["best"] < errors["mean"]

        z = ((filled - x) / np.where(missing, std, 1.0))[missing]
        assert 0.6 < (np.abs(z) < 1).mean() < 0.76
        assert 0.91 < (np.abs(z) < 1.96).mean() < 0.98

    def test_draws_are_reproducible_and_differ(self, fitted):
        imputer, _, holed = fitted
        draws = imputer.sample(holed[:20], 3)
        assert draws.shape == (3, 20, D)
        assert not np.isnan(draws).any()
        assert np.array_equal(draws, imputer.sample(holed[:20], 3))
        assert (draws[0] != draws[1])[np.isnan(holed[:20])].all()

    def test_scores_of_other_rows_stay(self, fitted):
        imputer, x, holed = fitted
        estimator = imputer.estimator_
        mixed = x[:40].copy()
        mixed[::2] = holed[:40:2]
        scores = estimator.score_samples(mixed)
        assert np.isfinite(scores).all()
        np.testing.assert_allclose(scores[1::2], estimator.score_samples(x[1:40:2]), atol=1e-3)
        # A row without any value has the density of nothing, 1.
        assert -0.3 < scores[0] < 0.1

    def test_a_saved_estimator_still_reads_gaps(self, fitted, tmp_path):
        imputer, _, holed = fitted
        estimator = imputer.estimator_
        estimator.save(tmp_path / "table.safetensors")
        again = equipoise.VAEEstimator.load(tmp_path / "table.safetensors")
        assert again.model_.reads_gaps
        assert np.array_equal(again.score_samples(holed), estimator.score_samples(holed))

    def test_the_explorer_shows_rows_without_gaps(self, fitted):
        imputer, _, holed = fitted
        estimator = imputer.estimator_
        view = View(estimator.model_, estimator.mixture_, load(holed))
        for index in range(5):
            raw = view.example(index)
            assert not np.isnan(raw).any()
            assert np.isfinite(view.inspect(raw).elbo)

    def test_gaps_at_test_time_only(self):
        x, holed = (part.numpy() for part in with_gaps(200))
        estimator = equipoise.VAEEstimator(
            latent_dim=2, stage_1_epochs=30, stage_2_epochs=2, random_state=0
        ).fit(x)
        assert not estimator.model_.reads_gaps
        assert np.isfinite(estimator.score_samples(holed)).all()
        assert np.isfinite(estimator.reconstruct(holed).mean).all()
        found = impute(estimator.model_, estimator.mixture_, torch.from_numpy(holed))
        missing = np.isnan(holed)
        error = np.sqrt(np.square(found.mean.numpy() - x)[missing].mean())
        assert error < 0.8 * np.sqrt(np.square(x)[missing].mean())

    @pytest.mark.parametrize("noise", ["global", "dimension"])
    def test_a_mask_of_no_gaps_changes_no_bit(self, monkeypatch, noise):
        """Recordings of CUDA graphs always have a mask, because they cannot ask for gaps."""
        data = load(with_gaps(100)[0].numpy())
        config = equipoise.TrainConfig(
            latent_dim=2, stage_1_epochs=2, stage_2_epochs=2, batch_size=32, noise=noise
        )
        results = []
        for is_masked in (False, True):
            if is_masked:
                for module in (gaussian, objectives, residuals):
                    monkeypatch.setattr(module, "missing_values", torch.isnan)
            torch.manual_seed(0)
            trainer = Trainer(make_model(data, config), data, config)
            (*_, row) = trainer.fit()
            results.append((row["train_elbo"], row["train_mse"], row["train_noise_var"]))
        assert results[0] == results[1]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    @pytest.mark.parametrize("has_gaps", [False, True])
    def test_a_gpu_replays_steps_of_tables(self, has_gaps):
        data = load(with_gaps(400)[has_gaps].numpy())
        rows = {}
        for is_recorded in (False, True):
            config = equipoise.TrainConfig(
                latent_dim=2,
                stage_1_epochs=4,
                stage_2_epochs=2,
                batch_size=32,
                accelerator="cuda",
                cuda_graphs=is_recorded,
            )
            torch.manual_seed(0)
            trainer = Trainer(make_model(data, config), data, config)
            rows[is_recorded] = trainer.fit()[-1]
            assert (trainer.graph is None) or trainer.graph.is_possible
        assert rows[True]["train_elbo"] == pytest.approx(rows[False]["train_elbo"], rel=1e-4)

    @pytest.mark.parametrize(
        "options",
        [
            {"objective": "sigma-vae"},
            {"objective": "wae-mmd"},
            {"noise": "dimension", "recalibrate": "dimension", "stage_2_epochs": 2},
            {"stage_2_gradients": "frozen", "recalibrate": "monotone", "stage_2_epochs": 2},
            {"noise_update": "gradient", "recalibrate": "coverage", "stage_2_epochs": 2},
        ],
        ids=str,
    )
    def test_every_part_of_training_knows_gaps(self, options):
        _, holed = with_gaps(150)
        holed[:, 4] = torch.where(holed[:, 4].isnan(), NAN, 7.0)
        data = load(holed)
        config = equipoise.make_config(
            {"latent_dim": 2, "stage_1_epochs": 2, "stage_2_epochs": 0, "batch_size": 32, **options}
        )
        trainer = Trainer(make_model(data, config), data, config)
        history = trainer.fit()
        assert all(np.isfinite(row["validation_elbo"]) for row in history)
        assert 0 < history[-1]["validation_mse"] < 5
        fit = fit_correlation(trainer.model.eval(), data, "full")
        assert all(np.isfinite(score.value) for score in fit.scores.values())
