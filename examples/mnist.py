"""Train on some MNIST digits: the noise variance that is learned, uncertainty maps, and new digits.

Needs train-images-idx3-ubyte and t10k-images-idx3-ubyte (plain or .gz) in --data-dir, and ends politely without.
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
    """Train, sample, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, help="where MNIST lies; the usual places if left out"
    )
    parser.add_argument("-n", type=int, default=6000, help="digits to train on, of 58,000 (6000)")
    parser.add_argument(
        "--epochs", type=int, default=4, help="of stage 1; stage 2 takes half as many (4)"
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
    found = noise_calibration(model, [test], varying_dimensions(test)).varying_dimensions
    print(
        f"test digits: ELBO {history[-1]['test_elbo']:.0f} nats, squared error {history[-1]['test_mse']:.4f} per pixel"
    )
    if found is not None:
        print(
            f"pixels that vary, within one predicted std: {found.coverage_1.value:.1%}, nominally 68.3%"
        )

    with torch.no_grad():
        x = model.scaling(test[:SHOWN])
        seen = model.reconstruct(x)
        new = model.generate(SHOWN, mixture, torch.Generator().manual_seed(0))
    figure = plots.reconstructions(x.numpy(), seen.mean.numpy(), seen.std.numpy())
    print(f"wrote {plots.save(figure, options.out)}")
    figure = plots.samples(new.mean.numpy(), new.std.numpy(), "new digits")
    print(f"wrote {plots.save(figure, options.out.with_stem(options.out.stem + '-new'))}")


if __name__ == "__main__":
    main()
