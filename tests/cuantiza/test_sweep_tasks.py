"""The tasks of a sweep without running one: parts of a text, groups of artifacts, kept cells, the Pareto front."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cuantiza.core.cli import source_of
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source
from cuantiza.eval.measure.estimates import text_size
from cuantiza.eval.measure.score import Scores
from cuantiza.sweep.__main__ import _arguments
from cuantiza.sweep.driver import Settings, Sweep
from cuantiza.sweep.executor import Local
from cuantiza.sweep.grid import Cell, read_grid
from cuantiza.sweep.page import markdown
from cuantiza.sweep.result import Cell as Done
from cuantiza.sweep.result import front, result
from cuantiza.sweep.tasks.build import Export
from cuantiza.sweep.tasks.made import Made
from cuantiza.sweep.tasks.measure import merge
from cuantiza.sweep.tasks.parts import groups, shards
from cuantiza.sweep.tasks.store import Store

from helpers import CORPUS, ES_MINI, assert_user_error, report_row, stage


def scores(rng: np.random.Generator, document: np.ndarray, with_kl: bool) -> Scores:
    n = len(document)
    against = (rng.random(n), rng.random(n) < 0.5) if with_kl else (None, None)
    return Scores(document, rng.random(n), rng.random(n) < 0.5, *against)


def test_parts_of_a_text_make_the_whole() -> None:
    rng = np.random.default_rng(0)
    documents = [[0] * int(n) for n in rng.integers(1, 900, 23)]
    lengths = [len(ids) for ids in documents]
    for tokens in (1, 700, 4096, 10**9):
        runs = shards(documents, tokens)
        assert [n for first, end in runs for n in range(first, end)] == list(range(23))
        sums = [sum(lengths[first:end]) for first, end in runs]
        assert all(size >= tokens for size in sums[:-1])
        assert all(size - lengths[end - 1] < tokens for size, (_, end) in zip(sums, runs, strict=True))
        numbers = np.repeat(np.arange(23), lengths)
        whole = [scores(rng, numbers, with_kl) for with_kl in (False, True)]

        def part(own: Scores, first: int, end: int) -> Scores:
            at = (own.document >= first) & (own.document < end)
            fields = (own.document, own.nll, own.right, own.kl, own.same_top)
            return Scores(*(None if value is None else value[at] for value in fields))

        merged = merge([[part(own, *run) for own in whole] for run in runs])
        for own, again in zip(whole, merged, strict=True):
            for field in ("document", "nll", "right", "kl", "same_top"):
                assert np.array_equal(getattr(own, field), getattr(again, field)) or getattr(own, field) is None


def test_artifacts_are_scored_together_where_they_are_small(tmp_path: Path) -> None:
    sizes = {"fp32": 100, "a": 26, "b": 26, "c": 26, "d": 26, "e": 120, "f": 10}
    made = {Cell("m", name, "t"): Made(tmp_path, name, size, size) for name, size in sizes.items()}
    base = Cell("m", "fp32", "t")
    names = [[cell.recipe for cell in group.wanted] for group in groups(base, list(made), made, None)]
    assert names == [["fp32", "a", "b", "c"], ["d"], ["e"], ["f"]]
    assert [group.others for group in groups(base, [base], made, None)] == [()]
    assert groups(base, [], made, None) == []
    assert text_size(("a b", "c")).words == 3


def row(name: str, size: int, delta: float, speedup: float) -> Done:
    fields = report_row(name, bytes=size, delta_ln_ppl=delta)
    fields["decode"][0]["speedup"] = speedup
    machine = {"cpu": "a CPU", "processors": 2, "threads": 1, "memory_bytes": 2**34, "system": "Linux"}
    named = {"recipe": name, "model": "m", "corpus": "c", "artifact": "0" * 64, "machine": machine}
    return Done.model_validate(fields | named)


def test_the_front_is_what_no_other_beats() -> None:
    rows = [
        row("fp32", 100, 0, 1),
        row("small", 20, 0.01, 3),
        row("smaller and slower", 19, 0.01, 2),
        row("beaten", 20, 0.02, 3),
        row("same", 20, 0.01, 3),
        row("slow and better", 100, -0.001, 0.5),
    ]
    names = {item.name for item in front(rows)}
    assert names == {"fp32", "small", "smaller and slower", "same", "slow and better"}


def test_a_kept_cell_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    store, inputs = Store(tmp_path / "cells"), {"kind": "quality", "artifact": "a"}
    assert store.read(inputs) is None
    assert store.write(inputs, {"values": [0.1 + 0.2, 1e-300]}) == store.read(inputs) == {"values": [0.1 + 0.2, 1e-300]}
    assert store.read(inputs | {"artifact": "b"}) is None
    (file,) = (tmp_path / "cells").iterdir()
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert store.read(inputs) in (None, {"values": [0.1 + 0.2, 1e-300]})
        file.write_bytes(whole[:at])
        assert store.read(inputs) is None


def test_a_cell_without_its_baseline_has_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There would be nothing to compare it with, and the page is written all the same."""
    grid = read_grid([str(ES_MINI)], ["fp16"], [Source(str(CORPUS))])
    sweep = Sweep(grid, Settings(100, 64, 1, 1, 100), tmp_path, Local())
    first, other = grid.cells
    for step in ("_export", "_quantize", "_score", "_time"):
        monkeypatch.setattr(sweep, step, lambda: None)
    sweep.failed, sweep.quality, sweep.latency = {first: "gone"}, {other: {}}, {other: {}, first: {}}
    sweep.run()
    assert sweep.failed == {first: "gone", other: f"{first}, which it is compared with, has no result: gone"}
    assert not result(sweep).cells and "which it is compared with" in markdown(result(sweep))
    assert "Measured on ." not in markdown(result(sweep))


