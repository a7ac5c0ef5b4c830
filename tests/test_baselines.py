"""Squared errors of the mean example and of PCA, in closed form."""

import numpy as np
import pytest
import torch

from equipoise.data import Subset
from equipoise.metrics.baselines import baselines
from equipoise.model import Scaling


@pytest.mark.parametrize("shape", [(6,), (1, 8, 9)])
@pytest.mark.parametrize("n_components", [1, 3])
def test_errors_are_the_variance_that_is_left(shape, n_components):
    rng = np.random.default_rng(0)
    width = int(np.prod(shape))
    basis = np.linalg.qr(rng.normal(size=(width, 3)))[0].T
    stds = np.array([3.0, 2.0, 1.0])
    x = (rng.normal(size=(4000, 3)) * stds @ basis + 5).reshape(-1, *shape).astype(np.float32)
    scale = 2.0
    scaling = Scaling(torch.tensor(5.0), torch.tensor(scale))
    found = baselines(Subset.whole(x[:2000]), Subset.whole(x[2000:]), scaling, n_components)
    left = [0, *stds**2]
    assert found.mse_mean_example.value == pytest.approx(sum(left) / width / scale**2, rel=0.1)
    expected = sum(left[1 + n_components :]) / width / scale**2
    assert found.mse_pca.value == pytest.approx(expected, rel=0.1, abs=1e-6)
    assert found.mse_pca.n == 2000
