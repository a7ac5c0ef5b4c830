"""Reading and writing tensors: safetensors with a JSON description, never pickle.

A file appears complete or not at all. The file of a model, ``model.safetensors``, holds its tensors
and, in the metadata, a JSON description. To load a model, its shapes are found from the description
without allocating them, and compared with the tensors. Only then is the module built and filled.
The error lists the differences.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from equipoise.aggregate import GaussianMixture
from equipoise.correlated_noise import CorrelatedNoise
from equipoise.files import StoreError, check_text, owner_of, whole_file
from equipoise.flow_fit import CodeFlow
from equipoise.label_mixture import LabelMixture
from equipoise.labels import UNKNOWN, labelled
from equipoise.levels import Level
from equipoise.model import VAE, PowerScaling, Scaling, decoder_shape, encoder_shape
from equipoise.networks import build_decoder, build_encoder
from equipoise.noise import GlobalNoise, build_noise
from equipoise.records import (
    FORMAT,
    CorrelatedNoiseArguments,
    CorrelationFitRecord,
    Digest,
    FlowDescription,
    MixtureDescription,
    ModelDescription,
    Name,
    check_format,
    check_record,
    decode_record,
)

METADATA_KEY = "equipoise"
"""The one key of a file's metadata, under which everything but the tensors is."""
SMALL = 1_000_000
"""Number of values that may be allocated in any case."""
LISTED = 10
"""Number of differences that an error lists."""
MIXTURE_TENSORS = ("weights", "means", "covariances")
LABEL_TENSORS = ("label_weights", "label_shares")
"""Those of a mixture with weights for each label, besides."""

T = TypeVar("T")


class Metadata(TypedDict):
    """What stands in the metadata of a file, beside its tensors."""

    format: Name
    kind: Name
    description: str
    sha256: Digest


