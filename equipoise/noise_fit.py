r"""The correlation of a trained model's errors: estimated on held-out data, and chosen by them.

The networks stand still. Standardised residuals u = (x - m(z)) / s(z), with z ~ q(z|x), come from
examples that the model was not trained on, because those of the training set are smaller than those
of new data. Their second moments are summed by fold, so that each form of correlation is judged by
the likelihood of rows that it has not seen. Where there are few rows, the moments of the training
set join in, multiplied so that their mean variance is that of the held-out rows.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from equipoise.config import ConfigError
from equipoise.correlated_noise import CorrelatedNoise, marginal_of
from equipoise.correlation import (
    BandCorrelation,
    BandCovariance,
    Correlation,
    FullCorrelation,
    LowRankCorrelation,
    embedded,
)
from equipoise.data import Data, ExampleSet, batches_of
from equipoise.estimate import Estimate
from equipoise.gaps import n_observed
from equipoise.gaussian import LOG_2PI, SharedGenerator, standard_normal_like, sum_dimensions
from equipoise.held_out import keep_held_out
from equipoise.model import VAE
from equipoise.noise import describe_noise
from equipoise.processes import ALONE, Processes, choose_device
from equipoise.randomness import stream
from equipoise.records import CorrelationFitRecord
from equipoise.residuals import ResidualCovariance
from equipoise.run import Run
from equipoise.store import read_codes_digest, save_model

FOLDS = 5
"""Parts of the held-out rows, each of which judges what is estimated on the others."""
ROWS_PER_DIMENSION = 5
"""Held-out rows per dimension of a matrix, below which the training set joins in."""
TRAINING_ROWS_PER_DIMENSION = 20
"""Rows of the training set per dimension that are enough."""
WEIGHTS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
"""Weights of the matrix against white noise, among which the held-out rows choose."""
FACTORS = (0, 1, 2, 4, 8, 16)
"""Numbers of common factors, among which the held-out rows choose."""
ERRORS = 2
"""Standard errors by which a form must gain, because the best of many candidates is judged. Where
there are few rows, Student's t of the same probability."""
RELATIVE_FLOOR = 1e-4
"""Floor of continuous data: this share of the mean variance; more for columns that hardly vary."""
MAX_AUTO, MAX_AUTO_FACTORS, MAX_DIMENSIONS = 1024, 512, 2048
"""Most dimensions for which 'auto' tries a full matrix, and common factors, whose search takes
minutes beyond; and for which one of them is estimated at all."""
BATCH = 500

Statistic: TypeAlias = ResidualCovariance | BandCovariance
Shape: TypeAlias = tuple[int, ...]
Candidates: TypeAlias = dict[str, Correlation]


class CorrelationFit(NamedTuple):
    """What was chosen, and by which figures.

    Args:
        form: "none", "full", "low-rank" or "bands".
        setting: The chosen candidate, such as "full, weight 0.95". None if the errors stay
            independent.
        correlation: C. None if the errors stay independent.
        scores: Cross-fitted log p(x|z) of the held-out rows by candidate, nats per row. "white" is
            the noise model as it is, "white, rescaled" with one factor on its variance.
        gains: Gain of each form's best candidate over the better of the two, paired over rows.
        n_held_out: Number of held-out rows.
        n_training: Number of rows of the training set that joined in.
        is_too_wide: Whether 'auto' tried no form, because of the number of dimensions.
        without_fold: C of the same setting, estimated without a fifth of the held-out rows each:
            the k-th without the rows whose number is k modulo five. It judges them as new rows.
    """

    form: str
    setting: str | None
    correlation: Correlation | None
    scores: dict[str, Estimate]
    gains: dict[str, Estimate]
    n_held_out: int
    n_training: int
    is_too_wide: bool = False
    without_fold: tuple[Correlation, ...] = ()

    @property
    def message(self) -> str:
        """A sentence that says what was chosen and why."""
        rows = f"{self.n_held_out:,} held-out examples"
        gains = "; ".join(
            f"{name} gains {gain.value:.2f} +- {gain.standard_error or math.inf:.2f}"
            for name, gain in self.gains.items()
        )
        if self.is_too_wide:
            return (
                f"Errors are independent of each other: with more than {MAX_AUTO:,} dimensions no "
                "form of correlation is tried unless it is named (full or low-rank, minutes)."
            )
        if not gains:
            return "Errors are independent of each other, as asked."
        if self.setting is None:
            return (
                "Errors are independent of each other, as no form of correlation gains beyond its "
                f"error: {gains} nats, {rows}."
            )

        before, after = self.scores["white"].value, self.scores[self.setting].value
        change = "rises" if after > before else "falls"
        message = (
            f"Correlated noise ({self.setting}): log p(x|z) of {rows} {change} from {before:.1f} "
            f"to {after:.1f} nats. Over the best white noise, {gains} nats."
        )
        if self.gains[self.setting].value < 0:
            message += " Independent errors are more likely: take the form auto or none."
        return message

    def record(self) -> CorrelationFitRecord:
        """Return everything but the correlation itself, as JSON values."""
        return {
            "form": self.form,
            "setting": self.setting,
            "scores": _as_json(self.scores),
            "gains": _as_json(self.gains),
            "n_held_out": self.n_held_out,
            "n_training": self.n_training,
            "message": self.message,
        }


