"""Ranks that would compute with different arithmetic do not start."""

from __future__ import annotations

from types import SimpleNamespace

import torch.distributed as dist

from megatron_rema.config import ConfigError
from megatron_rema.kernels import library
from megatron_rema.trainer.cast import choose_kernels


def choose(built_everywhere: bool) -> str:
    missing = library.Unavailable("libcpu has not been built")
    found = missing if built_everywhere is False and dist.get_rank() == 1 else SimpleNamespace(build={"target": "g++"})
    with library.using("reference", cpu=found):
        try:
            return choose_kernels(SimpleNamespace(kernels="auto"))
        except ConfigError as error:
            return f"refused: {error}"


def test_all_ranks_choose_the_same_kernels_or_none_starts(run_ranks):
    assert run_ranks(2, choose, True) == ["kernels: cpu fused (g++)"] * 2
    for message in run_ranks(2, choose, False):
        assert message.startswith("refused: kernels is auto") and "on rank 1" in message and "libcpu has not been built" in message
