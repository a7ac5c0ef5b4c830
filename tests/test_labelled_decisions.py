"""Decisions on examples with labels and with categories, by an estimator, a run and a command."""

import csv
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import equipoise
from equipoise import VAEEstimator, held_out
from equipoise.cli import main
from equipoise.data import load
from equipoise.data.batches import as_tensor
from equipoise.files import StoreError
from equipoise.labels import has_label, labelled, labels_of, unlabelled
from equipoise.store import write_tensors
from tests.test_labels import fit, shifted

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

NAMES = np.array(["a", "b", "c"])
N_HELD_OUT = 300


def near(share, expected, n_held_out=N_HELD_OUT, n=2000):
    """Within five standard errors of the share that so many held-out examples decide on."""
    error = np.sqrt(expected * (1 - expected) * (1 / n_held_out + 1 / n))
    return abs(share - expected) < 5 * error


@pytest.fixture(scope="module")
def vae():
    x, y = shifted(1000)
    return fit(x, NAMES[y], validation_fraction=0.3, false_alarm_rate=0.1)


def with_gaps(x, share=0.2):
    rng = np.random.default_rng(9)
    return np.where(rng.random(x.shape) < share, np.nan, x)


@pytest.mark.parametrize("gaps", [False, True])
def test_examples_with_a_label_are_odd_for_their_label(vae, gaps):
    x, y = shifted(2000, seed=1)
    if gaps:
        x[::2, 3] = np.nan
    own, other = NAMES[y], NAMES[(y + 1) % 3]
    for rate in (0.1, 0.5):
        assert near((vae.p_values(x, y=own) <= rate).mean(), rate)
        assert near((vae.p_values(x) <= rate).mean(), rate)
    assert near((vae.predict(x, y=own) == -1).mean(), 0.1)
    assert near((vae.predict(x) == -1).mean(), 0.1)

    # What belongs to another label is usual among all, and odd for the label that it is given.
    assert (vae.predict(x, y=other) == -1).mean() > 0.95
    half = [name if k % 2 else None for k, name in enumerate(other)]
    odd = vae.predict(x, y=half) == -1
    np.testing.assert_array_equal(odd[::2], vae.predict(x[::2]) == -1)
    assert odd[1::2].mean() > 0.95

    nats = vae.explain(x[:50], y=other[:50]).nats.sum(1)
    assert np.median(nats) > np.median(vae.explain(x[:50], y=own[:50]).nats.sum(1))


@pytest.mark.parametrize("gaps", [False, True])
def test_thresholds_of_labels_are_saved(tmp_path, gaps):
    x, y = shifted(300)
    names = [None if k % 10 == 0 else name for k, name in enumerate(NAMES[y])]
    vae = fit(with_gaps(x) if gaps else x, names, stage_1_epochs=5)
    vae.save(tmp_path / "vae.safetensors")
    loaded = VAEEstimator.load(tmp_path / "vae.safetensors")
    fresh = with_gaps(shifted(40, seed=3)[0]) if gaps else shifted(40, seed=3)[0]
    for labels in (None, NAMES[np.arange(40) % 3]):
        np.testing.assert_array_equal(
            vae.decision_function(fresh, y=labels), loaded.decision_function(fresh, y=labels)
        )
        np.testing.assert_array_equal(
            vae.p_values(fresh, y=labels), loaded.p_values(fresh, y=labels)
        )


def test_without_held_out_labels_an_example_with_one_is_not_judged():
    x, y = shifted(300)
    vae = fit(x, NAMES[y], stage_1_epochs=5)
    vae.calibrate(x[:100])
    vae.predict(x)
    with pytest.raises(ValueError, match=r"calibrate\(x, y\)"):
        vae.predict(x, y=NAMES[y])
    vae.calibrate(x[:100], NAMES[y[:100]])
    assert vae.predict(x, y=NAMES[y]).shape == (300,)


