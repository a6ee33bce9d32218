"""`python -m quantize`: fp32 artifact x recipes -> artifacts/<model>/<recipe>."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from core import artifact
from core.artifact import Artifact
from core.corpus import Source, add_arguments, load_splits, source_of
from core.errors import UserError, run
from core.hub import model_name
from core.progress import report
from quantize.recipes import (
    RECIPES,
    DynamicInt8,
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

# What each recipe runs; the choice between them (quantize.apply) and their values (in the manifest) change no bytes.
_CODE = {
    DynamicInt8: ("quantize.dynamic", "quantize.calibrate"),
    StaticInt8: ("quantize.static", "quantize.calibrate"),
    MixedStaticInt8: ("quantize.static", "quantize.calibrate", "quantize.sensitivity"),
    WeightOnly: ("quantize.weight_only", "quantize.calibrate"),
    Half: ("quantize.half", "core.onnx_file"),
    OrtDynamic: ("quantize.ort",),
    OrtStatic: ("quantize.ort", "quantize.calibrate"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quantize", description=__doc__)
    parser.add_argument("--model", default="models/es-mini", help="the model that was exported: folder or hub id")
    parser.add_argument(
        "--recipes", nargs="+", default=["int8-dynamic", "int8-static"], metavar="RECIPE", help=", ".join(RECIPES)
    )
    parser.add_argument("--output", type=Path, default=Path("artifacts"), help="folder of the artifacts")
    add_arguments(parser)
    args = parser.parse_args()
    recipes = dict(map(get_recipe, args.recipes))
    folder = args.output / model_name(args.model)
    if not (folder / "fp32").is_dir():
        raise UserError(f"{folder / 'fp32'}: is not there; run `make export` first")
    with artifact.locked(folder):
        parent = artifact.open_artifact(folder / "fp32")
        for name, recipe in recipes.items():
            quantize_one(parent, folder / name, name, recipe, source_of(args))
    return 0


def quantize_one(parent: Artifact, target: Path, name: str, recipe: Recipe, source: Source) -> None:
    """Make artifact `target` of `parent` by `recipe`, unless it is there and up to date."""
    calibration = load_splits(source)[0] if calibration_of(recipe) else None
    inputs = {
        "parent": parent.digest,
        "recipe": to_json(recipe),
        "calibration": calibration.sha256 if calibration else None,
        "code": artifact.code_digest(*_CODE[type(recipe)]),
        "versions": artifact.versions("numpy", "onnx", "onnx-ir", "onnxruntime", "tokenizers"),
    }
    reason = artifact.rebuild_reason(target, inputs)
    if reason is None:
        report(f"quantize  {target}: up to date")
        return
    report(f"quantize  {target}: {reason}")
    # Imported here: a run that finds everything up to date has no need of them.
    from core.process import isolated
    from quantize.apply import apply

    with artifact.staging(target) as work:
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
