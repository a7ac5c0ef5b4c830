import math

import pytest
import torch
from torch import nn

from equipoise.aggregate import StandardNormal
from equipoise.gaussian import Gaussian
from equipoise.model import VAE, Scaling
from equipoise.noise import GlobalNoise, PredictedNoise


class TupleEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x):
        mean = self.linear(x)
        return Gaussian(mean, torch.zeros_like(mean))


def own(encoder, decoder, **kwargs):
    return VAE(encoder, decoder, GlobalNoise(), **({"shape": (6,), "latent_dim": 2} | kwargs))


def test_plain_modules_serve_as_networks():
    for encoder in (nn.Linear(6, 4), TupleEncoder()):
        vae = own(encoder, nn.Linear(2, 6))
        seen = vae.reconstruct(torch.randn(3, 6))
        assert seen.mean.shape == seen.std.shape == (3, 6)


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        (
            nn.Linear(6, 5),
            nn.Linear(2, 6),
            r"encoder must map \(2, 6\) to \(2, 4\).*got \[\(2, 5\)\]",
        ),
        (nn.Linear(6, 4), nn.Linear(2, 7), r"decoder must map \(2, 2\) to \(2, 6\), got \(2, 7\)"),
    ],
)
def test_networks_that_do_not_fit_are_named_with_their_shapes(encoder, decoder, message):
    with pytest.raises(ValueError, match=message):
        own(encoder, decoder)


def test_checking_shapes_leaves_batch_statistics_alone():
    encoder = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
    own(encoder, nn.Linear(2, 6))
    assert encoder[0].num_batches_tracked == 0
    assert encoder.training


def test_extreme_log_variances_of_the_posterior_stay_finite():
    encoder = nn.Linear(6, 4)
    nn.init.constant_(encoder.bias, 1e6)
    posterior = own(encoder, nn.Linear(2, 6)).encode(torch.zeros(1, 6))
    assert torch.isfinite(posterior.std).all()
    assert torch.isfinite(posterior.kl()).all()


def test_an_encoder_beyond_the_bounds_finds_its_way_back():
    """A clamp would have no gradient there, and the unit would be lost for the rest of the run."""
    encoder = nn.Linear(6, 4)
    nn.init.constant_(encoder.bias, 50.0)
    vae = own(encoder, nn.Linear(2, 6))
    optimiser = torch.optim.Adam(encoder.parameters(), lr=0.5)
    for _ in range(500):
        loss = vae.encode(torch.zeros(1, 6)).kl().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert vae.encode(torch.zeros(1, 6)).kl().item() < 0.1


