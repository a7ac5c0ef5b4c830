"""Every benchmark runs at its smallest size, and their arithmetic is right."""

import argparse
import importlib
import json
import logging
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
NOT_COMMANDS = {"command", "experiment", "labelled", "one_class_data", "pythae_models"}
PRINTERS = {"reliability", "tables"}
"""Print tables of JSON files, and take no options of ours."""
COMMANDS = sorted({path.stem for path in FOLDER.glob("*.py")} - NOT_COMMANDS - PRINTERS)


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark as its command does, and forget it afterwards."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    yield importlib.import_module

    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture
def run(benchmark, monkeypatch, tmp_path):
    """Run the command of a benchmark at its smallest size in this process.

    A process of its own would take seconds to import torch.
    """

    def run(script, *arguments):
        out = tmp_path / "results" / f"{script}.json"
        command = [f"benchmarks/{script}.py", *map(str, arguments), "--tiny", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        benchmark(script).main()

        content = json.loads(out.read_text())
        assert content["versions"]["equipoise"]
        return content

    return run


def test_one_class_tables_at_their_smallest_size(run):
    content = run("one_class_tables")
    assert {"iris"} <= {row["table"] for row in content["rows"]} <= {"iris", "glass"}
    assert all(0 <= row["auroc"] <= 1 for row in content["rows"])
    assert content["summary"]["equipoise, default"]["tables"] in (1, 2)


def test_small_tables_at_their_smallest_size(run):
    content = run("small_tables")
    assert all(0 <= row["within"]["1"] <= row["within"]["1.96"] <= 1 for row in content["rows"])
    assert content["summary"]["three factors, 30 x 5"]["gain per column"]["n"] == 2


def test_mixture_gpu_at_its_smallest_size(run):
    rows = run("mixture_gpu")["rows"]
    assert [row["place"] for row in rows] == ["on the device", "on disk", "on disk"]
    assert len({round(row["log_likelihood"], 9) for row in rows}) == 1


def test_noise_updates_at_their_smallest_size(run):
    content = run("noise_updates", "--variants", "fixed")
    (row,) = content["rows"]
    assert row["noise_var"] == pytest.approx(0.005)
    assert row["frechet"] > 0


def test_recipes_at_their_smallest_size(run):
    content = run("recipes", "--variants", "wide:width=4,latent_dim=3")
    (row,) = content["rows"]
    assert row["options"]["latent_dim"] == 3
    assert row["kept_epoch"] == 1
    assert min(row["reconstructions"], row["mixture 4"]) > 0


def test_codes_at_their_smallest_size(run):
    wide, narrow, aggregate = run("codes")["rows"]
    assert wide["n_components"] == narrow["n_components"] == 4
    assert aggregate["n_components"] is None
    for row in (wide, narrow, aggregate):
        assert row["frechet"] > 0
        assert 0 <= row["recall"] <= 1
        assert math.isfinite(row["held_out"])


def test_held_out_variance_at_its_smallest_size(run):
    rows = run("held_out_variance", "--variants", "narrow:width=8")["rows"]
    assert [row["case"] for row in rows] == ["digits, 1", "factors, 2"]
    for row in rows:
        assert row["options"]["width"] == 8
        assert row["var_over_mse"] == pytest.approx(row["noise_var"] / row["test_mse"])


def test_predicted_std_at_its_smallest_size(run):
    variants = ("head", "unseen", "digital")
    rows = run("predicted_std", "--variants", *variants)["rows"]
    assert [row["variant"] for row in rows] == list(variants)
    for row in rows:
        as_predicted, calibrated = row["none"], row["monotone"]
        assert as_predicted["mse"] == calibrated["mse"]
        assert as_predicted["mse"][0] == pytest.approx(row["mse_before"], abs=1e-6)
        assert 0 < as_predicted["off_bounds_share"] <= 1


def test_auto_components_at_its_smallest_size(run):
    content = run("auto_components")
    (row,) = content["rows"]
    assert row["found"] == row["clusters"] == 2
    assert content["summary"]["found"] == content["summary"]["runs"] == 1


def test_threads_at_their_smallest_size(run):
    (row,) = run("threads")["rows"]
    assert 0 < row["least_milliseconds_with_one"] <= row["milliseconds_with_one"]
    assert row["operations"] > row["parameters"]


def test_streaming_scale_at_its_smallest_size(run):
    rows = run("streaming_scale")["rows"]
    read = {
        (row["source"], row["processes"], row["from_the_middle"]): row[
            "bytes_read_over_bytes_of_the_data"
        ]
        for row in rows
    }
    for processes in (1, 2):
        assert read["npy", processes, False] < 1.2
        assert processes <= read["whole stream", processes, False] < 1.2 * processes


def positive(figures):
    return all(math.isfinite(figure) and figure > 0 for figure in figures)


def test_cost_scaling_at_its_smallest_size(run):
    content = run("cost_scaling")
    assert set(content["em"]) == {"N", "K", "d"}
    assert set(content["training"]) == {"N", "D", "d"}
    for row in [*content["em"].values(), *content["training"].values()]:
        (seconds,) = (row[name] for name in row if name.startswith("seconds"))
        assert positive(seconds)
        first, second = np.polyfit(np.log(row["sizes"]), np.log(seconds), 1)
        assert row["exponent"] == pytest.approx(first)
        assert math.isfinite(second + row["standard_error"] + row["last_two"])


def test_distributed_at_its_smallest_size(run):
    one, two = run("distributed")["rows"].values()
    assert one["largest relative difference"] == 0
    assert two["largest relative difference"] < 1e-3
    assert positive([*two.values()])


def test_footprint_at_its_smallest_size(run):
    rows = run("footprint")["rows"]
    assert rows["training_of_digits"]["epochs"] == 2
    assert 0.1 < rows["training_of_digits"]["peak_gib"] < 4
    assert 0 < rows["start"]["python_seconds"] < rows["start"]["help_seconds"]
    assert not rows["start"]["import_brings_torch"]


def test_iwae_cost_at_its_smallest_size(run):
    rows = run("iwae_cost")["rows"]
    assert set(rows) == {"stage 1", "stage 2"}
    for row in rows.values():
        assert positive([row["ratio"], *row["decoder_codes_per_second"].values()])


def test_a_run_is_trained_and_evaluated_at_the_smallest_size(run, tmp_path):
    folder = tmp_path / "run"
    job = run("main_job", "mnist", "--run", folder)
    assert job["data"]["name"] == "digits"
    assert [stage["stage"] for stage in job["stages"]] == [1, 2]
    assert job["options"]["width"] == 4

    found = run("evaluation", "evaluate", "mnist", "--run", folder)
    assert found["data"] == job["data"]
    bound, of_job = (each["evaluation"]["likelihood"]["elbo"] for each in (found, job))
    assert bound["value"] == pytest.approx(of_job["value"])
    assert positive([found["optimal_noise_var"], found["seconds"]["whole command"]])


def test_em_against_scikit_learn_at_its_smallest_size(run):
    content = run("mixture_em")
    for row in content["speed"]:
        assert row["log_likelihood_difference"] == pytest.approx(0, abs=1e-9)
    memory = content["memory_of_a_million_codes"]
    assert 0 < memory["with_codes_before_fit_mib"] <= memory["peak_mib"]


def test_mixture_scale_at_its_smallest_size(run):
    content = run("mixture_scale")
    assert set(content["iteration"]["processes"]) == {"1", "2"}
    assert content["iteration"]["ratio"] > 0
    (row,) = content["first_phase"]
    assert row["with_first_phase"]["converged"]
    assert row["ratio_of_seconds_to_same_log_likelihood"] > 0


def test_step_profile_at_its_smallest_size(run):
    for stages in run("step_profile")["rows"].values():
        assert set(stages) == {"stage 1", "stage 2"}
        for shares in stages.values():
            assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
            assert min(shares.values()) >= 0


def test_streaming_memory_at_its_smallest_size(run):
    kinds = ["names in a folder", "stream, its batches alone"]
    content = run("streaming_memory", "--kinds", *kinds)
    assert [row["n"] for row in content["runs"]] == [20, 40, 200, 400]
    assert set(content["bytes_per_further_example"]) == set(kinds)
    for row in content["runs"]:
        assert 0 < row["anonymous_before_mib"] <= row["anonymous_peak_mib"]


def test_streaming_training_at_its_smallest_size(run):
    pytest.importorskip("pyarrow")
    content = run("streaming_training")
    assert len(content["curve"]) == len(content["examples_per_second"]) == 3
    assert content["largest_relative_difference_of_the_curves"] < 1e-6
    assert positive(content["anonymous_mib_of_the_largest_process"])


def test_batch_size_at_its_smallest_size(run):
    content = run("batch_size")
    auto, fixed = content["rows"]
    assert auto["batch_size"] < fixed["batch_size"] == 256
    assert auto["steps"] > fixed["steps"]
    assert set(content["test_elbo"]) == {"auto", "256", "auto minus 256"}


def test_training_loop_at_its_smallest_size(run):
    rows = run("training_loop")["rows"]
    assert set(rows["median of epoch / epoch by hand"]) == {"stage 1", "stage 2"}
    assert positive(rows["median of epoch / epoch by hand"].values())
    assert rows["whole job / by hand"] >= rows["training epochs / by hand"] > 0


def test_throughput_at_its_smallest_size(run):
    pytest.importorskip("pythae")
    stages = run("throughput", "--precisions", "float32")["rows"]["float32"]
    assert "pythae 0.1.2" in stages["stage 1"]
    assert "leanest loop by hand" in stages["stage 2"]
    for loops in stages.values():
        assert positive(row["equipoise_times_as_fast"] for row in loops.values())


def test_time_to_quality_at_its_smallest_size(run):
    pytest.importorskip("pythae")
    rows = run("time_to_quality")["rows"]
    assert len(rows) == 2
    for row in rows.values():
        distances = [mixture["frechet_distance"]["value"] for mixture in row["mixtures"]]
        assert positive([row["training_seconds"], *distances])


def test_peers_at_their_smallest_size(run):
    pytest.importorskip("pythae")
    models = ["equipoise", "pythae-vae", "pythae-rae-l2-scheduled"]
    rows = run("peers", "--threads", "1", "--models", *models)["rows"]
    assert list(rows) == models
    for row in rows.values():
        assert positive([row["test_mse"], row["mixture"]["frechet_distance"]["value"]])


def test_linear_probe_at_its_smallest_size(run):
    rows = run("linear_probe", "--methods", "equipoise", "PCA", "pixels")["rows"]
    accuracy = {row["method"]: row["all"] for row in rows}
    assert 10 < accuracy["equipoise"] < accuracy["pixels"] <= 100


def test_linear_probe_of_pythae_at_its_smallest_size(run):
    pytest.importorskip("pythae")
    (row,) = run("linear_probe", "--methods", "pythae RAE-L2")["rows"]
    assert 10 < row["all"] <= 100


def test_odd_images_at_their_smallest_size(run):
    content = run("odd_images", "--variants", "d 16")
    assert content["chosen"]["variant"] == "d 16"
    for row in content["rows"]:
        assert all(0 <= area <= 1 for area in [*row["aupr"].values(), *row["auroc"].values()])


@pytest.mark.parametrize("speed", [[], ["--speed"]])
def test_stage_two_at_its_smallest_size(run, speed):
    rows = run("stage_two", "mnist", *speed)["rows"]
    if speed:
        assert rows["stage 1"]["over_stage_1"] == 1
        assert positive(row["examples_per_second"] for row in rows.values())
    else:
        assert len(rows) == 5
        assert all(0 < row["coverage_1"] <= 1 for row in rows.values())


def test_calibration_at_its_smallest_size(run):
    ways = ["--recalibrations", "none", "scale"]
    as_trained, scaled = run("calibration", "mnist", "--floors", "1.0", *ways)["rows"].values()
    assert as_trained["scale"] == 1 != scaled["scale"] > 0
    assert as_trained["mse"] == scaled["mse"]


def test_correlated_noise_at_its_smallest_size(run):
    rows = run("correlated_noise")["digits"]["rows"]
    assert len(rows) == 10
    full, none = (rows[f"one variance, {form}"]["log_likelihood"] for form in ("full", "none"))
    assert full["value"] > none["value"]


def test_contaminated_tables_at_their_smallest_size(run):
    content = run("contaminated_tables")
    assert {row["table"] for row in content["rows"]} == {"iris"}
    assert all(0 <= row["auroc"] <= 1 for row in content["rows"])


def test_false_alarms_at_their_smallest_size(run):
    content = run("false_alarms")
    assert {row["case"] for row in content["rows"]} == {"digits, 400 rows"}
    for found in content["summary"].values():
        assert 0 <= found["flagged"]["value"] <= 1


def test_every_benchmark_has_a_test_at_its_smallest_size():
    tests = Path(__file__).read_text() + (ROOT / "tests" / "test_reliability.py").read_text()
    for name in COMMANDS:
        assert f'run("{name}"' in tests or f'run("benchmarks/{name}.py"' in tests, name


@pytest.mark.parametrize("name", COMMANDS)
def test_benchmarks_show_their_help_without_pythae(benchmark, monkeypatch, capsys, name):
    imported = [module for module in sys.modules if module.partition(".")[0] == "pythae"]
    for module in ("pythae", *imported):
        monkeypatch.setitem(sys.modules, module, None)

    command = ["evaluate"] if name == "evaluation" else []
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *command, "--help"])
    with pytest.raises(SystemExit) as ended:
        benchmark(name).main()
    assert ended.value.code == 0
    assert "--tiny" in capsys.readouterr().out


