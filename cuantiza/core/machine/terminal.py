"""Tables on the terminal: as a whole if the terminal is wide enough, else one row after the other."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 400  # width, in columns, of output that is not a terminal; none of our tables is wider


def new_table(title: str | Text, *columns: str, words: int = 1, caption: str = "") -> Table:
    """An empty table. Its first `words` columns hold words, the others numbers; headings break after a comma."""
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column.replace(", ", ",\n"), justify="left" if index < words else "right", no_wrap=True)
    return table


class Terminal(Console):
    """Standard output whose reader may go away. The command decides its status then; rich would end it with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show(table: Table, words: int = 1) -> None:
    """Print `table` to standard output.

    On a terminal that is narrower than the table, each row becomes a block of lines: its first `words` cells, and below
    them the other cells with their headings.
    """
    console = Terminal() if Terminal().is_terminal else Terminal(width=_WIDE)
    if _least_width(console, table) <= console.width:
        console.print(table)
        return
    console.print(table.title, style="italic", end="\n\n", highlight=False)
    headings = [str(column.header).replace("\n", " ").strip() for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        console.print(Text(" ").join(_text(cell) for cell in cells[:words] if str(cell)), style="bold")
        block = Table.grid(padding=(0, 2, 0, 0))
        block.add_column(no_wrap=True)
        block.add_column()
        for heading, cell in zip(headings[words:], cells[words:], strict=True):
            if str(cell):
                block.add_row(f"  {heading}", _text(cell))
        console.print(block)
    if table.caption:
        console.print(table.caption, style="dim", highlight=False)


def _least_width(console: Console, table: Table) -> int:
    """The least width of `table` in characters, if columns that may not wrap are shown in full."""
    width = 1
    for column in table.columns:
        sizes = [console.measure(cell) for cell in (column.header, *column.cells)]
        width += max(size.maximum if column.no_wrap else size.minimum for size in sizes) + 3
    return width


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))
