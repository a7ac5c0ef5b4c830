"""Which codes give the best samples? Mixtures of several K at several temperatures, over seeds.

    python benchmarks/codes.py --data-dir DATA

For each seed a model of the recipe's length is trained, stage 1 alone. Samples of each source are
compared with as many test images, or with all if there are fewer: by the Fréchet distance,
precision, recall, copies of training data, and the log-likelihood of codes of the test set.
``--sources`` takes any name of ``equipoise sample --from``; differences are to the first one.
Further models are written as in ``--variants recipe wide:width=64``.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
"""

import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from experiment import Rows, arguments, facts, one_thread, over_seeds, paired
from tables import table

from equipoise.config import make_config, read_recipe, shipped_recipes
from equipoise.data import Batches, load
from equipoise.evaluation.latent import COPIES_SOUGHT
from equipoise.evaluation.samples import COVERED
from equipoise.metrics.features import cached_features, features_of, load_features
from equipoise.metrics.memorisation import as_vectors, memorisation
from equipoise.metrics.precision_recall import precision_recall
from equipoise.metrics.samples import frechet_distance
from equipoise.model import encode_all
from equipoise.randomness import stream
from equipoise.sources import code_source
from equipoise.training.job import train

BATCH = 500
N_SAMPLES = 5000
MIXTURES = ("mixture=auto", "mixture=32", "mixture=256")
TEMPERATURES = (0.9, 0.8, 0.7)
SOURCES = (
    *MIXTURES,
    *(f"{mixture}@{temperature}" for temperature in TEMPERATURES for mixture in MIXTURES),
    "prior",
    "aggregate",
)
FIGURES = {
    "frechet": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "closer": "copies",
    "held_out": "held-out codes, nats",
}


class Judge:
    """A model, trained when it is first needed, whose sources of codes are judged."""

    def __init__(self, data, options, n_samples, folder):
        self.data = data
        self.config = make_config(options)
        self.n_samples = n_samples
        self.folder = folder

    @cached_property
    def run(self):
        """Train the model, and fit its own mixture."""
        return train(self.data, self.config, self.folder)

    @cached_property
    def model(self):
        """The trained model."""
        return self.run.model()

    def batches(self, part):
        """Go through examples in order."""
        return Batches(part, BATCH, torch.device("cpu")).epoch()

    def test(self, n):
        """Draw test images at random, because the test set of MNIST begins with the easier half."""
        rows = np.random.RandomState(0).permutation(len(self.data.test))[:n]
        return self.data.test.take(np.sort(rows))

    @cached_property
    def extractor(self):
        """Features to compare images in."""
        return load_features("auto", self.data)

    @cached_property
    def reference(self):
        """Features of test images, in random order."""
        test = self.test(self.n_samples)
        features = cached_features(self.extractor, test, self.batches(test))
        return features[np.random.RandomState(1).permutation(len(test))]

    @cached_property
    def test_codes(self):
        """Codes of all test images."""
        posterior = encode_all(self.model, self.batches(self.data.test))
        return posterior.sample(stream(self.config.seed, "codes"))

    @cached_property
    def images_to_copy(self):
        """What samples are compared with in the search for copies, see the evaluation."""
        model, test = self.model, self.test(COPIES_SOUGHT)
        codes = [model.encode(model.scaling(x)).mean for x in self.batches(self.data.train.at_hand)]
        unseen = encode_all(model, self.batches(test)).sample(stream(self.config.seed, "copies"))
        return {
            "training": as_vectors(map(model.decode_mean, codes)),
            "test_reconstructions": as_vectors([model.decode_mean(unseen)]),
            "test": as_vectors(model.scaling(x) for x in self.batches(test)),
        }

    def measure(self, name):
        """Find, or fit, a source of codes, and compute its figures."""
        source = code_source(self.run, self.model, name, lambda: self.data)
        with torch.no_grad():
            return self.figures(source)

    def figures(self, source):
        """Compute the figures of a source of codes."""
        generator = stream(self.config.seed, "samples")
        n = self.n_samples
        means = [
            self.model.generate(min(BATCH, n - first), source, generator).mean
            for first in range(0, n, BATCH)
        ]

        features = features_of(self.extractor, map(self.model.scaling.restore_levels, means))
        frechet = frechet_distance(features, self.reference)
        coverage = precision_recall(features[:COVERED], self.reference[:COVERED])
        copies = memorisation(as_vectors([torch.cat(means)[:COPIES_SOUGHT]]), **self.images_to_copy)
        return {
            "frechet": frechet.value,
            "frechet_standard_error": frechet.standard_error,
            "precision": coverage.precision.value,
            "recall": coverage.recall.value,
            "closer": copies.closer.value,
            "copied": copies.copied,
            "held_out": float(source.log_prob(self.test_codes).mean()),
            "n_components": getattr(source, "n_components", None),
            "n_reference": len(self.reference),
        }


def compare(name, variant, rows, sources):
    """Lay out one model: a row for each source."""
    found = {source: [row for row in rows if row["source"] == source] for source in sources}
    first = next(iter(found.values()))
    cells = []
    for source, of_source in found.items():
        figures = [over_seeds([row[figure] for row in of_source]) for figure in FIGURES]
        K = sorted({row["n_components"] for row in of_source if row["n_components"]})
        gain = "" if of_source is first else paired(of_source, first, "frechet")
        cells.append([name, variant, source, ", ".join(map(str, K)), *figures, gain])
    return cells


def main():
    """Train and judge what is not in the JSON yet, and print the table."""
    out = "results/benchmark-codes.json"
    parser = arguments(__doc__.splitlines()[0], out, "--variants", {"recipe": {}})
    parser.add_argument("--sources", nargs="+", default=list(SOURCES))
    parser.add_argument("--data", nargs="+", default=["digits", "mnist", "fashion-mnist"])
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--samples", type=int, default=N_SAMPLES)
    options = parser.parse_args()
    if options.tiny:
        options.data, options.epochs, options.seeds = ["digits"], 1, options.seeds[:1]
        options.sources, options.samples = ["mixture=4", "mixture=4@0.5", "aggregate"], 200
    one_thread()

    # All are loaded first, so that one that is missing is noticed before the others are trained on.
    data_sets = {name: load(name, data_dir=options.data_dir) for name in options.data}

    rows, cells = Rows(options.out), []
    for name, data in data_sets.items():
        recipe = read_recipe(shipped_recipes()[name]) | {"stage_2_epochs": 0}
        recipe.pop("data")
        if options.epochs:
            recipe["stage_1_epochs"] = options.epochs

        for variant, change in options.variants:
            found = []
            for seed in options.seeds:
                settings = recipe | change | {"seed": seed}
                key = {"data": name, "variant": variant, "seed": seed, "options": settings}
                key |= facts(data) | {"samples": options.samples}

                with tempfile.TemporaryDirectory() as folder:
                    judge = Judge(data, settings, options.samples, Path(folder) / "run")
                    found += [
                        rows.find_or_make(key | {"source": source}, judge.measure, source)
                        for source in options.sources
                    ]
            cells += compare(name, variant, found, options.sources)

    heads = ["data", "model", "source", "K", *FIGURES.values(), "Fréchet less that of the first"]
    print(table(heads, cells))


if __name__ == "__main__":
    main()
