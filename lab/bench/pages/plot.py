"""Draws a result: size, decode and prefill of every row, ours and the peers'."""

from __future__ import annotations

from pathlib import Path

_INCHES_PER_ROW, _INCHES_PER_PANEL = 0.26, 3.0
_OURS, _PEERS, _SPREAD = "#2f6db3", "#b9b9b9", "#444444"


def draw(result: dict, path: Path) -> None:
    """Draw the main setting as bars with their values, one panel per measure. Lines show the range of round medians."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if not row["skipped"] and not row["settings"][0]["skipped"]]
    panels = _panels(result)
    # The extra width is for the rows' names, left of the first panel.
    size = (2.5 + _INCHES_PER_PANEL * len(panels), 1.3 + _INCHES_PER_ROW * len(rows))
    with matplotlib.rc_context({"svg.hashsalt": "cuantiza", "svg.fonttype": "none"}):
        figure = Figure(size, layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, values) in zip(axes, panels, strict=True):
            _bars(axis, title, [values(row) for row in rows], [row["ours"] for row in rows])
        axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes[0].invert_yaxis()
        main = result["settings"][0]
        threads = f"{main['threads']} thread" + ("" if main["threads"] == 1 else "s")
        title = f"{result['shape']['name']}, {threads}, batch of {main['batch']}: less is better; blue: ours"
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, metadata={"Date": None})


def _panels(result: dict) -> list:
    """(title, function from a row to (value, least, largest)) for size, first and last decode, and last prefill."""
    main = result["settings"][0]

    def times(phase: str, index: int):
        def values(row: dict) -> tuple[float, float, float]:
            item = row["settings"][0][phase][index]
            return item["median_ms"], item["min_ms"], item["max_ms"]

        return values

    panels: list = [("files, MB", lambda row: (row["bytes"] / 1e6,) * 3)]
    for index in dict.fromkeys((0, len(main["decode"]) - 1)) if main["decode"] else ():
        panels.append((f"decode @{main['decode'][index]}, ms", times("decode", index)))
    if main["prefill"]:
        panels.append((f"prefill {main['prefill'][-1]}, ms", times("prefill", len(main["prefill"]) - 1)))
    return panels


def _bars(axis, title: str, values: list[tuple[float, float, float]], ours: list[bool]) -> None:
    places = range(len(values))
    middle = [value for value, _, _ in values]
    spread = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
    colours = [_OURS if own else _PEERS for own in ours]
    axis.barh(places, middle, color=colours)
    if any(map(any, spread)):
        axis.errorbar(middle, places, xerr=spread, fmt="none", ecolor=_SPREAD, elinewidth=1, capsize=2)
    largest = max(high for _, _, high in values)
    for place, (value, _, high) in zip(places, values, strict=True):
        digits = 2 if value < 10 else 1 if value < 100 else 0
        axis.text(high + 0.02 * largest, place, f"{value:.{digits}f}", va="center", fontsize=8)
    axis.set_xlim(0, 1.2 * largest)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8, left=False)
    axis.spines[["top", "right", "left"]].set_visible(False)
