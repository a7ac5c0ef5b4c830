"""The files of a run that are not tensors, and the descriptions of those that are: their schemas.

Each file has one typed record here, and :func:`read_record` and :func:`check_record` are the only
ways in. A record says which keys there must be, of which type, and how large a size may be, before
anything of that size is allocated. Keys that it does not name are kept as they are.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from equipoise.files import StoreError, check_digest, check_regular

FORMAT = "equipoise-1"
"""Format of all files, which is written into each of them."""
MAX_JSON_BYTES = 256_000_000
"""Largest JSON file that is read."""
MAX_NAME = 300
"""Longest name of a place in a file, in an error message."""
MAX_DEPTH = 200
"""Deepest nesting of a JSON value; the deepest that is written is the tree of a checkpoint."""

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=2**53)]
Limit = Annotated[int, Meta(ge=1, le=2**53)]
Size = Annotated[int, Meta(ge=1, le=10_000_000)]
"""A number of dimensions, units or components."""
ImageSize = Annotated[str, Meta(pattern=r"^\d{1,5}x\d{1,5}$")]
"""Width and height of images."""
Side = Annotated[int, Meta(ge=0, le=10_000_000)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Shape = Annotated[list[Side], Meta(max_length=4)]
Name = Annotated[str, Meta(max_length=4096)]
InnerPath = Annotated[str, Meta(max_length=4096, pattern=r"^[^./\\][^/\\]*(/[^./\\][^/\\]*)*$")]
"""Path of a file within a folder of ours, none of whose parts begins with a dot."""
Digest = Annotated[str, Meta(max_length=128)]
Scalar = int | float | str | None
Whole = Annotated[int, Meta(ge=-(2**53), le=2**53)]
Number = Whole | float
NonNegative = Annotated[float, Meta(ge=0)] | Annotated[int, Meta(ge=0, le=2**53)]
Plain = Whole | float | str | bool | None


class JsonObject(TypedDict):
    """Any JSON object."""


class NoiseRecord(TypedDict):
    """A noise model: its class, and the arguments from which it is built."""

    kind: Name
    arguments: dict[str, Any]


class CorrelationRecord(TypedDict):
    """The correlation of a noise model: its form, and the shapes from which it is built."""

    form: Name
    arguments: dict[str, Shape]


class CorrelatedNoiseArguments(TypedDict):
    """The arguments of ``CorrelatedNoise``."""

    marginal: NoiseRecord
    correlation: CorrelationRecord


class LoadArguments(TypedDict):
    """Arguments of ``data.load``, by which the data of a run are found again."""

    source: Name
    data_dir: NotRequired[Name]
    image_size: NotRequired[Size | ImageSize]
    channels: NotRequired[Literal["grey", "rgb"]]
    pages: NotRequired[Literal["examples", "channels", "first"]]
    fit: NotRequired[Literal["crop", "pad", "stretch"]]
    pool: NotRequired[bool]
    test_fraction: NotRequired[Fraction]
    validation_fraction: NotRequired[Fraction]
    strict: NotRequired[bool]
    download: NotRequired[bool]
    columns: NotRequired[list[Name]]
    drop: NotRequired[list[Name]]
    label: NotRequired[Name]
    categorical: NotRequired[bool | list[Name]]
    max_pixels: NotRequired[Limit]
    max_bytes: NotRequired[Limit]


class StreamArguments(TypedDict):
    """Arguments of ``data.load_stream``, and the mark by which they are known."""

    source: Name
    stream: bool
    count: NotRequired[Count]
    validation: NotRequired[Count]
    test: NotRequired[Count]
    buffer_size: NotRequired[Size]
    name: NotRequired[Name]
    column: NotRequired[Name]
    image_size: NotRequired[Size | ImageSize]
    channels: NotRequired[Literal["grey", "rgb"]]
    max_pixels: NotRequired[Limit]


class PackedShard(TypedDict):
    """A file of packed examples."""

    name: InnerPath
    part: Literal["train", "validation", "test"]
    n: Count
    offset: Count
    sha256: Digest
    skipped: list[str]


class Unfinished(TypedDict):
    """The files that a packing has written so far, and what it packs."""

    plan: Digest
    shards: list[PackedShard]


class PackIndex(TypedDict):
    """``index.json`` of packed examples: what training needs to know before it reads them."""

    format: Name
    name: Name
    plan: Digest
    kind: Literal["image", "table"]
    shape: Annotated[list[Size], Meta(min_length=1, max_length=4)]
    stored: Name
    dtype: Name
    offset: list[float]
    scale: list[float]
    quantum: float | None
    low: float
    high: float
    digest: Digest
    columns: list[Name]
    has_gaps: bool
    notes: list[str]
    cautions: list[str]
    shards: list[PackedShard]


class DataRecord(TypedDict):
    """The data that a run was trained on, and how they are loaded again."""

    name: Name
    fingerprint: Digest
    n_train: Count
    n_validation: Count
    n_test: Count
    source: Name
    load: dict[str, Any]
    shape: Annotated[list[Size], Meta(min_length=1, max_length=4)]


class ContinuationRecord(TypedDict):
    """How a finished run was continued: the options before, and where its results are kept."""

    command: list[str]
    created: Name
    epochs_before: dict[str, Count]
    earlier_results: Name


class Settings(TypedDict):
    """``config.json``."""

    format: Name
    command: list[str]
    created: Name
    data: DataRecord
    noise_model: NoiseRecord
    options: dict[str, Any]
    parameters: Count
    versions: dict[str, str]
    continued: NotRequired[list[ContinuationRecord]]


class EpochRow(TypedDict):
    """A line of ``metrics.jsonl``."""

    epoch: Count
    stage: Annotated[int, Meta(ge=1, le=2)]
    learning_rate: float
    seconds: float
    examples_per_second: float
    train_elbo: float
    train_log_likelihood: float
    train_kl: float
    train_mse: float
    train_noise_var: float
    validation_elbo: float
    validation_log_likelihood: float
    validation_kl: float
    validation_mse: float
    validation_noise_var: float
    validation_noise_std: float
    validation_floor_share: float
    overfitting: NotRequired[float]
    active_units: Count
    kept_epoch: NotRequired[Count]
    decision: str


class EvaluatedData(TypedDict):
    """The examples of an evaluation."""

    name: Name
    fingerprint: Digest
    test: Name
    test_sha256: Digest
    n_test: Count


class EvaluatedSection(TypedDict):
    """How a section of an evaluation was made."""

    command: NotRequired[list[str]]


class EvaluationAbout(TypedDict):
    """What ``evaluation.json`` is of."""

    format: Name
    data: EvaluatedData
    model: Digest
    mixture: Digest
    n_components: Size
    device: Name
    versions: dict[str, str]
    sections: dict[str, EvaluatedSection]
    sources: dict[str, dict[str, Any]]


class Figure(TypedDict):
    """A figure of an evaluation: its value, how certain it is, and from how many examples."""

    value: Plain
    n: NotRequired[Count | None]


class Estimate(TypedDict):
    """A figure with a standard error."""

    value: Number
    standard_error: NotRequired[NonNegative | None]
    n: NotRequired[Count | None]


class FigureOverSeeds(Estimate):
    """A mean over trainings with several seeds, with its error over seeds and each one's value."""

    error_over_seeds: NonNegative
    of_seeds: Annotated[list[Number], Meta(min_length=2)]


