"""``equipoise fit-noise``: estimate the correlation of a run's errors."""

from argparse import ArgumentParser, Namespace

from equipoise.cli.command import (
    Command,
    add_data_dir,
    add_quiet,
    add_run,
    data_of,
    open_terminal,
    paragraph,
)


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``fit-noise``."""
    add_run(parser)
    parser.add_argument(
        "--form",
        choices=["auto", "full", "low-rank", "bands", "none"],
        default="auto",
        help="Form of the correlation: full is any matrix, low-rank has common factors, bands has "
        "a variance per band of frequencies and colour axis, for images. The default is auto: the "
        "form of highest held-out likelihood, or none where it gains nothing beyond its error. "
        "none takes an earlier correlation out.",
    )
    add_data_dir(parser)
    add_quiet(parser)

    parser.epilog = paragraph(
        "The correlation is estimated on the validation set of the run, while its networks stand "
        "still. Means, std and intervals stay as they are. Likelihoods, outlier scores and samples "
        "with noise change, so an earlier evaluation must be written anew."
    )


def _run(options: Namespace) -> None:
    """Estimate the correlation, and write it into the model."""
    from equipoise.noise_fit import fit_noise
    from equipoise.run import Run

    run = Run(options.run)
    run.model()  # before the data are loaded, which may take long

    with open_terminal(options.quiet) as terminal:
        fit = fit_noise(run, data_of(run, terminal, options.data_dir), options.form)
        terminal.message(fit.message)
        terminal.message(f"Run       {run.folder}\nNext      equipoise evaluate {run.folder}")


COMMAND = Command(
    "Estimate how the errors of a trained run are correlated.",
    _add_arguments,
    _run,
    "the model is as it was, or has its correlation",
)
