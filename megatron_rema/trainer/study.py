"""What a training run is made of."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rema.config import RunConfig
from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.rollout.dataset import PromptStream
from megatron_rema.rollout.dialogue import Chats, DialogueRules
from megatron_rema.trainer import state
from megatron_rema.trainer.alarms import Alarms
from megatron_rema.trainer.cast import Policy
from megatron_rema.trainer.constraint import Constrain
from megatron_rema.trainer.faults import SkippedUpdates
from megatron_rema.trainer.guard import Guard
from megatron_rema.trainer.integrity import Monitor
from megatron_rema.trainer.payment import Payment
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.types import Engine, Prompt


@dataclass
class Study:
    """One assembled run."""

    config: RunConfig
    policies: dict[str, Policy]
    payment: Payment
    engines: dict[str, Engine]
    rules: DialogueRules
    constrain: Constrain
    chat: Chats
    stream: PromptStream
    sets: dict[str, list[Prompt]]
    verifier: VerifierPool
    folder: RunFolder
    checkpoints: state.Checkpoints
    reporter: Reporter
    position: state.Position
    skipped: SkippedUpdates
    alarms: Alarms
    monitor: Monitor | None = None
    guard: Guard | None = None
