"""The flow is a density, has invariances, and fits codes that a mixture does not describe."""

import math
import sys

import pytest
import torch
from torch.autograd.functional import jacobian

from equipoise.aggregate import GaussianMixture
from equipoise.files import StoreError
from equipoise.flow_fit import CodeFlow, fit_flow
from equipoise.gaussian import Gaussian
from equipoise.mixture_fit import fit_mixture
from equipoise.records import FlowDescription
from equipoise.store import load_flow, read_tensors, save_flow, write_tensors

SMALL = {"n_transforms": 3, "hidden": (32,), "batch_size": 256, "learning_rate": 5e-3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ring(n, seed=0):
    """Return posteriors of std 0.1 with means on a circle."""
    angles = 2 * math.pi * torch.rand(n, generator=seeded(seed))
    means = torch.stack([angles.cos(), angles.sin()], 1)
    return Gaussian(means, torch.full_like(means, math.log(0.01)))


def mixture_of(posterior, K):
    return fit_mixture(posterior.sample(seeded(8)), K, generator=seeded(9)).mixture


def fit(posterior, held_out, K=1, **options):
    return fit_flow(
        posterior, held_out, mixture_of(posterior, K), generator=seeded(), **SMALL | options
    )


def random_flow(d, dtype=torch.float64):
    """Return a flow far from the identity, with a mixture of two as its base."""
    means = torch.randn(2, d, generator=seeded(1))
    factors = torch.eye(d) + 0.3 * torch.randn(2, d, d, generator=seeded(2)).tril()
    flow = CodeFlow(GaussianMixture(torch.tensor([0.3, 0.7]), means, factors @ factors.mT), 2, (8,))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))

    return flow.to(dtype)


@pytest.fixture(scope="module")
def ring_fit():
    return fit(ring(2000), ring(1000, 1).sample(seeded(2)), epochs=30)


@pytest.mark.parametrize("d", [1, 2])
def test_the_density_integrates_to_one(d):
    flow = random_flow(d)
    axis = torch.linspace(-12, 12, 4001 if d == 1 else 401, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    with torch.no_grad():
        total = flow.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** d

    assert total.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("d", [1, 3])
def test_the_density_is_the_change_of_variables(d):
    flow = random_flow(d)
    inverse = torch.linalg.inv(flow.scale_tril)

    def to_base(z):
        w = (z - flow.mean) @ inverse.mT
        return flow.mean + flow.transform()(w) @ flow.scale_tril.mT

    for z in 2 * torch.randn(5, d, generator=seeded(), dtype=torch.float64):
        log_det = torch.linalg.slogdet(jacobian(to_base, z)).logabsdet
        expected = flow.base.log_prob(to_base(z)[None]) + log_det
        torch.testing.assert_close(flow.log_prob(z[None]), expected)


@pytest.mark.parametrize("d", [1, 3])
def test_draws_have_the_density(d):
    """The mean of p / q over samples of q is one for any density p that q covers."""
    flow = random_flow(d)
    z = flow.sample(20_000, seeded())
    p = Gaussian(z.mean(0), z.var(0).log() - 1)
    ratio = (p._replace(mean=p.mean.expand_as(z)).log_prob(z) - flow.log_prob(z)).exp()

    assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / math.sqrt(len(z)))


