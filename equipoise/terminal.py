"""What a user sees while a job runs: live bars on a terminal, and plain lines anywhere else."""

import re
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

from equipoise.glossary import Keys, format_figure, leaves, measure, term, title
from equipoise.run import Row
from equipoise.text import visible

SECONDS_BETWEEN_LINES = 2.0
"""Shortest time between two lines about epochs."""


class PlainTerminal:
    """Plain lines, for pipes, logs and ``--quiet``.

    It prints messages, and the figures of an epoch at most every two seconds. A stream that cannot
    be written any more, such as a closed pipe, never stops the job: nothing more is printed.

    Args:
        stream: Where to print; standard output if None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.last = -float("inf")
        self.is_lost = False

    def message(self, text: str) -> None:
        """Print a line."""
        if self.is_lost:
            return

        text = visible(text)
        try:
            try:
                print(text, file=self.stream, flush=True)
            except UnicodeEncodeError:
                text = text.encode("ascii", "backslashreplace").decode()
                print(text, file=self.stream, flush=True)
        except (OSError, ValueError):  # ValueError if Python itself has closed the stream
            self.is_lost = True

    def progress(self, label: str, done: int, total: int | None, text: str) -> None:
        """Print nothing: only live bars show a position."""

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Print nothing."""

    def step(
        self, done_steps: int, total_steps: int, label: str, figures: dict[str, float]
    ) -> None:
        """Print nothing: there is a line for an epoch, not for a step."""

    def epoch(self, row: Row) -> None:
        """Print the epoch's figures, unless a line was printed just before.

        The last epoch of a stage is always printed.
        """
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
    """A bar for each job, with the time left and the running ELBO, KL, MSE and noise std.

    Args:
        console: The terminal; standard output if None.
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
        self.bars.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    def progress(self, label: str, done: int, total: int | None, text: str) -> None:
        """Move the bar of a job. Labels with the same first word share a bar.

        Without a total, the bar shows the count only.
        """
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
        """Move the bar of the training, and show the running figures beside it."""
        self.progress(f"training {label}", done_steps, total_steps, format_figures(figures))

    def epoch(self, row: Row) -> None:
        """Show nothing: the running figures stand beside the bar."""

    def close(self) -> None:
        """Leave the bars on the screen. Those without a total are shown as complete."""
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
"""How the figures of an epoch are written on a line."""


def format_figures(figures: dict[str, float]) -> str:
    """Put an epoch's figures on one line.

    Args:
        figures: The figures by name: elbo and kl in nats, mse and noise_std in model units.

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
        name: The name of the section, such as "likelihood".
        section: The section, as JSON values.
        width: The width of the terminal in characters.

    Returns:
        Text of several lines: a row for each figure, with its standard error and N.
    """
    table = Table(title=name.capitalize(), title_justify="left")
    table.add_column("")
    table.add_column("value ± s.e.", justify="right")
    table.add_column("N", justify="right")
    table.add_column("unit")

    for keys, figure in leaves(section):
        n = figure.get("n") if isinstance(figure, dict) else None
        if _repeats(keys, n, section):
            continue
        count = f"{n:,}" if n else ""
        name = title(keys)
        first = re.search(r", first (\d+)", name)
        if first and n and n < int(first[1]):
            # There are no more examples, of which these would be the first.
            name = name.replace(first[0], "")
        table.add_row(name, format_figure(figure), count, term(measure(keys)[0]).unit)

    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)

    return capture.get().rstrip()


def _repeats(keys: Keys, n: int | None, section: dict[str, Any]) -> bool:
    """Tell whether a bound over the first examples is one over all, which stands there, too."""
    first = re.fullmatch(r"(iwae_\d+)_first_(\d+)(_mixture)?", keys[-1])
    if first is None or n is None or n >= int(first[2]):
        return False
    return f"{first[1]}{first[3] or ''}" in section
