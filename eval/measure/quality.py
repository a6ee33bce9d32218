"""Measure the quality of every subject against the baseline: perplexity by several protocols, and a continued prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split
from cuantiza.core.inputs.model_config import end_tokens, max_positions, read_config, start_token
from cuantiza.core.inputs.tokenizer import load_tokenizer, markers, parts, say_other_markers, take, token_ids
from cuantiza.core.machine.hardware import memory_bytes
from cuantiza.core.machine.process import ChildError, Remote
from cuantiza.core.machine.progress import track
from cuantiza.core.store.digests import digest
from cuantiza.eval.measure.answers.flips import compared
from cuantiza.eval.measure.answers.words import questions
from cuantiza.eval.measure.engines import Engine, Subject
from cuantiza.eval.measure.estimates import TextSize, llama_cpp_perplexity, quality, text_size
from cuantiza.eval.measure.score import Scores, score
from cuantiza.eval.measure.size import loaded_bytes
from cuantiza.eval.measure.tokens.protocols import measure_protocol
from cuantiza.eval.measure.tokens.windows import Window, halves, rolling
from cuantiza.eval.report.schema import PaperName

PROMPT = "Me gusta mucho el futbol"
CONTINUATION_TOKENS = 32
KEY_TOKENS = 128  # how many tokens of the text are used for the error of the keys by layer


@dataclass(frozen=True)
class Task:
    """The test text as tokens. Every subject is scored on it, in windows of at most `window` tokens.

    `in_split` counts the documents of the whole split, of which `documents` are the first. `words` int64 [W, 2] are the
    last words of sentences that models are asked for: (first, end) among the tokens of all documents. `papers` are names
    of PAPERS (eval/measure/tokens/protocols.py): by these protocols it is scored as well.
    """

    tokenizer: Tokenizer
    documents: list[list[int]]
    size: TextSize
    start: int
    longest: int
    window: int
    stream: np.ndarray
    in_split: int
    words: np.ndarray
    papers: tuple[PaperName, ...] = ()

    @property
    def rolling(self) -> list[Window]:
        return list(rolling(self.documents, self.start, self.window))

    @property
    def halves(self) -> list[Window]:
        return list(halves(self.stream, self.window))

    def real_tokens(self, count: int) -> np.ndarray:
        """Return the first `count` tokens of the text, which is repeated if it is shorter."""
        return np.resize(self.stream, count)


def make_task(folder: Path, test: Split, tokens: int, window: int, papers: Sequence[PaperName] = ()) -> Task:
    """Tokenize documents of `test` with the tokenizer of `folder`, until there are `tokens` tokens.

    Documents are taken in the order of their sha256, so that a part of a corpus is a fair sample of it, and whole but
    for a long last one (`take` says when it is cut). `papers` name the further protocols that are measured. Raises
    UserError where the documents have fewer than 2 tokens.
    """
    tokenizer, start = load_tokenizer(folder), start_token(folder)
    marked = () if test.joined else markers(tokenizer, {start, *end_tokens(folder)})
    whole = [part for text in sorted(test.documents, key=digest) for part in parts(text, marked)]
    taken = [item for item in take(tokenizer, whole, tokens) if item.ids]
    if not test.joined:
        say_other_markers(tokenizer, taken, test.name, test.sha256)
    documents, texts = [item.ids for item in taken], tuple(item.text for item in taken)
    if sum(map(len, documents)) < 2:
        raise UserError("CORPUS=: its test split has fewer than 2 tokens; give more text")
    longest = max_positions(read_config(folder))
    stream = np.asarray(token_ids(tokenizer, "\n\n".join(texts)), np.int64)
    size, window = text_size(texts), min(window, longest)
    words = questions(taken, list(rolling(documents, start, window)))
    return Task(tokenizer, documents, size, start, longest, window, stream, len(whole), words, tuple(papers))


def measure_quality(
    subjects: list[Subject],
    task: Task,
    threads: int,
    known: dict[str, dict] | None = None,
    keep: Callable[[dict[str, dict]], None] = lambda rows: None,
) -> dict[str, dict]:
    """Return the quality fields of every subject's row. The first subject is the baseline, scored with the others.

    Every subject has a process of its own. Besides the baseline, as many are loaded at once as `_groups` allows. Rows
    that are `known` by the name of their subject are not measured again; `keep` is told all rows whenever there are
    more. Raises ChildError, with the name of the subject, for one that cannot be measured.
    """
    baseline, *others = subjects
    rows = {item.name: known[item.name] for item in subjects if known and item.name in known}
    if len(rows) == len(subjects):
        return rows
    reference: dict[str, Scores] | None = None
    with Remote(Engine, baseline, threads, label=baseline.name) as first:
        for group in _groups([item for item in others if item.name not in rows]):
            with ExitStack() as stack:
                remotes = [stack.enter_context(Remote(Engine, item, threads, label=item.name)) for item in group]
                for item, remote in zip(group, remotes, strict=True):
                    _check(first, remote, baseline.name, item.name, task)
                label = "quality   " + " ".join(item.name for item in [baseline, *group])
                scores = score(track(task.rolling, label, len(task.rolling)), [first, *remotes])
                if not np.isfinite(scores[0].nll).all():
                    raise ChildError(f"{baseline.name}: gives logits that are not numbers", baseline.name)
                if baseline.name not in rows:
                    alone = _alone(baseline, first, task) | {"key_error": _key_error(first, first, task)}
                    rows[baseline.name] = _quality(scores[0], None, task) | alone
                if reference is None:
                    papers, reference = _by_papers(baseline, first, task, {})
                    rows[baseline.name] |= papers
                for item, remote, own in zip(group, remotes, scores[1:], strict=True):
                    rows[item.name] = _quality(own, scores[0], task) | _alone(item, remote, task)
                    rows[item.name] |= _by_papers(item, remote, task, reference)[0]
                    rows[item.name]["key_error"] = _key_error(first, remote, task)
                keep(rows)
    return rows


def _quality(scores: Scores, baseline: Scores | None, task: Task) -> dict:
    return quality(scores, task.size, baseline) | {"last_words": compared(scores, baseline, task.words)}


def _check(baseline: Remote, remote: Remote, first: str, name: str, task: Task) -> None:
    """Raises ChildError, with the name of the one at fault, if logits of `remote` cannot be compared with the baseline's."""
    ids = task.real_tokens(min(KEY_TOKENS, task.window))
    theirs, ours = baseline.call("logits", ids), remote.call("logits", ids)
    if theirs.shape != ours.shape:
        raise ChildError(
            f"{name}: gives logits of {ours.shape[-1]} tokens where the baseline gives {theirs.shape[-1]}; take a model of "
            "the same vocabulary",
            name,
        )
    for label, logits in ((first, theirs), (name, ours)):
        if not np.isfinite(logits).all():
            raise ChildError(f"{label}: gives logits that are not numbers", label)


