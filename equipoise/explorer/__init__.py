"""A local page on which to explore a trained model: its latent space, its samples, any image."""

from equipoise.explorer.server import explore
from equipoise.explorer.views import View

__all__ = ["View", "explore"]
