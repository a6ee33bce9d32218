"""The `ort` target: the same model as the portable form, with other operators and a KV cache updated in place."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cuantiza.core.contract import KEEP
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, full_windows, load_splits, stream
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.runtime import Options, Runtime
from cuantiza.quantize.recipes.registry import RECIPES, Float, Half
from cuantiza.quantize.rewrite.fuse_attention import check_attention
from cuantiza.quantize.settings import Calibration
from lab.bench.profile import profile

from helpers import CORPUS

NAMES = ("fp32", "fp16", "int8-dynamic", "int8-static", "int8-weight", "int4-weight")
# Limits for the difference to the portable form's logits, whose spread is 3.5: largest |Δ|, mean |Δ|, share of other
# top tokens. int8-dynamic and int8-static differ by more than a float's last digits only where such a digit decides
# which way a value is rounded. int8-weight computes with int8 activations where its portable form computes in fp32, and
# int4-weight uses other blocks.
LIMITS = {
    "fp32": (1e-4, 1e-5, 0),
    "fp16": (1e-4, 1e-5, 0),
    "int8-dynamic": (0.8, 0.03, 0.04),
    "int8-static": (0.8, 0.04, 0.04),
    "int8-weight": (1.0, 0.06, 0.08),
    "int4-weight": (1.0, 0.06, 0.08),
}


@pytest.fixture(scope="module")
def windows(es_mini_fp32):
    """Token windows [3, 96] of the test split."""
    documents = load_splits(Source(str(CORPUS)))[1].documents[:4]
    return full_windows(stream(encode(load_tokenizer(es_mini_fp32.path), documents), 0), 96)[:3]


@pytest.fixture(scope="module")
def folders(es_mini_fp32, tmp_path_factory):
    """{name: folder} of both targets. Weights are rounded to nearest, because only the operators matter here."""
    split = load_splits(Source(str(CORPUS)))[0]
    made = {"fp32": es_mini_fp32.path}
    for name in NAMES:
        for target in ("", "-ort"):
            if name + target in made:
                continue
            recipe = RECIPES[name + target]
            if not isinstance(recipe, Float | Half):
                recipe = replace(recipe, rounding="nearest", calibration=Calibration(8, 32))
            made[name + target] = tmp_path_factory.mktemp(name + target)
            recipe.make(es_mini_fp32.path, made[name + target], split)
    return made


@pytest.fixture(scope="module")
def runtimes(folders):
    return {name: Runtime(folder / "model.onnx", 2) for name, folder in folders.items()}


def padded(windows):
    """Return (ids, mask), each [3, 96]: the windows cut to 96, 48 and 19 tokens, with padding on the left."""
    lengths = np.array([96, 48, 19])
    mask = (np.arange(96) >= 96 - lengths[:, None]).astype(np.int64)
    rows = [np.concatenate([np.zeros(96 - n, np.int64), row[:n]]) for row, n in zip(windows, lengths, strict=True)]
    return np.stack(rows), mask


def token_by_token(runtime, ids, mask):
    past, steps = runtime.empty_past(len(ids)), []
    for t in range(ids.shape[1]):
        logits, past = runtime.extend(ids[:, t : t + 1], past, mask[:, : t + 1])
        steps.append(logits)
    return np.concatenate(steps, axis=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_logits_of_the_portable_form(name, cached, batch, runtimes, windows):
    ids, mask = padded(windows) if batch == 3 else (windows[:1], np.ones((1, 96), np.int64))
    of = token_by_token if cached else Runtime.forward
    portable, fused = (of(runtimes[key], ids, mask)[mask.astype(bool)] for key in (name, f"{name}-ort"))
    largest, mean, other_top = LIMITS[name]
    found = np.abs(portable - fused)
    same_top = (portable.argmax(axis=-1) == fused.argmax(axis=-1)).mean()
    assert found.max() <= largest and found.mean() <= mean, (found.max(), found.mean())
    assert same_top >= 1 - other_top, same_top


def test_int8_dynamic_is_the_same_to_the_last_digits_where_no_rounding_tips(runtimes, windows):
    """Both targets have the same integers and multiply in the same order, so nothing else can differ."""
    differences = [
        np.abs(runtimes["int8-dynamic"].forward(row[None]) - runtimes["int8-dynamic-ort"].forward(row[None])).max()
        for row in windows
    ]
    assert min(differences) < 1e-4, differences


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-static"])
def test_the_same_integers(name, folders):
    def integers(folder):
        weights = onnx_file.load(folder / "model.onnx").graph.initializers
        return {key: value.const_value.tobytes() for key, value in weights.items() if key.endswith("_int8")}

    portable, fused = integers(folders[name]), integers(folders[f"{name}-ort"])
    assert len(portable) > 20 and portable == fused


@pytest.mark.parametrize("name", ["int8-weight", "int4-weight"])
def test_the_same_weights_in_blocks(name, folders):
    """The bytes of MatMulNBits, dequantized by its specification, equal the portable form's integers times scales."""
    portable, fused = (onnx_file.load(folders[key] / "model.onnx").graph for key in (name, f"{name}-ort"))
    bits, weight = int(name[3]), "h.0.mlp.c_fc.weight"

    def array(graph, suffix):
        return graph.initializers[f"{weight}_{suffix}"].const_value.numpy()

    q = array(portable, f"int{bits}").astype(np.float32)
    scale = (array(portable, "scale_uint8") * array(portable, "scale_step")).repeat(32, axis=0)
    if bits == 4:
        q -= np.repeat(array(portable, "zero_point").astype(np.float32), 32, axis=0)
    packed, scale_ort = array(fused, f"int{bits}"), array(fused, "scale_uint8") * array(fused, "scale_step")
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1)
        zero = array(fused, "zero_point")
        zero = np.stack([zero & 15, zero >> 4], axis=-1).reshape(len(zero), -1)[:, : packed.shape[1], None]
    else:
        zero = np.full((1, 1, 1), 128)
    unpacked = packed.reshape(*packed.shape[:2], -1).astype(np.float32) - zero.astype(np.float32)
    unpacked *= scale_ort[:, :, None]
    assert np.array_equal(unpacked.reshape(len(packed), -1).T, q * scale)


