"""Train on some MNIST digits, and show the learned noise variance, uncertainty maps and new digits.

It needs the files train-images-idx3-ubyte and t10k-images-idx3-ubyte (plain or .gz) in --data-dir.
Without them it says so and ends.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from equipoise import TrainConfig, load_data, plots, train
from equipoise.metrics.calibration import noise_calibration, varying_dimensions

SHOWN = 25


def main() -> None:
    """Train a model, print its figures, and draw reconstructions and samples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST (the usual places)")
    parser.add_argument("-n", type=int, default=6000, help="digits to train on, of 58,000 (6000)")
    parser.add_argument(
        "--epochs", type=int, default=4, help="epochs of stage 1, twice those of stage 2 (4)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mnist.png"), help="picture to write (mnist.png)"
    )
    options = parser.parse_args()

    try:
        everything = load_data("mnist", data_dir=options.data_dir)
    except FileNotFoundError as error:
        print(f"Skipped: {error}")
        return

    few = slice(options.n // 10)
    data = replace(
        everything,
        train=everything.train.take(slice(options.n)),
        validation=everything.validation.take(few),
        test=everything.test.take(few),
    )

    config = TrainConfig(
        width=16,
        batch_size=64,
        learning_rate=5e-3,
        stage_1_epochs=options.epochs,
        stage_2_epochs=max(1, options.epochs // 2),
        n_components=16,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = train(data, config, Path(folder, "run"))
        model, mixture, history = run.model(), run.mixture(), run.history()

    learned = [row["validation_noise_var"] for row in history if row["stage"] == 1][-1]
    print(f"noise variance learned: {learned:.4f}, where the usual VAE has 0.5")

    test = torch.from_numpy(data.test[:])
    last = history[-1]
    print(
        f"test digits: ELBO {last['test_elbo']:.0f} nats, "
        f"squared error {last['test_mse']:.4f} per pixel"
    )
    calibration = noise_calibration(model, [test], varying_dimensions(test)).varying_dimensions
    if calibration is not None:
        print(
            "pixels that vary, within one predicted std: "
            f"{calibration.coverage_1.value:.1%}, nominally 68.3%"
        )

    with torch.no_grad():
        x = model.scaling(test[:SHOWN])
        reconstruction = model.reconstruct(x)
        new = model.generate(SHOWN, mixture, torch.Generator().manual_seed(0))

    mean, std = reconstruction.mean.numpy(), reconstruction.std.numpy()
    figure = plots.reconstructions(x.numpy(), mean, std)
    print(f"wrote {plots.save(figure, options.out)}")

    figure = plots.samples(new.mean.numpy(), new.std.numpy(), "new digits")
    print(f"wrote {plots.save(figure, options.out.with_stem(options.out.stem + '-new'))}")


if __name__ == "__main__":
    main()
