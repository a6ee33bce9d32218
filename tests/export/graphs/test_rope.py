"""Rotary embeddings have transformers' frequencies, whatever their kind and however config.json spells them."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cuantiza.export.graphs.rope import rope

LENGTHS = {"original_max_position_embeddings": 8192, "factor": 8.0}
PARAMETERS = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 5e6},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LENGTHS},
    {"rope_type": "yarn", "rope_theta": 1e6, **LENGTHS},
    {"rope_type": "yarn", "rope_theta": 1e6, "truncate": False, **LENGTHS},
    {"rope_type": "yarn", "rope_theta": 1e4, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.7, **LENGTHS},
    {"rope_type": "yarn", "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 1.3, **LENGTHS},
]


def of_transformers(parameters: dict, channels: int) -> tuple[np.ndarray, float]:
    config = LlamaConfig(
        hidden_size=4 * channels, num_attention_heads=4, max_position_embeddings=65536, rope_parameters=dict(parameters)
    )
    kind = parameters["rope_type"]
    function = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    frequencies, scale = function(config, device="cpu")
    return frequencies.numpy(), scale


@pytest.mark.parametrize("channels", [16, 64, 128])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda value: f"{value['rope_type']}-{len(value)}")
def test_frequencies_are_those_of_transformers(parameters: dict, channels: int) -> None:
    wanted, scale = of_transformers(parameters, channels)
    found = rope(parameters, channels)
    # transformers computes powers in float32 and we in float64, which is then rounded once.
    np.testing.assert_allclose(np.float32(found.frequencies), wanted, rtol=1e-6)
    assert found.scale == pytest.approx(scale) and found.channels == channels


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda value: f"{value['rope_type']}-{len(value)}")
def test_fast_pairs_keep_their_frequency_and_slow_ones_are_divided(parameters: dict) -> None:
    theta, channels, factor = parameters["rope_theta"], 128, parameters.get("factor", 1.0)
    plain = np.float64(theta) ** (-np.arange(0, channels, 2) / channels)
    ratio = plain / np.array(rope(parameters, channels).frequencies)
    assert ratio[-1] == pytest.approx(factor, rel=1e-6) and (np.diff(ratio) >= -1e-6).all()
    assert ratio[0] == pytest.approx(factor if parameters["rope_type"] == "linear" else 1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "changes with the length"),
        ({"rope_type": "longrope", "rope_theta": 1e4}, "changes with the length"),
        ({"rope_type": "spiral", "rope_theta": 1e4}, "is not one of default, linear, llama3, yarn"),
        ({"rope_theta": 0.0}, "rope_theta 0.0"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": "4"}, "factor '4'"),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "original_max_position_embeddings None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parameters_that_mean_nothing(parameters: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rope(parameters, 64)
