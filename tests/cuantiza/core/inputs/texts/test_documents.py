"""What counts as a document: files of a folder, rows, markers, lines and articles; and what the user is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, load_splits, write_index

from helpers import CORPUS

TEXTS = [f"Documento {number}: «¿qué día?»\n\nOtro párrafo {'ñ' * (number + 1)}." for number in range(11)]


def read(path: Path, **fields: str) -> set[str]:
    load_splits.cache_clear()
    calibration, test = load_splits(Source(str(path), **fields))
    assert not set(calibration.documents) & set(test.documents)
    return {*calibration.documents, *test.documents}


def rows(path: Path, values: list, column: str = "text") -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({column: values}), path)
    else:
        path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return path


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one text a file."""
    folder = tmp_path / "textos"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.{'txt' if number % 2 else 'TXT'}").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "name", ["__MACOSX/._00.txt", ".ipynb_checkpoints/00-checkpoint.txt", "._01.txt", ".git/x/a.jsonl", "00.txt~"]
)
def test_hidden_files_are_left_out(folder: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    hidden = folder / name
    hidden.parent.mkdir(parents=True, exist_ok=True)
    hidden.write_bytes(b"\0\x05\x16\x07 casi lo mismo")
    assert read(folder) == set(TEXTS) and capsys.readouterr().err == ""


def test_a_hidden_folder_may_be_named(folder: Path) -> None:
    assert read(folder.rename(folder.parent / ".textos")) == set(TEXTS)


def test_hidden_files_are_no_part_of_an_index(tmp_path: Path) -> None:
    folder = tmp_path / "indexed"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
        (folder / f"._{number:02}.txt").write_bytes(b"\0\x05\x16\x07\xff")
    write_index(folder)
    assert read(folder) == set(TEXTS)


def test_what_is_left_out_of_a_folder_is_said(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("README.md", "LICENSE", "tabla.csv", "config.json", "foto.bin", "vacio"):
        (folder / name).write_bytes({"config.json": b'{"a": 1}', "foto.bin": b"\0\1", "vacio": b""}.get(name, b"texto"))
    assert read(folder) == set(TEXTS)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "6 files are left out" in said and "LICENSE, README.md" in said


def test_folder_of_files_without_suffix(tmp_path: Path) -> None:
    """WikiExtractor's folders, and corpora whose suffix is the language."""
    (tmp_path / "AA").mkdir()
    (tmp_path / "AA" / "wiki_00").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:6]))
    (tmp_path / "AA" / "texto").write_text(TEXTS[6], encoding="utf-8")
    (tmp_path / "libros.es").write_text("\n<|endoftext|>\n".join(TEXTS[7:]), encoding="utf-8")
    assert read(tmp_path) == set(TEXTS)


