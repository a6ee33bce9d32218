"""Windows, scores and statistics: properties with an exact answer."""

import math

import numpy as np
import pytest

from cuantiza.core.run.divergence import compare
from cuantiza.eval.measure.estimates import (
    TextSize,
    llama_cpp_perplexity,
    mean_per_token,
    perplexity,
    quality,
    text_size,
)
from cuantiza.eval.measure.score import Scores, score
from cuantiza.eval.measure.tokens.windows import halves, rolling


class Here:
    """A model in this process, behind the interface of one in another."""

    def __init__(self, logits):
        self._logits = logits

    def start(self, method, ids, last):
        assert method == "logits"
        self._ids, self._last = ids, last

    def result(self):
        return self._logits(self._ids)[-self._last :]


def test_one_model_computes_at_a_time():
    running = []

    class Model(Here):
        def start(self, method, ids, last):
            assert not running
            running.append(self)
            super().start(method, ids, last)

        def result(self):
            assert running.pop() is self
            return super().result()

    models = [Model(lambda ids: np.zeros((len(ids), 8), np.float32)) for _ in range(3)]
    assert [len(scores.nll) for scores in score(rolling([[1, 2, 3], [4, 5]], 0, 2), models)] == [5, 5, 5]


@pytest.mark.parametrize("longest", [2, 3, 8, 100])
def test_rolling_scores_every_token_once_in_order(longest):
    documents = [list(range(100 * n, 100 * n + length)) for n, length in enumerate((1, 2, 7, 8, 9, 40))]
    windows = list(rolling(documents, start=-1, longest=longest))
    for number, tokens in enumerate(documents):
        mine = [window for window in windows if window.document == number]
        assert np.concatenate([window.targets for window in mine]).tolist() == tokens
        for window in mine:
            assert len(window.inputs) <= longest and len(window.targets) <= len(window.inputs)
            line = [-1, *tokens]
            end = line.index(window.targets[-1])
            # A target's context is what stands before it, as long as the window allows.
            assert window.inputs.tolist() == line[max(0, end - longest) : end]


def test_rolling_extends_the_last_window_to_the_left():
    first, last = rolling([[10, 11, 12, 13, 14, 15]], start=1, longest=4)
    assert (first.inputs.tolist(), first.targets.tolist()) == ([1, 10, 11, 12], [10, 11, 12, 13])
    assert (last.inputs.tolist(), last.targets.tolist()) == ([11, 12, 13, 14], [14, 15])


def test_halves_score_what_llama_cpp_scores():
    windows = list(halves(np.arange(1100), 512))
    assert len(windows) == 2
    for number, window in enumerate(windows):
        assert window.targets.tolist() == list(range(512 * number + 257, 512 * number + 512))  # 512 − 1 − 256 tokens
        assert window.inputs.tolist() == list(range(512 * number, 512 * number + 511))


@pytest.mark.parametrize("length, targets", [(1, []), (2, []), (3, [2, 5, 8]), (4, [3, 7])])
def test_halves_of_tiny_windows(length: int, targets: list[int]) -> None:
    found = list(halves(np.arange(10), length))
    assert [token for window in found for token in window.targets] == targets
    assert all(len(window.targets) for window in found)


def test_uniform_logits_give_perplexity_v():
    vocabulary = 1234
    model = Here(lambda ids: np.full((len(ids), vocabulary), 3.7, np.float32))
    (scores,) = score(rolling([[1, 2, 3], [4, 5]], 0, 8), [model])
    assert perplexity(scores).value == pytest.approx(vocabulary, rel=1e-6)
    assert perplexity(scores).stderr == pytest.approx(0, abs=1e-3)


def test_nll_is_the_cross_entropy_of_pytorch():
    import torch

    logits = np.random.default_rng(0).standard_normal((150, 999)).astype(np.float32) * 20
    targets = np.arange(150) * 6
    theirs = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(targets), reduction="none"
    ).numpy()
    assert np.allclose(compare(logits, [], targets)[0][0], theirs, rtol=1e-5, atol=1e-5)


def test_kl_of_two_known_distributions():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    logits = [np.log(x, dtype=np.float64).astype(np.float32)[None] for x in (p, q)]
    (base,), (other, kl, same) = compare(logits[0], logits[1:], np.array([2]))
    assert kl[0] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-6)
    assert (base[0], other[0], same[0]) == (pytest.approx(math.log(4)), pytest.approx(math.log(2)), False)


