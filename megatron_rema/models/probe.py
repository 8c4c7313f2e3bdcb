"""What a model's last MLP block takes in and gives out, token by token, read off a forward pass that is run anyway.

Source: arXiv:2501.19358, whose energy of a hidden state is its absolute sum; here the mean, so that models of other widths compare.
Shapes: T positions of one packed microbatch, of which this tensor rank sees T / tp under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_rema.models.policy import ParallelModel


class LastMLPEnergy:
    """mean |h_in| - mean |h_out| of the latest forward pass of the last MLP block, both over the hidden size; see `last_mlp_energy`."""

    def __init__(self, model: ParallelModel) -> None:
        self._groups, self._is_cut = model.groups, model.config.sequence_parallel
        self._loss_T: Tensor | None = None

    def hook(self, _: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
        """A forward hook. Reads detached values and returns nothing, so neither outputs nor gradients know of it."""
        taken_in, given_out = (_mean_absolute(hidden.detach()) for hidden in (inputs[0], output[0]))
        self._loss_T = taken_in - given_out

    def take(self, mask_T: Tensor) -> Tensor:
        """Sum over the positions that ``mask_T`` holds, float64, equal on all tensor ranks. A collective of `groups.tp` under sequence
        parallelism. Once for each microbatch, by its loss function, on the last stage: the pass that went before is the microbatch's own,
        and what activation recomputation runs again afterwards is never taken."""
        assert self._loss_T is not None, "no forward pass since the last one was taken"
        loss_T, self._loss_T = self._loss_T.double(), None
        if self._is_cut:
            mask_T = mask_T.chunk(self._groups.tensor_size)[self._groups.tensor_rank]
        total = torch.where(mask_T, loss_T, 0.0).sum()
        if self._is_cut:
            dist.all_reduce(total, group=self._groups.tp)
        return total


@contextmanager
def last_mlp_energy(model: ParallelModel) -> Iterator[LastMLPEnergy]:
    """Forward passes of ``model`` inside are read; on stages other than the last there is nothing to read, and nobody takes."""
    energy = LastMLPEnergy(model)
    handle = model.modules[-1].decoder.layers[-1].mlp.register_forward_hook(energy.hook) if model.groups.is_last_stage else None
    try:
        yield energy
    finally:
        if handle is not None:
            handle.remove()


def _mean_absolute(hidden: Tensor) -> Tensor:
    """[T, 1, hidden] -> [T] float32."""
    return torch.linalg.vector_norm(hidden, ord=1, dim=-1, dtype=torch.float32).flatten() / hidden.shape[-1]
