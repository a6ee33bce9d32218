"""Unusual shapes: every recipe gives an artifact that runs, or one line, however small or odd the model is.

The models are built without transformers, with random weights and a tokenizer of single characters.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from cuantiza.core import contract
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, Split
from cuantiza.core.inputs.gpt2_config import GPT2Config, parse_config
from cuantiza.core.inputs.weights.files import Weight
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.onnx.genai_config import GENAI_CONFIG
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store import artifact, folders
from cuantiza.export.graphs.gpt2 import build
from cuantiza.quantize.recipes.registry import RECIPES, MixedWeightOnly, WeightOnly
from cuantiza.quantize.rewrite import onnxruntime_tools
from cuantiza.quantize.stage import quantize
from cuantiza.quantize.steps import write_graph
from cuantiza.quantize.weights.gptq import gptq
from cuantiza.quantize.weights.rounding import Grid, round_to_nearest

# Heads of 10 and 13 channels and more; blocks of 64 that are larger than a channel, or end in the midst of one; a
# vocabulary that is smaller than a block; fewer channels than those that int8-static may keep in float.
SHAPES = {
    "heads-of-10": {"n_embd": 40, "n_head": 4, "n_inner": 33, "vocab_size": 97, "n_layer": 2},
    "heads-of-13": {"n_embd": 26, "n_head": 2, "n_inner": 1, "vocab_size": 2},
    "one-channel": {"n_embd": 1, "n_head": 1},
    "two-channels": {"n_embd": 2, "n_head": 2, "n_positions": 2, "n_layer": 2},
    "three-channels": {"n_embd": 3, "n_head": 1},
    "one-wide-head": {"n_embd": 136, "n_head": 1, "n_inner": 100},
}
# Recipes without calibration and those with it, portable and not; the others differ from these in constants.
GRID = tuple(
    name for name in RECIPES if name not in ("bf16", "fp16-ort", "bf16-ort", "int8-static-mixed-ort", "int-mixed-ort")
)


@dataclass(frozen=True)
class Model:
    """An fp32 artifact's folder, its configuration, a calibration split, and logits [1, T, V] of `ids` [1, T]."""

    folder: Path
    config: GPT2Config
    split: Split
    ids: np.ndarray
    logits: np.ndarray


def make_model(folder: Path, **shape: object) -> Model:
    """Write an fp32 artifact of random weights to `folder`, without publishing it."""
    fields = {"vocab_size": 64, "n_positions": 24, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0}
    fields |= {"model_type": "gpt2", "eos_token_id": 0} | shape
    config = parse_config(fields, folder / "config.json")
    rng = np.random.default_rng(0)
    weights: dict[str, Weight] = {}

    def add(name: str, *sizes: int, mean: float = 0) -> None:
        array = (mean + 0.2 * rng.normal(size=sizes)).astype(np.float32)
        weights[name] = Weight(sizes, "float32", lambda: array)

    width, inner = config.n_embd, config.n_inner
    linear = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    linear |= {"mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}
    norms = ["ln_f"]
    for layer in range(config.n_layer):
        norms += [f"h.{layer}.ln_1", f"h.{layer}.ln_2"]
        for name, sizes in linear.items():
            add(f"h.{layer}.{name}.weight", *sizes)
            add(f"h.{layer}.{name}.bias", sizes[1])
    for name in norms:
        add(f"{name}.weight", width, mean=1)
        add(f"{name}.bias", width)
    add("wte.weight", config.vocab_size, width)
    add("wpe.weight", config.n_positions, width)
    onnx_file.save(build(config, weights, 21, folder), folder)
    vocabulary = {chr(ord("a") + number): number for number in range(config.vocab_size)}
    Tokenizer(models.BPE(vocabulary, [])).save(str(folder / "tokenizer.json"))
    for name, content in {"config.json": fields, "generation_config.json": {}, "tokenizer_config.json": {}}.items():
        (folder / name).write_text(json.dumps(content))
    split = Split("calibration", ("".join(rng.choice(list(vocabulary), 20 * config.n_positions)),))
    ids = rng.integers(0, config.vocab_size, (1, min(10, config.n_positions)))
    return Model(folder, config, split, ids, Runtime(folder / "model.onnx", 1).forward(ids))


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])


