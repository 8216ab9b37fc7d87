"""Configuration of the documentation."""

from __future__ import annotations

import warnings

from sqlalchemy.exc import SAWarning

from sqlalchemy_lucent import __version__

# autodoc looks at every attribute of a mixin, which SQLAlchemy warns of.
warnings.filterwarnings("ignore", "Unmanaged access of declarative attribute", SAWarning)

project = "sqlalchemy-lucent"
author = "the sqlalchemy-lucent authors"
copyright = "2026, the sqlalchemy-lucent authors"  # noqa: A001
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"sqlalchemy-lucent {version}"
html_static_path = ["_static"]
html_css_files = ["drawing.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
nitpicky = False
