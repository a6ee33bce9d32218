"""The ONNX project's ReferenceEvaluator, which implements the standard operator by operator in NumPy."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx.reference import ReferenceEvaluator

from cuantiza.core import contract
from lab.matrix.python import graphs
from lab.matrix.python.job import run


def main(job: dict) -> dict:
    evaluator = ReferenceEvaluator(str(Path(job["folder"]) / "model.onnx"))
    graph = evaluator.proto_.graph
    shapes = {item.name: [size.dim_value for size in item.type.tensor_type.shape.dim] for item in graph.input}
    past = {name: tuple(shape[1::2]) for name, shape in shapes.items() if contract.is_past(name)}
    names = [item.name for item in graph.output]
    found = graphs.logits(
        lambda feeds: dict(zip(names, evaluator.run(None, feeds), strict=True)), past, job, "ReferenceEvaluator"
    )
    return {"version": f"onnx {onnx.__version__}", **found}


if __name__ == "__main__":
    run(main)
