"""A run as one page: ``report.html``, self-contained, from the files of the run folder alone."""

import base64
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, tostring

from PIL import Image

from equipoise.glossary import Keys, format_figure, leaves, measure, term, warnings_of
from equipoise.run import Run
from equipoise.store import StoreError, read_json, whole_file

LARGEST_PNG = 350_000
"""Bytes from which a figure is embedded as JPEG: ten of them stay below 5 MB."""


class Section(NamedTuple):
    """A section of the report.

    Args:
        title: its heading.
        figures: file names without ending, and captions.
        command: what adds it to a run.
    """

    title: str
    figures: dict[str, str]
    command: str = "equipoise evaluate {run}"


SECTIONS = {
    "likelihood": Section(
        "Likelihood",
        {
            "training": "Training: the bound, its two terms and the learned noise variance over the epochs.",
            "variance-sweep": "ELBO of the networks as they are, for any one noise variance: highest at the squared "
            "error on these data. The learned variance is that of the training data, eq. (10); the gap is the overfit.",
        },
    ),
    "samples": Section(
        "Samples",
        {
            "samples-compared": "Test data beside samples: what the distances say in numbers.",
            "mixture": "Samples of the mixture that was fitted to the aggregate posterior, and where they are unsure.",
        },
    ),
    "latent": Section(
        "Latent space",
        {
            "latent": "Where the codes are, where the mixture puts them, and where the prior would have them."
        },
    ),
    "noise": Section(
        "Noise",
        {
            "reconstructions": "Reconstructions of test data: the better the predicted std, the more it looks "
            "like the error.",
            "reliability": "Predicted std against the error found (right on the diagonal), the probability integral "
            "transform (right if flat), and the share of errors within 1, 2 and 3 std, and within the intervals "
            "calibrated on held-out data (right at the marks).",
            "sparsification": "Error of what is left when the least certain dimensions are removed first.",
        },
    ),
    "outliers": Section(
        "Outliers",
        {
            "outliers": "Scores of the model's own test data and of other data: the less they overlap, the better."
        },
        "equipoise evaluate {run} --against DATA",
    ),
}

FIGURES_OF_TRAINING = ("training", "mixture", "reconstructions")
"""Drawn without an evaluation."""

MAIN_FIGURES: tuple[Keys, ...] = (
    ("likelihood", "elbo"),
    ("likelihood", "iwae_20_first_500"),
    ("likelihood", "bits_per_dim"),
    ("samples", "prior", "frechet_distance"),
    ("samples", "mixture", "frechet_distance"),
    ("latent", "kl_mixture_prior"),
    ("noise", "varying", "coverage_1"),
    ("outliers", "combined", "auroc"),
)

