"""OpenVINO with int8 weights: our fp32 graph, compressed by NNCF and made stateful as optimum-intel does.

It uses the LATENCY hint and otherwise the CPU plugin's defaults: keys and values in u8, activations quantized
dynamically in groups where the processor allows. The input beam_idx exists because the plugin fuses attention with the
Gather on the state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino import properties

from cuantiza.core import contract

MODEL = "openvino_model.xml"


def version() -> str:
    return f"openvino {ov.get_version()}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    import nncf

    model = ov.convert_model(ours / "fp32" / "model.onnx")
    _last_logits(model)
    hide_cache(model)
    model = nncf.compress_weights(model)  # int8, asymmetric, a scale per output channel: its default
    ov.save_model(model, folder / MODEL, compress_to_fp16=False)


def files(kind: str, folder: Path) -> list[Path]:
    return [folder / MODEL, (folder / MODEL).with_suffix(".bin")]


class Engine:
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        options = {
            properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
            properties.inference_num_threads(): threads,
            properties.num_streams(): 1,
        }
        self._request = ov.Core().compile_model(folder / MODEL, "CPU", options).create_infer_request()

    def start(self, batch: int, capacity: int) -> None:
        self._request.reset_state()
        self._length = 0
        self._beams = np.arange(batch, dtype=np.int32)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, V] of the last of ids [B, T]; no others are computed. A view that the next call overwrites."""
        batch, count = ids.shape
        positions = np.arange(self._length, self._length + count)
        self._length += count
        self._request.start_async(
            {
                contract.INPUT_IDS: ids,
                contract.ATTENTION_MASK: np.ones((batch, self._length), np.int64),
                contract.POSITION_IDS: np.broadcast_to(positions, ids.shape),
                "beam_idx": self._beams,
            },
            share_inputs=True,
        )
        self._request.wait()
        return self._request.get_tensor(contract.LOGITS).data[:, -1]

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T], of a model that computes all; a view that the next call overwrites."""
        self.start(1, len(ids))
        self.feed(ids[None])
        return self._request.get_tensor(contract.LOGITS).data[0]


def _last_logits(model: ov.Model) -> None:
    """Slice the last position before the head, as OpenVINO GenAI does with the models that it loads."""
    head = model.output(contract.LOGITS).get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    hidden = head.input_value(0)
    last = ops.slice(hidden, *(ops.constant([value], np.int64) for value in (-1, np.iinfo(np.int64).max, 1, 1)))
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def hide_cache(model: ov.Model) -> None:
    """Turn the cache's inputs and outputs into states of the model, reordered by a new input beam_idx [B]."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    ids = model.input(contract.INPUT_IDS)
    past = [port.get_any_name() for port in model.inputs if contract.is_past(port.get_any_name())]
    beams = ops.parameter(ov.PartialShape([ids.get_partial_shape()[0]]), np.int32, name="beam_idx")
    beams.output(0).get_tensor().add_names({"beam_idx"})
    model.add_parameters([beams])
    for name in past:
        port = model.input(name)
        consumers = port.get_target_inputs()
        ordered = ops.gather(port, beams, ops.constant(0))
        for consumer in consumers:
            consumer.replace_source_output(ordered.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {name: contract.present_of(name) for name in past})
    # An empty state needs the batch, which only input_ids knows.
    batch = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant([0]), ops.constant(0))
    for state in (op for op in model.get_ops() if op.get_type_name() == "ReadValue"):
        _, heads, _, width = state.get_output_partial_shape(0)
        shape = ops.concat([batch, ops.constant([heads.get_length(), 0, width.get_length()], np.int64)], axis=0)
        state.set_arguments([ops.broadcast(ops.constant(np.float32(0)), shape)])
    model.validate_nodes_and_infer_types()
