"""``equipoise train``: train a model and fit the mixture; go on with a run that was stopped."""

import logging
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.cli.command import (
    Command,
    add_data_dir,
    add_limits,
    add_quiet,
    decoding_bar,
    list_entries,
    open_terminal,
    paragraph,
    show_default,
)
from equipoise.config import (
    CONTINUED,
    PLACEMENT,
    ConfigError,
    TrainConfig,
    make_config,
    option_help,
    read_recipe,
    shipped_recipes,
    type_name,
)

if TYPE_CHECKING:
    from equipoise.data import Data
    from equipoise.mixture_fit import EMStep
    from equipoise.run import Run
    from equipoise.terminal import Terminal

AUTO = "auto"
"""The value of --resume that starts a run or goes on with it."""
SHORTHANDS = (*PLACEMENT, "precision", "fit", "pages")
"""Options with flags of their own: those of the machine, and those of image files."""


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``train``."""
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="Data to train on: digits, mnist, fashion-mnist, celeba, a folder of images, an .npy "
        "or .npz file, a table (.csv, .tsv, .parquet, .feather), or hf:owner/name on the Hugging "
        "Face hub. The default is digits. A folder "
        "whose images differ in size needs an option such as --set image_size=64. Empty cells of a "
        "table are missing values, which are not filled in. Tables need the extra 'tables'.",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="Columns of a table to train on. The default is all of them. DATA go before it.",
    )
    parser.add_argument(
        "--drop",
        nargs="+",
        metavar="NAME",
        help="Columns of a table to leave out, such as those of names or dates.",
    )
    parser.add_argument(
        "--categorical",
        nargs="+",
        metavar="NAME",
        help="Columns of a table that are categories besides those of text and flags, such as "
        "codes that are numbers.",
    )
    parser.add_argument(
        "--label",
        metavar="NAME",
        help="Train a conditional model: NAME is the column of a table or the array of an .npz "
        "file that holds labels, 'folder' for images in folders of classes, and 'label' for "
        "digits, mnist and fashion-mnist. Without it, labels are not used.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Say what was read, and what would be trained, and stop: columns, kinds, gaps, ranges "
        "and the first rows of a table.",
    )

    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="YAML file of options, or the name of a recipe that comes with equipoise: "
        f"{', '.join(shipped_recipes())}. Each of these data sets uses its recipe by default.",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="Values of options, which win over those of the recipe. All options are listed below.",
    )

    parser.add_argument(
        "--out",
        metavar="RUN",
        help="Folder to write the run to. The default is runs/NAME, after the name of the data. An "
        "address such as s3://bucket/run gets a copy after each checkpoint.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="Write the run into a folder that holds other files. None of them is replaced.",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="Continue an interrupted run, with its own data and options. With --set "
        "stage_1_epochs=N or stage_2_epochs=N, a finished run goes on for longer: N counts all "
        "epochs of the stage, and the results so far are kept in RUN/earlier-1. '--resume auto', "
        "with --out, continues the run in that folder if there is one, and starts it if there is "
        "none, so that one line starts and restarts it.",
    )

    for name in SHORTHANDS:
        flag = "--" + name.replace("_", "-")
        metavar = {"precision": "P", "fit": "WAY", "pages": "USE"}.get(name, "N")
        parser.add_argument(flag, metavar=metavar, help=f"The same as --set {name}={metavar}.")

    add_data_dir(parser)
    add_limits(parser)
    parser.add_argument(
        "--download",
        action="store_true",
        help="Download named data that are not on this machine. Needs the extra 'hub'.",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="Read the data anew in every epoch, without keeping the examples: what 'equipoise "
        "pack' has written, or a folder of .npy, .parquet, .feather or .tar files, also at a place "
        "such as s3://bucket/folder, of which each process reads its own part; or data from the "
        "Hugging Face hub or a local copy (hf:PATH). Tables and hf: need the extra 'hub'.",
    )
    parser.add_argument(
        "--no-split",
        action="store_true",
        help="Pool a folder's own parts (train, val, test) and split anew. By default they are "
        "used as such.",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="Refuse a folder of images if one of its files cannot be read.",
    )
    add_quiet(parser)

    about_sigterm = paragraph(
        "Clusters send SIGTERM before they take a machine back. Training then writes a checkpoint "
        "and ends with the exit code 143. 'equipoise train --resume RUN' continues from the same "
        "step, and ends with the same result as a training without an interruption. "
        "'equipoise train DATA --out RUN --resume auto' is the same line for start and restart."
    )

    options = {}
    for field in fields(TrainConfig):
        title = f"{field.name}={show_default(field.default)}  ({type_name(field.name)})"
        options[title] = option_help(field.name)

    title = "options for --set and recipes, with their defaults:"
    parser.epilog = f"{about_sigterm}\n\n{title}\n{list_entries(options)}"


def _run(options: Namespace) -> None:
    """Train a model, or go on with a run."""
    from equipoise.run import Run
    from equipoise.training.engine import is_main_process
    from equipoise.training.job import train
    from equipoise.training.setup import check_fit

    # Fabric logs a line for each process that it starts.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

    is_auto = options.resume == AUTO
    if is_auto and not options.out:
        raise ConfigError(
            ["--resume auto needs --out RUN: the folder to look into, the same each time"]
        )
    is_resumed = bool(options.resume) and not is_auto

    if is_resumed:
        _refuse_with_resume(options)
        run_to_resume = Run(options.resume)
        over = {name: getattr(options, name) for name in PLACEMENT if getattr(options, name)}
        over |= _options_of_continuation(options.set)
        config = make_config(run_to_resume.config().as_dict(), over)
        if options.set and run_to_resume.is_trained() and config == run_to_resume.config():
            raise ConfigError(
                [
                    f"{options.resume} was trained with {', '.join(options.set)}: "
                    "give more epochs to continue it"
                ]
            )
    else:
        config, source = _resolve(options)

    with open_terminal(quiet=options.quiet, silent=not is_main_process()) as terminal:
        if is_resumed:
            data = run_to_resume.data(options.data_dir, decoding_bar(terminal), terminal.message)
        else:
            if options.dry_run:
                _describe_table(source, options, terminal)
            data = _load(source, config, options, terminal)
        terminal.message(f"{data.name}: {_describe_data(data)}.")
        for note in data.notes:
            terminal.message(f"Note: {note}")
        if options.dry_run:
            check_fit(data, config)
            terminal.message("Nothing was trained: leave out --dry-run to train.")
            return

        def show_mixture(step: "EMStep") -> None:
            label = f"mixture of {step.n_components}"
            figure = f"{step.log_likelihood:.3f} nats per code"
            terminal.progress(label, step.iteration, None, figure)

        run = train(
            data,
            config,
            options.resume if is_resumed else options.out,
            resume="auto" if is_auto else is_resumed,
            force=options.force,
            sinks=[terminal],
            command=["equipoise", *sys.argv[1:]],
            on_mixture=show_mixture,
        )
        if is_main_process():
            _finish(run, data, terminal, is_evaluation_kept=is_auto)


def _refuse_with_resume(options: Namespace) -> None:
    """Refuse data and options that a resumed run has already."""
    names = [
        *("recipe", "out", "force", "precision", "download", "stream", "strict"),
        *("max_pixels", "max_bytes", "fit", "pages", "no_split", "columns", "drop", "dry_run"),
        *("categorical", "label"),
    ]
    superfluous = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]
    if options.data:
        superfluous.append(options.data)

    if superfluous:
        raise ConfigError(
            [
                "--resume goes on with the run's own data and options; "
                f"leave out {', '.join(superfluous)}"
            ]
        )


def _options_of_continuation(items: list[str]) -> dict[str, str]:
    """Read the values of --set that a run may be continued with, and refuse the others."""
    over, problems = _read_items(items)
    problems += [
        f"{name} cannot change with --resume: the weights, the data or the stages that the run "
        f"has belong to its value; only {' and '.join(CONTINUED)} can, or train another run"
        for name in over
        if name not in CONTINUED
    ]
    if problems:
        raise ConfigError(problems)
    return over


def _read_items(items: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split the values of --set into names and values; return the problems beside them."""
    values, problems = {}, []
    for item in items:
        key, separator, value = item.partition("=")
        if separator:
            values[key.strip()] = value
        else:
            problems.append(f"--set needs KEY=VALUE, got {item!r}; the data go before --set")
    return values, problems


