"""Other libraries read an artifact's tokenizer as it was measured: transformers 4.57, transformers.js, onnxruntime-genai."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cuantiza.core.inputs.tokenizer import load_tokenizer, token_ids
from cuantiza.core.onnx.genai_config import GENAI_CONFIG, genai_config, tokenizer_warning
from cuantiza.export.tokenizer.write import write_tokenizer

from helpers import ES_MINI, ROOT, SPANISH, copy_tokenizer

PYTHON = ROOT / ".venv-optimum/bin/python"
GENAI = ROOT / ".venv-runtimes/bin/python"
JS = ROOT / "js"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TEXTS = [*SPANISH, "En 2023 hubo 12345 <a> visitas <pad> fin </s>"]
# folder -> how many tokens the model has, and config.json's ids of start, end and padding
SIZES = {"gaps": 8256, "four": 8195, "metaspace": 400, "digits": 8192, "prefix": 8192, "lower": 8192, "beyond": 8192}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def edit(path: Path, **changes: object) -> None:
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(fields | changes, ensure_ascii=False), encoding="utf-8")


def gaps(folder: Path) -> None:
    copy_tokenizer(folder, ("vocab.json", "merges.txt"))
    edit(folder / "added_tokens.json", **{"<a>": 8200, "<pad>": 8210})


def four(folder: Path) -> None:
    copy_tokenizer(folder, ("tokenizer.json",))
    names = {
        "bos_token": ("<s>", 0),
        "eos_token": ("</s>", 8192),
        "pad_token": ("<pad>", 8193),
        "unk_token": ("<unk>", 8194),
    }
    fields = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    fields["model"]["vocab"].pop("<|endoftext|>")
    fields["model"]["vocab"] |= dict(names.values())
    fields["added_tokens"] = [{"id": number, "content": name, **FLAGS} for name, number in names.values()]
    edit(folder / "tokenizer.json", **fields)
    edit(folder / "special_tokens_map.json", **{key: {"content": name, **FLAGS} for key, (name, _) in names.items()})
    edit(folder / "tokenizer_config.json", model_max_length=128)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def metaspace(folder: Path) -> None:
    letters = sorted({letter for text in TEXTS for letter in text if not letter.isspace()})
    words = ["<s>", "</s>", "<pad>", "<unk>", "▁", *letters, "▁h", "▁a", "st"]
    merges = [("▁", "h"), ("▁", "a"), ("s", "t")]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(words[:4])
    made.save(str(folder / "tokenizer.json"))


def digits(folder: Path) -> None:
    copy_tokenizer(folder)
    split = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    edit(folder / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, last]})


def prefix(folder: Path) -> None:
    copy_tokenizer(folder)
    before = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    edit(folder / "tokenizer.json", pre_tokenizer=before)


def lower(folder: Path) -> None:
    copy_tokenizer(folder, ("tokenizer.json",))
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


def beyond(folder: Path) -> None:
    copy_tokenizer(folder)
    start = json.loads((ES_MINI / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    edit(folder / "tokenizer.json", added_tokens=[*start, {"id": 8192, "content": "[PAD]", **FLAGS}])
    edit(folder / "tokenizer_config.json", pad_token="[PAD]")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer files of artifacts, and config.json."""
    place, made = tmp_path_factory.mktemp("readers"), {}
    for make in (gaps, four, metaspace, digits, prefix, lower, beyond):
        name = make.__name__
        source, made[name] = place / f"{name}-checkpoint", place / name
        source.mkdir()
        made[name].mkdir()
        make(source)
        ends = {"bos_token_id": 0, "eos_token_id": 1 if name == "metaspace" else 0, "pad_token_id": 2}
        config = {"model_type": "gpt2", "vocab_size": SIZES[name], **ends}
        write_tokenizer(source, made[name], SIZES[name], config)
        (made[name] / "config.json").write_text(json.dumps(config))
    return made


def expected(folder: Path) -> list[list[int]]:
    return [token_ids(load_tokenizer(folder), text) for text in TEXTS]


