"""Conditional models: labels from the data to the samples, with closed forms and real runs."""

import gzip
import signal
import struct
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import equipoise
from equipoise.aggregate import GaussianMixture
from equipoise.cli import main
from equipoise.config import ConfigError
from equipoise.data import load, load_examples
from equipoise.data.batches import Batches, as_tensor
from equipoise.gaussian import Gaussian
from equipoise.label_mixture import PRIOR_CODES, AnyLabel, LabelMixture, fit_label_weights
from equipoise.labels import UNKNOWN, Labelled, joined, labelled, labels_of, one_hot, withhold
from equipoise.model import VAE
from equipoise.noise import FixedNoise
from equipoise.objectives import importance_weighted_bound
from equipoise.sources import sample_source
from equipoise.store import load_model, read_digest, save_model
from equipoise.training.job import train
from tests.test_exact_resume import Stop

SMALL = equipoise.TrainConfig(
    latent_dim=2,
    width=4,
    stage_1_epochs=2,
    stage_2_epochs=1,
    batch_size=16,
    n_components=2,
    accelerator="cpu",
)
MEANS = np.array([[4.0, 0, 0, 0, 0], [0, -4, 0, 0, 0], [0, 0, 5, 0, 0]])


def shifted(n, seed=0):
    """Rows of one factor model, whose mean depends on the label, and the labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    loadings = np.array([[1.0, 0.5, 0, 1, 0.2], [0, 0.5, 1, 0, -1]])
    x = rng.normal(size=(n, 2)) @ loadings + MEANS[y] + 0.3 * rng.normal(size=(n, 5))
    return x, y


def refused(*arguments):
    """The command ends with the exit code of wrong input."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def fit(x, y=None, **options):
    options = {
        "latent_dim": 2,
        "width": 4,
        "stage_1_epochs": 20,
        "stage_2_epochs": 0,
        "batch_size": 32,
        "n_components": 3,
        "noise_correlation": "none",
        "random_state": 0,
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return equipoise.VAEEstimator(conditional=y is not None, **options).fit(x, y)


@pytest.fixture(scope="module")
def conditional():
    x, y = shifted(600)
    return fit(x, np.array(["a", "b", "c"])[y])


def test_labels_go_with_their_rows_and_not_with_arithmetic():
    z = labelled(torch.arange(8.0).view(4, 2), torch.tensor([0, 1, UNKNOWN, 2]))
    assert type(z * 2) is torch.Tensor
    assert type(torch.cat([z, z])) is torch.Tensor

    assert labels_of(z[torch.tensor([3, 0])]).tolist() == [2, 0]
    assert labels_of(z[z[:, 0] > 1]).tolist() == [1, UNKNOWN, 2]
    assert [labels_of(part).tolist() for part in torch.split(z, 3)] == [[0, 1, UNKNOWN], [2]]
    assert labels_of(z.repeat_interleave(2, 0)).tolist() == [0, 0, 1, 1, -1, -1, 2, 2]
    assert labels_of(joined([z, z[:1]])).tolist() == [0, 1, -1, 2, 0]
    assert isinstance(z.to(torch.float64), Labelled)
    assert isinstance(Gaussian(z, torch.zeros(())).sample(), Labelled)
    assert labels_of(z[:, 0]) is None

    assert one_hot(z, 3).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert not one_hot(torch.ones(4, 2), 3).any()
    withheld = withhold(z, torch.tensor([True, False, True, False]))
    assert labels_of(withheld).tolist() == [-1, 1, -1, 2]
    with pytest.raises(ValueError, match=r"\(3,\) labels for 4 examples"):
        labelled(torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64))


