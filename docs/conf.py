"""The documentation as a site: `python -m sphinx -W docs DIRECTORY`."""

import os
import re
import shutil
from pathlib import Path

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # modules are imported for their docstrings only

import jax_fa

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/jax-fa/jax_fa"

project = "jax_fa"
author = "The jax_fa authors"
copyright = "The jax_fa authors"
release = version = jax_fa.__version__

# Sphinx reads what lies below its own directory only.
shutil.copytree(
    HERE.parent / "notebooks", HERE / "notebooks", ignore=lambda _, names: [n for n in names if not n.endswith(".ipynb")],
    dirs_exist_ok=True,
)  # fmt: skip

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are kept with their outputs
exclude_patterns = ["_build"]
nitpicky = True  # a reference that leads nowhere is an error
nitpick_ignore = [
    ("py:class", "jax_fa.call.Dims"),  # explain shows it; it is not an entry of its own
    ("py:exc", "jax.errors.JaxRuntimeError"),  # of JAX
]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and dtypes stand in the text of every argument
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 60  # longer ones have one argument per line
napoleon_use_rtype = False
napoleon_use_param = False  # one table of arguments, as written
napoleon_custom_sections = ["Differences from CANN", "Differences from jax.nn"]
default_role = "code"  # docstrings put code in single backticks

html_theme = "furo"
html_title = "jax_fa"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}


def _repository_links(app, docname, source):
    """Pages link to files of the repository by relative paths, which lead out of the site."""
    source[0] = source[0].replace("](../notebooks/0", "](notebooks/0")
    source[0] = re.sub(r"\]\(\.\./(?=[\w.])", f"]({REPOSITORY}/blob/main/", source[0])


def setup(app):
    app.connect("source-read", _repository_links)
