"""What ``integrity.mode=guard`` does about a hack: it keeps checkpoints of steps whose audit was clean, and returns to one of them.

run_dir/clean_checkpoints/step_NNNNNN   as checkpoints/, the newest ``integrity.keep_clean_checkpoints`` of them

A roll-back restores weights, optimizers, running baselines and KL coefficients. Step count, data position, sampled tokens and weight
version go on, for what happened stays in the records; nothing is played twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch.distributed as dist

from megatron_rema.config import IntegrityConfig
from megatron_rema.trainer import state
from megatron_rema.trainer.run_folder import RunFolder

FOLDER = "clean_checkpoints"


class Guard:
    """The clean checkpoints of one run. Every method but ``steps`` is a collective."""

    def __init__(self, settings: IntegrityConfig, folder: RunFolder, *, step: int) -> None:
        """``step``: where the run continues; checkpoints of later steps, which it does again, are removed."""
        self._checkpoints = state.Checkpoints(folder.path / FOLDER, keep=settings.keep_clean_checkpoints)
        self._forget_after(step)

    def steps(self) -> list[int]:
        """Of the clean checkpoints, oldest first."""
        return state.steps_of(self._checkpoints.folder)

    def keep(self, position: state.Position, trained: Mapping[str, state.Trained]) -> None:
        """This step's audit was clean."""
        self._checkpoints.save(position, trained)

    def roll_back(self, step: int, position: state.Position, trained: Mapping[str, state.Trained]) -> None:
        """Every trained model as it was after ``step``, one of ``steps``. Raises ValueError where a file is not what was written."""
        with ExitStack() as on_device:
            for one in trained.values():
                on_device.enter_context(one.optimizer.resident())
            then = state.load(self._checkpoints.folder / state.name_of(step), trained)
        position.baselines, position.kl_coefs = then.baselines, then.kl_coefs
        self._forget_after(step)

    def _forget_after(self, step: int) -> None:
        if dist.get_rank() == 0:
            state.remove_after(self._checkpoints.folder, step)
        dist.barrier()