class FigureParts(TypedDict):
    """A figure with whatever else is known of it."""

    figure: dict[str, Plain | list[Plain]]


class LikelihoodFigures(TypedDict):
    """What a report computes with, of the section "likelihood"."""

    noise_var: NotRequired[Estimate]
    noise_floor_var: NotRequired[Number]


class SamplesFigures(TypedDict):
    """What a report computes with, of the section "samples"."""

    feature_dimension: NotRequired[Count]


class Memorisation(TypedDict):
    """What a report computes with, of the search for copies."""

    n_training: NotRequired[Count]


class LatentFigures(TypedDict):
    """What a report computes with, of the section "latent"."""

    memorisation: NotRequired[Memorisation]


class Evaluation(TypedDict):
    """``evaluation.json``: a section for each part of the protocol that was computed."""

    about: EvaluationAbout
    likelihood: NotRequired[LikelihoodFigures]
    samples: NotRequired[SamplesFigures]
    latent: NotRequired[LatentFigures]
    noise: NotRequired[dict[str, Any]]
    outliers: NotRequired[dict[str, Any]]


class ComparedData(TypedDict):
    """A data set of the paper's comparison."""

    name: Name
    fingerprint: Digest
    n_train: Count
    n_validation: Count
    n_test: Count


class ComparisonSeconds(TypedDict):
    """What an item of the paper's comparison took, in seconds."""

    training: NonNegative
    evaluation: NonNegative
    item: NonNegative
    models: dict[str, tuple[NonNegative, NonNegative]]


