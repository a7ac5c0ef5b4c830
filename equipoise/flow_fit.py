r"""A normalising flow on the codes, a density of any shape (extra ``flow``).

An invertible network f transforms the codes so that a mixture, eq. (13), describes them:

.. math:: \log q(z) = \log \hat q(u) + \log |\det \partial f / \partial w|, \qquad
    u = m + L f(w), \quad w = L^{-1} (z - m)

Here m and :math:`L L^T` are the mean and the covariance of the mixture. f is a masked
autoregressive flow of the library zuko. It starts as the identity, so that the fit starts from the
mixture. A mixture with one component is a Gaussian, the usual base of a flow.

Source: Papamakarios, Pavlakou and Murray (2017), *Masked autoregressive flow for density
estimation*.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.aggregate import BLOCK, GaussianMixture, LatentDistribution
from equipoise.gaussian import Gaussian

# Largest norm of the gradient of the mean log-likelihood. Without a limit, a few codes far from the
# others can undo the progress of an epoch.
CLIP = 5.0


class FlowEpoch(NamedTuple):
    """One pass over the codes, as it is passed to ``on_epoch``.

    Args:
        epoch: Number of the epoch, from 1.
        epochs: Largest number of epochs.
        log_likelihood: Mean log-likelihood of the codes during the epoch, in nats per code.
        held_out: Mean log-likelihood of held-out codes after the epoch, in nats per code.
    """

    epoch: int
    epochs: int
    log_likelihood: float
    held_out: float


class FlowFit(NamedTuple):
    """A fitted flow and the history of the fit.

    Args:
        flow: Flow of the best epoch, on the device of the codes.
        history: One record for each epoch.
        best_epoch: Number of the epoch that ``flow`` comes from. It is 0 if no epoch was better
            than the mixture that the fit starts from.
        held_out: Mean log-likelihood of held-out codes under ``flow``, in nats per code.
    """

    flow: "CodeFlow"
    history: tuple[FlowEpoch, ...]
    best_epoch: int
    held_out: float


class CodeFlow(LatentDistribution):
    r"""A masked autoregressive flow with a mixture as its base.

    Affine transforms are sufficient, because the base already has the modes. Splines on one
    Gaussian fitted codes of images worse, and took several times longer. For each transform, a
    density takes one pass through the network, and a sample takes d passes.

    Args:
        base: Mixture that f maps the codes to. It does not change.
        n_transforms: Number of autoregressive transforms. They run one after the other, in
            alternating order of the units.
        hidden: Width of each hidden layer in the network of a transform.

    Raises:
        ImportError: If the library of the extra ``flow`` is missing.

    Example:
        >>> base = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
        >>> CodeFlow(base).log_prob(torch.zeros(1, 2)).detach()  # -log(2 pi)
        tensor([-1.8379])
    """

    mean: Tensor
    scale_tril: Tensor

    def __init__(
        self, base: GaussianMixture, n_transforms: int = 5, hidden: Sequence[int] = (128, 128)
    ) -> None:
        super().__init__()
        mean, covariance = base.moments()

        self.base = base
        self.register_buffer("mean", mean)
        self.register_buffer("scale_tril", torch.linalg.cholesky(covariance))

        self.options = {"n_transforms": n_transforms, "hidden": list(hidden)}
        self.transform = _autoregressive(base.latent_dim, n_transforms, hidden).to(mean)

    @property
    def latent_dim(self) -> int:
        """Dimension d of the codes."""
        return self.base.latent_dim

    def description(self) -> dict[str, Any]:
        """Return the sizes from which the module is built before its state is loaded.

        Returns:
            A dictionary of JSON values.
        """
        return {
            "latent_dim": self.latent_dim,
            "n_components": self.base.n_components,
            **self.options,
        }

    def log_prob(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
        """Log-density of each code, by the change of variables.

        Args:
            z: Codes, (B, d).

        Returns:
            The log-densities, (B,), nats, in the dtype of ``z``, differentiable.

        Raises:
            ValueError: If the codes have another dimension.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"expected codes of shape (B, {self.latent_dim}), got {tuple(z.shape)}"
            )

        log_probs = []
        for codes in torch.split(z.to(self.mean.dtype) - self.mean, BLOCK):
            w = torch.linalg.solve_triangular(self.scale_tril, codes.mT, upper=False).mT
            transformed, log_det = self.transform().call_and_ladj(w)
            u = self.mean + transformed @ self.scale_tril.mT
            log_probs.append(self.base.log_prob(u) + log_det)

        return torch.cat(log_probs).to(z.dtype)

    @torch.no_grad()
    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "{n} latent"]:
        """Draw independent codes from the base and map them through the inverse of f.

        Args:
            n: Number of codes.
            generator: Source of randomness, on the device of the flow. None means the global
                generator.

        Returns:
            The codes, (n, d).
        """
        u = self.base.sample(n, generator)
        transformed = torch.linalg.solve_triangular(
            self.scale_tril, (u - self.mean).mT, upper=False
        ).mT

        inverse = self.transform().inv
        w = torch.cat([inverse(part) for part in torch.split(transformed, BLOCK)])

        return self.mean + w @ self.scale_tril.mT


