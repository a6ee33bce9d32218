"""Count the bytes on disk that inference needs: the ONNX file, its external data, configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path

from cuantiza.core.onnx.file import external_data
from cuantiza.core.onnx.stream import read_without_weights
from cuantiza.core.store.artifact import COMPANIONS
from cuantiza.eval.measure.engines import Subject


def inference_files(model: Path) -> list[Path]:
    """List the files that inference with an ONNX file needs: itself, its external data, configuration and tokenizer."""
    external = {info.location for _, info in external_data(read_without_weights(model))} - {model.name}
    return [model, *(model.parent / name for name in sorted(external)), *_companions(model.parent)]


def onnx_bytes(model: Path) -> dict:
    """Return {bytes: those of all files that inference needs, model_bytes: the ONNX file and its external data}."""
    total = sum(file.stat().st_size for file in inference_files(model))
    return {"bytes": total, "model_bytes": total - companion_bytes(model.parent)}


def companion_bytes(folder: Path) -> int:
    """Return the bytes of the configuration and tokenizer files in `folder`."""
    return sum(file.stat().st_size for file in _companions(folder))


def loaded_bytes(subject: Subject) -> int:
    """Estimate how many bytes a subject loads: all files that its ONNX file needs, or a checkpoint's weight files."""
    if subject.path.is_file():
        return sum(file.stat().st_size for file in inference_files(subject.path))
    return sum(file.stat().st_size for file in subject.path.iterdir() if file.suffix in (".bin", ".safetensors"))


def _companions(folder: Path) -> list[Path]:
    """List the configuration and tokenizer files in `folder`. transformers.js has them above a folder `onnx`."""
    found = [folder / name for name in COMPANIONS if (folder / name).is_file()]
    return _companions(folder.parent) if not found and folder.name == "onnx" else found
