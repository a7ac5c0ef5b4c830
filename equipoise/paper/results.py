"""Make the items: train, evaluate, write ``results/ITEM-BUDGET.json`` and the page that shows them."""

import json
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.paper import ITEMS
from equipoise.paper.protocol import Lab
from equipoise.provenance import data_record, provenance
from equipoise.store import read_json, whole_file, write_json

HEAD = """# Results: the paper reproduced

Written by `equipoise paper`, from the JSON in [results/](../results); edit neither by hand.

The comparison of Lin, Roberts, Trigoni and Clark (2019), arXiv 1909.03765, by [one protocol](evaluation.md). Methods
differ in objective and variance alone: networks, data, order of the examples, optimiser, rate, epochs and seed are
the same. ± is one standard error over test examples or samples, of one training run each: differences between
trainings with other seeds are not in it. The paper's figures stand beside ours for orientation; its networks,
preprocessing and training are not published, and its Fréchet distances are in Inception's features.
"""
NOTES = "results-notes.md"
"""A hand-written page beside the results, included where it is there: what differs from the paper, and why."""


def make_items(lab: Lab, names: Sequence[str], out: Path) -> list[Path]:
    """Make items, training what they need.

    Args:
        lab: budget and places.
        names: some of :data:`equipoise.paper.ITEMS`.
        out: folder of the JSON.

    Returns:
        The JSON files.
    """
    lab.prepare(spec for name in names for spec in ITEMS[name].specs(lab))
    files = []
    for name in names:
        item, started = ITEMS[name], time.perf_counter()
        found = item.compute(lab)
        specs = [spec for spec in item.specs(lab) if spec.data in lab.sets]
        seconds = {spec.name: _seconds(lab, spec) for spec in specs}
        about = provenance() | {
            "command": f"equipoise paper {name} --budget {lab.budget}"
            + (f" --epochs {lab.epochs}" if lab.epochs else ""),
            "item": name,
            "budget": lab.budget,
            "epochs": {
                data: lab.epochs_of(data) for data in dict.fromkeys(spec.data for spec in specs)
            },
            "seed": lab.seed,
            "features": lab.features,
            "data": {
                data: data_record(lab.data(data))
                for data in dict.fromkeys(spec.data for spec in specs)
            },
            "options": {spec.name: lab.config(spec).as_dict() for spec in specs},
            "seconds": {
                "training": round(sum(part[0] for part in seconds.values()), 1),
                "evaluation": round(sum(part[1] for part in seconds.values()), 1),
                "item": round(time.perf_counter() - started, 1),
                "models": {spec: list(parts) for spec, parts in seconds.items()},
            },
        }
        files.append(out / f"{name}-{lab.budget}.json")
        write_json(files[-1], about | found)
        lab.message(f"{name}: {files[-1]}")
    return files


def _seconds(lab: Lab, spec: Any) -> tuple[float, float]:  # noqa: ANN401 (a Spec)
    """Seconds of training and evaluation of a model, as its run folder says."""
    sections = lab.evaluation(spec)["about"]["sections"].values()
    training = sum(row["seconds"] for row in lab.run(spec).history())
    return round(training, 1), round(sum(section["seconds"] for section in sections), 1)


def write_page(out: Path, page: Path, images: Path) -> Path:
    """Write the page of results from all JSON that there is.

    Args:
        out: folder of the JSON.
        page: the file.
        images: folder of the pictures.

    Returns:
        The file.
    """
    parts = [HEAD]
    notes = page.parent / NOTES
    if notes.is_file():
        parts.append(notes.read_text(encoding="utf-8"))
    for name, item in ITEMS.items():
        by_budget = {
            budget: _read(out / f"{name}-{budget}.json") for budget in ("full", "small", "tiny")
        }
        shown = {budget: found for budget, found in by_budget.items() if found}
        if shown.keys() - {"tiny"}:
            shown.pop("tiny", None)
        if not shown:
            continue
        parts.append(f"## {item.TITLE}\n\n{_wrapped(item.TEXT)}\n")
        pictures = sorted(images.glob(f"{name}.png")) + sorted(images.glob(f"{name}-*.png"))
        parts += [
            f"![{item.TITLE}]({picture.relative_to(page.parent).as_posix()})\n"
            for picture in pictures
        ]
        for budget, found in shown.items():
            link = f"[{name}-{budget}.json](../{out.name}/{name}-{budget}.json)"
            parts.append(f"{_wrapped(f'{_origin(found)} ({link}):')}\n\n{item.markdown(found)}\n")
    with whole_file(page) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return page


def _origin(found: dict[str, Any]) -> str:
    """Command, machine, versions and time of an item, in a sentence."""
    seconds = found["seconds"]
    trained = ", ".join(
        f"{found['data'][data]['name']} {epochs}" for data, epochs in found["epochs"].items()
    )
    return (
        f"`{found['command']}`, seed {found['seed']}, epochs: {trained}; {found['machine']}, "
        f"torch {found['versions']['torch']}, {found['date']}; {seconds['training'] / 60:.0f} min of training and "
        f"{(seconds['evaluation'] + seconds['item']) / 60:.0f} of evaluation, models that tables share included"
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = read_json(path)
    return found


def summary(files: Sequence[Path]) -> str:
    """The items' tables as text, for the terminal.

    Args:
        files: JSON that :func:`make_items` wrote.

    Returns:
        Markdown.
    """
    parts = []
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        item = ITEMS[found["item"]]
        parts.append(f"{item.TITLE}\n\n{item.markdown(found)}")
    return "\n\n".join(parts)
