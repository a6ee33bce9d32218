"""Tell checkpoints that are quantized already, which cannot be exported, from those that hold floats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.weights.files import PACKED, Weight

# The ends of the names of tensors that hold scales, zero points or packed integers, and who writes them.
_WRITERS = {
    "bitsandbytes": (".SCB", ".weight_format", ".absmax", ".nested_absmax", ".quant_map", ".bitsandbytes__nf4"),
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx", ".scales"),
    "compressed-tensors or fp8": (
        ".weight_packed",
        ".weight_scale",
        ".weight_scale_inv",
        ".weight_zero_point",
        ".weight_global_scale",
        ".input_scale",
    ),
    "quanto": ("._data", "._scale"),
    "torchao": ("_weight_qdata", "_weight_scale", ":_data", ":qdata", ":int_data"),
    "HQQ": (".W_q",),
    "EETQ": (".weight_scales",),
    "AQLM": (".codes", ".codebooks"),
    "PyTorch": (PACKED,),
}
_ADVICE = "give the checkpoint before it was quantized, and cuantiza makes a small one of it"


def check_not_quantized(fields: Mapping[str, Any], tensors: Mapping[str, Weight], folder: Path) -> None:
    """Raise UserError if config.json (`fields`) or the names in `tensors` say that the weights are quantized."""
    declared = fields.get("quantization_config") or fields.get("compression_config")
    if declared:
        floats = all(weight.is_float for weight in tensors.values())
        instead = "; if its weights are floats after all, remove quantization_config" if floats else ""
        raise UserError(
            f"{folder}: is already quantized ({_method(declared)}, says quantization_config in config.json); {_ADVICE}{instead}"
        )
    for name, weight in tensors.items():
        if writer := _writer(name, tensors):
            raise UserError(f"{folder}: is already quantized ({writer}: it has {name}, {weight.dtype}); {_ADVICE}")


def check_floats(weights: Mapping[str, Weight], folder: Path) -> None:
    """Raise UserError if one of `weights` holds no floats: what its integers mean is not known without scales."""
    odd = [name for name, weight in weights.items() if not weight.is_float]
    if odd:
        count = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise UserError(f"{folder}: is already quantized ({odd[0]} is {weights[odd[0]].dtype}{count}); {_ADVICE}")


def _writer(name: str, tensors: Mapping[str, Weight]) -> str | None:
    """Who writes a tensor of this `name` among `tensors` of a quantized model; None for one that says nothing."""
    module, _, end = name.rpartition(".")
    if end in ("scales", "biases") and {f"{module}.scales", f"{module}.biases"} <= tensors.keys():
        return "MLX"
    return next((writer for writer, ends in _WRITERS.items() if name.endswith(ends)), None)


def _method(declared: Any) -> str:
    if not isinstance(declared, dict):
        return "by an unknown method"
    if isinstance(method := declared.get("quant_method"), str):
        return method
    if {"bits", "group_size"} <= declared.keys() <= {"bits", "group_size", "mode"}:
        return f"MLX, {declared['bits']} bits"
    bits = next((bits for bits in (4, 8) if declared.get(f"load_in_{bits}bit")), None)
    return f"bitsandbytes, {bits} bits" if bits else "by an unknown method"
