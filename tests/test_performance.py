"""The page on performance says what the JSON says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_of_the_page_are_those_of_the_json():
    """No figure in them was typed by hand, and there is no other table."""
    command = [sys.executable, "benchmarks/tables.py"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    tables = [block for block in page.split("\n\n") if block.startswith("|")]
    assert tables == made.strip().split("\n\n")