def test_options_of_texts_hold_for_all_of_them(tmp_path: Path) -> None:
    """As in `cuantiza quantize` and `eval`. Before anything runs, a column that only one has is told."""
    for name, column in (("uno", "cuerpo"), ("dos", "text")):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"{column}": "{name} {n}"}}\n' for n in range(9)))
    options = ("--corpora", tmp_path / "uno.jsonl", tmp_path / "dos.jsonl", "--corpus-column", "cuerpo")
    outputs = ("--work", tmp_path / "work", "--output", tmp_path / "report")
    assert_user_error(stage("cuantiza.sweep", *outputs, *options), "dos.jsonl: line 1", "CORPUS_COLUMN=")
    args = _arguments([*map(str, options), "--corpus-by", "line", "--corpus-config", "es", "--corpus-split", "test"])
    wanted = Source("a", "es", "test", "cuerpo", "line")
    assert source_of(args, "a") == wanted and _arguments(["--corpus-join"]).corpus_join == 1


def test_versions_of_a_folder_of_texts_have_names_of_their_own(tmp_path: Path) -> None:
    for name in ("v1.0", "v1.1"):
        (tmp_path / name).mkdir()
        for text in ("uno", "dos"):
            (tmp_path / name / f"{text}.txt").write_text(f"{text} de {name}")
    (tmp_path / "libro.txt").write_text("uno\n<|endoftext|>\ndos")
    given = [Source(str(tmp_path / name)) for name in ("v1.0", "v1.1", "libro.txt")]
    assert list(read_grid([str(ES_MINI)], ["fp16"], given).corpora) == ["v1.0", "v1.1", "libro"]


def test_the_base_of_an_adapter_is_found_from_the_users_folder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `cuantiza export` finds it, and without taking files of that folder for code."""
    shutil.copytree(tiny_folder, tmp_path / "bases/tiny")
    (adapter := tmp_path / "adapter").mkdir()
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "bases/tiny"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    shapes = {"A": (1, 32), "B": (96, 1)}
    module = "base_model.model.transformer.h.0.attn.c_attn"
    tensors = {f"{module}.lora_{part}.weight": np.ones(shape, np.float32) for part, shape in shapes.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (tmp_path / "cuantiza.py").write_text("raise SystemExit('no code of ours')")
    monkeypatch.chdir(tmp_path)
    grid = read_grid(["adapter"], ["fp16"], [Source(str(CORPUS))])
    sweep = Sweep(grid, Settings(100, 64, 1, 1, 100), tmp_path / "work", Local())
    sweep._export()
    assert not sweep.failed and [made.path.parent.name for made in sweep.made.values()] == ["adapter"]
    task = Export("adapter", grid.models["adapter"], tmp_path / "work", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"elsewhere: is not on .*in a folder that all machines see"):
        task.run()
