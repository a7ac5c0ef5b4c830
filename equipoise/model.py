r"""The variational autoencoder: an encoder, a decoder, a noise model, and the units of the data.

Any module from (B, \*) to (B, 2d) serves as encoder, and any module from (B, d) to (B, \*) as
decoder. They need no base class of this library. :meth:`VAE.build` makes a pair from
``networks.py``.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.catalogue import ARCHITECTURES
from equipoise.categories import Categories, Likelihood, MixedLikelihood
from equipoise.correlation import AnyGaussian
from equipoise.digital import Levels
from equipoise.gaussian import Gaussian
from equipoise.kernels import bounded
from equipoise.labels import joined, labelled, labels_of, one_hot
from equipoise.levels import Levels as CategoryLevels
from equipoise.networks import (
    ConvDecoder,
    MLPDecoder,
    build_decoder,
    build_encoder,
    build_head,
    default_architecture,
    start_at_data,
)
from equipoise.noise import GlobalNoise, NoiseModel, PredictedNoise, describe_noise
from equipoise.objectives import LatentVariableModel
from equipoise.powers import yeo_johnson, yeo_johnson_inverse, yeo_johnson_log_slope

LOG_VAR_RANGE = (-20.0, 5.0)
"""Bounds on the log-variance of q(z|x). The units of a model that trains well stay far from both.

If one bad step throws the encoder beyond a bound, it keeps the gradient that brings it back."""


FAR_RANGES, FAR_SHARE, SMALL_RANGE = 10.0, 0.01, 0.02
"""Distance of an image's values, in the range of the training, and the share of values so far, from
which they are in another unit; and the share of the range below which the largest value makes one
wonder."""
FAR_STDS, MIN_ROWS = 10.0, 10
"""Std from the mean at which the median of a column makes one wonder, and rows that it takes."""
MAX_INPUT = 1e6
"""Largest input of an encoder in evaluation, model units: a million std of a table's column.

Beyond it float32 overflows somewhere in the networks, and a code would be NaN. The likelihood is
that of the input as it is."""


@runtime_checkable
class CodeSource(Protocol):
    """A source of codes to decode: the prior, a fitted mixture or the aggregate posterior."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n codes, (n, d)."""


class Interval(NamedTuple):
    r"""The interval in which each dimension lies with a given probability.

    Args:
        lower: Lower bounds, (B, \*), in the unit of the mean that they surround.
        upper: Upper bounds, (B, \*), in the same unit.
    """

    lower: Tensor
    upper: Tensor


