"""Where a run's figures go: one protocol, and ``metrics.jsonl``, which every run has."""

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

from equipoise.run import Row
from equipoise.store import whole_file


@runtime_checkable
class Sink(Protocol):
    """Something that takes in what a run reports."""

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Training starts, or goes on after ``done_steps`` optimiser steps and the epochs of ``history``."""

    def step(
        self, done_steps: int, total_steps: int, label: str, figures: dict[str, float]
    ) -> None:
        """About once a second: position, and running averages by name."""

    def epoch(self, row: Row) -> None:
        """An epoch has ended."""

    def message(self, text: str) -> None:
        """Something a person should read, such as a switch of stages or a warning."""

    def close(self) -> None:
        """The run has ended, well or not."""


class JsonlSink:
    """One JSON row per epoch.

    Args:
        path: usually RUN/metrics.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Begin with the rows of the checkpoint: a kill may have left the file a row apart from it."""
        with whole_file(self.path) as temporary:
            temporary.write_text(
                "".join(json.dumps(row) + "\n" for row in history), encoding="utf-8"
            )

    def step(
        self, done_steps: int, total_steps: int, label: str, figures: dict[str, float]
    ) -> None:
        """Do nothing: rows are per epoch."""

    def epoch(self, row: Row) -> None:
        """Append the row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def message(self, text: str) -> None:
        """Do nothing: rows are per epoch."""

    def close(self) -> None:
        """Do nothing: the file is closed after each row."""
