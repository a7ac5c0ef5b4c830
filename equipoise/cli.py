"""The command line. Parses, calls, prints; decides nothing.

Only the options are imported at the top, so that ``equipoise --help`` does not wait for torch.
"""

import errno
import logging
import os
import sys
import textwrap
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
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
PAPER_ITEMS = (
    *(f"table-{number}" for number in range(1, 5)),
    *(f"figure-{number}" for number in range(1, 5)),
    "beyond-codes",
    "beyond-noise",
    "beyond-size",
)
SHORTHANDS = (*PLACEMENT, "precision")
"""Options of the machine, which have flags of their own."""
RUN_HELP = "run folder, or hf:owner/name of a published one"
SOURCES_HELP = (
    "; ".join(f"{name}: {source.summary}" for name, source in SOURCES.items())
    + ". Those that are fitted ("
    + ", ".join(name for name, source in SOURCES.items() if source.is_fitted)
    + ") need the training data when they are first asked for, and are kept in RUN"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exits with 0 when all went well, 2 for wrong input, 1 for a failure on the way, 130 when interrupted, 143 when
    SIGTERM stopped a training.

    Args:
        arguments: without the program's name; those of the process if None.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return
    try:
        COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        _fail(f"interrupted; {COMMANDS[options.command].after_interruption}", INTERRUPTED)
    except Preempted as error:
        if error.code == PREEMPTED:
            _fail(f"{error}; {COMMANDS[options.command].after_interruption}", PREEMPTED)
    except ArithmeticError as error:
        _fail(str(error), FAILURE)
    except (ValueError, ImportError) as error:
        _fail(str(error), USAGE_ERROR)
    except OSError as error:
        message = (
            f"{error.strerror}: {error.filename}"
            if error.filename
            else error.strerror or str(error)
        )
        _fail(message, FAILURE if error.errno in (errno.ENOSPC, errno.EDQUOT) else USAGE_ERROR)


def _fail(message: str, code: int) -> None:
    print(f"equipoise: {message}", file=sys.stderr)  # noqa: T201 (the terminal)
    sys.exit(code)


def make_parser() -> ArgumentParser:
    """Make the parser of all commands.

    Returns:
        The parser.
    """
    parser = ArgumentParser(
        prog="equipoise",
        description="Variational autoencoders that balance themselves: the noise variance is learned, and samples "
        "come from a mixture fitted to the aggregate posterior.",
        epilog="'equipoise train' without anything else trains on 8x8 digits, offline, in about a minute.",
    )
    parser.add_argument("--version", action="version", version=f"equipoise {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(
                name,
                help=command.summary,
                description=command.summary[0].upper() + command.summary[1:] + ".",
                formatter_class=RawDescriptionHelpFormatter,
            )
        )
    return parser


class Command(NamedTuple):
    """A command.

    Args:
        summary: one line for ``--help``.
        add_arguments: describes its arguments to a parser.
        run: takes what was parsed.
        after_interruption: what remains, and how to go on.
    """

    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]
    after_interruption: str = "nothing was left half-written"


def _train_arguments(parser: ArgumentParser) -> None:
    parser.epilog = "\n".join(
        [
            "SIGTERM, by which clusters take machines back, stops the training with a checkpoint and exit code 143;",
            "'equipoise train --resume RUN' goes on from that very step, and ends as if nothing had happened.",
            "",
            "options for --set and recipes, with their defaults:",
        ]
        + [_describe_option(field.name, field.default) for field in fields(TrainConfig)]
    )
    parser.add_argument(
        "data",
        nargs="?",
        help="digits (the default), mnist, fashion-mnist, celeba, a folder of images, an .npy or .npz file, or "
        "hf:owner/name. A folder whose images differ in size needs --set image_size=64, or another size",
    )
    parser.add_argument(
        "--recipe",
        help=f"YAML file of options, or one of {', '.join(shipped_recipes())}; these sets take their own by themselves",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="options, over those of the recipe",
    )
    parser.add_argument("--out", metavar="RUN", help="folder to write; runs/NAME if left out")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was cut off")
    for name in SHORTHANDS:
        metavar = "P" if name == "precision" else "N"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, metavar=metavar, help=f"short for --set {name}={metavar}")
    _add_data_dir(parser)
    parser.add_argument(
        "--download", action="store_true", help="fetch a named set that is not found (extra 'hub')"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read hf:owner/name, or hf: and a local copy, anew in every epoch instead of keeping it (extra 'hub')",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse a folder with a file that cannot be read"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="plain lines instead of a progress bar"
    )