def test_bound_of_a_linear_gaussian_model_is_the_conditional_density():
    """With the exact posterior, log p(x, z|y) - log q(z|x, y) is log p(x|y) for every z."""
    torch.manual_seed(1)
    weight = torch.linalg.qr(torch.randn(5, 2))[0] * torch.tensor([2.0, 0.7])
    means, var = torch.randn(5, 3), 0.2  # of three labels
    precision = (weight.square().sum(0) + var) / var
    encode = weight.T / var / precision[:, None]

    encoder, decoder = nn.Linear(8, 4), nn.Linear(5, 5)
    with torch.no_grad():
        for layer in (encoder, decoder):
            layer.weight.zero_()
            layer.bias.zero_()
        encoder.weight[:2] = torch.cat([encode, -encode @ means], 1)
        encoder.bias[2:] = -precision.log()
        decoder.weight.copy_(torch.cat([weight, means], 1))

    names = ("a", "b", "c")
    model = VAE(
        encoder, decoder, FixedNoise(var), shape=(5,), latent_dim=2, label_names=names
    ).eval()
    covariance = weight @ weight.T + var * torch.eye(5)
    y = torch.tensor([0, 1, 2, 2, UNKNOWN])
    mean = torch.cat([means.T, torch.zeros(1, 5)])[y]
    x = mean + torch.randn(5, 5)

    expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    bound = importance_weighted_bound(model, labelled(x, y), 3)
    assert torch.allclose(bound.float(), expected, atol=1e-4)


def test_samples_of_a_label_have_its_mean(conditional):
    for label, mean in zip("abc", MEANS, strict=True):
        found = conditional.sample(1500, noise=True, label=label).mean(0)
        assert np.abs(found - mean).max() < 0.5
    pooled = conditional.sample(3000, noise=True).mean(0)
    assert np.abs(pooled - MEANS.mean(0)).max() < 0.6
    with pytest.raises(ValueError, match=r"no label 'd'; choose from a, b, c"):
        conditional.sample(2, label="d")


def test_labels_are_worth_about_their_mutual_information(conditional):
    """I(x; y) is at most log 3, and nearly that, because the means are far apart."""
    x, y = shifted(300, seed=1)
    names = np.array(["a", "b", "c"])[y]
    plain = fit(shifted(600)[0], latent_dim=4)
    gain = conditional.score(x, names) - plain.score(x)
    assert 0.4 < gain < 2.5

    wrong = np.array(["b", "c", "a"])[y]
    assert conditional.score(x, names) > conditional.score(x, wrong) + 3
    # Without labels it is a density of x alone, and not far from that of a model of it.
    assert np.isfinite(conditional.score_samples(x)).all()
    unknown = [None] * len(x)
    assert (conditional.score_samples(x) == conditional.score_samples(x, y=unknown)).all()
    assert conditional.score(x, names) > conditional.score(x)


def test_an_estimator_is_saved_with_its_labels(conditional, tmp_path):
    x, y = shifted(20, seed=2)
    names = np.array(["a", "b", "c"])[y]
    conditional.save(tmp_path / "vae.safetensors")
    again = equipoise.VAEEstimator.load(tmp_path / "vae.safetensors")

    assert again.label_names_ == ("a", "b", "c")
    assert (again.transform(x, names) == conditional.transform(x, names)).all()
    assert (again.sample(5, label="b") == conditional.sample(5, label="b")).all()
    assert (again.transform(x, names) != again.transform(x)).any()
    with pytest.raises(ValueError, match=r"row 0 has the label 'z'"):
        again.transform(x, ["z"] * 20)
    with pytest.raises(ValueError, match="5 labels for 20 examples"):
        again.transform(x, ["a"] * 5)
    with pytest.raises(ValueError, match="take fit"):
        again.partial_fit(x, names)


@pytest.mark.parametrize("kind", [str, float, int, object])
def test_unknown_labels_have_many_forms(kind):
    x, y = shifted(60)
    values = {
        str: np.array(["1", "2", "10"])[y].astype(object),
        float: np.array([1.0, 2.0, 10.0])[y],
        int: np.array([1, 2, 10])[y],
        object: [[1, 2, 10][k] for k in y],
    }[kind]
    values[0] = {str: "", float: np.nan, int: -1, object: None}[kind]

    data = load(x, labels=values)
    assert data.label_names == ("1", "2", "10")
    parts = (data.train, data.validation, data.test)
    found = np.empty(60, np.int64)
    for part in parts:
        found[part.indices] = part.label_numbers()
    assert found.tolist() == [-1, *y[1:]]
    assert "1 have none" in " ".join(data.notes) or 0 not in data.train.indices


