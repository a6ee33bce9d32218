"""A budget returns linear layers to floating point, in the order of the KL that each causes alone."""

import json
from dataclasses import asdict

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.onnx import file as onnx_file
from cuantiza.export.stage import export
from cuantiza.quantize import mixed
from cuantiza.quantize.decide.blocks import split
from cuantiza.quantize.inspect import sensitivity
from cuantiza.quantize.inspect.sensitivity import Effect, Gauge, Sensitivity, rank, within_budget
from cuantiza.quantize.inspect.tables import sensitivity_table
from cuantiza.quantize.layers import decide
from cuantiza.quantize.recipes.registry import RECIPES
from cuantiza.quantize.weights.rounding import round_to_nearest

from helpers import copy_tokenizer, tiny_llama

MODEL = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
COSTS = {"a": 0.001, "b": 0.004, "c": 0.0005, "d": 0.002}


class Additive:
    """A gauge in which every quantized layer adds its own cost, and KL is half of the sum. It records each question."""

    def __init__(self, costs=COSTS, embeddings=0.0):
        self.asked, self.ranked, self.costs, self.embeddings = [], 0, costs, embeddings

    def effect(self, model, decisions, rewrite):
        self.asked.append(set(decisions))
        cost = self.embeddings + sum(self.costs[name] for name in decisions)
        return Effect(cost / 2, cost, 0.0)

    def first(self, count):
        return self

    def alone(self, model, decisions, rewrite, embedded):
        self.ranked += 1
        for name in decisions:
            yield name, Effect(self.costs[name] / 2, self.costs[name], 0.0)


def nothing(model, decisions):
    """A rewrite that changes nothing."""


def test_a_single_window_has_no_standard_error(es_mini_fp32, tmp_path):
    gauge = Gauge(es_mini_fp32.model, np.arange(24)[None], tmp_path)
    effect = gauge.effect(onnx_file.load(es_mini_fp32.model), {}, nothing)
    assert json.loads(json.dumps(asdict(effect), allow_nan=False))["delta_ln_ppl_stderr"] is None
    table = sensitivity_table(Sensitivity({"h.0": effect}, effect, effect, 1, 24), "title")
    assert [*table.columns[3].cells] == ["0.00000"] * 3


def test_the_ranking_is_by_kl():
    assert list(rank(MODEL, COSTS, nothing, Additive())) == ["b", "d", "a", "c"]


@pytest.mark.parametrize(
    "budget, kept", [(1, []), (0.0075, []), (0.0074, ["b"]), (0.0035, ["b"]), (0.002, ["b", "d"]), (0, [*"bdac"])]
)
def test_the_fewest_projections_stay_in_float(budget, kept):
    gauge = Additive()
    found, effect = within_budget(MODEL, COSTS, nothing, gauge, budget)
    assert list(found) == kept and all(found[name].delta_ln_ppl == COSTS[name] for name in kept)
    assert effect.delta_ln_ppl == pytest.approx(sum(COSTS.values()) - sum(COSTS[name] for name in kept))
    # If all layers together are within the budget, there is only one measurement.
    assert set(COSTS) - set(kept) in gauge.asked
    assert gauge.ranked == bool(kept) and (kept or len(gauge.asked) == 1)


def test_many_layers_take_few_measurements():
    costs = {f"layer {number}": 1.0 for number in range(200)}
    for kept in (0, 1, 2, 63, 64, 65, 199, 200):
        gauge = Additive(costs)
        found, effect = within_budget(MODEL, costs, nothing, gauge, 200.5 - kept)
        assert len(found) == kept and effect.delta_ln_ppl == 200 - kept
        assert len(gauge.asked) <= 17


def test_a_budget_that_embeddings_alone_break_leaves_all_in_float():
    gauge = Additive(embeddings=0.1)
    found, effect = within_budget(MODEL, COSTS, nothing, gauge, 0.002)
    assert [*found] == ["b", "d", "a", "c"] and effect.delta_ln_ppl == 0.1
    assert len(gauge.asked) == 4  # all, 1, 2 and 4 of 4 in float


