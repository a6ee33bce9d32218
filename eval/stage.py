"""The eval stage: measure artifacts against a baseline, unless their report is up to date, and write its pages."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import checkpoint_digest, resolve_model
from cuantiza.core.inputs.corpus import Source, Split, load_test, scored
from cuantiza.core.inputs.defaults import CORPUS, POSITIONS, ROUNDS, TOKENS, WINDOW
from cuantiza.core.machine.hardware import check_threads, default_threads
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.progress import working
from cuantiza.core.store import artifact, digests, folders
from cuantiza.core.store.artifact import Artifact
from cuantiza.core.store.records import read_record, write_record
from cuantiza.eval.kept import Kept
from cuantiza.eval.report.schema import PAPER_NAMES, Inputs, LeftOut, Machine, PaperName, Report

# What measures and what renders is imported where it is needed: a run that finds everything up to date does neither.
if TYPE_CHECKING:
    from cuantiza.eval.measure.engines import Subject

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
LANGUAGES = ("en", "es")


@dataclass(frozen=True)
class Settings:
    """How artifacts are measured.

    tokens: whole documents are scored until this many tokens; window: the longest context of a scored token, in tokens;
    rounds: interleaved rounds of latency; threads: threads of every runtime; positions: latency is measured up to so
    many; protocols: further protocols, by name.
    """

    tokens: int
    window: int
    rounds: int
    threads: int
    positions: int
    protocols: tuple[PaperName, ...] = ()

    def __post_init__(self) -> None:
        check_threads(self.threads)
        for name, least in (("tokens", 2), ("window", 2), ("rounds", 1), ("positions", 2)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: give a number from {least} on")
        if unknown := [name for name in self.protocols if name not in PAPER_NAMES]:
            raise UserError(f"--protocols {unknown[0]}: is none; choose from {', '.join(PAPER_NAMES)}")


def evaluate(
    artifacts: str | Path | Artifact | Sequence[str | Path | Artifact],
    *,
    corpus: str | Path | Source = CORPUS,
    tokens: int = TOKENS,
    window: int = WINDOW,
    rounds: int = ROUNDS,
    threads: int | None = None,
    positions: int = POSITIONS,
    protocols: PaperName | Sequence[PaperName] = (),
    onnx: str | Path | Sequence[str | Path] = (),
    checkpoint: str | Path | None = None,
    output: str | Path | None = None,
    language: str = "en",
) -> Report:
    """Measure perplexity, KL divergence, size, memory and latency of `artifacts`; the first is the baseline.

    tokens: documents of the test split are scored until this many tokens, whole but for a long last one. window: the
    longest context of a scored token, in tokens. rounds: interleaved rounds of latency. threads: threads of every
    runtime (all processors). positions: latency is measured up to so many, or to the model's last. protocols: names in
    PAPER_NAMES, by which perplexity is measured too. onnx: further ONNX files, or folders with a model.onnx, of the same
    interface. checkpoint:
    the model that the baseline was exported from; if it is given, PyTorch is measured too. output: a folder for the
    report and its pages in `language`; if an up-to-date report is there, it is read and nothing is measured. One
    artifact, protocol or ONNX file need not stand in a list.

    A file that cannot be measured does not stop the others: the report's `left_out` names it and says why. Raises
    UserError if the baseline cannot be measured, if an artifact is broken, two have one name, a number is out of range or
    the text is too short.
    """
    threads = default_threads() if threads is None else threads
    settings = Settings(tokens, window, rounds, threads, positions, tuple(dict.fromkeys(_several(protocols))))
    corpus = corpus if isinstance(corpus, Source) else Source(str(corpus))
    output = None if output is None else Path(output)
    paths = [path.path if isinstance(path, Artifact) else Path(path) for path in _several(artifacts)]
    once = {path.resolve(): path for path in reversed(paths)}
    if not once:
        raise UserError("--recipes: names no artifact; the first one is the baseline of the others")
    with ExitStack() as held:
        held.enter_context(folders.held(*(path.parent for path in paths)))  # a stage that writes there ends first
        published = _open([once[path] for path in dict.fromkeys(map(Path.resolve, paths))])
        if output is not None:
            held.enter_context(folders.locked(output))
        held.enter_context(working("eval"))
        return _evaluate(published, corpus, settings, [*map(Path, _several(onnx))], checkpoint, output, language)


def _open(paths: list[Path]) -> list[Artifact]:
    """Open artifacts to compare. Raises UserError where two have one name, or they were not made from one fp32 artifact."""
    published = [artifact.open_artifact(path, digests.sha256_known) for path in paths]
    first, named = published[0], {item.manifest.name: item for item in reversed(published)}
    for item in published:
        if (same := named[item.manifest.name]) is not item:
            raise UserError(
                f"{same.path} and {item.path}: both are artifacts named {item.manifest.name!r} by their manifests; "
                "compare folders of artifacts by `cuantiza compare`"
            )
        if _fp32_of(item) != _fp32_of(first):
            raise UserError(
                f"{item.path}: was not made from the same fp32 artifact as {first.path}; run `make quantize` or "
                "`cuantiza quantize` again"
            )
    return published


def _fp32_of(item: Artifact) -> str:
    """The digest of the fp32 artifact that `item` was made from, or its own."""
    return item.manifest.parent or item.digest


def _several(given: str | Path | Artifact | Sequence[Any]) -> Sequence[Any]:
    """Return what was given as a list. A text would be one of its letters."""
    return [given] if isinstance(given, str | Path | Artifact) else given


def _evaluate(
    published: list[Artifact],
    corpus: Source,
    settings: Settings,
    onnx: list[Path],
    checkpoint: str | Path | None,
    output: Path | None,
    language: str,
) -> Report:
    foreign = {str(path): _foreign(path) for path in onnx}
    test = load_test(corpus)
    broken = {path: reason for path, subject in foreign.items() if (reason := _broken(subject))}
    digests_of = {path: _foreign_digest(subject, path not in broken) for path, subject in foreign.items()}
    inputs = _inputs(published, test, settings, digests_of, checkpoint is not None)
    report = None if output is None else _measured(output, inputs)
    if report is None:
        from cuantiza.eval.measure.engines import Subject
        from cuantiza.eval.measure.report import measure

        for item in published:
            artifact.verify(item)
        _tell([*broken.values()])
        subjects = [Subject(item.manifest.name, "onnx", item.model) for item in published]
        subjects += [subject for path, subject in foreign.items() if path not in broken]
        if checkpoint is not None:
            folder = _same_checkpoint(str(checkpoint), published[0])
            subjects += [Subject("torch-fp32", "torch", folder), Subject("torch-dynamic", "torch-dynamic", folder)]
        identities = {item.name: published[0].digest for item in subjects}  # PyTorch's rows: what was exported
        identities |= {foreign[path].name: digest for path, digest in digests_of.items()}
        identities |= {item.manifest.name: item.digest for item in published}
        kept = Kept(output, inputs, identities)
        known = kept.read()
        if known:
            say(f"quality   {' '.join(known)}: kept from an earlier run")
        report = measure(
            published[0].manifest.model,
            subjects,
            published[0].path,
            test,
            scored(corpus).spec,
            inputs,
            tokens=settings.tokens,
            window=settings.window,
            rounds=settings.rounds,
            threads=settings.threads,
            positions=settings.positions,
            left_out=[*broken.values()],
            by=scored(corpus).by,
            joined=scored(corpus).join,
            papers=settings.protocols,
            known=known,
            keep=kept.write,
        )
    else:
        _tell(report.left_out)
    if output is not None:
        written = _publish(report, output, language)
        say(f"eval      {output / MARKDOWN}: {'written' if written else 'up to date'}")
    return report


def _tell(left_out: Sequence[LeftOut]) -> None:
    for item in left_out:
        say(f"left out  {item.name}: {item.reason}")


def _same_checkpoint(spec: str, exported: Artifact) -> Path:
    """Find the checkpoint's folder for the PyTorch rows. Raises UserError if it is not the one that was exported."""
    folder = resolve_model(spec).folder
    if _made_from(exported) not in (None, checkpoint_digest(folder)):
        raise UserError(
            f"MODEL={spec}: has changed since {exported.path} was exported; run `make export` or `cuantiza export` again"
        )
    return folder