def fit_flow(
    posterior: Gaussian,
    held_out: Float[Tensor, "m latent"],
    base: GaussianMixture,
    *,
    n_transforms: int = 5,
    hidden: Sequence[int] = (128, 128),
    epochs: int = 30,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    patience: int = 5,
    generator: torch.Generator | None = None,
    on_epoch: Callable[[FlowEpoch], None] | None = None,
) -> FlowFit:
    r"""Fit a flow to the aggregate posterior, eq. (12), by maximum likelihood.

    .. math:: \max_f \; \mathrm{E}_n \, \mathrm{E}_{q(z|x_n)} \log q(z)

    The optimiser is AdamW, with a learning rate that falls to zero as a cosine. Each epoch draws
    new codes from the posteriors. The result has the weights of the epoch with the largest
    log-likelihood of the held-out codes. If the codes and the base are moved, or scaled unit by
    unit, the fit is moved and scaled in the same way.

    Args:
        posterior: Posterior q(z|x) of each example, (N, d), at least two.
        held_out: Codes of other examples, (M, d), at least one.
        base: Mixture that the fit starts from, for example one that was fitted to the same
            posteriors.
        n_transforms: Number of transforms, see :class:`CodeFlow`.
        hidden: Width of each hidden layer, see :class:`CodeFlow`.
        epochs: Largest number of passes over the examples.
        batch_size: Number of codes per step.
        learning_rate: Learning rate of the first step.
        patience: The fit stops after this number of epochs without a gain on the held-out codes.
        generator: Source of randomness, also for the initial weights, on the device of the codes.
            None means the global generator.
        on_epoch: Function that is called after each epoch, for example to show progress.

    Returns:
        The flow and the history of the fit.

    Raises:
        ImportError: If the library of the extra ``flow`` is missing.
        ValueError: If the shapes do not fit together, if a value is not finite, or if an option is
            below 1.
    """
    options = {"epochs": epochs, "batch_size": batch_size, "patience": patience}
    problems = [
        f"{name} is at least 1, got {value}" for name, value in options.items() if value < 1
    ]
    if problems:
        raise ValueError("; ".join(problems))

    mean = posterior.mean.detach()
    log_var = posterior.log_var.detach()
    _check_input(mean, log_var, held_out, base.latent_dim)

    n = len(mean)
    device = mean.device
    start = GaussianMixture(base.weights.to(mean), base.means.to(mean), base.covariances.to(mean))
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    # zuko draws its initial weights from the global generator of the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        flow = CodeFlow(start, n_transforms, hidden)

    optimizer = torch.optim.AdamW(flow.parameters(), learning_rate)
    steps = epochs * -(-n // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def score() -> float:
        with torch.no_grad():
            return flow.log_prob(held_out).double().mean().item()

    def weights() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in flow.state_dict().items()}

    history: list[FlowEpoch] = []
    best_epoch, best_score, best_weights = 0, score(), weights()

    while len(history) < min(epochs, best_epoch + patience):
        total = 0.0
        order = torch.randperm(n, generator=generator, device=device)
        for rows in torch.split(order, batch_size):
            z = Gaussian(mean[rows], log_var[rows]).sample(generator)
            loss = -flow.log_prob(z).mean()

            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            total -= loss.item() * len(rows)

        epoch = FlowEpoch(len(history) + 1, epochs, total / n, score())
        history.append(epoch)
        if epoch.held_out > best_score:
            best_epoch, best_score, best_weights = epoch.epoch, epoch.held_out, weights()
        if on_epoch is not None:
            on_epoch(epoch)

    flow.load_state_dict(best_weights)
    return FlowFit(flow.requires_grad_(False).eval(), tuple(history), best_epoch, best_score)


def _check_input(mean: Tensor, log_var: Tensor, held_out: Tensor, d: int) -> None:
    shape = (len(mean), d)
    same_dimension = mean.shape == shape and log_var.shape == shape and held_out.shape[1:] == (d,)
    if not same_dimension or len(mean) == 0 or len(held_out) == 0:
        raise ValueError(
            f"expected posteriors (N, {d}) and held_out (M, {d}), as the base has {d} dimensions, "
            f"got {tuple(mean.shape)}, {tuple(log_var.shape)} and {tuple(held_out.shape)}"
        )
    if not all(values.isfinite().all() for values in (mean, log_var, held_out)):
        raise ValueError("the codes are not all finite: encode with the last good checkpoint")


def _autoregressive(d: int, n_transforms: int, hidden: Sequence[int]) -> nn.Module:
    """Build f as the identity, with shifts and log-scales of zero."""
    try:
        from zuko.flows import MAF
    except ImportError as error:
        raise ImportError("a flow needs the library zuko: pip install 'equipoise[flow]'") from error

    transform: Any = MAF(d, transforms=n_transforms, hidden_features=list(hidden)).transform
    for step in transform.transforms:
        # In one dimension there is no network, only the parameters phi.
        last_layer = step.phi if d == 1 else step.hyper[-1]
        for parameter in last_layer.parameters():
            nn.init.zeros_(parameter)

    return cast(nn.Module, transform)
