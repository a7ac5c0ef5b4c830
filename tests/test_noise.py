import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from equipoise.gaussian import Gaussian
from equipoise.kernels import bounded, lower_bound
from equipoise.model import VAE
from equipoise.noise import DimensionNoise, FixedNoise, GlobalNoise, PredictedNoise
from equipoise.residuals import ErrorsByStd, ResidualQuantiles, ResidualVariance

Z = torch.zeros(4, 2)


def residuals(n=32, shape=(3,), seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


class Constant(nn.Module):
    """A variance network that answers the same for every code."""

    def __init__(self, value, shape=(3,)):
        super().__init__()
        self.value = nn.Parameter(torch.as_tensor(value).expand(shape).clone())

    def forward(self, z):
        return self.value.expand(len(z), *self.value.shape)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 1000))
def test_residual_variance_does_not_depend_on_the_batches(sizes, seed):
    everything = residuals(sum(sizes), (2, 3), seed)
    for shape in ((), (2, 1), (2, 3)):
        statistic = ResidualVariance(shape)
        for batch in everything.split(sizes):
            statistic.update(batch)
        dims = [0] + [i + 1 for i in range(2) if shape == () or shape[i] == 1]
        oracle = everything.double().square().mean(dims).reshape(shape)
        torch.testing.assert_close(statistic.var, oracle, rtol=1e-6, atol=0)


def test_residual_variance_sums_in_float64():
    """In float32 the sum would stop growing at 2^24 summands of one."""
    statistic = ResidualVariance()
    statistic.sum.fill_(2.0**24)
    statistic.count.fill_(2.0**24)
    for _ in range(3):
        statistic.update(torch.ones(1, 1))
    assert statistic.sum == 2**24 + 3


@given(st.floats(1e-3, 10.0))
def test_the_elbo_is_stationary_at_the_closed_form(std):
    """Eq. (10): d/d(sigma^2) of the Gaussian likelihood vanishes at the mean squared residual."""
    x = residuals().double() * std
    statistic = ResidualVariance()
    statistic.update(x)
    log_var = statistic.var.log().requires_grad_()
    total = Gaussian(torch.zeros_like(x), log_var).log_prob(x).sum()
    (gradient,) = torch.autograd.grad(total, log_var)
    assert abs(float(gradient)) < 1e-9 * x.numel()


def test_global_noise_takes_the_first_batch_at_once():
    noise = GlobalNoise()
    batch = 0.2 * residuals()
    noise.update(batch)
    torch.testing.assert_close(noise(Z).exp(), batch.square().mean())


def test_global_noise_forgets_old_batches():
    noise = GlobalNoise(memory=10)
    for _ in range(20):
        noise.update(torch.ones(4, 3))
    for _ in range(100):
        noise.update(torch.full((4, 3), 0.1))
    torch.testing.assert_close(noise(Z).exp(), torch.tensor(0.01), rtol=0.01, atol=0)


def test_global_noise_by_gradient_finds_the_closed_form():
    batch = 0.3 * residuals(256)
    noise = GlobalNoise("gradient")
    noise.update(torch.ones(1, 3))  # start far away
    optimiser = torch.optim.Adam(noise.parameters(), lr=0.05)
    for _ in range(400):
        loss = -Gaussian(torch.zeros_like(batch), noise(Z)).log_prob(batch).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        noise.update(batch)  # only the first batch counts
    torch.testing.assert_close(noise(Z).exp().detach(), batch.square().mean(), rtol=1e-3, atol=0)


def test_dimension_noise_is_global_noise_per_dimension():
    std = torch.tensor([0.1, 1.0, 3.0])
    batch = residuals(1000) * std
    noise = DimensionNoise((3,))
    noise.update(batch)
    torch.testing.assert_close(noise(Z).exp(), batch.square().mean(0))


def test_channel_noise_averages_over_pixels():
    batch = residuals(50, (2, 4, 4)) * torch.tensor([0.1, 2.0]).view(2, 1, 1)
    noise = DimensionNoise((2, 1, 1))
    noise.update(batch)
    torch.testing.assert_close(noise(Z).exp(), batch.square().mean((0, 2, 3)).view(2, 1, 1))


def test_a_constant_dimension_rests_on_the_floor_and_is_reported():
    batch = residuals()
    batch[:, 0] = 0.0
    noise = DimensionNoise((3,), min_var=1e-4)
    noise.update(batch)
    assert noise(Z).exp()[0] == pytest.approx(1e-4)
    assert noise.floor_share(noise(Z)) == pytest.approx(1 / 3)
    assert noise.floor_var == pytest.approx(1e-4)


