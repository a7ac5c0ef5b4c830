"""``equipoise report``: write one self-contained page about a run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from equipoise.cli.command import Command, add_quiet, add_run, open_terminal, paragraph


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``report``."""
    add_run(parser)
    add_quiet(parser)
    parser.epilog = paragraph(
        "The page is RUN/report.html. It shows what training and 'equipoise evaluate' have written."
    )


def _run(options: Namespace) -> None:
    """Write the page of a run."""
    from equipoise.report import write_report

    with open_terminal(options.quiet) as terminal:
        terminal.message(str(write_report(Path(options.run))))


COMMAND = Command(
    "Write one self-contained page about a run.",
    _add_arguments,
    _run,
)
