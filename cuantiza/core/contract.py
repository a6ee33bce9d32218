"""The interface of an artifact's graph: its inputs, outputs, axes and metadata by name, and how inputs are fed.

Inputs    input_ids [B, T], attention_mask [B, P+T], past_key_values.{l}.key|value [B, H, P, d], and
          position_ids [B, T], unless only distances matter to the model
Outputs   logits [B, T, V], present.{l}.key|value [B, H, P+T, d]
Optional  num_logits_to_keep []: which positions get logits

B batch, T new tokens, P tokens in the cache, H heads of keys and values, d width of a head, V vocabulary. The token
inputs are int64, the rest float32. docs/artifact.md is the page for users. Whatever makes, runs or describes a graph
reads the names here; this module imports nothing but NumPy, so that it also runs in other libraries' environments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

INPUT_IDS, ATTENTION_MASK, POSITION_IDS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
# Symbolic axes. The last is the sum as ONNX's symbolic shape inference writes it, so that both have one name.
BATCH, TOKENS, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {TOKENS}"
# An input with a default of 0, so that loaders that do not know it need not feed it. 0 computes the logits of all
# positions; n > 0 those of the last n, [B, n, V]; n < 0 those of all but the first -n, so that -T only fills the cache.
KEEP = "num_logits_to_keep"
# A key in the file's metadata: a layer's past and present may be one buffer [B, H, capacity, d].
IN_PLACE = "kv_cache_in_place"
# Added to the attention scores of positions that a token may not see: exp() of it is 0, and a row in which nothing
# is visible stays finite.
MASKED = -1e30

_PAST_PREFIX, _PRESENT_PREFIX = "past_key_values.", "present."
_PAST_KEY = re.compile(r"past_key_values\.\d+\.key")
_PARTS = ("key", "value")


def past_name(layer: int | str, part: str) -> str:
    """The input with the cached keys (`part` "key") or values ("value") of a layer."""
    return f"{_PAST_PREFIX}{layer}.{part}"


def present_name(layer: int | str, part: str) -> str:
    """The output with the keys or values of a layer that include the new tokens."""
    return f"{_PRESENT_PREFIX}{layer}.{part}"


def past_names(layers: int) -> list[str]:
    """The cache's inputs in their order: key and value of each layer."""
    return [past_name(layer, part) for layer in range(layers) for part in _PARTS]


def present_names(layers: int) -> list[str]:
    """The cache's outputs, in the order of `past_names`."""
    return [present_name(layer, part) for layer in range(layers) for part in _PARTS]


def is_past(name: str) -> bool:
    """Whether `name` is an input of the cache."""
    return name.startswith(_PAST_PREFIX)


def present_of(past: str) -> str:
    """The output that becomes the input `past` of the next step."""
    return _PRESENT_PREFIX + past.removeprefix(_PAST_PREFIX)


def count_layers(inputs: Iterable[str]) -> int:
    """How many layers the cache has among the names of a graph's inputs."""
    return sum(_PAST_KEY.fullmatch(name) is not None for name in inputs)


def token_feeds(ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The token inputs, int64, for token ids [B, T] and `mask` [B, P+T], which is 0 on padding.

    Padding is on the left or in the past, so a token's position is the number of real tokens before it.
    """
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
    feeds = {INPUT_IDS: ids, ATTENTION_MASK: mask, POSITION_IDS: positions}
    return {name: np.ascontiguousarray(array, np.int64) for name, array in feeds.items()}


def window_feeds(inputs: Iterable[Any], ids: np.ndarray) -> dict[str, np.ndarray]:
    """All feeds for one sequence without a cache: token ids int64 [T], as a batch of one.

    `inputs` are the graph's, each with a name and a shape; inputs that the graph does not have are left out.
    """
    shapes = {item.name: item.shape for item in inputs}
    past = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items() if is_past(name)}
    tokens = token_feeds(ids[None], np.ones((1, len(ids)), np.int64))
    return {name: array for name, array in tokens.items() if name in shapes} | past
