"""Configuration of the documentation."""

from __future__ import annotations

import os
import warnings

from sqlalchemy.exc import SAWarning

from sqlalchemy_lucent import __version__

# autodoc looks at every attribute of a mixin, which SQLAlchemy warns of.
warnings.filterwarnings("ignore", "Unmanaged access of declarative attribute", SAWarning)

project = "sqlalchemy-lucent"
author = "the sqlalchemy-lucent authors"
copyright = "2026, the sqlalchemy-lucent authors"  # noqa: A001
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"sqlalchemy-lucent {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
nitpicky = False

# A command is copied without its prompt and its output.
copybutton_prompt_text = "$ "

# Links into other projects' documentation need their inventories from the network. The build must
# give the same pages without one, so they are made where INTERSPHINX is set: for publishing.
# There, an inventory that cannot be had fails the build.
if os.environ.get("INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_timeout = 20
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3/", None),
        "sqlalchemy": ("https://docs.sqlalchemy.org/en/20/", None),
        "alembic": ("https://alembic.sqlalchemy.org/en/latest/", None),
        "cryptography": ("https://cryptography.io/en/latest/", None),
    }
