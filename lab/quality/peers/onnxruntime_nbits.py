"""ONNX Runtime's own tool for 4-bit weights, MatMulNBitsQuantizer, on our fp32 graph.

Its algorithms are rounding to nearest (`default`), HQQ, and that of llama.cpp's K-quants (`k-quant`); blocks of 32
inputs share a scale and a zero point. It quantizes MatMul nodes only, so a tied embedding is stored in float32 for
itself, beside the quantized head.
"""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path

import onnx
from onnxruntime.quantization import matmul_nbits_quantizer as tool

from lab.bench.peers.ort_cache import CachedSession

BLOCK = 32


def version() -> str:
    return f"onnxruntime {version_of('onnxruntime')}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    configs = {
        "default": lambda: tool.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, accuracy_level=4),
        "hqq": lambda: tool.HQQWeightOnlyQuantConfig(block_size=BLOCK),
        "k-quant": lambda: tool.KQuantWeightOnlyQuantConfig(),
    }
    model = onnx.load(ours / "fp32" / "model.onnx")
    quantizer = tool.MatMulNBitsQuantizer(
        model, block_size=BLOCK, is_symmetric=False, accuracy_level=4, algo_config=configs[kind]()
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "model.onnx"), use_external_data_format=False)


def files(kind: str, folder: Path) -> list[Path]:
    return sorted(folder.glob("model.onnx*"))


class Engine(CachedSession):
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        super().__init__(folder / "model.onnx", threads, in_place=False)