class Form(NamedTuple):
    """How a form of correlation is estimated.

    Args:
        statistic: Makes the sums from which it is estimated, for a shape of examples, and whether
            values may be missing.
        dimensions: Dimensions of the largest matrix that is estimated, for a shape of examples.
        candidates: Makes the correlations to choose from, by name.
        needs_images: Whether examples must be images.
        is_tried: Whether 'auto' tries it, for a shape of examples.
    """

    statistic: Callable[[Shape, bool], Statistic]
    dimensions: Callable[[Shape], int]
    candidates: Callable[[Shape, Any, Tensor], Candidates]
    needs_images: bool
    is_tried: Callable[[Shape], bool]


def _full_candidates(shape: Shape, statistic: ResidualCovariance, floor: Tensor) -> Candidates:
    full = FullCorrelation.fit(shape, statistic, floor)
    return {f"full, weight {weight:g}": full.shrunk(weight) for weight in WEIGHTS}


def _low_rank_candidates(shape: Shape, statistic: ResidualCovariance, floor: Tensor) -> Candidates:
    numbers = [n for n in FACTORS if 2 * n < math.prod(shape)]
    return {
        f"low-rank, {n} factor{'' if n == 1 else 's'}": LowRankCorrelation.fit(
            shape, statistic, floor, n
        )
        for n in numbers
    }


def _band_candidates(shape: Shape, statistic: BandCovariance, floor: Tensor) -> Candidates:
    return {"bands": BandCorrelation.fit(shape, statistic, floor)}


FORMS: dict[str, Form] = {
    "full": Form(
        lambda shape, has_gaps: ResidualCovariance(math.prod(shape), has_gaps=has_gaps),
        math.prod,
        _full_candidates,
        needs_images=False,
        is_tried=lambda shape: math.prod(shape) <= MAX_AUTO,
    ),
    "low-rank": Form(
        lambda shape, has_gaps: ResidualCovariance(math.prod(shape), has_gaps=has_gaps),
        math.prod,
        _low_rank_candidates,
        needs_images=False,
        is_tried=lambda shape: len(shape) == 1 and math.prod(shape) <= MAX_AUTO_FACTORS,
    ),
    "bands": Form(
        lambda shape, _: BandCovariance(shape),
        lambda shape: shape[0],
        _band_candidates,
        needs_images=True,
        is_tried=lambda shape: len(shape) == 3,
    ),
}
"""How each form of the option ``noise_correlation`` is estimated."""


def choose_form(option: str | None, shape: Shape) -> str:
    """Choose the form of correlation, by the data where the option is null.

    Args:
        option: Option ``noise_correlation``.
        shape: Shape of one example.

    Returns:
        The option; in place of null "auto" for rows of tables and "none" for images.
    """
    if option is not None:
        return option
    return "auto" if len(shape) == 1 else "none"


