"""Checkpoints of the models that the lab measures: the embedded es-mini, and GPT-2's sizes with random weights."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, full_windows, load_splits, stream
from cuantiza.core.inputs.model_config import read_config, start_token
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer
from cuantiza.core.store import folders
from lab import CORPUS, ES_MINI

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
# Random prompts use token ids below this. It is less than es-mini's vocabulary, as random models have its tokenizer.
RANDOM_IDS = 4000


@dataclass(frozen=True)
class Shape:
    """The dimensions of a GPT-2. `folder` is its checkpoint; None means random weights."""

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int = 50257
    positions: int = 1024
    folder: Path | None = None

    @property
    def body_parameters(self) -> int:
        """The parameters without the token embedding (which is also the tied head) and the position embedding."""
        return self.layers * (12 * self.width**2 + 13 * self.width) + 2 * self.width

    @property
    def parameters(self) -> int:
        return self.body_parameters + (self.vocabulary + self.positions) * self.width


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("es-mini", layers=6, width=256, heads=4, vocabulary=8192, folder=ES_MINI),
        Shape("gpt2", layers=12, width=768, heads=12),
        Shape("gpt2-medium", layers=24, width=1024, heads=16),
        Shape("gpt2-large", layers=36, width=1280, heads=20),
        Shape("gpt2-xl", layers=48, width=1600, heads=25),
    )
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of every tensor in a checkpoint that transformers' GPT2LMHeadModel saves."""
    width, hidden = shape.width, 4 * shape.width
    yield "transformer.wte.weight", (shape.vocabulary, width)
    yield "transformer.wpe.weight", (shape.positions, width)
    linear_layers = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, hidden),
        "mlp.c_proj": (hidden, width),
    }
    for layer in range(shape.layers):
        for norm in ("ln_1", "ln_2"):
            yield f"transformer.h.{layer}.{norm}.weight", (width,)
            yield f"transformer.h.{layer}.{norm}.bias", (width,)
        for name, (inputs, outputs) in linear_layers.items():
            yield f"transformer.h.{layer}.{name}.weight", (inputs, outputs)
            yield f"transformer.h.{layer}.{name}.bias", (outputs,)
    yield "transformer.ln_f.weight", (width,)
    yield "transformer.ln_f.bias", (width,)


def checkpoint(shape: Shape, folder: Path) -> Path:
    """The checkpoint folder of `shape`: its own, or `folder`/<name> with random weights, which is made if missing.

    Weights are drawn from normal(0, 0.02) and LayerNorm weights are 1; they are the same every time. The tokenizer is
    es-mini's.
    """
    if shape.folder is not None:
        return shape.folder
    target, fields = folder / shape.name, _config(shape)
    try:
        if read_config(target) == fields:
            return target
    except UserError:
        pass
    folder.mkdir(parents=True, exist_ok=True)
    with folders.staging(target) as work:
        _write_safetensors(shape, work / "model.safetensors")
        for name in COMPANIONS:
            shutil.copyfile(ES_MINI / name, work / name)
        (work / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        work.chmod(0o755)
        folders.replace(work, target)
    return target


def prompts(shape: Shape, batch: int, count: int) -> np.ndarray:
    """Token ids int64 [batch, count]: real text for a trained model, random ids below RANDOM_IDS for a random one."""
    if shape.folder is None:
        return np.random.default_rng(0).integers(RANDOM_IDS, size=(batch, count))
    test = load_splits(Source(str(CORPUS)))[1]
    documents = encode(load_tokenizer(shape.folder), test.documents)
    text = stream(documents, start_token(shape.folder))
    return full_windows(np.resize(text, max(len(text), batch * count)), count)[:batch]


def _config(shape: Shape) -> dict:
    dimensions = {
        "n_layer": shape.layers,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_positions": shape.positions,
        "vocab_size": shape.vocabulary,
    }
    return read_config(ES_MINI) | dimensions | {"dtype": "float32"}


def _write_safetensors(shape: Shape, path: Path) -> None:
    """Write the header (8 bytes of length, then JSON) and the data, with only one tensor in memory at a time."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors(shape):
        begin, end = end, end + 4 * prod(dims)
        header[name] = {"dtype": "F32", "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dims in tensors(shape):
            if ".ln_" in name:
                values = np.full(dims, name.endswith("weight"), np.float32)
            else:
                # The seed depends only on the tensor's name, so the values are the same every time.
                values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(dims, np.float32) * 0.02
            file.write(values.astype("<f4", copy=False).data)