@pytest.mark.parametrize(
    "name", ["int8-static", "int8-dynamic-ort", "int8-static-ort", "int8-weight-ort", "int4-weight"]
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_layer_alone_has_the_effect_that_it_has_in_the_whole_graph(kind, name, tiny_folder, tmp_path, monkeypatch):
    """Embeddings are quantized beside it. Only the first block and what shares an embedding take the whole graph."""
    folder = tiny_folder
    if kind == "llama":  # its head is a matrix of its own
        tiny_llama(kind, num_hidden_layers=3, tie_word_embeddings=False).save_pretrained(
            folder := tmp_path / "checkpoint"
        )
        copy_tokenizer(folder)
    path = export(folder, tmp_path / "artifacts").model
    model, windows = onnx_file.load(path), np.random.default_rng(0).integers(8000, size=(3, 24))
    recipe = RECIPES[name]
    decisions = decide(model, windows, recipe.plan().alone(), tmp_path)
    gauge, rewrite = Gauge(path, windows, tmp_path).first(2), recipe.rewrite()
    wanted = {layer: gauge.effect(model, {layer: decisions[layer]}, rewrite) for layer in decisions}
    saved = []
    monkeypatch.setattr(Gauge, "effect", lambda *those: saved.append(next(iter(those[2]))) or wanted[saved[-1]])
    found = rank(model, decisions, rewrite, gauge)
    assert found.keys() == decisions.keys() and list(found) == sorted(found, key=lambda one: -found[one].kl_divergence)
    for layer, effect in found.items():
        assert asdict(effect) == pytest.approx(asdict(wanted[layer]), rel=2e-3, abs=1e-6)
    first = {projection.name for projection in split(model.graph)[0].projections}
    assert {*saved} == first | ({"lm_head"} if kind == "gpt2" else set()) and len(saved) < len(decisions) / 2


@pytest.mark.parametrize(
    ("kind", "options", "whole"),
    [
        ("gpt2", {}, {"wte.weight", "wpe.weight"}),
        ("llama", {"tie_word_embeddings": False}, {"embed_tokens.weight"}),
        # The cap on the logits stands after the last linear layer, in no block.
        ("gemma2", {"final_logit_softcapping": 5.0}, {"embed_tokens.weight"}),
    ],
)
def test_a_matrix_alone_has_the_effect_that_it_has_in_the_whole_graph(
    kind, options, whole, tiny_folder, tmp_path, monkeypatch
):
    """Only the matrices of embeddings take a graph that is rewritten, saved and run as a whole."""
    folder = tiny_folder
    if kind != "gpt2":
        tiny_llama(kind, num_hidden_layers=2, **options).save_pretrained(folder := tmp_path / "checkpoint")
        copy_tokenizer(folder)
    path = export(folder, tmp_path / "artifacts").model
    model = onnx_file.load(path)
    weights = {}
    for name, shape in mixed.matrix_shapes(model.graph).items():
        array = model.graph.initializers[name].const_value.numpy()
        weights[name] = round_to_nearest(array if array.shape == shape else array.T, mixed.BASE)
    gauge = Gauge(path, np.random.default_rng(0).integers(8000, size=(2, 24)), tmp_path)
    wanted = {name: gauge.effect(model, {name: weight}, mixed._portable) for name, weight in weights.items()}

    saved = []
    monkeypatch.setattr(
        sensitivity.Gauge, "effect", lambda *those: saved.append(those[2]) or wanted[next(iter(those[2]))]
    )
    found = dict(gauge.alone(model, weights, mixed._portable))
    assert {name for one in saved for name in one} == whole and found.keys() == weights.keys()
    for name, effect in found.items():
        assert asdict(effect) == pytest.approx(asdict(wanted[name]), rel=1e-3, abs=1e-7)
        assert effect.kl_divergence > 0