@given(st.floats(-5, 5), st.floats(1e-3, 1.0))
def test_predicted_noise_with_a_constant_network_is_global_noise(correction, var):
    var = torch.tensor(var)
    predicted = PredictedNoise(Constant(correction), var, var * 1e-4)
    torch.testing.assert_close(
        predicted(Z),
        (var.log() + max(correction, math.log(1e-4))).expand(4, 3),
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_floor_is_exact_and_its_share_is_reported():
    correction = torch.tensor([-1.0, 0.0, 1.0])
    noise = PredictedNoise(Constant(correction), torch.tensor(0.01), torch.tensor(0.01))
    torch.testing.assert_close(noise(Z)[0].exp(), 0.01 * torch.tensor([1.0, 1.0, math.e]))
    assert noise.floor_share(noise(Z)) == pytest.approx(2 / 3)
    assert noise.floor_var == pytest.approx(0.01)


def test_a_variance_below_its_floor_can_leave_it():
    """Large residuals raise a prediction that starts under the floor; a clamp would not."""
    noise = PredictedNoise(Constant(-1.0), torch.tensor(0.01), torch.tensor(0.01))
    optimiser = torch.optim.Adam(noise.parameters(), lr=0.1)
    x = torch.full((4, 3), 0.5)
    for _ in range(300):
        loss = -Gaussian(torch.zeros_like(x), noise(Z)).log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(noise(Z).exp(), torch.full((4, 3), 0.25), rtol=0.02, atol=0)


def test_lower_bound_gradients_away_from_the_bound():
    values = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: lower_bound(v, v.new_tensor(0.0)), (values,))


@given(st.floats(-3, 3, width=32), st.sampled_from([-2.0, -1e-6, 0.0, 1e-6, 2.0]))
def test_bounds_keep_the_gradients_that_bring_a_value_back(value, gradient):
    raw = torch.tensor([value], requires_grad=True)
    (found,) = torch.autograd.grad(bounded(raw, -1.0, 1.0), raw, torch.tensor([gradient]))
    descent_leads_further_out = (value < -1 and gradient > 0) or (value > 1 and gradient < 0)
    assert found == torch.tensor(0.0 if descent_leads_further_out else gradient)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_recalibration_gives_unit_standardised_residuals(shape):
    true_std = torch.tensor([0.1, 0.4, 2.0])
    x = residuals(20_000) * true_std
    noise = PredictedNoise(
        Constant(0.0), torch.tensor(0.05), torch.tensor(0.05), calibration_shape=shape
    )
    statistic = ResidualVariance(shape)
    statistic.update(x / noise(Z)[0].exp().sqrt())
    noise.recalibrate(statistic)
    standardised = x / noise(Z)[0].exp().sqrt()
    torch.testing.assert_close(standardised.square().mean(), torch.tensor(1.0), rtol=1e-2, atol=0)
    if shape:
        torch.testing.assert_close(noise(Z)[0].exp().sqrt(), true_std, rtol=0.02, atol=0)


def test_recalibration_of_a_constant_pixel_stays_finite():
    x = residuals()
    x[:, 0] = 0.0
    noise = PredictedNoise(
        Constant(0.0), torch.tensor(1.0), torch.tensor(1.0), calibration_shape=(3,)
    )
    statistic = ResidualVariance((3,))
    statistic.update(x)
    noise.recalibrate(statistic)
    assert torch.isfinite(noise(Z)).all()


def errors_of(residual, std):
    statistic = ErrorsByStd()
    statistic.update(residual, std)
    return statistic


def with_map(errors, **options):
    noise = PredictedNoise(torch.nn.Identity(), torch.tensor(1.0), torch.tensor(1e-8))
    noise.calibrate_std(errors, **options)
    return noise


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_planted_map_from_std_to_error_is_recovered(power):
    """The errors are a power of the predicted std, which is wrong in size and in spread."""
    std = (1.5 * residuals(300_000)[:, 0]).exp()
    error = 0.1 * std**power
    noise = with_map(errors_of(error * residuals(300_000, seed=1)[:, 0], std))
    grid = torch.linspace(-1.5, 1.5, 50)  # within the central 68 % of the log-std
    found = noise(2 * grid[:, None])[:, 0]
    torch.testing.assert_close(
        found, 2 * (power * grid + math.log(0.1)), atol=0.1, rtol=0, check_dtype=False
    )


