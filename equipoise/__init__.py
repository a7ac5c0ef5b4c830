"""equipoise: variational autoencoders that balance themselves.

The noise variance of the Gaussian likelihood is learned, so that reconstruction and prior find
their own balance. Samples come from a mixture that is fitted to the aggregate posterior. The method
is that of Lin, Roberts, Trigoni and Clark (2019), *Balancing Reconstruction Quality and
Regularisation in ELBO for VAEs*, arXiv 1909.03765.

Names are resolved when they are first used, so that importing the package does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from equipoise.aggregate import AggregatePosterior as AggregatePosterior
    from equipoise.aggregate import GaussianMixture as GaussianMixture
    from equipoise.aggregate import StandardNormal as StandardNormal
    from equipoise.config import TrainConfig as TrainConfig
    from equipoise.config import make_config as make_config
    from equipoise.correlated_noise import CorrelatedNoise as CorrelatedNoise
    from equipoise.data import Data as Data
    from equipoise.data import load as load_data  # noqa: F401 (re-exported under a clearer name)
    from equipoise.data import load_stream as load_stream
    from equipoise.data.packing import pack as pack
    from equipoise.digital import DigitalGaussian as DigitalGaussian
    from equipoise.digital import Levels as Levels
    from equipoise.estimator import VAEEstimator as VAEEstimator
    from equipoise.evaluation import Examples as Examples
    from equipoise.evaluation import evaluate as evaluate
    from equipoise.gaussian import Gaussian as Gaussian
    from equipoise.imputation import impute as impute
    from equipoise.imputer import VAEImputer as VAEImputer
    from equipoise.interop import from_autoencoder_kl as from_autoencoder_kl
    from equipoise.interop import read_pythae as read_pythae
    from equipoise.mixture_fit import fit_mixture as fit_mixture
    from equipoise.model import VAE as VAE
    from equipoise.model import Scaling as Scaling
    from equipoise.noise import DimensionNoise as DimensionNoise
    from equipoise.noise import FixedNoise as FixedNoise
    from equipoise.noise import GlobalNoise as GlobalNoise
    from equipoise.noise import NoiseModel as NoiseModel
    from equipoise.noise import PredictedNoise as PredictedNoise
    from equipoise.noise_fit import fit_noise as fit_noise
    from equipoise.objectives import DetachedVarianceElbo as DetachedVarianceElbo
    from equipoise.objectives import Elbo as Elbo
    from equipoise.objectives import importance_weighted_bound as importance_weighted_bound
    from equipoise.run import Run as Run
    from equipoise.sharing import push as push
    from equipoise.stages import StageSchedule as StageSchedule
    from equipoise.store import load_model as load_model
    from equipoise.store import save_model as save_model
    from equipoise.training.job import train as train

_HOMES = {
    "equipoise.aggregate": ("AggregatePosterior", "GaussianMixture", "StandardNormal"),
    "equipoise.config": ("TrainConfig", "make_config"),
    "equipoise.correlated_noise": ("CorrelatedNoise",),
    "equipoise.data": ("Data", "load_data", "load_stream"),
    "equipoise.data.packing": ("pack",),
    "equipoise.digital": ("DigitalGaussian", "Levels"),
    "equipoise.estimator": ("VAEEstimator",),
    "equipoise.evaluation": ("Examples", "evaluate"),
    "equipoise.gaussian": ("Gaussian",),
    "equipoise.imputation": ("impute",),
    "equipoise.imputer": ("VAEImputer",),
    "equipoise.interop": ("from_autoencoder_kl", "read_pythae"),
    "equipoise.mixture_fit": ("fit_mixture",),
    "equipoise.model": ("VAE", "Scaling"),
    "equipoise.noise": (
        "DimensionNoise",
        "FixedNoise",
        "GlobalNoise",
        "NoiseModel",
        "PredictedNoise",
    ),
    "equipoise.noise_fit": ("fit_noise",),
    "equipoise.objectives": ("DetachedVarianceElbo", "Elbo", "importance_weighted_bound"),
    "equipoise.run": ("Run",),
    "equipoise.sharing": ("push",),
    "equipoise.stages": ("StageSchedule",),
    "equipoise.store": ("load_model", "save_model"),
    "equipoise.training.job": ("train",),
}
_RENAMED = {"load_data": "load"}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(["__version__", *_MODULE_OF])


def __getattr__(name: str) -> Any:  # noqa: ANN401 (whatever the name stands for)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")

    module = importlib.import_module(_MODULE_OF[name])
    value = getattr(module, _RENAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