def _describe_option(name: str, default: object) -> str:
    shown = (
        "null"
        if default is None
        else str(default).lower()
        if isinstance(default, bool)
        else default
    )
    text = textwrap.fill(option_help(name), 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {name}={shown}  ({type_name(name)})\n{text}"


def _sample_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--from",
        dest="source",
        metavar="NAME",
        default="mixture",
        help=f"where codes come from (mixture): {SOURCES_HELP}",
    )
    parser.add_argument("-n", type=int, default=64, help="number of samples (64)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same samples (0)")
    parser.add_argument(
        "--noise",
        action="store_true",
        help="add the model's pixel noise; otherwise means are written",
    )
    _add_data_dir(parser)
    parser.add_argument("--out", metavar="FOLDER", help="folder to write; RUN/samples if left out")


def _reconstruct_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("data", nargs="?", help="as for train; the run's own test set if left out")
    parser.add_argument("-n", type=int, help="reconstruct the first n examples only")
    _add_data_dir(parser)
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder to write; RUN/reconstructions if left out"
    )


def _evaluate_arguments(parser: ArgumentParser) -> None:
    parser.epilog = (
        "Writes RUN/evaluation.json and RUN/figures; 'equipoise report RUN' makes one page of them.\n"
        "Distances in different features, or of different n, cannot be compared."
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--data", help="judge the run on these examples instead of its own test set; as for train"
    )
    parser.add_argument(
        "--against",
        metavar="DATA",
        help="examples of another kind: how well are they told from the test set?",
    )
    parser.add_argument(
        "--sections",
        nargs="+",
        default=[],
        metavar="SECTION",
        help="only some of likelihood, samples, latent, noise, outliers; the others are kept as they were",
    )
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        default=[],
        metavar="NAME",
        help="judge more sources of codes than prior, gaussian and mixture in the sections samples and latent, such as "
        "mixture=auto flow; 'equipoise sample --help' has their names",
    )
    parser.add_argument(
        "--features",
        default="auto",
        metavar="NAME",
        help="what samples are compared in: efficientnet-lite0 (the default for images, comes along), inception or "
        "inception=PATH (as in published Fréchet distances; extra 'fid'), columns (the default for tables), or "
        "PACKAGE.MODULE:NAME of a torch.nn.Module of your own",
    )
    parser.add_argument(
        "-n",
        type=int,
        default=10_000,
        help="samples to compare with as many test examples, if there are (10000)",
    )
    parser.add_argument(
        "--importance-samples",
        type=int,
        default=20,
        metavar="K",
        help="samples of z per example in the bound on log p(x) over the whole test set (20)",
    )
    parser.add_argument("--seed", type=int, help="of all random draws; that of the run if left out")
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch the weights of --features inception if missing",
    )
    _add_data_dir(parser)
    parser.add_argument("--quiet", action="store_true", help="plain lines instead of progress bars")


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)


