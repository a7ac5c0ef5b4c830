"""What the fuzz has found, each kind once."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open

import equipoise
from equipoise.config import ConfigError, make_config
from equipoise.files import StoreError
from equipoise.interop import read_pythae
from equipoise.records import decode_record
from equipoise.report import write_report
from equipoise.run import Run, read_evaluation
from equipoise.sharing import model_card
from equipoise.store import METADATA_KEY, load_flow, load_mixture
from tests.fuzz.hostile import write_sealed
from tests.fuzz.readers import READERS


def make_almost_singular(tensors):
    """Covariances that are positive definite in float64, and no longer in float32."""
    for name in ("base.weights", "base.means", "base.covariances"):
        tensors[name] = tensors[name].double()
    d = tensors["base.means"].shape[1]
    ones = torch.ones(d, d, dtype=torch.float64)
    tensors["base.covariances"][:] = ones + 1e-10 * torch.eye(d)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Valid files of the readers that are needed here."""
    folder = tmp_path_factory.mktemp("valid")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few rows
        for name in ("config", "mixture", "flow", "estimator", "pythae"):
            READERS[name].prepare(folder / name)
    return folder


def changed(value, keys, new):
    """A copy of a JSON value with another value at a place."""
    if not keys:
        return new
    return {**value, keys[0]: changed(value.get(keys[0], {}), keys[1:], new)}


@pytest.mark.parametrize(
    ("keys", "new"),
    [
        (("likelihood", "elbo", "value"), {"a": 1}),
        (("likelihood", "elbo", "value"), 10**30),
        (("likelihood", "elbo", "standard_error"), "0.1"),
        (("likelihood", "elbo", "standard_error"), -1),
        (("likelihood", "elbo", "n"), "three"),
        (("likelihood", "elbo", "of"), {"a": 1}),
        (("likelihood", "elbo"), [{"a": 1}]),
        (("likelihood", "elbo"), [[1]]),
        (("likelihood", "elbo", "value"), "-1.5"),
        (("likelihood", "noise_floor_var"), "0.1"),
        (("likelihood", "noise_var"), 0.1),
        (("samples", "feature_dimension"), "3"),
        (("latent", "memorisation"), [1]),
        (("latent", "memorisation", "n_training"), -1),
        (("latent",), [1]),
        (("new section",), [[1]]),
        (("about", "sections", "likelihood", "command"), [1]),
    ],
)
def test_figures_of_other_types_are_refused_by_their_place(valid, tmp_path, keys, new):
    path = tmp_path / "evaluation.json"
    evaluation = json.loads((valid / "config" / "valid" / path.name).read_text())
    path.write_text(json.dumps(changed(evaluation, keys, new)))
    with pytest.raises(StoreError, match=r"evaluation\.json"):
        read_evaluation(path)


@pytest.mark.parametrize("section", [3, "x", None, {"value": 1.5}, [1, 2], [{"value": 1}], {}])
def test_plain_sections_are_shown(valid, tmp_path, section):
    run = tmp_path / "run"
    shutil.copytree(valid / "config" / "valid", run)
    evaluation = json.loads((run / "evaluation.json").read_text())
    distances = {"a": {"frechet_distance": 3}, "b": {"frechet_distance": {"n": {"x": 1}}}}
    evaluation |= {"new section": section, "value": section}
    altered = changed(evaluation, ("samples",), distances)
    (run / "evaluation.json").write_text(json.dumps(altered))
    assert "New section" in model_card(Run(run), "owner/name")
    assert "New section" in write_report(run).read_text()


def test_nesting_is_limited_whatever_the_schema():
    for depth in (201, 900, 100_000):
        with pytest.raises(StoreError, match="nested too deeply"):
            decode_record("[" * depth + "]" * depth, list, "it")
    assert decode_record("[" * 200 + "]" * 200, list, "it")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", 3),
        ("source", None),
        ("strict", "yes"),
        ("test_fraction", 1.5),
        ("image_size", 0),
        ("channels", "cmyk"),
        ("cache_dir", "/tmp"),
        ("progress", 1),
        ("buffer_size", 10),
        ("stream", True),
    ],
)
def test_only_arguments_of_loading_are_passed_on(valid, tmp_path, name, value):
    path = tmp_path / "config.json"
    settings = json.loads((valid / "config" / "valid" / path.name).read_text())
    path.write_text(json.dumps(changed(settings, ("data", "load", name), value)))
    with pytest.raises(StoreError, match=r"config\.json: data\.load"):
        Run(tmp_path).data()


