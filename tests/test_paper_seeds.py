"""Tables over seeds: both errors, which figures differ, and runs that are made seed by seed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from equipoise.cli import main
from equipoise.cli.paper import _read_seeds
from equipoise.files import StoreError, write_json
from equipoise.glossary import leaves
from equipoise.paper import ITEMS, figure_1, figure_2, figure_4
from equipoise.paper.markdown import brief, cell, table
from equipoise.paper.protocol import Lab, Spec
from equipoise.paper.results import read_results, summary, write_page
from equipoise.paper.seeds import error_over_seeds, is_different, of_seeds, over_seeds

ROOT = Path(__file__).parent.parent
OLD = sorted(
    path for path in (ROOT / "results").glob("*.json") if path.name.startswith(tuple(ITEMS))
)


def figure(values, errors):
    """A figure over seeds, from the values and errors over examples of each."""
    pairs = zip(values, np.broadcast_to(errors, len(values)), strict=True)
    return over_seeds([{"value": v, "standard_error": float(e), "n": 100} for v, e in pairs])


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_both_errors_are_those_of_the_mean(n_seeds):
    """Of 0, 2, ..., 2(S - 1) the variance is S(S + 1)/3, and that of the mean (S + 1)/3."""
    found = figure([2.0 * s for s in range(n_seeds)], [0.1 * s for s in range(n_seeds)])
    assert found["value"] == pytest.approx(n_seeds - 1)
    assert found["error_over_seeds"] == pytest.approx(math.sqrt((n_seeds + 1) / 3))
    assert found["standard_error"] == pytest.approx(0.05 * (n_seeds - 1))
    assert found["n"] == 100
    assert found["of_seeds"] == [2.0 * s for s in range(n_seeds)]


def test_errors_over_examples_do_not_fall_with_seeds_that_share_the_examples():
    """A mean of S values t_s + c has the variance var(t)/S + var(c), and so say both errors."""
    rng = np.random.default_rng(0)
    training, examples, n_seeds, repetitions = 0.7, 0.4, 3, 3000
    c = rng.normal(scale=examples, size=(repetitions, 1))
    values = c + rng.normal(scale=training, size=(repetitions, n_seeds))
    found = [figure(row, examples) for row in values.tolist()]
    said = np.mean([f["error_over_seeds"] ** 2 + f["standard_error"] ** 2 for f in found])
    assert said == pytest.approx(training**2 / n_seeds + examples**2, rel=0.05)
    assert np.var([f["value"] for f in found]) == pytest.approx(said, rel=0.1)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6])
def test_figures_differ_from_two_combined_errors_on(spread, factor):
    """Differences m - spread and m + spread have the error ``spread``; .3 and .4 make .5."""
    limit = 2 * math.hypot(spread, 0.5)
    b = figure([factor * value for value in (5.0, 8.0)], 0.4 * factor)
    for m, differs in ((1.001 * limit, True), (0.999 * limit, False), (-1.001 * limit, True)):
        values = [factor * (5.0 + m - spread), factor * (8.0 + m + spread)]
        a = figure(values, 0.3 * factor)
        assert is_different(a, b) is differs
        assert is_different(b, a) is differs


def test_what_a_seed_does_to_both_figures_does_not_matter():
    effect = np.array([-30.0, 10.0, 25.0])
    a, b = np.array([1.0, 1.2, 1.1]), np.array([1.9, 2.0, 2.1])
    assert is_different(figure(a.tolist(), 0.1), figure(b.tolist(), 0.1))
    assert is_different(figure((a + effect).tolist(), 0.1), figure((b + effect).tolist(), 0.1))
    assert not is_different(
        figure((a + effect).tolist(), 0.1), figure((b + effect[::-1]).tolist(), 0.1)
    )


def test_three_seeds_alone_call_one_in_five_chances_a_difference():
    """1 - 2 / sqrt(6): the share of a t distribution with 2 degrees of freedom beyond 2."""
    draws = np.random.default_rng(0).normal(size=(5000, 3)).tolist()
    share = np.mean([is_different(over_seeds(row), 0.0) for row in draws])
    assert share == pytest.approx(1 - 2 / math.sqrt(6), abs=0.02)


def test_what_seeds_share_is_kept_and_what_they_lack_is_a_dash():
    contents = [
        {"K": 8, "features": "x", "none": None, "only": 1.0, "units": 15, "row": {"v": 1.0}},
        {"K": 8, "features": "x", "none": None, "units": 16, "row": {"v": 2.0}},
    ]
    found = over_seeds(contents)
    assert (found["K"], found["features"], found["none"], found["only"]) == (8, "x", None, None)
    assert found["units"] == {"value": 15.5, "error_over_seeds": 0.5, "of_seeds": [15, 16]}
    assert found["row"]["v"]["value"] == 1.5
    assert over_seeds(contents[:1]) is contents[0], "one seed is as it was"
    with pytest.raises(ValueError, match="cannot be averaged"):
        over_seeds(["a", "b"])


def test_a_ratio_is_computed_seed_by_seed():
    found = of_seeds(lambda a, b: a / b, figure([2.0, 6.0], 0.1), figure([1.0, 2.0], 0.1))
    assert found["of_seeds"] == [2.0, 3.0]
    assert (found["value"], error_over_seeds(found)) == (2.5, 0.5)


def test_cells_have_the_error_over_seeds_first():
    assert cell(figure([64.0, 66.0], 0.05)) == "65.0 ±\u00a01.0 ±\u00a00.050"
    assert cell(figure([64.0, 64.0], 1.4)) == "64.0 ±\u00a00 ±\u00a01.4"
    assert cell(brief(over_seeds([0.5, 0.7]), ".2f")) == "0.60 ±\u00a00.10"
    assert cell((figure([64.0, 66.0], 0.05), "x")) == "65.0 ±\u00a01.0 ±\u00a00.050 (x)"


def test_the_best_of_a_column_and_what_does_not_differ_from_it_are_bold():
    best, near, far = (figure([v, v + 0.2], 0.5) for v in (1.0, 2.0, 3.0))
    rows = [["a", near], ["b", far], ["c", best], ["real", cell(best)], ["none", None]]

    def is_bold(direction):
        lines = table(["", "distance"], rows, {"distance": direction}).splitlines()[2:]
        return ["**" in line for line in lines]

    assert is_bold("lower") == [True, False, True, False, False]
    assert is_bold("higher") == [True, True, False, False, False]
    assert "**" not in table(["", "distance"], rows), "no direction, nothing that is best"

    grouped = table(["", "distance"], rows[:3], {"distance": "lower"}, groups=["x", "x", "y"])
    assert ["**" in line for line in grouped.splitlines()[2:]] == [True, True, False]

    pairs = table(["bits"], [[(best, far)], [(far, best)]], {"bits": "lower"}).splitlines()[2:]
    assert pairs == [f"| **{cell(best)}** ({cell(far)}) |", f"| {cell(far)} (**{cell(best)}**) |"]


def test_with_one_seed_nothing_is_bold():
    rows = [["a", {"value": 1.0, "standard_error": 0.1, "n": 9}], ["b", {"value": 2.0}]]
    assert "**" not in table(["", "x"], rows, {"x": "lower"})


def varied(value, rng):
    """The same figures, as if of a training with another seed."""
    if isinstance(value, dict):
        if "value" in value:
            return value | {"value": value["value"] * (1 + 0.01 * rng.normal())}
        return {key: varied(part, rng) for key, part in value.items()}
    return value * (1 + 0.01 * rng.normal()) if isinstance(value, float) else value


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_every_item_lays_out_several_seeds_in_any_order(path, tmp_path):
    """The results are of one seed, by an earlier version, and are read still."""
    content = read_results(path)
    assert content["seeds"] == [0]

    rng, item = np.random.default_rng(0), ITEMS[content["item"]]
    seeds = [varied(content["rows"], rng) for _ in range(3)]
    rows = over_seeds(seeds)
    laid_out = item.markdown(content | {"rows": rows})
    assert laid_out == item.markdown(content | {"rows": over_seeds(seeds[::-1])})
    assert len(laid_out.splitlines()) == len(item.markdown(content).splitlines())
    assert ("**" in laid_out) == hasattr(item, "BETTER")

    write_json(tmp_path / "x.json", content | {"rows": rows, "seeds": [0, 1, 2]})
    assert item.markdown(read_results(tmp_path / "x.json")) == laid_out
    write_json(tmp_path / "x.json", content | {"rows": rows, "seeds": [0, 1]})
    with pytest.raises(StoreError, match="does not have a value for each of 2 seeds"):
        read_results(tmp_path / "x.json")


def test_pictures_of_figures_have_their_errors_over_seeds(monkeypatch, tmp_path):
    figures = []
    for module in (figure_1, figure_2):
        monkeypatch.setattr(module.plots, "save", lambda figure, _: figures.append(figure))
    monkeypatch.setattr(Lab, "sets", ())  # there are no models to draw samples of

    for module in (figure_1, figure_2):
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        rows = read_results(ROOT / "results" / f"{name}-full.json")["rows"]
        several = over_seeds([varied(rows, np.random.default_rng(s)) for s in range(2)])
        for content, has_errors in ((rows, False), (several, True)):
            module.draw(Lab("full", tmp_path), {"rows": content})
            for axis in figures.pop().axes:
                assert bool(axis.collections) == has_errors


@pytest.mark.parametrize(
    ("text", "seeds"), [("1", (0,)), ("3", (0, 1, 2)), ("0,4,7", (0, 4, 7)), ("5,2", (5, 2))]
)
def test_seeds_are_a_number_or_a_list(text, seeds):
    assert _read_seeds(text) == seeds


@pytest.mark.parametrize("seeds", ["0", "-1", "0,0", "1,-2", "two", "1,", "1.5"])
def test_seeds_that_make_no_sense_are_refused(seeds, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["paper", "figure-4", f"--seeds={seeds}"])
    assert "give a number of seeds from 1 on, or two or more different ones" in (
        capsys.readouterr().err
    )


def test_one_way_to_name_the_seeds_at_a_time(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["paper", "figure-4", "--seeds", "2", "--seed", "1"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_of_two_seeds_is_made_seed_by_seed(tmp_path, monkeypatch, capsys):
    """An interruption between the seeds leaves the first one, which is used again."""
    command = ["paper", "figure-4", "--budget", "tiny", "--epochs", "2"]
    command += ["--runs", str(tmp_path)]
    lab = Lab("tiny", tmp_path, epochs=2, seeds=(0, 1))
    spec = Spec("mnist", "pixel-low")
    first, second = (lab.of_seed(seed).run(spec) for seed in lab.seeds)
    assert second.folder.name == f"{first.folder.name}-seed=1"

    make = Lab._make

    def make_first(lab, spec):
        if lab.seed == 1:
            raise KeyboardInterrupt
        make(lab, spec)

    monkeypatch.setattr(Lab, "_make", make_first)
    with pytest.raises(SystemExit, match="130"):
        main([*command, "--seeds", "2"])
    assert first.evaluation_file.is_file()
    assert not second.folder.exists()

    monkeypatch.setattr(Lab, "_make", make)
    before = first.model_file.stat().st_mtime_ns
    capsys.readouterr()
    main([*command, "--seeds", "2"])
    assert first.model_file.stat().st_mtime_ns == before
    assert "Model 1 of 1: mnist-pixel-low-seed=1" in capsys.readouterr().out
    assert [run.config().seed for run in (first, second)] == [0, 1]

    file = tmp_path / "tiny" / "results" / "figure-4-tiny.json"
    both, alone = read_results(file), figure_4.compute(lab.of_seed(0))
    assert both["seeds"] == [0, 1]
    assert both["command"].endswith("figure-4 --budget tiny --epochs 2 --seeds 2")
    assert both["options"].keys() == both["seconds"]["models"].keys()
    assert {options["seed"] for options in both["options"].values()} == {0, 1}
    for (keys, figure), (_, of_first) in zip(
        leaves(both["rows"]), leaves(alone["rows"]), strict=True
    ):
        assert figure["of_seeds"][0] == of_first["value"], keys
        assert figure["of_seeds"][1] != of_first["value"], keys
        assert figure["error_over_seeds"] > 0
        assert figure["standard_error"] > 0

    # The page follows from the JSON alone. A part of the seeds does not replace all of them.
    page = file.parent.parent / "docs" / "results.md"
    written = page.read_text()
    assert "seeds 0 and 1, epochs" in written
    assert "Means over seeds 0 and 1" in written
    assert summary([file]).splitlines()[-1] in written
    assert write_page(file.parent, page, page.parent / "images" / "paper").read_text() == written
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--seed", "1"])
    assert "other seeds" in capsys.readouterr().err
    assert json.loads(file.read_text())["seeds"] == [0, 1]
