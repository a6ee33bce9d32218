"""The parity check: rounding of large logits passes, and a graph that computes something else does not.

Its bound is relative to the token's largest logit, because fp32 rounds a sum by a share of its terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.store.artifact import Artifact
from cuantiza.export.graphs import architectures
from cuantiza.export.parity import ATOL, RTOL, _beyond, _ends

from helpers import Result, assert_nothing_published, assert_user_error, edit_weights

SCALED = ("transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias")


def scale(folder: Path, factor: float, *names: str) -> None:
    """Multiply the weights `names` of a checkpoint by `factor`."""

    def change(weights: dict) -> None:
        for name in names:
            weights[name].mul_(factor)

    edit_weights(folder, change)


@pytest.mark.parametrize(
    ("factor", "names"),
    [(1000.0, SCALED[1:]), (1e6, SCALED[:1])],
    ids=["last norm", "embedding"],
)
def test_large_logits_are_exported(
    exported: Callable[..., Artifact], folder: Path, factor: float, names: tuple[str, ...]
) -> None:
    """Their fp32 rounding is beyond 1e-4, and beyond 1e-5 of a logit that happens to be near 0."""
    scale(folder, factor, *names)
    parity = exported(folder).manifest.details["parity"]
    assert parity["largest_logit"] > 3000 and ATOL < parity["whole"] <= ATOL + RTOL * parity["largest_logit"]


@pytest.mark.parametrize(
    ("wrong", "factor"),
    [
        ({"layer_norm_epsilon": 1e-6}, 1),
        ({"layer_norm_epsilon": 2e-5}, 1000),
        ({"activation_function": "gelu"}, 1),
        ({"activation_function": "gelu"}, 1000),
        ({"scale_attn_by_inverse_layer_idx": True}, 1000),
    ],
)
def test_a_graph_of_another_configuration_is_refused(
    export_here: Callable[..., Result],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: dict[str, object],
    factor: float,
) -> None:
    """The graph is built for `wrong`, whose logits are close; PyTorch reads config.json as it is."""
    gpt2 = architectures.ARCHITECTURES["gpt2"]
    parse = lambda *args: dataclasses.replace(gpt2.parse(*args), **wrong)  # noqa: E731
    monkeypatch.setattr(architectures, "_GPT2", dataclasses.replace(gpt2, parse=parse))
    scale(folder, factor, *SCALED[1:])
    output = tmp_path / "artifacts"
    assert_user_error(export_here("--model", folder, "--output", output), "differs from PyTorch", "largest |logit|")
    assert_nothing_published(output)


def test_logits_that_are_not_finite_are_refused(refused: Callable[..., str], folder: Path) -> None:
    """Infinity equals infinity, so they would agree."""
    scale(folder, 1e37, *SCALED)
    refused(folder.name, "not a number")


def test_the_bound_is_each_tokens_own() -> None:
    """A token with small logits does not profit from another token's large ones."""
    logits = np.array([[[1000.0, 0.5], [1.0, 0.5]]], np.float32)
    off = np.zeros_like(logits)
    off[0, 0, 1] = 0.009
    assert _beyond(logits + off, logits) is None
    assert _beyond(logits + off[:, ::-1], logits) == pytest.approx(0.009, rel=1e-3)
    off[0, 0, 1] = 0.011
    assert _beyond(logits + off, logits) == pytest.approx(0.011, rel=1e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_number_is_beyond_the_bound(value: float) -> None:
    logits = np.ones((1, 2, 3), np.float32)
    ours = logits.copy()
    ours[0, 1, 2] = value
    assert _beyond(ours, logits) is not None


@pytest.mark.parametrize("count", [1, 2, 12, 13, 24, 25, 29, 96])
def test_pieces_of_the_text_that_goes_through_the_cache(count: int) -> None:
    """All of it, and one by one at both ends."""
    sizes = np.diff(_ends(count))
    assert sizes.sum() == count and (sizes <= 16).all()
    assert (sizes[:12] == 1).all() and (sizes[-12:] == 1).all()
