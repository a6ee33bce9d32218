"""Large data sets of the hub are streamed until there is enough text, which is kept for later runs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.inputs.texts import documents

from helpers import ROOT
from hub_stub import Hub, serving

MOST = 300_000  # bytes, of which the data sets here have four times as many
LOAD = f"""
import json, sys
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.inputs.texts import documents
documents.HUB_BYTES = {MOST}
for fields in json.loads(sys.argv[1]):
    try:
        print(json.dumps([split.documents for split in load_splits(Source(**fields))]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def texts(shard: int) -> list[str | None]:
    return [None if n % 100 == 50 else f"Documento {shard}, {n}: " + "palabra " * (n % 40) for n in range(600)]


def parquet(values: list) -> bytes:
    table = pyarrow.table({"n": range(len(values)), "text": values})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, compression=None, use_dictionary=False, row_group_size=100)
    return file.getvalue()


def lines(values: list) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in values).encode()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as stub:
        for name, write, suffix in (("tabla", parquet, "parquet"), ("lineas", lines, "jsonl")):
            files = {f"train-{shard:05}-of-00012.{suffix}": write(texts(shard)) for shard in range(12)}
            stub.add(f"owner/{name}", files, kind="datasets")
        stub.add("owner/poco", {"train.jsonl": lines(texts(0))}, kind="datasets")
        yield stub


@pytest.fixture(scope="module")
def load(hub: Hub, tmp_path_factory: pytest.TempPathFactory):
    """`load(*fields, env=...)`: what loading each of the sources gives, in one process, and what it says."""
    home = tmp_path_factory.mktemp("hf")

    def call(*fields: dict, env: dict[str, str] | None = None) -> tuple[list, str]:
        given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""} | (env or {})
        done = subprocess.run(
            [sys.executable, "-c", LOAD, json.dumps(fields)],
            cwd=ROOT,
            env={**os.environ, **given},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    return call


def test_streamed_until_there_is_enough(
    hub: Hub, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A streamed data set gives the split of the same text in a file of which as much is read; later it needs no hub."""
    wanted = [{"spec": f"owner/{name}"} for name in ("tabla", "lineas", "poco")]
    found, said = load(*wanted, {"spec": "owner/tabla", "column": "cuerpo"}, {"spec": "owner/lineas", "column": "n"})

    (tmp_path / "c.jsonl").write_bytes(b"".join(lines(texts(shard)) for shard in range(12)))
    monkeypatch.setattr(documents, "FILE_BYTES", MOST)
    local = [list(split.documents) for split in load_splits(Source(str(tmp_path / "c.jsonl")))]
    assert found[0] == found[1] == local and 0 < len(local[0] + local[1]) < 4000
    (tmp_path / "few.jsonl").write_bytes(lines(texts(0)))
    assert found[2] == [list(split.documents) for split in load_splits(Source(str(tmp_path / "few.jsonl")))]
    assert "no column 'cuerpo' but n, text" in found[3] and "column 'n' holds int, not text" in found[4]
    assert said.count("only its beginning is streamed") == 4 and "owner/poco: has" not in said
    # The shards that follow the text that is used were not asked for.
    assert "train-00000-of-00012.jsonl" in hub.transferred() and "train-00000-of-00012.parquet" in hub.transferred()
    assert not {name for name in hub.transferred() if name.startswith(("train-00008", "train-00011"))}

    hub.requests.clear()
    again, said = load(*wanted, env={"HF_HUB_OFFLINE": "1"})
    assert again == found[:3] and not hub.requests
    assert said.count("streamed before; delete") == 2
    capsys.readouterr()
