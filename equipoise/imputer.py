"""``VAEImputer``: missing values of tables, as a scikit-learn transformer."""

from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float64
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, clone
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from equipoise.data.dataset import Array
from equipoise.data.levels import as_frame, encode_frame
from equipoise.estimator import VAEEstimator
from equipoise.imputation import Imputation, impute


class Imputed(NamedTuple):
    """A table without gaps, and how far each filled value may be off.

    Args:
        mean: The table, with the expectation of each missing value, (n, features).
        std: Std of each missing value; 0 where a value is observed, (n, features). NaN for
            categories, see :meth:`VAEImputer.level_probability`.
    """

    mean: Any
    std: Float64[np.ndarray, "n features"]


def _has_names(x: object) -> bool:
    """Whether it is a data frame whose columns have names."""
    return all(isinstance(name, str) for name in getattr(x, "columns", [None]))


# scikit-learn has no types.
class VAEImputer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    r"""Fill the gaps of a table, NaN, by a variational autoencoder, each with its uncertainty.

    .. math:: \mathrm{E}[x_\mathrm{mis}|x_\mathrm{obs}], \qquad
        \mathrm{Var}[x_\mathrm{mis}|x_\mathrm{obs}]

    The model is trained on observed values alone: nothing is filled in before. Values that are
    observed stay as they are, to the bit. A row without any value gets the mean of the model's own
    samples. Categories in a data frame of pandas or polars get the most probable level; the result
    is then a data frame, too.

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
        x = as_frame(x)
        self._table(encode_frame(x).frame if _has_names(x) else x, reset=True)
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
        filled = self._rows(np.where(np.isnan(table), found.mean.double().numpy(), table), x)
        if not return_std:
            return filled
        return Imputed(filled, found.std.double().numpy())

    def level_probability(self, x: object) -> Float64[np.ndarray, "n features"]:
        """Say how sure the level of each category is that :meth:`transform` fills in.

        Args:
            x: Rows, as for :meth:`transform`.

        Returns:
            Its probability, 1 where the level is observed, (n, features). NaN for numbers.
        """
        table = self._table(x, reset=False)
        probability = self._impute(table, 0).probability
        if probability is None:
            return np.full(table.shape, np.nan)
        return probability.double().numpy()

    def sample(self, x: object, n_draws: int = 5) -> Any:  # noqa: ANN401 (an array, or frames)
        """Draw multiple imputations, which differ as much as the missing values are unknown.

        What depends on the filled values is computed for each draw; its spread over the draws is
        what the gaps cost (Rubin, 1987, *Multiple imputation for nonresponse in surveys*).

        Args:
            x: Rows, (n, features), with NaN where a value is missing.
            n_draws: Number of imputations M.

        Returns:
            Tables without gaps, (M, n, features); a list of data frames if there are categories.

        Raises:
            ValueError: If there are fewer than one.
        """
        if n_draws < 1:
            raise ValueError(f"expected n_draws >= 1, got {n_draws}")
        table = self._table(x, reset=False)
        draws = self._impute(table, n_draws).draws.double().numpy()
        result: Array = np.where(np.isnan(table), draws, table)
        if not self.estimator_.model_.scaling.levels:
            return result
        return [self._rows(rows, x) for rows in result]

    def _rows(self, table: Array, like: object) -> Any:  # noqa: ANN401 (an array, or a frame)
        """Return an array as it is, or rows with categories as a data frame."""
        return self.estimator_.as_given(table, like)

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
            x = self.estimator_.with_codes(x)
        table: Array = validate_data(
            self, x, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan"
        )
        return table

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = []
        return tags
