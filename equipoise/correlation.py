r"""Correlation of the noise: the matrix C of Sigma(z) = diag(s(z)) C diag(s(z)).

s(z) is the std of whatever noise model a VAE has, and u = (x - m(z)) / s(z) its standardised
residual. With C = I the errors of all dimensions are independent of each other, which those of
neighbouring pixels are not. C is estimated once the networks stand still, from the second moments
of u: eq. (10) as a matrix. Three forms, from free to frugal:

=========================== ================================================== ================
:class:`FullCorrelation`    any matrix, shrunk towards white                   D (D + 1) / 2
:class:`LowRankCorrelation` a few common factors, and a variance per dimension (K + 1) D
:class:`BandCorrelation`    one variance per radial frequency and colour axis  bands x channels
=========================== ================================================== ================

The third column is how many numbers they have. A *floor* in units of s^2 is added to the variance
of every direction, so that p(x|z) cannot be narrower than that in any of them. For digital data it
is the variance of rounding, :math:`\mathrm{E}[q^2 / 12 s^2(z)]`, where q is the distance of two
levels: C is then the covariance of the residuals of dequantised data.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor, nn

from equipoise.gaps import missing_values
from equipoise.gaussian import (
    LOG_2PI,
    Gaussian,
    Randomness,
    standard_normal_like,
    sum_dimensions,
)
from equipoise.residuals import ResidualCovariance, SquareSums

Array: TypeAlias = NDArray[np.float64]

MAX_RESIDUAL = 1e15
"""Largest standardised residual. Larger ones would overflow in the sums of matrix products."""
MAX_SIDE = 4096
"""Largest side of an image in bands, whose transform is a matrix of that size."""


class Correlation(nn.Module, ABC):
    r"""A positive definite matrix C over the dimensions of an example, by what it does to them.

    Args:
        shape: Shape of one example, of D dimensions.
    """

    form: ClassVar[str]
    """Name of the form, as in the option ``noise_correlation``."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    @property
    @abstractmethod
    def log_det(self) -> Tensor:
        """Logarithm of the determinant of C, (), float64, nats."""

    @abstractmethod
    def whiten(self, u: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        r"""Take the correlation out: w with \|w\|^2 = u^T C^-1 u.

        Args:
            u: Standardised residuals, (B, \*).

        Returns:
            The whitened residuals, (B, \*), of covariance I if u has covariance C.
        """

    @abstractmethod
    def colour(self, white: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        r"""Put the correlation in: the inverse of :meth:`whiten`.

        Args:
            white: Values of covariance I, (B, \*).

        Returns:
            Values of covariance C, (B, \*).
        """

    def squared_norm_and_log_det(
        self, u: Float[Tensor, "batch *event"]
    ) -> tuple[Float[Tensor, " batch"], Tensor]:
        r"""Compute what a log-density is made of, over the observed dimensions of each row.

        Args:
            u: Standardised residuals, (B, \*). In rows (B, D), NaN marks what is not observed.

        Returns:
            u^T C^-1 u, (B,), and log det C, () or (B,), with C of the observed dimensions.
        """
        missing = missing_values(u)
        if missing is None:
            return sum_dimensions(self.whiten(u).square()), self.log_det
        if torch.compiler.is_exporting():
            # The rows of a program are complete, but for categories, which are independent of all.
            return sum_dimensions(self.whiten(u.nan_to_num(0.0)).square()), self.log_det

        filled = u.masked_fill(missing, 0.0).double()
        norm, log_det = u.new_zeros(len(u)), u.new_zeros(len(u))
        for rows, root in self._roots(missing):
            white = torch.linalg.solve_triangular(root, filled[rows].mT, upper=False)
            norm[rows] = white.square().sum(0).to(u.dtype)
            log_det[rows] = 2 * root.diagonal().log().sum().to(u.dtype)
        return norm, log_det

    def given(self, u: Float[Tensor, "batch dimensions"]) -> tuple[Tensor, Tensor]:
        r"""Mean and variance of each dimension given the observed ones, in closed form.

        .. math:: \mathrm{E}[u_m] = C_{mo} C_{oo}^{-1} u_o, \qquad
            \mathrm{Var}[u_m] = \mathrm{diag}(C_{mm} - C_{mo} C_{oo}^{-1} C_{om})

        Args:
            u: Standardised residuals with NaN where they are missing, (B, D).

        Returns:
            Means, which are u where it is observed, and variances, which are 0 there, (B, D).
        """
        missing = u.isnan()
        filled, covariance = u.masked_fill(missing, 0.0).double(), self.covariance
        mean, var = filled.clone(), torch.zeros_like(filled)

        for rows, root in self._roots(missing):
            gaps = missing[rows[0]]
            # Columns of the dimensions that are missing, rows of those observed.
            cross = covariance[:, gaps].masked_fill(gaps[:, None], 0.0)
            white = torch.linalg.solve_triangular(root, cross, upper=False)
            whitened = torch.linalg.solve_triangular(root, filled[rows].mT, upper=False)

            block = torch.zeros(len(rows), len(gaps), dtype=filled.dtype, device=u.device)
            block[:, gaps] = whitened.mT @ white
            mean[rows] += block
            left = covariance.diagonal()[gaps] - white.square().sum(0)
            var[rows[:, None], gaps.nonzero().flatten()] = left.clamp_min(0)
        return mean.to(u.dtype), var.to(u.dtype)

    @property
    def covariance(self) -> Tensor:
        """The matrix C, (D, D), float64."""
        size = math.prod(self.shape)
        device = next(self.buffers()).device
        dtype = next(self.buffers()).dtype
        unit = torch.eye(size, dtype=dtype, device=device).view(size, *self.shape)
        root = self.colour(unit).flatten(1).double()
        return root.mT @ root

    def _roots(self, missing: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Cholesky roots of C, one for each pattern of gaps, with the numbers of its rows.

        Dimensions that are missing are those of the unit matrix, which adds nothing anywhere.
        """
        covariance = self.covariance
        unit = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        patterns, number = torch.unique(missing, dim=0, return_inverse=True)
        for k, gaps in enumerate(patterns):
            is_left_out = gaps[:, None] | gaps
            matrix = torch.where(is_left_out, unit, covariance)
            yield (number == k).nonzero().flatten(), torch.linalg.cholesky(matrix)

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Describe the correlation by JSON values: all its shapes."""

    @classmethod
    @abstractmethod
    def from_description(cls, description: dict[str, Any]) -> "Correlation":
        """Build the correlation that a description is of, with meaningless values.

        Args:
            description: What :meth:`description` returned.

        Returns:
            The correlation; its tensors are filled afterwards.
        """


class FullCorrelation(Correlation):
    r"""Any covariance matrix, by its eigenvectors and eigenvalues: C = V diag(l) V^T.

    Args:
        shape: Shape of one example, of D dimensions.
        axes: V, the eigenvectors as columns, (D, D), orthonormal.
        log_var: Logarithm of the eigenvalues l, (D,).

    Example:
        >>> statistic = ResidualCovariance(2)
        >>> statistic.update(torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, -1.0]]))
        >>> full = FullCorrelation.fit((2,), statistic, torch.tensor(0.0)).float()
        >>> full.whiten(torch.tensor([[1.0, 1.0]])).square().sum()  # 3/5 of u^T u = 2 ...
        tensor(0.6000)
    """

    form = "full"

    axes: Tensor
    log_var: Tensor

    def __init__(self, shape: tuple[int, ...], axes: Tensor, log_var: Tensor) -> None:
        super().__init__(shape)
        self.register_buffer("axes", axes.contiguous())
        self.register_buffer("log_var", log_var)

    @classmethod
    def fit(
        cls, shape: tuple[int, ...], statistic: ResidualCovariance, floor: Tensor
    ) -> "FullCorrelation":
        """Take the covariance of the residuals, with the floor on its diagonal.

        Args:
            shape: Shape of one example.
            statistic: Second moments of the standardised residuals.
            floor: Variance that is added, of a shape that broadcasts to one example's.

        Returns:
            The correlation, float64.

        Raises:
            ValueError: If the matrix is singular, because there are no more examples than
                dimensions and the floor is zero.
        """
        covariance = statistic.covariance + _per_dimension(floor, shape).diag()
        var, axes = torch.linalg.eigh(covariance)

        # Rounding may make zero eigenvalues negative.
        if not bool(var[0] > var[-1] * torch.finfo(var.dtype).eps):
            raise ValueError(
                "the covariance of the residuals is singular; give more examples, or a floor"
            )
        return cls(shape, axes, var.log())

    def shrunk(self, weight: float) -> "FullCorrelation":
        r"""Shrink towards white noise of the same total variance: w C + (1 - w) c I.

        Ledoit and Wolf (2004), *A well-conditioned estimator for large-dimensional covariance
        matrices*. Here the weight is chosen by held-out likelihood.

        Args:
            weight: w, from 0 (white) to 1 (C as it is).

        Returns:
            A new correlation.
        """
        var = self.log_var.exp()
        log_var = torch.log(weight * var + (1 - weight) * var.mean())
        return FullCorrelation(self.shape, self.axes, log_var)

    @property
    def log_det(self) -> Tensor:
        """Sum of the logarithms of the eigenvalues."""
        return self.log_var.double().sum()

    def whiten(self, u: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Divide by the std along each eigenvector: the symmetric root of C^-1."""
        return self._scale(u, torch.exp(-0.5 * self.log_var))

    def colour(self, white: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Multiply by the std along each eigenvector: the symmetric root of C."""
        return self._scale(white, torch.exp(0.5 * self.log_var))

    def _scale(self, values: Tensor, factor: Tensor) -> Tensor:
        coefficients = values.flatten(1) @ self.axes
        return ((coefficients * factor) @ self.axes.mT).view_as(values)

    def description(self) -> dict[str, Any]:
        """Return the shapes of an example and of the eigenvectors."""
        return {"shape": list(self.shape), "axes_shape": list(self.axes.shape)}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Correlation":
        """Build the correlation with meaningless values."""
        n_rows, n_axes = description["axes_shape"]
        shape = tuple(description["shape"])
        if (n_rows, n_axes) != (math.prod(shape), math.prod(shape)):
            raise ValueError(f"eigenvectors {(n_rows, n_axes)} are not those of examples {shape}")
        return cls(shape, torch.zeros(n_rows, n_axes), torch.zeros(n_axes))


class LowRankCorrelation(Correlation):
    r"""A few common factors and a variance per dimension: C = W W^T + diag(psi), factor analysis.

    It is kept as :math:`C = \psi^{1/2} (I + U\, \mathrm{diag}(l - 1)\, U^T)\, \psi^{1/2}` with U
    orthonormal, because the root and the inverse of the matrix in the middle are of the same form:
    the formulas of Woodbury and of the determinant need no solution of equations.

    Args:
        shape: Shape of one example, of D dimensions.
        axes: U, as columns, (D, K), orthonormal. K may be 0.
        log_var: Logarithm of l, (K,), at least 0.
        log_uniqueness: Logarithm of psi, (D,).
    """

    form = "low-rank"

    axes: Tensor
    log_var: Tensor
    log_uniqueness: Tensor

    def __init__(
        self, shape: tuple[int, ...], axes: Tensor, log_var: Tensor, log_uniqueness: Tensor
    ) -> None:
        super().__init__(shape)
        self.register_buffer("axes", axes.contiguous())
        self.register_buffer("log_var", log_var)
        self.register_buffer("log_uniqueness", log_uniqueness)

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        loadings: Float[Tensor, "dimensions factors"],
        uniqueness: Float[Tensor, " dimensions"],
    ) -> "LowRankCorrelation":
        """Make the correlation of loadings and uniquenesses.

        Args:
            shape: Shape of one example.
            loadings: W, (D, K).
            uniqueness: psi, (D,), positive.

        Returns:
            The correlation W W^T + diag(psi).
        """
        scaled = loadings / uniqueness.sqrt()[:, None]
        axes, singular, _ = torch.linalg.svd(scaled, full_matrices=False)
        return cls(shape, axes, torch.log1p(singular.square()), uniqueness.log())

    @classmethod
    def fit(
        cls,
        shape: tuple[int, ...],
        statistic: ResidualCovariance,
        floor: Tensor,
        n_factors: int,
    ) -> "LowRankCorrelation":
        r"""Fit the factors by maximum likelihood to the covariance S of the residuals.

        .. math:: \psi^{-1/2} S\, \psi^{-1/2} = \sum_j \lambda_j u_j u_j^T, \qquad
            \min_{\psi \ge \psi_{\min}} \sum_i \log\psi_i
            + \sum_{j \le K} (\log\lambda_j + 1) + \sum_{j > K} \lambda_j

        For a given psi, the best factors are the eigenvectors u_j of the K largest eigenvalues, so
        that psi alone is searched for, by L-BFGS-B. Joreskog (1967), *Some contributions to maximum
        likelihood factor analysis*. The floor is added to the diagonal of S, and is psi_min.

        Args:
            shape: Shape of one example.
            statistic: Second moments of the standardised residuals.
            floor: Smallest variance, positive, of a shape that broadcasts to one example's.
            n_factors: K, number of factors, below D. 0 gives a diagonal C.

        Returns:
            The correlation, float64.
        """
        from scipy.optimize import minimize

        floor = _per_dimension(floor, shape)
        covariance = statistic.covariance + floor.diag()
        var = covariance.diagonal()
        if n_factors == 0:
            return cls(shape, var.new_zeros(len(var), 0), var.new_zeros(0), var.log())

        matrix = covariance.numpy()
        bounds = list(zip(floor.log().tolist(), var.log().tolist(), strict=True))
        start = (1 - 0.5 * n_factors / len(var)) / np.diag(np.linalg.inv(matrix))
        found = minimize(
            _factor_loss, np.log(start), (matrix, n_factors), "L-BFGS-B", jac=True, bounds=bounds
        )

        top, axes = _largest(matrix, found.x, n_factors)
        log_var = torch.from_numpy(np.log(np.maximum(top, 1)))
        return cls(shape, torch.from_numpy(axes), log_var, torch.from_numpy(found.x))

    @property
    def log_det(self) -> Tensor:
        """Sum of the logarithms of psi and of l."""
        return self.log_uniqueness.double().sum() + self.log_var.double().sum()

    def whiten(self, u: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Divide by the root of psi, and by that of l along the columns of U."""
        rows = u.flatten(1) * torch.exp(-0.5 * self.log_uniqueness)
        return self._scale(rows, torch.exp(-0.5 * self.log_var)).view_as(u)

    def colour(self, white: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Multiply by the root of l along the columns of U, and by that of psi."""
        rows = self._scale(white.flatten(1), torch.exp(0.5 * self.log_var))
        return (rows * torch.exp(0.5 * self.log_uniqueness)).view_as(white)

    def _scale(self, rows: Tensor, factor: Tensor) -> Tensor:
        """Multiply the components of rows (n, D) along the columns of U by factors (K,)."""
        return rows + (rows @ self.axes * (factor - 1)) @ self.axes.mT

    def description(self) -> dict[str, Any]:
        """Return the shapes of an example and of U."""
        return {"shape": list(self.shape), "axes_shape": list(self.axes.shape)}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Correlation":
        """Build the correlation with meaningless values."""
        n_rows, n_factors = description["axes_shape"]
        shape = tuple(description["shape"])
        if n_rows != math.prod(shape):
            raise ValueError(f"factors of {n_rows} dimensions are not those of examples {shape}")
        axes = torch.zeros(n_rows, n_factors)
        return cls(shape, axes, torch.zeros(n_factors), torch.zeros(n_rows))


class BandCorrelation(Correlation):
    r"""One variance per radial band of frequencies and colour axis, for images of any size.

    .. math:: C = T^T\, \mathrm{diag}(v_{b(i,j),k})\, T

    T is the orthonormal :class:`CosineTransform` of each colour axis k, and b(i, j) the band of the
    frequency (i, j). White noise has v = 1. Errors of neighbouring pixels that hang together have a
    v above one in the low bands and below one in the high ones.

    Args:
        shape: Shape of one image, (C, H, W).
        axes: Colour axes as columns, (C, C), orthonormal.
        log_var: Logarithm of v, (bands, C), one band for each of :class:`CosineTransform`.
    """

    form = "bands"

    axes: Tensor
    log_var: Tensor

    def __init__(self, shape: tuple[int, ...], axes: Tensor, log_var: Tensor) -> None:
        super().__init__(shape)
        self.transform = CosineTransform(shape, log_var.dtype)
        self.register_buffer("axes", axes.contiguous())
        self.register_buffer("log_var", log_var)

    @classmethod
    def fit(
        cls, shape: tuple[int, ...], statistic: "BandCovariance", floor: Tensor
    ) -> "BandCorrelation":
        """Take the variance of each band along the axes of the colours' covariance.

        Args:
            shape: Shape of one image.
            statistic: Second moments of the standardised residuals.
            floor: Variance that is added, of a shape that broadcasts to one image's. Its mean over
                the pixels is taken, because a band extends over all of them.

        Returns:
            The correlation, float64.

        Raises:
            ValueError: If a band is without variance and the floor is zero.
        """
        _, axes = torch.linalg.eigh(statistic.sum.sum(0))
        along_axes = torch.einsum("ck,bcd,dk->bk", axes, statistic.covariance, axes)

        var = along_axes + floor.double().mean()
        if not bool((var > 0).all()):
            raise ValueError("a band of the residuals has no variance; give a floor")
        return cls(shape, axes, var.log())

    @property
    def log_det(self) -> Tensor:
        """Sum of the logarithms of v over all frequencies and axes."""
        return (self.transform.sizes[:, None] * self.log_var.double()).sum()

    def whiten(self, u: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Divide by the std of each band and axis."""
        return self._scale(u, torch.exp(-0.5 * self.log_var))

    def colour(self, white: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Multiply by the std of each band and axis."""
        return self._scale(white, torch.exp(0.5 * self.log_var))

    def _scale(self, images: Tensor, factor: Tensor) -> Tensor:
        coefficients = torch.einsum("ck,bchw->bkhw", self.axes, self.transform(images))
        scaled = coefficients * factor[self.transform.bands].permute(2, 0, 1)
        return self.transform.inverse(torch.einsum("ck,bkhw->bchw", self.axes, scaled))

    def description(self) -> dict[str, Any]:
        """Return the shapes of an image, of the colour axes and of the variances."""
        return {
            "shape": list(self.shape),
            "axes_shape": list(self.axes.shape),
            "var_shape": list(self.log_var.shape),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Correlation":
        """Build the correlation with meaningless values."""
        shape, axes_shape = tuple(description["shape"]), description["axes_shape"]
        n_bands, n_axes = description["var_shape"]
        is_of_shape = axes_shape == [shape[0], shape[0]] and n_axes == shape[0]
        if not is_of_shape or n_bands != len(CosineTransform(shape).sizes):
            raise ValueError(f"{n_bands} bands and {axes_shape} axes are not those of {shape}")
        return cls(shape, torch.zeros(axes_shape), torch.zeros(n_bands, n_axes))


class CosineTransform(nn.Module):
    r"""The orthonormal discrete cosine transform (DCT-II) over the rows and columns of images.

    .. math:: T_{kn} = \sqrt{(2 - [k = 0]) / N}\, \cos\frac{\pi k (2n + 1)}{2N}

    Unlike the Fourier transform it does not join opposite borders. Both directions are products
    with two orthonormal matrices, which are computed and not stored.

    A frequency (i, j) belongs to the band :math:`\sqrt{(i/H)^2 + (j/W)^2}\, \max(H, W)`, rounded.
    ``bands`` (H, W) numbers them from 0, and ``sizes`` counts the frequencies of each.

    Args:
        shape: Shape of one image, (C, H, W).
        dtype: Type of the matrices.

    Raises:
        ValueError: If the shape is not that of an image of at most 4096 pixels a side.

    Example:
        >>> CosineTransform((1, 3, 3)).bands
        tensor([[0, 1, 2],
                [1, 1, 2],
                [2, 2, 3]])
    """

    rows: Tensor
    columns: Tensor
    bands: Tensor
    sizes: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"bands of frequencies need images (C, H, W), got {shape}")
        _, height, width = shape

        if max(height, width) > MAX_SIDE:
            raise ValueError(f"images may have up to {MAX_SIDE} pixels a side, got {shape}")

        vertical = torch.arange(height, dtype=torch.float64)[:, None] / height
        horizontal = torch.arange(width, dtype=torch.float64) / width
        radius = (vertical.square() + horizontal.square()).sqrt() * max(height, width)
        # Beyond the longer side, the corners of narrow images do not reach every number.
        _, bands = torch.unique(radius.round(), return_inverse=True)

        self.register_buffer("rows", _cosines(height).to(dtype), persistent=False)
        self.register_buffer("columns", _cosines(width).to(dtype), persistent=False)
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("sizes", bands.flatten().bincount(), persistent=False)

    def forward(self, images: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Compute the coefficients of images.

        Args:
            images: Images, (B, C, H, W).

        Returns:
            Coefficients, (B, C, H, W), of the same sum of squares.
        """
        return self.rows @ images @ self.columns.mT

    def inverse(self, coefficients: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Compute the images of coefficients.

        Args:
            coefficients: Coefficients, (B, C, H, W).

        Returns:
            Images, (B, C, H, W).
        """
        return self.rows.mT @ coefficients @ self.columns


class BandCovariance(SquareSums):
    r"""Second moments of the colours of residuals in each band of frequencies, in float64.

    Like :class:`ResidualCovariance`, it sums samples and combines by adding ``sum`` and ``count``.

    Args:
        shape: Shape of one image, (C, H, W).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        transform = CosineTransform(shape, torch.float64)
        n_channels = shape[0]
        super().__init__((len(transform.sizes), n_channels, n_channels))
        self.transform = transform

    @torch.no_grad()
    def update(self, residual: Float[Tensor, "batch c h w"]) -> None:
        """Add a batch.

        Args:
            residual: Standardised residuals u, (B, C, H, W).
        """
        coefficients = self.transform(residual.double())
        moments = torch.einsum("bchw,bdhw->hwcd", coefficients, coefficients)
        self.sum.index_add_(0, self.transform.bands.flatten(), moments.flatten(0, 1))
        self.count += len(residual)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the colours in each band, (bands, C, C); NaN before the first batch."""
        return self.sum / (self.count * self.transform.sizes)[:, None, None]

    @property
    def var(self) -> Tensor:
        """The mean variance over the dimensions, (); NaN before the first batch."""
        total = self.sum.diagonal(dim1=1, dim2=2).sum()
        return total / (self.count * self.transform.sizes.sum() * self.sum.shape[1])


class CorrelatedGaussian(NamedTuple):
    r"""A batch of Gaussians N(mean, diag(s) C diag(s)), with the interface of :class:`Gaussian`.

    ``var`` and ``std`` are s^2 and s, those of the noise model without its correlation.

    Args:
        mean: Mean, (B, \*).
        log_var: Logarithm of s^2, which broadcasts to ``mean``.
        correlation: C.
    """

    mean: Tensor
    log_var: Tensor
    correlation: Correlation

    @property
    def var(self) -> Tensor:
        """Variance s^2, in the squared unit of the variable, of the shape of ``mean``."""
        return self.log_var.exp().expand_as(self.mean)

    @property
    def std(self) -> Tensor:
        """Standard deviation s, in the unit of the variable, of the shape of ``mean``."""
        return (0.5 * self.log_var).exp().expand_as(self.mean)

    def squared_distance(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        r"""Squared Mahalanobis distance u^T C^-1 u, u = (x - mean) / s.

        Args:
            x: Values of the variable, (B, \*). Those that are missing do not count.

        Returns:
            The distances, (B,). Their mean is D under the density itself.
        """
        return self.correlation.squared_norm_and_log_det(self._standardised(x))[0]

    def _standardised(self, x: Tensor) -> Tensor:
        """Divide the residual by s; NaN stays NaN."""
        u = (x - self.mean) * torch.exp(-0.5 * self.log_var)
        return u.clamp(-MAX_RESIDUAL, MAX_RESIDUAL)

    def log_prob(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        r"""Log-density of each example.

        .. math:: -\tfrac12 \bigl[u^T C^{-1} u + \log\det C + D \log 2\pi\bigr]
            - \sum_i \log s_i, \qquad u_i = (x_i - \mu_i) / s_i

        Args:
            x: Values of the variable, (B, \*), of the shape of ``mean``. In rows (B, D), NaN marks
                what is not observed, and the density is that of the other dimensions.

        Returns:
            The log-densities, (B,), nats, constants included.
        """
        squared_norm, log_det = self.correlation.squared_norm_and_log_det(self._standardised(x))
        normaliser = (self.log_var + LOG_2PI).expand_as(self.mean)

        missing = missing_values(x)
        if missing is not None:
            normaliser = normaliser.masked_fill(missing, 0.0)
        return -0.5 * (squared_norm + log_det.to(x.dtype) + sum_dimensions(normaliser))

    def given(self, x: Float[Tensor, "batch dimensions"]) -> tuple[Tensor, Tensor]:
        """Mean and variance of each dimension, given the observed ones.

        Args:
            x: Rows with NaN where a value is missing, (B, D).

        Returns:
            Means, which are x where it is observed, and variances, which are 0 there, (B, D).
        """
        mean, var = self.correlation.given(self._standardised(x))
        return torch.where(x.isnan(), self.mean + self.std * mean, x), self.var * var

    def sample_given(
        self, x: Float[Tensor, "batch dimensions"], generator: Randomness = None
    ) -> Float[Tensor, "batch dimensions"]:
        """Draw the missing values of each row, given the observed ones.

        A draw of all dimensions is moved to the observed values by its conditional mean, Matheron's
        rule.

        Args:
            x: Rows with NaN where a value is missing, (B, D).
            generator: Source of randomness, on the device of ``mean``.

        Returns:
            Rows without gaps, (B, D).
        """
        draw = self.correlation.colour(standard_normal_like(self.mean, generator))
        moved, _ = self.correlation.given(self._standardised(x) - draw)
        return torch.where(x.isnan(), self.mean + self.std * (draw + moved), x)

    def sample(self, generator: Randomness = None) -> Tensor:
        r"""Draw one sample per example, mean + s * C^1/2 epsilon.

        Args:
            generator: Source of randomness, on the device of ``mean``.

        Returns:
            The samples, (B, \*).
        """
        epsilon = standard_normal_like(self.mean, generator)
        return self.mean + torch.exp(0.5 * self.log_var) * self.correlation.colour(epsilon)


AnyGaussian: TypeAlias = Gaussian | CorrelatedGaussian
"""What a likelihood p(x|z) can be."""

FORMS: dict[str, type[Correlation]] = {
    cls.form: cls for cls in (FullCorrelation, LowRankCorrelation, BandCorrelation)
}
"""The forms by their names in the option ``noise_correlation``."""


def describe_correlation(correlation: Correlation) -> dict[str, Any]:
    """Describe a correlation by JSON values, from which :func:`build_correlation` builds it again.

    Args:
        correlation: One of :data:`FORMS`.

    Returns:
        Its name as "form", and its :meth:`Correlation.description` as "arguments".
    """
    return {"form": correlation.form, "arguments": correlation.description()}


def build_correlation(description: dict[str, Any]) -> Correlation:
    """Build the correlation that a description is of; its tensors are filled afterwards.

    Args:
        description: What :func:`describe_correlation` returned.

    Returns:
        The correlation, with meaningless values.

    Raises:
        ValueError: If there is no such form.
    """
    form = description["form"]
    if form not in FORMS:
        raise ValueError(f"there is no form of correlation {form!r}; update equipoise")
    return FORMS[form].from_description(description["arguments"])


def embedded(correlation: Correlation, is_inside: Tensor) -> Correlation:
    """Put columns of variance one, without a correlation to others, beside those of a matrix.

    Args:
        correlation: A correlation of rows of a table, of d columns.
        is_inside: True for these among all D, (D,).

    Returns:
        The correlation of D columns.
    """
    inside, n = is_inside.nonzero().flatten(), len(is_inside)
    if isinstance(correlation, FullCorrelation):
        axes = torch.eye(n).to(correlation.axes)
        axes[inside[:, None], inside] = correlation.axes
        log_var = correlation.log_var.new_zeros(n)
        log_var[inside] = correlation.log_var
        return FullCorrelation((n,), axes, log_var)
    if isinstance(correlation, LowRankCorrelation):
        axes = correlation.axes.new_zeros(n, correlation.axes.shape[1])
        axes[inside] = correlation.axes
        log_uniqueness = correlation.log_uniqueness.new_zeros(n)
        log_uniqueness[inside] = correlation.log_uniqueness
        return LowRankCorrelation((n,), axes, correlation.log_var, log_uniqueness)
    raise ValueError(f"the form {correlation.form} is not one of tables")


def _per_dimension(floor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Spread a floor over the dimensions, (D,), float64."""
    return floor.double().expand(shape).flatten()


def _largest(covariance: Array, log_uniqueness: Array, n: int) -> tuple[Array, Array]:
    """The n largest eigenvalues of psi^-1/2 S psi^-1/2, and their eigenvectors, (n,), (D, n)."""
    scale = np.exp(-0.5 * log_uniqueness)
    scaled = covariance * np.outer(scale, scale)
    d = len(covariance)
    values, vectors = linalg.eigh(scaled, subset_by_index=(d - n, d - 1))
    return values, vectors


def _factor_loss(log_uniqueness: Array, covariance: Array, n_factors: int) -> tuple[float, Array]:
    """Twice the negative log-likelihood of the best factors, up to a constant, and its gradient."""
    top, axes = _largest(covariance, log_uniqueness, n_factors)
    var = np.diag(covariance) * np.exp(-log_uniqueness)

    # A factor whose eigenvalue is below one would have a negative variance, and is left out.
    top = np.maximum(top, 1)
    loss = log_uniqueness.sum() + (np.log(top) + 1 - top).sum() + var.sum()
    gradient = 1 - var + np.square(axes) @ (top - 1)
    return float(loss), gradient


def _cosines(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal matrix of the cosine transform of n values, float64."""
    frequency = torch.arange(n, dtype=torch.float64)[:, None]
    place = 2 * torch.arange(n, dtype=torch.float64) + 1
    matrix = math.sqrt(2 / n) * torch.cos(math.pi / (2 * n) * frequency * place)
    matrix[0] = math.sqrt(1 / n)
    return matrix
