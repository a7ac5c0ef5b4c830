"""``python -m equipoise``, the same as ``equipoise``."""

from equipoise.cli import main

main()
