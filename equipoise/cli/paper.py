"""``equipoise paper``: reproduce the paper's tables and figures."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from equipoise.cli.command import (
    Command,
    add_data_dir,
    add_quiet,
    list_entries,
    open_terminal,
    paragraph,
)
from equipoise.config import ConfigError

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
"""Tables and figures of the paper, and what goes beyond it."""


def _read_seeds(text: str) -> tuple[int, ...]:
    """Read "3" as the seeds 0, 1 and 2, and "0,4,7" as these."""
    wrong = ArgumentTypeError(
        f"give a number of seeds from 1 on, or two or more different ones as in 0,4,7; got {text!r}"
    )
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise wrong from None

    seeds = tuple(range(numbers[0]) if len(numbers) == 1 else numbers)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise wrong
    return seeds


def _add_arguments(parser: ArgumentParser) -> None:
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
        metavar="FOLDER",
        help="Folder for the figures as JSON. The default is results, or RUNS/tiny/results for the "
        "budget tiny.",
    )
    parser.add_argument(
        "--page",
        metavar="FILE",
        help="Page to write. The default is docs/results.md, or RUNS/tiny/docs/results.md for the "
        "budget tiny.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="Replace figures that were made with other epochs, other seeds or other features, "
        "and files that are not results.",
    )

    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="Number of models that are trained at the same time. The default is 1.",
    )

    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--seeds",
        type=_read_seeds,
        default=(0,),
        metavar="N",
        help="Train every model with N seeds, 0 to N - 1, or with those of a list such as 0,4,7. "
        "The tables then have both errors, as explained below. The default is 1.",
    )
    which.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="Train every model with this one seed. The default is 0.",
    )

    parser.add_argument(
        "--features",
        default="efficientnet-lite0",
        metavar="NAME",
        help="Features in which samples are compared, named as for 'equipoise evaluate'. The "
        "default is efficientnet-lite0.",
    )
    add_data_dir(parser)
    add_quiet(parser)

    about_items = paragraph(
        "Models that are missing are trained, interrupted trainings are continued, and all models "
        "are evaluated by one fixed protocol. Items share their models. The figures are written to "
        "ITEM-BUDGET.json in the folder of results, and from these the page with its pictures."
    )
    items = paragraph(f"Items: {', '.join(PAPER_ITEMS)}, all.")
    budgets = {
        "tiny": "Digits only, in about a minute, to see that everything works.",
        "small": "All data sets, in about two hours on two CPU cores.",
        "full": "All data sets, on one GPU.",
    }
    about_seeds = paragraph(
        "With several seeds, a figure is the mean over seeds, ± its standard error over seeds, ± "
        "that over test examples or samples. Bold in a column are the best figure and those that "
        "differ from it by at most two of both errors combined. Every seed other than 0 has run "
        "folders of its own, NAME-seed=S. They are made seed by seed, and those that are there are "
        "used again: '--seeds 3' after '--seeds 1' trains seeds 1 and 2, and replaces the figures "
        "of seed 0 by those of all three."
    )
    parser.epilog = (
        f"{about_items}\n\n{items}\n\nbudgets:\n{list_entries(budgets)}\n\nseeds:\n{about_seeds}"
    )


def _run(options: Namespace) -> None:
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
    from equipoise.paper.results import make_items, refuse_to_replace, summary, write_page

    # A trial must not replace results that took hours.
    home = Path(options.runs, "tiny") if options.budget == "tiny" else Path()
    page = Path(options.page or home / "docs" / "results.md")
    results = Path(options.out or home / "results")
    with open_terminal(options.quiet) as terminal:
        lab = Lab(
            budget=options.budget,
            runs=Path(options.runs),
            data_dir=options.data_dir,
            jobs=options.jobs,
            epochs=options.epochs,
            seeds=options.seeds if options.seed is None else (options.seed,),
            features=options.features,
            images=page.parent / "images" / "paper",
            sinks=(terminal,),
            message=terminal.message,
        )
        if not options.force:
            refuse_to_replace(lab, names, results, page)
        files = make_items(lab, names, results)

        terminal.close()
        terminal.message(summary(files))
        terminal.message(f"Page      {write_page(results, page, lab.images)}")


COMMAND = Command(
    "Reproduce the paper's tables and figures.",
    _add_arguments,
    _run,
    "models that were finished are kept, and the same command continues the others from their "
    "last checkpoints",
)
