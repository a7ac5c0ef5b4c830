"""One table for each kind of choice: every row can be made, and nothing can be made without one."""

import pytest
import torch

from equipoise.catalogue import ARCHITECTURES, NOISES, OBJECTIVES, SOURCES
from equipoise.config import TrainConfig, option_help
from equipoise.model import VAE
from equipoise.networks import NETWORKS
from equipoise.noise import NOISE_BUILDERS, NoiseOptions
from equipoise.objectives import OBJECTIVE_CLASSES
from equipoise.sources import FITTED, READY, TEMPERED, check_source
from equipoise.stages import Stage
from equipoise.training.setup import make_objective


def test_every_row_has_its_class_and_every_class_its_row():
    assert set(NOISE_BUILDERS) == set(NOISES)
    assert set(NETWORKS) == set(ARCHITECTURES)
    assert set(OBJECTIVE_CLASSES) == set(OBJECTIVES)
    assert {*READY, *FITTED, TEMPERED, "aggregate"} == set(SOURCES)


@pytest.mark.parametrize("name", NOISES)
def test_each_noise_model_is_built_for_the_shape(name):
    options = NoiseOptions((3, 8, 8), 2, "closed-form", 5, 0.5, None)
    noise = NOISE_BUILDERS[name](options)
    log_var = noise(torch.zeros(4, 2))
    assert torch.broadcast_shapes(log_var.shape, (4, 3, 8, 8)) == (4, 3, 8, 8)
    expected = {"global": (), "fixed": (), "channel": (3, 1, 1), "dimension": (3, 8, 8)}
    if name in expected:
        assert tuple(log_var.shape) == expected[name]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_is_made_with_its_own_weights(name):
    row = OBJECTIVES[name]
    model = VAE.build((6,), latent_dim=2, width=1)
    config = TrainConfig(objective=name, **row.options)
    objective = make_objective(model, config, Stage.SHARED_VARIANCE)
    penalties = ("off_diagonal", "penalty", "code_penalty")
    values = [getattr(objective, field) for field in penalties if hasattr(objective, field)]
    assert values == ([] if row.penalty is None else [row.penalty])
    assert hasattr(objective, "beta") >= row.has_beta
    terms = objective(torch.randn(8, 6), torch.Generator().manual_seed(0))
    assert terms.loss.shape == (8,)


def test_help_names_every_choice():
    tables = {"objective": OBJECTIVES, "noise": NOISES, "architecture": ARCHITECTURES}
    for option, table in tables.items():
        text = option_help(option)
        for name, row in table.items():
            assert f"'{name}': {row.summary}." in text


@pytest.mark.parametrize(
    ("name", "row"),
    [
        *((name, name) for name in ("prior", "mixture", "mixture=auto", "flow", "aggregate")),
        ("mixture=12", "mixture=K"),
        ("mixture@0.8", "mixture@T"),
        ("mixture@2", "mixture@T"),
        ("mixture=12@0.05", "mixture@T"),
        ("mixture=auto@1", "mixture@T"),
    ],
)
def test_a_name_belongs_to_its_row(name, row):
    assert check_source(name) == row
