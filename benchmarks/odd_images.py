"""Which score finds images of another kind? A digit left out, and Fashion-MNIST against MNIST.

    python benchmarks/odd_images.py --data-dir DATA

*A digit left out*: a model learns nine of the ten digits of MNIST, without labels, and has to find
the tenth among the 10,000 test images. The size of the codes and the score are chosen on the digits
0, 2, 3, 6 and 8 (one seed), by the mean area under the precision-recall curve. The
choice is then judged on 1, 4, 5, 7 and 9, which are the digits of the published table.

*Another set*: a model of MNIST judges Fashion-MNIST, and the other way round, 2,000 test images of
each. Simple images often have the higher likelihood here, see `equipoise/metrics/outliers.py`.

All models get 20,000 images, and all scores are of stage 1. The options are those of the recipe of
MNIST, except for what a variant changes. A row that is in the JSON is not computed again, so that
the command may be stopped and repeated.
"""

import copy
from dataclasses import replace

import numpy as np
import torch
from experiment import Rows, arguments, facts, one_thread, over_seeds, trained
from labelled import labels
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from tables import table

from equipoise.config import read_recipe, shipped_recipes
from equipoise.data import Batches, load
from equipoise.metrics.outliers import model_scores, outlier_scores
from equipoise.model import encode_all
from equipoise.noise_fit import fit_correlation
from equipoise.randomness import stream
from equipoise.sources import fit_aggregate

BATCH = 500
CHOSEN_ON = (0, 2, 3, 6, 8)
JUDGED_ON = (1, 4, 5, 7, 9)
N_TRAIN = 20_000
N_OTHER = 2000
VARIANTS = {"d 16": {"latent_dim": 16}, "d 32": {}, "d 64": {"latent_dim": 64}}
RECIPE = "d 32"
COMPONENTS = (32, 256)
TINY = {"width": 4, "latent_dim": 3, "stage_1_epochs": 1}
PUBLISHED = {
    "VAE": (0.063, 0.337, 0.325, 0.148, 0.104),
    "best": (0.722, 0.949, 0.980, 0.941, 0.935),
}
"""Areas of Cui, Wu and Han (2023), Table 3, for the digits of JUDGED_ON; its split is another."""


def without(part, of_part, digit):
    """Leave out the images of a digit."""
    return part.take(np.flatnonzero(of_part != digit))


def fit_mixture(model, data, trainer, n_components):
    """Fit a mixture of a given size to the codes of the training images."""
    config = replace(trainer.config, n_components=n_components)
    return fit_aggregate(model, data, config, torch.device("cpu")).mixture


def all_scores(trainer, data, test, components):
    """Compute all scores of the test images; higher is odder.

    Args:
        trainer: What has trained the model on `data`.
        data: Its data.
        test: The images to score.
        components: Sizes of the mixtures. The last is that of the combined score.

    Returns:
        Scores of each name, (N,).
    """
    model = trainer.model.eval()
    found = {}
    for n_components in components:
        mixture = fit_mixture(model, data, trainer, n_components)
        scores, reference = (of_parts(model, mixture, part) for part in (test, data.validation))
        found[f"code, mixture {n_components}"] = scores.negative_mixture_log_prob

    combined = outlier_scores(scores, reference)
    found["-ELBO"] = scores.negative_elbo
    found["residual"] = scores.standardised_residual
    found["rate"] = scores.rate
    found["combined"] = combined.combined

    correlated = copy.deepcopy(model)
    fit_correlation(correlated, data, "full")
    scores = of_parts(correlated, mixture, test)
    found["residual, full covariance"] = scores.standardised_residual
    found["-ELBO, full covariance"] = scores.negative_elbo

    codes, test_codes = (
        encode_all(model, batches(part)).mean.numpy() for part in (data.train, test)
    )
    found["nearest code"] = (
        NearestNeighbors(n_neighbors=1).fit(codes).kneighbors(test_codes)[0][:, 0]
    )
    return found


def batches(part):
    """Go through images in order."""
    return Batches(part, BATCH, torch.device("cpu")).epoch()


def of_parts(model, mixture, part):
    """Score images by the parts of a model."""
    return model_scores(model, mixture, batches(part), stream(0, "scores"))


def areas(scores, is_odd):
    """Areas under the precision-recall curve and under the ROC curve, for each score."""
    return {
        "aupr": {name: average_precision_score(is_odd, values) for name, values in scores.items()},
        "auroc": {name: roc_auc_score(is_odd, values) for name, values in scores.items()},
    }


