"""Run an artifact in ONNX Runtime: whole sequences, or step by step with a KV cache, on some number of threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from cuantiza.core import contract
from cuantiza.core.errors import UserError
from cuantiza.core.machine.hardware import default_threads
from cuantiza.core.run.exact_int8 import exact_options
from cuantiza.core.run.large_pages import use_large_pages
from cuantiza.core.run.packed import is_packed, open_packed

# A prompt goes through the model in pieces of this many tokens, because the attention scores grow with the square of
# the piece. Chosen on GPT-2 small: 512 tokens in pieces of 128, 256 and 512 (docs/performance.md).
CHUNK = 256


class Cache:
    """The keys and values of a batch's first `length` tokens. `Runtime.step` extends it; it belongs to that runtime.

    `copy.copy(cache)` is for running a step again from the same tokens. Of a cache in place, both write the new keys and
    values into one buffer, so only the one that stepped last may go on.
    """

    def __init__(self, past: list[ort.OrtValue], capacity: int, batch: int) -> None:
        self.past = past
        self.mask = np.ones((batch, capacity), np.int64)  # 0 on padding
        self.length = 0
        self.binding: ort.IOBinding | None = None  # only for a cache in place, whose buffers never change

    @property
    def capacity(self) -> int:
        """How many tokens fit, in each sequence."""
        return self.mask.shape[1]


@dataclass(frozen=True)
class Options:
    """The choices that make `Runtime.step` fast. lab/bench changes the defaults to measure what each choice is worth.

    in_place: write new keys and values into one buffer, where the file allows it.
    last_only: compute the logits of the last position only, where the file allows it.
    chunk: how many tokens of a prompt go through at a time; None for all at once.
    large_pages: move the weights into large memory pages (cuantiza/core/run/large_pages.py).
    """

    in_place: bool = True
    last_only: bool = True
    chunk: int | None = CHUNK
    large_pages: bool = True


class Runtime:
    """A session over `model`, an ONNX file with the inputs and outputs of cuantiza/core/contract.py.

    The number of layers L, of heads H, and the head width d are read from the file's own inputs.
    Raises UserError if ONNX Runtime refuses the file, when it is loaded or when it is run, or if it does not keep the
    contract.
    """

    def __init__(
        self,
        model: Path,
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        *,
        spin: bool = False,
        prepack: bool = True,
        artifact: str | None = None,
        exact: bool = True,
        options: Options = Options(),
    ) -> None:
        """Load `model`; `threads`, `spin`, `prepack`, `artifact` and `exact` are those of `open_session`.

        `outputs` names what `run` returns in place of the contract's outputs, for graphs that show other tensors too.
        """
        self.session = open_session(model, threads, spin, prepack, artifact, exact)
        self._model = model
        if options.large_pages and not is_packed(self.session):  # mapped weights stay in the page cache
            use_large_pages()
        inputs = {item.name: item for item in self.session.get_inputs()}
        self.layers = contract.count_layers(inputs)
        # A file without any cache is told that it lacks the first layer's.
        self._past = contract.past_names(max(self.layers, 1))
        self._present = contract.present_names(max(self.layers, 1))
        self._outputs = outputs or [contract.LOGITS, *self._present]
        self._check_names(set(inputs))
        self._check_types(inputs)
        _, self.heads, _, self.head_dim = inputs[self._past[0]].shape
        self._takes_positions = contract.POSITION_IDS in inputs
        self.in_place = options.in_place and contract.IN_PLACE in self.session.get_modelmeta().custom_metadata_map
        overridable = {item.name for item in self.session.get_overridable_initializers()}
        keeps = options.last_only and contract.KEEP in overridable
        self._keep_last = ort.OrtValue.ortvalue_from_numpy(np.array(1, np.int64)) if keeps else None
        self._chunk = options.chunk

    def _check_names(self, inputs: set[str]) -> None:
        found = inputs | {item.name for item in self.session.get_outputs()}
        wanted = {contract.INPUT_IDS, contract.ATTENTION_MASK, *self._past, *self._outputs}
        told = []
        if missing := sorted(wanted - found):
            told.append(f"has no {', '.join(missing[:3])}")
        if unknown := sorted(inputs - wanted - {contract.POSITION_IDS}):
            told.append(f"asks for {', '.join(unknown[:3])}")
        if told:
            raise UserError(
                f"{self._model}: {' and '.join(told)}; only graphs with the inputs and outputs of the contract in "
                "docs/artifact.md are measured, such as those of optimum's task text-generation-with-past"
            )

    def _check_types(self, inputs: dict[str, ort.NodeArg]) -> None:
        """Raise UserError where a tensor has another type or rank than in the contract, whose numbers would mislead."""
        logits = next((item for item in self.session.get_outputs() if item.name == contract.LOGITS), None)
        tokens = (contract.INPUT_IDS, contract.ATTENTION_MASK, contract.POSITION_IDS)
        told = [
            *(_unlike(inputs[name], "int64", "[B, T]", 2) for name in tokens if name in inputs),
            *(_unlike(inputs[name], "float", "[B, heads, P, width]", 4) for name in self._past),
            _unlike(logits, "float", "[B, T, V]", 3) if logits is not None else None,
        ]
        if first := next((text for text in told if text), None):
            raise UserError(f"{self._model}: {first}")

    def forward(self, ids: np.ndarray, mask: np.ndarray | None = None, last: int = 0) -> np.ndarray:
        """Logits float32 [B, n, V] of the `last` n (0: all T) of token ids [B, T], computed without a cache.

        `mask` [B, T] is 0 on padding. Where the file allows it, no other position's logits are computed.
        """
        logits: np.ndarray = self.run(ids, mask, last=last)[0].numpy()
        return logits[:, -last:]

    def extend(
        self, ids: np.ndarray, past: list[ort.OrtValue], mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, list[ort.OrtValue]]:
        """Logits [B, T, V] of token ids [B, T] that follow `past`, and the new past, which includes them.

        `past` holds L × (key, value), each [B, H, P, d]; `mask` [B, P+T] is 0 on padding. Keys and values are never
        copied to NumPy arrays.
        """
        logits, *present = self.run(ids, mask, past)
        return logits.numpy(), present

    def run(
        self, ids: np.ndarray, mask: np.ndarray | None = None, past: list[ort.OrtValue] | None = None, last: int = 0
    ) -> list[ort.OrtValue]:
        """All outputs, in their order, for token ids [B, T] that follow `past` (default: no tokens).

        The logits are those of the `last` n positions, if it is not 0 and the file allows it.
        """
        past = past or self.empty_past(len(ids))
        before = past[0].shape()[2]
        if mask is None:
            mask = np.ones((len(ids), before + ids.shape[1]), np.int64)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._feeds(ids, mask).items()}
        feeds = values | dict(zip(self._past, past, strict=True))
        count = ids.shape[1]
        if last and self._keep_last is not None:
            count = min(last, count)
            feeds[contract.KEEP] = ort.OrtValue.ortvalue_from_numpy(np.array(count, np.int64))
        with _refusals(self._model, "run"):
            outputs: list[ort.OrtValue] = self.session.run_with_ort_values(self._outputs, feeds)
        self._check_lengths(dict(zip(self._outputs, outputs, strict=True)), count, mask.shape[1])
        return outputs

    def _check_lengths(self, outputs: dict[str, ort.OrtValue], count: int, total: int) -> None:
        """Raise UserError unless `outputs` hold logits of `count` tokens, and keys and values of `total` ones.

        Other files have outputs of these names too: with the last token's logits alone, or without the past.
        """
        wanted = {contract.LOGITS: (1, count), self._present[0]: (2, total)}
        for name, (axis, length) in wanted.items():
            if name in outputs and (shape := outputs[name].shape())[axis] != length:
                raise UserError(
                    f"{self._model}: {name} is {shape} for {count} new tokens of {total}, where the contract in "
                    f"docs/artifact.md has {length} in place of {shape[axis]}; export the model again"
                )

    def empty_past(self, batch: int) -> list[ort.OrtValue]:
        """The past of a sequence without tokens: L × (key, value), each [B, H, 0, d]."""
        empty = np.zeros((batch, self.heads, 0, self.head_dim), np.float32)
        return [ort.OrtValue.ortvalue_from_numpy(empty) for _ in self._past]

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `step`: `batch` sequences of at most `capacity` tokens each."""
        if not self.in_place:
            return Cache(self.empty_past(batch), capacity, batch)
        # One block, which the kernel can back with large pages. It is written to now, so that no step has to wait for
        # the kernel to provide its memory.
        block = np.empty((len(self._past), batch, self.heads, capacity, self.head_dim), np.float32)
        block.fill(0)
        cache = Cache([ort.OrtValue.ortvalue_from_numpy(part) for part in block], capacity, batch)
        cache.binding = self._binding()
        for past, present, value in zip(self._past, self._present, cache.past, strict=True):
            cache.binding.bind_ortvalue_input(past, value)
            cache.binding.bind_ortvalue_output(present, value)
        return cache

    def step(self, cache: Cache, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Add token ids [B, T] to `cache`; returns the logits float32 [B, V] of the last position.

        `mask` [B, T] is 0 on padding. This does what generation needs and no more: where the file allows it, no other
        position's logits are computed, and with a cache in place no allocation grows with the number of tokens.
        Raises ValueError if the cache is full.
        """
        batch, count = ids.shape
        if cache.length + count > cache.capacity:
            raise ValueError(f"{cache.length} + {count} tokens in a cache of {cache.capacity}")
        if mask is not None:
            cache.mask[:, cache.length : cache.length + count] = mask
        # GroupQueryAttention accepts several tokens after a past only for a batch of one.
        together = count if batch > 1 and cache.length == 0 else 1 if batch > 1 and self.in_place else self._chunk
        together = together or count
        *before, last = (ids[:, start : start + together] for start in range(0, count, together))
        for piece in before:  # of which the cache is all that anybody reads
            keep_none = self._keep_last and ort.OrtValue.ortvalue_from_numpy(np.array(-piece.shape[1], np.int64))
            self._step(cache, piece, keep_none)
        return self._step(cache, last, self._keep_last)[:, -1]

    def _step(self, cache: Cache, ids: np.ndarray, keep: ort.OrtValue | None) -> np.ndarray:
        """Add token ids [B, T] to `cache`; logits [B, n, V] of the last n positions, as `keep` says (None: all T)."""
        cache.length += ids.shape[1]
        binding = cache.binding or self._binding()
        if keep is not None:
            binding.bind_ortvalue_input(contract.KEEP, keep)
        for name, array in self._feeds(ids, cache.mask[:, : cache.length]).items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(contract.LOGITS)  # at every step, as their shape changes with T
        if cache.binding is None:
            for past, present, value in zip(self._past, self._present, cache.past, strict=True):
                binding.bind_ortvalue_input(past, value)
                binding.bind_output(present)
        with _refusals(self._model, "run"):
            self.session.run_with_iobinding(binding)
        logits, *grown = binding.get_outputs()
        if cache.binding is None:
            self._check_lengths({self._present[0]: grown[0]}, ids.shape[1], cache.length)
            cache.past = grown
        computed: np.ndarray = logits.numpy()
        return computed

    def _binding(self) -> ort.IOBinding:
        binding = self.session.io_binding()
        binding.bind_output(contract.LOGITS)  # bound first, so that get_outputs() returns it first
        return binding

    def _feeds(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        feeds = contract.token_feeds(ids, mask)
        if not self._takes_positions:
            del feeds[contract.POSITION_IDS]
        return feeds


def _unlike(item: ort.NodeArg, type_: str, shape: str, rank: int) -> str | None:
    """Say how an input or output differs from the contract's type and shape; None if it does not.

    The heads and the width of the cache (`rank` 4) have to be numbers. A file may leave out a shape as a whole.
    """
    numbers = rank == 4 and [*map(type, item.shape[1::2])] != [int, int]
    if item.type == f"tensor({type_})" and len(item.shape) in ({rank} if rank == 4 else {0, rank}) and not numbers:
        return None
    return (
        f"{item.name} is {item.type} {item.shape} where the contract in docs/artifact.md has "
        f"tensor({type_}) {shape}; export the model again, in fp32 and with a cache"
    )


def open_session(
    model: Path,
    threads: int | None = None,
    spin: bool = False,
    prepack: bool = True,
    artifact: str | None = None,
    exact: bool = True,
) -> ort.InferenceSession:
    """A CPU session over any ONNX file, on `threads` threads (default: all processors).

    With `spin`, threads keep running for a while after a step, so that the next one starts sooner; this slows down
    every other process, so it is for a process that has the machine to itself. Without `prepack`, ONNX Runtime makes no
    second copy of the weights in the layout that its kernels want, which saves memory and is slower. With `artifact`,
    the digest of the artifact that the file belongs to, the packed weights are kept in the user's cache, so that the
    next session opens sooner (cuantiza/core/run/packed.py). With `exact`, integer matmuls are exact on every processor
    (cuantiza/core/run/exact_int8.py). Files that a recipe of ours wrote a moment ago need no `exact`. On processors without
    VNNI, ONNX Runtime cannot load a file with it whose layers share a matrix. Raises UserError if ONNX Runtime refuses the
    file.
    """
    entries = {
        "session.force_spinning_stop": "0" if spin else "1",
        "session.disable_prepacking": "0" if prepack else "1",
        **(exact_options(model) if exact else {}),
    }

    def options() -> ort.SessionOptions:
        made = ort.SessionOptions()
        made.intra_op_num_threads = threads or default_threads()
        made.inter_op_num_threads = 1
        made.log_severity_level = 4  # an error is raised, and needs no coloured lines of ONNX Runtime's own
        for name, value in entries.items():
            made.add_session_config_entry(name, value)
        return made

    if artifact is not None and prepack and (session := open_packed(model, artifact, entries, options)):
        return session
    with _refusals(model, "load"):
        return ort.InferenceSession(str(model), options(), providers=["CPUExecutionProvider"])


@contextmanager
def _refusals(model: Path, verb: str) -> Iterator[None]:
    """Raise a UserError that ONNX Runtime cannot `verb` the file `model`, in place of what ONNX Runtime raises."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(
            f"{model}: ONNX Runtime {ort.__version__} cannot {verb} it ({[*str(error).splitlines(), ''][0]})"
        ) from None
