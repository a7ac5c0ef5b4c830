"""What is evaluated: a model, its mixture, the examples, and how each section draws from them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipoise.aggregate import GaussianMixture, LatentDistribution
from equipoise.data import Batches, Data, Subset
from equipoise.gaps import missing_values
from equipoise.imputation import impute
from equipoise.metrics.features import FeatureExtractor
from equipoise.model import VAE
from equipoise.randomness import stream

BATCH = 500
"""Examples and samples that are computed together."""

Progress = Callable[[str, int, int | None], None]
"""Takes the label of a job, its position, and its total if known."""


class Examples(NamedTuple):
    """Examples, and what to call them.

    Args:
        name: Name in tables.
        raw: Examples in the units of the run's own data.
    """

    name: str
    raw: Subset


@dataclass(frozen=True, eq=False)
class Subject:
    """One model, one set of examples, and the settings of the protocol.

    Args:
        data: The data that the model was trained on.
        model: The model, in evaluation mode, on the device.
        mixture: The mixture fitted to its aggregate posterior, on the device.
        sources: More densities of codes to judge, by name, on the device.
        test: Examples to judge the model on.
        against: Examples of another kind, for the section ``outliers``.
        extractor: Features that samples are compared in. None if no section compares any.
        n_samples: Number of samples in each row of the section ``samples``.
        importance_samples: K of the importance-weighted bound over the whole test set. 0 leaves it
            out.
        seed: Seed of all draws.
        device: Where to compute.
        figures: Folder for pictures.
        progress: Called with the position in each long job.
    """

    data: Data
    model: VAE
    mixture: GaussianMixture
    sources: dict[str, LatentDistribution]
    test: Examples
    against: Examples | None
    extractor: FeatureExtractor | None
    n_samples: int
    importance_samples: int
    seed: int
    device: torch.device
    figures: Path
    progress: Progress

    @property
    def is_image(self) -> bool:
        """Whether the examples are images, and not rows of a table."""
        return self.data.kind == "image"

    def generator(self, part: str) -> torch.Generator:
        """Make a stream of random numbers for a part of the evaluation.

        Every part has its own, so that no figure depends on which others are computed.

        Args:
            part: Name of the part.

        Returns:
            A generator on the device.
        """
        return stream(self.seed, part, device=self.device)

    def batches(self, label: str, raw: Subset) -> Iterator[Tensor]:
        r"""Go through examples in order, with progress.

        Args:
            label: What is being done with them.
            raw: Raw examples.

        Returns:
            Batches on the device, raw units, (B, \*).
        """
        batches = Batches(raw, BATCH, self.device)
        return self.track(label, batches.epoch(), len(batches))

    def completed(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Fill the gaps of rows by draws of the model, given what is observed.

        Distances between examples need all values. Those that are missing are then as probable as
        the model says, and neither add to the distances nor take from them on average.

        Args:
            batches: Raw data.

        Yields:
            The batches without gaps. Data that have none are as they were.
        """
        for raw in batches:
            if missing_values(raw) is None:
                yield raw
            else:
                found = impute(self.model, self.mixture, raw, n_draws=1, seed=self.seed)
                yield found.draws[0]

    def track(self, label: str, batches: Iterable[Tensor], total: int) -> Iterator[Tensor]:
        """Report the progress of going through batches.

        Args:
            label: What is being done with them.
            batches: The batches.
            total: Their number.

        Yields:
            The batches.
        """
        for done, batch in enumerate(batches):
            self.progress(label, done, total)
            yield batch
        self.progress(label, total, total)

    def some(self, examples: Subset, n: int) -> Subset:
        """Draw some examples at random, because they may be sorted by class.

        Args:
            examples: Examples to draw from.
            n: Number of examples to draw. All are taken if there are no more.

        Returns:
            The examples, in their own order.
        """
        rows = np.random.RandomState(self.seed).permutation(len(examples))[:n]
        return examples.take(np.sort(rows))
