"""The tables of docs/reliability.md, from the JSON that their commands have written.

python benchmarks/reliability.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"

FAULTS = {
    "before": "killed before a file operation",
    "torn": "killed after it, the file cut in half",
    "term": "SIGTERM at a file operation",
    "unsynced": "loss of power: what was not flushed is gone",
    "calls": "a call fails (full disk, I/O error, too many files, no permission)",
    "limit": "a largest size of a file",
    "full": "a full file system",
}


def read(name):
    """Read a file of results."""
    return json.loads((RESULTS / f"reliability-{name}.json").read_text())


def damage():
    """Flipped bits and truncations of each kind of file."""
    content = read("damage")
    rows = []
    for kind, row in content["files"].items():
        flips, cuts = row["flips"], row["truncations"]
        counts = [f"{part['noticed']:,} of {part['tried']:,}" for part in (flips, cuts)]
        rows.append([kind, *counts])
    older = content["older_checkpoint"]
    rows.append(["older checkpoint serves", f"{older['served']:,} of {older['tried']:,}", ""])
    return table(["file", "flipped bits noticed", "truncations noticed"], rows)


def chaos():
    """Kills and failing calls, over all jobs."""
    totals = {}
    for row in read("chaos")["rows"]:
        tried, survived = totals.get(row["fault"], (0, 0))
        totals[row["fault"]] = (tried + row["tried"], survived + row["survived"])
    rows = [
        [FAULTS[fault], f"{tried:,}", f"{survived:,}"]
        for fault, (tried, survived) in totals.items()
    ]
    return table(["fault", "tried", "survived"], rows)


def fuzz():
    """Damaged files and lies, for each reader."""
    rows = [
        [row["reader"], *(f"{row[key]:,}" for key in ("cases", "read", "refused", "fault"))]
        for row in read("fuzz")["rows"]
    ]
    return table(["reader", "cases", "read", "refused", "faults"], rows)


def tests():
    """Faults that are tried by tests, each of which asserts that all are survived."""
    rows = [
        [row["fault"], f"{row['tried']:,}", f"{row['survived']:,}", f"`{row['command']}`"]
        for row in read("tests")["rows"]
    ]
    return table(["fault", "tried", "survived", "command"], rows)


def table(head, rows):
    """Lay rows out in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print("\n\n".join(make() for make in (damage, chaos, fuzz, tests)))
