"""Say which models are exported, and what a checkpoint is that is none, so that one line names it and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.gpt2_config import is_gpt2

# The types with a graph of our own (export/graphs/architectures.py).
GRAPH_TYPES = (
    "gpt2",
    "arcee",
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "granite",
    "helium",
    "llama",
    "ministral",
    "mistral",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "starcoder2",
)
# Each of these was exported end to end, with the parity check, by optimum-onnx 0.1.0.
OPTIMUM_TYPES = (
    "arcee",
    "bloom",
    "codegen",
    "cohere",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "granite",
    "helium",
    "llama",
    "mistral",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
)
_ONLY = "only decoder-only language models of text are exported"
# Model types with a sentence of their own.
_KNOWN = {
    "openai-gpt": "is the first GPT, of 2018, whose layers differ from GPT-2's; no exporter here takes it, choose a GPT-2",
    "imagegpt": f"is ImageGPT, which continues the pixels of pictures and not text; {_ONLY}",
    "trocr": f"is TrOCR's decoder, which reads text out of a picture that an encoder sees; {_ONLY}",
    "gptsan-japanese": f"is GPTSAN, a mixture of experts; {_ONLY}",
}
# What kinds of models transformers lists under a name, in the order in which they are looked up.
_KINDS = (
    (
        ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
        "is an encoder-decoder, whose text depends on an input of its encoder",
    ),
    (("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"), "is a model of pictures or sound with text"),
    (("MASKED_LM", "TEXT_ENCODING"), "is an encoder (BERT's kind), which fills or classifies text and continues none"),
    (("IMAGE_CLASSIFICATION", "IMAGE", "CAUSAL_IMAGE_MODELING"), "is a model of pictures"),
    (("CTC", "AUDIO_CLASSIFICATION", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM"), "is a model of sound"),
)
_UNREAD = {".h5": "TensorFlow", ".msgpack": "Flax", ".ot": "rust-bert", ".tflite": "TensorFlow", ".nemo": "NeMo"}
# Files, or the beginnings of their names, that only another program's models have, all together, and what those are.
_PROGRAMS = (
    (("openvino_model.xml",), "OpenVINO"),
    (("model.bin", "vocabulary."), "CTranslate2"),
    (("model.bin", "shared_vocabulary."), "CTranslate2"),
    (("rank0.",), "TensorRT-LLM"),
    (("params.json", "consolidated."), "its maker's own code, as Meta and Mistral publish them beside others"),
)
# The weights that transformers reads, whole or in shards, which may have any names in their index.
_WEIGHTS = re.compile(r"(?:model(?:-\d+-of-\d+)?\.safetensors|pytorch_model(?:-\d+-of-\d+)?\.bin)(?:\.index\.json)?")
# What a training needs to go on, and a model does not.
TRAINING_STATE = re.compile(r"(?:training_args|optimizer|scheduler|scaler|random_states|rng_state)")
_SAVE = "save the model with transformers' save_pretrained, or choose a repository that has safetensors"


def check_model_type(fields: dict[str, Any], path: Path, exporter: str) -> None:
    """Raise UserError where `exporter` ("graph" or "optimum") does not take the model whose config.json is `fields`.

    The error names `path` and says what the model is. It sends to the other exporter only what that one takes.
    """
    kind = fields.get("model_type")
    if (exporter == "graph" and _graph_takes(fields)) or (exporter == "optimum" and _optimum_takes(fields)):
        return
    if fields.get("is_encoder_decoder") is True or str(kind).endswith("encoder-decoder"):
        raise UserError(f"{path}: model_type {kind!r} {_encoder_decoder(fields)}")
    if kind in (None, ""):
        names = _architectures(fields)
        known = next(
            (kind for kind in (*GRAPH_TYPES, *OPTIMUM_TYPES) if any(_is_of(name, kind) for name in names)), None
        )
        add = f'add "model_type": "{known}"' if known else 'if the model is a GPT-2, add "model_type": "gpt2"'
        declared = f", and its architectures are {', '.join(names)}" if names else ""
        raise UserError(f"{path}: has no model_type{declared}; {add}")
    if exporter == "optimum" and _graph_takes(fields):
        raise UserError(f"{path}: model_type is {kind!r}, which optimum does not export; leave EXPORTER=optimum out")
    if _optimum_takes(fields):
        raise UserError(
            f"{path}: model_type is {kind!r}, and the default exporter knows {', '.join(GRAPH_TYPES)}; "
            "EXPORTER=optimum exports it"
        )
    raise UserError(f"{path}: model_type {kind!r} {_KNOWN.get(str(kind)) or _described(str(kind))}")


def own_code(fields: dict[str, Any]) -> tuple[str, ...]:
    """Return a sentence where config.json (`fields`) names classes of models that transformers does not have.

    Their code lies beside the checkpoint, or nowhere, and is not run.
    """
    kind, mapped = str(fields.get("model_type")), fields.get("auto_map")
    mapped = mapped if isinstance(mapped, dict) else {}
    code = [mapped.get(key) for key in ("AutoModelForCausalLM", "AutoModel")]
    classes = [*_architectures(fields), *(name.rpartition(".")[2] for name in code if isinstance(name, str))]
    classes = [name.removeprefix("TF").removeprefix("Flax") for name in classes if not name.startswith("Peft")]
    names = [name for name in dict.fromkeys(classes) if not _is_of(name, kind)]
    if names:  # importing transformers takes seconds
        import transformers

        names = [name for name in names if name not in dir(transformers)]
    if not names:
        return ()
    return (
        f"config.json names {', '.join(names)}, which transformers does not have; code of its own is not run, and the model "
        f"is exported as the {kind} that model_type says",
    )


def other_format(names: set[str]) -> str | None:
    """Say what a folder with files `names` (paths in it) is, where it is no checkpoint of transformers.

    None if that is unknown, or if it is an adapter, which others read.

    The result is the rest of a line that begins with the folder's name.
    """

    if "adapter_config.json" in names:
        return None

    def ending(*suffixes: str) -> str:
        return next((name for name in sorted(names) if name.lower().endswith(suffixes)), "")

    if "manifest.json" in names and "model.onnx" in names:
        return "is an artifact that was exported already; give the checkpoint that it was made of"
    for parts, program in _PROGRAMS:
        files = [next((name for name in sorted(names) if name.startswith(part)), "") for part in parts]
        if all(files):
            return (
                f"has {' and '.join(files)}, a model in the format of {program}; give the model in transformers' format"
            )
    if "model_index.json" in names:
        return "is a pipeline of diffusers, which makes pictures; only language models are exported"
    if "modules.json" in names or "config_sentence_transformers.json" in names:
        return (
            "is a model of sentence-transformers, which makes vectors of sentences; only language models are exported"
        )
    if found := ending(".gguf", ".ggml"):
        return f"has {found}, a file of llama.cpp, which holds no weights of transformers; give the checkpoint that it was made of"
    if found := ending(".onnx"):
        return f"has {found}, a model that is exported already; give the checkpoint that it was made of, or measure the file by `cuantiza eval --onnx`"
    if "hparams.json" in names or "encoder.json" in names or ending(".ckpt.index", ".ckpt.meta"):
        return "has the TensorFlow files of OpenAI's GPT-2 code, which cannot be read; take the model in transformers' format, such as openai-community/gpt2"
    for suffix, whose in _UNREAD.items():
        if found := ending(suffix):
            return (
                f"has no safetensors and no pytorch_model.bin, only {found} of {whose}, which cannot be read; {_SAVE}"
            )
    return None


def described_file(name: str) -> str:
    """Say what a file called `name` is that was given as a model: the rest of a line that begins with its path."""
    if name.lower().endswith((".gguf", ".ggml")):
        return "is a file of llama.cpp, which holds no weights of transformers; give the checkpoint's folder that it was made of"
    if name.lower().endswith(".onnx"):
        return "is a model that is exported already; give the checkpoint's folder, or measure the file by `cuantiza eval --onnx`"
    return "is a file, and so neither a folder nor a hub id; give its folder, with config.json and the tokenizer"


def refuse_other_formats(folder: Path) -> None:
    """Raise UserError where `folder` is another thing than a checkpoint of transformers, and say what it is.

    What lacks weights or a configuration for another reason is left to those who read them.
    """
    names = {file.name for file in folder.iterdir()}
    weights = any(map(_WEIGHTS.fullmatch, names))
    config = "config.json" in names
    if not weights or not config:
        inside = {f"{file.parent.name}/{file.name}" for file in folder.glob("*/*")}
        if found := other_format(names) or other_format({name for name in inside if name.endswith((".onnx", ".gguf"))}):
            raise UserError(f"{folder}: {found}")
    elif {"modules.json", "config_sentence_transformers.json", "model_index.json"} & names:
        raise UserError(f"{folder}: {other_format(names)}")
    # The last of checkpoint-500 and checkpoint-1000 is the one of the most steps.
    places = (f"{where}/{name}" for where in ("*", "snapshots/*") for name in ("config.json", "adapter_config.json"))
    nested = sorted(
        (path for place in places for path in folder.glob(place)), key=lambda path: (len(path.parent.name), path)
    )
    if config or weights:
        return
    if nested:
        raise UserError(
            f"{folder}: has no config.json, but {nested[-1].parent} has {nested[-1].name}; give that folder"
        )
    if found := next(
        (name for name in sorted(names) if name.endswith((".pt", ".pth", ".ckpt")) and not TRAINING_STATE.match(name)),
        None,
    ):
        raise UserError(
            f"{folder}: has no config.json and no weights but {found}, as torch saved it; save the model with transformers' "
            f"save_pretrained, or, if it is a GPT-2 such as nanoGPT's, rename {found} to pytorch_model.bin and write its sizes to a config.json"
        )


def _architectures(fields: dict[str, Any]) -> list[str]:
    """The names of classes in `architectures`."""
    found = fields.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _is_of(name: str, kind: str) -> bool:
    """Whether `name` is what transformers calls the class of language models of type `kind`, or of their backbone."""
    flat = kind.removesuffix("_text").replace("_", "")
    return name.lower().replace("_", "") in (f"{flat}forcausallm", f"{flat}lmheadmodel", f"{flat}model")


def _graph_takes(fields: dict[str, Any]) -> bool:
    return is_gpt2(fields) or (fields.get("model_type") in GRAPH_TYPES and fields.get("is_encoder_decoder") is not True)


def _optimum_takes(fields: dict[str, Any]) -> bool:
    return fields.get("model_type") in OPTIMUM_TYPES and fields.get("is_encoder_decoder") is not True


def _encoder_decoder(fields: dict[str, Any]) -> str:
    decoder = fields.get("decoder")
    inner = decoder.get("model_type") if isinstance(decoder, dict) else None
    said = f" (its decoder, {inner}, needs what the encoder makes)" if isinstance(inner, str) else ""
    return f"is an encoder-decoder{said}; {_ONLY}"


def _described(kind: str) -> str:
    """What transformers knows of the model type `kind`."""
    from transformers.models.auto import configuration_auto, modeling_auto

    for mappings, said in _KINDS:
        if any(kind in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", ()) for name in mappings):
            return f"{said}; {_ONLY}"
    others = ", ".join(name for name in OPTIMUM_TYPES if name not in GRAPH_TYPES)
    choose = f"choose one of {', '.join(GRAPH_TYPES)}, or for EXPORTER=optimum of {others}"
    if kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"is a language model that neither exporter can bring to the contract of docs/artifact.md; {choose}"
    if kind in configuration_auto.CONFIG_MAPPING_NAMES:
        return f"is no language model of text; {_ONLY}"
    return f'is none that transformers knows; if the model is a GPT-2, write "gpt2", else {choose}'