def test_operators(folders):
    """Only the operators that are faster come from com.microsoft."""
    allowed = {
        "fp32": {"GroupQueryAttention"},
        "fp16": {"GroupQueryAttention"},
        "int8-dynamic": {"GroupQueryAttention", "MatMulIntegerToFloat"},
        "int8-static": {"GroupQueryAttention", "MatMulIntegerToFloat"},
        "int8-weight": {"GroupQueryAttention", "MatMulNBits", "GatherBlockQuantized"},
        "int4-weight": {"GroupQueryAttention", "MatMulNBits", "GatherBlockQuantized"},
    }
    for name, expected in allowed.items():
        model = onnx_file.load(folders[f"{name}-ort"] / "model.onnx")
        assert {node.op_type for node in model.graph if node.domain} == expected, name
        assert set(model.graph.opset_imports) == {"", "com.microsoft"}
        counts = Counter(node.op_type for node in model.graph)
        assert counts["GroupQueryAttention"] == 6 and not counts.keys() & {"Softmax", "Concat_"}
        # Activations of 16 bits are split and divided, and nothing else is.
        assert name in ("int8-dynamic", "int8-static") or not counts.keys() & {"Split", "Div"}


def test_no_slow_fusion_at_load(folders, tmp_path):
    """ONNX Runtime does not fuse LayerNormalization into SkipLayerNormalization, which is slower."""
    for name in ("fp32-ort", "int8-dynamic-ort"):
        options = ort.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
        ort.InferenceSession(folders[name] / "model.onnx", options, providers=["CPUExecutionProvider"])
        counts = Counter(node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph)
        assert counts["LayerNormalization"] == 13 and counts["FastGelu"] == 6, counts


def test_files_are_as_small_as_the_portable_ones(folders):
    for name in NAMES:
        portable, fused = ((folders[key] / "model.onnx").stat().st_size for key in (name, f"{name}-ort"))
        assert fused <= portable * 1.001, name


@pytest.mark.parametrize("name", [name + target for name in NAMES for target in ("", "-ort")])
def test_logits_of_the_last_positions_alone(name, folders, runtimes, windows):
    runtime = runtimes[name]
    session, names = runtime.session, [item.name for item in runtime.session.get_outputs()]
    assert KEEP not in (item.name for item in session.get_inputs())  # so that loaders need not know of it
    feeds = {
        "input_ids": windows[:2],
        "attention_mask": np.ones((2, 96), np.int64),
        "position_ids": np.arange(96)[None].repeat(2, 0),
    }
    feeds |= {
        item.name: np.zeros((2, item.shape[1], 0, item.shape[3]), np.float32) for item in session.get_inputs()[3:]
    }
    everything = session.run(names, feeds)
    for count in (0, 1, 5, 96, 1000, -90, -96):
        kept = session.run(names, feeds | {KEEP: np.array(count, np.int64)})
        expected = everything[0][:, -count:] if count < 96 else everything[0]
        assert kept[0].shape == expected.shape
        # Fewer tokens use other kernels, whose last digits can decide which way a value is rounded.
        assert np.abs(kept[0] - expected).max(initial=0) < (1e-4 if name.startswith("fp") else 0.8)
        for whole, part in zip(everything[1:], kept[1:], strict=True):
            assert np.array_equal(whole, part)


