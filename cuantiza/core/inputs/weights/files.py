"""Read weight files as named arrays, lazily: safetensors where there are any, else pytorch_model.bin.

Names are those of the files; layout.py knows what GPT-2 calls its weights.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import files_to_read
from cuantiza.core.inputs.model_types import TRAINING_STATE

# Weights in formats that are not read, and in those that are, but under other names.
_UNREAD = (".h5", ".msgpack", ".ot", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
_OTHER_NAME = re.compile(r"(?!adapter_model).*\.(?:safetensors|bin)")
# The dtypes of safetensors that hold floats. Others are integers or packed, and mean nothing without their scales.
_FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# The end of the name under which torch's quantized layers keep a tuple of the packed weight and the bias.
PACKED = "._packed_params._packed_params"
# The keys under which training scripts keep the weights among their other state: Lightning, nanoGPT, DeepSpeed.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True)
class Weight:
    """A tensor on disk of type `dtype`, as NumPy names it. `read()` loads it as a float32 array of `shape`.

    `read()` raises UserError where the tensor does not hold floats.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("float", "bfloat"))


def read_tensors(folder: Path) -> dict[str, Weight]:
    """Return the tensors of a checkpoint's weight files by the names that they have there.

    Each array is read only when it is asked for, so that no more than one has to be in memory. A `.bin` in torch's
    legacy format is the exception, because it cannot be memory-mapped. Python's own unpickler never reads a file,
    because it would run code that the file contains. Raises UserError where no weights are found, or where a file is
    cut short or mislabelled.
    """
    names = files_to_read(folder)
    if not names:
        raise _no_weights(folder)
    tensors: dict[str, Weight] = {}
    for name in names:
        if not name.endswith(".index.json"):
            tensors |= read_file(folder / name)
    return tensors


def _no_weights(folder: Path) -> UserError:
    """Say what `folder` has instead of weights that can be read."""
    files = sorted(file.name for file in folder.iterdir() if not TRAINING_STATE.match(file.name))
    inside = [name for name in files if (folder / name).is_dir() and files_to_read(folder / name)]
    shards = [name for name in files if "-of-" in name and name.endswith((".safetensors", ".bin"))]
    unread = [name for name in files if name.endswith(_UNREAD)]
    renamed = [name for name in files if _OTHER_NAME.fullmatch(name)]
    advice = "save the model with transformers' save_pretrained"
    if inside:
        advice = f"give the folder that has them: {', '.join(inside)}"
    elif shards:
        advice = f"download the index of {shards[0]} too"
    elif renamed:
        ours = "model.safetensors" if renamed[0].endswith(".safetensors") else "pytorch_model.bin"
        advice = f"if transformers wrote {renamed[0]}, rename it to {ours}; else {advice}"
        unread = [*renamed, *unread]
    elif any(name.endswith((".pt", ".pth", ".ckpt")) for name in unread):
        advice += ", or rename the file that torch saved it in to pytorch_model.bin"
    only = f", only {', '.join(unread)}, which {'is' if len(unread) == 1 else 'are'} not read" if unread else ""
    return UserError(f"{folder}: has no model.safetensors and no pytorch_model.bin{only}; {advice}")


def read_file(path: Path) -> dict[str, Weight]:
    """Return the tensors of one file, which is in safetensors' format or in torch's. Raises as `read_tensors` does."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


def _read_safetensors(path: Path) -> dict[str, Weight]:
    """Return the tensors of a safetensors file, memory-mapped.

    The library validates the header. The offsets are then read from the header itself (8 bytes of length, then JSON),
    because the library's NumPy interface does not support bfloat16. Format: huggingface.co/docs/safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is cut short or not a safetensors file ({error}); download it again") from None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data = (
        np.memmap(path, np.uint8, mode="r", offset=8 + length)
        if path.stat().st_size > 8 + length
        else np.empty(0, np.uint8)
    )

    weights = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if dtype := _FLOATS.get(entry["dtype"]):
            weights[name] = Weight(shape, np.dtype(dtype).name, partial(_floats, data[begin:end], dtype, shape))
        else:
            kind = entry["dtype"].replace("BOOL", "bool").replace("I", "int").replace("U", "uint")
            weights[name] = _no_floats(path, name, shape, kind)
    return weights


