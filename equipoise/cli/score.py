"""``equipoise score``: how odd each row of a table, or each image, is by a run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from equipoise.cli.command import (
    Command,
    add_data_dir,
    add_limits,
    add_quiet,
    add_run,
    add_strict,
    data_of,
    list_written,
    open_terminal,
    other_examples,
    paragraph,
    warn_of_unit,
)
from equipoise.config import ConfigError


def _add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``score``."""
    add_run(parser)
    parser.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="What is scored: tables (.csv, .tsv, .parquet, .feather, .npy), or images: folders, "
        "single files or arrays. The default is the run's own test set.",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="Table to write to, .csv, .tsv, .parquet or .feather. The default is RUN/scores.csv.",
    )
    parser.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.05,
        metavar="RATE",
        help="Share of ordinary rows or images that may be called odd. The default is 0.05.",
    )
    parser.add_argument(
        "--fail-on-odd",
        action="store_true",
        help="End with the exit status 1 if any row or image is odd, for scripts.",
    )
    add_data_dir(parser)
    add_limits(parser)
    add_strict(parser)
    add_quiet(parser)
    parser.epilog = paragraph(
        "Each row gets its score, a bound on the log-density of its observed values in nats; its "
        "p-value, the share of held-out rows of the run with a score as low, where they have the "
        "same gaps; a verdict, 'odd' if the p-value is at most the rate; and the columns that are "
        "furthest from their reconstruction, numbers in predicted std and categories by -log p in "
        "nats, or the region of an image that costs most. With categories, the score is the "
        "log-density of the numbers plus the log-probability of the categories. The held-out rows "
        "are those of the run's validation and test sets."
    )


def _run(options: Namespace) -> None:
    """Score rows or images, and write what is found."""
    import functools

    import numpy as np

    from equipoise.conformal import check_rate, fewest_held_out
    from equipoise.data.batches import as_tensor
    from equipoise.data.tables import write_table
    from equipoise.gaps import missing_values
    from equipoise.held_out import (
        MIN_REFERENCE,
        keep_held_out,
        read_held_out,
        read_held_out_rows,
    )
    from equipoise.labels import has_label, joined
    from equipoise.metrics.rows import score_rows
    from equipoise.run import Run

    rate = options.false_alarm_rate
    if not 0 < rate < 1:
        raise ConfigError([f"--false-alarm-rate must be above 0 and below 1, got {rate:g}"])

    run = Run(options.run)
    model, mixture = run.model(), run.mixture()
    path = Path(options.out) if options.out else run.folder / "scores.csv"

    with open_terminal(options.quiet) as terminal:
        own_data = functools.cache(lambda: data_of(run, terminal, options.data_dir))
        if options.data:
            parts = [
                other_examples(source, run, model, options, terminal) for source in options.data
            ]
        else:
            parts = [own_data().test]
        x = joined([as_tensor(part) for part in parts])

        held_out = read_held_out(run, model)
        if held_out is None:
            if run.held_out_file.exists():
                terminal.message(
                    f"Note: {run.held_out_file.name} is not of this model and mixture, or of an "
                    "earlier release: held-out examples are scored anew, for which their data are "
                    "needed"
                )
            with run.exclusive("scores"):
                held_out = keep_held_out(run, model, mixture.log_prob, own_data())

        known = held_out.known(rate, validation=not options.data)
        n_known = [len(known.of(with_label=kind)) for kind in set(has_label(x).tolist())]
        try:
            for n in n_known:
                check_rate(rate, n)
        except ValueError as error:
            raise ConfigError([f"{run.folder}: {error}"]) from error

        reference = None
        if missing_values(x) is not None:
            reference = read_held_out_rows(run, model, validation=not options.data)
        if missing_values(x) is not None and reference is None:
            held_out_parts = [own_data().validation, *([own_data().test] if options.data else [])]
            reference = joined([as_tensor(part) for part in held_out_parts])

        model.scaling.check(x)
        warn_of_unit(model, x, terminal)

        found = score_rows(
            model,
            x,
            reference,
            mixture.log_prob,
            lambda done, total: terminal.progress("scores", done, total, ""),
            complete=known,
            fewest=max(MIN_REFERENCE, fewest_held_out(rate)),
        )
        # What has no density left is odd, even if some of the held-out rows have none.
        is_odd = (found.p_value <= rate) | np.isneginf(found.score)
        of_images = len(model.shape) > 1
        columns = {
            "image" if of_images else "row": [name for part in parts for name in part.names()],
            "score": found.score,
            "p_value": found.p_value,
            "verdict": np.where(is_odd, "odd", "usual"),
            "worst_region" if of_images else "worst_columns": found.worst,
        }

        if len(parts) > 1:
            sizes = [len(part) for part in parts]
            columns = {"source": np.repeat(options.data, sizes), **columns}
        if not of_images and all(part.name is None for part in parts):
            columns["row"] = np.array(columns["row"], np.int64)

        kind = "images" if of_images else "rows"
        terminal.message(
            f"{int(is_odd.sum()):,} of {len(x):,} {kind} are odd, at a false-alarm rate of "
            f"{rate:g} by {max(n_known, default=0):,} held-out {kind}."
        )
        lines = list_written(lambda: [write_table(path, columns)], path.parent)
        terminal.message("\n".join(lines))

    if options.fail_on_odd and is_odd.any():
        raise SystemExit(1)


COMMAND = Command(
    "Score rows of tables or images, and say which are odd, and where.",
    _add_arguments,
    _run,
)
