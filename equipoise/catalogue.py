"""The choices that options name: objectives, noise models, networks and sources of codes.

Options, help, trainer, evaluation, paper and docs read these tables, which need no torch. To add a
choice, write its class in ``objectives.py``, ``noise.py``, ``networks.py`` or ``sources.py``, add
its row here, and test it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Objective(NamedTuple):
    """What training can descend.

    Args:
        summary: What it is, as the end of a sentence that begins with its name.
        source: Where it was published.
        options: Options that it sets unless the user sets them.
        requires: Options that can have no other value with it.
        is_deterministic: Whether its encoder gives points in place of distributions.
        penalty: Default weight of what it adds to the loss. None if it adds nothing.
        has_beta: Whether the KL in its loss has a weight.
    """

    summary: str
    source: str
    options: Mapping[str, Any] = NOTHING
    requires: Mapping[str, Any] = NOTHING
    is_deterministic: bool = False
    penalty: float | None = None
    has_beta: bool = False


_ONE_STAGE: Mapping[str, Any] = {"stage_2_epochs": 0}
_FIXED_VARIANCE: Mapping[str, Any] = {**_ONE_STAGE, "noise": "fixed"}
_SQUARED_ERROR: Mapping[str, Any] = {**_FIXED_VARIANCE, "noise_var": 0.5}
"""The sum of squared errors and the KL: the bound at a fixed variance of 0.5."""

OBJECTIVES: dict[str, Objective] = {
    "elbo": Objective(
        "the evidence lower bound, with the noise model that is chosen",
        "Kingma and Welling (2014)",
        has_beta=True,
    ),
    "vae": Objective(
        "squared error and KL, which is the bound at a fixed variance of 0.5",
        "Kingma and Welling (2014)",
        options=_SQUARED_ERROR,
        requires=_FIXED_VARIANCE,
        has_beta=True,
    ),
    "beta-vae": Objective(
        "the bound at a fixed variance of 1, or at another noise_var or beta",
        "Higgins et al. (2017)",
        options={**_SQUARED_ERROR, "noise_var": 1.0},
        requires=_FIXED_VARIANCE,
        has_beta=True,
    ),
    "dip-vae-i": Objective(
        "vae, with posterior means that are not correlated",
        "Kumar et al. (2018)",
        options=_SQUARED_ERROR,
        requires=_FIXED_VARIANCE,
        penalty=10.0,
    ),
    "dip-vae-ii": Objective(
        "vae, with codes that are not correlated",
        "Kumar et al. (2018)",
        options=_SQUARED_ERROR,
        requires=_FIXED_VARIANCE,
        penalty=10.0,
    ),
    "wae-mmd": Objective(
        "squared error of an autoencoder whose codes are distributed like the prior's",
        "Tolstikhin et al. (2018)",
        options=_SQUARED_ERROR,
        requires=_FIXED_VARIANCE,
        is_deterministic=True,
        penalty=200.0,
    ),
    "sigma-vae": Objective(
        "the bound at the variance that is optimal for each batch",
        "Rybkin et al. (2021)",
        options=_ONE_STAGE,
        requires={**_ONE_STAGE, "noise": "global", "noise_update": "closed-form"},
    ),
    "rae-l2": Objective(
        "squared error of an autoencoder with short codes",
        "Ghosh et al. (2020)",
        options=_SQUARED_ERROR,
        requires=_FIXED_VARIANCE,
        is_deterministic=True,
        penalty=1e-4,
    ),
}


class Choice(NamedTuple):
    """A noise model of stage 1, or a pair of networks.

    Args:
        summary: What it is.
        needs_images: Whether examples must be images, signals or volumes, and not rows of a table.
    """

    summary: str
    needs_images: bool = False


NOISES: dict[str, Choice] = {
    "global": Choice("one learned variance for everything"),
    "channel": Choice("one learned variance per channel", needs_images=True),
    "dimension": Choice("one learned variance per pixel or column"),
    "fixed": Choice("the variance noise_var, which is not learned"),
}

ARCHITECTURES: dict[str, Choice] = {
    "mlp": Choice("fully connected layers"),
    "conv": Choice("convolutions", needs_images=True),
    "residual": Choice("convolutions with residual blocks, slower and stronger", needs_images=True),
}


class Source(NamedTuple):
    """Where codes to decode can come from.

    Args:
        summary: What it is.
        is_fitted: Whether it is fitted to the training data when it is first asked for, and kept.
        is_judged: Whether every evaluation judges it. The others are judged when asked for.
        is_mixture: Whether it is a Gaussian mixture, which can be exported.
    """

    summary: str
    is_fitted: bool = False
    is_judged: bool = False
    is_mixture: bool = False


SOURCES: dict[str, Source] = {
    "prior": Source("the prior N(0, I)", is_judged=True, is_mixture=True),
    "gaussian": Source(
        "one Gaussian with the mean and covariance of the mixture", is_judged=True, is_mixture=True
    ),
    "mixture": Source("the run's own mixture", is_judged=True, is_mixture=True),
    "mixture=K": Source(
        "a mixture of K components, such as mixture=500", is_fitted=True, is_mixture=True
    ),
    "mixture=auto": Source(
        "a mixture whose K is chosen by held-out codes", is_fitted=True, is_mixture=True
    ),
    "mixture@T": Source(
        "a mixture whose component covariances are multiplied by T, such as mixture@0.8 or "
        "mixture=500@0.8",
        is_mixture=True,
    ),
    "flow": Source("a normalising flow (extra 'flow')", is_fitted=True),
    "aggregate": Source(
        "the exact aggregate posterior, which gives noisy reconstructions of training data"
    ),
}