def problem_of_form(form: str, shape: Shape) -> str | None:
    """Find why a form of correlation does not suit the examples.

    Args:
        form: Option ``noise_correlation``.
        shape: Shape of one example.

    Returns:
        A sentence with what to do; None if all is well.
    """
    choices = ("none", "auto", *FORMS)
    if form not in choices:
        return f"noise_correlation must be one of {', '.join(choices)}, got {form!r}"
    if form not in FORMS:
        return None

    if FORMS[form].needs_images and len(shape) != 3:
        return f"noise_correlation={form} needs images; for tables use full or low-rank"

    dimensions = FORMS[form].dimensions(shape)
    if dimensions > MAX_DIMENSIONS:
        return (
            f"noise_correlation={form} needs a matrix of {dimensions:,} x {dimensions:,} numbers, "
            f"more than {MAX_DIMENSIONS:,} x {MAX_DIMENSIONS:,}; for images use bands"
        )
    return None


@torch.no_grad()
def fit_correlation(
    model: VAE,
    data: Data,
    form: str,
    *,
    seed: int = 0,
    processes: Processes = ALONE,
) -> CorrelationFit:
    r"""Estimate the correlation of a model's errors, and put it into the model's noise.

    Each candidate is estimated on four fifths of the held-out rows and judged by the likelihood of
    the last fifth, five times. 'auto' takes the best candidate whose gain over white noise exceeds
    two standard errors and is positive for more than half of the rows: one odd row can decide for
    no form. Of few rows the standard error is itself uncertain, and as many are asked for as
    Student's t exceeds equally rarely, 14 of two rows. Otherwise the errors stay independent. The
    candidate is then estimated anew on all rows.

    Digital data are judged after dequantisation, and the variance of rounding,
    :math:`\mathrm{E}[q^2/12s^2]`, is added to the variance of every direction. Of continuous data
    it is 10^-4 of the mean variance.

    Args:
        model: A trained model in evaluation mode. An earlier correlation is replaced.
        data: The validation set is what the correlation is estimated on.
        form: "full", "low-rank", "bands", "auto", or "none" to leave an earlier one out.
        seed: Seed of all draws.
        processes: The processes that share the work. Each takes its part of every batch.

    Returns:
        What was chosen, and why.

    Raises:
        ConfigError: If the form does not suit the examples.
    """
    problem = problem_of_form(form, model.shape)
    if problem:
        raise ConfigError([problem])

    model.noise = marginal_of(model.noise)
    shape = _residual_shape(model)
    names = [form] if form in FORMS else []
    if form == "auto":
        names = [name for name, each in FORMS.items() if each.is_tried(shape)]
    if model.categories is not None and shape[0] < 2:
        # A single number has no other to be correlated with.
        return CorrelationFit("none", None, None, {}, {}, len(data.validation), 0, False)
    if not names:
        is_too_wide = form == "auto"
        return CorrelationFit("none", None, None, {}, {}, len(data.validation), 0, is_too_wide)

    estimation = _Estimation(model, data, names, seed, processes)
    fit = _choose(estimation, is_given=form != "auto")
    if fit.correlation is not None:
        model.noise = _correlated(model, fit.correlation)
    return fit


def _correlated(model: VAE, correlation: Correlation) -> CorrelatedNoise:
    """Put a correlation of residuals on top of a model's noise."""
    if model.categories is not None:
        correlation = embedded(correlation.cpu(), model.categories.is_numeric.cpu())
    return CorrelatedNoise(marginal_of(model.noise), correlation.to(model.scaling.scale))


def _residual_shape(model: VAE) -> Shape:
    """Shape of the residuals of an example: its own, without categories."""
    if model.categories is None:
        return model.shape
    return (int(model.categories.is_numeric.sum()),)


