r"""What the page shows of a model.

Everything that a user can point at is a code. The page holds the code, and the model answers.
"""

import copy
import io
import math
import re
from collections import Counter
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, Float32, Num
from numpy.typing import NDArray
from torch import Tensor

from equipoise.aggregate import GaussianMixture, single_gaussian
from equipoise.categories import mode_of
from equipoise.correlated_noise import CorrelatedNoise
from equipoise.data import Batches, Data
from equipoise.data.dataset import Channels
from equipoise.data.gate import Limits
from equipoise.data.images import decode, make_plan, read_header
from equipoise.gaps import missing_values
from equipoise.gaussian import Gaussian
from equipoise.imputation import impute
from equipoise.metrics.latent import LatentPlane, latent_plane
from equipoise.metrics.likelihood import iwae
from equipoise.metrics.outliers import MIN_REFERENCE, model_scores, outlier_scores
from equipoise.model import VAE, encode_all
from equipoise.plots import NATS_BELOW_PEAK, UNCERTAINTY_MAP
from equipoise.randomness import stream
from equipoise.sources import READY, ready_source

Array = NDArray[Any]

BATCH = 500
PLANE_CODES, PLANE_POINTS = 2000, 96
"""Codes on the map, and grid points along each of its axes: a second of work on two cores."""
REFERENCE = 2000
"""Largest number of validation examples that an input is compared with."""
IMPORTANCE_SAMPLES = 64
"""Samples of the bound on log p(x) of one input; the answer takes less than a tenth of a second."""
SLIDER_STDS = 4.0
"""How far the sliders reach from the centre, in standard deviations of the codes."""
MAX_CODES = 64
"""Largest number of codes that are decoded in one answer."""
DRAWS = 3
"""Joint draws of one code, beside the map of its std."""
MAX_PIXELS = 40_000_000
"""Largest number of pixels of an uploaded image: enough for a camera, too few to fill memory."""
POINT_LOG_VAR = -20.0
"""Log-variance of codes that stand for themselves, without a posterior around them."""


