"""``equipoise sample``: draw samples from a run."""

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

from equipoise.catalogue import SOURCES
from equipoise.cli.command import (
    Command,
    add_data_dir,
    add_quiet,
    add_run,
    data_of,
    list_entries,
    list_written,
    open_terminal,
    table_to_write,
)
from equipoise.config import ConfigError


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``sample``."""
    add_run(parser)

    parser.add_argument(
        "--from",
        dest="source",
        metavar="NAME",
        default="mixture",
        help="Source of the codes that are decoded. The default is mixture. All sources are listed "
        "below.",
    )
    parser.add_argument("-n", type=int, default=64, help="Number of samples. The default is 64.")

    parser.add_argument(
        "--label",
        metavar="NAME",
        help="Label of all samples, of a run that was trained with labels. By default, labels are "
        "drawn by their share, and written beside the samples.",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="Seed of all random draws. The same seed gives the same samples. The default is 0.",
    )
    parser.add_argument(
        "--noise",
        action="store_true",
        help="Add the model's noise. Without it, each sample is the mean of p(x|z), or the "
        "most probable category, and rows of a table spread less than those of the data.",
    )
    add_data_dir(parser)
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="Folder to write to. The default is RUN/samples. A path such as x.csv or x.parquet "
        "writes rows of a table with the names of its columns.",
    )

    add_quiet(parser)

    sources = {}
    for name, source in SOURCES.items():
        text = source.summary[0].upper() + source.summary[1:] + "."
        if source.is_fitted:
            text += " It is fitted to the training data at first use, and kept in RUN."
        sources[name] = text

    parser.epilog = f"sources of codes for --from:\n{list_entries(sources)}"


def _run(options: Namespace) -> None:
    """Draw samples, and write them."""
    from equipoise.labels import label_number
    from equipoise.outputs import write_sampled_table, write_samples
    from equipoise.randomness import stream
    from equipoise.run import Run
    from equipoise.sources import draw_codes, file_stem

    if options.n < 1:
        raise ConfigError([f"-n must be at least 1, got {options.n}"])

    run = Run(options.run)
    model = run.model()
    generator = stream(options.seed, "samples")
    if options.label is not None:
        label_number(model.label_names, options.label)  # before anything is fitted or loaded
    table = table_to_write(options.out, model)
    folder = Path(options.out) if options.out else run.folder / "samples"

    with open_terminal(options.quiet) as terminal:
        codes = draw_codes(
            run,
            model,
            options.source,
            options.n,
            generator,
            lambda: data_of(run, terminal, options.data_dir),
            terminal.progress,
            options.label,
        )

        name = file_stem(options.source)
        if options.label is not None:
            name += f"-label-{_in_file_name(model.label_names, options.label)}"

        def write() -> list[Path]:
            if table is not None:
                return write_sampled_table(model, codes, table, generator, noise=options.noise)
            return write_samples(model, codes, name, folder, generator, noise=options.noise)

        terminal.message("\n".join(list_written(write, table.parent if table else folder)))


def _in_file_name(names: tuple[str, ...], label: str) -> str:
    """Write a label as part of the name of a file: letters, digits, ``_`` and ``-``."""
    text = re.sub(r"[^\w-]+", "-", label)[:40]
    if text == label:
        return text
    # Two labels may differ in other characters alone.
    return f"{text}-{names.index(label)}"


COMMAND = Command(
    "Draw samples from a run.",
    _add_arguments,
    _run,
)