def write_tensors(
    path: Path,
    kind: str,
    tensors: dict[str, Tensor],
    description: Any,  # noqa: ANN401 (any JSON value)
) -> None:
    """Write tensors, a JSON description and a checksum of both into one safetensors file.

    The file appears complete or not at all.

    Args:
        path: Path of the file.
        kind: Name of what the file holds, such as "model". :func:`read_tensors` compares it.
        tensors: Tensors by name. They are stored contiguously, and may be on any device.
        description: Any JSON value.

    Raises:
        StoreError: If another program's file is there.
    """
    check_text(path)
    if owner_of(path) is None and path.exists():
        # No manifest tells whose file it is, but its metadata do.
        try:
            _read_metadata(path)
        except StoreError as error:
            raise StoreError(
                f"{path} is there already, and is no file of equipoise's: "
                "move it away, or choose another name."
            ) from error
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description, allow_nan=False)
    record = {
        "format": FORMAT,
        "kind": kind,
        "description": text,
        "sha256": _checksum(kind, text, cpu_tensors),
    }
    # One key, because safetensors writes several in an order that differs between processes.
    data = serialise(cpu_tensors, {METADATA_KEY: json.dumps(record)})

    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: Path, kind: str, record: type[T]) -> tuple[dict[str, Tensor], T]:
    """Read a file that :func:`write_tensors` wrote.

    Args:
        path: Path of the file.
        kind: Name of what the file should hold.
        record: Schema of the description, see ``records.py``.

    Returns:
        Tensors by name, on the CPU, and the description.

    Raises:
        StoreError: If the file does not exist, is damaged, was altered, was not written by
            equipoise, or holds something else.
    """
    metadata = _read_metadata(path)
    if metadata["kind"] != kind:
        raise StoreError(f"{path} holds a {metadata['kind'][:100]}, not a {kind}.")

    with _open(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    if metadata["sha256"] != _checksum(kind, metadata["description"], tensors):
        raise StoreError(f"{path} was altered after it was written: its checksum differs.")
    return tensors, decode_record(metadata["description"], record, f"{path}, description")


def read_digest(path: Path) -> str:
    """Read the checksum that a file of tensors carries, without reading the tensors.

    Equal content has an equal checksum, by which other files refer to it.

    Args:
        path: Path of a file that :func:`write_tensors` wrote.

    Returns:
        SHA-256 over the kind, the description and the tensors, hexadecimal.

    Raises:
        StoreError: If the file does not exist, is damaged, or was not written by equipoise.
    """
    return _read_metadata(path)["sha256"]


def read_codes_digest(path: Path) -> str:
    """Read by which digest files that are fitted to a model's codes refer to it.

    It is the model's own, unless only its noise has changed since: its codes are then those of the
    model that it was made of.

    Args:
        path: Path of a file that :func:`save_model` wrote.

    Returns:
        SHA-256, hexadecimal.

    Raises:
        StoreError: If the file does not exist, is damaged, or was not written by equipoise.
    """
    return _read_description(path).get("codes_of", read_digest(path))


def read_correlation_form(path: Path) -> str:
    """Read which form of correlation the errors of a model have, without reading the tensors.

    Args:
        path: Path of a file that :func:`save_model` wrote.

    Returns:
        "full", "low-rank" or "bands"; "none" if the errors are independent of each other, or if
        nobody has estimated it.

    Raises:
        StoreError: If the file does not exist, is damaged, or was not written by equipoise.
    """
    fit = _read_description(path).get("correlation_fit")
    return "none" if fit is None else fit["form"]


def _read_description(path: Path) -> ModelDescription:
    """Read the description of a model, without reading the tensors."""
    text = _read_metadata(path)["description"]
    return decode_record(text, ModelDescription, f"{path}, description")


def _read_metadata(path: Path) -> Metadata:
    """Read the metadata of a file that equipoise wrote."""
    if not path.is_file():
        what = "is not a regular file" if os.path.lexists(path) else "does not exist"
        raise StoreError(f"There is no {path} to read: it {what}.")

    with _open(path) as file:
        metadata = file.metadata() or {}

    if METADATA_KEY not in metadata:
        raise StoreError(
            f"{path} was not written by equipoise: its metadata has no equipoise format."
        )
    record = decode_record(metadata[METADATA_KEY], Metadata, f"{path}, metadata")
    check_format(record["format"], str(path))
    return record


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a file of tensors.

    What the system refuses, such as a permission or one more open file, is no damage: it passes as
    an OSError.
    """
    check_text(path)
    # Because safetensors says of any file that the system does not open that it does not exist.
    path.open("rb").close()
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged or not a safetensors file ({error}).") from error


def _checksum(kind: str, description: str, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of everything in a file: kind, description, and tensors by name."""
    digest = hashlib.sha256(f"{kind}\0{description}\0".encode())

    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)

    return digest.hexdigest()


def fill(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Fill the parameters and buffers of a module.

    Args:
        module: Module that was built with the shapes of the tensors.
        tensors: Tensors by the names of ``module.state_dict()``.
        what: Name of the file, for the error message.

    Raises:
        StoreError: If names, shapes or dtypes differ, or numbers are not finite. The message lists
            the differences.
    """
    compare(module, tensors, what)

    infinite = [
        name
        for name, tensor in sorted(tensors.items())
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if infinite:
        raise StoreError(
            f"{what} has numbers that are NaN or infinite, in {', '.join(infinite[:5])}; "
            "the training diverged, or the file was altered."
        )
    module.load_state_dict(tensors)


def compare(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Compare tensors with what a module holds; it may be on the device "meta".

    Args:
        module: The module.
        tensors: Tensors by the names of ``module.state_dict()``.
        what: Name of the file, for the error message.

    Raises:
        StoreError: If names, shapes or dtypes differ. The message lists the differences.
    """
    expected = module.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]

    for name in expected.keys() & tensors.keys():
        shape, dtype = expected[name].shape, expected[name].dtype
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            problems.append(
                f"{name}: expected {tuple(shape)} {dtype}, "
                f"found {tuple(tensor.shape)} {tensor.dtype}"
            )

    if problems:
        shown = [problem[:200] for problem in sorted(problems)[:LISTED]]
        if len(problems) > LISTED:
            shown.append(f"and {len(problems) - LISTED} more")
        raise StoreError(f"{what} does not fit the model:\n  " + "\n  ".join(shown))


