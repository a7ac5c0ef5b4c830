import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from equipoise.catalogue import OBJECTIVES
from equipoise.config import (
    ConfigError,
    TrainConfig,
    make_config,
    option_help,
    read_recipe,
    shipped_recipes,
    type_name,
)


def test_the_defaults_have_no_problems():
    assert TrainConfig().problems() == []
    assert make_config({}) == TrainConfig()


def test_text_becomes_values():
    config = make_config(
        {
            "latent_dim": "8",
            "learning_rate": "1e-4",
            "floor": "quantisation",
            "n_components": "auto",
            "image_size": "null",
        }
    )
    assert (config.latent_dim, config.learning_rate, config.floor) == (8, 1e-4, "quantisation")
    assert (config.n_components, config.image_size) == ("auto", None)
    assert make_config({"floor": "0.5"}).floor == 0.5
    assert make_config({"n_components": "32"}).n_components == 32


def test_all_problems_come_in_one_message():
    with pytest.raises(ConfigError) as caught:
        make_config(
            {
                "latentdim": 3,
                "width": "wide",
                "floor": "low",
                "learning_rate": 0,
                "noise": "fixed",
                "recalibrate": "scale",
                "stage_2_epochs": 0,
            }
        )
    text = str(caught.value)
    for part in (
        "unknown option latentdim; did you mean latent_dim?",
        "width must be a whole number, got 'wide'",
        "floor must be a number or 'quantisation' or null, got 'low'",
        "learning_rate must be above 0",
        "noise=fixed needs noise_var",
        "recalibrate=scale",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"stage_1_epochs": 0, "stage_2_epochs": 0}, "cannot both be 0"),
        ({"noise_var": 0.5}, "needs noise=fixed"),
        ({"noise": "fixed", "noise_var": 0.5}, "set stage_2_epochs=0"),
        ({"noise": "fixed", "noise_var": -1, "stage_2_epochs": 0}, "noise_var must be above 0"),
        (
            {"stage_2_likelihood": "digital", "stage_2_epochs": 0},
            "stage_2_likelihood=digital is for the variance of stage 2",
        ),
        (
            {"stage_2_likelihood": "digital", "stage_2_gradients": "joint"},
            "set stage_2_gradients=stop",
        ),
        (
            {"stage_2_likelihood": "digital", "recalibrate": "scale"},
            "leave it out with stage_2_likelihood=digital",
        ),
        ({"warm_up": 1.0}, "warm_up"),
        ({"floor": 0}, "floor must be above 0"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"n_components": 0}, "n_components must be at least 1"),
        ({"clip": 0.5}, "multiple above 1"),
        ({"objective": "vae", "stage_2_epochs": 5}, "objective=vae has no stage 2"),
        (
            {"objective": "wae-mmd", "noise": "global", "noise_var": None},
            "goes with noise=fixed",
        ),
        ({"objective": "sigma-vae", "noise": "dimension"}, "goes with noise=global"),
        ({"objective": "rae-l2", "beta": 2}, "has no beta"),
        ({"penalty": 3}, "objective=elbo has none"),
        ({"objective": "dip-vae-iii"}, "'dip-vae-i' or 'dip-vae-ii'"),
        ({"architecture": "transformer"}, "'auto' or 'mlp' or 'conv' or 'residual'"),
        ({"compile": "perhaps"}, "true or false"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
    ],
)
def test_contradictions(values, message):
    with pytest.raises(ConfigError, match=message):
        make_config(values)


def test_a_misspelt_choice_is_a_problem_in_python_too():
    assert TrainConfig(noise="gloabl").problems() == [
        "noise must be 'global' or 'channel' or 'dimension' or 'fixed', got 'gloabl'"
    ]


def test_every_option_has_help_and_a_type():
    for field in fields(TrainConfig):
        assert len(option_help(field.name)) > 10
        assert type_name(field.name)


