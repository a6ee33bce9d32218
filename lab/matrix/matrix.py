"""The cells of the matrix: each compares a runtime's logits for an artifact with those of cuantiza/core/run/runtime.py.

All cells run the same job, each in a process of its own. Two runtimes add the same floats in different orders. Where
activations are quantized, a value that lies exactly between two integers can then round to the other one, which changes
all later values. So a cell is judged by KL divergence in nats, relative to what quantization itself changes
(`tolerance`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split
from cuantiza.core.inputs.model_config import start_token
from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.machine.child import Failed
from cuantiza.core.run.divergence import compare
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import MODEL, Artifact, open_artifact
from cuantiza.quantize.recipes.registry import PORTABLE
from lab.matrix.programs import Program, run
from lab.matrix.reasons import BFLOAT16, Reason, explain

TOKENS, PREFILL, PAD, GENERATE = 48, 16, 7, 16
PROMPT = "Me gusta mucho el futbol"
LOGITS = ("whole", "cached", "padded")
FLOATS = 1e-6  # KL in nats a position
RECIPES = tuple(name for recipe in ("fp32", *PORTABLE) for name in (recipe, f"{recipe}-ort"))


@dataclass(frozen=True)
class Reference:
    """The results of cuantiza/core/run/runtime.py for an artifact.

    `whole` [T, V] and `cached` [T - PREFILL + 1, V] are logits; `generated` are the tokens of a greedy continuation,
    each chosen by one of the logits `steps` [GENERATE, V].
    """

    whole: np.ndarray
    cached: np.ndarray
    generated: list[int]
    steps: np.ndarray
    prompt_ids: list[int]

    def logits(self, name: str) -> np.ndarray:
        """The expected logits `name` of a runtime. A token only sees earlier ones, so a shorter text has the whole's first."""
        return {"whole": self.whole, "cached": self.cached, "padded": self.whole[: TOKENS - PAD]}[name]


@dataclass(frozen=True)
class Difference:
    """How logits differ: the largest |Δ|, the root of the mean Δ², KL in nats a position, and equal top tokens.

    `positions` is how many positions were compared.
    """

    maximum: float
    rms: float
    kl: float
    same_top: int
    positions: int


@dataclass(frozen=True)
class Generated:
    """How many of `tokens` are the same until a runtime's continuation differs from ours.

    `gap` is by how much our logits prefer our token there; None if all are the same.
    """

    same: int
    tokens: int
    gap: float | None


@dataclass(frozen=True)
class Cell:
    """One artifact in one runtime. `status`: "ok", "differs", "fails" or "missing" (the runtime is not here)."""

    recipe: str
    runtime: str
    status: str
    version: str | None = None
    whole: Difference | None = None
    cached: Difference | None = None
    padded: Difference | None = None
    generated: Generated | None = None
    generated_padded: Generated | None = None
    same_prompt: bool | None = None
    skipped: dict[str, str] | None = None  # what the runtime does not have
    unable: dict[str, Reason] | None = None  # what it has, and failed at
    note: str | None = None
    reason: Reason | None = None


def target(recipe: str) -> str:
    """The recipe's target: standard operators ("portable"), or ONNX Runtime's own as well ("ort")."""
    return "ort" if recipe.endswith("-ort") else "portable"


def artifacts(folder: Path, recipes: tuple[str, ...]) -> dict[str, Artifact]:
    """The verified artifacts of `recipes` in `folder`. Raises UserError if one is missing or damaged."""
    if missing := [name for name in recipes if not (folder / name).is_dir()]:
        raise UserError(
            f'{folder}: has no {", ".join(missing)}; run `make quantize RECIPES="{" ".join(missing)}"` first'
        )
    return {name: open_artifact(folder / name) for name in recipes}


def make_job(folder: Path, test: Split, threads: int) -> dict:
    """The job of all cells, without folder, target and output. Its text is the first long enough document of `test`.

    The tokenizer is that of `folder`. Raises UserError if no document has TOKENS tokens.
    """
    tokenizer, start = load_tokenizer(folder), start_token(folder)
    for text in test.documents:
        ids = [start, *tokenizer.encode(text, add_special_tokens=False).ids][:TOKENS]
        if len(ids) == TOKENS:
            break
    else:
        raise UserError(f"--corpus: no test document has {TOKENS} tokens; give longer ones")
    return {
        "ids": ids,
        "start": start,
        "prefill": PREFILL,
        "pad": PAD,
        "prompt": PROMPT,
        "generate": GENERATE,
        "threads": threads,
    }


def make_reference(folder: Path, job: dict) -> Reference:
    """The results of cuantiza/core/run/runtime.py for `job` on the artifact in `folder`."""
    runtime = Runtime(folder / MODEL, job["threads"])
    ids = np.array([job["ids"]])
    whole = runtime.forward(ids)[0].copy()
    cache = runtime.cache(1, TOKENS)
    rows = [runtime.step(cache, ids[:, :PREFILL])[0].copy()]
    rows += [runtime.step(cache, ids[:, at : at + 1])[0].copy() for at in range(PREFILL, TOKENS)]
    prompt = load_tokenizer(folder).encode(job["prompt"], add_special_tokens=False).ids
    cache, step = runtime.cache(1, 1 + len(prompt) + GENERATE), [job["start"], *prompt]
    tokens: list[int] = []
    steps = []
    for _ in range(GENERATE):
        steps.append(runtime.step(cache, np.array([step]))[0].copy())
        tokens.append(int(steps[-1].argmax()))
        step = tokens[-1:]
    return Reference(whole, np.stack(rows), tokens, np.stack(steps), prompt)


