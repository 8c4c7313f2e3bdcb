"""What is added to a reward for the form of an answer, not for its truth. Pure: torch in, torch out.

Shapes: N traces (or turns: whatever has a length and a reward).
Source: DAPO arXiv:2503.14476 eq. 13 (soft overlong punishment).
"""

from __future__ import annotations

from torch import Tensor


def overlong_penalty(lengths_N: Tensor, *, max_tokens: int, buffer_tokens: int) -> Tensor:
    """[N] float32 in [-1, 0], to be added to the reward: a soft edge instead of a cliff where an answer is cut. With L the length:

    0                                        L <= max_tokens - buffer_tokens
    (max_tokens - buffer_tokens - L) / buffer_tokens    in the last buffer_tokens before max_tokens
    -1                                       L > max_tokens

    ``max_tokens`` is the paper's L_max, ``buffer_tokens`` its L_cache (16384 + 4096 and 4096 there). Raises ValueError for a buffer that is
    empty or longer than max_tokens.
    """
    if not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(
            f"buffer_tokens ({buffer_tokens}) must be in [1, max_tokens ({max_tokens})]: it is the stretch before max_tokens in which the "
            "penalty grows from 0 to 1; leave the penalty out to have none."
        )
    free_tokens = max_tokens - buffer_tokens
    return ((free_tokens - lengths_N.double()) / buffer_tokens).clamp(-1.0, 0.0).float()
