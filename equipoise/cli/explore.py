"""``equipoise explore``: explore a run on a local page."""

from argparse import ArgumentParser, Namespace

from equipoise.cli.command import Command, add_data_dir, add_run, data_of, open_terminal, paragraph
from equipoise.config import ConfigError


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``explore``."""
    add_run(parser)
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

    parser.epilog = paragraph(
        "The page is served to this machine only (127.0.0.1), until Ctrl-C. Needs the extra "
        "'explore'."
    )


def _run(options: Namespace) -> None:
    """Serve the page of a run until an interruption."""
    from equipoise.explorer import explore
    from equipoise.run import Run

    run = Run(options.run)
    if len(run.settings()["data"]["shape"]) in (2, 4):
        raise ConfigError(["the page is for images and tables, not for signals and volumes"])
    with open_terminal() as terminal:
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
            port=options.port,
            open_browser=not options.no_browser,
            on_ready=lambda url: terminal.message(f"Page      {url}\nEnd       Ctrl-C"),
        )


COMMAND = Command(
    "Explore a run on a local page in the browser.",
    _add_arguments,
    _run,
)
