"""docs/runtimes.md: the matrix as Markdown. Every number is in the JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

SCHEMA = "cuantiza/runtimes/1"
JSON, MARKDOWN, EMULATION = "runtimes.json", "runtimes.md", "runtimes-emulation.json"
# Of a message that goes on for pages; the JSON has all of it.
_LONGEST = 500
_INTRO = """\
# Runtimes

The same files in other runtimes: every artifact of `{model}` in each, run and compared with ONNX Runtime's Python \
package as `cuantiza/core/run/runtime.py` drives it. Made by `make runtimes`, from [{json}]({json}); `python -m lab.matrix --reprint` \
prints this page anew.
"""
_MATRIX = """\
## The matrix

A cell says **ok**, the largest difference of a logit when {tokens} Spanish tokens go in at once · when {prefill} do and \
the others follow one by one through the cache, and how many of the {tokens} most likely tokens are the same. Logits of \
this model have a standard deviation of about {deviation:.0f}.
"""
_HOW = """\
## How it was compared

Every cell is a process of its own, with {threads} threads, on {cpu} ({system}), {date}.
**ok** is a KL divergence from ONNX Runtime's distribution of at most {floats:.0e} nats a token, or twice what \
quantization itself causes in that artifact (its own KL from fp32), in all logits that the runtime gives. Sums of floats \
in another order move logits by some 1e-5 and KL by less than 1e-7. Where activations are integers, that is enough to \
tip a rounding now and then, and everything behind it is rounded anew: two roundings of the same fineness that have \
nothing to do with each other lie twice as far apart as each lies from the floats. A scale, a zero point, a mask or a \
position that a runtime gets wrong is orders of magnitude above that.
Tokens that a runtime's own loop generates have to be ours, up to the first place where our two best logits are nearer \
to each other than twice the largest difference; and its tokenizer has to split the prompt as `tokenizer.json` says.
"""
_PROCESSORS = """\
## Other processors

Under user-mode emulation: the artifacts on processors with other instructions, compared with the same artifact on the \
real one, by `python -m lab.matrix.emulation` ([{json}]({json})). Δ ln ppl is on {windows} windows of {length} tokens; an \
option is one of ONNX Runtime's session.
"""


def page(result: dict, emulation: dict | None = None) -> str:
    """The Markdown page of a matrix, and of what was measured on emulated processors."""
    notes = Footnotes()
    matrix = _table(result, result["runtimes"], notes, _cell)
    loops = [item for item in result["runtimes"] if _any(result, item, "generated")]
    batches = [item for item in result["runtimes"] if _any(result, item, "padded") or _skips(result, item, "padded")]
    parts = [
        _INTRO.format(model=result["model"], json=JSON),
        _MATRIX.format(**result),
        matrix,
    ]
    if loops:
        parts += [
            f"## Their own loops\n\nOf {result['generated']} tokens that each library's own generation continues "
            f"“{result['prompt']}” with, greedily, how many are ours; behind the comma, as the shorter row of a batch "
            "that its tokenizer pads on the left. The prompt goes through the library's own tokenizer.\n",
            _table(result, loops, notes, _loop),
        ]
    if batches:
        parts += [
            "## A padded batch\n\nThe largest difference of a logit where the tokens stand behind padding in the "
            "shorter row of two.\n",
            _table(result, batches, notes, _padded),
        ]
    parts.append(_how(result))
    if emulation is not None:
        parts += [
            _PROCESSORS.format(json=EMULATION, windows=emulation["windows"], length=emulation["tokens_per_window"])
        ]
        parts += [processors(emulation)]
    parts.append("## Versions\n\n" + _versions(result))
    return "\n".join([*map(_wrap, parts), *notes.lines()])


class Footnotes:
    """Numbered in the order of their first use; the same text has one number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        return f"[^{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"[^{number}]: {text}\n" for text, number in self._numbers.items()]


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
    return _markdown(columns, lines, left=(0, 1, 2, 6)) + "\n" + "\n".join([*about, ""])


def number(value: float) -> str:
    """Two digits that matter."""
    return "0" if value == 0 else f"{value:.2g}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def _table(result: dict, runtimes: list[dict], notes: Footnotes, show: Callable[[dict, Footnotes], str]) -> str:
    """A line for every recipe, a column for every one of `runtimes`."""
    found = {(cell["recipe"], cell["runtime"]): cell for cell in result["cells"]}
    lines = [
        [f"`{row['recipe']}`", row["target"], *(show(found[row["recipe"], item["name"]], notes) for item in runtimes)]
        for row in result["rows"]
    ]
    return _markdown(["recipe", "target", *(item["title"] for item in runtimes)], lines, left=(0, 1))


def _cell(cell: dict, notes: Footnotes) -> str:
    why, status = cell.get("reason"), cell["status"]
    if status == "missing":
        return "not installed" + notes.mark(_escape(why["message"]))
    if status == "fails":
        return f"**no**: {why['short']}{notes.mark(_explained(why))}"
    mark = notes.mark(_explained(why)) if why else ""
    if note := cell.get("note"):
        mark += notes.mark(_escape(note[0].upper() + note[1:] + "."))
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
    return f"{_escape(message)} — {cure}"


def _escape(text: str) -> str:
    """Text of others as text: no table, HTML, footnote, emphasis or link of Markdown comes of it."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text


def _versions(result: dict) -> str:
    lines = []
    for item in result["runtimes"]:
        cells = [cell for cell in result["cells"] if cell["runtime"] == item["name"]]
        versions = ", ".join(dict.fromkeys(cell["version"] for cell in cells if "version" in cell))
        lines.append(f"- **{item['title']}**: {item['missing'] or versions or 'ran nothing'}")
    return "\n".join([*lines, ""])


def _how(result: dict) -> str:
    machine = result["machine"]
    return _HOW.format(**machine, **{key: result[key] for key in ("date", "floats")})


def _wrap(part: str) -> str:
    """Lines of prose at 120 columns; tables, titles and lists as they are."""
    lines = [
        line
        if line.startswith(("|", "#", "- "))
        else textwrap.fill(line, 120, break_on_hyphens=False, break_long_words=False)
        for line in part.splitlines()
    ]
    return "\n".join([*lines, ""]) if part.endswith("\n") else "\n".join(lines)


def _markdown(columns: list[str], lines: list[list[str]], left: tuple[int, ...]) -> str:
    align = "|" + "".join("---|" if at in left else "---:|" for at in range(len(columns)))
    rows = [columns, *lines]
    return "\n".join([f"| {' | '.join(rows[0])} |", align, *(f"| {' | '.join(row)} |" for row in rows[1:])]) + "\n"
