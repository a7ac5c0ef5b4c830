"""EM is compared with scikit-learn and closed forms, and its invariances are tested."""

import math
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as ScikitLearnMixture

from equipoise import mixture_fit
from equipoise.aggregate import AggregatePosterior, GaussianMixture
from equipoise.estimate import Estimate
from equipoise.mixture_fit import FLOOR, fit_mixture, fit_variational_mixture
from equipoise.processes import Processes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def clusters(N=600, K=4, d=2, distance=8.0, seed=0):
    """Return codes of K clusters of different shapes, on a circle in their first two dimensions."""
    angles = torch.arange(K, dtype=torch.float64) * 2 * math.pi / K
    centres = torch.zeros(K, d, dtype=torch.float64)
    centres[:, 0], centres[:, 1] = distance * angles.cos(), distance * angles.sin()
    shapes = torch.eye(d, dtype=torch.float64) + 0.3 * normal(K, d, d, seed=seed + 1)
    labels = torch.arange(N) % K

    return centres[labels] + (shapes[labels] @ normal(N, d, 1, seed=seed)).squeeze(2)


def a_start(codes, K, seed=3):
    """Return K random codes as means, and the covariance of all codes."""
    means = codes[torch.randperm(len(codes), generator=seeded(seed))[:K]]
    return GaussianMixture(
        torch.full((K,), 1 / K, dtype=codes.dtype), means, codes.mT.cov().repeat(K, 1, 1)
    )


def assert_same(mixture, other, **tolerance):
    for name, value in mixture.state_dict().items():
        torch.testing.assert_close(value, getattr(other, name), **tolerance)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("K", [1, 3])
