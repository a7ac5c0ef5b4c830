"""Steps that are replayed as a CUDA graph are the steps that would have been taken.

Where there is no GPU, a graph is played by one that calls the recorded work again, from and into
the same memory.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from equipoise.config import TrainConfig
from equipoise.noise import GlobalNoise
from equipoise.training.setup import make_model
from equipoise.training.step_graph import WARM_UP, StepGraph
from equipoise.training.trainer import Trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

QUICK = TrainConfig(
    latent_dim=3,
    width=4,
    batch_size=128,
    stage_1_epochs=3,
    stage_2_epochs=2,
    tolerance=0.0,
    accelerator="cpu",
)


class PlayedGraph:
    """A graph that is not on a GPU: it does the work again, and its memory is its own."""

    n_replays = 0

    def register_generator_state(self, generator):
        self.generator = generator

    def replay(self):
        PlayedGraph.n_replays += 1
        self.result.copy_(self.work())


@pytest.fixture
def played(monkeypatch):
    """Play graphs on the CPU; the recorded work is not done, as on a GPU."""
    PlayedGraph.n_replays = 0

    def record(self, x):
        self.x = x.clone(memory_format=torch.preserve_format)
        graph = PlayedGraph()
        graph.register_generator_state(self.generator)
        graph.work = lambda: self.work(self.x)
        self.figures = graph.result = torch.full((8,), torch.nan, dtype=torch.float64)
        return graph

    monkeypatch.setattr(StepGraph, "_record", record)
    monkeypatch.setattr(StepGraph, "_generators", lambda graph: [])
    monkeypatch.setattr(Trainer, "_replays_steps", lambda trainer: True)


def fit(data, config):
    torch.manual_seed(config.seed)
    model = make_model(data, config)
    rows = Trainer(model, data, config).fit()
    return model, [{k: v for k, v in row.items() if "second" not in k} for row in rows]


PLAYED = [
    {"ema_decay": 0.9},
    {"noise_update": "gradient", "architecture": "mlp"},
    {"stage_2_network": "decoder", "stage_2_gradients": "stop", "stage_2_likelihood": "density"},
]
OPTIONS = [
    {},
    {"ema_decay": 0.9},
    {"clip": 0.0},
    {"noise_update": "gradient"},
    {"noise": "dimension"},
    {"objective": "dip-vae-ii"},
    {"objective": "sigma-vae", "stage_2_epochs": 0},
    {"stage_2_network": "decoder", "stage_2_gradients": "stop", "stage_2_likelihood": "density"},
    {"architecture": "residual"},
    {"architecture": "mlp"},
]


@pytest.mark.parametrize("options", PLAYED, ids=str)
def test_the_figures_of_a_batch_outlive_its_replay(digits, played, monkeypatch, options):
    config = replace(QUICK, **options)
    model, rows = fit(digits, config)
    assert PlayedGraph.n_replays > 10

    monkeypatch.setattr(Trainer, "_replays_steps", lambda trainer: False)
    expected_model, expected_rows = fit(digits, config)
    assert rows == expected_rows
    for name, value in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_first_steps_and_odd_batches_are_taken_as_usual(played):
    seen = []

    def work(x):
        seen.append(len(x))
        return x.sum(0).double()

    graph = StepGraph(work, 4, torch.Generator(), print)
    for _ in range(WARM_UP):
        graph(torch.ones(4, 8))
    assert graph.graph is None
    graph(torch.ones(4, 8))
    assert graph.graph is not None
    assert PlayedGraph.n_replays == 1
    assert graph(torch.ones(3, 8)).tolist() == [3.0] * 8
    assert PlayedGraph.n_replays == 1
    first, second = graph(torch.ones(4, 8)), graph(2 * torch.ones(4, 8))
    assert first.tolist() == [4.0] * 8
    assert second.tolist() == [8.0] * 8


def test_an_odd_batch_is_not_what_is_recorded(played):
    """The fourth step may be the last of an epoch; the full ones after it are replayed."""
    graph = StepGraph(lambda x: x.sum(0).double(), 4, torch.Generator(), print)
    for n in (4, 4, 4, 3):
        graph(torch.ones(n, 8))
    assert graph.graph is None
    assert graph(torch.ones(4, 8)).tolist() == [4.0] * 8
    assert PlayedGraph.n_replays == 1


def test_a_step_that_cannot_be_recorded_is_taken_as_usual_and_said(played, monkeypatch):
    said = []

    def refuse(self, x):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(StepGraph, "_record", refuse)
    monkeypatch.setattr(StepGraph, "_generators", lambda graph: [])
    graph = StepGraph(lambda x: x.sum(), 4, torch.Generator(), said.append)
    for _ in range(WARM_UP + 3):
        assert graph(torch.ones(4)) == 4
    assert len(said) == 1
    assert "not permitted when stream is capturing)" in said[0]


class CountingNoise(GlobalNoise):
    """A noise model of the user's own."""


@pytest.mark.parametrize(
    ("device", "n_processes", "options", "own", "expected"),
    [
        ("cuda", 1, {}, None, True),
        ("cpu", 1, {"cuda_graphs": True}, None, False),
        ("cuda", 2, {"cuda_graphs": True}, None, False),
        ("cuda", 1, {"cuda_graphs": False}, None, False),
        ("cuda", 1, {}, "networks", False),
        ("cuda", 1, {}, "noise", False),
        ("cuda", 1, {"cuda_graphs": True}, "noise", True),
    ],
)
def test_what_is_the_users_own_is_recorded_only_when_asked_for(
    digits, device, n_processes, options, own, expected
):
    config = replace(QUICK, **options)
    theirs = {}
    if own == "networks":
        theirs["encoder"] = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
        theirs["decoder"] = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8)))
    if own == "noise":
        theirs["noise"] = CountingNoise()
    trainer = Trainer(make_model(digits, config, **theirs), digits, config)

    class Machine:
        def __init__(self):
            self.device = torch.device(device)

    trainer.fabric, trainer.processes = Machine(), replace(trainer.processes, size=n_processes)
    assert trainer._replays_steps() is expected


@needs_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_gpu_computes_the_same_bits_with_and_without(digits, options, precision):
    machine = {"accelerator": "cuda", "deterministic": True, "precision": precision}
    config = replace(QUICK, **options, **machine)
    expected_model, expected_rows = fit(digits, replace(config, cuda_graphs=False))
    torch.manual_seed(config.seed)
    model = make_model(digits, config)
    trainer = Trainer(model, digits, config)
    said = []
    trainer._message = said.append
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in trainer.fit()]
    assert not [text for text in said if "CUDA graph" in text]
    assert rows == expected_rows
    for name, value in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


class Asking(nn.Module):
    """An encoder that waits for the device, which cannot be recorded."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))

    def forward(self, x):
        return self.layers(x) * (1.0 if float(x.sum()) >= 0 else 0.0)


@needs_gpu
def test_a_gpu_goes_on_where_a_step_cannot_be_recorded(digits):
    config = replace(QUICK, accelerator="cuda", cuda_graphs=True, deterministic=True)
    models, said = [], []
    for is_recorded in (True, False):
        torch.manual_seed(0)
        decoder = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8)))
        config = replace(config, cuda_graphs=is_recorded)
        model = make_model(digits, config, encoder=Asking(), decoder=decoder)
        trainer = Trainer(model, digits, config)
        trainer._message = said.append
        trainer.fit()
        models.append(model.state_dict())
    assert len([text for text in said if "CUDA graph" in text]) == 2  # one in each stage
    for name, value in models[1].items():
        assert torch.equal(models[0][name], value), name
    assert torch.randn(3, device="cuda").isfinite().all()
