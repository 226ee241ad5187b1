"""How Sphinx builds these pages: `make docs`."""

import sys
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_extensions")]

from config_reference import configuration_markdown  # noqa: E402
from docstrings import convert_columns  # noqa: E402
from http_reference import api_markdown, openapi_document  # noqa: E402

project = "flexllm_jax"
author = "the flexllm_jax authors"
release = metadata.version("flexllm_jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]
templates_path: list[str] = []

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 4

default_role = "code"  # what a docstring has in backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

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
}


def write_references(app: Sphinx, config: Config) -> None:
    """Write the pages that follow from the code, so that they say what it does today."""
    folder = DOCS / "_generated"
    folder.mkdir(exist_ok=True)
    document, text = openapi_document()
    (folder / "openapi.json").write_text(text, encoding="utf-8")
    (folder / "http_api.md").write_text(api_markdown(document), encoding="utf-8")
    (folder / "configuration.md").write_text(configuration_markdown(), encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Have the references written before anything is read, and docstrings in lists."""
    app.connect("config-inited", write_references, priority=1)
    app.connect("autodoc-process-docstring", convert_columns, priority=1)
