"""The quantize stage: make an artifact from an fp32 artifact and a recipe, and publish it, unless it is up to date."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, Split, load_calibration
from cuantiza.core.inputs.defaults import CORPUS
from cuantiza.core.machine.progress import report, warn
from cuantiza.core.store import artifact, digests, folders
from cuantiza.core.store.artifact import Artifact
from cuantiza.quantize.recipes.budget.int8_static_mixed import MixedStaticInt8
from cuantiza.quantize.recipes.budget.int_mixed import MixedWeightOnly
from cuantiza.quantize.recipes.registry import RECIPES, Recipe, calibration_of, get_recipe, to_json

_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "tokenizers")


def quantize(
    fp32: str | Path | Artifact,
    recipe: str | Recipe,
    output: Path | None = None,
    *,
    corpus: str | Path | Source = CORPUS,
    name: str | None = None,
) -> Artifact:
    """Quantize the artifact `fp32`, which `export` made, unless the result is there and up to date.

    `recipe` is a name in RECIPES, the path of a .json file, or a recipe object. `output` is the folder of the result
    (default: the folder `name` beside `fp32`). `name` is the artifact's name (default: the name of the recipe or its
    file). Calibration uses the calibration split of the text `corpus`; "self" is text that the model writes.

    Raises UserError if the recipe, the artifact or the text cannot be used.
    """
    path = fp32.path if isinstance(fp32, Artifact) else Path(fp32)
    label, recipe = get_recipe(recipe) if isinstance(recipe, str) else (_name_of(recipe), recipe)
    name = name or label or (output.name if output is not None else None)
    if name is None:
        raise UserError("name=: is missing; this recipe has no name of its own, so say how its artifact is called")
    target = path.parent / name if output is None else Path(output)
    source = corpus if isinstance(corpus, Source) else Source(str(corpus))
    with opened(path, target.parent) as parent:
        return quantize_one(parent, target, name, recipe, source)


def _name_of(recipe: Recipe) -> str | None:
    """Find the name of `recipe` in RECIPES; None if no recipe there has the same settings."""
    return next((name for name, known in RECIPES.items() if known == recipe), None)


@contextmanager
def opened(fp32: Path, held: Path | None = None) -> Iterator[Artifact]:
    """Open the artifact in the folder `fp32`; the folder `held` (default: its parent) is locked meanwhile.

    `quantize_one` verifies all of it before it makes anything of it. Raises UserError if the artifact does not exist or is damaged.
    """
    if not fp32.is_dir():
        raise UserError(f"{fp32}: is not there; run `make export` or `cuantiza export` first")
    with folders.locked(held or fp32.parent):
        yield artifact.open_artifact(fp32, digests.sha256_known)


def with_budget(recipes: dict[str, Recipe], nats: float) -> dict[str, Recipe]:
    """Return `recipes` with `nats` per token as the budget of every MixedStaticInt8.

    Raises UserError if `recipes` has no such recipe, or if `nats` is negative or not finite.
    """
    if not 0 <= nats < math.inf:
        raise UserError(f"--max-delta-ln-ppl {nats}: give a number of nats from 0, such as 0.002")
    mixed = {name: recipe for name, recipe in recipes.items() if isinstance(recipe, MixedStaticInt8)}
    if not mixed:
        raise UserError(
            f"--max-delta-ln-ppl {nats}: none of {', '.join(recipes)} has a budget; add int8-static-mixed to --recipes"
        )
    return recipes | {name: dataclasses.replace(recipe, max_delta_ln_ppl=nats) for name, recipe in mixed.items()}


def with_bits_budget(recipes: dict[str, Recipe], max_bytes: str | None, max_kl: float | None) -> dict[str, Recipe]:
    """Return `recipes` with `max_bytes`, or `max_kl` nats per token, as the budget of every MixedWeightOnly.

    Raises UserError if `recipes` has no such recipe, or if not one budget is given, or if it says nothing.
    """
    if max_bytes is not None and max_kl is not None:
        raise UserError("--max-bytes and --max-kl: are two budgets; give one of them")
    option = f"--max-bytes {max_bytes}" if max_kl is None else f"--max-kl {max_kl}"
    mixed = {name: recipe for name, recipe in recipes.items() if isinstance(recipe, MixedWeightOnly)}
    if not mixed:
        raise UserError(f"{option}: none of {', '.join(recipes)} has such a budget; add int-mixed to --recipes")
    try:
        return recipes | {
            name: dataclasses.replace(recipe, max_bytes=max_bytes, max_kl=max_kl) for name, recipe in mixed.items()
        }
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def quantize_one(parent: Artifact, target: Path, name: str, recipe: Recipe, source: Source) -> Artifact:
    """Make the artifact `target` from `parent`, unless it is up to date. The caller has locked its folder.

    Raises UserError if a file of `parent` is not as it was published.
    """
    calibration = load_calibration(source) if calibration_of(recipe) else None
    inputs = inputs_of(parent, recipe, calibration)
    there = artifact.up_to_date(target, inputs)
    if isinstance(there, Artifact):
        report(f"quantize  {target}: up to date")
        warn(there.manifest.details.get("warnings", []))
        return there
    report(f"quantize  {target}: {there}")
    artifact.verify(parent)
    # This import is here because a run that finds everything up to date does not need it.
    from cuantiza.core.machine.process import isolated

    with folders.staging(target) as work:
        details = isolated(recipe.make, parent.path, work, calibration, label=name)
        artifact.copy_companions(parent.path, work)
        made = artifact.publish(
            work,
            target,
            name=name,
            model=parent.manifest.model,
            recipe=inputs["recipe"],
            inputs=inputs,
            parent=parent.digest,
            calibration=inputs["calibration"],
            versions=inputs["versions"],
            details=details,
        )
    before, after = parent.model.stat().st_size, made.model.stat().st_size
    report(f"          {after / 1e6:.1f} MB, graph × fp32: {after / before:.3f}")
    warn(made.manifest.details.get("warnings", []))
    return made


def inputs_of(parent: Artifact, recipe: Recipe, calibration: Split | None) -> dict[str, Any]:
    """Collect everything that the bytes of an artifact depend on.

    "code" is the digest of the file that defines the recipe and of all that it imports.
    """
    return {
        "parent": parent.digest,
        "recipe": to_json(recipe),
        "calibration": calibration.sha256 if calibration else None,
        "code": digests.code_digest(type(recipe).__module__),
        "versions": digests.versions(*_LIBRARIES),
    }
