import errno
import html
import json
import os
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.aggregate import GaussianMixture
from equipoise.data.gate import Limits, open_image
from equipoise.files import StoreError, write_json
from equipoise.glossary import TERMS, format_figure, leaves, measure, term
from equipoise.model import VAE
from equipoise.report import SECTIONS, write_report
from equipoise.store import save_mixture, save_model
from equipoise.verdict import verdict
from tests.oracles import epoch_row, evaluation_about

VOID = {"meta", "img"}
EVIL = "<script>alert('x')</script>&\""


def estimate(value, standard_error=0.01, n=10_000):
    return {"value": value, "standard_error": standard_error, "n": n}


def full_evaluation(folder):
    sets = ("real", "reconstruction", "prior", "gaussian", "mixture")
    noise = ("coverage_1", "coverage_2", "coverage_3", "normalised_calibration_error")
    scores = ("negative_elbo", "standardised_residual", "negative_mixture_log_prob", "combined")
    likelihood = (
        "elbo",
        "log_likelihood",
        "kl",
        "mse",
        "iwae_20",
        "iwae_20_mixture",
        "iwae_20_first_500",
    )
    distances = {
        name: {
            "frechet_distance": estimate(70.125 + i),
            "kernel_distance": estimate(0.025 + i),
            "precision": estimate(0.75),
            "recall": estimate(0.5),
        }
        for i, name in enumerate(sets)
    }
    evaluation = {
        "about": evaluation_about(folder)
        | {
            "sections": {
                "noise": {"command": ["equipoise", "evaluate", "runs/a b"], "seconds": 12.5}
            },
        },
        "likelihood": {
            **{name: estimate(100.5 + i, 1.5) for i, name in enumerate(likelihood)},
            "noise_var": estimate(0.2, 0.0012),
            "noise_floor_var": 0.03125,
            "dequantised": {"elbo": estimate(95.25)},
            "bits_per_dim": estimate(6.5071, 0.0022),
            "bits_per_dim_dequantised": estimate(6.75, 0.0022),
        },
        "samples": {"features": "efficientnet-lite0", "feature_dimension": 1280, **distances},
        "latent": {
            "kl_mixture_prior": estimate(5.321),
            "active_units": {"value": 14, "of": 16, "threshold": 0.01, "n": 180},
            "rate_per_unit": [estimate(0.25), estimate(3.5)],
            "memorisation": {
                "samples": estimate(4.625),
                "closer": estimate(0.53),
                "copied": False,
                "mixture=1000": {
                    "samples": estimate(3.375),
                    "closer": estimate(0.9375),
                    "copied": False,
                },
            },
        },
        "noise": {
            name: {key: estimate(0.5 + i / 16 + j / 128, 0.0012) for j, key in enumerate(noise)}
            for i, name in enumerate(("all", "varying"))
        },
        "outliers": {
            "against": "mnist",
            **{name: {"auroc": estimate(0.9 + i / 64)} for i, name in enumerate(scores)},
        },
        "robustness": {"new_measure": estimate(1.75), "remark": "nothing yet", "unknown": None},
    }
    evaluation["noise"]["all"]["pit_histogram"] = [0.0625] * 20
    return evaluation


