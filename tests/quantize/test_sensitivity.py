"""A budget returns linear layers to floating point: as few as possible, in the order of the KL each causes alone."""

from dataclasses import asdict

import numpy as np
import pytest

from cuantiza.core.onnx import file as onnx_file
from cuantiza.export.stage import export
from cuantiza.quantize import mixed
from cuantiza.quantize.inspect import sensitivity
from cuantiza.quantize.inspect.sensitivity import Effect, Gauge, rank, within_budget
from cuantiza.quantize.weights.rounding import round_to_nearest

from helpers import copy_tokenizer, tiny_llama

COSTS = {"a": 0.001, "b": 0.004, "c": 0.0005, "d": 0.002}


class Additive:
    """A gauge in which every quantized layer adds its own cost, and KL is half of the sum. It records each question."""

    def __init__(self):
        self.asked = []

    def effect(self, model, decisions, rewrite):
        self.asked.append(set(decisions))
        cost = sum(COSTS[name] for name in decisions)
        return Effect(cost / 2, cost, 0.0)


def test_the_ranking_is_by_kl():
    assert list(rank(None, COSTS, None, Additive())) == ["b", "d", "a", "c"]


@pytest.mark.parametrize(
    "budget, kept", [(1, []), (0.0075, []), (0.0074, ["b"]), (0.0035, ["b"]), (0.002, ["b", "d"]), (0, [*"bdac"])]
)
def test_the_fewest_projections_stay_in_float(budget, kept):
    gauge = Additive()
    found, effect = within_budget(None, COSTS, None, gauge, budget)
    assert list(found) == kept and all(found[name].delta_ln_ppl == COSTS[name] for name in kept)
    assert effect.delta_ln_ppl == pytest.approx(sum(COSTS.values()) - sum(COSTS[name] for name in kept))
    # The last measurement is of what is published. If all layers together are within the budget, there is only one.
    assert gauge.asked[-1] == set(COSTS) - set(kept)
    assert len(gauge.asked) == (1 if not kept else 1 + len(COSTS) + len(kept))


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
