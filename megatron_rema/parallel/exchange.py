"""Rows of plain data between ranks: JSON over a byte tensor, so that no pickle crosses the wire and floats stay exact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_rema.parallel.platform import device


def gather_rows(rows: Sequence[dict[str, Any]], group: dist.ProcessGroup | None = None) -> list[dict[str, Any]]:
    """Every rank's rows, in rank order, on every rank. Two all-gathers: the sizes, then the bytes padded to the longest."""
    data = json.dumps(list(rows)).encode()
    world = dist.get_world_size(group)
    size = torch.tensor([len(data)], dtype=torch.int64, device=device())
    sizes = [torch.empty_like(size) for _ in range(world)]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(s) for s in sizes)
    mine = torch.zeros(longest, dtype=torch.uint8, device=device())
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(mine.device)
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine, group=group)
    gathered: list[dict[str, Any]] = []
    for part, length in zip(parts, sizes, strict=True):
        gathered.extend(json.loads(bytes(part[: int(length)].cpu().numpy().tobytes())))
    return gathered
