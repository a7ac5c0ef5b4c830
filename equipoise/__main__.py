"""``python -m equipoise`` is the same command as ``equipoise``."""

from equipoise.cli import main

main()
