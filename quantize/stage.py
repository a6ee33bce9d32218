"""The quantize stage: make artifacts from an fp32 artifact and recipes, and publish them, unless they are up to date."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, Split, load_calibration
from cuantiza.core.inputs.defaults import CORPUS
from cuantiza.core.machine.progress import report, warn
from cuantiza.core.store import artifact, digests, folders
from cuantiza.core.store.artifact import Artifact
from cuantiza.quantize.recipes.budget.int8_static_mixed import MixedStaticInt8
from cuantiza.quantize.recipes.budget.int_mixed import BothForms, MixedWeightOnly
from cuantiza.quantize.recipes.registry import (
    RECIPES,
    Recipe,
    calibrates_together,
    calibration_of,
    get_recipe,
    least_opset,
    to_json,
)
from cuantiza.quantize.settings import check_opset

_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "tokenizers")


def quantize(
    fp32: str | Path | Artifact,
    recipe: str | Recipe,
    output: str | Path | None = None,
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
    name = name or label or (Path(output).name if output is not None else None)
    if name is None:
        raise UserError("name=: is missing; this recipe has no name of its own, so say how its artifact is called")
    target = path.parent / name if output is None else Path(output)
    source = corpus if isinstance(corpus, Source) else Source(str(corpus))
    with opened(path, target.parent) as parent:
        (made,) = quantize_all(parent, [Wanted(target, name, recipe)], source)
        return made


def _name_of(recipe: Recipe) -> str | None:
    """Find the name of `recipe` in RECIPES; None if no recipe there has the same settings."""
    return next((name for name, known in RECIPES.items() if known == recipe), None)


@contextmanager
def opened(fp32: Path, held: Path | None = None) -> Iterator[Artifact]:
    """Open the artifact in the folder `fp32`; the folder `held` (default: its parent) is locked meanwhile.

    `quantize_all` verifies all of it before it makes anything of it. Raises UserError if the artifact does not exist or
    is damaged.
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
            f"--max-delta-ln-ppl {nats}: none of {', '.join(recipes) or 'fp32'} has a budget; add int8-static-mixed to --recipes"
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
        raise UserError(
            f"{option}: none of {', '.join(recipes) or 'fp32'} has such a budget; add int-mixed to --recipes"
        )
    try:
        return recipes | {
            name: dataclasses.replace(recipe, max_bytes=max_bytes, max_kl=max_kl) for name, recipe in mixed.items()
        }
    except ValueError as error:
        raise UserError(f"{option}: {str(error).partition('; ')[2]}") from None


@dataclass(frozen=True)
class Wanted:
    """An artifact to make: its folder, the name that its manifest gets, and its recipe."""

    target: Path
    name: str
    recipe: Recipe


@dataclass(frozen=True)
class _Missing:
    """A wanted artifact that is not up to date, with its `inputs_of` and the text that calibrates it."""

    wanted: Wanted
    inputs: dict[str, Any]
    calibration: Split | None


def quantize_all(parent: Artifact, wanted: Sequence[Wanted], source: Source) -> list[Artifact]:
    """Make the `wanted` artifacts from `parent`, unless they are up to date. The caller has locked their folders.

    Recipes that quantize linear layers calibrate together, on the text `source`, and have the same bytes as if each had
    done so alone. Every artifact is published as soon as it is finished. Raises UserError, before anything is made, if a
    file of `parent` is not as it was published, or if its opset is too low for a recipe. Raises one, too, if a recipe
    cannot be used; one that calibrates by itself, or not at all, does not stop the others. Where several cannot, the last
    is raised and the others are printed.
    """
    made: dict[Path, Artifact] = {}
    missing: list[_Missing] = []
    for one in wanted:
        calibration = load_calibration(source) if calibration_of(one.recipe) else None
        inputs = inputs_of(parent, one.recipe, calibration)
        there = artifact.up_to_date(one.target, inputs)
        if isinstance(there, Artifact):
            report(f"quantize  {one.target}: up to date")
            warn(there.manifest.details.get("warnings", []))
            made[one.target] = there
        else:
            report(f"quantize  {one.target}: {there}")
            missing.append(_Missing(one, inputs, calibration))
    if missing:
        artifact.verify(parent)
    for item in missing:  # before any of them calibrates, which takes minutes
        if (opset := parent.manifest.recipe.get("opset")) is not None:  # that of `export`
            check_opset(opset, least_opset(item.wanted.recipe))
    layered = [item for item in missing if calibrates_together(item.wanted.recipe)]
    errors: list[UserError] = []
    for group in [*_forms([item for item in missing if item not in layered]), *([layered] if layered else [])]:
        try:
            made |= _make_group(parent, group)
        except UserError as error:  # which says nothing about the other recipes
            errors.append(error)
    if errors:
        for other in errors[:-1]:
            report(f"failed    {other}")
        raise errors[-1]
    return [made[one.target] for one in wanted]


