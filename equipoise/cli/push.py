"""``equipoise push``: publish a run on the Hugging Face hub."""

from argparse import ArgumentParser, Namespace

from equipoise.cli.command import Command, open_terminal, paragraph


def _add_arguments(parser: ArgumentParser) -> None:
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

    parser.epilog = paragraph(
        "The model, the mixture, JSON files and a model card are uploaded. No data, pictures or "
        "checkpoints are uploaded. Everyone who can read the repository can use hf:owner/name in "
        "place of a run folder. Log in with 'hf auth login' first. Needs the extra 'hub'."
    )


def _run(options: Namespace) -> None:
    """Publish a run."""
    from equipoise.run import Run
    from equipoise.sharing import push

    with open_terminal() as terminal:
        address = push(
            Run(options.run),
            options.name,
            license_id=options.license,
            private=not options.public,
        )
        terminal.message(address)


COMMAND = Command(
    "Publish a run on the Hugging Face hub.",
    _add_arguments,
    _run,
)