def test_what_is_no_label_is_refused():
    x, y = shifted(60)
    with pytest.raises(ValueError, match=r"row 3: 0\.37 is no label"):
        load(x, labels=[1.0, 2.0, 1.0, 0.37, *range(56)])
    with pytest.raises(ValueError, match="1 different labels"):
        load(x, labels=["a"] * 60)
    with pytest.raises(ValueError, match="59 labels for 60 examples"):
        load(x, labels=y[1:])
    with pytest.raises(ValueError, match="conditional=True needs"):
        equipoise.VAEEstimator(conditional=True).fit(x)
    with pytest.raises(ValueError, match="give the labels as labels="):
        load(x, label="y")


def test_labels_belong_to_the_fingerprint():
    x, y = shifted(60)
    plain, one, other = load(x), load(x, labels=y), load(x, labels=(y + 1) % 3)
    assert len({plain.fingerprint, one.fingerprint, other.fingerprint}) == 3


def test_batches_carry_the_labels_of_their_rows():
    x, y = shifted(50)
    part = load(x, labels=y).train
    for resident_bytes in (0, 1 << 20):
        batches = Batches(part, 8, seed=3, resident_bytes=resident_bytes)
        for batch in batches.epoch(1):
            rows = (batch[:, None] == as_tensor(part)[None]).all(2).int().argmax(1)
            assert labels_of(batch).tolist() == part.label_numbers()[rows].tolist()


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("mlp", (5,)),
        ("mlp", (1, 8, 9)),
        ("conv", (3, 11, 16)),
        ("residual", (1, 8, 8)),
        ("conv", (2, 20)),
        ("conv", (1, 8, 9, 10)),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_networks_of_every_kind_read_labels(architecture, shape, stage, tmp_path):
    model = VAE.build(shape, 2, architecture=architecture, width=2, label_names=("a", "b"))
    if stage == 2:
        network = "head" if len(shape) == 3 else "decoder"
        model.predict_variance(torch.tensor(0.1), torch.tensor(0.01), network=network)
        nn.init.normal_(model.noise.network.output.weight)
    model.eval()

    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors")
    assert again.label_names == ("a", "b")

    x = torch.rand(1, *shape).expand(3, *shape)
    found = model.reconstruct(labelled(x, torch.tensor([0, 1, UNKNOWN])))
    same = again.reconstruct(labelled(x, torch.tensor([0, 1, UNKNOWN])))
    unlabelled = model.reconstruct(x)
    for of_labels, of_copy, of_none in zip(found, same, unlabelled, strict=True):
        of_labels, of_none = of_labels.expand_as(x), of_none.expand_as(x)
        assert torch.equal(of_labels, of_copy.expand_as(x))
        assert torch.allclose(of_labels[2], of_none[2], atol=1e-6)
        if stage == 2 or of_labels is not found.log_var.expand_as(x):
            continue
    means = found.mean.flatten(1)
    assert min(torch.dist(means[0], means[1]), torch.dist(means[0], means[2])) > 1e-4
    if stage == 2:
        stds = found.std.flatten(1)
        assert torch.dist(stds[0], stds[1]) > 1e-4


def two_clusters():
    means = torch.tensor([[-3.0, 0], [3, 0], [0, 4]]).double()
    covariances = torch.eye(2).double().expand(3, 2, 2)
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2]).double(), means, covariances)


def test_weights_of_a_label_are_their_map_estimate(generator):
    common = two_clusters()
    n = 400
    labels = torch.zeros(n, dtype=torch.int64)
    labels[-50:] = UNKNOWN
    codes = torch.cat([common.sample(n - 100, generator, component=1), common.sample(100)])
    mixture = fit_label_weights(common, codes, labels, 2)

    # A fixed point of EM, whose own equation holds.
    known = labelled(codes[:-50], labels[:-50])
    r = mixture.responsibilities(known)
    expected = (r.sum(0) + PRIOR_CODES * common.weights) / (n - 50 + PRIOR_CODES)
    assert torch.allclose(mixture.label_weights[0], expected, atol=1e-6)

    # A maximum of the posterior: moves along the simplex lower it.
    def objective(weights):
        density = GaussianMixture(weights, common.means, common.covariances)
        return density.log_prob(codes[:-50]).sum() + PRIOR_CODES * common.weights @ weights.log()

    best = objective(mixture.label_weights[0])
    for i, j in ((0, 1), (1, 2), (2, 0)):
        step = torch.zeros(3).double()
        step[i], step[j] = 0.005, -0.005
        assert objective(mixture.label_weights[0] + step) < best

    # A label without codes has the common weights.
    assert torch.equal(mixture.label_weights[1], common.weights)
    assert mixture.label_shares.tolist() == [1.0, 0.0]


