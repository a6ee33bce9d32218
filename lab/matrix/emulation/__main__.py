"""`python -m lab.matrix.emulation`: run artifacts on emulated processors and here: docs/data/runtimes-emulation.json."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cuantiza.core.cli import add_corpus, source_of
from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.corpus import load_test
from cuantiza.core.inputs.model_config import max_positions, read_config, start_token
from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.machine.child import Failed
from cuantiza.core.machine.hardware import default_threads
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.progress import track, working
from cuantiza.core.run.exact_int8 import EXACT
from cuantiza.core.store import artifact, folders
from lab.matrix.emulation import qemu as emulation
from lab.matrix.emulation.qemu import PROCESSORS, Difference, Processor

SCHEMA = "cuantiza/emulation/1"
# So many tokens of the first window are fed one by one with the cache: one token takes other kernels than many.
CACHED = 8
# Logits that differ by less differ only by rounding of floats.
SAME = 1e-3


@dataclass(frozen=True)
class Outcome:
    """The logits `whole` and `cached` that the driver wrote, or why there are none."""

    logits: dict[str, np.ndarray] | None
    failure: str | None = None


def main() -> int:
    args = _arguments()
    # Errors in the options come first, before anything is made or measured.
    chosen = [PROCESSORS[name] for name in dict.fromkeys(args.processors)]
    for processor in chosen:
        emulation.emulator(processor)
    artifacts = _artifacts(args.artifacts, args.recipes)
    windows = token_windows(artifacts[0].path, load_test(source_of(args)).documents, args.windows, args.tokens)
    with working("emulation"), tempfile.TemporaryDirectory(prefix="cuantiza-emulation-") as work:
        prefixes = {processor: emulation.command(processor, args.folder) for processor in chosen}
        found = measure(prefixes, artifacts, windows, Path(work), args.threads)
    result = {
        "schema": SCHEMA,
        "model": artifacts[0].manifest.model,
        "corpus": args.corpus,
        "windows": len(windows),
        "tokens_per_window": windows.shape[1],
        "tokens_through_the_cache": CACHED,
        "versions": emulation.versions(),
        **found,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with folders.staging(args.output.absolute()) as staged:
        written = staged / args.output.name
        written.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.replace(args.output)
    say(f"emulation {args.output}: written")
    return 0


def measure(
    prefixes: dict[Processor, list[str]],
    artifacts: list[artifact.Artifact],
    windows: np.ndarray,
    work: Path,
    threads: int,
) -> dict:
    """The part of the JSON that describes the processors, and has in `rows` each artifact on each of them."""
    np.save(work / "windows.npy", windows)
    job = {"windows": str(work / "windows.npy"), "cached": CACHED, "threads": threads}
    here = emulation.command(None, work)
    about = {None: _about(here, job, work), **{name: _about(prefix, job, work) for name, prefix in prefixes.items()}}
    # If this processor clips sums, too, the option gives the correct reference.
    options = EXACT if about[None]["saturates"] else {}
    rows = []
    for found in track(artifacts, "emulate", len(artifacts)):
        name = found.manifest.name
        reference = _outcome(here, job, found.model, options, work)
        if reference.logits is None:
            raise UserError(f"{found.model}: does not run on this machine ({reference.failure}); leave it out")
        for processor, prefix in prefixes.items():
            plain = _outcome(prefix, job, found.model, {}, work)
            exact = _outcome(prefix, job, found.model, EXACT, work) if about[processor]["saturates"] else None
            for option, outcome, note in notes(plain, exact):
                there = (
                    None if outcome.logits is None else emulation.difference(reference.logits, outcome.logits, windows)
                )
                rows.append(row(processor.name, name, option, windows.size, there, note))
    processors = {
        processor.name: {"about": processor.about, "qemu_cpu": processor.model} | about[processor]
        for processor in prefixes
    }
    return {"real": about[None], "processors": processors, "rows": rows}


def notes(plain: Outcome, exact: Outcome | None) -> list[tuple[str | None, Outcome, str | None]]:
    """The rows to write, each (option, outcome, note). `exact` is the outcome with the option, if that was tried.

    The option changes nothing but integer matmuls. So if it changes logits on a processor, sums were clipped without it.
    """
    option = "=".join(*EXACT.items())
    if exact is None:
        return [(None, plain, plain.failure)]
    if plain.logits is None or exact.logits is None:
        unknown = f"with {option}: {exact.failure}" if exact.failure else None
        return [(None, plain, plain.failure or "not known whether sums were clipped"), (option, exact, unknown)]
    if all((plain.logits[name] == exact.logits[name]).all() for name in plain.logits):
        return [(None, plain, "no sum was clipped: the option changes nothing")]
    return [(None, plain, "sums of u8·s8 products were clipped to 16 bits"), (option, exact, None)]


def row(
    processor: str, recipe: str, option: str | None, tokens: int, there: Difference | None, note: str | None
) -> dict:
    """One element of `rows`; its differences are null if the artifact did not run."""
    values = dict.fromkeys(Difference.__dataclass_fields__) if there is None else asdict(there)
    if there is not None:
        same = max(there.max_logit_difference, there.max_logit_difference_cached) < SAME
        note = "; ".join(filter(None, [note, "as on the real processor" if same else None]))
    return (
        {"processor": processor, "recipe": recipe, "option": option, "tokens": tokens} | values | {"note": note or None}
    )


def token_windows(folder: Path, documents: tuple[str, ...], count: int, tokens: int) -> np.ndarray:
    """Token ids int64 [count, tokens]: each window is the start token and the first tokens of a long enough document.

    Raises UserError if there are too few such documents, or if the model has fewer positions than `tokens`.
    """
    longest = max_positions(read_config(folder))
    if tokens > longest:
        raise UserError(f"--tokens {tokens}: the model has {longest} positions; give that many at most")
    tokenizer, start = load_tokenizer(folder), start_token(folder)
    windows: list[list[int]] = []
    for text in documents:
        ids = [start, *tokenizer.encode(text, add_special_tokens=False).ids][:tokens]
        if len(ids) == tokens:
            windows.append(ids)
        if len(windows) == count:
            return np.array(windows, np.int64)
    raise UserError(
        f"--windows {count}: only {len(windows)} test documents have {tokens} tokens; give fewer windows or tokens"
    )


def _about(prefix: list[str], job: dict, work: Path) -> dict:
    try:
        return emulation.run(prefix, {**job, "runs": []}, work)
    except Failed as error:
        raise UserError(f"{' '.join(prefix[:3])}: ONNX Runtime does not run there ({error})") from None


def _outcome(prefix: list[str], job: dict, model: Path, options: dict[str, str], work: Path) -> Outcome:
    output = work / "logits.npz"
    output.unlink(missing_ok=True)  # otherwise a run that wrote nothing would return the previous one's
    request = {**job, "runs": [{"model": str(model.absolute()), "options": options, "output": str(output)}]}
    try:
        emulation.run(prefix, request, work)
    except Failed as error:
        return Outcome(None, str(error))
    with np.load(output) as file:
        return Outcome({name: file[name] for name in file.files})


def _artifacts(folder: Path, recipes: list[str] | None) -> list[artifact.Artifact]:
    if not recipes:
        recipes = sorted(path.parent.name for path in folder.glob(f"*/{artifact.MANIFEST}"))
        if not recipes:
            raise UserError(f"{folder}: holds no artifacts; run `make export quantize`, or name another by --artifacts")
    return [artifact.open_artifact(folder / name) for name in dict.fromkeys(recipes)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.matrix.emulation", description=__doc__)
    default = Path("artifacts/es-mini")
    parser.add_argument("--artifacts", type=Path, default=default, help=f"a model's folder (default {default})")
    parser.add_argument("--recipes", nargs="+", metavar="RECIPE", help="artifacts by name (default: all of the folder)")
    several = ["haswell", "cortex-a72", "neoverse-n1"]
    listed = "; ".join(f"{name}: {processor.about}" for name, processor in PROCESSORS.items())
    parser.add_argument(
        "--processors", nargs="+", default=several, choices=PROCESSORS, help=f"{listed} (default {' '.join(several)})"
    )
    parser.add_argument("--windows", type=int, default=4, help="documents to take a window of (default 4)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each window (default 64)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="threads (default: all processors)")
    default = Path(".emulation")
    parser.add_argument("--folder", type=Path, default=default, help=f"where systems are kept (default {default})")
    default = Path("docs/data/runtimes-emulation.json")
    parser.add_argument("--output", type=Path, default=default, help=f"file of the result (default {default})")
    add_corpus(parser)
    args = parser.parse_args()
    for option, least in (("windows", 1), ("tokens", CACHED + 2), ("threads", 1)):
        if getattr(args, option) < least:
            raise UserError(f"--{option} {getattr(args, option)}: is too few; give {least} or more")
    return args


if __name__ == "__main__":
    run(main)
