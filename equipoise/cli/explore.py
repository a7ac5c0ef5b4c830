"""``equipoise explore``: explore a run on a local page."""

from argparse import ArgumentParser, Namespace

from equipoise.cli.command import (
    Command,
    add_data_dir,
    add_limits,
    add_quiet,
    add_run,
    data_of,
    open_terminal,
    other_examples,
    paragraph,
)


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``explore``."""
    add_run(parser)
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="Image, or other data as for 'equipoise reconstruct', whose first example the page "
        "begins with.",
    )
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
    add_data_dir(parser)
    add_limits(parser)
    add_quiet(parser)

    parser.epilog = paragraph(
        "The page is served to this machine only (127.0.0.1), until Ctrl-C. Needs the extra "
        "'explore'."
    )


def _run(options: Namespace) -> None:
    """Serve the page of a run until an interruption."""
    import torch

    from equipoise.explorer import explore
    from equipoise.run import Run

    run = Run(options.run)
    model, start = run.model(), None
    with open_terminal(options.quiet) as terminal:
        if options.file is not None:
            start = other_examples(options.file, run, model, options, terminal).take(slice(1))[:]
            model.scaling.check(torch.from_numpy(start))
        data = None
        if run.settings()["data"]["load"]:
            data = data_of(run, terminal, options.data_dir)
        else:
            terminal.message(
                "Note: the run was trained from Python, so its data cannot be loaded here. "
                "The page does not rank inputs without them."
            )
        terminal.close()

        explore(
            run,
            data,
            model=model,
            start=start,
            port=options.port,
            open_browser=not options.no_browser,
            on_ready=lambda url: terminal.message(f"Page      {url}\nEnd       Ctrl-C"),
        )


COMMAND = Command(
    "Explore a run on a local page in the browser.",
    _add_arguments,
    _run,
)
