"""The paper's comparison: it compares what it says, and its page agrees with its JSON."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from equipoise.cli.paper import PAPER_ITEMS
from equipoise.config import ConfigError
from equipoise.data import Batches
from equipoise.files import write_json
from equipoise.objectives import (
    BatchVarianceElbo,
    DetachedVarianceElbo,
    DipVaeI,
    DipVaeII,
    Elbo,
    RaeL2,
    WaeMmd,
)
from equipoise.paper import ITEMS
from equipoise.paper.markdown import cell, table
from equipoise.paper.protocol import METHODS, PAPERS_FIVE, TITLES, Lab, Spec
from equipoise.paper.results import make_items, refuse_to_replace, write_page
from equipoise.stages import Stage
from equipoise.training.setup import make_model, make_objective, parameter_groups

ROOT = Path(__file__).parent.parent
FREE = {
    "objective",
    "noise",
    "noise_var",
    "noise_update",
    "floor",
    "stage_2_gradients",
    "stage_1_epochs",
    "stage_2_epochs",
}
"""All that methods may differ in: objective and variance; two stages share the epochs of one."""


@pytest.fixture
def lab(tmp_path):
    return Lab("tiny", tmp_path / "runs", epochs=1, images=tmp_path / "docs" / "images")


def test_methods_differ_in_objective_and_variance_alone(lab):
    reference = lab.config(Spec("mnist", "learned")).as_dict()
    for method in METHODS:
        options = (("noise_var", 0.1),) if method == "fixed" else ()
        config = lab.config(Spec("mnist", method, options))
        changed = {name for name, value in config.as_dict().items() if value != reference[name]}
        assert changed <= FREE, method
        assert config.stage_1_epochs + config.stage_2_epochs == reference["stage_1_epochs"]


def test_methods_start_from_the_same_networks_and_see_the_same_batches(lab):
    data, models, groups, batches = lab.data("mnist"), {}, {}, {}
    for method in PAPERS_FIVE:
        config = lab.config(Spec("mnist", method))
        torch.manual_seed(config.seed)
        model = make_model(data, config)
        models[method] = {**model.encoder.state_dict(), **model.decoder.state_dict()}
        groups[method] = [
            (group["lr"], group["weight_decay"], len(group["params"]))
            for group in parameter_groups(model, 1.0, 0.3)
        ]
        batches[method] = next(Batches(data.train, config.batch_size, seed=config.seed).epoch(0))
    for method in PAPERS_FIVE:
        assert groups[method] == groups["learned"]
        torch.testing.assert_close(batches[method], batches["learned"])
        for name, tensor in models[method].items():
            torch.testing.assert_close(tensor, models["learned"][name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "objective", "is_deterministic"),
    [
        ("learned", Elbo, False),
        ("vae", Elbo, False),
        ("beta-vae", Elbo, False),
        ("dip-vae-i", DipVaeI, False),
        ("dip-vae", DipVaeII, False),
        ("wae", WaeMmd, True),
        ("rae", RaeL2, True),
        ("sigma-vae", BatchVarianceElbo, False),
    ],
)
def test_each_method_is_trained_by_its_objective(lab, method, objective, is_deterministic):
    config = lab.config(Spec("mnist", method))
    model = make_model(lab.data("mnist"), config)
    assert type(make_objective(model, config, Stage.SHARED_VARIANCE)) is objective
    assert model.deterministic is is_deterministic


def test_the_second_stage_stops_gradients_unless_told_otherwise(lab):
    for method, objective in (("pixel", DetachedVarianceElbo), ("pixel-joint", Elbo)):
        config = lab.config(Spec("mnist", method))
        model = make_model(lab.data("mnist"), config)
        model.predict_variance(torch.tensor(0.1), torch.tensor(0.1))
        assert type(make_objective(model, config, Stage.PREDICTED_VARIANCE)) is objective


def test_a_penalty_and_a_beta_reach_the_objective(lab):
    data = lab.data("mnist")
    for options, attribute in ((("penalty", 3.5), "penalty"), (("beta", 4.0), "beta")):
        config = lab.config(
            Spec("mnist", "wae" if attribute == "penalty" else "beta-vae", (options,))
        )
        objective = make_objective(make_model(data, config), config, Stage.SHARED_VARIANCE)
        assert getattr(objective, attribute) == options[1]


def test_every_item_asks_for_models_that_exist(lab):
    assert tuple(ITEMS) == PAPER_ITEMS
    assert METHODS.keys() == TITLES.keys()
    for budget in ("tiny", "full"):  # "small" differs in its lengths alone
        of_budget = Lab(budget, lab.runs)
        specs = {name: set(item.specs(of_budget)) for name, item in ITEMS.items()}
        assert all(specs.values())
        for spec in set.union(*specs.values()):
            assert of_budget.config(spec).problems() == []


def test_a_model_is_made_once_whole_for_all_who_need_it(lab, monkeypatch):
    made = []
    monkeypatch.setattr(Lab, "_make", lambda _lab, spec: made.append(spec))
    lab.prepare(
        [
            Spec("mnist", "vae", brief=True),
            Spec("mnist", "vae", sources=("flow",)),
            Spec("mnist", "vae"),
        ]
    )
    assert made == [Spec("mnist", "vae", brief=False, sources=("flow",))]


@pytest.mark.slow
def test_an_item_from_the_command_line_and_again(tmp_path):
    """Trains, evaluates, writes JSON and page; a second call finds all of it and trains nothing."""
    places = [
        "--runs",
        tmp_path / "runs",
        "--out",
        tmp_path / "results",
        "--page",
        tmp_path / "docs" / "page.md",
    ]
    call = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "equipoise",
        "paper",
        "figure-4",
        "--budget",
        "tiny",
        "--epochs",
        "2",
    ]
    outputs = [
        subprocess.run(
            [*call, *map(str, places)], capture_output=True, text=True, check=True, cwd=tmp_path
        ).stdout
        for _ in range(2)
    ]
    assert "Model 1 of 1: mnist-pixel-low" in outputs[0]
    assert "Model 1 of 1" not in outputs[1]
    found = json.loads((tmp_path / "results" / "figure-4-tiny.json").read_text())
    assert {
        "command",
        "date",
        "versions",
        "machine",
        "format",
        "seeds",
        "data",
        "options",
        "seconds",
    } <= found.keys()
    assert found["epochs"] == {"mnist": 2}
    assert str(tmp_path) not in json.dumps(
        {key: found[key] for key in ("command", "data", "options")}
    )
    page = (tmp_path / "docs" / "page.md").read_text()
    assert "![Figure 4" in page
    (picture,) = re.findall(r"\]\((images/paper/figure-4[^)]*)\)", page)
    assert (tmp_path / "docs" / picture).stat().st_size > 1000


def test_a_run_with_other_options_is_refused(lab):
    """And nothing of it is overwritten."""
    spec = Spec("mnist", "learned", brief=True)
    other = Lab("tiny", lab.runs, epochs=2)
    from equipoise.training.job import train

    train(lab.data("mnist"), other.config(spec), other.run(spec).folder)
    before = other.run(spec).model_file.read_bytes()
    with pytest.raises(ConfigError, match="other values of stage_1_epochs"):
        lab.prepare([spec])
    assert other.run(spec).model_file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table-9"], "there is no item 'table-9'; choose from table-1"),
        (["table-1", "--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_wrong_calls_say_what_is_right(arguments, message):
    call = [sys.executable, "-m", "equipoise", "paper", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_page_of_results_is_what_the_json_says(tmp_path):
    """No figure on it was typed by hand."""
    page = ROOT / "docs" / "results.md"
    before = page.read_text(encoding="utf-8")
    copy = tmp_path / "docs"
    (copy / "images").mkdir(parents=True)
    (copy / "images" / "paper").symlink_to(page.parent / "images" / "paper")
    (copy / "results-notes.md").symlink_to(page.parent / "results-notes.md")
    (tmp_path / "results").symlink_to(ROOT / "results")
    assert (
        write_page(tmp_path / "results", copy / "results.md", copy / "images" / "paper").read_text()
        == before
    )
    assert "## Table 2" in before


def test_cells():
    assert cell(None) == "–"  # noqa: RUF001
    assert cell("text") == "text"
    assert cell({"value": 65.32, "standard_error": 1.46, "n": 10_000}) == "65.3 ±\u00a01.5"
    assert table(["a", "b"], [[1, None]]).splitlines() == ["| a | b |", "|---|---|", "| 1 | – |"]  # noqa: RUF001


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"seeds": [1]},
        {"seeds": [0, 1]},
        {"epochs": {"mnist": 7}},
        {"item": "other"},
        {"features": "x"},
        {"rows": None},
        {"rows": {"mnist": {"samples": {"value": [1.0]}}}},
        {"rows": {"mnist": {"samples": {"value": 1.0, "error_over_seeds": 0.1}}}},
    ],
)
def test_results_of_other_settings_are_not_replaced(tmp_path, change):
    lab = Lab("tiny", tmp_path / "runs", epochs=1, images=tmp_path / "images")
    out, page = tmp_path / "results", tmp_path / "results.md"
    refuse_to_replace(lab, ["figure-4"], out, page)
    record = json.loads((ROOT / "results" / "figure-4-full.json").read_text())
    settings = {"budget": "tiny", "epochs": {"mnist": 1}, "seeds": [0], "features": lab.features}
    write_json(out / "figure-4-tiny.json", record | settings | change)
    if not change:
        refuse_to_replace(lab, ["figure-4"], out, page)
        refuse_to_replace(replace(lab, seeds=(1, 0)), ["figure-4"], out, page)  # seed 0 is in it
        page.write_text("mine")
    with pytest.raises(ConfigError, match="--force to replace it"):
        refuse_to_replace(lab, ["figure-4"], out, page)


@pytest.mark.slow
def test_all_items_on_digits(tmp_path):
    """In processes of their own, two at once."""
    lab = Lab(
        "tiny", tmp_path / "runs", jobs=2, epochs=1, images=tmp_path / "docs" / "images" / "paper"
    )
    files = make_items(lab, list(ITEMS), tmp_path / "results")
    assert [file.name for file in files] == [f"{name}-tiny.json" for name in ITEMS]
    page = write_page(
        tmp_path / "results", tmp_path / "docs" / "results.md", lab.images
    ).read_text()
    for item in ITEMS.values():
        assert item.TITLE in page
