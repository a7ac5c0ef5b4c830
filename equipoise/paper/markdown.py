"""Markdown for the page of results: tables of estimates."""

from collections.abc import Sequence
from typing import Any

from equipoise.glossary import format_figure

NONE = "–"  # noqa: RUF001 (a dash)
"""The cell of a figure that does not exist."""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out a table.

    Args:
        head: The titles of the columns.
        rows: The cells of each row; :func:`cell` says what they may be.

    Returns:
        Markdown.

    Example:
        >>> kl = {"value": 1.5, "standard_error": 0.25, "n": 9}
        >>> print(table(["", "KL"], [["prior", kl], ["mixture", None]]))
        |  | KL |
        |---|---|
        | prior | 1.50 ±\u00a00.25 |
        | mixture | – |
    """
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [cell(value) for value in row]
        lines.append(f"| {' | '.join(cells)} |")

    return "\n".join(lines)


def cell(value: Any) -> str:  # noqa: ANN401 (any JSON value)
    """Format one cell.

    Args:
        value: Text, an estimate (``{"value", "standard_error", "n"}``), a number, or None.

    Returns:
        The text as it is, the formatted number, or a dash for None.
    """
    if value is None:
        return NONE
    if isinstance(value, str):
        return value

    return format_figure(value)


def bits(row: dict[str, Any], suffix: str = "") -> str:
    """Write the bits per dimension, exact and, in brackets, of dequantised data.

    Args:
        row: Figures of the section ``likelihood``.
        suffix: End of the names of both figures, such as "_mixture".

    Returns:
        The text of a cell, with a dash for a figure that does not exist.

    Example:
        >>> bits({"bits_per_dim": 2.5, "bits_per_dim_dequantised": 3.5})
        '2.5 (3.5)'
    """
    exact = estimate(row, f"bits_per_dim{suffix}")
    dequantised = estimate(row, f"bits_per_dim_dequantised{suffix}")
    return f"{cell(exact)} ({cell(dequantised)})"


def estimate(content: Any, *keys: str) -> Any:  # noqa: ANN401 (any JSON value)
    """Look a figure up.

    Args:
        content: JSON values.
        *keys: The keys that lead to the figure, from the outside in.

    Returns:
        The figure; None if it is not there.
    """
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            return None

        content = content[key]

    return content
