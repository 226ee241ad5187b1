"""Docstrings as the code writes them, for autodoc: Google's sections, and columns of names and
meanings, which become lists.

max_tokens   most output tokens
top_k        most likely tokens to draw from;
             0 or -1: all
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.ext import napoleon

_ENTRY = re.compile(r"^(?P<names>[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*) {2,}(?P<text>\S.*)$")


def convert_columns(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Handle autodoc's event `autodoc-process-docstring`: change `lines` in place."""
    made: list[str] = []
    inside = False  # the lines of an entry
    for line in lines:
        entry = _ENTRY.match(line)
        if entry:
            if made and made[-1] and not inside:
                made.append("")
            names = ", ".join(f"``{one}``" for one in entry["names"].split(", "))
            made.append(f"* {names}: {entry['text']}")
            inside = True
        elif inside and line.startswith("  "):
            made.append(f"  {line.strip()}")
        else:
            if inside and line:
                made.append("")
            inside = False
            made.append(line)
    # Not by napoleon's own hook, which takes what a property says before a colon for its type.
    google: Any = getattr(napoleon, "GoogleDocstring")  # noqa: B009 (its types are wrong)
    lines[:] = google(made, napoleon.Config(), app, "function").lines()


def setup(app: Any) -> dict[str, bool]:
    """Make it an extension."""
    app.connect("autodoc-process-docstring", convert_columns)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