def save_model(
    path: str | Path,
    model: VAE,
    origin: str | None = None,
    *,
    codes_of: str | None = None,
    correlation_fit: CorrelationFitRecord | None = None,
) -> None:
    """Save a model with its networks, its noise model and its scaling.

    Args:
        path: Path of the file, usually RUN/model.safetensors.
        model: Any :class:`VAE`, with networks of ``networks.py`` or of the user's own.
        origin: Digest of the options and the data that it was trained with, by which a run knows
            its own model.
        codes_of: Digest of an earlier model that gives the same codes, so that what was fitted to
            them stays valid, see :func:`read_codes_digest`.
        correlation_fit: How the correlation of its errors was chosen.
    """
    description = model.description()
    further = {"origin": origin, "codes_of": codes_of, "correlation_fit": correlation_fit}
    description |= {name: value for name, value in further.items() if value is not None}
    write_tensors(Path(path), "model", model.state_dict(), description)


def load_model(
    path: str | Path,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    origin: str | None = None,
) -> VAE:
    """Load a model, in evaluation mode, on the CPU.

    Args:
        path: Path of a file that :func:`save_model` wrote.
        encoder: The user's own encoder, built as it was when the model was saved. Its weights are
            replaced.
        decoder: The user's own decoder, built as it was when the model was saved. Its weights are
            replaced.
        origin: Digest that the model must have been saved with. None takes any.

    Returns:
        The model.

    Raises:
        StoreError: If the file is damaged or does not fit, if it has another origin, or if the
            model has networks of the user's own that were not passed.
    """
    tensors, description = read_tensors(Path(path), "model", ModelDescription)
    if origin is not None and description.get("origin", origin) != origin:
        raise StoreError(
            f"{path} was trained with other data or options than those in its folder's "
            "config.json: one of the two files belongs to another run, or was altered."
        )
    return restore_model(description, tensors, encoder, decoder, what=str(path))


def restore_model(
    description: ModelDescription,
    tensors: dict[str, Tensor],
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    what: str = "the description",
) -> VAE:
    """Build the model that a description is of, and fill it.

    Args:
        description: What :meth:`VAE.description` returned.
        tensors: Tensors by the names of ``model.state_dict()``.
        encoder: The user's own encoder, if the description has no architecture.
        decoder: The user's own decoder, if the description has no architecture.
        what: Name of the description's source, for error messages.

    Returns:
        The model, in evaluation mode.

    Raises:
        StoreError: If networks of the user's own are needed but not passed, or are passed but not
            needed, if the noise model is not known, or if the tensors do not fit.
    """
    try:
        _check_sizes(description, tensors, what)
        model = _build_model(description, encoder, decoder, what)
    except StoreError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        # The first line alone: torch adds a trace of its own functions.
        reason = str(error).partition("\n")[0]
        raise StoreError(f"{what} cannot be loaded: {reason}.") from error

    fill(model, tensors, what)
    return model.eval()


def _check_sizes(description: ModelDescription, tensors: dict[str, Tensor], what: str) -> None:
    """Refuse a description whose model is far larger than the tensors of the file.

    Nothing is allocated for that: the networks are built as shapes alone.
    """
    if description["noise"]["kind"] == CorrelatedNoise.__name__:
        parts: Any = description["noise"]["arguments"]
        check_record(parts, CorrelatedNoiseArguments, f"{what}: noise")

    n_values = sum(tensor.numel() for tensor in tensors.values())
    arguments = list(_leaves(description["noise"]["arguments"]))
    shapes = [description["offset_shape"], description["scale_shape"], *arguments]

    for shape in shapes:
        sides = shape if isinstance(shape, list) else [shape]
        sizes = [side for side in sides if type(side) is int]
        if math.prod(sizes) > max(1, n_values):
            raise StoreError(f"{what}: {shape} is larger than all that the file holds.")

    if description["architecture"] is not None:
        with torch.device("meta"):
            encoder, decoder = _build_networks(description, None, None, what)
        outline = nn.ModuleDict({"encoder": encoder, "decoder": decoder})

        n_needed = sum(tensor.numel() for tensor in outline.state_dict().values())
        if n_needed > 2 * n_values + SMALL:
            compare(outline, tensors, what)


