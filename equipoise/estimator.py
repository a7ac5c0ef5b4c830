"""``VAEEstimator``: the model as a scikit-learn estimator.

It takes plain arrays, and works in pipelines and grid searches. It only checks and converts arrays.
Training, bounds and mixture are those of the other modules.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64
from numpy.typing import NDArray
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    OutlierMixin,
    TransformerMixin,
    clone,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold
from sklearn.utils import Tags, check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from equipoise.aggregate import GaussianMixture
from equipoise.categories import Likelihood, joined, mode_of
from equipoise.config import EARLIER_VALUES, TrainConfig, make_config
from equipoise.conformal import conformal_p_values
from equipoise.contamination import near_rows
from equipoise.correlated_noise import CorrelatedNoise
from equipoise.data import Data, load, load_examples
from equipoise.data.arrays import MIN_EXAMPLES, as_array, refuse_hidden
from equipoise.data.batches import as_tensor
from equipoise.data.dataset import Array
from equipoise.data.labels import name_of
from equipoise.data.levels import as_frame, encode_frame, new_frame
from equipoise.estimate import Estimate
from equipoise.files import StoreError
from equipoise.gaps import column_means, column_vars
from equipoise.gaussian import standard_normal_log_prob
from equipoise.held_out import MAX_REFERENCE, judged_scores, log_densities
from equipoise.labels import has_label, label_number, unlabelled
from equipoise.levels import Level, level_values
from equipoise.metrics.explanation import Explanation, explain
from equipoise.model import VAE, encode_all
from equipoise.noise_fit import (
    CorrelationFit,
    choose_form,
    fit_correlation,
    without_each_fold,
)
from equipoise.objectives import LogPrior, importance_weighted_bounds
from equipoise.randomness import stream, stream_seed
from equipoise.records import EstimatorDescription
from equipoise.run import Row
from equipoise.sources import fit_aggregate, mixture_warnings, ready_source, sample_source
from equipoise.store import (
    read_tensors,
    restore_mixture,
    restore_model,
    write_tensors,
)
from equipoise.threshold import Threshold
from equipoise.training.diagnostics import warnings_for
from equipoise.training.passes import EVALUATION_BATCH
from equipoise.training.setup import (
    check_fit,
    latent_dim_of_varying,
    make_model,
    make_noise,
)
from equipoise.training.trainer import Trainer

AUTO_STEPS = 1000
"""Number of optimiser steps in stage 1 if its number of epochs is "auto"."""
AUTO_EPOCHS = (10, 200)
"""Smallest and largest number of epochs that "auto" chooses for stage 1.

More epochs would make the model learn a small table by heart."""
AUTO_VALIDATION, AUTO_SHARES = 50, (0.1, 0.25)
"""Examples that are held out if their share is "auto", and the smallest and largest share."""
PRIOR_EXAMPLES, PRIOR_SAMPLES = 200, 20
"""Held-out examples that choose p(z), and codes drawn for each."""
CHUNK_SHIFT = 5.0
"""Mean or std of a column of a chunk, in std of the first chunk, that is worth a word."""
DECISIONS = ("false_alarm_rate", "contamination")
"""Options of the threshold, which no other class has."""
DECISION = "held_out."
"""Prefix of the tensors in a file by which examples are judged."""
MIN_VALIDATION = 2
"""Smallest number of examples in the validation set."""
CONTAMINATION_FOLDS = 3
"""Models that tell each other's outliers before the one that is kept is trained."""
LEFT_OUT = 2.0
"""Rows that they are not trained on because a Gaussian finds them odd, per supposed outlier."""


class Reconstruction(NamedTuple):
    r"""Reconstructed examples and their predicted errors, in the data's own unit.

    Args:
        mean: Mean of p(x|z), (n, \*), in the shape of the examples; a data frame with the most
            probable level of each category if there are some.
        std: Standard deviation of p(x|z) per dimension, (n, \*), in the shape of the examples.
    """

    mean: Any
    std: Float32[np.ndarray, "n *event"]


