"""The `ort` target of Llama and its like: the portable form's logits, with the cache in place and the rotary embedding inside."""

import json
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.onnx.genai_config import GENAI_CONFIG
from cuantiza.core.run.runtime import Runtime
from cuantiza.export.examine import examine
from cuantiza.quantize.recipes.registry import RECIPES
from cuantiza.quantize.rewrite.fuse_attention import check_attention
from cuantiza.quantize.settings import Calibration

from helpers import ROOT, copy_tokenizer

TOKENS = 24
GENAI = ROOT / ".venv-runtimes/bin/python"
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


@dataclass(frozen=True)
class Kind:
    """A kind of model: fields of its config.json, and attributes of the GroupQueryAttention of each of its two layers."""

    model_type: str
    fields: dict
    first: dict
    second: dict
    rotary: bool = True


INSIDE = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}
OUTSIDE = {"num_heads": 4, "kv_num_heads": 2}
UNGROUPED, TURNED = {"num_heads": 4, "kv_num_heads": 4}, {"do_rotary": 1}
WINDOW, CAP = {"local_window_size": 6}, {"softcap": 2.0}
KINDS = {
    "llama": Kind("llama", {}, INSIDE, INSIDE),
    "long": Kind("llama", {"max_position_embeddings": 131072}, INSIDE, INSIDE),
    "longer": Kind("llama", {"max_position_embeddings": 131073}, OUTSIDE, OUTSIDE),
    "ungrouped": Kind("llama", {"num_key_value_heads": 4}, INSIDE | {"kv_num_heads": 4}, INSIDE | {"kv_num_heads": 4}),
    "scaled": Kind("llama", {"rope_parameters": YARN}, INSIDE, INSIDE),
    "narrow": Kind("llama", {"head_dim": 8}, OUTSIDE, OUTSIDE),
    "qwen2": Kind("qwen2", {}, INSIDE, INSIDE),
    "qwen3": Kind("qwen3", {}, INSIDE, INSIDE),
    "olmo2": Kind("olmo2", {}, INSIDE, INSIDE),
    "mistral": Kind("mistral", {"sliding_window": 6}, INSIDE | WINDOW, INSIDE | WINDOW),
    "smollm3": Kind("smollm3", {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2}, INSIDE, OUTSIDE),
    "phi3": Kind("phi3", {"head_dim": 32, "hidden_size": 128, "partial_rotary_factor": 0.5}, INSIDE, INSIDE),
    "glm": Kind("glm", {"partial_rotary_factor": 0.5}, OUTSIDE, OUTSIDE),
    "gemma3": Kind(
        "gemma3_text",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "query_pre_attn_scalar": 16},
        INSIDE | WINDOW,
        INSIDE,
    ),
    "gemma2": Kind(
        "gemma2",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        INSIDE | WINDOW | CAP,
        INSIDE | CAP,
    ),
}
KINDS |= {
    "opt": Kind("opt", {"ffn_dim": 128}, UNGROUPED, UNGROUPED, rotary=False),
    "gpt_neo": Kind(
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "window_size": 6},
        UNGROUPED,
        UNGROUPED | WINDOW,
        rotary=False,
    ),
    "gpt_neox": Kind("gpt_neox", {}, UNGROUPED, UNGROUPED),
    "gpt_neox whole": Kind("gpt_neox", {"rotary_pct": 1.0}, UNGROUPED | TURNED, UNGROUPED | TURNED),
    "phi": Kind("phi", {"partial_rotary_factor": 1.0}, INSIDE, INSIDE),
}
SHAPE = {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SENTENCES = tuple(f"La niña {word} el mar. " * 20 for word in ("ve", "oye", "ama"))


def make_fp32(model_type: str, folder: Path, **fields: object) -> Path:
    """The files of the fp32 artifact of a random model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE | fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name or ".ln_" in name:
                parameter.add_(1)
    model.save_pretrained(folder / "checkpoint")
    copy_tokenizer(folder / "checkpoint")
    (folder / "fp32").mkdir()
    onnx_file.save(examine(folder / "checkpoint", folder / "fp32", "graph").graph, folder / "fp32")
    return folder / "fp32"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """`make(kind, recipe)`: the folder of a kind's artifact, and the details of its manifest. Each is made once."""
    made, split = {}, Split("calibration", SENTENCES)
    folders = {}

    def call(kind, name):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            folder = make_fp32(KINDS[kind].model_type, folders[kind], **KINDS[kind].fields)
            made[kind, "fp32"] = folder, {}
        if (kind, name) not in made:
            recipe = RECIPES[name]
            if hasattr(recipe, "rounding"):
                recipe = replace(recipe, rounding="nearest", calibration=Calibration(8, 32))
            (work := folders[kind] / name).mkdir()
            made[kind, name] = work, recipe.make(folders[kind] / "fp32", work, split)
        return made[kind, name]

    return call


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(1, 8192, (3, TOKENS))


MASK = (np.arange(TOKENS) >= TOKENS - np.array([TOKENS, 13, 5])[:, None]).astype(np.int64)


def runtime(made):
    return Runtime(made[0] / "model.onnx", 1)


def token_by_token(model, ids, mask):
    past, steps = model.empty_past(len(ids)), []
    for t in range(ids.shape[1]):
        logits, past = model.extend(ids[:, t : t + 1], past, mask[:, : t + 1])
        steps.append(logits)
    return np.concatenate(steps, axis=1)


def attentions(folder):
    graph = onnx_file.load(folder / "model.onnx").graph
    return [node for node in graph if node.op_type == "GroupQueryAttention"], {node.op_type for node in graph}


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_the_portable_form(kind, make, ids):
    """Whole and token by token, alone and in a batch with padding on the left."""
    portable, fused = (runtime(make(kind, name)) for name in ("fp32", "fp32-ort"))
    real = MASK.astype(bool)
    expected = portable.forward(ids, MASK)[real]
    tolerance = {"rtol": 0, "atol": 1e-4 * expected.std()}
    assert np.allclose(fused.forward(ids, MASK)[real], expected, **tolerance)
    assert np.allclose(token_by_token(fused, ids, MASK)[real], expected, **tolerance)
    alone, ones = portable.forward(ids[:1]), np.ones((1, TOKENS), np.int64)
    assert np.allclose(fused.forward(ids[:1]), alone, **tolerance)
    assert np.allclose(token_by_token(fused, ids[:1], ones), alone, **tolerance)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["whole first", "padded first"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_prompt_and_what_follows_it(kind, order, make, ids):
    """A prompt of 14 tokens, in which one sequence has none yet, then single tokens, of which one sequence lacks two."""
    portable, fused = (runtime(make(kind, name)) for name in ("fp32", "fp32-ort"))
    mask = MASK[order].copy()
    mask[:, 16:18] *= np.array([1, 0, 1])[:, None]
    found = []
    for model in (portable, fused):
        past, steps = model.empty_past(3), []
        for piece in (slice(14), *(slice(t, t + 1) for t in range(14, TOKENS))):
            logits, past = model.extend(ids[:, piece], past, mask[:, : piece.stop])
            steps.append(logits)
        found.append(np.concatenate(steps, axis=1)[mask.astype(bool)])
    assert np.allclose(found[1], found[0], rtol=0, atol=1e-4 * found[0].std())


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_does_all_that_it_can(kind, make):
    folder, details = make(kind, "fp32-ort")
    nodes, others = attentions(folder)
    assert details["fused_attention"] == 2 == len(nodes) and not others & {"Softmax", "Where"}
    for node, expected in zip(nodes, (KINDS[kind].first, KINDS[kind].second), strict=True):
        found = {name: item.value for name, item in node.attributes.items() if name != "scale"}
        assert found == expected
        assert [value is None for value in node.inputs[7:11]] == [not found.get("do_rotary")] * 3 + [False]
    assert ("Split" in others) == (KINDS[kind].rotary and "do_rotary" not in KINDS[kind].first)


def test_what_onnx_runtime_does_at_load(make, tmp_path):
    """It folds cosines and sines of all positions, which would take 8 MB of the file, and fuses norms and SiLU."""
    portable, fused = (make("long", name)[0] / "model.onnx" for name in ("fp32", "fp32-ort"))
    assert fused.stat().st_size < 1.001 * portable.stat().st_size
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(fused, options, providers=["CPUExecutionProvider"])
    graph = ir.load(tmp_path / "optimized.onnx").graph
    counts = Counter(node.op_type for node in graph)
    assert (counts["GroupQueryAttention"], counts["SimplifiedLayerNormalization"], counts["QuickGelu"]) == (2, 5, 2)
    assert not counts.keys() & {"Range", "Cos", "Sin", "Reshape", "Transpose", "Pow", "Sigmoid"}
    tables = {value.name for node in graph if node.op_type == "GroupQueryAttention" for value in node.inputs[7:9]}
    assert [graph.initializers[name].shape.numpy() for name in sorted(tables)] == [(131072, 8)] * 2


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "narrow"])
def test_the_cache_is_updated_in_place(kind, make, ids):
    """A prompt in two pieces, and then token by token, in buffers that stay where they are."""
    portable, fused = (runtime(make(kind, name)) for name in ("fp32", "fp32-ort"))
    whole = portable.forward(ids[:1])[0]
    assert fused.in_place and not portable.in_place
    cache = fused.cache(1, TOKENS + 3)
    buffers = [value.data_ptr() for value in cache.past]
    found = [fused.step(cache, ids[:1, piece]) for piece in (slice(7), slice(7, 15))]
    found += [fused.step(cache, ids[:1, t : t + 1]) for t in range(15, TOKENS)]
    assert np.allclose(np.concatenate(found), whole[[6, *range(14, TOKENS)]], atol=1e-4 * whole.std(), rtol=0)
    assert [value.data_ptr() for value in cache.past] == buffers
    grown = portable.cache(1, TOKENS)
    portable.step(grown, ids[:1])
    for ours, theirs in zip(cache.past, grown.past, strict=True):
        assert np.allclose(ours.numpy()[:, :, :TOKENS], theirs.numpy(), atol=1e-4)