def test_equals_scikit_learn(d, K):
    codes = clusters(d=max(d, 2), distance=2.0)[:, :d]
    start = a_start(codes, K)
    oracle = ScikitLearnMixture(
        K,
        reg_covar=0,
        tol=0.0,
        max_iter=12,
        weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=torch.linalg.inv(start.covariances).numpy(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        oracle.fit(codes.numpy())

    fit = fit_mixture(codes, K, start=start, tol=0.0, max_iter=12)

    assert fit.n_iterations == 12
    assert not fit.converged
    assert fit.log_likelihoods == pytest.approx(oracle.lower_bounds_, rel=1e-11)
    torch.testing.assert_close(
        fit.mixture.weights, torch.from_numpy(oracle.weights_), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        fit.mixture.means, torch.from_numpy(oracle.means_), rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(
        fit.mixture.covariances, torch.from_numpy(oracle.covariances_), rtol=1e-8, atol=1e-10
    )


def test_stops_where_scikit_learn_stops():
    codes = clusters(distance=2.0)
    start = a_start(codes, 3)
    oracle = ScikitLearnMixture(
        3,
        reg_covar=0,
        tol=1e-5,
        max_iter=1000,
        weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=torch.linalg.inv(start.covariances).numpy(),
    ).fit(codes.numpy())
    fit = fit_mixture(codes, 3, start=start, tol=1e-5, max_iter=1000)

    assert fit.converged
    assert oracle.converged_
    assert fit.n_iterations == len(fit.log_likelihoods) == oracle.n_iter_


def test_reported_likelihood_is_that_of_the_mixture():
    codes = clusters()
    start = a_start(codes, 3)
    fit = fit_mixture(codes, 3, start=start, max_iter=1)
    assert fit.log_likelihoods[0] == pytest.approx(start.log_prob(codes).mean().item(), rel=1e-12)

    again = fit_mixture(codes, 3, start=fit.mixture, max_iter=1)
    assert again.log_likelihoods[0] == pytest.approx(
        fit.mixture.log_prob(codes).mean().item(), rel=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), d=st.integers(1, 4), K=st.integers(1, 6), posteriors=st.booleans()
)
def test_likelihood_never_decreases(seed, d, K, posteriors):
    codes = normal(60, d, seed=seed) ** 3
    log_vars = normal(60, d, seed=seed + 1) if posteriors else None
    fit = fit_mixture(
        codes, K, log_vars=log_vars, start=a_start(codes, K, seed), tol=0.0, max_iter=30
    )
    steps = torch.tensor(fit.log_likelihoods).diff()

    assert (steps >= -1e-9).all()


@pytest.mark.parametrize("log_vars", [None, normal(600, 2, seed=7)])
def test_chunks_do_not_matter(log_vars):
    codes = clusters()
    expected = fit_mixture(codes, 3, log_vars=log_vars, start=a_start(codes, 3), max_iter=9)

    for chunk_size in (1, 7, 599, 10**6):
        fit = fit_mixture(
            codes, 3, log_vars=log_vars, start=a_start(codes, 3), max_iter=9, chunk_size=chunk_size
        )
        assert_same(fit.mixture, expected.mixture, rtol=1e-9, atol=1e-10)
        assert fit.log_likelihoods == pytest.approx(expected.log_likelihoods, rel=1e-11)


def in_processes(fit_part, parts):
    """Return ``fit_part(part, processes)`` for each part, with one thread for each process."""
    barrier, shared = Barrier(len(parts)), {}

    def run(rank):
        def all_reduce(values):
            shared[rank] = values
            barrier.wait()
            total = sum(shared[other] for other in range(len(parts)))
            barrier.wait()

            return total

        try:
            return fit_part(parts[rank], Processes(rank, len(parts), all_reduce))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


@pytest.mark.parametrize("log_vars", [None, normal(600, 2, seed=7)])
def test_processes_do_not_matter(log_vars):
    """Three processes with unequal parts of the codes find the mixture of all."""
    codes = clusters()
    start = a_start(codes, 3)
    rows = (slice(0, 10), slice(10, 200), slice(200, 600))

    def fit_part(part, processes):
        some = None if log_vars is None else log_vars[part]
        return fit_mixture(
            codes[part], 3, log_vars=some, start=start, max_iter=9, processes=processes
        )

    fits = in_processes(fit_part, rows)
    expected = fit_mixture(codes, 3, log_vars=log_vars, start=start, max_iter=9)

    for fit in fits:
        assert_same(fit.mixture, expected.mixture, rtol=1e-9, atol=1e-10)
        assert fit.log_likelihoods == pytest.approx(expected.log_likelihoods, rel=1e-11)


@pytest.mark.parametrize("n_components", [4, "auto"])
@pytest.mark.parametrize("subsample", ["auto", 1000])
def test_processes_find_a_start_together(n_components, subsample):
    """Each process lacks clusters of the other. Both find the mixture of all codes, also its K."""
    codes = clusters(N=4000, distance=15.0)
    order = codes[:, 0].argsort()

    def fit_part(part, processes):
        options = {
            "subsample": subsample,
            "processes": processes,
            "generator": seeded(processes.rank),
        }
        return fit_mixture(codes[part], n_components, **options)

    one, other = in_processes(fit_part, (order[:1500], order[1500:]))
    assert_same(one.mixture, other.mixture, rtol=0.0, atol=0.0)
    assert one.log_likelihoods == other.log_likelihoods
    assert one.held_out == other.held_out
    assert list(one.held_out) == ([1, 4, 5, 10, 3] if n_components == "auto" else [])

    alone = fit_mixture(codes, 4, tol=0.0, start=one.mixture, max_iter=50)
    assert one.mixture.n_components == 4
    assert alone.log_likelihoods[-1] == pytest.approx(alone.log_likelihoods[0], abs=0.01)


def test_processes_score_the_held_out_codes_of_all():
    codes, held_out = clusters(), clusters(seed=20)
    parts = (slice(0, 100), slice(100, 600))
    fits = in_processes(
        lambda part, processes: fit_mixture(
            codes[part], 4, held_out=held_out[part], processes=processes
        ),
        parts,
    )
    expected = Estimate.of_mean(fits[0].mixture.log_prob(held_out))

    for fit in fits:
        assert fit.held_out[4].value == pytest.approx(expected.value)
        assert fit.held_out[4].standard_error == pytest.approx(expected.standard_error)


ONE_OF_TWO = """
import sys

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from equipoise.aggregate import GaussianMixture
from equipoise.mixture_fit import fit_mixture
from equipoise.processes import Processes

rank, folder = int(sys.argv[1]), sys.argv[2]
store = f"file://{folder}/store"
distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)

def all_reduce(values):
    distributed.all_reduce(values)
    return values

half = np.array_split(np.load(f"{folder}/codes.npy", mmap_mode="r"), [250])[rank]
processes = Processes(rank, 2, all_reduce)
start = GaussianMixture(**load_file(f"{folder}/start.safetensors"))
generator = torch.Generator().manual_seed(rank)
fits = {
    "start": fit_mixture(half, 3, start=start, max_iter=9, processes=processes),
    "auto": fit_mixture(half, "auto", subsample=300, processes=processes, generator=generator),
}
for name, fit in fits.items():
    state = {key: value.contiguous() for key, value in fit.mixture.state_dict().items()}
    save_file(state, f"{folder}/{name}-{rank}.safetensors")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_real_processes(tmp_path):
    """Two processes with half of the codes each find the mixture of one process with all."""
    codes = clusters(distance=15.0).float()
    start = a_start(codes.double(), 3)
    np.save(tmp_path / "codes.npy", codes.numpy())
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    children = [
        subprocess.Popen([sys.executable, "-c", ONE_OF_TWO, str(rank), str(tmp_path)])
        for rank in range(2)
    ]

    assert [child.wait(timeout=120) for child in children] == [0, 0]

    expected = fit_mixture(codes, 3, start=start, max_iter=9).mixture

    for name in ("start", "auto"):
        one, other = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(one[key], other[key]) for key in one)
        if name == "start":
            assert_same(GaussianMixture(**one), expected, rtol=1e-9, atol=1e-10)
        else:
            assert one["weights"].tolist() == pytest.approx([0.25] * 4, abs=0.05)


def test_first_phase_needs_fewer_passes_over_all_codes():
    codes = clusters(N=20_000, d=3, distance=2.0)
    steps_of_whole, steps_of_first = [], []
    start = a_start(codes, 4)
    options = {"tol": 1e-5, "start": start, "on_iteration": steps_of_whole.append}
    whole = fit_mixture(codes, 4, generator=seeded(), **options)
    options |= {"subsample": 2000, "on_iteration": steps_of_first.append}
    first = fit_mixture(codes, 4, generator=seeded(), **options)

    assert {step.n_codes for step in steps_of_whole} == {20_000}
    assert {step.n_codes for step in steps_of_first} == {2000, 20_000}
    assert first.converged
    assert first.n_iterations < 0.6 * whole.n_iterations
    assert first.log_likelihoods[-1] == pytest.approx(whole.log_likelihoods[-1], abs=1e-3)

    on_all = [step.log_likelihood for step in steps_of_first if step.n_codes == 20_000]
    assert first.log_likelihoods == tuple(on_all)


def test_first_phase_of_posteriors():
    """Subsampled rows keep their variances."""
    means, log_vars = clusters(N=3000), normal(3000, 2, seed=9)
    first = fit_mixture(means, 4, log_vars=log_vars, subsample=1000, tol=1e-6, generator=seeded())
    whole = fit_mixture(means, 4, log_vars=log_vars, subsample=None, tol=1e-6, generator=seeded())

    assert first.log_likelihoods[0] == pytest.approx(whole.log_likelihoods[-1], abs=0.05)
    assert first.log_likelihoods[-1] == pytest.approx(whole.log_likelihoods[-1], abs=1e-4)


def test_no_first_phase_where_it_would_not_pay(monkeypatch):
    """By default there is no first phase with few codes, nor if a start is passed."""
    codes = clusters()
    for subsample in ("auto", 600, 10**6):
        fit = fit_mixture(codes, 3, subsample=subsample, generator=seeded())
        assert_same(
            fit.mixture,
            fit_mixture(codes, 3, subsample=None, generator=seeded()).mixture,
            rtol=0,
            atol=0,
        )

    monkeypatch.setattr(mixture_fit, "SUBSAMPLE_CODES", 100)
    monkeypatch.setattr(mixture_fit, "SUBSAMPLE_CODES_PER_COMPONENT_AND_UNIT", 1)
    steps = []
    fit_mixture(codes, 3, generator=seeded(), on_iteration=steps.append)

    assert {step.n_codes for step in steps} == {100, 600}

    start, steps = a_start(codes, 3), []
    fit_mixture(codes, 3, start=start, on_iteration=steps.append)
    assert {step.n_codes for step in steps} == {600}
    assert steps[0].log_likelihood == pytest.approx(start.log_prob(codes).mean().item(), rel=1e-12)

    fit_mixture(codes, 3, start=start, subsample=100, generator=seeded(), on_iteration=steps.append)
    assert {step.n_codes for step in steps} == {100, 600}


@pytest.mark.parametrize("K", [1, 4])
def test_affine_equivariance(K):
    """The fit of A z + b is the fit of z under this map, including the start and the floor."""
    codes, matrix, shift = clusters(d=3), normal(3, 3, seed=5), normal(3, seed=6)
    fit = fit_mixture(codes, K, generator=seeded())
    mapped = fit_mixture(codes @ matrix.mT + shift, K, generator=seeded())
    order = mapped.mixture.responsibilities(fit.mixture.means @ matrix.mT + shift).argmax(1)

    assert sorted(order.tolist()) == list(range(K))

    expected = GaussianMixture(
        fit.mixture.weights,
        fit.mixture.means @ matrix.mT + shift,
        matrix @ fit.mixture.covariances @ matrix.mT,
    )
    actual = GaussianMixture(
        *(getattr(mapped.mixture, name)[order] for name in expected.state_dict())
    )

    assert_same(actual, expected, rtol=1e-6, atol=1e-8)

    log_det = matrix.logdet().real if matrix.det() > 0 else (-matrix.det()).log()
    assert mapped.log_likelihoods[-1] == pytest.approx(
        fit.log_likelihoods[-1] - log_det.item(), abs=1e-8
    )


def test_far_away_and_narrow():
    """Codes around 1e4 with std 1e-2 have the same fit as codes around 0 with std 1."""
    codes = clusters()
    near = fit_mixture(codes, 4, generator=seeded())
    far = fit_mixture(1e4 + 1e-2 * codes, 4, generator=seeded())

    torch.testing.assert_close(
        (far.mixture.means - 1e4) / 1e-2, near.mixture.means, rtol=1e-7, atol=1e-7
    )
    torch.testing.assert_close(
        far.mixture.covariances / 1e-4, near.mixture.covariances, rtol=1e-6, atol=1e-6
    )


def test_one_component_has_the_moments_of_the_codes():
    codes = clusters(d=3)
    mixture = fit_mixture(codes, 1).mixture

    assert mixture.weights.tolist() == [1]
    torch.testing.assert_close(mixture.means[0], codes.mean(0))
    torch.testing.assert_close(mixture.covariances[0], codes.mT.cov(correction=0))


def test_one_component_has_the_moments_of_the_aggregate_posterior():
    means, log_vars = clusters(d=3), normal(600, 3, seed=9)
    fit = fit_mixture(means, 1, log_vars=log_vars)
    moments = AggregatePosterior(means, log_vars).moments()
    torch.testing.assert_close(fit.mixture.means[0], moments.mean)
    torch.testing.assert_close(fit.mixture.covariances[0], moments.covariance)

    # The bound is E_q[log q^], which depends only on the moments. It is minus the entropy of a
    # Gaussian.
    entropy = 0.5 * (3 * math.log(2 * math.pi * math.e) + moments.covariance.logdet().item())
    assert fit.log_likelihoods[-1] == pytest.approx(-entropy, rel=1e-10)


def test_posteriors_are_the_limit_of_many_samples():
    """This holds with more than one component because each posterior stays in one of them."""
    means = clusters(distance=20.0)
    log_vars = normal(600, 2, seed=9) - 2
    start = fit_mixture(means, 4, generator=seeded()).mixture
    exact = fit_mixture(means, 4, log_vars=log_vars, start=start)
    draws = torch.cat(
        [means + (0.5 * log_vars).exp() * normal(600, 2, seed=seed) for seed in range(400)]
    )
    sampled = fit_mixture(draws, 4, start=start)

    assert_same(exact.mixture, sampled.mixture, rtol=0.01, atol=0.01)
    assert exact.log_likelihoods[-1] == pytest.approx(sampled.log_likelihoods[-1], abs=0.01)


def test_bound_of_posteriors():
    """The reported value is the documented bound, and it is below E_q[log q^]."""
    means, log_vars = clusters(distance=2.0), normal(600, 2, seed=9)
    start = a_start(means, 3)
    fit = fit_mixture(means, 3, log_vars=log_vars, start=start, max_iter=1)
    precisions = torch.linalg.inv(start.covariances)
    log_joint = start.responsibilities(means).log() + start.log_prob(means)[:, None]
    expected = log_joint - 0.5 * log_vars.exp() @ precisions.diagonal(dim1=1, dim2=2).mT
    bound = expected.logsumexp(1).mean().item()

    assert fit.log_likelihoods[0] == pytest.approx(bound, rel=1e-11)

    draws = means + (0.5 * log_vars).exp() * normal(100, 600, 2, seed=10)
    assert bound < start.log_prob(draws.reshape(-1, 2)).mean().item()


def test_vanishing_variances_are_plain_codes():
    codes = clusters()
    plain = fit_mixture(codes, 3, start=a_start(codes, 3))
    narrow = fit_mixture(codes, 3, start=a_start(codes, 3), log_vars=torch.full_like(codes, -60.0))
    assert_same(plain.mixture, narrow.mixture)


def test_finds_planted_clusters():
    codes = clusters(N=4000)
    fit = fit_mixture(codes, 4, generator=seeded())

    assert fit.converged
    assert fit.n_floored == 0
    torch.testing.assert_close(
        fit.mixture.weights, torch.full((4,), 0.25).double(), atol=0.01, rtol=0
    )
    assert fit.mixture.means.norm(dim=1).tolist() == pytest.approx([8] * 4, abs=0.2)


def test_generator_decides():
    codes = clusters(distance=1.0)
    assert_same(
        fit_mixture(codes, 4, generator=seeded()).mixture,
        fit_mixture(codes, 4, generator=seeded()).mixture,
        rtol=0.0,
        atol=0.0,
    )

    one, other = (fit_mixture(codes, 4, generator=seeded(seed), max_iter=1) for seed in (1, 2))
    assert not torch.equal(one.mixture.means, other.mixture.means)


@pytest.mark.parametrize("K", [1, 4, 8])
@pytest.mark.parametrize("posteriors", [False, True])
def test_auto_finds_the_planted_number(K, posteriors):
    codes = clusters(N=3000, K=K, distance=15.0)
    log_vars = torch.full_like(codes, -5.0) if posteriors else None
    fit = fit_mixture(codes, "auto", log_vars=log_vars, generator=seeded())

    assert fit.mixture.n_components == K
    assert {1, K} < set(fit.held_out)
    assert max(score.value for score in fit.held_out.values()) < fit.held_out[K].value + 0.1


def grid(K, d, seed, std=0.05):
    """600 codes of K tight clusters on a square grid, in two of d directions."""
    generator = seeded(seed)
    side = math.ceil(math.sqrt(K))
    labels = torch.randint(K, (600,), generator=generator)
    codes = std * torch.randn(600, d, generator=generator, dtype=torch.float64)
    codes[:, 0] += labels % side
    codes[:, 1] += labels // side
    return codes


@pytest.mark.parametrize(("K", "d"), [(9, 2), (2, 10)])
def test_auto_depends_on_no_luck(K, d):
    """One start by k-means for each K, and a stop at the first without gain, chose K = 1."""
    for seed in range(15):
        fit = fit_mixture(grid(K, d, seed), "auto", generator=seeded(seed))
        assert fit.mixture.n_components == K


def test_given_number_depends_on_no_luck():
    """A run of k-means puts two centres into one of nine clusters, and EM cannot mend that."""
    for seed in range(15):
        fit = fit_mixture(grid(9, 2, seed), 9, generator=seeded(seed))
        assert fit.mixture.weights.min() > 0.05
        std = fit.mixture.covariances.diagonal(dim1=1, dim2=2).sqrt()
        assert std.max() < 0.07


def test_auto_with_given_held_out_codes():
    codes, held_out = clusters(N=2000, distance=15.0), clusters(N=1000, distance=15.0, seed=20)
    fit = fit_mixture(codes, "auto", held_out=held_out, generator=seeded())
    log_prob = fit.mixture.log_prob(held_out)

    assert fit.mixture.n_components == 4
    assert fit.held_out[4].value == pytest.approx(log_prob.mean().item())
    assert fit.held_out[4].standard_error == pytest.approx(log_prob.std().item() / 1000**0.5)


def test_auto_does_not_fit_what_it_holds_out():
    """The history of K = 1 is the likelihood of nine tenths of the codes."""
    codes = clusters()
    steps = []
    fit_mixture(codes, "auto", generator=seeded(), on_iteration=steps.append)
    of_all = fit_mixture(codes, 1, generator=seeded())
    first = [step for step in steps if step.n_components == 1]

    assert first[-1].log_likelihood != pytest.approx(of_all.log_likelihoods[-1], abs=1e-6)
    assert {step.n_components for step in steps} >= {1, 4}


def test_auto_is_limited_by_the_number_of_codes():
    fit = fit_mixture(normal(30, 2), "auto", generator=seeded())
    assert max(fit.held_out) <= 4


def test_held_out_score_of_a_given_number():
    codes, held_out = clusters(), clusters(seed=20)
    fit = fit_mixture(codes, 3, held_out=held_out, generator=seeded())
    assert list(fit.held_out) == [3]
    assert fit_mixture(codes, 3, generator=seeded()).held_out == {}


def test_empty_component_is_revived():
    codes = clusters(distance=15.0)
    good = fit_mixture(codes, 4, generator=seeded())
    means = good.mixture.means.clone()
    means[0] = 1e4
    lost = GaussianMixture(good.mixture.weights, means, good.mixture.covariances)
    fit = fit_mixture(codes, 4, start=lost, tol=1e-6)

    assert fit.log_likelihoods[-1] == pytest.approx(good.log_likelihoods[-1], abs=0.01)
    assert fit.mixture.weights.tolist() == pytest.approx([0.25] * 4, abs=0.01)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_points_without_a_floor(scale):
    """If components are single points, the rounding error limits their variance."""
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, scale]]).repeat(20, 1)
    fit = fit_mixture(codes, 3, floor=0.0, generator=seeded())
    assert fit.n_floored == 3
    assert fit.mixture.log_prob(codes).isfinite().all()


def test_fewer_distinct_codes_than_components():
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).repeat(20, 1)
    fit = fit_mixture(codes, 5, generator=seeded())
    assert fit.n_floored > 0
    assert fit.mixture.log_prob(codes).isfinite().all()


def test_floor_is_relative_and_clips_only_what_is_below():
    """The variance of a cluster that is one point is the floor. The other does not change."""
    codes = torch.cat([torch.zeros(50, 1), 10 + normal(50, 1)])
    fit = fit_mixture(codes, 2, floor=1e-4, generator=seeded())
    narrow, wide = fit.mixture.covariances.flatten().sort().values.tolist()

    assert fit.n_floored == 1
    assert narrow == pytest.approx(1e-4 * codes.var(correction=0).item(), rel=1e-6)
    assert wide == pytest.approx(codes[50:].var(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("column", [torch.zeros(600, 1), torch.full((600, 1), 3.1)])
def test_unit_without_variance(column):
    """A fit with an unused unit, whose means are constant, has almost no variance there."""
    # One unit is constant, and another is the copy of a unit.
    codes = torch.cat([clusters(), column, clusters()[:, :1]], 1)
    fit = fit_mixture(codes, 4, generator=seeded())
    without = fit_mixture(codes[:, :2], 4, generator=seeded())

    assert (fit.n_floored, fit.n_flat) == (0, 2)
    assert sorted(fit.mixture.weights.tolist()) == pytest.approx(
        sorted(without.mixture.weights.tolist()), abs=0.01
    )
    variances = fit.mixture.covariances[:, 2, 2]
    assert variances.max() < 3 * FLOOR * codes.var(0).max()


def flat_codes():
    """Codes that do not vary in some direction, by all ways there are."""
    few, codes = normal(6, 8), normal(600, 4)
    unused, tiny, copied = (codes.clone() for _ in range(3))
    unused[:, 3] = 0
    tiny[:, 3] *= 1e-9
    copied[:, 3] = copied[:, 2]
    return {"few": (few, 3), "unused": (unused, 1), "tiny": (tiny, 1), "copied": (copied, 1)}


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("way", ["few", "unused", "tiny", "copied"])
def test_floor_where_codes_do_not_vary(way, K):
    """It was relative to the variance of rounding: new codes had -5e12 nats."""
    codes, n_flat = flat_codes()[way]
    fit = fit_mixture(codes, K, generator=seeded())
    variances = torch.linalg.eigvalsh(fit.mixture.covariances)
    largest = torch.linalg.eigvalsh(codes.T.cov()).max()

    assert fit.n_flat == n_flat
    if K == 1:
        assert variances.min() > 0.3 * FLOOR * largest
        assert fit.n_floored == 0
        assert fit.mixture.log_prob(normal(5, codes.shape[1], seed=9)).min() > -1e8


def test_float32_products():
    codes = clusters()
    double = fit_mixture(codes, 3, start=a_start(codes, 3), max_iter=9)
    single = fit_mixture(codes, 3, start=a_start(codes, 3), max_iter=9, dtype=torch.float32)

    assert single.mixture.means.dtype == torch.float64
    assert single.log_likelihoods == pytest.approx(double.log_likelihoods, abs=1e-5)


def test_reads_what_gives_slices(tmp_path):
    codes = clusters().float()
    np.save(tmp_path / "codes.npy", codes.numpy())
    expected = fit_mixture(codes, 3, generator=seeded())

    for same in (
        np.load(tmp_path / "codes.npy", mmap_mode="r"),
        codes.numpy(),
        codes.clone().requires_grad_(),
    ):
        assert_same(
            fit_mixture(same, 3, generator=seeded()).mixture, expected.mixture, rtol=0.0, atol=0
        )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_device(tmp_path, device):
    """Codes on disk are copied to the device in chunks. The mixture is on the device."""
    codes = clusters().float()
    np.save(tmp_path / "codes.npy", codes.numpy())
    expected = fit_mixture(codes, 3, start=a_start(codes.double(), 3), max_iter=9).mixture

    for source in (np.load(tmp_path / "codes.npy", mmap_mode="r"), codes):
        fit = fit_mixture(
            source, 3, start=a_start(codes.double(), 3), max_iter=9, chunk_size=100, device=device
        )
        assert fit.mixture.means.device.type == device
        assert_same(fit.mixture.cpu(), expected, rtol=1e-9, atol=1e-10)

    fit = fit_mixture(
        codes,
        "auto",
        device=device,
        subsample=100,
        generator=torch.Generator(device).manual_seed(0),
    )

    assert fit.mixture.means.device.type == device


def test_reads_only_slices_of_chunks():
    """Codes on disk are read in slices of at most one chunk."""

    class OnDisk:
        shape = (600, 2)
        longest = 0

        def __getitem__(self, rows):
            self.longest = max(self.longest, rows.stop - rows.start)
            return codes[rows]

    codes, source = clusters(), OnDisk()
    fit = fit_mixture(source, 3, chunk_size=50, generator=seeded())

    assert source.longest == 50
    assert fit.log_likelihoods == pytest.approx(
        fit_mixture(codes, 3, generator=seeded()).log_likelihoods
    )


def test_leaves_codes_and_start_alone():
    codes = clusters()
    start = a_start(codes, 3)
    codes_before = codes.clone()
    state_before = {name: value.clone() for name, value in start.state_dict().items()}
    fit_mixture(codes, 3, start=start)

    assert torch.equal(codes, codes_before)
    assert all(torch.equal(value, state_before[name]) for name, value in start.state_dict().items())


def test_progress():
    steps = []
    fit = fit_mixture(clusters(), 3, generator=seeded(), on_iteration=steps.append)

    assert [step.iteration for step in steps] == list(range(1, fit.n_iterations + 1))
    assert tuple(step.log_likelihood for step in steps) == fit.log_likelihoods
    assert {step.n_components for step in steps} == {3}


def test_variational_mixture_leaves_components_unused():
    codes = clusters(N=4000, distance=15.0)
    fit = fit_variational_mixture(codes, 10, max_iter=500, generator=seeded())

    assert fit.converged
    assert (fit.mixture.weights > 0.02).sum() == 4
    assert fit.log_likelihoods == (pytest.approx(fit.mixture.log_prob(codes).mean().item()),)
    assert fit.log_likelihoods[0] == pytest.approx(
        fit_mixture(codes, 4, generator=seeded()).log_likelihoods[-1], abs=0.1
    )
    assert_same(
        fit.mixture,
        fit_variational_mixture(codes, 10, max_iter=500, generator=seeded()).mixture,
        rtol=0.0,
        atol=0.0,
    )
    assert not fit_variational_mixture(codes, 10, max_iter=1, generator=seeded()).converged


def test_variational_bayes_wins_where_codes_are_few_and_components_many():
    """It empties what it does not need, and needs no held-out codes to choose K by.

    K that such codes have chosen is better by a few tenths of a nat.
    """
    gains, losses = [], []
    for seed in range(5):
        generator = seeded(seed)
        centres = 3 * torch.randn(3, 4, generator=generator)

        def draw(n, centres=centres, generator=generator):
            components = torch.randint(3, (n,), generator=generator)
            return centres[components] + torch.randn(n, 4, generator=generator)

        few, judges, more = draw(60), draw(15), draw(2000)
        variational = fit_variational_mixture(few, 10, generator=seeded(seed)).mixture
        by_em = fit_mixture(few, 10, generator=seeded(seed)).mixture
        chosen = fit_mixture(few, "auto", held_out=judges, generator=seeded(seed)).mixture

        score = variational.log_prob(more).mean().item()
        gains.append(score - by_em.log_prob(more).mean().item())
        losses.append(chosen.log_prob(more).mean().item() - score)

    assert min(gains) > 2  # nats per code
    assert np.mean(losses) < 0.5


def spoiled(value):
    codes = clusters()
    codes[3, 1] = codes[5, 0] = value
    return codes


@pytest.mark.parametrize("fit", [fit_mixture, fit_variational_mixture])
@pytest.mark.parametrize(
    ("codes", "n_components", "message"),
    [
        (clusters()[:3], 4, "at least one code per component, got 3 codes for 4"),
        (
            spoiled(math.nan),
            2,
            "2 of 600 codes are not finite: the training that gave them diverged",
        ),
        (spoiled(-math.inf), 2, "2 of 600 codes are not finite"),
        (torch.zeros(5), 2, r"expected codes of shape \(N, d\), neither zero, got \(5,\)"),
        (torch.zeros(5, 2, 2), 2, r"got \(5, 2, 2\); flatten"),
        (torch.zeros(5, 0), 2, r"neither zero, got \(5, 0\)"),
        (torch.zeros(0, 5), 2, r"neither zero, got \(0, 5\)"),
        (clusters(), 0, "n_components is at least 1, got 0"),
        (torch.full((7, 2), 0.1), 2, "all codes are the same.*collapse"),
    ],
)
def test_refuses_codes(fit, codes, n_components, message):
    with pytest.raises(ValueError, match=message):
        fit(codes, n_components)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iter": 0}, "max_iter is at least 1, got 0"),
        ({"tol": -1.0}, "tol is not negative, got -1"),
        ({"tol": math.nan}, "tol is not negative, got nan"),
        ({"floor": 1.0}, "floor is a fraction"),
        ({"floor": 1.0, "max_iter": 0}, "floor is a fraction.*; max_iter is at least 1"),
        ({"chunk_size": 0}, "chunk_size >= 1, got 0"),
        (
            {"log_vars": torch.zeros(600, 1)},
            r"log_vars of the codes' shape \(600, 2\), got \(600, 1\)",
        ),
        ({"log_vars": torch.full((600, 2), math.nan)}, "600 of 600 codes are not finite"),
        ({"log_vars": torch.full((600, 2), 1e4)}, "600 of 600 codes are not finite"),
        ({"held_out": torch.zeros(5, 3)}, r"held_out codes \(M, 2\), M > 1, got \(5, 3\)"),
        ({"held_out": torch.zeros(1, 2)}, r"held_out codes \(M, 2\), M > 1, got \(1, 2\)"),
        ({"held_out": spoiled(math.nan)}, "held_out codes are not all finite"),
        ({"start": a_start(clusters(), 3)}, "start has 3 components, but n_components is 2"),
        ({"start": a_start(clusters(d=3), 2)}, "start of dimension 2, got 3"),
        ({"subsample": 0}, "subsample is at least 1, got 0"),
        ({"n_components": "auto", "start": a_start(clusters(), 3)}, "n_components is auto"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        fit_mixture(clusters(), **({"n_components": 2} | options))


def test_auto_refuses_too_few_codes():
    with pytest.raises(ValueError, match="needs 20 codes"):
        fit_mixture(clusters(N=12), "auto")