def test_figures_of_the_smallest_size_replace_no_others(benchmark):
    command = benchmark("command").Command("What it is.", "results/x-{data}.json", "mnist")
    assert command.parse_args([]).out == Path("results/x-mnist.json")
    assert command.parse_args(["--tiny"]).out == Path("results-scratch/x-digits.json")
    assert command.parse_args(["--tiny", "--out", "y.json"]).out == Path("y.json")


def printed_commands():
    """Find each command of a benchmark in the documents and the results, with its file."""
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "justfile"]):
        text = path.read_text(encoding="utf-8")
        spans = re.findall(r"`(python\s+benchmarks/[^`]+)`", text)
        lines = re.findall(r"^\s*(?:\$ )?(python benchmarks/(?:.*\\\n)*.*)$", text, re.MULTILINE)
        lines = [line.replace("\\\n", " ") for line in lines if "`" not in line]
        for command in [*spans, *lines]:
            yield path, command

    for path in sorted(ROOT.glob("results/*.json")):
        for command in json.loads(path.read_text(encoding="utf-8"))["command"].split("; "):
            if command.startswith("python benchmarks/"):
                yield path, command.partition(", one process")[0]


PRINTED = sorted({(str(path.relative_to(ROOT)), text) for path, text in printed_commands()})


class ParsedError(Exception):
    """Is raised once the options are read, so that nothing runs."""


