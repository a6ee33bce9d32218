"""CTranslate2 with int8 weights: the converter's `--quantization int8`, and its own greedy loop.

It is set up as its performance guide advises: int8, no beam search, no scores, one generator with all threads. Its
public interface has no single step with a cache, so a row is timed over whole generations, or by the callback per token.
"""

from __future__ import annotations

import json
import tempfile
import time
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np


def version() -> str:
    return f"ctranslate2 {version_of('ctranslate2')}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        padded = Path(work)
        for file in checkpoint.iterdir():
            (padded / file.name).symlink_to(file.absolute())
        _pad_tokenizer(padded)
        converter = ctranslate2.converters.TransformersConverter(str(padded), low_cpu_mem_usage=True)
        # int8 weights; the rest in float32, which CPUs compute in, whatever the checkpoint is stored in.
        converter.convert(str(folder), quantization="int8_float32", force=True)


def _pad_tokenizer(folder: Path) -> None:
    """Add tokens up to the size of the embedding, as the converter demands; a random model's tokenizer has fewer."""
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocabulary |= {f"<unused {number}>": number for number in range(size) if number not in taken}
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def files(kind: str, folder: Path) -> list[Path]:
    return [folder / "model.bin"]


class Engine:
    steps = False

    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        self._generator = ctranslate2.Generator(str(folder), device="cpu", inter_threads=1, intra_threads=threads)
        self._tokens = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, ids: np.ndarray, count: int) -> list[list[int]]:
        """`count` tokens after each of ids [B, T], of which all but the last are processed at once."""
        return [result.sequences_ids[0] for result in self._generate(ids, count)]

    def times(self, ids: np.ndarray, count: int) -> list[int]:
        """When each of `count` tokens after ids [B, T] was there for the whole batch, in ns from the call.

        The differences are the times of decode steps with a cache of T and more tokens.
        """
        found: dict[int, int] = {}
        start = time.perf_counter_ns()

        def note(result: ctranslate2.GenerationStepResult) -> bool:
            found[result.step] = time.perf_counter_ns() - start
            return False  # continue

        self._generate(ids, count, callback=note)
        return list(found.values())

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, V] of the last of ids [B, T], for checks only: without a cache, and computed for all positions."""
        return np.array(self._generator.forward_batch(ids.tolist()))[:, -1]

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T]."""
        return np.array(self._generator.forward_batch([ids.tolist()]))[0]

    def _generate(self, ids: np.ndarray, count: int, **options: Any) -> list[ctranslate2.GenerationResult]:
        return self._generator.generate_batch(
            [[self._tokens[token] for token in row] for row in ids],
            min_length=count,
            max_length=count,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            **options,
        )
