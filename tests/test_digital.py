"""The probability of levels: its values, its gradients, and what it must never do."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from equipoise.digital import DigitalGaussian, Levels
from equipoise.gaussian import Gaussian, SharedGenerator

GREY = Levels(1 / 255)


def every_level(mean, std, levels):
    """Log-probability of each level under one mean and std, (K,)."""
    k = torch.arange(levels.number, dtype=torch.float64)
    x = levels.low + levels.quantum * k
    digital = DigitalGaussian(
        torch.full_like(x, mean), torch.tensor(2 * math.log(std), dtype=torch.float64), levels
    )
    return digital.log_prob(x)


def exact(k, mean, std, count):
    """Log-probability of level k in units of the quantum, and its slopes, to 60 digits."""
    with mpmath.workdps(60):
        m, s = mpmath.mpf(mean), mpmath.mpf(std)
        upper = mpmath.inf if k == count - 1 else (k + 0.5 - m) / s
        lower = -mpmath.inf if k == 0 else (k - 0.5 - m) / s
        if abs(lower) < abs(upper):
            mass = (mpmath.erfc(lower / mpmath.sqrt(2)) - mpmath.erfc(upper / mpmath.sqrt(2))) / 2
        else:
            mass = (mpmath.erfc(-upper / mpmath.sqrt(2)) - mpmath.erfc(-lower / mpmath.sqrt(2))) / 2

        edges = [edge for edge in (upper, lower) if mpmath.isfinite(edge)]
        signs = [1 if edge is upper else -1 for edge in edges]
        densities = [
            sign * mpmath.npdf(edge) / mass for sign, edge in zip(signs, edges, strict=True)
        ]
        by_mean = -sum(densities) / s
        by_log_std = -sum(edge * density for edge, density in zip(edges, densities, strict=True))
        return float(mpmath.log(mass)), float(by_mean), float(by_log_std)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 7),
    st.one_of(st.floats(-1e4, 1e4), st.floats(-8, 8)),
    st.floats(-4, 4),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_values_and_slopes_are_those_of_60_digits(k, standardised, log10_std, dtype):
    """From 1e-4 to 1e4 quanta of std, and up to 10,000 std away, in both precisions."""
    std = 10.0**log10_std
    # As the precision rounds them: how mean and std were rounded before is not the question.
    mean = torch.tensor([k + standardised * std], dtype=dtype, requires_grad=True)
    log_var = torch.tensor([2 * math.log(std)], dtype=dtype, requires_grad=True)
    rounded = math.exp(0.5 * float(log_var.detach()))

    value = DigitalGaussian(mean, log_var, Levels(1.0, 0.0, 7.0)).log_prob(
        torch.tensor([float(k)], dtype=dtype)
    )
    slopes = torch.autograd.grad(value.sum(), [mean, log_var])
    expected, by_mean, by_log_std = exact(k, float(mean.detach()), rounded, 8)

    # Where the mean lies near an edge of std far below a quantum, its own last digit matters.
    digits = torch.finfo(dtype).eps * (1 + abs(float(mean.detach()))) / rounded
    tolerance = 1e3 * torch.finfo(dtype).eps
    assert float(value.detach()) == pytest.approx(
        expected, rel=tolerance, abs=tolerance + abs(by_mean) * rounded * digits
    )
    curvature = (1 + abs(by_mean * rounded)) * digits
    assert float(slopes[0]) * rounded == pytest.approx(
        by_mean * rounded, rel=tolerance, abs=tolerance + curvature
    )
    assert float(slopes[1]) == pytest.approx(
        by_log_std / 2, rel=tolerance, abs=tolerance + (1 + abs(standardised)) * curvature
    )


@given(st.floats(-20, 20), st.floats(-3, 4), st.integers(2, 300))
@settings(deadline=None)
def test_the_cells_of_any_gaussian_sum_to_one(standardised, log10_std, count):
    std = 10.0**log10_std
    mean = (count - 1) / 2 + standardised * std
    total = every_level(mean, std, Levels(1.0, 0.0, count - 1.0)).logsumexp(0)
    assert float(total) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("log10_std", [-4, -2, -1, 0, 1, 2, 4])
@pytest.mark.parametrize("distance", [0.0, 0.3, 3.0, 20.0, 1e4])
def test_gradients_are_those_of_differences(log10_std, distance):
    """Also at 20 and at 10,000 std, in the inner cells and in both of the open ones."""
    std = 10.0**log10_std
    x = torch.tensor([[0.0, 3.0, 3.0, 7.0]], dtype=torch.float64)
    away = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    mean = (x + away * distance * std).requires_grad_()
    log_var = torch.full_like(x, 2 * math.log(std)).requires_grad_()

    def log_prob(standardised_mean, log_var):
        mean = x + away * std * standardised_mean
        return DigitalGaussian(mean, log_var, Levels(1.0, 0.0, 7.0)).log_prob_of_values(x)

    standardised = torch.full_like(x, distance).requires_grad_()
    assert torch.autograd.gradcheck(log_prob, (standardised, log_var), eps=1e-6, rtol=1e-4)

    # And through the cell alone, of the same dtype as the model.
    total = DigitalGaussian(mean, log_var, Levels(1.0, 0.0, 7.0)).log_prob(x).sum()
    for gradient in torch.autograd.grad(total, [mean, log_var]):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_std_far_above_a_quantum_gives_the_density_times_the_quantum(dtype):
    levels = Levels(1e-4, -math.inf, math.inf)
    x = torch.linspace(-4, 4, 30, dtype=dtype)[:, None]
    gaussian = Gaussian(torch.full_like(x, 0.3), torch.zeros_like(x))
    expected = gaussian.log_prob(x) + math.log(levels.quantum)
    torch.testing.assert_close(DigitalGaussian.of(gaussian, levels).log_prob(x), expected)


def test_a_std_far_below_a_quantum_is_certain_and_no_more():
    """The density would grow without limit; a probability ends at one."""
    values = [every_level(0.2, std, GREY) for std in (0.1, 0.01, 1e-3, 1e-4, 1e-6)]
    of_the_level = [float(value[51]) for value in values]  # 51 / 255 = 0.2
    assert of_the_level == sorted(of_the_level)
    assert of_the_level[-1] == 0.0
    assert all(bool((value <= 0).all()) for value in values)


@pytest.mark.parametrize("levels", [Levels(1.0), Levels(0.25), GREY, Levels(2.0, -6.0, 10.0)])
def test_a_model_of_its_own_data_needs_no_more_bits_than_counting_the_levels(levels):
    """The mean code length is then the entropy of the levels, at most log2 of their number."""
    span = levels.high - levels.low
    for mean in (0.0, 0.3, 0.5, 1.0, 3.0):
        for std in (1e-4, 0.01, 0.1, 0.4, 1.0, 100.0):
            log_prob = every_level(levels.low + mean * span, std * span, levels)
            bits = float(-(log_prob.exp() * log_prob).sum()) / math.log(2)
            assert 0 <= bits <= math.log2(levels.number) + 1e-9


def test_a_very_wide_gaussian_leaves_the_inner_levels_to_the_ends():
    """Half of the mass goes to each open end, so that data which are not there cost more bits."""
    log_prob = every_level(0.5, 1e4, GREY)
    assert float(log_prob[[0, 255]].exp().sum()) == pytest.approx(1, abs=1e-4)
    assert float(-log_prob[100]) > math.log(256)


def test_levels_may_be_open_on_one_side_or_on_none():
    x = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    gaussian = Gaussian(torch.tensor([[1.0, 1.5]], dtype=torch.float64), torch.zeros(()))
    ends = {
        (0.0, 2.0): (norm.cdf(-0.5), norm.sf(0.0)),
        (-math.inf, math.inf): (norm.cdf(-0.5) - norm.cdf(-1.5), norm.cdf(1.0) - norm.cdf(0.0)),
        (0.0, math.inf): (norm.cdf(-0.5), norm.cdf(1.0) - norm.cdf(0.0)),
    }
    for (low, high), expected in ends.items():
        digital = DigitalGaussian.of(gaussian, Levels(1.0, low, high))
        assert digital.log_prob_of_values(x)[0].exp().tolist() == pytest.approx(expected)
    assert Levels(1.0, 0.0, math.inf).number is None


@given(st.integers(0, 15), st.floats(-3, 18), st.floats(0.01, 30), st.floats(0.01, 50))
def test_units_do_not_matter_nor_the_direction_of_the_scale(k, mean, std, unit):
    x = torch.tensor([[float(k)]], dtype=torch.float64)
    log_var = torch.tensor(2 * math.log(std), dtype=torch.float64)
    digital = DigitalGaussian(torch.full_like(x, mean), log_var, Levels(1.0, 0.0, 15.0))
    scaled = DigitalGaussian(
        unit * digital.mean - 3, log_var + 2 * math.log(unit), Levels(unit, -3.0, 15 * unit - 3)
    )
    mirrored = DigitalGaussian(15 - digital.mean, log_var, digital.levels)

    expected = float(digital.log_prob(x))
    assert float(scaled.log_prob(unit * x - 3)) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert float(mirrored.log_prob(15 - x)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (4, 1, 6, 7)])
@pytest.mark.parametrize("per_value", [True, False])
def test_log_prob_sums_over_everything_but_examples(shape, per_value, generator):
    x = torch.randint(0, 256, shape, generator=generator) / 255
    log_var = torch.full(shape if per_value else (), -4.0)
    digital = DigitalGaussian(torch.full(shape, 0.4), log_var, GREY)
    values = digital.log_prob_of_values(x)
    assert values.shape == shape
    torch.testing.assert_close(digital.log_prob(x), values.reshape(shape[0], -1).sum(1))


@pytest.mark.parametrize("planted", [0.3, 0.6, 3.0])
def test_the_std_before_rounding_and_clamping_is_recovered(planted, generator):
    """Where it is most probable; the density finds that of the levels, with the rounding in it."""
    mean = torch.rand(100_000, 1, generator=generator, dtype=torch.float64) * 14 - 3.5
    drawn = mean + planted * torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    x = drawn.round().clamp(0, 7)

    log_var = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_var], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = -DigitalGaussian(mean, log_var, Levels(1.0, 0.0, 7.0)).log_prob(x).mean()
        value.backward()
        return value

    optimiser.step(loss)
    assert math.exp(0.5 * float(log_var.detach())) == pytest.approx(planted, rel=0.02)


@pytest.mark.parametrize("std", [0.05, 0.4, 2.0, 30.0])
def test_the_randomised_transform_of_rounded_and_clamped_data_is_uniform(std, generator):
    """A histogram of eight levels, most of them at the ends, is flat where each PIT is not one."""
    n = 40_000
    mean = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 8 - 0.5
    drawn = mean + std * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x = drawn.round().clamp(0, 7)

    log_var = torch.tensor(2 * math.log(std), dtype=torch.float64)
    pit = DigitalGaussian(mean, log_var, Levels(1.0, 0.0, 7.0)).pit(x, generator)
    shares = torch.histc(pit, 20, 0, 1) / pit.numel()
    assert float((shares - 0.05).abs().max()) < 5 * math.sqrt(0.05 * 0.95 / pit.numel())
    assert 0 <= float(pit.min()) <= float(pit.max()) <= 1


def test_processes_that_share_a_batch_draw_the_same_transforms():
    x = torch.full((5, 3), 0.2)
    digital = DigitalGaussian(x, torch.full((), -9.0), GREY)
    whole = digital.pit(x, torch.Generator().manual_seed(3))
    for rank in range(2):
        mine = DigitalGaussian(x[rank::2], digital.log_var, GREY)
        shared = SharedGenerator(torch.Generator().manual_seed(3), 5, rank, 2)
        torch.testing.assert_close(mine.pit(x[rank::2], shared), whole[rank::2])


def test_agreement_on_a_bound_says_nothing_of_the_std():
    x = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.5, 0.0]])
    mean = torch.tensor([[0.0, 0.01, 1.0], [0.001, 0.5, 0.001]])
    agree = Levels(1 / 255).agree_on_bound(x, mean)
    assert agree.tolist() == [[True, False, True], [False, False, True]]
    assert not Levels(1 / 255, -math.inf, math.inf).agree_on_bound(x, mean).any()
