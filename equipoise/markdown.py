"""Text from outside in Markdown, where it must stay text."""

import re

from equipoise.text import LONGEST_NAME, visible


def code(text: str, *, in_table: bool = False) -> str:
    r"""Show a name as code.

    Args:
        text: Any text, such as the name of a folder.
        in_table: Whether it is in a table, where a bar would begin another cell.

    Returns:
        A code span, within quotes of more backticks than there are in the text.

    Example:
        >>> code("a`b")
        '``a`b``'
        >>> code("a|b", in_table=True)
        '`a\\|b`'
    """
    name = _on_one_line(text)
    if not name.strip():
        return "(no name)"

    runs: list[str] = re.findall("`+", name)
    quotes = "`" * (1 + max(map(len, runs), default=0))
    if name[0] in "` " or name[-1] in "` ":
        name = f" {name} "
    if in_table:
        name = name.replace("|", "\\|")
    return quotes + name + quotes


def plain(text: str) -> str:
    r"""Show a text as it is, whatever it holds.

    Args:
        text: Any text.

    Returns:
        Markdown that is shown as the text, also in a table.

    Example:
        >>> plain("<b>a_b</b>")
        '\\<b\\>a\\_b\\</b\\>'
    """
    escaped = re.sub(r"([\\`*_\[\]<>|~&!])", r"\\\1", _on_one_line(text))
    # Otherwise a bare address becomes a link.
    return re.sub(r"(:)(?=//)|(?<=www)(\.)", r"\\\1\2", escaped)


def _on_one_line(text: str) -> str:
    """The text without what cannot be seen, on one line and not too long."""
    line = visible(text.replace("\n", "\\n").replace("\t", " "), LONGEST_NAME)
    # A blank of another kind at an edge would be stripped there.
    return line.replace("\u00a0", " ") if not line.strip() else line
