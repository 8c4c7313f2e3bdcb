"""The process groups of one parallel layout, made once and passed explicitly.

A world of W ranks is a grid: tensor (fastest), data, pipeline (slowest); ``rank = t + tensor * (d + data * p)``, megatron's own order,
so that the ranks that talk most are neighbours. Actor and reference, or two policies, may each have a `Groups` of their own layout over
the same ranks: megatron-core is given ``groups.collection`` and its globals (``parallel_state``) stay uninitialised. Three of its functions
ask globals all the same; they are answered here, and nowhere else:

- sequence parallelism keeps one scratch buffer per process, which no layout owns: `build_groups` makes it;
- sequence parallelism wants a named random state for dropout in the embedding: `build_groups` adds one (our dropout is always 0);
- ``sharded_state_dict`` of tied embeddings asks for the data-parallel rank: call it inside `megatron_globals`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed import ProcessGroup

from megatron_rema.parallel import platform

platform.enable()


@dataclass(frozen=True, eq=False)
class Groups:
    """Who this rank talks to. Every field is the group that this rank is a member of."""

    tp: ProcessGroup  # shards of the same layers: `tensor` ranks
    pp: ProcessGroup  # stages of one copy of the model: `pipeline` ranks
    dp: ProcessGroup  # same shard of every copy: `data` ranks
    model: ProcessGroup  # one whole copy of the model: tensor x pipeline ranks
    embedding: ProcessGroup  # first and last stage, which both hold tied embeddings; this rank alone on stages in between
    collection: ProcessGroupCollection  # the same groups, in megatron's words

    @property
    def tensor_rank(self) -> int:
        return self.tp.rank()

    @property
    def tensor_size(self) -> int:
        return self.tp.size()

    @property
    def pipeline_rank(self) -> int:
        return self.pp.rank()

    @property
    def pipeline_size(self) -> int:
        return self.pp.size()

    @property
    def data_rank(self) -> int:
        return self.dp.rank()

    @property
    def data_size(self) -> int:
        return self.dp.size()

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def last_stage_rank(self) -> int:
        """World rank of the last stage of this rank's pipeline, where logits and losses are."""
        return dist.get_process_group_ranks(self.pp)[-1]

    @contextlib.contextmanager
    def megatron_globals(self) -> Iterator[None]:
        """``parallel_state`` answers with these groups inside: only for the megatron functions that have no group argument."""
        values = {
            "_TENSOR_MODEL_PARALLEL_GROUP": self.tp,
            "_PIPELINE_MODEL_PARALLEL_GROUP": self.pp,
            "_MODEL_PARALLEL_GROUP": self.model,
            "_DATA_PARALLEL_GROUP": self.dp,
            "_DATA_PARALLEL_GROUP_WITH_CP": self.dp,
        }
        before = {name: getattr(parallel_state, name) for name in values}
        vars(parallel_state).update(values)
        try:
            yield
        finally:
            vars(parallel_state).update(before)


def build_groups(*, tensor: int, pipeline: int) -> Groups:
    """Lay tensor x pipeline x data over all ranks of the initialised world. A collective: every rank calls it, in the same order.

    Raises ValueError when tensor * pipeline does not divide the world size.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if tensor < 1 or pipeline < 1:
        raise ValueError(f"parallel.tensor ({tensor}) and parallel.pipeline ({pipeline}) must be at least 1.")
    if world % (tensor * pipeline):
        raise ValueError(
            f"parallel.tensor ({tensor}) * parallel.pipeline ({pipeline}) = {tensor * pipeline} must divide world_size ({world}); "
            f"got remainder {world % (tensor * pipeline)}. Start a multiple of {tensor * pipeline} processes or change the layout."
        )
    data = world // (tensor * pipeline)
    grid = [[[t + tensor * (d + data * p) for t in range(tensor)] for d in range(data)] for p in range(pipeline)]  # [p][d][t]
    lines = [[grid[p][d][t] for p in range(pipeline)] for d in range(data) for t in range(tensor)]  # the pipelines
    tp = _new_group("tensor", [grid[p][d] for p in range(pipeline) for d in range(data)])
    pp = _new_group("pipeline", lines)
    dp = _new_group("data", [[grid[p][d][t] for d in range(data)] for p in range(pipeline) for t in range(tensor)])
    model = _new_group("model", [[grid[p][d][t] for p in range(pipeline) for t in range(tensor)] for d in range(data)])
    alone = _new_group("alone", [[r] for r in range(world)])
    ends = _new_group("embedding", [[line[0], line[-1]] for line in lines]) if pipeline > 1 else alone
    embedding = ends if ends is not None else alone
    assert rank == grid[pp.rank()][dp.rank()][tp.rank()]
    collection = ProcessGroupCollection(tp=tp, pp=pp, mp=model, embd=embedding, pos_embd=alone, dp=dp, dp_cp=dp)
    for name in ("cp", "hcp", "ep", "expt_tp", "inter_dist_opt"):  # dimensions that we do not split
        setattr(collection, name, alone)
    collection.tp_cp = collection.tp_ep = tp
    collection.intra_dp_cp = collection.expt_dp = collection.intra_expt_dp = dp
    collection.tp_ep_pp = model
    collection.intra_dist_opt = dist.group.WORLD  # where ZeRO-1 shards live: gradient norms are summed over all of them
    _answer_process_globals()
    return Groups(tp=tp, pp=pp, dp=dp, model=model, embedding=embedding, collection=collection)


def _answer_process_globals() -> None:
    """What megatron keeps once per process whatever the layout. Leaves torch's own random state as it was."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    tracker = get_cuda_rng_tracker()
    if "model-parallel-rng" not in tracker.get_states():
        tracker.add("model-parallel-rng", 1)


def _new_group(name: str, partition: list[list[int]]) -> ProcessGroup | None:
    """Every rank makes every group of ``partition`` (torch demands it); returned is the one this rank is in. ``name`` is for reports."""
    mine = None
    timeout = dist.group.WORLD._get_backend(platform.device()).options._timeout  # torch would take the backend's default instead
    for ranks in partition:
        group = dist.new_group(ranks, timeout=timeout, group_desc=name)
        if dist.get_rank() in ranks:
            mine = group
    return mine
