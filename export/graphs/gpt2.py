"""GPT-2 as an ONNX graph of standard operators. The code reads from top to bottom like the model.

The inputs and outputs are those of cuantiza/core/contract.py; parts.py has what other families share.

B batch, T new tokens, P tokens in the KV cache, D width of the model, H heads, d = D/H, V vocabulary.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir

from cuantiza.core.inputs.gpt2_config import GPT2Config
from cuantiza.core.inputs.weights.files import Weight
from cuantiza.export.graphs import parts

_BLOCK = re.compile(r"h\.(\d+)\.")


def build(config: GPT2Config, weights: dict[str, Weight], opset: int, folder: Path) -> ir.Model:
    """Build the graph of `config` with `weights`, which are read only when the model is saved.

    Raises UserError where a weight is missing, has another shape, or (when it is read) is not finite. The message names
    `folder`.
    """
    builder = parts.begin("gpt2", opset)
    op = builder.op
    width, vocabulary = config.n_embd, config.vocab_size
    heads = parts.Heads(config.n_head, config.n_head, config.head_dim)

    def weight(name: str, *shape: int) -> ir.Value:
        return parts.weight(builder, weights, folder, name, shape)

    def linear(x: ir.Value, name: str, inputs: int, outputs: int) -> ir.Value:
        # transformers' Conv1D stores its weight as [inputs, outputs], which is the layout of MatMul.
        y = op.MatMul(x, weight(f"{name}.weight", inputs, outputs), _name=name)
        return op.Add(y, weight(f"{name}.bias", outputs), _name=f"{name}.bias")

    def layer_norm(x: ir.Value, name: str) -> ir.Value:
        scale, bias = weight(f"{name}.weight", width), weight(f"{name}.bias", width)
        return op.LayerNormalization(x, scale, bias, axis=-1, epsilon=config.layer_norm_epsilon, _name=name)

    layers = {int(found[1]): name for name in weights if (found := _BLOCK.match(name))}
    parts.check_layers(layers, config.n_layer, "n_layer", "h", folder)

    inputs = parts.add_inputs(builder, config.n_layer, heads)
    present: list[ir.Value] = []
    wte = weight("wte.weight", vocabulary, width)
    wpe = weight("wpe.weight", config.n_positions, width)
    x = op.Add(op.Gather(wte, inputs.input_ids, _name="wte"), op.Gather(wpe, inputs.position_ids, _name="wpe"))
    visible = parts.visible(op, inputs, [None], heads)[None]  # [B, 1, T, P+T]

    for layer in range(config.n_layer):  # x [B, T, D]
        block = f"h.{layer}"
        h = layer_norm(x, f"{block}.ln_1")
        qkv = linear(h, f"{block}.attn.c_attn", width, 3 * width)  # [B, T, 3D]
        split = op.Split(qkv, axis=-1, num_outputs=3, _outputs=3)
        q, k, v = (parts.split_heads(op, part, heads.number, heads.width) for part in split)
        k = op.Concat(inputs.past[2 * layer], k, axis=2)  # [B, H, P+T, d]
        v = op.Concat(inputs.past[2 * layer + 1], v, axis=2)
        present += [k, v]
        context = parts.attention(op, q, k, v, visible, heads, _attention_scale(config, layer), f"{block}.attn")
        if layer == config.n_layer - 1:
            context, x = parts.asked(op, inputs.keep, context, x)  # [B, n or T, D]
        x = op.Add(x, linear(context, f"{block}.attn.c_proj", width, width))
        h = linear(layer_norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc", width, config.n_inner)
        h = parts.activation(op, h, config.activation_function, opset)
        x = op.Add(x, linear(h, f"{block}.mlp.c_proj", config.n_inner, width))

    x = layer_norm(x, "ln_f")
    tied = parts.is_tied(weights, "wte.weight", "lm_head.weight", config.tie_word_embeddings)
    logits = parts.head(op, x, wte if tied else weight("lm_head.weight", vocabulary, width))
    return parts.finish(builder, logits, present, heads, vocabulary)


def describe(config: GPT2Config) -> str:
    """The sizes of a GPT-2 in a line for users."""
    return (
        f"GPT-2: {config.n_layer} layers of width {config.n_embd}, {config.n_head} heads of {config.head_dim}, "
        f"MLP of {config.n_inner} with {config.activation_function}, a vocabulary of {config.vocab_size}"
    )


def size(config: GPT2Config) -> parts.Size:
    """The number of parameters of a GPT-2."""
    width, inner, embedding = config.n_embd, config.n_inner, config.vocab_size * config.n_embd
    layer = (width + 1) * 3 * width + (width + 1) * width + (width + 1) * inner + (inner + 1) * width + 4 * width
    rest = config.n_positions * width + config.n_layer * layer + 2 * width
    return parts.Size(
        rest + embedding * (1 if config.tie_word_embeddings else 2), embedding, config.tie_word_embeddings
    )


def _attention_scale(config: GPT2Config, layer: int) -> float:
    scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale
