"""Host offload: a model's device memory waits in host memory while the model is not at work.

An RL step uses its models one after the other (engine, reward model, reference, critic, actor): what rests need not share the device with
what works. The storages themselves are emptied and filled again, so every view of them (megatron's gradient buckets, ZeRO-1's shards,
tied embeddings) stays valid: megatron-core's own way for its ZeRO-1 buffers, here for everything, frozen models too. The same code runs
on a CPU, where it moves memory to memory and gains nothing: tests compare bits there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class HostOffload:
    """``kept()`` are tensors whose values must survive a rest; ``scratch()`` are tensors that come back as zeros.

    Both are asked again at every rest: an optimizer makes its state at its first step. Tensors may share storages, and a storage that is
    both kept and scratch is kept.
    """

    def __init__(self, kept: Callable[[], Iterable[Tensor]], scratch: Callable[[], Iterable[Tensor]] = tuple) -> None:
        self._kept, self._scratch = kept, scratch
        self._users = 0
        self._copies: dict[torch.UntypedStorage, Tensor] = {}  # host copies of kept storages, their memory reused from rest to rest
        self._resting: list[tuple[torch.UntypedStorage, int, bool]] = []  # storage, bytes, whether it is kept

    @property
    def is_resting(self) -> bool:
        return bool(self._resting)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """On the device inside; at rest after the last user left. Users may nest."""
        if self._users == 0:
            self._restore()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._rest()

    @torch.no_grad()
    def _rest(self) -> None:
        kept = _storages(self._kept())
        self._copies = {storage: copy for storage, copy in self._copies.items() if storage in kept}
        scratch = [storage for storage in _storages(self._scratch()) if storage not in kept]
        for storage in kept:
            copy = self._copies.get(storage)
            if copy is None or copy.numel() != storage.nbytes():
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                self._copies[storage] = copy
            copy.copy_(_bytes(storage))
        self._resting = [(s, s.nbytes(), True) for s in kept] + [(s, s.nbytes(), False) for s in scratch]
        for storage, _, _ in self._resting:
            storage.resize_(0)

    @torch.no_grad()
    def _restore(self) -> None:
        resting, self._resting = self._resting, []
        for storage, num_bytes, is_kept in resting:
            storage.resize_(num_bytes)
            target = _bytes(storage)
            if is_kept:
                target.copy_(self._copies[storage])
            else:
                target.zero_()


def _storages(tensors: Iterable[Tensor]) -> dict[torch.UntypedStorage, None]:
    """Each storage once, in order."""
    return dict.fromkeys(tensor.untyped_storage() for tensor in tensors if tensor.numel())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