def without_each_fold(model: VAE, fit: CorrelationFit) -> Iterator[tuple[NDArray[np.int64], VAE]]:
    """Give held-out rows a model whose correlation they did not decide on.

    Scores of rows that the correlation was estimated on are higher than those of new rows. The
    scores of each fold by the model that did not see it are not, but for the choice of the setting,
    which is made once by all folds.

    Args:
        model: A model after :func:`fit_correlation`.
        fit: What that has returned.

    Yields:
        Numbers of the rows of a fold within the validation set, and a model for them. All rows and
        the model itself if it has no correlation, or if there are less than ten rows.
    """
    rows = np.arange(fit.n_held_out)
    if not fit.without_fold or len(rows) < 2 * FOLDS:
        yield rows, model
        return

    for k, correlation in enumerate(fit.without_fold):
        judge = copy.deepcopy(model)
        judge.noise = _correlated(model, correlation)
        yield rows[rows % FOLDS == k], judge


def _choose(estimation: "_Estimation", *, is_given: bool) -> CorrelationFit:
    """Judge all candidates by held-out rows, and estimate the best one on all of them."""
    rows = estimation.scores()
    scores = {name: Estimate.of_mean(values) for name, values in rows.items()}
    white = max(("white", "white, rescaled"), key=lambda name: scores[name].value)

    best: dict[str, str] = {}
    for form in estimation.forms:
        settings = [name for name in rows if name.partition(",")[0] == form]
        best[form] = max(settings, key=lambda name: scores[name].value)

    gains, accepted = {}, []
    for form, setting in best.items():
        gain = rows[setting] - rows[white]
        gains[setting] = Estimate.of_mean(gain)
        is_more_likely = float((gain > 0).double().mean()) > 0.5
        if is_given or (_is_beyond_error(gains[setting]) and is_more_likely):
            accepted.append(form)

    n_held_out = len(rows["white"])
    if not accepted:
        return CorrelationFit("none", None, None, scores, gains, n_held_out, estimation.n_training)

    form = max(accepted, key=lambda name: scores[best[name]].value)
    return CorrelationFit(
        form,
        best[form],
        estimation.candidates(form)[best[form]],
        scores,
        gains,
        n_held_out,
        estimation.n_training,
        without_fold=tuple(fold[best[form]] for fold in estimation.folds),
    )


def _is_beyond_error(gain: Estimate) -> bool:
    """Tell whether a gain is larger than chance makes it, which two rows hardly ever know."""
    if gain.standard_error is None:
        return False
    errors = special.stdtrit(gain.n - 1, special.ndtr(ERRORS))
    return bool(gain.value > errors * gain.standard_error)


class _Batch(NamedTuple):
    """Residuals of a batch, divided by their std.

    Args:
        row: Number of each example, (B,).
        u: Standardised residuals, (B, *), float64, NaN where the example has a gap.
        judged: The same of dequantised data, where the data are digital.
        log_std: Sum of log s over the observed dimensions, (B,), float64.
        rounding: Variance of rounding in units of s^2, summed over the batch, (*), float64.
    """

    row: Tensor
    u: Tensor
    judged: Tensor
    log_std: Tensor
    rounding: Tensor


