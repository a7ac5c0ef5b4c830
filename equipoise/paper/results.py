"""Make the items of the comparison, and the page that shows them.

To make an item is to train and evaluate its models, and to write ``results/ITEM-BUDGET.json``.
"""

import json
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.config import ConfigError
from equipoise.files import StoreError, whole_file, write_json
from equipoise.paper import ITEMS
from equipoise.paper.protocol import Lab
from equipoise.provenance import data_record, provenance
from equipoise.records import JsonObject, read_record

HEAD = """# Results: the paper reproduced

Written by `equipoise paper`, from the JSON in [results/](../results). Do not edit either by hand.

This is the comparison of Lin, Roberts, Trigoni and Clark (2019), arXiv 1909.03765, by
[one protocol](evaluation.md). Methods differ only in objective and variance: networks, data, order
of the examples, optimiser, rate, epochs and seed are the same. ± is one standard error over test
examples or samples of one training run. Differences between trainings with other seeds are not in
it. The paper's figures stand beside ours for orientation: its networks, preprocessing and training
are not published, and its Fréchet distances are in Inception's features.
"""
NOTES = "results-notes.md"
"""A page beside the results that is written by hand, and included if it exists.

It says what differs from the paper, and why.
"""
WIDTH = 120
"""Width of the lines of the page, in characters."""


def refuse_to_replace(lab: Lab, names: Sequence[str], out: Path, page: Path) -> None:
    """Refuse to replace figures of other settings, and files that are not results.

    Args:
        lab: The budget, and the places of data and runs.
        names: Some of the names in :data:`equipoise.paper.ITEMS`.
        out: The folder of the JSON.
        page: The file of the page.

    Raises:
        ConfigError: with each of them.
    """
    problems = []
    for name in names:
        file = out / f"{name}-{lab.budget}.json"
        if not file.exists():
            continue

        try:
            content = dict(read_record(file, JsonObject))
        except StoreError:
            content = {}
        settings = _settings(lab, name)
        differing = [key for key, value in settings.items() if content.get(key) != value]
        if content.get("item") != name:
            problems.append(f"{file} is there, and holds no figures of {name}")
        elif differing:
            problems.append(f"{file} holds figures with other {' and '.join(differing)}")

    if page.exists() and not page.read_bytes().startswith(HEAD.splitlines()[0].encode()):
        problems.append(f"{page} is there, and is no page of results")
    if problems:
        advice = "choose another --out and --page, or give --force to replace it"
        raise ConfigError([f"{problem}; {advice}" for problem in problems])


def _settings(lab: Lab, name: str) -> dict[str, Any]:
    """What distinguishes the figures of an item from those of another call."""
    specs = [spec for spec in ITEMS[name].specs(lab) if spec.data in lab.sets]
    sets = list(dict.fromkeys(spec.data for spec in specs))
    return {
        "budget": lab.budget,
        "epochs": {data: lab.epochs_of(data) for data in sets},
        "seed": lab.seed,
        "features": lab.features,
    }


def make_items(lab: Lab, names: Sequence[str], out: Path) -> list[Path]:
    """Make items, and train the models that they need.

    Args:
        lab: The budget, and the places of data and runs.
        names: Some of the names in :data:`equipoise.paper.ITEMS`.
        out: The folder of the JSON.

    Returns:
        The JSON files.
    """
    lab.prepare(spec for name in names for spec in ITEMS[name].specs(lab))

    files = []
    for name in names:
        started = time.perf_counter()
        content = ITEMS[name].compute(lab)
        about = _about(lab, name, started)

        file = out / f"{name}-{lab.budget}.json"
        write_json(file, about | content)
        files.append(file)
        lab.message(f"{name}: {file}")

    return files


