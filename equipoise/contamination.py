r"""A first look for the outliers within a table: the rows that a robust Gaussian finds far.

A flexible model learns outliers that it is trained on. A Gaussian has too few parameters for that,
and is fitted again and again to the rows that are nearest to it, which leaves the outliers out: the
concentration steps of Rousseeuw and van Driessen (1999), *A fast algorithm for the minimum
covariance determinant estimator*, here with the shrunk covariance of Ledoit and Wolf (2004), *A
well-conditioned estimator for large-dimensional covariance matrices*.
"""

import warnings

import numpy as np
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

STEPS = 5
"""Number of concentration steps."""
MOST_LEFT_OUT = 0.5
MAX_DIMENSIONS = 1024
"""Dimensions beyond which a covariance takes too long, and no row is found far."""


def near_rows(x: Float[np.ndarray, "n d"], share: float) -> NDArray[np.bool_]:
    """Find the rows of a table that are nearest to a Gaussian that is fitted to them alone.

    Args:
        x: Rows, NaN where a value is missing, which counts as the mean. Without columns, all rows
            are near.
        share: Share of the rows to leave out, of which at most half are, because fewer rows would
            follow themselves and not the bulk.

    Returns:
        True for the rows that stay, (n,).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = np.concatenate([rng.normal(size=(95, 3)), 9 + 0.1 * rng.normal(size=(5, 3))])
        >>> near_rows(x, 0.05)[-5:].any()
        np.False_
    """
    near: NDArray[np.bool_] = np.ones(len(x), bool)
    if not 0 < x.shape[1] <= MAX_DIMENSIONS:
        return near

    z = _standardise(x)
    for _ in range(STEPS):
        distance = LedoitWolf().fit(z[near]).mahalanobis(z)
        near = distance <= np.quantile(distance, 1 - min(share, MOST_LEFT_OUT))
    return near


def _standardise(x: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    """Bring columns to the median 0 and the mean absolute deviation 1, and fill their gaps."""
    z = np.asarray(x, np.float64)
    with warnings.catch_warnings():
        # Of columns without any value.
        warnings.simplefilter("ignore", RuntimeWarning)
        z = z - np.nanmedian(z, 0)
        z = z / np.maximum(np.nanmean(np.abs(z), 0), np.finfo(np.float32).tiny)
    filled: Float64[np.ndarray, "n d"] = np.nan_to_num(z)
    return filled
