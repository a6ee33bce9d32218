"""Export causal language models other than GPT-2 with optimum's exporter.

The exported graph is then changed so that its inputs and outputs are those of cuantiza/core/contract.py. optimum-onnx
needs transformers 4.57 or older, so it runs in an interpreter of its own (`make optimum`, OPTIMUM_PYTHON).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.version_converter import ConvertVersionPass

from cuantiza.core import contract
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import files_to_read
from cuantiza.core.inputs.model_types import OPTIMUM_TYPES
from cuantiza.core.inputs.weights.checkpoint import read_for_transformers
from cuantiza.core.inputs.weights.files import check_finite
from cuantiza.core.machine import child
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.store import folders

# optimum uses torch's TorchScript exporter, which writes no opset after this one.
_LAST_OPSET = 20
# Rotary embeddings that change with the length of the text. Tracing would fix them at the length of the example.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")
# The layer types of gemma3, each of which has a rotary embedding of its own.
_GEMMA3_LAYERS = ("full_attention", "sliding_attention")
_EXPORT = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past", opset=int(sys.argv[3]), dtype="fp32", library_name="transformers",
            local_files_only=True, trust_remote_code=False, do_validation=False, no_post_process=True)
"""


def check_optimum(fields: dict, path: Path) -> None:
    """Raise UserError where an export of the model with `fields` of config.json, at `path`, is bound to fail.

    This is told before anything slow: a rotary embedding that cannot be exported, an encoder that it needs, no size of
    the vocabulary, or no second environment.
    """
    _legacy_config(fields, path)
    if fields.get("add_cross_attention") is True:
        raise UserError(
            f"{path}: add_cross_attention is true: it is the decoder of an encoder-decoder; only models without an encoder are exported"
        )
    vocabulary = fields.get("vocab_size")
    if type(vocabulary) is not int or vocabulary < 1:
        raise UserError(f"{path}: vocab_size is {vocabulary!r} where a positive whole number is needed")
    _interpreter()


def export_optimum(checkpoint: Path, fields: dict, work: Path, opset: int) -> None:
    """Export the model of `checkpoint`, whose config.json is `fields`, to `work`/model.onnx.

    The graph has the inputs and outputs of cuantiza/core/contract.py. The graphs of bloom, gemma, gemma2, gemma3_text,
    mpt and nemotron take no position_ids, as only distances matter to these models; cuantiza/core/run/runtime.py then
    feeds none. A weight that occurs twice is stored once, also where one copy is the other's transpose.
    Raises UserError as `check_optimum` does, and if the weights are damaged, or the export fails or does not keep the
    contract.
    """
    config = _legacy_config(fields, checkpoint / "config.json")
    python = _interpreter()
    with folders.staging(work) as folder:
        _prepare(checkpoint, config, folder / "checkpoint")
        _run(python, checkpoint, folder / "checkpoint", folder / "onnx", min(opset, _LAST_OPSET))
        model = onnx_file.load(folder / "onnx" / "model.onnx")
        _name_weights(model.graph)
        passes.ClearMetadataAndDocStringPass()(model)
        passes.LiftConstantsToInitializersPass()(model)
        passes.IdentityEliminationPass()(model)
        _share_weights(model.graph)
        passes.RemoveUnusedNodesPass()(model)
        ConvertVersionPass(opset)(model)
        _set_interface(model.graph, checkpoint)
        model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
        model.producer_name, model.producer_version = "cuantiza", None
        onnx_file.save(model, work)


def _interpreter() -> str:
    python = os.environ.get("OPTIMUM_PYTHON", ".venv-optimum/bin/python")
    if not os.access(python, os.X_OK):
        raise UserError(
            f"OPTIMUM_PYTHON={python}: does not exist, and --exporter optimum runs in it; run `make optimum` first"
        )
    return python


