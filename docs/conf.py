"""Sphinx configuration: pages are MyST notebooks, executed at each build, offline."""

import os
import sys
from functools import partialmethod
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from nbclient import NotebookClient
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import equipoise

project, author = "equipoise", "the equipoise authors"
release = version = equipoise.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "results-notes.md"]

html_theme, html_title = "furo", "equipoise"
html_copy_source = html_show_copyright = html_show_sphinx = False
html_math_renderer = "mathml"
html_static_path = ["_static"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = nb_execution_raise_on_error = nb_merge_streams = True
nb_execution_timeout = 300
nb_render_markdown_format = "myst"  # with tables
# MyST-NB alone ends a line wherever the output of a process arrives in pieces.
NotebookClient.__init__ = partialmethod(NotebookClient.__init__, coalesce_streams=True)

autodoc_member_order = "bysource"
autodoc_typehints = (
    "none"  # shapes stand in the Args; jaxtyping's classes would fill the signatures
)
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# The notebooks call the `equipoise` of this environment, on one thread: 8 x 8 images are small.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("OMP_NUM_THREADS", "1")


def visit_inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    """Write TeX as MathML, which browsers show without a script."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_display_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula of its own line."""
    formula = tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the renderer of formulas.

    Args:
        app: the build.
    """
    app.add_html_math_renderer("mathml", (visit_inline_math, None), (visit_display_math, None))
    app.add_css_file("equipoise.css")
