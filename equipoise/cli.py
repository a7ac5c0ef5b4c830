"""The command line. Parses, calls, prints; decides nothing.

Only the options are imported at the top, so that ``equipoise --help`` does not wait for torch.
"""

import errno
import logging
import os
import shutil
import sys
import textwrap
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from equipoise import __version__
from equipoise.catalogue import SOURCES
from equipoise.config import (
    PLACEMENT,
    ConfigError,
    TrainConfig,
    make_config,
    option_help,
    read_recipe,
    shipped_recipes,
    type_name,
)
from equipoise.training.preemption import EXIT_CODE as PREEMPTED
from equipoise.training.preemption import Preempted

if TYPE_CHECKING:
    from equipoise.data import Data, Subset
    from equipoise.mixture_fit import EMStep
    from equipoise.run import Run
    from equipoise.terminal import Terminal

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit codes."""
SHORTHANDS = (*PLACEMENT, "precision")
"""Options of the machine, which have flags of their own."""
PAPER_ITEMS = (
    "table-1",
    "table-2",
    "table-3",
    "table-4",
    "figure-1",
    "figure-2",
    "figure-3",
    "figure-4",
    "beyond-codes",
    "beyond-noise",
    "beyond-size",
)


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
    _add_help(parser)
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
        _add_help(command_parser)
        command.add_arguments(command_parser)
    return parser


class Command(NamedTuple):
    """A command.

    Args:
        summary: A sentence that says what the command does, for ``--help``.
        add_arguments: Describes the command's arguments to a parser.
        run: Runs the command with the parsed arguments.
        after_interruption: What an interruption leaves behind, and how to go on. It follows a
            semicolon.
    """

    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]
    after_interruption: str = "no file was left half-written"


# Help of each command


def _train_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``train``."""
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="Data to train on: digits, mnist, fashion-mnist, celeba, a folder of images, an .npy "
        "or .npz file, or hf:owner/name on the Hugging Face hub. The default is digits. A folder "
        "whose images differ in size needs an option such as --set image_size=64.",
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
        help="Folder to write the run to. The default is runs/NAME, after the name of the data.",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="Continue an interrupted run, with its own data and options.",
    )

    for name in SHORTHANDS:
        flag = "--" + name.replace("_", "-")
        metavar = "P" if name == "precision" else "N"
        parser.add_argument(flag, metavar=metavar, help=f"The same as --set {name}={metavar}.")

    _add_data_dir(parser)
    parser.add_argument(
        "--download",
        action="store_true",
        help="Download named data that are not on this machine. Needs the extra 'hub'.",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="Read data from the Hugging Face hub, or from a local copy (hf:PATH), anew in every "
        "epoch, without keeping the examples. Needs the extra 'hub'.",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="Refuse a folder of images if one of its files cannot be read.",
    )
    _add_quiet(parser)

    about_sigterm = _paragraph(
        "Clusters send SIGTERM before they take a machine back. Training then writes a checkpoint "
        "and ends with the exit code 143. 'equipoise train --resume RUN' continues from the same "
        "step, and ends with the same result as a training without an interruption."
    )

    options = {}
    for field in fields(TrainConfig):
        title = f"{field.name}={_show(field.default)}  ({type_name(field.name)})"
        options[title] = option_help(field.name)

    parser.epilog = (
        f"{about_sigterm}\n\noptions for --set and recipes, with their defaults:\n{_list(options)}"
    )


def _sample_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``sample``."""
    _add_run(parser)

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
        "--seed",
        type=int,
        default=0,
        help="Seed of all random draws. The same seed gives the same samples. The default is 0.",
    )
    parser.add_argument(
        "--noise",
        action="store_true",
        help="Add the model's pixel noise. Without it, each sample is the mean of p(x|z).",
    )
    _add_data_dir(parser)
    parser.add_argument(
        "--out", metavar="FOLDER", help="Folder to write to. The default is RUN/samples."
    )

    sources = {}
    for name, source in SOURCES.items():
        text = source.summary[0].upper() + source.summary[1:] + "."
        if source.is_fitted:
            text += " It is fitted to the training data at first use, and kept in RUN."
        sources[name] = text

    parser.epilog = f"sources of codes for --from:\n{_list(sources)}"


def _reconstruct_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``reconstruct``."""
    _add_run(parser)
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="Data to reconstruct, named as for 'equipoise train'. The default is the run's own "
        "test set.",
    )

    parser.add_argument(
        "-n",
        type=int,
        help="Number of examples to reconstruct, from the first on. The default is all examples.",
    )
    _add_data_dir(parser)
    parser.add_argument(
        "--out", metavar="FOLDER", help="Folder to write to. The default is RUN/reconstructions."
    )


