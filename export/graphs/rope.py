"""Rotary position embeddings: the angle by which each position turns a pair of channels, for the kinds that models have.

Position p turns pair i by p · f_i, where f_i = theta^(-2i/r) for i < r/2 (arXiv 2104.09864). A model that was trained
on short texts is stretched to long ones by changing f:

linear   all f divided by a factor (arXiv 2306.15595)
llama3   slow f divided by the factor, fast ones kept, between them a mix (Llama 3.1's own reference code)
yarn     the same with other bounds, and queries and keys made longer (arXiv 2309.00071)

A graph holds the r/2 frequencies, and makes cosines and sines of the positions that it is given: a table of them would
have 131,072 rows for a model of today.

B batch, T new tokens, H heads, d width of a head, r channels of a head that are turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript
from onnx_ir import DataType

# Kinds whose frequencies change with the length of the text, while past keys have been turned by the old ones.
_CHANGING = ("dynamic", "longrope", "su")


class NotExported(ValueError):
    """A configuration that models have, and that no graph here computes. `optimum` says whether optimum's may."""

    def __init__(self, said: str, optimum: bool = True) -> None:
        super().__init__(said)
        self.optimum = optimum


@dataclass(frozen=True)
class Rope:
    """The frequencies f_i in radians per position, as float32 holds them, and what cosines and sines are multiplied by."""

    frequencies: tuple[float, ...]
    scale: float = 1.0

    @property
    def channels(self) -> int:
        """How many channels of a head are turned."""
        return 2 * len(self.frequencies)


def rope(parameters: Mapping[str, Any], channels: int) -> Rope:
    """The rotary embedding of `channels` channels with `parameters`, transformers' rope_parameters of one layer.

    Raises ValueError, with what is wrong with the parameters, for a kind that is not known, and where a number that it
    needs is missing or none; NotExported for a kind that changes with the text's length.
    """
    kind = parameters.get("rope_type", "default")
    if kind in _CHANGING:
        raise NotExported(
            f"rope_type {kind!r} changes with the length of the text, which an exported graph cannot do", optimum=False
        )
    if kind not in _STRETCHED:
        raise ValueError(f"rope_type {kind!r} is not one of {', '.join(_STRETCHED)}")
    # The model was trained with frequencies that PyTorch computed in float32, so the steps are rounded as it rounds them.
    exponents = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    periods = (_number(parameters, "rope_theta") ** exponents.astype(np.float64)).astype(np.float32)
    frequencies, scale = _STRETCHED[kind](np.float32(1) / periods, parameters)
    return Rope(tuple(frequencies.astype(np.float32).tolist()), scale)


def turning(
    builder: onnxscript.GraphBuilder, position_ids: ir.Value, ropes: Iterable[Rope]
) -> dict[Rope, tuple[ir.Value, ir.Value]]:
    """Cosines and sines [B, 1, T, r/2] of the angles by which each of `ropes` turns the new tokens."""
    op = builder.op
    turns: dict[Rope, tuple[ir.Value, ir.Value]] = {}
    for number, rope in enumerate(dict.fromkeys(ropes)):
        name = f"rotary.{number}.frequencies"
        frequencies = builder.initializer(ir.tensor(np.array(rope.frequencies, np.float32), name=name), name)
        positions = op.Cast(op.Unsqueeze(position_ids, [1, 3]), to=DataType.FLOAT)  # [B, 1, T, 1]
        angles = op.Mul(positions, frequencies)
        cosines, sines = op.Cos(angles), op.Sin(angles)
        if rope.scale != 1.0:
            cosines, sines = op.Mul(cosines, rope.scale), op.Mul(sines, rope.scale)
        turns[rope] = cosines, sines
    return turns


def turn(
    op: onnxscript.OpBuilder, x: ir.Value, rope: Rope, turns: Mapping[Rope, tuple[ir.Value, ir.Value]], width: int
) -> ir.Value:
    """Turn queries or keys x [B, H, T, d] by `rope`, whose cosines and sines are in `turns`; d is `width`.

    Of the first r channels, i and i + r/2 are a pair; the rest stays.
    """
    (cosines, sines), half, rest = turns[rope], rope.channels // 2, width - rope.channels
    if rest:
        a, b, *others = op.Split(x, [half, half, rest], axis=-1, _outputs=3)
    else:
        a, b, *others = op.Split(x, axis=-1, num_outputs=2, _outputs=2)
    first = op.Sub(op.Mul(a, cosines), op.Mul(b, sines))
    second = op.Add(op.Mul(b, cosines), op.Mul(a, sines))
    return op.Concat(first, second, *others, axis=-1)


def paired(array: np.ndarray, channels: int, width: int) -> np.ndarray:
    """Reorder queries' or keys' outputs [H·d, ..] so that channels 2i and 2i + 1 of the first `channels` become a pair.

    Some families turn neighbours, and not i and i + r/2; `width` is d. Scores are the same, because queries and keys
    change their order together.
    """
    order = [*range(0, channels, 2), *range(1, channels, 2), *range(channels, width)]
    return array.reshape(-1, width, *array.shape[1:])[:, order].reshape(array.shape)


def _default(frequencies: np.ndarray, _: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    return frequencies, 1.0


def _linear(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    return frequencies / _number(parameters, "factor"), 1.0


def _llama3(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    slow, fast = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    turns = _number(parameters, "original_max_position_embeddings") * frequencies / (2 * np.pi)
    kept = np.clip(
        (turns - slow) / (fast - slow), 0, 1
    )  # turns: how often a pair turned in the longest text of training
    return frequencies * (kept + (1 - kept) / _number(parameters, "factor")), 1.0


def _yarn(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    factor, theta = _number(parameters, "factor"), _number(parameters, "rope_theta")
    length, channels = _number(parameters, "original_max_position_embeddings"), 2 * len(frequencies)

    def pair(turns: float) -> float:
        """The index of the pair that turns so often in the longest text of training."""
        return channels * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(_number(parameters, "beta_fast", 32)), pair(_number(parameters, "beta_slow", 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    divided = np.clip((np.arange(len(frequencies)) - first) / (last - first or 0.001), 0, 1)
    return frequencies * (1 - divided + divided / factor), _yarn_scale(factor, parameters)


def _yarn_scale(factor: float, parameters: Mapping[str, Any]) -> float:
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")

    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return grown(_number(parameters, "mscale")) / grown(_number(parameters, "mscale_all_dim"))
    return grown(1)


_STRETCHED = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _number(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = parameters.get(key)
    value = default if default is not None and not value else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"rope_parameters have {key} {value!r} where a positive number is needed")
    return float(value)
