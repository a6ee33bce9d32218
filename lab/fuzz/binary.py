"""Hypothesis strategies that break the binary formats: safetensors, PyTorch's .bin (a zip archive with a pickle), ONNX."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable

from hypothesis import strategies as st

from lab.fuzz.hostile import NAMES, NUMBERS, broken_bytes, broken_message, broken_value

# Hostile pickles try to create this file. If it exists afterwards, the reader ran code from the file.
CANARY = "canary"


@st.composite
def broken_safetensors(draw: st.DrawFn, seed: bytes) -> bytes:
    """Break the JSON header, or declare a wrong length for it."""
    if draw(st.integers(0, 4)) == 0:
        return draw(broken_bytes(seed))
    (length,) = struct.unpack("<Q", seed[:8])
    header = json.dumps(draw(broken_value(json.loads(seed[8 : 8 + length])))).encode()
    if draw(st.integers(0, 4)) == 0:  # the same tensor twice
        header = header[:-1] + b"," + header[1:]
    claimed = draw(
        st.sampled_from((len(header), len(header), len(header), 0, len(header) + 9, 2**40, 2**63, 2**64 - 1))
    )
    return struct.pack("<Q", claimed) + header + seed[8 + length :]


class _Call:
    """An object whose pickle calls `function` when it is loaded."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def _hostile_pickles() -> list[bytes]:
    import os
    import subprocess

    import torch

    command = f"touch {CANARY}"
    calls = [
        _Call(os.system, command),
        _Call(eval, f"open({CANARY!r}, 'w')"),
        _Call(exec, f"open({CANARY!r}, 'w')"),
        _Call(subprocess.call, ["touch", CANARY]),
        _Call(open, CANARY, "w"),
        _Call(getattr, "a", "upper"),
        _Call(torch.zeros, 10**12),
        _Call(bytearray, 10**12),
    ]
    hand_made = [
        b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        b"\x80\x02cbuiltins\nexec\nX" + struct.pack("<I", len(command)) + command.encode() + b"\x85R.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"(" * 1_000_000 + b".",
        b"]" + b"2" * 1_000_000 + b".",
    ]
    return [pickle.dumps({"transformer.wte.weight": call}, protocol=2) for call in calls] + hand_made


@st.composite
def broken_bin(draw: st.DrawFn, seed: bytes) -> bytes:
    """Break one member of the zip archive, replace it by a hostile pickle, or grow it to a zip bomb.

    Other cases are broken bytes, or a pickle without an archive.
    """
    hostile = st.sampled_from(_hostile_pickles())
    kind = draw(st.sampled_from(("member", "member", "bytes", "pickle", "bare", "bomb", "names")))
    if kind == "bytes":
        return draw(broken_bytes(seed))
    if kind == "bare":
        return draw(st.one_of(hostile, broken_bytes(pickle.dumps({"a": 1}, protocol=2))))
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    target = draw(st.sampled_from(sorted(members)))
    pickled = next(name for name in members if name.endswith("data.pkl"))
    if kind == "pickle":
        members[pickled] = draw(hostile)
    elif kind == "bomb":
        members[target] = bytes(300_000_000)
    elif kind == "names":
        members[draw(st.sampled_from([name for name in NAMES if 0 < len(name.split("\0")[0]) < 1000]))] = members.pop(
            target
        )
    else:
        members[target] = draw(broken_bytes(members[target]))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if kind == "bomb" else zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def broken_onnx(seed: bytes) -> st.SearchStrategy[bytes]:
    import onnx

    model = onnx.load_from_string(seed)
    return st.one_of(broken_message(model), _external(model), _tangled(model))


@st.composite
def _external(draw: st.DrawFn, model) -> bytes:
    """Declare that a weight is stored in another file (external data), often one that is missing or outside."""
    import onnx

    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    tensor = broken.graph.initializer[draw(st.integers(0, len(broken.graph.initializer) - 1))]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    numbers = st.sampled_from([str(number) for number in (*NUMBERS, "x", "")])
    values = {"location": st.sampled_from((*NAMES, "link", "config.json")), "offset": numbers, "length": numbers}
    for key in draw(st.lists(st.sampled_from(["location", *values]), min_size=1, max_size=4)):
        tensor.external_data.add(key=key, value=draw(values[key]))
    if tensor.dims and draw(st.booleans()):
        tensor.dims[0] = draw(st.sampled_from((0, -1, 2**31, 2**62)))
    return broken.SerializeToString()


@st.composite
def _tangled(draw: st.DrawFn, model) -> bytes:
    """Tangle the graph: cycles, two nodes with one output, wrong operators or domains, nested graphs."""
    import onnx

    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    nodes = broken.graph.node
    for _ in range(draw(st.integers(1, 3))):
        node, other = (nodes[draw(st.integers(0, len(nodes) - 1))] for _ in range(2))
        action = draw(st.sampled_from(("cycle", "same output", "operator", "domain", "nest")))
        if action == "cycle" and node.input and other.output:
            node.input[0] = other.output[0]
        elif action == "same output" and node.output and other.output:
            node.output[0] = other.output[0]
        elif action == "operator":
            node.op_type = draw(st.sampled_from(("MatMul", "Gemm", "Gather", "If", "Loop", "", "Constant")))
        elif action == "domain":
            node.domain = draw(st.sampled_from(("com.microsoft", "", "x" * 1000)))
        else:
            inner = node.attribute.add(name="body", type=onnx.AttributeProto.GRAPH)
            inner.g.CopyFrom(model.graph) if len(nodes) < 500 else None
    return broken.SerializeToString()
