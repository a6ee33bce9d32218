"""Recipes that are made together: the bytes of each alone, what is done once for all, and what is left after an error."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, Split, load_calibration
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import Artifact
from cuantiza.core.store.digests import sha256_file
from cuantiza.export.stage import export
from cuantiza.quantize import layers
from cuantiza.quantize.decide import blocks, calibrate
from cuantiza.quantize.decide.blocks import open_block
from cuantiza.quantize.decide.blocks import split as blocks_of
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.layers import calibrate_recipes
from cuantiza.quantize.recipes.registry import RECIPES, MixedStaticInt8, Recipe, WeightOnly, least_opset
from cuantiza.quantize.rewrite import fuse_attention
from cuantiza.quantize.settings import Calibration
from cuantiza.quantize.stage import Wanted, inputs_of, opened, quantize_all

from helpers import CORPUS, ES_MINI, edit_config, edit_weights

SOURCE = Source(str(CORPUS))
LITTLE = Calibration(windows=4, tokens=96, minimum=4)
# As the recipes themselves, int4-weight takes more windows. int8-weight has other ones, which no other recipe shares.
QUICK = {
    "int8-dynamic": LITTLE,
    "int8-static": LITTLE,
    "int8-weight": Calibration(windows=5, tokens=64, minimum=4),
    "int4-weight": Calibration(windows=7, tokens=96, minimum=4),
}
FLOATS = ["fp32-ort", "fp16", "fp16-ort", "bf16", "bf16-ort"]
NAMES = [name + form for form in ("", "-ort") for name in QUICK]


def quick(name: str) -> Recipe:
    return dataclasses.replace(RECIPES[name], calibration=QUICK[name.removesuffix("-ort")])


@pytest.fixture(scope="module")
def split() -> Split:
    return load_calibration(SOURCE)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The fp32 artifact of es-mini's first layer."""
    folder = shutil.copytree(ES_MINI, tmp_path_factory.mktemp("checkpoints") / "first")
    edit_config(folder, n_layer=1)
    edit_weights(
        folder,
        lambda weights: [weights.pop(name) for name in list(weights) if ".h." in f".{name}" and "h.0." not in name],
    )
    return export(folder, tmp_path_factory.mktemp("artifacts"))


def make(parent: Artifact, recipes: dict[str, Recipe], folder: Path) -> dict[str, Artifact]:
    """Make the artifacts folder/NAME, as the command does."""
    with opened(parent.path, folder) as found:
        made = quantize_all(found, [Wanted(folder / name, name, recipe) for name, recipe in recipes.items()], SOURCE)
    return dict(zip(recipes, made, strict=True))


def test_each_has_the_bytes_that_it_has_alone(fp32: Artifact, split: Split, tmp_path: Path) -> None:
    made = make(fp32, {name: quick(name) for name in NAMES}, tmp_path / "together")
    for name in NAMES:
        work, manifest = tmp_path / name, made[name].manifest
        work.mkdir()
        details = quick(name).make(fp32.path, work, split)
        assert {file.name: sha256_file(file) for file in work.iterdir()}.items() <= {
            name: file.sha256 for name, file in manifest.files.items()
        }.items()
        assert json.loads(json.dumps(details)) == json.loads(json.dumps(manifest.details))
        assert manifest.inputs == inputs_of(fp32, quick(name), split)


def test_every_block_is_observed_once_and_both_forms_share_their_decisions(
    fp32: Artifact, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(blocks, "open_block", lambda *those: ran.append(those[1]) or open_block(*those))
    nearest = WeightOnly(
        8, None, symmetric=True, rounding="nearest", calibration=dataclasses.replace(LITTLE, windows=6)
    )
    recipes = [quick("int8-dynamic"), nearest, quick("int8-dynamic-ort")]
    dynamic, other, ort = calibrate_recipes(recipes, fp32.path, tmp_path, split)
    assert len(ran) == len(blocks_of(dynamic.model.graph)) == 2 + 1
    assert ort.decisions is dynamic.decisions and ort.model is dynamic.model
    assert other.model is not dynamic.model and other.decisions.keys() == dynamic.decisions.keys()
    assert (len(dynamic.windows), len(other.windows)) == (4, 6) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [None, 5])