def test_generate_is_determined_by_the_generator():
    vae = VAE.build((1, 8, 8), latent_dim=2, width=4)
    prior = StandardNormal(2)
    draws = [vae.generate(3, prior, torch.Generator().manual_seed(1)).mean for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("network", ["decoder", "head"])
@pytest.mark.parametrize("architecture", ["mlp", "conv", "residual"])
def test_predicting_the_variance_does_not_move_the_likelihood(architecture, network):
    vae = VAE.build((1, 8, 8), latent_dim=2, width=4, architecture=architecture)
    vae.noise.update(torch.full((2, 1, 8, 8), 0.1))
    z = torch.randn(5, 2)
    before = vae.decode(z)
    var = before.log_var.exp()
    vae.predict_variance(var, 0.5 * var, network=network)
    after = vae.decode(z)
    assert isinstance(vae.noise, PredictedNoise)
    torch.testing.assert_close(after.mean, before.mean)
    torch.testing.assert_close(after.log_var, before.log_var.expand_as(after.log_var))


@pytest.mark.parametrize("shape", [(7,), (1, 8, 8), (3, 9, 13), (4, 31, 17)])
@pytest.mark.parametrize("architecture", ["mlp", "conv", "residual"])
def test_a_head_reads_what_the_mean_is_made_of(architecture, shape):
    """The features are computed once, and the mean of a code is the same with and without it."""
    if len(shape) == 1 and architecture != "mlp":
        return
    vae = VAE.build(shape, 3, architecture=architecture, width=2, mean_bounds=(0.0, 1.0)).eval()
    z, calls = torch.randn(5, 3), []
    mean = vae.decode(z).mean
    vae.predict_variance(torch.tensor(0.1), torch.tensor(0.01), network="head")
    torch.nn.init.normal_(vae.noise.network.output.weight)
    vae.decoder.hidden.register_forward_hook(lambda *_: calls.append(1))

    likelihood = vae.decode(z)
    assert len(calls) == 1
    assert torch.equal(likelihood.mean, mean)
    assert likelihood.log_var.shape == (5, *shape)
    features = vae.decoder.hidden(z)
    assert torch.equal(vae.noise(features), likelihood.log_var)
    assert likelihood.log_var.std() > 0.01


def test_an_own_decoder_gets_a_variance_network_too():
    vae = own(nn.Linear(6, 4), nn.Sequential(nn.Linear(2, 6), nn.Sigmoid()))
    vae.predict_variance(torch.tensor(0.1), torch.tensor(0.1))
    assert vae.decode(torch.randn(3, 2)).log_var.shape == (3, 6)
    with pytest.raises(ValueError, match="network='decoder'"):
        vae.predict_variance(torch.tensor(0.1), torch.tensor(0.1), network="head")


def test_scaling_round_trip():
    offset, scale = torch.tensor([5.0, -2.0]), torch.tensor([10.0, 0.1])
    raw = torch.randn(7, 2) * scale + offset
    scaling = Scaling(offset, scale)
    torch.testing.assert_close(scaling.restore(scaling(raw)), raw)
    torch.testing.assert_close(scaling.restore_std(torch.ones(1, 2))[0], scale)


def test_digital_data_come_back_rounded_and_within_their_levels():
    scaling = Scaling(torch.tensor(0.0), torch.tensor(16.0), quantum=1 / 16)
    x = torch.tensor([[-0.2, 0.04, 0.5, 1.3]])
    assert scaling.restore_levels(x).tolist() == [[0, 1, 8, 16]]
    assert scaling.restore_levels(x).dtype == torch.uint8


def test_levels_that_a_byte_cannot_hold_are_not_wrapped():
    scaling = Scaling(torch.tensor(-1000.0), torch.tensor(3000.0), quantum=1 / 3000)
    assert scaling.restore_levels(torch.tensor([[-0.1, 0.0, 0.5, 1.0]])).tolist() == [
        [-1000, -1000, 500, 2000]
    ]


@pytest.mark.parametrize(
    ("quantum", "raw", "message"),
    [
        (
            1 / 16,
            torch.tensor([[0.0, 0.5]]),
            r"whole numbers within \[0, 16\]; these are torch.float32",
        ),
        (1 / 16, torch.tensor([[0, 200]], dtype=torch.uint8), "from 0 to 200"),
        (None, torch.tensor([[0, 200]], dtype=torch.uint8), "real numbers"),
    ],
)
def test_data_in_another_unit_are_refused(quantum, raw, message):
    with pytest.raises(ValueError, match=message):
        Scaling(torch.tensor(0.0), torch.tensor(16.0), quantum).check(raw)


@pytest.mark.parametrize(
    ("quantum", "scale", "raw"),
    [
        (1 / 16, 16.0, torch.tensor([[0, 20]], dtype=torch.uint8)),
        (1 / 4095, 4095.0, torch.tensor([[0, 4000], [4096, 6000]], dtype=torch.int32)),
        (None, 1.0, torch.tensor([[0.0, 1.2]])),
        (None, 1.0, torch.cat([torch.rand(1, 200), torch.tensor([[300.0]])], 1)),
    ],
)
def test_values_beyond_those_of_the_training_are_taken_and_noticed(quantum, scale, raw):
    """Brighter pixels, and a hot one, are in the same unit; what is far beyond gets a word."""
    scaling = Scaling(torch.tensor(0.0), torch.tensor(scale), quantum)
    scaling.check(raw)
    is_beyond = float(scaling(raw).max()) > 1.5
    assert (scaling.range_warning(raw) is not None) == is_beyond


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_grey_levels_are_refused_where_white_is_one(share):
    """Also if most of an image is black, and if it is one among many."""
    raw = torch.zeros(50, 1, 20, 20)
    raw[7].view(-1)[: int(share * 400)] = 255
    with pytest.raises(ValueError, match=r"values within \[0, 1\]; these are from 0 to 255"):
        Scaling(torch.tensor(0.0), torch.tensor(1.0)).check(raw)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scaling_needs_a_positive_scale(scale):
    with pytest.raises(ValueError, match="positive, finite scale"):
        Scaling(torch.tensor(0.0), torch.tensor(scale))


def test_means_stay_within_the_bounds_and_find_back():
    """A mean beyond a bound is at the bound, and keeps only the gradient that brings it back."""
    vae = VAE.build((1, 8, 8), latent_dim=2, width=2, mean_bounds=(0.0, 1.0))
    torch.nn.init.zeros_(vae.decoder.output.weight)
    bias = vae.decoder.output.bias
    for outside, bound in ((-0.3, 0.0), (1.3, 1.0)):
        torch.nn.init.constant_(bias, outside)
        mean = vae.decode_mean(torch.zeros(4, 2))
        assert bool((mean == bound).all())
        for target, moves in ((0.5, True), (bound, False)):
            (gradient,) = torch.autograd.grad(
                (vae.decode_mean(torch.zeros(4, 2)) - target).square().sum(), bias
            )
            assert bool(gradient.abs().sum() > 0) is moves
            assert not moves or torch.sign(gradient) == math.copysign(
                1, outside
            )  # descent goes back inside


def test_a_deterministic_posterior_is_a_point():
    vae = VAE.build((1, 8, 8), latent_dim=2, width=2, deterministic=True)
    x = torch.rand(3, 1, 8, 8)
    posterior = vae.encode(x)
    torch.testing.assert_close(posterior.sample(), posterior.mean, atol=1e-3, rtol=0)
    assert float(posterior.std.max()) == pytest.approx(math.exp(-10), rel=1e-5)
