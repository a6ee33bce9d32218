"""Makes docs/reliability.md from docs/data/reliability.json and docs/data/fuzz*.json, one section per existing file.

python -m lab.reliability_page    writes the page again from the JSON files in docs/data/

To add a section, write a function from its JSON to Markdown, and add a line to SECTIONS. Prose is in lab/templates/.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.progress import report as say
from cuantiza.core.pages import escape
from lab import DATA, DOCS, page_folder
from lab.pages import filled, write

SCHEMA = "cuantiza/reliability/1"
JSON, MARKDOWN = "reliability.json", "reliability.md"
TEMPLATES = Path(__file__).resolve().parent / "templates"


def fault_section(report: dict) -> str:
    """The section of a fault campaign (docs/data/reliability.json)."""
    rows = [
        [f"`{row['kind']}`", row["fault"], f"{row['moments']:,}", f"{row['struck']:,}", str(row["findings"])]
        for row in report["kinds"]
    ]
    totals = [f"{sum(row[key] for row in report['kinds']):,}" for key in ("moments", "struck", "findings")]
    return filled(
        TEMPLATES / "faults.md.j2",
        seed=report["seed"],
        moments=report["kills"],
        changes=report["changes"],
        cpu=report["machine"]["cpu"],
        python=report["versions"]["python"],
        onnxruntime=report["versions"]["onnxruntime"],
        minutes=max(1, round(report["seconds"] / 60)),
        rows=[*rows, ["", "all", *totals]],
        skipped=[(row["kind"], row["skipped"]) for row in report["kinds"] if row["skipped"]],
        findings=[[escape(item["moment"]), _wrong(item), f"`{item['again']}`"] for item in report["findings"]],
    )


def _wrong(finding: dict) -> str:
    """The text about what was wrong at a moment. After the cause was fixed, "fixed" is added to the JSON by hand."""
    if "fixed" in finding:
        return f"**Fixed.** {escape(finding['fixed'])}."
    return escape(" ".join(finding["wrong"][0].split())[:300])


def fuzz_section(report: dict) -> str:
    """The section of one engine's run of `python -m lab.fuzz` (docs/data/fuzz*.json)."""
    formats = report["formats"]
    rows = [
        [
            row["format"],
            f"{row['cases']:,}",
            f"{row['accepted']:,}",
            f"{row['seconds']:.0f} s",
            row["finding"] or "none",
        ]
        for row in formats
    ]
    totals = [f"{sum(row[key] for row in formats):,}" for key in ("cases", "accepted")]
    minutes, findings = sum(row["seconds"] for row in formats) / 60, sum(bool(row["finding"]) for row in formats)
    return filled(
        TEMPLATES / "fuzz.md.j2",
        engine=report["engine"],
        seed=report["seed"],
        cases=f"{report['cases']:,}",
        cpu=report["cpu"],
        versions=", ".join(f"{name} {item}" for name, item in report["versions"].items()),
        rows=[*rows, ["all", *totals, f"{minutes:.0f} min", str(findings or "none")]],
    )


# File in docs/data/ -> the function that makes a section of it; in the order of the page.
SECTIONS: dict[str, Callable[[dict], str]] = {
    JSON: fault_section,
    "fuzz.json": fuzz_section,
    "fuzz-atheris.json": fuzz_section,
}


def page(data: Path) -> str:
    """The page with a section for each JSON file in the folder `data`. Raises UserError if a file is broken."""
    sections = []
    for name, section in SECTIONS.items():
        path = data / name
        if not path.is_file():
            continue
        try:
            sections.append(section(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is broken ({error!r}); make it again") from None
    return filled(TEMPLATES / "reliability.md.j2", sections=sections)


def publish(report: dict, output: Path) -> None:
    """Write a campaign's JSON to `output`. If that is one of SECTIONS, write the page as well (`page_folder`)."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write(output, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if output.name in SECTIONS:
        write(page_folder(output) / MARKDOWN, page(output.parent))


def main() -> int:
    write(DOCS / MARKDOWN, page(DATA))
    say(f"reliability  {DOCS / MARKDOWN}: written")
    return 0


if __name__ == "__main__":
    run(main)