def assert_runs(path: Path, model: Model, exact: bool) -> None:
    """The file's logits are finite and near fp32's; they are the same through a cache, if `exact` to the last digits."""
    runtime, ids = Runtime(path, 1), model.ids
    whole = runtime.forward(ids)
    spread = model.logits.std()
    assert np.isfinite(whole).all() and np.abs(whole - model.logits).mean() < 0.3 * spread
    cache, steps = runtime.cache(1, ids.shape[1]), []
    for t in range(ids.shape[1]):
        steps.append(runtime.step(cache, ids[:, t : t + 1])[0])
    difference = np.abs(np.stack(steps) - whole[0])
    assert difference.max() < 1e-4 if exact else difference.mean() < 0.1 * spread


def about_attention(details: dict) -> int:
    """How many warnings are about attention; another one is about the tokenizer, which is not GPT-2's here."""
    return sum("attention" in text for text in details.get("warnings", []))


@pytest.mark.parametrize("name", GRID)
def test_every_recipe_takes_every_shape(name: str, model: Model, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    if isinstance(recipe, MixedWeightOnly):  # so small a graph has no weights to save at
        recipe = dataclasses.replace(recipe, max_bytes=None, max_kl=0.02)
    details = recipe.make(model.folder, tmp_path, model.split)
    # ort-dynamic has one scale for all tokens. The integers of the others may tip over by a float's last digit.
    assert_runs(
        tmp_path / "model.onnx", model, exact=name.startswith(("fp", "int8-weight")) and "8-weight-ort" not in name
    )
    if name.endswith("-ort"):
        fused = model.config.head_dim % 8 == 0
        assert details["fused_attention"] == (model.config.n_layer if fused else 0)
        assert about_attention(details) == (0 if fused else 1)
        assert fused or f"this model's have {model.config.head_dim}" in details["warnings"][0]
        search = json.loads((tmp_path / GENAI_CONFIG).read_text())["search"]
        assert search["past_present_share_buffer"] == fused == Runtime(tmp_path / "model.onnx", 1).in_place


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose heads have 10 channels."""
    return make_model(tmp_path_factory.mktemp("narrow"), n_embd=20)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [1, 7, 16, 64, 1024])
def test_weights_in_blocks_of_any_size(block: int, symmetric: bool, narrow: Model, tmp_path: Path) -> None:
    """Blocks of one input, blocks that do not divide the inputs, and blocks larger than a channel."""
    recipe = WeightOnly(8, block, symmetric, table_block=block, rounding="nearest", smoothing=())
    recipe.make(narrow.folder, tmp_path, narrow.split)
    assert_runs(tmp_path / "model.onnx", narrow, exact=False)


def test_attention_that_stays_is_said_each_time(
    narrow: Model, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest keeps the sentence, and it is printed when the artifact is up to date, too."""
    monkeypatch.setattr("cuantiza.core.machine.process.isolated", lambda function, *args, label: function(*args))
    fp32 = tmp_path / "narrow" / "fp32"
    work = tmp_path / "work"
    work.mkdir()
    for file in narrow.folder.iterdir():
        (work / file.name).write_bytes(file.read_bytes())
    with folders.locked(fp32.parent):
        artifact.publish(
            work,
            fp32,
            name="fp32",
            model="narrow",
            recipe={"type": "fp32"},
            inputs={},
            parent=None,
            calibration=None,
            versions={},
            details={},
        )
    for state in ("new", "up to date"):
        made = quantize(fp32, "fp32-ort", corpus=Source("unused"))
        sentence, *_ = made.manifest.details["warnings"]
        assert "a multiple of 8 channels, and this model's have 10" in sentence
        printed = capsys.readouterr().err
        assert f"warning   {sentence}" in " ".join(printed.split("\n")) and ("up to date" in printed) == (
            state == "up to date"
        )
    # Nothing promises a cache in place that the graph would copy.
    assert contract.IN_PLACE not in onnx_file.load(made.model).metadata_props


def test_attention_of_heads_of_8_is_fused(tmp_path: Path) -> None:
    made = make_model(tmp_path, n_embd=16)
    work = tmp_path / "work"
    work.mkdir()
    details = write_graph(made.folder, work, "ort", lambda model: {})
    assert details["fused_attention"] == 1 and about_attention(details) == 0


def test_a_window_of_one_token_measures_nothing(tmp_path: Path) -> None:
    """A model of one position predicts no token of its windows, so there is no perplexity to keep within a budget."""
    made = make_model(tmp_path, n_positions=1)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(UserError, match=r"takes one token at a time.*int8-static"):
        RECIPES["int8-static-mixed"].make(made.folder, work, made.split)
    RECIPES["int8-static"].make(made.folder, work, made.split)
    assert_runs(work / "model.onnx", made, exact=False)


@pytest.mark.parametrize("gram", [[[-1e-3]], [[1.0, 2.0], [2.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
def test_a_hessian_of_rounding_alone(gram: list[list[float]]) -> None:
    """It is not positive definite, so it has no Cholesky factor until enough is added to its diagonal."""
    weight = np.random.default_rng(0).normal(size=(len(gram), 5)).astype(np.float32)
    by_gptq, nearest = gptq(weight, np.array(gram, np.float32), Grid(8)), round_to_nearest(weight, Grid(8))
    assert np.abs(by_gptq.q.astype(int) - nearest.q).max() <= 127
    assert np.abs(by_gptq.dequantize() - weight).max() < np.abs(weight).max() / 10


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_without_a_finite_hessian_weights_are_rounded_to_nearest(value: float) -> None:
    """The squares of huge activations are beyond float32, and say nothing of how to round."""
    weight = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    rounded = gptq(weight, np.full((3, 3), value, np.float32), Grid(8))
    assert np.array_equal(rounded.q, round_to_nearest(weight, Grid(8)).q)


@pytest.mark.parametrize("name", ["ort-dynamic", "ort-static"])
def test_onnx_runtimes_tools_read_heads_from_the_graph(name: str, tmp_path: Path) -> None:
    """A config.json may name them hidden_size and num_attention_heads, as other models do."""
    made, other, wanted = (tmp_path / key for key in ("fp32", "other", "wanted"))
    for folder in (made, other, wanted):
        folder.mkdir()
    model = make_model(made)
    RECIPES[name].make(made, wanted, model.split)
    config = json.loads((made / "config.json").read_text())
    config |= {"hidden_size": config.pop("n_embd"), "num_attention_heads": config.pop("n_head")}
    (made / "config.json").write_text(json.dumps(config))
    RECIPES[name].make(made, other, model.split)
    assert (other / "model.onnx").read_bytes() == (wanted / "model.onnx").read_bytes()


@pytest.mark.parametrize("name", ["ort-dynamic", "ort-static"])
def test_onnx_runtimes_tools_write_no_weights_into_messages(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A protobuf message ends at 2 GB, so a larger model has to lie beside it, at every step."""
    made, work = tmp_path / "fp32", tmp_path / "work"
    made.mkdir()
    work.mkdir()
    model = make_model(made, n_inner=8192)
    sizes: dict[str, int] = {}
    finish = onnxruntime_tools._finish

    def spied(folder: Path) -> None:
        sizes.update({file.name: file.stat().st_size for file in folder.iterdir()})
        finish(folder)

    monkeypatch.setattr(onnxruntime_tools, "_finish", spied)
    RECIPES[name].make(made, work, model.split)
    whole = (made / "model.onnx").stat().st_size
    for step, part in (("optimized", 1.0), ("prepared", 1.0), ("quantized", 0.24)):
        assert sizes[f"{step}.onnx"] < 0.1 * whole and sizes[f"{step}.onnx.data"] > 0.9 * part * whole
    assert [file.name for file in work.iterdir()] == ["model.onnx"]
    assert Path.cwd() != work
