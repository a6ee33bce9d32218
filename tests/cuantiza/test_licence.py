"""A bundle passes on what its checkpoint says of its licence, and its card never points at itself for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cuantiza.bundle.examples import examples, opening
from cuantiza.bundle.licence import licence_of

from helpers import ES_MINI

ID = "owner/name"
MIT = "---\nlicense: mit\n---\n# a model\n"
# Lists of lists: 30 lines, and half a billion words where they are written out.
NESTED = "l0: &l0 [mit, mit]\n" + "".join(f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}]\n" for n in range(1, 30))
LINKED = "---\nlicense: other\nlicense_name: house\nlicense_link: {}\n---\n# a model\n"


@pytest.fixture
def checkpoint(tmp_path: Path):
    """`checkpoint({"README.md": text})`: a folder with these files."""

    def make(files: dict[str, str]) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize(
    ("files", "hub_id", "head", "copied", "said"),
    [
        ({"README.md": MIT}, None, {"license": "mit"}, {"CHECKPOINT.md"}, "That of the checkpoint: mit."),
        ({"README.md": MIT.replace("\n", "\r\n")}, None, {"license": "mit"}, {"CHECKPOINT.md"}, "checkpoint: mit."),
        ({"README.md": "\ufeff" + MIT}, ID, {"license": "mit"}, {"CHECKPOINT.md"}, f"https://huggingface.co/{ID}"),
        (
            {"README.md": LINKED.format("README.md")},
            None,
            {"license": "other", "license_name": "house", "license_link": "CHECKPOINT.md"},
            {"CHECKPOINT.md"},
            "[CHECKPOINT.md](CHECKPOINT.md)",
        ),
        (
            {"README.md": LINKED.format("./TERMS.txt"), "TERMS.txt": "terms"},
            None,
            {"license": "other", "license_name": "house", "license_link": "TERMS.txt"},
            {"CHECKPOINT.md", "TERMS.txt"},
            "house",
        ),
        (
            {"README.md": LINKED.format("docs/TERMS.txt")},
            ID,
            {
                "license": "other",
                "license_name": "house",
                "license_link": f"https://huggingface.co/{ID}/blob/main/docs/TERMS.txt",
            },
            {"CHECKPOINT.md"},
            "house",
        ),
        (
            {"README.md": LINKED.format("https://example.org/terms")},
            None,
            {"license": "other", "license_name": "house", "license_link": "https://example.org/terms"},
            {"CHECKPOINT.md"},
            "house",
        ),
        (
            {"LICENSE": "the text", "NOTICE": "a notice"},
            None,
            {"license": "other", "license_name": "that-of-the-checkpoint", "license_link": "LICENSE"},
            {"LICENSE", "NOTICE"},
            "[LICENSE](LICENSE)",
        ),
        (
            {"licence.md": "the text", "README.md": MIT},
            None,
            {"license": "mit"},
            {"licence.md", "CHECKPOINT.md"},
            "mit",
        ),
        ({"README.md": "# no front matter"}, None, {}, {"CHECKPOINT.md"}, "look there before"),
        ({"README.md": "---\nlicense: [\n---\n"}, ID, {}, {"CHECKPOINT.md"}, "look there before"),
        ({"README.md": f"---\n{NESTED}license: *l29\n---\n"}, ID, {}, {"CHECKPOINT.md"}, "look there before"),
        ({}, ID, {}, set(), f"at https://huggingface.co/{ID}: look there"),
    ],
)
def test_what_is_said_and_passed_on(checkpoint, files, hub_id, head, copied, said) -> None:
    found = licence_of(checkpoint(files), hub_id)
    assert found.head == head and set(found.files) == copied and said in found.sentence
    assert "README.md" not in found.sentence and found.head.get("license_link") != "README.md"


@pytest.mark.parametrize("link", ["../secret.txt", "/etc/hostname", "sub/../../secret.txt"])
def test_no_link_leads_out_of_the_folder(checkpoint, link: str) -> None:
    folder = checkpoint({"README.md": LINKED.format(link)})
    (folder.parent / "secret.txt").write_text("secret")
    found = licence_of(folder, None)
    assert set(found.files) == {"CHECKPOINT.md"} and "license_link" not in found.head


def test_the_examples_begin_with_the_start_token() -> None:
    tokenizer = Tokenizer.from_file(str(ES_MINI / "tokenizer.json"))
    begin = opening(tokenizer, 0, "Hola")
    assert begin.parsed and begin.text == "<|endoftext|>"
    optimum, javascript, plain = examples(ID, 'dijo "no"', begin, "model_quantized.onnx", "q8")
    assert '"<|endoftext|>dijo \\"no\\""' in optimum and '"<|endoftext|>dijo \\"no\\""' in javascript
    assert "new = [0, *" in plain
    # The id of an ordinary word, which that word before a prompt does not give.
    other = opening(tokenizer, tokenizer.token_to_id("a"), "mor")
    assert not other.parsed and '("Hola"' in examples(ID, "Hola", other, "model.onnx", "fp32")[0]
