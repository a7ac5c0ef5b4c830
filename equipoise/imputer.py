"""``VAEImputer``: missing values of tables, as a scikit-learn transformer."""

from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float64
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, clone
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from equipoise.data.dataset import Array
from equipoise.estimator import VAEEstimator
from equipoise.imputation import Imputation, impute


class Imputed(NamedTuple):
    """A table without gaps, and how far each filled value may be off.

    Args:
        mean: The table, with the expectation of each missing value, (n, features).
        std: Std of each missing value; 0 where a value is observed, (n, features).
    """

    mean: Any
    std: Float64[np.ndarray, "n features"]


# scikit-learn has no types.
class VAEImputer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    r"""Fill the gaps of a table, NaN, by a variational autoencoder, each with its uncertainty.

    .. math:: \mathrm{E}[x_\mathrm{mis}|x_\mathrm{obs}], \qquad
        \mathrm{Var}[x_\mathrm{mis}|x_\mathrm{obs}]

    The model is trained on observed values alone: nothing is filled in before. Values that are
    observed stay as they are, to the bit. A row without any value gets the mean of the model's own
    samples.

    Args:
        estimator: The unfitted :class:`equipoise.VAEEstimator` whose copy is fitted. None takes one
            with a noise variance for each column.
        n_samples: Number of codes per row over which the expectation is taken, see
            :func:`equipoise.imputation.impute`.
        random_state: Seed of the estimator if ``estimator`` is None, and of the draws.

    Attributes:
        estimator_: The fitted :class:`equipoise.VAEEstimator`.
        n_features_in_: Number of columns.
        feature_names_in_: Names of the columns of a data frame, if they are strings.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> x = load_iris().data.copy()
        >>> x[::7, 2] = np.nan
        >>> fast = VAEEstimator(stage_1_epochs=50, stage_2_epochs=0, random_state=0)
        >>> filled, std = VAEImputer(fast, random_state=0).fit(x).transform(x, return_std=True)
        >>> bool(np.isnan(filled).any()), bool((std[::7, 2] > 0).all()), float(std[1].max())
        (False, True, 0.0)
    """

    def __init__(
        self,
        estimator: VAEEstimator | None = None,
        *,
        n_samples: int = 100,
        random_state: int | np.integer[Any] | None = None,
    ) -> None:
        self.estimator = estimator
        self.n_samples = n_samples
        self.random_state = random_state

    def fit(self, x: object, y: object = None) -> "VAEImputer":
        """Train the model on the observed values of a table.

        Args:
            x: Rows, (n, features), at least 10, with NaN where a value is missing.
            y: Ignored.

        Returns:
            The imputer.

        Raises:
            ValueError: If the table cannot be used, such as one with a column that has no value.
        """
        self._table(x, reset=True)
        estimator = self.estimator
        if estimator is None:
            estimator = VAEEstimator(noise="dimension", random_state=self.random_state)
        self.estimator_: VAEEstimator = clone(estimator).fit(x)
        return self

    @overload
    def transform(self, x: object, return_std: Literal[False] = False) -> Any: ...  # noqa: ANN401

    @overload
    def transform(self, x: object, return_std: Literal[True]) -> Imputed: ...

    def transform(self, x: object, return_std: bool = False) -> Any:
        """Fill the gaps of a table by the expectation of each missing value.

        Args:
            x: Rows, (n, features), with NaN where a value is missing.
            return_std: Whether to return the std of each filled value, too.

        Returns:
            The table without gaps, float64; with ``return_std``, that and the std, as
            :class:`Imputed`.
        """
        table = self._table(x, reset=False)
        found = self._impute(table, 0)
        filled = np.where(np.isnan(table), found.mean.double().numpy(), table)
        if not return_std:
            return filled
        return Imputed(filled, found.std.double().numpy())

    def sample(self, x: object, n_draws: int = 5) -> Float64[np.ndarray, "draws n features"]:
        """Draw multiple imputations, which differ as much as the missing values are unknown.

        What depends on the filled values is computed for each draw; its spread over the draws is
        what the gaps cost (Rubin, 1987, *Multiple imputation for nonresponse in surveys*).

        Args:
            x: Rows, (n, features), with NaN where a value is missing.
            n_draws: Number of imputations M.

        Returns:
            Tables without gaps, (M, n, features).

        Raises:
            ValueError: If there are fewer than one.
        """
        if n_draws < 1:
            raise ValueError(f"expected n_draws >= 1, got {n_draws}")
        table = self._table(x, reset=False)
        draws = self._impute(table, n_draws).draws.double().numpy()
        result: Array = np.where(np.isnan(table), draws, table)
        return result

    def _impute(self, table: Array, n_draws: int) -> Imputation:
        estimator = self.estimator_
        seed = 0 if self.random_state is None else int(self.random_state)
        raw = torch.from_numpy(table.astype(np.float32))
        estimator.model_.scaling.warn_of_range(raw, stacklevel=3)
        return impute(
            estimator.model_,
            estimator.mixture_,
            raw,
            n_samples=self.n_samples,
            n_draws=n_draws,
            seed=seed,
        )

    def _table(self, x: object, *, reset: bool) -> Array:
        """Check rows by scikit-learn's rules."""
        if not reset:
            check_is_fitted(self, "estimator_")
        table: Array = validate_data(
            self, x, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan"
        )
        return table

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = []
        return tags