class Inspection(NamedTuple):
    """What a model computes for one input.

    Args:
        raw: The input as the model takes it, in raw units, flat.
        code: The mean of q(z|x) of the input, (d,).
        elbo: The ELBO in nats, with one sample of z.
        log_likelihood: The importance-weighted bound on log p(x), in nats.
        standardised_residual: The mean over the dimensions of (x - m)^2 / sigma^2. It is about one
            if the noise is right.
        code_log_prob: The log-density of the code under the mixture, in nats.
        odder_than: The share of the validation set that is less odd, in [0, 1). None without a
            validation set.
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
    r"""A model, its mixture and, if available, its data, ready to answer the page at once.

    A view does not change after its construction: an answer depends on the request alone.

    Args:
        model: The model, in evaluation mode, on the CPU.
        mixture: The mixture that was fitted to its aggregate posterior, eq. (13).
        data: The data that the model was trained on. They give the training codes of the map, and
            the validation scores that an input is compared with. If None, the map is drawn from
            the mixture, and inputs are not ranked.
        name: The name of the run.
        start: The example that the page begins with, (1, \*), raw units. If None, it begins with
            the heaviest component of the mixture.

    Example:
        >>> model = VAE.build((1, 8, 8), latent_dim=2).eval()
        >>> mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
        >>> view = View(model, mixture)
        >>> view.decode(view.sample("prior", 3, seed=0)).shape  # 2 of the code, 64 means, 64 stds
        (3, 130)
    """

    def __init__(
        self,
        model: VAE,
        mixture: GaussianMixture,
        data: Data | None = None,
        name: str = "model",
        start: Num[np.ndarray, "1 *shape"] | None = None,
    ) -> None:
        self.model, self.mixture, self.data, self.name = model, mixture, data, name
        self.start = start

        self.reference = None
        if data is not None and len(data.validation) >= MIN_REFERENCE:
            # The page shows examples and codes whose label is unknown.
            held_out = data.validation.take(slice(REFERENCE)).without_labels()
            batches = Batches(held_out, BATCH).epoch()
            self.reference = model_scores(model, mixture, batches, _generator(0))

        self.map = self._map() if model.latent_dim > 1 else None

    @torch.no_grad()
    def _map(self) -> "_Map":
        """Compute the map from training codes, or from draws of the mixture without data."""
        if self.data is None:
            codes = self.mixture.sample(PLANE_CODES, _generator(0))
            posterior = Gaussian(codes, torch.full_like(codes, POINT_LOG_VAR))
        else:
            train = self.data.train.at_hand
            rows = np.random.default_rng(0).permutation(len(train))[:PLANE_CODES]
            shown = train.take(np.sort(rows)).without_labels()
            posterior = encode_all(self.model, Batches(shown, BATCH).epoch())

        plane = latent_plane(posterior, self.mixture, _generator(0), PLANE_POINTS)

        axes = torch.from_numpy(plane.axes)
        full = copy.deepcopy(self.mixture).double()
        projected = GaussianMixture(
            full.weights, full.means @ axes.mT, axes @ full.covariances @ axes.mT
        )
        return _Map(plane, axes, projected)

    def about(self) -> dict[str, Any]:
        """Everything that the page has to know once, as JSON values.

        Returns:
            The shapes, the units, the map, the range of each slider, the colours of the map of
            uncertainty, and the number of joint draws to show, which is 0 if errors are
            independent.
        """
        model, mixture = self.model, self.mixture
        gaussian = single_gaussian(mixture)
        reach = SLIDER_STDS * gaussian.covariances[0].diagonal().sqrt()

        samples = self.decode(self.sample("mixture", MAX_CODES, seed=0))
        stds = samples[:, -math.prod(model.shape) :]
        colours = mpl.colormaps[UNCERTAINTY_MAP](np.arange(256), bytes=True)[:, :3]

        return {
            "name": self.name,
            "shape": list(model.shape),
            "latent_dim": model.latent_dim,
            "offset": model.scaling.offset.flatten().tolist(),
            "scale": model.scaling.scale.flatten().tolist(),
            "highest_std": float(np.quantile(stds, 0.995)),
            "std_colours": colours.flatten().tolist(),
            "weights": mixture.weights.tolist(),
            "means": mixture.means.tolist(),
            "centre": gaussian.means[0].tolist(),
            "reach": reach.tolist(),
            "n_draws": DRAWS if self._has_draws else 0,
            "n_examples": len(self.data.validation) if self.data else 0,
            "plane": self.map and self._describe_map(self.map),
            "start": None if self.start is None else self.inspect(self.start)._asdict(),
        }

    @property
    def _has_draws(self) -> bool:
        """Whether joint draws show more than the mean and the map of the std do."""
        return len(self.model.shape) == 3 and isinstance(self.model.noise, CorrelatedNoise)

    def _describe_map(self, map_: "_Map") -> dict[str, Any]:
        """The map as JSON values, its density between 0 and 1."""
        plane = map_.plane
        log_prob = plane.mixture_log_prob if self.data is None else plane.aggregate_log_prob
        density = (1 + (log_prob - log_prob.max()) / NATS_BELOW_PEAK).clip(0)

        return {
            "axes": plane.axes.tolist(),
            "x": plane.x[[0, -1]].tolist(),
            "y": plane.y[[0, -1]].tolist(),
            "n_points": PLANE_POINTS,
            "density": density.flatten().round(3).tolist(),
            "codes": plane.codes.round(3).tolist(),
            "means": map_.mixture.means.tolist(),
            "covariances": map_.mixture.covariances.tolist(),
        }

    @torch.no_grad()
    def decode(self, codes: Float[np.ndarray, "n latent"]) -> Float32[np.ndarray, "n numbers"]:
        """Decode codes.

        Args:
            codes: The codes, (n, d).

        Returns:
            (n, d + 2 D): each code, then the mean of p(x|z) and its std, both flat and in raw
            units.
        """
        z = torch.from_numpy(codes).to(self.model.scaling.scale.dtype)
        likelihood = self.model.decode(z)
        return self._beside(z, mode_of(likelihood), likelihood.std)

    @torch.no_grad()
    def draws(self, code: Float[np.ndarray, "1 latent"]) -> Float32[np.ndarray, "draws numbers"]:
        """Draw from p(x|z) of one code, always with the same random numbers.

        Args:
            code: The code, (1, d).

        Returns:
            (3, d + 2 D), as :meth:`decode`, with a draw in the place of the mean.
        """
        z = torch.from_numpy(code).to(self.model.scaling.scale.dtype).repeat(DRAWS, 1)
        likelihood = self.model.decode(z)
        return self._beside(z, likelihood.sample(_generator(0)), likelihood.std)

    def _beside(self, z: Tensor, x: Tensor, std: Tensor) -> Float32[np.ndarray, "n numbers"]:
        """Codes, then values and std in raw units, flat, beside each other."""
        scaling = self.model.scaling
        # Categories, which are shown by their numbers, have no std.
        raw_std = scaling.restore_std(std, x).nan_to_num(0.0)
        values = (scaling.restore(x).flatten(1), raw_std.flatten(1))
        return torch.cat((z, *values), 1).numpy()

    @torch.no_grad()
    def code_at(self, point: Float[np.ndarray, "2"]) -> Float[np.ndarray, "1 latent"]:
        r"""The expected code at a point of the map, under the most responsible component.

        .. math:: k = \arg\max_j \pi_j N(p; A \mu_j, A \Sigma_j A^T), \qquad
            \mathrm{E}_k[z \mid A z = p] = \mu_k + \Sigma_k A^T (A \Sigma_k A^T)^{-1} (p - A \mu_k)

        The average over all components would lie between the clusters, where there are no data.

        Args:
            point: The point p, on the axes A of the map.

        Returns:
            The code, whose projection onto the map is the point.

        Raises:
            ValueError: If the model has only one latent unit, and therefore no map.
        """
        if self.map is None:
            raise ValueError("a model of one latent unit has no map; give its code instead")

        _, axes, projected = self.map
        target = torch.from_numpy(point).double()
        k = int(projected.responsibilities(target[None]).argmax())

        shift = torch.linalg.solve(projected.covariances[k], target - projected.means[k])
        covariance = self.mixture.covariances[k].double()
        code = self.mixture.means[k].double() + covariance @ axes.mT @ shift

        row: Array = code[None].numpy()
        return row

    @torch.no_grad()
    def sample(self, source: str, n: int, seed: int) -> Float[np.ndarray, "n latent"]:
        """Draw codes.

        Args:
            source: "prior", "mixture", or the number of a component, counted from 0.
            n: The number of codes, 1 to 64.
            seed: The seed; the same seed gives the same codes.

        Returns:
            The codes, (n, d).

        Raises:
            ValueError: If there is no such source, or the number is out of its range.
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
        r"""Make an example from an upload: an image file, or the numbers of a row or signal.

        Args:
            upload: The content of an image file, whose centred square is taken and resized. For
                models of tables and signals it is text: the values of one example, separated by
                commas or blanks, channel after channel.

        Returns:
            The example, (1, \*), raw units.

        Raises:
            ValueError: If the upload cannot be read, or does not have the shape of the model's
                examples.
        """
        if len(self.model.shape) == 3:
            return self._read_image(upload)

        return self._read_row(upload)

    def _read_image(self, upload: bytes) -> Array:
        channels, height, width = self.model.shape
        file, limits = io.BytesIO(upload), Limits(max_pixels=MAX_PIXELS)
        try:
            header = read_header(file, limits)
            convert: Channels | None = None
            if header.bands in (1, 3) and channels in (1, 3):
                convert = "grey" if channels == 1 else "rgb"
            size = f"{width}x{height}"
            plan = make_plan(
                *(Counter([header]), size, convert, None, "the image", "first"),
                is_wide=self.model.scaling.is_wide,
            )
            pixels = decode(file, plan, limits)
            if pixels.shape[1:] != self.model.shape:
                sides = f"{pixels.shape[3]}x{pixels.shape[2]} with {pixels.shape[1]} channels"
                raise ValueError(f"is {sides} where the model has {width}x{height} with {channels}")
        except Exception as error:  # Pillow's readers raise nearly anything on a broken file
            if str(error).startswith("no image"):
                raise
            raise ValueError(
                f"the image cannot be used ({error}); save it as PNG or JPEG of {width} x {height}"
            ) from error

        if plan.dtype != "uint8":
            return pixels.astype(np.float32 if plan.dtype == "float32" else np.int32)
        x = torch.from_numpy(pixels.copy()) / 255
        levels: Array = self.model.scaling.restore_levels(x).numpy()
        return levels

    def _read_row(self, upload: bytes) -> Array:
        n_columns = math.prod(self.model.shape)
        words = re.split(r"[\s,;]+", upload.decode(errors="replace").strip())
        try:
            row = np.array([float(word) for word in words])
        except ValueError as error:
            raise ValueError(
                f"expected {n_columns} numbers separated by commas: {error}"
            ) from error

        if len(row) != n_columns or not np.isfinite(row).all():
            raise ValueError(
                f"expected {n_columns} finite numbers separated by commas, got {len(words)}"
            )

        return row.reshape(1, *self.model.shape)

    def example(self, index: int) -> Num[np.ndarray, "1 *shape"]:
        r"""An example of the validation set.

        Args:
            index: The index of the example; beyond the last example, counting starts again at the
                first.

        Returns:
            The example, (1, \*), raw units.

        Raises:
            ValueError: If there are no data.
        """
        if self.data is None:
            raise ValueError("this run was opened without its data; drop an example of your own")

        start = index % len(self.data.validation)
        raw = self.data.validation[start : start + 1]
        if missing_values(torch.from_numpy(raw)) is None:
            return raw
        # The page edits numbers: what is missing begins at its expectation.
        return impute(self.model, self.mixture, torch.from_numpy(raw)).mean.numpy()

    def inspect(self, raw: Num[np.ndarray, "1 *shape"]) -> Inspection:
        r"""Judge one input: its code, how likely it is, and how odd it is among the validation set.

        Args:
            raw: The input, (1, \*), raw units.

        Returns:
            The record. The reconstruction is not in it: the page decodes the code.
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
            elbo=float(self.model.scaling.log_transform_slope(batch)[0] - scores.negative_elbo[0]),
            log_likelihood=float(bound[0, 0]),
            standardised_residual=float(scores.standardised_residual[0]),
            code_log_prob=-float(scores.negative_mixture_log_prob[0]),
            odder_than=odder_than,
        )


def _generator(seed: int) -> torch.Generator:
    return stream(seed, "explorer")
