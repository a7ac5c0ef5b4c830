"""Where the figures of a run go: one protocol, and ``metrics.jsonl``, which every run has."""

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

from equipoise.files import record_digest, whole_file
from equipoise.run import Row


@runtime_checkable
class Sink(Protocol):
    """Something that receives what a run reports."""

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Receive the start of a training.

        A resumed training has done optimiser steps, and has the rows of its finished epochs.
        """

    def step(
        self, done_steps: int, total_steps: int, label: str, figures: dict[str, float]
    ) -> None:
        """Receive the position and running averages by name, about once a second."""

    def epoch(self, row: Row) -> None:
        """Receive the figures of an epoch that has ended."""

    def message(self, text: str) -> None:
        """Receive a message to a person, such as a change of stage or a warning."""

    def close(self) -> None:
        """Receive the end of the training, whether it has succeeded or failed."""


class JsonlSink:
    """Writes one JSON row per epoch.

    Args:
        path: The file, usually RUN/metrics.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = b""

    def start(self, total_steps: int, done_steps: int, history: list[Row]) -> None:
        """Write the rows of the checkpoint.

        If the process was killed, the file may have one row more or less than the checkpoint.
        """
        rows = "".join(json.dumps(row) + "\n" for row in history)
        self.content = rows.encode()
        with whole_file(self.path) as temporary:
            temporary.write_bytes(self.content)
        record_digest(self.path, self.content, grows=True)

    def step(
        self, done_steps: int, total_steps: int, label: str, figures: dict[str, float]
    ) -> None:
        """Do nothing, because rows are per epoch."""

    def epoch(self, row: Row) -> None:
        """Append the row."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(line)

        self.content += line
        record_digest(self.path, self.content, grows=True)

    def message(self, text: str) -> None:
        """Do nothing, because the file holds figures only."""

    def close(self) -> None:
        """Do nothing, because the file is closed after each row."""
