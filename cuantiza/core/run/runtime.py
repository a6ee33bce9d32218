"""One ONNX Runtime session of the artifact contract: full forward, cached decode, explicit threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from cuantiza.core.errors import UserError
from cuantiza.core.machine.threads import default_threads
from cuantiza.core.run.exact_int8 import exact_products
from cuantiza.core.run.large_pages import use_large_pages

# Set in the metadata of a file whose past and present may be one buffer [B, H, capacity, d].
IN_PLACE = "kv_cache_in_place"
KEEP = "num_logits_to_keep"
# Tokens that go through the model at a time: attention's products grow with their square. Measured on GPT-2 small, 512
# tokens in pieces of 128, 256 and 512 (docs/performance.md).
CHUNK = 256


class Cache:
    """Keys and values of `length` tokens of a batch, which `Runtime.step` adds to. Belongs to the runtime that made it.

    A shallow copy goes on by itself, from the tokens that both have.
    """

    def __init__(self, past: list[ort.OrtValue], capacity: int, batch: int) -> None:
        self.past = past
        self.mask = np.ones((batch, capacity), np.int64)  # 0 on padding
        self.length = 0
        self.binding: ort.IOBinding | None = None  # of what stays the same, where the cache is updated in place

    @property
    def capacity(self) -> int:
        return self.mask.shape[1]


class Runtime:
    """A session over `model` (an ONNX file of the contract in the README).

    The number of layers L, heads H and the head width d are read from the file's own inputs.
    Raises UserError where ONNX Runtime refuses the file or its inputs and outputs are not the contract's.
    """

    def __init__(
        self,
        model: Path,
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        *,
        in_place: bool = True,
        last_only: bool = True,
        chunk: int | None = CHUNK,
        spin: bool = False,
        prepack: bool = True,
        large_pages: bool = True,
    ) -> None:
        """`outputs` replaces the contract's, for a graph that shows something else of the same model; `spin` and
        `prepack` as in `open_session`; `large_pages` as cuantiza/core/run/large_pages.py has it.

        The others concern `step`, and are there for measuring what each is worth: whether to update the cache in
        place and to compute the last position's logits alone, where the file can do so, and how many tokens of a
        prompt go through at a time (None: all).
        """
        self.session = open_session(model, threads, spin, prepack)
        if large_pages:
            use_large_pages()
        inputs = {item.name: item.shape for item in self.session.get_inputs()}
        found = {*inputs, *(item.name for item in self.session.get_outputs())}
        self.layers = sum(name.startswith("past_key_values.") for name in inputs) // 2
        self._past = [
            f"past_key_values.{layer}.{kv}" for layer in range(max(self.layers, 1)) for kv in ("key", "value")
        ]
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        self._outputs = outputs or ["logits", *self._present]
        wanted = {"input_ids", "attention_mask", *self._past, *self._outputs}
        if missing := sorted(wanted - found):
            raise UserError(
                f"{model}: has no {', '.join(missing[:3])}; only graphs with the inputs and outputs of the README's contract are measured"
            )
        if unknown := sorted(inputs.keys() - wanted - {"position_ids"}):
            raise UserError(f"{model}: asks for {', '.join(unknown[:3])}, which the README's contract does not know")
        self._takes_positions = "position_ids" in inputs
        for item in self.session.get_inputs():
            if item.name in self._past and (
                item.type != "tensor(float)" or [*map(type, item.shape[1::2])] != [int, int]
            ):
                raise UserError(
                    f"{model}: {item.name} is {item.type} {item.shape} where the README's contract has float32 [B, heads, P, width]"
                )
        _, self.heads, _, self.head_dim = inputs[self._past[0]]
        self.in_place = in_place and IN_PLACE in self.session.get_modelmeta().custom_metadata_map
        keeps = last_only and KEEP in (item.name for item in self.session.get_overridable_initializers())
        self._keep_last = ort.OrtValue.ortvalue_from_numpy(np.array(1, np.int64)) if keeps else None
        self._chunk = chunk

    def forward(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits float32 [B, T, V] of token ids [B, T] without a past; `mask` [B, T] is 0 on padding."""
        return self.run(ids, mask)[0].numpy()

    def extend(
        self, ids: np.ndarray, past: list[ort.OrtValue], mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, list[ort.OrtValue]]:
        """Logits [B, T, V] of token ids [B, T] behind `past`, and the past that includes them.

        `past` holds L × (key, value), each [B, H, P, d]; `mask` [B, P+T] is 0 on padding. Neither the
        past nor the new one passes through NumPy.
        """
        logits, *present = self.run(ids, mask, past)
        return logits.numpy(), present

    def run(
        self, ids: np.ndarray, mask: np.ndarray | None = None, past: list[ort.OrtValue] | None = None
    ) -> list[ort.OrtValue]:
        """All outputs for token ids [B, T] behind `past` (none where not given), in their order."""
        past = past or self.empty_past(len(ids))
        before = past[0].shape()[2]
        if mask is None:
            mask = np.ones((len(ids), before + ids.shape[1]), np.int64)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._feeds(ids, mask).items()}
        return self.session.run_with_ort_values(self._outputs, values | dict(zip(self._past, past, strict=True)))

    def empty_past(self, batch: int) -> list[ort.OrtValue]:
        """A past of no tokens: L × (key, value), each [B, H, 0, d]."""
        empty = np.zeros((batch, self.heads, 0, self.head_dim), np.float32)
        return [ort.OrtValue.ortvalue_from_numpy(empty) for _ in self._past]

    def cache(self, batch: int, capacity: int) -> Cache:
        """A cache of no tokens for `batch` sequences of at most `capacity` tokens, for `step`."""
        if not self.in_place:
            return Cache(self.empty_past(batch), capacity, batch)
        # One block, and written to here: the system backs it with large pages, and none of them in the midst of a step.
        block = np.empty((len(self._past), batch, self.heads, capacity, self.head_dim), np.float32)
        block.fill(0)
        cache = Cache([ort.OrtValue.ortvalue_from_numpy(part) for part in block], capacity, batch)
        cache.binding = self._binding()
        for past, present, value in zip(self._past, self._present, cache.past, strict=True):
            cache.binding.bind_ortvalue_input(past, value)
            cache.binding.bind_ortvalue_output(present, value)
        return cache

    def step(self, cache: Cache, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits float32 [B, V] of the last of token ids [B, T], which are added to `cache`.

        `mask` [B, T] is 0 on padding. What generation needs and no more: other positions' logits are not computed
        where the file allows, and nothing passes through NumPy but ids and these logits. Where the file updates its
        cache in place, nothing is allocated that grows with the tokens.
        """
        batch, count = ids.shape
        if cache.length + count > cache.capacity:
            raise ValueError(f"{cache.length} + {count} tokens in a cache of {cache.capacity}")
        if mask is not None:
            cache.mask[:, cache.length : cache.length + count] = mask
        # GroupQueryAttention takes several tokens behind a past for a batch of one alone.
        together = count if batch > 1 and cache.length == 0 else 1 if batch > 1 and self.in_place else self._chunk
        together = together or count
        *before, last = (ids[:, start : start + together] for start in range(0, count, together))
        for piece in before:  # of which the cache is all that anybody reads
            keep_none = self._keep_last and ort.OrtValue.ortvalue_from_numpy(np.array(-piece.shape[1], np.int64))
            self._step(cache, piece, keep_none)
        return self._step(cache, last, self._keep_last)[:, -1]

    def _step(self, cache: Cache, ids: np.ndarray, keep: ort.OrtValue | None) -> np.ndarray:
        """Logits [B, n, V] of token ids [B, T], which are added to `cache`; `keep` says which, None: all."""
        cache.length += ids.shape[1]
        binding = cache.binding or self._binding()
        if keep is not None:
            binding.bind_ortvalue_input(KEEP, keep)
        for name, array in self._feeds(ids, cache.mask[:, : cache.length]).items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")  # anew, as their shape may have changed
        if cache.binding is None:
            for past, present, value in zip(self._past, self._present, cache.past, strict=True):
                binding.bind_ortvalue_input(past, value)
                binding.bind_output(present)
        self.session.run_with_iobinding(binding)
        logits, *grown = binding.get_outputs()
        if cache.binding is None:
            cache.past = grown
        return logits.numpy()

    def _binding(self) -> ort.IOBinding:
        binding = self.session.io_binding()
        binding.bind_output("logits")  # before all others, so that it is the first of get_outputs()
        return binding

    def _feeds(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        feeds = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            # Padding stands on the left or in the past: a token's position counts the real ones before it.
            feeds["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        return {name: np.ascontiguousarray(array, np.int64) for name, array in feeds.items()}


def window_feeds(inputs: Iterable, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What a graph with contract `inputs` (each with a name and a shape) asks for: token ids int64 [T], no past."""
    feeds = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
    }
    shapes = {item.name: item.shape for item in inputs}
    past = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_")
    }
    return {name: array for name, array in feeds.items() if name in shapes} | past


def open_session(
    model: Path, threads: int | None = None, spin: bool = False, prepack: bool = True
) -> ort.InferenceSession:
    """A session over any ONNX file, on `threads` threads (all processors where not given).

    Threads that `spin` on after a run begin the next one sooner, and slow every other session down meanwhile: for one
    that has the processors to itself. Without `prepack`, weights stay where they are (those of external data in the
    mapped file) and are packed at every product, which is slower. Integer products are exact on every processor (cuantiza/core/run/exact_int8.py). Raises
    UserError where ONNX Runtime refuses the file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "0" if spin else "1")
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    for name, value in exact_products().items():
        options.add_session_config_entry(name, value)
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(
            f"{model}: ONNX Runtime {ort.__version__} cannot load it ({str(error).splitlines()[0]})"
        ) from None