def test_what_is_odd_for_its_label_is_left_out(tmp_path):
    x, y = shifted(300)
    is_odd = np.arange(300) < 15
    labels = NAMES[np.where(is_odd, (y + 1) % 3, y)]
    vae = VAEEstimator(
        latent_dim=2, width=8, learning_rate=0.01, stage_1_epochs=30, stage_2_epochs=0,
        n_components=3, batch_size=32, noise_correlation="none", random_state=0,
        conditional=True, contamination=0.05,
    )  # fmt: skip
    found = vae.fit_predict(x, labels)
    assert (found == -1).sum() == 15
    assert roc_auc_score(is_odd, -vae.table_scores_) > 0.85
    assert vae.label_names_ == ("a", "b", "c")
    # The threshold of examples with a label is the quantile of the scores with labels.
    edge = np.quantile(vae.table_scores_, 0.05)
    scores = vae.score_samples(x, y=labels)
    np.testing.assert_allclose(vae.decision_function(x, y=labels), scores - edge, rtol=1e-6)
    vae.save(tmp_path / "vae.safetensors")
    loaded = VAEEstimator.load(tmp_path / "vae.safetensors")
    np.testing.assert_array_equal(loaded.predict(x, y=labels), vae.predict(x, y=labels))
    # Without their labels, they are usual.
    assert abs((vae.predict(x[is_odd]) == -1).mean() - (vae.predict(x) == -1).mean()) < 0.15


