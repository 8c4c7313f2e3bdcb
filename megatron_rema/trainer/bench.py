"""What audits play with: the run's own engines, verifier and reward function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from megatron_rema.config import RunConfig
from megatron_rema.reward.math_verifier import Judgement, VerifierPool
from megatron_rema.rollout.dialogue import Chats, DialogueRules
from megatron_rema.rollout.scheduler import starts_of
from megatron_rema.trainer.cast import Policy, reference_speaks
from megatron_rema.trainer.collect import judge_everywhere, play_everywhere
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.whitebox import Score
from megatron_rema.types import Engine, Episode, Prompt, Role

Judgements = Mapping[str, Judgement]
Pay = Callable[[Sequence[Episode], Judgements], list[Episode]]


@dataclass(frozen=True)
class Bench:
    """What audits play with: the run's own engines, verifier and reward function. Every call is a collective."""

    rules: DialogueRules
    chat: Chats
    play: Callable[[Sequence[Prompt], DialogueRules], tuple[list[Episode], Judgements]]  # one episode a prompt
    judge: Callable[[Sequence[Episode]], Judgements]
    pay: Pay  # fills verdict, score and rewards; those without a verdict are left out
    score: Score | None = None  # None: nobody looks inside the policies
    # roles whose policy has a reference, and speaks for nobody else: inside the context it speaks with the reference's weights
    frozen: Mapping[Role, Callable[[], AbstractContextManager[None]]] = field(default_factory=dict)


def bench_of(
    config: RunConfig,
    rules: DialogueRules,
    chat: Chats,
    policies: Mapping[str, Policy],
    engines: Mapping[str, Engine],
    verifier: VerifierPool,
    pay: Pay,
    score: Score,
) -> Bench:
    """The bench of a run. ``pay``: what training does to have its episodes rewarded; ``score``: `whitebox.scorer`."""

    def play(prompts: Sequence[Prompt], rules: DialogueRules) -> tuple[list[Episode], Judgements]:
        return play_everywhere(
            starts_of(prompts, 1),
            rules=rules,
            chat=chat,
            engines=engines,
            engine_tensor=config.engine.tensor,
            verifier=verifier,
            seed=config.seed,
            step=-1,
            reporter=Reporter(speaks=False),
        )

    frozen = {
        policy.roles[0]: partial(reference_speaks, policy, engines[name])
        for name, policy in policies.items()
        if policy.reference is not None and len(policies) > 1 and len(policy.roles) == 1
    }
    return Bench(rules, chat, play, lambda episodes: judge_everywhere(episodes, verifier), pay, score, frozen)
