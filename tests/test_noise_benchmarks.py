"""The benchmarks of the noise model run at their smallest size, and their arithmetic is right."""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark as its command does, and forget it afterwards."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)
    yield importlib.import_module
    for name in ("experiment", "imputation", "one_class_data", "one_class_tables", "tables"):
        if name not in before:
            sys.modules.pop(name, None)


def run(script, out, *arguments):
    command = [sys.executable, f"benchmarks/{script}.py", "--tiny", "--out", str(out), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(out.read_text())


def test_one_class_tables_at_their_smallest_size(tmp_path):
    content = run("one_class_tables", tmp_path / "x.json")
    assert {"iris"} <= {row["table"] for row in content["rows"]} <= {"iris", "glass"}
    assert all(0 <= row["auroc"] <= 1 for row in content["rows"])
    assert content["summary"]["equipoise, default"]["tables"] in (1, 2)


def test_mixture_gpu_at_its_smallest_size(tmp_path):
    rows = run("mixture_gpu", tmp_path / "x.json")["rows"]
    assert [row["place"] for row in rows] == ["on the device", "on disk", "on disk"]
    assert len({round(row["log_likelihood"], 9) for row in rows}) == 1


def test_noise_updates_at_their_smallest_size(tmp_path):
    content = run("noise_updates", tmp_path / "x.json", "--variants", "fixed")
    (row,) = content["rows"]
    assert row["noise_var"] == pytest.approx(0.005)
    assert row["frechet"] > 0


def test_recipes_at_their_smallest_size(tmp_path):
    content = run("recipes", tmp_path / "x.json", "--variants", "wide:width=4,latent_dim=3")
    (row,) = content["rows"]
    assert row["options"]["latent_dim"] == 3
    assert row["kept_epoch"] == 1
    assert min(row["reconstructions"], row["mixture 4"]) > 0


def test_codes_at_their_smallest_size(tmp_path):
    wide, narrow, aggregate = run("codes", tmp_path / "x.json")["rows"]
    assert wide["n_components"] == narrow["n_components"] == 4
    assert aggregate["n_components"] is None
    for row in (wide, narrow, aggregate):
        assert row["frechet"] > 0
        assert 0 <= row["recall"] <= 1
        assert math.isfinite(row["held_out"])


def test_held_out_variance_at_its_smallest_size(tmp_path):
    rows = run("held_out_variance", tmp_path / "x.json", "--variants", "narrow:width=8")["rows"]
    assert [row["case"] for row in rows] == ["digits, 1", "factors, 2"]
    for row in rows:
        assert row["options"]["width"] == 8
        assert row["var_over_mse"] == pytest.approx(row["noise_var"] / row["test_mse"])


def test_predicted_std_at_its_smallest_size(tmp_path):
    variants = ("head", "unseen", "digital")
    rows = run("predicted_std", tmp_path / "x.json", "--variants", *variants)["rows"]
    assert [row["variant"] for row in rows] == list(variants)
    for row in rows:
        as_predicted, calibrated = row["none"], row["monotone"]
        assert as_predicted["mse"] == calibrated["mse"]
        assert as_predicted["mse"][0] == pytest.approx(row["mse_before"], abs=1e-6)
        assert 0 < as_predicted["off_bounds_share"] <= 1


def test_auto_components_at_its_smallest_size(tmp_path):
    content = run("auto_components", tmp_path / "x.json")
    (row,) = content["rows"]
    assert row["found"] == row["clusters"] == 2
    assert content["summary"]["found"] == content["summary"]["runs"] == 1


def test_threads_at_their_smallest_size(tmp_path):
    (row,) = run("threads", tmp_path / "x.json")["rows"]
    assert 0 < row["least_milliseconds_with_one"] <= row["milliseconds_with_one"]
    assert row["operations"] > row["parameters"]


def test_streaming_scale_at_its_smallest_size(tmp_path):
    rows = run("streaming_scale", tmp_path / "x.json")["rows"]
    read = {
        (row["source"], row["processes"], row["from_the_middle"]): row[
            "bytes_read_over_bytes_of_the_data"
        ]
        for row in rows
    }
    for processes in (1, 2):
        assert read["npy", processes, False] < 1.2
        assert processes <= read["whole stream", processes, False] < 1.2 * processes


def test_a_finished_row_is_not_computed_again(benchmark, tmp_path, capsys):
    experiment = benchmark("experiment")
    path = tmp_path / "results" / "x.json"
    made = []

    def double(value):
        made.append(value)
        return {"double": 2 * value}

    for _ in range(2):
        rows = experiment.Rows(path)
        for seed in (1, 2):
            row = rows.find_or_make({"seed": seed, "options": {"a": 0.5}}, double, seed)
            assert row["double"] == 2 * seed
    assert made == [1, 2]

    rows.write(summary={"mean": 3})
    content = json.loads(path.read_text())
    assert content["summary"] == {"mean": 3}
    assert [row["double"] for row in content["rows"]] == [2, 4]
    assert content["versions"]["equipoise"]


def test_variants(benchmark):
    variant = benchmark("experiment").variant
    known = {"default": {}}
    assert variant("default", known) == ("default", {})
    assert variant("a:noise=fixed,noise_var=0.1", known) == (
        "a",
        {"noise": "fixed", "noise_var": 0.1},
    )
    assert variant("width=8", known) == ("width=8", {"width": 8})
    with pytest.raises(argparse.ArgumentTypeError, match="KEY=VALUE"):
        variant("unknown", known)


@pytest.mark.parametrize("d", [1, 3])
def test_the_log_probability_of_a_cell_is_that_of_the_gaussian(benchmark, d):
    script = benchmark("one_class_tables")
    rng = np.random.default_rng(0)
    x, quanta = rng.normal(size=(2000, d)), np.linspace(0.2, 0.6, d)

    exact = np.log(norm.cdf(x + quanta / 2) - norm.cdf(x - quanta / 2)).sum(1)
    found = script.cell_log_prob(lambda rows: norm.logpdf(rows).sum(1), x, quanta, rng)
    assert found.mean() == pytest.approx(exact.mean(), abs=0.02)


def test_the_error_of_three_splits_is_that_of_one(benchmark):
    script = benchmark("one_class_tables")
    values = np.tile(np.random.default_rng(0).normal(size=100), (3, 1))
    mean, error = script.with_error(values)
    assert mean == pytest.approx(values[0].mean())
    assert error == pytest.approx(values[0].std(ddof=1) / math.sqrt(100))


def test_resolutions_and_swaps(benchmark):
    data = benchmark("one_class_data")
    found = data.one_class([[0, 1, 7], [0.3 - 0.2, 3, 7], [0.1, 2, 7]], [True, True, False])
    assert data.resolutions(found) == pytest.approx([0.1, 1.0])

    x = np.arange(12.0).reshape(4, 3)
    swapped = data.swapped(x, np.random.default_rng(0))
    assert ((swapped != x).sum(1) == 1).all()


def test_imputation_at_its_smallest_size(tmp_path):
    content = run("imputation", tmp_path / "x.json")
    rows = {row["method"]: row for row in content["rows"]}
    assert rows["VAEImputer"]["rmse"] < rows["mean"]["rmse"]
    assert 0.4 < rows["VAEImputer"]["within_1"] < 1
    assert "within_1" not in rows["KNNImputer"]


def test_the_imputation_in_the_guide_is_that_of_the_json(benchmark):
    content = json.loads((ROOT / "results" / "benchmark-imputation.json").read_text())
    guide = (ROOT / "docs" / "guides" / "your-table.md").read_text(encoding="utf-8")
    assert benchmark("imputation").page(content["rows"]) in guide