def test_windows_are_those_of_each_recipe_alone(
    seed: int | None, fp32: Artifact, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model writes is written once for each length; a text of several documents is cut where each one needs."""
    text = split if seed is None else Split("calibration", (), seed)
    wanted = [Calibration(windows, tokens, 1) for windows, tokens in ((3, 24), (6, 24), (2, 16), (3, 24), (9, 24))]
    alone = [calibration_windows(fp32.path, text, one) for one in wanted]
    calls = []
    monkeypatch.setattr(
        layers, "calibration_windows", lambda *those: calls.append(those) or calibration_windows(*those)
    )
    found = layers._windows_of(wanted, fp32.path, text)
    assert len(calls) == (4 if seed is None else 2)
    for ours, theirs in zip(found, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert layers._with_common_text(found) == [[4, 1, 0, 3], [2]]


def test_what_is_finished_before_an_error_is_published_and_not_made_again(
    fp32: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Both are written after the common calibration. The error names its recipe, and nothing half-written is left."""
    # Its budget is measured after calibration, and windows of one token predict nothing.
    short = dataclasses.replace(quick("int8-static"), calibration=Calibration(windows=4, tokens=1, minimum=4))
    odd = MixedStaticInt8(static=short)
    recipes = {"int8-dynamic": quick("int8-dynamic"), "odd": odd, "fp16": RECIPES["fp16"]}
    folder = tmp_path / "made"
    with pytest.raises(UserError, match=r"^odd: .*takes one token at a time"):
        make(fp32, recipes, folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["fp16", "int8-dynamic"]
    before = (folder / "int8-dynamic").stat().st_ino
    capsys.readouterr()
    make(fp32, recipes | {"odd": MixedStaticInt8(static=quick("int8-static"))}, folder)
    printed = capsys.readouterr().err
    assert "int8-dynamic: up to date" in printed and "odd: new" in printed and "odd: " in printed.splitlines()[-1]
    assert (folder / "int8-dynamic").stat().st_ino == before


def test_a_recipe_that_cannot_be_used_does_not_stop_the_others(
    fp32: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tiny = dataclasses.replace(
        RECIPES["int-mixed"], max_bytes="9kB", calibration=dataclasses.replace(LITTLE, minimum=3)
    )
    with pytest.raises(UserError, match=r"^tiny: max_bytes are 9,000, .* all in 4 bits"):
        make(fp32, {"tiny": tiny, "int8-dynamic": quick("int8-dynamic")}, tmp_path / "made")
    assert (tmp_path / "made/int8-dynamic/manifest.json").is_file() and not (tmp_path / "made/tiny").exists()
    less = dataclasses.replace(tiny, max_bytes="8kB")
    with pytest.raises(UserError, match=r"^less: max_bytes are 8,000"):
        make(fp32, {"tiny": tiny, "less": less}, tmp_path / "two")
    assert "failed    tiny: max_bytes are 9,000" in capsys.readouterr().err
    both = {"tiny": tiny, "tiny-ort": dataclasses.replace(tiny, target="ort")}
    with pytest.raises(UserError, match=r"^tiny, tiny-ort: max_bytes are 9,000, .* all in 4 bits"):
        make(fp32, both, tmp_path / "both")


def test_portable_recipes_are_made_where_the_ort_form_is_refused(
    fp32: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a graph of another exporter, whose attention is not found."""
    monkeypatch.setattr(fuse_attention, "_find_all", lambda graph: [])
    recipes, split = [quick("int8-dynamic"), quick("int8-dynamic-ort")], load_calibration(SOURCE)
    portable, ort = calibrate_recipes(recipes, fp32.path, tmp_path, split)
    recipes[0].make(fp32.path, tmp_path, split, portable)
    assert (tmp_path / "model.onnx").is_file()
    with pytest.raises(UserError, match="use the recipe without -ort"):
        recipes[1].make(fp32.path, tmp_path, split, ort)


def test_no_thread_is_the_first_to_read_a_weight(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx_ir maps a tensor of a file when it is first read; two threads that do so at once fail (an untied head)."""
    folder = shutil.copytree(ES_MINI, tmp_path / "untied")
    edit_config(folder, n_layer=1, tie_word_embeddings=False)

    def change(weights: dict) -> None:
        for name in [name for name in weights if ".h." in f".{name}" and "h.0." not in name]:
            del weights[name]
        weights["lm_head.weight"] = weights["transformer.wte.weight"] * 0.5

    edit_weights(folder, change)
    fp32 = export(folder, tmp_path / "artifacts")
    load = ir.ExternalTensor._load

    def load_in_the_main_thread(tensor: ir.ExternalTensor) -> None:
        assert threading.current_thread() is threading.main_thread(), tensor.name
        load(tensor)

    monkeypatch.setattr(ir.ExternalTensor, "_load", load_in_the_main_thread)
    calibrate_recipes([quick("int8-dynamic"), quick("int8-static")], fp32.path, tmp_path, split)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_no_thread_of_a_pool_waits_for_work_that_none_is_free_for(threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda ten: calibrate._spread(pool, lambda one: 10 * ten + one, range(5)), range(4))
        assert list(found) == [[10 * ten + one for one in range(5)] for ten in range(4)]


def test_after_an_error_no_job_decides_on_further_blocks(
    fp32: Artifact, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other job is still at the first of three blocks then. A thread may already wait for that to begin the second."""
    decide, decided, stopped = calibrate._JobRunner.decide, [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait)

    def one_fails(runner: calibrate._JobRunner, number: int, *args: object) -> None:
        if runner.job.plan.ranges == "row":
            raise ValueError("this job fails")
        assert stopped.wait(60)
        decided.append(number)
        decide(runner, number, *args)

    monkeypatch.setattr(calibrate, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(calibrate._JobRunner, "decide", one_fails)
    with pytest.raises(ValueError, match="this job fails"):
        calibrate_recipes([quick("int8-dynamic"), quick("int8-static")], fp32.path, tmp_path, split)
    assert decided in ([0], [0, 1])


@pytest.mark.parametrize("name", ["int-mixed", "int-mixed-ort", "int4-weight"])
def test_an_opset_that_is_too_low_is_refused_before_anything_is_calibrated(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuantiza.core.machine import process

    parent = export(tiny_folder, tmp_path / "artifacts", opset=20)
    for work in ("Remote", "isolated"):
        monkeypatch.setattr(process, work, lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(UserError, match=r"opset 20 .*OPSET=21"):
        make(parent, {"int8-dynamic": RECIPES["int8-dynamic"], name: RECIPES[name]}, tmp_path / "made")
    assert not list((tmp_path / "made").glob("*/manifest.json"))


def test_a_form_for_onnx_runtime_needs_no_opset(tiny_folder: Path, tmp_path: Path) -> None:
    parent = export(tiny_folder, tmp_path / "artifacts", opset=18)
    names = [name for name in NAMES if name.endswith("-ort") or not least_opset(RECIPES[name])]
    made = make(
        parent, {name: quick(name) for name in names} | {name: RECIPES[name] for name in FLOATS}, tmp_path / "made"
    )
    ids = np.arange(1, 40)[None]
    logits = {name: Runtime(item.model).forward(ids) for name, item in made.items()}
    assert all(np.isfinite(found).all() for found in logits.values())
    for name in ("int8-dynamic", "int8-static"):  # of the same integers, but floats are added in another order
        np.testing.assert_allclose(logits[f"{name}-ort"], logits[name], atol=0.1)
    # What is made of an artifact that is quantized already says of itself that nothing is left to do.
    with pytest.raises(UserError, match="has no linear layer"):
        make(made["int4-weight-ort"], {"int4-weight": quick("int4-weight")}, tmp_path / "again")
