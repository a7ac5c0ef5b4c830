"""What the documents say is so: names resolve, blocks run, recipes parse."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
    assert len(README.splitlines()) <= 160


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
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(
            r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")
        ):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_figures_in_the_documents_come_with_their_json():
    """Every JSON that a document names exists and says how it was made."""
    import json

    named = {
        name
        for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for name in re.findall(r"results/[\w.-]+\.json", document.read_text(encoding="utf-8"))
    }
    assert named
    for name in named:
        content = json.loads((ROOT / name).read_text(encoding="utf-8"))
        assert {"command", "date", "versions"} <= content.keys(), name


def test_the_table_of_the_readme_is_that_of_the_json():
    """No figure in it was typed by hand."""
    names = [f"results/evaluation-{name}.json" for name in ("mnist", "fashion-mnist")]
    made = subprocess.run(
        [sys.executable, "benchmarks/evaluation.py", "table", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.strip() in README


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
