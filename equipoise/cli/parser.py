"""The parser of all commands. Only their options are imported, so that help is fast."""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from equipoise import __version__
from equipoise.cli import (
    cache,
    evaluate,
    explore,
    export,
    fit_noise,
    impute,
    pack,
    paper,
    push,
    reconstruct,
    report,
    sample,
    score,
    train,
)
from equipoise.cli.command import add_help
from equipoise.config import ConfigError

COMMANDS = {
    "train": train.COMMAND,
    "fit-noise": fit_noise.COMMAND,
    "evaluate": evaluate.COMMAND,
    "report": report.COMMAND,
    "sample": sample.COMMAND,
    "reconstruct": reconstruct.COMMAND,
    "impute": impute.COMMAND,
    "score": score.COMMAND,
    "explore": explore.COMMAND,
    "export": export.COMMAND,
    "paper": paper.COMMAND,
    "push": push.COMMAND,
    "cache": cache.COMMAND,
    "pack": pack.COMMAND,
}


def refuse_empty(options: Namespace) -> None:
    """Refuse arguments that are empty, which would be taken for those that are not given.

    Args:
        options: What the parser has read.

    Raises:
        ConfigError: If there are some. It names them.
    """
    empty = [
        f"{name.replace('_', '-')} is empty; is a variable of the shell not set?"
        for name, value in vars(options).items()
        if "" in (value if isinstance(value, list) else [value])
    ]
    if empty:
        raise ConfigError(empty)


def make_parser() -> ArgumentParser:
    """Make the parser of all commands.

    Returns:
        The parser.
    """
    parser = ArgumentParser(
        prog="equipoise",
        description="Variational autoencoders that balance themselves. The noise variance is "
        "learned, and samples come from a mixture that is fitted to the aggregate posterior.",
        add_help=False,
        epilog="'equipoise train' alone trains a model on 8x8 digits, in about a minute and "
        "without a download. 'equipoise COMMAND --help' explains a command.",
    )
    add_help(parser)
    parser.add_argument(
        "--version",
        action="version",
        version=f"equipoise {__version__}",
        help="Print the version and exit.",
    )

    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        command_parser = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            formatter_class=RawDescriptionHelpFormatter,
            add_help=False,
        )
        add_help(command_parser)
        command.add_arguments(command_parser)
    return parser