class _Estimation:
    """The sums from which candidates are estimated, by fold, and the rows that judge them."""

    def __init__(
        self, model: VAE, data: Data, forms: list[str], seed: int, processes: Processes
    ) -> None:
        self.model = model
        self.shape = _residual_shape(model)
        self.data = data
        self.forms = forms
        self.seed = seed
        self.processes = processes
        self.device = model.scaling.scale.device
        self.n_folds = min(FOLDS, len(data.validation))

        self.held_out = {form: self._blank(form, self.n_folds) for form in forms}
        self.rounding = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        self._sum_held_out()

        self.folds: list[Candidates] = []
        self.training: dict[str, Statistic] = {}
        self.n_training = 0
        self._sum_training()

    def _blank(self, form: str, n: int) -> list[Statistic]:
        make, has_gaps = FORMS[form].statistic, self.data.has_gaps
        return [make(self.shape, has_gaps).to(self.device) for _ in range(n)]

    def _sum_held_out(self) -> None:
        """Sum the held-out residuals of each fold, and the variance of rounding."""
        for batch in self._batches(self.data.validation, "held out"):
            for form in self.forms:
                for k, statistic in enumerate(self.held_out[form]):
                    statistic.update(batch.u[batch.row % self.n_folds == k])
            self.rounding += batch.rounding

        for statistics in self.held_out.values():
            for statistic in statistics:
                statistic.all_reduce(self.processes.all_reduce)
        self.rounding = self.processes.all_reduce(self.rounding) / len(self.data.validation)

    def _sum_training(self) -> None:
        """Sum training residuals for the forms that have too few held-out rows."""
        sizes = {form: FORMS[form].dimensions(self.shape) for form in self.forms}
        n_held_out = len(self.data.validation)
        short = [form for form in self.forms if n_held_out < ROWS_PER_DIMENSION * sizes[form]]
        if not short:
            return

        self.training = {form: self._blank(form, 1)[0] for form in short}
        wanted = TRAINING_ROWS_PER_DIMENSION * max(sizes[form] for form in short)
        # In random order, because the examples may be sorted.
        batches = self._batches(self.data.train, "training", shuffle=True)
        for batch in itertools.islice(batches, math.ceil(wanted / BATCH)):
            for statistic in self.training.values():
                statistic.update(batch.u)

        for statistic in self.training.values():
            statistic.all_reduce(self.processes.all_reduce)
            self.n_training = int(statistic.count.max())

    def candidates(self, form: str, left_out: int | None = None) -> Candidates:
        """Estimate the candidates of a form on all folds, or all but one."""
        statistic = self._statistic(form, left_out)
        floor = self._floor(statistic).cpu()

        training = self.training.get(form)
        if training is not None and training.var > 0:
            statistic.add(training, float(statistic.var / training.var))
        return FORMS[form].candidates(self.shape, statistic.cpu(), floor)

    def _statistic(self, form: str, left_out: int | None) -> Any:  # noqa: ANN401 (a Statistic)
        (statistic,) = self._blank(form, 1)
        for k, fold in enumerate(self.held_out[form]):
            if k != left_out:
                statistic.add(fold)
        return statistic

    def _floor(self, statistic: Statistic) -> Tensor:
        if self.model.scaling.quantum is not None:
            return self.rounding
        floor = RELATIVE_FLOOR * statistic.var
        if not isinstance(statistic, ResidualCovariance):
            return floor

        # A column that was constant would decide on every row in which it is not. As in stage 1, it
        # has the variance that a single residual of the common size would give it.
        single = statistic.var / (statistic.n_rows + 1)
        missing = single - statistic.covariance.diagonal()
        return (floor + missing.clamp_min(0)).view(self.shape)

    def scores(self) -> dict[str, Tensor]:
        """Log-likelihoods of the held-out rows by candidate, (N,), each estimated without its fold.

        The rows of several processes follow each other, in the same order for all candidates.
        """
        self.folds, scales = [], []
        for k in range(self.n_folds):
            by_form = [self.candidates(form, k) for form in self.forms]
            self.folds.append({name: c for group in by_form for name, c in group.items()})
            statistic = self._statistic(self.forms[0], k)
            scales.append(statistic.var + self._floor(statistic).mean())

        parts: dict[str, list[Tensor]] = {}
        for batch in self._batches(self.data.validation, "held out"):
            for name, values in self._scores_of_batch(batch, torch.stack(scales)).items():
                parts.setdefault(name, []).append(values)
        return {name: self.processes.gather(torch.cat(values)) for name, values in parts.items()}

    def _scores_of_batch(self, batch: _Batch, scales: Tensor) -> dict[str, Tensor]:
        """Log-likelihood of each row by candidate, (B,), float64."""
        dimensions = n_observed(batch.judged)
        constant = -batch.log_std - 0.5 * dimensions * LOG_2PI
        squared = sum_dimensions(batch.judged.nan_to_num(0.0).square())

        fold = batch.row % self.n_folds
        scale = scales[fold]
        scores = {
            "white": constant - 0.5 * squared,
            "white, rescaled": constant - 0.5 * (squared / scale + dimensions * scale.log()),
        }
        for name in self.folds[0]:
            scores[name] = constant.clone()
            for k, candidates in enumerate(self.folds):
                correlation = candidates[name].to(self.device)
                judged = batch.judged[fold == k]
                squared, log_det = correlation.squared_norm_and_log_det(judged)
                scores[name][fold == k] -= 0.5 * (squared + log_det)
        return scores

    def _batches(
        self, examples: ExampleSet, part: str, *, shuffle: bool = False
    ) -> Iterator[_Batch]:
        """Go through this process's part of the examples, always with the same draws."""
        rank, size = self.processes.rank, self.processes.size
        generator = stream(self.seed, "correlation", part, device=self.device)
        batches = batches_of(
            examples,
            max(1, BATCH // size),
            self.device,
            seed=self.seed if shuffle else None,
            rank=rank,
            world_size=size,
        )

        first = 0
        for number, raw in enumerate(batches.epoch()):
            n = batches.size(number)
            row = first + rank + size * torch.arange(len(raw), device=self.device)
            yield self._standardise(raw, row, SharedGenerator(generator, n, rank, size))
            first += n

    def _standardise(self, raw: Tensor, row: Tensor, generator: SharedGenerator) -> _Batch:
        """Encode, decode a sample of z, and divide the residual by its std."""
        model, quantum = self.model, self.model.scaling.quantum
        x = model.scaling(raw)
        likelihood = model.decode(model.encode(x).sample(generator))
        mean, log_var = likelihood.mean, likelihood.log_var.expand_as(x).double()
        if model.categories is not None:
            is_numeric = model.categories.is_numeric
            x, mean, log_var = (values[:, is_numeric] for values in (x, mean, log_var))

        precision = torch.exp(-0.5 * log_var)
        u = (x - mean) * precision
        judged, rounding = u, torch.zeros_like(self.rounding)
        if quantum is not None:
            # Uniform, from normal draws that do not depend on the number of processes.
            place = torch.special.ndtr(standard_normal_like(x, generator)) - 0.5
            judged = u + quantum * place * precision
            rounding = quantum**2 / 12 * precision.square().sum(0)
        log_std = 0.5 * sum_dimensions(log_var.masked_fill(x.isnan(), 0.0))
        return _Batch(row, u, judged, log_std, rounding)


def _as_json(estimates: dict[str, Estimate]) -> Any:  # noqa: ANN401 (JSON values)
    return {name: estimate._asdict() for name, estimate in estimates.items()}


def fit_noise(
    run: Run | str | Path,
    data: Data | None = None,
    form: str = "auto",
    *,
    model: VAE | None = None,
) -> CorrelationFit:
    """Estimate the correlation of the errors of a run that is trained already, and keep it.

    The file of the model is written anew. Its codes do not change, so the mixture and other sources
    of codes stay valid. Likelihoods do change: an earlier evaluation is of another model, and every
    command that reads it says so.

    Args:
        run: A run that has finished training, or its folder.
        data: The data that it was trained on. None loads them again.
        form: As for :func:`fit_correlation`. "none" takes an earlier correlation out.
        model: The run's model, where it has networks of your own. It gets the correlation.

    Returns:
        What was chosen, and why.

    Raises:
        ConfigError: If the form does not suit the examples.
        StoreError: If the run has not finished, or the data are not those of the run.

    Example:
        >>> fit = equipoise.fit_noise("runs/digits")  # doctest: +SKIP
        >>> fit.setting  # doctest: +SKIP
        'full, weight 1'
    """
    if not isinstance(run, Run):
        run = Run(run)
    if model is None:
        model = run.model()
    problem = problem_of_form(form, model.shape)
    if problem:
        raise ConfigError([problem])
    if data is None:
        data = run.data()
    run.check_data(data)

    config = run.config()
    before = describe_noise(model.noise)
    with run.exclusive("fit of the noise"):
        model.place(choose_device(config.accelerator))
        fit = fit_correlation(model.eval(), data, form, seed=config.seed)
        model.cpu()

        if fit.correlation is not None or describe_noise(model.noise) != before:
            save_model(
                run.model_file,
                model,
                run.origin(),
                codes_of=read_codes_digest(run.model_file),
                correlation_fit=fit.record(),
            )
            keep_held_out(run, model, run.mixture().log_prob, data, without_each_fold(model, fit))
    return fit