# Largest and mean |Δ logit| to the portable form as shares of the logits' spread, for the reasons of test_ort_target.py.
# Random weights have no structure that would dampen a rounding that tips.
LIMITS = {
    "fp16": (1e-4, 1e-5),
    "int8-dynamic": (0.5, 0.05),
    "int8-static": (0.5, 0.05),
    "int8-weight": (0.5, 0.05),
    "int4-weight": (0.5, 0.05),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "opt"])
def test_every_recipe_has_an_ort_form(kind, name, make, ids):
    portable, fused = (make(kind, form) for form in (name, f"{name}-ort"))
    largest, mean = LIMITS[name]
    expected = runtime(portable).forward(ids, MASK)[MASK.astype(bool)]
    found = np.abs(runtime(fused).forward(ids, MASK)[MASK.astype(bool)] - expected) / expected.std()
    assert found.max() <= largest and found.mean() <= mean, (found.max(), found.mean())
    sizes = [(folder / "model.onnx").stat().st_size for folder, _ in (portable, fused)]
    assert sizes[1] <= 1.001 * sizes[0]  # so the tied matrix is stored once, too


@pytest.mark.parametrize("name", ["int8-weight-ort", "int4-weight-ort"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_matmuls_that_read_the_same_value_are_one(kind, name, make, ids, tmp_path, monkeypatch):
    """Queries, keys and values, and gate and up-projection: 4 instead of 7 a layer, with the same logits bit by bit."""
    joined, _ = make(kind, name)
    monkeypatch.setattr("cuantiza.quantize.steps.join_matmuls", lambda graph: None)
    recipe = replace(RECIPES[name], rounding="nearest", calibration=Calibration(8, 32))
    recipe.make(joined.parent / "fp32", tmp_path, Split("calibration", SENTENCES))
    nodes = [[*onnx_file.load(folder / "model.onnx").graph] for folder in (joined, tmp_path)]
    counts = [Counter(node.op_type for node in graph)["MatMulNBits"] for graph in nodes]
    assert counts == [2 * 4 + 1, 2 * 7 + 1]
    # The operator splits queries, keys and values itself where nothing stands in between.
    packed = [node.inputs[1] is None for node in nodes[0] if node.op_type == "GroupQueryAttention"]
    assert packed == [kind == "llama"] * 2
    found, expected = (Runtime(folder / "model.onnx", 1).forward(ids, MASK) for folder in (joined, tmp_path))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["int8-dynamic-ort", "int8-static-ort"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_int8_matmuls_that_read_the_same_value_are_one(kind, name, make, ids, tmp_path, monkeypatch):
    """What quantizes the value that they read is there once, too, and the logits are the same bit by bit."""
    joined, _ = make(kind, name)
    for rewrite in ("dynamic", "static"):
        monkeypatch.setattr(f"cuantiza.quantize.rewrite.{rewrite}.group", lambda found, *_: [[one] for one in found])
    recipe = replace(RECIPES[name], rounding="nearest", calibration=Calibration(8, 32))
    recipe.make(joined.parent / "fp32", tmp_path, Split("calibration", SENTENCES))
    counts = [
        Counter(node.op_type for node in onnx_file.load(folder / "model.onnx").graph) for folder in (joined, tmp_path)
    ]
    assert [count["MatMulIntegerToFloat"] for count in counts] == [2 * 4 + 1, 2 * 7 + 1]
    assert counts[0]["QuantizeLinear"] < counts[1]["QuantizeLinear"]
    found, expected = (Runtime(folder / "model.onnx", 1).forward(ids, MASK) for folder in (joined, tmp_path))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["int8-dynamic-ort", "int8-static-ort", "int8-weight-ort"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2", "phi3", "gpt_neox", "opt"])
def test_only_the_logits_that_are_asked_for(kind, name, make, ids):
    """The last layer's MLP then sees fewer tokens than the layers before it."""
    model = runtime(make(kind, name))
    whole = model.forward(ids)
    assert np.array_equal(model.forward(ids, last=5), whole[:, -5:])
    assert np.allclose(model.step(model.cache(1, TOKENS), ids[:1]), whole[:1, -1], atol=1e-4)


@pytest.mark.parametrize(
    "name", ["fp32-ort", "int8-dynamic-ort", "int8-static-ort", "int8-weight-ort", "int4-weight-ort"]
)
def test_heads_that_the_operator_does_not_take(name, tmp_path):
    """The attention stays in standard operators, which a warning says, and ONNX Runtime loads the file."""
    folder = make_fp32("llama", tmp_path, head_dim=12)
    (work := tmp_path / "ort").mkdir()
    recipe, split = RECIPES[name], None
    if name != "fp32-ort":
        recipe = replace(recipe, rounding="nearest", calibration=Calibration(8, 32))
        split = Split("calibration", SENTENCES)
    details = recipe.make(folder, work, split)
    assert details["fused_attention"] == 0 and "this model's have 12" in details["warnings"][0]
    assert not json.loads((work / GENAI_CONFIG).read_text())["search"]["past_present_share_buffer"]
    assert not Runtime(work / "model.onnx", 1).in_place


def test_attention_with_another_rotary_embedding_is_refused(make, tmp_path):
    """Only what is the same function is fused: here, a sine stands in the place of the cosine."""
    model = onnx_file.load(make("llama", "fp32")[0] / "model.onnx")
    check_attention(model, tmp_path)
    turned = next(node for node in model.graph if node.op_type == "Cos")
    turned.op_type = "Sin"
    with pytest.raises(UserError, match="target ort"):
        check_attention(model, tmp_path)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("llama", "llama"),
        ("long", "llama"),
        ("qwen3", "qwen3"),
        ("mistral", "mistral"),
        ("olmo2", "decoder"),
        ("phi", "phi"),
    ],
)
def test_genai_config(kind, expected, make):
    fields = json.loads((make(kind, "fp32-ort")[0] / GENAI_CONFIG).read_text())
    decoder, positions = fields["model"]["decoder"], KINDS[kind].fields.get("max_position_embeddings", 512)
    assert (fields["model"]["type"], fields["model"]["context_length"]) == (expected, positions)
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert [decoder[size] for size in sizes] == [16, 64, 4, 2, 2]
    assert fields["search"] == {
        "do_sample": False,
        "max_length": min(positions, 4096),
        "past_present_share_buffer": True,
    }


SCRIPT = """
import json, sys
import numpy as np
import onnxruntime_genai as genai
genai.disable_telemetry_events()
ids = json.loads(sys.argv[2])
model = genai.Model(sys.argv[1])
params = genai.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + 1)
loop = genai.Generator(model, params)
rows = []
for part in (ids[:9], *[[token] for token in ids[9:]]):
    loop.append_tokens(np.array([part], np.int32))
    rows.append(loop.get_logits()[0, -1].tolist())
print(json.dumps(rows))
"""


@pytest.mark.skipif(not GENAI.exists(), reason="no .venv-runtimes here; `make runtimes` creates it")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "olmo2", "opt", "gpt_neo", "gpt_neox", "phi"])
def test_onnxruntime_genai_gives_the_same_logits(kind, make, ids):
    folder = make(kind, "fp32-ort")[0]
    command = [GENAI, "-c", SCRIPT, str(folder), json.dumps(ids[0].tolist())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = runtime(make(kind, "fp32")).forward(ids[:1])[0, 8:]
    assert np.allclose(json.loads(done.stdout.splitlines()[-1]), expected, atol=1e-4 * expected.std(), rtol=0)
