"""The protocols of papers: properties with an exact answer, and the figures of transformers' and GPTQ's own loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.inputs.corpus import Split
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import Artifact
from cuantiza.eval.measure.estimates import llama_cpp_perplexity, perplexity
from cuantiza.eval.measure.quality import Task, make_task
from cuantiza.eval.measure.score import score
from cuantiza.eval.measure.tokens.protocols import LONGEST, PAPERS, measure_protocol
from cuantiza.eval.measure.tokens.windows import Window, full, halves, rolling, strided
from cuantiza.eval.report.schema import PAPER_NAMES
from cuantiza.eval.stage import evaluate

from helpers import CORPUS, ES_MINI, assert_user_error, stage

LENGTHS = [(1, 4, 2), (3, 4, 2), (4, 4, 2), (5, 4, 2), (8, 4, 2), (11, 4, 1), (40, 7, 3), (41, 8, 8), (40, 8, 8)]


class Here:
    """A model in this process, behind the interface of one in another."""

    def __init__(self, logits: Callable[[np.ndarray], np.ndarray]) -> None:
        self._logits = logits

    def start(self, method: str, ids: np.ndarray, last: int) -> None:
        assert method == "logits"
        self._ids, self._last = ids, last

    def result(self) -> np.ndarray:
        return self._logits(self._ids)[-self._last :]


def targets(windows: list[Window]) -> list[int]:
    return [int(token) for window in windows for token in window.targets]


@pytest.mark.parametrize(("count", "length", "stride"), LENGTHS)
def test_overlapping_windows_score_every_token_but_the_first_once(count: int, length: int, stride: int) -> None:
    windows = list(strided(np.arange(count), length, stride))
    unseen = set(range(0, count, stride)) if stride == length else {0}
    assert targets(windows) == [token for token in range(count) if token not in unseen]
    for window in windows:
        # A target's context is all that stands before it in its window, and at least what the windows share.
        end = int(window.targets[-1])
        assert window.inputs.tolist() == list(range(int(window.inputs[0]), end)) and len(window.inputs) < length
        assert int(window.targets[0]) - int(window.inputs[0]) >= (length - stride if window.document else 1)


@pytest.mark.parametrize(("count", "length"), [(3, 4), (4, 4), (9, 4), (40, 8), (41, 8)])
def test_a_stride_of_the_whole_window_gives_disjoint_windows(count: int, length: int) -> None:
    """They are GPTQ's, and what is left at the end, which GPTQ leaves out."""
    stream = np.arange(count)
    rest = count % length
    touching, disjoint = list(strided(stream, length, length)), list(full(stream, length))
    assert len(disjoint) == count // length and len(touching) == len(disjoint) + (rest > 1)
    for number, (one, other) in enumerate(zip(touching, disjoint, strict=False)):
        assert one.inputs.tolist() == other.inputs.tolist() == list(range(number * length, (number + 1) * length - 1))
        assert one.targets.tolist() == other.targets.tolist() == (one.inputs + 1).tolist()


def test_equal_logits_give_the_size_of_the_vocabulary_by_every_protocol() -> None:
    size = 97
    stream = np.random.default_rng(0).integers(size, size=500)
    flat = Here(lambda ids: np.full((len(ids), size), 0.25, np.float32))
    for windows in (
        rolling([stream[:200].tolist(), stream[200:].tolist()], 0, 32),
        strided(stream, 32, 16),
        full(stream, 32),
    ):
        assert perplexity(score(windows, [flat])[0]).value == pytest.approx(size, rel=1e-6)
    assert llama_cpp_perplexity(score(halves(stream, 32), [flat])[0]).value == pytest.approx(size, rel=1e-6)
    for name in PAPER_NAMES:
        fields, _ = measure_protocol(name, stream, 32, flat, "flat", None)
        assert fields["perplexity"] == pytest.approx(size, rel=1e-6) and fields["delta_ln_ppl"] == 0
        assert (fields["window_tokens"], fields["stride_tokens"]) == (32, 16 if name == "transformers" else 32)


def test_the_difference_to_the_baseline_is_paired() -> None:
    """A model with twice the baseline's logits: ln of the ratio of the perplexities, and no error where all is equal."""
    size = 50
    table = np.random.default_rng(1).normal(size=(size, size)).astype(np.float32)
    stream = np.random.default_rng(2).integers(size, size=400)
    base, sharp = Here(lambda ids: table[ids]), Here(lambda ids: 2 * table[ids])
    for name in PAPER_NAMES:
        first, scores = measure_protocol(name, stream, 40, base, "base", None)
        other, _ = measure_protocol(name, stream, 40, sharp, "sharp", scores)
        same, _ = measure_protocol(name, stream, 40, base, "same", scores)
        assert other["delta_ln_ppl"] == pytest.approx(math.log(other["perplexity"] / first["perplexity"]))
        assert other["delta_ln_ppl_stderr"] > 0 and same["delta_ln_ppl"] == same["delta_ln_ppl_stderr"] == 0


