"""docs/reliability.json -> docs/reliability.md, one section for each JSON file that is there.

python -m lab.reliability_page    the page anew, from the JSON files in docs/

A further section is a function from its JSON to Markdown, and a line in SECTIONS.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store import folders
from lab import DOCS

SCHEMA = "cuantiza/reliability/1"

JSON, MARKDOWN = "reliability.json", "reliability.md"

_INTRO = """\
# Reliability

What was done to the pipeline to break it, how often, what was found, and what was mended. Each section is made of its
JSON file by `python -m lab.reliability_page`, which reprints this page.
"""

_FAULTS = """\
## Faults

`make torture` runs `make export quantize eval` again and again, harms it at a random moment, and looks at what is left.
Right after the fault, every artifact that exists must open (size and sha256 of each file by the manifest, and the
manifest by its own) and be, byte for byte, one that an undisturbed run makes; after a signal or an error there must
be no temporary folder, no process left running and no traceback. Then one undisturbed make must end with status 0,
wait for no lock, and leave the bytes of a run that nothing ever disturbed; of a report, everything but what it timed.

Runs begin from nothing, and over finished artifacts with the opset changed (everything is rebuilt) or the
corpus changed (all that is calibrated is). Most moments take a random GPT-2 of 2 layers, every eighth kill and interrupt the
embedded model. Half of the moments are anywhere in the time that a run takes; half are at one of the changes that it makes below its
output folders (a file opened for writing, a folder made, a rename, a removal: {changes}), where those near
a rename are chosen four times as often. These are met exactly: an audit hook of Python in every process of the run
([lab/faults/hook](../lab/faults/hook/sitecustomize.py)) sends the signal, or fills the disk, before the change happens or some milliseconds later.