OF_MIXTURE = ("closer", "copied")
"""Measures that speak of the run's own mixture where no case is named."""

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #5a5a5a; --line: #d5d5d5; --page: #fff; --mark: #fff3d6 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --soft: #a8a8a8; --line: #444; --page: #16181b; --mark: #3d3215 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 }
main { max-width: 56rem; margin: 0 auto; padding: 1rem }
h1 { line-height: 1.2; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 1rem 0 }
a { color: inherit }
table { border-collapse: collapse; table-layout: fixed; width: 100%; margin: 1rem 0 }
caption { text-align: left; font-weight: bold; padding: .5rem 0 }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; overflow-wrap: anywhere }
thead, tbody, details tr { border-bottom: 1px solid var(--line) }
tbody th { font-weight: normal }
.case th { padding-left: .8rem }
td { font-variant-numeric: tabular-nums }
.value { width: 14rem }
.count { text-align: right; padding-right: 0; width: 4rem }
small, figcaption, td.count { color: var(--soft) }
small { display: block; line-height: 1.35; margin-top: -.2rem }
figure { margin: 1.5rem 0 }
figure div { overflow-x: auto; background: #fff; border-radius: 4px }
img { display: block; max-width: 100%; margin: 0 auto; padding: .5rem; box-sizing: border-box; height: auto }
aside { background: var(--mark); padding: .1rem 1rem; border-radius: 4px }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; padding: .6rem }
@media (max-width: 40rem) { .value { width: 8.6rem } }
"""


def write_report(folder: Path) -> Path:
    """Write ``report.html``: one file with all figures in it, which needs neither network nor scripts.

    Args:
        folder: of the run, finished training; what has not been evaluated is named as such.

    Returns:
        The file.

    Raises:
        StoreError: if the folder is not a run, or its evaluation is damaged.
    """
    run = Run(folder)
    settings = run.settings()
    evaluation = read_json(run.evaluation_file) if run.evaluation_file.is_file() else {}
    sections = [_mapping(evaluation).get(name, {}) for name in ("about", *SECTIONS)]
    if not all(isinstance(part, dict) for part in (evaluation, *sections)):
        raise StoreError(
            f"{run.evaluation_file} is damaged: write it anew with 'equipoise evaluate {run.folder}'."
        )
    about = evaluation.pop("about", {})
    page = _tag(
        "html",
        _tag(
            "head",
            _tag("meta", charset="utf-8"),
            _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            _tag("title", f"{run.folder.resolve().name}: {settings['data']['name']}"),
            _tag("style", STYLE),
        ),
        _tag("body", _tag("main", *_content(run, settings, evaluation, about))),
        lang="en",
    )
    path = run.folder / "report.html"
    text = "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _content(
    run: Run, settings: dict[str, Any], evaluation: dict[str, Any], about: dict[str, Any]
) -> Iterator[Element]:
    """Everything below ``main``, from top to bottom."""
    others = sorted(
        {path.stem for path in run.figures.glob("*.png")}.difference(
            *(s.figures for s in SECTIONS.values())
        )
    )
    sections = SECTIONS | {
        key: Section(term(key).title, {}) for key in evaluation if key not in SECTIONS
    }
    if others:
        sections["figures"] = Section(
            "Other figures", {stem: term(stem.replace("-", "_")).title for stem in others}
        )
    yield _tag("h1", f"Variational autoencoder trained on {settings['data']['name']}")
    yield _tag("p", _summary(run, settings))
    links = {key: section.title for key, section in sections.items()} | {
        "configuration": "Configuration"
    }
    yield _tag("nav", *(_tag("a", title, href=f"#{key}") for key, title in links.items()))
    if warnings := list(warnings_of(evaluation)):
        yield _tag("aside", *(_tag("p", text) for text in warnings), aria_label="Warnings")
    figures = dict(leaves(evaluation))
    if main_figures := {path: figures[path] for path in MAIN_FIGURES if path in figures}:
        yield _figure_table("Main results", main_figures)
    for key, section in sections.items():
        yield _section(
            run, key, section, {path: figure for path, figure in figures.items() if path[0] == key}
        )
    yield _tag("section", *_configuration(settings, about), id="configuration")


def _summary(run: Run, settings: dict[str, Any]) -> str:
    data, epochs = settings["data"], run.history()
    return (
        f"{settings['parameters']:,} parameters, trained on {data['n_train']:,} "
        f"examples of {data['source']}, {' x '.join(map(str, data['shape']))} each, with {data['n_validation']:,} for "
        f"validation and {data['n_test']:,} for the test: {len(epochs)} epochs, "
        f"{sum(row['seconds'] for row in epochs):,.0f} s, on {settings['created'][:10]}."
    )


def _section(run: Run, key: str, section: Section, figures: dict[Keys, Any]) -> Element:
    """A heading, the table if it was evaluated, and the pictures that are there."""
    parts = [_tag("h2", section.title)]
    if figures:
        parts.append(_figure_table(f"{section.title}: results", figures))
    elif key in SECTIONS:
        command = section.command.format(run=shlex.quote(str(run.folder)))
        parts.append(_tag("p", "Not evaluated yet. This adds it: ", _tag("code", command)))
    for stem, caption in section.figures.items():
        path = run.figures / f"{stem}.png"
        if path.is_file() and (figures or key not in SECTIONS or stem in FIGURES_OF_TRAINING):
            parts.append(_tag("figure", _picture(path, caption), _tag("figcaption", caption)))
    return _tag("section", *parts, id=key)


def _picture(path: Path, alt: str) -> Element:
    """An embedded picture; on a phone it stays legible and scrolls sideways, by keyboard too."""
    data, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if len(data) > LARGEST_PNG:
            buffer, kind = io.BytesIO(), "jpeg"
            image.convert("RGB").save(buffer, kind, quality=85)
            data = buffer.getvalue()
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    style = f"min-width: min(40rem, {0.6 * width:.0f}px)"
    img = _tag("img", src=source, alt=alt, width=str(width), height=str(height), style=style)
    return _tag("div", img, tabindex="0", role="group", aria_label=path.stem)


def _figure_table(caption: str, figures: dict[Keys, Any]) -> Element:
    """One group of rows for each measure, with its meaning said once and a row for each case."""
    groups: dict[str, dict[Keys, Any]] = {}
    for path, figure in figures.items():
        key, case = measure(path[1:] or path)
        groups.setdefault(key, {})[case] = figure
    head = _tag(
        "tr",
        _tag("th", "Measure", scope="col"),
        _tag(
            "th",
            "Value ± ",
            _tag("abbr", "s.e.", title="standard error"),
            scope="col",
            class_="value",
        ),
        _tag("th", "N", scope="col", class_="count"),
    )
    bodies = []
    for key, cases in groups.items():
        entry = term(key)
        better = f"{entry.better.capitalize()} is better." if entry.better else ""
        note = _tag(
            "tr", _tag("td", _tag("small", f"{entry.meaning} {better}".strip()), colspan="3")
        )
        if list(cases) == [()]:
            rows = [_row(entry.title, cases[()], entry.unit), note]
        else:
            rows = [_tag("tr", _tag("th", entry.title, scope="rowgroup", colspan="3")), note]
            for case, figure in cases.items():
                bare = term("mixture").title if key in OF_MIXTURE else "data as they are"
                name = ", ".join(term(part).title for part in case) or bare
                rows.append(_row(name, figure, entry.unit, "case"))
        bodies.append(_tag("tbody", *rows))
    return _tag("table", _tag("caption", caption), _tag("thead", head), *bodies)


def _row(name: str, figure: Any, unit: str, kind: str = "measure") -> Element:  # noqa: ANN401 (any JSON value)
    first = figure[0] if isinstance(figure, list) and figure else figure
    n = _mapping(first).get("n")
    return _tag(
        "tr",
        _tag("th", name, scope="row"),
        _tag("td", f"{format_figure(figure)} {unit}".strip()),
        _tag("td", "" if n is None else f"{n:,}", class_="count"),
        class_=kind,
    )


def _configuration(settings: dict[str, Any], about: dict[str, Any]) -> Iterator[Element]:
    """How to reproduce the run, and all that it was made with."""
    yield _tag("h2", "Configuration")
    evaluations = _mapping(about.get("sections")).values()
    for title, parts in {"Trained": [settings], "Evaluated": evaluations}.items():
        commands = dict.fromkeys(
            shlex.join(part["command"]) for part in parts if part.get("command")
        )
        if commands:
            yield _tag("p", f"{title} by")
            yield _tag("pre", _tag("code", "\n".join(commands)))
        elif parts:
            yield _tag("p", f"{title} from Python, without a command.")
    tables = {
        "Options": settings["options"],
        "Data": settings["data"],
        "Versions": settings["versions"],
    }
    tables["Training"] = {
        key: value for key, value in settings.items() if key.capitalize() not in tables
    }
    if about:
        tables["Evaluation"] = about
    for caption, values in tables.items():
        rows = [
            _tag("tr", _tag("th", ".".join(path), scope="row"), _tag("td", _plain(value)))
            for path, value in leaves(values)
        ]
        yield _tag("details", _tag("summary", caption), _tag("table", _tag("tbody", *rows)))


def _plain(value: Any) -> str:  # noqa: ANN401 (any JSON value)
    return shlex.join(map(str, value)) if isinstance(value, list) else str(value)


def _mapping(value: Any) -> dict[str, Any]:  # noqa: ANN401 (any JSON value)
    return value if isinstance(value, dict) else {}


def _tag(name: str, /, *children: Element | str, **attributes: str) -> Element:
    """An HTML element. Text is escaped when the page is written, so that nothing from a file can become markup."""
    element = Element(
        name, {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    )
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element
