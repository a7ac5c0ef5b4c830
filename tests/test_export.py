"""Exported files compute the same as the model.

They do so for any number of examples, in the user's own units.
"""

import json
import re
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from equipoise import export as export_module
from equipoise.aggregate import GaussianMixture
from equipoise.export import export
from equipoise.files import LOCK, MANIFEST, adopt
from equipoise.model import VAE, Scaling
from equipoise.noise import FixedNoise
from equipoise.residuals import ErrorsByStd

FORMATS = ["torch", "onnx"]


def make_mixture():
    factor = torch.tril(torch.randn(3, 2, 2)) + 2 * torch.eye(2)
    means = torch.tensor([[-9.0, 0.0], [0.0, 5.0], [9.0, 0.0]])
    return GaussianMixture(torch.tensor([0.2, 0.7, 0.1]), means, 0.1 * factor @ factor.mT)


def make_images(network="decoder"):
    model = VAE.build(
        (1, 9, 8),
        latent_dim=2,
        width=2,
        scaling=Scaling(torch.tensor(0.0), torch.tensor(255.0), 1 / 255),
    )
    model.predict_variance(torch.tensor(0.02), torch.tensor(0.01), (), network)
    nn.init.normal_(model.noise.network.output.weight)
    errors = ErrorsByStd()
    errors.update(torch.randn(5000), torch.rand(5000) + 0.05)
    model.noise.calibrate_std(errors)
    return model.eval()


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    model, mixture = make_images("head"), make_mixture()
    return (
        model,
        mixture,
        export(model, mixture, request.param, tmp_path_factory.mktemp(request.param)),
    )


def runner(file):
    """What another program would do with the file."""
    if file.path.suffix == ".pt2":
        module = torch.export.load(file.path).module()
        return lambda **inputs: module(*inputs.values())
    session = onnxruntime.InferenceSession(file.path)
    return lambda **inputs: [
        torch.from_numpy(found)
        for found in session.run(None, {name: value.numpy() for name, value in inputs.items()})
    ]


