"""Shows a result as a Markdown page and as a table on the terminal. Every number comes from the JSON."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from statistics import median

from rich.console import Console

from cuantiza.core.machine.terminal import new_table, show
from cuantiza.core.pages import count
from lab.pages import filled

# What goes before the command of a run that was held back.
_HELD = ("python", "-m", "lab.avx2", "--")
TEMPLATE = Path(__file__).resolve().parent / "bench.md.j2"

_LIMITS = {
    "read_bytes_per_second": "GB/s read",
    "fp32_ops_per_second": "GFLOP/s fp32",
    "int8_ops_per_second": "GOP/s int8",
}


def page(result: dict, name: str) -> str:
    """The Markdown page of a result. It shows <name>.svg from its own folder."""
    shape = result["shape"]
    settings = [
        (f"{count(setting['threads'], 'thread')}, batch of {setting['batch']}", *speed_table(result, number, _long))
        for number, setting in enumerate(result["settings"])
    ]
    return filled(
        TEMPLATE,
        name=name,
        shape=shape,
        million=f"{shape['parameters'] / 1e6:.0f}",
        parameters=f"{shape['parameters']:,}",
        baseline=result["baseline"],
        settings=settings,
        beside=_beside(result),
        beside_columns=["theirs", "ours", *(title for title, _, _ in _shapes(result["settings"][0]))],
        facts=_facts(result),
        shares=_shares(result),
        skipped=_skipped(result),
        **_how(result),
    )


def ratios(ours: dict, theirs: dict) -> dict:
    """How many times as long theirs takes on one shape: median and range of the rounds, {ratio, ratio_min, ratio_max}.

    The ratio is that of the two speed-ups over the baseline, so it is also valid for rows of different groups.
    """
    found = [own / other for own, other in zip(ours["speedups"], theirs["speedups"], strict=True)]
    return {"ratio": median(found), "ratio_min": min(found), "ratio_max": max(found)}


def print_table(result: dict) -> None:
    """Print the main setting's table and the skipped rows on standard output."""
    setting = result["settings"][0]
    title = f"{result['shape']['name']}, {count(setting['threads'], 'thread')}, batch of {setting['batch']}: ms"
    columns, lines = speed_table(result, 0, _short)
    caption = f"medians, in brackets the speed-up over {result['baseline']} within a round"
    grid = new_table(title, *columns, caption=caption)
    for line in lines:
        grid.add_row(*line)
    show(grid)
    for row, why in _skipped(result):
        Console().print(f"skipped {row}: {why}", markup=False, highlight=False)


def speed_table(result: dict, number: int, show: Callable[[dict], str]) -> tuple[list[str], list[list[str]]]:
    """(columns, lines) of the table of setting `number`: MB, and each shape's time as `show` formats it."""
    setting = result["settings"][number]
    shapes = _shapes(setting)
    columns = ["row", "MB", *(title for title, _, _ in shapes)]
    if setting["generate"]:
        columns.append("tokens/s")
    lines = []
    for row, found in _measured(result, number):
        cells = [show(found[phase][index]) for _, phase, index in shapes]
        if setting["generate"]:
            cells.append(f"{found['generate'][0]['tokens_per_second']:.0f}")
        lines.append([row["name"], f"{row['bytes'] / 1e6:.1f}", *cells])
    return columns, lines


def _beside(result: dict) -> list[list[str]]:
    """One line per peer and `-ort` artifact of the same precision, with their ratios in the main setting."""
    shapes = _shapes(result["settings"][0])
    rows = [(row, found) for row, found in _measured(result, 0) if found[shapes[0][1]][0]["speedups"]]
    ours = [(row, found) for row, found in rows if row["ours"] and row["engine"]["kind"].endswith("-ort")]
    lines = []
    for peer, theirs in rows:
        for row, found in ours:
            if peer["ours"] or row["precision"] != peer["precision"].split()[0]:
                continue
            pairs = [ratios(found[phase][index], theirs[phase][index]) for _, phase, index in shapes]
            lines.append([peer["name"], row["name"], *(spread(pair, *pair) for pair in pairs)])
    return lines


def _facts(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["row", "MB", "bytes / parameter bytes", "load, ms", "peak MB", "max Δ logit", "same top", "with"]
    lines = []
    for row, found in _measured(result, 0):
        close = row["agreement"] or {"max_logit_difference": None, "same_top": 0, "positions": 0}
        difference, positions = close["max_logit_difference"], close["positions"]
        lines.append(
            [
                row["name"],
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['ratio']:.3f}",
                f"{found['load_ms']:.0f}",
                f"{found['peak_rss_bytes'] / 1e6:.0f}",
                "—" if difference is None else f"{difference:.2g}",
                f"{close['same_top'] * positions:.0f} of {positions}" if positions else "—",
                row["version"],
            ]
        )
    return columns, lines


