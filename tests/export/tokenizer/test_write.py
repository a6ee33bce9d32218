"""The tokenizer files of an artifact: the checkpoint's own where nothing has to change, and the ids that its files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.tokenizer import load_tokenizer, token_ids
from cuantiza.core.store.artifact import Artifact, copy_companions, open_artifact
from cuantiza.export.tokenizer.write import write_tokenizer

from helpers import ES_MINI, SPANISH, copy_tokenizer

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path: Path, **changes: object) -> None:
    """Change fields of a JSON file; `...` takes a field away."""
    fields = (read(path) if path.is_file() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}, ensure_ascii=False))


def token(number: int, text: str, special: bool = True) -> dict:
    return {"id": number, "content": text, **FLAGS, "special": special}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """es-mini's tokenizer files."""
    copy_tokenizer(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def written(checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[Path, tuple[str, ...]]]:
    """`written(size, **config)`: the artifact's folder and the warnings, for a model of `size` tokens."""

    def call(size: int = 8192, **config: object) -> tuple[Path, tuple[str, ...]]:
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        fields = {"model_type": "gpt2", "vocab_size": size, "bos_token_id": 0, "eos_token_id": 0, **config}
        warnings = write_tokenizer(checkpoint, work, size, fields)
        (work / "config.json").write_text(json.dumps(fields))
        return work, warnings

    return call


def same_ids(folder: Path, *texts: str) -> None:
    """AutoTokenizer gives the ids that tokenizer.json itself gives."""
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in (*SPANISH, *texts):
        assert theirs(text, add_special_tokens=False)["input_ids"] == token_ids(ours, text), text


def test_the_file_is_copied_byte_for_byte(checkpoint: Path, written: Callable[..., tuple]) -> None:
    folder, warnings = written()
    assert warnings == ()
    assert (folder / "tokenizer.json").read_bytes() == (ES_MINI / "tokenizer.json").read_bytes()
    assert read(folder / "tokenizer_config.json") == read(ES_MINI / "tokenizer_config.json")
    assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "config.json"}


