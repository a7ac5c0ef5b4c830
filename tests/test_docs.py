"""What the documents say is so: names resolve, blocks run, recipes parse."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.paper.markdown import cell
from equipoise.paper.protocol import TITLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SUMMARY = (ROOT / "docs" / "results-summary.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SETS = ("mnist", "fashion-mnist", "celeba")


def resolve(name):
    """Import the longest prefix that is a module, then follow attributes."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


EQUATIONS = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
PROTOCOL = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(equipoise\.[\w.]+)`", EQUATIONS + PROTOCOL)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", EQUATIONS)))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_equations_and_protocol_is_in_the_code(name):
    assert resolve(name) is not None


@pytest.mark.parametrize("name", TESTS)
def test_every_check_in_the_equations_is_a_test(name):
    file, _, function = name.partition("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    assert f"def {function or 'test_'}" in source


def test_every_equation_of_the_paper_has_a_row():
    assert len(NAMES) > 10
    for number in range(1, 14):
        ranges = re.findall(r"^\| \((\d+)\)(?:-\((\d+)\))?", EQUATIONS, re.MULTILINE)
        assert any(int(first) <= number <= int(last or first) for first, last in ranges), number


def test_the_readme_is_short():
    assert len(README.split()) <= 550


def test_the_python_in_readme_and_choices_runs(tmp_path):
    text = README + (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 1
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_links_within_the_repository_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        for target in re.findall(
            r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")
        ):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_figures_in_the_documents_come_with_their_json():
    """Every JSON that a document names exists and says how it was made."""
    named = {
        name
        for document in (ROOT / "README.md", *PAGES)
        for name in re.findall(r"results/[\w.-]+\.json", document.read_text(encoding="utf-8"))
    }
    assert named
    for name in named:
        content = json.loads((ROOT / name).read_text(encoding="utf-8"))
        assert {"command", "date", "versions"} <= content.keys(), name


def read_json(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def rows_of(page, title):
    """The cells of the rows whose first cell contains a title."""
    text = page.replace("\u00a0", " ")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[part.strip() for part in line.strip("|").split(" | ")] for line in lines]
    return [row for row in rows if title in row[0]]


def test_the_table_of_the_readme_is_that_of_the_json():
    """No figure in it was typed by hand."""
    distances = read_json("table-2-full")["rows"]
    for method in ("learned", "vae", "wae", "rae"):
        found = [distances[name][method]["mixture"]["frechet_distance"] for name in SETS]
        cells = [cell(figure).replace("\u00a0", " ") for figure in found]
        assert rows_of(README, TITLES[method]) == [[TITLES[method], *cells]]


def test_the_comparison_in_the_summary_is_that_of_the_json():
    distances = read_json("table-2-full")["rows"]
    likelihoods = read_json("table-3-full")["rows"]["mnist"]
    for method in ("learned", "vae", "beta-vae", "dip-vae", "wae", "rae"):
        cells = []
        for name in SETS:
            prior, mixture = (
                distances[name][method][source]["frechet_distance"]
                for source in ("prior", "mixture")
            )
            cells.append(
                f"{prior['value']:.0f} / {mixture['value']:.0f} ± {mixture['standard_error']:.0f}"
            )
        if method in likelihoods:
            cells.append(f"{likelihoods[method]['iwae_20_first_500']['value']:.0f}")
        else:
            cells.append("–")  # noqa: RUF001
        assert rows_of(SUMMARY, TITLES[method]) == [[TITLES[method], *cells]]


@pytest.mark.parametrize(("name", "title"), [("mnist", "MNIST"), ("celeba", "CelebA")])
def test_the_gain_by_correlation_in_the_guide_is_that_of_the_json(name, title):
    guide = (ROOT / "docs" / "guides" / "kinds-of-noise.md").read_text(encoding="utf-8")
    for row, figures in read_json("benchmark-correlated-noise")[name]["rows"].items():
        log_likelihood, elbo, bits = (
            figures[key] for key in ("log_likelihood", "elbo", "bits_per_dim_first_200")
        )
        expected = [
            *(f"{e['value']:.0f} ± {e['standard_error']:.0f}" for e in (log_likelihood, elbo)),
            f"{bits['value']:.2f} ± {bits['standard_error']:.2f}",
        ]
        if not row.endswith("auto"):
            assert rows_of(guide, f"{title}, {row}") == [[f"{title}, {row}", *expected]]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "mnist-2d", "celeba"])
def test_the_main_job_in_the_summary_is_that_of_the_json(name):
    content = read_json(f"main-job-{name}")
    options = content["options"]
    stage_1 = content["stages"][0]
    likelihood = content["evaluation"]["likelihood"]
    elbo = likelihood["elbo"]
    prior, mixture = (likelihood[key] for key in ("iwae_20_first_500", "iwae_20_first_500_mixture"))

    expected = [
        str(options["latent_dim"]),
        f"{options['stage_1_epochs']} + {options['stage_2_epochs']}",
        f"{stage_1['optimal_noise_var']:.5f}".removeprefix("0"),
        f"{likelihood['mse']['value']:.4f}".removeprefix("0"),
        f"{stage_1['test_elbo']:.0f} → {elbo['value']:.0f} ± {elbo['standard_error']:.0f}",
        f"{prior['value']:.0f} / {mixture['value']:.0f} ± {mixture['standard_error']:.0f}",
    ]
    ((_, *cells),) = rows_of(SUMMARY, f"results/main-job-{name}.json")
    assert cells == expected


def test_the_evaluation_in_the_summary_is_that_of_the_json():
    names = [f"results/evaluation-{name}.json" for name in ("mnist", "fashion-mnist")]
    made = subprocess.run(
        [sys.executable, "benchmarks/evaluation.py", "table", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.strip() in SUMMARY


def test_layers():
    """Imports go down only, as pyproject.toml says."""
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
