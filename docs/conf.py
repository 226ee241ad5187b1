"""How Sphinx builds these pages: `make docs`."""

import runpy
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_extensions")]

project = "flexllm_jax"
author = "the flexllm_jax authors"
release = runpy.run_path(str(DOCS.parent / "flexllm_jax/version.py"))["__version__"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "docstrings",  # these two are in _extensions
    "references",
]
exclude_patterns = ["_build", "_generated"]
templates_path: list[str] = []

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 4

default_role = "code"  # what a docstring has in backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "flexllm_jax"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_extra_path = ["_generated/openapi.json"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search is in the sidebar
}