def test_a_card_needs_no_versions(valid, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(valid / "config" / "valid", run)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "versions": {}}))
    assert "torch unknown" in model_card(Run(run), "owner/name")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bool, torch.int64])
@pytest.mark.parametrize("names", [("means",), ("weights", "means", "covariances")])
def test_a_mixture_has_floats_of_one_type(valid, tmp_path, dtype, names):
    path = tmp_path / "m.safetensors"
    with safe_open(valid / "mixture" / "valid" / "m.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in names:
        tensors[name] = tensors[name].to(dtype)
    write_sealed(path, "mixture", tensors, "{}")
    with pytest.raises(StoreError, match="float"):
        load_mixture(path)


@pytest.mark.parametrize(
    "alter",
    [
        lambda tensors: tensors["base.weights"].neg_(),
        lambda tensors: tensors["base.covariances"].neg_(),
        lambda tensors: tensors.update({"base.means": tensors["base.means"].long()}),
        lambda tensors: tensors.update({"base.means": tensors["base.means"].double()}),
        lambda tensors: tensors.pop("base.covariances"),
        lambda tensors: make_almost_singular(tensors),
    ],
)
def test_the_base_of_a_flow_is_a_mixture(valid, tmp_path, alter):
    path = tmp_path / "flow.safetensors"
    with safe_open(valid / "flow" / "valid" / path.name, framework="pt") as file:
        record = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    alter(tensors)
    write_sealed(path, "flow", tensors, record["description"])
    with pytest.raises(StoreError, match=r"flow\.safetensors"):
        load_flow(path)


@pytest.mark.parametrize(
    ("keys", "new"),
    [
        (("example_shape",), [4]),
        (("example_shape",), [3, 1]),
        (("example_shape",), [10_000_000]),
        (("feature_names",), ["a"]),
        (("options", "latent_dim"), [1]),
        (("options", "floor"), {"a": 1}),
        (("options", "noise"), "[" * 1000),
    ],
)
def test_an_estimator_describes_itself_or_is_refused(valid, tmp_path, keys, new):
    path = tmp_path / "e.safetensors"
    with safe_open(valid / "estimator" / "valid" / path.name, framework="pt") as file:
        record = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = json.dumps(changed(json.loads(record["description"]), keys, new))
    write_sealed(path, "estimator", tensors, text)
    with pytest.raises(StoreError, match=r"e\.safetensors"):
        equipoise.VAEEstimator.load(path)


HUGE = (10**400, -(10**400), 10**5000, -(10**5000), float("inf"), float("nan"), "inf", "nan")
LONG = ("[" * 100_000, "{a: " * 50, "9" * 5000, "x" * 10**6, [[1]], {"a": 1})


@pytest.mark.parametrize("name", ["latent_dim", "batch_size", "devices", "num_nodes", "beta"])
def test_options_out_of_every_range_are_refused_in_a_line(name):
    for value in (*HUGE, *LONG):
        with pytest.raises(ConfigError) as caught:
            make_config({name: value})
        assert len(str(caught.value)) < 500


def test_many_problems_are_counted():
    with pytest.raises(ConfigError, match="and 280 more") as caught:
        make_config({f"x{i}" * 100: 1 for i in range(300)})
    assert len(caught.value.problems) == 300
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize("input_dim", [[10_000_000], [10_000_000] * 4, [3]])
def test_nothing_is_allocated_for_a_peer_before_its_weights_fit(valid, tmp_path, input_dim):
    shutil.copytree(valid / "pythae" / "valid", tmp_path / "model")
    path = tmp_path / "model" / "model_config.json"
    path.write_text(json.dumps({"input_dim": input_dim, "latent_dim": 1}))
    with pytest.raises(StoreError):
        read_pythae(tmp_path / "model")


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02", b"PK\x03\x04" + bytes(100)])
def test_broken_weights_of_a_peer_are_refused(valid, tmp_path, content):
    shutil.copytree(valid / "pythae" / "valid", tmp_path / "model")
    (tmp_path / "model" / "model.pt").write_bytes(content)
    with pytest.raises(StoreError, match=r"model\.pt is damaged"):
        read_pythae(tmp_path / "model")
