"""Text from outside, such as names of files, made safe to show."""

LONGEST_NAME = 200
"""Number of characters after which a name is cut where it is shown."""


def visible(text: str, longest: int | None = None) -> str:
    r"""Write out what would not be seen, or would change how the rest is seen.

    These are control characters, which steer a terminal, marks that turn the direction of writing,
    and bytes of a file's name that are not Unicode. Line ends stay.

    Args:
        text: Any text.
        longest: Number of characters after which the text is cut. If None, it is not cut.

    Returns:
        The text, with escapes such as ``\x1b`` and ``\u202e`` in place of those characters.

    Example:
        >>> visible("a\x1b[2Jb\u202ec\n")
        'a\\x1b[2Jb\\u202ec\n'
        >>> visible("abcdef", longest=4)
        'abc…'
    """
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"

    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    """A character, or its escape if it is not to be seen."""
    if character.isprintable() or character in _KEPT:
        return character
    return character.encode("unicode_escape").decode()


_KEPT = "\n\t\u00a0\u2007\u2009\u202f"
"""Line ends and blanks, which harm nobody although Python does not count them as printable."""


def parse_size(image_size: int | str) -> tuple[int, int]:
    """Read the size of images.

    Args:
        image_size: Pixels a side, or WIDTHxHEIGHT.

    Returns:
        Width and height.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> parse_size(64), parse_size("64x48")
        ((64, 64), (64, 48))
    """
    sides = str(image_size).split("x")
    if not all(side.isascii() and side.isdigit() for side in sides) or len(sides) > 2:
        raise ValueError(
            f"image_size must be a number of pixels, or WIDTHxHEIGHT as in 64x48, not {image_size}"
        )
    return int(sides[0]), int(sides[-1])
