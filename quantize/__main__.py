"""`python -m quantize`: fp32 artifact x recipes -> artifacts/<model>/<recipe>."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cuantiza.core.cli import source_of
from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.machine.progress import report
from cuantiza.core.store import artifact, digests, folders
from cuantiza.core.store.artifact import Artifact
from cuantiza.quantize.inspect.commands import add_commands, add_inputs, opened
from cuantiza.quantize.recipes import (
    RECIPES,
    DynamicInt8,
    Float,
    Half,
    MixedStaticInt8,
    OrtDynamic,
    OrtStatic,
    Recipe,
    StaticInt8,
    WeightOnly,
    calibration_of,
    get_recipe,
    to_json,
)

# What each recipe runs; the choice between them (cuantiza.quantize.apply) and their values (in the manifest) change no bytes.
_CODE = {
    DynamicInt8: ("cuantiza.quantize.rewrite.dynamic", "cuantiza.quantize.decide.calibrate"),
    StaticInt8: ("cuantiza.quantize.rewrite.static", "cuantiza.quantize.decide.calibrate"),
    MixedStaticInt8: (
        "cuantiza.quantize.rewrite.static",
        "cuantiza.quantize.decide.calibrate",
        "cuantiza.quantize.inspect.sensitivity",
    ),
    WeightOnly: ("cuantiza.quantize.rewrite.weight_only", "cuantiza.quantize.decide.calibrate"),
    Half: ("cuantiza.quantize.rewrite.half", "cuantiza.quantize.rewrite.fuse_attention", "cuantiza.core.onnx.file"),
    Float: ("cuantiza.quantize.rewrite.fuse_attention", "cuantiza.core.onnx.file"),
    OrtDynamic: ("cuantiza.quantize.rewrite.onnxruntime_tools",),
    OrtStatic: ("cuantiza.quantize.rewrite.onnxruntime_tools", "cuantiza.quantize.decide.calibrate"),
}
# What the target ort has beside its graph.
_ORT_CODE = ("cuantiza.core.onnx.genai_config",)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m quantize",
        usage="python -m quantize [options]\n       python -m quantize COMMAND [options of the command]",
        description=__doc__,
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["int8-dynamic", "int8-static"],
        metavar="RECIPE",
        help=f"{', '.join(RECIPES)}, or .json files of your own (default int8-dynamic int8-static)",
    )
    parser.add_argument(
        "--max-delta-ln-ppl",
        type=float,
        metavar="NATS",
        help="how far int8-static-mixed may raise ln perplexity, in nats per token (default: what the recipe says)",
    )
    add_inputs(parser)
    add_commands(parser)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parser.parse_args(arguments)
    if args.command is not None:
        # Behind its name only: argparse would take no notice of those in front.
        if arguments[0] != args.command:
            raise UserError(f"{arguments[0]}: stands in front of {args.command}; put its options behind it")
        return args.function(args)
    recipes: dict[str, Recipe] = {}
    for given in args.recipes:
        name, recipe = get_recipe(given)
        if recipes.setdefault(name, recipe) != recipe:
            raise UserError(f"RECIPES={given}: another recipe is named {name} too; give the file another name")
    if args.max_delta_ln_ppl is not None:
        recipes = with_budget(recipes, args.max_delta_ln_ppl)
    with opened(args) as parent:
        for name, recipe in recipes.items():
            quantize_one(parent, parent.path.parent / name, name, recipe, source_of(args))
    return 0


def with_budget(recipes: dict[str, Recipe], nats: float) -> dict[str, Recipe]:
    """`recipes` with `nats` a token as the budget of every MixedStaticInt8.

    Raises UserError where there is none, or `nats` is no finite number from 0.
    """
    if not 0 <= nats < math.inf:
        raise UserError(f"--max-delta-ln-ppl {nats}: give a number of nats from 0, such as 0.002")
    mixed = {name: recipe for name, recipe in recipes.items() if isinstance(recipe, MixedStaticInt8)}
    if not mixed:
        raise UserError(
            f"--max-delta-ln-ppl {nats}: none of {', '.join(recipes)} has a budget; add int8-static-mixed to --recipes"
        )
    return recipes | {name: dataclasses.replace(recipe, max_delta_ln_ppl=nats) for name, recipe in mixed.items()}


def quantize_one(parent: Artifact, target: Path, name: str, recipe: Recipe, source: Source) -> None:
    """Make artifact `target` of `parent` by `recipe`, unless it is there and up to date."""
    calibration = load_splits(source)[0] if calibration_of(recipe) else None
    inputs = {
        "parent": parent.digest,
        "recipe": to_json(recipe),
        "calibration": calibration.sha256 if calibration else None,
        "code": digests.code_digest(
            *_CODE[type(recipe)], *(_ORT_CODE if getattr(recipe, "target", "portable") == "ort" else ())
        ),
        "versions": digests.versions("numpy", "onnx", "onnx-ir", "onnxruntime", "tokenizers"),
    }
    reason = artifact.rebuild_reason(target, inputs)
    if reason is None:
        report(f"quantize  {target}: up to date")
        return
    report(f"quantize  {target}: {reason}")
    # Imported here: a run that finds everything up to date has no need of them.
    from cuantiza.core.machine.process import isolated
    from cuantiza.quantize.apply import apply

    with folders.staging(target) as work:
        details = isolated(apply, recipe, parent.path, work, calibration)
        for companion in artifact.COMPANIONS:
            shutil.copyfile(parent.path / companion, work / companion)
        artifact.publish(
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
    before, after = parent.model.stat().st_size, (target / artifact.MODEL).stat().st_size
    report(f"          {after / 1e6:.1f} MB, {after / before:.3f} × fp32")


if __name__ == "__main__":
    run(main)
