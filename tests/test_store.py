import errno
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from equipoise.aggregate import GaussianMixture
from equipoise.files import MANIFEST, StoreError, whole_file, write_json
from equipoise.model import VAE, Scaling
from equipoise.noise import DimensionNoise, FixedNoise, GlobalNoise
from equipoise.records import JsonObject, ModelDescription, read_record
from equipoise.residuals import ErrorsByStd, ResidualQuantiles
from equipoise.store import (
    load_mixture,
    load_model,
    read_tensors,
    save_mixture,
    save_model,
    write_tensors,
)
from equipoise.training.checkpoint import load_checkpoint, save_checkpoint

PACKAGE = Path(__file__).parent.parent / "equipoise"


def noises():
    yield FixedNoise(0.3)
    yield GlobalNoise()
    yield GlobalNoise("gradient")
    yield DimensionNoise((3, 8, 8), min_var=1e-5)
    yield DimensionNoise((3, 1, 1))
    yield "decoder"
    yield "head"


@pytest.mark.parametrize(
    "noise", list(noises()), ids=lambda n: n if isinstance(n, str) else type(n).__name__
)
@pytest.mark.parametrize("architecture", ["mlp", "conv", "residual"])
def test_a_loaded_model_is_the_saved_one(tmp_path, noise, architecture):
    scaling = Scaling(torch.zeros(3, 1, 1), torch.full((3, 1, 1), 255.0), quantum=1 / 255)
    vae = VAE.build((3, 8, 8), latent_dim=2, width=4, architecture=architecture, scaling=scaling)
    if noise in ("decoder", "head"):
        vae.predict_variance(torch.tensor(0.1), torch.tensor(0.05), (3, 8, 8), noise)
        nn.init.normal_(vae.noise.network.output.weight)
        errors = ErrorsByStd()
        errors.update(torch.randn(500), torch.rand(500) + 0.1)
        vae.noise.calibrate_std(errors)
        statistic = ResidualQuantiles()
        statistic.update(torch.randn(50, 3))
        vae.noise.calibrate_intervals(statistic)
    else:
        noise.update(0.1 * torch.randn(4, 3, 8, 8))
        vae.noise = noise
    save_model(tmp_path / "model.safetensors", vae)
    loaded = load_model(tmp_path / "model.safetensors")
    assert not loaded.training
    assert loaded.description() == vae.description()
    raw = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mine, theirs = vae.eval().reconstruct(vae.scaling(raw)), loaded.reconstruct(loaded.scaling(raw))
    assert torch.equal(mine.mean, theirs.mean)
    assert torch.equal(mine.std, theirs.std)
    assert all(
        map(
            torch.equal,
            vae.interval(vae.scaling(raw), 0.9),
            loaded.interval(loaded.scaling(raw), 0.9),
        )
    )


def test_a_model_from_before_heads_and_maps_is_loaded(tmp_path):
    """Its description does not speak of them."""
    vae = VAE.build((6,), latent_dim=2, width=1).eval()
    vae.predict_variance(torch.tensor(0.1), torch.tensor(0.1))
    description = vae.description()
    for name in ("reads_features", "map_points"):
        del description["noise"]["arguments"][name]
    write_tensors(tmp_path / "model.safetensors", "model", vae.state_dict(), description)
    x = torch.randn(3, 6)
    loaded = load_model(tmp_path / "model.safetensors")
    assert torch.equal(loaded.reconstruct(x).std, vae.reconstruct(x).std)


def test_own_networks_are_saved_and_loaded(tmp_path):
    def networks():
        return nn.Linear(6, 4), nn.Sequential(nn.Linear(2, 6))

    vae = VAE(*networks(), GlobalNoise(), shape=(6,), latent_dim=2)
    vae.predict_variance(torch.tensor(0.1), torch.tensor(0.1))
    file = tmp_path / "model.safetensors"
    save_model(file, vae)
    with pytest.raises(StoreError, match=r"own \(Linear, Sequential\).*encoder= and decoder="):
        load_model(file)
    loaded = load_model(file, *networks())
    x = torch.randn(3, 6)
    assert torch.equal(loaded.reconstruct(x).mean, vae.reconstruct(x).mean)
    with pytest.raises(
        StoreError, match=r"(?s)missing: encoder.0.bias.*unexpected: encoder.weight"
    ):
        load_model(file, nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), networks()[1])


def test_built_in_networks_are_not_replaced_by_chance(tmp_path):
    file = tmp_path / "model.safetensors"
    save_model(file, VAE.build((6,), latent_dim=2, width=1))
    with pytest.raises(StoreError, match="do not pass"):
        load_model(file, encoder=nn.Linear(6, 4))


