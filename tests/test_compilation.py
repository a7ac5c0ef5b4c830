"""Compiled networks compute the same."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from equipoise.config import TrainConfig
from equipoise.stages import Stage
from equipoise.training.compilation import compile_networks
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

QUICK = TrainConfig(
    latent_dim=3,
    width=4,
    batch_size=128,
    stage_1_epochs=2,
    stage_2_epochs=1,
    tolerance=0.0,
    recalibrate="dimension",
    accelerator="cpu",
)


def fit(data, config):
    torch.manual_seed(config.seed)
    model = make_model(data, config)
    trainer = Trainer(model, data, config)
    return model, [{k: v for k, v in row.items() if "second" not in k} for row in trainer.fit()]


def test_the_networks_of_the_stage_are_compiled(digits, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    model = make_model(digits, QUICK)
    compile_networks(model)
    assert compiled == [model.encoder, model.decoder]

    compiled.clear()
    model.predict_variance(torch.tensor(0.1), torch.tensor(0.1))
    compile_networks(model)
    assert compiled == [model.encoder, model.decoder, model.noise.network]

    compiled.clear()
    model.predict_variance(torch.tensor(0.1), torch.tensor(0.1), network="head")
    compile_networks(model)
    parts = [model.encoder, model.decoder.hidden, model.decoder.output, model.noise.network]
    assert compiled == parts


@pytest.mark.parametrize("is_compiled", [False, True])
def test_networks_are_handed_back_as_they_were(digits, monkeypatch, is_compiled):
    """Also those that a user has compiled before."""
    monkeypatch.setattr(
        nn.Module, "compile", lambda network: setattr(network, "_compiled_call_impl", print)
    )
    config = replace(QUICK, compile=is_compiled)
    model = make_model(digits, config)
    before = None if is_compiled else model.encoder._call_impl
    model.encoder._compiled_call_impl = before
    monkeypatch.setattr(
        Trainer, "_epoch", lambda trainer: setattr(trainer.schedule, "stage", Stage.FINISHED)
    )
    Trainer(model, digits, config).fit()
    assert model.encoder._compiled_call_impl == before
    assert model.decoder._compiled_call_impl is None


COMPILED_AND_NOT = """
import sys
import torch
from equipoise.data import load
from equipoise.objectives import Elbo
from equipoise.training.compilation import compile_networks, restore_networks
from equipoise.config import TrainConfig
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer

data = load("digits")
config = TrainConfig(
    latent_dim=3, width=4, stage_1_epochs=1, stage_2_epochs=1, accelerator="cpu", compile=True,
    stage_2_network=sys.argv[1], recalibrate="monotone"
)
model = make_model(data, config)
Trainer(model, data, config).fit()
x = model.scaling(torch.from_numpy(data.train[:100]))
results = []
for restore in (lambda: compile_networks(model), lambda: restore_networks(model)):
    restore()
    model.zero_grad()
    elbo = Elbo(model)(x, torch.Generator().manual_seed(0)).elbo
    elbo.mean().backward()
    result = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    results.append(result | {"elbo": elbo})
compiled, eager = results
networks = ("encoder", "decoder", "noise.network")
assert compiled.keys() == eager.keys() > {f"{network}.output.weight" for network in networks}
for name in eager:
    torch.testing.assert_close(
        compiled[name], eager[name], rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}"
    )
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("network", ["decoder", "head"])
def test_compiled_networks_compute_the_same(network):
    """Compiled and restored networks give the same ELBO and gradients.

    This runs in a process of its own, since the type checks in these tests cannot be compiled.
    """
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_AND_NOT, network],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("the same\n"), done.stderr
