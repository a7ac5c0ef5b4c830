"""The table of readers: how valid files of each are made, how they are altered, and read."""

import json
import os
import random
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import equipoise
from equipoise import files
from equipoise.aggregate import GaussianMixture, StandardNormal
from equipoise.config import ConfigError, TrainConfig, make_config, read_recipe
from equipoise.data import load, load_examples
from equipoise.files import StoreError
from equipoise.flow_fit import CodeFlow
from equipoise.interop import read_pythae
from equipoise.model import VAE, Scaling
from equipoise.noise import DimensionNoise, FixedNoise, PredictedNoise
from equipoise.report import write_report
from equipoise.run import Run
from equipoise.sharing import model_card
from equipoise.store import load_flow, load_mixture, load_model, save_flow, save_mixture, save_model
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer
from tests.fuzz import hostile
from tests.fuzz.limits import DATA, rng_of, run_case

OWN = (StoreError, ConfigError)
FORMATS = {
    "bmp": {},
    "gif": {},
    "jpeg": {},
    "png": {},
    "ppm": {},
    "tiff": {"compression": "tiff_deflate"},
    "webp": {},
}
DEFAULTS = TrainConfig().as_dict()
TENSORS = ("model.safetensors", "aggregate.safetensors")
Steps = Iterator[tuple[str, Callable[[], object]]]


class Reader(NamedTuple):
    """A reader of the library.

    Args:
        prepare: Writes valid files into a folder, once: a subfolder for each variant.
        targets: Patterns of the files that are altered, one of them in each case.
        read: Yields the names of all steps of the reading, and a function for each.
        allowed: Kinds of errors that are refusals.
        is_own: Whether equipoise itself writes these files.
    """

    prepare: Callable[[Path], None]
    targets: tuple[str, ...]
    read: Callable[[Path], Steps]
    allowed: tuple[type[BaseException], ...] = OWN
    is_own: bool = True


LIES: dict[str, Callable[[Path, random.Random], None]] = {
    ".json": hostile.lie_in_json,
    ".jsonl": hostile.lie_in_lines,
    ".safetensors": hostile.lie_in_tensors,
    ".npy": hostile.lie_in_npy,
    ".npz": hostile.lie_in_npz,
    ".yaml": hostile.lie_in_yaml,
    "-ubyte": hostile.lie_in_idx,
    ".gz": hostile.lie_in_idx,
}
"""How files lie, by the end of their names. Others are damaged only."""


def prepare(folder: Path, names: list[str]) -> None:
    """Write the valid files of readers, each into a subfolder with its name."""
    os.environ["EQUIPOISE_CACHE"] = str(folder / "cache")
    os.environ["EQUIPOISE_DATA"] = str(folder / "nowhere")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in names:
        if not (folder / name).is_dir():
            READERS[name].prepare(folder / name)


def attempt(valid: Path, reader: str, seed: int, folder: Path) -> tuple[str, str]:
    """Make the files of a case, and read them.

    Args:
        valid: Where :func:`prepare` has written.
        reader: Name of the reader.
        seed: Seed of the case. Even ones damage bytes, odd ones lie.
        folder: Folder of the case, which does not exist.

    Returns:
        Verdict and detail.
    """
    entry, rng = READERS[reader], rng_of(reader, seed)
    shutil.copytree(rng.choice(sorted((valid / reader).iterdir())), folder)
    targets = [path for pattern in entry.targets for path in sorted(folder.glob(pattern))]
    alter(rng.choice(targets), rng, is_lie=bool(seed % 2))
    torch.manual_seed(0)
    return run_case(entry.read(folder), entry.allowed)


def alter(path: Path, rng: random.Random, *, is_lie: bool) -> None:
    """Damage a file, or replace it by a lie."""
    for ending, way in LIES.items():
        if is_lie and path.name.endswith(ending):
            way(path, rng)
            return
    path.write_bytes(hostile.mutate(path.read_bytes(), rng))