def cells(
    found: dict[str, Artifact], runtimes: list[Program], job: dict, original: Reference
) -> Iterator[tuple[Cell, Difference]]:
    """Yield each artifact in each runtime, with the difference of the artifact's own logits from fp32's, `original`."""
    for recipe, artifact in found.items():
        reference = original if recipe == "fp32" else make_reference(artifact.path, job)
        quantization = difference(original.whole, reference.whole)
        for program in runtimes:
            yield one_cell(recipe, artifact.path, program, job, reference, quantization), quantization


def one_cell(
    recipe: str,
    folder: Path,
    program: Program,
    job: dict,
    reference: Reference,
    quantization: Difference,
) -> Cell:
    """Run `program` on the artifact in `folder` and compare what it gives."""
    if (why := program.missing()) is not None:
        return Cell(recipe, program.name, "missing", reason=Reason("not installed", why, None))
    with TemporaryDirectory(prefix="cuantiza-runtimes-") as name:
        output = Path(name)
        here = job | {"folder": str(folder.resolve()), "target": target(recipe), "output": name}
        try:
            result = run(program, here)
        except Failed as error:
            message = str(error).replace(str(folder.resolve()), recipe).replace(name, "")
            return Cell(recipe, program.name, "fails", reason=explain(message))
        return compare_result(recipe, program.name, result, output, reference, quantization)


def compare_result(
    recipe: str, runtime: str, result: dict, output: Path, reference: Reference, quantization: Difference
) -> Cell:
    """The cell of a runtime's `result`, whose logits lie in folder `output`."""
    found: dict[str, Difference] = {}
    for name in LOGITS:
        if result.get(name) is not None:
            expected = reference.logits(name)
            values = np.fromfile(output / result[name], "<f4")
            if values.size != expected.size or not np.isfinite(values).all():
                message = f"{name}: {values.size} logits where {expected.size} finite ones are expected"
                return Cell(recipe, runtime, "fails", reason=Reason("no logits", message, None))
            found[name] = difference(expected, values.reshape(expected.shape))
    loops = {
        name: parting(reference, result[name])
        for name in ("generated", "generated_padded")
        if result.get(name) is not None
    }
    prompt = result.get("prompt_ids")
    same_prompt = None if prompt is None else prompt == reference.prompt_ids
    failed = {name: explain(why) for name, why in result.get("failed", {}).items()}
    cure = BFLOAT16 if "bf16" in result["version"] else None
    reason = _objection(found, loops, same_prompt, quantization, cure)
    return Cell(
        recipe,
        runtime,
        "ok" if reason is None else "differs",
        result["version"],
        **found,
        **loops,
        same_prompt=same_prompt,
        skipped=result["skipped"],
        unable=failed or None,
        note=result.get("note"),
        reason=reason,
    )


def difference(expected: np.ndarray, found: np.ndarray) -> Difference:
    """How the logits `found` [n, V] differ from the `expected` ones."""
    error = found - expected
    (_, kl, same) = compare(expected, [found], np.zeros(len(found), np.int64))[1]
    return Difference(
        float(np.abs(error).max()), float(np.sqrt((error**2).mean())), float(kl.mean()), int(same.sum()), len(found)
    )


def parting(reference: Reference, tokens: list[int]) -> Generated:
    """Find where the generated `tokens` first differ from the reference's."""
    for at, (ours, theirs) in enumerate(zip(reference.generated, tokens, strict=False)):
        if ours != theirs:
            return Generated(at, GENERATE, float(reference.steps[at][ours] - reference.steps[at][theirs]))
    same = min(len(tokens), GENERATE)
    return Generated(same, GENERATE, None if same == GENERATE else float("inf"))


def tolerance(quantization: Difference) -> float:
    """The KL divergence in nats a position up to which a cell is ok. `quantization` is the artifact's own from fp32.

    Rounding of floats alone gives up to 1e-7 among all runtimes. Two independent quantizations of the same precision
    differ from each other by twice what each differs from fp32. An error of a runtime (a wrong scale, zero point, mask
    or position) gives orders of magnitude more.
    """
    return max(FLOATS, 2 * quantization.kl)


def _objection(
    found: dict[str, Difference],
    loops: dict[str, Generated],
    same_prompt: bool | None,
    quantization: Difference,
    cure: str | None,
) -> Reason | None:
    """Why the cell is not ok; None if it is."""
    limit = tolerance(quantization)
    for name, item in found.items():
        if item.kl > limit:
            return Reason("other logits", f"{name}: KL {item.kl:.3g} nats where {limit:.3g} are allowed", cure)
    if same_prompt is False:
        return Reason("other tokens", "its tokenizer splits the prompt otherwise than tokenizer.json says", cure)
    for name, loop in loops.items():
        # The two best tokens of a near tie may change places; anything else is another model's text.
        near = 2 * max((item.maximum for item in found.values()), default=0.0)
        if loop.gap is not None and loop.gap > near:
            return Reason("other text", f"{name}: leaves ours at token {loop.same}, by {loop.gap:.2g}", cure)
    return None


def to_json(cell: Cell) -> dict:
    """The cell as JSON's types, without the fields that are None."""
    return {key: value for key, value in json.loads(json.dumps(asdict(cell))).items() if value is not None}
