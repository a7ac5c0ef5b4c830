r"""Models trained elsewhere, as a :class:`equipoise.model.VAE` that learns its noise variance.

Every weighting of squared error against KL *is* a variance: SSE / (2 sigma^2) + KL. pythae's ``mse`` loss has
sigma^2 = 1, diffusers' training example, SSE + 1e-6 KL, has 5e-7. The models made here start from sigma^2 = 1. Then

- ``Trainer(model, data, TrainConfig(stage_1_epochs=0)).fit()`` computes eq. (10) over the training set and adds the
  predicted variance of eq. (11); after ``model.encoder.requires_grad_(False)`` and likewise for the decoder, it trains
  nothing else;
- ``train(data, config, encoder=model.encoder, decoder=model.decoder)``, with the model's ``latent_dim`` in the
  configuration, makes a run of both stages that starts from their weights.

What is saved can be loaded by whoever reads the original again: ``load_model(path, model.encoder, model.decoder)``.
"""

import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.gaussian import Gaussian
from equipoise.model import VAE, Scaling
from equipoise.noise import GlobalNoise
from equipoise.store import StoreError, fill, read_json

PYTHAE_UNITS = 512


def read_pythae(
    folder: str | Path,
    *,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    scaling: Scaling | None = None,
) -> VAE:
    """Read a ``VAE`` of pythae, or a relative with the same networks such as ``BetaVAE``.

    Of the folder, tensors and JSON are read; pickled networks are not.

    Args:
        folder: what pythae wrote, with ``model_config.json`` and ``model.pt``.
        encoder: pythae's ``BaseEncoder`` that the model was trained with, if not the default; of any weights.
        decoder: likewise.
        scaling: the units of the data that it will see, ``Scaling(tensor(0.0), tensor(255.0), 1 / 255)`` for images of
            8 bits; the units that it was trained in if None.

    Returns:
        The model, in evaluation mode.

    Raises:
        StoreError: if a file is absent or damaged, or the networks are others than these.

    Example:
        >>> model = read_pythae("my_model/final_model")  # doctest: +SKIP
    """
    config_file, weights_file = Path(folder, "model_config.json"), Path(folder, "model.pt")
    config = read_json(config_file)
    if config.get("input_dim") is None:
        raise StoreError(
            f'{config_file} does not say the shape of an example: add it, such as "input_dim": [1, 28, 28]'
        )
    for name, given in (("encoder", encoder), ("decoder", decoder)):
        if given is None and not config.get(f"uses_default_{name}", True):
            raise StoreError(
                f"{folder} has an {name} of your own: build it as it was and pass it as {name}="
            )
    shape, latent_dim = tuple(config["input_dim"]), config["latent_dim"]
    networks = nn.ModuleDict(
        {
            "encoder": encoder or _DefaultEncoder(shape, latent_dim),
            "decoder": decoder or _DefaultDecoder(shape, latent_dim),
        }
    )
    fill(networks, _pythae_weights(weights_file), str(weights_file))
    return VAE(
        PythaeEncoder(networks["encoder"]),
        PythaeDecoder(networks["decoder"]),
        GlobalNoise(),
        shape=shape,
        latent_dim=latent_dim,
        scaling=scaling,
    ).eval()


def _pythae_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise StoreError(f"There is no {path}.")
    try:
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)[
            "model_state_dict"
        ]
    except (UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise StoreError(
            f"{path} is damaged, or holds something else than the weights of a pythae model."
        ) from error
    return weights


class PythaeEncoder(nn.Module):
    """An encoder that returns q(z|x) under pythae's names.

    Args:
        module: returns a mapping with ``embedding`` and ``log_covariance``, (B, d) each.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Float[Tensor, "batch *event"]) -> Gaussian:
        """Map data to q(z|x)."""
        found = self.module(x)
        return Gaussian(found["embedding"], found["log_covariance"])


class PythaeDecoder(nn.Module):
    r"""A decoder that returns means under pythae's name.

    Args:
        module: returns a mapping with ``reconstruction``, (B, \*).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch *event"]:
        """Map codes to means."""
        mean: Tensor = self.module(z)["reconstruction"]
        return mean


class _DefaultEncoder(nn.Module):
    """What pythae takes if it is given no encoder, under pythae's names of the layers."""

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
    """Likewise for the decoder."""

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
        return {"reconstruction": self.layers[1](self.layers[0](z)).unflatten(1, self.shape)}


@runtime_checkable
class AutoencoderKL(Protocol):
    """What is used of diffusers' class of this name."""

    encoder: nn.Module
    quant_conv: nn.Module | None
    post_quant_conv: nn.Module | None
    decoder: nn.Module


def from_autoencoder_kl(
    autoencoder: AutoencoderKL, shape: tuple[int, int, int], scaling: Scaling | None = None
) -> VAE:
    """Take over an ``AutoencoderKL`` of diffusers: its networks, not a copy of them.

    The codes are its latents (C, h, w) in a row, without the ``scaling_factor`` of the diffusion model. Model units are
    [0, 1] where its own are [-1, 1], so that variances compare with those of other models.

    Args:
        autoencoder: in float32.
        shape: (channels, height, width) of the images to come; sizes that it halves without remainder.
        scaling: the units of the data that it will see, ``Scaling(tensor(0.0), tensor(255.0), 1 / 255)`` for images of
            8 bits; [0, 1] if None.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if it does not map the shape to itself.

    Example:
        >>> from diffusers import AutoencoderKL  # doctest: +SKIP
        >>> autoencoder = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse")  # doctest: +SKIP
        >>> model = from_autoencoder_kl(autoencoder, (3, 64, 64))  # doctest: +SKIP
        >>> model.latent_dim  # 4 x 8 x 8  # doctest: +SKIP
        256
    """
    encoder = _sequence(_Affine(2.0, -1.0), autoencoder.encoder, autoencoder.quant_conv).eval()
    with torch.no_grad():
        _, channels, height, width = encoder(torch.zeros(1, *shape)).shape
    latents = (channels // 2, height, width)
    return VAE(
        _sequence(encoder, nn.Flatten()),
        _sequence(
            nn.Unflatten(1, latents),
            autoencoder.post_quant_conv,
            autoencoder.decoder,
            _Affine(0.5, 0.5),
        ),
        GlobalNoise(),
        shape=shape,
        latent_dim=math.prod(latents),
        scaling=scaling,
    ).eval()


def _sequence(*modules: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(*(module for module in modules if module is not None))


class _Affine(nn.Module):
    """From one unit to another."""

    def __init__(self, scale: float, offset: float) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.offset
