"""The evaluation of a run on held-out data, by one fixed protocol; one file for each section."""

from equipoise.evaluation.protocol import SECTIONS, evaluate
from equipoise.evaluation.subject import Examples

__all__ = ["SECTIONS", "Examples", "evaluate"]
