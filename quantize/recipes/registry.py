"""The recipes by name, and their form as JSON. A manifest holds its artifact's recipe in this form, as it was used."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Literal

from cuantiza.core.errors import UserError
from cuantiza.core.store.artifact import name_in
from cuantiza.quantize.recipes.budget.int8_static_mixed import MixedStaticInt8
from cuantiza.quantize.recipes.budget.int_mixed import MixedWeightOnly
from cuantiza.quantize.recipes.float_ort import Float
from cuantiza.quantize.recipes.half import Half
from cuantiza.quantize.recipes.int8_dynamic import DynamicInt8
from cuantiza.quantize.recipes.int8_static import StaticInt8
from cuantiza.quantize.recipes.ort_dynamic import OrtDynamic
from cuantiza.quantize.recipes.ort_static import OrtStatic
from cuantiza.quantize.recipes.weight_only import WeightOnly
from cuantiza.quantize.settings import Calibration

if typing.TYPE_CHECKING:
    from cuantiza.quantize.decide.decision import Plan

# Every kind has `describe() -> str`, which says in one line what it does, and `make(parent, work, split) -> dict`,
# which writes the files. A kind that quantizes linear layers one by one also has `plan` and `rewrite`, and its `make`
# takes what calibration decided together with other recipes (quantize/layers.py).
Recipe = (
    DynamicInt8 | StaticInt8 | MixedStaticInt8 | WeightOnly | MixedWeightOnly | Half | Float | OrtDynamic | OrtStatic
)

# Each of these uses standard operators, and has a form NAME-ort in the operators that are fastest in ONNX Runtime.
PORTABLE: dict[str, DynamicInt8 | StaticInt8 | WeightOnly | Half] = {
    "int8-dynamic": DynamicInt8(),
    "int8-static": StaticInt8(),
    "int8-weight": WeightOnly(8, block=32, symmetric=True, table_block=32, scale_bits=8),
    "int4-weight": WeightOnly(4, block=32, symmetric=False, scale_bits=8, rounding="follow"),
    "fp16": Half("fp16"),
    "bf16": Half("bf16"),
}
RECIPES: dict[str, Recipe] = {
    **PORTABLE,
    "int8-static-mixed": MixedStaticInt8(),
    "int-mixed": MixedWeightOnly("0.16x"),
    "fp32-ort": Float("ort"),
    # These forms have the same weights and integers, in other operators.
    **{f"{name}-ort": dataclasses.replace(recipe, target="ort") for name, recipe in PORTABLE.items()},
    "int8-static-mixed-ort": MixedStaticInt8(static=StaticInt8(target="ort")),
    "int-mixed-ort": MixedWeightOnly("0.16x", target="ort"),
    "ort-dynamic": OrtDynamic(),
    "ort-static": OrtStatic(),
}


def get_recipe(name: str) -> tuple[str, Recipe]:
    """Return (name, recipe) for a name in RECIPES, or for a .json file that is a recipe or an artifact's manifest.

    Raises UserError if the name is unknown, or if the file does not hold a recipe.
    """
    if name in RECIPES:
        return name, RECIPES[name]
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(
            f"RECIPES={name}: is not a recipe; choose from {', '.join(RECIPES)}, or give a .json file of one"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        label = name_in(path, fields)
        if "recipe" in fields:  # a manifest
            fields = fields["recipe"]
        if label in ("", "fp32") or label.startswith(".") or Path(label).name != label:
            raise ValueError(f"{label!r} is not a name for its artifact")
        return label, from_json(fields)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"RECIPES={name}: is not a recipe ({error}); start from `cuantiza recipes --json int8-static`"
        ) from None


def to_json(recipe: Recipe) -> dict:
    """Convert `recipe` to JSON's own types, with the name of its class as "type"."""
    return {"type": type(recipe).__name__} | json.loads(json.dumps(dataclasses.asdict(recipe)))


def from_json(fields: dict) -> Recipe:
    """Make the recipe from the `fields` that `to_json` wrote. Raises ValueError if one is unknown or ill-typed."""
    kinds = {kind.__name__: kind for kind in typing.get_args(Recipe)}
    if not isinstance(fields, dict) or fields.get("type") not in kinds:
        raise ValueError(f'"type" must be one of {", ".join(kinds)}')
    return _read(kinds[fields["type"]], {key: value for key, value in fields.items() if key != "type"}, "recipe")


def _read(kind: type, value: object, place: str) -> typing.Any:
    """Convert `value` from JSON to the type `kind`: a dataclass, a choice, a tuple, a number or None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or (unknown := sorted(value.keys() - hints.keys())):
            raise ValueError(
                f"{place} has no {', '.join(unknown)}" if isinstance(value, dict) else f"{place} is not an object"
            )
        return kind(**{key: _read(hints[key], item, key) for key, item in value.items()})
    if origin is types.UnionType:
        options = [option for option in arguments if option is not types.NoneType]
        return None if value is None and len(options) < len(arguments) else _read(options[0], value, place)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise ValueError(f"{place} is {value!r}; choose from {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{place} is not a list")
        return tuple(_read(arguments[0], item, place) for item in value)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{place} is {value!r}, not {kind.__name__}")
    return value


def calibration_of(recipe: Recipe) -> Calibration | None:
    """Return how much text calibrates `recipe`; None if it needs no calibration."""
    return getattr(recipe, "calibration", None)


def least_opset(recipe: Recipe) -> int:
    """Return the opset that the fp32 graph needs at least; 0 if `recipe` works in all that `export` writes."""
    return getattr(recipe, "least_opset", 0)


def calibrates_together(recipe: Recipe) -> bool:
    """Whether `make` takes what calibration decided together with other recipes; int-mixed calibrates more than once."""
    return hasattr(recipe, "plan") and not isinstance(recipe, MixedWeightOnly)


def plan_of(recipe: Recipe) -> Plan | None:
    """Return what calibration decides for each linear layer; None if `recipe` does not quantize them one by one."""
    return recipe.plan() if hasattr(recipe, "plan") else None
