r"""What the page shows of a model. Everything a user can point at is a code; the page holds it, the model answers."""

import copy
import io
import math
import re
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, Float32, Num
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from equipoise.aggregate import GaussianMixture, single_gaussian
from equipoise.data import Batches, Data
from equipoise.data.images import Plan, decode
from equipoise.gaussian import Gaussian
from equipoise.metrics.latent import LatentPlane, latent_plane
from equipoise.metrics.likelihood import iwae
from equipoise.metrics.outliers import MIN_REFERENCE, model_scores, outlier_scores
from equipoise.model import VAE, encode_all
from equipoise.plots import NATS_BELOW_PEAK, UNCERTAINTY_MAP
from equipoise.sources import READY, ready_source

Array = NDArray[Any]

BATCH = 500
PLANE_CODES, PLANE_POINTS = 2000, 96
"""Codes on the map and grid points along each of its axes: a second of work on two cores."""
REFERENCE = 2000
"""Validation examples that an input is compared with, at most."""
IMPORTANCE_SAMPLES = 64
"""Of the bound on log p(x) of one input: it answers within a tenth of a second."""
SLIDER_STDS = 4.0
MAX_CODES = 64
"""Codes decoded in one answer, at most."""
MAX_PIXELS = 40_000_000
"""Of an image that is dropped on the page: what a camera takes, and no decompression bomb."""
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
POINT_LOG_VAR = -20.0
"""Log-variance of codes that stand for themselves, without a posterior around them."""


class Inspection(NamedTuple):
    """What a model makes of one input.

    Args:
        raw: the input as the model takes it, raw units, flat.
        code: mean of its q(z|x), (d,).
        elbo: nats, with one sample of z.
        log_likelihood: importance-weighted bound on log p(x), nats.
        standardised_residual: mean over the dimensions of (x - m)^2 / sigma^2; about one if the noise is right.
        code_log_prob: log-density of the code under the mixture, nats.
        odder_than: share of the validation set that is less odd, in [0, 1); None without one.
    """

    raw: list[float]
    code: list[float]
    elbo: float
    log_likelihood: float
    standardised_residual: float
    code_log_prob: float
    odder_than: float | None


class _Map(NamedTuple):
    """A plane through the latent space, and the mixture projected onto it."""

    plane: LatentPlane
    axes: Tensor
    mixture: GaussianMixture


