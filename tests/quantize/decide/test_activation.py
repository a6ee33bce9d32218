"""Quantized activations: what is exact, and what their error costs a matmul."""

import numpy as np
import pytest

from cuantiza.quantize.decide.activation import (
    LARGEST_MAX,
    LARGEST_MIN,
    ROW_ZERO_POINTS,
    PerRow,
    PerTensor,
    fitting_row,
    matmul_error,
)


@pytest.mark.parametrize("low, high", [(-1.0, 3.0), (0.5, 2.0), (-7.0, -2.0), (0.0, 0.0), (-1e-30, 1e30)])
def test_zero_is_exact_and_the_range_is_covered(low, high):
    scale, zero_point = PerTensor(low, high).parameters
    assert scale > 0 and np.isfinite(scale) and scale.dtype == np.float32 and zero_point.dtype == np.uint8
    ends = (np.array([0, 255]) - float(zero_point)) * scale
    assert ends[0] <= min(low, 0) + scale / 2 and ends[1] >= max(high, 0) - scale / 2
    assert PerTensor(low, high).restore(np.zeros((1, 1), np.float32)) == 0


@pytest.mark.parametrize("activation", [PerTensor(-3, 4), PerTensor(-1, 2), PerRow(128), PerRow(16)], ids=str)
def test_matmul_error_is_the_error_of_the_matmul(activation):
    """The estimate holds for independent elements, and rows of very different size count alike."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((200, 300)).astype(np.float32) * np.geomspace(0.2, 1, 200, dtype=np.float32)[:, None]
    weight = generator.standard_normal((300, 400)) * np.exp(generator.standard_normal((300, 1)))
    restored, energy = activation.restore(x), (weight**2).sum(axis=1)
    exact = (((restored - x) @ weight) ** 2).sum(axis=1) / ((x @ weight) ** 2).sum(axis=1)
    assert matmul_error(x, restored, energy, (x * x) @ energy) == pytest.approx(exact.mean(), rel=0.1)
    assert matmul_error(x, x, energy, (x * x) @ energy) == 0


@pytest.mark.parametrize("zero_point", ROW_ZERO_POINTS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e-5, 1.0, 1e4, 1e5, 1e9, 1e30])
def test_rows_of_any_size_keep_their_steps(size, zero_point):
    """The exponent is 0 for rows that fit, and brings others into the range in which fp16 is precise."""
    above, below = 255 - zero_point, min(zero_point, 127)
    x = (size * np.random.default_rng(0).uniform(-below / above, 1, (20, 64))).astype(np.float32)
    activation = fitting_row(x, float(x.min()), float(x.max()), zero_point)
    assert (activation.exponent != 0) == (size not in (0.0, 1.0, 1e4))
    if activation.exponent:
        assert LARGEST_MIN * 8 < x.max() * 2.0**-activation.exponent < LARGEST_MAX / 4
    step = np.maximum(x.max(axis=1) / above, -x.min(axis=1) / below)[:, None]
    assert (np.abs(activation.restore(x) - x) <= step / 2 * (1 + 1e-4)).all()


def test_a_negative_value_that_few_integers_stand_for_counts_as_what_it_takes():
    """With zero point 8 there are 8 integers for it and 247 for a positive one, so its row's scale is 31 times as large."""
    rows = np.array([[1.0, 2.0, -0.01]], np.float32)
    assert fitting_row(rows, -9000, 9000, 128).exponent == 0 < fitting_row(rows, -9000, 9000, 8).exponent


def test_a_row_beyond_fp16_is_clipped_as_the_graph_does():
    x = np.array([[1e6, -3e5]], np.float32)
    assert PerRow().restore(x)[0] == pytest.approx([65504, -65504 / 127 * 128])
