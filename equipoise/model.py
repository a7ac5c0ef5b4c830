r"""The variational autoencoder: an encoder, a decoder, a noise model, and the units of the data.

Any module from (B, \*) to (B, 2d) serves as encoder and any from (B, d) to (B, \*) as decoder; no base class of
ours is needed. :meth:`VAE.build` makes a pair from ``networks.py``.
"""

from collections.abc import Iterable
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.catalogue import ARCHITECTURES
from equipoise.gaussian import Gaussian
from equipoise.kernels import bounded
from equipoise.networks import build_decoder, build_encoder, default_architecture, start_at_data
from equipoise.noise import GlobalNoise, NoiseModel, PredictedNoise, describe_noise

LOG_VAR_RANGE = (-20.0, 5.0)
"""Bounds on the log-variance of q(z|x); no healthy unit comes near either end. An encoder thrown beyond them by one bad
step keeps the gradient that brings it back."""


@runtime_checkable
class CodeSource(Protocol):
    """Where codes to decode come from: the prior, a fitted mixture, the aggregate posterior."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n codes, (n, d)."""


class Interval(NamedTuple):
    r"""Where each dimension lies with a given probability.

    Args:
        lower: (B, \*), in the unit of the data it is for.
        upper: likewise.
    """

    lower: Tensor
    upper: Tensor


