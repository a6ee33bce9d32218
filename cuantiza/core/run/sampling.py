"""Generate text token by token: draw each next token from the logits, and decode tokens to text as they come.

The logits are processed in the order of transformers: no-repeat n-grams, temperature, top-k, top-p (its
LogitsProcessorList).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from cuantiza.core.errors import UserError
from cuantiza.core.run.runtime import Runtime


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Raises UserError if a value is out of range.

    temperature: divides the logits; 0 takes the likeliest token. top_k: draw from this many likeliest tokens (0: all).
    top_p: draw from the likeliest tokens that together have this probability. no_repeat_ngram: never repeat a sequence
    of this many tokens (0: allowed), unless every token would.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        # Below 0.001, the softmax hardly differs from taking the likeliest token.
        if not (self.temperature == 0 or 1e-3 <= self.temperature < math.inf):
            raise UserError(
                f"--temperature {self.temperature}: give 0 (the likeliest token), or a number from 0.001 on"
            )
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: give a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: give a probability above 0, up to 1")
        if self.no_repeat_ngram < 0:
            raise UserError(f"--no-repeat-ngram {self.no_repeat_ngram}: give a number of tokens, or 0")


def scores(logits: np.ndarray, before: list[int], sampling: Sampling) -> np.ndarray:
    """Process logits float32 [V], which follow the token ids `before`, by `sampling`; returns float64 [V].

    A token with −inf is never drawn. A temperature of 0 does not scale, as the likeliest token stays the same.
    Raises UserError if a logit is NaN or infinite above 0.
    """
    left = logits.astype(np.float64)
    if not (left < np.inf).all():
        raise UserError("the model's logits are not numbers; check it by `make eval` or `cuantiza eval`")
    repeating = _repeating(before, sampling.no_repeat_ngram)
    if len(set(repeating)) < len(left):  # a small vocabulary may have no token left that would not repeat
        left[repeating] = -np.inf
    if sampling.temperature:
        left /= sampling.temperature
    if 0 < sampling.top_k < len(left):
        left[left < np.partition(left, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        order = np.argsort(left, kind="stable")  # the least likely first, so that sums round as in transformers
        below = np.cumsum(_softmax(left[order]))
        dropped = below <= 1 - sampling.top_p
        dropped[-1] = False
        left[order[dropped]] = -np.inf
    return left


def draw(logits: np.ndarray, before: list[int], sampling: Sampling, generator: np.random.Generator) -> int:
    """Draw the token id that follows `before`, from logits float32 [V]."""
    left = scores(logits, before, sampling)
    if sampling.temperature == 0 or not np.isfinite(left).any():
        return int(left.argmax())
    # Exactly one random number per token, however many can be chosen, so that a seed gives comparable texts.
    sums = np.cumsum(_softmax(left))
    return int(np.searchsorted(sums, generator.random() * sums[-1], side="right").clip(0, len(sums) - 1))


def generate(
    runtime: Runtime,
    ids: list[int],
    count: int,
    sampling: Sampling,
    seed: int = 0,
    stop: Collection[int] = (),
    repeat_prompt: bool = False,
) -> Iterator[int]:
    """Yield up to `count` token ids that follow `ids`, with a KV cache; ends before a token of `stop`.

    With `repeat_prompt`, `sampling.no_repeat_ngram` allows the sequences of `ids`, and bans those of the new tokens alone.
    """
    generator = np.random.default_rng(seed)
    cache, before = runtime.cache(1, len(ids) + count), [] if repeat_prompt else list(ids)
    step = np.asarray([ids], np.int64)
    for _ in range(count):
        token = draw(runtime.step(cache, step)[0], before, sampling, generator)
        if token in stop:
            return
        yield token
        before.append(token)
        step = np.asarray([[token]], np.int64)


def text_of(tokenizer: Tokenizer, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Yield the text of token ids as they come: a piece whenever a token completes one, never half a character.

    `before` are the token ids before them. They matter, because some decoders drop the space at the start of a text.
    Bytes that are no character become U+FFFD. What was yielded stays, even where a decoder would take it back: one with
    byte fallback decodes a whole run of bytes to U+FFFD as soon as one of them is invalid.
    """
    context, held = list(before), []
    known = tokenizer.decode(context, skip_special_tokens=False)
    for token in ids:
        held.append(token)
        text = tokenizer.decode([*context, *held], skip_special_tokens=False)
        if not text.startswith(known):
            context, known = [], ""
            text = tokenizer.decode(held, skip_special_tokens=False)
        if len(text) > len(known) and not text.endswith("\ufffd"):
            yield text[len(known) :]
            context, held = held, []
            known = tokenizer.decode(context, skip_special_tokens=False)
    if held:  # the last character is incomplete
        text = tokenizer.decode([*context, *held], skip_special_tokens=False)
        yield text[len(known) :] if text.startswith(known) else tokenizer.decode(held, skip_special_tokens=False)


def _repeating(before: list[int], size: int) -> list[int]:
    """The tokens that would complete a sequence of `size` tokens that `before` already contains."""
    if not 0 < size <= len(before):
        return []
    last = before[len(before) - size + 1 :]
    starts = range(len(before) - size + 1)
    return [before[start + size - 1] for start in starts if before[start : start + size - 1] == last]


def _softmax(values: np.ndarray) -> np.ndarray:
    exponentials: np.ndarray = np.exp(values - values.max())
    exponentials /= exponentials.sum()
    return exponentials
