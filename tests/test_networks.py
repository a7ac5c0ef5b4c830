import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.networks import (
    GELU,
    ConvTranspose2d,
    build_decoder,
    build_encoder,
    build_head,
    default_architecture,
    start_at_data,
)


@given(
    st.sampled_from(["conv", "residual", "mlp"]),
    st.integers(1, 4),
    st.integers(8, 37),
    st.integers(8, 37),
    st.integers(1, 5),
)
def test_every_image_size_goes_in_and_comes_out(architecture, channels, height, width, latent_dim):
    shape = (channels, height, width)
    encoder = build_encoder(architecture, shape, latent_dim, 2)
    decoder = build_decoder(architecture, shape, latent_dim, 2)
    parameters = encoder(torch.zeros(2, *shape))
    assert parameters.shape == (2, 2 * latent_dim)
    assert decoder(parameters[:, :latent_dim]).shape == (2, *shape)
    head = build_head(architecture, shape, 2)
    assert head(decoder.hidden(parameters[:, :latent_dim])).shape == (2, *shape)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "layer",
    [GELU(), *(ConvTranspose2d(6, outputs, output_padding=(0, 1)) for outputs in (1, 3, 5))],
    ids=["GELU", "transposed, 1 channel", "transposed, 3 channels", "transposed, 5 channels"],
)
def test_layers_that_are_quicker_compute_what_torchs_do(layer, layout):
    layer = copy.deepcopy(layer).to(memory_format=layout)
    reference = copy.deepcopy(layer)
    reference.__class__ = type(layer).__base__
    found = []
    for module in (layer, reference):
        x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)).contiguous(
            memory_format=layout
        )
        y = module(x.requires_grad_())
        assert y.is_contiguous(memory_format=layout)
        y.square().sum().backward()
        found.append([y, x.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [1, 3, 5])
@pytest.mark.parametrize("odd", [(0, 0), (1, 0), (1, 1)])
def test_the_transposed_convolution_has_the_gradients_of_its_values(outputs, odd):
    layer = ConvTranspose2d(2, outputs, output_padding=odd).double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(
            layer, dict(zip(("weight", "bias"), values, strict=True)), (x,)
        ),
        (x, layer.weight, layer.bias),
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # by torch's own jvp
@pytest.mark.parametrize("outputs", [1, 5])
def test_the_transposed_convolution_can_be_differentiated_by_every_way(outputs):
    """Twice, and by the transforms of torch.func, as for the geometry of a latent space."""
    layer = ConvTranspose2d(2, outputs, output_padding=(0, 0)).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), (x,))
    expected = torch.stack(
        [torch.autograd.functional.jacobian(layer, one[None])[0, :, :, :, 0] for one in x]
    )
    by_func = torch.func.vmap(torch.func.jacrev(lambda one: layer(one[None])[0]))(x)
    torch.testing.assert_close(by_func, expected)
    (_, forwards) = torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(forwards, expected.sum((-3, -2, -1)))


@pytest.mark.parametrize("outputs", [1, 5])
def test_the_transposed_convolution_computes_in_the_precision_of_its_surroundings(outputs):
    layer = ConvTranspose2d(6, outputs, output_padding=(0, 0))
    x = torch.randn(4, 6, 5, 7).requires_grad_()
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    assert 0 < (y.float() - exact).abs().max() < 0.03


@pytest.mark.parametrize("architecture", ["mlp", "conv", "residual"])
def test_untrained_networks_start_in_balance(architecture):
    """Decoder at the mean, posterior near the prior: the first residual variance is the data's."""
    x = 0.2 + 0.3 * torch.rand(500, 3, 12, 12)
    encoder, decoder = (
        build_encoder(architecture, (3, 12, 12), 4, 8),
        build_decoder(architecture, (3, 12, 12), 4, 8),
    )
    start_at_data(encoder, decoder, x.mean(0), x.std())
    with torch.no_grad():
        mean, log_var = encoder(x).chunk(2, 1)
        residual = x - decoder(torch.randn(500, 4))
    torch.testing.assert_close(residual.square().mean(), x.var(), rtol=0.1, atol=0)
    assert mean.abs().max() < 0.5
    assert log_var.abs().max() < 0.5


@pytest.mark.parametrize("architecture", ["mlp", "conv", "residual"])
def test_gradients_reach_every_parameter(architecture):
    encoder, decoder = (
        build_encoder(architecture, (1, 9, 9), 2, 4),
        build_decoder(architecture, (1, 9, 9), 2, 4),
    )
    decoder(encoder(torch.randn(3, 1, 9, 9))[:, :2]).square().sum().backward()
    used = [
        p
        for p in (*encoder.parameters(), *decoder.parameters())
        if p.grad is not None and p.grad.abs().sum() > 0
    ]
    # The log-variance half of the encoder's output is not used here, but shares its layer.
    assert len(used) == len([*encoder.parameters(), *decoder.parameters()])


def test_the_output_reaches_beyond_the_unit_interval():
    decoder = build_decoder("conv", (1, 8, 8), 2, 4)
    assert decoder(1000 * torch.randn(50, 2)).abs().max() > 1


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 8, 8), "conv"), ((3, 64, 64), "conv"), ((1, 7, 9), "mlp"), ((10,), "mlp")],
)
def test_the_architecture_follows_the_shape(shape, expected):
    assert default_architecture(shape) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("conv", (10,), 2, 4), "use architecture='mlp'"),
        (("residual", (1, 7, 8), 2, 4), "at least 8 x 8"),
        (("mlp", (10,), 0, 4), "latent_dim"),
        (("mlp", (), 2, 4), "every axis"),
    ],
)
def test_wrong_shapes_say_what_to_do(arguments, message):
    for build in (build_encoder, build_decoder):
        with pytest.raises(ValueError, match=message):
            build(*arguments)


def test_only_our_networks_are_started_at_the_data():
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="need a layer 'standardise'"):
        start_at_data(linear, linear, torch.zeros(2), torch.ones(()))
