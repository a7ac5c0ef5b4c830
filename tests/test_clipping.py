import pytest
import torch
from torch import nn

from equipoise.training.clipping import RelativeClipping


def clipped(clipping, value, n=2):
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(n)]
    for parameter in parameters:
        parameter.grad = torch.full((3,), value)
    frozen = nn.Parameter(torch.zeros(1))
    clipping.clip([*parameters, frozen])
    return torch.cat([parameter.grad for parameter in parameters]).norm().item()


def test_steady_gradients_pass():
    clipping = RelativeClipping(2.0)
    norms = [clipped(clipping, 1.0) for _ in range(5)]
    assert norms == pytest.approx([6**0.5] * 5)


def test_an_outlier_is_cut_to_the_multiple_and_hardly_moves_the_average():
    clipping = RelativeClipping(2.0)
    for _ in range(50):
        clipped(clipping, 1.0)
    assert clipped(clipping, 1000.0) == pytest.approx(2 * 6**0.5, rel=1e-4)
    assert float(clipping.average) == pytest.approx(6**0.5 * (1 + 1 / 51), rel=1e-3)


def test_gradients_that_keep_growing_are_let_through_in_time():
    """As the noise variance falls, gradients grow by orders of magnitude: that is no outlier."""
    clipping = RelativeClipping(3.0)
    norms = [clipped(clipping, 1.01**i) for i in range(1000)]
    assert norms[-1] == pytest.approx(6**0.5 * 1.01**999, rel=1e-4)


def test_the_direction_is_kept():
    clipping = RelativeClipping(1.0)
    parameter = nn.Parameter(torch.zeros(2))
    for gradient in ([1.0, 0.0], [30.0, 40.0]):
        parameter.grad = torch.tensor(gradient)
        clipping.clip([parameter])
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-3, atol=0)
