"""Sums and means over masked positions and over segments (turns, traces) of a packed batch.

Shapes: T label positions, K segments (turns or traces); a function's suffix is the shape it returns.
A segment id of -1 means "in no segment": its value is not read, so a NaN there cannot leak; a NaN inside a segment is
never hidden. Sums accumulate in float64: the order of the additions (packing, microbatching) is then invisible in the
float32 result. On CUDA ``index_add`` adds atomically; ``torch.use_deterministic_algorithms(True)`` makes it sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """Scalar: sum of the values where the mask is True; 0 (with gradient 0) where it is nowhere True."""
    return values_T.masked_fill(~mask_T, 0.0).sum(dtype=torch.float64).to(values_T.dtype)


def masked_mean(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """Scalar: mean of the values where the mask is True; 0 where it is nowhere True."""
    return masked_sum(values_T, mask_T) / mask_T.sum().clamp(min=1)


def weighted_whiten(values_N: Tensor, weights_N: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Shift to weighted mean 0 and scale to weighted variance 1, as if value i occurred ``weights_N[i]`` times.

    Whitening one value per turn with weights = tokens per turn equals whitening over tokens. Population variance;
    equal values give exactly 0. Values of weight 0 are not read and come back as 0.
    """
    counted_N = weights_N > 0
    values64_N = values_N.double().masked_fill(~counted_N, 0.0)
    weights64_N = weights_N.double()
    total = weights64_N.sum().clamp(min=eps)
    mean = (weights64_N * values64_N).sum() / total
    variance = (weights64_N * (values64_N - mean).square()).sum() / total
    return ((values64_N - mean) * (variance + eps).rsqrt()).masked_fill(~counted_N, 0.0).to(values_N.dtype)


def masked_moments(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """[3] float64: how many values the mask keeps, their mean (0 of none), the sum of their squared distances from it."""
    values64_T = values_T.double().masked_fill(~mask_T, 0.0)
    count = mask_T.sum().double()
    mean = values64_T.sum() / count.clamp(min=1.0)
    return torch.stack([count, mean, (values64_T - mean).square().masked_fill(~mask_T, 0.0).sum()])


def merge_moments(moments_R3: Tensor) -> Tensor:
    """[3] the moments of all parts together, merged in order (Chan et al. 1979)."""
    merged = moments_R3[0]
    for part in moments_R3[1:]:
        count, distance = merged[0] + part[0], part[1] - merged[1]
        share = part[0] / count.clamp(min=1.0)
        merged = torch.stack([count, merged[1] + distance * share, merged[2] + part[2] + distance.square() * merged[0] * share])
    return merged


def whiten(values_T: Tensor, mask_T: Tensor, moments_3: Tensor, *, eps: float) -> Tensor:
    """(value - mean) / sqrt(population variance + eps) where the mask is True, 0 elsewhere."""
    count, mean, squares = moments_3
    scale = (squares / count.clamp(min=1.0) + eps).rsqrt()
    return ((values_T.double() - mean) * scale).masked_fill(~mask_T, 0.0).to(values_T.dtype)


def segment_sum_K(values_T: Tensor, segment_ids_T: Tensor, num_segments: int) -> Tensor:
    """[K] sum of each segment's values; 0 for a segment without a token."""
    sums = torch.zeros(num_segments + 1, dtype=torch.float64, device=values_T.device)
    sums = sums.index_add(0, _bucket_T(segment_ids_T, num_segments), values_T.double())
    return sums[:num_segments].to(values_T.dtype)


def segment_count_K(segment_ids_T: Tensor, num_segments: int) -> Tensor:
    """[K] int64 number of tokens of each segment."""
    counts = torch.zeros(num_segments + 1, dtype=torch.int64, device=segment_ids_T.device)
    return counts.index_add(0, _bucket_T(segment_ids_T, num_segments), torch.ones_like(segment_ids_T, dtype=torch.int64))[:num_segments]


def segment_mean_K(values_T: Tensor, segment_ids_T: Tensor, num_segments: int) -> Tensor:
    """[K] mean of each segment's values; 0 for a segment without a token."""
    return segment_sum_K(values_T, segment_ids_T, num_segments) / segment_count_K(segment_ids_T, num_segments).clamp(min=1)


def segment_mean_T(values_T: Tensor, segment_ids_T: Tensor, num_segments: int) -> Tensor:
    """[T] each token gets the mean of its own segment; 0 where the id is -1."""
    return spread_T(segment_mean_K(values_T, segment_ids_T, num_segments), segment_ids_T)


def spread_T(values_K: Tensor, segment_ids_T: Tensor) -> Tensor:
    """[T] each token gets the value of its own segment; 0 where the id is -1."""
    return torch.cat([values_K, values_K.new_zeros(1)])[_bucket_T(segment_ids_T, values_K.numel())]


def _bucket_T(segment_ids_T: Tensor, num_segments: int) -> Tensor:
    """Tokens of no segment go to one bucket behind the last, which no caller reads: no data-dependent shape, no device sync."""
    return segment_ids_T.long().masked_fill(segment_ids_T < 0, num_segments)
