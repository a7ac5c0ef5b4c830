"""An exported scorer gives the score and the p-value of the run that it comes from."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from scipy.special import logsumexp

import equipoise
from equipoise.cli import main
from equipoise.data import load
from equipoise.export import Scoring, export
from equipoise.held_out import IMPORTANCE_SAMPLES, log_densities, read_held_out

SMALL = {"latent_dim": 2, "width": 8, "stage_1_epochs": 4, "stage_2_epochs": 2, "batch_size": 32}
RANDOM = np.random.default_rng(0)
CALLS = 100


def table(n=300):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(n, 2))
    return (z @ rng.normal(size=(2, 5)) + 0.3 * rng.normal(size=(n, 5))) * [1, 10, 1, 5, 100]


def images(shape):
    return RANDOM.integers(0, 256, (200, *shape)).astype(np.uint8)


def text(folder):
    rows = table()[:, :2]
    lines = [f"{a:.3f},{b:.3f},{'high' if a > 0 else 'low'}" for a, b in rows]
    path = folder / "table.csv"
    path.write_text("\n".join(["a,b,kind", *lines]))
    return path


CASES = {
    "independent": (lambda _: table(), {"noise_correlation": "none"}),
    "full": (lambda _: table(), {"noise_correlation": "full"}),
    "low-rank": (lambda _: table(), {"noise_correlation": "low-rank"}),
    "powers": (lambda _: np.exp(table() / 30), {"power_transform": "yes"}),
    "categories": (text, {}),
    "images": (lambda _: images((1, 9, 8)), {}),
    "bands": (lambda _: images((3, 8, 9)), {"noise_correlation": "bands"}),
    "volumes": (lambda _: images((1, 8, 8, 8)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_run_but_for_the_draws(tmp_path, name):
    make, options = CASES[name]
    data = load(make(tmp_path))
    run = equipoise.train(data, equipoise.make_config(SMALL | options), tmp_path / "run")
    held_out = read_held_out(run, run.model()).scores
    model, mixture = run.model(), run.mixture()
    raw = torch.from_numpy(data.test[:10])
    file = export(model, mixture, "onnx", tmp_path, Scoring(mixture, held_out))[-1]
    session = onnxruntime.InferenceSession(file.path)

    scores = []
    for _ in range(CALLS):
        normal = RANDOM.normal(size=(len(raw), IMPORTANCE_SAMPLES, 2)).astype(np.float32)
        score, p_value = session.run(None, {"raw": raw.numpy(), "normal": normal})
        scores.append(score)
        assert (p_value == (1 + (held_out <= score[:, None]).sum(1)) / (1 + len(held_out))).all()

    # Bounds of 20 draws each make one of all draws.
    found = logsumexp(scores, 0) - math.log(CALLS)
    n_draws = CALLS * IMPORTANCE_SAMPLES
    expected = log_densities(model, raw, mixture.log_prob, n_draws)
    np.testing.assert_allclose(found, expected, rtol=0.003, atol=0.1)

    if len(model.shape) == 1:
        gap = raw.numpy().copy()
        gap[0, 0] = np.nan
        score, p_value = session.run(None, {"raw": gap, "normal": normal})
        assert np.isnan([score[0], p_value[0]]).all()
        assert not np.isnan([score[1], p_value[1]]).any()


def test_the_command_writes_a_scorer_of_a_run_that_keeps_scores(tmp_path, capsys):
    config = equipoise.make_config(SMALL)
    run = equipoise.train(load(table()), config, tmp_path / "run")
    main(["export", str(run.folder), "--to", "torch"])
    module = torch.export.load(run.folder / "export" / "scorer.pt2").module()
    raw, normal = torch.from_numpy(table()[:4].astype(np.float32)), torch.zeros(4, 20, 2)
    assert [output.shape for output in module(raw, normal)] == [(4,), (4,)]

    run.held_out_file.unlink()
    main(["export", str(run.folder), "--to", "torch", "--out", str(tmp_path / "again")])
    assert "no scorer is written" in capsys.readouterr().out
    assert not (tmp_path / "again" / "scorer.pt2").exists()
