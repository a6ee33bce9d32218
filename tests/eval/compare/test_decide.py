"""One figure against its budget: when quality, size and latency count as worse."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cuantiza.core.errors import UserError
from cuantiza.eval.compare.budgets import Budget, read_budgets
from cuantiza.eval.compare.decide import (
    FIRST_LEVEL,
    check_latency,
    check_quality,
    check_size,
    chosen,
    confirmed,
)
from cuantiza.eval.measure.estimates import Estimate, mean_by_document, mean_per_token

from helpers import ROOT


def test_a_second_look_clears_a_figure():
    first = check_latency("q", "decode at 32", (1, 1.3), [0.26] * 8, FIRST_LEVEL, 0.1)
    assert first.regression and first.change.value == pytest.approx(math.expm1(0.26))
    cleared = confirmed(first, check_latency("q", "decode at 32", (1, 1), [0.0] * 20, 0.001, 0.1))
    assert not cleared.regression and "not shown again" in cleared.note
    kept = confirmed(first, check_latency("q", "decode at 32", (1, 1.3), [0.26] * 20, 0.001, 0.1))
    assert kept.regression and kept.verdict == "regression"


def test_the_two_forms_of_the_estimator_are_one():
    generator = np.random.default_rng(0)
    document = np.repeat(np.arange(5), [3, 50, 7, 20, 11])
    values = generator.normal(size=len(document)) + document
    per_document = mean_by_document(np.bincount(document, weights=values), np.bincount(document))
    assert per_document == mean_per_token(values, document)


def test_quality_counts_beyond_budget_and_standard_errors():
    assert not check_quality("q", 4.0, 4.02, Estimate(0.02, 0.01), 0.005).regression
    assert check_quality("q", 4.0, 4.02, Estimate(0.02, 0.007), 0.005).regression
    assert not check_quality("q", 4.0, 4.004, Estimate(0.004, 0.0), 0.005).regression
    assert check_quality("q", 4.0, 3.9, Estimate(-0.1, 0.01), 0.005).verdict == "better"
    assert check_quality("q", 4.0, math.nan, Estimate(math.nan, math.nan), 0.005).regression
    with pytest.raises(UserError, match="single document"):
        check_quality("q", 4.0, 4.1, Estimate(0.1, None), 0.005)
    with pytest.raises(UserError, match="BASE=: the perplexity of q is not finite"):
        check_quality("q", math.nan, 4.1, Estimate(math.nan, math.nan), 0.005)


def test_size_counts_beyond_its_budget():
    assert check_size("q", 1000, 1011, 0.01).regression and not check_size("q", 1000, 1009, 0.01).regression
    assert check_size("q", 1000, 900, 0.01).verdict == "better"


def test_which_recipes_are_compared():
    assert chosen(["a", "b"], ["b", "a", "c"], None) == (["a", "b"], ["c"])
    assert chosen(["a", "b"], ["b", "c"], ["b"]) == (["b"], [])
    with pytest.raises(UserError, match="HEAD=: lacks a"):
        chosen(["a", "b"], ["b"], None)
    with pytest.raises(UserError, match="--recipes c: is not in BASE and not in HEAD"):
        chosen(["a"], ["a"], ["c"])


def test_budgets_of_the_repository():
    budgets = read_budgets(ROOT / "budgets.toml")
    assert budgets.default == Budget(quality=0.005, size=0.01, latency=0.1) and not budgets.recipes


def test_a_recipe_has_budgets_of_its_own(tmp_path):
    (tmp_path / "b.toml").write_text("quality = 0.01\nsize = 2\nlatency = 5\n[recipes.int4-weight]\nquality = 0.1\n")
    budgets = read_budgets(tmp_path / "b.toml")
    assert budgets.of("int4-weight") == Budget(0.1, 0.02, 0.05) and budgets.of("fp32") == Budget(0.01, 0.02, 0.05)
