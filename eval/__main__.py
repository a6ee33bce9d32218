"""`python -m eval`: artifacts -> reports/<model>/report.json, report.md and report.html, and the table."""

from __future__ import annotations

import argparse
import hashlib
import sys
from importlib import import_module
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.checkpoints import checkpoint_digest, model_name, resolve_model
from cuantiza.core.inputs.corpus import Split, add_arguments, load_splits, source_of
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.threads import check_threads, default_threads
from cuantiza.core.store import artifact, digests, folders
from cuantiza.eval.measure.engines import Subject
from cuantiza.eval.report.schema import Inputs, Report

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
LANGUAGES = ("en", "es")


def main() -> int:
    if sys.argv[1:2] == ["compare"]:
        # By name: a report depends on the code that this file imports, and not on the comparison's.
        return import_module("cuantiza.eval.compare.cli").main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    parser.add_argument(
        "--model",
        default="models/es-mini",
        help="the model that was exported: folder or hub id (also the PyTorch rows)",
    )
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="folder of the artifacts")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["fp32", "int8-dynamic", "int8-static"],
        metavar="NAME",
        help="artifacts to measure; the first is the baseline",
    )
    parser.add_argument(
        "--onnx",
        nargs="*",
        type=Path,
        default=[],
        metavar="PATH",
        help="further ONNX files, or folders with a model.onnx, of the same contract",
    )
    parser.add_argument("--without-torch", action="store_true", help="leave out the PyTorch rows")
    parser.add_argument(
        "--tokens", type=int, default=12288, help="score whole documents until this many tokens (default 12288)"
    )
    parser.add_argument(
        "--window", type=int, default=512, help="longest context of a scored token, in tokens (default 512)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of latency (default 3)")
    parser.add_argument(
        "--threads", type=int, default=default_threads(), help="threads of every runtime (default: all processors)"
    )
    parser.add_argument("--output", type=Path, default=Path("reports"), help="folder of the reports")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of the pages (default en)")
    add_arguments(parser)
    args = parser.parse_args()
    check_threads(args.threads)
    for option, least in (("tokens", 2), ("window", 2), ("rounds", 1)):
        if getattr(args, option) < least:
            raise UserError(f"--{option} {getattr(args, option)}: give a number from {least} on")
    name = model_name(args.model)
    if args.artifacts.resolve() == args.output.resolve():
        raise UserError(f"--output {args.output}: is the folder of the artifacts; choose another one (REPORTS=)")
    if not (args.artifacts / name).is_dir():
        raise UserError(f"{args.artifacts / name}: is not there; run `make export quantize` first")
    with folders.locked(args.artifacts / name), folders.locked(args.output / name):
        _evaluate(args, args.artifacts / name, args.output / name)
    return 0


def _evaluate(args: argparse.Namespace, artifacts: Path, output: Path) -> None:
    published = [artifact.open_artifact(artifacts / recipe) for recipe in dict.fromkeys(args.recipes)]
    subjects = [Subject(item.manifest.name, "onnx", item.model) for item in published] + [
        _foreign(path) for path in args.onnx
    ]
    test = load_splits(source_of(args))[1]
    inputs = _inputs(args, published, test)
    report = _measured(output, inputs)
    if report is None:
        from cuantiza.eval.measure.report import measure

        if not args.without_torch:
            folder = _same_checkpoint(args.model, published[0])
            subjects += [Subject("torch-fp32", "torch", folder), Subject("torch-dynamic", "torch-dynamic", folder)]
        settings = {"tokens": args.tokens, "window": args.window, "rounds": args.rounds, "threads": args.threads}
        report = measure(subjects, artifacts / args.recipes[0], test, args.corpus, inputs, **settings)
    written = _publish(report, output, args.language)
    say(f"eval      {output / MARKDOWN}: {'written' if written else 'up to date'}")
    from cuantiza.eval.report.markdown import print_table

    print_table(report, args.language)


def _same_checkpoint(spec: str, exported: artifact.Artifact) -> Path:
    """Folder of the checkpoint for the PyTorch rows. Raises UserError where it is not the one that was exported."""
    folder = resolve_model(spec).folder
    made_from = exported.manifest.inputs.get("checkpoint")  # only an fp32 artifact knows
    if made_from not in (None, checkpoint_digest(folder)):
        raise UserError(f"MODEL={spec}: has changed since {exported.path} was exported; run `make export` again")
    return folder


def _foreign(path: Path) -> Subject:
    """A subject of an ONNX file, or of a folder that holds one. Raises UserError where there is none."""
    files = [path, path / "model.onnx", path / "onnx" / "model.onnx"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"--onnx {path}: is neither an ONNX file nor a folder with a model.onnx")
    return Subject(path.stem if path.is_file() else path.name, "onnx", file)


def _foreign_digest(path: Path) -> str:
    """Of everything that inference with the files at `path` reads. Raises UserError where the ONNX file is not sound."""
    from cuantiza.core.machine.process import isolated
    from cuantiza.core.onnx import file as onnx_file
    from cuantiza.eval.measure.size import inference_files

    model = _foreign(path).path
    isolated(onnx_file.check, model)
    return digests.digest([[file.name, digests.sha256_file(file)] for file in inference_files(model)])


def _inputs(args: argparse.Namespace, published: list[artifact.Artifact], test: Split) -> Inputs:
    """All that a report depends on, the machine and the settings of the measurement included."""
    from cuantiza.core.machine.hardware import machine, software

    return Inputs(
        artifacts=tuple((item.manifest.name, item.digest) for item in published),  # in order: the first is the baseline
        onnx=tuple((str(path), _foreign_digest(path)) for path in args.onnx),
        torch=not args.without_torch,
        corpus=test.sha256,
        tokens=args.tokens,
        window=args.window,
        rounds=args.rounds,
        machine=machine(args.threads),
        code=digests.code_digest("cuantiza.eval.measure.report"),
        versions=software(),
    )


def _measured(output: Path, inputs: Inputs) -> Report | None:
    """The report that is there, where it is of these inputs."""
    try:
        done = Report.from_json((output / JSON).read_bytes())
    except (OSError, ValueError):
        return None
    return done if done.inputs == inputs and done.sha256 == done.digest() else None


def _publish(report: Report, output: Path, language: str) -> bool:
    """Write the report and its pages, renamed into place, where they differ from what is there; whether they did.

    report.json comes last and names the pages that belong to it.
    """
    from cuantiza.eval.report.html import render
    from cuantiza.eval.report.markdown import markdown

    pages = {MARKDOWN: markdown(report, language), HTML: render(report, language)}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in pages.items()}
    pages[JSON] = report.sealed(hashes).to_json()
    return folders.publish_texts(output, pages)


if __name__ == "__main__":
    run(main)
