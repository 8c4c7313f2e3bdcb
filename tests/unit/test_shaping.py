"""The overlong penalty against hand-computed numbers. Shapes: N traces."""

import pytest
import torch

from megatron_rema.algorithm.shaping import overlong_penalty


def test_the_penalty_is_a_ramp_over_the_buffer():
    lengths_N = torch.tensor([0, 11, 12, 13, 14, 16, 17, 1000])
    # max 16, buffer 4, free 12: (12 - 13) / 4 = -0.25, (12 - 14) / 4 = -0.5, (12 - 16) / 4 = -1, beyond 16: -1
    penalty_N = overlong_penalty(lengths_N, max_tokens=16, buffer_tokens=4)
    assert penalty_N.tolist() == [0.0, 0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    assert penalty_N.dtype == torch.float32


def test_a_buffer_of_everything_punishes_from_the_first_token():
    assert overlong_penalty(torch.tensor([0, 1, 4, 5]), max_tokens=4, buffer_tokens=4).tolist() == [0.0, -0.25, -1.0, -1.0]
    assert overlong_penalty(torch.zeros(0, dtype=torch.long), max_tokens=4, buffer_tokens=1).tolist() == []


@pytest.mark.parametrize("buffer_tokens", [0, -1, 17])
def test_a_buffer_outside_the_budget_is_refused_by_name(buffer_tokens):
    with pytest.raises(ValueError, match=rf"buffer_tokens \({buffer_tokens}\).*max_tokens \(16\)"):
        overlong_penalty(torch.tensor([1]), max_tokens=16, buffer_tokens=buffer_tokens)
