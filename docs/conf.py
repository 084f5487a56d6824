"""How Sphinx builds these pages, see `make docs`: without network, and from notebooks that were executed before."""

import jaxllm

project = "jaxllm"
author = "the jaxllm authors"
version = release = jaxllm.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nb_execution_mode = "off"  # their outputs are committed, see `make notebooks`
myst_heading_anchors = 3

default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_use_ivar = True  # otherwise an attribute that is a field would be described twice

html_theme = "sphinx_book_theme"
html_title = "jaxllm"
