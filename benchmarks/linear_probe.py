"""How much do codes say about the class? A linear classifier on them, over seeds.

    python benchmarks/linear_probe.py --data-dir DATA

Codes of the training images, without their labels, come from a VAE of this library (posterior
means), from the same networks trained by pythae (of the extra `benchmarks`), from
PCA of as many components, or are the pixels themselves. On the standardised codes of labelled
training images a logistic regression is fitted, whose penalty is cross-validated, and judged by
its accuracy on test images. Models differ in nothing but the loss and its optimiser: the networks,
the start, data, batch size and epochs are the same. Differences are to the first method, with equal
seeds.

A row that is in the JSON is not computed again, so that the command may be stopped and repeated.
"""

from dataclasses import replace

import numpy as np
import torch
from experiment import Rows, arguments, facts, one_thread, over_seeds, paired, scaled, trained
from labelled import labels
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tables import table

from equipoise.config import make_config
from equipoise.data import Batches, load
from equipoise.model import encode_all

BATCH = 500
OPTIONS = {"latent_dim": 16, "learning_rate": 0.005, "batch_size": 256}
CASES = {
    "digits": (1455, OPTIONS | {"batch_size": 32, "stage_1_epochs": 60}),
    "mnist": (20_000, OPTIONS | {"stage_1_epochs": 8}),
    "fashion-mnist": (20_000, OPTIONS | {"stage_1_epochs": 8}),
}
"""Number of training images, and options of the models."""
TINY = {"digits": (200, OPTIONS | {"width": 4, "stage_1_epochs": 1})}
LABELLED = (100, 1000, None)
"""Numbers of training images whose labels the classifier sees; None for all."""
PENALTIES = np.logspace(-4, 2, 7)


def pixels(data, options):
    """Take the pixels themselves."""
    return [part[:].reshape(len(part), -1) / 255 for part in (data.train, data.test)]


def principal_components(data, options):
    """Fit PCA to the training images."""
    train, test = pixels(data, options)
    pca = PCA(options["latent_dim"], random_state=options["seed"]).fit(train)
    return pca.transform(train), pca.transform(test)


def equipoise(data, options):
    """Train stage 1 of a VAE, and take the means of q(z|x)."""
    trainer, _ = trained(data, options | {"stage_2_epochs": 0})
    return codes(trainer.model.eval(), data)


def codes(model, data):
    """Encode both parts."""
    batches = (
        Batches(part, BATCH, torch.device("cpu")).epoch() for part in (data.train, data.test)
    )
    with torch.no_grad():
        return [encode_all(model, part).mean.numpy() for part in batches]


def pythae(kind, data, options):
    """Train a model of pythae with the optimiser and the schedule of equipoise."""
    from pythae_models import fit_pythae, optimiser

    config = make_config(options | {"accelerator": "cpu"})
    model, _ = fit_pythae(kind, data, config, optimiser(config, is_scheduled=True))
    with torch.no_grad():
        parts = [scaled(model.decoder.model, part) for part in (data.train, data.test)]
        return [
            torch.cat([model.encoder(x).embedding for x in part.split(BATCH)]).numpy()
            for part in parts
        ]


METHODS = {
    "equipoise": equipoise,
    "PCA": principal_components,
    "pixels": pixels,
    "pythae VAE": lambda data, options: pythae("vae", data, options),
    "pythae RAE-L2": lambda data, options: pythae("rae-l2", data, options),
}


def accuracies(train, test, labels_of_train, labels_of_test, seed):
    """Fit the classifier to the first labels, in random order, and judge it on the test images."""
    order = np.random.RandomState(seed).permutation(len(train))
    found = {}
    for n in LABELLED:
        rows = order[:n]
        classifier = make_pipeline(
            StandardScaler(),
            LogisticRegressionCV(
                Cs=PENALTIES,
                cv=3,
                max_iter=200,
                l1_ratios=(0.0,),
                scoring="accuracy",
                use_legacy_attributes=False,
            ),
        )
        classifier.fit(train[rows], labels_of_train[rows])
        name = "all" if n is None else str(n)
        found[name] = round(100 * classifier.score(test, labels_of_test), 2)
    return found


def measure(method, data, options, seed):
    """Compute the codes of one method, and judge them."""
    of_train, _, of_test = labels(data)
    return accuracies(*METHODS[method](data, options), of_train, of_test, seed)


def main():
    """Measure what is not in the JSON yet, and print the table."""
    parser = arguments(
        __doc__.splitlines()[0],
        "results/benchmark-linear-probe.json",
        "--methods",
        {name: {} for name in METHODS},
    )
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    one_thread()

    rows, cells = Rows(options.out), []
    for name, (n_train, settings) in (TINY if options.tiny else CASES).items():
        data = load(name, data_dir=options.data_dir)
        data = replace(data, train=data.train.take(slice(n_train)))

        found = {}
        for method, _ in options.methods:
            for seed in options.seeds[:1] if options.tiny else options.seeds:
                with_seed = settings | {"seed": seed}
                key = {"case": name, "method": method, "seed": seed, "options": with_seed}
                row = rows.find_or_make(key | facts(data), measure, method, data, with_seed, seed)
                found.setdefault(method, []).append(row)

        first = next(iter(found.values()))
        for method, its_rows in found.items():
            figures = ["100", "1000", "all"]
            values = [over_seeds([row[figure] for row in its_rows]) for figure in figures]
            cells.append([name, method, *values, paired(its_rows, first, "1000")])

    print(table(["data", "codes", "100 labels", "1,000", "all", "1,000 less the first"], cells))


if __name__ == "__main__":
    main()