@pytest.mark.parametrize("name", ["fp32", "fp32-ort"])
def test_stepping_gives_what_the_whole_gives(name, runtimes, windows):
    runtime = runtimes[name]
    whole = runtime.forward(windows[:1])[0]
    cache = runtime.cache(1, 96)
    found = [runtime.step(cache, windows[:1, :40])]
    found += [runtime.step(cache, windows[:1, t : t + 1]) for t in range(40, 96)]
    assert cache.length == 96 and np.allclose(np.concatenate(found), whole[39:], atol=1e-4)
    with pytest.raises(ValueError, match=r"96 \+ 1 tokens in a cache of 96"):
        runtime.step(cache, windows[:1, :1])


@pytest.mark.parametrize("name", ["fp32", "fp32-ort"])
def test_stepping_a_padded_batch(name, runtimes, windows):
    runtime, (ids, mask) = runtimes[name], padded(windows)
    whole = runtime.forward(ids, mask)
    cache = runtime.cache(3, 96)
    # The steps are several tokens with an empty cache, several after a past, one token, and several again.
    pieces = [slice(0, 80), slice(80, 90), slice(90, 91), slice(91, 96)]
    for piece in pieces:
        logits = runtime.step(cache, ids[:, piece], mask[:, piece])
        real = mask[:, piece.stop - 1].astype(bool)
        assert np.allclose(logits[real], whole[real, piece.stop - 1], atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_a_prompt_in_pieces(chunk, folders, windows):
    runtime = Runtime(folders["fp32-ort"] / "model.onnx", 2, options=Options(chunk=chunk))
    logits = runtime.step(runtime.cache(1, 96), windows[:1])
    assert np.allclose(logits[0], runtime.forward(windows[:1])[0, -1], atol=1e-4)


def test_the_cache_is_updated_in_place(runtimes, windows):
    runtime = runtimes["fp32-ort"]
    cache = runtime.cache(1, 128)
    buffers = [value.data_ptr() for value in cache.past]
    runtime.step(cache, windows[:1])
    untouched = cache.past[0].numpy()[:, :, 96:]
    assert not untouched.any() and cache.past[0].numpy()[:, :, :96].any(axis=-1).all()
    for token in windows[1, :8]:
        runtime.step(cache, token[None, None])
    assert [value.data_ptr() for value in cache.past] == buffers
    assert [value.shape()[2] for value in cache.past] == [128] * 12
    grown = runtimes["fp32"].cache(1, 128)
    runtimes["fp32"].step(grown, np.concatenate([windows[:1], windows[1:2, :8]], axis=1))
    for ours, theirs in zip(cache.past, grown.past, strict=True):
        assert np.allclose(ours.numpy()[:, :, :104], theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["fp32", "fp32-ort"])
def test_a_copy_of_a_cache_repeats_a_step(name, runtimes, windows):
    runtime = runtimes[name]
    cache = runtime.cache(1, 96)
    runtime.step(cache, windows[:1, :50])
    first, second = (runtime.step(copy.copy(cache), windows[:1, 50:51]) for _ in range(2))
    assert cache.length == 50 and np.array_equal(first, second)


def test_another_attention_is_refused(folders):
    model = onnx_file.load(folders["fp32"] / "model.onnx")
    check_attention(model, folders["fp32"])
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    with pytest.raises(UserError, match=r"fp32.*target ort .* --exporter graph"):
        add = softmax.inputs[0].producer()
        add.op_type = "Sub"
        check_attention(model, folders["fp32"])


def test_a_profile_counts_the_operators_of_one_step(folders):
    rows, whole = profile(folders["int8-weight-ort"] / "model.onnx", 1, 20, 4, 2)
    counts = {name: count for name, (count, _) in rows.items()}
    assert counts["GroupQueryAttention"] == 6 and counts["LayerNormalization"] == 13
    assert sum(count for name, count in counts.items() if name.startswith("MatMulNBits")) == 25
    assert 0 < sum(milliseconds for _, milliseconds in rows.values()) <= whole
