"""The loop that every supervised front door shares: draw examples, one optimizer step, metrics, checkpoints, resume."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

from megatron_rema.config import RunConfig, as_mapping
from megatron_rema.trainer import state
from megatron_rema.trainer.cast import Critic, Policy
from megatron_rema.trainer.faults import SkippedUpdates
from megatron_rema.trainer.inputs import Source
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder

Example = TypeVar("Example")


def fit(
    config: RunConfig,
    title: str,
    examples: Sequence[Example],
    *,
    source: Source,
    learners: Mapping[str, Policy | Critic],
    update: Callable[[int, list[Example]], dict[str, float]],
    folder: RunFolder,
    reporter: Reporter,
) -> None:
    """``trainer.steps`` calls of ``update``, with the step's number (from 1) and ``trainer.global_batch_dialogues`` examples, from
    the latest checkpoint on."""
    trainer = config.trainer
    with reporter.phase("restore"):
        position = state.restore(config, learners, folder, source)
    folder.write_config(as_mapping(config))
    reporter.say(f"{title}: {len(examples)} examples, {trainer.steps} steps of {trainer.global_batch_dialogues}")
    checkpoints, skipped = state.checkpoints_of(config, folder), SkippedUpdates(trainer.max_skipped_updates)
    with ExitStack() as at_work, reporter.run(title, total=trainer.steps, done=position.step), checkpoints.finished():
        for learner in learners.values():  # nobody else needs the device meanwhile
            at_work.enter_context(learner.optimizer.resident())
        while position.step < trainer.steps:
            begin = time.perf_counter()
            chosen = draw(examples, trainer.global_batch_dialogues, position.prompts_taken, config.seed)
            reporter.begin_step(position.step + 1)
            with reporter.phase("update", draws=False):
                metrics = update(position.step + 1, chosen)
            position.step += 1
            position.prompts_taken += len(chosen)
            seconds = time.perf_counter() - begin
            folder.metrics({"step": position.step, "weight_version": 0, "time_s": seconds, **metrics})
            last = position.step == trainer.steps
            if position.step % 20 == 0 or last:
                losses = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.endswith(("loss", "accuracy")))
                reporter.step_done(position.step, f"{losses}  {seconds:.2f} s")
            if last or (trainer.checkpoint_every and position.step % trainer.checkpoint_every == 0):
                with reporter.phase("checkpoint", draws=False):
                    checkpoints.save(position, learners)
            else:
                checkpoints.finish_pending(wait=False)
            skipped.count(metrics, step=position.step)
        with reporter.phase("checkpoint", draws=False):
            checkpoints.finish_pending()


def draw(examples: Sequence[Example], count: int, taken: int, seed: int) -> list[Example]:
    """The ``count`` examples from place ``taken`` on, in an order shuffled anew each epoch: a function of (seed, taken) alone."""
    chosen = []
    size = len(examples)
    orders: dict[int, list[int]] = {}
    for place in range(taken, taken + count):
        epoch = place // size
        if epoch not in orders:
            orders[epoch] = random.Random(f"{seed}/{epoch}").sample(range(size), size)
        chosen.append(examples[orders[epoch][place % size]])
    return chosen
