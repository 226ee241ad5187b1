"""Writes the pages that follow from the code, so that they say what it does today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from config_reference import configuration_markdown
from families_reference import families_markdown
from http_reference import api_markdown, openapi_document
from sphinx.application import Sphinx


def write_references(app: Sphinx, config: Any) -> None:
    """Handle Sphinx's event `config-inited`, which comes before anything is read."""
    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    document, text = openapi_document()
    (folder / "openapi.json").write_text(text, encoding="utf-8")
    (folder / "http_api.md").write_text(api_markdown(document), encoding="utf-8")
    (folder / "configuration.md").write_text(configuration_markdown(), encoding="utf-8")
    (folder / "families.md").write_text(families_markdown(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Make it an extension; before Sphinx looks whether all files are there."""
    app.connect("config-inited", write_references, priority=1)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
