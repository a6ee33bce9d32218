"""Tell language models from models with another head, and say what of a checkpoint is left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.weights.layout import some

# The heads of models that were trained for another task. Their backbone no longer predicts the next token.
_TASKS = {
    "score": "ForSequenceClassification",
    "classifier": "ForTokenClassification",
    "qa_outputs": "ForQuestionAnswering",
}
# What the classes of such models are called, and of those that judge texts, whose heads have many names.
_CLASSES = (*_TASKS.values(), "ForMultipleChoice", "RewardModel", "ForScore")
# Heads that are trained together with the language model's, or beside it.
_BESIDE = {
    "multiple_choice_head": "the multiple-choice head of a GPT2DoubleHeadsModel",
    "v_head": "a value head, as trl adds",
    "value_head": "a value head",
    "ilql_heads": "the heads of ILQL",
}
_OLD_HEAD = re.compile(r"(?<![^.])embed_out(?![^.])")
_ADAPTER = re.compile(r".*\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|base_layer)(?:\..*)?")


def check_task(fields: Mapping[str, Any], names: Collection[str], folder: Path) -> None:
    """Raise UserError if a checkpoint with tensors `names` and a config.json of `fields` is no language model.

    It is none if it has the head of another task and none of its own, or if `architectures` says so. A model with an
    adapter that nobody has merged is refused as well.
    """
    if adapter := next((name for name in names if _ADAPTER.fullmatch(name)), None):
        raise UserError(
            f"{folder}: holds a LoRA adapter among its weights ({adapter}); merge it with peft's merge_and_unload and save again"
        )
    head = {module: next(iter(_under(module, names)), None) for module in _TASKS}
    tensor = next((name for name in head.values() if name), None)
    task = next((_TASKS[module] for module, name in head.items() if name), None)
    declared = fields.get("architectures")
    architecture = declared[0] if isinstance(declared, list) and declared and isinstance(declared[0], str) else ""
    if not architecture.endswith(_CLASSES):
        if task is None:
            return
        if not architecture or "LM" in architecture:
            architecture = f"GPT2{task}" if fields.get("model_type", "gpt2") == "gpt2" else task.removeprefix("For")
    if any(name.endswith("lm_head.weight") for name in names):
        return  # its own head is there, so it still is a language model
    because = f" (it has {tensor})" if tensor else " (architectures in config.json says so)"
    raise UserError(
        f"{folder}: is a {architecture}{because}, and only language models are exported; "
        "give the language model that it was trained from, because the rest of this one no longer predicts text"
    )


def with_head(name: str) -> str:
    """The `name` of a tensor or a module, where GPT-NeoX's head, embed_out before transformers 5, is lm_head."""
    return _OLD_HEAD.sub("lm_head", name)


def left_out(others: Collection[str]) -> list[str]:
    """Say in a sentence each which of `others`, the tensors that are no part of the model, are left out."""
    warnings, rest = [], set(others)
    for module, what in _BESIDE.items():
        if names := _under(module, rest):
            rest -= {*names}
            warnings.append(f"the export leaves out {what} ({some(names)})")
    for module in _TASKS:
        if names := _under(module, rest):
            rest -= {*names}
            warnings.append(f"the export leaves out the head of another task ({some(names)})")
    if rest:
        warnings.append(f"the export leaves out tensors that are no part of such a model ({some(rest)})")
    return warnings


def are_heads(names: Collection[str]) -> bool:
    """Whether all of `names` are tensors of heads that are trained beside a language model, which an export leaves out."""
    return {*names} == {name for module in _BESIDE for name in _under(module, names)}


def _under(module: str, names: Collection[str]) -> list[str]:
    """Those of `names` that are tensors of `module`, with any prefix."""
    return sorted(name for name in names if re.match(rf"(?:.*\.)?{module}\d*\.", name))
