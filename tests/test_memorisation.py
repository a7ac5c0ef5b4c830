import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

from equipoise.metrics import memorisation as module
from equipoise.metrics.memorisation import as_vectors, memorisation


@pytest.fixture(scope="module")
def decoded(digits):
    """A linear autoencoder of digits: codes and, blurred by it, reconstructions."""
    train, test = (
        part[:].reshape(len(part), -1).astype(np.float32) for part in (digits.train, digits.test)
    )
    pca = PCA(12, random_state=0).fit(train)

    def decode(codes):
        return torch.from_numpy(pca.inverse_transform(codes).astype(np.float32))

    return pca, decode, torch.from_numpy(train), torch.from_numpy(test)


def test_copies_are_found_and_an_honest_mixture_is_not(decoded):
    pca, decode, train, test = decoded
    rng, codes = np.random.default_rng(0), pca.transform(train)
    copies = decode(codes[rng.integers(len(codes), size=500)] + rng.normal(size=(500, 12)))
    honest = decode(GaussianMixture(32, reg_covar=1e-2, random_state=0).fit(codes).sample(500)[0])
    unseen = decode(pca.transform(test))
    for training, least in (
        (train, 0.65),
        (decode(codes), 0.95),
    ):  # more power with blur on either side
        found = memorisation(copies, training, unseen, test)
        assert found.copied
        assert found.closer.value > least
        assert found.samples.value < found.reconstructions.value
        assert not memorisation(honest, training, unseen, test).copied
    # The comparison without a null of the same blur would call the honest ones copies.
    blurred = memorisation(honest, decode(codes), unseen, test)
    assert blurred.samples.value < blurred.test.value


def test_some_copies_among_honest_samples_are_found(generator):
    fresh = torch.randn(800, 10, generator=generator)
    training, unseen = torch.randn(2, 1000, 10, generator=generator)
    assert not memorisation(fresh, training, unseen, unseen).copied
    mixed = torch.cat([fresh[:600], training[:200] + 0.01])
    closer = memorisation(mixed, training, unseen, unseen).closer
    assert closer.value == pytest.approx(0.75 * 0.5 + 0.25, abs=3 * closer.standard_error)
    assert memorisation(mixed, training, unseen, unseen).copied


def test_distances_and_probability_agree_with_scikit_learn_and_scipy(monkeypatch, generator):
    monkeypatch.setattr(module, "VECTORS_AT_ONCE", 7)
    monkeypatch.setattr(module, "TRAINING_AT_ONCE", 1)  # blocks with fewer than two examples
    samples, training, unseen = (torch.randn(n, 4, generator=generator) for n in (30, 50, 40))
    found = memorisation(samples, training, unseen, unseen)
    neighbours = NearestNeighbors(n_neighbors=2).fit(training.double())
    a, b = (neighbours.kneighbors(x.double())[0] for x in (samples, unseen))
    assert found.samples.value == pytest.approx(np.median(a[:, 0]), rel=1e-5)
    assert (
        found.test.value
        == found.reconstructions.value
        == pytest.approx(np.median(b[:, 0]), rel=1e-5)
    )
    u = mannwhitneyu(b[:, 0] / b[:, 1], a[:, 0] / a[:, 1]).statistic
    assert found.closer.value == pytest.approx(u / (30 * 40), abs=1e-6)


def test_standard_error_is_the_spread_over_repetitions(generator):
    training = torch.randn(300, 5, generator=generator)

    def repeat():
        samples, unseen = (
            torch.randn(60, 5, generator=generator),
            torch.randn(90, 5, generator=generator),
        )
        return memorisation(samples, training, unseen, unseen).closer

    figures = [repeat() for _ in range(150)]
    assert np.mean([figure.value for figure in figures]) == pytest.approx(0.5, abs=0.02)
    spread = np.std([figure.value for figure in figures])
    assert np.mean([figure.standard_error for figure in figures]) == pytest.approx(spread, rel=0.2)


def test_distances_of_near_copies_are_not_lost_in_rounding(generator):
    training = torch.randn(100, 8, generator=generator)
    unseen = torch.randn(60, 8, generator=generator)
    near = training[:30] + 1e-5  # a matrix product of float32 leaves 1e-3
    found = memorisation(near, training, training[:50] + 1.0, training + 1.0)
    assert found.samples.value == pytest.approx(1e-5 * 8**0.5, rel=0.05)
    there, here = (
        memorisation(unseen + x, training + x, unseen + x, unseen + x).test.value
        for x in (1e4, 0.0)
    )
    assert there == pytest.approx(here, rel=1e-2)
    exact = memorisation(
        training[:30] + 1e3, training + 1e3, training[:50] + 1001.0, training + 1001.0
    )
    assert exact.samples.value == 0
    assert exact.closer.value == 1
    assert exact.closer.standard_error == 0
    assert exact.copied


def test_copied_takes_a_margin_and_significance(monkeypatch, generator):
    training, unseen = torch.randn(2, 400, 6, generator=generator)
    samples = torch.cat([torch.randn(300, 6, generator=generator), training[:150]])
    assert memorisation(samples, training, unseen, unseen).copied
    few = memorisation(samples[297:303], training, unseen[:6], unseen)
    assert few.closer.value > 0.5 + module.MARGIN
    assert not few.copied
    monkeypatch.setattr(module, "MARGIN", 0.4)
    assert not memorisation(samples, training, unseen, unseen).copied


def test_constant_data_are_no_copies():
    same = torch.ones(5, 3)
    found = memorisation(same, same, same, same)
    assert found.closer.value == 0.5
    assert not found.copied


def test_wrong_input_is_refused(generator):
    x = torch.randn(9, 3, generator=generator)
    with pytest.raises(ValueError, match="expected at least 2 samples"):
        memorisation(x[:1], x, x, x)
    with pytest.raises(ValueError, match="at least 2 training"):
        memorisation(x, x[:1], x, x)
    with pytest.raises(ValueError, match=r"test, of the 3 dimensions of training, got \(9, 2\)"):
        memorisation(x, x, x, x[:, :2])


def test_vectors_lie_as_far_apart_as_the_examples(generator):
    images = torch.rand(40, 3, 32, 32, generator=generator)
    vectors = as_vectors(images.split(15))
    assert vectors.shape == (40, 1024)
    pairs = torch.pdist(images.flatten(1))
    assert float((torch.pdist(vectors) / pairs - 1).abs().max()) < 0.12
    torch.testing.assert_close(
        vectors, as_vectors([images])
    )  # the same projection, whatever the batches
    few = torch.rand(5, 1, 8, 8, generator=generator)
    assert torch.equal(as_vectors([few]), few.flatten(1))
    with pytest.raises(ValueError, match="at least one batch"):
        as_vectors([])