class Scaling(nn.Module):
    r"""The map between raw data and model units, x = (raw - offset) / scale, and back.

    Images of 8 bits have offset 0 and scale 255, so that x is in [0, 1], the unit of the paper.
    Columns of a table are standardised. The map belongs to the model: a model that was saved and
    loaded still accepts and returns the user's own units.

    Args:
        offset: Raw value that becomes zero. It broadcasts to one example.
        scale: Raw difference that becomes one, positive. It broadcasts to one example.
        quantum: Distance of two neighbouring values of digital data, in model units. None for
            continuous data.
        columns: Names of the columns of a table, if they have names.
        levels: Levels of the columns of a table that are categories, by their number. Raw data and
            model units have the number of a level there.

    Raises:
        ValueError: If the offset is not finite, or the scale is not positive and finite.

    Example:
        >>> pixels = Scaling(torch.tensor(0.0), torch.tensor(255.0), quantum=1 / 255)
        >>> pixels(torch.tensor([[0, 255]], dtype=torch.uint8))
        tensor([[0., 1.]])
    """

    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        offset: Tensor,
        scale: Tensor,
        quantum: float | None = None,
        columns: tuple[str, ...] = (),
        levels: CategoryLevels | None = None,
    ) -> None:
        super().__init__()

        scale_is_valid = torch.all(scale > 0) and torch.all(torch.isfinite(scale))
        if not (scale_is_valid and torch.all(torch.isfinite(offset))):
            raise ValueError(
                "Scaling needs a finite offset and a positive, finite scale in every dimension."
            )

        self.register_buffer("offset", offset.float())
        self.register_buffer("scale", scale.float())
        self.quantum = quantum
        self.columns = tuple(columns)
        self.levels = dict(levels or {})

    def name_of(self, column: int) -> str:
        """Name a column of a table within a sentence.

        Args:
            column: Its number.

        Returns:
            "column 'NAME'", or "column N" if it has no name.
        """
        return f"column {self.columns[column]!r}" if self.columns else f"column {column}"

    def short_name_of(self, column: int) -> str:
        """Name a column of a table in a list or a figure.

        Args:
            column: Its number.

        Returns:
            Its name, or "column N" if it has none.
        """
        return self.columns[column] if self.columns else f"column {column}"

    def forward(self, raw: Tensor) -> Tensor:
        r"""Convert raw data of any dtype to model units.

        Args:
            raw: Raw data, (B, \*).

        Returns:
            The data in model units, (B, \*), of the dtype of the scale, which is float32. They
            carry the labels that the raw data carry.
        """
        if raw.dtype in (torch.int32, torch.int64):
            # Levels beyond 2^24 become float32 only when the offset is gone.
            x = (raw.double() - self.offset).to(self.scale.dtype) / self.scale
        else:
            x = (raw.to(self.scale.dtype) - self.offset) / self.scale
        return labelled(x, labels_of(raw))

    def restore(self, x: Tensor) -> Tensor:
        r"""Convert means or samples from model units to raw units.

        Args:
            x: Means or samples, (B, \*), model units.

        Returns:
            The same in raw units, not rounded, (B, \*).
        """
        return x * self.scale + self.offset

    def restore_levels(self, x: Tensor) -> Tensor:
        r"""Convert means or samples to values that the raw data can have.

        Digital data are rounded and clamped to their range, so that a level that was scaled comes
        back to the bit. Continuous data are only rescaled.

        Args:
            x: Means or samples, (B, \*), model units.

        Returns:
            The values in raw units, (B, \*). If the data are digital, they are uint8 where this
            type holds the range, and int32 otherwise.
        """
        if self.quantum is None:
            return self.restore(x)

        low, high = self.offset.double(), self.offset.double() + self.scale
        dtype = torch.int32 if self.is_wide else torch.uint8

        raw = (x * self.scale).double() + low
        return raw.round().clamp(min=low, max=high.clamp(max=torch.iinfo(dtype).max)).to(dtype)

    @property
    def is_wide(self) -> bool:
        """Whether the training had whole numbers beyond 8 bits, such as those of 16-bit images."""
        if self.quantum is None:
            return False
        low, high = self.offset.double(), self.offset.double() + self.scale
        return bool(low.min() < 0 or high.max() > 255)

    def check(self, raw: Tensor) -> None:
        r"""Refuse data that cannot be in the raw units of this model.

        A model of digital data takes whole numbers, and a model of continuous data floating-point
        numbers. One of images takes values beyond those of its training, such as brighter pixels.
        It refuses an image if more than one value in a hundred is more than ten times the range of
        the training away, such as pixels up to 255 where 1 is white.

        Args:
            raw: Raw data, (B, \*).

        Raises:
            ValueError: If the data have another type or unit than those of the training.
        """
        is_digital = self.quantum is not None
        # Whole numbers of so many levels became real ones for the training, too.
        has_too_many_levels = not self.scale.ndim and float(self.scale) >= 2**24
        if is_digital == raw.is_floating_point() and not has_too_many_levels:
            numbers = "whole" if is_digital else "real"
            advice = "in another unit. Convert them first."
            if is_digital and bool((raw == raw.round()).all()):
                advice = "whole numbers, too: store them as integers, as x.astype('int32') does."
            raise ValueError(
                f"The model was trained on {numbers} numbers{self._range()}; these are {raw.dtype} "
                f"from {float(raw.min()):g} to {float(raw.max()):g}, {advice}"
            )

        if not self.scale.ndim:
            is_far = (self(raw) - 0.5).abs() > FAR_RANGES
            if bool((is_far.flatten(1).float().mean(1) > FAR_SHARE).any()):
                raise ValueError(f"{self._compare(raw)} Bring them to the same range.")

    def range_warning(self, raw: Tensor) -> str | None:
        r"""Notice data that :meth:`check` accepts, but that seem to be in another unit.

        Args:
            raw: Raw data, (B, \*).

        Returns:
            For images, a warning if they reach half their range beyond it, or only a fiftieth of
            it. For tables of at least ten rows, a warning if half the values of a column are more
            than ten std from its mean. Otherwise None.
        """
        x = self(raw)
        if not self.scale.ndim:
            low, high = float(x.min()), float(x.max())
            if -0.5 <= low <= high <= 1.5 and not 0 < high < SMALL_RANGE:
                return None
            return f"{self._compare(raw)} Are they in the same unit?"

        if len(x) < MIN_ROWS:
            return None
        far = x.abs().nanmedian(0).values > FAR_STDS
        far[list(self.levels)] = False
        if not far.any():
            return None
        columns = far.nonzero().flatten().tolist()
        first = columns[0]
        was = f"{float(self.offset[first]):.6g} with a std of {float(self.scale[first]):.3g}"
        values = raw[:, first][~raw[:, first].isnan()]
        here = f"from {float(values.min()):.6g} to {float(values.max()):.6g}"
        return (
            f"Half of the values of {len(columns)} columns are more than {FAR_STDS:g} std from the "
            f"mean of the training. C{self.name_of(first)[1:]} was {was} there, and is {here} "
            "here. Are they in the same unit?"
        )

    def warn_of_range(self, raw: Tensor, stacklevel: int = 1) -> None:
        r"""Warn as :meth:`range_warning` says, where it says something.

        Args:
            raw: Raw data, (B, \*).
            stacklevel: How far above the caller the line is that the warning names; 1 is the
                caller's own.
        """
        text = self.range_warning(raw)
        if text is not None:
            warnings.warn(text, stacklevel=stacklevel + 1)

    def _range(self) -> str:
        """Name the range of the scale, in which the training lies; empty for tables."""
        if self.scale.ndim:
            return ""
        return f" within [{float(self.offset):g}, {float(self.offset + self.scale):g}]"

    def _compare(self, raw: Tensor) -> str:
        """Name the range of an image in the training, and that of others."""
        return (
            f"The model was trained on values{self._range()}; these are from "
            f"{float(raw.min()):g} to {float(raw.max()):g}."
        )

    def restore_std(self, std: Tensor, mean: Tensor | None = None) -> Tensor:
        r"""Convert standard deviations or errors, which have no offset, to raw units.

        Args:
            std: Standard deviations or errors, (B, \*), model units.
            mean: Where they are, (B, \*), model units. A linear map has the same everywhere, and
                needs none.

        Returns:
            The same in raw units, (B, \*).
        """
        return std * self.scale

    def log_slope(self, raw: Tensor) -> Tensor:
        r"""Compute log dx/draw, by which a log-density in model units becomes one in raw units.

        Args:
            raw: Raw data, (B, \*).

        Returns:
            The logarithm for each value, (B, \*) or (1, \*) where it is the same for all.
        """
        return -self.scale.log().expand(raw.shape[1:])[None]

    def log_transform_slope(self, raw: Tensor) -> Tensor:
        r"""Compute by how much a power transform alone changes the log-density of each example.

        A log-density in model units and this are one in units of standardised columns, in which
        models with and without a transform are compared.

        Args:
            raw: Raw data, (B, \*), with NaN where a value is missing, which does not count.

        Returns:
            The sum of the logarithms of the slopes, (B,), 0 without a transform.
        """
        return raw.new_zeros(len(raw), dtype=self.scale.dtype)


