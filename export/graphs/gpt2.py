"""GPT-2 as an ONNX graph of standard operators. The code reads from top to bottom like the model.

The inputs and outputs are those of cuantiza/core/contract.py.

B batch, T new tokens, P tokens in the KV cache, D width of the model, H heads, d = D/H, V vocabulary.
"""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
from onnx_ir import DataType

from cuantiza.core import contract
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.gpt2_config import GPT2Config
from cuantiza.core.inputs.weights.files import Weight, check_finite

_END = 2**63 - 1  # as the end of a Slice: the end of the axis, however long it is
_BLOCK = re.compile(r"h\.(\d+)\.")


def build(config: GPT2Config, weights: dict[str, Weight], opset: int, folder: Path) -> ir.Model:
    """Build the graph of `config` with `weights`, which are read only when the model is saved.

    Raises UserError where a weight is missing, has another shape, or (when it is read) is not finite. The message names
    `folder`.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="gpt2")
    builder = onnxscript.GraphBuilder(graph)
    op = builder.op
    width, vocabulary = config.n_embd, config.vocab_size

    def weight(name: str, *shape: int) -> ir.Value:
        if name not in weights:
            raise UserError(f"{folder}: has no weight {name}; take the files of the original checkpoint")
        source = weights[name]
        if source.shape != shape:
            turned = ", which is its transpose" if source.shape == shape[::-1] != shape else ""
            raise UserError(
                f"{folder}: {name} is {list(source.shape)} where config.json says {list(shape)}{turned}; take the config.json of the same checkpoint"
            )
        tensor = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(check_finite(name, source.read(), folder))),
            DataType.FLOAT,
            ir.Shape(shape),
            name=name,
        )
        return builder.initializer(tensor, name)

    def linear(x: ir.Value, name: str, inputs: int, outputs: int) -> ir.Value:
        # transformers' Conv1D stores its weight as [inputs, outputs], which is the layout of MatMul.
        y = op.MatMul(x, weight(f"{name}.weight", inputs, outputs), _name=name)
        return op.Add(y, weight(f"{name}.bias", outputs), _name=f"{name}.bias")

    def layer_norm(x: ir.Value, name: str) -> ir.Value:
        scale, bias = weight(f"{name}.weight", width), weight(f"{name}.bias", width)
        return op.LayerNormalization(x, scale, bias, axis=-1, epsilon=config.layer_norm_epsilon, _name=name)

    layers = {int(found[1]): name for name in weights if (found := _BLOCK.match(name))}
    # Check the number of layers before anything is built: config.json may say two billion.
    if (missing := next(layer for layer in count() if layer not in layers)) < config.n_layer:
        raise UserError(
            f"{folder}: has no weight h.{missing}.* where config.json says n_layer {config.n_layer}; take the config.json of the same checkpoint"
        )
    if beyond := next((name for layer, name in layers.items() if layer >= config.n_layer), None):
        raise UserError(
            f"{folder}: has a weight {beyond} where config.json says n_layer {config.n_layer}; take the config.json of the same checkpoint"
        )

    tokens = [contract.BATCH, contract.TOKENS]
    input_ids = builder.input(contract.INPUT_IDS, DataType.INT64, tokens)
    attention_mask = builder.input(contract.ATTENTION_MASK, DataType.INT64, [contract.BATCH, contract.TOTAL])
    position_ids = builder.input(contract.POSITION_IDS, DataType.INT64, tokens)
    cache: list[str | int] = [contract.BATCH, config.n_head, contract.PAST, config.head_dim]
    past = [builder.input(name, DataType.FLOAT, cache) for name in contract.past_names(config.n_layer)]
    present: list[ir.Value] = []

    # This input has a default, so that loaders that do not know it need not feed it.
    keep = ir.Value(
        name=contract.KEEP,
        shape=ir.Shape([]),
        type=ir.TensorType(DataType.INT64),
        const_value=ir.tensor(np.array(0, np.int64), name=contract.KEEP),
    )
    graph.inputs.append(keep)
    graph.register_initializer(keep)

    wte = weight("wte.weight", vocabulary, width)
    wpe = weight("wpe.weight", config.n_positions, width)
    x = op.Add(op.Gather(wte, input_ids, _name="wte"), op.Gather(wpe, position_ids, _name="wpe"))  # [B, T, D]
    visible = _visible(op, input_ids, attention_mask)  # [B, 1, T, P+T]

    for layer in range(config.n_layer):
        block = f"h.{layer}"
        h = layer_norm(x, f"{block}.ln_1")
        qkv = linear(h, f"{block}.attn.c_attn", width, 3 * width)  # [B, T, 3D]
        q, k, v = (_split_heads(op, part, config) for part in op.Split(qkv, axis=-1, num_outputs=3, _outputs=3))
        k = op.Concat(past[2 * layer], k, axis=2)  # [B, H, P+T, d]
        v = op.Concat(past[2 * layer + 1], v, axis=2)
        present += [k, v]
        scores = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]), _name=f"{block}.attn.scores")  # [B, H, T, P+T]
        if (scale := _attention_scale(config, layer)) != 1.0:
            scores = op.Mul(scores, scale)
        attention = op.Softmax(op.Add(scores, visible), axis=-1, _name=f"{block}.attn.softmax")
        context = op.MatMul(attention, v, _name=f"{block}.attn.context")  # [B, H, T, d]
        context = op.Reshape(op.Transpose(context, perm=[0, 2, 1, 3]), [0, 0, width])  # [B, T, D]
        if layer == config.n_layer - 1:
            # Keys and values are complete here. What follows only feeds the logits, so keep just the positions that
            # were asked for.
            start = op.Neg(op.Unsqueeze(keep, [0]))
            context, x = (op.Slice(value, start, [_END], [1]) for value in (context, x))  # [B, n or T, D]
        x = op.Add(x, linear(context, f"{block}.attn.c_proj", width, width))
        h = layer_norm(x, f"{block}.ln_2")
        h = _activation(op, linear(h, f"{block}.mlp.c_fc", width, config.n_inner), config.activation_function, opset)
        x = op.Add(x, linear(h, f"{block}.mlp.c_proj", config.n_inner, width))

    x = layer_norm(x, "ln_f")
    # In a tied model, the embedding matrix is also the head's weight. Runtimes fold the transpose of a constant at load.
    head = wte if _is_tied(config, weights) else weight("lm_head.weight", vocabulary, width)
    logits = op.MatMul(x, op.Transpose(head, perm=[1, 0]), _name="lm_head")  # [B, T, V]

    logits.shape = ir.Shape([*tokens, vocabulary])
    builder.add_output(logits, contract.LOGITS)
    for value, name in zip(present, contract.present_names(config.n_layer), strict=True):
        value.shape = ir.Shape([contract.BATCH, config.n_head, contract.TOTAL, config.head_dim])
        builder.add_output(value, name)
    for node in graph:
        node.metadata_props.clear()
    ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return ir.Model(graph, ir_version=ir_version, producer_name="cuantiza")


def _is_tied(config: GPT2Config, weights: dict[str, Weight]) -> bool:
    """Whether head and embedding share a matrix: they are equal, or there is no head and config.json says so."""
    if "lm_head.weight" not in weights or "wte.weight" not in weights:
        return config.tie_word_embeddings
    head, embedding = weights["lm_head.weight"], weights["wte.weight"]
    return head.shape == embedding.shape and np.array_equal(head.read(), embedding.read())


def _visible(op: onnxscript.OpBuilder, input_ids: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """Make the attention mask [B, 1, T, P+T]: 0 where the new token t may see position s, else contract.MASKED.

    It may see s if s ≤ P + t and s is not padding.
    """
    total = op.Shape(attention_mask, start=1, end=2)
    count = op.Shape(input_ids, start=1, end=2)
    keys = op.Range(0, op.Squeeze(total, [0]), 1)  # [P+T]
    queries = op.Slice(keys, op.Sub(total, count), total)  # [T]: P .. P+T-1
    causal = op.LessOrEqual(keys, op.Unsqueeze(queries, [1]))  # [T, P+T]
    real = op.Cast(op.Unsqueeze(attention_mask, [1, 2]), to=DataType.BOOL)  # [B, 1, 1, P+T]
    return op.Where(op.And(causal, real), 0.0, contract.MASKED)


def _split_heads(op: onnxscript.OpBuilder, x: ir.Value, config: GPT2Config) -> ir.Value:
    """Split x [B, T, D] into heads [B, H, T, d]."""
    return op.Transpose(op.Reshape(x, [0, 0, config.n_head, config.head_dim]), perm=[0, 2, 1, 3])


def _attention_scale(config: GPT2Config, layer: int) -> float:
    scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def _activation(op: onnxscript.OpBuilder, x: ir.Value, name: str, opset: int) -> ir.Value:
    """Apply transformers' activation `name`. ONNX has a Gelu operator from opset 20 on."""
    match name:
        case "relu":
            return op.Relu(x)
        case "tanh":
            return op.Tanh(x)
        case "silu" | "swish":
            return op.Mul(x, op.Sigmoid(x))
        case "gelu" if opset >= 20:
            return op.Gelu(x)
        case "gelu":
            return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, 0.5**0.5)), 1.0))
        case _ if opset >= 20:
            return op.Gelu(x, approximate="tanh")
        case _:
            # 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³))), arXiv 1606.08415
            cubic = op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), 0.044715))
            return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(op.Mul(cubic, (2 / np.pi) ** 0.5)), 1.0))
