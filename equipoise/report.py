"""Writes ``report.html``, a self-contained page about one run.

The page is made from the files of the run folder only.
"""

import base64
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, tostring

from equipoise.data.gate import open_image
from equipoise.files import StoreError, whole_file
from equipoise.glossary import CURVES, Keys, format_figure, leaves, measure, term, warnings_of
from equipoise.records import Settings
from equipoise.run import Run
from equipoise.text import visible
from equipoise.verdict import Verdict, verdict

LARGEST_PNG = 350_000
"""Largest size of a figure that is embedded as PNG, bytes.

Larger figures are embedded as JPEG. Ten figures then stay below 5 MB.
"""
LISTED_UNITS = 8
"""Most latent units whose KL are also listed in the table; of more, there are the bars alone."""


class Section(NamedTuple):
    """A section of the report.

    Args:
        title: heading of the section.
        figures: caption of each figure, by file name without ending.
        command: command that adds the section to a run.
    """

    title: str
    figures: dict[str, str]
    command: str = "equipoise evaluate {run}"


SECTIONS = {
    "likelihood": Section(
        "Likelihood",
        {
            "training": "Training: the ELBO, its two terms and the learned noise variance over the "
            "epochs.",
            "variance-sweep": "ELBO for a range of noise variances, with the networks unchanged. "
            "It is highest where the variance equals the squared error on these data. The learned "
            "variance is eq. (10) over the validation examples, or over those of the training with "
            "variance_from=training; then the gap between the two shows the overfitting.",
        },
    ),
    "samples": Section(
        "Samples",
        {
            "samples-compared": "Test data and samples, which the distances in the table compare.",
            "mixture": "Samples of the mixture that was fitted to the aggregate posterior, and "
            "their predicted std.",
        },
    ),
    "latent": Section(
        "Latent space",
        {"latent": "Where the codes are, and the densities of the mixture and of the prior."},
    ),
    "noise": Section(
        "Noise",
        {
            "reconstructions": "Reconstructions of test data. A good map of the predicted std "
            "looks like the map of the error.",
            "reliability": "Predicted std against observed error (right on the diagonal), the "
            "probability integral transform (right if flat), and the share of errors within 1, 2 "
            "and 3 std and within the intervals that were calibrated on held-out data (right at "
            "the marks). Off the bounds are the values whose mean and datum are not both on the "
            "same bound of the scale.",
            "spectrum": "Variance of the standardised errors by the frequency of their pattern. It "
            "is one for errors that are independent of each other, and after whitening if their "
            "correlation was estimated well.",
            "sparsification": "Error of the remaining values when the least certain ones are "
            "removed first.",
        },
    ),
    "outliers": Section(
        "Outliers",
        {
            "outliers": "Scores of the model's own test data and of other data. A good score "
            "separates the two."
        },
        "equipoise evaluate {run} --against DATA",
    ),
}

FIGURES_OF_TRAINING = ("training", "mixture", "reconstructions")
"""Figures that training draws, which exist without an evaluation."""

MAIN_FIGURES: tuple[Keys, ...] = (
    ("likelihood", "elbo"),
    ("likelihood", "iwae_20_first_500"),
    ("likelihood", "bits_per_dim"),
    ("likelihood", "bits_per_dim_dequantised"),
    ("samples", "prior", "frechet_distance"),
    ("samples", "mixture", "frechet_distance"),
    ("latent", "kl_mixture_prior"),
    ("noise", "varying", "coverage_1"),
    ("noise", "off_bounds", "coverage_1"),
    ("outliers", "combined", "auroc"),
)
"""Figures of the first table, the main results."""

OF_MIXTURE = ("closer", "copied")
"""Measures of the run's own mixture if no other case is named."""

