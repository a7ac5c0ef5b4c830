"""``equipoise impute``: fill the gaps of a table with a run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from equipoise.cli.command import (
    Command,
    add_data_dir,
    add_limits,
    add_quiet,
    add_run,
    add_strict,
    list_written,
    open_terminal,
    other_examples,
    table_run,
    warn_of_unit,
)
from equipoise.config import ConfigError


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``impute``."""
    add_run(parser)
    parser.add_argument(
        "table",
        metavar="TABLE",
        help="Table whose gaps are filled, a .csv, .tsv, .parquet, .feather or .npy file. Its "
        "columns are found by their names. Other columns stay as they are.",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="File to write to, of any of these formats. The default is the name of TABLE with "
        "-imputed, in the folder RUN/imputed. The std of each filled value, and the probability of "
        "each filled category, go into a second file with -std.",
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=0,
        metavar="M",
        help="Write M more tables, with -1, -2 and so on, in which the gaps are filled by random "
        "draws: multiple imputations. The default is 0.",
    )
    parser.add_argument(
        "--n-samples",
        type=int,
        default=100,
        metavar="K",
        help="Number of codes per row over which the expectation is taken. The default is 100.",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of all random draws. The default is 0."
    )
    add_data_dir(parser)
    add_limits(parser)
    add_strict(parser)
    add_quiet(parser)


def _run(options: Namespace) -> None:
    """Fill the gaps of a table, and write it."""
    import torch

    from equipoise.data.tables import SUFFIXES, is_table
    from equipoise.imputation import impute
    from equipoise.outputs import write_imputed

    if options.draws < 0:
        raise ConfigError([f"--draws must be at least 0, got {options.draws}"])

    run, model, mixture = table_run(options.run, "fills the gaps")

    source = Path(options.table)
    stem, dot, endings = source.name.partition(".")
    path = run.folder / "imputed" / f"{stem}-imputed{dot}{endings}"
    if options.out:
        path = Path(options.out)
    if options.out and path.suffix != ".npy" and not is_table(path):
        raise ConfigError([f"--out {path}: tables are written to {', '.join(SUFFIXES)} and .npy"])
    if path.resolve() == source.resolve():
        raise ConfigError([f"--out {path} is the table itself, whose gaps would be lost"])

    with open_terminal(options.quiet) as terminal:
        raw = torch.from_numpy(other_examples(options.table, run, model, options, terminal)[:])
        warn_of_unit(model, raw, terminal)

        found = impute(
            model,
            mixture,
            raw,
            n_samples=options.n_samples,
            n_draws=options.draws,
            seed=options.seed,
        )
        n_gaps = int(raw.isnan().sum())
        terminal.message(f"{n_gaps:,} of {raw.numel():,} values were missing.")

        def write() -> list[Path]:
            return write_imputed(model, source, raw, found, path)

        terminal.message("\n".join(list_written(write, path.parent)))


COMMAND = Command(
    "Fill the missing values of a table with a run, and say how well each is known.",
    _add_arguments,
    _run,
)
