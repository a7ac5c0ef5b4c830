r"""A trained model as files that run without equipoise.

The files are ``torch.export`` programs, or ONNX graphs (extra ``export``):

=========== ====================================== =============================================
``encoder`` ``raw`` (n, \*)                        ``mean``, ``log_var`` of q(z|x), (n, d)
``decoder`` ``code`` (n, d)                        ``mean``, ``std`` of p(x|z), (n, \*)
``sampler`` ``uniform`` (n,), ``normal`` (n, d)    ``code`` (n, d), drawn from the mixture, eq. (13)
``scorer``  ``raw`` (n, \*), ``normal`` (n, K, d)  ``score`` and ``p_value`` (n,)
=========== ====================================== =============================================

Data are in the user's own unit, on the way in and out. The number n of examples may be any number
from 1. Sampler and scorer take their noise as inputs, independent draws from U[0, 1) and N(0, 1),
so that whoever runs them chooses the seed. The score is the bound of
:func:`equipoise.held_out.log_densities` with K = 20, and its p-value is by the held-out scores that
the run keeps: an example is odd if its p-value is at most the rate of false alarms. Examples are
complete: both are NaN where a value is. The decoder of a model with correlated noise has its std,
but not its correlation: noise that is drawn with them is independent.
"""

import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from equipoise.aggregate import GaussianMixture
from equipoise.categories import MixedLikelihood
from equipoise.correlated_noise import marginal_of
from equipoise.files import exclusive_outputs, whole_file
from equipoise.gaussian import Gaussian, sum_dimensions
from equipoise.held_out import IMPORTANCE_SAMPLES
from equipoise.model import VAE

TOLERANCE = 1e-4
"""Largest deviation of a file's output from the model's, relative to the output's largest value."""
TRACED, COMPARED = 2, (1, 5)
"""Numbers of examples: those that a program is made with, and those that a file is checked with."""


class Exported(NamedTuple):
    """A file that was written.

    Args:
        path: The file.
        signature: The inputs and outputs of the file.
        deviation: The largest difference of an output from the model's, relative to the output's
            largest value.
    """

    path: Path
    signature: str
    deviation: float


@torch.no_grad()
def export(
    model: VAE,
    mixture: GaussianMixture,
    to: str,
    folder: Path,
    scoring: "Scoring | None" = None,
) -> list[Exported]:
    """Write the encoder, the decoder and the sampler to files.

    Each file is read again and compared with the model before it gets its name.

    Args:
        model: The model, in evaluation mode, on the CPU.
        mixture: The mixture that was fitted to its aggregate posterior, on the CPU.
        to: "torch" for programs of ``torch.export``, "onnx" for ONNX graphs.
        folder: The folder in which to write ``encoder``, ``decoder``, ``sampler`` and ``scorer``,
            with the ending .pt2 or .onnx.
        scoring: What scores are computed by and compared with. None writes no scorer.

    Returns:
        The files.

    Raises:
        ValueError: If there is no such format, or the model is conditional on labels.
        ImportError: If the libraries of the extra ``export`` are missing.
        ArithmeticError: If a file deviates from the model. That file is not kept.

    Example:
        >>> import equipoise
        >>> run = equipoise.Run("runs/mnist")  # doctest: +SKIP
        >>> folder = run.folder / "export"  # doctest: +SKIP
        >>> model, mixture = run.model(), run.mixture()  # doctest: +SKIP
        >>> known = read_held_out(run, model).known()  # doctest: +SKIP
        >>> scoring = Scoring(mixture, known.plain)  # doctest: +SKIP
        >>> files = export(model, mixture, "onnx", folder, scoring)  # doctest: +SKIP
        >>> files[1].signature  # doctest: +SKIP
        'code float32 (n, 16) -> mean, std float32 (n, 1, 28, 28)'
    """
    if to not in FORMATS:
        raise ValueError(
            f"there is no format {to!r} to export to; choose from {', '.join(FORMATS)}"
        )
    if model.label_names:
        raise ValueError(
            "a model with labels is not exported yet: its files would not know them. Load it with "
            "equipoise where it is used, or train without --label"
        )

    form = FORMATS[to]()
    files = []
    with exclusive_outputs(folder, "export"):
        for name, part in _parts(model, mixture, scoring).items():
            path = folder / f"{name}{form.ending}"
            # Made in memory, because torch's own writer ends the whole process where the disk is
            # full.
            content = form.make(_trace(part), part)
            with whole_file(path) as temporary:
                temporary.write_bytes(content)

                deviation = _deviation(form.load(temporary.read_bytes()), part)
                if not deviation <= TOLERANCE:  # also true if the deviation is NaN
                    raise ArithmeticError(
                        f"{path} was not written: it would deviate from the model by "
                        f"{deviation:.2g} of the largest value, more than {TOLERANCE:g}. "
                        "Export to another format."
                    )

            files.append(Exported(path, _signature(part), deviation))
    return files


