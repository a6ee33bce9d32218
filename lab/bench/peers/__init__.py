"""The peers: rows of other libraries, which users would pick instead. Their interface is in lab/bench/worker.py.

This file imports the standard library only. Each peer's module is imported by the interpreter that has its library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Peer:
    """A row of another library: its name, and the module that makes and runs it, in which environment.

    `kind` tells the module which of its rows this is. `precision` is that of the weights; `cache_bytes` is the size of
    one element of the keys and values.
    """

    name: str
    kind: str
    environment: Literal["peers", "optimum"]
    module: str
    precision: str
    cache_bytes: int = 4


PEERS: tuple[Peer, ...] = (
    Peer("PyTorch fp32", "fp32", "peers", "lab.bench.peers.pytorch", "fp32"),
    Peer("PyTorch quantize_dynamic, as in the course", "course", "peers", "lab.bench.peers.pytorch", "int8 head"),
    Peer("PyTorch quantize_dynamic, Conv1D as Linear", "linear", "peers", "lab.bench.peers.pytorch", "int8"),
    Peer("optimum fp32", "fp32", "optimum", "lab.bench.peers.optimum_onnx", "fp32"),
    Peer("optimum int8", "int8", "optimum", "lab.bench.peers.optimum_onnx", "int8"),
    Peer("optimum int8 per channel", "int8-channel", "optimum", "lab.bench.peers.optimum_onnx", "int8"),
    Peer("mobius-onnx fp32", "fp32", "peers", "lab.bench.peers.mobius_onnx", "fp32"),
    Peer("OpenVINO int8 weights", "int8", "peers", "lab.bench.peers.openvino_int8", "int8", cache_bytes=1),
    Peer("OpenVINO GenAI int8", "int8", "peers", "lab.bench.peers.openvino_genai_int8", "int8", cache_bytes=1),
    Peer("CTranslate2 int8", "int8", "peers", "lab.bench.peers.ctranslate2_int8", "int8"),
    Peer("llama.cpp f32", "f32", "peers", "lab.bench.peers.llama_cpp_gguf", "fp32", cache_bytes=2),
    Peer("llama.cpp Q8_0", "q8_0", "peers", "lab.bench.peers.llama_cpp_gguf", "int8", cache_bytes=2),
    Peer("llama.cpp Q4_K_M", "q4_k_m", "peers", "lab.bench.peers.llama_cpp_gguf", "int4", cache_bytes=2),
    Peer("llama.cpp Q4_0", "q4_0", "peers", "lab.bench.peers.llama_cpp_gguf", "int4", cache_bytes=2),
    Peer("onnxruntime-genai's builder int8", "builder-int8", "peers", "lab.bench.peers.ort_genai", "int8"),
    Peer("onnxruntime-genai's builder int4", "builder-int4", "peers", "lab.bench.peers.ort_genai", "int4"),
    Peer("onnxruntime-genai int8-weight-ort", "int8-weight-ort", "peers", "lab.bench.peers.ort_genai", "int8"),
)