class PaperResults(TypedDict):
    """``ITEM-BUDGET.json``: the figures of an item of the paper's comparison, in ``rows``.

    Files of earlier versions have one seed and no format.
    """

    format: NotRequired[Name]
    command: Name
    date: Name
    machine: Name
    versions: dict[str, str]
    item: Name
    budget: Name
    epochs: dict[str, Limit]
    seed: NotRequired[Count]
    seeds: NotRequired[Annotated[list[Count], Meta(min_length=1)]]
    features: Name
    data: dict[str, ComparedData]
    options: dict[str, dict[str, Any]]
    seconds: ComparisonSeconds
    rows: dict[str, Any]


class TrackerRecord(TypedDict):
    """``tracker.json``."""

    run_id: Name


class CorrelationFitRecord(TypedDict):
    """How the correlation of a model's errors was chosen."""

    form: Name
    setting: Name | None
    scores: dict[str, Estimate]
    gains: dict[str, Estimate]
    n_held_out: Count
    n_training: Count
    message: str


class ModelDescription(TypedDict):
    """The description in ``model.safetensors``."""

    shape: Annotated[list[Size], Meta(min_length=1, max_length=4)]
    latent_dim: Size
    architecture: str | None
    width: Annotated[int, Meta(ge=1, le=1_000_000)]
    mean_bounds: tuple[float, float] | None
    deterministic: bool
    encoder: Name
    decoder: Name
    quantum: float | None
    offset_shape: Shape
    scale_shape: Shape
    noise: NoiseRecord
    reads_gaps: NotRequired[bool]
    columns: NotRequired[list[Name]]
    levels: NotRequired[dict[str, Annotated[list[str | bool | int | float], Meta(min_length=1)]]]
    power_transform: NotRequired[bool]
    label_names: NotRequired[Annotated[list[Name], Meta(max_length=256)]]
    origin: NotRequired[Digest]
    codes_of: NotRequired[Digest]
    correlation_fit: NotRequired[CorrelationFitRecord]


class FlowSizes(TypedDict):
    """The sizes from which a flow is built."""

    latent_dim: Size
    n_components: Size
    n_transforms: Annotated[int, Meta(ge=1, le=1000)]
    hidden: Annotated[list[Size], Meta(max_length=100)]


class FlowDescription(TypedDict):
    """The description in ``flow.safetensors``."""

    flow: FlowSizes


class MixtureDescription(TypedDict):
    """The description in ``aggregate.safetensors`` and of other mixtures."""

    model: NotRequired[Digest]
    mixture: NotRequired[Digest]


class HeldOutDescription(TypedDict):
    """The description in ``held-out.safetensors``."""

    model: Digest
    mixture: Digest
    n_validation: Count


class PeerConfig(TypedDict):
    """``model_config.json`` of another library's model; see ``interop.py``."""

    input_dim: NotRequired[Annotated[list[Size], Meta(min_length=1, max_length=4)] | None]
    latent_dim: Size
    uses_default_encoder: NotRequired[bool]
    uses_default_decoder: NotRequired[bool]


class EstimatorDescription(TypedDict):
    """The description in the file of an estimator."""

    model: ModelDescription
    options: dict[str, Any]
    random_state: int | None
    history: list[dict[str, Scalar]]
    prior: NotRequired[Literal["prior", "mixture"]]
    example_shape: Annotated[list[Size], Meta(min_length=1, max_length=4)]
    feature_names: list[str]
    frames: NotRequired[Literal["pandas", "polars"]]
    offset: NotRequired[float]
    labelled_offset: NotRequired[float]
    rate: NotRequired[Annotated[float, Meta(gt=0, lt=1)]]


