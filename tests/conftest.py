"""Fixtures shared by the tests: determinism, and data small enough that training takes a second."""

import functools
import gc
import inspect
import signal
import typing

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import BeartypeConf
from hypothesis import settings

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As under nohup or in the background of a script. Children that are interrupted inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# There are no deadlines, since shared machines are slow now and then. Random examples are the same
# in every run, so that a failure comes from a change of the code and not from chance.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


def names_shapes(hint):
    """Tell whether an annotation may contain a shape; names of types are not looked up."""
    if isinstance(hint, str) or (inspect.isclass(hint) and issubclass(hint, ARRAY)):
        return True

    parts = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else ()
    return any(map(names_shapes, parts))


def check_types(fn=None, *, typechecker):
    """Check shapes where a function names some, and else types alone.

    jaxtyping checks the arguments of each call twice and binds them, too, which takes as long as
    all else that a training of the tests does.
    """
    if fn is None:
        return functools.partial(check_types, typechecker=typechecker)

    hints = getattr(fn, "__annotations__", {}).values()
    if inspect.isfunction(fn) and not any(map(names_shapes, hints)):
        return typechecker(fn, conf=AS_JAXTYPING)

    return check_shapes(fn, typechecker=typechecker)


# Modules of equipoise are decorated as they are imported, which is later than this.
ARRAY, AS_JAXTYPING = jaxtyping.AbstractArray, BeartypeConf(violation_type=TypeError)
check_shapes, jaxtyping.jaxtyped = jaxtyping.jaxtyped, check_types


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
    from equipoise.data import load  # not before the checks of types are chosen

    return load("digits")


@pytest.fixture(scope="session")
def table():
    """A correlated table whose columns have very different units."""
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(600, 2))
    loadings = rng.normal(size=(2, 6))
    units = np.array([1.0, 10.0, 100.0, 1e-3, 1.0, 5.0])
    return (codes @ loadings + 0.3 * rng.normal(size=(600, 6))) * units + 7 * units
