"""The peers of the page on quality. The interface of their modules is in lab/bench/worker.py.

This file imports the standard library only, as lab/bench/peers does, which has the modules of the benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_BENCH, _HERE = "lab.bench.peers", "lab.quality.peers"


@dataclass(frozen=True)
class Peer:
    """A row of another library: its name, and the module that makes and runs it, in which environment.

    `kind` tells the module which of its rows this is, and `calibrated` that it takes the calibration windows. `bits` are
    those of most weights; `how` says on the page what was done.
    """

    name: str
    kind: str
    environment: Literal["peers", "optimum"]
    module: str
    bits: int
    how: str
    calibrated: bool = False


def _llama_cpp(name: str, bits: int) -> Peer:
    how = f"`llama_model_quantize` to {name}, as `llama-quantize` does it"
    return Peer(f"llama.cpp {name}", name.lower(), "peers", f"{_BENCH}.llama_cpp_gguf", bits, how)


def _with_importance(name: str, bits: int) -> Peer:
    how = f"the same to {name}, with an importance matrix of the calibration windows"
    return Peer(f"llama.cpp {name} imatrix", name.lower(), "peers", f"{_HERE}.llama_cpp", bits, how, calibrated=True)


def _torchao(name: str, kind: str, bits: int, how: str) -> Peer:
    return Peer(f"torchao {name}", kind, "peers", f"{_HERE}.torchao_int", bits, how)


def _nncf(name: str, kind: str, bits: int, how: str, calibrated: bool = True) -> Peer:
    return Peer(f"OpenVINO {name}", kind, "peers", f"{_HERE}.openvino_nncf", bits, how, calibrated)


def _nbits(name: str, kind: str, how: str) -> Peer:
    how = f"`MatMulNBitsQuantizer` of ONNX Runtime: {how}, 4 bits in blocks of 32"
    return Peer(f"ONNX Runtime {name}", kind, "peers", f"{_HERE}.onnxruntime_nbits", 4, how)


def _autoround(name: str, kind: str, bits: int, how: str) -> Peer:
    return Peer(f"AutoRound {name}", kind, "peers", f"{_HERE}.auto_round_int", bits, how, calibrated=True)


def _inc(name: str, kind: str, bits: int, how: str) -> Peer:
    name, module = f"Neural Compressor {name}", f"{_HERE}.neural_compressor_int"
    return Peer(name, kind, "peers", module, bits, how, calibrated=True)


def _builder(name: str, bits: int) -> Peer:
    how = f"`onnxruntime_genai.models.builder` with `-p {name} -e cpu`; it knows Llama-shaped families, not GPT-2"
    return Peer(f"onnxruntime-genai's builder {name}", f"builder-{name}", "peers", f"{_BENCH}.ort_genai", bits, how)


def _onnx_quantize(name: str, kind: str, bits: int, how: str) -> Peer:
    how = f"`quantize` with `weights_only` and `mse`: {how}"
    return Peer(f"onnx_quantize {name}", kind, "peers", f"{_HERE}.onnx_quantize_int", bits, how)


PEERS: tuple[Peer, ...] = (
    Peer("PyTorch fp32", "fp32", "peers", f"{_BENCH}.pytorch", 32, "transformers, not quantized"),
    Peer(
        "llama.cpp f32", "f32", "peers", f"{_BENCH}.llama_cpp_gguf", 32, "weights not quantized, keys and values in f16"
    ),
    _llama_cpp("Q8_0", 8),
    _llama_cpp("Q6_K", 6),
    _with_importance("Q6_K", 6),
    _llama_cpp("Q5_K_M", 5),
    _with_importance("Q5_K_M", 5),
    _llama_cpp("Q4_K_M", 4),
    _with_importance("Q4_K_M", 4),
    _llama_cpp("Q4_0", 4),
    _with_importance("Q4_0", 4),
    _nncf(
        "int8 weights",
        "int8-weights",
        8,
        "`nncf.compress_weights` with its defaults: int8, asymmetric",
        calibrated=False,
    ),
    _nncf("int8", "int8", 8, "`nncf.quantize` with ModelType.TRANSFORMER (SmoothQuant, bias correction), mixed preset"),
    _nncf("int4", "int4", 4, "`nncf.compress_weights` to INT4_ASYM in groups of 64, with AWQ and scale estimation"),
    _torchao("int8 dynamic", "int8-dynamic", 8, "`Int8DynamicActivationInt8WeightConfig`"),
    _torchao("int8 weights", "int8-weight", 8, "`Int8WeightOnlyConfig`"),
    _torchao(
        "8da4w", "8da4w", 4, "`Int8DynamicActivationIntxWeightConfig`, int4 in groups of 32, in bytes in the file"
    ),
    _torchao("int4 weights", "int4-weight", 4, "`IntxWeightOnlyConfig`, int4 in groups of 32, in bytes in the file"),
    Peer(
        "CTranslate2 int8",
        "int8",
        "peers",
        f"{_BENCH}.ctranslate2_int8",
        8,
        "the converter's `int8_float32` quantization",
    ),
    _builder("int8", 8),
    _builder("int4", 4),
    _nbits("int4", "default", "rounding to nearest"),
    _nbits("int4 HQQ", "hqq", "HQQ"),
    _nbits("int4 k-quant", "k-quant", "k_quant"),
    _autoround("int4", "int4", 4, "scheme `W4A16` in groups of 32, 200 iterations, run in float32"),
    _autoround("int8", "int8", 8, "scheme `W8A16` in groups of 32, rounding to nearest, run in float32"),
    _inc("int4 GPTQ", "gptq", 4, "`GPTQConfig`, 4 bits in groups of 32, asymmetric"),
    _inc("int4 AWQ", "awq", 4, "`AWQConfig`, 4 bits in groups of 32, asymmetric"),
    _inc("int8", "int8", 8, "`get_default_static_config` on the exported graph, float32 weights in the file"),
    _onnx_quantize("int4", "int4", 4, "4 bits in groups of 32, asymmetric"),
    _onnx_quantize("int8 weights", "int8-weights", 8, "int8 per channel, symmetric"),
    Peer(
        "optimum int8",
        "int8",
        "optimum",
        f"{_BENCH}.optimum_onnx",
        8,
        "`ORTQuantizer` with `AutoQuantizationConfig.avx512_vnni(is_static=False)`",
    ),
    Peer(
        "optimum int8 per channel",
        "int8-channel",
        "optimum",
        f"{_BENCH}.optimum_onnx",
        8,
        "the same with `per_channel=True`",
    ),
)
