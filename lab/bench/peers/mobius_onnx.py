"""mobius-onnx: Microsoft's direct graph builder, in fp32, run by ONNX Runtime.

The graph is built for the CPU execution provider (`--ep cpu`), as mobius' guide advises. It has GroupQueryAttention on
packed q/k/v, with a cache that is updated in place (84 nodes for 6 layers, 156 for 12). `default` would use opset 24's
Attention, which concatenates (108 and 204 nodes).
"""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path

from lab.bench.peers.ort_cache import CachedSession


def version() -> str:
    return f"mobius-onnx {version_of('mobius-onnx')}, onnxruntime {version_of('onnxruntime')}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    from mobius import build

    # Given a folder, it reads the safetensors there and downloads nothing.
    package = build(str(checkpoint.resolve()), dtype="f32", execution_provider="cpu")
    package.save(str(folder), progress_bar=False)


def files(kind: str, folder: Path) -> list[Path]:
    return sorted(folder.glob("model.onnx*"))


class Engine(CachedSession):
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        super().__init__(folder / "model.onnx", threads, in_place=True)
