"""optimum's export through ONNX Runtime: fp32, and ORTQuantizer's dynamic int8 (avx512_vnni).

The export is that of ORTModelForCausalLM.from_pretrained(export=True) with accelerate installed; without accelerate the
tied embedding would be stored twice. It runs as in ORTModelForCausalLM with use_io_binding, without transformers' loop.
"""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path

from lab.bench.peers.ort_cache import CachedSession

PER_CHANNEL = {"int8": False, "int8-channel": True}


def version() -> str:
    return f"optimum-onnx {version_of('optimum-onnx')}, onnxruntime {version_of('onnxruntime')}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    from optimum.exporters.onnx import main_export

    export = folder / "fp32"
    main_export(
        str(checkpoint),
        output=export,
        task="text-generation-with-past",
        dtype="fp32",
        library_name="transformers",
        local_files_only=True,
        do_validation=False,
    )
    if kind == "fp32":
        return
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    quantizer = ORTQuantizer.from_pretrained(export, file_name="model.onnx")
    recipe = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=PER_CHANNEL[kind])
    quantizer.quantize(save_dir=folder, quantization_config=recipe)
    for file in export.glob("model.onnx*"):
        file.unlink()


def files(kind: str, folder: Path) -> list[Path]:
    return sorted((folder / "fp32").glob("model.onnx*") if kind == "fp32" else folder.glob("model_quantized.onnx*"))


class Engine(CachedSession):
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        # Its attention concatenates the past and the new keys and values.
        super().__init__(files(kind, folder)[0], threads, in_place=False)