@given(st.integers(1, 400), st.integers(0, 1000), st.sampled_from([1e-30, 1e-10, 1.0, 1e10]))
def test_the_map_is_finite_and_keeps_the_order(n, seed, size):
    std = residuals(n, (2,), seed).exp().flatten().float() * size
    noise = with_map(errors_of(residuals(n, (2,), seed + 1).flatten() * size, std))
    knots = noise.std_map
    assert knots.isfinite().all()
    assert (knots[0].diff() > 0).all()
    log_var = torch.linspace(-200, 200, 1001)[:, None]
    found = noise.forward(log_var)
    # The floor binds below, where all values are the same.
    assert (found.diff(dim=0) >= 0).all()
    assert found.isfinite().all()
    above_floor = 2 * knots[0] > math.log(1e-8)
    before, after = 2 * knots[:, above_floor]
    torch.testing.assert_close(noise(before[:, None])[:, 0], after, atol=1e-4, rtol=1e-4)


def test_one_knot_is_the_scale_of_highest_likelihood():
    """With one predicted std, the map is the factor that recalibration finds."""
    x = 3 * residuals(500)
    mapped = with_map(errors_of(x.flatten(), torch.ones(1500)))
    scaled = PredictedNoise(Constant(0.0), torch.tensor(1.0), torch.tensor(1e-8))
    statistic = ResidualVariance()
    statistic.update(x)
    scaled.recalibrate(statistic)
    torch.testing.assert_close(mapped(torch.zeros(4, 3)), scaled(Z), check_dtype=False)
    assert mapped.calibration_scale == pytest.approx(scaled.calibration_scale)


def test_no_other_monotone_map_of_the_bins_is_more_likely():
    std = residuals(4000)[:, 0].exp()
    x = std.sqrt() * residuals(4000, seed=1)[:, 0]
    statistic = errors_of(x, std)

    def log_likelihood(knots):
        log_std = torch.from_numpy(np.interp(std.log().numpy(), *knots.numpy()))
        return Gaussian(torch.zeros(1, 4000), 2 * log_std[None]).log_prob(x[None].double()).item()

    knots = statistic.monotone_map()
    best = log_likelihood(knots)
    for seed in range(20):
        other = knots.clone()
        other[1] += 0.15 * residuals(knots.shape[1], (), seed)
        other[1] = other[1].cummax(0).values
        assert log_likelihood(other) < best


def test_errors_of_several_parts_are_those_of_the_whole():
    std, x = residuals(1000)[:, 0].exp(), residuals(1000, seed=1)[:, 0]
    whole, parts = errors_of(x, std), [errors_of(x[::2], std[::2]), errors_of(x[1::2], std[1::2])]
    parts[0].all_reduce(lambda sums: sums + parts[1].sums)
    torch.testing.assert_close(parts[0].monotone_map(), whole.monotone_map())
    assert parts[0].count == whole.count == 1000


def test_a_map_goes_with_the_floor_the_share_on_it_and_the_intervals():
    std = torch.tensor([0.1, 0.2, 0.4]).repeat(2000)
    noise = PredictedNoise(Constant(torch.tensor([-9.0, 0.0, 1.0])), *[torch.tensor(0.04)] * 2)
    noise.calibrate_intervals(quantiles_of(residuals(100)))
    noise.calibrate_std(errors_of(2 * std * residuals(6000)[:, 0], std))
    assert noise.interval_factors is None  # they were multiples of other std
    assert noise.floor_share(noise(Z)) == pytest.approx(2 / 3)
    assert float(noise.floor_var) == pytest.approx(0.16, rel=0.1)
    noise.calibrate_intervals(quantiles_of(residuals(100)), rescale=True)
    assert float(noise.floor_var) == pytest.approx(noise(Z).min().exp().item())
    factor = 2 * noise.calibration.div(2).exp().item()
    assert noise.calibration_scale == pytest.approx(factor, rel=0.05)

    with pytest.raises(ValueError, match="forget_calibration"):
        noise.calibrate_std(errors_of(std, std))
    noise.forget_calibration()
    torch.testing.assert_close(noise(Z)[0].exp(), torch.tensor([0.04, 0.04, 0.04 * math.e]))
    assert noise.calibration_scale == 1.0