def _leaves(arguments: dict[str, Any]) -> Iterator[Any]:
    """Go through the arguments of a noise model, and of the parts that it is made of."""
    for value in arguments.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


def _build_model(
    description: ModelDescription,
    encoder: nn.Module | None,
    decoder: nn.Module | None,
    what: str,
) -> VAE:
    """Build the module that a description is of, with meaningless weights."""
    encoder, decoder = _build_networks(description, encoder, decoder, what)
    offset, scale = torch.zeros(description["offset_shape"]), torch.ones(description["scale_shape"])
    columns = tuple(description.get("columns", ()))
    levels = _levels(description)
    scaling = Scaling(offset, scale, description["quantum"], columns, levels)
    if description.get("power_transform", False):
        # Tensors of their own, which are filled one by one.
        powers, centre, spread = (torch.ones_like(scale) for _ in range(3))
        scaling = PowerScaling(offset, scale, powers, centre, spread, columns, levels)
    if scaling.columns and [len(scaling.columns)] != description["shape"]:
        raise ValueError("its columns have other names than there are columns")

    bounds: tuple[float, float] | None = None
    if description["mean_bounds"] is not None:
        low, high = description["mean_bounds"]
        bounds = (low, high)

    model = VAE(
        encoder,
        decoder,
        GlobalNoise(),
        shape=tuple(description["shape"]),
        latent_dim=description["latent_dim"],
        scaling=scaling,
        architecture=description["architecture"],
        width=description["width"],
        mean_bounds=bounds,
        deterministic=description["deterministic"],
        reads_gaps=description.get("reads_gaps", False),
        label_names=tuple(description.get("label_names", ())),
    )
    noise = {"kind": description["noise"]["kind"], "arguments": description["noise"]["arguments"]}
    model.noise = build_noise(noise, model.blank_variance_network)

    if isinstance(model.noise, CorrelatedNoise) and model.noise.correlation.shape != model.shape:
        raise ValueError("its correlation is of another shape than its examples")
    return model


def _levels(description: ModelDescription) -> dict[int, tuple[Level, ...]]:
    """Levels of categories by the number of the column, which is text in JSON."""
    return {int(i): tuple(names) for i, names in description.get("levels", {}).items()}


def _build_networks(
    description: ModelDescription,
    encoder: nn.Module | None,
    decoder: nn.Module | None,
    what: str,
) -> tuple[nn.Module, nn.Module]:
    """Build the networks that a description is of, or check that the user's own were passed."""
    architecture = description["architecture"]

    if architecture is None:
        if encoder is not None and decoder is not None:
            return encoder, decoder

        missing = []
        if encoder is None:
            missing.append("encoder=")
        if decoder is None:
            missing.append("decoder=")
        raise StoreError(
            f"{what} has networks of your own ({description['encoder']}, "
            f"{description['decoder']}): build them as they were and, in Python, pass them as "
            f"{' and '.join(missing)}."
        )

    if encoder is not None or decoder is not None:
        raise StoreError(
            f"{what} has the {architecture!r} networks of equipoise; "
            "do not pass encoder or decoder."
        )

    shape = tuple(description["shape"])
    latent_dim, width = description["latent_dim"], description["width"]
    n_labels, levels = len(description.get("label_names", ())), _levels(description)
    reads_gaps = description.get("reads_gaps", False)
    read = encoder_shape(shape, reads_gaps, levels, n_labels, architecture)
    returned = decoder_shape(shape, levels)
    encoder = build_encoder(architecture, read, latent_dim, width)
    decoder = build_decoder(architecture, returned, latent_dim + n_labels, width)
    return encoder, decoder


def save_mixture(path: Path, mixture: GaussianMixture, description: dict[str, Any]) -> None:
    """Save a mixture fitted to the aggregate posterior.

    Args:
        path: Path of the file, usually RUN/aggregate.safetensors.
        mixture: The mixture, eq. (13).
        description: JSON values that describe how it was fitted.
    """
    write_tensors(path, "mixture", mixture.state_dict(), description)