def test_before_a_fit_it_is_its_base():
    base = mixture_of(ring(500), 4)
    flow = CodeFlow(base)
    codes = ring(50, 1).sample(seeded())

    torch.testing.assert_close(
        flow.log_prob(codes), base.log_prob(codes).float(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(flow.sample(20, seeded()), base.sample(20, seeded()))


def test_a_ring_is_no_ellipse(ring_fit):
    codes = ring(2000, 3).sample(seeded(4))
    gaussian = mixture_of(ring(2000), 1).log_prob(codes.double()).mean().item()
    flow = ring_fit.flow.log_prob(codes).mean().item()

    # The density of the ring itself: its radius is 1, and its std is 0.1.
    posterior = ring(4000, 5)
    distances = (codes[:, None] - posterior.mean).square().sum(2)
    exact = (torch.logsumexp(-50 * distances, 1) + math.log(50 / math.pi / 4000)).mean().item()

    assert gaussian + 0.5 < flow < exact + 0.05

    radius = ring_fit.flow.sample(2000, seeded()).norm(dim=1)
    assert radius.mean().item() == pytest.approx(1, abs=0.1)
    assert ((radius > 0.6) & (radius < 1.4)).float().mean() > 0.8  # 0.56 for one Gaussian


def test_it_starts_from_its_mixture_and_is_no_worse_on_held_out_codes():
    posterior, held_out = ring(300), ring(1000, 1).sample(seeded(2))
    mixture = mixture_of(posterior, 8)
    before = mixture.log_prob(held_out).mean().item()

    for rate in (5e-3, 10.0):  # at the second rate, every epoch is worse than the start
        result = fit(posterior, held_out, 8, epochs=3, learning_rate=rate)
        assert result.held_out >= before - 1e-4
        assert result.held_out == pytest.approx(
            result.flow.log_prob(held_out).mean().item(), abs=1e-4
        )

    assert result.best_epoch == 0


def test_it_stops_when_held_out_codes_gain_no_more():
    epochs = []
    posterior = ring(40)
    result = fit(
        posterior, ring(1000, 1).sample(seeded(2)), epochs=400, patience=4, on_epoch=epochs.append
    )

    assert len(result.history) == result.best_epoch + 4 < 400
    assert tuple(epochs) == result.history
    assert result.held_out == max(step.held_out for step in result.history)


def test_codes_that_are_moved_and_scaled_have_the_fit_moved_and_scaled():
    scale = torch.tensor([8.0, 0.25], dtype=torch.float64)
    shift = torch.tensor([3.0, -5.0], dtype=torch.float64)
    posterior = Gaussian(*(values.double() for values in ring(400)))
    held_out = ring(100, 1).sample().double()
    moved = Gaussian(posterior.mean * scale + shift, posterior.log_var + 2 * scale.log())
    base = mixture_of(posterior, 2)
    moved_base = GaussianMixture(
        base.weights, base.means * scale + shift, base.covariances * torch.outer(scale, scale)
    )
    one = fit_flow(posterior, held_out, base, generator=seeded(), **SMALL, epochs=3)
    other = fit_flow(
        moved, held_out * scale + shift, moved_base, generator=seeded(), **SMALL, epochs=3
    )

    assert one.best_epoch > 0
    torch.testing.assert_close(
        other.flow.log_prob(held_out * scale + shift) + scale.log().sum(),
        one.flow.log_prob(held_out),
    )


def test_a_seed_says_it_all_and_the_global_generator_is_left_alone():
    posterior, held_out = ring(300), ring(100, 1).sample(seeded(2))
    state = torch.get_rng_state()
    one, other = (fit(posterior, held_out, epochs=2) for _ in range(2))

    assert torch.equal(one.flow.sample(9, seeded(3)), other.flow.sample(9, seeded(3)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one.flow.sample(9, seeded(3)), one.flow.sample(9, seeded(4)))


def test_a_file_holds_it_bit_for_bit(ring_fit, tmp_path):
    file = tmp_path / "flow.safetensors"
    save_flow(file, ring_fit.flow, {"seconds": 1.5})
    loaded, description = load_flow(file)
    codes = ring(50, 1).sample(seeded())

    assert description == {"seconds": 1.5}
    assert torch.equal(loaded.log_prob(codes), ring_fit.flow.log_prob(codes))
    assert torch.equal(loaded.sample(50, seeded()), ring_fit.flow.sample(50, seeded()))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())

    tensors, description = read_tensors(file, "flow", FlowDescription)
    del tensors["transform.transforms.0.hyper.0.bias"]
    write_tensors(file, "flow", tensors, description)
    with pytest.raises(StoreError, match=r"missing: transform\.transforms\.0\.hyper\.0\.bias"):
        load_flow(file)


def test_without_its_library_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)

    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    monkeypatch.setitem(sys.modules, "zuko", None)

    with pytest.raises(ImportError, match=r"equipoise\[flow\]"):
        CodeFlow(GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None]))


def test_wrong_input_is_refused():
    posterior, base = ring(50), mixture_of(ring(50), 1)
    codes = posterior.mean

    with pytest.raises(ValueError, match=r"held_out \(M, 2\)"):
        fit_flow(posterior, codes[:0], base)
    with pytest.raises(ValueError, match="base has 2 dimensions"):
        fit_flow(Gaussian(codes[:, :1], codes[:, :1]), codes[:, :1], base)
    with pytest.raises(ValueError, match="not all finite"):
        fit_flow(posterior, codes * torch.nan, base)
    with pytest.raises(
        ValueError, match=r"epochs is at least 1, got 0; .*patience is at least 1, got -1"
    ):
        fit_flow(posterior, codes, base, epochs=0, patience=-1)
    with pytest.raises(ValueError, match=r"expected codes of shape \(B, 2\)"):
        CodeFlow(base).log_prob(torch.zeros(3, 3))