def _evaluate_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``evaluate``."""
    _add_run(parser)

    parser.add_argument(
        "--data",
        metavar="DATA",
        help="Data to judge the run on, named as for 'equipoise train'. The default is the run's "
        "own test set.",
    )
    parser.add_argument(
        "--against",
        metavar="DATA",
        help="Data of another kind. The section outliers measures how well the model tells them "
        "from the test set.",
    )

    parser.add_argument(
        "--sections",
        nargs="+",
        default=[],
        metavar="SECTION",
        help="Sections to compute: likelihood, samples, latent, noise, outliers. The default is "
        "all sections, but outliers only with --against. Other sections of an earlier evaluation "
        "are kept.",
    )
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Sources of codes to judge in the sections samples and latent, besides prior, "
        "gaussian and mixture. 'equipoise sample --help' lists all sources.",
    )

    parser.add_argument(
        "--features",
        default="auto",
        metavar="NAME",
        help="Features in which samples are compared. efficientnet-lite0 is the default for "
        "images, and comes with equipoise. columns is the default for tables. inception and "
        "inception=PATH are those of published Fréchet distances, and need the extra 'fid'. "
        "PACKAGE.MODULE:NAME is a torch.nn.Module of your own.",
    )

    parser.add_argument(
        "-n",
        type=int,
        default=10_000,
        help="Number of samples, which are compared with the same number of test examples. The "
        "default is 10000, or the number of test examples if that is smaller.",
    )
    parser.add_argument(
        "--importance-samples",
        type=int,
        default=20,
        metavar="K",
        help="Number of samples of z per example in the bound on log p(x) over the whole test set. "
        "The default is 20.",
    )

    parser.add_argument(
        "--seed", type=int, help="Seed of all random draws. The default is the seed of the run."
    )

    parser.add_argument(
        "--download",
        action="store_true",
        help="Download the weights of --features inception if they are missing.",
    )
    _add_data_dir(parser)
    _add_quiet(parser)

    parser.epilog = _paragraph(
        "The figures are written to RUN/evaluation.json, or to RUN/evaluation-DATA.json with "
        "--data. Pictures are written to RUN/figures. 'equipoise report RUN' makes one page of "
        "them. Distances can only be compared if they were measured in the same features and with "
        "the same number of samples."
    )


def _report_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``report``."""
    _add_run(parser)
    parser.epilog = _paragraph(
        "The page is RUN/report.html. It shows what training and 'equipoise evaluate' have written."
    )


def _export_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``export``."""
    mixtures = ", ".join(name for name, source in SOURCES.items() if source.is_mixture)

    _add_run(parser)
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
    _add_data_dir(parser)
    parser.add_argument(
        "--out", metavar="FOLDER", help="Folder to write to. The default is RUN/export."
    )

    parser.epilog = _paragraph(
        "Three files are written: an encoder, a decoder and a sampler. They take any number of "
        "examples, in the unit of the data. The sampler turns uniform noise in [0, 1) and normal "
        "noise into codes for the decoder."
    )


def _push_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``push``."""
    parser.add_argument("run", metavar="RUN", help="Run folder.")
    parser.add_argument(
        "name",
        metavar="OWNER/NAME",
        help="Repository on the hub. It is created if it does not exist.",
    )

    parser.add_argument(
        "--license",
        metavar="ID",
        help="Licence of the model, such as apache-2.0, for the model card.",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="Let everyone see the repository if it is new. Without this flag it is private.",
    )

    parser.epilog = _paragraph(
        "The model, the mixture, JSON files and a model card are uploaded. No data, pictures or "
        "checkpoints are uploaded. Everyone who can read the repository can use hf:owner/name in "
        "place of a run folder. Log in with 'hf auth login' first. Needs the extra 'hub'."
    )


