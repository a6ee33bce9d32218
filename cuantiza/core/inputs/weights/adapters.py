"""Merge a LoRA adapter of peft into the weights that it was trained on: W + scale · B A.

A file of peft holds, for each adapted module, A [r, inputs] and B [outputs, r]; the scale is alpha / r, or alpha / √r for
rslora (arXiv 2106.09685, 2312.03732). It may also hold whole tensors that replace those of the base: trained biases,
`modules_to_save`, an embedding matrix with new tokens. Names: huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import ADAPTER, adapter_fields, base_folder
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.inputs.weights.files import Weight, read_file
from cuantiza.core.inputs.weights.heads import with_head
from cuantiza.core.inputs.weights.layout import EMBEDDING, HEAD, canonical_module, canonical_name
from cuantiza.core.inputs.weights.quantized import check_floats

# Fields of adapter_config.json that merging reads, and those that only mattered in training. Any other that is set
# changes what an adapter computes.
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "alpha_pattern",
    "rank_pattern",
    "use_rslora",
    "init_lora_weights",
    "task_type",
}
_READ |= {"base_model_name_or_path", "revision", "modules_to_save", "lora_bias", "bias"}
_TRAINING = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
}
_TRAINING |= {"layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"}
_TRAINING |= {"megatron_config", "megatron_core", "merge_weights", "peft_version", "qalora_group_size"}
_TRAINING |= {"runtime_config", "target_modules", "velora_config"}
# Other values of init_lora_weights change the base's own weights before training.
_KEEP_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
# Kinds of adapters that no merge turns into weights.
_PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
)
_MERGE = "merge it with peft's merge_and_unload and give the merged model"
# The name of the adapter, such as `default`, stands in files that were saved without peft's save_pretrained.
_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>(?:embedding_)?[AB])(?:\.(?!weight$|bias$)[\w-]+)?(?:\.(?P<kind>weight|bias))?"
)
# Patterns of adapter_config.json, a file from anywhere, on which Python's matcher could work for ever: with a repeated
# group, or with more repetitions than these.
_REPEATED_GROUP, _REPETITION, _MOST_REPETITIONS, _LONGEST_NAME = re.compile(r"\)[*+{]"), re.compile(r"[*+?{]"), 4, 128
# The embedding matrix as the families call it.
_EMBEDDINGS = ("wte.weight", "embed_tokens.weight", "embed_in.weight")
_POSITIONS = ("wpe.weight", "embed_positions.weight")
_WHOLE = re.compile(r"\.(?:base_layer|modules_to_save(?:\.[\w-]+(?=\.\w+$))?)(?=\.)")


@dataclass(frozen=True)
class Adapter:
    """The fields and tensors of an adapter. `file` is where the tensors are."""

    fields: dict[str, Any]
    tensors: dict[str, Weight]
    file: Path


@dataclass(frozen=True)
class Names:
    """What the weights are called that an adapter is merged into.

    `embedding` and `head` are the two that a model may tie; `embeddings` are the modules of which rows are read.
    `module` and `weight` say which module, or weight, a name in an adapter's file stands for, None for none. The weights
    of modules for which `transposed` holds are [inputs, outputs], others [outputs, inputs].
    """

    embedding: str
    head: str
    embeddings: frozenset[str]
    module: Callable[[str], str | None]
    weight: Callable[[str], str | None]
    transposed: Callable[[str], bool]


# transformers' Conv1D is [inputs, outputs], as is an embedding; nn.Linear, of which the head is one, is the opposite.
GPT2 = Names(
    EMBEDDING, HEAD, frozenset({"wte", "wpe"}), canonical_module, canonical_name, lambda module: module != "lm_head"
)


def names_of(weights: Mapping[str, Weight], folder: Path) -> Names:
    """Those of a model that transformers reads as it is, whose linear layers are nn.Linear.

    A name in an adapter stands for the weight whose name it ends in. Raises UserError where no weight is an embedding.
    """
    embedding = next((name for name in weights if name.endswith(_EMBEDDINGS)), None)
    if embedding is None:
        raise UserError(
            f"{folder}: has no embedding matrix, which the model of an adapter has; take the files of the original checkpoint"
        )
    tables = {name.removesuffix(".weight") for name in weights if name.endswith((*_EMBEDDINGS, *_POSITIONS))}

    def weight(name: str) -> str | None:
        parts = with_head(name).split(".")
        endings = (".".join(parts[first:]) for first in range(len(parts)))
        return next((ending for ending in endings if ending in weights or ending == HEAD), None)

    def module(name: str) -> str | None:
        found = weight(f"{name}.weight")
        return found and found.removesuffix(".weight")

    return Names(embedding, HEAD, frozenset(tables), module, weight, tables.__contains__)


def read_adapter(folder: Path) -> Adapter | None:
    """The LoRA adapter in `folder`; None if there is none.

    Raises UserError where it is not whole, or computes more than W + scale · B A.
    """
    there = [name for name in ADAPTER if (folder / name).exists()]
    if not there:
        return None
    fields, path = adapter_fields(folder), folder / ADAPTER[0]
    files = [folder / name for name in there if name != ADAPTER[0]]
    if not files:
        raise UserError(f"{path}: has no {ADAPTER[1]} beside it; add the adapter's weights, or remove {ADAPTER[0]}")
    kind = fields.get("peft_type")
    if kind in _PROMPTS:
        raise UserError(
            f"{path}: peft_type is {kind!r}, which puts trained vectors before every text; no weights hold those, so it cannot "
            "be merged or exported; only LORA is"
        )
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}, and only LORA is merged here; {_MERGE}")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{path}: task_type is {fields['task_type']}, so it is the adapter of no language model; only those are exported"
        )
    odd = sorted(key for key, value in fields.items() if value and key not in _READ | _TRAINING)
    if fields.get("init_lora_weights") not in _KEEP_BASE:
        odd.append(f"init_lora_weights {fields['init_lora_weights']!r}, which changed the base")
    if odd:
        raise UserError(f"{path}: has {', '.join(odd)}, which is not merged here; {_MERGE}")
    tensors = read_file(files[0])
    check_floats(tensors, folder)
    return Adapter(fields, tensors, files[0])


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of config.json of the checkpoint in `folder`, or of the base of the adapter in it.

    vocab_size is the adapter's, if tokens were added while it was trained. Raises UserError as `read_adapter` does.
    """
    fields, adapter = read_config(base_folder(folder)), read_adapter(folder)
    for name, tensor in (adapter.tensors if adapter else {}).items():
        plain = _WHOLE.sub("", name)
        embedding = canonical_name(plain) == EMBEDDING or plain.endswith(_EMBEDDINGS)
        if _PART.fullmatch(name) is None and embedding and tensor.shape:
            fields = fields | {"vocab_size": tensor.shape[0]}
    return fields