def run(command: list[object], folders: dict[str, Path], cwd: Path = ROOT) -> dict:
    done = subprocess.run(
        [*map(str, command)],
        input=json.dumps([TEXTS, {name: str(path) for name, path in folders.items()}]),
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(folders: dict[str, Path], found: dict) -> None:
    """`found`: for each folder its token ids, its special tokens (start, end, padding), and its chat template."""
    for name, folder in folders.items():
        ids, named, template = found[name]
        assert ids == expected(folder), name
        assert template == (TEMPLATE if name == "four" else None)
        if name in ("four", "metaspace"):
            assert named == ["<s>", "</s>", "<pad>"]
        else:
            assert named[:2] == ["<|endoftext|>"] * 2
    assert found["beyond"][1][2] == "[PAD]"


PYTHON_SCRIPT = """
import json, sys
from transformers import AutoTokenizer
texts, folders = json.load(sys.stdin)
found = {}
for name, folder in folders.items():
    t = AutoTokenizer.from_pretrained(folder)
    assert "token_type_ids" not in t("hola"), name
    ids = [t(text, add_special_tokens=False)["input_ids"] for text in texts]
    found[name] = [ids, [t.bos_token, t.eos_token, t.pad_token], t.chat_template]
print(json.dumps(found))
"""


@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-optimum here; `make optimum` creates it")
def test_transformers_4(folders: dict[str, Path]) -> None:
    check(folders, run([PYTHON, "-c", PYTHON_SCRIPT], folders))


JS_SCRIPT = """
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { AutoTokenizer, env } from "@huggingface/transformers";
const [texts, folders] = JSON.parse(readFileSync(0));
env.allowRemoteModels = false;
const found = {};
for (const [name, folder] of Object.entries(folders)) {
  env.localModelPath = dirname(folder);
  const t = await AutoTokenizer.from_pretrained(basename(folder));
  const ids = texts.map((text) => t.encode(text, { add_special_tokens: false }));
  found[name] = [ids, [t.bos_token, t.eos_token, t.pad_token], t.chat_template];
}
console.log(JSON.stringify(found));
"""


@pytest.mark.skipif(
    not (JS / "node_modules").is_dir() or shutil.which("node") is None, reason="no Node, or no js/node_modules here"
)
def test_transformers_js(folders: dict[str, Path]) -> None:
    check(folders, run(["node", "--input-type=module", "-e", JS_SCRIPT], folders, JS))


GENAI_SCRIPT = """
import json, sys
import onnxruntime_genai as genai
texts, folders = json.load(sys.stdin)
found = {}
for name, folder in folders.items():
    t = genai.Tokenizer(folder)
    found[name] = [[int(token) for token in t.encode(text)] for text in texts]
print(json.dumps(found))
"""


@pytest.mark.skipif(not GENAI.exists(), reason="no .venv-runtimes here; `make runtimes` creates it")
def test_onnxruntime_genai_reads_them_or_the_artifact_says_that_it_cannot(folders: dict[str, Path]) -> None:
    sizes = {"layers": 1, "heads": 1, "head_dim": 8, "positions": 128}
    for name, folder in folders.items():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fields = genai_config(config, {}, vocabulary=SIZES[name], in_place=True, **sizes)
        (folder / GENAI_CONFIG).write_text(json.dumps(fields))
    found = run([GENAI, "-c", GENAI_SCRIPT], folders)
    for name, folder in folders.items():
        warning = tokenizer_warning(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
        assert (found[name] == expected(folder)) is (warning is None), name


def test_which_tokenizers_genai_cannot_read(folders: dict[str, Path]) -> None:
    told = {
        name: tokenizer_warning(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
        for name, folder in folders.items()
    }
    assert {name for name, warning in told.items() if warning} == {"metaspace", "prefix", "lower"}
    assert "Metaspace, BPE" in str(told["metaspace"])


@pytest.mark.parametrize("named", [None, "PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_model_type_for_which_autotokenizer_takes_no_class_that_is_named(tmp_path: Path, named: str | None) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    made.mkdir()
    copy_tokenizer(source, ("tokenizer.json",))
    edit(source / "tokenizer_config.json", **({"tokenizer_class": named} if named else {}))
    (warning,) = write_tokenizer(source, made, 8192, {"model_type": "qwen2", "vocab_size": 8192})
    edit(made / "config.json", model_type="qwen2")
    auto = AutoTokenizer.from_pretrained(made)
    assert type(auto).__name__ == "Qwen2Tokenizer" and "takes Qwen2Tokenizer for the model type qwen2" in warning
    assert [auto(text)["input_ids"] for text in TEXTS] != expected(made)
    plain = PreTrainedTokenizerFast.from_pretrained(made)  # as the warning says
    assert [plain(text)["input_ids"] for text in TEXTS] == expected(made)


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_a_model_type_for_which_autotokenizer_takes_the_class_that_is_named(tmp_path: Path, named: str) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    made.mkdir()
    copy_tokenizer(source, ("tokenizer.json",))
    edit(source / "tokenizer_config.json", tokenizer_class=named)
    assert write_tokenizer(source, made, 8192, {"model_type": "llama", "vocab_size": 8192}) == ()