def _explore_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``explore``."""
    _add_run(parser)
    parser.add_argument(
        "--port",
        type=int,
        help="Port of the page. The default is 8769, or a free port if that is taken.",
    )
    parser.add_argument(
        "--no-browser",
        action="store_true",
        help="Print the address of the page without opening it.",
    )
    _add_data_dir(parser)

    parser.epilog = _paragraph(
        "The page is served to this machine only (127.0.0.1), until Ctrl-C. Needs the extra "
        "'explore'."
    )


def _paper_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``paper``."""
    parser.add_argument(
        "items",
        nargs="+",
        metavar="ITEM",
        help="Items to reproduce. They are listed below. 'all' stands for all of them.",
    )

    parser.add_argument(
        "--budget",
        choices=["tiny", "small", "full"],
        default="small",
        help="How long to train. The default is small. The budgets are explained below.",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="Number of epochs of every model. The default is that of the budget.",
    )

    parser.add_argument(
        "--runs",
        default="runs/paper",
        metavar="FOLDER",
        help="Folder of the trained models. The default is runs/paper.",
    )
    parser.add_argument(
        "--out",
        default="results",
        metavar="FOLDER",
        help="Folder for the figures as JSON. The default is results.",
    )
    parser.add_argument(
        "--page",
        default="docs/results.md",
        metavar="FILE",
        help="Page to write. The default is docs/results.md.",
    )

    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="Number of models that are trained at the same time. The default is 1.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of all models. The default is 0.")

    parser.add_argument(
        "--features",
        default="efficientnet-lite0",
        metavar="NAME",
        help="Features in which samples are compared, named as for 'equipoise evaluate'. The "
        "default is efficientnet-lite0.",
    )
    _add_data_dir(parser)
    _add_quiet(parser)

    about_items = _paragraph(
        "Models that are missing are trained, interrupted trainings are continued, and all models "
        "are evaluated by one fixed protocol. Items share their models. The figures are written to "
        "results/ITEM-BUDGET.json, and the page with its pictures to docs/results.md."
    )
    items = _paragraph(f"Items: {', '.join(PAPER_ITEMS)}, all.")
    budgets = {
        "tiny": "Digits only, in about a minute, to see that everything works.",
        "small": "All data sets, in about two hours on two CPU cores.",
        "full": "All data sets, on one GPU.",
    }
    parser.epilog = f"{about_items}\n\n{items}\n\nbudgets:\n{_list(budgets)}"


def _add_help(parser: ArgumentParser) -> None:
    """Describe ``--help``."""
    parser.add_argument("-h", "--help", action="help", help="Show this help and exit.")


def _add_run(parser: ArgumentParser) -> None:
    """Describe the argument that names the run."""
    parser.add_argument(
        "run",
        metavar="RUN",
        help="Run folder, or hf:owner/name of a run that was published on the Hugging Face hub.",
    )


def _add_data_dir(parser: ArgumentParser) -> None:
    """Describe ``--data-dir``."""
    parser.add_argument(
        "--data-dir",
        metavar="FOLDER",
        help="Folder to search first for mnist, fashion-mnist and celeba.",
    )


def _add_quiet(parser: ArgumentParser) -> None:
    """Describe ``--quiet``."""
    parser.add_argument(
        "--quiet", action="store_true", help="Print plain lines instead of progress bars."
    )