class View:
    r"""A model, its mixture and, if they are there, its data, ready to answer the page at once.

    Nothing changes after construction: answers depend on the request alone.

    Args:
        model: in evaluation mode, on the CPU.
        mixture: fitted to its aggregate posterior, eq. (13).
        data: what it was trained on: training codes for the map, validation scores to compare an input with. None
            draws the map from the mixture, and no input is ranked.
        name: of the run.

    Example:
        >>> model = VAE.build((1, 8, 8), latent_dim=2).eval()
        >>> view = View(model, GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None]))
        >>> view.decode(view.sample("prior", 3, seed=0)).shape  # 2 of the code, 64 means, 64 stds
        (3, 130)
    """

    def __init__(
        self, model: VAE, mixture: GaussianMixture, data: Data | None = None, name: str = "model"
    ) -> None:
        self.model, self.mixture, self.data, self.name = model, mixture, data, name
        self.reference = None
        if data is not None and len(data.validation) >= MIN_REFERENCE:
            held_out = Batches(data.validation.take(slice(REFERENCE)), BATCH).epoch()
            self.reference = model_scores(model, mixture, held_out, _generator(0))
        self.map = self._map() if model.latent_dim > 1 else None

    @torch.no_grad()
    def _map(self) -> "_Map":
        if self.data is None:
            codes = self.mixture.sample(PLANE_CODES, _generator(0))
            posterior = Gaussian(codes, torch.full_like(codes, POINT_LOG_VAR))
        else:
            train = self.data.train.at_hand
            rows = np.random.default_rng(0).permutation(len(train))[:PLANE_CODES]
            posterior = encode_all(self.model, Batches(train.take(np.sort(rows)), BATCH).epoch())
        plane = latent_plane(posterior, self.mixture, _generator(0), PLANE_POINTS)
        axes, full = torch.from_numpy(plane.axes), copy.deepcopy(self.mixture).double()
        return _Map(
            plane,
            axes,
            GaussianMixture(full.weights, full.means @ axes.mT, axes @ full.covariances @ axes.mT),
        )

    def about(self) -> dict[str, Any]:
        """Everything that the page has to know once, as JSON values.

        Returns:
            Shapes, units, the map, the range of each slider, the colours of the map of uncertainty.
        """
        model, mixture = self.model, self.mixture
        gaussian = single_gaussian(mixture)
        sampled = self.decode(self.sample("mixture", MAX_CODES, seed=0))
        colours = mpl.colormaps[UNCERTAINTY_MAP](np.arange(256), bytes=True)[:, :3]
        return {
            "name": self.name,
            "shape": list(model.shape),
            "latent_dim": model.latent_dim,
            "offset": model.scaling.offset.flatten().tolist(),
            "scale": model.scaling.scale.flatten().tolist(),
            "highest_std": float(np.quantile(sampled[:, -math.prod(model.shape) :], 0.995)),
            "std_colours": colours.flatten().tolist(),
            "weights": mixture.weights.tolist(),
            "means": mixture.means.tolist(),
            "centre": gaussian.means[0].tolist(),
            "reach": (SLIDER_STDS * gaussian.covariances[0].diagonal().sqrt()).tolist(),
            "n_examples": len(self.data.validation) if self.data else 0,
            "plane": self.map and self._describe_map(self.map),
        }

    def _describe_map(self, shown: "_Map") -> dict[str, Any]:
        plane = shown.plane
        log_prob = plane.mixture_log_prob if self.data is None else plane.aggregate_log_prob
        density = (1 + (log_prob - log_prob.max()) / NATS_BELOW_PEAK).clip(0)
        return {
            "axes": plane.axes.tolist(),
            "x": plane.x[[0, -1]].tolist(),
            "y": plane.y[[0, -1]].tolist(),
            "n_points": PLANE_POINTS,
            "density": density.flatten().round(3).tolist(),
            "codes": plane.codes.round(3).tolist(),
            "means": shown.mixture.means.tolist(),
            "covariances": shown.mixture.covariances.tolist(),
        }

    @torch.no_grad()
    def decode(self, codes: Float[np.ndarray, "n latent"]) -> Float32[np.ndarray, "n numbers"]:
        """Decode codes.

        Args:
            codes: (n, d).

        Returns:
            (n, d + 2 D): each code, then the mean of p(x|z) and its std, both flat and in raw units.
        """
        z = torch.from_numpy(codes).to(self.model.scaling.scale.dtype)
        seen, scaling = self.model.decode(z), self.model.scaling
        parts = (z, scaling.restore(seen.mean).flatten(1), scaling.restore_std(seen.std).flatten(1))
        return torch.cat(parts, 1).numpy()

    @torch.no_grad()
    def code_at(self, point: Float[np.ndarray, "2"]) -> Float[np.ndarray, "1 latent"]:
        r"""The code to expect at a point of the map, under the component that most likely put it there.

        .. math:: k = \arg\max_j \pi_j N(p; A \mu_j, A \Sigma_j A^T), \qquad
            \mathrm{E}_k[z \mid A z = p] = \mu_k + \Sigma_k A^T (A \Sigma_k A^T)^{-1} (p - A \mu_k)

        The average over all components would lie between the clusters, where no data are.

        Args:
            point: p, on the axes A of the map.

        Returns:
            The code, which lies at the point.

        Raises:
            ValueError: if the model has one latent unit only, and no map.
        """
        if self.map is None:
            raise ValueError("a model of one latent unit has no map; give its code instead")
        _, axes, projected = self.map
        target = torch.from_numpy(point).double()
        k = int(projected.responsibilities(target[None]).argmax())
        shift = torch.linalg.solve(projected.covariances[k], target - projected.means[k])
        code = (
            self.mixture.means[k].double() + self.mixture.covariances[k].double() @ axes.mT @ shift
        )
        at: Array = code[None].numpy()
        return at

    @torch.no_grad()
    def sample(self, source: str, n: int, seed: int) -> Float[np.ndarray, "n latent"]:
        """Draw codes.

        Args:
            source: "prior", "mixture", or the number of a component, counted from 0.
            n: number of codes, 1 to 64.
            seed: same seed, same codes.

        Returns:
            (n, d).

        Raises:
            ValueError: if there is no such source, or the number is out of its range.
        """
        if not 1 <= n <= MAX_CODES:
            raise ValueError(f"1 to {MAX_CODES} samples are drawn at once, got {n}")
        generator = _generator(seed)
        if source in READY:
            return ready_source(source, self.mixture).sample(n, generator).numpy()
        if source.isdecimal():
            return self.mixture.sample(n, generator, component=int(source)).numpy()
        raise ValueError(
            f"expected a source among {', '.join(map(repr, READY))} or the number of a component, "
            f"got {source!r}"
        )

    def read(self, upload: bytes) -> Num[np.ndarray, "1 *shape"]:
        r"""Make an example of what was dropped on the page: an image file, or the numbers of a row.

        Args:
            upload: content of an image file, of which the centred square is taken and resized; for tables text, the
                values of one row, separated by commas or blanks.

        Returns:
            The example, (1, \*), raw units.

        Raises:
            ValueError: if it cannot be read, or has not the shape of the model's examples.
        """
        return self._read_image(upload) if len(self.model.shape) == 3 else self._read_row(upload)

    def _read_image(self, upload: bytes) -> Array:
        channels, height, width = self.model.shape
        try:
            with Image.open(io.BytesIO(upload), formats=IMAGE_FORMATS) as image:
                size = image.size
        except Exception as error:  # Pillow's readers raise nearly anything on a broken file
            raise ValueError(
                f"no image that can be read ({error}); expected {', '.join(IMAGE_FORMATS)}"
            ) from error
        if math.prod(size) > MAX_PIXELS:
            raise ValueError(
                f"the image has {size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}; make it smaller"
            )
        try:
            pixels = decode(
                io.BytesIO(upload), Plan((channels, height, width), resize=height == width)
            )
        except Exception as error:
            raise ValueError(
                f"the image cannot be used ({error}); save it as PNG or JPEG of {width} x {height}"
            ) from error
        levels: Array = self.model.scaling.restore_levels(
            torch.from_numpy(pixels.copy())[None] / 255
        ).numpy()
        return levels

    def _read_row(self, upload: bytes) -> Array:
        words = re.split(r"[\s,;]+", upload.decode(errors="replace").strip())
        try:
            row = np.array([float(word) for word in words])
        except ValueError as error:
            raise ValueError(
                f"expected {self.model.shape[0]} numbers separated by commas: {error}"
            ) from error
        if row.shape != self.model.shape or not np.isfinite(row).all():
            raise ValueError(
                f"expected {self.model.shape[0]} finite numbers separated by commas, got {len(words)}"
            )
        return row[None]

    def example(self, index: int) -> Num[np.ndarray, "1 *shape"]:
        r"""An example of the validation set.

        Args:
            index: which; counted on from the start beyond the last.

        Returns:
            The example, (1, \*), raw units.

        Raises:
            ValueError: if there are no data.
        """
        if self.data is None:
            raise ValueError("this run was opened without its data; drop an example of your own")
        at = index % len(self.data.validation)
        return self.data.validation[at : at + 1]

    def inspect(self, raw: Num[np.ndarray, "1 *shape"]) -> Inspection:
        r"""Judge one input: how the model codes it, how likely it is, and how odd among the validation set.

        Args:
            raw: (1, \*), raw units.

        Returns:
            The record; the reconstruction is what its code decodes to.
        """
        batch = torch.from_numpy(raw)
        scores = model_scores(self.model, self.mixture, [batch], _generator(0))
        bound = iwae(self.model, [batch], IMPORTANCE_SAMPLES, generator=_generator(0))
        odder_than = None
        if self.reference is not None:
            odder_than = 1 - float(outlier_scores(scores, self.reference).tail_probability[0])
        return Inspection(
            raw=raw.astype(np.float64).flatten().tolist(),
            code=encode_all(self.model, [batch]).mean[0].tolist(),
            elbo=-float(scores.negative_elbo[0]),
            log_likelihood=float(bound[0, 0]),
            standardised_residual=float(scores.standardised_residual[0]),
            code_log_prob=-float(scores.negative_mixture_log_prob[0]),
            odder_than=odder_than,
        )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
