"""Read a checkpoint as people have it: a GPT-2 in any layout, with an adapter or without, or a model of another family."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import base_folder, files_to_read
from cuantiza.core.inputs.weights import adapters
from cuantiza.core.inputs.weights.files import Weight, read_tensors
from cuantiza.core.inputs.weights.heads import are_heads, check_task, left_out, with_head
from cuantiza.core.inputs.weights.layout import EMBEDDING, HEAD, arrange, canonical_module, some
from cuantiza.core.inputs.weights.quantized import check_floats, check_not_quantized

# What old checkpoints store and no model learns: causal masks, what they are filled with, and rotary embeddings.
_BUFFER = re.compile(
    r"(?:.*\.)?(?:(?:attn|attention)\.(?:bias|masked_bias|embed_positions)|rotary_emb\.inv_freq|version)"
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model in transformers' layout (layout.py has GPT-2's), and what a user should know of them.

    `fields` are those of config.json. `dtypes` are those on disk, the most frequent first. `warnings` are a sentence
    each: what was repaired, left out or merged. `repaired` says that transformers' own from_pretrained would not have
    read the same weights.
    """

    fields: dict[str, Any]
    weights: dict[str, Weight]
    dtypes: tuple[str, ...]
    warnings: tuple[str, ...]
    repaired: bool


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the GPT-2 in `folder`, and merge the LoRA adapter that lies beside or instead of its weights.

    No tensor is read before its `read()` is called, but a head that lies beside the embedding. Raises UserError where weights are missing, damaged, quantized
    already, or of a model that is no language model, or where the adapter cannot be merged.
    """
    base, fields = base_folder(folder), adapters.read_fields(folder)
    tensors = read_tensors(base)
    check_not_quantized(fields, tensors, base)
    check_task(fields, tensors, base)
    tied = fields.get("tie_word_embeddings") is not False
    layout = arrange(tensors, tied, base)
    check_floats(layout.weights, base)
    weights, warnings = layout.weights, [*layout.warnings, *left_out(layout.others)]
    if tied and HEAD in weights and not np.array_equal(weights[HEAD].read(), weights[EMBEDDING].read()):
        warnings.append(
            "lm_head.weight differs from wte.weight, though config.json does not say so (tie_word_embeddings false); both are "
            "kept, as transformers 5 does, but transformers 4 takes wte.weight for both."
        )
    dtypes = _dtypes(weights)
    eight = [name for name in dtypes if name.startswith("float8")]
    if eight:
        _check_no_scales(layout.others, base)
        warnings.append(
            f"the checkpoint's weights have 8 bits ({', '.join(eight)}); what that rounding lost stays lost"
        )
    adapter = adapters.read_adapter(folder)
    if adapter is not None:
        weights = adapters.merge(weights, adapter, tied)
        warnings += [_merged(adapter, folder, base), *_beside_adapter(folder, base)]
    repaired = layout.repaired or bool(eight) or adapter is not None or index_is_bare(base)
    return Checkpoint(fields, weights, dtypes, tuple(warnings), repaired)


def read_by_names(folder: Path, fields: Mapping[str, Any], embedding: str, backbone: str = "model.") -> Checkpoint:
    """Read the checkpoint of a model that transformers reads as it is, under names without the prefix of its backbone.

    The prefix (`backbone`, or none) is what stands before `embedding`, the name of the embedding matrix. Masks and
    frequencies, which old checkpoints store beside the weights, are left out, and a LoRA adapter that lies beside or
    instead of them is merged. No tensor is read before its `read()` is called, but a head beside an embedding where
    there is an adapter. Raises UserError as `read_merged` does, and where the embedding is missing, where another prefix
    stands before it, or where weights have 8 bits.
    """
    tensors, adapter = read_merged(folder, fields)
    prefix = next((found for found in (backbone, "") if f"{found}{embedding}" in tensors), None)
    if prefix is None and fields.get("tie_word_embeddings") and HEAD in tensors:
        # Of two names of one tensor, safetensors' save_model keeps the first of the alphabet: the head's.
        prefix = backbone if any(name.startswith(backbone) for name in tensors) else ""
        tensors[f"{prefix}{embedding}"] = tensors.pop(HEAD)
    if prefix is None:
        raise UserError(
            f"{folder}: has no weight {backbone}{embedding}; its tensors are named {some(tensors)}; "
            "save the model with transformers' save_pretrained"
        )
    weights = {name.removeprefix(prefix): weight for name, weight in tensors.items()}
    check_floats({name: weight for name, weight in weights.items() if name.endswith((".weight", ".bias"))}, folder)
    dtypes = _dtypes(weights)
    if eight := [name for name in dtypes if name.startswith("float8")]:
        raise UserError(
            f"{folder}: has weights of 8 bits ({', '.join(eight)}), which transformers does not read as they are; "
            "give the checkpoint before it was quantized"
        )
    base = base_folder(folder)
    warnings = [] if adapter is None else [_merged(adapter, folder, base), *_beside_adapter(folder, base)]
    return Checkpoint(dict(fields), weights, dtypes, tuple(warnings), adapter is not None or index_is_bare(base))


def read_merged(folder: Path, fields: Mapping[str, Any]) -> tuple[dict[str, Weight], adapters.Adapter | None]:
    """Return the weights of a model that is no GPT-2, by transformers' names, and the LoRA adapter that was merged.

    `fields` are those of its config.json. Raises UserError where the files are damaged, quantized or of no language
    model, or where the adapter cannot be merged.
    """
    base, adapter = base_folder(folder), adapters.read_adapter(folder)
    stored = read_tensors(base)
    check_not_quantized(fields, stored, base)
    check_task(fields, stored, base)
    tensors = {with_head(name): weight for name, weight in stored.items() if not _BUFFER.fullmatch(name)}
    if adapter is None:
        return tensors, None
    names = adapters.names_of(tensors, base)
    head, embedding = tensors.get(names.head), tensors[names.embedding]
    tied = head is None or (head.shape == embedding.shape and np.array_equal(head.read(), embedding.read()))
    return adapters.merge(tensors, adapter, tied, names), adapter


def _merged(adapter: adapters.Adapter, folder: Path, base: Path) -> str:
    """Say into what `adapter` of `folder` was merged."""
    what = f"the LoRA adapter {adapters.describe(adapter)} was merged into"
    if base == folder:
        return f"{what} the weights beside it; if those are merged already, remove adapter_config.json and that file"
    return f"{what} its base {adapters.base_name(adapter, base)}"


def _beside_adapter(folder: Path, base: Path) -> list[str]:
    """Say what is left out of weights that lie beside an adapter in `folder`, where its base is elsewhere.

    Raises UserError where they are more than the heads that trl keeps there.
    """
    tensors = read_tensors(folder) if base != folder and files_to_read(folder) else {}
    if not are_heads(tensors):
        raise UserError(
            f"{folder}: has weights ({some(tensors)}) beside its adapter, but no config.json; put the config.json of their "
            f"model there, or take {', '.join(files_to_read(folder))} away if the adapter's base is {base}"
        )
    return left_out(tensors)


def read_for_transformers(folder: Path, fields: Mapping[str, Any]) -> dict[str, Weight]:
    """Return the tensors of a model of any family, by their names on disk, if transformers can read them as they are.

    Raises UserError where they are damaged, quantized or of no language model, where an adapter lies beside them, or
    where they are a GPT-2 in another layout.
    """
    if adapters.read_adapter(folder) is not None:
        raise UserError(
            f"{folder}: has a LoRA adapter, which EXPORTER=optimum does not merge; merge it with peft's merge_and_unload and give the merged model"
        )
    tensors = read_tensors(folder)
    check_not_quantized(fields, tensors, folder)
    check_task(fields, tensors, folder)
    if index_is_bare(folder):
        raise UserError(
            f"{folder}: the index of its shards has no `metadata`, which transformers needs; export it without EXPORTER=optimum, "
            "or save the model again with save_pretrained"
        )
    if fields.get("model_type") == "gpt2" and read_checkpoint(folder).repaired:
        raise UserError(
            f"{folder}: is a GPT-2 whose weights transformers does not read as they are; export it without EXPORTER=optimum"
        )
    return tensors


def index_is_bare(folder: Path) -> bool:
    """Whether the index of the shards lacks `metadata`, without which transformers does not read it."""
    index = next((name for name in files_to_read(folder) if name.endswith(".index.json")), None)
    return index is not None and "metadata" not in json.loads((folder / index).read_text(encoding="utf-8"))


def _check_no_scales(others: Mapping[str, Weight], folder: Path) -> None:
    """Raise UserError if one of `others`, which are no part of a GPT-2 of 8-bit floats, lies beside a weight of it."""
    for name in others:
        if any(canonical_module(name.rsplit(".", parts)[0]) for parts in (1, 2)):
            raise UserError(
                f"{folder}: is already quantized (it has weights of 8 bits, and beside one of them {name}, as a scale is); "
                "give the checkpoint before it was quantized, and cuantiza makes a small one of it"
            )


def _dtypes(weights: Mapping[str, Weight]) -> tuple[str, ...]:
    """The dtypes of `weights`, that of the most numbers first."""
    names = [weight.dtype for weight in weights.values()]
    return tuple(sorted(set(names), key=lambda name: (-names.count(name), name)))