def test_folder_with_one_object_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As scrapes are saved. An object without a text stands beside them."""
    for number, text in enumerate(TEXTS):
        fields = {"id": number, "text": text}
        (tmp_path / f"{number}.json").write_text(json.dumps(fields, indent=number % 2 or None), encoding="utf-8")
    (tmp_path / "scrape.json").write_text('{"pages": 11, "text": null}')
    assert read(tmp_path) == set(TEXTS)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1 file is left out" in said and "scrape.json" in said
    with pytest.raises(UserError, match=r"0\.json: .* the keys 'id', 'text', .*CORPUS_COLUMN="):
        read(tmp_path, column="cuerpo")


def test_json_without_any_text_beside_texts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    others = {"ids.json": "[1, 2, 3]", "metadata.jsonl": '{"f": "0"}\n', "array.jsonl": '[{"id": 1}]'}
    for name, content in others.items():
        (folder / name).write_text(content)
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)
    assert read(folder) == set(TEXTS)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "3 files are left out" in said and "array.jsonl, ids.json, metadata.jsonl" in said
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"metadata\.jsonl: line 1 .*CORPUS_COLUMN="):
        read(tmp_path)


@pytest.mark.parametrize(
    "rows", ['{"content": "uno"}\n' * 200, '{"messages": [{"role": "user", "content": "uno"}]}\n' * 200]
)
def test_a_corpus_in_another_column_is_not_taken_for_the_note_beside_it(folder: Path, rows: str) -> None:
    (folder / "shard.jsonl").write_text(rows)
    with pytest.raises(UserError, match=r"shard\.jsonl: line 1 .*(content|messages)"):
        read(folder)


def test_folder_with_nothing_but_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-")
    with pytest.raises(UserError, match=r"holds no \.txt.*a\.pdf"):
        read(tmp_path)


def test_links_are_followed_once(folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "enlace").symlink_to(folder)
    (folder / "arriba").symlink_to(corpus)
    assert read(corpus) == set(TEXTS)


def test_copies_are_counted(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "copia.txt").write_text(TEXTS[0], encoding="utf-8")
    assert read(folder) == set(TEXTS) and "1 document is a copy" in capsys.readouterr().err


@pytest.mark.parametrize("fields", [{"split": "test"}, {"config": "es"}])
def test_files_have_no_split(folder: Path, fields: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"give the files of that split alone, without CORPUS_SPLIT="):
        read(folder, **fields)


# Rows


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_under_the_name_of_a_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:6]), encoding)
    (tmp_path / "b.txt").write_text(json.dumps([{"text": text} for text in TEXTS[6:]], indent=1), encoding)
    assert read(tmp_path) == set(TEXTS)


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"text": ["a"]}', "holds list"), ('{"text": "a', "is not JSON;"), ('{"text": "\\ud83d"}', "surrogate")],
)
def test_what_is_wrong_with_a_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=f"line 1.* {said}"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json"])
def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    assert read(rows(tmp_path / name, [*TEXTS[:5], None, *TEXTS[5:]])) == set(TEXTS)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1 row has no text (null) and is left out" in said and f" 6 of {name}" in said
    assert read(rows(tmp_path / name, [None, *TEXTS, None])) == set(TEXTS)
    assert "2 rows have no text" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_objects_without_the_column_that_others_have(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    """Spark leaves out fields that are null."""
    found = [{"id": 1}, {}, *({"id": 2, "text": text} for text in TEXTS), {"id": 3}]
    lines = json.dumps(found) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in found)
    (tmp_path / name).write_text(lines)
    assert read(tmp_path / name) == set(TEXTS)
    said = capsys.readouterr().err
    assert "3 rows have no text (null) and are left out, the first is " in said and f" 1 of {name}" in said
    with pytest.raises(
        UserError, match=r"1 is not a JSON object with a text in 'cuerpo' \(it has 'id'\); .*CORPUS_COLUMN="
    ):
        read(tmp_path / name, column="cuerpo")


def test_a_mistyped_column_is_told_before_all_of_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"cuerpo": "a"}\n' * 20_000 + b"\xff")
    with pytest.raises(UserError, match=r"line 1 .*'cuerpo'"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_under_the_name_of_lines(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps([{"text": text} for text in TEXTS], indent=indent))
    with pytest.raises(UserError, match=r"line 1 is .*named? .*\.json"):
        read(tmp_path / "a.jsonl")


def test_missing_numbers_of_pandas_are_rows_without_text(tmp_path: Path) -> None:
    assert read(rows(tmp_path / "a.jsonl", [*TEXTS, float("nan")])) == set(TEXTS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_conversations(tmp_path: Path, name: str) -> None:
    for first, second in (("role", "content"), ("from", "value")):
        values = [[{first: "user", second: text}] for text in TEXTS]
        with pytest.raises(UserError, match=r"column 'messages' holds conversations .*CORPUS_COLUMN="):
            read(rows(tmp_path / name, values, "messages"), column="messages")
        with pytest.raises(UserError, match=r"'?messages'?.*CORPUS_COLUMN="):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_column_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"cuerpo.*CORPUS_COLUMN="):
        read(rows(tmp_path / name, TEXTS, "cuerpo"))


# Markers


MARKED = {
    "a line each": "".join(f"<|startoftext|>{text}<|endoftext|>\n" for text in TEXTS),
    "one line": "".join(f"<|startoftext|>{text}<|endoftext|>" for text in TEXTS),
    "across lines": "".join(f"<|startoftext|>\n{text}\n<|endoftext|>\n" for text in TEXTS),
    "ends alone": "<|endoftext|>".join(TEXTS),
    "ends with space": " <|endoftext|> ".join(TEXTS),
    "starts alone": "".join(f"<|startoftext|>{text}\n" for text in TEXTS),
    "starts with the end's": "".join(f"<|endoftext|>{text}\n" for text in TEXTS),
    "lines": "\n<|endoftext|>\n".join(TEXTS),
    "capitals": "\n<|ENDOFTEXT|>\n".join(TEXTS),
    "spaces inside": "<| endoftext |>".join(TEXTS),
    "lines, and one at an end of a line": "\n<|endoftext|>\n".join(TEXTS).replace(
        "\n<|endoftext|>", "<|endoftext|>", 1
    ),
    "Windows": "\r\n<|endoftext|>\r\n".join(text.replace("\n", "\r\n") for text in TEXTS),
}


@pytest.mark.parametrize("form", MARKED)
def test_markers_end_documents(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.txt").write_bytes(MARKED[form].encode())
    assert read(tmp_path / "a.txt") == set(TEXTS)


@pytest.mark.parametrize("marker", ["</s>", "[EOS]", "<|end_of_text|>"])
def test_markers_of_other_tokenizers_in_one_file(tmp_path: Path, marker: str) -> None:
    """Without the model's tokenizer they might be text, so that the user is told what to write instead."""
    (tmp_path / "a.txt").write_text(f"{marker}\n".join(TEXTS), encoding="utf-8")
    with pytest.raises(UserError, match=r"a line <.endoftext.> in the place of each") as raised:
        read(tmp_path / "a.txt")
    assert f"if {marker} ends a document" in str(raised.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_markers_in_rows(tmp_path: Path, name: str) -> None:
    marked = [f"<|startoftext|>{text}<|endoftext|>" for text in TEXTS[:4]]
    marked += [f"<|endoftext|>{text}" for text in TEXTS[4:8]] + ["<|endoftext|>".join(TEXTS[8:])]
    assert read(rows(tmp_path / name, marked)) == set(TEXTS)


def test_markers_in_indexed_files(tmp_path: Path) -> None:
    """The index decides the side of a file; what its markers divide stays on that side."""
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.txt").write_text(f"<|endoftext|>{text}<|endoftext|>Otra {number}.", encoding="utf-8")
    write_index(tmp_path)
    calibration, test = load_splits(Source(str(tmp_path)))
    assert [text for text in calibration.documents if text in TEXTS] == [TEXTS[n] for n in (1, 4, 7, 10)]
    assert len(calibration.documents) == 8 and len(test.documents) == 14


@pytest.mark.parametrize(
    "mention",
    [
        "El marcador <|endoftext|> separa textos.",
        "GPT-2 escribe `<|endoftext|>` al final; otros, «<|startoftext|>» al principio.",
        'Su nombre ("<|endoftext|>") lo dice.',
        "El último es <|endoftext|>.",
        "Tras <|endoftext|>, empieza otro.",
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_text_about_markers_stays_whole(
    tmp_path: Path, mention: str, name: str, capsys: pytest.CaptureFixture
) -> None:
    texts = [*TEXTS, mention]
    if name == "a.txt":
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    else:
        rows(tmp_path / name, texts)
    assert read(tmp_path / name) == set(texts)
    assert "1 of its documents have <|endoftext|>" in capsys.readouterr().err


def test_texts_in_small_letters_are_divided(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" <|endoftext|> ".join(["uno", "dos", "tres", "cuatro", "cinco"]))
    assert read(tmp_path / "a.txt") == {"uno", "dos", "tres", "cuatro", "cinco"}


def test_scripts_without_capitals_are_divided(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("你好 <|endoftext|> 世界", encoding="utf-8")
    assert read(tmp_path / "a.txt") == {"你好", "世界"}


def test_one_text_that_speaks_of_a_marker_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hola <|endoftext|> bien")
    with pytest.raises(UserError, match="a marker amid a sentence is text; put "):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("first", ["[Nota] uno", '["uno"] dijo', "[\nuno", "[{nombre}] uno", "[1]", '{"uno"}', '"uno"'])
def test_a_text_in_brackets_is_no_json(tmp_path: Path, first: str) -> None:
    (tmp_path / "a.txt").write_text(f"{first}\n<|endoftext|>\ndos")
    assert read(tmp_path / "a.txt") == {first, "dos"}


# Lines and articles


def test_a_line_each(tmp_path: Path) -> None:
    lines = [f"Una frase {number} de otra cosa." for number in range(1500)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"1 non-empty documents.*CORPUS_BY=line \(--corpus-by line\)"):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", by="line") == set(lines)
    (tmp_path / "b.txt").write_bytes("\r\n\r\n".join(lines).encode("utf-16"))
    assert read(tmp_path, by="line") == set(lines)


def test_two_lists_of_lines_are_read_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text("\n".join(f"{name}, frase {n}" for n in range(1200)))
    assert len(read(tmp_path)) == 2
    assert "CORPUS_BY=line" in capsys.readouterr().err
    read(tmp_path, by="line")
    assert capsys.readouterr().err == ""


def test_lines_of_an_indexed_folder(tmp_path: Path) -> None:
    """A line that occurs on both sides of the index calibrates only."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"—Sí.\nNúmero {number}.\n", encoding="utf-8")
    write_index(tmp_path)
    assert read(tmp_path, by="line") == {"—Sí.", "Número 0.", "Número 1.", "Número 2."}


ARTICLES = [
    f"= Título {n} =\n\nUna línea = otra .\n\n= = Sección = =\n\nMás de {n} .\n\n= = = Menor = = =\n\nFin ."
    for n in range(9)
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt", "wiki.train.tokens"])
def test_articles(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    """WikiText's rows are lines of articles, most of them with a space on both sides, or with a line end."""
    lines = ["", *(line and f" {line} " for text in ARTICLES for line in (*text.split("\n"), ""))]
    file = tmp_path / name
    if name.startswith("a.") and name != "a.txt":
        rows(file, [f"{line}\n" if number % 2 else line for number, line in enumerate(lines)])
        assert len(read(file)) > len(ARTICLES)
        assert "CORPUS_BY=article" in capsys.readouterr().err
    else:
        file.write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(UserError, match="CORPUS_BY=article"):
            read(file)
    expected = {"\n".join(line.strip() for line in text.split("\n")) for text in ARTICLES}
    found = read(file, by="article")
    assert {"\n".join(line.strip() for line in text.split("\n")) for text in found} == expected
    assert capsys.readouterr().err == ""


def test_rows_of_lines_with_blanks_between(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    read(rows(tmp_path / "a.jsonl", [row for n in range(40) for row in (f"Frase {n}.", "")]))
    assert "40 of its 80 rows are blank" in capsys.readouterr().err


def test_whole_articles_and_prose_give_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    read(rows(tmp_path / "a.jsonl", ARTICLES))
    read(CORPUS)
    read(Path(shutil.copytree(CORPUS, tmp_path / "es", ignore=shutil.ignore_patterns("index.json"))))
    assert capsys.readouterr().err == ""


def test_unknown_way_to_divide(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CORPUS_BY=page: choose one from document, line, article"):
        read(rows(tmp_path / "a.jsonl", TEXTS), by="page")
