"""The command line: parses, calls, prints, and decides nothing.

Each command is a file of its own. Only the options are imported at the top, so that ``equipoise
--help`` does not wait for torch.
"""

import errno
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from equipoise import __version__
from equipoise.cli import evaluate, explore, export, paper, push, reconstruct, report, sample, train
from equipoise.cli.command import add_help
from equipoise.training.preemption import EXIT_CODE as PREEMPTED
from equipoise.training.preemption import Preempted

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit codes."""

COMMANDS = {
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "report": report.COMMAND,
    "sample": sample.COMMAND,
    "reconstruct": reconstruct.COMMAND,
    "explore": explore.COMMAND,
    "export": export.COMMAND,
    "paper": paper.COMMAND,
    "push": push.COMMAND,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    The exit code is 0 if all went well, 2 for wrong input, 1 for a failure on the way, 130 if the
    user interrupted the command, and 143 if SIGTERM stopped a training.

    Args:
        arguments: Arguments without the program's name. None takes those of the process.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return
    command = COMMANDS[options.command]

    try:
        command.run(options)
    except KeyboardInterrupt:
        _fail(f"interrupted; {command.after_interruption}", INTERRUPTED)
    except Preempted as error:
        # Of several processes, only the first has this code. The others end without a message.
        if error.code == PREEMPTED:
            _fail(f"{error}; {command.after_interruption}", PREEMPTED)
    except ArithmeticError as error:
        _fail(str(error), FAILURE)
    except (ValueError, ImportError) as error:
        _fail(str(error), USAGE_ERROR)
    except OSError as error:
        is_disk_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _fail(_describe_os_error(error), FAILURE if is_disk_full else USAGE_ERROR)


def _fail(message: str, code: int) -> None:
    """Print an error message, and end the process."""
    print(f"equipoise: {message}", file=sys.stderr)  # noqa: T201 (the terminal)
    sys.exit(code)


def _describe_os_error(error: OSError) -> str:
    """Say what the operating system refused, and for which file."""
    if error.filename:
        return f"{error.strerror}: {error.filename}"
    return error.strerror or str(error)


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