def table() -> Any:
    """Rows whose columns are correlated."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(60, 1)) + 0.3 * rng.normal(size=(60, 3))).astype(np.float32)


def images(n: int = 40) -> Any:
    """Small grey images."""
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8), dtype=np.uint8)


def mixture_of(latent_dim: int) -> GaussianMixture:
    """A mixture of two components."""
    covariances = torch.eye(latent_dim).repeat(2, 1, 1)
    return GaussianMixture(torch.tensor([0.25, 0.75]), torch.randn(2, latent_dim), covariances)


def _prepare_models(folder: Path) -> None:
    """A model for each noise model and each kind of network."""
    models = {
        "global": VAE.build((3,), latent_dim=2, width=2),
        "fixed": VAE.build((3,), latent_dim=2, width=2, noise=FixedNoise(0.5)),
        "dimension": VAE.build((3,), latent_dim=2, width=2, noise=DimensionNoise((3,))),
        "conv": VAE.build((1, 8, 8), latent_dim=2, width=2, mean_bounds=(0.0, 1.0)),
        "residual": VAE.build((3, 8, 8), latent_dim=2, width=2, architecture="residual"),
        "scaled": VAE.build(
            (3,), latent_dim=2, width=2, scaling=Scaling(torch.zeros(3), torch.ones(3), 0.5)
        ),
    }
    for name in ("predicted", "predicted-conv"):
        shape = (3,) if name == "predicted" else (1, 8, 8)
        model = models[name] = VAE.build(shape, latent_dim=2, width=2)
        network = model.blank_variance_network()
        model.noise = PredictedNoise(network, torch.ones(()), torch.ones(()))
    for name, model in models.items():
        save_model(folder / name / "model.safetensors", model, "ab" * 32)


def use_model(model: VAE, mixture: GaussianMixture | None = None) -> None:
    """Pass data through a model, and sample from it."""
    with torch.no_grad():
        x = torch.zeros(2, *model.shape)
        model.scaling.restore_levels(model.decode(model.encode(x).mean).mean)
        drawn = model.generate(2, mixture or StandardNormal(model.latent_dim))
        model.scaling.restore_std(drawn.std)


def _read_model(folder: Path) -> Steps:
    path = folder / "model.safetensors"
    yield "load_model", lambda: use_model(load_model(path))


def _prepare_mixture(folder: Path) -> None:
    save_mixture(folder / "valid" / "m.safetensors", mixture_of(2), {"fit": "em", "held_out": [1]})


def _read_mixture(folder: Path) -> Steps:
    def use() -> None:
        mixture = load_mixture(folder / "m.safetensors")[0]
        codes = mixture.sample(5, torch.Generator().manual_seed(0))
        mixture.log_prob(codes)

    yield "load_mixture", use


def _prepare_flow(folder: Path) -> None:
    flow = CodeFlow(mixture_of(2), n_transforms=2, hidden=(3, 2))
    save_flow(folder / "valid" / "flow.safetensors", flow, {"seconds": 1.5})


def _read_flow(folder: Path) -> Steps:
    def use() -> None:
        flow = load_flow(folder / "flow.safetensors")[0]
        flow.log_prob(flow.sample(5, torch.Generator().manual_seed(0)))

    yield "load_flow", use


def _prepare_estimator(folder: Path) -> None:
    (folder / "valid").mkdir(parents=True)
    estimator = equipoise.VAEEstimator(
        latent_dim=2, width=2, stage_1_epochs=1, stage_2_epochs=1, n_components=1, random_state=0
    )
    estimator.fit(table()).save(folder / "valid" / "e.safetensors")


def _read_estimator(folder: Path) -> Steps:
    def use() -> None:
        estimator = equipoise.VAEEstimator.load(folder / "e.safetensors")
        rows = np.zeros((2, *estimator.example_shape_), np.float32)
        estimator.transform(rows)
        estimator.score_samples(rows)
        estimator.sample(2)
        estimator.get_params()
        repr(estimator)
        estimator.save(folder / "again.safetensors")

    yield "load", use


CONFIG = {
    "latent_dim": 2,
    "width": 2,
    "stage_1_epochs": 2,
    "stage_2_epochs": 2,
    "n_components": 1,
    "batch_size": 16,
    "tolerance": 0,
}


def _prepare_run(folder: Path) -> None:
    """A whole run without its manifest, so that the schemas are what refuses."""
    for other in ("config", "metrics", "evaluation", "run-tensors"):
        if (folder.parent / other).is_dir():
            shutil.copytree(folder.parent / other, folder)
            return
    folder.mkdir(parents=True)
    source = folder.parent / "table-of-run.npy"
    np.save(source, table())
    data = load(source)
    run = equipoise.train(data, make_config(CONFIG), folder / "valid")
    equipoise.evaluate(run, data, n_samples=200, importance_samples=5, brief=True)
    for name in (files.MANIFEST, files.LOCK):
        (run.folder / name).unlink(missing_ok=True)
    shutil.rmtree(run.figures, ignore_errors=True)
    shutil.rmtree(run.checkpoints)


def _read_run(folder: Path) -> Steps:
    from equipoise.explorer.views import View

    run = Run(folder)
    yield "settings", run.settings
    yield "config", run.config
    yield "model and mixture", lambda: use_model(run.model(), run.mixture())
    yield "data", run.data
    yield from _read_figures(folder)
    # The map takes a second, so that it is drawn in some of the cases only.
    content = b"".join((folder / name).read_bytes() for name in ("config.json", *TENSORS))
    if zlib.crc32(content) % 20 == 0:
        yield "view", lambda: View(run.model(), run.mixture(), run.data()).about()


def _read_figures(folder: Path) -> Steps:
    run = Run(folder)
    yield "history", run.history
    yield "evaluation", run.evaluation
    yield "model_card", lambda: model_card(run, "owner/name")
    yield "report", lambda: write_report(folder)


def _prepare_manifest(folder: Path) -> None:
    """A run with its manifest, with figures of the training alone."""
    source = folder / "valid" / "table.npy"
    source.parent.mkdir(parents=True)
    np.save(source, table())
    run = equipoise.train(load(source), make_config(CONFIG), folder / "valid" / "run")
    shutil.rmtree(run.figures, ignore_errors=True)
    shutil.rmtree(run.checkpoints)


def _read_manifest(folder: Path) -> Steps:
    run = Run(folder / "run")
    path = run.folder / "new.json"
    yield "written_names", lambda: files.written_names(run.folder)
    yield "settings", run.settings
    yield "history", run.history
    yield "is_ours", lambda: files.is_ours(run.model_file)

    def write() -> None:
        with run.exclusive("test"):
            files.write_json(path, {"a": 1})

    yield "write", write
    yield "remove", lambda: files.remove(path)


def _prepare_checkpoint(folder: Path) -> None:
    """Runs that are at the end of stage 1, and within stage 2; without manifests."""
    folder.mkdir(parents=True)
    source = folder.parent / "table-of-checkpoint.npy"
    np.save(source, table())
    data = load(source)
    for name, epochs in (("whole", 2), ("one", 1)):
        config = make_config({**CONFIG, "stage_1_epochs": epochs, "stage_2_epochs": epochs})
        run = equipoise.train(data, config, folder / name)
        newest = max(run.checkpoints.iterdir())
        if name == "whole":
            newest.unlink()
        for path in run.folder.iterdir():
            if path.name not in ("config.json", "checkpoints"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (run.checkpoints / files.MANIFEST).unlink(missing_ok=True)


def _read_checkpoint(folder: Path) -> Steps:
    def resume() -> None:
        run = Run(folder)
        data = run.data()
        # The parts of a training that read a checkpoint; the mixture is not fitted.
        config = run.config()
        model = make_model(data, config)
        trainer = Trainer(model, data, config, folder=run.checkpoints)
        trainer.fit(resume=True)

    yield "resume", resume


def _prepare_pythae(folder: Path) -> None:
    from equipoise.interop import _DefaultDecoder, _DefaultEncoder

    valid = folder / "valid"
    valid.mkdir(parents=True)
    networks = torch.nn.ModuleDict(
        {"encoder": _DefaultEncoder((2,), 1), "decoder": _DefaultDecoder((2,), 1)}
    )
    torch.save({"model_state_dict": networks.state_dict()}, valid / "model.pt")
    config = {"name": "VAEConfig", "input_dim": [2], "latent_dim": 1, "uses_default_encoder": True}
    (valid / "model_config.json").write_text(json.dumps(config))


def _read_pythae(folder: Path) -> Steps:
    yield "read_pythae", lambda: use_model(read_pythae(folder))


def _prepare_tracker(folder: Path) -> None:
    (folder / "valid").mkdir(parents=True)
    (folder / "valid" / "tracker.json").write_text(json.dumps({"run_id": "abc"}))


def _read_tracker(folder: Path) -> Steps:
    from equipoise.training.trackers import TensorBoardSink

    yield "run_id", lambda: TensorBoardSink(folder, {}).run_id(lambda: "new")


def _prepare_options(folder: Path) -> None:
    """Each option with a value, as strings of a command line."""
    values = {name: "null" if value is None else str(value) for name, value in DEFAULTS.items()}
    (folder / "valid").mkdir(parents=True)
    (folder / "valid" / "options.json").write_text(json.dumps(values))


def _read_options(folder: Path) -> Steps:
    # What json itself cannot read was no mapping in memory.
    try:
        values = json.loads((folder / "options.json").read_text(errors="replace"))
    except (ValueError, RecursionError):
        values = {"latent_dim": (folder / "options.json").read_text(errors="replace")[:10_000]}
    if not isinstance(values, dict):
        values = {"latent_dim": values}

    yield "values", lambda: make_config(values)
    yield "over", lambda: make_config({}, values)
    defaults = {name: "null" if v is None else str(v) for name, v in DEFAULTS.items()}
    altered = {name: value for name, value in values.items() if value != defaults.get(name)}
    for name, value in list(altered.items())[:3]:
        yield name[:100], lambda name=name, value=value: make_config({name: value})


def _prepare_recipe(folder: Path) -> None:
    (folder / "valid").mkdir(parents=True)
    text = "data: digits\nlatent_dim: 8\nfloor: quantisation\nnoise: pixel\nclip: 2.5\nseed: 1\n"
    (folder / "valid" / "recipe.yaml").write_text(text)


def _read_recipe(folder: Path) -> Steps:
    def read() -> None:
        values = read_recipe(folder / "recipe.yaml")
        values.pop("data", None)
        make_config(values)

    yield "read_recipe", read


def use_data(path: Path | str, **options: Any) -> None:
    """Load data, and look at all examples."""
    data = load(path, **options)
    for part in (data.train, data.validation, data.test):
        part[:]


def _prepare_npy(folder: Path) -> None:
    for name, array in {"table": table(), "images": images(), "big": table().astype(">f8")}.items():
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "x.npy", array)


def _read_npy(folder: Path) -> Steps:
    path = folder / "x.npy"
    yield "load", lambda: use_data(path)
    yield "load_examples", lambda: load_examples(path, (3,))


def _prepare_npz(folder: Path) -> None:
    for name in ("one", "parts"):
        (folder / name).mkdir(parents=True)
    np.savez(folder / "one" / "x.npz", x=table())
    arrays = {"x_train": images(), "x_val": images(16), "x_test": images(16)}
    np.savez_compressed(folder / "parts" / "x.npz", **arrays)


def _read_npz(folder: Path) -> Steps:
    yield "load", lambda: use_data(folder / "x.npz")


def _prepare_idx(folder: Path, ending: str = "") -> None:
    import gzip
    import struct

    place = folder / "valid" / "mnist"
    place.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        content = struct.pack(">4I", 0x0803, 40, 8, 8) + images().tobytes()
        content = gzip.compress(content) if ending else content
        (place / f"{name}{ending}").write_bytes(content)


def _read_idx(folder: Path) -> Steps:
    yield "load", lambda: use_data("mnist", data_dir=folder / "mnist")


def _prepare_image(ending: str, folder: Path) -> None:
    """Folders in which one image of many is altered, and folders of which it is nearly all."""
    for name, n in (("many", 20), ("few", 11)):
        place = folder / name / "images"
        place.mkdir(parents=True)
        for i, pixels in enumerate(images(n)):
            image = Image.fromarray(np.kron(pixels, np.ones((2, 2), np.uint8)))
            if name == "few":
                image = image.convert("RGB")
            first = "0" if i == 0 else "x"
            image.save(place / f"{first}-{i}.{ending}", **FORMATS[ending])


def _read_image(folder: Path) -> Steps:
    cache = folder / "cache"
    yield "load", lambda: use_data(folder / "images", cache_dir=cache)
    yield "strict", lambda: use_data(folder / "images", image_size=8, strict=True, cache_dir=cache)
    yield "load_examples", lambda: load_examples(folder / "images", (1, 8, 8), cache_dir=cache)


def _read_upload(folder: Path) -> Steps:
    from equipoise.explorer.views import View

    view = View(VAE.build((1, 8, 8), latent_dim=1, width=1).eval(), mixture_of(1))
    for path in sorted((folder / "images").glob("0-*")):
        yield "upload", lambda path=path: view.read(path.read_bytes())


def _prepare_upload(folder: Path) -> None:
    for ending in FORMATS:
        place = folder / ending / "images"
        place.mkdir(parents=True)
        Image.fromarray(images(1)[0]).save(place / f"0-0.{ending}", **FORMATS[ending])


def _prepare_image_cache(folder: Path) -> None:
    """A folder of images, and the cache that decoding it has left."""
    _prepare_image("png", folder)
    shutil.rmtree(folder / "few")
    load(folder / "many" / "images", cache_dir=folder / "many" / "cache")


def _prepare_features(folder: Path) -> None:
    from equipoise.store import write_tensors

    tensors = {"features": torch.randn(4, 3)}
    write_tensors(folder / "valid" / "f.safetensors", "features", tensors, {})


def _read_features(folder: Path) -> Steps:
    from equipoise.records import JsonObject
    from equipoise.store import read_tensors

    yield "read_tensors", lambda: read_tensors(folder / "f.safetensors", "features", JsonObject)


READERS: dict[str, Reader] = {
    "config": Reader(_prepare_run, ("config.json",), _read_run),
    "metrics": Reader(_prepare_run, ("metrics.jsonl",), _read_figures),
    "evaluation": Reader(_prepare_run, ("evaluation.json",), _read_figures),
    "manifest": Reader(_prepare_manifest, (f"run/{files.MANIFEST}",), _read_manifest),
    "run-tensors": Reader(_prepare_run, TENSORS, _read_run),
    "model": Reader(_prepare_models, ("*.safetensors",), _read_model),
    "mixture": Reader(_prepare_mixture, ("*.safetensors",), _read_mixture),
    "flow": Reader(_prepare_flow, ("*.safetensors",), _read_flow),
    "checkpoint": Reader(_prepare_checkpoint, ("checkpoints/*.safetensors",), _read_checkpoint),
    "estimator": Reader(_prepare_estimator, ("*.safetensors",), _read_estimator),
    "features": Reader(_prepare_features, ("*.safetensors",), _read_features),
    "tracker": Reader(_prepare_tracker, ("tracker.json",), _read_tracker),
    "pythae": Reader(_prepare_pythae, ("model_config.json", "model.pt"), _read_pythae),
    "upload": Reader(_prepare_upload, ("images/0-*",), _read_upload, (ValueError,)),
    "options": Reader(_prepare_options, ("options.json",), _read_options),
    "recipe": Reader(_prepare_recipe, ("recipe.yaml",), _read_recipe, OWN, False),
    "npy": Reader(_prepare_npy, ("x.npy",), _read_npy, DATA, False),
    "npz": Reader(_prepare_npz, ("x.npz",), _read_npz, DATA, False),
    "idx": Reader(_prepare_idx, ("mnist/*",), _read_idx, DATA, False),
    "idx.gz": Reader(
        lambda folder: _prepare_idx(folder, ".gz"), ("mnist/*",), _read_idx, DATA, False
    ),
    **{
        ending: Reader(partial(_prepare_image, ending), ("images/0-*",), _read_image, DATA, False)
        for ending in FORMATS
    },
    "image-cache": Reader(_prepare_image_cache, ("cache/*",), _read_image, DATA, False),
}

SLOW = {"config": 8, "run-tensors": 8, "checkpoint": 8, "options": 8}
"""Readers that take longer, and by how much fewer cases each of them has therefore."""
OWN_READERS = [name for name, reader in READERS.items() if reader.is_own]
