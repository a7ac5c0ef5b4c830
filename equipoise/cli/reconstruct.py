"""``equipoise reconstruct``: reconstruct data with a run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from equipoise.cli.command import (
    Command,
    add_data_dir,
    add_limits,
    add_no_split,
    add_quiet,
    add_run,
    data_of,
    list_written,
    open_terminal,
    other_examples,
    paragraph,
    table_to_write,
)
from equipoise.config import ConfigError


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``reconstruct``."""
    add_run(parser)
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="Data to reconstruct, named as for 'equipoise train', or one image file. Of a folder "
        "with the parts train, val and test, the test part is taken. The default is the run's own "
        "test set.",
    )
    add_no_split(parser)

    parser.add_argument(
        "-n",
        type=int,
        help="Number of examples to reconstruct, from the first on. The default is all examples.",
    )
    add_data_dir(parser)
    add_limits(parser)
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="Folder to write to. The default is RUN/reconstructions. A path such as x.csv or "
        "x.parquet writes the means of a table, and their std to x-std.csv, with the names of its "
        "columns.",
    )
    add_quiet(parser)
    parser.epilog = paragraph(
        "reconstructions.npz has the arrays data, mean, std and error in the unit of the data, and "
        "name: the file, or the row of the array, that each entry is. reconstructions.csv has the "
        "name, the root mean squared error and the std of each. Values beyond those of the "
        "training are taken with a warning; data in another unit are refused."
    )


def _run(options: Namespace) -> None:
    """Reconstruct examples, and write what becomes of them."""
    from equipoise.outputs import write_reconstructed_table, write_reconstructions
    from equipoise.run import Run

    if options.n is not None and options.n < 1:
        raise ConfigError([f"-n must be at least 1, got {options.n}"])
    run = Run(options.run)
    model = run.model()
    table = table_to_write(options.out, model)
    folder = Path(options.out) if options.out else run.folder / "reconstructions"

    with open_terminal(options.quiet) as terminal:
        if options.data is None:
            examples = data_of(run, terminal, options.data_dir).test
        else:
            examples = other_examples(options.data, run, model, options, terminal)
        examples = examples.take(slice(options.n))

        def write() -> list[Path]:
            if table is not None:
                return write_reconstructed_table(model, examples, table)
            return write_reconstructions(model, examples, folder)

        terminal.message("\n".join(list_written(write, table.parent if table else folder)))


COMMAND = Command(
    "Reconstruct data with a run, with the uncertainty of each value.",
    _add_arguments,
    _run,
)
