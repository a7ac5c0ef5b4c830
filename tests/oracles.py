"""Closed forms for tests, and records as a run writes them.

The closed form is probabilistic principal component analysis, the limit of a linear VAE.

The model is x = W z + b + e with e ~ N(0, var I). At the maximum of the likelihood, var is the mean
of the discarded eigenvalues of the covariance.

Source: Tipping and Bishop (1999), *Probabilistic principal component analysis*.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from equipoise.gaussian import Gaussian
from equipoise.model import VAE
from equipoise.noise import NoiseModel
from equipoise.store import read_digest


class Ppca(NamedTuple):
    weight: Tensor  # (D, d)
    bias: Tensor  # (D,)
    var: Tensor  # ()

    @classmethod
    def fit(cls, x: Tensor, latent_dim: int) -> "Ppca":
        bias = x.mean(0)
        values, vectors = torch.linalg.eigh((x - bias).T @ (x - bias) / len(x))
        values, vectors = values.flip(0), vectors.flip(1)
        var = values[latent_dim:].mean()
        return cls(vectors[:, :latent_dim] * (values[:latent_dim] - var).sqrt(), bias, var)

    def log_prob(self, x: Tensor) -> Tensor:
        covariance = self.weight @ self.weight.T + self.var * torch.eye(
            len(self.bias), dtype=x.dtype
        )
        return torch.distributions.MultivariateNormal(self.bias, covariance).log_prob(x)


class ExactEncoder(nn.Module):
    """Posterior of PPCA. The fitted W^T W is diagonal, so that the covariance is diagonal."""

    def __init__(self, ppca: Ppca) -> None:
        super().__init__()
        self.ppca = ppca
        self.precision = (ppca.weight.T @ ppca.weight).diagonal() + ppca.var

    def forward(self, x: Tensor) -> Gaussian:
        mean = (x - self.ppca.bias) @ self.ppca.weight / self.precision
        log_var = (self.ppca.var / self.precision).log().expand_as(mean)
        return Gaussian(mean, log_var)


class LinearDecoder(nn.Module):
    def __init__(self, ppca: Ppca) -> None:
        super().__init__()
        self.ppca = ppca

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.ppca.weight.T + self.ppca.bias


def ppca_vae(ppca: Ppca, noise: NoiseModel) -> VAE:
    """The VAE that is exactly this PPCA."""
    dimensions, latent_dim = ppca.weight.shape
    encoder, decoder = ExactEncoder(ppca), LinearDecoder(ppca)
    # A float64 parameter tells the model in which precision to check its shapes.
    decoder.register_parameter("dtype", nn.Parameter(torch.zeros((), dtype=ppca.bias.dtype)))
    return VAE(encoder, decoder, noise, shape=(dimensions,), latent_dim=latent_dim)


def linear_gaussian_data(
    n: int = 2000, dimensions: int = 8, latent_dim: int = 3, noise_std: float = 0.3
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(dimensions, latent_dim, generator=generator, dtype=torch.float64)
    z = torch.randn(n, latent_dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, dimensions, generator=generator, dtype=torch.float64)
    return z @ weight.T + noise_std * noise + 2.0


def epoch_row(epoch: int = 1, **figures: object) -> dict[str, object]:
    """A line of metrics.jsonl, with every key that it must have."""
    splits = {
        f"{split}_{name}": 1.0
        for split in ("train", "validation")
        for name in ("elbo", "log_likelihood", "kl", "mse", "noise_var")
    }
    return {
        "epoch": epoch,
        "stage": 1,
        "learning_rate": 0.001,
        "seconds": 1.0,
        "examples_per_second": 10.0,
        **splits,
        "validation_noise_std": 1.0,
        "validation_floor_share": 0.0,
        "active_units": 1,
        "decision": "",
        **figures,
    }


def evaluation_about(folder: Path) -> dict[str, object]:
    """What evaluation.json says of itself, for the model and the mixture in a run folder."""
    return {
        "format": "equipoise-1",
        "data": {
            "name": "mnist",
            "fingerprint": "f1ea",
            "test": "test",
            "test_sha256": "0",
            "n_test": 180,
        },
        "model": read_digest(folder / "model.safetensors"),
        "mixture": read_digest(folder / "aggregate.safetensors"),
        "n_components": 1,
        "device": "cpu",
        "versions": {},
        "sections": {},
        "sources": {},
    }
