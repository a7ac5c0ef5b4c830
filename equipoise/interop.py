r"""Models trained elsewhere, as a :class:`equipoise.model.VAE` that learns its noise variance.

Every weighting of squared error against KL *is* a variance: SSE / (2 sigma^2) + KL. pythae's
``mse`` loss has sigma^2 = 1. The training example of diffusers, SSE + 1e-6 KL, has sigma^2 = 5e-7.
The models made here start from sigma^2 = 1. There are two ways to go on:

- ``Trainer(model, data, TrainConfig(stage_1_epochs=0)).fit()`` computes eq. (10) over the training
  set and adds the predicted variance of eq. (11). It trains nothing else after
  ``model.encoder.requires_grad_(False)`` and ``model.decoder.requires_grad_(False)``.
- ``train(data, config, encoder=model.encoder, decoder=model.decoder)``, with the model's
  ``latent_dim`` in the configuration, makes a run of both stages that starts from their weights.

Whoever reads the original model again can load the saved one:
``load_model(path, model.encoder, model.decoder)``.
"""

import math
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.files import StoreError
from equipoise.gaussian import Gaussian
from equipoise.model import VAE, Scaling
from equipoise.noise import GlobalNoise
from equipoise.records import PeerConfig, read_record
from equipoise.store import compare, fill

PYTHAE_UNITS = 512
"""Width of the hidden layer in pythae's default networks."""


def read_pythae(
    folder: str | Path,
    *,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    scaling: Scaling | None = None,
) -> VAE:
    """Read a ``VAE`` of pythae, or a relative with the same networks such as ``BetaVAE``.

    Only the tensors and the JSON in the folder are read. Pickled networks are not.

    Args:
        folder: The folder that pythae wrote, with ``model_config.json`` and ``model.pt``.
        encoder: The ``BaseEncoder`` of pythae that the model was trained with, if it is not the
            default. Its weights do not matter.
        decoder: The ``BaseDecoder`` of pythae that the model was trained with, if it is not the
            default. Its weights do not matter.
        scaling: The units of the data that the model will see, such as
            ``Scaling(tensor(0.0), tensor(255.0), 1 / 255)`` for images of 8 bits. If None, the
            units that it was trained in.

    Returns:
        The model, in evaluation mode.

    Raises:
        StoreError: If a file is absent or damaged, or if its weights belong to other networks.

    Example:
        >>> model = read_pythae("my_model/final_model")  # doctest: +SKIP
    """
    config_file, weights_file = Path(folder, "model_config.json"), Path(folder, "model.pt")
    config = read_record(config_file, PeerConfig)

    input_dim = config.get("input_dim")
    if input_dim is None:
        raise StoreError(
            f"{config_file} does not say the shape of an example: add it, "
            'such as "input_dim": [1, 28, 28]'
        )

    for name, network in (("encoder", encoder), ("decoder", decoder)):
        if network is None and not config.get(f"uses_default_{name}", True):
            raise StoreError(
                f"{folder} has an {name} of your own: build it as it was and pass it as {name}="
            )

    shape, latent_dim = tuple(input_dim), config["latent_dim"]
    weights = _pythae_weights(weights_file)
    if math.prod(shape) > sum(tensor.numel() for tensor in weights.values()):
        raise StoreError(f"{config_file}: input_dim is larger than all that {weights_file} holds.")

    with torch.device("meta"):
        # Shapes alone: nothing is allocated before they are those of the weights.
        outline = nn.ModuleDict(
            {
                "encoder": encoder or _DefaultEncoder(shape, latent_dim),
                "decoder": decoder or _DefaultDecoder(shape, latent_dim),
            }
        )
    compare(outline, weights, str(weights_file))

    networks = nn.ModuleDict(
        {
            "encoder": encoder or _DefaultEncoder(shape, latent_dim),
            "decoder": decoder or _DefaultDecoder(shape, latent_dim),
        }
    )
    fill(networks, weights, str(weights_file))

    return VAE(
        PythaeEncoder(networks["encoder"]),
        PythaeDecoder(networks["decoder"]),
        GlobalNoise(),
        shape=shape,
        latent_dim=latent_dim,
        scaling=scaling,
    ).eval()


def _pythae_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of pythae's networks by name."""
    if not path.is_file():
        raise StoreError(f"There is no {path}.")

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights: dict[str, Tensor] = content["model_state_dict"]
        if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise TypeError("other values than tensors")
    except Exception as error:  # torch's reader raises nearly anything on a broken file
        raise StoreError(
            f"{path} is damaged, or holds something else than the weights of a pythae model."
        ) from error

    return weights


