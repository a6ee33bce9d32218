"""Recipes as data: what is quantized, how, and from which calibration."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import UserError


@dataclass(frozen=True)
class Calibration:
    """Full windows of real text: `windows` of at most `tokens` tokens each; fewer than `minimum` are refused."""

    windows: int = 32
    tokens: int = 512
    minimum: int = 8


@dataclass(frozen=True)
class DynamicInt8:
    """Weights s8 per channel; activations u8 with a scale per row, computed as they come."""


@dataclass(frozen=True)
class StaticInt8:
    """Weights s8 per channel; activations u8 per tensor, with ranges from a calibration."""

    calibration: Calibration = Calibration()


@dataclass(frozen=True)
class OrtDynamic:
    """ONNX Runtime's own quantize_dynamic, as its documentation advises for transformers."""


@dataclass(frozen=True)
class OrtStatic:
    """ONNX Runtime's own quantize_static (QDQ, min-max), as its documentation advises for transformers."""

    calibration: Calibration = Calibration()


Recipe = DynamicInt8 | StaticInt8 | OrtDynamic | OrtStatic

RECIPES: dict[str, Recipe] = {
    "int8-dynamic": DynamicInt8(),
    "int8-static": StaticInt8(),
    "ort-dynamic": OrtDynamic(),
    "ort-static": OrtStatic(),
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UserError where there is none."""
    if name not in RECIPES:
        raise UserError(f"RECIPES={name}: is no recipe; choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def calibration_of(recipe: Recipe) -> Calibration | None:
    """What `recipe` is calibrated on; None where it needs nothing."""
    return getattr(recipe, "calibration", None)