def test_options_survive_json():
    import json

    config = make_config({"floor": "quantisation", "n_components": 12})
    assert make_config(json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion-mnist", "celeba"])
def test_recipes_fit_the_options(name):
    values = read_recipe(shipped_recipes()[name])
    assert values.pop("data") == name
    make_config(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [("- 1\n", "must be a mapping"), ("a: [", "not valid YAML"), (None, "there is no recipe")],
)
def test_wrong_recipes(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_recipe(path)


def test_an_objective_brings_what_it_needs():
    """Over a recipe's options if the user names it, but never over the user's own."""
    recipe = {"latent_dim": 3, "stage_2_epochs": 5}
    config = make_config(recipe, {"objective": "vae"})
    assert (config.noise, config.noise_var, config.stage_2_epochs, config.latent_dim) == (
        "fixed",
        0.5,
        0,
        3,
    )
    assert make_config({}, {"objective": "beta-vae"}).noise_var == 1.0
    assert make_config({}, {"objective": "beta-vae", "noise_var": 2}).noise_var == 2.0
    assert make_config({"objective": "rae-l2"}).stage_2_epochs == 0
    with pytest.raises(ConfigError, match="no stage 2"):
        make_config({"objective": "vae", "stage_2_epochs": 5})
    for name in OBJECTIVES:
        assert make_config({}, {"objective": name}).problems() == []


HOSTILE_RECIPES = [
    (b"1: 2", "names of options are words, got 1"),
    (b"null: 3", "names of options are words, got None"),
    (b"a: &x [1,2]\nb: *x", "aliases"),
    (b"[", "not valid YAML"),
    (b"[" * 5000, "not valid YAML"),
    (b"data: [1]", "'data' must be a name or a path"),
    (b"data: null", "'data' must be a name or a path"),
    (b"latent_dim: 2020-01-01", "must be a number, a word or null"),
    (b"latent_dim: [1, 2]", "must be a number, a word or null"),
    (b"{a: {b: {c: 1}}}", "must be a number, a word or null"),
    (b"\xff\xfe\x00", "not UTF-8"),
    (b"a: !!python/object:os.system x", "not valid YAML"),
    (b"? [a]\n: 1", "not valid YAML"),
    (b"2020-99-99: 1", "not valid YAML"),
    (b"x" * 200_000, "longer than the 100,000 bytes"),
    (b"seed: 1\nwidth: 2\nseed: 2", "'seed' stands there more than once"),
    (b'seed: 1\n"seed": 2', "'seed' stands there more than once"),
    (b"? 0x" + b"f" * 5000 + b"\n: 1", "names of options are words, got a int"),
    (b"seed: [0x" + b"f" * 5000 + b"]", "must be a number, a word or null, got a list"),
    (b"seed: &a 8", "anchors"),
    (b"seed: !!set {a}", "must be a number, a word or null"),
    (b"seed: !!binary aGk=", "must be a number, a word or null"),
    (b"a: " + b"[" * 90_000, "not valid YAML"),
    (b"{a: " * 20_000, "not valid YAML"),
    (b"a\x1bb: 1", "not valid YAML"),
    (b"--- 1\n--- 2", "not valid YAML"),
    (b"- 1", "must be a mapping"),
    (b"", "must be a mapping"),
]


@pytest.mark.parametrize(("content", "message"), HOSTILE_RECIPES, ids=range(len(HOSTILE_RECIPES)))
def test_a_hostile_recipe_is_refused(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_file_that_hides_its_size_is_not_read_to_its_end():
    """The system says that this one has 0 bytes; it has gigabytes."""
    endless = Path("/proc/self/pagemap")
    if not endless.exists():
        pytest.skip("only where there is /proc")
    with pytest.raises(ConfigError, match="longer than the 100,000 bytes"):
        read_recipe(endless)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 2**32}, "seed must be at most 4294967295"),
        ({"width": 10**9}, "width must be at most 2048"),
        ({"latent_dim": 10_001}, "latent_dim must be at most 10000"),
        ({"batch_size": 10**9}, "batch_size must be at most"),
        ({"n_components": 10**9}, "n_components must be at most"),
        ({"devices": 10**9}, "devices must be at most"),
        ({"seed": "0x" + "f" * 70}, "seed must be at most 4294967295"),
        ({"image_size": "100000"}, "image_size must be at most 4096"),
        ({"num_nodes": 10**9}, "num_nodes must be at most"),
        ({"stage_1_epochs": 10**12}, "stage_1_epochs must be at most"),
        ({"learning_rate": "inf"}, "learning_rate must be"),
        ({"weight_decay": float("inf")}, "weight_decay must be"),
        ({"tolerance": float("nan")}, "tolerance must be"),
    ],
    ids=str,
)
def test_values_beyond_reason_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        make_config(values)


