"""Scheduler and engines together: no barrier between turns, a dialogue's next turn is submitted as soon as its last one ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_rema.rollout.scheduler import TurnScheduler
from megatron_rema.types import Engine, Episode


def play(
    scheduler: TurnScheduler,
    engines: Mapping[str, Engine],
    on_episode: Callable[[Episode], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Episode]:
    """Play all episodes of ``scheduler``; ``engines`` by policy name (two names may share one engine).

    ``on_episode(episode)`` is called as each episode ends, while others still run, so that verification overlaps generation.
    ``on_progress(num_episodes_ended, num_tokens_sampled)`` is called after each engine step. Returns the episodes in start order.
    """
    for role in scheduler.rules.roles:
        if scheduler.rules.policy_for(role) not in engines:
            raise ValueError(
                f"no engine for policy {scheduler.rules.policy_for(role)!r}, which speaks for {role}; engines are {sorted(engines)}. "
                "Give every policy of policy_of_role an engine."
            )
    distinct = list({id(engine): engine for engine in engines.values()}.values())
    num_ended = num_tokens = 0

    def ended(episode: Episode) -> None:
        nonlocal num_ended
        num_ended += 1
        if on_episode is not None:
            on_episode(episode)

    def submit_next() -> None:
        for request in scheduler.next_requests():
            engines[request.policy].submit(request)

    def take_others() -> None:
        for episode in scheduler.take_ended_unasked():
            ended(episode)

    take_others()
    submit_next()
    while not scheduler.is_done:
        if not any(engine.num_unfinished for engine in distinct):
            raise RuntimeError(f"{scheduler.num_running} turns are in flight but no engine has a request left: an engine lost them.")
        for engine in distinct:
            if not engine.num_unfinished:
                continue
            for completion in engine.step():
                num_tokens += len(completion.token_ids)
                episode = scheduler.accept(completion)
                if episode is not None:
                    ended(episode)
            take_others()
            submit_next()
            if on_progress is not None:
                on_progress(num_ended, num_tokens)
    return scheduler.episodes