def _export_arguments(parser: ArgumentParser) -> None:
    parser.epilog = (
        "Writes encoder, decoder and sampler, for any number n of examples, in the unit of the data. The\n"
        "sampler turns uniform noise in [0, 1) and normal noise into codes for the decoder."
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--to",
        choices=["torch", "onnx"],
        required=True,
        help="torch.export programs, or ONNX (extra 'export')",
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder to write; RUN/export if left out")


def _push_arguments(parser: ArgumentParser) -> None:
    parser.epilog = (
        "Uploads the model, the mixture, JSON and a model card; no data, pictures or checkpoints. Anyone who may\n"
        "read the repository can then give hf:owner/name wherever a RUN is expected. Log in with 'hf auth login' first."
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "name", metavar="OWNER/NAME", help="repository on the hub; made if it is not there"
    )
    parser.add_argument(
        "--license", metavar="ID", help="licence of the model for its card, such as apache-2.0"
    )
    parser.add_argument(
        "--public", action="store_true", help="let everyone see a new repository; private otherwise"
    )


def _explore_arguments(parser: ArgumentParser) -> None:
    parser.epilog = (
        "Serves a page on this machine alone (127.0.0.1), until Ctrl-C. Needs the extra 'explore'."
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--port", type=int, help="to serve at; 8769, or any that is free, if left out"
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="print the page's address, and do not open it"
    )
    _add_data_dir(parser)


def _paper_arguments(parser: ArgumentParser) -> None:
    parser.epilog = (
        "Trains what is missing, resuming what was cut off, evaluates it by the fixed protocol, and writes\n"
        "results/ITEM-BUDGET.json and the page docs/results.md with its pictures. Models are shared between items.\n"
        "Items: " + ", ".join(PAPER_ITEMS) + ", all.\n"
        "Budgets: tiny (digits only, a minute: to see that it works), small (two CPU cores, about two hours\n"
        "for all), full (one GPU)."
    )
    parser.add_argument(
        "items", nargs="+", metavar="ITEM", help="tables and figures of the paper, or 'all'"
    )
    parser.add_argument(
        "--budget",
        choices=["tiny", "small", "full"],
        default="small",
        help="how long to train (small)",
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="of every model, in place of the budget's"
    )
    parser.add_argument(
        "--runs", default="runs/paper", metavar="FOLDER", help="folder of the models (runs/paper)"
    )
    parser.add_argument(
        "--out", default="results", metavar="FOLDER", help="folder of the JSON (results)"
    )
    parser.add_argument(
        "--page", default="docs/results.md", metavar="FILE", help="page to write (docs/results.md)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="models to train at once (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all models (0)")
    parser.add_argument(
        "--features",
        default="efficientnet-lite0",
        metavar="NAME",
        help="what samples are compared in, as for evaluate",
    )
    _add_data_dir(parser)
    parser.add_argument("--quiet", action="store_true", help="plain lines instead of progress bars")


def _add_data_dir(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", help="where to look for mnist, fashion-mnist and celeba first"
    )


def _train(options: Namespace) -> None:
    from equipoise.run import Run
    from equipoise.training.engine import is_main_process
    from equipoise.training.job import train

    # It announces every process.
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
    given = [
        f"--{name}" for name in ("recipe", "set", "out", "precision") if getattr(options, name)
    ]
    if options.data:
        given.append(options.data)
    if given:
        raise ConfigError(
            [f"--resume goes on with the run's own data and options; leave out {', '.join(given)}"]
        )


def _resolve(options: Namespace) -> tuple[TrainConfig, str]:
    """Recipe, then --set over it; problems of all of them in one message."""
    recipes = shipped_recipes()
    name = options.recipe or options.data or "digits"
    file = recipes.get(name, Path(name) if options.recipe else None)
    values = read_recipe(file) if file else {}
    source = options.data or values.get("data") or "digits"
    values.pop("data", None)
    malformed = [
        f"--set needs KEY=VALUE, got {item!r}; the data go before --set"
        for item in options.set
        if "=" not in item
    ]
    pairs = (item.split("=", 1) for item in options.set if "=" in item)
    flags = {name: value for name in SHORTHANDS if (value := getattr(options, name))}
    try:
        config = make_config(values, {key.strip(): value for key, value in pairs} | flags)
    except ConfigError as error:
        raise ConfigError([*malformed, *error.problems]) from None
    if malformed:
        raise ConfigError(malformed)
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
    return lambda done, total: terminal.progress("decoding images", done, total, "")


def _describe_data(data: "Data") -> str:
    kind = " x ".join(map(str, data.shape)) + (" images" if data.kind == "image" else " columns")
    return (
        f"{len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test examples, "
        f"{kind}, from {data.source}"
    )


def _finish(run: "Run", data: "Data", terminal: "Terminal") -> None:
    """What a person wants at the end: honest test figures, pictures, and where to look."""
    from equipoise.evaluation import evaluate
    from equipoise.terminal import format_section

    found = evaluate(run, data, sections=["likelihood"], brief=True)
    terminal.close()
    terminal.message(format_section("likelihood", found["likelihood"]))
    terminal.message(
        f"Run       {run.folder}\nFigures   {run.figures}: training.png, mixture.png, reconstructions.png\n"
        f"Next      equipoise evaluate {run.folder}\n          equipoise sample {run.folder}"
    )


def _evaluate(options: Namespace) -> None:
    from equipoise.evaluation import Examples, evaluate
    from equipoise.glossary import warnings_of
    from equipoise.run import Run
    from equipoise.terminal import format_section

    run = Run(options.run)
    model = run.model()
    with _terminal(options.quiet) as terminal:
        test, against = (
            Examples(source, _other_examples(source, model.shape, options.data_dir, terminal))
            if source
            else None
            for source in (options.data, options.against)
        )
        found = evaluate(
            run,
            _data_of(run, terminal, options.data_dir),
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
        for text in warnings_of(found):
            terminal.message(f"Warning: {text}")
        terminal.message(f"Run       {run.folder}\nNext      equipoise report {run.folder}")


def _report(options: Namespace) -> None:
    from equipoise.report import write_report

    with _terminal() as terminal:
        terminal.message(str(write_report(Path(options.run))))


def _explore(options: Namespace) -> None:
    from equipoise.explorer import explore
    from equipoise.run import Run

    run = Run(options.run)
    with _terminal() as terminal:
        data = None
        if run.settings()["data"]["load"]:
            data = _data_of(run, terminal, options.data_dir)
        else:
            terminal.message(
                "Note: the run was trained from Python; its data are not here to rank inputs with."
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
    from equipoise.export import export
    from equipoise.run import Run

    run = Run(options.run)
    folder = Path(options.out) if options.out else run.folder / "export"
    with _terminal() as terminal:
        for file in export(run.model(), run.mixture(), options.to, folder):
            deviation = f"largest relative deviation from the model: {file.deviation:.1g}"
            terminal.message(f"{file.path}\n  {file.signature}\n  {deviation}")


def _push(options: Namespace) -> None:
    from equipoise.run import Run
    from equipoise.sharing import push

    with _terminal() as terminal:
        terminal.message(
            push(
                Run(options.run),
                options.name,
                license_id=options.license,
                private=not options.public,
            )
        )


def _paper(options: Namespace) -> None:
    names = list(PAPER_ITEMS) if "all" in options.items else list(dict.fromkeys(options.items))
    problems = [
        f"there is no item {name!r}; choose from {', '.join(PAPER_ITEMS)}, all"
        for name in names
        if name not in PAPER_ITEMS
    ]
    problems += [
        f"--{name} must be at least 1, got {value}"
        for name in ("jobs", "epochs")
        if (value := getattr(options, name)) is not None and value < 1
    ]
    if problems:
        raise ConfigError(problems)
    from equipoise.paper.protocol import Lab
    from equipoise.paper.results import make_items, summary, write_page

    page = Path(options.page)
    with _terminal(options.quiet) as terminal:
        lab = Lab(
            options.budget,
            Path(options.runs),
            options.data_dir,
            options.jobs,
            options.epochs,
            options.seed,
            options.features,
            page.parent / "images" / "paper",
            sinks=(terminal,),
            message=terminal.message,
        )
        files = make_items(lab, names, Path(options.out))
        terminal.close()
        terminal.message(summary(files))
        terminal.message(f"Page      {write_page(Path(options.out), page, lab.images)}")


def _sample(options: Namespace) -> None:
    from equipoise.outputs import torch_generator, write_samples
    from equipoise.run import Run
    from equipoise.sources import draw_codes, file_stem

    if options.n < 1:
        raise ConfigError([f"-n must be at least 1, got {options.n}"])
    run = Run(options.run)
    model, generator = run.model(), torch_generator(options.seed)

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

        folder = Path(options.out) if options.out else run.folder / "samples"
        name = file_stem(options.source)
        files = write_samples(model, codes, name, folder, generator, noise=options.noise)
        terminal.message("\n".join(map(str, files)))


def _reconstruct(options: Namespace) -> None:
    from equipoise.outputs import write_reconstructions
    from equipoise.run import Run

    run = Run(options.run)
    model = run.model()
    with _terminal() as terminal:
        if options.data is None:
            examples = _data_of(run, terminal, options.data_dir).test
        else:
            examples = _other_examples(options.data, model.shape, options.data_dir, terminal)
        folder = Path(options.out) if options.out else run.folder / "reconstructions"
        terminal.message(
            "\n".join(map(str, write_reconstructions(model, examples[: options.n], folder)))
        )


def _data_of(run: "Run", terminal: "Terminal", data_dir: str | None) -> "Data":
    return run.data(data_dir, _decoding_bar(terminal))


def _other_examples(
    source: str, shape: tuple[int, ...], data_dir: str | None, terminal: "Terminal"
) -> "Subset":
    from equipoise.data import load_examples

    return load_examples(source, shape, data_dir=data_dir, progress=_decoding_bar(terminal))


@contextmanager
def _terminal(quiet: bool = False, silent: bool = False) -> Iterator["Terminal"]:
    """A live terminal if there is one, otherwise plain lines; nothing where another process speaks for this one."""
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
        "train a model and fit the mixture",
        _train_arguments,
        _train,
        "go on from the last checkpoint with 'equipoise train --resume RUN'",
    ),
    "evaluate": Command(
        "measure a run by one fixed protocol, on held-out data",
        _evaluate_arguments,
        _evaluate,
        "the sections that were done are kept; --sections computes the others",
    ),
    "report": Command("make one self-contained page of a run", _report_arguments, _report),
    "sample": Command("draw samples from a run", _sample_arguments, _sample),
    "reconstruct": Command(
        "reconstruct data with a run, with uncertainty", _reconstruct_arguments, _reconstruct
    ),
    "explore": Command("look around in a run on a local page", _explore_arguments, _explore),
    "export": Command("write a run as files that need no equipoise", _export_arguments, _export),
    "paper": Command(
        "reproduce the paper's tables and figures",
        _paper_arguments,
        _paper,
        "models that were finished are kept, and the one in hand goes on from its last checkpoint when called again",
    ),
    "push": Command("publish a run on the Hugging Face hub", _push_arguments, _push),
}
