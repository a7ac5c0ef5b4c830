"""Reconstruct faces with maps of their uncertainty, and compare them with patches without a face.

The package scikit-image contains the 100 faces and 100 other patches, of 25 x 25 pixels each:
pip install scikit-image.
"""

import argparse
from pathlib import Path

import numpy as np
from skimage.data import lfw_subset

from equipoise import VAEEstimator, plots
from equipoise.metrics.outliers import auroc

HELD_OUT, SHOWN = 25, 10


def main() -> None:
    """Train a model, print how right its std is, and draw reconstructions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--epochs", type=int, default=60, help="epochs of stage 1, twice those of stage 2 (60)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("faces.png"), help="picture to write (faces.png)"
    )
    options = parser.parse_args()

    faces, others = np.split(lfw_subset().astype(np.float32), 2)
    shuffled = np.random.default_rng(0).permutation(faces)
    test, train = np.split(shuffled, [HELD_OUT])
    train = np.concatenate([train, train[:, :, ::-1]])  # with their mirror images, as they are few

    vae = VAEEstimator(
        latent_dim=8,
        width=16,
        batch_size=32,
        weight_decay=0.3,
        stage_1_epochs=options.epochs,
        stage_2_epochs=options.epochs // 2,
        # With so few images, most errors are below the optimum of stage 1. With the default floor
        # the maps would be flat.
        floor=0.3,
        recalibrate="scale",
        random_state=0,
    ).fit(train)

    print(
        "pixels within one predicted std, nominally 68.3% "
        f"(noise variance of stage 1: {vae.noise_var_:.4f})"
    )
    for name, images in (("new faces", test), ("no faces", others)):
        reconstruction = vae.reconstruct(images)
        error = np.abs(images - reconstruction.mean)
        print(f"  {name:9} {np.mean(error <= reconstruction.std):.1%}")

    area = auroc(-vae.score_samples(test), -vae.score_samples(others))
    print(f"AUROC of telling the others from faces: {area.value:.2f} ± {area.standard_error:.2f}")

    shown = np.concatenate([test[:SHOWN], others[:SHOWN]])
    reconstruction = vae.reconstruct(shown)
    mean, std = reconstruction.mean[:, None], reconstruction.std[:, None]
    figure = plots.reconstructions(shown[:, None], mean, std)
    path = plots.save(figure, options.out)
    print(f"wrote {path}: {SHOWN} new faces, then {SHOWN} patches that are none")


if __name__ == "__main__":
    main()