def _make_group(parent: Artifact, group: list[_Missing]) -> dict[Path, Artifact]:
    """Make the artifacts of `group`, which has more than one only where they are made together; return them by folder."""
    if calibrates_together(group[0].wanted.recipe):
        from cuantiza.quantize.layers import Together

        return _make_together(parent, group, Together)
    if len(group) > 1:
        return _make_together(parent, group, BothForms)
    return {group[0].wanted.target: _make(parent, group[0])}


def _forms(missing: Sequence[_Missing]) -> list[list[_Missing]]:
    """Group those that quantize by one budget for several targets; each other one is a group of its own."""
    groups: dict[Recipe | int, list[_Missing]] = {}
    for place, one in enumerate(missing):
        recipe = one.wanted.recipe
        shared = dataclasses.replace(recipe, target="portable") if isinstance(recipe, MixedWeightOnly) else place
        groups.setdefault(shared, []).append(one)
    return list(groups.values())


def _known(one: _Missing) -> dict[str, Any] | None:
    """What the manifest of the portable form beside it, if that is up to date, says of the bits of an -ort form."""
    recipe = one.wanted.recipe
    if not isinstance(recipe, MixedWeightOnly) or recipe.target == "portable":
        return None
    form = to_json(dataclasses.replace(recipe, target="portable"))
    beside = one.wanted.target.with_name(one.wanted.name.removesuffix("-ort"))
    found = artifact.up_to_date(beside, one.inputs | {"recipe": form})
    return found.manifest.details["mixed"] if isinstance(found, Artifact) else None


def _make(parent: Artifact, one: _Missing) -> Artifact:
    # This import is here because a run that finds everything up to date does not need it.
    from cuantiza.core.machine.process import ChildError, isolated

    name = one.wanted.name
    with folders.staging(one.wanted.target) as work:
        try:
            known = _known(one)
            more = () if known is None else (None, known)
            details = isolated(one.wanted.recipe.make, parent.path, work, one.calibration, *more, label=name)
        except ChildError as error:
            raise UserError(f"{name}: {error.reason}") from error
        return _publish(parent, one, work, details)


def _make_together(parent: Artifact, together: list[_Missing], kind: type) -> dict[Path, Artifact]:
    """Make the artifacts by a `kind` of Together in one process, which calibrates all at once; return them by folder."""
    from cuantiza.core.machine.process import ChildError, Remote

    made: dict[Path, Artifact] = {}
    recipes = {one.wanted.name: one.wanted.recipe for one in together}
    with Remote(kind, recipes, parent.path, together[0].calibration, label=", ".join(recipes)) as remote:
        with folders.staging(together[0].wanted.target) as work:
            try:
                remote.call("calibrate", work)
            except ChildError as error:
                raise UserError(f"{', '.join(recipes)}: {error.reason}") from error
        for one in together:
            name = remote.label = one.wanted.name
            with folders.staging(one.wanted.target) as work:
                try:
                    details = remote.call("make", name, work)
                except ChildError as error:
                    raise UserError(f"{name}: {error.reason}") from error
                made[one.wanted.target] = _publish(parent, one, work, details)
    return made


def _publish(parent: Artifact, one: _Missing, work: Path, details: dict[str, Any]) -> Artifact:
    """Publish the files in `work` as the artifact that is missing, and say how large it is."""
    from cuantiza.quantize.steps import stored_bytes

    artifact.copy_companions(parent.path, work)
    made = artifact.publish(
        work,
        one.wanted.target,
        name=one.wanted.name,
        model=parent.manifest.model,
        recipe=one.inputs["recipe"],
        inputs=one.inputs,
        parent=parent.digest,
        calibration=one.inputs["calibration"],
        versions=one.inputs["versions"],
        details=details,
    )
    before, after = stored_bytes(parent.path), stored_bytes(made.path)
    report(f"          {one.wanted.name}: {after / 1e6:.1f} MB, graph × fp32: {after / before:.3f}")
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