def _resolve(options: Namespace) -> tuple[TrainConfig, str]:
    """Put the values of flags over those of --set, and these over the recipe; find the data.

    The problems of all of them come in one error.
    """
    name = options.recipe or options.data or "digits"
    file = shipped_recipes().get(name)
    if file is None and options.recipe:
        file = Path(name)

    values = {}
    if file is not None:
        values = read_recipe(file)
    data_of_recipe = values.pop("data", None)
    source = options.data or data_of_recipe or "digits"

    over, problems = _read_items(options.set)
    for shorthand in SHORTHANDS:
        if getattr(options, shorthand):
            over[shorthand] = getattr(options, shorthand)

    try:
        config = make_config(values, over)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    return config, source


def _load(source: str, config: TrainConfig, options: Namespace, terminal: "Terminal") -> "Data":
    """Load the data that are named on the command line."""
    from equipoise.data import is_packed_source, load, load_stream

    is_packed = not options.stream and is_packed_source(source)
    if is_packed:
        terminal.message(f"Note: {source} holds packed examples, which are read as a stream")
    if options.stream or is_packed:
        if options.label:
            raise ConfigError(["--stream reads no labels: leave out --label, or --stream"])
        if options.columns or options.drop or options.categorical:
            raise ConfigError(
                [
                    "--columns, --drop and --categorical are for tables in files, which --stream "
                    "does not read"
                ]
            )
        if options.max_bytes is not None:
            raise ConfigError(
                ["--max-bytes is for .npz and .gz files; leave it out, because --stream reads none"]
            )
        if config.pages or config.fit != "crop" or options.no_split:
            raise ConfigError(
                ["--stream reads the first page and crops: leave out pages, fit and --no-split"]
            )
        return load_stream(
            source,
            image_size=config.image_size,
            channels=config.channels,
            max_pixels=options.max_pixels,
        )

    return load(
        source,
        data_dir=options.data_dir,
        strict=options.strict,
        download=options.download,
        image_size=config.image_size,
        channels=config.channels,
        pages=config.pages,
        fit=config.fit,
        pool=options.no_split,
        test_fraction=config.test_fraction,
        validation_fraction=config.validation_fraction,
        progress=decoding_bar(terminal),
        say=terminal.message,
        max_pixels=options.max_pixels,
        max_bytes=options.max_bytes,
        columns=options.columns,
        drop=options.drop,
        label=options.label,
        categorical=options.categorical or True,
    )