STYLE = """
:root {
  color-scheme: light dark;
  --text: #1a1a1a; --soft: #5a5a5a; --line: #d5d5d5; --page: #fff; --mark: #fff3d6
}
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --soft: #a8a8a8; --line: #444; --page: #16181b; --mark: #3d3215 }
}
body {
  font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0
}
main { max-width: 56rem; margin: 0 auto; padding: 1rem }
h1 { line-height: 1.2; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 1rem 0 }
a { color: inherit }
table { border-collapse: collapse; table-layout: fixed; width: 100%; margin: 1rem 0 }
caption { text-align: left; font-weight: bold; padding: .5rem 0 }
th, td {
  text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; overflow-wrap: anywhere
}
thead, tbody, details tr { border-bottom: 1px solid var(--line) }
tbody th { font-weight: normal }
.case th { padding-left: .8rem }
td { font-variant-numeric: tabular-nums }
.value { width: 14rem }
.count { text-align: right; padding-right: 0; width: 4rem; overflow-wrap: normal }
small, figcaption, td.count { color: var(--soft) }
small { display: block; line-height: 1.35; margin-top: -.2rem }
figure { margin: 1.5rem 0 }
img {
  display: block; max-width: 100%; margin: 0 auto; padding: .5rem; box-sizing: border-box;
  height: auto; background: #fff; border-radius: 4px
}
#verdict ul { list-style: none; padding: 0 }
#verdict li { margin: .4rem 0; overflow-wrap: anywhere }
.bars { columns: 16rem; column-gap: 1.5rem; list-style: none; margin: 0; padding: 0 }
.bars li { break-inside: avoid; font-size: .85rem; font-variant-numeric: tabular-nums }
.bars span { display: block }
.bars .on, .bars .off { height: .5rem; border-radius: 2px; background: #3b7dd8; min-width: 2px }
.bars .off { background: var(--line) }
aside { background: var(--mark); padding: .1rem 1rem; border-radius: 4px }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; padding: .6rem }
@media (max-width: 40rem) {
  .value { width: 8rem } .count { width: 3.9rem } figure { margin: 1rem 0 }
}
"""


def write_report(folder: Path) -> Path:
    """Write ``report.html``, one file that contains all figures.

    The page needs no network and no scripts.

    Args:
        folder: folder of the run, whose training is finished. Sections that have not been evaluated
            are named on the page.

    Returns:
        The path of the file.

    Raises:
        StoreError: if the folder is not a run, or its evaluation is damaged.
    """
    run = Run(folder)
    settings = run.settings()
    evaluation = run.evaluation()
    about = evaluation.pop("about", {})

    head = _tag(
        "head",
        _tag("meta", charset="utf-8"),
        _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _tag("title", f"{run.folder.resolve().name}: {settings['data']['name']}"),
        _tag("style", STYLE),
    )
    main = _tag("main", *_content(run, settings, evaluation, about))
    page = _tag("html", head, _tag("body", main), lang="en")

    path = run.folder / "report.html"
    text = "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

    return path


def _content(
    run: Run, settings: Settings, evaluation: dict[str, Any], about: dict[str, Any]
) -> Iterator[Element]:
    """Yield all elements of ``main``, from top to bottom."""
    sections = _sections(run, evaluation)

    yield _tag("h1", f"Variational autoencoder trained on {settings['data']['name']}")
    yield _tag("p", _summary(run, settings))

    command = shlex.quote(str(run.folder))
    yield _verdict(verdict(run.history(), evaluation, command))
    yield from _continuations(settings)

    titles = {key: section.title for key, section in sections.items()}
    titles["configuration"] = "Configuration"
    links = [_tag("a", title, href=f"#{key}") for key, title in titles.items()]
    yield _tag("nav", *links)

    warnings = [_tag("p", text) for text in warnings_of(evaluation)]
    if warnings:
        yield _tag("aside", *warnings, aria_label="Warnings")

    figures = {
        keys: figure
        for name, part in evaluation.items()
        if name not in CURVES
        for keys, figure in leaves(part, name)
    }
    main_figures = {path: figures[path] for path in MAIN_FIGURES if path in figures}
    if main_figures:
        yield _figure_table("Main results", main_figures)

    for key, section in sections.items():
        section_figures = {path: figure for path, figure in figures.items() if path[0] == key}
        bars = _unit_bars(evaluation.get("latent", {})) if key == "latent" else None
        rates = section_figures.get(("latent", "rate_per_unit"), [])
        if bars is not None and len(rates) > LISTED_UNITS:
            del section_figures["latent", "rate_per_unit"]
        element = _section(run, key, section, section_figures)
        if bars is not None:
            element.insert(2, bars)  # below the heading and the table
        yield element

    yield _tag("section", *_configuration(settings, about), id="configuration")


