"""Readers of other libraries' models.

The model computes the same as there, no code from a file runs, and the noise variance is learned.
"""

import json
import math
import os
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from equipoise.config import TrainConfig
from equipoise.files import StoreError
from equipoise.interop import from_autoencoder_kl, read_pythae
from equipoise.model import Scaling
from equipoise.noise import PredictedNoise
from equipoise.objectives import Elbo
from equipoise.store import load_model, save_model
from equipoise.training.job import train
from equipoise.training.trainer import Trainer

SHAPE, LATENT_DIM = (1, 8, 8), 4
SIXTEEN_LEVELS = Scaling(torch.tensor(0.0), torch.tensor(16.0), 1 / 16)


def write_pythae(folder, weights, **config):
    """A folder as pythae 0.1.2 writes it."""
    folder.mkdir(exist_ok=True)
    config = {
        "name": "VAEConfig",
        "input_dim": SHAPE,
        "latent_dim": LATENT_DIM,
        "reconstruction_loss": "mse",
    } | config
    (folder / "model_config.json").write_text(json.dumps(config))
    torch.save({"model_state_dict": weights}, folder / "model.pt")


@pytest.fixture
def weights():
    layers = {
        "encoder.layers.0.0": (64, 512),
        "encoder.embedding": (512, LATENT_DIM),
        "encoder.log_var": (512, LATENT_DIM),
        "decoder.layers.0.0": (LATENT_DIM, 512),
        "decoder.layers.1.0": (512, 64),
    }
    linears = {name: nn.Linear(*sizes) for name, sizes in layers.items()}
    return {
        f"{name}.{key}": value
        for name, layer in linears.items()
        for key, value in layer.state_dict().items()
    }


class TheirEncoder(nn.Module):
    """Of one's own, as pythae wants it: a mapping comes out."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 2 * LATENT_DIM)

    def forward(self, x):
        mean, log_var = self.linear(x.flatten(1)).chunk(2, 1)
        return {"embedding": mean, "log_covariance": log_var}


class TheirDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(LATENT_DIM, 64)

    def forward(self, z):
        return {"reconstruction": self.linear(z).reshape(-1, *SHAPE)}


class TheirAutoencoderKL(nn.Module):
    """The names and shapes of diffusers' class, with one halving."""

    def __init__(self, quant=True):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), nn.Tanh())
        self.quant_conv = nn.Conv2d(4, 4, 1) if quant else None
        self.post_quant_conv = nn.Conv2d(2, 2, 1) if quant else None
        self.decoder = nn.ConvTranspose2d(2, 1, 2, stride=2)


def test_pythae_networks_compute_what_they_did(tmp_path, weights):
    write_pythae(tmp_path, weights)
    model = read_pythae(tmp_path)
    assert not model.training

    def linear(name, inputs):
        return functional.linear(inputs, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = torch.rand(3, *SHAPE)
    hidden = linear("encoder.layers.0.0", x.reshape(3, 64)).relu()
    posterior = model.encode(x)
    torch.testing.assert_close(posterior.mean, linear("encoder.embedding", hidden))
    torch.testing.assert_close(posterior.log_var, linear("encoder.log_var", hidden))
    z = torch.randn(3, LATENT_DIM)
    mean = (
        linear("decoder.layers.1.0", linear("decoder.layers.0.0", z).relu())
        .sigmoid()
        .reshape(3, *SHAPE)
    )
    torch.testing.assert_close(model.decode_mean(z), mean)
    # Half the squared error plus KL, pythae's loss, is the negative ELBO up to its constant.
    terms = Elbo(model)(x, torch.Generator().manual_seed(0))
    squared_error = (
        (x - model.decode_mean(posterior.sample(torch.Generator().manual_seed(0))))
        .square()
        .sum((1, 2, 3))
    )
    loss = 0.5 * squared_error + posterior.kl()
    torch.testing.assert_close(-terms.elbo, loss + 32 * math.log(2 * math.pi))


def test_pythae_networks_of_ones_own_are_built_by_their_owner(tmp_path):
    theirs = nn.ModuleDict({"encoder": TheirEncoder(), "decoder": TheirDecoder()})
    write_pythae(
        tmp_path, theirs.state_dict(), uses_default_encoder=False, uses_default_decoder=False
    )
    with pytest.raises(
        StoreError, match="an encoder of your own: build it as it was and pass it as encoder="
    ):
        read_pythae(tmp_path)
    with pytest.raises(
        StoreError, match=r"(?s)missing: encoder\.0\.linear\.bias.*unexpected: encoder\.linear"
    ):
        read_pythae(tmp_path, encoder=nn.Sequential(TheirEncoder()), decoder=TheirDecoder())
    model = read_pythae(tmp_path, encoder=TheirEncoder(), decoder=TheirDecoder())
    x = torch.rand(3, *SHAPE)
    assert torch.equal(model.encode(x).mean, theirs["encoder"](x)["embedding"])
    z = torch.randn(3, LATENT_DIM)
    assert torch.equal(model.decode_mean(z), theirs["decoder"](z)["reconstruction"])


def test_nothing_of_a_pythae_folder_is_executed(tmp_path, weights):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    write_pythae(tmp_path, weights)
    (tmp_path / "encoder.pkl").write_bytes(pickle.dumps(Trap()))
    read_pythae(tmp_path)
    torch.save({"model_state_dict": Trap()}, tmp_path / "model.pt")
    with pytest.raises(StoreError, match=r"model\.pt is damaged, or holds something else"):
        read_pythae(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no config", r"There is no .*model_config\.json"),
        ("no weights", r"There is no .*model\.pt"),
        ("truncated", r"model\.pt is damaged"),
        ("bare", r"model\.pt is damaged, or holds something else"),
        ("no shape", r'does not say the shape of an example: add it, such as "input_dim"'),
        ("other kind", r"(?s)missing: encoder\.log_var\.weight.*unexpected: pseudo_inputs"),
    ],
)
def test_damaged_pythae_folders_are_refused(tmp_path, weights, damage, message):
    other = {key: value for key, value in weights.items() if "log_var" not in key} | {
        "pseudo_inputs": torch.ones(1)
    }
    write_pythae(
        tmp_path,
        other if damage == "other kind" else weights,
        **({"input_dim": None} if damage == "no shape" else {}),
    )
    file = tmp_path / "model.pt"
    if damage == "no config":
        (tmp_path / "model_config.json").unlink()
    elif damage == "no weights":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "bare":
        torch.save(weights, file)
    with pytest.raises(StoreError, match=message):
        read_pythae(tmp_path)


