"""Files: whole or not at all, safetensors and JSON, never pickle.

A model is ``model.safetensors``: its tensors, and in the file's metadata the JSON description from which the
module is built before it is filled. Loading verifies names, shapes and dtypes and says what differs.
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


class StoreError(ValueError):
    """A file that cannot be read or written, with what to do about it."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file whole: a temporary beside it, flushed to disk, then renamed over it.

    A kill at any moment leaves the old file or the new one, and a full disk leaves the old one.

    Args:
        path: where the file shall be; its folder is made.

    Yields:
        The temporary path to write to, with the same ending.

    Raises:
        OSError: if the disk is full or may not be written to.
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
            message = f"no space left to write {path}; what was there before is untouched, so free some and go on"
            raise OSError(error.errno, message) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system lets folders be opened."""
    with contextlib.suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 (any JSON value)
    """Write JSON whole.

    Args:
        path: the file.
        value: any JSON value; NaN is refused.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:  # noqa: ANN401 (any JSON value)
    """Read JSON.

    Args:
        path: the file.

    Returns:
        The value.

    Raises:
        StoreError: if the file is absent or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"There is no {path}.") from error
    except ValueError as error:
        raise StoreError(f"{path} is not valid JSON ({error}).") from error


def write_tensors(path: Path, kind: str, tensors: dict[str, Tensor], description: Any) -> None:  # noqa: ANN401 (JSON)
    """Write tensors and a JSON description into one safetensors file, whole, with a checksum of the tensors.

    Args:
        path: the file.
        kind: what it holds, such as "model"; asked for when it is read.
        tensors: by name; stored contiguous, on the CPU.
        description: any JSON value.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "kind": kind,
        "description": json.dumps(description, allow_nan=False),
        "sha256": _checksum(plain),
    }
    data = serialise(plain, metadata)
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`write_tensors` wrote.

    Args:
        path: the file.
        kind: what it should hold.

    Returns:
        Tensors by name, on the CPU, and the description.

    Raises:
        StoreError: if the file is absent, torn, altered, or from elsewhere.
    """
    if not path.is_file():
        raise StoreError(f"There is no {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged or not a safetensors file ({error}).") from error
    found = metadata.get("format", "")
    if not found.startswith("equipoise-"):
        raise StoreError(
            f"{path} was not written by equipoise: its metadata has no equipoise format."
        )
    if found != FORMAT:
        raise StoreError(
            f"{path} has the format {found}, this version of equipoise reads {FORMAT}; update equipoise."
        )
    if metadata.get("kind") != kind:
        raise StoreError(f"{path} holds a {metadata.get('kind')}, not a {kind}.")
    if metadata.get("sha256") != _checksum(tensors):
        raise StoreError(f"{path} was altered after it was written: its checksum differs.")
    return tensors, json.loads(metadata["description"])


def file_checksum(path: Path) -> str:
    """Tell a file from any other.

    Args:
        path: the file.

    Returns:
        SHA-256 of its bytes, hexadecimal.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fill(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Fill a module's parameters and buffers, after comparing names, shapes and dtypes.

    Args:
        module: built with the shapes that the tensors should have.
        tensors: by the names of ``module.state_dict()``.
        what: the file, for the message.

    Raises:
        StoreError: if anything differs; lists all differences.
    """
    expected = module.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        want, got = expected[name], tensors[name]
        if want.shape != got.shape or want.dtype != got.dtype:
            problems.append(
                f"{name}: expected {tuple(want.shape)} {want.dtype}, found {tuple(got.shape)} {got.dtype}"
            )
    if problems:
        raise StoreError(f"{what} does not fit the model:\n  " + "\n  ".join(sorted(problems)))
    module.load_state_dict(tensors)


def save_model(path: Path, model: VAE) -> None:
    """Save a model: networks, noise and units.

    Args:
        path: file to write, usually RUN/model.safetensors.
        model: any :class:`VAE`, with our networks or the user's own.
    """
    write_tensors(path, "model", model.state_dict(), model.description())


def load_model(
    path: Path, encoder: nn.Module | None = None, decoder: nn.Module | None = None
) -> VAE:
    """Load a model, in evaluation mode, on the CPU.

    Args:
        path: file that :func:`save_model` wrote.
        encoder: the user's own encoder, built as it was when saved; weights need not match.
        decoder: likewise.

    Returns:
        The model.

    Raises:
        StoreError: if the file is damaged or does not fit, or the model has networks of the user's own that
            were not given.
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
    """Build the module that a description tells of; its tensors are still to be filled.

    Args:
        description: what :meth:`VAE.description` returned.
        encoder: the user's own, if the description has no architecture.
        decoder: likewise.
        what: source of the description, for messages.

    Returns:
        The model with meaningless weights.

    Raises:
        StoreError: if the user's own networks are needed, or given where they are not.
    """
    shape, latent_dim = tuple(description["shape"]), description["latent_dim"]
    architecture, width = description["architecture"], description["width"]
    own = [name for name, module in (("encoder", encoder), ("decoder", decoder)) if module is None]
    if architecture is None and own:
        raise StoreError(
            f"{what} has networks of your own ({description['encoder']}, {description['decoder']}): build them as they "
            f"were and pass them as {' and '.join(f'{name}=' for name in own)}."
        )
    if architecture is not None:
        if len(own) < 2:
            raise StoreError(
                f"{what} has the {architecture!r} networks of equipoise; do not pass encoder or decoder."
            )
        encoder = build_encoder(architecture, shape, latent_dim, width)
        decoder = build_decoder(architecture, shape, latent_dim, width)
    scaling = Scaling(
        torch.zeros(description["offset_shape"]),
        torch.ones(description["scale_shape"]),
        description["quantum"],
    )
    model = VAE(
        encoder,  # type: ignore[arg-type]
        decoder,  # type: ignore[arg-type]
        GlobalNoise(),
        shape=shape,
        latent_dim=latent_dim,
        scaling=scaling,
        architecture=architecture,
        width=width,
        mean_bounds=tuple(description["mean_bounds"]) if description["mean_bounds"] else None,
        deterministic=description["deterministic"],
    )

    try:
        model.noise = build_noise(description["noise"], model.blank_variance_network)
    except ValueError as error:
        raise StoreError(f"{what} cannot be loaded: {error}.") from error
    return model


def save_mixture(path: Path, mixture: GaussianMixture, description: dict[str, Any]) -> None:
    """Save a mixture fitted to the aggregate posterior.

    Args:
        path: file to write, usually RUN/aggregate.safetensors.
        mixture: weights, means and covariances.
        description: how it was fitted, JSON values.
    """
    tensors = {name: getattr(mixture, name) for name in ("weights", "means", "covariances")}
    write_tensors(path, "mixture", tensors, description)


def load_mixture(path: Path) -> tuple[GaussianMixture, dict[str, Any]]:
    """Load a mixture.

    Args:
        path: file that :func:`save_mixture` wrote.

    Returns:
        The mixture and how it was fitted.
    """
    tensors, description = read_tensors(path, "mixture")
    return GaussianMixture(**tensors), description


def save_flow(path: Path, flow: CodeFlow, description: dict[str, Any]) -> None:
    """Save a flow fitted to the aggregate posterior.

    Args:
        path: file to write, usually RUN/flow.safetensors.
        flow: fitted.
        description: how it was fitted, JSON values.
    """
    write_tensors(path, "flow", flow.state_dict(), {"flow": flow.description(), **description})


def load_flow(path: Path) -> tuple[CodeFlow, dict[str, Any]]:
    """Load a flow, on the CPU.

    Args:
        path: file that :func:`save_flow` wrote.

    Returns:
        The flow and how it was fitted.

    Raises:
        StoreError: if the file is damaged or does not fit.
        ImportError: if the library of the extra ``flow`` is missing.
    """
    tensors, description = read_tensors(path, "flow")
    options = description.pop("flow")
    K, d = options.pop("n_components"), options.pop("latent_dim")
    blank = GaussianMixture(
        torch.full((K,), 1 / K), torch.zeros(K, d), torch.eye(d).repeat(K, 1, 1)
    )
    flow = CodeFlow(blank, **options)
    fill(flow, tensors, str(path))
    return flow.requires_grad_(False).eval(), description
