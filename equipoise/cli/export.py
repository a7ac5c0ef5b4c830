"""``equipoise export``: write a run as files that run without equipoise."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from equipoise.catalogue import SOURCES
from equipoise.cli.command import Command, add_data_dir, add_run, data_of, open_terminal, paragraph


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``export``."""
    mixtures = ", ".join(name for name, source in SOURCES.items() if source.is_mixture)

    add_run(parser)
    parser.add_argument(
        "--to",
        choices=["torch", "onnx"],
        required=True,
        help="Format of the files: programs of torch.export, or ONNX graphs. onnx needs the extra "
        "'export'.",
    )

    parser.add_argument(
        "--from",
        dest="source",
        metavar="NAME",
        default="mixture",
        help="Source of the codes that the sampler draws. It must be a Gaussian mixture: "
        f"{mixtures}. The default is mixture. 'equipoise sample --help' explains all sources.",
    )
    add_data_dir(parser)
    parser.add_argument(
        "--out", metavar="FOLDER", help="Folder to write to. The default is RUN/export."
    )

    parser.epilog = paragraph(
        "Four files are written: an encoder, a decoder, a sampler and a scorer. They take any "
        "number of examples, in the unit of the data. The sampler turns uniform noise in [0, 1) "
        "and normal noise into codes for the decoder. The scorer takes complete examples and "
        "normal noise, and returns the score of each and its p-value by the held-out scores that "
        "the run keeps: an example is odd if it is at most the rate of false alarms."
    )


def _run(options: Namespace) -> None:
    """Export the model of a run, with a sampler of codes."""
    from equipoise.correlated_noise import CorrelatedNoise
    from equipoise.export import Scoring, export
    from equipoise.held_out import read_held_out
    from equipoise.run import Run
    from equipoise.sources import exportable_mixture

    run = Run(options.run)
    model = run.model()
    folder = Path(options.out) if options.out else run.folder / "export"

    with open_terminal() as terminal:
        mixture = exportable_mixture(
            run,
            model,
            options.source,
            lambda: data_of(run, terminal, options.data_dir),
            terminal.progress,
        )
        scoring, held_out = None, read_held_out(run, model)
        if held_out is None:
            terminal.message(
                f"Note: no scorer is written, because the run keeps no held-out scores yet: "
                f"'equipoise score {run.folder}' makes them"
            )
        else:
            scoring = Scoring(run.mixture(), held_out.known().plain)
        for file in export(model, mixture, options.to, folder, scoring):
            deviation = f"largest relative deviation from the model: {file.deviation:.1g}"
            terminal.message(f"{file.path}\n  {file.signature}\n  {deviation}")
        if isinstance(model.noise, CorrelatedNoise):
            terminal.message("The decoder has the std of the noise, not its correlation.")


COMMAND = Command(
    "Write a run as files that run without equipoise.",
    _add_arguments,
    _run,
)
