"""Public implementations as opponents: installed apart from this project, run on the same numbers, never copied.

`make golden` installs the packages (requirements/golden.txt) and names their folder in MEGATRON_REMA_GOLDEN; without it every test of this
folder skips. Repositories that no package index has are run where MEGATRON_REMA_ORACLES names a folder of their check-outs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

if "MEGATRON_REMA_GOLDEN" not in os.environ:
    pytest.skip("the public implementations are not installed: run `make golden`", allow_module_level=True)
PACKAGES = Path(os.environ["MEGATRON_REMA_GOLDEN"]).resolve()
if str(PACKAGES) not in sys.path:
    sys.path.append(str(PACKAGES))  # last: what the main environment has comes from there

# (our function, the opponent, dtype) -> largest difference of all comparisons, relative where values exceed 1; printed by conftest.py
LARGEST: dict[tuple[str, str, str], float] = {}


def agree(ours: str, theirs: str, value: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """Asserts |value - expected| <= tolerance * max(1, largest |expected|), all finite, and remembers the largest difference."""
    assert value.shape == expected.shape, (value.shape, expected.shape)
    value, expected = value.detach(), expected.detach()
    dtype = str(expected.dtype).removeprefix("torch.")
    value, expected = value.double(), expected.double()
    assert value.isfinite().all() and expected.isfinite().all(), (ours, value, expected)
    if not value.numel():
        return
    difference = ((value - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
    LARGEST[ours, theirs, dtype] = max(difference, LARGEST.get((ours, theirs, dtype), 0.0))
    assert difference <= tolerance, f"{ours} and {theirs} ({dtype}) differ by {difference:.2e} > {tolerance:.0e}:\n{value}\n{expected}"


def agree_gradients(ours: str, theirs: str, value: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """As `agree`, but relative to the largest gradient: a mean over many tokens has small ones."""
    scale = expected.abs().max()
    assert scale > 0.0, f"{theirs} has no gradient to compare with"
    agree(f"{ours}, gradient", theirs, value / scale, expected / scale, tolerance=tolerance)


def repository(name: str) -> Path:
    """The check-out of a public repository, or skips the test."""
    if "MEGATRON_REMA_ORACLES" not in os.environ:
        pytest.skip(f"MEGATRON_REMA_ORACLES names no folder with check-outs of public repositories (here: {name})")
    path = Path(os.environ["MEGATRON_REMA_ORACLES"]).resolve() / name
    if not path.is_dir():
        pytest.skip(f"MEGATRON_REMA_ORACLES has no check-out {name}")
    return path


def load(name: str, path: Path, **names: object) -> ModuleType:
    """Runs one file of another project as module ``name``; ``names`` are there before its first line."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(names)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def openrlhf() -> tuple[ModuleType, ModuleType]:
    """OpenRLHF's ``models/loss.py`` and ``models/utils.py`` without the rest of the package, which needs deepspeed, peft and flash-attn.

    ``utils.py`` imports deepspeed for one function that is not called here: an empty module stands in while the file is read.
    """
    folder = PACKAGES / "openrlhf" / "models"
    package = ModuleType("openrlhf_models")
    package.__path__ = [str(folder)]
    sys.modules["openrlhf_models"] = package
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
        utils = load("openrlhf_models.utils", folder / "utils.py")
        return load("openrlhf_models.loss", folder / "loss.py"), utils


def verl_actor_config(**settings: object) -> object:
    """verl's configuration of a policy loss: ``clip_ratio_low``, ``clip_ratio_high``, ``clip_ratio_c`` (its dual clip)."""
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)


def trl_grpo_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    mask_BL: Tensor,
    *,
    level: str,
    loss_type: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    max_completion_length: int = 1,
    ref_logprobs_BL: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_BL: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> Tensor:
    """TRL's ``GRPOTrainer._compute_loss`` on given log-probabilities: called with a plain object that holds the settings it reads,
    because a trainer would want a language model that happens to have these."""
    from accelerate import Accelerator
    from trl.trainer.grpo_trainer import GRPOTrainer

    entropy_BL = torch.zeros_like(logprobs_BL) if entropy_BL is None else entropy_BL
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),  # "eval" mode: no division by the number of accumulation steps
        accelerator=Accelerator(cpu=True),
        args=SimpleNamespace(delta=dual_clip, use_bias_correction_kl=False),
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        max_completion_length=max_completion_length,
        beta=kl_coef,
        entropy_coef=entropy_coef,
        _entropy_bonus_enabled=bool(entropy_coef),
        use_adaptive_entropy=False,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs_BL, entropy_BL, None),
    )
    ids_BL = torch.zeros(mask_BL.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids_BL[:, :1],
        "prompt_mask": mask_BL[:, :1],
        "completion_ids": ids_BL,
        "completion_mask": mask_BL.to(logprobs_BL.dtype),
        "advantages": advantages_BL,
        "old_per_token_logps": old_logprobs_BL,
        "ref_per_token_logps": ref_logprobs_BL,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def trl_reward_loss(chosen_N: Tensor, rejected_N: Tensor, *, margin_N: Tensor | None, centering: float) -> Tensor:
    """TRL's ``RewardTrainer.compute_loss`` on given scores, called as above: the "model" answers with them."""
    from accelerate import Accelerator
    from trl.trainer.reward_trainer import RewardTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=Accelerator(cpu=True),
        args=SimpleNamespace(center_rewards_coefficient=centering or None),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {} if margin_N is None else {"margin": margin_N}
    scores = SimpleNamespace(logits=torch.cat([chosen_N, rejected_N])[:, None])
    return RewardTrainer.compute_loss(trainer, lambda **_: scores, inputs)
