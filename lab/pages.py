"""How the pages in docs/ are made: a template joins prose and figures, and the file is written whole."""

from __future__ import annotations

from pathlib import Path

from cuantiza.core.pages import count, environment, table, wrapped
from cuantiza.core.store import folders


def filled(template: Path, **values: object) -> str:
    """The Markdown page of a template, with paragraphs filled to 120 columns.

    Beside `values`, a template can call `table` and `count` of cuantiza/core/pages.py.
    """
    pages = environment(template.parent)
    pages.globals |= {"table": table, "count": count}
    return wrapped(pages.get_template(template.name).render(**values))


def write(path: Path, text: str) -> None:
    """Write `text` as file `path`: into a temporary folder first, then renamed into place."""
    with folders.staging(path) as work:
        (work / path.name).write_text(text, encoding="utf-8")
        (work / path.name).replace(path)
