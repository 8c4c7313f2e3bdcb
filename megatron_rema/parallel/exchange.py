"""Plain data between ranks: JSON over a byte tensor, so that no pickle crosses the wire and floats stay exact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_rema.parallel.platform import device


def gather_rows(rows: Sequence[dict[str, Any]], group: dist.ProcessGroup | None = None) -> list[dict[str, Any]]:
    """Every rank's rows, in rank order, on every rank."""
    return [row for part in gather(list(rows), group) for row in part]


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's ``value``, in rank order, on every rank; a tuple arrives as a list.

    Two all-gathers: the sizes, then the bytes padded to the longest.
    """
    data = json.dumps(value).encode()
    world = dist.get_world_size(group)
    size = torch.tensor([len(data)], dtype=torch.int64, device=device())
    sizes = [torch.empty_like(size) for _ in range(world)]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(s) for s in sizes)
    mine = torch.zeros(longest, dtype=torch.uint8, device=device())
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(mine.device)
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine, group=group)
    return [json.loads(part[: int(length)].cpu().numpy().tobytes()) for part, length in zip(parts, sizes, strict=True)]


def broadcast(value: Any, *, src: int, group: dist.ProcessGroup | None = None) -> Any:
    """Global rank ``src``'s ``value`` on every rank of ``group``. Two broadcasts: the size, then the bytes."""
    data = json.dumps(value).encode()
    size = torch.tensor([len(data)], dtype=torch.int64, device=device())
    dist.broadcast(size, src=src, group=group)
    sent = torch.empty(int(size), dtype=torch.uint8, device=device())
    if dist.get_rank() == src:
        sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(sent, src=src, group=group)
    return json.loads(sent.cpu().numpy().tobytes())
