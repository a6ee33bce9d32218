"""A budget returns linear layers to floating point: as few as possible, in the order of the KL each causes alone."""

import pytest

from cuantiza.quantize.inspect.sensitivity import Effect, rank, within_budget

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
