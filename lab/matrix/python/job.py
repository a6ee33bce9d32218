"""The job that a runtime is given, and the result that it writes.

A runtime is a program whose last argument is the path of a job. It writes <output>/result.json and ends with status 0;
or it ends with another status, and the last line of standard error is the reason.

Job: `folder` (an artifact), `target` ("portable" or "ort"), `ids` (T token ids, the first is the start token),
`prefill` (how many of them the cached run takes at once), `pad` (how many padding tokens the shorter sequence of a
batch has), `start` (the start token), `prompt` (text), `generate` (how many tokens), `threads`, `output` (a folder).

Result: `version`
  `whole` [T, V]                the logits of all ids
  `cached` [T - prefill + 1, V] the logits of the last prefill token, and of each later token with the cache
  `padded` [T - pad, V]         the logits of the real tokens of (padding × pad, ids[: T - pad]) in a batch with ids
  `generated`                   the greedy continuation of start token and prompt by the runtime's own loop
  `generated_padded`            the same in a batch with a longer prompt
  `prompt_ids`                  the prompt's ids by the runtime's own tokenizer
  `note`                        what was done to make the artifact run
Logits are files of little-endian float32. A part that the runtime does not have is null or left out, and `skipped` says
why; a part that it failed at has its message in `failed`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

LOGITS = ("whole", "cached", "padded")
NO_LOOP = "runs graphs; it has no generation loop or tokenizer"


def run(main: Callable[[dict], dict]) -> None:
    """Read the job that the command line names, let `main` do it, and write the result; arrays become files."""
    job = json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))
    output = Path(job["output"])
    try:
        result = {"skipped": {}} | main(job)
    except Exception as error:  # a library may raise anything; its message is the answer
        sys.exit(one_line(error))
    for name in LOGITS:
        if (logits := result.setdefault(name, None)) is not None:
            np.ascontiguousarray(logits, "<f4").tofile(output / f"{name}.f32")
            result[name] = f"{name}.f32"
    (output / "result.json").write_text(json.dumps(result), encoding="utf-8")


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def padded_batch(job: dict) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), each [2, T]: the job's ids; and `pad` padding tokens, followed by all but the last `pad` ids."""
    ids, pad = job["ids"], job["pad"]
    mask = np.ones((2, len(ids)), np.int64)
    mask[1, :pad] = 0
    return np.array([ids, [job["start"]] * pad + ids[: len(ids) - pad]], np.int64), mask


def pieces(job: dict) -> list[slice]:
    """The slices of the ids in which the cached run takes them: the prefill, then one token at a time."""
    prefill, count = job["prefill"], len(job["ids"])
    return [slice(0, prefill), *(slice(at, at + 1) for at in range(prefill, count))]
