"""onnx_quantize: weights of a few bits on our fp32 graph, by rounding to nearest with a search for the least error.

Its scales and zero points are nodes of ONNX's own functions, and ONNX Runtime runs them. It quantizes MatMul nodes with
constant weights only, so a tied embedding and its head stay in float32. Its release on PyPI has no AWQ and no HQQ, and
calibrates graphs of a single input only, which ours are not; so its GPTQ is not here.
"""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import onnx
from onnx_quantize import QConfig, QuantType, quantize

from lab.bench.peers.ort_cache import CachedSession

GROUP = 32
CONFIGS: dict[str, dict[str, Any]] = {
    "int4": {"weights_dtype": QuantType.QUInt4, "weights_symmetric": False, "group_size": GROUP},
    "int8-weights": {"weights_dtype": QuantType.QInt8, "weights_symmetric": True, "strategy": "channel"},
}


def version() -> str:
    return f"onnx_quantize {version_of('onnx_quantize')}, onnxruntime {version_of('onnxruntime')}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    config = QConfig(is_static=False, weights_only=True, mse=True, **CONFIGS[kind])
    onnx.save(quantize(onnx.load(ours / "fp32" / "model.onnx"), config), folder / "model.onnx")


def files(kind: str, folder: Path) -> list[Path]:
    return [folder / "model.onnx"]


class Engine(CachedSession):
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        super().__init__(folder / "model.onnx", threads, in_place=False)
