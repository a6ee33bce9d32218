"""An artifact, loaded: logits of tokens, and text that continues a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.defaults import PROMPT
from cuantiza.core.inputs.model_config import end_tokens, max_positions, read_config, start_token
from cuantiza.core.inputs.tokenizer import load_tokenizer, markers, token_ids
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.run.sampling import Sampling, generate, text_of
from cuantiza.core.store.artifact import Artifact, open_artifact, verify
from cuantiza.core.store.digests import sha256_known

if TYPE_CHECKING:  # templates take a while to load, and only a chat needs them
    from cuantiza.core.run.chat import Chat


def load(artifact: str | Path | Artifact, threads: int | None = None) -> Model:
    """Open an artifact's folder, verify its files and load it on `threads` threads (all processors where not given).

    A large file is not read again while nothing shows that it has changed since an earlier run read it, and what ONNX
    Runtime prepares is kept in the user's cache (docs/performance/cold-start.md).

    Raises UserError where the artifact is not whole, or another one has taken its place since it was opened, or ONNX
    Runtime refuses its graph.
    """
    if isinstance(artifact, Artifact):
        verify(artifact, sha256_known)
    else:
        artifact = open_artifact(Path(artifact), sha256_known)
    return Model(artifact, threads)


class Model:
    """A loaded artifact.

    `artifact` is its folder and manifest, `tokenizer` a `tokenizers.Tokenizer`, `positions` the longest sequence in
    tokens, `start` the id of the token that begins every text, and `end` the ids that end one.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        self.artifact = artifact
        self.tokenizer = load_tokenizer(artifact.path)
        self.positions = max_positions(read_config(artifact.path))
        self.start, self.end = start_token(artifact.path), end_tokens(artifact.path)
        # This session is alone with the processors, so its threads may spin between two tokens.
        self.runtime = Runtime(artifact.model, threads, spin=True, artifact=artifact.digest)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` after the start token, as the model was trained to read a text.

        A text that begins with the start token's own text, as people copy it from a training file, has it once.
        """
        for mark in markers(self.tokenizer, [self.start]):
            while text.startswith(mark):
                text = text.removeprefix(mark)
        return [self.start, *token_ids(self.tokenizer, text)]

    def logits(self, ids: Any) -> np.ndarray:
        """Logits float32 [B, T, V] of token ids [B, T], or [T, V] of ids [T]."""
        array = np.asarray(ids, np.int64)
        logits = self.runtime.forward(np.atleast_2d(array))
        return logits if array.ndim == 2 else logits[0]

    def room(self, ids: list[int]) -> int:
        """How many tokens the model can add to `ids`. Raises UserError where they fill its positions."""
        if (room := self.positions - len(ids)) < 1:
            raise UserError(
                f"--prompt: has {len(ids)} tokens where {self.artifact.path} takes {self.positions - 1}; shorten it"
            )
        return room

    def chat(self, message: str) -> Chat:
        """The conversation in which the user says `message`, by the model's chat template.

        Its `ids` end where the model answers, and its `end` are tokens that end the answer. Raises UserError if the
        model has no chat template, or if it fails.
        """
        from cuantiza.core.run.chat import chat

        found = chat(self.artifact.path, self.tokenizer, message)
        return replace(found, end=found.end | self.end)

    def tokens(
        self, ids: list[int], count: int, sampling: Sampling, seed: int = 0, asked: Chat | None = None
    ) -> Iterator[int]:
        """Up to `count` token ids that follow `ids`, through the KV cache.

        They end before a token that ends a text; where they answer what was `asked`, before one that ends an answer. An
        answer may repeat what was asked, and the words of the template: `no_repeat_ngram` is about the answer alone.
        """
        stop, count = self.end if asked is None else asked.end, min(count, self.room(ids))
        yield from generate(self.runtime, ids, count, sampling, seed, stop, repeat_prompt=asked is not None)

    def text(self, tokens: Iterable[int], before: list[int]) -> Iterator[str]:
        """The text of `tokens` as they come after the ids `before`, in pieces of whole characters."""
        return text_of(self.tokenizer, tokens, before)

    def generate(
        self,
        prompt: str = PROMPT,
        tokens: int = 100,
        *,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 0.95,
        no_repeat_ngram: int = 3,
        seed: int = 0,
    ) -> str:
        """The text that follows `prompt`: at most `tokens` tokens, drawn as `Sampling` says; the same seed, the same text.

        A temperature of 0 takes the likeliest token each time. Raises UserError where a value is out of range.
        """
        ids = self.encode(prompt)
        sampling = Sampling(temperature, top_k, top_p, no_repeat_ngram)
        return "".join(self.text(self.tokens(ids, tokens, sampling, seed), ids))
