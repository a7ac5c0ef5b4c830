"""Markdown of the page of results: tables of estimates, the paper's figures beside ours."""

from collections.abc import Sequence
from typing import Any

from equipoise.glossary import format_figure

NONE = "–"  # noqa: RUF001 (a dash)  # noqa: RUF001 (a dash)  # noqa: RUF001 (a dash)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out a table.

    Args:
        head: of the columns.
        rows: text as it is, estimates (``{"value", "standard_error", "n"}``) and numbers formatted, None as a dash.

    Returns:
        Markdown.

    Example:
        >>> print(table(["", "KL"], [["prior", {"value": 1.5, "standard_error": 0.25, "n": 9}], ["mixture", None]]))
        |  | KL |
        |---|---|
        | prior | 1.50 ±\u00a00.25 |
        | mixture | – |
    """
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(
        ("|" + "|".join(line) + "|") if line[0] == "---" else f"| {' | '.join(line)} |"
        for line in lines
    )


def cell(value: Any) -> str:  # noqa: ANN401 (any JSON value)
    """Format one cell.

    Args:
        value: text, an estimate, a number or None.

    Returns:
        Text.
    """
    if value is None:
        return NONE
    return value if isinstance(value, str) else format_figure(value)


def estimate(found: Any, *keys: str) -> Any:  # noqa: ANN401 (any JSON value)
    """Look a figure up.

    Args:
        found: JSON values.
        *keys: from the outside in.

    Returns:
        The figure; None if it is not there.
    """
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found