def test_a_sample_without_any_error_does_not_make_the_std_vanish():
    std = torch.tensor([0.1, 0.4]).repeat_interleave(1000)
    x = torch.where(std > 0.2, residuals(2000)[:, 0], 0.0)
    noise = with_map(errors_of(x, std), min_var=1e-4)
    assert noise.std_map[1, 0] == pytest.approx(math.log(1e-2))
    for nothing in (ErrorsByStd(), errors_of(torch.zeros(5), torch.ones(5))):
        with pytest.raises(ValueError, match="not all zero"):
            with_map(nothing)
    for x, std in ((math.nan, 1.0), (1.0, 0.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="finite"):
            errors_of(torch.tensor([x]), torch.tensor([std]))


def test_gradients_pass_through_the_map():
    noise = with_map(errors_of(residuals(2000)[:, 0], residuals(2000)[:, 0].exp())).double()
    z = residuals(4).double().requires_grad_()
    assert torch.autograd.gradcheck(noise, (z,))


NOMINAL = [math.erf(k / math.sqrt(2)) for k in (1, 2, 3)]


def quantiles_of(*batches):
    statistic = ResidualQuantiles()
    for batch in batches:
        statistic.update(batch)
    return statistic


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(-30, 30), st.integers(0, 1000)
)
def test_residual_quantiles_are_those_of_numpy_whatever_the_batches(sizes, octaves, seed):
    everything = residuals(sum(sizes), (2, 3), seed) * 2.0**octaves
    shares = torch.tensor([0.0, 0.25, 0.6827, 0.95, 1.0])
    found = quantiles_of(*everything.split(sizes)).quantile(shares).numpy()
    expected = np.quantile(everything.abs().numpy(), shares.numpy(), method="inverted_cdf")
    assert (found > expected).all()  # rounded up
    np.testing.assert_allclose(found, expected, rtol=1 / 2048)


def test_residual_quantiles_refuse_what_is_no_number_and_nothing():
    with pytest.raises(ValueError, match="not finite"):
        quantiles_of(torch.tensor([[math.inf]]))
    with pytest.raises(ValueError, match="at least one batch"):
        ResidualQuantiles().quantile(torch.tensor([0.5]))