class PowerScaling(Scaling):
    r"""Standardised columns, of which skewed ones are made symmetric by a power transform.

    .. math:: x = \bigl(t_\lambda((\mathrm{raw} - \mathrm{offset}) / \mathrm{scale})
        - \mathrm{centre}\bigr) / \mathrm{spread}

    t is :func:`equipoise.powers.yeo_johnson`. A Gaussian around a mean in model units is a skewed
    distribution in raw units: :meth:`restore` returns its median, and :meth:`restore_std` the std
    near there.

    Args:
        offset: Raw value that becomes zero before the transform, (D,).
        scale: Raw difference that becomes one before the transform, (D,).
        powers: Powers lambda from 0 to 2, (D,).
        centre: Mean of the transformed columns, (D,).
        spread: Std of the transformed columns, (D,).
        columns: Names of the columns, if they have names.
        levels: Levels of the columns that are categories. Those are neither scaled nor transformed.
    """

    powers: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        offset: Tensor,
        scale: Tensor,
        powers: Tensor,
        centre: Tensor,
        spread: Tensor,
        columns: tuple[str, ...] = (),
        levels: CategoryLevels | None = None,
    ) -> None:
        super().__init__(offset, scale, None, columns, levels)
        self.register_buffer("powers", powers.float())
        self.register_buffer("centre", centre.float())
        self.register_buffer("spread", spread.float())

    def forward(self, raw: Tensor) -> Tensor:
        """Convert raw rows to model units."""
        x = (yeo_johnson(super().forward(raw), self.powers) - self.centre) / self.spread
        return labelled(x, labels_of(raw))

    def restore(self, x: Tensor) -> Tensor:
        """Convert model units to raw rows."""
        return super().restore(self._standardised(x))

    def restore_std(self, std: Tensor, mean: Tensor | None = None) -> Tensor:
        """Convert standard deviations or errors near a mean to raw units."""
        if mean is None:
            raise ValueError("the columns are transformed: give the mean that the std is around")
        slope = yeo_johnson_log_slope(self._standardised(mean), self.powers).exp() / self.spread
        return super().restore_std(std / slope, mean)

    def log_slope(self, raw: Tensor) -> Tensor:
        """Compute log dx/draw for each value."""
        return super().log_slope(raw) + self._log_transform_slopes(raw)

    def log_transform_slope(self, raw: Tensor) -> Tensor:
        """Compute the log-slope of the transform of each row, of what is observed, (B,)."""
        return self._log_transform_slopes(raw).masked_fill(raw.isnan(), 0.0).sum(1)

    def _log_transform_slopes(self, raw: Tensor) -> Tensor:
        """Log-slope of the transform at each value, (B, D)."""
        standardised = super().forward(raw)
        return yeo_johnson_log_slope(standardised, self.powers) - self.spread.log()

    def _standardised(self, x: Tensor) -> Tensor:
        """Undo the transform."""
        return yeo_johnson_inverse(x * self.spread + self.centre, self.powers)


