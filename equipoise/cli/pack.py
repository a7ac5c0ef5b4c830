"""``equipoise pack``: decode a folder of images or a table once, into files for every machine."""

from argparse import ArgumentParser, Namespace

from equipoise.cli.command import Command, add_quiet, open_terminal, paragraph


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``pack``."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="A folder of images, a table (.csv, .tsv, .parquet, .feather) of any size, a folder "
        "of files that --stream reads, also at a place such as s3://bucket/folder, or other data "
        "that 'equipoise train' takes.",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help="Folder to write to, or the address of one, such as s3://bucket/packed.",
    )
    parser.add_argument(
        "--image-size", metavar="SIZE", help="Size in pixels of each image: N, or WIDTHxHEIGHT."
    )
    parser.add_argument("--channels", choices=("grey", "rgb"), help="Channels of the images.")
    parser.add_argument(
        "--fit",
        choices=("crop", "pad", "stretch"),
        default="crop",
        help="How images of other proportions get the size. The default is crop.",
    )
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME", help="Columns of a table to take; all by default."
    )
    parser.add_argument(
        "--drop", nargs="+", metavar="NAME", help="Columns of a table to leave out."
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="Skip image files of more pixels than this. The default is 50 million.",
    )
    add_quiet(parser)
    parser.epilog = paragraph(
        "'equipoise train OUT --stream' reads what is packed. Nothing is decoded then, each "
        "process reads its own part, and units are those of all training examples. The same line "
        "goes on after the last whole file if it was stopped. DATA and OUT come before options."
    )


def _run(options: Namespace) -> None:
    """Pack examples."""
    from equipoise.data.packing import pack

    with open_terminal(quiet=options.quiet) as terminal:
        folder = pack(
            options.data,
            options.out,
            image_size=options.image_size,
            channels=options.channels,
            fit=options.fit,
            columns=options.columns,
            drop=options.drop,
            max_pixels=options.max_pixels,
            say=terminal.message,
            progress=lambda done, total: terminal.progress("packing", done, total, ""),
        )
        terminal.message(f"Next      equipoise train {folder} --stream")


COMMAND = Command(
    "Decode images or a table once, into files that every machine reads.",
    _add_arguments,
    _run,
    "the same line goes on after the last whole file",
)
