"""How the pages in docs/ are made: a template joins prose and figures, and the file is written whole."""

from __future__ import annotations

import argparse
from pathlib import Path

from cuantiza.core.pages import count, environment, table, wrapped
from cuantiza.core.store import folders
from lab import ES_MINI, ROOT


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


def page_parser(module: str, text: str | None, tokens: int, work: Path, output: Path) -> argparse.ArgumentParser:
    """The options of a page that scores artifacts of one model: what is measured, and where it is written."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ES_MINI, help="folder of the checkpoint (default es-mini)")
    parser.add_argument("--tokens", type=int, default=tokens, help=f"tokens to score (default {tokens})")
    parser.add_argument("--work", type=Path, default=work, help=f"folder of the artifacts (default {work})")
    parser.add_argument("--output", type=Path, default=output, help=f"the figures (default {output.relative_to(ROOT)})")
    parser.add_argument("--reprint", action="store_true", help="write the page again from the JSON, without measuring")
    return parser
