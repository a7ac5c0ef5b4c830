"""Reading and writing files: safetensors and JSON, never pickle.

A file appears complete or not at all. The file of a model, ``model.safetensors``, holds its tensors
and, in the metadata, a JSON description. To load a model, the module is built from the description
and then filled with the tensors. Names, shapes and dtypes are compared before that, and the error
names all differences.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from equipoise.aggregate import GaussianMixture
from equipoise.flow_fit import CodeFlow
from equipoise.model import VAE, Scaling
from equipoise.networks import build_decoder, build_encoder
from equipoise.noise import GlobalNoise, build_noise

FORMAT = "equipoise-1"
"""Format of the tensor files, which is written into their metadata."""
METADATA_KEY = "equipoise"
"""The one key of a file's metadata, under which everything but the tensors is."""


class StoreError(ValueError):
    """A file cannot be read or written. The message says what to do about it."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file so that it appears complete or not at all.

    The data go to a temporary file in the same folder, are flushed to the disk, and the temporary
    file is renamed. If the process is killed, the old file or the new one is there. If the disk is
    full, the old one is there.

    Args:
        path: Path of the file. Its folder is made if it does not exist.

    Yields:
        Path of the temporary file to write to. It has the same ending.

    Raises:
        OSError: If the disk is full or cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")

    try:
        yield temporary

        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)

    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"no space left to write {path}; what was there before is untouched, "
                "so free some and go on"
            )
            raise OSError(error.errno, message) from error
        raise

    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush a rename in a folder to the disk, on systems that can open folders."""
    with contextlib.suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 (any JSON value)
    """Write a JSON file, which appears complete or not at all.

    Args:
        path: Path of the file.
        value: Any JSON value. NaN and infinite numbers are refused.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:  # noqa: ANN401 (any JSON value)
    """Read a JSON file.

    Args:
        path: Path of the file.

    Returns:
        The JSON value.

    Raises:
        StoreError: If the file does not exist or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"There is no {path}.") from error
    except ValueError as error:
        raise StoreError(f"{path} is not valid JSON ({error}).") from error


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
    """
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


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """Read a file that :func:`write_tensors` wrote.

    Args:
        path: Path of the file.
        kind: Name of what the file should hold.

    Returns:
        Tensors by name, on the CPU, and the description.

    Raises:
        StoreError: If the file does not exist, is damaged, was altered, was not written by
            equipoise, or holds something else.
    """
    if not path.is_file():
        raise StoreError(f"There is no {path}.")

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged or not a safetensors file ({error}).") from error

    if METADATA_KEY not in metadata:
        raise StoreError(
            f"{path} was not written by equipoise: its metadata has no equipoise format."
        )
    record = _read_record(path, metadata[METADATA_KEY])
    if record["kind"] != kind:
        raise StoreError(f"{path} holds a {record['kind']}, not a {kind}.")
    if record["sha256"] != _checksum(kind, record["description"], tensors):
        raise StoreError(f"{path} was altered after it was written: its checksum differs.")

    return tensors, json.loads(record["description"])


def _read_record(path: Path, text: str) -> dict[str, str]:
    """Read the metadata of a file; its format must be ours, and every entry a string."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise StoreError(f"{path} was altered after it was written: {error}.") from error

    entries = ("format", "kind", "description", "sha256")
    is_record = isinstance(record, dict)
    if not is_record or not all(isinstance(record.get(entry), str) for entry in entries):
        raise StoreError(f"{path} was altered after it was written: its metadata lack an entry.")

    if record["format"] != FORMAT:
        raise StoreError(
            f"{path} has the format {record['format']}, this version of equipoise reads {FORMAT}; "
            "update equipoise."
        )
    return {entry: record[entry] for entry in entries}