class Scoring(NamedTuple):
    """What scores are computed by, and what they are compared with.

    Args:
        mixture: p(z), the mixture under which the held-out examples were scored.
        held_out: Scores of held-out examples without their labels, (m,), float64.
    """

    mixture: GaussianMixture
    held_out: Float64[np.ndarray, " m"]


class _Part(NamedTuple):
    """The content of one file: a computation, examples of its inputs, the names of its outputs.

    The first ``n_compared`` outputs are compared with the model's; None means all. A p-value is a
    step function, which rounding may move by a step.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    n_compared: int | None = None


def _parts(model: VAE, mixture: GaussianMixture, scoring: Scoring | None) -> dict[str, _Part]:
    """The content of each file, with examples that the model itself generates."""
    generator = torch.Generator().manual_seed(0)
    n, dtype = max(COMPARED), model.scaling.scale.dtype

    code = mixture.sample(n, generator).to(dtype)
    raw = model.scaling.restore_levels(model.decode(code).sample(generator))
    uniform = torch.rand(n, generator=generator, dtype=dtype)
    normal = torch.randn(n, model.latent_dim, generator=generator, dtype=dtype)

    noise = {"uniform": uniform, "normal": normal}
    of_row = ("mean", "std") if model.categories is None else ("mean", "std", "probability")
    parts = {
        "encoder": _Part(_Encoder(model), {"raw": raw}, ("mean", "log_var")),
        "decoder": _Part(_Decoder(model), {"code": code}, of_row),
        "sampler": _Part(_Sampler(mixture, dtype), noise, ("code",)),
    }
    if scoring is not None:
        shape = (n, IMPORTANCE_SAMPLES, model.latent_dim)
        draws = torch.randn(shape, generator=generator, dtype=dtype)
        outputs = ("score", "p_value")
        parts["scorer"] = _Part(_Scorer(model, scoring), {"raw": raw, "normal": draws}, outputs, 1)
    return parts


class _Encoder(nn.Module):
    """From raw data to the mean and log-variance of q(z|x)."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        del self.model.decoder, self.model.noise  # otherwise the program contains their weights

    def forward(self, raw: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.encode(self.model.scaling(raw)))


class _Decoder(nn.Module):
    """From codes to the mean and standard deviation of p(x|z), in raw units and not rounded.

    If there are categories, mean and std are those of the numeric columns, and the probabilities of
    all levels follow.
    """

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        del self.model.encoder
        self.model.noise = marginal_of(self.model.noise)  # of which the std are

    def forward(self, code: Tensor) -> tuple[Tensor, ...]:
        likelihood, scaling = self.model.decode(code), self.model.scaling
        mean = scaling.restore(likelihood.mean)
        std = scaling.restore_std(likelihood.std, likelihood.mean)
        if not isinstance(likelihood, MixedLikelihood):
            return mean, std
        is_numeric = likelihood.categories.is_numeric.nonzero().flatten()
        return mean[:, is_numeric], std[:, is_numeric], likelihood.log_probs.exp()


