r"""Texts without the paths of this machine, which others need not know.

A path is cut down to its last part. Where a text leaves open how far a path goes, because its
folders have blanks in their names, rather too much is cut than too little.
"""

import os
import re
from typing import Any

PATH_KEYS = frozenset({"command", "source", "load", "data_dir", "features", "against", "test"})
"""Keys of JSON files whose values name files, among other things, or hold words that do."""

_KEPT = r"(?P<kept>\b(?:https?|hf|s3|gs|ftp)://[^\s/][^\s\"'`<>]*)"
_START = r"""
    (?:
        \bfile:[/\\]+                                # file:///home/ada
      | (?<!\w)~[\w.-]*[/\\]                         # ~/photos, ~ada/photos
      | (?<![A-Za-z0-9])[A-Za-z]:[/\\]+              # C:\Users, c:/Users
      | (?:[^\s/\\"'`=:,;(){}\[\]<>|]*[/\\]+)*\.\.[/\\]+   # ../photos, runs/../photos
      | (?<![\w.])\.[/\\]+                           # ./photos
      | (?<![\w.~/\\])[/\\]+(?=[^\s/\\])             # /home, \\server, \Users
    )
"""
_REST = r"""(?:[^/\\\n"'`<>|]*[/\\]+)* (?P<last>[^\s/\\"'`<>|,;:(){}\[\]]*)"""
_PATH = re.compile(f"{_KEPT} | (?P<path>{_START} {_REST})", re.VERBOSE)
_PLACE_ON_HUB = re.compile(r"hf:[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def without_paths(value: Any, *, names_files: bool = False) -> Any:  # noqa: ANN401 (any JSON value)
    """Cut the paths in a JSON value down to their last parts.

    Args:
        value: Any JSON value. In strings, and in the keys of objects, paths are found that begin at
            a root, a drive, a home folder or with dots, as addresses of files, and within
            sentences.
        names_files: Whether the value is known to name files. Then each of its strings is cut to
            its last part, except for places on the hub. Values of :data:`PATH_KEYS` are known to.

    Returns:
        The value without paths.

    Example:
        >>> without_paths("cannot read '/home/ada/photos/a.png': it is empty")
        "cannot read 'a.png': it is empty"
        >>> without_paths({"command": ["equipoise", "train", "photos/cats", "--out=../x/run"]})
        {'command': ['equipoise', 'train', 'cats', '--out=run']}
    """
    if isinstance(value, dict):
        result: dict[str, Any] = {}
        for key, child in value.items():
            short = number_of = without_paths(key)
            number = 2
            while short in result:
                short = f"{number_of} ({number})"
                number += 1
            is_of_files = names_files or key in PATH_KEYS
            result[short] = without_paths(child, names_files=is_of_files)
        return result

    if isinstance(value, list):
        return [without_paths(child, names_files=names_files) for child in value]
    if not isinstance(value, str):
        return value

    # Once more, since what is left of one path may be the beginning of another.
    text = value
    for _ in range(2):
        text = _PATH.sub(_last_part, text)
    return _last_of_word(text) if names_files else text


def _last_part(found: re.Match[str]) -> str:
    """The last part of a path; the home folder itself has no name that others need."""
    if found["kept"]:
        return found["kept"]
    if found["last"]:
        return found["last"]

    path = found["path"].rstrip("/\\")
    if path == os.path.expanduser("~"):
        return "~"
    return re.split(r"[/\\:]", path)[-1].strip(".~")


def _last_of_word(word: str) -> str:
    """The last part of a word that may be a path, behind the name of an option if there is one."""
    if _PLACE_ON_HUB.fullmatch(word) or _PATH.fullmatch(word):
        return word

    option, text = "", word
    assigned = re.match(r"-{0,2}\w[\w.-]*=", word)
    if assigned:
        option, text = assigned[0], word[assigned.end() :]
    if _PLACE_ON_HUB.fullmatch(text):
        return word

    parts = [part for part in re.split(r"[/\\]", text) if part]
    return option + (parts[-1] if parts else "")
