"""OpenVINO on the ONNX file itself: `python -m lab.matrix.python.openvino PRECISION job.json`.

PRECISION is "f32", or "default": the plugin's own choice, which is bfloat16 on processors that compute in it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import openvino as ov
from openvino import properties

from cuantiza.core import contract
from lab.matrix.python import graphs
from lab.matrix.python.job import run


def main(job: dict) -> dict:
    core = ov.Core()
    options = {properties.inference_num_threads(): job["threads"], properties.num_streams(): 1}
    if sys.argv[1] == "f32":
        options |= {
            properties.hint.inference_precision(): ov.Type.f32,
            properties.hint.dynamic_quantization_group_size(): 0,
            properties.hint.kv_cache_precision(): ov.Type.f32,
        }
    model = core.compile_model(core.read_model(Path(job["folder"]) / "model.onnx"), "CPU", options)
    request = model.create_infer_request()
    shapes = {port.get_any_name(): port.get_partial_shape() for port in model.inputs}
    past = {
        name: (shape[1].get_length(), shape[3].get_length()) for name, shape in shapes.items() if contract.is_past(name)
    }

    def call(feeds: dict) -> dict:
        found = request.infer({name: array for name, array in feeds.items() if name in shapes})
        return {port.get_any_name(): array for port, array in found.items()}

    precision = model.get_property(properties.hint.inference_precision())
    version = f"openvino {ov.__version__.split('-')[0]}, {precision.get_type_name()}"
    return {"version": version, **graphs.logits(call, past, job, "OpenVINO")}


if __name__ == "__main__":
    run(main)
