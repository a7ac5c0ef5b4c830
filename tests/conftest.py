"""Fixtures shared by the tests: determinism, and data small enough that training takes a second."""

import gc
import signal

import numpy as np
import pytest
import torch
from hypothesis import settings

from equipoise.data import load

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As under nohup or in the background of a script. Children that are interrupted inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# There are no deadlines, since shared machines are slow now and then. Random examples are the same
# in every run, so that a failure comes from a change of the code and not from chance.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


def pytest_collection_finish():
    """Spare the garbage collector the modules and tests, which stay until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_cache_in_the_home_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQUIPOISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    return load("digits")


@pytest.fixture(scope="session")
def table():
    """A correlated table whose columns have very different units."""
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(600, 2))
    loadings = rng.normal(size=(2, 6))
    units = np.array([1.0, 10.0, 100.0, 1e-3, 1.0, 5.0])
    return (codes @ loadings + 0.3 * rng.normal(size=(600, 6))) * units + 7 * units