def check_record(value: Any, record: type[T], what: str) -> T:  # noqa: ANN401 (any JSON value)
    """Compare a JSON value with its schema.

    Args:
        value: The value.
        record: A typed record of this module.
        what: Name of the file, for the error message.

    Returns:
        The same value, with its further keys.

    Raises:
        StoreError: If a key is missing, or a value has another type or is out of its bounds. The
            message names file and key, and says what was expected.
    """
    try:
        msgspec.convert(value, record)
    except msgspec.ValidationError as error:
        raise StoreError(_describe(what, error)) from error
    except RecursionError as error:
        raise StoreError(f"{what} is nested too deeply; it was damaged or altered.") from error

    checked: T = value
    return checked


def check_figures(value: Any, what: str) -> None:  # noqa: ANN401 (any JSON value)
    """Compare a section of an evaluation, or a part of one, with what a report can show.

    Args:
        value: A dictionary of parts, a figure, a list of figures, or a plain value.
        what: Its name, for the error message.

    Raises:
        StoreError: If it is something else.
    """
    if isinstance(value, dict) and "value" not in value:
        for key, child in value.items():
            check_figures(child, f"{what}.{key}"[:MAX_NAME])
        return

    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            check_record(item, _record_of_figure(item), what)
            check_record({"figure": item}, FigureParts, what)
        else:
            check_record({"value": item}, Figure, what)


def _record_of_figure(figure: dict[str, Any]) -> Any:  # noqa: ANN401 (a typed record)
    """The schema of a figure with these keys."""
    if "of_seeds" in figure or "error_over_seeds" in figure:
        return FigureOverSeeds
    return Estimate if figure.get("standard_error") else Figure


def decode_record(text: bytes | str, record: type[T], what: str) -> T:
    """Decode JSON, and compare it with its schema.

    Args:
        text: The JSON.
        record: As for :func:`check_record`.
        what: Name of the file, for the error message.

    Returns:
        The value.

    Raises:
        StoreError: If it is no JSON, or does not fit the schema.
    """
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise StoreError(f"{what} is not valid JSON ({error}); it was damaged.") from error
    except RecursionError as error:
        raise StoreError(f"{what} is nested too deeply; it was damaged or altered.") from error

    _check_depth(value, what)
    return check_record(value, record, what)


def _check_depth(value: Any, what: str) -> None:  # noqa: ANN401 (any JSON value)
    """Refuse a value that is nested too deeply for what goes through it."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        children = (
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        )
        level = list(children)
        if not level:
            return
    raise StoreError(f"{what} is nested too deeply; it was damaged or altered.")


def read_record(path: Path, record: type[T]) -> T:
    """Read a JSON file by its schema.

    Args:
        path: Path of the file.
        record: As for :func:`check_record`. :class:`JsonObject` takes any JSON object.

    Returns:
        The value.

    Raises:
        StoreError: If there is no such file, if it is not a regular file, if it is too large, if it
            is no JSON, if it does not fit the schema, or if it has a format that this version does
            not know.
    """
    value = decode_record(read_bytes(path), record, str(path))
    if isinstance(value, dict) and isinstance(value.get("format"), str):
        check_format(value["format"], str(path))
    return value


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a regular file as a whole, if it is not too large.

    Args:
        path: Path of the file.
        limit: Largest size, in bytes.

    Returns:
        Its content.

    Raises:
        StoreError: If there is no such file, if it is not a regular file, if it is too large, or if
            the manifest of its folder says that it was altered.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > limit:
        raise StoreError(f"{path} has {size:,} bytes, more than the {limit:,} that are read.")

    content = path.read_bytes()
    check_digest(path, content)
    return content


def check_format(found: str, what: str) -> None:
    """Refuse a file of another version.

    Args:
        found: The format that stands in the file.
        what: Name of the file, for the error message.

    Raises:
        StoreError: If it is not the format of this version.
    """
    if found != FORMAT:
        raise StoreError(
            f"{what} has the format {found[:100]!r}, this version of equipoise reads {FORMAT!r}; "
            "update equipoise."
        )


def _describe(what: str, error: msgspec.ValidationError) -> str:
    """Turn an error of the library into a sentence that names file, key and expectation."""
    text, _, place = str(error).partition(" - at `$")
    key = place.rstrip("`").lstrip(".")
    where = f"{what}: {key}" if key else what
    expectation = text[0].lower() + text[1:]
    return (
        f"{where}: {expectation}; the file was damaged or altered, so restore it or make it anew."
    )