def unchecked(values):
    """Options as a program without type checks makes them; the tests check every call."""
    config = TrainConfig()
    for name, value in values.items():
        object.__setattr__(config, name, value)
    return config


@pytest.mark.parametrize(
    "values",
    [
        {"n_components": 2.0},
        {"batch_size": 64.0},
        {"batch_size": True},
        {"latent_dim": 2.0},
        {"latent_dim": "x"},
        {"stage_2_epochs": True},
        {"seed": None},
        {"tolerance": None},
        {"noise": None},
        {"precision": None},
        {"compile": None},
        {"clip": "3"},
        {"image_size": 8.5},
        {"accelerator": ["cpu"]},
    ],
    ids=str,
)
def test_a_value_of_another_type_is_a_problem_from_python_too(values):
    (name,) = values
    problems = unchecked(values).problems()
    assert len(problems) == 1
    assert problems[0].startswith(f"{name} must be ")


@pytest.mark.parametrize("number", [np.int64(3), np.uint8(3), np.float32(3.0), np.float64(3.0)])
def test_numbers_of_numpy_are_numbers(number):
    name = "seed" if isinstance(number, np.integer) else "clip"
    config = unchecked({name: number})
    config.__post_init__()
    assert not config.problems()
    assert json.loads(json.dumps(config.as_dict()))[name] == 3


def test_what_is_valid_is_read_back_as_it_was():
    for values in ({"clip": 3}, {"floor": 2}, {"floor": "quantisation"}, {"noise_var": None}):
        config = unchecked(values)
        assert not config.problems()
        assert make_config(config.as_dict()) == config


def test_every_recipe_sets_the_size_of_its_batches():
    """'auto' chooses by the number of examples, of which benchmarks and tests take fewer."""
    for file in shipped_recipes().values():
        assert isinstance(read_recipe(file)["batch_size"], int)


@pytest.mark.parametrize("n", [1, 20, 511, 512, 1023, 1024, 1620, 8191, 8192, 10**7])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_automatic_batches_make_enough_steps(n, processes):
    size = TrainConfig().step_size(n, processes)
    assert size % processes == 0
    assert 16 <= size < 256 + processes
    if size >= 32 and processes == 1:
        assert n // size >= 32
    assert size == 16 or n < 64 * size or size >= 256
    assert TrainConfig(batch_size=100).step_size(n) == 100


@pytest.mark.parametrize(
    ("image_size", "message"),
    [
        ("64x", "WIDTHxHEIGHT"),
        ("axb", "WIDTHxHEIGHT"),
        ("4x64", "from 8 to 4096 pixels a side, got 4x64"),
        ("64x5000", "from 8 to 4096"),
    ],
)
def test_two_sides_are_checked_as_one(image_size, message):
    assert make_config({"image_size": "64x48"}).image_size == "64x48"
    assert make_config({"image_size": "64"}).image_size == 64
    with pytest.raises(ConfigError, match=message):
        make_config({"image_size": image_size})