def _made_from(exported: Artifact) -> str | None:
    """The digest of the checkpoint that `exported` was made from. Only an fp32 artifact has it: this one, or that beside it."""
    if exported.manifest.parent is not None:
        try:
            beside = artifact.open_artifact(exported.path.with_name("fp32"), digests.sha256_known)
        except UserError:
            return None
        if beside.digest != exported.manifest.parent:
            return None
        exported = beside
    found: str | None = exported.manifest.inputs.get("checkpoint")
    return found


def _foreign(path: Path) -> Subject:
    """Make the subject of an ONNX file, or of a folder that holds one. Raises UserError if there is none."""
    from cuantiza.eval.measure.engines import Subject

    # "." has no name of its own. A link of the hub's cache keeps its name, which resolving it would lose.
    path = Path(os.path.normpath(path.absolute()))
    files = [path, path / "model.onnx", path / "onnx" / "model.onnx"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"--onnx {path}: is neither an ONNX file nor a folder with a model.onnx")
    return Subject(path.stem if path.is_file() else path.name, "onnx", file)


def _broken(subject: Subject) -> LeftOut | None:
    """Why an ONNX file from elsewhere is not even loaded, or None."""
    from cuantiza.core.machine.process import ChildError, isolated
    from cuantiza.core.onnx import file as onnx_file

    try:
        isolated(onnx_file.check, subject.path, label=subject.name)
    except ChildError as error:
        return LeftOut(name=subject.name, kind="onnx", reason=error.reason)
    return None