def _floats(data: np.ndarray, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    return data.view(dtype).reshape(shape).astype(np.float32, copy=False)


def _no_floats(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> Weight:
    def read() -> np.ndarray:
        raise UserError(f"{path}: {name} is {dtype}, not floats; give the checkpoint before it was quantized")

    return Weight(shape, dtype, read)


def _read_bin(path: Path) -> dict[str, Weight]:
    """Return the tensors of a pytorch_model.bin. torch's weights-only loader reads it and runs no code of the file."""
    import torch

    try:
        mapped = zipfile.is_zipfile(path)
        if mapped:
            _refuse_bomb(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle's protocol, which does not concern users
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # Modules such as os are "blocked"; what else is no tensor is "not allowed". Advice on allowing it is left out.
        lines = (line for line in str(error).splitlines() if "nsupported" in line or "not an allowed" in line)
        reason = next(lines, "").split(" by default.")[0]
        if not reason:
            raise UserError(f"{path}: is cut short or not a PyTorch file; download it again") from None
        raise UserError(
            f"{path}: holds more than tensors and was refused unexecuted ({reason.strip()}); "
            "ask its author for a model.safetensors"
        ) from None
    except MemoryError:
        raise UserError(
            f"{path}: asks for more memory than there is; free some, or ask its author for a model.safetensors"
        ) from None
    except (PermissionError, UserError):
        raise
    except Exception:  # for a broken file, the loader raises many kinds of exception
        raise UserError(f"{path}: is cut short or not a PyTorch file; download it again") from None
    if not isinstance(state, dict):
        raise UserError(
            f"{path}: holds a {type(state).__name__}, not a dictionary of tensors; save the model with transformers' save_pretrained"
        )

    def weight(name: str, tensor: torch.Tensor) -> Weight:
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if not tensor.is_floating_point():
            return _no_floats(path, name, shape, dtype)
        return Weight(shape, dtype, lambda: tensor.detach().to(torch.float32).contiguous().numpy())

    prefix, state = _unwrap(state)
    found = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            found[prefix + name] = weight(name, value)
        elif isinstance(name, str) and name.endswith(PACKED):
            found[prefix + name] = _no_floats(path, name, (), type(value).__name__)
    return found


def _unwrap(state: dict[Any, Any]) -> tuple[str, dict[Any, Any]]:
    """Return the dictionary of weights in `state`, after the keys that lead to it, such as "model."."""
    prefix = ""
    for _ in _WRAPPERS:  # a dictionary may hold itself
        key = next((key for key in _WRAPPERS if isinstance(state.get(key), dict)), None)
        if key is not None:
            prefix, state = f"{prefix}{key}.", state[key]
    return prefix, state


def _refuse_bomb(path: Path) -> None:
    """Raise UserError where an archive unpacks to more than its own size: torch.save never compresses."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise UserError(
            f"{path}: unpacks to {unpacked} bytes, more than its own size, which torch.save never writes; "
            "save it again with torch.save, or ask its author for a model.safetensors"
        )


def check_finite(name: str, array: np.ndarray, folder: Path) -> np.ndarray:
    """Return `array` itself. Raises UserError where it holds NaN or infinities."""
    # A float64 sum is not finite if any element is not, and it needs no mask as large as the weights.
    with np.errstate(invalid="ignore"):
        total = float(array.sum(dtype=np.float64))
    if not math.isfinite(total):
        raise UserError(f"{folder}: {name} holds NaN or infinities; the checkpoint is damaged or its training diverged")
    return array