class PythaeEncoder(nn.Module):
    """An encoder that returns q(z|x) under pythae's names.

    Args:
        module: A network that returns a mapping with ``embedding`` and ``log_covariance``, (B, d)
            each.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Float[Tensor, "batch *event"]) -> Gaussian:
        """Map data to q(z|x)."""
        output = self.module(x)
        return Gaussian(output["embedding"], output["log_covariance"])


class PythaeDecoder(nn.Module):
    r"""A decoder that returns the mean of p(x|z) under pythae's name.

    Args:
        module: A network that returns a mapping with ``reconstruction``, (B, \*).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch *event"]:
        """Map codes to means."""
        mean: Tensor = self.module(z)["reconstruction"]
        return mean


class _DefaultEncoder(nn.Module):
    """The default encoder of pythae, with pythae's names of the layers."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(math.prod(shape), PYTHAE_UNITS), nn.ReLU())]
        )
        self.embedding = nn.Linear(PYTHAE_UNITS, latent_dim)
        self.log_var = nn.Linear(PYTHAE_UNITS, latent_dim)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.layers[0](x.flatten(1))
        return {"embedding": self.embedding(hidden), "log_covariance": self.log_var(hidden)}


class _DefaultDecoder(nn.Module):
    """The default decoder of pythae, with pythae's names of the layers."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(latent_dim, PYTHAE_UNITS), nn.ReLU()),
                nn.Sequential(nn.Linear(PYTHAE_UNITS, math.prod(shape)), nn.Sigmoid()),
            ]
        )

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        x = self.layers[1](self.layers[0](z))
        return {"reconstruction": x.unflatten(1, self.shape)}


@runtime_checkable
class AutoencoderKL(Protocol):
    """The parts of diffusers' class ``AutoencoderKL`` that are used here."""

    encoder: nn.Module
    quant_conv: nn.Module | None
    post_quant_conv: nn.Module | None
    decoder: nn.Module


def from_autoencoder_kl(
    autoencoder: AutoencoderKL, shape: tuple[int, int, int], scaling: Scaling | None = None
) -> VAE:
    """Use the networks of an ``AutoencoderKL`` of diffusers in a model. They are not copied.

    The codes are its latents (C, h, w), flattened, without the ``scaling_factor`` of the diffusion
    model. Model units are [0, 1] where those of diffusers are [-1, 1], so that variances can be
    compared with those of other models.

    Args:
        autoencoder: The model of diffusers, in float32.
        shape: (channels, height, width) of the images to come. The encoder must be able to halve
            height and width without remainder.
        scaling: The units of the data that the model will see, such as
            ``Scaling(tensor(0.0), tensor(255.0), 1 / 255)`` for images of 8 bits. If None, [0, 1].

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If the autoencoder does not map the shape to itself.

    Example:
        >>> from diffusers import AutoencoderKL  # doctest: +SKIP
        >>> name = "stabilityai/sd-vae-ft-mse"  # doctest: +SKIP
        >>> autoencoder = AutoencoderKL.from_pretrained(name)  # doctest: +SKIP
        >>> model = from_autoencoder_kl(autoencoder, (3, 64, 64))  # doctest: +SKIP
        >>> model.latent_dim  # 4 x 8 x 8  # doctest: +SKIP
        256
    """
    encoder = _sequence(_Affine(2.0, -1.0), autoencoder.encoder, autoencoder.quant_conv).eval()
    with torch.no_grad():
        _, channels, height, width = encoder(torch.zeros(1, *shape)).shape

    latents = (channels // 2, height, width)  # the other half of the channels are log-variances
    decoder = _sequence(
        nn.Unflatten(1, latents),
        autoencoder.post_quant_conv,
        autoencoder.decoder,
        _Affine(0.5, 0.5),
    )
    return VAE(
        _sequence(encoder, nn.Flatten()),
        decoder,
        GlobalNoise(),
        shape=shape,
        latent_dim=math.prod(latents),
        scaling=scaling,
    ).eval()


def _sequence(*modules: nn.Module | None) -> nn.Sequential:
    """Put modules in a row, without those that are None."""
    return nn.Sequential(*(module for module in modules if module is not None))


class _Affine(nn.Module):
    """Changes from one unit to another."""

    def __init__(self, scale: float, offset: float) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.offset
