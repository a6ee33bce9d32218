"""Quality of every subject against the baseline: both protocols, and the seed prompt continued."""

from __future__ import annotations

from contextlib import ExitStack
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
from eval.machine import memory_bytes
from eval.score import Logits, score, score_together
from eval.size import weight_bytes
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
    return Task(
        tokenizer, documents, text_size(tuple(taken)), start_token(folder), longest, min(window, longest), stream
    )


def measure_quality(subjects: list[Subject], task: Task, threads: int) -> dict[str, dict]:
    """The quality fields of every subject's row; the first is the baseline, and is scored along with the others.

    The baseline is in memory here and every other subject in a process of its own, as many at once as
    `_groups` allows. They work on a window at the same time, and its logits are gone before the next.
    """
    first, *others = subjects
    baseline = Runtime(first.path, threads)
    rows: dict[str, dict] = {first.name: {}}
    for group in _groups(others):
        with ExitStack() as stack:
            remotes = [stack.enter_context(Remote(Engine, subject, threads, label=subject.name)) for subject in group]
            windows = track(
                task.rolling, "quality   " + " ".join(subject.name for subject in group or [first]), len(task.rolling)
            )
            scores = score_together(
                windows,
                _while_others_work(remotes, baseline.logits),
                lambda _, remotes=remotes: [r.result() for r in remotes],
                len(group),
            )
            rows[first.name] = quality(scores[0], task.size, None)
            for subject, remote, own in zip(group, remotes, scores[1:], strict=True):
                logits = lambda ids, remote=remote: remote.call("logits", ids)  # noqa: E731
                rows[subject.name] = quality(own, task.size, scores[0]) | {
                    # What PyTorch gives by another protocol too would cost more time than it tells.
                    "llama_cpp": _halves(task, logits) if subject.kind == "onnx" else None,
                    "continuation": _continue(remote, task),
                    **remote.call("describe"),
                }
    rows[first.name] |= {"llama_cpp": _halves(task, baseline.logits)}
    del baseline
    with Remote(Engine, first, threads, label=first.name) as remote:
        rows[first.name]["continuation"] = _continue(remote, task)
    return rows


def _groups(subjects: list[Subject]) -> list[list[Subject]]:
    """Subjects that are loaded at once: as long as their files make up an eighth of the machine's memory, one at least."""
    groups: list[list[Subject]] = [[]]
    room = memory_bytes() / 8
    for subject in subjects:
        if groups[-1] and sum(map(weight_bytes, groups[-1])) + weight_bytes(subject) > room:
            groups.append([])
        groups[-1].append(subject)
    return groups


def _while_others_work(remotes: list[Remote], baseline: Logits) -> Logits:
    """The baseline's logits, computed while every remote computes its own."""

    def logits(ids: np.ndarray) -> np.ndarray:
        for remote in remotes:
            remote.start("logits", ids)
        return baseline(ids)

    return logits


def _halves(task: Task, logits: Logits) -> dict | None:
    """Perplexity by llama.cpp's protocol; None where the text is shorter than one window."""
    windows = task.halves
    if not windows:
        return None
    estimate = perplexity(score(windows, logits))
    return {
        "perplexity": estimate.value,
        "perplexity_stderr": estimate.stderr,
        "windows": len(windows),
        "window_tokens": task.window,
        "tokens_scored": sum(len(window.targets) for window in windows),
    }


def _continue(remote: Remote, task: Task) -> str:
    ids = [task.start, *task.tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    room = task.longest - len(ids)
    return task.tokenizer.decode(remote.call("continue_greedy", ids, max(0, min(CONTINUATION_TOKENS, room))))