def _key_error(baseline: Remote, remote: Remote, task: Task) -> list[float] | None:
    """Relative error of the keys of every layer, ‖keys − baseline's keys‖ / ‖baseline's keys‖.

    The keys are computed directly from the input of a layer, and no recipe rescales them (it may rescale the values).
    So they show how the quantization error grows from layer to layer. The result is None if the runtime does not
    expose its keys.
    """
    ids = task.real_tokens(min(KEY_TOKENS, task.window))
    theirs, ours = baseline.call("keys", ids), remote.call("keys", ids)
    if theirs is None or ours is None or [item.shape for item in theirs] != [item.shape for item in ours]:
        return None
    pairs = zip(theirs, ours, strict=True)
    # A layer without keys, as pruning leaves it, has all of them 0, and then the error is absolute.
    return [float(np.linalg.norm(own - base) / (np.linalg.norm(base) or 1.0)) for base, own in pairs]


def _groups(subjects: list[Subject]) -> list[list[Subject]]:
    """Group the subjects that are loaded at once: files of an eighth of the machine's memory, but at least one."""
    groups: list[list[Subject]] = [[]]
    room = memory_bytes() / 8
    for subject in subjects:
        if groups[-1] and sum(map(loaded_bytes, groups[-1])) + loaded_bytes(subject) > room:
            groups.append([])
        groups[-1].append(subject)
    return groups


def _alone(subject: Subject, remote: Remote, task: Task) -> dict:
    """Measure what needs no baseline: llama.cpp's protocol, the continued prompt, and what the runtime describes.

    PyTorch rows skip llama.cpp's protocol, because it is slow and would say nothing new.
    """
    llama_cpp = _halves(subject.name, remote, task) if subject.kind == "onnx" else None
    return {"llama_cpp": llama_cpp, "continuation": _continue(remote, task), **remote.call("describe")}


def _by_papers(
    subject: Subject, remote: Remote, task: Task, reference: dict[str, Scores]
) -> tuple[dict, dict[str, Scores]]:
    """Measure the protocols that the task names, of ONNX rows alone: the field of a row, and the scores by name.

    `reference` has the baseline's scores, and is empty for the baseline itself. Where the text is shorter than a window
    of a protocol, there is nothing of it.
    """
    found: list[dict] = []
    scores: dict[str, Scores] = {}
    for name in task.papers if subject.kind == "onnx" else ():
        measured = measure_protocol(name, task.stream, task.longest, remote, subject.name, reference.get(name))
        if measured is not None:
            fields, scores[name] = measured
            found.append(fields)
    return {"protocols": found}, scores


def _halves(name: str, remote: Remote, task: Task) -> dict | None:
    """Return the perplexity by llama.cpp's protocol; None if the text is shorter than one window."""
    windows = task.halves
    if not windows:
        return None
    estimate = llama_cpp_perplexity(
        score(track(windows, f"quality   {name}, llama.cpp's protocol", len(windows)), [remote])[0]
    )
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
