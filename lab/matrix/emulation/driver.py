"""`driver.py JOB` runs in any environment that has NumPy and ONNX Runtime, also on an emulated processor.

JOB is a JSON file: {"windows": .npy of token ids int64 [W, T], "cached": C, "threads": n, "runs": [{"model": .onnx,
"options": {session option: value}, "output": .npz to write}]}. The output has `whole` float32 [W, T, V], the logits
without a past, and `cached` [C, V], those of the first window's last C tokens, which are fed one by one through the KV
cache, because a single token uses other kernels. Prints one line of JSON about this processor.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when ONNX Runtime is loaded; cuantiza is imported later here
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from cuantiza.core import contract
from cuantiza.core.run.exact_int8 import EXACT, saturates

# ONNX Runtime chooses its aarch64 kernels by these bits of the auxiliary vector: (entry, bit), Linux's asm/hwcap.h.
_AARCH64 = {"asimddp": (16, 20), "sve": (16, 22), "i8mm": (26, 13), "bf16": (26, 14)}


def session(model: str | bytes, options: dict[str, str], threads: int) -> ort.InferenceSession:
    """A CPU session; `options` are ONNX Runtime's session options by their documented names."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    for name, value in options.items():
        settings.add_session_config_entry(name, value)
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def feeds(opened: ort.InferenceSession, ids: np.ndarray, past: list[np.ndarray] | None) -> dict[str, np.ndarray]:
    """All feeds for token ids int64 [B, T] that follow `past`, L × (key, value) (None: no tokens)."""
    shapes = {item.name: item.shape for item in opened.get_inputs()}
    names = [name for name in shapes if contract.is_past(name)]
    past = past or [np.zeros((len(ids), shapes[name][1], 0, shapes[name][3]), np.float32) for name in names]
    values = contract.token_feeds(ids, np.ones((len(ids), past[0].shape[2] + ids.shape[1]), np.int64))
    return {name: value for name, value in values.items() if name in shapes} | dict(zip(names, past, strict=True))


def logits(opened: ort.InferenceSession, windows: np.ndarray, cached: int) -> dict[str, np.ndarray]:
    """`whole` [W, T, V] and `cached` [C, V] of windows [W, T]."""
    whole = np.concatenate([opened.run([contract.LOGITS], feeds(opened, ids[None], None))[0] for ids in windows])
    past_names = [item.name for item in opened.get_inputs() if contract.is_past(item.name)]
    outputs = [contract.LOGITS, *map(contract.present_of, past_names)]
    first = windows[:1]
    _, *past = opened.run(outputs, feeds(opened, first[:, : first.shape[1] - cached], None))
    rows = []
    for position in range(first.shape[1] - cached, first.shape[1]):
        row, *past = opened.run(outputs, feeds(opened, first[:, position : position + 1], past))
        rows.append(row[0, -1])
    return {"whole": whole, "cached": np.stack(rows)}


def features() -> list[str]:
    """Which features of _AARCH64 this processor has. Empty on x86-64, where ONNX Runtime reads them by CPUID itself."""
    if platform.machine() != "aarch64":
        return []
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype = ctypes.c_ulong
    return [name for name, (entry, bit) in _AARCH64.items() if getauxval(ctypes.c_ulong(entry)) >> bit & 1]


def main(job: dict) -> None:
    windows = np.load(job["windows"])
    for run in job["runs"]:
        try:
            opened = session(run["model"], run["options"], job["threads"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            sys.exit(" ".join(str(error).split()))
        np.savez(run["output"], **logits(opened, windows, job["cached"]))
    probe = bytes.fromhex(job["probe"])
    about = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "features": features(),
        "saturates": saturates(probe, {}),
        "saturates_with_option": saturates(probe, EXACT),
    }
    print(json.dumps(about))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
