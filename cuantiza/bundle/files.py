"""The folder of a bundle: which artifacts go into it, and under which file names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx_ir as ir

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.exact_int8 import SESSION_OPTIONS
from cuantiza.core.store import artifact
from cuantiza.core.store.artifact import Artifact

# transformers.js finds a graph by its dtype's name (src/utils/dtypes.js there). In the browser its default is q8.
DTYPES = {"fp32": "fp32", "int8-dynamic": "q8", "int8-static": "int8", "int4-weight": "q4", "fp16": "fp16"}
_SUFFIXES = {"fp32": "", "q8": "_quantized", "int8": "_int8", "q4": "_q4", "fp16": "_fp16"}
# By default, optimum looks only for the file name of this recipe, in any folder below the model's.
FIRST = "fp32"
CARD = "README.md"


def graph_name(recipe: str) -> str:
    """The file name of `recipe`'s graph, such as model_q4.onnx."""
    return f"model{_SUFFIXES[DTYPES[recipe]]}.onnx"


def check_names(recipes: Sequence[str]) -> None:
    """Raise UserError if a recipe has no name in a bundle; all such recipes are named."""
    if unknown := [recipe for recipe in recipes if recipe not in DTYPES]:
        raise UserError(
            f"--recipes {' '.join(unknown)}: no dtype name in transformers.js; choose from {', '.join(DTYPES)}"
        )


def open_all(folder: Path, recipes: list[str]) -> list[Artifact]:
    """Open and verify the artifacts of `recipes` in `folder`. fp32 is always included and comes first.

    Raises UserError if one is missing or broken, has no name in a bundle, or was made from another fp32 artifact.
    """
    check_names(recipes)
    opened = [artifact.open_artifact(folder / recipe) for recipe in dict.fromkeys([FIRST, *recipes])]
    first = opened[0]
    for other in opened[1:]:
        if other.manifest.parent != first.digest:
            raise UserError(f"{other.path}: was not made from {first.path}; run `make export quantize` again")
        if not SESSION_OPTIONS.keys().isdisjoint(other.manifest.details):
            raise UserError(
                f"{other.path}: its int8 sums are clipped on some processors; an older version made it, so run `make quantize` again"
            )
    return opened


def check_target(target: Path, others: Iterable[str]) -> None:
    """Raise UserError if `target`, which a bundle with the files `others` would replace, holds what no bundle has.

    Graphs of any recipe may be there, since an earlier bundle may have had other recipes.
    """
    graphs = {f"onnx/{graph_name(recipe)}" for recipe in DTYPES}
    ours = {CARD, *artifact.COMPANIONS, *others, *graphs, *(f"{name}_data" for name in graphs)}
    there = [path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()] if target.is_dir() else []
    if foreign := sorted({str(path.relative_to(target)) for path in there} - ours):
        raise UserError(
            f"{target}: holds {foreign[0]!r}, which no bundle has and which would be lost; move it away, or choose another "
            "output folder (DIST=, --output)"
        )


def assemble(artifacts: list[Artifact], others: dict[str, Path], card: str, folder: Path) -> None:
    """Fill the empty folder `folder` with onnx/, configurations, tokenizer, model card and `others`, files by name."""
    for name, path in others.items():  # first, so that none of them replaces a file of the bundle's own
        shutil.copyfile(path, folder / name)
    first = artifacts[0]
    (folder / "onnx").mkdir()
    external = {}
    for item in artifacts:
        name = graph_name(item.manifest.name)
        if onnx_file.DATA in item.manifest.files:
            # Each graph needs a data file of its own, whose name is stored in the graph. transformers.js expects the
            # ending `_data`.
            ir.save(onnx_file.load(item.model), folder / "onnx" / name, external_data=f"{name}_data")
            external[name] = True
        else:
            shutil.copyfile(item.model, folder / "onnx" / name)
    artifact.copy_companions(first.path, folder)
    if external:
        config = read_config(first.path) | {"transformers.js_config": {"use_external_data_format": external}}
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")