def _describe_table(source: str, options: Namespace, terminal: "Terminal") -> None:
    """Say what a file with a table holds, also where it cannot be trained on."""
    from equipoise.data import NAMES
    from equipoise.data.tables import is_table, read_table
    from equipoise.files import expanded

    path = expanded(source)
    if source in NAMES or not is_table(source) or not path.is_file():
        return
    try:
        table = read_table(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if options.columns or options.drop:
        table = table.select(options.columns, options.drop)
    table = table.with_categories(options.categorical or True)
    terminal.message(table.describe())


def _describe_data(data: "Data") -> str:
    """Say how many examples there are, of what kind, and where they come from."""
    unit = {1: "columns", 2: "signals", 3: "images", 4: "volumes"}[len(data.shape)]
    shape = " x ".join(map(str, data.shape))
    return (
        f"{len(data.train):,} training, {len(data.validation):,} validation and "
        f"{len(data.test):,} test examples, {shape} {unit}, from {data.source}"
    )


def _finish(run: "Run", data: "Data", terminal: "Terminal", *, is_evaluation_kept: bool) -> None:
    """Show figures on the test set, where the pictures are, and what to do next."""
    from equipoise.evaluation import evaluate
    from equipoise.terminal import format_section

    evaluation = run.evaluation() if is_evaluation_kept else {}
    if "likelihood" not in evaluation:
        evaluation = evaluate(run, data, sections=["likelihood"], brief=True)

    if run.remote is not None:
        run.remote.upload()
    terminal.close()
    terminal.message(format_section("likelihood", evaluation["likelihood"]))
    terminal.message(
        f"Run       {run.folder}\n"
        f"Figures   {run.figures}: training.png, mixture.png, reconstructions.png\n"
        f"Next      equipoise evaluate {run.folder}\n"
        f"          equipoise sample {run.folder}"
    )


COMMAND = Command(
    "Train a model and fit the mixture.",
    _add_arguments,
    _run,
    "go on from the last checkpoint with 'equipoise train --resume RUN'",
)