def load_mixture(path: Path) -> tuple[GaussianMixture, dict[str, Any]]:
    """Load a mixture, on the CPU.

    Args:
        path: Path of a file that :func:`save_mixture` wrote.

    Returns:
        The mixture, and the description of how it was fitted.

    Raises:
        StoreError: If the file is damaged, or does not hold a mixture.
    """
    tensors, description = read_tensors(path, "mixture", MixtureDescription)
    return restore_mixture(tensors, str(path)), dict(description)


def restore_mixture(tensors: dict[str, Tensor], what: str) -> GaussianMixture:
    """Make the mixture that tensors are of.

    Args:
        tensors: "weights" (K,), "means" (K, d) and "covariances" (K, d, d); of a conditional model
            also "label_weights" (L, K) and "label_shares" (L,).
        what: Name of their source, for error messages.

    Returns:
        The mixture.

    Raises:
        StoreError: If they are not those of a mixture.
    """
    has_labels = LABEL_TENSORS[0] in tensors
    if set(tensors) != {*MIXTURE_TENSORS, *(LABEL_TENSORS if has_labels else ())}:
        raise StoreError(
            f"{what} holds {', '.join(sorted(tensors))[:200] or 'nothing'} where a mixture has "
            f"{', '.join(MIXTURE_TENSORS)}."
        )

    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise StoreError(f"{what} does not hold a mixture: its tensors are not of one float type.")

    try:
        return LabelMixture(**tensors) if has_labels else GaussianMixture(**tensors)
    except (ValueError, RuntimeError) as error:
        raise StoreError(f"{what} does not hold a mixture: {error}") from error


def restore_labels(
    rows: Tensor, labels: Tensor | None, names: tuple[str, ...], what: str
) -> Tensor:
    r"""Let examples of a file carry the labels that lie beside them.

    Args:
        rows: Examples, (m, \*).
        labels: Their numbers, (m,), -1 where there is none. None leaves the examples as they are.
        names: The labels of the model.
        what: Name of the source, for error messages.

    Returns:
        The examples.

    Raises:
        StoreError: If the labels are not those of the examples, or not the model's.
    """
    if labels is None:
        return rows
    if labels.dtype != torch.int64 or labels.shape != rows.shape[:1]:
        raise StoreError(f"{what} does not hold one label for each of its rows.")
    if bool(((labels < UNKNOWN) | (labels >= len(names))).any()):
        raise StoreError(f"{what} holds labels that the model does not know.")
    return labelled(rows, labels)


def save_flow(path: Path, flow: CodeFlow, description: dict[str, Any]) -> None:
    """Save a flow fitted to the aggregate posterior.

    Args:
        path: Path of the file, usually RUN/flow.safetensors.
        flow: The fitted flow.
        description: JSON values that describe how it was fitted.
    """
    write_tensors(path, "flow", flow.state_dict(), {"flow": flow.description(), **description})


def load_flow(path: Path) -> tuple[CodeFlow, dict[str, Any]]:
    """Load a flow, on the CPU.

    Args:
        path: Path of a file that :func:`save_flow` wrote.

    Returns:
        The flow, and the description of how it was fitted.

    Raises:
        StoreError: If the file is damaged or does not fit.
        ImportError: If the library of the extra ``flow`` is missing.
    """
    tensors, description = read_tensors(path, "flow", FlowDescription)
    sizes = description["flow"]
    layers = [sizes["latent_dim"], *sizes["hidden"]]
    n_weights = sizes["n_transforms"] * sum(a * b for a, b in itertools.pairwise(layers))
    if n_weights > sum(tensor.numel() for tensor in tensors.values()):
        raise StoreError(f"{path} holds fewer weights than a flow of its description has.")

    means = tensors.get("base.means")
    if means is None or means.shape != (sizes["n_components"], sizes["latent_dim"]):
        raise StoreError(f"{path} does not hold the mixture of its description.")

    prefix = "base."
    base_tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    base = restore_mixture(base_tensors, str(path))
    try:
        flow = CodeFlow(base.float(), sizes["n_transforms"], sizes["hidden"])
    except RuntimeError as error:
        # Covariances may be positive definite in float64 only.
        raise StoreError(f"{path} does not hold a flow: {error}") from error
    fill(flow, tensors, str(path))
    others = {name: value for name, value in description.items() if name != "flow"}
    return flow.requires_grad_(False).eval(), others