def merge(weights: Mapping[str, Weight], adapter: Adapter, tied: bool, names: Names = GPT2) -> dict[str, Weight]:
    """Return `weights`, which are called as `names` says, with `adapter` merged into them when they are read.

    `tied` says that head and embedding of the base share a matrix. If the adapter changes only one of such a pair, the
    result has both, as the adapted model computes with both.
    Raises UserError where the adapter does not fit the weights.
    """
    embedding, head = names.embedding, names.head
    merged = {head: weights[embedding], **weights}
    whole, factors = _sorted(adapter, names)
    for name, tensor in whole.items():
        _check_replacement(name, tensor, merged, adapter, names)
        merged[name] = tensor
    if embedding in whole and head not in whole and tied and _follows(whole[embedding], weights, adapter, names):
        merged[head] = whole[embedding]
    for module, parts in factors.items():
        merged |= _adapted(module, parts, merged, adapter, names)
    if merged[head] is merged[embedding]:
        del merged[head]
    return merged


def describe(adapter: Adapter) -> str:
    """The file and size of an adapter, as a line for users names it."""
    modules = len({found["module"] for name in adapter.tensors if (found := _PART.fullmatch(name))})
    return f"{adapter.file.name} (r {adapter.fields.get('r')}, alpha {adapter.fields.get('lora_alpha')}, {modules} modules)"


def base_name(adapter: Adapter, base: Path) -> str:
    """What a line for users calls the folder `base`: its path, or the hub id where it lies in the hub's cache."""
    spec = str(adapter.fields.get("base_model_name_or_path"))
    return str(base) if Path(spec).name in ("", "..", base.name) else spec


@dataclass(frozen=True)
class _Factors:
    """What a file has for one module: its name there, and A and B, and a bias of B, by `A`, `B` and `B.bias`."""

    name: str
    tensors: dict[str, Weight]


def _sorted(adapter: Adapter, names: Names) -> tuple[dict[str, Weight], dict[str, _Factors]]:
    """Sort an adapter's tensors: those that replace the base's by the weights' names, and factors by their modules.

    Raises UserError where a tensor is neither, where the base has no such module, or where two claim one place.
    """
    whole: dict[str, Weight] = {}
    factors: dict[str, _Factors] = {}
    for name, tensor in adapter.tensors.items():
        if ".original_module." in name:  # the base's own, which modules_to_save replaces
            continue
        if found := _PART.fullmatch(name):
            if (module := names.module(found["module"])) is None:
                raise _of_another_model(adapter, _plain(found["module"]))
            place = factors.setdefault(module, _Factors(_plain(found["module"]), {})).tensors
            key = found["part"] + (".bias" if found["kind"] == "bias" else "")
        else:
            place, key = whole, names.weight(_WHOLE.sub("", name)) or ""
        if place is whole and key in whole and _equal(whole[key], tensor):  # peft stores a resized one twice
            continue
        if not key or key in place:
            raise UserError(f"{adapter.file}: has a tensor {name}, which is not merged here; {_MERGE}")
        place[key] = tensor
    if not whole and not factors:
        raise UserError(f"{adapter.file}: holds no tensors of an adapter; take the file of the original adapter")
    return whole, factors


def _of_another_model(adapter: Adapter, module: str) -> UserError:
    return UserError(
        f"{adapter.file}: adapts {module}, which the base does not have; give the base that it was trained on"
    )


