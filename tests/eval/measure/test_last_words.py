"""Last words of sentences: which are found, which tokens spell them, who is right, and what flips."""

from __future__ import annotations

import json
from math import comb

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, Split, load_splits
from cuantiza.core.inputs.tokenizer import load_tokenizer, take
from cuantiza.eval.compare.decide import answers_note
from cuantiza.eval.compare.reports import read_side
from cuantiza.eval.measure.answers import words as words_of
from cuantiza.eval.measure.answers.flips import answered, compared, exact_p, flips, marks
from cuantiza.eval.measure.answers.words import CONTEXT, last_words, questions, spelled
from cuantiza.eval.measure.quality import make_task
from cuantiza.eval.measure.score import Scores, score
from cuantiza.eval.measure.tokens.windows import rolling
from cuantiza.eval.report.columns import cells
from cuantiza.eval.report.schema import Report

from helpers import CORPUS, ES_MINI, report_fields, report_row


@pytest.mark.parametrize(
    "text, words",
    [
        ("Llegó tarde a casa. No había nadie", ["casa"]),
        ("¿Dónde está la llave? ¡Qué sorpresa!", ["llave", "sorpresa"]),
        ("Dijo: «Ven a la cocina». Y fue.", ["cocina"]),
        ("Dijo: «Ven a la cocina.» Luego calló…", ["cocina", "calló"]),
        ("¿Dijo «ven conmigo»? (Lo dijo muchas veces.)\n\n«¿Vienes a casa?».", ["conmigo", "veces", "casa"]),
        ("No lo sé... Quizá mañana... ¿Mañana?!", ["mañana", "Mañana"]),
        ("—No lo sé —contestó Marta—. Era mentira.", ["Marta", "mentira"]),
        ("Era físico-químico. Cuesta 3.50 euros.", ["químico", "euros"]),
        # What is too short, has digits, or goes on: no question.
        ("El Sr. Gil vive en la pág. 3, con 25. En 1984. Un B12a. Un X9abcd. Un a_bcde. No sé. Sí.", []),
        ("Véase www.ejemplo.es/casa.html o fin.De", []),
        # A letter and its accent may be two characters.
        ("Fue una decisio\u0301n. Leyó नमस्ते।", ["decisio\u0301n", "नमस्ते"]),
        ("Pesa aprox. dos kilos.", ["aprox", "kilos"]),  # an abbreviation: noise that every row has alike
        ("", []),
        ("...", []),
    ],
)
def test_words_that_end_sentences(text: str, words: list[str]) -> None:
    assert [text[begin:end] for begin, end in last_words(text)] == words


def test_long_runs_of_marks_take_no_longer() -> None:
    """Quadratic time would be hours here."""
    assert list(last_words("índice" + "." * 10**6 + "7 " + "»" * 10**6 + "x")) == []


@pytest.mark.parametrize("trimmed", [True, False])
def test_tokens_spell_the_word(trimmed: bool) -> None:
    """With es-mini's own tokenizer, whether or not its offsets leave the blank before a word out."""
    fields = json.loads((ES_MINI / "tokenizer.json").read_text(encoding="utf-8"))
    fields["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": trimmed,
        "use_regex": True,
    }
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    text = "La niñita guardó el cuadernillo. Después, «añoranza»… ¿Otorrinolaringólogo?"
    (item,) = take(tokenizer, [text])
    found = [tokenizer.decode(item.ids[first:end]) for first, end in spelled(item)]
    assert [word.strip() for word in found] == ["cuadernillo", "añoranza", "Otorrinolaringólogo"]


