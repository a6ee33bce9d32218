"""The task of an evaluation: which tokens of the test split are scored, and how large their text is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.inputs.corpus import Source, Split, load_splits, write_index
from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.store.digests import digest
from cuantiza.eval.measure.estimates import text_size
from cuantiza.eval.measure.quality import Task, make_task

from helpers import CORPUS, ES_MINI


def scored(task: Task) -> int:
    return sum(len(window.targets) for window in task.rolling)


def test_documents_of_the_usual_length_stay_whole() -> None:
    test = load_splits(Source(str(CORPUS)))[1]
    for tokens in (400, 3000, 12288):
        task = make_task(ES_MINI, test, tokens, 512)
        texts = tuple(sorted(test.documents, key=digest)[: len(task.documents)])
        assert task.size == text_size(texts) and tokens <= scored(task) < tokens + 1024
    assert scored(make_task(ES_MINI, test, 3000, 512)) == 3634


@pytest.mark.parametrize("tokens", [500, 4000])
def test_one_very_long_document_is_cut(tokens: int) -> None:
    """Both protocols score about as many tokens as asked for, and the bytes are those of the text that is scored."""
    novel = "\n".join(file.read_text(encoding="utf-8") for file in sorted(CORPUS.glob("*.txt")))
    short = [f"Un texto corto, el número {number}." for number in range(20)]
    first = next(text for n in range(10**6) if digest(text := f"{novel} fin {n}") < min(map(digest, short)))
    for documents in ((first, *short), (novel, *short), (novel,)):
        task = make_task(ES_MINI, Split("test", documents), tokens, 512)
        assert tokens <= scored(task) <= tokens + 3
        spelled = [load_tokenizer(ES_MINI).decode(ids, skip_special_tokens=False) for ids in task.documents]
        assert task.size == text_size(tuple(spelled))
        assert abs(len(task.stream) - scored(task)) <= 2 * len(documents)


@pytest.mark.parametrize(
    "form", ["<|endoftext|>{}", "<|startoftext|>{}<|endoftext|>", "<|endoftext|> {}\n<|endoftext|>\n"]
)
def test_a_marked_text_is_scored_as_without_markers(tmp_path: Path, form: str) -> None:
    tasks = []
    for name, way in (("plain", "{}"), ("marked", form)):
        (tmp_path / name).mkdir()
        for file in sorted(CORPUS.glob("*.txt"))[:12]:
            text = way.format(file.read_text(encoding="utf-8").strip())
            (tmp_path / name / file.name).write_text(text, encoding="utf-8")
        write_index(tmp_path / name)
        tasks.append(make_task(ES_MINI, load_splits(Source(str(tmp_path / name)))[1], 10**6, 512))
    plain, marked = tasks
    assert marked.documents == plain.documents and marked.size == plain.size
    np.testing.assert_array_equal(marked.stream, plain.stream)


def test_markers_of_the_models_own_tokenizer(tmp_path: Path) -> None:
    """A model with `<s>` and `</s>`: what fine-tuning scripts put around each text is not scored."""
    folder = Path(shutil.copytree(ES_MINI, tmp_path / "own", ignore=shutil.ignore_patterns("*.safetensors")))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": 8192 + n, "content": text, **added} for n, text in enumerate(("<s>", "</s>"))]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": 8192, "eos_token_id": 8193, "vocab_size": 8194}
    (folder / "config.json").write_text(json.dumps(config | ids))
    (folder / "generation_config.json").unlink(missing_ok=True)

    texts = [f"Un texto de verdad, el número {number}." for number in range(9)]
    plain = make_task(folder, Split("test", tuple(texts)), 10**6, 512)
    marked = make_task(folder, Split("test", tuple(f"<s>{text}</s>" for text in texts)), 10**6, 512)
    assert sorted(marked.documents) == sorted(plain.documents) and marked.size == plain.size
    assert not {8192, 8193} & {token for ids in marked.documents for token in ids}


@pytest.mark.parametrize("mark", ["</s>", "<|im_end|>", "<|eot_id|>", "[SEP]", "<eos>"])
def test_markers_of_another_tokenizer_are_named(mark: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are text here, so one file whose documents they end is one document."""
    texts = tuple(f"{mark}\n".join(f"Un texto de {name}, el {number}." for number in range(9)) for name in "ab")
    make_task(ES_MINI, Split("test", texts), 10**6, 512)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning   CORPUS: 2 test documents have {mark}, which the model's tokenizer reads as text; if"
    )
    make_task(ES_MINI, Split("test", ("\n".join(texts),), joined=True), 10**6, 512)
    make_task(ES_MINI, Split("test", texts), 10**6, 512)
    assert capsys.readouterr().err == ""  # a joined text is read as it is, and each line is said once


def test_a_document_about_markers_is_one_and_the_split_counts_parts(es_mini: Path) -> None:
    """The model's own start token, inside a sentence, is text; at the end of a sentence it divides."""
    about = "El marcador <|endoftext|> separa los textos."
    assert make_task(es_mini, Split("test", (about,)), 10**6, 512).in_split == 1
    task = make_task(es_mini, Split("test", ("Uno.<|endoftext|>Dos.<|endoftext|>Tres y más.", about)), 2, 512)
    assert len(task.documents) < task.in_split == 4
