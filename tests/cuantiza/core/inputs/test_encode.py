"""Documents as tokens: markers at their ends are removed, and a long last one is cut."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cuantiza.core.inputs.tokenizer import encode, load_tokenizer, markers, take

from helpers import CORPUS, ES_MINI, SPANISH


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ES_MINI)


@pytest.fixture(scope="module")
def novel() -> str:
    """The embedded texts as one, 190 KB."""
    return "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(CORPUS.glob("*.txt")))


def metaspace() -> Tokenizer:
    """A small tokenizer with `<s>` and `</s>`, as sentencepiece models have them."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator(SPANISH, trainer)
    return made


def test_markers_are_special_tokens_alone(tokenizer: Tokenizer) -> None:
    """A config may name the id of a word as its start token; texts that begin with this word keep it."""
    word = tokenizer.encode("Hola").ids[0]
    assert markers(tokenizer, [0]) == ("<|endoftext|>",) and markers(tokenizer, [word, 10**6]) == ()
    made = metaspace()
    made.add_tokens([AddedToken("común", special=False)])
    assert markers(made, range(400)) == ("<unk>", "<s>", "</s>")


@pytest.mark.parametrize("kind", ["es-mini", "metaspace"])
def test_start_and_end_in_the_text_are_not_tokens_of_it(tokenizer: Tokenizer, kind: str) -> None:
    used, start, end = (
        (tokenizer, "<|endoftext|>", "<|endoftext|>") if kind == "es-mini" else (metaspace(), "<s>", "</s>")
    )
    marked = markers(used, [used.token_to_id(start), used.token_to_id(end)])
    plain = take(used, SPANISH, marked=marked)
    for before, after in (
        (start, ""),
        (start, end),
        (start + start, f" {end}"),
        (f"{start} ", f"{end}{end}"),
        ("", end),
    ):
        texts = tuple(before + text + after for text in SPANISH)
        assert take(used, texts, marked=marked) == plain
        assert take(used, texts, 1000, marked) == plain
    # Several documents in one text, as they are where only the tokenizer knows its markers.
    assert take(used, ["".join(f"{start}{text}{end}\n" for text in SPANISH)], marked=marked) == plain
    assert used.token_to_id(start) in encode(used, [f"Uno {start} dos."])[0]


def test_whole_documents_until_there_are_enough(tokenizer: Tokenizer, novel: str) -> None:
    """Documents of the usual length are never cut: the last one stays whole."""
    texts = tuple(novel[begin : begin + 3000] for begin in range(0, 90_000, 3000))
    whole = encode(tokenizer, texts)
    for enough in (1, 500, 3000, 12288, 10**9):
        found = encode(tokenizer, texts, enough)
        assert found == whole[: len(found)]
        assert sum(map(len, found[:-1])) < enough
        assert sum(map(len, found)) >= enough or len(found) == len(whole)


@pytest.mark.parametrize("enough", [1, 1000, 4000])
@pytest.mark.parametrize("before", [0, 1])
def test_a_long_document_is_cut(tokenizer: Tokenizer, novel: str, enough: int, before: int) -> None:
    """The tokens are the first of the whole document, and the text is what they spell."""
    texts = (*SPANISH[:before], novel)
    whole = encode(tokenizer, texts)
    found = take(tokenizer, texts, enough)
    if enough == 1 and before:
        assert [item.ids for item in found] == whole[:1]
        return
    count = sum(len(item.ids) for item in found)
    assert enough <= count <= enough + 2
    last = found[-1]
    assert last.ids == whole[before][: len(last.ids)]
    assert last.text == tokenizer.decode(last.ids, skip_special_tokens=False) and novel.startswith(last.text)


def test_a_cut_falls_between_characters(tokenizer: Tokenizer) -> None:
    """A character of several tokens is taken whole."""
    text = "🦎日本é" * 3000
    for enough in range(50, 60):
        (found,) = take(tokenizer, [text], enough)
        assert tokenizer.decode(found.ids, skip_special_tokens=False) == found.text and text.startswith(found.text)
        assert enough <= len(found.ids) <= enough + 4


def test_white_space_at_the_cut(tokenizer: Tokenizer) -> None:
    text = "Hola.\n\n\n\n   \n" * 3000
    for enough in range(20, 40):
        (found,) = take(tokenizer, [text], enough)
        assert tokenizer.decode(found.ids, skip_special_tokens=False) == found.text and not found.text[-1].isspace()


def test_no_more_than_needed_is_encoded(tokenizer: Tokenizer) -> None:
    """As many tokens of a text a thousand times as long are the same ones."""
    text = "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo.\n"
    seen = []

    class Counting:
        def encode(self, text: str, **options: bool):
            seen.append(len(text))
            return tokenizer.encode(text, **options)

    short, long = (take(Counting(), [text * count], 2000) for count in (1000, 1_000_000))
    assert short == long and max(seen) < 100_000