class Scaling(nn.Module):
    r"""The map between raw data and model units, x = (raw - offset) / scale, and back.

    Images of 8 bits have offset 0 and scale 255, so x is in [0, 1], the unit of the paper; columns of a table
    are standardised. It belongs to the model, so that a loaded model accepts and returns the user's own units.

    Args:
        offset: in raw units, broadcasts to one example.
        scale: in raw units, positive, broadcasts to one example.
        quantum: distance of two neighbouring values in model units, for digital data; None for continuous data.

    Raises:
        ValueError: if the scale is not positive and finite.

    Example:
        >>> pixels = Scaling(torch.tensor(0.0), torch.tensor(255.0), quantum=1 / 255)
        >>> pixels(torch.tensor([[0, 255]], dtype=torch.uint8))
        tensor([[0., 1.]])
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, offset: Tensor, scale: Tensor, quantum: float | None = None) -> None:
        super().__init__()
        if not bool(
            torch.all(scale > 0)
            and torch.all(torch.isfinite(scale))
            and torch.all(torch.isfinite(offset))
        ):
            raise ValueError(
                "Scaling needs a finite offset and a positive, finite scale in every dimension."
            )
        self.register_buffer("offset", offset.float())
        self.register_buffer("scale", scale.float())
        self.quantum = quantum

    def forward(self, raw: Tensor) -> Tensor:
        r"""Take raw data, of any dtype, to model units.

        Args:
            raw: (B, \*).

        Returns:
            Float32 tensor of the same shape.
        """
        return (raw.to(self.scale.dtype) - self.offset) / self.scale

    def restore(self, x: Tensor) -> Tensor:
        r"""Take means or samples in model units back to raw units.

        Args:
            x: (B, \*), model units.

        Returns:
            The same shape, raw units; not rounded.
        """
        return x * self.scale + self.offset

    def restore_levels(self, x: Tensor) -> Tensor:
        r"""Take means or samples back to raw units as the data would be: digital data rounded and within range.

        Args:
            x: (B, \*), model units.

        Returns:
            The same shape, raw units; whole numbers if the data are digital, uint8 where that holds them.
        """
        raw = self.restore(x)
        if self.quantum is None:
            return raw
        low, high = self.offset, self.offset + self.scale
        fits = bool(low.min() >= 0 and high.max() <= 255)
        return raw.round().clamp(min=low, max=high).to(torch.uint8 if fits else torch.int32)

    def check(self, raw: Tensor) -> None:
        r"""Refuse data that cannot be in this model's units: floats for grey levels, or levels for floats.

        Args:
            raw: (B, \*).

        Raises:
            ValueError: with what was expected and what came.
        """
        low, high = float(self.offset.min()), float((self.offset + self.scale).max())
        if self.quantum is not None and (
            raw.is_floating_point() or raw.max() > high or raw.min() < low
        ):
            raise ValueError(
                f"The model was trained on whole numbers from {low:g} to {high:g}; these are {raw.dtype} from "
                f"{float(raw.min()):g} to {float(raw.max()):g}. Bring them to the same levels."
            )
        if self.quantum is None and not raw.is_floating_point():
            raise ValueError(
                f"The model was trained on real numbers; these are {raw.dtype}, in another unit. Convert them first."
            )

    def restore_std(self, std: Tensor) -> Tensor:
        r"""Take standard deviations or errors, which have no offset, back to raw units.

        Args:
            std: (B, \*), model units.

        Returns:
            The same shape, raw units.
        """
        return std * self.scale


class VAE(nn.Module):
    r"""A variational autoencoder with Gaussian posterior, Gaussian likelihood and a noise model.

    Args:
        encoder: module from (B, \*shape) to (B, 2 d), mean and log-variance of q(z|x), or to a :class:`Gaussian`.
        decoder: module from (B, d) to (B, \*shape), the mean of p(x|z).
        noise: the variance of p(x|z).
        shape: one example's shape.
        latent_dim: d.
        scaling: the units of the data; model units if None.
        architecture: name under which the networks can be built again, None for the user's own.
        width: width with which they can be built again.
        mean_bounds: smallest and largest value that the data can have, model units, (0, 1) for images: the decoder's
            mean is clamped to them, so that a black background is black. None for data of any size.
        deterministic: make q(z|x) a point, up to a std of e^-10: an autoencoder, for objectives that have no posterior.

    Raises:
        ValueError: if the networks do not map the shapes as said.

    Example:
        >>> vae = VAE.build((1, 8, 8), latent_dim=2)
        >>> vae.reconstruct(torch.zeros(5, 1, 8, 8)).mean.shape
        torch.Size([5, 1, 8, 8])
    """

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
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.noise = noise
        self.scaling = scaling or Scaling(torch.zeros(()), torch.ones(()))
        self.shape = tuple(shape)
        self.latent_dim = latent_dim
        self.architecture = architecture
        self.width = width
        self.mean_bounds = mean_bounds
        self.deterministic = deterministic
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
    ) -> "VAE":
        """Make a model with networks that suit the data's shape.

        Args:
            shape: one example's shape, (C, H, W) or (D,).
            latent_dim: d.
            architecture: "mlp", "conv" or "residual"; None chooses by the shape.
            width: of the networks, see ``networks.py``.
            noise: noise model; :class:`GlobalNoise` if None.
            scaling: the units of the data; model units if None.
            mean_bounds: what the data can reach, see :class:`VAE`.
            deterministic: make q(z|x) a point.

        Returns:
            The untrained model.
        """
        architecture = architecture or default_architecture(shape)
        return cls(
            build_encoder(architecture, shape, latent_dim, width),
            build_decoder(architecture, shape, latent_dim, width),
            noise or GlobalNoise(),
            shape=shape,
            latent_dim=latent_dim,
            scaling=scaling,
            architecture=architecture,
            width=width,
            mean_bounds=mean_bounds,
            deterministic=deterministic,
        )

    def encode(self, x: Float[Tensor, "batch *event"]) -> Gaussian:
        r"""Approximate posterior q(z|x).

        Args:
            x: data in model units, (B, \*).

        Returns:
            Gaussian over codes, (B, d).
        """
        parameters = self.encoder(x)
        mean, log_var = parameters if isinstance(parameters, tuple) else parameters.chunk(2, dim=1)
        log_var = bounded(at_least_float32(log_var), *LOG_VAR_RANGE)
        if self.deterministic:
            log_var = torch.full_like(log_var, LOG_VAR_RANGE[0])
        return Gaussian(at_least_float32(mean), log_var)

    def decode_mean(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch *event"]:
        r"""Mean m(z) of p(x|z).

        Args:
            z: codes, (B, d).

        Returns:
            (B, \*), model units, within ``mean_bounds``.
        """
        mean = at_least_float32(self.decoder(z))
        return bounded(mean, *self.mean_bounds) if self.mean_bounds else mean

    def decode(self, z: Float[Tensor, "batch latent"]) -> Gaussian:
        r"""Likelihood p(x|z): the decoder's mean with the noise model's variance.

        Args:
            z: codes, (B, d).

        Returns:
            Gaussian over data, (B, \*), model units.
        """
        return Gaussian(self.decode_mean(z), self.noise(z))

    def reconstruct(self, x: Float[Tensor, "batch *event"]) -> Gaussian:
        r"""Decode the posterior mean: where the model sees x, and how sure it is per dimension.

        Args:
            x: data in model units, (B, \*).

        Returns:
            Gaussian over data; its ``std`` is the uncertainty map.
        """
        return self.decode(self.encode(x).mean)

    def interval(self, x: Float[Tensor, "batch *event"], coverage: float = 0.95) -> Interval:
        r"""Reconstruct, with an interval for each dimension that holds the given share of the errors.

        It is as many predicted std wide as held that share of the held-out errors, which need not be Gaussian, see
        :meth:`PredictedNoise.calibrate_intervals`; of a model without stage 2, as many as of a Gaussian.

        Args:
            x: data in model units, (B, \*).
            coverage: share of the errors over the dimensions that vary, above 0 and below 1.

        Returns:
            Bounds around the mean of :meth:`reconstruct`, (B, \*), model units; ``scaling.restore`` takes each to raw
            units.

        Raises:
            ValueError: if the coverage is out of its domain.

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
        seen = self.reconstruct(x)
        half = self.noise.interval_factor(NormalDist().inv_cdf((1 + coverage) / 2)) * seen.std
        return Interval(seen.mean - half, seen.mean + half)

    def generate(
        self, n: int, source: CodeSource, generator: torch.Generator | None = None
    ) -> Gaussian:
        r"""Decode codes drawn from a source.

        Args:
            n: number of samples.
            source: prior, mixture or aggregate posterior of ``aggregate.py``.
            generator: source of randomness.

        Returns:
            Gaussian over data, (n, \*), model units: show its mean, or its ``sample`` to add pixel noise.
        """
        return self.decode(source.sample(n, generator).to(self.scaling.scale.dtype))

    def predict_variance(
        self,
        reference_var: Tensor,
        floor_var: Tensor,
        calibration_shape: tuple[int, ...] = (),
    ) -> None:
        r"""Enter stage 2: replace the noise model by one that predicts a variance per pixel and input, eq. (11).

        The variance network has the decoder's architecture and starts from the decoder's weights, with an output
        of exactly zero: the model's likelihood does not change at this moment.

        Args:
            reference_var: sigma_*^2 of stage 1, in squared model units.
            floor_var: smallest variance allowed, in squared model units.
            calibration_shape: () or one example's shape, see :class:`PredictedNoise`.
        """
        device = next(self.parameters()).device
        self.noise = PredictedNoise(
            self._variance_network(), reference_var, floor_var, calibration_shape
        ).to(device)

    def _variance_network(self) -> nn.Module:
        network = self.blank_variance_network()
        if self.architecture is not None:
            network.load_state_dict(self.decoder.state_dict())

        output = cast(nn.Linear, network.output)  # or a convolution, whose names are the same
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        return network

    def blank_variance_network(self) -> nn.Module:
        """Untrained variance network of the shape that :meth:`predict_variance` makes.

        Returns:
            A decoder of ``networks.py``.
        """
        architecture = self.architecture or default_architecture(self.shape)
        return build_decoder(architecture, self.shape, self.latent_dim, self.width)

    def start_at_data(self, mean: Tensor, std: Tensor) -> None:
        r"""Fit untrained networks to the scale of the data; leaves a user's own networks alone.

        Args:
            mean: mean of the training data, one example's shape, model units.
            std: its standard deviation over all dimensions, a scalar.
        """
        if self.architecture is not None:
            start_at_data(self.encoder, self.decoder, mean, std)

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of images in memory that suits the networks.

        Channels last is faster for our convolutions. A user's own networks get the usual layout,
        because they may rely on it when they change shapes.
        """
        if self.architecture is not None and ARCHITECTURES[self.architecture].needs_images:
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
        """Constructor arguments as JSON values, from which ``store.py`` builds the model before it fills it.

        Returns:
            Shapes, sizes and names; for the user's own networks their class names.
        """
        return {
            "shape": list(self.shape),
            "latent_dim": self.latent_dim,
            "architecture": self.architecture,
            "width": self.width,
            "mean_bounds": list(self.mean_bounds) if self.mean_bounds else None,
            "deterministic": self.deterministic,
            "encoder": type(self.encoder).__qualname__,
            "decoder": type(self.decoder).__qualname__,
            "quantum": self.scaling.quantum,
            "offset_shape": list(self.scaling.offset.shape),
            "scale_shape": list(self.scaling.scale.shape),
            "noise": describe_noise(self.noise),
        }

    @torch.no_grad()
    def _check_shapes(self) -> None:
        """Run two examples through once, so that networks that do not fit fail here, by name, and not in the loop."""
        parameter = next(self.parameters(), torch.zeros(()))
        x = torch.zeros(2, *self.shape, dtype=parameter.dtype, device=parameter.device)
        was_training = self.training
        self.eval()
        try:
            parameters = self.encoder(x)
            if isinstance(parameters, tuple):
                got, expected = [tuple(t.shape) for t in parameters], [(2, self.latent_dim)] * 2
            else:
                got, expected = [tuple(parameters.shape)], [(2, 2 * self.latent_dim)]
            if got != expected:
                raise ValueError(
                    f"The encoder must map {tuple(x.shape)} to {expected[0]} (mean and log-variance of "
                    f"{self.latent_dim} latent units) or to a Gaussian of two {(2, self.latent_dim)}, got {got}."
                )
            mean = self.decoder(torch.zeros(2, self.latent_dim, dtype=x.dtype, device=x.device))
            if tuple(mean.shape) != tuple(x.shape):
                raise ValueError(
                    f"The decoder must map {(2, self.latent_dim)} to {tuple(x.shape)}, got {tuple(mean.shape)}."
                )
        finally:
            self.train(was_training)


@torch.no_grad()
def encode_all(model: VAE, batches: Iterable[Tensor]) -> Gaussian:
    r"""Posterior q(z|x) of every example.

    Args:
        model: in evaluation mode.
        batches: raw data, (B, \*) each, on the model's device.

    Returns:
        Means and log-variances, (N, d).

    Raises:
        ValueError: if there are no batches.
    """
    posteriors = [model.encode(model.scaling(raw)) for raw in batches]
    if not posteriors:
        raise ValueError("expected at least one batch of examples to encode, got none")
    return Gaussian(
        torch.cat([p.mean for p in posteriors]), torch.cat([p.log_var for p in posteriors])
    )


def at_least_float32(values: Tensor) -> Tensor:
    """Undo a mixed-precision engine's bfloat16: residuals and likelihoods are summed in float32 or better.

    Args:
        values: any floating dtype.

    Returns:
        The same values, float32 or float64.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))