class VAE(nn.Module):
    r"""A variational autoencoder with Gaussian posterior, Gaussian likelihood and a noise model.

    Args:
        encoder: Module from (B, \*shape) to (B, 2 d), the mean and log-variance of q(z|x) side by
            side, or to a :class:`Gaussian`.
        decoder: Module from (B, d) to (B, \*shape), the mean of p(x|z).
        noise: Model of the variance of p(x|z).
        shape: Shape of one example.
        latent_dim: Number of latent units d.
        scaling: Map between the data's own units and model units. If None, the two are the same.
        architecture: Name under which the networks can be built again. None for networks of the
            user's own.
        width: Width with which the networks can be built again.
        mean_bounds: Smallest and largest value that the data can have, model units, (0, 1) for
            images. The decoder's mean is clamped to them, so that a black background is black. None
            for data without bounds.
        deterministic: Whether q(z|x) is a point, up to a std of e^-10. The model is then an
            autoencoder, for objectives that have no posterior.
        reads_gaps: Whether the encoder also reads which values of a row are missing. Its input is
            then (B, 2 D): the row, with zeros in its gaps, and ones where the gaps are. Otherwise
            it gets the zeros alone.
        label_names: Names of the labels of a conditional model, see ``labels.py``. Encoder, decoder
            and noise then read the label that an example or a code carries.

    Raises:
        ValueError: If a network does not map its input to the expected shape.

    Example:
        >>> vae = VAE.build((1, 8, 8), latent_dim=2)
        >>> vae.reconstruct(torch.zeros(5, 1, 8, 8)).mean.shape
        torch.Size([5, 1, 8, 8])
    """

    counted: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        noise: NoiseModel,
        *,
        shape: tuple[int, ...],
        latent_dim: int,
        scaling: Scaling | None = None,
        architecture: str | None = None,
        width: int = 32,
        mean_bounds: tuple[float, float] | None = None,
        deterministic: bool = False,
        reads_gaps: bool = False,
        label_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.noise = noise

        if scaling is None:
            scaling = Scaling(torch.zeros(()), torch.ones(()))
        self.scaling = scaling

        self.shape = tuple(shape)
        self.latent_dim = latent_dim
        self.architecture = architecture
        self.width = width
        self.mean_bounds = mean_bounds
        self.deterministic = deterministic
        self.reads_gaps = reads_gaps
        self.label_names = tuple(label_names)
        self.categories: Categories | None = None
        if scaling.levels:
            self.categories = Categories(scaling.levels, self.shape[0])
        # Set in training, and not saved: the dimensions over which residuals are pooled.
        self.register_buffer("counted", None, persistent=False)

        self._check_shapes()

    @classmethod
    def build(
        cls,
        shape: tuple[int, ...],
        latent_dim: int = 16,
        *,
        architecture: str | None = None,
        width: int = 32,
        noise: NoiseModel | None = None,
        scaling: Scaling | None = None,
        mean_bounds: tuple[float, float] | None = None,
        deterministic: bool = False,
        reads_gaps: bool = False,
        label_names: tuple[str, ...] = (),
    ) -> "VAE":
        """Make a model with networks that suit the data's shape.

        Args:
            shape: Shape of one example, (C, H, W) or (D,).
            latent_dim: Number of latent units d.
            architecture: "mlp", "conv" or "residual". None chooses by the shape.
            width: Width of the networks, see ``networks.py``.
            noise: Noise model; :class:`GlobalNoise` if None.
            scaling: Map between the data's own units and model units. If None, the two are the
                same.
            mean_bounds: Smallest and largest value that the data can have, see :class:`VAE`.
            deterministic: Whether q(z|x) is a point, see :class:`VAE`.
            reads_gaps: Whether the encoder reads which values are missing, see :class:`VAE`.
            label_names: Names of the labels of a conditional model, see :class:`VAE`.

        Returns:
            The untrained model.
        """
        if architecture is None:
            architecture = default_architecture(shape)
        if noise is None:
            noise = GlobalNoise()

        n_labels = len(label_names)
        levels = None if scaling is None else scaling.levels
        read = encoder_shape(shape, reads_gaps, levels, n_labels, architecture)
        returned = decoder_shape(shape, levels)
        return cls(
            build_encoder(architecture, read, latent_dim, width),
            build_decoder(architecture, returned, latent_dim + n_labels, width),
            noise,
            shape=shape,
            latent_dim=latent_dim,
            scaling=scaling,
            architecture=architecture,
            width=width,
            mean_bounds=mean_bounds,
            deterministic=deterministic,
            reads_gaps=reads_gaps,
            label_names=label_names,
        )

    def pooled(self, values: Float[Tensor, "batch *event"]) -> Tensor:
        r"""Select the dimensions over which residuals are pooled into one variance.

        Args:
            values: Residuals, or what belongs to them, (B, \*).

        Returns:
            All of them, or without the constant columns of a table, (B, D').
        """
        return values if self.counted is None else values[:, self.counted]

    @property
    def has_numbers(self) -> bool:
        """Whether any dimension is a number, so that there is a noise variance."""
        return self.categories is None or bool(self.categories.is_numeric.any())

    @property
    def levels(self) -> Levels | None:
        """The values that the data can have, model units. None for continuous data."""
        if self.scaling.quantum is None:
            return None

        low, high = self.mean_bounds or (-math.inf, math.inf)
        return Levels(self.scaling.quantum, low, high)

    def encode(self, x: Float[Tensor, "batch *event"]) -> Gaussian:
        r"""Compute the approximate posterior q(z|x).

        Args:
            x: Data in model units, (B, \*). NaN in rows (B, D) marks what is missing.

        Returns:
            Gaussian over codes, (B, d). In evaluation mode, that of the data within
            :data:`MAX_INPUT`. Its mean and its samples carry the labels of the data.
        """
        labels = labels_of(x)
        if not self.training:
            x = labelled(x.clamp(-MAX_INPUT, MAX_INPUT), labels)
        parameters = self.encoder(self._encoder_input(x))
        if isinstance(parameters, tuple):
            mean, log_var = parameters
        else:
            mean, log_var = parameters.chunk(2, dim=1)

        log_var = bounded(at_least_float32(log_var), *LOG_VAR_RANGE)
        if self.deterministic:
            log_var = torch.full_like(log_var, LOG_VAR_RANGE[0])

        return Gaussian(labelled(at_least_float32(mean), labels), log_var)

    def _encoder_input(self, x: Tensor) -> Tensor:
        """Put zeros in the gaps of rows, and add what else the encoder reads of an example.

        These are gaps, categories as one-hot vectors, and labels as numbers or constant planes.
        """
        parts = [x]
        if len(self.shape) == 1:
            missing = x.isnan()
            parts = [x.masked_fill(missing, 0.0)]
            if self.reads_gaps:
                parts.append(missing.to(x.dtype))
            if self.categories is not None:
                parts[0] = parts[0].masked_fill(self.categories.is_category, 0.0)
                parts.append(self.categories.one_hot(x))
        if self.label_names:
            label = one_hot(x, len(self.label_names))
            if _reads_planes(self.architecture):
                planes = label.view(*label.shape, *(1 for _ in self.shape[1:]))
                label = planes.expand(-1, -1, *self.shape[1:])
            else:
                parts[0] = parts[0].flatten(1)
            parts.append(label)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _decoder_input(self, z: Tensor) -> Tensor:
        """Add the labels that codes carry, (B, d + L)."""
        return torch.cat([z, one_hot(z, len(self.label_names))], 1) if self.label_names else z

    def decode_mean(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch *event"]:
        r"""Compute the mean m(z) of p(x|z).

        Args:
            z: Codes, (B, d).

        Returns:
            The mean, (B, \*), model units, within ``mean_bounds``; NaN for categories.
        """
        output = self._within_bounds(self.decoder(self._decoder_input(z)))
        if self.categories is None:
            return output
        return self.categories.hide(output[:, : self.shape[0]])

    def mean_and_context(
        self, z: Float[Tensor, "batch latent"]
    ) -> tuple[Float[Tensor, "batch *output"], Float[Tensor, "batch *context"]]:
        r"""Compute the mean m(z), and what the noise model reads.

        Args:
            z: Codes, (B, d).

        Returns:
            The mean, (B, \*), with the logits of categories behind it, for :meth:`around`; and the
            codes with their labels, or the features from which the decoder computed the mean if the
            noise model reads those.
        """
        code = self._decoder_input(z)
        if not self.noise.reads_features:
            if self.categories is None:
                return self.decode_mean(z), code
            return self._within_bounds(self.decoder(code)), code

        decoder = cast(MLPDecoder | ConvDecoder, self.decoder)
        features = decoder.hidden(code)
        mean = decoder.output(features).view(-1, *decoder_shape(self.shape, self.scaling.levels))
        return self._within_bounds(mean), features

    def around(self, output: Tensor, density: Callable[[Tensor], AnyGaussian]) -> Likelihood:
        """Put a density around the mean, and read the logits of categories behind it.

        Args:
            output: What :meth:`mean_and_context` returned.
            density: Makes the density of the numbers from their mean, (B, D).

        Returns:
            The density itself if there are no categories.
        """
        if self.categories is None:
            return density(output)
        mean, logits = output.tensor_split([self.shape[0]], 1)
        return MixedLikelihood(density(mean), logits, self.categories)

    def _within_bounds(self, mean: Tensor) -> Tensor:
        """Return the decoder's result in full precision and within the bounds of the data."""
        mean = at_least_float32(mean)
        return mean if self.mean_bounds is None else bounded(mean, *self.mean_bounds)

    def decode(self, z: Float[Tensor, "batch latent"]) -> Likelihood:
        r"""Compute the likelihood p(x|z): the decoder's mean with the noise model's variance.

        Args:
            z: Codes, (B, d).

        Returns:
            Gaussian over data, (B, \*), model units, and probabilities of categories.
        """
        output, context = self.mean_and_context(z)
        return self.around(output, lambda mean: self.noise.likelihood(mean, context))

    def reconstruct(self, x: Float[Tensor, "batch *event"]) -> Likelihood:
        r"""Decode the mean of q(z|x).

        Args:
            x: Data in model units, (B, \*).

        Returns:
            Gaussian over data, (B, \*), model units. Its ``std`` is the predicted std of each
            dimension, the uncertainty map.
        """
        return self.decode(self.encode(x).mean)

    def interval(self, x: Float[Tensor, "batch *event"], coverage: float = 0.95) -> Interval:
        r"""Reconstruct, with an interval per dimension that holds the given share of the errors.

        The half-width of the interval is a multiple of the predicted std. At the end of stage 2 the
        multiple is measured on held-out errors, which need not be Gaussian, see
        :meth:`PredictedNoise.calibrate_intervals`. Without such a measurement it is the multiple
        that holds the share of a Gaussian.

        Args:
            x: Data in model units, (B, \*).
            coverage: Share of the errors over the dimensions that vary, above 0 and below 1.

        Returns:
            Bounds around the mean of :meth:`reconstruct`, (B, \*), model units. ``scaling.restore``
            converts each bound to raw units.

        Raises:
            ValueError: If the coverage is out of its domain.

        Example:
            >>> vae = VAE.build((3,), latent_dim=1)  # untrained: a std of 1
            >>> lower, upper = vae.interval(torch.zeros(1, 3), coverage=0.95)
            >>> ((upper - lower) / 2).tolist()[0]  # doctest: +ELLIPSIS
            [1.9599..., 1.9599..., 1.9599...]
        """
        if not 0 < coverage < 1:
            raise ValueError(
                f"coverage must be above 0 and below 1, such as 0.95, got {coverage:g}"
            )

        likelihood = self.reconstruct(x)
        n_std_of_gaussian = NormalDist().inv_cdf((1 + coverage) / 2)
        half_width = self.noise.interval_factor(n_std_of_gaussian) * likelihood.std
        return Interval(likelihood.mean - half_width, likelihood.mean + half_width)

    def generate(
        self, n: int, source: CodeSource, generator: torch.Generator | None = None
    ) -> Likelihood:
        r"""Decode codes drawn from a source.

        Args:
            n: Number of samples.
            source: Prior, mixture or aggregate posterior of ``aggregate.py``.
            generator: Source of randomness.

        Returns:
            Gaussian over data, (n, \*), model units. Its mean is what is usually shown; its
            ``sample`` adds the noise of p(x|z).
        """
        codes = source.sample(n, generator).to(self.scaling.scale.dtype)
        return self.decode(codes)

    def predict_variance(
        self,
        reference_var: Tensor,
        floor_var: Tensor,
        calibration_shape: tuple[int, ...] = (),
        network: Literal["head", "decoder"] = "decoder",
    ) -> None:
        r"""Enter stage 2: predict a variance for each dimension of each example, eq. (11).

        The new noise model replaces the one of stage 1. Its network is a second decoder, which
        starts from the weights of the first, or a head on the features of the first. In both cases
        its output is exactly zero at first. Therefore the model's likelihood does not change at
        this moment.

        Args:
            reference_var: Variance sigma_*^2 of stage 1, in squared model units.
            floor_var: Smallest variance that can be predicted, in squared model units.
            calibration_shape: () or the shape of one example, see :class:`PredictedNoise`.
            network: "head" or "decoder".

        Raises:
            ValueError: If a head is asked for, and the decoder is of the user's own.
        """
        device = next(self.parameters()).device
        reads_features = network == "head"

        variance_network = self.blank_variance_network(reads_features=reads_features)
        if self.architecture is not None and not reads_features:
            weights = self.decoder.state_dict()
            if self.categories is not None:
                # The last layer has logits, too, and becomes zero anyway.
                last = variance_network.state_dict()
                weights |= {name: last[name] for name in last if name.startswith("output.")}
            variance_network.load_state_dict(weights)
        # The last layer may also be a convolution, whose parameters have the same names.
        output = cast(nn.Linear, variance_network.output)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

        noise = PredictedNoise(
            variance_network,
            reference_var,
            floor_var,
            calibration_shape,
            reads_features=reads_features,
        )
        self.noise = noise.to(device)

    def blank_variance_network(self, *, reads_features: bool = False) -> nn.Module:
        """Make an untrained variance network, as :meth:`predict_variance` needs it.

        Args:
            reads_features: Whether it reads the decoder's features, and not codes.

        Returns:
            A decoder or a head of ``networks.py``.

        Raises:
            ValueError: If a head is asked for, and the decoder is of the user's own.
        """
        architecture = self.architecture
        if reads_features:
            if architecture is None:
                raise ValueError(
                    "A variance head reads the features of a decoder of equipoise's; with networks "
                    "of your own, predict the variance by a second decoder (network='decoder')."
                )
            return build_head(architecture, self.shape, self.width)

        if architecture is None:
            architecture = default_architecture(self.shape)
        n_read = self.latent_dim + len(self.label_names)
        return build_decoder(architecture, self.shape, n_read, self.width)

    def start_at_data(self, mean: Tensor, std: Tensor, logits: Tensor | None = None) -> None:
        r"""Fit untrained networks to the scale of the data.

        Networks of the user's own stay as they are.

        Args:
            mean: Mean of the training data, of the shape of one example, model units.
            std: Standard deviation of the training data over all dimensions, (), model units.
            logits: Log-frequencies of the levels of categories, see
                :meth:`Categories.log_frequencies`.
        """
        if self.architecture is not None:
            start_at_data(self.encoder, self.decoder, mean, std, logits)

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of images in memory that suits the networks.

        Channels last is faster for our convolutions. A user's own networks get the usual layout,
        because they may rely on it when they change shapes.
        """
        is_conv = self.architecture is not None and ARCHITECTURES[self.architecture].needs_images
        if is_conv and len(self.shape) == 3:
            return torch.channels_last

        return torch.contiguous_format

    def place(self, device: torch.device | str) -> None:
        """Move the model to a device, in the layout of :attr:`memory_format`.

        Args:
            device: Where to compute.
        """
        self.to(device)

        if self.memory_format is torch.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def description(self) -> dict[str, Any]:
        """Describe the model by JSON values, from which ``store.py`` builds it before it fills it.

        Returns:
            Constructor arguments, shapes, and the class names of the networks.
        """
        mean_bounds = None if self.mean_bounds is None else list(self.mean_bounds)
        # Named only where there are some, so that other models are described as ever.
        further: dict[str, Any] = {}
        if self.reads_gaps:
            further["reads_gaps"] = True
        if self.label_names:
            further["label_names"] = list(self.label_names)
        if self.scaling.columns:
            further["columns"] = list(self.scaling.columns)
        if isinstance(self.scaling, PowerScaling):
            further["power_transform"] = True
        if self.scaling.levels:
            further["levels"] = {str(i): list(names) for i, names in self.scaling.levels.items()}

        return {
            "shape": list(self.shape),
            "latent_dim": self.latent_dim,
            "architecture": self.architecture,
            "width": self.width,
            "mean_bounds": mean_bounds,
            "deterministic": self.deterministic,
            "encoder": type(self.encoder).__qualname__,
            "decoder": type(self.decoder).__qualname__,
            "quantum": self.scaling.quantum,
            "offset_shape": list(self.scaling.offset.shape),
            "scale_shape": list(self.scaling.scale.shape),
            "noise": describe_noise(self.noise),
            **further,
        }

    @torch.no_grad()
    def _check_shapes(self) -> None:
        """Run two examples through the networks, so that networks that do not fit fail here.

        An error here can name the network and the shapes. An error in training could not.
        """
        parameter = next(self.parameters(), torch.zeros(()))
        x = torch.zeros(2, *self.shape, dtype=parameter.dtype, device=parameter.device)

        was_training = self.training
        self.eval()

        try:
            read = self._encoder_input(x)
            parameters = self.encoder(read)
            if isinstance(parameters, tuple):
                shapes = [tuple(tensor.shape) for tensor in parameters]
                expected = [(2, self.latent_dim), (2, self.latent_dim)]
            else:
                shapes = [tuple(parameters.shape)]
                expected = [(2, 2 * self.latent_dim)]

            if shapes != expected:
                raise ValueError(
                    f"The encoder must map {tuple(read.shape)} to {expected[0]} (mean and "
                    f"log-variance of {self.latent_dim} latent units) or to a Gaussian of two "
                    f"{(2, self.latent_dim)}, got {shapes}."
                )

            z = torch.zeros(2, self.latent_dim, dtype=x.dtype, device=x.device)
            z = self._decoder_input(z)
            mean = self.decoder(z)
            expected_output = (2, *decoder_shape(self.shape, self.scaling.levels))
            if tuple(mean.shape) != expected_output:
                raise ValueError(
                    f"The decoder must map {tuple(z.shape)} to {expected_output}, "
                    f"got {tuple(mean.shape)}."
                )
        finally:
            self.train(was_training)


# From Python 3.12 on, isinstance() does not see attributes of a module that are modules themselves.
LatentVariableModel.register(VAE)


@torch.no_grad()
def encode_all(model: VAE, batches: Iterable[Tensor]) -> Gaussian:
    r"""Compute the posterior q(z|x) of every example.

    Args:
        model: Model in evaluation mode.
        batches: Raw data, (B, \*) each, on the device of the model.

    Returns:
        Means and log-variances, (N, d).

    Raises:
        ValueError: If there are no batches.
    """
    posteriors = [model.encode(model.scaling(raw)) for raw in batches]
    if not posteriors:
        raise ValueError("expected at least one batch of examples to encode, got none")

    means = joined([posterior.mean for posterior in posteriors])
    log_vars = torch.cat([posterior.log_var for posterior in posteriors])
    return Gaussian(means, log_vars)


def encoder_shape(
    shape: tuple[int, ...],
    reads_gaps: bool,
    levels: CategoryLevels | None = None,
    n_labels: int = 0,
    architecture: str | None = None,
) -> tuple[int, ...]:
    """Shape of what an encoder reads of one example.

    Args:
        shape: Shape of the example.
        reads_gaps: Whether it also reads which values are missing, see :class:`VAE`.
        levels: Levels of the columns that are categories.
        n_labels: Number of labels L of a conditional model.
        architecture: Name of the networks, of which some read labels as planes of an image.

    Returns:
        The shape; that of a row twice if the gaps are read, one number more for each level, and L
        numbers or planes more if there are labels.

    Raises:
        ValueError: If the gaps of anything but rows are to be read.
    """
    if reads_gaps and len(shape) != 1:
        raise ValueError(f"only rows of a table can have missing values, not examples {shape}")
    if reads_gaps:
        shape = (2 * shape[0],)
    shape = decoder_shape(shape, levels)
    if not n_labels:
        return shape
    if _reads_planes(architecture):
        return (shape[0] + n_labels, *shape[1:])
    return (math.prod(shape) + n_labels,)


def _reads_planes(architecture: str | None) -> bool:
    """Tell whether networks read a label as constant planes, and not as further numbers."""
    return architecture is not None and ARCHITECTURES[architecture].needs_images


def decoder_shape(shape: tuple[int, ...], levels: CategoryLevels | None) -> tuple[int, ...]:
    """Shape of what a decoder returns for one example.

    Args:
        shape: Shape of the example.
        levels: Levels of the columns that are categories.

    Returns:
        The shape, with one more value, a logit, for each level.

    Raises:
        ValueError: If anything but rows is to have categories.
    """
    if not levels:
        return shape
    if len(shape) != 1:
        raise ValueError(f"only rows of a table can have categories, not examples {shape}")
    return (shape[0] + sum(map(len, levels.values())),)


def at_least_float32(values: Tensor) -> Tensor:
    """Convert bfloat16 and float16, which mixed precision returns, to float32.

    Residuals and likelihoods are sums of many terms, which need the digits.

    Args:
        values: Values of any floating dtype.

    Returns:
        The same values, float32 or float64.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.to(dtype)
