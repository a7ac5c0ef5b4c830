"""Reconstruct faces, with a map of how far off each pixel may be, and look at what is no face.

The 100 faces and 100 other patches of 25 x 25 pixels come inside the package scikit-image: pip install scikit-image.
"""

import argparse
from pathlib import Path

import numpy as np
from skimage.data import lfw_subset

from equipoise import VAEEstimator, plots
from equipoise.metrics.outliers import auroc

HELD_OUT, SHOWN = 25, 10


def main() -> None:
    """Train, reconstruct, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--epochs", type=int, default=60, help="of stage 1; stage 2 takes half as many (60)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("faces.png"), help="picture to write (faces.png)"
    )
    options = parser.parse_args()

    faces, others = np.split(lfw_subset().astype(np.float32), 2)
    shuffled = np.random.default_rng(0).permutation(faces)
    test, train = np.split(shuffled, [HELD_OUT])
    vae = VAEEstimator(
        latent_dim=8,
        width=16,
        batch_size=32,
        weight_decay=0.3,
        stage_1_epochs=options.epochs,
        stage_2_epochs=options.epochs // 2,
        floor=0.3,  # of so few images most errors are below the optimum of stage 1, and the maps would be flat
        recalibrate="scale",
        random_state=0,
    ).fit(np.concatenate([train, train[:, :, ::-1]]))  # mirrored, too: they are few

    print(
        f"pixels within one predicted std, nominally 68.3% (noise variance of stage 1: {vae.noise_var_:.4f})"
    )
    for name, images in (("new faces", test), ("no faces", others)):
        seen = vae.reconstruct(images)
        print(f"  {name:9} {np.mean(np.abs(images - seen.mean) <= seen.std):.1%}")
    found = auroc(-vae.score_samples(test), -vae.score_samples(others))
    print(f"AUROC of telling the others from faces: {found.value:.2f} ± {found.standard_error:.2f}")

    shown = np.concatenate([test[:SHOWN], others[:SHOWN]])
    seen = vae.reconstruct(shown)
    figure = plots.reconstructions(shown[:, None], seen.mean[:, None], seen.std[:, None])
    print(
        f"wrote {plots.save(figure, options.out)}: {SHOWN} new faces, then {SHOWN} patches that are none"
    )


if __name__ == "__main__":
    main()