def file_checksum(path: Path) -> str:
    """Compute a checksum of a file.

    Args:
        path: Path of the file.

    Returns:
        SHA-256 of its bytes, hexadecimal.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
        StoreError: If names, shapes or dtypes differ. The message lists all differences.
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
        raise StoreError(f"{what} does not fit the model:\n  " + "\n  ".join(sorted(problems)))
    module.load_state_dict(tensors)


def save_model(path: Path, model: VAE) -> None:
    """Save a model with its networks, its noise model and its scaling.

    Args:
        path: Path of the file, usually RUN/model.safetensors.
        model: Any :class:`VAE`, with networks of ``networks.py`` or of the user's own.
    """
    write_tensors(path, "model", model.state_dict(), model.description())


def load_model(
    path: Path, encoder: nn.Module | None = None, decoder: nn.Module | None = None
) -> VAE:
    """Load a model, in evaluation mode, on the CPU.

    Args:
        path: Path of a file that :func:`save_model` wrote.
        encoder: The user's own encoder, built as it was when the model was saved. Its weights are
            replaced.
        decoder: The user's own decoder, built as it was when the model was saved. Its weights are
            replaced.

    Returns:
        The model.

    Raises:
        StoreError: If the file is damaged or does not fit, or if the model has networks of the
            user's own that were not passed.
    """
    tensors, description = read_tensors(path, "model")
    model = build_model(description, encoder, decoder, what=str(path))
    fill(model, tensors, str(path))
    return model.eval()


def build_model(
    description: dict[str, Any],
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    what: str = "the description",
) -> VAE:
    """Build the module that a description is of. Its tensors are filled afterwards.

    Args:
        description: What :meth:`VAE.description` returned.
        encoder: The user's own encoder, if the description has no architecture.
        decoder: The user's own decoder, if the description has no architecture.
        what: Name of the description's source, for error messages.

    Returns:
        The model, with meaningless weights.

    Raises:
        StoreError: If networks of the user's own are needed but not passed, or are passed but not
            needed, or if the noise model is not known.
    """
    encoder, decoder = _build_networks(description, encoder, decoder, what)
    scaling = Scaling(
        torch.zeros(description["offset_shape"]),
        torch.ones(description["scale_shape"]),
        description["quantum"],
    )

    mean_bounds = description["mean_bounds"]
    if mean_bounds is not None:
        mean_bounds = tuple(mean_bounds)
    model = VAE(
        encoder,
        decoder,
        GlobalNoise(),
        shape=tuple(description["shape"]),
        latent_dim=description["latent_dim"],
        scaling=scaling,
        architecture=description["architecture"],
        width=description["width"],
        mean_bounds=mean_bounds,
        deterministic=description["deterministic"],
    )

    try:
        model.noise = build_noise(description["noise"], model.blank_variance_network)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{what} cannot be loaded: {error}.") from error
    return model


def _build_networks(
    description: dict[str, Any], encoder: nn.Module | None, decoder: nn.Module | None, what: str
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
            f"{description['decoder']}): build them as they were and pass them as "
            f"{' and '.join(missing)}."
        )

    if encoder is not None or decoder is not None:
        raise StoreError(
            f"{what} has the {architecture!r} networks of equipoise; "
            "do not pass encoder or decoder."
        )

    shape = tuple(description["shape"])
    latent_dim, width = description["latent_dim"], description["width"]
    encoder = build_encoder(architecture, shape, latent_dim, width)
    decoder = build_decoder(architecture, shape, latent_dim, width)
    return encoder, decoder


def save_mixture(path: Path, mixture: GaussianMixture, description: dict[str, Any]) -> None:
    """Save a mixture fitted to the aggregate posterior.

    Args:
        path: Path of the file, usually RUN/aggregate.safetensors.
        mixture: The mixture, eq. (13).
        description: JSON values that describe how it was fitted.
    """
    tensors = {name: getattr(mixture, name) for name in ("weights", "means", "covariances")}
    write_tensors(path, "mixture", tensors, description)


def load_mixture(path: Path) -> tuple[GaussianMixture, dict[str, Any]]:
    """Load a mixture, on the CPU.

    Args:
        path: Path of a file that :func:`save_mixture` wrote.

    Returns:
        The mixture, and the description of how it was fitted.
    """
    tensors, description = read_tensors(path, "mixture")
    return GaussianMixture(**tensors), description


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
    tensors, description = read_tensors(path, "flow")
    options = description.pop("flow")
    K = options.pop("n_components")
    d = options.pop("latent_dim")

    weights = torch.full((K,), 1 / K)
    covariances = torch.eye(d).repeat(K, 1, 1)
    blank = GaussianMixture(weights, torch.zeros(K, d), covariances)
    flow = CodeFlow(blank, **options)
    fill(flow, tensors, str(path))

    return flow.requires_grad_(False).eval(), description