STATE: dict[str, Callable[[dict], None]] = {
    "truncation": lambda fields: fields.update(
        truncation={"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    ),
    "padding": lambda fields: fields.update(
        padding={"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        | {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    ),
    "dropout": lambda fields: fields["model"].update(dropout=0.1),
}


@pytest.mark.parametrize("name", STATE)
def test_working_state_is_taken_out_and_nothing_else(
    checkpoint: Path, written: Callable[..., tuple], name: str
) -> None:
    """The merges are written as strings here, which stay as they are."""
    fields = read(checkpoint / "tokenizer.json")
    fields["model"]["merges"] = [" ".join(merge) for merge in fields["model"]["merges"]]
    (checkpoint / "tokenizer.json").write_text(json.dumps(fields))
    whole = (written()[0] / "tokenizer.json").read_bytes()
    assert whole == (checkpoint / "tokenizer.json").read_bytes()
    changed = json.loads(json.dumps(fields))
    STATE[name](changed)
    (checkpoint / "tokenizer.json").write_text(json.dumps(changed))
    folder, warnings = written()
    assert read(folder / "tokenizer.json") == fields and warnings == ()
    same_ids(folder)


@pytest.mark.parametrize("told", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "ids", [{"<uno>": 8200, "<pad>": 8210}, {"<b>": 8193, "<a>": 8192}, {"<b>": 8255}], ids=["gaps", "order", "last"]
)
def test_added_tokens_have_the_ids_that_the_file_says(
    checkpoint: Path, written: Callable[..., tuple], told: str, ids: dict[str, int]
) -> None:
    more = [token(number, text, special=False) for text, number in ids.items()]
    if told == "tokenizer.json":
        edit(checkpoint / told, added_tokens=[*read(checkpoint / told)["added_tokens"], *more])
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (checkpoint / name).unlink()
        decoder = {str(item["id"]): {key: value for key, value in item.items() if key != "id"} for item in more}
        edit(checkpoint / told, **(ids if told == "added_tokens.json" else {"added_tokens_decoder": decoder}))
    folder, _ = written(8256)
    ours = load_tokenizer(folder)
    text = " ".join(f"Hola {name} que tal" for name in ids)
    assert [number for number in token_ids(ours, text) if number > 8191] == list(ids.values())
    assert [ours.decode([number], skip_special_tokens=False) for number in ids.values()] == list(ids)
    same_ids(folder, text)


def test_an_added_token_in_the_place_of_a_word(checkpoint: Path, written: Callable[..., tuple]) -> None:
    """It is refused where a text can give that word, and takes the place of one that no text gives."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    (checkpoint / "added_tokens.json").write_text('{"<pad>": 300}')
    with pytest.raises(UserError, match=r"'<pad>' has the id 300, which its vocabulary gives to 'Ġun'"):
        written()
    edit(checkpoint / "vocab.json", **{"<unused0>": 8192})
    (checkpoint / "added_tokens.json").write_text('{"<pad>": 8192}')
    folder, _ = written(8193)
    assert token_ids(load_tokenizer(folder), "a<pad>")[-1] == 8192
    same_ids(folder, "a<pad> <unused0>")


def test_added_tokens_that_contradict_each_other(checkpoint: Path, written: Callable[..., tuple]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    (checkpoint / "added_tokens.json").write_text('{"<a>": 8192, "<b>": 8192}')
    with pytest.raises(UserError, match="same id 8192"):
        written(8256)
    (checkpoint / "added_tokens.json").write_text('{"<|endoftext|>": 8192}')
    with pytest.raises(UserError, match="8192 among its added tokens and 0 in its vocabulary"):
        written(8256)
    (checkpoint / "added_tokens.json").write_text('{"<a>": "x"}')
    with pytest.raises(UserError, match=r"added_tokens\.json: the id of '<a>' is 'x'"):
        written(8256)


def test_tokens_that_an_older_save_left_are_not_added(checkpoint: Path, written: Callable[..., tuple]) -> None:
    """As transformers reads them: an added_tokens_decoder is all there is, and added_tokens.json is older."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    edit(checkpoint / "tokenizer_config.json", added_tokens_decoder={"8192": {"content": "<pad>", "special": True}})
    (checkpoint / "added_tokens.json").write_text('{"[PAD]": 8192, "<old>": 8193}')
    folder, _ = written(8256)
    ours = load_tokenizer(folder)
    assert ours.token_to_id("<pad>") == 8192 and ours.token_to_id("[PAD]") is ours.token_to_id("<old>") is None
    same_ids(folder, "Hola <pad> <old>")


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json"])
def test_a_token_beyond_the_embedding_is_named(checkpoint: Path, written: Callable[..., tuple], where: str) -> None:
    if where == "tokenizer.json":
        edit(checkpoint / where, added_tokens=[token(0, "<|endoftext|>"), token(8192, "[PAD]")])
    edit(checkpoint / "tokenizer_config.json", pad_token="[PAD]", added_tokens_decoder=...)
    edit(checkpoint / "special_tokens_map.json", pad_token="[PAD]")
    folder, (warning,) = written(8192)
    assert "'[PAD]' (8192)" in warning and "8192 tokens" in warning
    assert max(token_ids(load_tokenizer(folder), "Hola [PAD]")) < 8192
    found = AutoTokenizer.from_pretrained(folder)
    assert (found.pad_token, found.pad_token_id) == ("[PAD]", 8192)
    folder, warnings = written(8193)  # the model has a row for it
    assert warnings == () and token_ids(load_tokenizer(folder), "Hola [PAD]")[-1] == 8192


def test_a_tokenizer_that_drops_characters_says_so(checkpoint: Path, written: Callable[..., tuple]) -> None:
    metaspace(checkpoint)
    fields = read(checkpoint / "tokenizer.json")
    fields["model"]["unk_token"] = None
    (checkpoint / "tokenizer.json").write_text(json.dumps(fields))
    folder, warnings = written(17, eos_token_id=1)
    assert token_ids(load_tokenizer(folder), "h中") == token_ids(load_tokenizer(folder), "h")
    assert any("leaves out characters" in warning for warning in warnings)


def test_words_beyond_the_embedding_are_refused(written: Callable[..., tuple]) -> None:
    with pytest.raises(UserError, match=r"ids up to 8191.*ends at 8190"):
        written(8191)


def four_specials(folder: Path) -> None:
    """<s> at 0 and three more after the vocabulary, as in many GPT-2s that were trained from scratch."""
    fields = read(folder / "tokenizer.json")
    names = {0: "<s>", 8192: "</s>", 8193: "<pad>", 8194: "<unk>"}
    vocabulary = {
        ("<s>" if word == "<|endoftext|>" else word): number for word, number in fields["model"]["vocab"].items()
    }
    fields["model"]["vocab"] = vocabulary | {name: number for number, name in names.items()}
    fields["added_tokens"] = [token(number, name) for number, name in names.items()]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize("form", ["text", "objects", "config"])
def test_special_tokens_that_stand_in_another_file(checkpoint: Path, written: Callable[..., tuple], form: str) -> None:
    four_specials(checkpoint)
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    edit(checkpoint / "tokenizer_config.json", model_max_length=128)
    if form == "config":  # no file names them but config.json, by their ids
        folder, _ = written(8195, eos_token_id=8192, pad_token_id=8193)
        named.pop("unk_token")
    else:
        objects = {key: {"content": name, **FLAGS} for key, name in named.items()}
        edit(checkpoint / "special_tokens_map.json", **(named if form == "text" else objects))
        folder, _ = written(8195)
    found = AutoTokenizer.from_pretrained(folder)
    assert {key: getattr(found, key) for key in named} == named
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, len(found)) == (0, 8192, 8193, 8195)
    settings = read(folder / "tokenizer_config.json")
    assert {key: settings[key] for key in named} == named  # transformers.js reads no other file
    same_ids(folder, "Hola que tal </s>")


@pytest.mark.parametrize(
    "files", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"], ["vocab.json", "merges.txt"]]
)
def test_chat_template(checkpoint: Path, written: Callable[..., tuple], files: list[str], tmp_path: Path) -> None:
    for path in [path for path in checkpoint.iterdir() if path.name not in files]:
        path.unlink()
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    folder, _ = written()
    (tmp_path / "copy").mkdir()
    copy_companions(folder, tmp_path / "copy")
    for place in (folder, tmp_path / "copy"):
        found = AutoTokenizer.from_pretrained(place)
        assert found.apply_chat_template([{"role": "user", "content": "hola"}], tokenize=False) == "user: hola\n"
        assert read(place / "tokenizer_config.json")["chat_template"] == TEMPLATE
        assert (place / "chat_template.jinja").read_text() == TEMPLATE


def test_several_chat_templates(checkpoint: Path, written: Callable[..., tuple]) -> None:
    edit(checkpoint / "tokenizer_config.json", chat_template="old")
    folder, _ = written()
    assert AutoTokenizer.from_pretrained(folder).chat_template == "old"
    (checkpoint / "chat_template.jinja").write_text("one")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "rag.jinja").write_text("two")
    folder, _ = written()
    assert AutoTokenizer.from_pretrained(folder).chat_template == {"default": "one", "rag": "two"}


def metaspace(folder: Path) -> None:
    """tokenizer.json alone, of another kind than GPT-2's."""
    words = ["<s>", "</s>", "<pad>", "<unk>", "▁", *"holaquetsd", "▁h", "▁q"]
    merges = [("▁", "h"), ("▁", "q")]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.add_special_tokens(words[:4])
    for path in folder.iterdir():
        path.unlink()
    made.save(str(folder / "tokenizer.json"))


def changed(**changes: object) -> Callable[[Path], None]:
    """es-mini's tokenizer.json with other parts."""
    return lambda folder: edit(folder / "tokenizer.json", **changes)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}
OTHER_KINDS = {
    "metaspace": metaspace,
    "digits": changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}),
    "lower case": changed(normalizer={"type": "Lowercase"}),
    "no regex": changed(pre_tokenizer=BYTES),
    "class of another model": lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_class_that_would_rebuild_the_tokenizer_is_replaced(
    checkpoint: Path, written: Callable[..., tuple], name: str
) -> None:
    OTHER_KINDS[name](checkpoint)
    folder, warnings = written(8192 if name != "metaspace" else 17, eos_token_id=0 if name != "metaspace" else 1)
    assert any("PreTrainedTokenizerFast" in warning for warning in warnings)
    settings = read(folder / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    same_ids(folder, "En 2023 y en 1987 hubo 12345 visitas", "hola que tal")
    found = AutoTokenizer.from_pretrained(folder)
    assert list(found("hola")) == ["input_ids", "attention_mask"]  # GPT-2 would add an embedding for token types
    if name == "metaspace":
        assert (found.bos_token, found.eos_token, found.unk_token, len(found)) == ("<s>", "</s>", "<unk>", 17)
    else:
        assert found.eos_token == "<|endoftext|>" and len(found) == 8192


@pytest.mark.parametrize("own", [True, False])
def test_the_space_before_a_text_is_as_tokenizer_json_says(
    checkpoint: Path, written: Callable[..., tuple], own: bool
) -> None:
    before = read(checkpoint / "tokenizer.json")["pre_tokenizer"] | {"add_prefix_space": own}
    edit(checkpoint / "tokenizer.json", pre_tokenizer=before)
    edit(checkpoint / "tokenizer_config.json", add_prefix_space=not own)
    folder, (warning,) = written()
    assert "add_prefix_space" in warning
    assert read(folder / "tokenizer_config.json")["add_prefix_space"] is own
    same_ids(folder)


def test_leftovers_of_the_process_that_saved_it(checkpoint: Path, written: Callable[..., tuple]) -> None:
    """transformers 4.57 knows neither the class nor a list of extra tokens, as transformers 5 writes them."""
    left = {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "name_or_path": "/home/ana/gpt2", "max_length": 64}
    changes = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "added_tokens_decoder": ...}
    edit(checkpoint / "tokenizer_config.json", **left, **changes)
    folder, warnings = written(8193)
    settings = read(folder / "tokenizer_config.json")
    assert warnings == () and not left.keys() & settings.keys()
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<a>"] and "extra_special_tokens" not in settings
    assert token_ids(load_tokenizer(folder), "<a>") == [8192]
    same_ids(folder, "<a>")


