"""Checkpoints of the shapes that the lab measures: the embedded es-mini, and others with random weights."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, full_windows, load_splits, stream
from cuantiza.core.inputs.model_config import read_config, start_token
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer
from cuantiza.core.store import folders
from lab import CORPUS, ES_MINI
from lab.checkpoints.shapes import Shape

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


def checkpoint(shape: Shape, folder: Path) -> Path:
    """The checkpoint folder of `shape`: its own, or `folder`/<name> with random weights, which is made if missing.

    Weights are drawn from normal(0, 0.02), and those of norms are 1; they are the same every time. The tokenizer is
    es-mini's.
    """
    if shape.folder is not None:
        return shape.folder
    target, fields = folder / shape.name, shape.config()
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


def _write_safetensors(shape: Shape, path: Path) -> None:
    """Write the header (8 bytes of length, then JSON) and the data, with only one tensor in memory at a time."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in shape.tensors():
        begin, end = end, end + 4 * prod(dims)
        header[name] = {"dtype": "F32", "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dims in shape.tensors():
            if ".ln_" in name or "norm." in name:
                values = np.full(dims, name.endswith("weight"), np.float32)
            else:
                # The seed depends only on the tensor's name, so the values are the same every time.
                values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(dims, np.float32) * 0.02
            file.write(values.astype("<f4", copy=False).data)
