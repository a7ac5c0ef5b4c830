"""Categories: probabilities beside densities, from files and frames to scores and imputed rows."""

import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from equipoise import VAEEstimator, VAEImputer
from equipoise.categories import Categories, MixedLikelihood
from equipoise.config import ConfigError, TrainConfig
from equipoise.correlation import FullCorrelation, LowRankCorrelation, embedded
from equipoise.data import load, load_examples
from equipoise.data.levels import encode, encode_frame
from equipoise.gaussian import Gaussian, RowGenerators, standard_normal_log_prob
from equipoise.held_out import log_densities
from equipoise.imputation import impute
from equipoise.levels import level_codes, level_values, sorted_levels
from equipoise.metrics.explanation import explain
from equipoise.metrics.rows import worst_columns
from equipoise.mixture_fit import fit_mixture
from equipoise.model import VAE, Scaling, encode_all
from equipoise.objectives import DetachedVarianceElbo, Elbo, FrozenMeanElbo
from equipoise.run import Run
from equipoise.store import load_model, save_model
from equipoise.training.job import train
from equipoise.training.setup import check_fit, make_model
from equipoise.training.trainer import Trainer

FAST = {"stage_2_epochs": 0, "batch_size": 64, "n_components": 4}


def mixed_likelihood(levels, width, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    categories = Categories(levels, width)
    mean = torch.randn(n, width, generator=generator)
    logits = torch.randn(n, categories.n_logits, generator=generator)
    return MixedLikelihood(Gaussian(mean, torch.tensor(-0.5)), logits, categories)


def model_of(levels, width, *, reads_gaps=False, **options):
    torch.manual_seed(0)
    scaling = Scaling(torch.zeros(width), torch.ones(width), None, (), levels)
    return VAE.build(
        (width,), latent_dim=2, width=4, scaling=scaling, reads_gaps=reads_gaps, **options
    ).eval()


class TestLevels:
    def test_levels_do_not_depend_on_the_order_of_rows(self):
        values = ["b", "a", None, "c", "a"]
        assert sorted_levels(values) == sorted_levels(values[::-1]) == ("a", "b", "c")
        assert sorted_levels([True, False, True]) == (False, True)
        assert sorted_levels([10.0, 9.0, 2.5]) == (2.5, 9, 10)

    @pytest.mark.parametrize(
        ("values", "levels", "codes"),
        [
            (["1", "2"], (1, 2), [0, 1]),
            ([1, 2.0], ("1", "2"), [0, 1]),
            (["true", "False", 1, 0], (False, True), [1, 0, 1, 0]),
            (["x", None], ("a", "x"), [1, None]),
            (["X"], ("x",), [None]),
        ],
    )
    def test_levels_are_found_in_any_dress(self, values, levels, codes):
        assert level_codes(values, levels) == codes

    def test_codes_come_back_as_levels(self):
        levels = ("a", "b", "c")
        values = ["c", None, "a"]
        assert level_values(encode("kind", values, levels).codes.tolist(), levels) == values


class TestLikelihood:
    @pytest.mark.parametrize(
        "levels", [{1: "abc"}, {0: "ab", 2: "a"}, {0: "ab", 1: "abcd", 2: "abc"}]
    )
    def test_probabilities_sum_to_one_and_log_prob_is_their_sum(self, levels):
        levels = {i: tuple(names) for i, names in levels.items()}
        likelihood = mixed_likelihood(levels, 3)
        for part in likelihood.log_probs.exp().split(likelihood.categories.sizes, 1):
            torch.testing.assert_close(part.sum(1), torch.ones(5))

        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
        for column, names in levels.items():
            x[:, column] = torch.arange(5) % len(names)
        expected = torch.zeros(5)
        start = 0
        for column in range(3):
            if column in levels:
                size = len(levels[column])
                logits = likelihood.logits[:, start : start + size]
                start += size
                density = torch.distributions.Categorical(logits=logits)
            else:
                mean = likelihood.numeric.mean[:, column]
                density = torch.distributions.Normal(mean, math.exp(-0.25))
            expected += density.log_prob(x[:, column])
        torch.testing.assert_close(likelihood.log_prob(x), expected)

        # A missing value leaves its own term out.
        x[:, 1] = torch.nan
        assert bool((likelihood.log_prob(x) != expected).all())
        gone = torch.full_like(x, torch.nan)
        torch.testing.assert_close(likelihood.log_prob(gone), torch.zeros(5))

    def test_draws_have_the_probabilities(self):
        likelihood = mixed_likelihood({1: ("a", "b", "c")}, 2, n=1)
        many = likelihood._replace(
            numeric=Gaussian(likelihood.numeric.mean.expand(20_000, 2), torch.tensor(-0.5)),
            logits=likelihood.logits.expand(20_000, 3),
        )
        draws = many.sample(torch.Generator().manual_seed(0))[:, 1]
        shares = torch.bincount(draws.long(), minlength=3) / len(draws)
        torch.testing.assert_close(shares, likelihood.log_probs.exp()[0], atol=0.015, rtol=0)

    def test_draws_given_what_is_observed_keep_it(self):
        likelihood = mixed_likelihood({1: ("a", "b")}, 3)
        x = torch.tensor([[0.5, 1.0, torch.nan], [torch.nan, torch.nan, 2.0]]).repeat(3, 1)[:5]
        draws = likelihood.sample_given(x, RowGenerators.of(x))
        seen = ~x.isnan()
        assert torch.equal(draws[seen], x[seen])
        assert set(draws[:, 1].tolist()) <= {0.0, 1.0}

    def test_mean_and_residual_are_of_numbers_alone(self):
        likelihood = mixed_likelihood({1: ("a", "b")}, 2)
        assert bool(likelihood.mean[:, 1].isnan().all())
        assert bool(likelihood.std[:, 1].isnan().all())
        assert set(likelihood.mode[:, 1].tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(likelihood.mode[:, 0], likelihood.numeric.mean[:, 0])

    @pytest.mark.parametrize("kind", ["full", "low-rank"])
    def test_correlation_of_the_numbers_is_kept_beside_categories(self, kind):
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        if kind == "full":
            var, axes = torch.linalg.eigh(root @ root.mT + torch.eye(3))
            correlation = FullCorrelation((3,), axes, var.log())
        else:
            correlation = LowRankCorrelation.of((3,), root[:, :1], torch.ones(3).double())
        is_numeric = torch.tensor([True, False, True, False, True])
        wide = embedded(correlation, is_numeric)

        u = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        padded = torch.full((4, 5), torch.nan).double()
        padded[:, is_numeric] = u
        for found, expected in zip(
            wide.squared_norm_and_log_det(padded),
            correlation.squared_norm_and_log_det(u),
            strict=True,
        ):
            torch.testing.assert_close(found, expected.expand_as(found))


class TestModel:
    def test_the_encoder_reads_one_hot_vectors_and_zeros_where_missing(self):
        categories = Categories({0: ("a", "b", "c")}, 2)
        x = torch.tensor([[2.0, 0.5], [torch.nan, 0.5]])
        assert categories.one_hot(x).tolist() == [[0, 0, 1], [0, 0, 0]]

    @pytest.mark.parametrize("objective", [Elbo, DetachedVarianceElbo, FrozenMeanElbo])
    def test_the_bound_is_of_the_joint_density_in_both_stages(self, objective):
        model = model_of({1: ("a", "b", "c")}, 3)
        if objective is not Elbo:
            model.predict_variance(torch.tensor(0.5), torch.tensor(0.1))
        x = torch.tensor([[0.1, 2.0, -0.3], [0.4, 0.0, 1.0]])
        terms = objective(model)(x, torch.Generator().manual_seed(0))
        z = model.encode(x).sample(torch.Generator().manual_seed(0))
        likelihood = model.decode(z)
        torch.testing.assert_close(terms.log_likelihood, likelihood.log_prob(x))
        torch.testing.assert_close(terms.log_probability, likelihood.log_probability(x))
        assert bool(terms.residual[:, 1].isnan().all())
        assert bool(terms.residual[:, [0, 2]].isfinite().all())

    def test_the_order_of_levels_and_columns_changes_nothing(self):
        """Networks whose weights are permuted with the levels give the same scores."""
        model = model_of({0: ("a", "b", "c")}, 2)
        other = model_of({1: ("c", "a", "b")}, 2)
        new_of_old = [1, 2, 0]  # a, b, c in the other's order

        state = {name: value.clone() for name, value in model.state_dict().items()}
        read = state["encoder.hidden.1.weight"]
        numbers, levels = read[:, :2].flip(1), read[:, 2:].clone()
        levels[:, new_of_old] = read[:, 2:]
        state["encoder.hidden.1.weight"] = torch.cat([numbers, levels], 1)
        for name in ("decoder.output.weight", "decoder.output.bias"):
            rows = state[name]
            logits = rows[2:].clone()
            logits[new_of_old] = rows[2:]
            state[name] = torch.cat([rows[:2].flip(0), logits])
        other.load_state_dict(state)

        code = torch.tensor([0, 1, 2, 1])
        x = torch.stack([code.float(), torch.tensor([0.1, -2.0, 0.3, torch.nan])], 1)
        same = torch.stack([x[:, 1], torch.tensor(new_of_old)[code].float()], 1)
        torch.testing.assert_close(
            model.reconstruct(x).log_prob(x), other.reconstruct(same).log_prob(same)
        )

    def test_the_score_of_a_row_does_not_depend_on_the_others(self):
        model = model_of({1: ("a", "b", "c")}, 3, reads_gaps=True)
        x = torch.tensor([[0.1, 2.0, 0.3], [torch.nan, torch.nan, 1.0], [0.0, 0.0, torch.nan]])
        together = log_densities(model, x, standard_normal_log_prob)
        for row, score in enumerate(together):
            alone = log_densities(model, x[row : row + 1], standard_normal_log_prob)
            np.testing.assert_allclose(alone, score, rtol=1e-6)

    def test_a_category_is_named_by_its_nats(self):
        model = model_of({0: ("a", "b")}, 2)
        with torch.no_grad():
            model.decoder.output.weight.zero_()
            model.decoder.output.bias.copy_(torch.tensor([0.0, 0.0, 5.0, -5.0]))
        rows = torch.tensor([[1.0, 0.1], [0.0, 0.1], [torch.nan, 3.0]])
        rare, usual, missing = worst_columns(model, rows)
        assert rare.startswith("column 0 10.0 nats")
        assert usual.startswith("column 1")
        assert missing == "column 1 +3.0"

    @pytest.mark.parametrize(
        "levels", [{1: ("a", "b")}, {0: (False, True), 2: (1, 2, 10)}, {0: ("x",)}]
    )
    def test_save_and_load(self, tmp_path, levels):
        model = model_of(levels, 3)
        save_model(tmp_path / "m.safetensors", model)
        again = load_model(tmp_path / "m.safetensors")
        assert again.scaling.levels == levels
        for names, found in zip(levels.values(), again.scaling.levels.values(), strict=True):
            assert list(map(type, names)) == list(map(type, found))
        x = torch.zeros(2, 3)
        assert torch.equal(model.reconstruct(x).log_prob(x), again.reconstruct(x).log_prob(x))

    def test_objectives_of_squared_errors_are_refused(self):
        data = load(np.tile([[0.0, 1.0], [1.0, 2.0], [0.0, 3.0]], (20, 1)), levels={0: ("a", "b")})
        config = TrainConfig(objective="wae-mmd")
        with pytest.raises(ConfigError, match="squared errors alone"):
            check_fit(data, config)
        network = torch.nn.Linear(2, 2)
        with pytest.raises(ConfigError, match="networks of your own read no categories"):
            make_model(data, TrainConfig(), network, network)


def rows_with_dependence(n=1500, seed=0):
    """A category with known shares, and a flag and a number that depend on it."""
    generator = np.random.default_rng(seed)
    kind = generator.choice(3, n, p=[0.5, 0.3, 0.2])
    flag = generator.random(n) < np.array([0.9, 0.5, 0.1])[kind]
    x = np.array([0.0, 4.0, -4.0])[kind] + generator.normal(size=n)
    return kind, flag, x


class TestLearning:
    def test_a_planted_dependence_is_recovered(self):
        kind, flag, x = rows_with_dependence(800)
        data = load(np.stack([kind, flag, x], 1), levels={0: ("a", "b", "c"), 1: (False, True)})
        config = TrainConfig(stage_1_epochs=30, stage_2_epochs=0, batch_size=32)
        model, mixture = fitted(data, config)

        given = torch.full((4, 3), torch.nan)
        given[:3, 0] = torch.arange(3)
        found = impute(model, mixture, given, n_draws=400, seed=1)
        shares, means = found.draws[:, :3, 1].mean(0), found.mean[:3, 2]
        for row in range(3):
            assert float(shares[row]) == pytest.approx(flag[kind == row].mean(), abs=0.18)
            assert float(means[row]) == pytest.approx(x[kind == row].mean(), abs=0.7)
        assert found.mean[:3, 1].tolist()[::2] == [1.0, 0.0]
        assert bool(found.probability[:, 2].isnan().all())
        assert bool(found.std[:, :2].isnan().all())
        assert torch.equal(found.probability[:3, 0], torch.ones(3))

        # What is imputed is what the model says: sum over many codes of p(z).
        codes = mixture.sample(20_000, torch.Generator().manual_seed(0)).float()
        with torch.no_grad():
            of_kind, of_flag = model.decode(codes).log_probs.exp().split([3, 2], 1)
        joint = (of_kind[:, :, None] * of_flag[:, None]).mean(0)
        expected = (joint / joint.sum(1, keepdim=True)).max(1).values
        torch.testing.assert_close(found.probability[:3, 1], expected, atol=0.08, rtol=0)
        drawn = torch.bincount(found.draws[:, 3, 0].long(), minlength=3) / 400
        torch.testing.assert_close(drawn, joint.sum(1), atol=0.08, rtol=0)

    def test_log_p_of_independent_categories_is_minus_their_entropy(self):
        generator = np.random.default_rng(0)
        p = np.array([0.6, 0.3, 0.1])
        codes = generator.choice(3, (3000, 2), p=p).astype(float)
        data = load(codes, levels={0: ("a", "b", "c"), 1: ("u", "v", "w")})
        config = TrainConfig(stage_1_epochs=8, stage_2_epochs=0, batch_size=128)
        model, _ = fitted(data, config)

        scores = log_densities(model, torch.from_numpy(data.test[:]), standard_normal_log_prob)
        entropy = -2 * (p * np.log(p)).sum()
        error = scores.std() / math.sqrt(len(scores))
        assert abs(scores.mean() + entropy) < 3 * error + 0.02

    @pytest.mark.parametrize("n_levels", [1, 1000])
    def test_one_level_and_a_thousand(self, n_levels):
        names = [f"n{i:04}" for i in range(n_levels)]
        codes = np.arange(2000) % n_levels
        x = np.random.default_rng(0).normal(size=2000)
        data = load(np.stack([codes, x, -x], 1), levels={0: tuple(names)})
        model, mixture = fitted(data, TrainConfig(stage_1_epochs=1, stage_2_epochs=0))
        found = impute(model, mixture, torch.tensor([[torch.nan, 0.1, -0.1]]))
        assert 0 <= found.mean[0, 0] < n_levels
        assert 0 < found.probability[0, 0] <= 1
        if n_levels == 1:
            assert float(found.probability[0, 0]) == pytest.approx(1)


def fitted(data, config):
    """A model that was trained in memory, and its mixture."""
    torch.manual_seed(config.seed)
    model = make_model(data, config)
    Trainer(model, data, config).fit()
    model.eval()
    codes = encode_all(model, [torch.from_numpy(data.train[:])]).sample()
    return model, fit_mixture(codes, 4).mixture


def write_people(path, n=200, seed=0):
    kind, flag, x = rows_with_dependence(n, seed)
    lines = ["kind,flag,x,code"]
    for i in range(n):
        cells = [["red", "green", "blue"][kind[i]], str(bool(flag[i])).lower(), f"{x[i]:.3f}"]
        cells.append(str(10 * kind[i]))
        if i % 7 == 0:
            cells[i // 7 % 3] = ""
        lines.append(",".join(cells))
    path.write_text("\n".join(lines) + "\n")
    return path


class TestFiles:
    @pytest.fixture(autouse=True)
    def _needs_polars(self):
        pytest.importorskip("polars")

    def test_text_and_flags_are_categories_and_numbers_on_request(self, tmp_path):
        path = write_people(tmp_path / "people.csv")
        data = load(path)
        assert data.levels == {0: ("blue", "green", "red"), 1: (False, True)}
        assert any("'kind' (3 levels), 'flag' (2 levels)" in note for note in data.notes)
        assert any("nats" in note for note in data.notes)
        assert data.offset[0] == 0
        assert data.scale[1] == 1
        assert set(np.unique(data.train[:][:, 0])) >= {0.0, 1.0, 2.0}

        more = load(path, categorical=["code"])
        assert more.levels[3] == (0, 10, 20)
        assert more.fingerprint != data.fingerprint
        with pytest.raises(ValueError, match=r"no column 'cod'.*did you mean 'code'"):
            load(path, categorical=["cod"])

    def test_as_before_where_no_column_is_to_be_one(self, tmp_path):
        path = write_people(tmp_path / "people.csv")
        with pytest.raises(ValueError, match="text in 'kind'"):
            load(path, categorical=False)
        flags = load(path, categorical=False, drop=["kind"])
        assert not flags.levels
        assert "categorical" not in load(path, categorical=False, drop=["kind"]).loading

    def test_renamed_levels_are_other_data(self, tmp_path):
        path = write_people(tmp_path / "a.csv")
        other = tmp_path / "b.csv"
        other.write_text(path.read_text().replace("blue", "aqua"))
        assert load(path).fingerprint != load(other).fingerprint

    def test_names_and_numbers_with_typing_errors_are_no_categories(self, tmp_path):
        (tmp_path / "a.csv").write_text(
            "who,x,y\n" + "".join(f"p{i},{i * i if i != 3 else 'o'},{i}\n" for i in range(40))
        )
        with pytest.raises(ValueError, match="like names") as caught:
            load(tmp_path / "a.csv")
        assert "'o' in row 3" in str(caught.value)
        assert "--categorical who x" in str(caught.value)
        assert len(load(tmp_path / "a.csv", categorical=["who"], drop=["x"]).levels[0]) == 40

    def test_unknown_levels_are_missing_and_named_or_refused(self, tmp_path):
        (tmp_path / "a.csv").write_text("kind,x\nred,1\nmauve,2\n,3\n")
        said = []
        arguments = {"columns": ("x", "kind"), "levels": {1: ("blue", "red")}}
        found = load_examples(tmp_path / "a.csv", (2,), on_note=said.append, **arguments)
        np.testing.assert_array_equal(found[:], [[1, 1], [2, np.nan], [3, np.nan]])
        (note,) = said
        assert "'kind'" in note
        assert "'mauve' in row 1" in note
        with pytest.raises(ValueError, match=r"'mauve' in row 1.*'blue', 'red'"):
            load_examples(tmp_path / "a.csv", (2,), strict=True, **arguments)

    def test_a_run_from_text_to_rows_of_the_same_form(self, tmp_path, capsys):
        import polars as pl

        from equipoise.cli import main

        path = write_people(tmp_path / "people.csv")
        run = str(tmp_path / "run")

        def command(*arguments):
            main([str(argument) for argument in arguments])
            return capsys.readouterr().out

        set_options = ["stage_1_epochs=3", "stage_2_epochs=1", "n_components=2"]
        said = command(
            "train", path, "--categorical", "code", "--out", run, "--quiet", "--set", *set_options
        )
        assert "'code' (3 levels)" in said

        before = pl.read_csv(path)
        command("impute", run, path, "--draws", "1", "--out", tmp_path / "i.csv")
        for name in ("i.csv", "i-1.csv"):
            after = pl.read_csv(tmp_path / name)
            assert after.schema == before.schema
            assert after.null_count().sum_horizontal()[0] == 0
            for column in before.columns:
                seen = before[column].is_not_null()
                assert before[column].filter(seen).equals(after[column].filter(seen))
                if column != "x":
                    assert set(after[column]) <= set(before[column].drop_nulls())
        probability = pl.read_csv(tmp_path / "i-std.csv")["probability of kind"]
        assert bool((probability <= 1).all())
        assert bool((probability.filter(before["kind"].is_not_null()) == 1).all())

        command("sample", run, "-n", "30", "--noise", "--out", tmp_path / "new.parquet")
        new = pl.read_parquet(tmp_path / "new.parquet")
        assert set(new["kind"]) <= {"red", "green", "blue"}
        assert new.schema["flag"] == pl.Boolean
        assert new.schema["code"] == pl.Int64
        assert load_examples(
            tmp_path / "new.parquet",
            (4,),
            columns=new.columns,
            levels=Run(run).model().scaling.levels,
        ).shape == (30, 4)

        command("reconstruct", run, path, "--out", tmp_path / "r.csv")
        assert set(pl.read_csv(tmp_path / "r.csv")["kind"]) <= {"red", "green", "blue"}
        command("reconstruct", run)
        command("score", run, path, "--out", tmp_path / "s.csv")
        assert "nats" in " ".join(pl.read_csv(tmp_path / "s.csv")["worst_columns"].drop_nulls())

        row = before.head(1).with_columns(kind=pl.lit("mauve"))
        row.write_csv(tmp_path / "odd.csv")
        assert "'mauve' in row 0" in command("impute", run, tmp_path / "odd.csv")
        with pytest.raises(SystemExit):
            command("score", run, tmp_path / "odd.csv", "--strict")
        assert "mauve" in capsys.readouterr().err

        assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["load"][
            "categorical"
        ] == ["code"]

    @pytest.mark.parametrize("drop", [[], pytest.param(["x"], marks=pytest.mark.slow)])
    def test_killed_and_resumed_is_the_same_run(self, tmp_path, drop):
        path = write_people(tmp_path / "people.csv")
        data = load(path, drop=[*drop, "code"])
        config = TrainConfig(stage_1_epochs=3, stage_2_epochs=1, n_components=2, batch_size=64)
        whole = train(data, config, tmp_path / "whole")

        code = (
            "import os, sys\n"
            "from equipoise.data import load\n"
            "from equipoise.config import TrainConfig\n"
            "from equipoise.training.job import train\n"
            "class Kill:\n"
            "    def __getattr__(self, name):\n"
            "        return lambda *a, **k: None\n"
            "    def epoch(self, row):\n"
            "        row['epoch'] < 3 or os._exit(9)\n"
            f"data = load({str(path)!r}, drop={[*drop, 'code']!r})\n"
            "config = TrainConfig(stage_1_epochs=3, stage_2_epochs=1, n_components=2, "
            "batch_size=64)\n"
            f"train(data, config, {str(tmp_path / 'killed')!r}, sinks=[Kill()])\n"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == 9
        killed = Run(tmp_path / "killed")
        resumed = train(killed.data(), killed.config(), killed.folder, resume=True)
        for name, value in whole.model().state_dict().items():
            assert torch.equal(value, resumed.model().state_dict()[name]), name


class TestFrames:
    @pytest.mark.parametrize("library", ["pandas", "polars"])
    def test_estimator_and_imputer_of_a_frame(self, tmp_path, library):
        frames = pytest.importorskip(library)
        kind, flag, x = rows_with_dependence(150)
        columns = {
            "kind": [["red", "green", "blue"][k] if i % 9 else None for i, k in enumerate(kind)],
            "flag": flag.tolist(),
            "x": x.tolist(),
        }
        frame = frames.DataFrame(columns)
        options = {"stage_1_epochs": 2, "stage_2_epochs": 0, "random_state": 0, "n_components": 2}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vae = VAEEstimator(**options).fit(frame)
            imputer = VAEImputer(VAEEstimator(**options), random_state=0).fit(frame)

        assert vae.get_feature_names_out().tolist()[0] == "vaeestimator0"
        for rows in (vae.sample(5, noise=True), vae.reconstruct(frame).mean):
            assert type(rows) is type(frame)
            assert set(rows["kind"]) <= {"red", "green", "blue"}
            assert set(rows["flag"]) <= {True, False}

        vae.save(tmp_path / "vae.safetensors")
        again = VAEEstimator.load(tmp_path / "vae.safetensors")
        np.testing.assert_array_equal(again.score_samples(frame), vae.score_samples(frame))
        assert type(again.sample(2)) is type(frame)

        found = imputer.transform(frame, return_std=True)
        assert list(found.mean["kind"])[1:9] == columns["kind"][1:9]
        assert next(iter(found.mean["kind"])) in {"red", "green", "blue"}
        assert imputer.level_probability(frame)[1, 0] == 1
        assert np.isnan(found.std[:, 0]).all()
        assert type(imputer.sample(frame, 2)[1]) is type(frame)

        other = frames.DataFrame(columns | {"kind": ["mauve"] * 150})
        with pytest.warns(UserWarning, match="'mauve' in row 0.*treated as missing"):
            scores = vae.score_samples(other)
        missing = frames.DataFrame(columns | {"kind": [None] * 150})
        np.testing.assert_array_equal(scores, vae.score_samples(missing))

    def test_types_that_are_categories(self):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(
            {
                "number": [1, 2, 3, 1],
                "level": pandas.Categorical([3, 1, None, 3]),
                "flag": pandas.array([True, None, False, True], dtype="boolean"),
                "text": ["a", None, "b", "a"],
            }
        )
        encoded = encode_frame(frame)
        assert encoded.levels == {1: (1, 3), 2: (False, True), 3: ("a", "b")}
        assert encoded.frame["level"].tolist()[:2] == [1.0, 0.0]
        with pytest.raises(ValueError, match="like names"):
            encode_frame(pandas.DataFrame({"who": list("abcdefghijkl")}))


def test_an_explanation_counts_what_a_level_is_below_the_best():
    model = model_of({0: ("a", "b", "c"), 2: (False, True)}, 3)
    rows = torch.tensor([[float(k), 0.3, torch.nan] for k in range(3)] + [[torch.nan, 0.3, 1.0]])
    nats = explain(model, rows).nats

    log_probs = model.reconstruct(rows[:3]).log_probs[:, :3]
    expected = log_probs.max(1).values - log_probs.diagonal()
    np.testing.assert_allclose(nats[:3, 0], expected.detach(), rtol=1e-5)
    assert (nats[:3, 2] == 0).all()
    assert nats[3, 0] == 0
    assert np.isfinite(nats).all()