def test_every_difference_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_model(file, VAE.build((6,), latent_dim=2, width=1))
    tensors, description = read_tensors(file, "model", ModelDescription)
    tensors["extra"] = torch.zeros(1)
    tensors["encoder.output.bias"] = tensors["encoder.output.bias"].double()
    del tensors["decoder.output.bias"]
    write_tensors(file, "model", tensors, description)
    with pytest.raises(StoreError) as caught:
        load_model(file)
    for part in (
        "unexpected: extra",
        "missing: decoder.output.bias",
        "encoder.output.bias: expected (4,) torch.float32",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped bit", "foreign", "mixture", "newer", "empty", "absent"]
)
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    file = tmp_path / "model.safetensors"
    save_model(file, VAE.build((6,), latent_dim=2, width=1))
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped bit":
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, file)
    elif damage == "mixture":
        file.unlink()
        save_mixture(
            file, GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None]), {}
        )
    elif damage == "newer":
        file.write_bytes(bytes(content).replace(b"equipoise-1", b"equipoise-9"))
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        load_model(file)


def test_what_the_system_refuses_is_not_called_damage(tmp_path):
    resource = pytest.importorskip("resource")
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": torch.tensor(step)})
    newest = tmp_path / "step-000000002.safetensors"

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            read_tensors(newest, "checkpoint", JsonObject)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert load_checkpoint(tmp_path).path == newest


def test_mixture_round_trip(tmp_path):
    mixture = GaussianMixture(
        torch.tensor([0.25, 0.75], dtype=torch.float64),
        torch.randn(2, 3, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64).repeat(2, 1, 1),
    )
    save_mixture(tmp_path / "m.safetensors", mixture, {"fit": "em"})
    loaded, description = load_mixture(tmp_path / "m.safetensors")
    z = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(loaded.log_prob(z), mixture.log_prob(z))
    assert description == {"fit": "em"}


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    writing = whole_file(path)
    writing.__enter__().write_text("half")
    assert not writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert read_record(path, JsonObject) == {"old": 1}
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})

    def no_space(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space left") as caught:
        write_json(path, {"new": 2})
    assert caught.value.errno == errno.ENOSPC
    assert read_record(path, JsonObject) == {"old": 1}
    assert os.listdir(tmp_path) == ["value.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_the_operating_system_reports_a_full_disk_as_we_expect():
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "w") as file:
        file.write("x")
    assert caught.value.errno == errno.ENOSPC


def test_json_that_is_not_json(tmp_path):
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(StoreError, match="not valid JSON"):
        read_record(tmp_path / "c.json", JsonObject)
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "d.json", float("nan"))
    assert not (tmp_path / "d.json").exists()


def test_checkpoints_hold_trees_of_tensors_and_values(tmp_path):
    shared = torch.randn(4)
    state = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "m": shared}, 1: {"m": shared}},
            "betas": (0.9, 0.99),
        },
        "rows": [{"elbo": 1.5, "name": "x", "flag": True}],
        "nothing": None,
    }
    save_checkpoint(tmp_path, 7, state)
    loaded = load_checkpoint(tmp_path).state
    assert loaded["rows"] == state["rows"]
    assert loaded["nothing"] is None
    assert loaded["optimizer"]["betas"] == (0.9, 0.99)
    assert torch.equal(loaded["optimizer"]["state"][0]["m"], shared)
    assert set(loaded["optimizer"]["state"]) == {0, 1}
    with pytest.raises(TypeError, match="/odd is a set"):
        save_checkpoint(tmp_path, 8, {"odd": {1}})


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step})
    assert sorted(os.listdir(tmp_path)) == [
        MANIFEST,
        "step-000000002.safetensors",
        "step-000000003.safetensors",
    ]
    newest = tmp_path / "step-000000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    found = load_checkpoint(tmp_path)
    assert found.state == {"step": 2}
    assert len(found.refused) == 1
    aside = tmp_path / "step-000000003.safetensors.damaged"
    assert str(aside) in found.refused[0]
    assert aside.is_file()
    (tmp_path / "step-000000002.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match="Every checkpoint is damaged"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path / "elsewhere") is None


def test_a_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(StoreError):
        load_model(tmp_path / "model.safetensors")
    assert not (tmp_path / "trapped").exists()


def test_nothing_in_the_package_loads_pickle():
    """Ruff knows the pickle family; torch.load and NumPy's flag are ours to look for."""
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--isolated",
            "--select",
            "S301,S302,S403",
            "--no-cache",
            str(PACKAGE),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    source = "".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    assert "allow_pickle=False" in source
    # The foreign formats that are read, and of those only tensors.
    loads = re.findall(r"torch\.load\(([^)]*)\)", source)
    assert loads
    assert all("weights_only=True" in arguments for arguments in loads)
    assert "allow_pickle=True" not in source


def test_traits_of_a_model_are_kept(tmp_path):
    vae = VAE.build((1, 8, 8), latent_dim=2, width=2, mean_bounds=(0.0, 1.0), deterministic=True)
    save_model(tmp_path / "model.safetensors", vae)
    loaded = load_model(tmp_path / "model.safetensors")
    assert (loaded.mean_bounds, loaded.deterministic) == ((0.0, 1.0), True)
