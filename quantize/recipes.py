"""Recipes as data: what is quantized, how, and from which calibration. The manifest holds a recipe as it was used."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cuantiza.core.errors import UserError

Rounding = Literal["gptq", "nearest"]
Ranges = Literal["min-max", "percentile", "entropy", "mse"]
# Standard operators for any runtime, or the fewest and fastest ones for ONNX Runtime on a CPU (quantize/rewrite/fuse_attention.py).
Target = Literal["portable", "ort"]
# SmoothQuant's exponents that are tried for each tensor; no exponent, no smoothing.
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def _check_exponents(smoothing: tuple[float, ...]) -> None:
    if not all(0 <= alpha <= 1 for alpha in smoothing):
        raise ValueError(f"smoothing has {', '.join(map(str, smoothing))}; give exponents from 0 to 1")


@dataclass(frozen=True)
class Calibration:
    """Full windows of real text: `windows` of at most `tokens` tokens each; fewer than `minimum` are refused.

    16 and 32 measure alike for 8 bits; at 4 bits, 32 lower KL by 2 % (es-mini and es-sink).
    """

    windows: int = 16
    tokens: int = 512
    minimum: int = 8

    def __post_init__(self) -> None:
        if min(self.windows, self.tokens, self.minimum) < 1:
            raise ValueError(f"calibration has {self}; give whole numbers from 1")


@dataclass(frozen=True)
class DynamicInt8:
    """Weights s8 per channel; activations u8 with a scale per row, computed as they come."""

    rounding: Rounding = "gptq"
    smoothing: tuple[float, ...] = ALPHAS
    calibration: Calibration = Calibration()
    target: Target = "portable"

    def __post_init__(self) -> None:
        _check_exponents(self.smoothing)


@dataclass(frozen=True)
class StaticInt8:
    """Weights s8 per channel; activations u8 per tensor, with ranges from a calibration.

    Up to `float_channels` input channels of a tensor are left out of its integer product where that pays.
    """

    rounding: Rounding = "gptq"
    smoothing: tuple[float, ...] = ALPHAS
    ranges: Ranges = "mse"
    float_channels: int = 16
    calibration: Calibration = Calibration()
    target: Target = "portable"

    def __post_init__(self) -> None:
        _check_exponents(self.smoothing)
        if self.float_channels < 0:
            raise ValueError(f"float_channels is {self.float_channels}; give a number from 0")


@dataclass(frozen=True)
class MixedStaticInt8:
    """As `static`, with the fewest projections in floating point that keep the rise of ln perplexity in a budget.

    `max_delta_ln_ppl` is in nats a token, measured on calibration windows.
    """

    max_delta_ln_ppl: float = 0.002
    static: StaticInt8 = StaticInt8()

    def __post_init__(self) -> None:
        if not 0 <= self.max_delta_ln_ppl < math.inf:
            raise ValueError(f"max_delta_ln_ppl is {self.max_delta_ln_ppl}; give a number of nats from 0")

    @property
    def calibration(self) -> Calibration:
        return self.static.calibration

    @property
    def target(self) -> Target:
        return self.static.target


@dataclass(frozen=True)
class WeightOnly:
    """Weights of `bits` with a scale (and a zero point unless `symmetric`) for every `block` inputs of a channel,
    computed in floating point; the head and the embeddings have bits and blocks of their own.

    `target` "ort" is ONNX Runtime's MatMulNBits, whose activations are int8 with a scale a block.
    """

    bits: Literal[4, 8]
    block: int | None
    symmetric: bool
    table_bits: Literal[4, 8] = 8
    table_block: int | None = None
    rounding: Rounding = "gptq"
    smoothing: tuple[float, ...] = ALPHAS
    target: Target = "portable"
    calibration: Calibration = Calibration(windows=32)

    def __post_init__(self) -> None:
        _check_exponents(self.smoothing)
        for block in (self.block, self.table_block):
            if block is not None and block < 1:
                raise ValueError(f"block is {block}; give a number of inputs from 1, or null for one scale a channel")


@dataclass(frozen=True)
class Half:
    """Weights in half the bytes, computed in fp32."""

    dtype: Literal["fp16", "bf16"]
    target: Target = "portable"


@dataclass(frozen=True)
class Float:
    """The fp32 weights as they are, for another target."""

    target: Target


@dataclass(frozen=True)
class OrtDynamic:
    """ONNX Runtime's own quantize_dynamic, as its documentation advises for transformers."""