def test_special_tokens_that_an_object_names(checkpoint: Path, written: Callable[..., tuple]) -> None:
    extra = {"image_token": "<img>", "audio_token": {"content": "<audio>", **FLAGS}}
    edit(checkpoint / "tokenizer_config.json", extra_special_tokens=extra, additional_special_tokens=["<a>"])
    folder, warnings = written(8195)
    assert warnings == () and token_ids(load_tokenizer(folder), "<img><audio><a>") == [8192, 8193, 8194]
    same_ids(folder, "Hola <img> y <audio>, <a>.")
    assert AutoTokenizer.from_pretrained(folder).image_token == "<img>"
    folder, (warning,) = written(8193)
    assert "'<audio>' (8193), '<a>' (8194)" in warning and token_ids(load_tokenizer(folder), "<img>") == [8192]
    edit(checkpoint / "tokenizer_config.json", extra_special_tokens={"image_token": 7})
    with pytest.raises(UserError, match="image_token of extra_special_tokens is 7 where the text of a token is needed"):
        written(8195)


def test_every_recipe_and_the_bundle_have_the_same_tokenizer(
    make_gpt2: Callable[..., Path], exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    """From truncation in tokenizer.json and a chat template in a file of its own to the folder for the hub."""
    from cuantiza.bundle.files import assemble
    from cuantiza.core.inputs.corpus import Source
    from cuantiza.quantize.recipes.registry import RECIPES
    from cuantiza.quantize.stage import Wanted, quantize_all

    folder = make_gpt2("chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    STATE["truncation"](fields := read(folder / "tokenizer.json"))
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    fp32 = exported(folder)
    (made,) = quantize_all(fp32, [Wanted(fp32.path.parent / "fp16", "fp16", RECIPES["fp16"])], Source("unused"))
    (tmp_path / "bundle").mkdir()
    assemble([fp32, made], {}, "card", tmp_path / "bundle")
    text = " ".join(SPANISH) * 3
    ids = token_ids(load_tokenizer(ES_MINI), text)
    assert len(ids) > 64
    for place in (open_artifact(fp32.path).path, made.path, tmp_path / "bundle"):
        found = AutoTokenizer.from_pretrained(place)
        assert found(text, add_special_tokens=False)["input_ids"] == token_ids(load_tokenizer(place), text) == ids
        assert found.chat_template == TEMPLATE and (place / "chat_template.jinja").is_file()
