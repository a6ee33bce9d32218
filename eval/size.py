"""Bytes on disk that inference needs: the graph, its external data, configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path

import onnx

from eval.engines import Subject

COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def onnx_bytes(model: Path) -> dict:
    """{bytes: all that inference needs, model_bytes: the ONNX file and its external data}."""
    proto = onnx.load(model, load_external_data=False)
    names = {
        onnx.external_data_helper.ExternalDataInfo(tensor).location
        for tensor in onnx.external_data_helper._get_all_tensors(proto)
        if onnx.external_data_helper.uses_external_data(tensor)
    }
    weights = sum((model.parent / name).stat().st_size for name in names) + model.stat().st_size
    return {"bytes": weights + companion_bytes(model.parent), "model_bytes": weights}


def weight_bytes(subject: Subject) -> int:
    """Bytes of everything that stands beside a subject's weights, themselves included: how much loading it may take."""
    folder = subject.path.parent if subject.path.is_file() else subject.path
    return sum(
        file.stat().st_size for file in folder.iterdir() if file.suffix in (".onnx", ".data", ".bin", ".safetensors")
    )


def companion_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in COMPANIONS if (folder / name).is_file())
