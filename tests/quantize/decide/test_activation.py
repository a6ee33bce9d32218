"""Quantized activations: what is exact, and what their error costs a matmul."""

import numpy as np
import pytest

from cuantiza.quantize.decide.activation import LARGEST_MAX, LARGEST_MIN, PerRow, PerTensor, matmul_error, row_exponent


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


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e-5, 1.0, 1e4, 1e5, 1e9, 1e30])
def test_rows_of_any_size_keep_their_steps(size):
    """The exponent is 0 for rows that fit, and brings others into the range in which fp16 is precise."""
    x = (size * np.random.default_rng(0).uniform(-1, 1, (20, 64))).astype(np.float32)
    largest = float(np.abs(x).max())
    exponent = row_exponent(x, largest)
    assert (exponent != 0) == (size not in (0.0, 1.0, 1e4))
    if exponent:
        assert LARGEST_MIN * 8 < largest * 2.0**-exponent < LARGEST_MAX / 4
    restored = PerRow(exponent=exponent).restore(x)
    assert (np.abs(restored - x) <= np.abs(x).max(axis=1, keepdims=True) / 254 * (1 + 1e-4)).all()


def test_a_row_beyond_fp16_is_clipped_as_the_graph_does():
    x = np.array([[1e6, -3e5]], np.float32)
    assert PerRow().restore(x)[0] == pytest.approx([65504, -65504 / 127 * 128])