@pytest.mark.parametrize("quant", [True, False])
def test_an_autoencoder_kl_keeps_its_function_in_units_of_ours(quant):
    theirs = TheirAutoencoderKL(quant)
    model = from_autoencoder_kl(theirs, SHAPE, SIXTEEN_LEVELS)
    assert model.latent_dim == 2 * 4 * 4
    raw = torch.randint(0, 17, (3, *SHAPE), dtype=torch.uint8)
    moments = theirs.encoder(raw / 8 - 1)  # its own unit: -1 to 1
    moments = theirs.quant_conv(moments) if quant else moments
    mean, log_var = moments.chunk(2, 1)
    posterior = model.encode(model.scaling(raw))
    torch.testing.assert_close(posterior.mean, mean.flatten(1))
    torch.testing.assert_close(posterior.log_var, log_var.flatten(1))
    decoded = theirs.decoder(theirs.post_quant_conv(mean) if quant else mean)
    restored = model.scaling.restore(model.decode_mean(posterior.mean))
    torch.testing.assert_close(restored, 8 * (decoded + 1))
    assert {id(parameter) for parameter in theirs.parameters()} <= {
        id(parameter) for parameter in model.parameters()
    }


def test_a_noise_variance_is_added_to_networks_as_they_are(digits, tmp_path, monkeypatch):
    theirs = TheirAutoencoderKL()
    model = from_autoencoder_kl(theirs, SHAPE, SIXTEEN_LEVELS)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    model.encoder.requires_grad_(False)
    model.decoder.requires_grad_(False)
    # Networks that are not trained leave little to predict.
    monkeypatch.setattr(Trainer, "_refuse_worse_prediction", lambda trainer: [])
    trainer = Trainer(model, digits, TrainConfig(stage_1_epochs=0, stage_2_epochs=3, batch_size=64))
    at_variance_one = trainer.figures(trainer.validation).elbo
    trainer.fit()
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())
    assert isinstance(model.noise, PredictedNoise)
    # Eq. (10) is the squared error that is left.
    assert float(model.noise.reference_log_var.exp()) == pytest.approx(
        trainer.figures(trainer.validation).mse, rel=0.1
    )
    assert trainer.figures(trainer.validation).elbo > at_variance_one + 10
    save_model(tmp_path / "model.safetensors", model)
    again = from_autoencoder_kl(TheirAutoencoderKL(), SHAPE)
    loaded = load_model(tmp_path / "model.safetensors", again.encoder, again.decoder)
    x = loaded.scaling(torch.from_numpy(digits.test[:5]))
    assert torch.equal(loaded.reconstruct(x).mean, model.eval().reconstruct(x).mean)
    assert torch.equal(loaded.reconstruct(x).std, model.reconstruct(x).std)


def test_a_run_goes_on_from_their_weights(digits, weights, tmp_path):
    write_pythae(tmp_path / "theirs", weights)
    model = read_pythae(tmp_path / "theirs")
    config = TrainConfig(
        latent_dim=LATENT_DIM,
        stage_1_epochs=1,
        stage_2_epochs=0,
        learning_rate=1e-9,
        n_components=2,
    )
    run = train(digits, config, tmp_path / "run", encoder=model.encoder, decoder=model.decoder)
    again = read_pythae(tmp_path / "theirs")
    loaded = run.model(again.encoder, again.decoder)
    for name, value in weights.items():
        half, _, key = name.partition(".")
        torch.testing.assert_close(
            loaded.get_submodule(half).module.state_dict()[key], value, atol=1e-6, rtol=0
        )
    assert run.history()[-1]["optimal_noise_var"] < 0.2