DISTRIBUTIONS = {
    "Gaussian": stats.norm(scale=0.3),
    "Laplace": stats.laplace(scale=0.3),
    "Student's t": stats.t(3, scale=0.3),
}


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("errors", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_intervals_cover_whatever_the_distribution(errors, rescale):
    """All planted std are wrong by one factor. SciPy's quantile functions are the oracle."""
    planted = torch.linspace(-1, 1, 20).exp()
    noise = PredictedNoise(
        Constant(2 * planted.log(), (20,)), torch.tensor(4.0), torch.tensor(1e-6)
    )
    unscaled = noise(Z)[0].mul(0.5).exp()
    torch.testing.assert_close(unscaled, 2 * planted)
    rng = np.random.default_rng(0)
    held_out, new = (torch.from_numpy(errors.rvs((4000, 20), rng)) * planted for _ in range(2))
    noise.calibrate_intervals(quantiles_of(held_out / unscaled), rescale=rescale)
    std = noise(Z)[0].mul(0.5).exp()
    for k, nominal in zip((1.0, 2.0, 3.0), NOMINAL, strict=True):
        half = noise.interval_factor(k) * std
        error = math.sqrt(nominal * (1 - nominal) / new.numel())
        assert (new.abs() <= half).double().mean() == pytest.approx(
            nominal, abs=6 * error
        )  # held out and new
        torch.testing.assert_close(
            half, float(errors.ppf((1 + nominal) / 2)) * planted, rtol=0.01 * k**2, atol=0
        )
    for coverage in (0.5, 0.9, 0.99):  # between the points of the grid
        factor = noise.interval_factor(float(stats.norm.ppf((1 + coverage) / 2)))
        assert (new.abs() <= factor * std).double().mean() == pytest.approx(coverage, abs=0.008)
    if rescale:
        assert noise.interval_factor(1.0) == pytest.approx(1.0)
        torch.testing.assert_close(
            std, float(errors.ppf((1 + NOMINAL[0]) / 2)) * planted, rtol=0.01, atol=0
        )
    else:
        assert torch.equal(std, unscaled)


@given(st.integers(-8, 8), st.integers(0, 1000))
def test_the_scale_of_the_prediction_does_not_matter(octaves, seed):
    held_out = residuals(50, (3,), seed)
    intervals = []
    for factor in (1.0, 2.0**octaves):
        noise = PredictedNoise(Constant(0.0), torch.tensor(factor**2), torch.tensor(factor**2))
        noise.calibrate_intervals(quantiles_of(held_out / factor), rescale=True)
        std = noise(Z)[0].mul(0.5).exp()
        intervals.append(
            torch.stack([noise.interval_factor(k) * std for k in (0.3, 1.0, 2.0, 3.0, 5.0)])
        )
    torch.testing.assert_close(*intervals)


def test_wider_intervals_cover_more():
    noise = PredictedNoise(Constant(0.0), torch.tensor(1.0), torch.tensor(1.0))
    assert noise.interval_factor(2.5) == 2.5  # a Gaussian's, before it has seen anything
    noise.calibrate_intervals(quantiles_of(residuals(100)))
    factors = [noise.interval_factor(k / 10) for k in range(60)]
    assert factors[0] == 0.0
    assert factors == sorted(factors)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_intervals_outlive_one_scale_and_are_forgotten_with_a_scale_per_dimension(shape):
    noise = PredictedNoise(Constant(0.0), torch.tensor(4.0), torch.tensor(4.0), shape)
    noise.calibrate_intervals(quantiles_of(residuals(100)))
    before = noise.interval_factor(2.5) * noise(Z)[0].mul(0.5).exp()
    statistic = ResidualVariance(shape)
    statistic.update(3 * residuals(100))
    noise.recalibrate(statistic)
    if shape:
        assert noise.interval_factor(2.5) == 2.5
    else:
        torch.testing.assert_close(noise.interval_factor(2.5) * noise(Z)[0].mul(0.5).exp(), before)


def test_the_guarantee_for_few_examples_whose_dimensions_hang_together():
    """On average over draws, the coverage is at least N / (N + 1) times the nominal one."""
    N, coverage = 9, []
    for seed in range(1000):
        # One scale per example: its dimensions are as good as one.
        x = residuals(N + 1, (4,), seed) * residuals(N + 1, (1,), seed + 10_000).exp()
        half = quantiles_of(x[:N]).quantile(torch.tensor([0.6827, 0.9545]))
        coverage.append((x[N].abs()[:, None] <= half).double().mean(0))
    found, error = (
        torch.stack(coverage).mean(0),
        torch.stack(coverage).std(0) / math.sqrt(len(coverage)),
    )
    nominal = torch.tensor([0.6827, 0.9545], dtype=torch.float64)
    assert (found > nominal * N / (N + 1) - 3 * error).all()
    assert found[1] < 0.9545 - 3 * error[1]  # without the factor it would be false


def test_the_interval_of_a_model_without_stage_2_is_the_gaussians():
    vae = VAE.build((3,), latent_dim=1, noise=FixedNoise(0.01)).eval()
    x = residuals(5)
    lower, upper = vae.interval(x, coverage=0.95)
    torch.testing.assert_close((lower + upper) / 2, vae.reconstruct(x).mean)
    torch.testing.assert_close(upper - lower, torch.full((5, 3), 2 * 0.1 * 1.959964))
    for wrong in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match=r"such as 0\.95"):
            vae.interval(x, wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedNoise(0.0), "positive"),
        (lambda: FixedNoise(math.inf), "finite"),
        (lambda: GlobalNoise("newton"), "closed-form"),
        (lambda: GlobalNoise(min_var=0.0), "min_var"),
        (lambda: DimensionNoise((3,), memory=0), "memory"),
        (
            lambda: PredictedNoise(Constant(0.0), torch.tensor(-1.0), torch.tensor(1.0)),
            "reference_var",
        ),
        (
            lambda: PredictedNoise(Constant(0.0), torch.tensor(1.0), torch.tensor(math.nan)),
            "floor_var",
        ),
        (
            lambda: PredictedNoise(Constant(0.0), torch.tensor(1.0), torch.tensor(1.0)).recalibrate(
                ResidualVariance()
            ),
            "held-out",
        ),
        (
            lambda: PredictedNoise(
                Constant(0.0), torch.tensor(1.0), torch.tensor(1.0)
            ).calibrate_intervals(quantiles_of(torch.tensor([[0.0, 0.0, 0.0, 1.0]])), rescale=True),
            "not zero",
        ),
    ],
)
def test_wrong_arguments_say_what_is_wrong(make, message):
    # beartype is on in the test run and would catch a wrong type first; these are wrong values.
    with pytest.raises(
        (ValueError, TypeError), match=message if message != "closed-form" else None
    ):
        make()