def _show(default: object) -> str:
    """Write the default of an option as in a recipe."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return str(default)


def _paragraph(text: str, indent: int = 0, further_indent: int | None = None) -> str:
    """Wrap a text to the width of the terminal, its first line and the further ones indented."""
    if further_indent is None:
        further_indent = indent

    return textwrap.fill(
        text,
        width=min(100, max(40, shutil.get_terminal_size().columns - 2)),
        initial_indent=" " * indent,
        subsequent_indent=" " * further_indent,
        break_on_hyphens=False,
    )


def _list(entries: Mapping[str, str]) -> str:
    """List names, each with its explanation below it."""
    lines = []
    for name, explanation in entries.items():
        lines.append(_paragraph(name, indent=2, further_indent=4))
        lines.append(_paragraph(explanation, indent=6))
    return "\n".join(lines)


# What each command does


def _train(options: Namespace) -> None:
    """Train a model, or go on with a run."""
    from equipoise.run import Run
    from equipoise.training.engine import is_main_process
    from equipoise.training.job import train

    # Fabric logs a line for each process that it starts.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

    if options.resume:
        _refuse_with_resume(options)
        run_to_resume = Run(options.resume)
        placement = {name: getattr(options, name) for name in PLACEMENT if getattr(options, name)}
        config = make_config(run_to_resume.config().as_dict(), placement)
    else:
        config, source = _resolve(options)

    with _terminal(quiet=options.quiet, silent=not is_main_process()) as terminal:
        if options.resume:
            data = run_to_resume.data(options.data_dir, _decoding_bar(terminal))
        else:
            data = _load(source, config, options, terminal)
        terminal.message(f"{data.name}: {_describe_data(data)}.")
        for note in data.notes:
            terminal.message(f"Note: {note}")

        def show_mixture(step: "EMStep") -> None:
            label = f"mixture of {step.n_components}"
            figure = f"{step.log_likelihood:.3f} nats per code"
            terminal.progress(label, step.iteration, None, figure)

        run = train(
            data,
            config,
            options.resume or options.out,
            resume=bool(options.resume),
            sinks=[terminal],
            command=["equipoise", *sys.argv[1:]],
            on_mixture=show_mixture,
        )
        if is_main_process():
            _finish(run, data, terminal)


def _refuse_with_resume(options: Namespace) -> None:
    """Refuse data and options that a resumed run has already."""
    names = ("recipe", "set", "out", "precision", "download", "stream", "strict")
    superfluous = [f"--{name}" for name in names if getattr(options, name)]
    if options.data:
        superfluous.append(options.data)

    if superfluous:
        raise ConfigError(
            [
                "--resume goes on with the run's own data and options; "
                f"leave out {', '.join(superfluous)}"
            ]
        )


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

    problems = []
    over = {}
    for item in options.set:
        key, separator, value = item.partition("=")
        if separator:
            over[key.strip()] = value
        else:
            problems.append(f"--set needs KEY=VALUE, got {item!r}; the data go before --set")
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
    from equipoise.data import load, load_stream

    if options.stream:
        return load_stream(source, image_size=config.image_size, channels=config.channels)

    return load(
        source,
        data_dir=options.data_dir,
        strict=options.strict,
        download=options.download,
        image_size=config.image_size,
        channels=config.channels,
        test_fraction=config.test_fraction,
        validation_fraction=config.validation_fraction,
        progress=_decoding_bar(terminal),
    )


def _decoding_bar(terminal: "Terminal") -> Callable[[int, int], None]:
    """Return a function that shows how many images have been decoded."""
    return lambda done, total: terminal.progress("decoding images", done, total, "")


def _describe_data(data: "Data") -> str:
    """Say how many examples there are, of what kind, and where they come from."""
    unit = "images" if data.kind == "image" else "columns"
    shape = " x ".join(map(str, data.shape))
    return (
        f"{len(data.train):,} training, {len(data.validation):,} validation and "
        f"{len(data.test):,} test examples, {shape} {unit}, from {data.source}"
    )


def _finish(run: "Run", data: "Data", terminal: "Terminal") -> None:
    """Show figures on the test set, where the pictures are, and what to do next."""
    from equipoise.evaluation import evaluate
    from equipoise.terminal import format_section

    evaluation = evaluate(run, data, sections=["likelihood"], brief=True)

    terminal.close()
    terminal.message(format_section("likelihood", evaluation["likelihood"]))
    terminal.message(
        f"Run       {run.folder}\n"
        f"Figures   {run.figures}: training.png, mixture.png, reconstructions.png\n"
        f"Next      equipoise evaluate {run.folder}\n"
        f"          equipoise sample {run.folder}"
    )


def _evaluate(options: Namespace) -> None:
    """Evaluate a run, and show each section when it is done."""
    from equipoise.evaluation import Examples, evaluate
    from equipoise.glossary import warnings_of
    from equipoise.run import Run
    from equipoise.terminal import format_section

    run = Run(options.run)
    model = run.model()

    with _terminal(options.quiet) as terminal:

        def load_examples(source: str | None) -> Examples | None:
            if not source:
                return None
            return Examples(
                source, _other_examples(source, model.shape, options.data_dir, terminal)
            )

        test = load_examples(options.data)
        against = load_examples(options.against)
        data = _data_of(run, terminal, options.data_dir)

        evaluation = evaluate(
            run,
            data,
            model=model,
            test=test,
            against=against,
            sections=options.sections,
            sources=options.sources,
            features=options.features,
            n_samples=options.n,
            importance_samples=options.importance_samples,
            seed=options.seed,
            download=options.download,
            progress=lambda label, done, total: terminal.progress(label, done, total, ""),
            on_section=lambda name, section: terminal.message(format_section(name, section)),
            command=["equipoise", *sys.argv[1:]],
        )

        for text in warnings_of(evaluation):
            terminal.message(f"Warning: {text}")
        terminal.message(f"Run       {run.folder}\nNext      equipoise report {run.folder}")


def _report(options: Namespace) -> None:
    """Write the page of a run."""
    from equipoise.report import write_report

    with _terminal() as terminal:
        terminal.message(str(write_report(Path(options.run))))


def _explore(options: Namespace) -> None:
    """Serve the page of a run until an interruption."""
    from equipoise.explorer import explore
    from equipoise.run import Run

    run = Run(options.run)
    with _terminal() as terminal:
        data = None
        if run.settings()["data"]["load"]:
            data = _data_of(run, terminal, options.data_dir)
        else:
            terminal.message(
                "Note: the run was trained from Python, so its data cannot be loaded here. "
                "The page does not rank inputs without them."
            )
        terminal.close()

        explore(
            run,
            data,
            port=options.port,
            open_browser=not options.no_browser,
            on_ready=lambda url: terminal.message(f"Page      {url}\nEnd       Ctrl-C"),
        )


def _export(options: Namespace) -> None:
    """Export the model of a run, with a sampler of codes."""
    from equipoise.export import export
    from equipoise.run import Run
    from equipoise.sources import exportable_mixture

    run = Run(options.run)
    model = run.model()
    folder = Path(options.out) if options.out else run.folder / "export"

    with _terminal() as terminal:
        mixture = exportable_mixture(
            run,
            model,
            options.source,
            lambda: _data_of(run, terminal, options.data_dir),
            terminal.progress,
        )
        for file in export(model, mixture, options.to, folder):
            deviation = f"largest relative deviation from the model: {file.deviation:.1g}"
            terminal.message(f"{file.path}\n  {file.signature}\n  {deviation}")


def _push(options: Namespace) -> None:
    """Publish a run."""
    from equipoise.run import Run
    from equipoise.sharing import push

    with _terminal() as terminal:
        address = push(
            Run(options.run),
            options.name,
            license_id=options.license,
            private=not options.public,
        )
        terminal.message(address)


def _paper(options: Namespace) -> None:
    """Reproduce items of the paper, and write the page."""
    names = list(dict.fromkeys(options.items))
    if "all" in names:
        names = list(PAPER_ITEMS)

    problems = []
    for name in names:
        if name not in PAPER_ITEMS:
            choices = ", ".join(PAPER_ITEMS)
            problems.append(f"there is no item {name!r}; choose from {choices}, all")
    for option in ("jobs", "epochs"):
        value = getattr(options, option)
        if value is not None and value < 1:
            problems.append(f"--{option} must be at least 1, got {value}")
    if problems:
        raise ConfigError(problems)

    from equipoise.paper.protocol import Lab
    from equipoise.paper.results import make_items, summary, write_page

    page = Path(options.page)
    results = Path(options.out)
    with _terminal(options.quiet) as terminal:
        lab = Lab(
            budget=options.budget,
            runs=Path(options.runs),
            data_dir=options.data_dir,
            jobs=options.jobs,
            epochs=options.epochs,
            seed=options.seed,
            features=options.features,
            images=page.parent / "images" / "paper",
            sinks=(terminal,),
            message=terminal.message,
        )
        files = make_items(lab, names, results)

        terminal.close()
        terminal.message(summary(files))
        terminal.message(f"Page      {write_page(results, page, lab.images)}")


def _sample(options: Namespace) -> None:
    """Draw samples, and write them."""
    from equipoise.outputs import write_samples
    from equipoise.randomness import stream
    from equipoise.run import Run
    from equipoise.sources import draw_codes, file_stem

    if options.n < 1:
        raise ConfigError([f"-n must be at least 1, got {options.n}"])

    run = Run(options.run)
    model = run.model()
    generator = stream(options.seed, "samples")
    folder = Path(options.out) if options.out else run.folder / "samples"

    with _terminal() as terminal:
        codes = draw_codes(
            run,
            model,
            options.source,
            options.n,
            generator,
            lambda: _data_of(run, terminal, options.data_dir),
            terminal.progress,
        )

        name = file_stem(options.source)
        files = write_samples(model, codes, name, folder, generator, noise=options.noise)
        terminal.message("\n".join(map(str, files)))


def _reconstruct(options: Namespace) -> None:
    """Reconstruct examples, and write what becomes of them."""
    from equipoise.outputs import write_reconstructions
    from equipoise.run import Run

    if options.n is not None and options.n < 1:
        raise ConfigError([f"-n must be at least 1, got {options.n}"])
    run = Run(options.run)
    model = run.model()
    folder = Path(options.out) if options.out else run.folder / "reconstructions"

    with _terminal() as terminal:
        if options.data is None:
            examples = _data_of(run, terminal, options.data_dir).test
        else:
            examples = _other_examples(options.data, model.shape, options.data_dir, terminal)

        files = write_reconstructions(model, examples[: options.n], folder)
        terminal.message("\n".join(map(str, files)))


def _data_of(run: "Run", terminal: "Terminal", data_dir: str | None) -> "Data":
    """Load the data of a run, and show how far that is."""
    return run.data(data_dir, _decoding_bar(terminal))


def _other_examples(
    source: str, shape: tuple[int, ...], data_dir: str | None, terminal: "Terminal"
) -> "Subset":
    """Load examples for a model of this shape, and show how far that is."""
    from equipoise.data import load_examples

    return load_examples(source, shape, data_dir=data_dir, progress=_decoding_bar(terminal))


@contextmanager
def _terminal(quiet: bool = False, silent: bool = False) -> Iterator["Terminal"]:
    """Show progress bars on a terminal, and plain lines elsewhere or if ``quiet``.

    A ``silent`` process shows nothing, because another process speaks for it.
    """
    from equipoise.terminal import LiveTerminal, PlainTerminal

    if silent:
        with open(os.devnull, "w") as nowhere:
            yield PlainTerminal(nowhere)
        return

    if quiet or not sys.stdout.isatty():
        yield PlainTerminal()
        return

    terminal = LiveTerminal()
    try:
        with terminal.bars:
            yield terminal
    finally:
        terminal.close()


COMMANDS = {
    "train": Command(
        "Train a model and fit the mixture.",
        _train_arguments,
        _train,
        "go on from the last checkpoint with 'equipoise train --resume RUN'",
    ),
    "evaluate": Command(
        "Measure a run on held-out data, by one fixed protocol.",
        _evaluate_arguments,
        _evaluate,
        "the sections that were done are kept, and --sections computes the others",
    ),
    "report": Command(
        "Write one self-contained page about a run.",
        _report_arguments,
        _report,
    ),
    "sample": Command(
        "Draw samples from a run.",
        _sample_arguments,
        _sample,
    ),
    "reconstruct": Command(
        "Reconstruct data with a run, with the uncertainty of each value.",
        _reconstruct_arguments,
        _reconstruct,
    ),
    "explore": Command(
        "Explore a run on a local page in the browser.",
        _explore_arguments,
        _explore,
    ),
    "export": Command(
        "Write a run as files that run without equipoise.",
        _export_arguments,
        _export,
    ),
    "paper": Command(
        "Reproduce the paper's tables and figures.",
        _paper_arguments,
        _paper,
        "models that were finished are kept, and the same command continues the others from their "
        "last checkpoints",
    ),
    "push": Command(
        "Publish a run on the Hugging Face hub.",
        _push_arguments,
        _push,
    ),
}
