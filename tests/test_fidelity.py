"""Fidelity to the unreduced model, and the comparison with a smaller input at equal measured time."""

import numpy as np
import pytest
import torch

from laconic.analysis.equal_time import at_equal_time, bootstrap, over_smaller_input
from laconic.analysis.fidelity import class_cosine, map_correlation, patch_cosine, resized


def test_cosines_are_those_of_each_image():
    base, other = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [6.0, 8.0]])
    assert class_cosine(base, other).tolist() == pytest.approx([0.0, 1.0])
    both = patch_cosine(torch.stack([base, base]), torch.stack([base, other]).half())
    assert both.tolist() == pytest.approx([1.0, 0.5])
    assert both.dtype == torch.float32


def test_features_of_a_smaller_grid_are_resized_bilinearly():
    ramp = torch.arange(4.0).repeat(4, 1).reshape(1, 16, 1)  # columns 0 1 2 3
    assert resized(ramp, 4).flatten().tolist() == pytest.approx([0.5, 2.5, 0.5, 2.5])
    plane = torch.stack([torch.ones(64), torch.arange(8.0).repeat(8)], 1)[None]
    assert patch_cosine(plane, resized(plane, 36)).item() > 0.99
    assert patch_cosine(plane, resized(plane, 36).flip(1)).item() < 0.95
    with pytest.raises(ValueError, match="square grids of patches, not 6 and 16"):
        patch_cosine(torch.ones(1, 16, 2), torch.ones(1, 6, 2))


def test_correlation_ignores_level_and_scale():
    maps = torch.rand(3, 1, 5, 5)
    found = map_correlation(maps, torch.stack([2 * maps[0] + 7, -maps[1], maps[2].flip(2)]))
    assert found[:2].tolist() == pytest.approx([1.0, -1.0], abs=1e-5)
    assert found[2].item() == pytest.approx(np.corrcoef(maps[2].flatten(), maps[2].flip(2).flatten())[0, 1], abs=1e-5)


def test_the_input_size_is_interpolated_in_time():
    inputs = [(4.0, np.array([1.0, 1.0])), (1.0, np.array([0.0, 0.4])), (2.0, np.array([0.6, 0.4]))]
    assert at_equal_time(inputs, 1.5).tolist() == pytest.approx([0.3, 0.4])
    assert at_equal_time(inputs, 3.5).tolist() == pytest.approx([0.9, 0.85])
    assert at_equal_time(inputs, 4.0).tolist() == [1.0, 1.0]
    assert at_equal_time(inputs, 0.9) is None
    assert over_smaller_input(np.ones(2), inputs, 4.1) is None
    assert at_equal_time([(2.0, np.zeros(1)), (2.0, np.ones(1))], 2.0).tolist() == [0.0]


def test_intervals_are_of_the_mean_and_paired():
    values = np.random.default_rng(1).normal(0.5, 0.2, 60)
    found = bootstrap(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.half == pytest.approx(1.96 * values.std() / 60**0.5, rel=0.1)
    assert found.low < found.mean < found.high
    assert found.clear
    inputs = [(1.0, values - 0.01), (2.0, values + 0.01)]
    better = over_smaller_input(values, inputs, 1.0)
    assert better.low == pytest.approx(0.01)  # the same on every photograph: no spread is left
    assert not over_smaller_input(values - values.mean(), [(1.0, np.zeros(60)), (2.0, np.zeros(60))], 1.5).clear