def _foreign_digest(subject: Subject, whole: bool) -> str:
    """Digest everything that inference with an ONNX file from elsewhere reads; of a broken one, that file alone."""
    from cuantiza.eval.measure.size import inference_files

    files = inference_files(subject.path) if whole else [subject.path]
    return digests.digest([[file.name, digests.sha256_file(file)] for file in files])


def _inputs(published: list[Artifact], test: Split, settings: Settings, onnx: dict[str, str], torch: bool) -> Inputs:
    """Collect everything that a report depends on, including the machine and the settings of the measurement."""
    from cuantiza.core.machine.hardware import machine, software
    from cuantiza.core.machine.instructions import instruction_sets

    return Inputs(
        artifacts=tuple((item.manifest.name, item.digest) for item in published),  # in order: the first is the baseline
        onnx=tuple(onnx.items()),
        torch=torch,
        corpus=test.sha256,
        tokens=settings.tokens,
        window=settings.window,
        rounds=settings.rounds,
        protocols=settings.protocols,
        positions=settings.positions,
        machine=Machine(**machine(settings.threads), instructions=instruction_sets()),
        code=digests.code_digest("cuantiza.eval.measure.report"),
        versions=software(),
    )


def _measured(output: Path, inputs: Inputs) -> Report | None:
    """Read the report in `output`; None if there is none, if it has other inputs or is damaged, or if it lacks a row.

    A row that failed may succeed the next time, for example with more memory.
    """
    try:
        done = Report.from_json((output / JSON).read_bytes())
    except (OSError, ValueError):
        return None
    whole = all(item.expected for item in done.left_out)
    return done if whole and done.inputs == inputs and done.sha256 == done.digest() else None


def _publish(report: Report, output: Path, language: str) -> bool:
    """Write the report and its pages, renamed into place, unless the same are there already.

    report.json comes last and has the sha256 of the pages that belong to it. Returns whether anything was written.
    """
    made_of = digests.digest([report.digest(), language, _renderer()])
    hashes = read_record("pages", made_of)
    if hashes is not None and _is_there(report.sealed(hashes), output):
        return False
    from cuantiza.eval.report.html import render
    from cuantiza.eval.report.markdown import markdown

    pages = {MARKDOWN: markdown(report, language), HTML: render(report, language)}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in pages.items()}
    pages[JSON] = report.sealed(hashes).to_json()
    written = folders.publish_texts(output, pages)
    write_record("pages", made_of, hashes)
    return written


def _renderer() -> list[object]:
    """What turns a report into pages: our code, its templates and the library that fills them in."""
    templates = sorted((Path(__file__).parent / "report" / "templates").iterdir())
    return [
        digests.code_digest("cuantiza.eval.report.html", "cuantiza.eval.report.markdown"),
        [[file.name, digests.sha256_file(file)] for file in templates],
        digests.versions("jinja2", "markupsafe"),
    ]


def _is_there(report: Report, output: Path) -> bool:
    """Whether `output` holds the sealed `report` and the pages that belong to it."""
    try:
        return (output / JSON).read_bytes() == report.to_json().encode() and all(
            digests.sha256_file(output / name) == sha256 for name, sha256 in report.pages.items()
        )
    except OSError:
        return False