# scikit-learn has no types.
class VAEEstimator(
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    OutlierMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    r"""A variational autoencoder that finds its own balance, with scikit-learn's interface.

    ``fit`` trains by Algorithm 1 of Lin et al. (2019) and fits a mixture to the aggregate
    posterior. Examples are rows of a table (n, features), whose columns are standardised, or images
    (n, H, W), (n, C, H, W) or (n, H, W, C), which are scaled to [0, 1]. They may come in an array,
    a tensor, a data frame or a list. All results have the shape and the unit of the examples. NaN
    in a table is a missing value, in training and afterwards: only what is observed counts, and
    :class:`equipoise.VAEImputer` fills the gaps. Columns of text, flags and categories of a data
    frame of pandas or polars are categories: they get probabilities, and rows come back as such
    frames.

    An option that :class:`equipoise.TrainConfig` has too means the same in both classes. The
    documentation of :class:`equipoise.TrainConfig` is more detailed.

    Args:
        latent_dim: Number of latent units d. "auto" is 16, or half the features if there are fewer
            than 32.
        architecture: Architecture of the networks, "mlp", "conv", "residual" or "auto".
        width: Width of the networks.
        noise: Noise variance of stage 1, "global", "channel", "dimension" or "fixed".
        noise_var: The variance if ``noise="fixed"``, in squared model units.
        variance_from: Whose residuals eq. (10) is taken over, "held-out" or "training".
        floor: Smallest variance in stage 2, as a multiple of the optimum of stage 1, or
            "quantisation". None takes "quantisation" for digital images, 1.0 for others and 0.1 for
            tables.
        recalibrate: How the predicted std is calibrated on held-out examples, "none", "monotone",
            "scale", "dimension" or "coverage". None takes "monotone" for digital images, and "none"
            otherwise.
        power_transform: Whether skewed columns are made symmetric by Yeo and Johnson's power
            transform, where held-out values become more likely by it. Scores contain its slope, and
            reconstructions are medians.
        noise_correlation: Correlation of the errors, estimated on held-out examples after
            training, "none", "full", "low-rank", "bands" or "auto". None takes "auto" for tables
            and "none" for images.
        stage_1_epochs: Number of epochs with one learned variance. "auto" is the number that 1,000
            steps take, but at least 10 and at most 200.
        stage_2_epochs: Number of epochs with a variance per feature and example; 0 leaves stage 2
            out. "auto" is half of what "auto" is for ``stage_1_epochs``.
        batch_size: Number of examples per step, or "auto" for at least 32 steps an epoch.
        learning_rate: Peak of the learning rate of stage 1.
        weight_decay: AdamW's decoupled weight decay. If there are few examples, it is worth a
            search.
        keep_weights: Weights that a stage ends with, those of the "best" epoch by the ELBO of the
            held-out examples, or of the "last".
        early_stopping: Number of epochs without a higher held-out ELBO after which a stage ends.
            None takes a third of its epochs, and at least 10; 0 never stops.
        n_components: Number of components of the mixture. "auto" chooses it by the likelihood of
            held-out codes.
        validation_fraction: Share of the examples that are held out: for the noise variance and
            the correlation of the errors, to choose the mixture, and to recalibrate. "auto" is a
            tenth, or as much as makes 50 examples, but at most a quarter.
        conditional: Whether the model is one of x given the labels y, which :meth:`fit` then needs:
            text or whole numbers; None, NaN and numbers below 0 are unknown labels. Otherwise y is
            ignored.
        label_dropout: Share of the examples of a step whose label is withheld, so that the model
            also describes examples without one.
        false_alarm_rate: Share of ordinary examples that :meth:`predict` may call odd. The
            threshold is conformal: a score as low has a p-value of at most this share among
            held-out examples. None takes 0.05, or the smallest p-value 1 / (m + 1) that m held-out
            examples can give if that is larger.
        contamination: Share of the table that is outliers, above 0 and at most 0.5. Each third of
            the table is scored by a model of the other two, without the rows that are furthest from
            a robust Gaussian, twice that share. The examples with the lowest scores are left out of
            the training, and the threshold is the quantile of these scores. It takes about four
            times as long. None trains on all.
        accelerator: Device to train on, "cpu", "cuda" or "auto". A fitted model is on the CPU.
        random_state: Seed or source of randomness. An int gives the same model from the same data.
            With a RandomState or None, each fit gives another model.

    Attributes:
        model_: The :class:`equipoise.VAE`, on the CPU. ``model_.scaling`` is the map between the
            data's own unit and model units.
        mixture_: The :class:`equipoise.GaussianMixture` fitted to the aggregate posterior, eq.
            (13).
        prior_: The density of codes p(z) in :meth:`score_samples`: "mixture" if with it held-out
            examples are more likely than with N(0, I), beyond the error of the difference, and
            "prior" otherwise.
        noise_var_: Variance of stage 1, eq. (10), in squared model units. For standardised columns
            it is the share of their variance that the model leaves unexplained; constant columns do
            not count. It is an array if
            ``noise`` is "channel" or "dimension", and a number otherwise.
        overfitting_: How many times as large as that of the training examples the squared error of
            held-out examples is, at the end of stage 1. It is 1 if nothing was learned by heart, or
            if ``variance_from="training"``.
        noise_correlation_: Form of the correlation of the errors, "none", "full", "low-rank" or
            "bands": what was chosen if ``noise_correlation`` is "auto" or None.
        label_names_: Names of the labels of a conditional model, otherwise empty.
        offset_: Score below which an example without gaps and label is odd, nats.
            ``decision_function`` is the score minus this number, or one that is found likewise.
        false_alarm_rate_: The rate that ``offset_`` has, see ``false_alarm_rate``. NaN if
            ``contamination`` set the threshold.
        held_out_scores_: Scores of held-out examples, at most 1,000, in ascending order. Where at
            least 20 have no gaps, and enough for the rate, theirs alone.
        table_scores_: Score of each example of the table by a model that was trained on another
            part of it, (n,), if ``contamination`` is given: log p(x), or log p(x|y) where a label
            is known. Not in the file of :meth:`save`.
        usual_: Which examples of the table were trained on, (n,), if ``contamination`` is given.
            Not in the file of :meth:`save`.
        history_: Figures of each epoch, as in ``metrics.jsonl`` of a run.
        n_features_in_: Number of features or of pixel values of an example.
        feature_names_in_: Names of the columns of a data frame, if they are strings.
        example_shape_: Shape of one example in the data passed to ``fit``.

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
        variance_from: Literal["held-out", "training"] = "held-out",
        floor: float | Literal["quantisation"] | None = None,
        recalibrate: Literal["none", "monotone", "scale", "dimension", "coverage"] | None = None,
        power_transform: bool = False,
        noise_correlation: Literal["none", "full", "low-rank", "bands", "auto"] | None = None,
        stage_1_epochs: int | Literal["auto"] = "auto",
        stage_2_epochs: int | Literal["auto"] = "auto",
        batch_size: int | Literal["auto"] = 256,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.0,
        keep_weights: Literal["best", "last"] = "best",
        early_stopping: int | None = None,
        n_components: int | Literal["auto"] = "auto",
        validation_fraction: float | Literal["auto"] = "auto",
        conditional: bool = False,
        label_dropout: float = 0.1,
        false_alarm_rate: float | None = None,
        contamination: float | None = None,
        accelerator: Literal["auto", "cpu", "cuda"] = "auto",
        random_state: int | np.integer[Any] | np.random.RandomState | None = None,
    ) -> None:
        self.latent_dim = latent_dim
        self.architecture = architecture
        self.width = width
        self.noise = noise
        self.noise_var = noise_var
        self.variance_from = variance_from
        self.floor = floor
        self.recalibrate = recalibrate
        self.power_transform = power_transform
        self.noise_correlation = noise_correlation
        self.stage_1_epochs = stage_1_epochs
        self.stage_2_epochs = stage_2_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.keep_weights = keep_weights
        self.early_stopping = early_stopping
        self.n_components = n_components
        self.validation_fraction = validation_fraction
        self.conditional = conditional
        self.label_dropout = label_dropout
        self.false_alarm_rate = false_alarm_rate
        self.contamination = contamination
        self.accelerator = accelerator
        self.random_state = random_state

    def fit(self, x: object, y: object = None) -> "VAEEstimator":
        r"""Train a model from scratch.

        Args:
            x: Examples, at least 10, rows of a table (n, features) or images.
            y: Label of each example if ``conditional``. Ignored otherwise.

        Returns:
            The estimator.

        Raises:
            ValueError: If the examples or the options cannot be used. The message says why.
        """
        x = self._encoded_frame(x, reset=True)
        examples = self._array(x, reset=True)
        if self.conditional and y is None:
            raise ValueError("conditional=True needs a label for each example: give y")
        self._check_decision()
        labels = _as_labels(y) if self.conditional else None
        if labels is not None and len(labels) != len(examples):
            raise ValueError(f"{len(labels)} labels for {len(examples)} examples; give one each")
        if self.contamination is None:
            return self._fit_array(examples, labels)

        plain, self.table_scores_ = self._cross_fitted(examples, labels, self.contamination)
        self.usual_ = self.table_scores_ >= np.quantile(self.table_scores_, self.contamination)
        self._fit_array(examples[self.usual_], _chosen(labels, self.usual_))
        offset, labelled = (
            float(np.quantile(scores, self.contamination)) for scores in (plain, self.table_scores_)
        )
        labelled_offset = None if labels is None else labelled
        return self._judge_by(self._threshold.moved_to(offset, labelled_offset))

    def _fit_array(self, examples: Array, labels: list[Any] | None) -> "VAEEstimator":
        """Train on examples that are checked, with the numbers of levels for categories."""
        config = self._config(len(examples))
        self.history_: list[Row] = []
        trainer = self._train(examples, config, None, labels, stacklevel=4)

        figures = trainer.figures(trainer.validation)
        depends_on_code = trainer.model.noise.depends_on_code
        overfitting = trainer.overfitting
        for text in warnings_for(
            figures, trainer.data_var, depends_on_code, overfitting, trainer.counted_share
        ):
            warnings.warn(text, ConvergenceWarning, stacklevel=3)
        return self._finish(trainer, stacklevel=4)

    def fit_predict(self, x: object, y: object = None) -> NDArray[np.int64]:
        """Fit to a table, and call each of its rows odd or usual.

        Args:
            x: Examples as for :meth:`fit`.
            y: Label of each example if ``conditional``, for the training. Ignored otherwise.

        Returns:
            -1 for odd examples and 1 for usual ones, (n,). With ``contamination`` it is by the
            scores of models that were trained on other parts of the table, and otherwise by
            :meth:`predict`.
        """
        self.fit(x, y)
        if self.contamination is None:
            return self.predict(x)
        return np.where(self.usual_, 1, -1)

    def partial_fit(self, x: object, y: object = None) -> "VAEEstimator":
        r"""Train on a chunk of a stream: one epoch of stage 1 that continues from the last chunk.

        The learning rate warms up and decays within the chunk. The noise variance becomes eq. (10)
        over the chunk, and the mixture is fitted to the codes of the chunk. The scaling of the data
        is that of the first chunk; a warning names a later chunk that is far from it. A stream has
        no end at which stage 2 could begin, so a model that has been through stage 2 goes back to
        stage 1.

        Args:
            x: Examples as for :meth:`fit`, at least 10. Good chunks have hundreds to thousands.
            y: Ignored.

        Returns:
            The estimator.

        Raises:
            ValueError: If the examples or the options cannot be used, or ``contamination`` is
                given.
        """
        if self.conditional:
            raise ValueError("a conditional model is trained on all examples at once: take fit")
        if self.contamination is not None:
            raise ValueError("contamination is for fit: partial_fit sees one chunk at a time")
        self._check_decision()
        model: VAE | None = getattr(self, "model_", None)
        x = self._encoded_frame(x, reset=model is None)
        examples = self._array(x, reset=model is None)
        if model is None:
            self.history_ = []

        config = self._config(len(examples))
        config = replace(config, stage_1_epochs=1, stage_2_epochs=0, recalibrate="none")
        trainer = self._train(examples, config, model)
        return self._finish(trainer)

    def transform(self, x: object, y: object = None) -> Float32[np.ndarray, "n latent"]:
        """Encode examples by the means of q(z|x), or of q(z|x, y).

        Args:
            x: Examples as for :meth:`fit`.
            y: Labels of the examples if ``conditional``. None means that they are unknown.

        Returns:
            Codes, (n, d).
        """
        codes: Float32[np.ndarray, "n latent"] = self._encode(x, y).numpy()
        return codes

    def inverse_transform(self, z: object) -> Any:  # noqa: ANN401 (an array, or a frame)
        r"""Decode codes by the means of p(x|z).

        Args:
            z: Codes, (n, d).

        Returns:
            Examples, (n, \*), in the data's own unit; a data frame if there are categories.

        Raises:
            ValueError: If the codes have another dimension than d.
        """
        check_is_fitted(self, "model_")

        codes = check_array(z, dtype=np.float32)
        if codes.shape[1] != self.model_.latent_dim:
            raise ValueError(
                f"expected codes of shape (n, {self.model_.latent_dim}), got {codes.shape}"
            )

        likelihood = self._decode(torch.tensor(codes))
        return self.as_given(
            self._in_original_shape(self.model_.scaling.restore(mode_of(likelihood)))
        )

    def reconstruct(self, x: object, y: object = None) -> Reconstruction:
        """Encode examples and decode the codes.

        Args:
            x: Examples as for :meth:`fit`.
            y: Labels of the examples if ``conditional``. None means that they are unknown.

        Returns:
            Mean and std of p(x|z), in the data's own unit. Categories have the most probable
            level in place of a mean, and NaN in place of a std.
        """
        likelihood = self._decode(self._encode(x, y))
        mean = self.model_.scaling.restore(mode_of(likelihood))
        std = self.model_.scaling.restore_std(likelihood.std, likelihood.mean)
        return Reconstruction(
            self.as_given(self._in_original_shape(mean), x), self._in_original_shape(std)
        )

    def predict_std(self, x: object) -> Float32[np.ndarray, "n *event"]:
        r"""Predict how far each value may lie from its reconstruction.

        Args:
            x: Examples as for :meth:`fit`.

        Returns:
            Standard deviations, (n, \*), in the data's own unit.
        """
        return self.reconstruct(x).std

    def sample(
        self,
        n: int = 1,
        source: str = "mixture",
        *,
        noise: bool = False,
        label: object = None,
    ) -> Any:  # noqa: ANN401 (an array, or a frame)
        r"""Draw new examples. If ``random_state`` is an int, each call draws the same ones.

        Args:
            n: Number of examples, at least 1.
            source: Source of the codes. "mixture", "mixture@0.8" for the mixture with its component
                covariances times 0.8, "gaussian" for one Gaussian with the mixture's mean and
                covariance, or "prior" for N(0, I).
            noise: Whether to add the noise of p(x|z). Without it the samples are means, which look
                best as images, but vary less than the rows of a table do.
            label: Label of all examples, of a conditional model. None draws labels by their share.

        Returns:
            Examples, (n, \*), in the data's own unit. Those of images are rounded to whole numbers.
            Rows with categories come in a data frame.

        Raises:
            ValueError: If there is no such source or label, or if ``n`` is less than 1.
        """
        check_is_fitted(self, "model_")
        if n < 1:
            raise ValueError(f"expected n >= 1 samples, got {n}")
        density = ready_source(source, self.mixture_)
        number = None
        if label is not None:
            number = label_number(self.label_names_, name_of(label) or "")

        generator = stream(self._seed(), "samples")
        likelihood = self._decode(sample_source(density, n, generator, number).float())
        samples = likelihood.sample(generator) if noise else mode_of(likelihood)
        return self.as_given(self._in_original_shape(self.model_.scaling.restore_levels(samples)))

    def score_samples(
        self, x: object, importance_samples: int = 20, *, y: object = None
    ) -> Float64[np.ndarray, " n"]:
        r"""Bound the log-density of each example from below by importance weighting.

        .. math:: \log p(x) \ge \log \frac1K \sum_k \frac{p(x|z_k)\, p(z_k)}{q(z_k|x)}
            - \sum_i \log s_i

        An example with a low score is unusual. The score is a density of the data in their own
        unit, and s_i is the scale by which the model divides feature i. Missing values, NaN, are
        left out of p(x|z) and of the sum: the score of a row with gaps is the density of what is
        observed, and that of a row without any value is at most about 0. Models that scale
        the same data differently can be compared. p(z) is the density :attr:`prior_`. The random
        draws of an example follow from its values, so that its score does not depend on the other
        examples, but for the rounding of float32.

        Args:
            x: Examples as for :meth:`fit`.
            importance_samples: Number of samples K per example. The bound grows with K. K = 1
                estimates the evidence lower bound, eq. (4); K = 20 is used in Table 3 of the paper.
            y: Labels of the examples if ``conditional``: the density is then p(x|y). None, or an
                unknown label, means p(x).

        Returns:
            The bounds, (n,), nats.
        """
        return self._scores(self._raw(x, y), importance_samples)

    def score(self, x: object, y: object = None) -> float:
        """Average :meth:`score_samples` over the examples. Grid searches maximise this score.

        Each example has draws of its own, so that those of n examples average out: the mean is as
        far from that of other draws as the std of a score over draws, divided by the root of n.

        Args:
            x: Examples as for :meth:`fit`, preferably other examples than those of :meth:`fit`.
            y: Labels of the examples if ``conditional``. Ignored otherwise.

        Returns:
            Nats per example. Minus infinity if an example is so odd that its density is too small
            for a number; a warning names it.
        """
        scores = self.score_samples(x, y=y if self.conditional else None)
        far = np.flatnonzero(np.isneginf(scores))
        if len(far) > 0:
            warnings.warn(
                f"The mean is minus infinity, because {len(far)} of {len(scores)} examples have "
                f"no density left, the first in row {far[0]}: their values are far from all of "
                "the training. Check them; score_samples gives the scores of the others.",
                stacklevel=2,
            )
        return float(scores.mean())

    def decision_function(self, x: object, *, y: object = None) -> Float64[np.ndarray, " n"]:
        """Subtract the threshold from :meth:`score_samples`. Odd examples are below zero.

        A row with gaps has the density of what is observed, which is another number than that of a
        complete row. Its threshold is therefore that of held-out rows with the same gaps. So is
        that of an example whose label is known: it is odd if it is odd for its label.

        Args:
            x: Examples as for :meth:`fit`.
            y: Labels of the examples if ``conditional``. None means that they are unknown.

        Returns:
            Differences, (n,), nats; minus infinity for an example whose density is too small for a
            number.

        Raises:
            ValueError: If rows have gaps, and the estimator was loaded from a file and fitted to a
                table without.
        """
        raw = self._raw(x, y)
        scores = self._scores(raw)
        for rows, held_out in self._kinds(raw):
            with_label = bool(has_label(raw)[torch.from_numpy(rows)].any())
            scores[rows] -= self._threshold.below(held_out, with_label=with_label)
        return scores

    def predict(self, x: object, *, y: object = None) -> NDArray[np.int64]:
        """Call each example odd or usual by the threshold.

        Args:
            x: Examples as for :meth:`fit`.
            y: Labels of the examples if ``conditional``. None means that they are unknown.

        Returns:
            -1 for odd examples and 1 for usual ones, (n,).
        """
        return np.where(self.decision_function(x, y=y) < 0, -1, 1)

    def p_values(self, x: object, *, y: object = None) -> Float64[np.ndarray, " n"]:
        """Compare each example with held-out ones.

        Args:
            x: Examples as for :meth:`fit`.
            y: Labels of the examples if ``conditional``. None means that they are unknown.

        Returns:
            Conformal p-values, (n,), see :func:`equipoise.conformal.conformal_p_values`. Rows with
            gaps are compared with rows of the same gaps, and examples with a label by log p(x|y).
        """
        raw = self._raw(x, y)
        scores = self._scores(raw)
        p_values = np.empty(len(raw))
        for rows, held_out in self._kinds(raw):
            p_values[rows] = conformal_p_values(scores[rows], held_out)
        return p_values

    def calibrate(self, x: object, y: object = None) -> "VAEEstimator":
        """Set the threshold by examples of your own that had no part in the training.

        The held-out examples of :meth:`fit` also decide on the noise variance, the mixture and the
        weights that are kept. Those given here decide on nothing else, so that the rate of false
        alarms is at most ``false_alarm_rate_`` without approximation.

        Args:
            x: Ordinary examples as for :meth:`fit`, at least 1 / ``false_alarm_rate`` - 1.
            y: Labels of the examples if ``conditional``. Without them, examples with a label are
                compared with nothing, and cannot be judged.

        Returns:
            The estimator.

        Raises:
            ValueError: If there are too few examples for the rate.
        """
        raw = self._raw(x, y)[:MAX_REFERENCE]
        return self._judge_by(Threshold.of(self._scores, raw, self.false_alarm_rate))

    def explain(self, x: object, *, y: object = None) -> Explanation:
        r"""Say in which values an example is odd.

        .. math:: \tfrac12 \frac{(x_i - m_i(\mu(x)))^2}{\sigma_i^2}

        Args:
            x: Examples as for :meth:`fit`.
            y: Labels of the examples if ``conditional``. None means that they are unknown.

        Returns:
            Nats that each value costs, in the shape of the examples, with the names of the columns.
        """
        raw = self._raw(x, y)
        found = explain(self.model_, raw)
        return found._replace(nats=self._in_original_shape(torch.from_numpy(found.nats)))

    def save(self, path: str | Path) -> None:
        """Save the fitted estimator in one safetensors file, which appears complete or not at all.

        The threshold and the held-out scores are saved, too. If the table has gaps, so are the
        held-out rows themselves, at most 1,000, with which rows of other gaps are compared.

        Args:
            path: Path of the file.
        """
        check_is_fitted(self, "model_")

        random_state = None
        if isinstance(self.random_state, int | np.integer):
            random_state = int(self.random_state)
        description: dict[str, Any] = {
            "model": self.model_.description(),
            "options": self._options(),
            "random_state": random_state,
            "history": self.history_,
            "prior": self.prior_,
            "example_shape": list(self.example_shape_),
            "feature_names": list(getattr(self, "feature_names_in_", [])),
        }
        if self._frame_library:
            description["frames"] = self._frame_library

        parts = nn.ModuleDict({"model": self.model_, "mixture": self.mixture_})
        tensors = parts.state_dict()
        threshold = getattr(self, "_threshold", None)
        if threshold is not None:
            description["offset"] = threshold.offset
            if not math.isnan(threshold.rate):
                description["rate"] = threshold.rate
            if threshold.labelled_offset is not None:
                description["labelled_offset"] = threshold.labelled_offset
            for name, tensor in threshold.tensors().items():
                tensors[f"{DECISION}{name}"] = tensor
        write_tensors(Path(path), "estimator", tensors, description)

    @classmethod
    def load(cls, path: str | Path) -> "VAEEstimator":
        """Load an estimator that :meth:`save` wrote.

        Args:
            path: Path of the file.

        Returns:
            The fitted estimator.

        Raises:
            StoreError: If the file is damaged or holds something else.
        """
        tensors, description = read_tensors(Path(path), "estimator", EstimatorDescription)
        try:
            names = set(cls._get_param_names())
            earlier = {name: EARLIER_VALUES[name] for name in names & EARLIER_VALUES.keys()}
            options = earlier | description["options"]
            estimator = cls(**options, random_state=description["random_state"])
        except TypeError as error:
            raise StoreError(f"{path}: options: {error}; update equipoise.") from error
        try:
            estimator._config(MIN_EXAMPLES)
        except ValueError as error:
            raise StoreError(f"{path}: options: {error}") from error

        decision = {
            name.removeprefix(DECISION): tensors.pop(name)
            for name in sorted(tensors)
            if name.startswith(DECISION)
        }
        prefix = "mixture."
        mixture_tensors = {
            name.removeprefix(prefix): tensors.pop(name)
            for name in sorted(tensors)
            if name.startswith(prefix)
        }
        mixture = restore_mixture(mixture_tensors, str(path))

        model_tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        model = restore_model(description["model"], model_tensors, what=str(path))
        if mixture.latent_dim != model.latent_dim:
            raise StoreError(f"{path} holds a mixture of codes of another model.")

        estimator.history_ = description["history"]
        estimator.example_shape_ = tuple(description["example_shape"])
        # Images may have no channels, or the channels last.
        channels, *sides = model.shape
        shapes = [model.shape, (*sides, channels)]
        if channels == 1 and sides:
            shapes.append(tuple(sides))
        n_names = len(description["feature_names"])
        if estimator.example_shape_ not in shapes or n_names not in (0, math.prod(model.shape)):
            raise StoreError(f"{path} describes examples of another shape than the model's.")

        estimator.n_features_in_ = math.prod(estimator.example_shape_)
        if description["feature_names"]:
            estimator.feature_names_in_ = np.array(description["feature_names"], object)

        estimator._frame_library = description.get("frames", "")
        # Estimators of earlier releases have no other.
        estimator._adopt(model, mixture, description.get("prior", "prior"))
        if "offset" in description:
            threshold = Threshold.restore(
                description["offset"],
                description.get("rate", math.nan),
                decision,
                model,
                str(path),
                description.get("labelled_offset"),
            )
            estimator._judge_by(threshold)
        return estimator

    @property
    def _n_features_out(self) -> int:
        return self.model_.latent_dim

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _options(self) -> dict[str, Any]:
        """Return the constructor's arguments without ``random_state``, as plain Python values.

        Grid searches may set options to NumPy numbers.
        """
        options: dict[str, Any] = self.get_params(deep=False)
        del options["random_state"]

        for name, value in options.items():
            if isinstance(value, np.generic):
                options[name] = value.item()
        return options

    def _config(self, n_examples: int) -> TrainConfig:
        """Check the options, and replace "auto" by numbers of epochs."""
        options = self._options()
        del options["conditional"]  # a matter of the data, and not of the training
        for name in DECISIONS:
            del options[name]
        stages = ("stage_1_epochs", "stage_2_epochs")
        auto_stages = [name for name in stages if options[name] == "auto"]
        for name in auto_stages:
            del options[name]
        if options["validation_fraction"] == "auto":
            least, most = AUTO_SHARES
            options["validation_fraction"] = min(max(AUTO_VALIDATION / n_examples, least), most)
        config = make_config(options)

        fewest, most = AUTO_EPOCHS
        steps_per_epoch = math.ceil(n_examples / config.step_size(n_examples))
        stage_1_epochs = min(max(AUTO_STEPS // steps_per_epoch, fewest), most)
        epochs = {"stage_1_epochs": stage_1_epochs, "stage_2_epochs": stage_1_epochs // 2}
        changes: dict[str, Any] = {name: epochs[name] for name in auto_stages}

        # An epoch of a small table has one or two steps, over which the bound hardly changes. With
        # a tolerance, training would stop at once.
        return replace(config, tolerance=0.0, seed=self._seed(), **changes)

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31))

    def _train(
        self,
        examples: Array,
        config: TrainConfig,
        model: VAE | None,
        labels: list[Any] | None = None,
        *,
        stacklevel: int = 3,
    ) -> Trainer:
        """Train a new model, or continue with the given one, and extend the history."""
        validation_fraction = max(config.validation_fraction, MIN_VALIDATION / len(examples))
        names = getattr(self, "feature_names_in_", None)
        data = load(
            examples,
            test_fraction=0.0,
            validation_fraction=validation_fraction,
            names=None if names is None or examples.ndim > 2 else [str(name) for name in names],
            labels=labels,
            levels=self._levels,
        )
        # The caller tests the estimator on data of their own. The trainer needs a test set, so it
        # gets the validation set once more.
        data = replace(data, test=data.validation)
        for text in data.cautions:
            warnings.warn(text[0].upper() + text[1:] + ".", stacklevel=stacklevel)
        if config.latent_dim == "auto":
            latent_dim = latent_dim_of_varying(data) if model is None else model.latent_dim
            config = replace(config, latent_dim=latent_dim)
        check_fit(data, config, min_train=MIN_EXAMPLES - MIN_VALIDATION)
        if model is not None:
            self._check_chunk(model, torch.from_numpy(data.train.at_hand[:]))

        # The state of the caller's random numbers does not change.
        with torch.random.fork_rng(devices=[]):
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

        for row in history:
            figures = {name: row[name] for name in row if not name.startswith("test_")}
            self.history_.append(figures)
        return trainer

    def _check_chunk(self, model: VAE, raw: Tensor) -> None:
        """Refuse a chunk in another unit than the first, and warn of one far from it."""
        model.scaling.check(raw)
        x = model.scaling(raw)
        if len(model.shape) > 1:
            _warn_of_range(model.scaling.range_warning(raw))
            return

        mean, std = column_means(x).nan_to_num(0.0), column_vars(x).nan_to_num(0.0).sqrt()
        far = (mean.abs() > CHUNK_SHIFT) | (std > CHUNK_SHIFT)
        if far.any():
            columns = far.nonzero().flatten().tolist()
            worst = int(torch.maximum(mean.abs(), std).argmax())
            warnings.warn(
                f"{len(columns)} columns of this chunk are far from the first chunk, whose scale "
                f"the model keeps: {model.scaling.name_of(worst)} has the mean "
                f"{float(mean[worst]):.3g} and the std {float(std[worst]):.3g} in std of the first "
                "chunk. The model resolves the stream badly. Begin a new model with a chunk that "
                "is like the stream, such as one that is shuffled.",
                stacklevel=4,
            )

    def _finish(self, trainer: Trainer, *, stacklevel: int = 3) -> "VAEEstimator":
        """Fit the mixture to the codes of the training data."""
        model, config = trainer.model.eval(), trainer.config
        form = choose_form(config.noise_correlation, model.shape)
        correlation_fit = fit_correlation(model, trainer.data, form, seed=config.seed)
        fit = fit_aggregate(model, trainer.data, trainer.config, trainer.fabric.device)
        for text in mixture_warnings(fit):
            warnings.warn(text, ConvergenceWarning, stacklevel=stacklevel)
        self._adopt(model.cpu(), fit.mixture.cpu(), "prior")

        held_out = as_tensor(trainer.data.validation.take(slice(PRIOR_EXAMPLES)))
        self.prior_ = self._choose_prior(model.scaling(held_out))
        self._calibrate_by_folds(model, trainer.data, correlation_fit)
        return self

    def _check_decision(self) -> None:
        """Refuse options of the threshold that are out of their domain, or exclude each other."""
        rate, contamination = self.false_alarm_rate, self.contamination
        if rate is not None and contamination is not None:
            raise ValueError("give one of false_alarm_rate and contamination, which sets it too")
        for name, value in (("false_alarm_rate", rate), ("contamination", contamination)):
            if value is not None and not isinstance(value, Real):
                raise ValueError(f"{name} must be a number or None, got {value!r}")
        if rate is not None and not 0 < rate < 1:
            raise ValueError(f"false_alarm_rate must be above 0 and below 1, got {rate:g}")
        if contamination is not None and not 0 < contamination <= 0.5:
            raise ValueError(
                f"contamination must be above 0 and at most 0.5, got {contamination:g}"
            )

    def _cross_fitted(
        self, examples: Array, labels: list[Any] | None, contamination: float
    ) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """Score a table by models of other parts of it, without what looks odd to a Gaussian.

        Returns the bounds on log p(x), and those with the labels that are known, log p(x|y).
        """
        judge = clone(self).set_params(contamination=None, random_state=self._seed())
        judge._read_as(self)
        numbers = np.delete(examples.reshape(len(examples), -1), list(self._levels), axis=1)
        near = near_rows(numbers, LEFT_OUT * contamination)
        folds = KFold(CONTAMINATION_FOLDS, shuffle=True, random_state=judge.random_state)
        plain, scores = np.empty(len(examples)), np.empty(len(examples))
        for given, others in folds.split(examples):
            rows = given[near[given]]
            with warnings.catch_warnings():
                # What there is to say will be said of the model that is kept.
                warnings.simplefilter("ignore")
                judge._fit_array(examples[rows], _chosen(labels, rows))
                asked = _chosen(labels, others)
                if asked is not None:
                    # A rare label may be in this part alone.
                    known = judge.label_names_
                    asked = [label if name_of(label) in known else None for label in asked]
                raw = judge._loaded(examples[others], asked)
            scores[others] = plain[others] = judge._scores(unlabelled(raw))
            if labels is not None:
                scores[others] = judge._scores(raw)
        return plain, scores

    def _read_as(self, other: "VAEEstimator") -> None:
        """Take examples for what another estimator, which is not fitted yet, takes them for."""
        for name in ("example_shape_", "n_features_in_", "feature_names_in_"):
            if hasattr(other, name):
                setattr(self, name, getattr(other, name))
        self._levels = other._levels

    def _calibrate_by_folds(self, model: VAE, data: Data, fit: CorrelationFit) -> None:
        """Set the threshold by the held-out examples, each judged without its own correlation."""
        judges = list(without_each_fold(model, fit))
        log_prior = self._log_priors()[self.prior_]
        raw = as_tensor(data.validation.take(slice(MAX_REFERENCE)))
        self._judge_by(
            Threshold.of(lambda x: judged_scores(judges, x, log_prior), raw, self.false_alarm_rate)
        )

    def _judge_by(self, threshold: Threshold) -> "VAEEstimator":
        """Set the attributes of a threshold."""
        self._threshold = threshold
        self.offset_, self.false_alarm_rate_ = threshold.offset, threshold.rate
        self.held_out_scores_ = threshold.known.plain
        return self

    def _kinds(self, raw: Tensor) -> Iterator[tuple[NDArray[np.bool_], Array]]:
        """Find the held-out scores that each example is compared with."""
        if not hasattr(self, "_threshold"):
            raise ValueError(
                "this file is of an earlier release, and has no threshold; "
                "set one by calibrate(x) with ordinary examples that were not trained on"
            )
        yield from self._threshold.by_kind(self.model_, raw, self._log_priors()[self.prior_])

    def _scores(self, raw: Tensor, importance_samples: int = 20) -> Float64[np.ndarray, " n"]:
        log_prior = self._log_priors()[self.prior_]
        return log_densities(self.model_, raw, log_prior, importance_samples)

    def _log_priors(self) -> dict[str, LogPrior]:
        return {"prior": standard_normal_log_prob, "mixture": self.mixture_.log_prob}

    def _choose_prior(self, held_out: Tensor) -> str:
        """Take the mixture as p(z) where held-out examples are more likely with it."""
        generator = torch.Generator().manual_seed(0)
        log_priors = list(self._log_priors().values())
        (bounds,) = importance_weighted_bounds(
            self.model_, held_out, PRIOR_SAMPLES, log_priors, generator
        )
        gain = Estimate.of_mean(bounds[1] - bounds[0])
        error = math.inf if gain.standard_error is None else gain.standard_error
        return "mixture" if gain.value > error else "prior"

    def _adopt(self, model: VAE, mixture: GaussianMixture, prior: str) -> "VAEEstimator":
        """Set the attributes of a fitted estimator."""
        self.model_ = model
        self.mixture_ = mixture
        self.prior_ = prior
        self.label_names_ = model.label_names

        self.noise_correlation_ = "none"
        if isinstance(model.noise, CorrelatedNoise):
            self.noise_correlation_ = model.noise.correlation.form

        shared_log_var = model.noise.shared_log_var
        if shared_log_var is None:
            shared_log_var = torch.tensor(self.history_[-1]["validation_noise_var"]).log()

        self.noise_var_ = shared_log_var.detach().exp().numpy()[()]
        # Estimators of earlier releases have no such figure.
        self.overfitting_ = float(self.history_[-1].get("overfitting", 1.0))
        return self

    _frame_library: str = ""
    """Library of the data frame that the model was fitted to, if that had categories."""
    _levels: dict[int, tuple[Level, ...]] = {}  # noqa: RUF012 (replaced, never changed)

    def _encoded_frame(self, x: object, *, reset: bool) -> object:
        """Put codes in the place of the categories of a data frame."""
        x = as_frame(x)
        if not reset:
            self._levels = self.model_.scaling.levels
        else:
            self._levels, self._frame_library = {}, ""
        if not hasattr(x, "columns") or not all(isinstance(name, str) for name in x.columns):
            return x
        known = None if reset else self._levels
        names = getattr(self, "feature_names_in_", None)
        if known and list(x.columns) != list(names if names is not None else ()):
            return x  # of which scikit-learn says what is wrong
        encoded = encode_frame(x, levels=known)
        if not reset:
            # Values that are no levels of the model's, of which each column has one note.
            for note in encoded.notes:
                warnings.warn(note, stacklevel=4)
        if reset and encoded.levels:
            self._levels = encoded.levels
            self._frame_library = "polars" if hasattr(x, "with_columns") else "pandas"
        return encoded.frame

    def _array(self, x: object, *, reset: bool) -> Array:
        """Check examples by scikit-learn's rules for tables, and check their shape.

        With ``reset`` the shape is stored. Otherwise it must be the one that is stored.
        """
        refuse_hidden(x)
        if isinstance(x, Tensor):
            x = as_array(x)

        shape: tuple[int, ...] = x.shape if hasattr(x, "shape") else np.asarray(x).shape
        has_images = len(shape) > 2
        if has_images:
            x = np.asarray(x).reshape(shape[0], math.prod(shape[1:]))

        rules: dict[str, Any] = {}
        if reset:
            rules = {"ensure_min_samples": MIN_EXAMPLES, "ensure_min_features": 2}
        if not has_images:
            # NaN in the rows of a table is a missing value.
            rules["ensure_all_finite"] = "allow-nan"
        table: Array = validate_data(self, x, reset=reset, **rules)

        example_shape = shape[1:] if has_images else table.shape[1:]
        if reset:
            self.example_shape_ = example_shape
        elif example_shape != self.example_shape_:
            raise ValueError(
                f"expected examples of shape {self.example_shape_}, as in fit, got {example_shape}"
            )
        return table.reshape(-1, *example_shape)

    def _raw(self, x: object, y: object = None) -> Tensor:
        """Check examples to which the fitted model is applied, and their labels."""
        check_is_fitted(self, "model_")
        array = self._array(self._encoded_frame(x, reset=False), reset=False)
        labels = _as_labels(y)
        if labels is not None and not self.label_names_:
            raise ValueError("the model reads no labels: leave out y, or fit with conditional=True")
        raw = self._loaded(array, labels)
        _warn_of_range(self.model_.scaling.range_warning(raw))
        return raw

    def _loaded(self, array: Array, labels: list[Any] | None) -> Tensor:
        """Bring an array and its labels to the model's form."""
        names = self.label_names_
        raw = as_tensor(
            load_examples(array, self.model_.shape, labels=labels, label_names=names, strict=True)
        )
        self.model_.scaling.check(raw)
        return raw

    def _encode(self, x: object, y: object = None) -> Tensor:
        """Return the means of q(z|x), computed batch by batch."""
        batches = torch.split(self._raw(x, y), EVALUATION_BATCH)
        return encode_all(self.model_, batches).mean

    @torch.no_grad()
    def _decode(self, codes: Tensor) -> Likelihood:
        """Return p(x|z) in model units, computed batch by batch."""
        return joined([self.model_.decode(batch) for batch in torch.split(codes, EVALUATION_BATCH)])

    def with_codes(self, x: object) -> object:
        """Put the numbers of levels in the place of the categories of a data frame.

        Args:
            x: Rows as for :meth:`fit`, or an array, which stays as it is.

        Returns:
            A frame of numbers. Values that are no level of the model's are missing, with a warning.
        """
        check_is_fitted(self, "model_")
        return self._encoded_frame(x, reset=False)

    def as_given(self, array: Array, like: object = None) -> Any:  # noqa: ANN401 (array or frame)
        r"""Put levels in the place of their numbers, in a data frame.

        Args:
            array: Examples, (n, \*). It stays as it is if there are no categories.
            like: The rows that it comes from, whose index it gets.

        Returns:
            Rows in a frame of the library of those that the estimator was fitted to.
        """
        levels = self.model_.scaling.levels
        if not levels:
            return array

        columns: dict[str, Any] = dict(zip(self.feature_names_in_, array.T, strict=True))
        for number, names in levels.items():
            name = self.feature_names_in_[number]
            columns[name] = level_values(columns[name].tolist(), names)
        return new_frame(self._frame_library, columns, like)

    def _in_original_shape(self, examples: Tensor) -> Array:
        """Convert examples of the model, (n, C, H, W) or (n, D), to the shape of the user's."""
        array = examples.numpy()

        # The user's images may have no channels, or the channels last.
        if array.shape[1:] != self.example_shape_:
            array = np.moveaxis(array, 1, -1).reshape(-1, *self.example_shape_)
        return array


def _as_labels(y: object) -> list[Any] | None:
    """Return labels as a list of Python's values, whatever holds them."""
    if y is None:
        return None
    if isinstance(y, str) or not hasattr(y, "__len__"):
        raise ValueError("expected one label for each example, in a list, an array or a column")
    return list(as_array(y).ravel().tolist() if isinstance(y, Tensor) else np.asarray(y).tolist())


def _chosen(labels: list[Any] | None, rows: Array) -> list[Any] | None:
    """Choose the labels of some examples, by numbers or by a mask."""
    return None if labels is None else [labels[i] for i in np.arange(len(labels))[rows]]


def _warn_of_range(text: str | None) -> None:
    """Pass on what a scaling has noticed, to the caller of a public method."""
    if text is not None:
        warnings.warn(text, stacklevel=4)
