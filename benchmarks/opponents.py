"""Public implementations that benchmarks/kernels.py runs beside ours: installed or checked out apart, called as they are, never copied.

Each function returns callables on the benchmark's own tensors, or raises `Absent` with the reason, which the table then prints.
Shapes: B traces of L tokens (N own ones at most), T label positions, V columns.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from megatron_rema.parallel.groups import Groups

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Absent(Exception):
    """Why an opponent is left out here."""


def verl(module: str) -> ModuleType:
    """A module of verl, as ``make golden`` installs it (or where MEGATRON_REMA_GOLDEN says)."""
    folder = Path(os.environ.get("MEGATRON_REMA_GOLDEN", Path(__file__).resolve().parents[1] / "build" / "golden")).resolve()
    if not (folder / "verl").is_dir():
        raise Absent(f"verl is not installed in {folder.name}/: make golden")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: what the main environment has comes from there
    return importlib.import_module(module)


def slime(path: Path | None) -> ModuleType:
    """slime's ``utils/ppo_utils.py``, one file that imports torch only, from a check-out of github.com/THUDM/slime."""
    if path is None:
        raise Absent("no check-out of slime: --slime PATH or MEGATRON_REMA_SLIME")
    spec = importlib.util.spec_from_file_location("slime_ppo_utils", path / "slime" / "utils" / "ppo_utils.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def over_own_tokens(scan: Function) -> Function:
    """A scan over whole rows (slime's know no mask) made one over own tokens, on [B, L] columns and a mask [B, L] with gaps.

    Gather: every row's own tokens next to each other, [B, N], zeros after them, which a reverse scan meets first. Then back: 0 elsewhere.
    """

    def run(rewards_BL: Tensor, values_BL: Tensor, mask_BL: Tensor, discount: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
        rows_S, columns_S = mask_BL.nonzero(as_tuple=True)
        places_S = (mask_BL.cumsum(1) - 1)[rows_S, columns_S]
        shape = (len(mask_BL), int(places_S.max()) + 1)
        rewards_BN, values_BN = rewards_BL.new_zeros(shape), values_BL.new_zeros(shape)
        rewards_BN[rows_S, places_S], values_BN[rows_S, places_S] = rewards_BL[rows_S, columns_S], values_BL[rows_S, columns_S]
        results = []
        for scanned_BN in scan(rewards_BN, values_BN, discount, gae_lambda):
            result_BL = torch.zeros_like(rewards_BL)
            result_BL[rows_S, columns_S] = scanned_BN[rows_S, places_S]
            results.append(result_BL)
        return tuple(results)

    return run


def megatron_cross_entropies(groups: Groups) -> dict[str, Function]:
    """megatron-core's two, on [T, V] logits and [T] labels: [T] log-probabilities. Both keep the softmax for their gradient."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    def fused(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        return -fused_vocab_parallel_cross_entropy(logits_TV[:, None], labels_T[:, None], groups.tp)[:, 0]

    def unfused(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        with groups.megatron_globals():
            return -vocab_parallel_cross_entropy(logits_TV[:, None], labels_T[:, None])[:, 0]

    return {"megatron-core fused": fused, "megatron-core": unfused}


def liger_cross_entropy(device: torch.device) -> Function:
    """Liger's, on [T, V] logits and [T] labels: [T] log-probabilities. Its gradient is made in forward, over the logits."""
    if device.type != "cuda":
        raise Absent("Triton kernels: run on CUDA only")
    if importlib.util.find_spec("liger_kernel") is None:
        raise Absent("liger-kernel is not installed")
    function = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return lambda logits_TV, labels_T: -function(logits_TV, labels_T, reduction="none")