class _Sampler(nn.Module):
    """From noise to codes of the mixture.

    The uniform number chooses the component, and the normal numbers the place within it.
    """

    boundaries: Tensor
    means: Tensor
    scale_trils: Tensor

    def __init__(self, mixture: GaussianMixture, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("boundaries", mixture.weights.double().cumsum(0)[:-1].to(dtype))
        self.register_buffer("means", mixture.means.to(dtype))
        self.register_buffer("scale_trils", mixture.scale_trils.to(dtype))

    def forward(self, uniform: Tensor, normal: Tensor) -> tuple[Tensor, ...]:
        component = (uniform.unsqueeze(1) >= self.boundaries).sum(1)
        shift = (self.scale_trils[component] @ normal.unsqueeze(2)).squeeze(2)
        return (self.means[component] + shift,)


class _Scorer(nn.Module):
    """From raw data and noise to a bound on the log-density, and its rarity."""

    held_out: Tensor

    def __init__(self, model: VAE, scoring: Scoring) -> None:
        super().__init__()
        self.model, self.mixture = copy.deepcopy(model), copy.deepcopy(scoring.mixture)
        self.register_buffer("held_out", torch.from_numpy(np.sort(scoring.held_out)))

    def forward(self, raw: Tensor, normal: Tensor) -> tuple[Tensor, ...]:
        model, k = self.model, normal.shape[1]
        x = model.scaling(raw)
        posterior = model.encode(x)
        log_var = posterior.log_var.expand_as(posterior.mean)
        q = Gaussian(posterior.mean.repeat_interleave(k, 0), log_var.repeat_interleave(k, 0))
        z = q.mean + q.std * normal.flatten(0, 1)

        log_prob = model.decode(z).log_prob(x.repeat_interleave(k, 0)).double()
        log_weights = log_prob + self.mixture.log_prob(z) - q.log_prob(z)
        bound = log_weights.view(-1, k).logsumexp(1) - math.log(k)
        score = bound + sum_dimensions(model.scaling.log_slope(raw))
        if raw.is_floating_point():
            has_gaps = raw.flatten(1).isnan().any(1)
            score = score.masked_fill(has_gaps, torch.nan)

        n_as_odd = (self.held_out <= score[:, None]).sum(1)
        p_value = (1 + n_as_odd).double() / (1 + len(self.held_out))
        return score, torch.where(score.isnan(), score, p_value)


def _trace(part: _Part) -> torch.export.ExportedProgram:
    """Make the program of a part, for any number of examples."""
    examples = tuple(example[:TRACED] for example in part.inputs.values())
    any_number = ({0: torch.export.Dim.DYNAMIC},) * len(examples)
    # Newer releases of torch are not strict by default. torch 2.6 cannot trace strictly what the
    # type checker of the tests wraps, nor read a program back that compares dtypes.
    program = torch.export.export(part.module, examples, dynamic_shapes=any_number, strict=False)
    program.graph.eliminate_dead_code()

    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths on this machine, which stay private

    return program


Computation = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


class _Format(NamedTuple):
    """How the content of a file is made of a program, and loaded as a computation."""

    ending: str
    make: Callable[[torch.export.ExportedProgram, _Part], bytes]
    load: Callable[[bytes], Computation]


def _torch_format() -> _Format:
    def make(program: torch.export.ExportedProgram, part: _Part) -> bytes:
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer.getvalue()

    def load(content: bytes) -> Computation:
        module = torch.export.load(io.BytesIO(content)).module()
        return lambda inputs: module(*inputs.values())

    return _Format(".pt2", make, load)


def _onnx_format() -> _Format:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch uses it to write ONNX)
    except ImportError as error:
        raise ImportError(
            "ONNX needs libraries that are not installed: pip install 'equipoise[export]'"
        ) from error

    def make(program: torch.export.ExportedProgram, part: _Part) -> bytes:
        with _quiet():
            graph = torch.onnx.export(
                program,
                input_names=list(part.inputs),
                output_names=part.outputs,
                dynamic_shapes=({0: "n"},) * len(part.inputs),
                dynamo=True,
                verbose=False,
            )
        content: bytes = cast(torch.onnx.ONNXProgram, graph).model_proto.SerializeToString()
        return content

    def load(content: bytes) -> Computation:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

        def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
            arrays = {name: example.numpy() for name, example in inputs.items()}
            return tuple(torch.from_numpy(output) for output in session.run(None, arrays))

        return run

    return _Format(".onnx", make, load)


FORMATS = {"torch": _torch_format, "onnx": _onnx_format}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch's exporter reports about itself.

    It warns of its own deprecated calls, and logs that torchvision is absent.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _deviation(computation: Computation, part: _Part) -> float:
    """The largest difference of an output from the model's, relative to the output's largest value.

    It is NaN if any difference is.
    """
    relative = []
    for n in COMPARED:
        inputs = {name: example[:n] for name, example in part.inputs.items()}
        pairs = list(zip(computation(inputs), part.module(**inputs), strict=True))
        for output, expected in pairs[: part.n_compared]:
            tiny = torch.finfo(expected.dtype).tiny
            largest = expected.abs().max().clamp_min(tiny)  # an output may be zero
            relative.append((output - expected).abs().max() / largest)

    return float(torch.stack(relative).max())


def _signature(part: _Part) -> str:
    """Describe the inputs and outputs of a part.

    For example ``code float32 (n, 16) -> mean, std float32 (n, 1, 28, 28)``.
    """

    def describe(names: str, tensor: Tensor) -> str:
        axes = ", ".join(["n", *map(str, tensor.shape[1:])])
        if tensor.ndim == 1:
            axes += ","

        return f"{names} {str(tensor.dtype).removeprefix('torch.')} ({axes})"

    inputs = " and ".join(describe(name, example) for name, example in part.inputs.items())
    output = part.module(**part.inputs)[0]
    return f"{inputs} -> {describe(', '.join(part.outputs), output)}"
