"""Markdown for the page of results: tables of estimates, and what is best in their columns."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from equipoise.glossary import format_figure
from equipoise.paper.seeds import has_seeds, is_different, value_of

Better: TypeAlias = Mapping[str, Literal["higher", "lower"]]
"""The direction in which figures are better, by the title of their column."""

NONE = "–"  # noqa: RUF001 (a dash)
"""The cell of a figure that does not exist."""


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    better: Better | None = None,
    groups: Sequence[Hashable] | None = None,
) -> str:
    """Lay out a table.

    Args:
        head: The titles of the columns.
        rows: The cells of each row; :func:`cell` says what they may be.
        better: The directions of the columns in which figures over seeds are compared. There the
            best figure is bold, and so are those that do not differ from it, see
            :func:`equipoise.paper.seeds.is_different`. Text and None are not compared.
        groups: For each row, what its figures are compared within. All rows are one group if it is
            None.

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
    marked = [list(row) for row in rows]
    for column, title in enumerate(head):
        if better and title in better:
            for group in dict.fromkeys(groups or [None]):
                members = [
                    row for i, row in enumerate(marked) if groups is None or groups[i] == group
                ]
                _mark_best(members, column, better[title])

    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in marked:
        cells = [cell(value) for value in row]
        lines.append(f"| {' | '.join(cells)} |")

    return "\n".join(lines)


def _mark_best(rows: list[list[Any]], column: int, direction: str) -> None:
    """Make the best figures of a column bold; of cells with two figures, the best of each."""
    cells = [row[column] if isinstance(row[column], tuple) else (row[column],) for row in rows]
    best = [_best([figure[i] for figure in cells], direction) for i in range(len(cells[0]))]

    for row, figures in zip(rows, cells, strict=True):
        parts = [
            bold(figure) if other is not None and _is_no_worse(figure, other) else figure
            for figure, other in zip(figures, best, strict=True)
        ]
        row[column] = tuple(parts) if isinstance(row[column], tuple) else parts[0]


def _best(cells: list[Any], direction: str) -> Any:  # noqa: ANN401 (any JSON value)
    """The best of the figures; None if there are none over seeds, or no two to compare."""
    figures = [figure for figure in cells if _is_compared(figure)]
    if len(figures) < 2 or not any(has_seeds(figure) for figure in figures):
        return None

    return (max if direction == "higher" else min)(figures, key=value_of)


def _is_no_worse(figure: Any, best: Any) -> bool:  # noqa: ANN401 (any JSON value)
    """Whether a cell has a figure that does not differ from the best one."""
    return _is_compared(figure) and not is_different(figure, best)


def _is_compared(figure: Any) -> bool:  # noqa: ANN401 (any JSON value)
    return figure is not None and not isinstance(figure, str)


def bold(figure: Any) -> str:  # noqa: ANN401 (any JSON value)
    """Format one cell in bold.

    Args:
        figure: As for :func:`cell`.

    Returns:
        Markdown.
    """
    return f"**{cell(figure)}**"


def cell(value: Any) -> str:  # noqa: ANN401 (any JSON value)
    """Format one cell.

    Args:
        value: Text, a figure over seeds, an estimate (``{"value", "standard_error", "n"}``), a
            number, or None; or a pair of these, of which the second stands in brackets.

    Returns:
        The text as it is, the formatted number, or a dash for None.
    """
    if value is None:
        return NONE
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        first, second = value
        return f"{cell(first)} ({cell(second)})"

    return format_figure(value)


def brief(figure: Any, form: str) -> Any:  # noqa: ANN401 (any JSON value)
    """Write the value of a figure alone, where it is of one training.

    Args:
        figure: A figure over seeds, an estimate or a number.
        form: The format of the number, such as ".3g".

    Returns:
        Its text; a figure over seeds itself, whose cell has both its errors.

    Example:
        >>> brief({"value": 0.98765, "standard_error": 0.1}, ".2f")
        '0.99'
    """
    return figure if has_seeds(figure) else format(value_of(figure), form)


def bits(row: dict[str, Any], suffix: str = "") -> tuple[Any, Any]:
    """Pair the bits per dimension, exact and of dequantised data.

    Args:
        row: Figures of the section ``likelihood``.
        suffix: End of the names of both figures, such as "_mixture".

    Returns:
        Both figures, None for one that does not exist.

    Example:
        >>> cell(bits({"bits_per_dim": 2.5, "bits_per_dim_dequantised": 3.5}))
        '2.5 (3.5)'
    """
    exact = estimate(row, f"bits_per_dim{suffix}")
    dequantised = estimate(row, f"bits_per_dim_dequantised{suffix}")
    return exact, dequantised


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
