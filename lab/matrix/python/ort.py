"""Runs a job in ONNX Runtime as its documentation shows: `session.run` on arrays, without our Runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from cuantiza.core import contract
from lab.matrix.python import graphs
from lab.matrix.python.job import run


def main(job: dict) -> dict:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = job["threads"], 3
    session = ort.InferenceSession(Path(job["folder"]) / "model.onnx", options, providers=["CPUExecutionProvider"])
    past = {item.name: tuple(item.shape[1::2]) for item in session.get_inputs() if contract.is_past(item.name)}
    names = [item.name for item in session.get_outputs()]
    found = graphs.logits(
        lambda feeds: dict(zip(names, session.run(names, feeds), strict=True)), past, job, "ONNX Runtime"
    )
    return {"version": f"onnxruntime {ort.__version__}", **found}


if __name__ == "__main__":
    run(main)
