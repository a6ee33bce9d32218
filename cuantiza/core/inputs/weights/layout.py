"""Bring the tensors of a GPT-2 checkpoint, whoever wrote it, to one layout: transformers' own names and shapes.

The names are those of GPT2Model, such as `h.0.attn.c_attn.weight`, and `lm_head.weight`. Linear layers have the shape
[inputs, outputs], as transformers' Conv1D stores them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.weights.files import Weight

_LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_NORMS = ("ln_1", "ln_2")
# What other programs call weight and bias: OpenAI's TensorFlow code w, g and b; Flax kernel, scale and embedding; old
# LayerNorms gamma and beta.
_KINDS = dict.fromkeys(("weight", "w", "g", "gamma", "kernel", "scale", "embedding"), "weight")
_KINDS |= dict.fromkeys(("bias", "b", "beta"), "bias")
_MODULE = rf"wte|wpe|ln_f|lm_head|h\.\d{{1,6}}\.(?:{'|'.join(map(re.escape, (*_NORMS, *_LINEAR)))})"
# OpenAI's TensorFlow code stores embedding matrices under the name of their module alone, and writes h0 for h.0.
_NAME = re.compile(rf"(?P<prefix>(?:.*\.)?)(?P<module>{_MODULE})(?:\.(?P<kind>{'|'.join(_KINDS)}))?")
_LAYER_OF_TF = re.compile(r"(^|\.)h(\d{1,6})\.")
# Modules that training puts around a whole model or around single layers: torch.compile, FSDP, checkpointing.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Buffers that old checkpoints store among their weights: the causal mask, and the value used instead of -inf.
_BUFFER = re.compile(r"(?:.*\.)?(?:attn\.(?:bias|masked_bias|mask|tril|causal_mask)|position_ids)")
_LAYER = re.compile(r"h\.(\d+)\.")
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"


@dataclass(frozen=True)
class Layout:
    """The weights of GPT-2 under the names of transformers, and what had to be done for that.

    `others` are the tensors that are no part of GPT-2, by their names on disk. `repaired` says that transformers could
    not have read the files as they are, or would have read something else.
    """

    weights: dict[str, Weight]
    others: dict[str, Weight]
    warnings: tuple[str, ...]
    repaired: bool


def arrange(tensors: Mapping[str, Weight], tied: bool, folder: Path) -> Layout:
    """Return `tensors` in transformers' layout. `tied` says that head and embedding share a matrix (config.json).

    Read are: any prefix that all names share; the names of torch.compile, FSDP, OpenAI's TensorFlow code and Flax;
    linear layers as nn.Linear stores them, [outputs, inputs]; a tied pair under the head's name alone; models without
    biases, which get zeros. Raises UserError where names are not GPT-2's, weights are missing, or two tensors claim
    one name.
    """
    found = {name: match for name in tensors if (match := _match(name)) and not _BUFFER.fullmatch(name)}
    prefix = _prefix({match["prefix"] for match in found.values() if match["module"] != "lm_head"}, tensors, folder)
    weights: dict[str, Weight] = {}
    sources: dict[str, str] = {}
    for name, match in found.items():
        if match["module"] == "lm_head" and not prefix.startswith(match["prefix"]):
            continue
        ours = f"{match['module']}.{_KINDS[match['kind'] or 'weight']}"
        if ours in ("wte.bias", "wpe.bias"):
            continue
        if ours in sources:
            raise UserError(f"{folder}: holds {ours} twice, as {sources[ours]} and {name}; keep one of them")
        sources[ours], weights[ours] = name, tensors[name]
    used = set(sources.values())
    others = {name: weight for name, weight in tensors.items() if name not in used and not _BUFFER.fullmatch(name)}
    if "lm_head.bias" in weights:
        raise UserError(f"{folder}: has a bias for the head ({sources['lm_head.bias']}), so it is not a GPT-2")
    repaired = any(name not in (ours, f"transformer.{ours}") for ours, name in sources.items())
    if EMBEDDING not in weights and HEAD in weights and tied:
        weights[EMBEDDING] = weights.pop(HEAD)
        repaired = True
    if not tied and HEAD not in weights and EMBEDDING in weights:
        raise UserError(
            f"{folder}: has no {HEAD}, though config.json says that the head is not the embedding (tie_word_embeddings "
            "false); add the head, or set that to true if the model was trained so"
        )
    weights, transposed = _as_conv1d({name: _squeezed(weight) for name, weight in weights.items()})
    absent = _check_complete(weights, others, folder)
    weights |= {name: _zeros(shape) for name, shape in absent.items()}
    warnings = []
    if transposed:
        warnings.append(
            "the checkpoint stores linear layers as [outputs, inputs], as nn.Linear has them, and they were transposed"
        )
    if absent:
        kinds = dict.fromkeys(_LAYER.sub("", name) for name in absent)
        warnings.append(f"the checkpoint has no biases ({', '.join(kinds)}), and zeros take their place")
    return Layout(weights, others, tuple(warnings), repaired or transposed or bool(absent))


def some(names: Collection[str], most: int = 3) -> str:
    """The first of `names`, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def canonical_module(name: str) -> str | None:
    """The module of GPT-2 that `name`, a path of modules with any prefix, ends in; None if it ends in none."""
    match = re.fullmatch(rf"(?:.*\.)?({_MODULE})", _WRAPPERS.sub("", name))
    return match[1] if match else None


