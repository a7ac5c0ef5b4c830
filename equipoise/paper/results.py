"""Make the items of the comparison, and the page that shows them.

To make an item is to train and evaluate its models, and to write ``results/ITEM-BUDGET.json``.
"""

import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from equipoise.config import ConfigError
from equipoise.files import StoreError, whole_file, write_json
from equipoise.glossary import leaves
from equipoise.paper import ITEMS
from equipoise.paper.protocol import Lab, Spec
from equipoise.paper.seeds import has_seeds, over_seeds
from equipoise.provenance import data_record, provenance
from equipoise.records import FORMAT, PaperResults, check_figures, read_record

HEAD = """# Results: the paper reproduced

Written by `equipoise paper`, from the JSON in [results/](../results). Do not edit either by hand.

This is the comparison of Lin, Roberts, Trigoni and Clark (2019), arXiv 1909.03765, by
[one protocol](evaluation.md). Methods differ only in objective and variance: networks, data, order
of the examples, optimiser, rate, epochs and seed are the same. ± is one standard error over test
examples or samples. Of a table with one seed, it does not have the differences between trainings
with other seeds; a table with several seeds says so, and has both errors. The paper's figures stand
beside ours for orientation: its networks, preprocessing and training are not published, and its
Fréchet distances are in Inception's features.
"""
NOTES = "results-notes.md"
"""A page beside the results that is written by hand, and included if it exists.

It says what differs from the paper, and why.
"""
ABOUT_SEEDS = (
    "Means over {seeds}, ± the standard error over seeds, ± that over test examples or samples. A "
    "single ± is over seeds. Two figures *differ* if their difference is larger than two of both "
    "errors combined, 2 √(s² + a² + b²), where s is the standard error over seeds of the "
    "difference at the same seed, and a and b are the errors of both figures over examples. "
    "**Bold** in a column: the best figure, and all that do not differ from it. Pictures of images "
    "show seed {first}; error bars are over seeds."
)
"""What a table of several seeds needs to be read."""
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
            content = read_results(file)
        except StoreError:
            content = {}
        settings = _settings(lab, name)
        differing = [key for key, value in settings.items() if content.get(key) != value]
        if set(content.get("seeds", [])) <= set(lab.seeds):  # nothing of the file would be lost
            differing = [key for key in differing if key != "seeds"]
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
        "seeds": list(lab.seeds),
        "features": lab.features,
    }


def read_results(path: Path) -> dict[str, Any]:
    """Read the JSON of an item.

    Args:
        path: A file that :func:`make_items` wrote, of this version or of one with a single seed.

    Returns:
        Its content, with the list ``seeds``.

    Raises:
        StoreError: If the file is missing or damaged.
    """
    content: dict[str, Any] = dict(read_record(path, PaperResults))
    check_figures(content["rows"], f"{path}: rows")

    if "seeds" not in content:
        if "seed" not in content:
            raise StoreError(f"{path} does not say its seeds; it was damaged, so make it anew.")
        content["seeds"] = [content.pop("seed")]

    for keys, figure in leaves(content["rows"]):
        if has_seeds(figure) and len(figure["of_seeds"]) != len(content["seeds"]):
            where = ".".join(("rows", *keys))
            raise StoreError(
                f"{path}: {where} does not have a value for each of {len(content['seeds'])} seeds; "
                "the file was damaged or altered, so make it anew."
            )

    return content


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
        item = ITEMS[name]
        content = over_seeds([item.compute(lab.of_seed(seed)) for seed in lab.seeds])
        if hasattr(item, "draw"):
            item.draw(lab, content)
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
    labs = [lab.of_seed(seed) for seed in lab.seeds]
    models = {one.run(spec).folder.name: (one, spec) for one in labs for spec in specs}
    seconds = {name: _seconds(*model) for name, model in models.items()}

    command = f"equipoise paper {name} --budget {lab.budget}"
    if lab.epochs:
        command += f" --epochs {lab.epochs}"
    command += _seeds_option(lab.seeds)

    return provenance() | {
        "format": FORMAT,
        "command": command,
        "item": name,
        **_settings(lab, name),
        "data": {data: data_record(lab.data(data)) for data in sets},
        "options": {name: one.config(spec).as_dict() for name, (one, spec) in models.items()},
        "seconds": {
            "training": round(sum(training for training, _ in seconds.values()), 1),
            "evaluation": round(sum(evaluation for _, evaluation in seconds.values()), 1),
            "item": round(time.perf_counter() - started, 1),
            "models": {model: list(parts) for model, parts in seconds.items()},
        },
    }


def _seeds_option(seeds: tuple[int, ...]) -> str:
    """What a command needs for these seeds, besides the default."""
    if seeds == (0,):
        return ""
    if len(seeds) == 1:
        return f" --seed {seeds[0]}"

    is_range = seeds == tuple(range(len(seeds)))
    return f" --seeds {len(seeds) if is_range else ','.join(map(str, seeds))}"


def _seconds(lab: Lab, spec: Spec) -> tuple[float, float]:
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
            parts.append(f"{origin}\n\n{_laid_out(item, content)}\n")

    with whole_file(page) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")

    return page


def _contents(out: Path, name: str) -> dict[str, dict[str, Any]]:
    """Read the JSON of an item, by budget. The tiny one counts only if there is no other."""
    contents = {}
    for budget in ("full", "small", "tiny"):
        path = out / f"{name}-{budget}.json"
        if path.is_file():
            contents[budget] = read_results(path)

    if contents.keys() - {"tiny"}:
        contents.pop("tiny", None)

    return contents


def _laid_out(item: ModuleType, content: dict[str, Any]) -> str:
    """The table of an item; with several seeds, how to read it."""
    table: str = item.markdown(content)
    seeds = content["seeds"]
    if len(seeds) == 1:
        return table

    note = ABOUT_SEEDS.format(seeds=_named(seeds), first=seeds[0])
    return f"{table}\n\n{_wrapped(note)}"


def _named(seeds: Sequence[int]) -> str:
    """Name the seeds, as in "seeds 0, 1 and 2"."""
    *others, last = map(str, seeds)
    return f"seeds {', '.join(others)} and {last}" if others else f"seed {last}"


def _origin(content: dict[str, Any]) -> str:
    """Command, machine, versions and time of an item, in a sentence."""
    epochs = ", ".join(
        f"{content['data'][data]['name']} {n}" for data, n in content["epochs"].items()
    )
    seconds = content["seconds"]
    training = seconds["training"] / 60
    evaluation = (seconds["evaluation"] + seconds["item"]) / 60

    return (
        f"`{content['command']}`, {_named(content['seeds'])}, epochs: {epochs}; "
        f"{content['machine']}, "
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
        content = read_results(file)
        item = ITEMS[content["item"]]
        parts.append(f"{item.TITLE}\n\n{_laid_out(item, content)}")

    return "\n\n".join(parts)
