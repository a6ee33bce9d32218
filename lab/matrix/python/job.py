"""What the runtimes share: the job that a runtime is given and the result that it writes.

A runtime is a program that takes the path of a job, its last argument. It ends with status 0 having written <output>/result.json, or with
another and the reason as the last line of standard error.

Job: `folder` (an artifact), `target` ("portable" or "ort"), `ids` (T tokens behind the start token, that included),
`prefill` (how many of them the cached run takes at once), `pad` (how many padding tokens the shorter row of a batch
has), `start` (the start token), `prompt` (text), `generate` (how many tokens), `threads`, `output` (a folder).

Result: `version`; `whole` [T, V], the logits of all ids; `cached` [T - prefill + 1, V], those of the last token of the
prefill and of every further one through the cache; `padded` [T - pad, V], those of the real tokens of
(padding × pad, ids[: T - pad]) beside ids in one batch; `generated`, what the runtime's own loop continues the start
token and the prompt with, greedily; `generated_padded`, the same beside a longer prompt in one batch; `prompt_ids`,
the prompt by the runtime's own tokenizer; `note`, what was done for it. Logits are files of little-endian float32;
what a runtime does not have is null, or left out, and `skipped` says why; `failed` has the message where it has one.
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
    """Read the job that the command line names, have `main` carry it out, write the result: arrays as files."""
    job = json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))
    output = Path(job["output"])
    try:
        result = {"skipped": {}} | main(job)
    except Exception as error:  # whatever a library raises is the answer
        sys.exit(one_line(error))
    for name in LOGITS:
        if (logits := result.setdefault(name, None)) is not None:
            np.ascontiguousarray(logits, "<f4").tofile(output / f"{name}.f32")
            result[name] = f"{name}.f32"
    (output / "result.json").write_text(json.dumps(result), encoding="utf-8")


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def padded_batch(job: dict) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) [2, T] of the job's ids, and of all but the last `pad` of them behind as much padding."""
    ids, pad = job["ids"], job["pad"]
    mask = np.ones((2, len(ids)), np.int64)
    mask[1, :pad] = 0
    return np.array([ids, [job["start"]] * pad + ids[: len(ids) - pad]], np.int64), mask


def pieces(job: dict) -> list[slice]:
    """Of the ids: the prefill, then one at a time."""
    prefill, count = job["prefill"], len(job["ids"])
    return [slice(0, prefill), *(slice(at, at + 1) for at in range(prefill, count))]
