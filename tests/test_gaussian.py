import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from equipoise import gaussian as module
from equipoise.gaussian import (
    Gaussian,
    SharedGenerator,
    standard_normal_like,
    standard_normal_log_prob,
)

shapes = st.sampled_from([(3, 4), (2, 1, 5, 5), (1, 7)])
seeds = st.integers(0, 2**16)


def draw(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    mean, log_var, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return Gaussian(mean, 3 * log_var), x


@given(shapes, seeds)
def test_log_prob_is_that_of_torch(shape, seed):
    gaussian, x = draw(shape, seed)
    oracle = Normal(gaussian.mean, gaussian.std).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(gaussian.log_prob(x), oracle)


@given(shapes, seeds)
def test_kl_is_that_of_torch_and_not_negative(shape, seed):
    gaussian, _ = draw(shape, seed)
    prior = Normal(torch.zeros_like(gaussian.mean), 1.0)
    oracle = kl_divergence(Normal(gaussian.mean, gaussian.std), prior).flatten(1).sum(1)

    torch.testing.assert_close(gaussian.kl(), oracle)
    assert (gaussian.kl() >= 0).all()


@pytest.mark.parametrize("log_var_shape", [(), (4,), (3, 1), (3, 4)])
def test_a_shared_log_variance_is_the_same_as_its_copies(log_var_shape):
    mean, x = torch.randn(3, 4), torch.randn(3, 4)
    log_var = torch.randn(log_var_shape)
    shared, full = Gaussian(mean, log_var), Gaussian(mean, log_var.expand(3, 4).clone())

    torch.testing.assert_close(shared.log_prob(x), full.log_prob(x))
    torch.testing.assert_close(shared.std, full.std)


def test_scalar_variance_weighs_the_squared_error_by_half_its_inverse():
    """Eq. (9): variance 0.5 gives weight 1, variance 1 gives weight 1/2."""
    mean, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    error = (x - mean).square().sum(1)
    for var, weight in ((0.5, 1.0), (1.0, 0.5)):
        log_var = torch.tensor(var, dtype=torch.float64).log()
        constant = -2 * torch.log(torch.tensor(2 * torch.pi * var, dtype=torch.float64))
        torch.testing.assert_close(Gaussian(mean, log_var).log_prob(x), constant - weight * error)


def test_samples_have_the_mean_and_variance(generator):
    gaussian = Gaussian(
        torch.tensor([[1.0, -2.0]]).expand(200_000, 2), torch.tensor([0.5, -1.0]).expand(200_000, 2)
    )
    z = gaussian.sample(generator)

    torch.testing.assert_close(z.mean(0), gaussian.mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(0), gaussian.var[0], atol=0, rtol=0.02)


def test_same_generator_same_sample():
    gaussian = Gaussian(torch.zeros(3, 2), torch.zeros(3, 2))
    draws = [gaussian.sample(torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)


def test_gradients():
    mean, log_var, x = (
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )

    assert torch.autograd.gradcheck(lambda m, s, x: Gaussian(m, s).log_prob(x), (mean, log_var, x))
    assert torch.autograd.gradcheck(lambda m, s: Gaussian(m, s).kl(), (mean, log_var))


def test_standard_normal():
    z = torch.randn(5, 3)
    torch.testing.assert_close(standard_normal_log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(1))


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("shape", [(1000, 3), (997, 4), (160, 1), (161, 1, 5, 5), (31,), (3, 2)])
def test_processes_draw_long_rows_of_numbers_block_by_block(shape, world_size, monkeypatch):
    def shares():
        for rank in range(world_size):
            values = torch.empty(len(range(rank, shape[0], world_size)), *shape[1:])
            shared = SharedGenerator(torch.Generator().manual_seed(3), shape[0], rank, world_size)
            yield standard_normal_like(values, shared)

    whole = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(3))
    sizes = []
    draw = torch.Tensor.normal_

    def counted(numbers, **options):
        sizes.append(numbers.numel())
        return draw(numbers, **options)

    monkeypatch.setattr(module, "VALUES_AT_ONCE", 64)
    monkeypatch.setattr(torch.Tensor, "normal_", counted)
    for rank, share in enumerate(shares()):
        assert torch.equal(share, whole[rank::world_size])
    row = max(1, whole[0].numel())
    assert max(sizes) <= max(64, 16 * row) + 16 * row
    assert share.untyped_storage().nbytes() <= 4 * max(share.numel(), max(sizes))