def test_a_model_against_itself_differs_by_nothing():
    model = lambda ids: np.random.default_rng(int(ids.sum())).standard_normal((len(ids), 50)).astype(np.float32)  # noqa: E731
    base, same = score(rolling([[1, 2, 3], [4, 5, 6, 7]], 0, 3), [Here(model), Here(model)])
    row = quality(same, TextSize(30, 7), base)
    assert row["delta_ln_ppl"] == row["delta_ln_ppl_stderr"] == row["kl_divergence"] == row["kl_divergence_p99"] == 0
    assert row["top1_agreement"] == 1 and row["perplexity"] == perplexity(base).value


def test_standard_error_over_documents():
    # Documents of one length: the ratio estimator is the mean of means, and its error std / sqrt(D).
    means = np.array([1.0, 2.0, 4.0, 5.0])
    estimate = mean_per_token(np.repeat(means, 10), np.repeat(np.arange(4), 10))
    assert estimate.value == pytest.approx(3.0) and estimate.stderr == pytest.approx(means.std(ddof=1) / 2)
    assert mean_per_token(np.array([1.0, 2.0]), np.zeros(2, int)).stderr is None


def test_standard_error_is_the_bootstraps_where_lengths_differ():
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 60, 200)
    values = np.concatenate(
        [
            generator.normal(level, 1, length)
            for level, length in zip(generator.normal(4, 0.5, 200), lengths, strict=True)
        ]
    )
    document = np.repeat(np.arange(200), lengths)
    sums = np.bincount(document, weights=values)
    draws = generator.integers(0, 200, (4000, 200))
    bootstrap = (sums[draws].sum(axis=1) / lengths[draws].sum(axis=1)).std()
    assert mean_per_token(values, document).stderr == pytest.approx(bootstrap, rel=0.1)


def test_llama_cpps_uncertainty_has_tokens_as_its_units():
    """Against the sums that llama.cpp's perplexity tool keeps: Σx and Σx² of the negative log-likelihoods."""
    nll = np.random.default_rng(3).gamma(2.0, 2.0, 1785)
    total, squares, count = 0.0, 0.0, len(nll)
    for value in nll:
        total, squares = total + value, squares + value * value
    mean = total / count
    printed = math.exp(mean) * math.sqrt((squares / count - mean * mean) / (count - 1))
    found = llama_cpp_perplexity(Scores(np.arange(count) // 255, nll, np.ones(count, bool)))
    assert found.value == pytest.approx(math.exp(mean), rel=1e-12) and found.stderr == pytest.approx(printed, rel=1e-9)
    # In which window a token stands makes no difference, other than for an error over documents.
    assert llama_cpp_perplexity(Scores(np.zeros(count, int), nll, np.ones(count, bool))) == found


@pytest.mark.parametrize("nll", [[1.0], [1.0, math.inf], [900.0, 901.0]])
def test_llama_cpps_uncertainty_is_left_out_where_there_is_none(nll):
    assert llama_cpp_perplexity(Scores(np.zeros(len(nll), int), np.array(nll), np.ones(len(nll), bool))).stderr is None


def test_a_perplexity_beyond_floats_is_infinite():
    """A document of Chinese has hardly any white space, so it is one word."""
    scores = Scores(np.zeros(300, int), np.full(300, 3.0), np.zeros(300, bool))
    row = quality(scores, TextSize(900, 1), None)
    assert row["word_perplexity"] == math.inf and row["perplexity"] == pytest.approx(math.e**3)


def test_bits_per_byte_and_word_perplexity_follow_from_the_sum():
    size = text_size(("¡Qué año!", "dos palabras"))
    assert size == TextSize(bytes=len("¡Qué año!dos palabras".encode()), words=4)
    (scores,) = score(rolling([[1, 2], [3]], 0, 8), [Here(lambda ids: np.zeros((len(ids), 16), np.float32))])
    row = quality(scores, size, None)
    assert row["bits_per_byte"] == pytest.approx(3 * 4 / size.bytes)
    assert row["word_perplexity"] == pytest.approx(16 ** (3 / 4)) and row["byte_perplexity"] == pytest.approx(
        2 ** row["bits_per_byte"]
    )