def test_files_compute_what_the_model_does(exported):
    model, _, files = exported
    assert [file.signature for file in files] == [
        "raw uint8 (n, 1, 9, 8) -> mean, log_var float32 (n, 2)",
        "code float32 (n, 2) -> mean, std float32 (n, 1, 9, 8)",
        "uniform float32 (n,) and normal float32 (n, 2) -> code float32 (n, 2)",
    ]
    assert all(file.deviation < 1e-5 for file in files)
    encode, decode, sample = map(runner, files)
    for n in (1, 7):
        raw = torch.randint(0, 256, (n, 1, 9, 8), dtype=torch.uint8)
        posterior = model.encode(raw / 255)
        for found, expected in zip(encode(raw=raw), posterior, strict=True):
            torch.testing.assert_close(found, expected.detach())
        likelihood = model.decode(posterior.mean)
        mean, std = decode(code=posterior.mean.detach())
        torch.testing.assert_close(mean, 255 * likelihood.mean.detach(), atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(std, 255 * likelihood.std.detach(), atol=1e-3, rtol=1e-5)
        assert sample(uniform=torch.rand(n), normal=torch.randn(n, 2))[0].shape == (n, 2)


def test_the_sampler_draws_from_the_mixture(exported):
    _, mixture, files = exported
    n = 200_000
    (code,) = runner(files[2])(uniform=torch.rand(n), normal=torch.randn(n, 2))
    components = mixture.responsibilities(code).argmax(1)  # their means lie far apart
    torch.testing.assert_close(
        components.bincount(minlength=3) / n, mixture.weights, atol=5e-3, rtol=0
    )
    for k in range(3):
        drawn = code[components == k]
        torch.testing.assert_close(drawn.mean(0), mixture.means[k], atol=0.02, rtol=0)
        torch.testing.assert_close(drawn.mT.cov(), mixture.covariances[k], atol=0.02, rtol=0.03)


def test_a_single_component_needs_no_choice(tmp_path):
    normal = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    sample = runner(export(make_images(), normal, "onnx", tmp_path)[2])
    noise = torch.randn(3, 2)
    torch.testing.assert_close(sample(uniform=torch.rand(3), normal=noise)[0], noise)


def test_a_table_keeps_the_units_of_its_columns(tmp_path):
    scaling = Scaling(torch.tensor([2000.0, 0.0]), torch.tensor([10.0, 1e-3]))
    model = VAE.build((2,), latent_dim=2, width=1, noise=FixedNoise(0.25), scaling=scaling).eval()
    nn.init.zeros_(model.encoder.output.weight)  # a collapsed posterior is no deviation
    files = export(model, make_mixture(), "torch", tmp_path)
    assert files[0].signature.startswith("raw float32 (n, 2)")
    mean, std = runner(files[1])(code=torch.zeros(2, 2))
    torch.testing.assert_close(std, torch.tensor([[5.0, 5e-4]] * 2))
    torch.testing.assert_close(mean, scaling.restore(model.decode_mean(torch.zeros(2, 2))).detach())


def test_files_carry_their_own_weights_only_and_no_paths_of_this_machine(exported):
    encoder, decoder, _ = (file.path for file in exported[2])
    for path in (encoder, decoder):
        content = path.read_bytes()
        assert export_module.__file__.encode() not in content
        assert str(path.parent).encode() not in content
    if encoder.suffix == ".pt2":
        assert {name.split(".")[1] for name in torch.export.load(encoder).state_dict} == {
            "encoder",
            "scaling",
        }
        assert {name.split(".")[1] for name in torch.export.load(decoder).state_dict} == {
            "decoder",
            "noise",
            "scaling",
        }
    else:
        axes = onnx.load(decoder).graph.input[0].type.tensor_type.shape.dim
        # torch 2.6 gives it a name of its own.
        assert re.fullmatch(r"n|s\d+", axes[0].dim_param)
        assert axes[1].dim_value == 2


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_that_deviates_is_not_left(tmp_path, monkeypatch, to):
    monkeypatch.setattr(export_module, "TOLERANCE", -1.0)
    for name in ("encoder.onnx", "encoder.pt2"):
        (tmp_path / name).write_text("old")
    adopt(tmp_path, ["encoder.onnx", "encoder.pt2"])
    with pytest.raises(
        ArithmeticError, match=r"encoder\.(pt2|onnx) was not written: it would deviate"
    ):
        export(make_images(), make_mixture(), to, tmp_path)
    left = sorted(path for path in tmp_path.iterdir() if path.name not in (MANIFEST, LOCK))
    assert [path.name for path in left] == ["encoder.onnx", "encoder.pt2"]
    assert {path.read_text() for path in left} == {"old"}


def test_values_that_are_not_finite_are_a_deviation(tmp_path):
    model = make_images()
    nn.init.constant_(model.encoder.output.bias, float("nan"))
    with pytest.raises(ArithmeticError, match="by nan"):
        export(model, make_mixture(), "torch", tmp_path)


def test_other_formats_and_a_missing_extra_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no format 'tflite' .* choose from torch, onnx"):
        export(make_images(), make_mixture(), "tflite", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'equipoise\[export\]'"):
        export(make_images(), make_mixture(), "onnx", tmp_path)


def test_files_run_without_equipoise(exported):
    model, _, files = exported
    path = str(files[0].path)
    run = {
        ".pt2": f"import torch; encode = torch.export.load({path!r}).module(); "
        "found = encode(torch.arange(72).byte().reshape(1, 1, 9, 8))",
        ".onnx": f"import numpy, onnxruntime; found = onnxruntime.InferenceSession({path!r})"
        ".run(None, {'raw': numpy.arange(72, dtype='uint8').reshape(1, 1, 9, 8)})",
    }[files[0].path.suffix]
    code = f"import sys; sys.modules['equipoise'] = None; {run}; print(found[0].tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    raw = torch.arange(72).byte().reshape(1, 1, 9, 8)
    expected = model.encode(model.scaling(raw)).mean
    torch.testing.assert_close(
        torch.tensor(json.loads(done.stdout)), expected.detach(), atol=1e-5, rtol=1e-5
    )