def _sections(run: Run, evaluation: dict[str, Any]) -> dict[str, Section]:
    """All sections of the page, including those of figures and keys that are not in SECTIONS."""
    sections = dict(SECTIONS)
    for key in evaluation:
        if key not in SECTIONS:
            sections[key] = Section(term(key).title, {})

    known_stems = {stem for section in SECTIONS.values() for stem in section.figures}
    other_stems = sorted({path.stem for path in run.figures.glob("*.png")} - known_stems)
    if other_stems:
        captions = {stem: term(stem.replace("-", "_")).title for stem in other_stems}
        sections["figures"] = Section("Other figures", captions)

    return sections


def _summary(run: Run, settings: Settings) -> str:
    data = settings["data"]
    epochs = run.history()
    shape = " x ".join(map(str, data["shape"]))
    seconds = sum(row["seconds"] for row in epochs)

    overfitting = epochs[-1].get("overfitting") if epochs else None
    by_heart = ""
    if overfitting is not None:
        by_heart = (
            f" Held-out examples have {overfitting:.2f} times the squared error of the training "
            "examples."
        )
    return (
        f"The model has {settings['parameters']:,} parameters. It was trained on "
        f"{data['n_train']:,} examples of {data['source']}, {shape} each, with "
        f"{data['n_validation']:,} examples for validation and {data['n_test']:,} for the test. "
        f"Training took {len(epochs)} epochs and {seconds:,.0f} s, on {settings['created'][:10]}."
        f"{by_heart}"
    )


def _verdict(of_run: Verdict) -> Element:
    """The judgement in plain words, with a mark before each finding."""
    marks = {True: "Good", False: "Look", None: "Open"}
    items = []
    for finding in of_run.findings:
        mark = _tag("strong", marks[finding.is_good])
        items.append(_tag("li", mark, f" {finding.text}"))
    headline = _tag("p", _tag("strong", of_run.headline))
    parts = [headline, _tag("ul", *items)] if items else [headline]
    return _tag("section", *parts, id="verdict", aria_label="Verdict")


def _continuations(settings: Settings) -> Iterator[Element]:
    """Say that the run was continued after it had been trained to its end, and from what."""
    for record in settings.get("continued", []):
        before = ", ".join(f"{name}={value}" for name, value in record["epochs_before"].items())
        yield _tag(
            "p",
            f"The run was continued on {record['created'][:10]}. Its results before, with {before},"
            f" are in its folder {record['earlier_results']}.",
        )


def _unit_bars(latent: dict[str, Any]) -> Element | None:
    """Bars of the KL of each latent unit, the largest first; None if there are none."""
    rates = [
        rate["value"] if isinstance(rate, dict) else rate
        for rate in latent.get("rate_per_unit") or []
    ]
    if not rates or not all(isinstance(rate, int | float) for rate in rates):
        return None
    flags = latent.get("unit_is_active") or []
    largest = max([*rates, 1e-12])

    items = []
    for unit in sorted(range(len(rates)), key=lambda unit: -rates[unit]):
        is_active = flags[unit] if len(flags) == len(rates) else None
        state = {True: "", False: ", off", None: ""}[is_active]
        width = f"width: {max(0.0, 100 * rates[unit] / largest):.1f}%"
        bar = _tag("span", class_="off" if is_active is False else "on", style=width)
        label = _tag("span", f"unit {unit + 1}: {rates[unit]:.2f} nats{state}")
        items.append(_tag("li", label, bar))
    caption = (
        "KL of each latent unit, which add up to that of the ELBO, the largest first. A unit that "
        "is off encodes every input in the same way."
    )
    return _tag("div", _tag("ol", *items, class_="bars"), _tag("p", _tag("small", caption)))


def _section(run: Run, key: str, section: Section, figures: dict[Keys, Any]) -> Element:
    """A heading, the table of results if there is one, and the pictures that exist."""
    parts = [_tag("h2", section.title)]
    if figures:
        parts.append(_figure_table(f"{section.title}: results", figures))
    elif key in SECTIONS:
        command = section.command.format(run=shlex.quote(str(run.folder)))
        advice = "Not evaluated yet. This command evaluates it: "
        parts.append(_tag("p", advice, _tag("code", command)))

    for stem, caption in section.figures.items():
        # A picture of a section that was not evaluated is left over from another evaluation.
        is_current = figures or key not in SECTIONS or stem in FIGURES_OF_TRAINING
        path = run.figures / f"{stem}.png"
        if is_current and path.is_file():
            parts.append(_tag("figure", _picture(path, caption), _tag("figcaption", caption)))

    return _tag("section", *parts, id=key)


