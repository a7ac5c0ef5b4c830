"""What a person sees while a job runs: a live bar on a terminal, plain lines anywhere else."""

import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from equipoise.glossary import format_figure, leaves, measure, term, title
from equipoise.run import Row

SECONDS_BETWEEN_LINES = 2.0


class PlainTerminal:
    """Lines for pipes, logs and ``--quiet``: messages, and an epoch's figures at most every two seconds.

    Args:
        stream: where to print.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.last = -float("inf")

    def message(self, text: str) -> None:
        """Print a line."""
        print(text, file=self.stream, flush=True)

    def progress(self, label: str, done: int, total: int | None, text: str) -> None:
        """Print nothing: positions are for live bars."""

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Print nothing."""

    def step(
        self, done_steps: int, total_steps: int, label: str, figures: dict[str, float]
    ) -> None:
        """Print nothing: lines are per epoch."""

    def epoch(self, row: Row) -> None:
        """Print the epoch's figures."""
        is_last_of_stage = "test_elbo" in row
        if time.monotonic() - self.last < SECONDS_BETWEEN_LINES and not is_last_of_stage:
            return
        self.last = time.monotonic()
        figures = {name: row[f"validation_{name}"] for name in FIGURES}
        self.message(
            f"stage {row['stage']} epoch {row['epoch']}  {format_figures(figures)}  "
            f"{row['examples_per_second']:.0f} examples/s"
        )

    def close(self) -> None:
        """Print nothing."""


class LiveTerminal:
    """A bar per job with the time left, and the running ELBO, KL, MSE and noise std.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.bars.start()

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, label: str, done: int, total: int | None, text: str) -> None:
        """Move the bar of a job, one bar per label's first word; without a total it only tells the count."""
        job = label.split()[0]
        if job not in self.tasks:
            self.tasks[job] = self.bars.add_task(label, total=total, text=text)
        self.bars.update(self.tasks[job], description=label, completed=done, total=total, text=text)

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Show the bar of the training."""
        self.progress("training", done_steps, total_steps, "")

    def step(
        self, done_steps: int, total_steps: int, label: str, figures: dict[str, float]
    ) -> None:
        """Move it."""
        self.progress(f"training {label}", done_steps, total_steps, format_figures(figures))

    def epoch(self, row: Row) -> None:
        """Show nothing more: the bar has the running figures."""

    def close(self) -> None:
        """Leave the bars where they are, complete if the jobs are."""
        for task in self.tasks.values():
            if self.bars.tasks[task].total is None:
                self.bars.update(task, total=1, completed=1)
        self.tasks.clear()
        self.bars.refresh()


Terminal = PlainTerminal | LiveTerminal

FIGURES = {
    "elbo": "ELBO {:.1f}",
    "kl": "KL {:.1f}",
    "mse": "MSE {:.5f}",
    "noise_std": "noise std {:.4f}",
}


def format_figures(figures: dict[str, float]) -> str:
    """Put an epoch's figures on one line.

    Args:
        figures: by name: elbo and kl in nats, mse and noise_std in model units.

    Returns:
        For instance ``ELBO 812.3  KL 51.2  MSE 0.00631  noise std 0.0790``.

    Example:
        >>> format_figures({"elbo": 812.34, "kl": 51.2})
        'ELBO 812.3  KL 51.2'
    """
    return "  ".join(
        form.format(figures[name]) for name, form in FIGURES.items() if name in figures
    )


def format_section(name: str, section: dict[str, Any], width: int = 100) -> str:
    """Lay a section of ``evaluation.json`` out as a table.

    Args:
        name: of the section, such as "likelihood".
        section: JSON values.
        width: of the terminal.

    Returns:
        Text of several lines: a row per figure, with its standard error and N.
    """
    table = Table(title=name.capitalize(), title_justify="left")
    for column in ("", "value ± s.e.", "N", "unit"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    for keys, figure in leaves(section):
        n = figure.get("n") if isinstance(figure, dict) else None
        table.add_row(
            title(keys), format_figure(figure), f"{n:,}" if n else "", term(measure(keys)[0]).unit
        )
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
