"""Keep an artifact's graph and weights as ONNX Runtime has prepared them, so that the next session opens sooner.

To open a session, ONNX Runtime optimizes the graph, computes what is constant in it and packs the weights for its
kernels. It can write the outcome beside a graph (`session.save_external_prepacked_constant_initializers`). A session
over that copy has nothing to optimize, and maps the packed weights: they take no memory of its own, and all processes
that run the same artifact share them. ONNX Runtime 1.32 still packs each weight once, to compare it with the copy.

A copy holds for one processor, one build of ONNX Runtime and one set of options only, so it is never part of an
artifact. It lies in the user's cache (cuantiza/core/store/entries.py), and its key names all of these:

KEY/index.json    the key's parts, and size and sha256 of both files
KEY/model.onnx    the optimized graph
KEY/weights.bin   its weights, as they were and packed
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from cuantiza.core import contract
from cuantiza.core.machine.instructions import kernel_switches, processor
from cuantiza.core.store import entries
from cuantiza.core.store.artifact import File
from cuantiza.core.store.digests import digest, graph_hashes, sha256_file, sha256_known
from cuantiza.core.store.user_cache import user_cache

_SCHEMA = "cuantiza/packed/1"
_GRAPH, _WEIGHTS, _INDEX = "model.onnx", "weights.bin", "index.json"
# A copy was seen to take 2.2 to 2.4 times the artifact's bytes; fp16 and bf16, which are computed in fp32, 4.2 times.
_MOST_TIMES = 5
_SAVE = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_file_name": _WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
# The copy must give these token ids' logits exactly: a prompt and a single token, which run different kernels.
_TRIED = (np.arange(8), np.arange(1))


def open_packed(
    model: Path, artifact: str, settings: dict[str, str], options: Callable[[], ort.SessionOptions]
) -> ort.InferenceSession | None:
    """A session over the packed copy of `model`, which is made if it is missing; None where there cannot be one.

    `artifact` is the digest of the artifact that `model` belongs to. `settings` are the configuration entries of
    `options`, which makes a session's options. Whatever goes wrong with the copy, `model` itself can be opened instead.
    """
    try:
        folder, parts = user_cache(), _parts(model, artifact, settings)
        entry = folder / "packed" / digest(parts)
        session = _opened(entry, parts, options)
        return session or (_made(model, folder, entry, parts, options) if _has_room(model, folder) else None)
    except Exception:  # there is no cache, the disk is full, ONNX Runtime fails, whose exceptions share no base class
        return None


def is_packed(session: ort.InferenceSession) -> bool:
    """Whether `session` is one of `open_packed`."""
    level: ort.GraphOptimizationLevel = session.get_session_options().graph_optimization_level
    return bool(level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL)


def _parts(model: Path, artifact: str, settings: dict[str, str]) -> dict[str, Any]:
    """Everything that a copy depends on. The number of threads is not among it: packing gives the same bytes."""
    return {
        "schema": _SCHEMA,
        "artifact": artifact,
        "files": graph_hashes(model, sha256_known),
        "onnxruntime": [ort.__version__, ort.get_build_info()],
        "processor": processor(),
        "settings": settings,
        "environment": kernel_switches(),
    }


def _opened(
    entry: Path, parts: dict[str, Any], options: Callable[[], ort.SessionOptions]
) -> ort.InferenceSession | None:
    """A session over the copy `entry`; None if there is none, or not a whole one, which is removed."""
    if not entry.exists():
        return None
    try:
        index = json.loads((entry / _INDEX).read_bytes())
        whole = index["parts"] == parts and all(
            (entry / name).stat().st_size == index["files"][name]["bytes"]
            and sha256_known(entry / name) == index["files"][name]["sha256"]
            for name in (_GRAPH, _WEIGHTS)
        )
        if whole:
            session = _mapped(entry, options)
            entries.touch(entry)
            return session
    except Exception:  # the index is no JSON or lacks something, a file is missing, ONNX Runtime refuses the graph
        pass
    entries.remove(entry)
    return None


def _mapped(entry: Path, options: Callable[[], ort.SessionOptions]) -> ort.InferenceSession:
    settings = options()
    # It was optimized when it was saved. Without this, it might be optimized into something else.
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(entry / _GRAPH), settings, providers=["CPUExecutionProvider"])


def _has_room(model: Path, folder: Path) -> bool:
    """Whether a copy of `model` fits into the cache's bound, and leaves as much of the disk free as it takes."""
    most = _MOST_TIMES * sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*"))
    return most <= entries.BOUND_BYTES and 2 * most <= shutil.disk_usage(folder).free


def _made(
    model: Path, folder: Path, entry: Path, parts: dict[str, Any], options: Callable[[], ort.SessionOptions]
) -> ort.InferenceSession | None:
    """Make the copy `entry` and open it; None while another process makes one, or if it is not exact."""
    with entries.making(folder) as work:
        if work is None:
            return None
        settings = options()
        settings.optimized_model_filepath = str(work / _GRAPH)
        for name, value in _SAVE.items():
            settings.add_session_config_entry(name, value)
        saved = ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
        # Another artifact may have taken this one's place since the key was made, and the copy would be wrong for ever.
        if graph_hashes(model, sha256_known) != parts["files"] or not _agree(saved, _mapped(work, options)):
            return None
        del saved
        files = {
            name: asdict(File((work / name).stat().st_size, sha256_file(work / name))) for name in (_GRAPH, _WEIGHTS)
        }
        (work / _INDEX).write_text(json.dumps({"parts": parts, "files": files}), encoding="utf-8")
        entries.publish(work, entry)
    return _opened(entry, parts, options)


def _agree(first: ort.InferenceSession, second: ort.InferenceSession) -> bool:
    """Whether both sessions compute exactly the same outputs, bit by bit."""
    for ids in _TRIED:
        feeds = contract.window_feeds(first.get_inputs(), ids)
        pairs = zip(first.run(None, feeds), second.run(None, feeds), strict=True)
        if any(one.tobytes() != other.tobytes() for one, other in pairs):
            return False
    return True
