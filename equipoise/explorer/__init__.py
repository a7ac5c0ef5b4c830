"""A local page on which to look around in a trained model: its latent space, its samples, and any image."""

from equipoise.explorer.server import explore
from equipoise.explorer.views import View

__all__ = ["View", "explore"]
