"""``VAEEstimator``: the model as a scikit-learn estimator, for pipelines, grid searches and plain arrays.

An adapter. It checks and converts arrays, and hands them to the same training, bounds and mixture as everything else.
"""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Shaped
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from equipoise.aggregate import GaussianMixture
from equipoise.config import TrainConfig, make_config
from equipoise.data import load, load_examples
from equipoise.data.arrays import MIN_EXAMPLES
from equipoise.data.dataset import Array
from equipoise.gaussian import Gaussian
from equipoise.model import VAE, encode_all
from equipoise.objectives import importance_weighted_bound
from equipoise.randomness import stream, stream_seed
from equipoise.run import Row
from equipoise.sources import fit_aggregate, ready_source
from equipoise.store import build_model, fill, read_tensors, write_tensors
from equipoise.training.diagnostics import warnings_for
from equipoise.training.passes import EVALUATION_BATCH
from equipoise.training.setup import check_fit, make_model, make_noise
from equipoise.training.trainer import Trainer

AUTO_STEPS = 1000
AUTO_EPOCHS = (10, 200)
"""Epochs 'auto' are as many as these steps take, within these limits: more would learn a small table by heart."""
MIN_VALIDATION = 2


class Reconstruction(NamedTuple):
    r"""Where the model sees each example, and how sure it is, in the data's own unit.

    Args:
        mean: (n, \*), of the shape of the examples.
        std: standard deviation of p(x|z) per dimension, likewise.
    """

    mean: Float32[np.ndarray, "n *event"]
    std: Float32[np.ndarray, "n *event"]


class VAEEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc] # untyped
    r"""A variational autoencoder that finds its own balance, with scikit-learn's interface.

    ``fit`` is Algorithm 1 of Lin et al. (2019) and a mixture fitted to the aggregate posterior. Examples are rows of a
    table (n, features), whose columns are standardised, or images (n, H, W), (n, C, H, W) or (n, H, W, C), which are
    scaled to [0, 1]; in arrays, tensors, data frames or lists. What comes back has their shape and their unit.

    Options that :class:`equipoise.TrainConfig` has too mean the same there, where more is said about them.

    Args:
        latent_dim: number of latent units d; "auto" is 16, or half the features if there are fewer than 32.
        architecture: networks: "mlp", "conv", "residual", or "auto".
        width: size of the networks.
        noise: noise variance of stage 1: "global", "channel", "dimension" or "fixed".
        noise_var: the variance where ``noise="fixed"``, in squared model units.
        floor: smallest variance in stage 2, a multiple of stage 1's optimum, or "quantisation".
        recalibrate: rescale the predicted std on held-out examples: "none", "scale", "dimension" or "coverage".
        stage_1_epochs: epochs with one learned variance; "auto" is as many as 1,000 steps take, from 10 to 200.
        stage_2_epochs: epochs with a variance per feature and input, or 0; "auto" is half of the former.
        batch_size: examples per step.
        learning_rate: peak of the learning rate of stage 1.
        weight_decay: AdamW's decoupled weight decay; worth a search where examples are few.
        n_components: components of the mixture; "auto" chooses by held-out likelihood.
        validation_fraction: share of the examples held out to choose the mixture and for ``recalibrate``.
        accelerator: where to train: "cpu", "cuda" or "auto". A fitted model is on the CPU.
        random_state: int for the same model from the same data, a RandomState, or None.

    Attributes:
        model_: the :class:`equipoise.VAE`, on the CPU; ``model_.scaling`` is the map from the data's unit to its own.
        mixture_: the :class:`equipoise.GaussianMixture` fitted to the aggregate posterior, eq. (13).
        noise_var_: variance of stage 1, eq. (10), in squared model units: the share of their variance that
            standardised columns keep unexplained. A number, or an array where ``noise`` is of channels or dimensions.
        history_: figures of each epoch, as in a run's ``metrics.jsonl``.
        n_features_in_: number of features, or of pixel values, of an example.
        feature_names_in_: names of a data frame's columns, if they are strings.
        example_shape_: shape of one example as it came.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> x = load_iris().data
        >>> vae = VAEEstimator(stage_1_epochs=50, stage_2_epochs=0, random_state=0).fit(x)
        >>> vae.transform(x).shape, vae.reconstruct(x).std.shape, vae.sample(3).shape
        ((150, 2), (150, 4), (3, 4))
    """

    def __init__(
        self,
        *,
        latent_dim: int | Literal["auto"] = "auto",
        architecture: Literal["auto", "mlp", "conv", "residual"] = "auto",
        width: int = 32,
        noise: Literal["global", "channel", "dimension", "fixed"] = "global",
        noise_var: float | None = None,
        floor: float | Literal["quantisation"] = 1.0,
        recalibrate: Literal["none", "scale", "dimension", "coverage"] = "none",
        stage_1_epochs: int | Literal["auto"] = "auto",
        stage_2_epochs: int | Literal["auto"] = "auto",
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.0,
        n_components: int | Literal["auto"] = "auto",
        validation_fraction: float = 0.1,
        accelerator: Literal["auto", "cpu", "cuda"] = "auto",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.latent_dim = latent_dim
        self.architecture = architecture
        self.width = width
        self.noise = noise
        self.noise_var = noise_var
        self.floor = floor
        self.recalibrate = recalibrate
        self.stage_1_epochs = stage_1_epochs
        self.stage_2_epochs = stage_2_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.n_components = n_components
        self.validation_fraction = validation_fraction
        self.accelerator = accelerator
        self.random_state = random_state

    def fit(self, x: object, y: object = None) -> "VAEEstimator":
        r"""Train a model from scratch.

        Args:
            x: examples, (n, features) or images, at least 10.
            y: ignored.

        Returns:
            The estimator.

        Raises:
            ValueError: if the examples or the options cannot be used; says why and what to do.
        """
        examples = self._array(x, reset=True)
        self.history_: list[Row] = []
        trainer = self._train(examples, self._config(len(examples)), None)
        figures = trainer.figures(trainer.validation)
        for text in warnings_for(figures, trainer.data_var, trainer.model.noise.depends_on_code):
            warnings.warn(text, ConvergenceWarning, stacklevel=2)
        return self._finish(trainer)

    def partial_fit(self, x: object, y: object = None) -> "VAEEstimator":
        r"""Train on a chunk of a stream: one epoch of stage 1, from where the chunk before left the model.

        The learning rate warms up and decays within the chunk, the noise variance becomes eq. (10) over the chunk, and
        the mixture is fitted to its codes. The unit of the data is that of the first chunk. A stream has no end at
        which stage 2 could begin; a model that has been through it goes back to stage 1.

        Args:
            x: examples as for :meth:`fit`, at least 10; hundreds to thousands make good chunks.
            y: ignored.

        Returns:
            The estimator.
        """
        model: VAE | None = getattr(self, "model_", None)
        examples = self._array(x, reset=model is None)
        if model is None:
            self.history_ = []
        config = replace(
            self._config(len(examples)), stage_1_epochs=1, stage_2_epochs=0, recalibrate="none"
        )
        return self._finish(self._train(examples, config, model))

    def transform(self, x: object) -> Float32[np.ndarray, "n latent"]:
        """Encode: the means of q(z|x).

        Args:
            x: examples as in :meth:`fit`.

        Returns:
            Codes, (n, d).
        """
        codes: Float32[np.ndarray, "n latent"] = self._encode(x).numpy()
        return codes

    def inverse_transform(self, z: object) -> Float32[np.ndarray, "n *event"]:
        r"""Decode: the means of p(x|z).

        Args:
            z: codes, (n, d).

        Returns:
            (n, \*), in the data's own unit.

        Raises:
            ValueError: if the codes are of another dimension.
        """
        check_is_fitted(self, "model_")
        codes = check_array(z, dtype=np.float32)
        if codes.shape[1] != self.model_.latent_dim:
            raise ValueError(
                f"expected codes of shape (n, {self.model_.latent_dim}), got {codes.shape}"
            )
        return self._as_given(self.model_.scaling.restore(self._decode(torch.tensor(codes)).mean))

    def reconstruct(self, x: object) -> Reconstruction:
        """Encode and decode: where the model sees x, and how sure it is.

        Args:
            x: examples as in :meth:`fit`.

        Returns:
            Mean and std in the data's own unit.
        """
        seen, scaling = self._decode(self._encode(x)), self.model_.scaling
        return Reconstruction(
            self._as_given(scaling.restore(seen.mean)),
            self._as_given(scaling.restore_std(seen.std)),
        )

    def predict_std(self, x: object) -> Float32[np.ndarray, "n *event"]:
        r"""Predict how far each value may lie from its reconstruction.

        Args:
            x: examples as in :meth:`fit`.

        Returns:
            Standard deviations, (n, \*), in the data's own unit.
        """
        return self.reconstruct(x).std

    def sample(
        self, n: int = 1, source: str = "mixture", *, noise: bool = False
    ) -> Shaped[np.ndarray, "{n} *event"]:
        r"""Make new examples. The same ones each time if ``random_state`` is an int.

        Args:
            n: how many.
            source: Where codes come from: "mixture", "gaussian" for one Gaussian with the mixture's
                mean and covariance, or "prior" for N(0, I).
            noise: add the noise of p(x|z). Without it samples are means, which look best as images but spread less
                than the rows of a table do.

        Returns:
            (n, \*), in the data's own unit; rounded if the data are images of grey levels.

        Raises:
            ValueError: if there is no such source, or nothing to draw.
        """
        check_is_fitted(self, "model_")
        if n < 1:
            raise ValueError(f"expected n >= 1 samples, got {n}")
        density = ready_source(source, self.mixture_)

        generator = stream(self._seed(), "samples")
        likelihood = self._decode(density.sample(n, generator).float())
        samples = likelihood.sample(generator) if noise else likelihood.mean
        return self._as_given(self.model_.scaling.restore_levels(samples))

    def score_samples(self, x: object, importance_samples: int = 20) -> Float64[np.ndarray, " n"]:
        r"""Bound the log-density of each example from below by importance weighting; low values are odd.

        .. math:: \log p(x) \ge \log \frac1K \sum_k \frac{p(x|z_k)\, p(z_k)}{q(z_k|x)} - \sum_i \log s_i

        It is the density of the data in their own unit, so that models of differently scaled data compare: s is the
        scale by which the model divides each feature. All examples get the same draws, hence a score does not depend
        on the others.

        Args:
            x: examples as in :meth:`fit`.
            importance_samples: K; the bound grows with it. One estimates the ELBO, eq. (4); 20 is the paper's Table 3.

        Returns:
            (n,), nats.
        """
        raw, model = self._raw(x), self.model_
        log_scale = float(model.scaling.scale.log().expand(model.shape).sum())
        bounds = [
            importance_weighted_bound(
                model, example, importance_samples, torch.Generator().manual_seed(0)
            )
            for example in torch.split(model.scaling(raw), 1)
        ]
        found: Float64[np.ndarray, " n"] = torch.cat(bounds).numpy() - log_scale
        return found

    def score(self, x: object, y: object = None) -> float:
        """Mean of :meth:`score_samples`, by which grid searches choose.

        Args:
            x: examples as in :meth:`fit`, best not those.
            y: ignored.

        Returns:
            Nats per example.
        """
        return float(self.score_samples(x).mean())

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file, whole.

        Args:
            path: the file.
        """
        check_is_fitted(self, "model_")
        description = {
            "model": self.model_.description(),
            "options": self._options(),
            "random_state": self.random_state if isinstance(self.random_state, int) else None,
            "history": self.history_,
            "example_shape": list(self.example_shape_),
            "feature_names": list(getattr(self, "feature_names_in_", [])),
        }
        parts = nn.ModuleDict({"model": self.model_, "mixture": self.mixture_})
        write_tensors(Path(path), "estimator", parts.state_dict(), description)

    @classmethod
    def load(cls, path: str | Path) -> "VAEEstimator":
        """Read what :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            The fitted estimator.

        Raises:
            StoreError: if the file is damaged or holds something else.
        """
        tensors, description = read_tensors(Path(path), "estimator")
        estimator = cls(**description["options"], random_state=description["random_state"])
        mixture = {
            name: tensors.pop(f"mixture.{name}") for name in ("weights", "means", "covariances")
        }
        model = build_model(description["model"], what=str(path))
        fill(
            model,
            {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
            str(path),
        )
        estimator.history_ = description["history"]
        estimator.example_shape_ = tuple(description["example_shape"])
        estimator.n_features_in_ = math.prod(estimator.example_shape_)
        if description["feature_names"]:
            estimator.feature_names_in_ = np.array(description["feature_names"], object)
        return estimator._adopt(model, GaussianMixture(**mixture))

    @property
    def _n_features_out(self) -> int:
        return self.model_.latent_dim

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _options(self) -> dict[str, Any]:
        """Constructor arguments that say how to train; numbers of NumPy, as grids have them, become Python's."""
        options = {
            name: value
            for name, value in self.get_params(deep=False).items()
            if name != "random_state"
        }
        return {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in options.items()
        }

    def _config(self, n_examples: int) -> TrainConfig:
        options = self._options()
        auto = [name for name in ("stage_1_epochs", "stage_2_epochs") if options[name] == "auto"]
        config = make_config({name: value for name, value in options.items() if name not in auto})
        least, most = AUTO_EPOCHS
        stage_1_epochs = min(
            max(AUTO_STEPS // math.ceil(n_examples / config.batch_size), least), most
        )
        epochs: dict[str, Any] = {
            "stage_1_epochs": stage_1_epochs,
            "stage_2_epochs": stage_1_epochs // 2,
        }
        # An epoch of a small table is a step or two, over which everything seems to have converged.
        return replace(
            config, tolerance=0.0, seed=self._seed(), **{name: epochs[name] for name in auto}
        )

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31))

    def _train(self, examples: Array, config: TrainConfig, model: VAE | None) -> Trainer:
        held_out = max(config.validation_fraction, MIN_VALIDATION / len(examples))
        data = load(examples, test_fraction=0.0, validation_fraction=held_out)
        # Tests are the caller's business: the trainer's own are of the validation set, and left out of the history.
        data = replace(data, test=data.validation)
        check_fit(data, config, min_train=MIN_EXAMPLES - MIN_VALIDATION)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            torch.manual_seed(stream_seed(config.seed, "weights"))
            if model is None:
                model = make_model(data, config)
            elif model.noise.depends_on_code and model.noise.shared_log_var is not None:
                # The stream goes on in stage 1, from the variance that stage 2 started at.
                shared_var = model.noise.shared_log_var.exp()
                model.noise = make_noise(data, config)
                model.noise.set_var(shared_var)

            trainer = Trainer(model, data, config)
            history = trainer.fit()
        self.history_ += [
            {name: row[name] for name in row if not name.startswith("test_")} for row in history
        ]
        return trainer

    def _finish(self, trainer: Trainer) -> "VAEEstimator":
        model = trainer.model.eval()
        mixture = fit_aggregate(model, trainer.data, trainer.config, trainer.fabric.device).mixture
        return self._adopt(model.cpu(), mixture.cpu())

    def _adopt(self, model: VAE, mixture: GaussianMixture) -> "VAEEstimator":
        self.model_, self.mixture_ = model, mixture

        shared_log_var = model.noise.shared_log_var
        if shared_log_var is None:
            shared_log_var = torch.tensor(self.history_[-1]["validation_noise_var"]).log()
        self.noise_var_ = shared_log_var.detach().exp().numpy()[()]
        return self

    def _array(self, x: object, *, reset: bool) -> Array:
        """Check examples by scikit-learn's rules, which are for tables, and against the shape that is known."""
        if isinstance(x, Tensor):
            x = (x.float() if x.is_floating_point() else x).detach().cpu().numpy()
        shape: tuple[int, ...] = x.shape if hasattr(x, "shape") else np.asarray(x).shape
        if len(shape) > 2:
            x = np.asarray(x).reshape(shape[0], math.prod(shape[1:]))
        least = {"ensure_min_samples": MIN_EXAMPLES, "ensure_min_features": 2} if reset else {}
        checked: Array = validate_data(self, x, reset=reset, **least)
        example_shape = shape[1:] if len(shape) > 2 else checked.shape[1:]
        if reset:
            self.example_shape_ = example_shape
        elif example_shape != self.example_shape_:
            raise ValueError(
                f"expected examples of shape {self.example_shape_}, as in fit, got {example_shape}"
            )
        return checked.reshape(-1, *example_shape)

    def _raw(self, x: object) -> Tensor:
        """Check examples that the fitted model is to be applied to."""
        check_is_fitted(self, "model_")
        raw = torch.from_numpy(load_examples(self._array(x, reset=False), self.model_.shape)[:])
        self.model_.scaling.check(raw)
        return raw

    def _encode(self, x: object) -> Tensor:
        raw = self._raw(x)
        return encode_all(self.model_, torch.split(raw, EVALUATION_BATCH)).mean

    @torch.no_grad()
    def _decode(self, codes: Tensor) -> Gaussian:
        """Likelihoods in model units, a batch at a time."""
        parts = [self.model_.decode(batch) for batch in torch.split(codes, EVALUATION_BATCH)]
        return Gaussian(
            torch.cat([p.mean for p in parts]),
            torch.cat([p.log_var.expand_as(p.mean) for p in parts]),
        )

    def _as_given(self, examples: Tensor) -> Array:
        """Bring examples of the model's shape, (n, C, H, W) or (n, D), to the shape in which they came."""
        array = examples.numpy()
        if array.shape[1:] != self.example_shape_:  # grey images without channels, or channels last
            array = np.moveaxis(array, 1, -1).reshape(-1, *self.example_shape_)
        return array
