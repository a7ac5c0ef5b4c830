"""Sharing a run with others: its model card, and its publication on the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

import yaml

from equipoise.anonymity import without_paths
from equipoise.data.hub import MIRRORS
from equipoise.files import StoreError
from equipoise.glossary import format_figure, leaves, measure, term, title
from equipoise.held_out import KIND
from equipoise.hub import PREFIX, RUN_FILES, check_name, publish
from equipoise.markdown import code, plain
from equipoise.noise import NoiseModel, noise_class
from equipoise.records import (
    CorrelatedNoiseArguments,
    JsonObject,
    ModelDescription,
    NoiseRecord,
    check_record,
    read_record,
)
from equipoise.run import Run
from equipoise.store import read_tensors

KINDS = {
    "model.safetensors": "model",
    "aggregate.safetensors": "mixture",
    "held-out.safetensors": KIND,
}
"""What the files of tensors that are published hold."""


def push(run: Run, name: str, *, license_id: str | None = None, private: bool = True) -> str:
    """Publish a run on the Hugging Face hub.

    It uploads safetensors, JSON and a model card, but no data, pictures or checkpoints. Paths are
    cut down to their last part, see :mod:`equipoise.anonymity`.

    Args:
        run: A finished training.
        name: "owner/name" of the repository. It is made if it does not exist. A card that is
            already there is replaced.
        license_id: The licence of the model, as the hub spells it, such as "apache-2.0". If None,
            the card names no licence.
        private: Whether a new repository is visible to its owner only.

    Returns:
        The address of its page.

    Raises:
        ValueError: If the run is not finished, or the hub refuses. The message says what to do.

    Example:
        >>> push(Run("runs/mnist"), "ada/mnist-vae", license_id="apache-2.0")  # doctest: +SKIP
        'https://huggingface.co/ada/mnist-vae'
    """
    files: dict[str, bytes | Path] = {"README.md": model_card(run, name, license_id).encode()}

    for file in RUN_FILES:
        path = run.folder / file
        if not path.is_file():
            continue

        if path.suffix == ".json":
            content = dict(read_record(path, JsonObject))
            files[file] = _as_json(without_paths(content), indent=2)
        elif path.suffix == ".jsonl":
            files[file] = b"".join(_as_json(without_paths(row)) + b"\n" for row in run.history())
        else:
            _refuse_paths(path)
            files[file] = path

    return publish(name, files, private=private)


def _as_json(value: object, indent: int | None = None) -> bytes:
    """Write a JSON value.

    A name that is not Unicode has characters that UTF-8 lacks; their escapes are valid JSON.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode(errors="backslashreplace")


def _refuse_paths(path: Path) -> None:
    """Refuse a file whose description holds a path, since the file is published as it is."""
    description = read_tensors(path, KINDS[path.name], JsonObject)[1]
    if without_paths(description) != description:
        raise StoreError(
            f"{path} describes itself with a path of this machine, probably in the arguments of a "
            "noise model of your own; publish a model that was built without one."
        )


def model_card(run: Run, name: str, license_id: str | None = None) -> str:
    """Describe a run for people who did not train it: what it is, its use, its figures, its limits.

    Args:
        run: A finished training.
        name: "owner/name" under which it will be published.
        license_id: The licence of the model, as the hub spells it. If None, the card names none.

    Returns:
        Markdown with a YAML header.

    Raises:
        HubError: If the name is malformed.
        StoreError: If the run is not finished.
    """
    check_name(name)
    settings = without_paths(run.settings())
    description = read_tensors(run.model_file, "model", ModelDescription)[1]
    mixture = run.mixture()

    evaluation = without_paths(run.evaluation())

    header = yaml.safe_dump(_header(settings["data"], license_id), sort_keys=False)
    parts = [
        f"---\n{header}---\n",
        f"# {name.partition('/')[2]}\n",
        _summary(settings, description, mixture.n_components),
        _usage(name, description),
        _figures(evaluation),
        _LIMITATIONS,
    ]
    return "\n".join(parts)


def _header(data: dict[str, Any], license_id: str | None) -> dict[str, Any]:
    """The header of the card, which the hub reads; entries without a value are left out."""
    source = str(data["load"].get("source", ""))
    dataset = MIRRORS.get(data["name"])
    if source.startswith(PREFIX):
        dataset = source.removeprefix(PREFIX)

    is_image = len(data["shape"]) == 3
    header: dict[str, Any] = {
        "library_name": "equipoise",
        "license": license_id,
        "datasets": [dataset] if dataset else None,
        "pipeline_tag": "unconditional-image-generation" if is_image else None,
        "tags": ["variational-autoencoder", "vae", "uncertainty", "arxiv:1909.03765"],
    }
    return {key: value for key, value in header.items() if value}


