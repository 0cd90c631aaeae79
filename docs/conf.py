"""The documentation as a site: `python -m sphinx -W docs DIRECTORY`."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # modules are imported for their docstrings only

import jax_fa

project = "jax_fa"
author = "The jax_fa authors"
copyright = "The jax_fa authors"
release = version = jax_fa.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
nitpicky = True  # a reference that leads nowhere is an error
nitpick_ignore = [("py:class", "jax_fa.problem.Dims")]  # explain shows it; it is no entry of its own

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and dtypes stand in the text of every argument
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_param = False  # one table of arguments, as written
napoleon_custom_sections = ["Differences from CANN", "Differences from jax.nn"]
default_role = "code"  # docstrings put code in single backticks

html_theme = "furo"
html_title = "jax_fa"
