r"""A normalising flow on the codes: a density of any shape, where a mixture has one of K ellipses (extra ``flow``).

An invertible network f bends the codes until a mixture, eq. (13), describes them:

.. math:: \log q(z) = \log \hat q(u) + \log |\det \partial f / \partial w|, \qquad
    u = m + L f(w), \quad w = L^{-1} (z - m)

where m and :math:`L L^T` are the mean and the covariance of the mixture. f is a masked autoregressive flow of the
library zuko: Papamakarios, Pavlakou and Murray (2017), *Masked autoregressive flow for density estimation*. It starts
as the identity, so that the fit starts from the mixture; a mixture of one is the usual base, a Gaussian.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.aggregate import BLOCK, GaussianMixture, LatentDistribution
from equipoise.gaussian import Gaussian

# Largest norm of the gradient of the mean log-likelihood: rare codes far out would undo an epoch.
CLIP = 5.0


class FlowEpoch(NamedTuple):
    """One pass over the codes, as told to ``on_epoch``.

    Args:
        epoch: from 1.
        epochs: most there may be.
        log_likelihood: mean over the epoch's codes while it went, nats per code.
        held_out: mean over held-out codes after it, nats per code.
    """

    epoch: int
    epochs: int
    log_likelihood: float
    held_out: float


class FlowFit(NamedTuple):
    """A fitted flow and how the fit went.

    Args:
        flow: of the best epoch, on the device of the codes.
        history: a record per epoch run.
        best_epoch: the one whose weights are kept; 0 if none beat the mixture that the fit starts from.
        held_out: mean log-likelihood of held-out codes under ``flow``, nats per code.
    """

    flow: "CodeFlow"
    history: tuple[FlowEpoch, ...]
    best_epoch: int
    held_out: float


class CodeFlow(LatentDistribution):
    r"""A masked autoregressive flow with a mixture as its base.

    Affine transforms suffice, as the base has the modes; splines on one Gaussian fitted codes of images worse, and took
    several times as long. A density takes one pass of the network for each transform, a draw d of them.

    Args:
        base: mixture that f maps the codes to; it stays as it is.
        n_transforms: autoregressive transforms, one after the other, in alternating order of the units.
        hidden: widths of the hidden layers of each transform's network.

    Raises:
        ImportError: if the library of the extra ``flow`` is missing.

    Example:
        >>> base = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
        >>> CodeFlow(base).log_prob(torch.zeros(1, 2)).detach()  # the base, before it is fitted: -log(2 pi)
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
        """What the module is built from before it is filled.

        Returns:
            JSON values.
        """
        return {
            "latent_dim": self.latent_dim,
            "n_components": self.base.n_components,
            **self.options,
        }

    def log_prob(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
        """Log-density of each code, by the change of variables.

        Args:
            z: codes, (B, d).

        Returns:
            (B,), nats, in the dtype of ``z``; differentiable.

        Raises:
            ValueError: if the codes have another dimension.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"expected codes of shape (B, {self.latent_dim}), got {tuple(z.shape)}"
            )
        parts = []
        for codes in torch.split(z.to(self.mean.dtype) - self.mean, BLOCK):
            w = torch.linalg.solve_triangular(self.scale_tril, codes.mT, upper=False).mT
            bent, log_det = self.transform().call_and_ladj(w)
            parts.append(self.base.log_prob(self.mean + bent @ self.scale_tril.mT) + log_det)
        return torch.cat(parts).to(z.dtype)

    @torch.no_grad()
    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "{n} latent"]:
        """Draw independent codes: those of the base, through the inverse of f.

        Args:
            n: number of codes.
            generator: source of randomness, on the device of the flow; the global one if None.

        Returns:
            (n, d).
        """
        u = self.base.sample(n, generator)
        bent = torch.linalg.solve_triangular(self.scale_tril, (u - self.mean).mT, upper=False).mT
        unbend = self.transform().inv
        w = torch.cat([unbend(part) for part in torch.split(bent, BLOCK)])
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

    AdamW with a learning rate that falls to zero as a cosine; each epoch draws new codes from the posteriors. What is
    kept is the epoch under which held-out codes are likeliest. Codes that are moved, or scaled unit by unit, have the
    same fit moved and scaled, if the base is.

    Args:
        posterior: q(z|x) of each example, (N, d), at least two.
        held_out: codes of other examples, (M, d), at least one.
        base: mixture to start from, such as one that was fitted to the same posteriors.
        n_transforms: see :class:`CodeFlow`.
        hidden: see :class:`CodeFlow`.
        epochs: most passes over the examples.
        batch_size: codes per step.
        learning_rate: at the start.
        patience: stop after so many epochs without a gain on the held-out codes.
        generator: source of randomness, of the weights too, on the device of the codes; the global one if None.
        on_epoch: called after each epoch, for instance to show progress.

    Returns:
        The flow and the history of the fit.

    Raises:
        ImportError: if the library of the extra ``flow`` is missing.
        ValueError: if the shapes do not fit together, values are not finite, or an option is below 1.
    """
    options = {"epochs": epochs, "batch_size": batch_size, "patience": patience}
    if problems := [
        f"{name} is at least 1, got {value}" for name, value in options.items() if value < 1
    ]:
        raise ValueError("; ".join(problems))
    mean, log_var = (values.detach() for values in posterior)
    n, d = len(mean), base.latent_dim
    if (
        mean.shape != (n, d)
        or log_var.shape != (n, d)
        or held_out.shape[1:] != (d,)
        or 0 in (n, len(held_out))
    ):
        raise ValueError(
            f"expected posteriors (N, {d}) and held_out (M, {d}), as the base has {d} dimensions, got "
            f"{tuple(mean.shape)}, {tuple(log_var.shape)} and {tuple(held_out.shape)}"
        )
    if not all(values.isfinite().all() for values in (mean, log_var, held_out)):
        raise ValueError("the codes are not all finite: encode with the last good checkpoint")
    start = GaussianMixture(
        *(values.to(mean) for values in (base.weights, base.means, base.covariances))
    )
    device = mean.device
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    with torch.random.fork_rng(
        devices=[]
    ):  # zuko's weights come from the global generator of the CPU
        torch.default_generator.manual_seed(seed)
        flow = CodeFlow(start, n_transforms, hidden)
    optimizer = torch.optim.AdamW(flow.parameters(), learning_rate)
    steps = epochs * -(-n // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def judged() -> float:
        with torch.no_grad():
            return flow.log_prob(held_out).double().mean().item()

    def weights() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in flow.state_dict().items()}

    history: list[FlowEpoch] = []
    best_epoch, best, kept = 0, judged(), weights()
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
        history.append(FlowEpoch(len(history) + 1, epochs, total / n, judged()))
        if history[-1].held_out > best:
            best_epoch, best, kept = len(history), history[-1].held_out, weights()
        if on_epoch is not None:
            on_epoch(history[-1])
    flow.load_state_dict(kept)
    return FlowFit(flow.requires_grad_(False).eval(), tuple(history), best_epoch, best)


def _autoregressive(d: int, n_transforms: int, hidden: Sequence[int]) -> nn.Module:
    """Build f as the identity: shifts and log-scales are zero."""
    try:
        from zuko.flows import MAF
    except ImportError as error:
        raise ImportError("a flow needs the library zuko: pip install 'equipoise[flow]'") from error
    transform: Any = MAF(d, transforms=n_transforms, hidden_features=list(hidden)).transform
    for step in transform.transforms:
        for parameter in (step.phi if d == 1 else step.hyper[-1]).parameters():
            nn.init.zeros_(parameter)
    return cast(nn.Module, transform)