def _about(lab: Lab, name: str, started: float) -> dict[str, Any]:
    """Where an item comes from: its command, data, options and seconds."""
    specs = [spec for spec in ITEMS[name].specs(lab) if spec.data in lab.sets]
    sets = list(dict.fromkeys(spec.data for spec in specs))
    seconds = {spec.name: _seconds(lab, spec) for spec in specs}

    command = f"equipoise paper {name} --budget {lab.budget}"
    if lab.epochs:
        command += f" --epochs {lab.epochs}"

    return provenance() | {
        "command": command,
        "item": name,
        **_settings(lab, name),
        "data": {data: data_record(lab.data(data)) for data in sets},
        "options": {spec.name: lab.config(spec).as_dict() for spec in specs},
        "seconds": {
            "training": round(sum(training for training, _ in seconds.values()), 1),
            "evaluation": round(sum(evaluation for _, evaluation in seconds.values()), 1),
            "item": round(time.perf_counter() - started, 1),
            "models": {model: list(parts) for model, parts in seconds.items()},
        },
    }


def _seconds(lab: Lab, spec: Any) -> tuple[float, float]:  # noqa: ANN401 (a Spec)
    """Seconds of a model's training and evaluation, as its run folder says."""
    sections = lab.evaluation(spec)["about"]["sections"].values()
    training = sum(row["seconds"] for row in lab.run(spec).history())
    evaluation = sum(section["seconds"] for section in sections)
    return round(training, 1), round(evaluation, 1)


def write_page(out: Path, page: Path, images: Path) -> Path:
    """Write the page of results from all JSON files that exist.

    Args:
        out: The folder of the JSON.
        page: The file of the page.
        images: The folder of the pictures.

    Returns:
        The file of the page.
    """
    parts = [HEAD]
    notes = page.parent / NOTES
    if notes.is_file():
        parts.append(notes.read_text(encoding="utf-8"))

    for name, item in ITEMS.items():
        contents = _contents(out, name)
        if not contents:
            continue

        parts.append(f"## {item.TITLE}\n\n{_wrapped(item.TEXT)}\n")

        for picture in sorted(images.glob(f"{name}.png")) + sorted(images.glob(f"{name}-*.png")):
            address = picture.relative_to(page.parent).as_posix()
            parts.append(f"![{item.TITLE}]({address})\n")

        for budget, content in contents.items():
            link = f"[{name}-{budget}.json](../{out.name}/{name}-{budget}.json)"
            origin = _wrapped(f"{_origin(content)} ({link}):")
            parts.append(f"{origin}\n\n{item.markdown(content)}\n")

    with whole_file(page) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")

    return page


def _contents(out: Path, name: str) -> dict[str, dict[str, Any]]:
    """Read the JSON of an item, by budget. The tiny one counts only if there is no other."""
    contents = {}
    for budget in ("full", "small", "tiny"):
        path = out / f"{name}-{budget}.json"
        if path.is_file():
            contents[budget] = dict(read_record(path, JsonObject))

    if contents.keys() - {"tiny"}:
        contents.pop("tiny", None)

    return contents


def _origin(content: dict[str, Any]) -> str:
    """Command, machine, versions and time of an item, in a sentence."""
    epochs = ", ".join(
        f"{content['data'][data]['name']} {n}" for data, n in content["epochs"].items()
    )
    seconds = content["seconds"]
    training = seconds["training"] / 60
    evaluation = (seconds["evaluation"] + seconds["item"]) / 60

    return (
        f"`{content['command']}`, seed {content['seed']}, epochs: {epochs}; {content['machine']}, "
        f"torch {content['versions']['torch']}, {content['date']}; {training:.0f} min of training "
        f"and {evaluation:.0f} of evaluation, including models that several tables share"
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def summary(files: Sequence[Path]) -> str:
    """The items' tables as text, for the terminal.

    Args:
        files: JSON files that :func:`make_items` wrote.

    Returns:
        Markdown.
    """
    parts = []
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        item = ITEMS[content["item"]]
        parts.append(f"{item.TITLE}\n\n{item.markdown(content)}")

    return "\n\n".join(parts)
