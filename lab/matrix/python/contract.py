"""The README's contract for a runtime that runs graphs and nothing more: feeds, and the cache handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lab.matrix.python.job import NO_LOOP, one_line, padded_batch, pieces

Call = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


def logits(call: Call, past: dict[str, tuple[int, int]], job: dict, library: str) -> dict:
    """What the job asks for, as far as graphs go. `call` runs the graph: feeds -> outputs, by name.

    `past` has the (heads, width) of every input past_key_values.
    """

    def run(ids: np.ndarray, mask: np.ndarray, cache: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.ascontiguousarray(positions)}
        return call(feeds | cache)

    def empty(batch: int) -> dict[str, np.ndarray]:
        return {name: np.zeros((batch, heads, 0, width), np.float32) for name, (heads, width) in past.items()}

    ids = np.array([job["ids"]], np.int64)
    whole = np.array(run(ids, np.ones_like(ids), empty(1))["logits"][0])
    cache, rows = empty(1), []
    for piece in pieces(job):
        outputs = run(ids[:, piece], np.ones((1, piece.stop), np.int64), cache)
        rows.append(np.array(outputs["logits"][0, -1]))
        cache = {name: np.array(outputs[name.replace("past_key_values", "present")]) for name in past}
    skipped = dict.fromkeys(("generated", "generated_padded", "prompt_ids"), f"{library} {NO_LOOP}")
    padded, failed = None, {}
    try:
        batch, mask = padded_batch(job)
        padded = np.array(run(batch, mask, empty(2))["logits"][1, job["pad"] :])
    except Exception as error:  # a runtime may do with one sequence what it cannot with two
        failed["padded"] = one_line(error)
    return {"whole": whole, "cached": np.stack(rows), "padded": padded, "skipped": skipped, "failed": failed}
