"""The long fuzz: ``python -m tests.fuzz --cases 10000``; one case again with ``--case``."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from equipoise.provenance import provenance
from tests.fuzz.limits import Outcome, try_all
from tests.fuzz.readers import OWN_READERS, READERS, SLOW, attempt, prepare


def main() -> None:
    """Try the cases that were asked for, and print a table.

    Raises:
        SystemExit: With the code 1 if there was a fault.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--own", action="store_true", help="only readers of equipoise's own files")
    parser.add_argument("--cases", type=int, default=1000, help="cases in all, if none is slow")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path, help="file for the table")
    parser.add_argument("--case", help="one case again, as READER:SEED, without limits")
    parser.add_argument("--keep", type=Path, help="where the files of --case stay")
    options = parser.parse_args()

    names = OWN_READERS if options.own else options.readers
    if options.case:
        names = [options.case.rpartition(":")[0]]

    valid = Path(tempfile.mkdtemp(prefix="fuzz-valid-"))
    try:
        prepare(valid, names)
        if options.case:
            folder = options.keep or valid / "case"
            print(*attempt(valid, names[0], int(options.case.rpartition(":")[2]), folder))
            return
        per_reader = max(1, -(-options.cases // len(names)))
        counts = {name: max(3, per_reader // SLOW.get(name, 1)) for name in names}
        cases = [(name, options.seed + i) for name in names for i in range(counts[name])]
        outcomes = _try(valid, cases)
    finally:
        shutil.rmtree(valid, ignore_errors=True)
    sys.exit(int(_print_table(names, outcomes, options)))


def _try(valid: Path, cases: list[tuple[str, int]]) -> list[Outcome]:
    """Try cases, and say how far that is."""
    outcomes, started, said = [], time.monotonic(), 0.0
    for outcome in try_all(cases, partial(attempt, valid)):
        outcomes.append(outcome)
        if outcome.verdict == "fault":
            print(f"FAULT {outcome.reader}:{outcome.seed} {outcome.detail}", flush=True)
        seconds = time.monotonic() - started
        if seconds - said > 10:
            said = seconds
            print(f"{len(outcomes)} of {len(cases)} cases, {seconds:.0f} s", flush=True)
    return outcomes


def _print_table(names: list[str], outcomes: list[Outcome], options: argparse.Namespace) -> bool:
    """Print what became of the cases of each reader; True if there was a fault."""
    counts: Counter[tuple[str, str]] = Counter()
    seconds: Counter[str] = Counter()
    for outcome in outcomes:
        seconds[outcome.reader] += outcome.seconds
        counts[outcome.reader, outcome.verdict] += 1

    columns = ("read", "refused", "fault")
    print("reader          cases    " + "".join(f"{column:>9}" for column in columns) + "  seconds")
    for name in names:
        figures = [counts[name, column] for column in columns]
        row = "".join(f"{figure:9}" for figure in figures)
        print(f"{name:15} {sum(figures):6}    {row}{seconds[name]:9.1f}")
    totals = [sum(counts[name, column] for name in names) for column in columns]
    print(f"{'all':15} {sum(totals):6}    " + "".join(f"{total:9}" for total in totals))

    if options.json:
        rows = [
            {"reader": name, "cases": sum(counts[name, column] for column in columns)}
            | {column: counts[name, column] for column in columns}
            for name in names
        ]
        command = f"python -m tests.fuzz --cases {options.cases} --seed {options.seed}"
        content = {**provenance(), "command": command, "rows": rows}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return totals[-1] > 0


if __name__ == "__main__":
    main()