def _picture(path: Path, alt: str) -> Element:
    """An embedded picture, which shrinks to the width of the screen."""
    data = path.read_bytes()
    kind = "png"
    try:
        with open_image(io.BytesIO(data)) as image:
            width, height = image.size
            if len(data) > LARGEST_PNG:
                kind = "jpeg"
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, kind, quality=85)
                data = buffer.getvalue()
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        raise StoreError(
            f"{path} cannot be shown ({error}); delete it, or have it drawn again"
        ) from error

    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return _tag("img", src=source, alt=alt, width=str(width), height=str(height))


def _figure_table(caption: str, figures: dict[Keys, Any]) -> Element:
    """A table with one group of rows for each measure.

    The group contains the meaning of the measure once, and one row for each case.
    """
    groups: dict[str, dict[Keys, Any]] = {}
    for path, figure in figures.items():
        key, case = measure(path[1:] or path)
        groups.setdefault(key, {})[case] = figure

    standard_error = _tag("abbr", "s.e.", title="standard error")
    head = _tag(
        "tr",
        _tag("th", "Measure", scope="col"),
        _tag("th", "Value ± ", standard_error, scope="col", class_="value"),
        _tag("th", "N", scope="col", class_="count"),
    )
    bodies = [_tag("tbody", *_measure_rows(key, cases)) for key, cases in groups.items()]

    return _tag("table", _tag("caption", caption), _tag("thead", head), *bodies)


def _measure_rows(key: str, cases: dict[Keys, Any]) -> list[Element]:
    """The rows of one measure: its title, its meaning and its value in each case."""
    entry = term(key)
    meaning = entry.meaning
    if entry.better:
        meaning = f"{meaning} {entry.better.capitalize()} is better.".strip()
    note = _tag("tr", _tag("td", _tag("small", meaning), colspan="3"))

    if list(cases) == [()]:
        return [_row(entry.title, cases[()], entry.unit), note]

    unnamed_case = term("mixture").title if key in OF_MIXTURE else "data as they are"
    rows = [_tag("tr", _tag("th", entry.title, scope="rowgroup", colspan="3")), note]
    for case, figure in cases.items():
        name = ", ".join(term(part).title for part in case) or unnamed_case
        rows.append(_row(name, figure, entry.unit, "case"))

    return rows


def _row(
    name: str,
    figure: Any,  # noqa: ANN401 (any JSON value)
    unit: str,
    kind: str = "measure",
) -> Element:
    first = figure
    if isinstance(figure, list) and figure:
        first = figure[0]

    n = _mapping(first).get("n")
    count = "" if n is None else f"{n:,}"

    return _tag(
        "tr",
        _tag("th", name, scope="row"),
        _tag("td", f"{format_figure(figure)} {unit}".strip()),
        _tag("td", count, class_="count"),
        class_=kind,
    )


def _configuration(settings: Settings, about: dict[str, Any]) -> Iterator[Element]:
    """Yield the commands that reproduce the run, and tables of all its settings."""
    yield _tag("h2", "Configuration")

    evaluations = _mapping(about.get("sections")).values()
    for title, parts in {"Trained": [settings], "Evaluated": evaluations}.items():
        # The sections of one evaluation have the same command, which is shown once.
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
    if isinstance(value, list):
        return shlex.join(map(str, value))
    return str(value)


def _mapping(value: Any) -> dict[str, Any]:  # noqa: ANN401 (any JSON value)
    return value if isinstance(value, dict) else {}


def _tag(name: str, /, *children: Element | str, **attributes: str) -> Element:
    """An HTML element.

    Text is escaped when the page is written, so that no text from a file can become markup.
    Characters that steer or cannot be written, such as marks of direction, are shown as escapes.
    """
    html_attributes = {
        key.rstrip("_").replace("_", "-"): visible(value) for key, value in attributes.items()
    }
    element = Element(name, html_attributes)

    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + visible(child)
        else:
            element.text = (element.text or "") + visible(child)

    return element