def _summary(settings: dict[str, Any], description: ModelDescription, n_components: int) -> str:
    """What the model is: a paragraph, and a table of the training."""
    data = settings["data"]
    versions = {name: settings["versions"].get(name, "unknown") for name in ("equipoise", "torch")}
    kind = "images" if len(data["shape"]) == 3 else "columns"
    shape = " x ".join(map(str, data["shape"]))

    networks = plain(description["architecture"] or "")
    if not networks:
        encoder, decoder = (
            code(description[part], in_table=True) for part in ("encoder", "decoder")
        )
        networks = f"{encoder} and {decoder}, the author's own"

    name = code(data["name"], in_table=True)
    fingerprint = code(data["fingerprint"][:12], in_table=True)
    date = plain(settings["created"][:10])
    of_equipoise, of_torch = plain(versions["equipoise"]), plain(versions["torch"])
    return f"""\
A variational autoencoder of {shape} {kind}, trained on {code(data["name"])} with \
equipoise. {_noise_summary(description["noise"])}; new codes are drawn from \
a mixture of {n_components} Gaussians, fitted to the aggregate posterior. \
Method: Lin, Roberts, Trigoni and Clark \
(2019), *Balancing Reconstruction Quality and Regularisation in ELBO for VAEs*, \
[arXiv 1909.03765](https://arxiv.org/abs/1909.03765).

| | |
|---|---|
| Training data | {data["n_train"]:,} examples of {name}, fingerprint {fingerprint} |
| Latent units | {description["latent_dim"]} |
| Networks | {networks} |
| Parameters | {settings["parameters"]:,} |
| Trained | {date}, equipoise {of_equipoise}, torch {of_torch} |

All options are in `config.json`, the course of the training in `metrics.jsonl`.
"""


def _noise_summary(noise: NoiseRecord) -> str:
    """Say what a noise model is; a general sentence where its class is not at hand."""
    try:
        summary = noise_class(noise["kind"]).summary
    except ValueError:
        return NoiseModel.summary

    if noise["kind"] != "CorrelatedNoise":
        return summary
    arguments: Any = noise["arguments"]
    parts = check_record(arguments, CorrelatedNoiseArguments, "the noise model")
    return f"{_noise_summary(parts['marginal'])}. {summary}"


def _usage(name: str, description: ModelDescription) -> str:
    """How to use the model: commands to run."""
    networks = note = ""
    if description["architecture"] is None:
        networks = "encoder=..., decoder=..."
        note = (
            f"\nThe networks are the author's own: build {code(description['encoder'])} and "
            f"{code(description['decoder'])} as they were, and pass them to `run.model`.\n"
        )

    best = "mode" if description.get("levels") else "mean"
    return f"""\
## Use

```bash
pip install 'equipoise[hub]'
equipoise sample {PREFIX}{name}
```

```python
import equipoise

run = equipoise.Run("{PREFIX}{name}")
model, mixture = run.model({networks}), run.mixture()
drawn = model.generate(16, mixture)
samples = model.scaling.restore_levels(drawn.{best})  # in the units of the data
std = model.scaling.restore_std(drawn.std, drawn.mean)
```
{note}"""


def _figures(evaluation: dict[str, Any]) -> str:
    """The figures of the evaluation, a table for each of its sections."""
    sections = {name: section for name, section in evaluation.items() if name != "about"}
    if not sections:
        return "## Figures\n\nNone yet: `equipoise evaluate` has not run.\n"

    data = evaluation["about"]["data"]
    name_of_test = "the test set" if data["test"] == "test" else code(data["test"])
    lines = [
        "## Figures\n",
        f"By equipoise's fixed protocol on {name_of_test} ({data['n_test']:,} examples), ± one "
        "standard error. Likelihoods are in nats per example, constants included, and limited by "
        "the noise floor. In model units, images reach from 0 to 1 and columns have the variance "
        "1. Distances of samples compare only with those in the same features and of the same N.\n",
    ]

    for name, section in sections.items():
        lines.append(f"| {plain(name.capitalize())} | value | N | unit |\n|---|---:|---:|---|")
        for keys, figure in leaves(section):
            n = figure.get("n") if isinstance(figure, dict) else None
            count = f"{n:,}" if n else ""
            unit = term(measure(keys or (name,))[0]).unit
            value = plain(format_figure(figure))
            lines.append(f"| {plain(title(keys or (name,)))} | {value} | {count} | {unit} |")

        lines.append("")

    return "\n".join(lines)


_LIMITATIONS = """\
## Limits

- The standard deviation tells of the errors on data like the training data. \
On other data it is an extrapolation.
- Samples follow the training data, with their gaps and biases, \
and may come close to single training examples.
- A high likelihood does not make an input normal, nor a sample good; \
look at the other figures as well.
- The licence of this model, if the header names one, says nothing about that of the training data.
"""
