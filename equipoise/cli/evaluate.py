"""``equipoise evaluate``: measure a run by the fixed protocol."""

import sys
from argparse import ArgumentParser, Namespace

from equipoise.cli.command import (
    Command,
    add_data_dir,
    add_limits,
    add_no_split,
    add_quiet,
    add_run,
    data_of,
    open_terminal,
    other_examples,
    paragraph,
)


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``evaluate``."""
    add_run(parser)

    parser.add_argument(
        "--data",
        metavar="DATA",
        help="Data to judge the run on, named as for 'equipoise train'. Of a folder with the parts "
        "train, val and test, the test part is taken. The default is the run's own test set.",
    )
    add_no_split(parser)
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
    add_data_dir(parser)
    add_limits(parser)
    add_quiet(parser)

    parser.epilog = paragraph(
        "The figures are written to RUN/evaluation.json, or to RUN/evaluation-DATA.json with "
        "--data. Pictures are written to RUN/figures. 'equipoise report RUN' makes one page of "
        "them. Distances can only be compared if they were measured in the same features and with "
        "the same number of samples."
    )


def _run(options: Namespace) -> None:
    """Evaluate a run, and show each section when it is done."""
    from equipoise.evaluation import Examples, evaluate
    from equipoise.glossary import warnings_of
    from equipoise.run import Run
    from equipoise.terminal import format_section

    run = Run(options.run)
    model = run.model()

    with open_terminal(options.quiet) as terminal:

        def load_examples(source: str | None) -> Examples | None:
            if not source:
                return None
            return Examples(source, other_examples(source, run, model, options, terminal))

        test = load_examples(options.data)
        against = load_examples(options.against)
        data = data_of(run, terminal, options.data_dir)

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


COMMAND = Command(
    "Measure a run on held-out data, by one fixed protocol.",
    _add_arguments,
    _run,
    "the sections that were done are kept, and --sections computes the others",
)