def _equal(one: Weight, other: Weight) -> bool:
    return one.shape == other.shape and np.array_equal(one.read(), other.read())


def _plain(module: str) -> str:
    """The name that a module has in the base, by which patterns in adapter_config.json find it."""
    return module.removeprefix("base_model.model.").replace(".base_layer", "")


def _check_replacement(
    name: str, tensor: Weight, weights: Mapping[str, Weight], adapter: Adapter, names: Names
) -> None:
    old = weights[name].shape if name in weights else None
    # Tokens that were added in training make embedding and head longer.
    fits = old == tensor.shape or (name in (names.embedding, names.head) and old and old[1:] == tensor.shape[1:])
    if not fits:
        raise UserError(
            f"{adapter.file}: has {name} {list(tensor.shape)} where the base has {list(old) if old else 'none'}; "
            "give the base that it was trained on"
        )


def _follows(embedding: Weight, weights: Mapping[str, Weight], adapter: Adapter, names: Names) -> bool:
    """Whether the head of a tied pair follows an `embedding` that replaces the base's.

    Of such a pair, peft trains a copy of the embedding alone if modules_to_save names that alone; an embedding
    that was stored because it was resized is the head too.
    """
    saved, module = adapter.fields.get("modules_to_save"), f".{names.embedding.removesuffix('.weight')}"
    # peft saves the modules whose names end in one of those; a name there may begin before ours.
    copied = isinstance(saved, list) and any(
        module.endswith(f".{name}") or f".{name}".endswith(module) for name in map(str, saved)
    )
    grown = embedding.shape != weights[names.embedding].shape
    return grown or not copied


def _adapted(
    module: str, factors: _Factors, weights: Mapping[str, Weight], adapter: Adapter, names: Names
) -> dict[str, Weight]:
    """The weight of `module` with B A added, and its bias where B has one. Raises UserError where shapes do not fit."""
    embedding = module in names.embeddings
    left, right = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    a, b, base = factors.tensors.get(left), factors.tensors.get(right), weights.get(f"{module}.weight")
    if base is None:
        raise _of_another_model(adapter, factors.name)
    odd = factors.tensors.keys() - {left, right, *(() if embedding else ("B.bias",))}
    if a is None or b is None or odd or len(a.shape) != 2 or len(b.shape) != 2:
        raise UserError(f"{adapter.file}: has no A and B of two axes for {factors.name}; take the original adapter")
    turned = names.transposed(module)
    change = (a.shape[1], b.shape[0]) if turned else (b.shape[0], a.shape[1])
    if change != base.shape or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{adapter.file}: {factors.name} has A {list(a.shape)} and B {list(b.shape)}, which do not fit the base's "
            f"{list(base.shape)}; give the base that it was trained on"
        )
    scale = _scale(factors.name, a.shape[0], adapter)

    def read() -> np.ndarray:
        # In double precision, so that the sum does not depend on the order in which a machine adds.
        delta = b.read().astype(np.float64) @ a.read().astype(np.float64)
        return (base.read() + scale * (delta.T if turned else delta)).astype(np.float32)

    adapted = {f"{module}.weight": replace(base, read=read)}
    if extra := factors.tensors.get("B.bias"):
        bias = weights.get(f"{module}.bias")
        if bias is None or bias.shape != extra.shape:
            raise UserError(f"{adapter.file}: has a bias for {factors.name}, which the base does not have; {_MERGE}")
        adapted[f"{module}.bias"] = replace(
            bias, read=lambda: (bias.read() + scale * extra.read().astype(np.float64)).astype(np.float32)
        )
    return adapted


def _scale(name: str, r: int, adapter: Adapter) -> float:
    """alpha / r, or alpha / √r for rslora, of the module `name`. Raises UserError where adapter_config.json has another r."""
    fields, path = adapter.fields, adapter.file.parent / ADAPTER[0]
    alpha, patterns = fields.get("lora_alpha", 8), fields.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not isinstance(fields.get("rank_pattern") or {}, dict):
        raise UserError(f"{path}: alpha_pattern and rank_pattern have to be objects; take the original adapter's file")
    for pattern, value in patterns.items():
        if (
            _REPEATED_GROUP.search(pattern)
            or len(_REPETITION.findall(pattern)) > _MOST_REPETITIONS
            or len(name) > _LONGEST_NAME
        ):
            raise UserError(
                f"{path}: alpha_pattern {pattern[:80]!r} may take very long on {name[:80]}; write names of modules instead of it"
            )
        try:
            found = re.match(rf"(.*\.)?({pattern})$", name)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{path}: alpha_pattern {pattern!r} is no regular expression ({error})") from None
        if found:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -1e9 < alpha < 1e9:
        raise UserError(f"{path}: alpha of {name} is {alpha!r} where a number is needed")
    if not fields.get("rank_pattern") and fields.get("r", 8) != r:
        raise UserError(f"{path}: r is {fields.get('r')!r}, but {name} has {r}; take the files of one adapter")
    return alpha / math.sqrt(r) if fields.get("use_rslora") else alpha / r
