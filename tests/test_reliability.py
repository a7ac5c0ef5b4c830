"""The page on reliability says what the JSON says, and its commands run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout


def test_the_tables_of_the_page_are_those_of_the_json():
    made = run("benchmarks/reliability.py").strip()
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [block for block in page.split("\n\n") if block.startswith("|")] == made.split("\n\n")


@pytest.mark.slow
def test_damage_at_its_smallest_size(tmp_path):
    run("benchmarks/damage.py", "--every", "400", "--out", tmp_path / "damage.json")
    content = json.loads((tmp_path / "damage.json").read_text())
    for row in content["files"].values():
        for part in row.values():
            assert part["noticed"] == part["tried"] > 0
    assert content["older_checkpoint"]["served"] == content["older_checkpoint"]["tried"] > 0
