"""`python -m eval`: artifacts -> reports/<model>/report.json and report.md, and the table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from core import artifact
from core.corpus import Split, add_arguments, load_splits, source_of
from core.errors import UserError, run
from core.hub import checkpoint_digest, model_name, resolve_model
from core.progress import report as say
from core.threads import default_threads
from eval.subject import Subject

JSON, MARKDOWN = "report.json", "report.md"


def main() -> int:
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
    add_arguments(parser)
    args = parser.parse_args()
    for option, least in (("tokens", 2), ("window", 2), ("rounds", 1), ("threads", 1)):
        if getattr(args, option) < least:
            raise UserError(f"--{option} {getattr(args, option)}: give a number from {least} on")
    name = model_name(args.model)
    if args.artifacts.resolve() == args.output.resolve():
        raise UserError(f"--output {args.output}: is the folder of the artifacts; choose another one (REPORTS=)")
    if not (args.artifacts / name).is_dir():
        raise UserError(f"{args.artifacts / name}: is not there; run `make export quantize` first")
    with artifact.locked(args.artifacts / name), artifact.locked(args.output / name):
        _evaluate(args, args.artifacts / name, args.output / name)
    return 0


def _evaluate(args: argparse.Namespace, artifacts: Path, output: Path) -> None:
    published = [artifact.open_artifact(artifacts / recipe) for recipe in dict.fromkeys(args.recipes)]
    subjects = [Subject(item.manifest.name, "onnx", item.model) for item in published] + [
        _foreign(path) for path in args.onnx
    ]
    test = load_splits(source_of(args))[1]
    inputs = _inputs(args, published, test)
    if _up_to_date(output, inputs):
        say(f"eval      {output / MARKDOWN}: up to date")
    else:
        if not args.without_torch:
            folder = _same_checkpoint(args.model, published[0])
            subjects += [Subject("torch-fp32", "torch", folder), Subject("torch-dynamic", "torch-dynamic", folder)]
        _publish(_measure(args, subjects, artifacts / args.recipes[0], test, inputs), output)
        say(f"eval      {output / MARKDOWN}: written")
    from eval.report import print_table

    print_table(json.loads((output / JSON).read_text(encoding="utf-8")))


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
    from core import onnx_file
    from core.process import isolated
    from eval.size import inference_files

    model = _foreign(path).path
    isolated(onnx_file.check, model)
    return artifact.digest([[file.name, artifact.sha256_file(file)] for file in inference_files(model)])


def _inputs(args: argparse.Namespace, published: list[artifact.Artifact], test: Split) -> dict:
    """All that a report depends on, the machine and the settings of the measurement included."""
    from eval.machine import machine, software

    return {
        "artifacts": [[item.manifest.name, item.digest] for item in published],  # in order: the first is the baseline
        "onnx": [[str(path), _foreign_digest(path)] for path in args.onnx],
        "torch": not args.without_torch,
        "corpus": test.sha256,
        "tokens": args.tokens,
        "window": args.window,
        "rounds": args.rounds,
        "machine": machine(args.threads),
        "code": artifact.code_digest("eval.__main__"),
        "versions": software(),
    }


def _up_to_date(output: Path, inputs: dict) -> bool:
    try:
        done = json.loads((output / JSON).read_text(encoding="utf-8"))
        return done["inputs"] == inputs and done["markdown_sha256"] == artifact.sha256_file(output / MARKDOWN)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _measure(args: argparse.Namespace, subjects: list[Subject], baseline: Path, test: Split, inputs: dict) -> dict:
    from eval.latency import measure_latency
    from eval.quality import PROMPT, make_task, measure_quality
    from eval.report import SCHEMA
    from eval.size import companion_bytes, onnx_bytes

    names = [subject.name for subject in subjects]
    if clash := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--onnx: two artifacts are called {clash!r}; rename one of the files")
    task = make_task(baseline, test, args.tokens, args.window)
    quality = measure_quality(subjects, task, args.threads)
    latency = measure_latency(subjects, task.real_tokens(task.longest), task.longest, args.rounds, args.threads)
    rows = []
    for subject in subjects:
        if subject.kind == "onnx":
            size = onnx_bytes(subject.path)
        else:
            weights = quality[subject.name].pop("weight_bytes")
            size = {"bytes": weights + companion_bytes(baseline), "model_bytes": weights}
        rows.append({"name": subject.name, **size, **quality[subject.name], **latency[subject.name]})
    return {
        "schema": SCHEMA,
        "model": baseline.parent.name,
        "corpus": {
            "source": args.corpus,
            "split": test.name,
            "sha256": test.sha256,
            "documents": len(task.documents),
            "documents_in_split": len(test.documents),
            "bytes": task.size.bytes,
            "words": task.size.words,
            "document_tokens": [len(ids) for ids in task.documents],
            "tokens_sha256": artifact.digest(task.documents),
            "window_tokens": task.window,
        },
        "machine": inputs["machine"],
        "versions": inputs["versions"],
        "rounds": args.rounds,
        "prompt": PROMPT,
        "inputs": inputs,
        "artifacts": rows,
    }


def _publish(report: dict, output: Path) -> None:
    """Report and table, renamed into place; report.json comes last and names the table that belongs to it."""
    from eval.report import markdown

    with artifact.staging(output / JSON) as work:
        (work / MARKDOWN).write_text(markdown(report), encoding="utf-8")
        report["markdown_sha256"] = artifact.sha256_file(work / MARKDOWN)
        (work / JSON).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in (MARKDOWN, JSON):
            (work / name).replace(output / name)


if __name__ == "__main__":
    run(main)