def test_density_of_a_label_is_that_of_its_weights(generator):
    common = two_clusters()
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.5, 0.5]]).double()
    shares = torch.tensor([0.25, 0.75]).double()
    mixture = LabelMixture(common.weights, common.means, common.covariances, weights, shares)
    codes = torch.randn(6, 2, generator=generator).double()
    y = torch.tensor([0, 0, 1, 1, UNKNOWN, UNKNOWN])

    each = [GaussianMixture(w, common.means, common.covariances) for w in weights]
    expected = torch.stack([[*each, common][k].log_prob(codes)[i] for i, k in enumerate(y)])
    assert torch.allclose(mixture.log_prob(labelled(codes, y)), expected)
    assert torch.equal(mixture.log_prob(codes), common.log_prob(codes))

    drawn = mixture.sample(4000, generator)
    labels = labels_of(drawn)
    assert abs(float((labels == 1).double().mean()) - 0.75) < 0.03
    assert torch.allclose(drawn[labels == 1].mean(0), weights[1] @ common.means, atol=0.15)
    of_one = sample_source(mixture, 500, generator, 0)
    assert set(labels_of(of_one).tolist()) == {0}
    assert torch.allclose(of_one.mean(0), weights[0] @ common.means, atol=0.3)

    again = LabelMixture(**mixture.state_dict())
    assert torch.equal(again.log_prob(drawn), mixture.log_prob(drawn))
    assert set(labels_of(sample_source(AnyLabel(common, shares), 9, generator, 1)).tolist()) == {1}
    with pytest.raises(ValueError, match="sum to one"):
        LabelMixture(common.weights, common.means, common.covariances, 2 * weights, shares)


def test_a_rare_label_gives_sensible_samples():
    x, y = shifted(403)
    y = np.where(np.arange(403) < 3, 3, y)
    x[:3] = MEANS[0] + np.random.default_rng(0).normal(size=(3, 5))
    vae = fit(x, y)
    samples = vae.sample(200, label=3, noise=True)
    assert np.isfinite(samples).all()
    low, high = x.min(0) - 3 * x.std(0), x.max(0) + 3 * x.std(0)
    assert ((samples > low) & (samples < high)).all()