`python -m lab.faults --seed {seed} --moments {moments}` on {cpu}, Linux, Python {python}, onnxruntime {onnxruntime}, in {minutes} minutes.
"""

_COLUMNS = """\
*Struck*: the moment came while the run was at work; a moment drawn near the end may come after it, and a disk that is full
may be in nobody's way. A full disk is a real one (a file system in memory, filled up to the last block or inode); files
too large are the kernel's own refusal under `ulimit -f`. Without root, full disks and read-only mounts are left out.
"""


@dataclass(frozen=True)
class Mended:
    """What was found in making and running campaigns, how it was mended, and the test that holds it."""

    found: str
    mended: str
    test: str


MENDED = (
    Mended(
        "A bit flipped in a manifest was not noticed where it left valid JSON (a model's name, a parity)",
        "The manifest has a sha256 of its own, and must be written as we write it, to the last byte",
        "cuantiza/core/test_artifact.py::test_every_flipped_bit_of_the_manifest_is_noticed",
    ),
    Mended(
        "SIGINT or SIGTERM between the two renames that replace an artifact lost it, and left a temporary folder",
        "The old one goes back",
        "cuantiza/core/test_artifact.py::test_an_error_while_replacing_leaves_the_old_one",
    ),
    Mended(
        "A second Ctrl-C broke off the removal of temporary folders, as did a first one that fell into it",
        "Further signals are ignored while a stage unwinds, and who holds the lock sweeps on its way out",
        "lab/test_faults.py::test_a_second_signal_does_not_break_off_the_cleaning",
    ),
    Mended(
        "Ctrl-C showed a traceback of a child process that was still importing its modules",
        "Children start with SIGINT blocked; their parent ends them",
        "lab/test_faults.py::test_ctrl_c_while_a_child_starts",
    ),
    Mended(
        "Ctrl-C in the first 0.3 s of a stage, while it imports its modules, showed a traceback",
        "Until a stage can unwind, SIGINT ends it as SIGTERM does",
        "lab/test_faults.py::test_ctrl_c_while_a_stage_loads_its_modules",
    ),
    Mended(
        "A signal after a stage's last line, while Python joins threads, showed a traceback of Python's own",
        "What is published is whole by then: the signal ends the process as if nobody handled it",
        "lab/test_faults.py::test_a_signal_while_the_interpreter_ends_says_nothing",
    ),
    Mended(
        "The campaign expected what is not due: a line in a log that may hold 0 bytes (size-limit/9), and a refusal where "
        "all is up to date and nothing has to be written (read-only/5)",
        "A limit leaves room for the line, and what is up to date may say so",
        "lab/test_faults.py::test_a_moment",
    ),
    Mended(
        "A file beyond what `ulimit -f` or the file system allows was a traceback, as was an error of the disk itself",
        "One line, status 2",
        "lab/test_faults.py::test_a_file_too_large",
    ),
    Mended(
        "A figure that changed in report.json was shown as measured by every further run",
        "The report has a sha256 of what it measured, and one of each page",
        "lab/test_faults.py::test_a_report_with_another_figure_is_measured_again",
    ),
    Mended(
        "A full disk was told without saying where",
        "The line names the artifact that could not be written",
        "lab/test_faults.py::test_a_write_that_fails_names_the_artifact",
    ),
)


_REFUSED = "One line"
MENDED_INPUT = (
    Mended(
        "A config.json of 2,147,483,647 layers: export made a graph's inputs for every one of them",
        "More layers than the checkpoint has tensors for are refused before anything is built",
        "hostile/two-billion-layers.config.json",
    ),
    Mended("A safetensors index nested too deep for its parser", _REFUSED, "hostile/deep.safetensors.index.json"),
    Mended("A .bin that asks for a tensor of a terabyte", _REFUSED, "hostile/terabyte.bin"),
    Mended("A .bin that claims to be one of two disks", _REFUSED, "hostile/two-disks.bin"),
    Mended(
        "A compressed .bin that unpacks to far more than its size: torch unpacked it first, which took long",
        "Members that unpack to more than the file are refused before torch reads it: torch.save never compresses",
        "hostile/bomb.bin",
    ),
    Mended(
        "A .bin with a tensor that requires grad",
        "It is read: its values are fine",
        "lab/test_fuzz.py::test_a_tensor_that_requires_grad_is_a_tensor",
    ),
    Mended(
        "An ONNX node with fewer inputs than its operator has",
        "A graph that is not ours passes ONNX's checker first",
        "hostile/few-inputs.onnx",
    ),
    Mended(
        "A tokenizer.json whose unknown token is in no vocabulary: an error only with the first text that needs it",
        "One line where it is loaded",
        "hostile/unknown-token.tokenizer.json",
    ),
    Mended("A tokenizer.json that makes the Rust library panic", _REFUSED, "hostile/panic.tokenizer.json"),
    Mended("A column of a .parquet whose name is no UTF-8", _REFUSED, "hostile/bad-name.parquet"),
)


def fault_section(report: dict) -> str:
    """The section of a fault campaign (docs/reliability.json)."""
    intro = _FAULTS.format(
        seed=report["seed"],
        moments=report["kills"],
        changes=f"{report['changes']['from_nothing']} from nothing, {report['changes']['over_finished']} over finished artifacts",
        cpu=report["machine"]["cpu"],
        python=report["versions"]["python"],
        onnxruntime=report["versions"]["onnxruntime"],
        minutes=max(1, round(report["seconds"] / 60)),
    )
    rows = [
        (f"`{row['kind']}`", row["fault"], f"{row['moments']:,}", f"{row['struck']:,}", str(row["findings"]))
        for row in report["kinds"]
    ]
    totals = [f"{sum(row[key] for row in report['kinds']):,}" for key in ("moments", "struck", "findings")]
    skipped = [f"`{row['kind']}` could not be tried: {row['skipped']}.\n" for row in report["kinds"] if row["skipped"]]
    parts = [
        wrapped(intro),
        table(("kind", "fault", "moments", "struck", "findings"), [*rows, ("", "all", *totals)], left=2),
        wrapped(_COLUMNS),
        *skipped,
        _findings(report["findings"]),
        "### Found on the way, and mended\n",
        mended_table(MENDED),
    ]
    return "\n".join(parts)


_FUZZ = {
    "hypothesis": """\
## Hostile input

`python -m lab.fuzz --seed {seed} --json docs/fuzz.json` breaks a valid file of every format {cases} times and reads each as the
stage that takes it does: fields of JSON and of protobufs replaced by other types, huge, negative and nested values; paths that
lead out; frames that lie of their lengths; pickles that call functions; archives that unpack to 300 MB; cyclic graphs; bytes flipped, cut, repeated.
A reader may take the file, or refuse it with one line. A finding is anything else: a traceback, more than 10 s, more than 2 GB, a file
opened, written, renamed or removed outside of what it reads, a program started, a connection made, a process that dies.
""",
    "atheris": """\