def left_out(data, digit, options, components):
    """Train without a digit, and find it among the test images."""
    of_train, of_validation, of_test = labels(data)
    seen = replace(
        data,
        train=without(data.train, of_train, digit).take(slice(N_TRAIN)),
        validation=without(data.validation, of_validation, digit),
    )
    trainer, _ = trained(seen, options)
    with torch.no_grad():
        scores = all_scores(trainer, seen, data.test, components)
    return areas(scores, of_test == digit)


def other_set(data, other, options, components):
    """Train on one set, and find images of another among its test images."""
    data = replace(data, train=data.train.take(slice(N_TRAIN)))
    trainer, _ = trained(data, options)
    with torch.no_grad():
        usual, odd = (
            all_scores(trainer, data, each.test.take(slice(N_OTHER)), components)
            for each in (data, other)
        )
    is_odd = np.repeat([0, 1], [len(values["-ELBO"]) for values in (usual, odd)])
    return areas({name: np.concatenate([usual[name], odd[name]]) for name in usual}, is_odd)


def best(rows, variants):
    """Choose the variant and the score with the highest mean area over digits."""
    means = {
        (variant, score): np.mean([row["aupr"][score] for row in rows if row["variant"] == variant])
        for variant in variants
        for score in rows[0]["aupr"]
    }
    return max(means, key=means.get), means


def main():
    """Measure what is not in the JSON yet, and print the tables."""
    out = "results/benchmark-odd-images.json"
    parser = arguments(__doc__.splitlines()[0], out, "--variants", VARIANTS)
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    one_thread()

    recipe = read_recipe(shipped_recipes()["digits" if options.tiny else "mnist"]) | {
        "stage_2_epochs": 0
    }
    recipe = {name: value for name, value in recipe.items() if name != "data"}
    sets, components = ("mnist", "fashion-mnist"), COMPONENTS
    chosen_on, judged_on, seeds = CHOSEN_ON, JUDGED_ON, options.seeds
    if options.tiny:
        recipe, sets, components = recipe | TINY, ("digits", "digits"), (2, 4)
        chosen_on, judged_on, seeds = chosen_on[:1], judged_on[:1], seeds[:1]

    rows = Rows(options.out)
    data, other = (load(name, data_dir=options.data_dir) for name in sets)

    def detected(digit, variant, change, seed):
        of_row = recipe | change | {"seed": seed}
        key = {"task": "left out", "digit": digit, "variant": variant, "seed": seed}
        key |= {"options": of_row} | facts(data)
        return rows.find_or_make(key, left_out, data, digit, of_row, components)

    chosen = [
        detected(digit, variant, change, seeds[0])
        for variant, change in options.variants
        for digit in chosen_on
    ]
    variants = dict(options.variants)
    (variant, score), means = best(chosen, variants)
    print(f"chosen on {chosen_on}: {variant}, {score}")
    names = list(chosen[0]["aupr"])
    print(
        table(
            ["digits of the choice", *variants],
            [[name, *(f"{means[each, name]:.3f}" for each in variants)] for name in names],
        )
    )

    judged = {
        digit: [detected(digit, variant, variants[variant], seed) for seed in seeds]
        for digit in judged_on
    }
    print(
        table(
            [f"left out, {variant}", *map(str, judged)],
            [
                [
                    name,
                    *(
                        over_seeds([row["aupr"][name] for row in found])
                        for found in judged.values()
                    ),
                ]
                for name in names
            ],
        )
    )

    both_ways = {}
    for known, strange in ((data, other), (other, data)):
        for seed in seeds:
            of_row = recipe | {"seed": seed}
            key = {"task": "other set", "known": known.name, "strange": strange.name, "seed": seed}
            key |= {"options": of_row} | facts(known)
            row = rows.find_or_make(key, other_set, known, strange, of_row, components)
            both_ways.setdefault(f"{known.name}, odd: {strange.name}", []).append(row)
    print(
        table(
            ["AUROC", *both_ways],
            [
                [
                    name,
                    *(
                        over_seeds([row["auroc"][name] for row in found])
                        for found in both_ways.values()
                    ),
                ]
                for name in names
            ],
        )
    )

    rows.write(chosen={"variant": variant, "score": score}, published=PUBLISHED)


if __name__ == "__main__":
    main()