@pytest.mark.parametrize(("shape", "epoch"), [((5,), 3), ((1, 8, 8), 2)])
def test_resuming_with_labels_is_the_run(shape, epoch, tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(-1, 3, 60)
    x = rng.normal(size=(60, *shape)) + y.reshape(-1, *(1 for _ in shape))
    if len(shape) > 1:
        x = np.clip(100 + 30 * x, 0, 255).astype(np.uint8)
    data = load(x, labels=y)
    whole = train(data, SMALL, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(data, SMALL, tmp_path / "parts", sinks=[Stop(epoch)])
    parts = train(data, SMALL, tmp_path / "parts", resume=True)

    for file in ("model_file", "mixture_file"):
        assert read_digest(getattr(whole, file)) == read_digest(getattr(parts, file))


@pytest.mark.slow
def test_label_dropout_trains_the_path_without_labels():
    x, y = shifted(600)
    never = fit(x, y, label_dropout=0.0)
    mostly = fit(x, y, label_dropout=0.9)
    assert mostly.score(x) > never.score(x) + 0.3
    assert never.score(x, y) > mostly.score(x, y)


def write_table(path, n=80):
    x, y = shifted(n)
    lines = ["u,v,kind,w"]
    for row, k in zip(x, y, strict=True):
        lines.append(f"{row[0]},{row[1]},{['low', 'mid', 'high'][k]},{row[2]}")
    lines[4] = "0.1,0.2,,0.3"
    path.write_text("\n".join(lines) + "\n")
    return path


TRAIN_OPTIONS = [
    *("--quiet", "--set", "stage_1_epochs=1", "stage_2_epochs=1", "n_components=2", "width=4"),
    *("accelerator=cpu", "noise_correlation=none"),
]


def test_a_table_with_a_column_of_labels(tmp_path, monkeypatch, capsys):
    pytest.importorskip("polars")
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "table.csv")
    data = load(table, label="kind")
    assert "conditional on 3 labels" in " ".join(data.notes)
    run = train(data, SMALL, "run")
    model = run.model()
    assert (model.label_names, model.scaling.columns) == (("high", "low", "mid"), ("u", "v", "w"))
    assert run.data().label_names == model.label_names
    assert isinstance(run.mixture(), LabelMixture)

    main(["sample", "run", "--label", "mid", "-n", "4", "--out", "x.csv"])
    assert (tmp_path / "x.csv").read_text().splitlines()[0] == "u,v,w,label"
    refused("sample", "run", "--label", "huge")
    assert "choose from high, low, mid" in capsys.readouterr().err

    main(["score", "run", str(table), "--false-alarm-rate", "0.2", "--out", "s.csv"])
    examples = load_examples(
        table, (3,), columns=("u", "v", "w"), label="kind", label_names=model.label_names
    )
    assert examples.label_numbers()[3] == UNKNOWN
    (tmp_path / "other.csv").write_text("u,v,kind,w\n1,2,huge,3\n")
    capsys.readouterr()
    main(["score", "run", "other.csv", "--false-alarm-rate", "0.2", "--out", "o.csv"])
    assert "1 labels are none of the model's, the first is 'huge' in row 0" in (
        capsys.readouterr().out
    )
    refused("score", "run", "other.csv", "--strict")
    assert "row 0 has the label 'huge'" in capsys.readouterr().err
    (tmp_path / "bare.csv").write_text("u,v,w\n1,2,3\n1,2,4\n")
    main(["reconstruct", "run", "bare.csv", "--out", "bare-means.csv"])
    assert "labels of all examples are unknown" in capsys.readouterr().out
    refused("train", "table.csv", "--label", "kin", "--out", "r2", "--quiet")
    assert "did you mean 'kind'" in capsys.readouterr().err


def fill(folder, n, grey):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(grey)
    for number in range(n):
        pixels = np.clip(rng.normal(grey, 20, (9, 10)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")


def test_folders_of_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for part, n in (("train", 20), ("val", 5), ("test", 4)):
        fill(tmp_path / "set" / part / "dark", n, 60)
        fill(tmp_path / "set" / part / "light", n, 190)
    data = load("set", label="folder")
    assert data.label_names == ("dark", "light")
    for part in (data.train, data.validation, data.test):
        names = [name.split("/")[1] for name in part.names()]
        assert [data.label_names[k] for k in part.label_numbers()] == names
    assert not load("set").label_names
    assert "--label folder" in " ".join(load("set").notes)

    fill(tmp_path / "flat", 20, 60)
    with pytest.raises(ValueError, match="at least two folders"):
        load("flat", label="folder")
    with pytest.raises(ValueError, match="the label of images is 'folder'"):
        load("set", label="class")

    main(["train", "set", "--label", "folder", "--out", "run", *TRAIN_OPTIONS])
    main(["sample", "run", "--label", "dark", "-n", "2", "--from", "aggregate"])
    assert np.load("run/samples/aggregate-label-dark-labels.npy").tolist() == ["dark", "dark"]
    likelihood = equipoise.Run("run").evaluation()["likelihood"]
    elbos = {name: part["elbo"] for name, part in likelihood.items() if name.startswith("label ")}
    assert {name: elbo["n"] for name, elbo in elbos.items()} == {"label dark": 4, "label light": 4}
    mean = np.mean([elbo["value"] for elbo in elbos.values()])
    assert abs(mean - likelihood["elbo"]["value"]) < 5  # other draws of z

    fill(tmp_path / "later" / "dark", 3, 60)
    fill(tmp_path / "later" / "a new one", 2, 60)
    capsys.readouterr()
    main(["score", "run", "later", "--false-alarm-rate", "0.3"])
    assert "2 labels are none of the model's, the first is 'a new one' in row 0: they are" in (
        capsys.readouterr().out
    )

    main(["reconstruct", "run", "set"])
    with np.load("run/reconstructions/reconstructions.npz") as archive:
        assert set(archive["label"]) == {"dark", "light"}
    capsys.readouterr()


def test_arrays_and_named_sets_with_labels(tmp_path):
    x, y = shifted(60)
    np.savez(tmp_path / "one.npz", x=x, y=y)
    np.savez(tmp_path / "parts.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9] * 0)
    one = load(tmp_path / "one.npz", label="y")
    assert (one.train.label_numbers() == y[one.train.indices]).all()
    parts = load(tmp_path / "parts.npz", label="y")
    assert (parts.train.label_numbers() == y[parts.train.indices]).all()
    assert parts.test.label_numbers().tolist() == [0] * 9
    with pytest.raises(ValueError, match="holds no labels 'z'"):
        load(tmp_path / "one.npz", label="z")

    digits = load("digits", label="label")
    assert digits.label_names == tuple("0123456789")
    with pytest.raises(ValueError, match="the label 'label' alone"):
        load("digits", label="class")

    images = np.arange(30 * 64, dtype=np.uint32).reshape(30, 8, 8).astype(np.uint8)
    images[::2] //= 2
    folder = tmp_path / "mnist"
    folder.mkdir()
    for stem in ("train", "t10k"):
        header = struct.pack(">4I", 0x803, 30, 8, 8)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = struct.pack(">2I", 0x801, 30) + bytes(k % 2 for k in range(30))
        with gzip.open(folder / f"{stem}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(labels)
    mnist = load("mnist", data_dir=folder, label="label")
    assert (mnist.test.label_numbers() == np.arange(30) % 2).all()
    (folder / "train-labels-idx1-ubyte").write_bytes(labels[:20])
    with pytest.raises(ValueError, match="holds 12 labels of 30"):
        load("mnist", data_dir=folder, label="label")


def test_what_reads_no_labels_refuses_them(tmp_path, capsys):
    x, y = shifted(60)
    data = load(x, labels=y)
    encoder, decoder = nn.Linear(5, 4), nn.Linear(2, 5)
    with pytest.raises(ConfigError, match="read no labels"):
        train(data, SMALL, tmp_path / "run", encoder=encoder, decoder=decoder)
    with pytest.raises(ConfigError, match="label_dropout"):
        equipoise.make_config({"label_dropout": 1.0})
    refused("train", "digits", "--stream", "--label", "label", "--out", str(tmp_path / "s"))
    assert "reads no labels" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_labels(tmp_path, monkeypatch):
    """A real process, stopped by SIGTERM within training, and the command that goes on."""
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "data.npz", **dict(zip("xy", shifted(400), strict=True)))
    options = ["--quiet", "--set", "stage_1_epochs=6", "stage_2_epochs=1", "batch_size=8"]
    options += ["width=4", "n_components=2", "accelerator=cpu", "tolerance=0"]
    options.append("noise_correlation=none")
    command = [sys.executable, "-m", "equipoise", "train", "data.npz", "--label", "y", *options]

    process = subprocess.Popen(
        [*command, "--out", "parts"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    rows = tmp_path / "parts" / "metrics.jsonl"
    for _ in range(6000):
        if rows.is_file() and len(rows.read_bytes().splitlines()) > 1:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143

    parts = equipoise.Run("parts")
    train(parts.data(), parts.config(), "parts", resume=True)
    whole = train(parts.data(), parts.config(), "whole")
    assert read_digest(parts.mixture_file) == read_digest(whole.mixture_file)
    assert parts.model().label_names == ("0", "1", "2")


def test_other_data_may_lack_the_labels_of_a_run(tmp_path):
    x, _ = shifted(12)
    np.save(tmp_path / "x.npy", x)
    options = {"label": "label", "label_names": ("0", "1")}
    assert (load_examples(tmp_path / "x.npy", (5,), **options).label_numbers() == UNKNOWN).all()
    notes = []
    fill(tmp_path / "flat", 3, 90)
    load_examples(tmp_path / "flat", (1, 9, 10), **options, on_note=notes.append)
    assert any("labels of all examples are unknown" in note for note in notes)


def test_explorer_and_export_of_a_conditional_model(conditional, tmp_path):
    from equipoise.explorer.views import View
    from equipoise.export import export

    x, y = shifted(60)
    view = View(conditional.model_, conditional.mixture_, load(x, labels=y))
    for source in ("mixture", "prior", "0"):
        assert np.isfinite(view.decode(view.sample(source, 3, seed=0))).all()
    assert np.isfinite(view.inspect(x[:1].astype(np.float32)).elbo)
    with pytest.raises(ValueError, match="is not exported yet"):
        export(conditional.model_, conditional.mixture_, "torch", tmp_path)