### The same by coverage

`python -m lab.fuzz --engine atheris --json docs/fuzz-atheris.json`: libFuzzer changes bytes of the same files, and keeps what reaches new code of
the readers. It reads its first inputs on top of the number that is asked for.
""",
}


def fuzz_section(report: dict) -> str:
    """The section of one engine's run of `python -m lab.fuzz` (docs/fuzz*.json)."""
    rows = [
        (
            row["format"],
            f"{row['cases']:,}",
            f"{row['accepted']:,}",
            f"{row['seconds']:.0f} s",
            row["finding"] or "none",
        )
        for row in report["formats"]
    ]
    findings = sum(bool(row["finding"]) for row in report["formats"])
    seconds = sum(row["seconds"] for row in report["formats"])
    totals = ("all", *(f"{sum(row[key] for row in report['formats']):,}" for key in ("cases", "accepted")))
    engine, versions = report["engine"], ", ".join(f"{name} {item}" for name, item in report["versions"].items())
    parts = [
        wrapped(_FUZZ[engine].format(seed=report["seed"], cases=f"{report['cases']:,}")),
        table(
            ("format", "cases", "read", "time", "finding"),
            [*rows, (*totals, f"{seconds / 60:.0f} min", str(findings or "none"))],
        ),
        wrapped(f"On {report['cpu']}, {versions}."),
    ]
    if engine == "hypothesis":
        parts += [
            "### Found by all runs, and mended\n",
            mended_table(MENDED_INPUT),
            wrapped(
                "A format ends at its first finding. Each of these was a traceback, but for the first, which did not end, and the archive that unpacks. `make test` reads "
                "the files of [tests/hostile](../tests/hostile) again, and 100 new cases of every format."
            ),
        ]
    return "\n".join(parts)


def mended_table(items: tuple[Mended, ...]) -> str:
    return table(
        ("found", "mended", "held by, in tests/"),
        [(item.found, item.mended, f"`{item.test}`") for item in items],
        left=3,
    )


def _findings(findings: list[dict]) -> str:
    if not findings:
        return "No moment of this campaign had a finding.\n"
    lines = ["### Findings\n"]
    for item in findings:
        lines += [f"- {item['moment']}: {' '.join(item['wrong'][0].split())[:300]}", f"  `{item['again']}`"]
    return "\n".join(lines) + "\n"


# File in docs/ -> the function that makes a section of it; in the order of the page.
SECTIONS: dict[str, Callable[[dict], str]] = {
    JSON: fault_section,
    "fuzz.json": fuzz_section,
    "fuzz-atheris.json": fuzz_section,
}


def page(docs: Path) -> str:
    """The page, of those of SECTIONS that are in folder `docs`. Raises UserError where one of them is broken."""
    parts = [_INTRO]
    for name, section in SECTIONS.items():
        path = docs / name
        if not path.is_file():
            continue
        try:
            parts.append(section(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is broken ({error!r}); make it anew") from None
    return "\n".join(parts)


def publish(report: dict, output: Path) -> None:
    """Write a campaign's JSON as `output`, and, where it is one of SECTIONS, the page beside it; both whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write(output, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if output.name in SECTIONS:
        write(output.parent / MARKDOWN, page(output.parent))


def write(path: Path, text: str) -> None:
    """`text` as file `path`, renamed into place."""
    with folders.staging(path) as work:
        (work / path.name).write_text(text, encoding="utf-8")
        (work / path.name).replace(path)


def wrapped(text: str) -> str:
    """Lines of at most 120 characters; headings stay as they are."""
    paragraphs = text.rstrip().split("\n\n")
    fill = lambda part: textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False)  # noqa: E731
    return "\n\n".join(part if part.startswith("#") else fill(part) for part in paragraphs) + "\n"


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are aligned to the left, the others to the right."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (columns, *rows)]
    lines.insert(1, "|" + "---|" * left + "---:|" * (len(columns) - left))
    return "\n".join(lines) + "\n"


def main() -> int:
    write(DOCS / MARKDOWN, page(DOCS))
    say(f"reliability  {DOCS / MARKDOWN}: written")
    return 0


if __name__ == "__main__":
    run(main)