def _shares(result: dict) -> tuple[list[str], list[list[str]]]:
    """(columns, lines) of the table of shares of the machine's limits, for every setting and shape that has a limit."""
    places = [
        (number, phase, index, f"{title}<br>{count(setting['threads'], 'thread')}, batch {setting['batch']}")
        for number, setting in enumerate(result["settings"])
        for title, phase, index in _shapes(setting)
        if phase != "generate"
    ]
    lines = []
    for row in result["rows"]:
        settings = row.get("settings") or []
        if row["skipped"]:
            continue
        cells = [
            "—" if settings[number]["skipped"] else f"{100 * settings[number][phase][index]['share_of_limit']:.0f}"
            for number, phase, index, _ in places
        ]
        lines.append([row["name"], *cells])
    return ["row", *(title for *_, title in places)], lines


def _shapes(setting: dict) -> list[tuple[str, str, int]]:
    """(title, phase, index within the phase) of a setting's shapes."""
    found = [(f"prefill {length}", "prefill", index) for index, length in enumerate(setting["prefill"])]
    found += [(f"decode @{position}", "decode", index) for index, position in enumerate(setting["decode"])]
    if setting["generate"]:
        prompt, tokens = setting["generate"]
        found.append((f"{prompt} → {tokens} tokens", "generate", 0))
    return found


def _measured(result: dict, number: int) -> list[tuple[dict, dict]]:
    """(row, its setting `number`) for each row that has times in this setting."""
    rows = [row for row in result["rows"] if not row["skipped"]]
    return [(row, row["settings"][number]) for row in rows if not row["settings"][number]["skipped"]]


def _skipped(result: dict) -> list[tuple[str, str]]:
    """(row, reason) for each row without any times, and (row and setting, reason) for each setting without times."""
    found = []
    for row in result["rows"]:
        if row["skipped"]:
            found.append((row["name"], row["skipped"]))
            continue
        for setting in row["settings"]:
            if setting["skipped"]:
                where = f"{count(setting['threads'], 'thread')}, batch of {setting['batch']}"
                found.append((f"{row['name']} ({where})", setting["skipped"]))
    return found


def _how(result: dict) -> dict[str, object]:
    """The template's variables that describe the measurement."""
    machine, check, busy = result["machine"], result["check"], result["others_processors"]
    main = result["settings"][0]
    prompt, tokens = main["generate"] or (0, 0)
    limits = []
    for threads in dict.fromkeys(item["threads"] for item in result["limits"]):
        found = [item for item in result["limits"] if item["threads"] == threads]
        figures = [_limit([item[key] / 1e9 for item in found], unit) for key, unit in _LIMITS.items()]
        limits.append(f"{count(threads, 'thread')}: {', '.join(figures)}")
    return {
        "steps": result["decode_steps"],
        "generate": f"{tokens} tokens after a prompt of {prompt}",
        "prompt": check["prompt"],
        "check": check["steps"],
        "first": result["rows"][0]["name"],
        "limits": "; ".join(limits),
        "held": f", on a processor held to {machine['held_to']}" if machine.get("held_to") else "",
        "machine": ", ".join(
            [
                machine["cpu"],
                *([f"held to {machine['held_to']} by lab/avx2"] if machine.get("held_to") else []),
                *([f"with {', '.join(machine['instructions'])}"] if machine.get("instructions") else []),
                f"{machine['processors']} processors",
                f"{machine['memory_bytes'] / 2**30:.0f} GiB",
            ]
        ),
        "rounds": count(result["rounds"], "round"),
        "busy": "" if busy is None else f", during which other processes kept {busy:.1f} processors busy",
        "command": shlex.join([*(_HELD if machine.get("held_to") else []), *result["command"]]),
    }


def _limit(values: list[float], unit: str) -> str:
    return f"{max(values):.0f} ({min(values):.0f}) {unit}"


def _long(item: dict) -> str:
    """The time as `5.21 [5.10–5.62]` in ms, and below it the speed-up as `3.42 [3.40–3.47] ×`, unless it is missing."""
    time = spread(item, "median_ms", "min_ms", "max_ms")
    return time if _is_baseline(item) else f"{time}<br>{spread(item, 'speedup', 'speedup_min', 'speedup_max')} ×"


def _short(item: dict) -> str:
    """The time in ms and the speed-up as `5.21 (3.42 ×)`."""
    return three_digits(item["median_ms"]) + ("" if _is_baseline(item) else f" ({three_digits(item['speedup'])} ×)")


def _is_baseline(item: dict) -> bool:
    """Whether there is no speed-up to show, because the row is the baseline or the baseline was skipped."""
    return item["speedup"] is None or item["speedup_min"] == item["speedup_max"] == 1


def spread(item: dict, middle: str, low: str, high: str) -> str:
    """Three values of `item` as `5.21 [5.10–5.62]`."""
    return f"{three_digits(item[middle])} [{three_digits(item[low])}–{three_digits(item[high])}]"


def three_digits(value: float) -> str:
    """`value` with three significant digits and at most two decimals."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
