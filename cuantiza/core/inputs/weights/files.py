"""Read weight files as named arrays, lazily: safetensors where there are any, else pytorch_model.bin."""

from __future__ import annotations

import json
import math
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import weight_files

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
# Buffers that old checkpoints store among their weights: the causal mask, and the value used instead of -inf.
_BUFFERS = (".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class Weight:
    """A tensor on disk. `read()` loads it as a float32 array of `shape`."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read_weights(folder: Path) -> dict[str, Weight]:
    """Return the weights of a GPT-2 checkpoint by name, without the `transformer.` prefix and without buffers.

    Each array is read only when it is asked for, so that no more than one has to be in memory. A `.bin` in torch's
    legacy format is the exception, because it cannot be memory-mapped. Python's own unpickler never reads a file,
    because it would run code that the file contains. Raises UserError where no weights are found, or where a file is
    cut short or mislabelled.
    """
    names = weight_files({file.name for file in folder.iterdir()})
    if not names:
        found = [file.name for file in folder.iterdir() if file.suffix in (".h5", ".msgpack", ".ot")]
        kind = f", only {', '.join(sorted(found))}, which cannot be read" if found else ""
        raise UserError(
            f"{folder}: has no model.safetensors and no pytorch_model.bin{kind}; save the model with transformers' save_pretrained"
        )
    _check_index(folder, names)
    weights: dict[str, Weight] = {}
    for name in names:
        if not name.endswith(".index.json"):
            weights |= _read_safetensors(folder / name) if name.endswith(".safetensors") else _read_bin(folder / name)
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    return {name: weight for name, weight in weights.items() if not name.endswith(_BUFFERS)}


def _check_index(folder: Path, names: list[str]) -> None:
    """Raise UserError where an index names a shard that is not a file of this folder."""
    for name in names:
        if not name.endswith(".index.json"):
            continue
        try:
            shards = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{folder / name}: broken index ({error}); download it again") from None
        if missing := sorted(shards - set(names), key=str):
            raise UserError(f"{folder / name}: names {missing[0]!r}, which is not there; download the missing shards")


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

    def reader(begin: int, end: int, dtype: type, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
        return lambda: data[begin:end].view(dtype).reshape(shape).astype(np.float32, copy=False)

    weights = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in _DTYPES:
            shape = tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            weights[name] = Weight(shape, reader(begin, end, _DTYPES[entry["dtype"]], shape))
    return weights


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
        reason = next(
            (line for line in str(error).splitlines() if "Unsupported" in line or "not an allowed" in line), ""
        )
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

    def reader(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        return lambda: tensor.detach().to(torch.float32).contiguous().numpy()

    return {
        name: Weight(tuple(tensor.shape), reader(tensor))
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }


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
