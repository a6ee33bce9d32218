"""ONNX files of other exporters: each is run as the contract says, or refused in one line, without a line of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cuantiza.core import contract
from cuantiza.core.errors import UserError
from cuantiza.core.run.runtime import Runtime, open_session

VOCABULARY, HEADS, WIDTH = 7, 2, 4
TOKENS = ["batch", "tokens"]
CACHE = ["batch", HEADS, "past", WIDTH]


def write(folder: Path, change: Callable[[onnx.GraphProto], None] = lambda graph: None) -> Path:
    """Write a model of one layer that keeps the contract, after `change`. Its keys and values are all 1."""
    info = helper.make_tensor_value_info
    past, present = contract.past_names(1), contract.present_names(1)
    table = np.arange(VOCABULARY * VOCABULARY, dtype=np.float32).reshape(VOCABULARY, VOCABULARY)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["logits"]),
        helper.make_node("Shape", ["input_ids"], ["shape"]),
        helper.make_node("Split", ["shape"], ["batch", "count"], num_outputs=2),
        helper.make_node("Concat", ["batch", "heads", "count", "width"], ["new"], axis=0),
        helper.make_node("Expand", ["one", "new"], ["ones"]),
        *(
            helper.make_node("Concat", [before, "ones"], [after], axis=2)
            for before, after in zip(past, present, strict=True)
        ),
    ]
    constants = {
        "table": table,
        "heads": np.array([HEADS]),
        "width": np.array([WIDTH]),
        "one": np.ones((1, 1, 1, 1), np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "foreign",
        [
            info("input_ids", TensorProto.INT64, TOKENS),
            info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *(info(name, TensorProto.FLOAT, CACHE) for name in past),
        ],
        [
            info("logits", TensorProto.FLOAT, [*TOKENS, VOCABULARY]),
            *(info(name, TensorProto.FLOAT, ["batch", HEADS, "total", WIDTH]) for name in present),
        ],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    change(graph)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def retype(name: str, element: int) -> Callable[[onnx.GraphProto], None]:
    """Give the input or output `name` another type, with a Cast to or from what the graph computes with."""

    def change(graph: onnx.GraphProto) -> None:
        for value in [*graph.input, *graph.output]:
            if value.name != name:
                continue
            before, is_input = value.type.tensor_type.elem_type, value in graph.input
            value.type.tensor_type.elem_type = element
            for node in graph.node:
                names = node.input if is_input else node.output
                names[:] = [f"{name}_inside" if other == name else other for other in names]
            pair = (name, f"{name}_inside") if is_input else (f"{name}_inside", name)
            cast = helper.make_node("Cast", [pair[0]], [pair[1]], to=before if is_input else element)
            graph.node.insert(0 if is_input else len(graph.node), cast)

    return change


def merged(graph: onnx.GraphProto) -> None:
    """An input of optimum's merged decoders, which have a branch with a cache and one without."""
    graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))


def joint_cache(graph: onnx.GraphProto) -> None:
    """Keys and values in one tensor, as onnxruntime's convert_to_onnx writes them."""
    for value in [*graph.input, *graph.output]:
        value.name = {contract.past_name(0, "key"): "past_0", contract.present_name(0, "key"): "present_0"}.get(
            value.name, value.name
        )
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [
                {contract.past_name(0, "key"): "past_0", contract.present_name(0, "key"): "present_0"}.get(name, name)
                for name in names
            ]


def no_mask(graph: onnx.GraphProto) -> None:
    graph.input.remove(next(value for value in graph.input if value.name == "attention_mask"))


def only_the_last(graph: onnx.GraphProto) -> None:
    """Logits [B, V] of the last token."""
    gather = next(node for node in graph.node if node.op_type == "Gather")
    gather.output[0] = "all"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(-1), "last"))
    graph.node.append(helper.make_node("Gather", ["all", "last"], ["logits"], axis=1))
    logits = next(value for value in graph.output if value.name == "logits")
    logits.CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", VOCABULARY]))


REFUSED: dict[str, tuple[Callable[[onnx.GraphProto], None], tuple[str, ...]]] = {
    "merged": (merged, ("asks for use_cache_branch",)),
    "joint cache": (joint_cache, ("has no past_key_values.0.key", "asks for past_0")),
    "no mask": (no_mask, ("has no attention_mask",)),
    "keys in 16 bits": (
        retype(contract.past_name(0, "key"), TensorProto.FLOAT16),
        ("past_key_values.0.key is tensor(float16)", "tensor(float) [B, heads, P, width]"),
    ),
    "logits in 16 bits": (retype("logits", TensorProto.FLOAT16), ("logits is tensor(float16)", "tensor(float)")),
    "int32 tokens": (retype("input_ids", TensorProto.INT32), ("input_ids is tensor(int32)", "tensor(int64)")),
    "last token alone": (only_the_last, ("logits is tensor(float) ['batch', 7]", "[B, T, V]")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_interface_is_refused(name: str, tmp_path: Path) -> None:
    change, fragments = REFUSED[name]
    path = write(tmp_path, change)
    with pytest.raises(UserError) as refused:
        Runtime(path, 1)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)
    for fragment in fragments:
        assert fragment in str(refused.value)


def test_a_file_that_keeps_the_contract_runs(tmp_path: Path) -> None:
    """It has no position_ids, as models in which only distances matter."""
    runtime = Runtime(write(tmp_path), 1)
    ids = np.array([[3, 1, 4]])
    assert np.array_equal(runtime.forward(ids)[0, :, 0], ids[0] * VOCABULARY)
    cache = runtime.cache(1, 3)
    runtime.step(cache, ids[:, :2])
    assert runtime.step(cache, ids[:, 2:])[0, 0] == 4 * VOCABULARY and cache.past[0].shape() == [1, HEADS, 3, WIDTH]


def without_past(graph: onnx.GraphProto) -> None:
    """Present keys of the new tokens alone."""
    node = next(node for node in graph.node if node.output[0] == contract.present_name(0, "key"))
    node.CopyFrom(helper.make_node("Identity", ["ones"], [node.output[0]]))


def test_a_cache_that_does_not_grow_is_noticed(tmp_path: Path) -> None:
    """Its first step would be right, and every later one would have forgotten what came before."""
    runtime = Runtime(write(tmp_path, without_past), 1)
    cache = runtime.cache(1, 4)
    runtime.step(cache, np.array([[1, 2]]))
    with pytest.raises(UserError, match=r"present\.0\.key is \[1, 2, 1, 4\] for 1 new tokens of 3"):
        runtime.step(cache, np.array([[3]]))
    _, past = runtime.extend(np.array([[1, 2]]), runtime.empty_past(1))
    with pytest.raises(UserError, match=r"present\.0\.key"):
        runtime.extend(np.array([[3]]), past)


def last_kept(graph: onnx.GraphProto) -> None:
    """Logits [B, 1, V], though the file says [B, T, V]."""
    only_the_last(graph)
    graph.node[-1].op_type = "Gather"
    graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(np.array([-1]), "last"))
    logits = next(value for value in graph.output if value.name == "logits")
    logits.CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*TOKENS, VOCABULARY]))


def test_missing_logits_are_noticed(tmp_path: Path) -> None:
    runtime = Runtime(write(tmp_path, last_kept), 1)
    with pytest.raises(UserError, match=r"logits is \[1, 1, 7\] for 3 new tokens"):
        runtime.forward(np.array([[1, 2, 3]]))


def fixed_length(graph: onnx.GraphProto) -> None:
    """Exported for windows of 4 tokens and no other."""
    for value in [*graph.input, *graph.output]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "tokens":
                dimension.dim_value = 4


def test_what_onnx_runtime_refuses_is_one_line_of_ours(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """When a file is loaded, and when it is run: ids beyond the vocabulary, a length that the file does not take."""
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x0anonsense")
    with pytest.raises(UserError, match=r"broken\.onnx: ONNX Runtime .* cannot load it"):
        open_session(broken, 1)
    runtime = Runtime(write(tmp_path), 1)
    with pytest.raises(UserError, match=r"model\.onnx: ONNX Runtime .* cannot run it .*out of data bounds"):
        runtime.forward(np.array([[VOCABULARY]]))
    with pytest.raises(UserError, match="cannot run it"):
        runtime.step(runtime.cache(1, 2), np.array([[VOCABULARY]]))
    fixed = Runtime(write(tmp_path, fixed_length), 1)
    with pytest.raises(UserError, match="cannot run it"):
        fixed.forward(np.array([[1, 2, 3]]))
    assert capfd.readouterr() == ("", "")