@pytest.fixture
def folder(tmp_path):
    """A run folder as training and evaluation leave it."""
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    settings = {
        "format": "equipoise-1",
        "noise_model": {"kind": "GlobalNoise", "arguments": {}},
        "command": ["equipoise", "train", "mnist", "--out", "runs/a b"],
        "created": "2026-01-02T03:04:05+00:00",
        "data": {
            "name": "mnist",
            "source": "/data/mnist",
            "load": {},
            "fingerprint": "f1ea",
            "shape": [1, 28, 28],
        }
        | {"n_train": 55_000, "n_validation": 5_000, "n_test": 10_000},
        "options": {"latent_dim": 16, "noise": "global"},
        "parameters": 273_465,
        "versions": {"torch": "2.6.0"},
    }
    write_json(folder / "config.json", settings)
    save_model(folder / "model.safetensors", VAE.build((2,), latent_dim=1, width=1))
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
    save_mixture(folder / "aggregate.safetensors", mixture, {})
    write_json(folder / "evaluation.json", full_evaluation(folder))
    rows = [epoch_row(1, seconds=2.5), epoch_row(2, seconds=3.5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for section in SECTIONS.values():
        for stem in section.figures:
            Image.new("RGB", (400, 300)).save(folder / "figures" / f"{stem}.png")
    return folder


class Page(HTMLParser):
    """Checks that every element is closed where it must be, and keeps what is found."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.found, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]

    @property
    def text(self):
        return "\n".join(self.texts)


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def edit(folder, name, change):
    value = json.loads((folder / name).read_text())
    change(value)
    write_json(folder / name, value)


def test_everything_that_was_evaluated_is_shown(folder):
    page = page_of(folder)
    evaluation = full_evaluation(folder)
    model = evaluation.pop("about")["model"]
    for keys, figure in leaves(evaluation):
        key, case = measure(keys[1:])
        assert format_figure(figure) in page.text, keys
        assert term(key).title in page.text
        assert term(key).meaning in page.text
        assert ", ".join(term(part).title for part in case) in page.text
    for shown in (model, "12.5", "f1ea", "2.6.0", "273,465", "mnist", "2 epochs", "6 s"):
        assert shown in page.text
    assert "equipoise train mnist --out 'runs/a b'" in page.text
    assert "equipoise evaluate 'runs/a b'" in page.text
    assert "0.0625" not in page.text, "curves are for pictures"


def test_rows_say_what_they_are_of(folder):
    """A value stands in the row of its case, below the name of its measure."""
    text = page_of(folder).text
    samples = text[text.index("Samples: results") :]
    rows = [
        "Fréchet distance",
        "Lower is better.",
        "prior",
        "72.125",
        "mixture",
        "74.125",
        "Kernel distance",
    ]
    places = [samples.index(row) for row in rows]
    assert places == sorted(places)
    latent = text[text.index("Closer than") : text.index("Noise: results")]
    closer = [format_figure(estimate(value)) for value in (0.53, 0.9375)]
    rows = ["Closer than", "\nmixture\n", closer[0], "mixture of 1,000", closer[1], "Copies"]
    places = [latent.index(row) for row in rows]
    assert places == sorted(places)
    assert "data as they are" not in latent


def test_the_page_is_whole_and_needs_nothing_else(folder):
    page = page_of(folder)
    for tag, attributes in page.found:
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/").startswith("data:image/")
    assert "url(" not in (folder / "report.html").read_text()
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} >= {link["href"] for link in page.all("a")}


def test_the_page_can_be_read_aloud(folder):
    page = page_of(folder)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert (
        len(page.all("img"))
        == len(page.all("figcaption"))
        == sum(len(s.figures) for s in SECTIONS.values())
    )
    assert all(image["alt"] for image in page.all("img"))
    assert all(head["scope"] in ("row", "col", "rowgroup") for head in page.all("th"))


def test_sections_that_are_missing_are_named_with_their_command(folder):
    (folder / "evaluation.json").unlink()
    text = page_of(folder).text
    assert text.count("Not evaluated yet") == 5
    assert f"equipoise evaluate {folder} --against DATA" in text
    evaluation = {"about": evaluation_about(folder), "likelihood": {"elbo": estimate(1.0)}}
    write_json(folder / "evaluation.json", evaluation)
    assert page_of(folder).text.count("Not evaluated yet") == 4


def test_a_run_without_figures_or_commands(folder):
    for path in (folder / "figures").iterdir():
        path.unlink()
    edit(folder, "config.json", lambda settings: settings.update(command=[]))
    page = page_of(folder)
    assert not page.all("img")
    assert "Trained from Python" in page.text


def test_names_from_outside_stay_text(folder):
    edit(folder, "config.json", lambda settings: settings["data"].update(name=EVIL, source=EVIL))
    edit(folder, "config.json", lambda settings: settings["options"].update({EVIL: EVIL}))
    edit(folder, "evaluation.json", lambda evaluation: evaluation.update({EVIL: {EVIL: EVIL}}))
    edit(folder, "evaluation.json", lambda evaluation: evaluation["outliers"].update(against=EVIL))
    Image.new("RGB", (4, 3)).save(folder / "figures" / "<b>&.png")
    page = page_of(folder)
    assert not page.all("script")
    assert not page.all("b")
    assert page.text.count("alert('x')") >= 6
    assert html.escape("<script>", quote=False) in (folder / "report.html").read_text()


def test_names_that_steer_are_shown_as_escapes(folder):
    name = "a\x00\x1b[2J\u202eb" + 4000 * "w"
    for file, change in (
        ("config.json", {"data": {"name": name, "source": name}}),
        ("evaluation.json", {name: {name: name}}),
    ):
        value = json.loads((folder / file).read_text())
        for key, child in change.items():
            value[key] = value.get(key, {}) | child
        (folder / file).write_text(json.dumps(value))  # with escapes
    page = page_of(folder)
    assert page.text.count("a\\x00\\x1b[2J\\u202ebw") >= 4
    assert not set("\x00\x1b\u202e") & set(page.text)


def test_other_figures_and_sections_are_shown_plainly(folder):
    Image.new("RGB", (4, 3)).save(folder / "figures" / "my-own.png")
    edit(folder, "evaluation.json", lambda evaluation: evaluation.update(schema=2))
    page = page_of(folder)
    assert "My own" in page.text
    assert "Robustness" in page.text
    assert "New measure" in page.text
    assert "Schema" in page.text


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda e: e["likelihood"].update(noise_floor_var=0.15), "near its floor, 0.15"),
        (lambda e: e["likelihood"].pop("bits_per_dim"), "has no closed form"),
        (lambda e: e["samples"].update(feature_dimension=10_000), "far too high"),
        (lambda e: e["latent"]["memorisation"].update(copied=True), "(mixture) single out"),
        (
            lambda e: e["latent"]["memorisation"]["mixture=1000"].update(copied=True),
            "(mixture of 1,000) single out",
        ),
    ],
)
def test_warnings_stand_where_they_are_due(folder, change, warning):
    assert not page_of(folder).all("aside")
    edit(folder, "evaluation.json", change)
    page = page_of(folder)
    assert len(page.all("aside")) == 1
    assert warning in page.text


def test_large_figures_stay_below_5_mb(folder):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (40, 80, 3), dtype=np.uint8)).resize((1200, 600))
    photo = np.clip(np.asarray(smooth) + rng.normal(0, 4, (600, 1200, 3)), 0, 255).astype(np.uint8)
    path = folder / "figures" / "training.png"
    Image.fromarray(photo).save(path)
    for other in (folder / "figures").iterdir():
        other.write_bytes(path.read_bytes())
    assert sum(other.stat().st_size for other in (folder / "figures").iterdir()) > 10e6
    page = page_of(folder)
    assert (folder / "report.html").stat().st_size < 5e6
    assert all(image["src"].startswith("data:image/jpeg") for image in page.all("img"))


@pytest.mark.parametrize("kind", ["eps", "cut", "large"])
def test_a_figure_that_is_no_picture_is_named(folder, monkeypatch, kind):
    path = folder / "figures" / "training.png"
    if kind == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:400_000])
    elif kind == "eps":
        Image.new("RGB", (10, 9)).save(path, "eps")
    else:
        monkeypatch.setattr("equipoise.report.open_image", partial(open_image, limits=Limits(50)))
    with pytest.raises(StoreError, match=r"training\.png cannot be shown"):
        page_of(folder)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_full_disk_or_a_kill_leaves_the_old_report(folder, monkeypatch, error):
    old = write_report(folder).read_bytes()

    def fail(handle):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(type(error)):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == old
    assert not list(folder.glob(".report*"))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is not a run"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (estimate(812.345, 1.23), "812.3 ± 1.2"),
        (estimate(0.0066123, 0.0000214), "0.006612 ± 0.000021"),
        (estimate(1234567.8, 123.0), "1,234,568 ± 123"),
        (estimate(1.5e-12, 2e-13), "1.5e-12 ± 2e-13"),
        (estimate(-22.0, None, 1), "-22"),
        (estimate(1.0, 0.0), "1"),
        (10_000, "10,000"),
        (True, "yes"),
        ("efficientnet-lite0", "efficientnet-lite0"),
        ([estimate(0.25), estimate(3.5)], "0.25, 3.5"),
        ([], ""),
    ],
)
def test_figures_have_the_digits_that_their_errors_allow(figure, text):
    assert format_figure(figure).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("elbo",), ("elbo", ())),
        (("dequantised", "iwae_50_mixture"), ("iwae_50_mixture", ("dequantised",))),
        (("memorisation", "samples"), ("memorisation", ("samples",))),
        (("memorisation", "closer"), ("closer", ())),
        (("memorisation", "mixture=500", "closer"), ("closer", ("mixture=500",))),
        (("memorisation", "flow", "samples"), ("memorisation", ("flow", "samples"))),
        (("all", "nobody_knows"), ("nobody_knows", ("all",))),
    ],
)
def test_what_is_measured_is_told_from_what_it_is_measured_for(keys, expected):
    assert measure(keys) == expected


def test_the_glossary_speaks_to_people():
    for key, entry in TERMS.items():
        assert re.fullmatch(r"[a-z0-9_]+", key)
        if entry.meaning:
            assert entry.title
            assert entry.meaning.endswith(".")
        else:
            assert not entry.unit
            assert not entry.better


def test_a_damaged_evaluation_is_named_as_such(folder):
    about = evaluation_about(folder)
    for damaged in ([], {}, {"about": about, "likelihood": [1]}, {"about": {**about, "model": 1}}):
        write_json(folder / "evaluation.json", damaged)
        with pytest.raises(StoreError, match=r"evaluation\.json: .* damaged or altered"):
            write_report(folder)


def test_an_evaluation_of_another_model_or_mixture_is_refused(folder):
    for key in ("model", "mixture"):
        about = {**evaluation_about(folder), key: "0" * 64}
        write_json(folder / "evaluation.json", {"about": about})
        with pytest.raises(StoreError, match=r"of another model or mixture .* write it anew"):
            write_report(folder)


def test_figures_of_a_section_that_is_not_in_the_file_are_not_shown(folder):
    """They would be of another evaluation."""
    change_json = json.loads((folder / "evaluation.json").read_text())
    del change_json["latent"]
    write_json(folder / "evaluation.json", change_json)
    page = page_of(folder).text
    assert "Where the codes are" not in page


# ---- the verdict


@pytest.mark.parametrize(
    ("row", "evaluation", "headline", "text"),
    [
        (
            {"decision": "stage 1 converged at epoch 9"},
            {},
            "as far as it is known",
            "equipoise eval",
        ),
        ({}, {}, "Convergence needs attention", "--set stage_1_epochs=3"),
        ({"overfitting": 3.0}, {}, "Convergence and overfitting need", "learned by heart"),
        ({"active_units": 0}, {}, "latent units need", "ignores its codes"),
        ({"decision": "stage 1: epoch 1 of at most 9"}, {}, "as far as", "has not ended"),
        ({}, {"coverage_1": 0.70}, "Convergence needs", "within 5 points"),
        ({}, {"coverage_1": 0.90}, "calibration need", "std are too large"),
        ({}, {"coverage_1": 0.40}, "calibration need", "std are too small"),
        ({}, {"coverage_1": 0.9, "interval_coverage_1": 0.69}, "Convergence needs", "use them"),
    ],
)
def test_the_verdict_says_what_is_wrong_and_what_to_do(row, evaluation, headline, text):
    limit = {"stage": 1, "decision": "stage 1 ended at its limit of 1 epochs", "overfitting": 1.1}
    noise = {"varying": {name: estimate(value) for name, value in evaluation.items()}}
    found = verdict([epoch_row(1, **(limit | row))], {"noise": noise} if evaluation else {})
    assert headline in found.headline
    assert any(text in finding.text for finding in found.findings)


def test_a_good_run_needs_nothing(folder):
    row = epoch_row(1, decision="stage 2 converged at epoch 4", overfitting=1.0, active_units=2)
    evaluation = {"noise": {"all": {"coverage_1": estimate(0.68)}}}
    found = verdict([row], evaluation)
    assert all(finding.is_good for finding in found.findings)
    assert "nothing that was measured needs attention" in found.headline
    assert verdict([], {}).findings == []

    distances = {"real": 7.0, "reconstructions": 57.0, "prior": 220.0, "mixture": 59.0}
    evaluation["samples"] = {
        name: {"frechet_distance": estimate(value)} for name, value in distances.items()
    }
    for mse, is_good, text in ((0.01, True, "20%"), (0.06, False, "linear"), (0.2, False, "codes")):
        errors = {"mse": mse, "mse_mean_example": 0.1, "mse_pca": 0.05}
        evaluation["likelihood"] = {name: estimate(value) for name, value in errors.items()}
        found = verdict([row], evaluation)
        assert all(finding.is_good for finding in found.findings) == is_good
        assert text in " ".join([found.headline, *(finding.text for finding in found.findings)])
        assert "more in the pictures" in " ".join(finding.text for finding in found.findings)


def test_bars_show_the_kl_of_each_unit_and_whether_it_is_active(folder):
    def change(evaluation):
        rates = [estimate(rate) for rate in (0.5, 2.0, *[0.0] * 10)]
        evaluation["latent"] |= {
            "rate_per_unit": rates,
            "unit_is_active": [True] * 2 + [False] * 10,
        }

    edit(folder, "evaluation.json", change)
    page = page_of(folder)
    bars = [span["style"] for span in page.all("span") if "style" in span]
    assert bars[:3] == ["width: 100.0%", "width: 25.0%", "width: 0.0%"]
    assert page.text.index("unit 2: 2.00 nats") < page.text.index("unit 1: 0.50 nats")
    assert page.text.count("nats, off") == 10
    assert term("rate_per_unit").title not in page.text


def test_a_continued_run_says_where_its_earlier_results_are(folder):
    record = {"command": [], "created": "2026-02-03T00:00:00+00:00", "earlier_results": "earlier-1"}
    record["epochs_before"] = {"stage_1_epochs": 10, "stage_2_epochs": 5}
    edit(folder, "config.json", lambda settings: settings.update(continued=[record]))
    text = page_of(folder).text
    assert "with stage_1_epochs=10, stage_2_epochs=5, are in its folder earlier-1" in text
