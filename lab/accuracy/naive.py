"""Quantizes with other tools as their defaults are: ONNX Runtime's functions, and optimum, in its own environment.

`make_naive` stands here, and not beside the command, because a child process cannot import from a `__main__.py`.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from cuantiza.core.contract import window_feeds
from cuantiza.core.errors import UserError
from cuantiza.core.machine import child
from cuantiza.core.machine.process import isolated
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.progress import working
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.store import artifact, digests, folders
from cuantiza.core.store.artifact import Artifact
from lab import ROOT

NAIVE = ("naive-dynamic", "naive-static", "optimum-dynamic", "optimum-static")
# Quantizes as optimum's documentation shows. It runs in a separate environment, because optimum needs one. Arguments:
# the fp32 artifact, the folder to write to, "dynamic" or "static", sentences as a JSON list of lists of token ids.
_OPTIMUM = """
import json, sys
import numpy, onnxruntime
from onnxruntime.quantization import CalibrationMethod
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig, CalibrationConfig
folder, work, kind, sentences = sys.argv[1:]
quantizer = ORTQuantizer.from_pretrained(folder, file_name="model.onnx")
config, ranges = AutoQuantizationConfig.avx512_vnni(is_static=kind == "static", per_channel=False), None
if config.is_static:
    inputs = onnxruntime.InferenceSession(folder + "/model.onnx").get_inputs()
    past = {i.name: numpy.zeros((i.shape[1], 0, i.shape[3]), "f") for i in inputs if i.name.startswith("past_")}
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": list(range(len(ids))), **past}
            for ids in json.loads(sentences)]
    calibration = CalibrationConfig("sentences", "", "", len(rows), CalibrationMethod.MinMax)
    ranges = quantizer.fit(rows, calibration, work + "/augmented.onnx", config.operators_to_quantize)
quantizer.quantize(config, work, file_suffix="", calibration_tensors_range=ranges)
"""


def make_naive(name: str, fp32: Artifact, target: Path, sentences: list[list[int]]) -> Artifact:
    """Quantize `fp32` with the tool of `name` (one of NAIVE) to the artifact `target`, unless that is up to date.

    `sentences` are token ids; each sentence is one calibration sample. Raises UserError if optimum is missing or fails.
    """
    tool, kind = name.split("-")
    inputs = {
        "parent": fp32.digest,
        "recipe": {"type": name},
        "calibration": digests.digest(sentences) if kind == "static" else None,
        "code": digests.sha256_file(Path(__file__)),
        "versions": digests.versions("onnx", "onnxruntime"),
    }
    if tool == "optimum":
        inputs["versions"] |= {"optimum": digests.sha256_file(ROOT / "setup" / "optimum.txt")}
        python = Path(os.environ.get("OPTIMUM_PYTHON", ROOT / ".venv-optimum/bin/python"))
        if not os.access(python, os.X_OK):
            raise UserError("there is no environment with optimum; run `make optimum` to make it")
    if reason := artifact.rebuild_reason(target, inputs):
        say(f"accuracy  {target}: {reason}")
        with folders.staging(target) as work:
            if tool == "optimum":
                _optimum(python, fp32.path, work, kind, sentences)
            else:
                isolated(onnxruntime_defaults, kind, fp32.model, work, sentences)
            for extra in [file for file in work.iterdir() if file.name not in (artifact.MODEL, "model.onnx.data")]:
                extra.unlink()
            artifact.copy_companions(fp32.path, work)
            facts = {key: inputs[key] for key in ("recipe", "parent", "calibration", "versions")}
            artifact.publish(work, target, name=name, model=fp32.manifest.model, inputs=inputs, details={}, **facts)
    return artifact.open_artifact(target)


def onnxruntime_defaults(kind: str, model: Path, work: Path, sentences: list[list[int]]) -> None:
    """Write work/model.onnx: quantize_dynamic or quantize_static (`kind`) applied to `model` without preparation."""
    import numpy as np
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    logging.getLogger().setLevel(logging.ERROR)  # the tools log long advice to prepare the model
    proto = onnx.load(model)
    if kind == "dynamic":
        quantize_dynamic(proto, work / artifact.MODEL, weight_type=QuantType.QInt8)
        return
    inputs = onnx_file.load(model).graph.inputs
    feeds = iter([window_feeds(inputs, np.asarray(ids, np.int64)) for ids in sentences])

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict | None:
            return next(feeds, None)

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(proto, work / artifact.MODEL, Reader(), **types)


def _optimum(python: Path, fp32: Path, work: Path, kind: str, sentences: list[list[int]]) -> None:
    # With -I, Python finds only the environment's own packages, not this repository's or the user's.
    command = [python, "-I", "-c", _OPTIMUM, fp32, work, kind, json.dumps(sentences)]
    try:
        with working(f"optimum   {kind} of {fp32.parent.name}"):
            child.run(command, environment={"HF_HUB_OFFLINE": "1"})
    except child.Failed as error:
        raise UserError(f"optimum failed on {fp32.parent.name} ({str(error)[:200]})") from None
    if not (work / artifact.MODEL).is_file():
        raise UserError(f"optimum failed on {fp32.parent.name} (it wrote no {artifact.MODEL})")
