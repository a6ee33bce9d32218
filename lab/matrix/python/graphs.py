"""A job for libraries that only run graphs: here are the feeds, and the loop that hands on the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from cuantiza.core import contract
from lab.matrix.python.job import NO_LOOP, one_line, padded_batch, pieces

Call = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


def logits(call: Call, past: dict[str, tuple[int, int]], job: dict, library: str) -> dict:
    """The part of a job's result (lab/matrix/python/job.py) that needs no tokenizer and no generation loop.

    `call` runs the graph: feeds -> outputs, both by name. `past` has (heads, width) of each input of the cache.
    """

    def run(ids: np.ndarray, mask: np.ndarray, cache: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return call(contract.token_feeds(ids, mask) | cache)

    def empty(batch: int) -> dict[str, np.ndarray]:
        return {name: np.zeros((batch, heads, 0, width), np.float32) for name, (heads, width) in past.items()}

    ids = np.array([job["ids"]], np.int64)
    whole = np.array(run(ids, np.ones_like(ids), empty(1))[contract.LOGITS][0])
    cache, rows = empty(1), []
    for piece in pieces(job):
        outputs = run(ids[:, piece], np.ones((1, piece.stop), np.int64), cache)
        rows.append(np.array(outputs[contract.LOGITS][0, -1]))
        cache = {name: np.array(outputs[contract.present_of(name)]) for name in past}
    skipped = dict.fromkeys(("generated", "generated_padded", "prompt_ids"), f"{library} {NO_LOOP}")
    padded, failed = None, {}
    try:
        batch, mask = padded_batch(job)
        padded = np.array(run(batch, mask, empty(2))[contract.LOGITS][1, job["pad"] :])
    except Exception as error:  # some runtimes can run one sequence but not a batch of two
        failed["padded"] = one_line(error)
    return {"whole": whole, "cached": np.stack(rows), "padded": padded, "skipped": skipped, "failed": failed}