def test_a_token_of_more_than_the_word_leaves_it_out() -> None:
    vocabulary = {"<unk>": 0, "la": 1, "▁casa": 2, "▁casa.": 3, "▁": 4, ".": 5, "(mesa": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (item,) = take(tokenizer, ["la casa. (mesa ."])
    assert len(item.ids) == 4 and not list(spelled(item))
    # Characters that the text does not hold by themselves: offsets are those of the text as it was.
    tokenizer.normalizer = normalizers.Replace("casa", "la")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    (item,) = take(tokenizer, ["esta casa."])
    assert [item.ids[first:end] for first, end in spelled(item)] == [[1]]


def test_sentencepieces_leading_blank_belongs_to_the_word() -> None:
    tokenizer = Tokenizer(
        models.BPE({"▁": 0, "c": 1, "a": 2, "▁c": 3, "ca": 4, ".": 5, "s": 6}, [("▁", "c")], unk_token=None)
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    (item,) = take(tokenizer, ["casa. casa."])
    assert [item.ids[first:end] for first, end in spelled(item)] == [[3, 2, 6, 2]] * 2


def test_every_question_has_its_context() -> None:
    """Against each target's window: the word's tokens are targets there, after at least CONTEXT tokens."""
    tokenizer = load_tokenizer(ES_MINI)
    documents = take(tokenizer, load_splits(Source(str(CORPUS)))[1].documents[:6])
    ids = [token for item in documents for token in item.ids]
    for longest in (16, CONTEXT + 1, 100, 512):
        windows = list(rolling([item.ids for item in documents], 0, longest))
        words = questions(documents, windows)
        contexts = [
            len(window.inputs) - len(window.targets) + 1 + number
            for window in windows
            for number in range(len(window.targets))
        ]
        asked = {int(first) for first, end in words}
        assert all(min(contexts[first:end]) >= CONTEXT for first, end in words)
        before, missed = 0, 0
        for item in documents:
            for first, end in spelled(item):
                enough = min(contexts[before + first : before + end]) >= CONTEXT
                assert enough == (before + first in asked)
                missed += not enough
            before += len(item.ids)
        assert missed and (len(words) > 100 if longest == 512 else True) and (longest >= CONTEXT or not len(words))
        assert all(tokenizer.decode(ids[first:end]).strip().isalpha() for first, end in words)


def test_too_many_words_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    test = load_splits(Source(str(CORPUS)))[1]
    whole = make_task(ES_MINI, test, 12288, 512).words
    monkeypatch.setattr(words_of, "MOST", 50)
    some = make_task(ES_MINI, test, 12288, 512).words
    at = [whole[:, 0].tolist().index(first) for first in some[:, 0]]
    assert len(some) == 50 and at[0] == 0 and at[-1] == len(whole) - 1
    assert set(np.diff(at)) <= {len(whole) // 50, len(whole) // 50 + 1}


def test_a_text_without_sentences_has_no_questions() -> None:
    task = make_task(ES_MINI, Split("test", ("uno dos tres " * 100,)), 300, 512)
    scores = Scores(np.zeros(300, int), np.zeros(300), np.ones(300, bool))
    assert task.words.shape == (0, 2) and compared(scores, None, task.words) is None


class Known:
    """A model whose likeliest token after a token is `table`[token], behind the interface of one in another process."""

    def __init__(self, table: np.ndarray) -> None:
        self._table = table

    def start(self, method: str, ids: np.ndarray, last: int) -> None:
        self._ids, self._last = ids, last

    def result(self) -> np.ndarray:
        return np.eye(len(self._table), dtype=np.float32)[self._table[self._ids]][-self._last :]


def test_a_word_is_right_where_all_its_tokens_are() -> None:
    """Documents 0..9 and 10..19; `one` errs after 3 and after 11, `other` after 4 and after 11."""
    table = np.roll(np.arange(21), -1)
    one, other = (np.where(np.isin(np.arange(21), odd), 0, table) for odd in ((3, 11), (4, 11)))
    windows = rolling([list(range(10)), list(range(10, 20))], 20, 100)
    base, own = score(windows, [Known(one), Known(other)])
    # The targets after the tokens 3, 4 and 11 are at 4, 5 and 12; a document's first token is no one's successor but 0.
    assert np.flatnonzero(~base.right).tolist() == [4, 10, 12] and np.flatnonzero(~own.right).tolist() == [5, 10, 12]
    words = np.array([[1, 4], [3, 5], [5, 6], [4, 6], [11, 12], [12, 14]])
    assert answered(base, words).tolist() == [True, False, True, False, True, False]
    assert answered(own, words).tolist() == [True, True, False, False, True, False]
    first, found = compared(base, None, words), compared(own, base, words)
    assert (first["words"], first["accuracy"], first["gained"], first["lost"], first["p"]) == (6, 0.5, 0, 0, 1)
    assert (found["accuracy"], found["gained"], found["lost"], found["p"]) == (0.5, 1, 1, 1)
    assert found["right"] == "110010" and marks(found["right"]).tolist() == answered(own, words).tolist()
    # Documents have 4 and 2 words, of which 2 and 1 are right: no difference between them, so no error.
    assert found["accuracy_stderr"] == pytest.approx(0)
    assert "50.0 % (+1 −1, p 1.000)" in answers_note(answered(base, words), answered(own, words))


def test_uniform_logits_answer_with_the_first_token() -> None:
    """Ties go to the lowest id, as in lm-evaluation-harness: only words of token 0 are right."""
    flat = Known(np.zeros(8, int))
    flat.result = lambda: np.zeros((len(flat._ids), 8), np.float32)  # type: ignore[method-assign]
    base, same = score(rolling([[0, 0, 3, 0, 5, 6]], 7, 100), [flat, flat])
    found = compared(same, base, np.array([[0, 2], [1, 3], [3, 4], [4, 6]]))
    assert found["right"] == "1010" and found["accuracy"] == 0.5 and found["accuracy_stderr"] is None
    assert (found["gained"], found["lost"], found["p"]) == (0, 0, 1)


def test_the_exact_test_is_that_of_all_outcomes() -> None:
    """Against the sum over every way that n flips can fall, and the numbers of a table."""
    for n in range(13):
        ways = [bin(outcome).count("1") for outcome in range(2**n)]
        for gained in range(n + 1):
            uneven = abs(2 * gained - n)
            expected = sum(abs(2 * ups - n) >= uneven for ups in ways) / 2**n
            assert exact_p(gained, n - gained) == expected
    assert exact_p(0, 0) == 1 and exact_p(0, 5) == 2 / 32 and exact_p(1, 9) == 22 / 1024
    assert exact_p(2400, 2600) == 2 * sum(comb(5000, k) for k in range(2401)) / 2**5000
    assert exact_p(0, 5000) == 0.0 and flips(np.array([0, 1, 1], bool), np.array([1, 0, 1], bool)) == (1, 1)


LAST = {"words": 4, "accuracy": 0.5, "accuracy_stderr": 0.1, "gained": 1, "lost": 2, "p": 1.0, "right": "0101"}


def test_the_cells_of_a_report() -> None:
    rows = [report_row("fp32", last_words=LAST), report_row("int8", last_words=LAST), report_row("old")]
    first, own, old = Report.model_validate(report_fields(rows)).artifacts
    for language, share in (("en", "50.0 %"), ("es", "50,0 %")):
        shown = [
            cells(("last_words",), row, first, language)[0].replace("\N{NO-BREAK SPACE}", " ")
            for row in (first, own, old)
        ]
        assert shown == [share, f"{share} (+1 −2)", "—"]
    assert [cells(("flips_p",), row, first, "es")[0] for row in (first, own, old)] == ["", "1,000", "—"]


@pytest.mark.parametrize("changes, fragment", [({"right": "01"}, "2 marks for 4 words"), ({"right": "01x1"}, "01x1")])
def test_a_report_with_other_marks_is_refused(tmp_path, changes: dict, fragment: str) -> None:
    fields = report_fields([report_row("fp32", last_words=LAST | changes)])
    (tmp_path / "report.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=fragment):
        read_side(tmp_path)


def test_answers_of_different_texts_are_not_compared() -> None:
    assert answers_note(np.ones(3, bool), np.ones(4, bool)) == answers_note(np.ones(0, bool), np.ones(0, bool)) == ""
