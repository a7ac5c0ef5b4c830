"""Does batch_size=auto, which takes smaller batches of few examples, give a better test ELBO?

    python benchmarks/batch_size.py --data FOLDER --n 2000 --image-size 16

Of a folder of images, the first N are trained on with all other options at their defaults, with
``batch_size=auto`` and with the fixed 256 that was the default before. The ELBO is that of the test
set at the end of stage 1, in nats per example, with its error over seeds, and the difference is
paired by seed.
"""

from pathlib import Path

import numpy as np
from experiment import Rows, arguments, facts, one_thread, over_seeds, paired, trained

from equipoise.data import load

VARIANTS = {"auto": {"batch_size": "auto"}, "256": {"batch_size": 256}}


def train(data, options):
    """Train stage 1; return the ELBO of the test set, the steps, and the seconds of the epochs."""
    trainer, history = trained(data, options)
    return {
        "test_elbo": history[-1]["test_elbo"],
        "batch_size": trainer.config.step_size(len(data.train)),
        "steps": trainer.position.step,
        "training_seconds": round(sum(row["seconds"] for row in history), 1),
    }


def main():
    """Make the rows that are missing."""
    parser = arguments(
        __doc__.splitlines()[0], "results/benchmark-batch-size.json", "--variants", VARIANTS
    )
    parser.add_argument("--data", type=Path, help="a folder of images")
    parser.add_argument("--n", type=int, default=2000, help="images to take")
    parser.add_argument("--image-size", type=int, default=16)
    options = parser.parse_args()
    one_thread()

    if options.tiny:
        data, seeds = load("digits"), [0]
    else:
        whole = load(options.data, image_size=options.image_size, test_fraction=0.1)
        images = np.concatenate([whole.train[:], whole.validation[:], whole.test[:]])
        data, seeds = load(images[: options.n]), options.seeds

    rows = Rows(options.out)
    epochs = {"stage_1_epochs": 1 if options.tiny else 10, "stage_2_epochs": 0}
    found = {}
    for name, changes in options.variants:
        for seed in seeds:
            key = facts(data) | {"shape": list(data.shape), "variant": name, "seed": seed}
            row = rows.find_or_make(key, train, data, epochs | changes | {"seed": seed})
            found.setdefault(name, []).append(row)

    summary = {name: over_seeds([row["test_elbo"] for row in some]) for name, some in found.items()}
    if {"auto", "256"} <= found.keys():
        summary["auto minus 256"] = paired(found["auto"], found["256"], "test_elbo")
    rows.write(test_elbo=summary)
    print(summary)


if __name__ == "__main__":
    main()
