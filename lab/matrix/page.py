"""Makes docs/runtimes.md, the matrix as Markdown. Every number comes from the JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cuantiza.core.pages import escape, table
from lab.pages import filled

SCHEMA = "cuantiza/runtimes/1"
TEMPLATE = Path(__file__).resolve().parent / "runtimes.md.j2"
JSON, MARKDOWN, EMULATION = "data/runtimes.json", "runtimes.md", "data/runtimes-emulation.json"
# A longer message is cut off on the page; the JSON has all of it.
_LONGEST = 500


def page(result: dict, emulation: dict | None = None) -> str:
    """The Markdown page of a matrix and of the results on emulated processors."""
    notes = Footnotes()
    loops = [item for item in result["runtimes"] if _any(result, item, "generated")]
    batches = [item for item in result["runtimes"] if _any(result, item, "padded") or _skips(result, item, "padded")]
    values = {
        "model": result["model"],
        "json": JSON,
        "emulation_json": EMULATION,
        "tokens": result["tokens"],
        "prefill": result["prefill"],
        "deviation": f"{result['deviation']:.0f}",
        "generated": result["generated"],
        "prompt": result["prompt"],
        "matrix": _table(result, result["runtimes"], notes, _cell),
        "loops": _table(result, loops, notes, _loop) if loops else "",
        "batches": _table(result, batches, notes, _padded) if batches else "",
        "floats": f"{result['floats']:.0e}",
        "date": result["date"],
        "processors": "" if emulation is None else processors(emulation),
        "windows": emulation and emulation["windows"],
        "length": emulation and emulation["tokens_per_window"],
        "versions": _versions(result),
    }
    machine = {key: result["machine"][key] for key in ("threads", "cpu", "system")}
    return filled(TEMPLATE, **values, **machine, notes=notes.lines())


class Footnotes:
    """Numbered in the order of their first use; the same text has one number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        return f"[^{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"[^{number}]: {text}" for text, number in self._numbers.items()]


def processors(emulation: dict) -> str:
    """The table of emulated processors."""
    columns = ["processor", "recipe", "option", "tokens", "Δ ln ppl", "max Δ logit", "note"]
    lines = [
        [
            item["processor"],
            item["recipe"],
            f"`{item['option']}`" if item["option"] else "",
            str(item["tokens"]),
            "" if item["delta_ln_ppl"] is None else f"{round(item['delta_ln_ppl'], 5) + 0.0:.5f}",
            "" if item["max_logit_difference"] is None else number(item["max_logit_difference"]),
            item["note"] or "",
        ]
        for item in emulation["rows"]
    ]
    about = [
        f"- **{name}**: {fields['about']} (`qemu -cpu {fields['qemu_cpu']}`)"
        for name, fields in emulation.get("processors", {}).items()
    ]
    return table(columns, lines, left=(0, 1, 2, 6)) + "\n" + "\n".join([*about, ""])


def number(value: float) -> str:
    """`value` with two significant digits."""
    return "0" if value == 0 else f"{value:.2g}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def _table(result: dict, runtimes: list[dict], notes: Footnotes, show: Callable[[dict, Footnotes], str]) -> str:
    """The table with a line per recipe and a column per runtime of `runtimes`."""
    found = {(cell["recipe"], cell["runtime"]): cell for cell in result["cells"]}
    lines = [
        [f"`{row['recipe']}`", row["target"], *(show(found[row["recipe"], item["name"]], notes) for item in runtimes)]
        for row in result["rows"]
    ]
    return table(["recipe", "target", *(item["title"] for item in runtimes)], lines, left=(0, 1))


def _cell(cell: dict, notes: Footnotes) -> str:
    why, status = cell.get("reason"), cell["status"]
    if status == "missing":
        return "not installed" + notes.mark(escape(why["message"]))
    if status == "fails":
        return f"**no**: {why['short']}{notes.mark(_explained(why))}"
    mark = notes.mark(_explained(why)) if why else ""
    if note := cell.get("note"):
        mark += notes.mark(escape(note[0].upper() + note[1:] + "."))
    values = " · ".join(number(cell[name]["maximum"]) if name in cell else "—" for name in ("whole", "cached"))
    whole = cell.get("whole")
    same = f"<br>{whole['same_top']} of {whole['positions']}" if whole else ""
    return f"**{'ok' if status == 'ok' else why['short']}**{mark}<br>{values}{same}"


def _loop(cell: dict, notes: Footnotes) -> str:
    if "generated" not in cell:
        return "" if cell["status"] == "missing" else "—"
    found = [f"{cell[name]['same']}" for name in ("generated", "generated_padded") if name in cell]
    return ", ".join(found) + ("" if cell.get("same_prompt") else " (another prompt)")


def _padded(cell: dict, notes: Footnotes) -> str:
    if "padded" in cell:
        return number(cell["padded"]["maximum"])
    if (why := _explanation(cell, "padded")) is None:
        return "" if cell["status"] == "missing" else "—"
    return f"**no**: {why['short']}{notes.mark(_explained(why))}"


def _explanation(cell: dict, name: str) -> dict | None:
    return (cell.get("unable") or {}).get(name)


def _any(result: dict, runtime: dict, name: str) -> bool:
    return any(name in cell for cell in result["cells"] if cell["runtime"] == runtime["name"])


def _skips(result: dict, runtime: dict, name: str) -> bool:
    return any(_explanation(cell, name) for cell in result["cells"] if cell["runtime"] == runtime["name"])


def _explained(why: dict) -> str:
    message = why["message"] if len(why["message"]) <= _LONGEST else why["message"][:_LONGEST] + " …"
    cure = why["cure"] or "What would cure it is not known."
    return f"{escape(message)} — {cure}"


def _versions(result: dict) -> str:
    lines = []
    for item in result["runtimes"]:
        cells = [cell for cell in result["cells"] if cell["runtime"] == item["name"]]
        versions = ", ".join(dict.fromkeys(cell["version"] for cell in cells if "version" in cell))
        lines.append(f"- **{item['title']}**: {item['missing'] or versions or 'ran nothing'}")
    return "\n".join([*lines, ""])