def test_windows_are_the_models_length_up_to_2048_tokens() -> None:
    assert set(PAPERS) == set(PAPER_NAMES)
    flat = Here(lambda ids: np.zeros((len(ids), 4), np.float32))
    for positions, length in ((16, 16), (131072, LONGEST)):
        fields, _ = measure_protocol("gptq", np.zeros(2 * LONGEST + 1, np.int64), positions, flat, "flat", None)
        assert fields["window_tokens"] == length and fields["windows"] == 2 * LONGEST // length
    assert measure_protocol("gptq", np.zeros(15, np.int64), 16, flat, "flat", None) is None


@pytest.fixture(scope="module")
def task() -> Task:
    """Text of 2,600 tokens, joined: five windows that overlap, and two that are full."""
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(CORPUS.glob("*.txt"))[:8])
    return make_task(ES_MINI, Split("test", (text,)), 2600, 512, PAPER_NAMES)


def test_figures_are_those_of_the_loops_of_transformers_and_gptq(task: Task, es_mini_fp32: Artifact) -> None:
    """Each loss is the model's own, `labels=` given, as the documentation and GPTQ's code compute it."""
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(ES_MINI, dtype=torch.float32).eval()
    ids = torch.from_numpy(task.stream)[None]
    length, stride, total = 1024, 512, ids.shape[1]
    sums, counts, before = 0.0, 0, 0
    with torch.no_grad():
        for begin in range(0, total, stride):
            end = min(begin + length, total)
            labels = ids[:, begin:end].clone()
            labels[:, : -(end - before)] = -100
            scored = int((labels[:, 1:] != -100).sum())
            sums += float(model(ids[:, begin:end], labels=labels).loss) * scored
            counts, before = counts + scored, end
            if end == total:
                break
        whole = [ids[:, n * length : (n + 1) * length] for n in range(total // length)]
        losses = [float(model(window, labels=window).loss) for window in whole]
    wanted = {"transformers": math.exp(sums / counts), "gptq": math.exp(sum(losses) / len(losses))}
    runtime = Runtime(es_mini_fp32.model)
    engine = Here(lambda window: runtime.forward(window[None])[0])
    for name in task.papers:
        fields, _ = measure_protocol(name, task.stream, task.longest, engine, "fp32", None)
        assert fields["perplexity"] == pytest.approx(wanted[name], rel=1e-5)
        assert fields["tokens_scored"] == (counts if name == "transformers" else 2 * 1023)


def test_the_report_has_them_where_they_are_asked_for(es_mini_fp32: Artifact, tmp_path: Path) -> None:
    """Another protocol measures again, a report says what is missing, and an unknown name is refused."""
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"Una línea, la número {n}.\n"}) + "\n" for n in range(40)), encoding="utf-8"
    )
    command = ["eval", "--artifacts", es_mini_fp32.path.parent.parent, "--recipes", "fp32", "--without-torch"]
    command += ["--rounds", 1, "--tokens", 400, "--corpus", tmp_path / "text.jsonl", "--corpus-join"]
    command += ["--output", tmp_path]
    result = stage(*command, "--protocols", "transformers", "gptq")
    assert result.status == 0, result.stderr
    assert "40 texts are joined to one of" in result.stderr
    report = json.loads((tmp_path / "es-mini/report.json").read_text(encoding="utf-8"))
    (found,) = report["artifacts"][0]["protocols"]
    (tokens,) = report["corpus"]["document_tokens"]
    assert found["name"] == "transformers" and found["windows"] == 1 and found["tokens_scored"] == tokens - 1 < 1023
    assert report["corpus"]["joined"] and report["inputs"]["protocols"] == ["transformers", "gptq"]
    page = (tmp_path / "es-mini/report.md").read_text(encoding="utf-8")
    assert "joined to one text" in page and "perplexity, transformers' windows" in page
    assert "The protocol `gptq` scores nothing here" in page
    assert_user_error(stage(*command, "--protocols", "wikitext"), "--protocols", "wikitext", "transformers")


def test_python_refuses_an_unknown_protocol(es_mini_fp32: Artifact) -> None:
    with pytest.raises(Exception, match="--protocols alpaca: is none; choose from transformers, gptq"):
        evaluate([es_mini_fp32], protocols=["alpaca"])  # type: ignore[list-item]