def test_a_label_that_parts_of_the_table_lack_is_unknown_to_their_models():
    x, y = shifted(90)
    labels = [*NAMES[y[:-2]].tolist(), "rare", None]
    vae = VAEEstimator(
        latent_dim=2, width=4, stage_1_epochs=2, stage_2_epochs=0, n_components=1,
        noise_correlation="none", random_state=0, conditional=True, contamination=0.1,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (vae.fit_predict(x, labels) == -1).sum() == 9
    with pytest.raises(ValueError, match="89 labels for 90 examples; give one each"):
        vae.fit(x, labels[:-1])


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_outliers_of_a_table_with_categories_are_left_out(library):
    frames = pytest.importorskip(library)
    x, y = shifted(300)
    is_odd = np.arange(300) < 15
    x[is_odd] += 3 * np.random.default_rng(2).normal(size=(15, 5))
    kinds = NAMES[y]
    kinds[25] = "rare"  # a level that two thirds of the table may lack
    columns = {f"x{i}": x[:, i] for i in range(5)} | {"kind": kinds.tolist()}
    frame = frames.DataFrame(columns)
    vae = VAEEstimator(
        latent_dim=2, width=4, learning_rate=0.01, stage_1_epochs=15, stage_2_epochs=0,
        n_components=3, batch_size=32, noise_correlation="none", random_state=0,
        contamination=0.05,
    )  # fmt: skip
    found = vae.fit_predict(frame)
    assert (found == -1).sum() == 15
    assert roc_auc_score(is_odd, -vae.table_scores_) > 0.85
    assert vae.predict(frame).shape == (300,)
    only = frames.DataFrame({"kind": kinds.tolist(), "other": kinds.tolist()})
    quick = VAEEstimator(width=4, stage_1_epochs=1, stage_2_epochs=0, contamination=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (quick.fit_predict(only) == -1).sum() <= 30


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def write(path, x, names=None, gaps=False):
    header = [f"x{i}" for i in range(5)]
    lines = [",".join(header if names is None else [*header, "kind"])]
    for k, row in enumerate(with_gaps(x) if gaps else x):
        cells = ["" if value != value else repr(float(value)) for value in row]
        lines.append(",".join(cells if names is None else [*cells, names[k]]))
    path.write_text("\n".join(lines) + "\n")
    return path


def trained(folder, *, labels, gaps):
    x, y = shifted(600)
    table = write(folder / "table.csv", x, NAMES[y] if labels else None, gaps)
    config = equipoise.TrainConfig(
        latent_dim=2, width=4, stage_1_epochs=10, stage_2_epochs=0, batch_size=32, n_components=3,
        accelerator="cpu", noise_correlation="none",
    )  # fmt: skip
    data = load(table, label="kind" if labels else None, validation_fraction=0.4)
    return equipoise.train(data, config, folder / "run"), data


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_a_run_scores_without_its_data(tmp_path, capsys, labels, gaps):
    pytest.importorskip("polars")
    run, _ = trained(tmp_path, labels=labels, gaps=gaps)
    (tmp_path / "table.csv").unlink()
    x, y = shifted(500, seed=1)
    new = write(tmp_path / "new.csv", x, gaps=gaps)
    main(["score", str(run.folder), str(new), "--out", str(tmp_path / "s.csv"), "--quiet"])
    p_values = np.array([float(row["p_value"]) for row in rows_of(tmp_path / "s.csv")])
    assert near((p_values <= 0.5).mean(), 0.5, 250, 500)
    if not labels:
        return

    own = write(tmp_path / "own.csv", x, NAMES[y], gaps)
    other = write(tmp_path / "other.csv", x, NAMES[(y + 1) % 3], gaps)
    shares = []
    for table in (own, other):
        main(["score", str(run.folder), str(table), "--out", str(tmp_path / "s.csv"), "--quiet"])
        found = rows_of(tmp_path / "s.csv")
        shares.append(np.mean([float(row["p_value"]) <= 0.5 for row in found]))
    assert near(shares[0], 0.5, 250, 500)
    assert shares[1] > 0.9
    assert "odd" in capsys.readouterr().out


def test_files_of_held_out_examples_are_whole_or_refused(tmp_path):
    pytest.importorskip("polars")
    run, data = trained(tmp_path, labels=True, gaps=True)
    model = run.model()
    found = held_out.read_held_out(run, model)
    raw = as_tensor(data.validation.take(slice(None)))
    n = found.n_validation
    log_prior = run.mixture().log_prob
    np.testing.assert_array_equal(
        found.scores[:n], held_out.log_densities(model, unlabelled(raw), log_prior)
    )
    np.testing.assert_array_equal(found.labelled[:n], held_out.log_densities(model, raw, log_prior))
    assert np.abs(found.labelled - found.scores).max() > 0.1
    rows = held_out.read_held_out_rows(run, model, validation=True)
    assert torch.equal(unlabelled(rows).nan_to_num(), unlabelled(raw).nan_to_num())
    assert torch.equal(labels_of(rows), labels_of(raw))

    # Rows are the user's data, and are not among what is published.
    assert run.held_out_rows_file.name not in equipoise.hub.RUN_FILES
    text = run.held_out_rows_file.read_bytes()
    run.held_out_rows_file.write_bytes(text[:-8])
    with pytest.raises(StoreError):
        held_out.read_held_out_rows(run, model)
    run.held_out_rows_file.unlink()
    assert held_out.read_held_out_rows(run, model) is None


def test_rows_of_an_earlier_model_go_and_a_file_of_somebody_else_stays(tmp_path):
    pytest.importorskip("polars")
    run, data = trained(tmp_path, labels=False, gaps=False)
    model, log_prior = run.model(), run.mixture().log_prob
    run.held_out_rows_file.write_bytes(b"mine")
    held_out.keep_held_out(run, model, log_prior, data)
    assert run.held_out_rows_file.read_bytes() == b"mine"

    run.held_out_rows_file.unlink()
    rows = {"rows": torch.zeros(3, 5)}
    about = {"model": "0" * 64, "mixture": "0" * 64, "n_validation": 3}
    write_tensors(run.held_out_rows_file, held_out.KIND_OF_ROWS, rows, about)
    assert held_out.read_held_out_rows(run, model) is None
    held_out.keep_held_out(run, model, log_prior, data)
    assert not run.held_out_rows_file.exists()


def test_labels_are_taken_off_and_asked_for():
    z = labelled(torch.zeros(3, 2), torch.tensor([0, -1, 1]))
    assert has_label(z).tolist() == [True, False, True]
    assert has_label(unlabelled(z)).tolist() == [False] * 3
    assert labels_of(z) is not None