@pytest.mark.parametrize(("path", "command"), PRINTED)
def test_benchmarks_know_the_options_of_their_printed_commands(
    benchmark, monkeypatch, path, command
):
    placeholders = {"MODEL": "equipoise"}
    _, script, *options = (placeholders.get(word, word) for word in shlex.split(command))
    assert (ROOT / script).is_file()
    if Path(script).stem in PRINTERS:
        assert not any(option.startswith("-") for option in options)
        return

    read = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        raise ParsedError(read(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(ParsedError):
        benchmark(Path(script).stem).main()


def test_the_results_of_a_benchmark_come_from_its_script():
    for path in ROOT.glob("results/benchmark-*.json"):
        script = re.search(r"benchmarks/(\w+)\.py", json.loads(path.read_text())["command"])[1]
        assert path.stem.startswith(f"benchmark-{script.replace('_', '-')}")


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


def test_imputation_at_its_smallest_size(run):
    content = run("imputation")
    rows = {row["method"]: row for row in content["rows"]}
    assert rows["VAEImputer"]["rmse"] < rows["mean"]["rmse"]
    assert 0.4 < rows["VAEImputer"]["within_1"] < 1
    assert "within_1" not in rows["KNNImputer"]


def test_the_imputation_in_the_guide_is_that_of_the_json(benchmark):
    content = json.loads((ROOT / "results" / "benchmark-imputation.json").read_text())
    guide = (ROOT / "docs" / "guides" / "your-table.md").read_text(encoding="utf-8")
    imputation = benchmark("imputation")
    assert imputation.page(content["rows"]) in guide
    assert imputation.page_of_mechanisms(content["rows"]) in guide


def test_depth_cost_at_its_smallest_size(run):
    pytest.importorskip("tifffile")
    rows = run("depth_cost")["rows"]
    assert len(rows) == 2
    for row in rows.values():
        assert positive([value for figure in row.values() for value in figure.values()])


def test_table_speed_at_its_smallest_size(run):
    content = run("table_speed")
    for part in ("reading", "scoring"):
        assert positive([*content[part]["seconds"].values(), *content[part]["ratios"].values()])