def canonical_name(name: str) -> str | None:
    """GPT-2's name for the tensor that is called `name` on disk, under any prefix; None if it is no part of GPT-2."""
    match = _match(name)
    return f"{match['module']}.{_KINDS[match['kind'] or 'weight']}" if match else None


def _match(name: str) -> re.Match[str] | None:
    name = _LAYER_OF_TF.sub(r"\1h.\2.", _WRAPPERS.sub("", name.replace("/", ".")))
    match = _NAME.fullmatch(name)
    return match if match and (match["kind"] or match["module"] in ("wte", "wpe")) else None


def _prefix(prefixes: Collection[str], names: Collection[str], folder: Path) -> str:
    """The prefix of all of GPT-2's names. Raises UserError unless there is exactly one."""
    if len(prefixes) == 1:
        return next(iter(prefixes))
    if prefixes:
        raise UserError(
            f"{folder}: its tensors have several prefixes ({', '.join(map(repr, sorted(prefixes)))}), "
            "as those of more than one model; save one model with transformers' save_pretrained"
        )
    there = f"are named {some(names)}" if names else "are none"
    raise UserError(
        f"{folder}: its tensors {there}, where GPT-2's are named wte.weight, h.0.attn.c_attn.weight and so on; "
        "take the files of the original checkpoint"
    )


def _squeezed(weight: Weight) -> Weight:
    """`weight` without the leading 1 of a convolution's kernel [1, inputs, outputs], as OpenAI's TensorFlow code has it."""
    if len(weight.shape) != 3 or weight.shape[0] != 1:
        return weight
    return replace(weight, shape=weight.shape[1:], read=lambda: weight.read()[0])


def _as_conv1d(weights: dict[str, Weight]) -> tuple[dict[str, Weight], bool]:
    """Transpose all linear layers if those that are not square are [outputs, inputs]; also return whether they were.

    The input of c_attn and c_fc and the output of the others is as wide as the model. attn.c_proj is square, so only
    the other layers tell how it is stored. Layers that disagree are left alone.
    """
    width = next((weight.shape[0] for name, weight in weights.items() if name.startswith("ln_f.") and weight.shape), 0)
    linear = {name: weight for name, weight in weights.items() if name.endswith(tuple(f"{n}.weight" for n in _LINEAR))}
    votes = set()
    for name, weight in linear.items():
        if len(weight.shape) == 2 and weight.shape[0] != weight.shape[1]:
            axis = 0 if name.endswith(("c_attn.weight", "c_fc.weight")) else 1
            votes.add((weight.shape[axis] == width, weight.shape[1 - axis] == width))
    if votes != {(False, True)}:
        return weights, False
    turned = {name: _transposed(weight) for name, weight in linear.items() if len(weight.shape) == 2}
    return weights | turned, True


def _transposed(weight: Weight) -> Weight:
    return replace(weight, shape=weight.shape[::-1], read=lambda: np.ascontiguousarray(weight.read().T))


def _check_complete(weights: Mapping[str, Weight], others: Collection[str], folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the biases that are missing by design: of all layers, or of all LayerNorms. They are zeros.

    Raises UserError where another weight is missing in one of the layers that are there.
    """
    layers = sorted({int(match[1]) for name in weights if (match := _LAYER.match(name))})
    norms = ["ln_f", *(f"h.{layer}.{name}" for layer in layers for name in _NORMS)]
    linear = [[f"h.{layer}.{name}" for layer in layers] for name in _LINEAR]
    absent: dict[str, tuple[int, ...]] = {}
    missing = [name for name in (EMBEDDING, "wpe.weight") if name not in weights]
    for modules in (norms, *linear):
        missing += [f"{module}.weight" for module in modules if f"{module}.weight" not in weights]
        biases = [f"{module}.bias" for module in modules if f"{module}.bias" not in weights]
        if len(biases) < len(modules):
            missing += biases
        else:
            there = (weights.get(f"{module}.weight") for module in modules)
            absent |= {bias: weight.shape[-1:] for bias, weight in zip(biases, there, strict=True) if weight}
    if missing:
        besides = f", but {some(others)}" if others else ""
        raise UserError(
            f"{folder}: has no weight {some(missing, 6)}{besides}; take the files of the original checkpoint"
        )
    return absent


def _zeros(shape: tuple[int, ...]) -> Weight:
    return Weight(shape, "float32", partial(np.zeros, shape, np.float32))