def _legacy_config(fields: dict, path: Path) -> dict:
    """Return `fields` as transformers 4.57 reads them: it has separate fields where 5.x writes rope_parameters.

    Raises UserError where the rotary embedding cannot be exported.
    """
    kind = fields.get("model_type")
    # Code from a model's repository is never run, so the field auto_map that names it is dropped.
    config = {key: value for key, value in fields.items() if key not in ("auto_map", "rope_parameters")}
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if kind == "gemma3_text" and isinstance(rope, dict) and [*map(type, map(rope.get, _GEMMA3_LAYERS))] == [dict, dict]:
        rope, local = map(rope.get, _GEMMA3_LAYERS)
        config |= {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"{path}: has a rotary embedding for each type of layer, which transformers 4.57 does not read; choose another model"
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise UserError(
            f"{path}: its rotary embedding ({rope_type}) changes with the length of the text, which an exported graph cannot do; "
            "choose a model with another rotary embedding"
        )
    if "rope_parameters" not in fields:
        return config
    # gpt_neox has its own names for these two fields.
    theta, part = ("rotary_emb_base", "rotary_pct") if kind == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    config |= {new: rope[old] for new, old in ((theta, "rope_theta"), (part, "partial_rotary_factor")) if old in rope}
    if rope_type != "default":
        config["rope_scaling"] = {
            key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")
        }
    return config


def _prepare(checkpoint: Path, config: dict, folder: Path) -> None:
    """Make a folder that holds `config` and links to the weights, and nothing else that optimum would load."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # Damaged files get a clear message here. transformers would use random weights in their place, or compute NaN.
    for name, tensor in read_for_transformers(checkpoint, config).items():
        if tensor.is_float:
            check_finite(name, tensor.read(), checkpoint)
    for name in files_to_read(checkpoint):
        (folder / name).symlink_to((checkpoint / name).resolve())


def _run(python: str, checkpoint: Path, prepared: Path, output: Path, opset: int) -> None:
    """Run optimum's exporter on `prepared`. Where it fails, raises UserError with the last line that it printed."""
    # -I keeps packages of this repository and of the user from replacing those of the environment.
    command = [python, "-I", "-c", _EXPORT, str(prepared), str(output), str(opset)]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        child.run(command, environment=environment)
        written = (output / "model.onnx").is_file()
        failure = "" if written else "it wrote no model.onnx"
    except child.Failed as error:
        failure = str(error)
    if "No module named 'optimum" in failure:
        raise UserError(
            f"OPTIMUM_PYTHON={python}: has no optimum-onnx; run `make optimum`, or name the interpreter that has it"
        )
    if failure:
        raise UserError(
            f"{checkpoint}: optimum's exporter failed ({failure[:300]}); check that the weights belong to the config.json"
        )


def _name_weights(graph: ir.Graph) -> None:
    """Name weights after the modules that multiply by them, where tracing gave them a name like onnx::MatMul_803."""
    for weight in list(graph.initializers.values()):
        node = next(iter(weight.consumers()), None)
        # A node's name is, for example, /model/layers.0/mlp/up_proj/MatMul.
        path = (node.name or "").strip("/").rpartition("/")[0].replace("/", ".") if node else ""
        name = f"{path}.weight"
        if weight.name.startswith("onnx::") and path and name not in graph.initializers:
            weight.name = name


def _share_weights(graph: ir.Graph) -> None:
    """Store equal matrices once, and replace a matrix by a Transpose where it is that of an embedding matrix.

    Vectors are not shared, because many are equal by chance (zeros, ones), and a quantizer may want to change only one.
    """
    kept: dict[tuple, list[ir.Value]] = {}
    for weight in list(graph.initializers.values()):
        array = weight.const_value.numpy()
        if array.ndim < 2:
            continue
        alike = kept.setdefault((array.dtype, array.shape), [])
        equal = next((other for other in alike if np.array_equal(other.const_value.numpy(), array)), None)
        if equal is None:
            alike.append(weight)
        else:
            weight.replace_all_uses_with(equal)
            del graph.initializers[weight.name]
    for embedding in list(_embedding_matrices(graph)):
        array = embedding.const_value.numpy()
        for weight in kept.get((array.dtype, array.shape[::-1]), []):
            # Comparing one column with one row first tells most matrices apart without reading them whole.
            other = weight.const_value.numpy()
            if weight is not embedding and np.array_equal(array[:, 0], other[0]) and np.array_equal(array.T, other):
                _replace_by_transpose(graph, weight, embedding)


def _embedding_matrices(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the matrices whose rows a Gather picks."""
    for weight in graph.initializers.values():
        if weight.const_value.shape.rank() == 2 and any(node.op_type == "Gather" for node in weight.consumers()):
            yield weight


def _replace_by_transpose(graph: ir.Graph, weight: ir.Value, embedding: ir.Value) -> None:
    """Let all nodes that read `weight` read the Transpose of `embedding` instead."""
    users = set(weight.consumers())
    first = next(node for node in graph if node in users)
    transpose = ir.node("Transpose", [embedding], {"perm": [1, 0]}, name=f"{weight.name}.transpose")
    transpose.outputs[0].name = f"{weight.name}.transposed"
    graph.insert_before(first, transpose)
    weight.replace_all_uses_with(transpose.outputs[0])
    del graph.initializers[weight.name]


def _set_interface(graph: ir.Graph, checkpoint: Path) -> None:
    """Give the graph the order of inputs and outputs, and the names of axes, that the graphs of export/graphs/gpt2.py have.

    Raises UserError where an input or output is missing or unknown, or where the number or width of heads is not fixed.
    """
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    layers = contract.count_layers(inputs)
    past, present = contract.past_names(layers), contract.present_names(layers)
    positions = [contract.POSITION_IDS] if contract.POSITION_IDS in inputs else []
    wanted_inputs = [contract.INPUT_IDS, contract.ATTENTION_MASK, *positions, *past]
    wanted_outputs = [contract.LOGITS, *present]
    if not layers or (odd := sorted({*inputs} ^ {*wanted_inputs} | {*outputs} ^ {*wanted_outputs})):
        raise UserError(
            f"{checkpoint}: optimum's export does not keep the contract of docs/artifact.md ({', '.join(odd) if layers else 'no cache'}); "
            f"choose a model of another type: {', '.join(OPTIMUM_TYPES)}"
        )
    axes: dict[str, list[str | int | ir.SymbolicDim]] = {
        contract.INPUT_IDS: [contract.BATCH, contract.TOKENS],
        contract.ATTENTION_MASK: [contract.BATCH, contract.TOTAL],
        contract.POSITION_IDS: [contract.BATCH, contract.TOKENS],
        contract.LOGITS: [contract.BATCH, contract.TOKENS, outputs[contract.LOGITS].shape[2]],
    }
    for before, after in zip(past, present, strict=True):
        _, heads, _, width = inputs[before].shape
        if not isinstance(heads, int) or not isinstance(width, int):
            raise UserError(
                f"{checkpoint}: optimum's export leaves the shape of the cache open ([B, {heads}, P, {width}]); "
                f"choose a model of another type: {', '.join(OPTIMUM_TYPES)}"
            )
        axes[before] = [contract.BATCH, heads, contract.PAST, width]
        axes[after] = [contract.BATCH, heads, contract.TOTAL, width]
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(axes[value.name])
    graph.inputs[:] = [inputs[name] for name in wanted_inputs]
    graph.outputs[:] = [outputs[name] for name in wanted_outputs]
