"""Read ONNX files with checks, and write them without holding the weights in memory twice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from cuantiza.core.errors import UserError
from cuantiza.core.onnx.stream import GRAPH_INITIALIZER, MODEL_GRAPH, TENSOR_RAW_DATA, frame, read_without_weights

DATA = "model.onnx.data"
# A protobuf message is limited to 2 GiB, of which the graph and the framing need a little.
INLINE_LIMIT_BYTES = 2**31 - 2**24


def load(path: Path) -> ir.Model:
    """Read an ONNX file. Its weights stay in the file and are memory-mapped when they are used.

    Raises UserError if the file is corrupt or not a valid model, or if its external data is missing, too short, or
    outside the file's folder.
    """
    try:
        proto = read_without_weights(path)
        _check_external_data(proto, path)
        onnx.checker.check_model(_without_data(proto))
        model = ir.from_proto(proto)
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist") from None
    except onnx.checker.ValidationError as error:
        raise UserError(f"{path}: is not a valid ONNX model ({str(error).splitlines()[0]}); export it again") from None
    except (DecodeError, ir.serde.SerdeError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is not a readable ONNX file ({type(error).__name__}); export it again") from None
    if not model.graph.outputs:
        raise UserError(f"{path}: is not a readable ONNX file (it has no outputs); export it again")
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def check(path: Path) -> None:
    """Raise UserError if `load` would, and return nothing, so that a child process has nothing to send back."""
    load(path)


def _without_data(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph for the checker, with inputs in place of its initializers, so that no weight is copied."""
    bare = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    bare.graph.name = proto.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(bare.graph, field).extend(getattr(proto.graph, field))
    for value in bare.graph.output:  # ONNX Runtime runs a file that leaves these shapes out, and the checker wants one
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    given = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.name not in given:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return bare


def external_data(
    proto: onnx.ModelProto,
) -> Iterator[tuple[onnx.TensorProto, onnx.external_data_helper.ExternalDataInfo]]:
    """Every tensor with external data, and where that data is."""
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if onnx.external_data_helper.uses_external_data(tensor):
            yield tensor, onnx.external_data_helper.ExternalDataInfo(tensor)


def _check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    for tensor, info in external_data(proto):
        file = (folder / info.location).resolve()
        if not info.location or folder not in file.parents:
            cure = (
                f"; copy {path.name} and that file to a folder of their own"
                if (folder / info.location).is_symlink()
                else ""
            )
            raise UserError(
                f"{path}: the data of {tensor.name!r} points to {info.location!r}, outside its folder; refused{cure}"
            )
        needed = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth / 8)
        if info.length not in (None, needed):
            raise UserError(
                f"{path}: {tensor.name!r} names {info.length} bytes of data where its type and shape need {needed}; export it again"
            )
        if not file.is_file() or file.stat().st_size < (info.offset or 0) + needed:
            raise UserError(
                f"{file}: the data of {tensor.name!r} is missing or cut short; copy it whole beside {path.name}"
            )


def save(model: ir.Model, folder: Path) -> None:
    """Write `model` as folder/model.onnx, with its weights in model.onnx.data where they exceed 2 GB.

    Weights are computed and written one at a time. One protobuf message of the whole model would hold every weight
    twice: GPT-2 small peaks at 2.3 GB that way, and at 0.8 GB here. Only the framing of the three enclosing messages is
    our own (cuantiza/core/onnx/stream.py); every message inside them is serialized by the library.
    """
    weights = _weights(model)
    if sum(tensor.nbytes for tensor in weights.values()) > INLINE_LIMIT_BYTES:
        ir.save(model, folder / "model.onnx", external_data=DATA)
        return
    skeleton, graph, heads, lengths = _pieces(model, weights)
    total = _graph_bytes(graph, lengths)
    # It is written under another name first, because weights may be memory-mapped from the file that is replaced.
    new = folder / ".tmp-model.onnx"
    with new.open("wb") as file:
        file.write(skeleton)
        file.write(frame(MODEL_GRAPH, total) + graph)
        for name, tensor in weights.items():
            file.write(frame(GRAPH_INITIALIZER, lengths[name]) + heads[name])
            _write_raw(file, tensor)
    new.replace(folder / "model.onnx")


def saved_bytes(model: ir.Model) -> int:
    """Return how many bytes `save` would write, without computing a weight.

    Where the weights exceed 2 GB, this is the size of a single file, which that of the two differs from by their names.
    """
    skeleton, graph, _, lengths = _pieces(model, _weights(model))
    total = _graph_bytes(graph, lengths)
    return len(skeleton) + len(frame(MODEL_GRAPH, total)) + total


def _weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The initializers by name. onnx_ir refuses to write one without a value."""
    values = model.graph.initializers.items()
    return {name: value.const_value for name, value in values if value.const_value is not None}


def _pieces(
    model: ir.Model, weights: dict[str, ir.TensorProtocol]
) -> tuple[bytes, bytes, dict[str, bytes], dict[str, int]]:
    """What `save` frames: the model without its graph, the graph without its weights, and of each weight, by name, its
    description and the length of description and data together.
    """
    skeleton = ir.to_proto(_without_weights(model, weights))
    graph = skeleton.graph.SerializeToString(deterministic=True)
    skeleton.ClearField("graph")
    heads = {
        name: onnx.TensorProto(name=name, dims=tensor.shape.numpy(), data_type=tensor.dtype.value).SerializeToString()
        for name, tensor in weights.items()
    }
    lengths = {
        name: len(heads[name]) + len(frame(TENSOR_RAW_DATA, tensor.nbytes)) + tensor.nbytes
        for name, tensor in weights.items()
    }
    return skeleton.SerializeToString(deterministic=True), graph, heads, lengths


def _graph_bytes(graph: bytes, lengths: dict[str, int]) -> int:
    return len(graph) + sum(len(frame(GRAPH_INITIALIZER, length)) + length for length in lengths.values())


def _without_weights(model: ir.Model, weights: dict[str, ir.TensorProtocol]) -> ir.Model:
    """A copy of `model` without its initializers."""
    copy = model.clone()
    for name in weights:
        copy.graph.initializers.pop(name)
    return copy


def _write_raw(file: BinaryIO, tensor: ir.TensorProtocol) -> None:
    data = tensor.tobytes()
    if len(data) != tensor.nbytes:
        raise ValueError(f"{tensor.name}: {len(data)} bytes where its type and shape say {tensor.nbytes}")
    file.write(frame(TENSOR_RAW_DATA, len(data)))
    file.write(data)
