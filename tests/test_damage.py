"""Damaged files: every bit of a description, and every truncation, of each kind of file."""

import functools
import json
import struct
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

import equipoise
from equipoise.aggregate import GaussianMixture
from equipoise.files import StoreError
from equipoise.flow_fit import CodeFlow
from equipoise.model import VAE
from equipoise.records import JsonObject
from equipoise.store import (
    load_flow,
    load_mixture,
    load_model,
    read_tensors,
    save_flow,
    save_mixture,
    save_model,
)
from equipoise.training.checkpoint import load_checkpoint, save_checkpoint


def mixture_file(path):
    mixture = GaussianMixture(torch.tensor([0.25, 0.75]), torch.randn(2, 1), torch.ones(2, 1, 1))
    save_mixture(path, mixture, {"fit": "em", "held_out": [1.5, None]})


def model_file(path):
    save_model(path, VAE.build((2,), latent_dim=1, width=1))


def checkpoint_file(path):
    state = {"position": [3, 12], "model": {"weight": torch.randn(2)}, 7: ("a", None, 0.5)}
    save_checkpoint(path.parent, 1, state).replace(path)


def flow_file(path):
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    save_flow(path, CodeFlow(mixture, n_transforms=1, hidden=(2,)), {"seconds": 1.5})


def estimator_file(path):
    fitted_estimator().save(path)


@functools.cache
def fitted_estimator():
    table = np.random.default_rng(0).normal(size=(40, 3))
    options = {"latent_dim": 1, "width": 1, "stage_1_epochs": 1, "stage_2_epochs": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return equipoise.VAEEstimator(**options, n_components=1).fit(table)


def load_estimator(path):
    estimator = equipoise.VAEEstimator.load(path)
    return [estimator.model_, estimator.mixture_, estimator.history_, estimator.get_params()]


READERS = {
    "flow": (flow_file, load_flow),
    "estimator": (estimator_file, load_estimator),
    "mixture": (mixture_file, load_mixture),
    "model": (model_file, load_model),
    "checkpoint": (checkpoint_file, lambda path: read_tensors(path, "checkpoint", JsonObject)),
}


def header_size(content):
    return 8 + struct.unpack("<Q", content[:8])[0]


def loads_as_before(read, path, before):
    """Whether a file is read, and to the same content; False where it is refused."""
    try:
        after = read(path)
    except StoreError:
        return False
    assert comparable(after) == before
    return True


def comparable(content):
    """Everything that a reader returned, as text that equals only itself."""
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if isinstance(content, dict):
        return {str(name): comparable(value) for name, value in content.items()}
    if isinstance(content, tuple | list):
        return [comparable(value) for value in content]
    return content.tolist() if isinstance(content, torch.Tensor) else content


@pytest.mark.parametrize("kind", READERS)
def test_bits_of_a_header_matter_or_are_refused(tmp_path, kind):
    """A flip is refused by a StoreError, or it changed nothing that is read, such as a blank."""
    write, read = READERS[kind]
    path = tmp_path / "file.safetensors"
    write(path)
    content, before = path.read_bytes(), comparable(read(path))
    survived = 0
    stride = max(1, 8 * header_size(content) // 4000)
    for position in range(0, 8 * header_size(content), stride):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        survived += loads_as_before(read, path, before)
    assert survived == 0


@pytest.mark.parametrize("kind", READERS)
def test_bits_of_tensors_and_truncations_are_refused(tmp_path, kind):
    write, read = READERS[kind]
    path = tmp_path / "file.safetensors"
    write(path)
    content = path.read_bytes()
    start = header_size(content)
    for position in range(8 * start, 8 * len(content), 8 * max(1, (len(content) - start) // 200)):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 7
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"altered|damaged"):
            read(path)
    for length in range(0, len(content), max(1, len(content) // 300)):
        path.write_bytes(content[:length])
        with pytest.raises(StoreError):
            read(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return evaluated_run(tmp_path_factory.mktemp("damage"))


def evaluated_run(folder):
    """A run whose JSON files are whole."""
    table = np.random.default_rng(0).normal(size=(40, 3))
    config = equipoise.TrainConfig(
        latent_dim=1, width=1, stage_1_epochs=2, stage_2_epochs=0, n_components=1
    )
    data = equipoise.load_data(table)
    run = equipoise.train(data, config, folder / "run")
    equipoise.evaluate(run, data, sections=["likelihood"])
    return run


JSON_FILES = {
    "config.json": lambda run: run.settings(),
    "metrics.jsonl": lambda run: run.history(),
    "evaluation.json": lambda run: run.evaluation(),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_every_bit_and_every_truncation_of_a_json_file_is_noticed(run, name):
    path, read = run.folder / name, JSON_FILES[name]
    content, before = path.read_bytes(), read(run)
    n_bits = 8 * len(content)
    try:
        for position in range(0, n_bits, max(1, n_bits // 2000)):
            damaged = bytearray(content)
            damaged[position // 8] ^= 1 << position % 8
            path.write_bytes(damaged)
            with pytest.raises(StoreError, match=name):
                read(run)
        for length in range(0, len(content), max(1, len(content) // 300)):
            path.write_bytes(content[:length])
            with pytest.raises(StoreError, match=name):
                read(run)
    finally:
        path.write_bytes(content)
    assert read(run) == before


@pytest.mark.parametrize("bit", range(0, 4000, 97))
def test_the_older_checkpoint_serves_where_the_newest_is_damaged(tmp_path, bit):
    save_checkpoint(tmp_path, 1, {"epoch": 1, "weight": torch.ones(3)})
    newest = save_checkpoint(tmp_path, 2, {"epoch": 2, "weight": torch.zeros(3)})
    content = bytearray(newest.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    newest.write_bytes(content)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.state["epoch"] == 1
    assert len(checkpoint.refused) == 1


def test_equal_content_is_an_equal_file(tmp_path):
    for name in ("first", "second"):
        torch.manual_seed(0)
        model_file(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    header = (tmp_path / "first").read_bytes()
    metadata = json.loads(header[8 : header_size(header)])["__metadata__"]
    assert list(metadata) == ["equipoise"]
