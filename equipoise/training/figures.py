"""The figures of an epoch and of a split: averages over examples and processes."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.aggregate import ACTIVE_UNIT_VAR
from equipoise.estimate import Estimate
from equipoise.model import VAE
from equipoise.objectives import Terms
from equipoise.residuals import StandardisedVariance
from equipoise.stages import Stage
from equipoise.training.passes import SplitPass

AllReduce = Callable[..., Tensor]
"""Combines a tensor over processes, by "sum" (the default) or by "max"."""


class NotFiniteError(ArithmeticError):
    """The loss became NaN or infinite."""


@torch.no_grad()
def batch_sums(terms: Terms) -> Tensor:
    """Sum a batch for :class:`RunningMeans`, on its device.

    Args:
        terms: The terms of the batch.

    Returns:
        The sums of :attr:`RunningMeans.NAMES` and of the loss over the examples, and the lowest and
        the highest log-variance, (8,), float64.
    """
    noise_var = terms.log_var.exp().mean().expand_as(terms.kl)
    values = (
        terms.elbo,
        terms.log_likelihood,
        terms.kl,
        terms.squared_error,
        noise_var,
        terms.loss,
    )
    sums = torch.stack(values).sum(1, dtype=torch.float64)
    return torch.cat([sums, torch.stack(torch.aminmax(terms.log_var)).double()])


class RunningMeans:
    """Sums over an epoch that stay on the device until they are read, and the time they took."""

    NAMES = ("elbo", "log_likelihood", "kl", "squared_error", "noise_var")

    def __init__(self) -> None:
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64)
        self.count = 0
        self.log_var_range = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
        self.first_bad_step = -1
        self.started = time.perf_counter()
        self._not_yet_read: list[tuple[int, Tensor]] = []

    def add(self, sums: Tensor, n: int, step: int) -> None:
        """Add a batch, without waiting for the device.

        Args:
            sums: What :func:`batch_sums` returned.
            n: Number of examples in the batch.
            step: Number of optimiser steps done, to name the first whose loss is not finite.
        """
        self.count += n
        self._not_yet_read.append((step, sums))

    def read(self, dimensions: int, stage: Stage, all_reduce: AllReduce) -> dict[str, float]:
        """Average over the examples so far and all processes, which waits for the device.

        Args:
            dimensions: Number of dimensions of an example, by which the squared error is divided.
            stage: Stage of Algorithm 1, for the error message.
            all_reduce: Combines a tensor over processes.

        Returns:
            elbo, log_likelihood and kl in nats per example; mse, noise_var and noise_std in model
            units; n, the number of examples.

        Raises:
            NotFiniteError: if a loss was not finite.
        """
        self._read_batches()
        count = self.sums.new_tensor([self.count])
        is_bad = self.sums.new_tensor([self.first_bad_step >= 0])
        *sums, n, n_bad = all_reduce(torch.cat([self.sums, count, is_bad])).tolist()
        if n_bad:
            raise self._not_finite(stage, all_reduce)

        means = {name: value / n for name, value in zip(self.NAMES, sums, strict=True)}
        means["mse"] = means.pop("squared_error") / dimensions
        means["noise_std"] = math.sqrt(means["noise_var"])
        return means | {"n": n}

    @property
    def seconds(self) -> float:
        """Time since the first batch, without that between an interruption and :meth:`unpack`."""
        return time.perf_counter() - self.started

    def pack(self) -> Tensor:
        """Put everything into one tensor, exactly, (10,), float64."""
        self._read_batches()
        others = [self.count, self.first_bad_step, self.seconds]
        return torch.cat([self.sums, self.log_var_range, self.sums.new_tensor(others)])

    def unpack(self, packed: Tensor) -> None:
        """Go on where :meth:`pack` was called.

        Args:
            packed: What it returned, (P, 10), of one process, or of several to take over from.
        """
        n = len(self.NAMES)
        self.sums.copy_(packed[:, :n].sum(0))
        self.log_var_range.copy_(torch.stack([packed[:, n].min(), packed[:, n + 1].max()]))
        self.count = int(packed[:, n + 2].sum())
        self.first_bad_step = int(packed[:, n + 3].max())
        self.started = time.perf_counter() - float(packed[:, n + 4].max())

    def _read_batches(self) -> None:
        """Wait for the batches since the last time, and add them one after the other."""
        if not self._not_yet_read:
            return
        steps, batches = zip(*self._not_yet_read, strict=True)
        self._not_yet_read = []

        rows = torch.stack(batches).cpu()
        for row in rows:
            self.sums += row[: len(self.NAMES)]

        loss, low, high = rows[:, len(self.NAMES) :].unbind(1)
        low = low.nan_to_num(math.inf, math.inf, -math.inf).min()
        high = high.nan_to_num(-math.inf, math.inf, -math.inf).max()
        low = torch.minimum(self.log_var_range[0], low)
        high = torch.maximum(self.log_var_range[1], high)
        self.log_var_range = torch.stack([low, high])

        is_bad = loss.isfinite().logical_not().tolist()
        if self.first_bad_step < 0 and any(is_bad):
            self.first_bad_step = steps[is_bad.index(True)]

    def _not_finite(self, stage: Stage, all_reduce: AllReduce) -> NotFiniteError:
        """Say at which step the loss stopped being finite, and where the log-variances were."""
        signs = self.log_var_range.new_tensor([-1.0, 1.0])  # the lowest, as the highest negative
        low, high = (all_reduce(self.log_var_range * signs, "max") * signs).tolist()
        bad_step = int(all_reduce(self.sums.new_tensor([self.first_bad_step]), "max"))

        log_var = f"until then the log-variance of the noise lay in [{low:.2f}, {high:.2f}]"
        if low > high:
            log_var = "the log-variance of the noise was not finite either"
        return NotFiniteError(
            f"The loss stopped being finite in stage {stage:d} at step {bad_step}; {log_var}. "
            "Checkpoints, if there are any, are from before it. Try a lower learning_rate, or, in "
            "stage 2, a higher floor."
        )


LOGGED = ("elbo", "log_likelihood", "kl", "mse", "noise_var")
"""The averages of a split that go into ``metrics.jsonl``."""


class SplitFigures(NamedTuple):
    """Averages over one split of the data.

    Args:
        n: Number of examples.
        elbo: Evidence lower bound, nats per example.
        log_likelihood: log p(x|z), nats per example.
        kl: KL(q(z|x), p(z)), nats per example.
        mse: Squared error per dimension, squared model units.
        noise_var: Mean variance of p(x|z), squared model units.
        floor_share: Share of the variances that lie on the model's floor.
        standardised_var: Mean of ((x - m) / std)^2, over examples. It is 1 where the variance is
            that of these residuals.
        unit_var: Variance over the data of each latent unit's posterior mean, (d,).
    """

    n: int
    elbo: float
    log_likelihood: float
    kl: float
    mse: float
    noise_var: float
    floor_share: float
    standardised_var: Estimate
    unit_var: Tensor

    @property
    def active_units(self) -> int:
        """Number of latent units that the model uses."""
        return int((self.unit_var > ACTIVE_UNIT_VAR).sum())

    def row(self, split: str, log_slope: float = 0.0) -> dict[str, float]:
        """Name the averages for a row of ``metrics.jsonl``.

        Args:
            split: Name of the split, which each name begins with.
            log_slope: Mean log-slope of the power transform, see :func:`of_raw_data`.

        Returns:
            Averages by name.
        """
        averages = {name: getattr(self, name) for name in LOGGED}
        return {
            f"{split}_{name}": value for name, value in of_raw_data(averages, log_slope).items()
        }


def of_raw_data(figures: dict[str, float], log_slope: float) -> dict[str, float]:
    """Turn bounds of transformed data into those of the raw data, as evaluations have them.

    Args:
        figures: Averages by name, of which elbo and log_likelihood change.
        log_slope: Mean log-slope of the power transform, in nats per example.

    Returns:
        The averages, the same ones where there is no transform.
    """
    if not log_slope:
        return figures
    changed = {name: figures[name] + log_slope for name in ("elbo", "log_likelihood")}
    return figures | changed


@torch.no_grad()
def split_figures(
    model: VAE,
    split: SplitPass,
    generator: torch.Generator,
    *,
    step: int,
    stage: Stage,
    all_reduce: AllReduce,
) -> SplitFigures:
    """Average a model's figures over a split.

    Args:
        model: The model, in training mode before and afterwards.
        split: The split, in order.
        generator: Source of one sample of z per example.
        step: Number of optimiser steps done, for an error message.
        stage: Stage of Algorithm 1, for an error message.
        all_reduce: Combines a tensor over processes.

    Returns:
        The averages, over all processes.
    """
    device = split.device
    means = RunningMeans()
    floor_share = torch.zeros((), dtype=torch.float64, device=device)
    standardised = StandardisedVariance().to(device)
    unit_sums = torch.zeros(2, model.latent_dim, dtype=torch.float64, device=device)

    for terms in split.terms(model, generator):
        means.add(batch_sums(terms), len(terms.kl), step)
        floor_share += model.noise.floor_share(terms.log_var) * len(terms.kl)
        log_var = terms.log_var
        if log_var.ndim:
            log_var = model.pooled(log_var.expand_as(terms.residual))
        standardised.update(model.pooled(terms.residual), log_var)
        posterior_mean = terms.posterior.mean.double()
        unit_sums += torch.stack([posterior_mean.sum(0), posterior_mean.square().sum(0)])

    figures = means.read(math.prod(model.shape), stage, all_reduce)
    n = int(figures["n"])
    unit_sum, unit_squares = all_reduce(unit_sums)
    unit_var = (unit_squares - unit_sum.square() / n) / (n - 1)
    standardised.all_reduce(all_reduce)

    return SplitFigures(
        n=n,
        elbo=figures["elbo"],
        log_likelihood=figures["log_likelihood"],
        kl=figures["kl"],
        mse=figures["mse"],
        noise_var=figures["noise_var"],
        floor_share=float(all_reduce(floor_share)) / n,
        standardised_var=standardised.estimate(),
        unit_var=unit_var.float().cpu(),
    )