@dataclass(frozen=True)
class OrtStatic:
    """ONNX Runtime's own quantize_static (QDQ, min-max), as its documentation advises for transformers."""

    calibration: Calibration = Calibration()


Recipe = DynamicInt8 | StaticInt8 | MixedStaticInt8 | WeightOnly | Half | Float | OrtDynamic | OrtStatic

_PORTABLE: dict[str, DynamicInt8 | StaticInt8 | WeightOnly | Half] = {
    "int8-dynamic": DynamicInt8(),
    "int8-static": StaticInt8(),
    "int8-weight": WeightOnly(8, block=None, symmetric=True),
    "int4-weight": WeightOnly(4, block=64, symmetric=False),
    "fp16": Half("fp16"),
    "bf16": Half("bf16"),
}
RECIPES: dict[str, Recipe] = {
    **_PORTABLE,
    "int8-static-mixed": MixedStaticInt8(),
    "fp32-ort": Float("ort"),
    # The same weights and integers in the operators that are fastest in ONNX Runtime.
    **{f"{name}-ort": dataclasses.replace(recipe, target="ort") for name, recipe in _PORTABLE.items()},
    "int8-static-mixed-ort": MixedStaticInt8(static=StaticInt8(target="ort")),
    "ort-dynamic": OrtDynamic(),
    "ort-static": OrtStatic(),
}


def get_recipe(name: str) -> tuple[str, Recipe]:
    """(name, recipe) of a name in RECIPES, or of a .json file: a recipe, or the manifest of an artifact.

    Raises UserError where there is none, or where the file is no recipe.
    """
    if name in RECIPES:
        return name, RECIPES[name]
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(f"RECIPES={name}: is no recipe; choose from {', '.join(RECIPES)}, or give a .json file of one")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        label, fields = (str(fields["name"]), fields["recipe"]) if "recipe" in fields else (path.stem, fields)
        if label in ("", "fp32") or label.startswith(".") or Path(label).name != label:
            raise ValueError(f"{label!r} is no name for its artifact")
        return label, from_json(fields)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"RECIPES={name}: is no recipe ({error}); start from `python -m quantize recipes --json int8-static`"
        ) from None


def to_json(recipe: Recipe) -> dict:
    """`recipe` as JSON's own types, its class in "type"."""
    return {"type": type(recipe).__name__} | json.loads(json.dumps(dataclasses.asdict(recipe)))


def from_json(fields: dict) -> Recipe:
    """The recipe that `to_json` made `fields` of. Raises ValueError where a field is unknown or of another type."""
    kinds = {kind.__name__: kind for kind in typing.get_args(Recipe)}
    if not isinstance(fields, dict) or fields.get("type") not in kinds:
        raise ValueError(f'"type" must be one of {", ".join(kinds)}')
    return _read(kinds[fields["type"]], {key: value for key, value in fields.items() if key != "type"}, "recipe")


def _read(kind: type, value: object, place: str) -> typing.Any:
    """`value` of JSON as a `kind`: a dataclass, a choice, a tuple, a number or None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or (unknown := sorted(value.keys() - hints.keys())):
            raise ValueError(
                f"{place} has no {', '.join(unknown)}" if isinstance(value, dict) else f"{place} is no object"
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
            raise ValueError(f"{place} is no list")
        return tuple(_read(arguments[0], item, place) for item in value)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{place} is {value!r}, not {kind.__name__}")
    return value


def calibration_of(recipe: Recipe) -> Calibration | None:
    """What `recipe` is calibrated on; None where it needs nothing."""
    return getattr(recipe, "calibration", None)
