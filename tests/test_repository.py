"""What the repository promises in several places is one promise."""

import re
import tomllib
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from equipoise.gaussian import standard_normal_log_prob
from equipoise.noise import GlobalNoise

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    Requirement(line)
    for line in (*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra))
]


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {pin.name.lower().replace("_", "-"): pin for pin in pins}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_versions_of_ci_are_among_those_that_are_promised(requirement):
    pin = constraints().get(requirement.name.lower().replace("_", "-"))
    if pin is None:
        pytest.skip("not installed in CI")
    (specifier,) = pin.specifier
    assert Version(specifier.version) in requirement.specifier


def test_the_workflow_tests_the_pythons_that_are_promised():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    lowest = min(map(Version, matrix["python"]))
    assert PROJECT["requires-python"] == f">={lowest}"
    assert {"python": str(lowest), "versions": "lowest"} in matrix["include"]
    assert f"python{lowest} -m venv" in (ROOT / ".ci" / "lowest").read_text()
    classified = {
        text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)
    }
    assert classified <= set(matrix["python"])


def test_there_is_one_list_of_the_checks_that_read_the_code():
    checks = ("ruff format", "mypy", "lint-imports", "pydoclint")
    lint = (ROOT / ".ci" / "lint").read_text()
    assert all(check in lint for check in checks)
    for path in (".ci/run", "justfile", ".pre-commit-config.yaml"):
        text = (ROOT / path).read_text()
        assert "bash .ci/lint" in text
        assert "lint-imports" not in text


def test_the_readme_command_is_what_ci_runs():
    readme = (ROOT / "README.md").read_text()
    install, test = re.findall(r"^```sh\n(.*?)^```", readme, re.S | re.M)[:2]
    assert "equipoise train" in install
    assert "pytest" in test
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_package_carries_its_marker_of_types():
    assert (resources.files("equipoise") / "py.typed").is_file()


def test_types_and_shapes_are_checked_while_the_tests_run():
    with pytest.raises(TypeError, match="newton"):
        GlobalNoise("newton")
    with pytest.raises(TypeError, match="batch latent"):
        standard_normal_log_prob(torch.zeros(3))
