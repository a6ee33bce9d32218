"""Quality of every subject against the baseline: both protocols, and the seed prompt continued."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from core.corpus import Split
from core.errors import UserError
from core.process import Remote
from core.progress import track
from core.runtime import Runtime
from core.tokenizer import encode, load_tokenizer, max_positions, start_token
from eval.engines import Engine, Subject
from eval.score import Logits, Scores, score, score_pair
from eval.statistics import TextSize, perplexity, quality, text_size
from eval.windows import Window, halves, rolling

PROMPT = "Me gusta mucho el futbol"
CONTINUATION_TOKENS = 32


@dataclass(frozen=True)
class Task:
    """The test text as tokens: what every subject is scored on, in windows of at most `window` tokens."""

    tokenizer: Tokenizer
    documents: list[list[int]]
    size: TextSize
    start: int
    longest: int
    window: int
    stream: np.ndarray

    @property
    def rolling(self) -> list[Window]:
        return list(rolling(self.documents, self.start, self.window))

    @property
    def halves(self) -> list[Window]:
        return list(halves(self.stream, self.window))

    def real_tokens(self, count: int) -> np.ndarray:
        """`count` tokens of the text, repeated where it is shorter."""
        return np.resize(self.stream, count)


def make_task(folder: Path, test: Split, tokens: int, window: int) -> Task:
    """Tokenize whole documents of `test`, until `tokens` tokens are reached, by the tokenizer of `folder`.

    Raises UserError where less than 2 tokens come of it.
    """
    tokenizer, documents, taken = load_tokenizer(folder), [], []
    for text, ids in zip(test.documents, encode(tokenizer, test.documents), strict=True):
        if ids:
            documents.append(ids)
            taken.append(text)
        if sum(map(len, documents)) >= tokens:
            break
    if sum(map(len, documents)) < 2:
        raise UserError("CORPUS=: its test split has less than 2 tokens; give more text")
    longest = max_positions(folder)
    stream = np.asarray(tokenizer.encode("\n\n".join(taken), add_special_tokens=False).ids, np.int64)
    return Task(tokenizer, documents, text_size(tuple(taken)), start_token(folder), longest, min(window, longest), stream)


def measure_quality(subjects: list[Subject], task: Task, threads: int) -> dict[str, dict]:
    """The quality fields of every subject's row; the first is the baseline, and is scored along with each other one.

    Baseline and subject are in memory two at a time, the subject in a process of its own.
    """
    first, *others = subjects
    baseline = Runtime(first.path, threads)
    reference: Scores | None = None
    rows: dict[str, dict] = {}
    for subject in others:
        with Remote(Engine, subject, threads, label=subject.name) as remote:
            windows = track(task.rolling, f"quality   {subject.name}", len(task.rolling))
            reference, scores = score_pair(windows, baseline.logits, lambda ids, remote=remote: remote.call("logits", ids))
            rows[subject.name] = quality(scores, task.size, reference)
            # What PyTorch gives by another protocol too would cost more time than it tells.
            rows[subject.name] |= _halves(task, lambda ids, remote=remote: remote.call("logits", ids)) if subject.kind == "onnx" else {"llama_cpp": None}
            rows[subject.name] |= {"continuation": _continue(remote, task)} | remote.call("describe")
    if reference is None:
        reference = score(track(task.rolling, f"quality   {first.name}", len(task.rolling)), baseline.logits)
    own = quality(reference, task.size, None) | _halves(task, baseline.logits)
    del baseline
    with Remote(Engine, first, threads, label=first.name) as remote:
        own["continuation"] = _continue(remote, task)
    return {first.name: own} | rows


def _halves(task: Task, logits: Logits) -> dict:
    """Perplexity by llama.cpp's protocol; None where the text is shorter than one window."""
    windows = task.halves
    if not windows:
        return {"llama_cpp": None}
    estimate = perplexity(score(windows, logits))
    return {"llama_cpp": {"perplexity": estimate.value, "perplexity_stderr": estimate.stderr, "windows": len(windows),
                          "window_tokens": len(windows[0].inputs) + 1, "tokens_scored": sum(len(window.targets) for window in windows)}}


def _continue(remote: Remote, task: Task) -> str:
    ids = [task.start, *task.tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    room = task.longest - len(ids)
    return task.tokenizer.decode(remote.call("continue_greedy", ids, max(0, min(CONTINUATION_TOKENS, room))))
