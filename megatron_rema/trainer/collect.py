"""Episodes from all engine replicas: dealt out, played, verified while others still generate, and gathered on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch.distributed as dist

from megatron_rema.parallel.exchange import gather_rows
from megatron_rema.reward.math_verifier import Judgement, VerifierPool
from megatron_rema.rollout.dialogue import Chats, DialogueRules
from megatron_rema.rollout.runner import play
from megatron_rema.rollout.scheduler import TurnScheduler
from megatron_rema.trainer.progress import Reporter
from megatron_rema.types import Engine, Episode, Prompt, Verdict


def play_everywhere(
    starts: Sequence[tuple[Prompt, int]],
    *,
    rules: DialogueRules,
    chat: Chats,
    engines: Mapping[str, Engine],
    engine_tensor: int,
    verifier: VerifierPool,
    seed: int,
    step: int,
    reporter: Reporter,
) -> tuple[list[Episode], dict[str, Judgement]]:
    """Every episode of ``starts`` in that order, and its judgement by episode_id; the same on every rank. A collective.

    Replica r of n plays starts[r::n]: the episodes of one prompt, alike in length, spread over the replicas (those that follow one plan
    are played where it is made). Ranks of one replica play the same episodes (the scheduler is deterministic); the first of them verifies
    and speaks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    replica, num_replicas = rank // engine_tensor, world // engine_tensor
    speaks = rank % engine_tensor == 0
    places = [_planner(index, group_index, rules) for index, (_, group_index) in enumerate(starts)]
    mine = [index for index, place in enumerate(places) if place // rules.samples_per_plan % num_replicas == replica]
    scheduler = TurnScheduler([starts[i] for i in mine], rules=rules, chat=chat, seed=seed, step=step)

    def progress(ended: int, tokens: int) -> None:
        reporter.advance(ended, f"{tokens} tokens on this rank")

    with reporter.phase("generate", total=len(mine)):
        episodes = play(scheduler, engines, on_episode=verifier.submit if speaks else None, on_progress=progress)
    with reporter.phase("verify", total=len(mine)):
        judgements = verifier.collect(on_progress=reporter.advance)
        rows = [
            {"index": index, "episode": episode.to_json(), "judgement": asdict(judgements[episode.episode_id])}
            for index, episode in zip(mine, episodes, strict=True)
            if speaks
        ]
        gathered = sorted(gather_rows(rows), key=lambda row: row["index"])
    everyone = [Episode.from_json(row["episode"]) for row in gathered]
    verdicts = {e.episode_id: _judgement(row["judgement"]) for e, row in zip(everyone, gathered, strict=True)}
    return everyone, verdicts


def judge_everywhere(episodes: Sequence[Episode], verifier: VerifierPool) -> dict[str, Judgement]:
    """Judgements of episodes that every rank holds, by episode_id; the same on every rank. A collective: each judges its share."""
    for episode in episodes[dist.get_rank() :: dist.get_world_size()]:
        verifier.submit(episode)
    rows = gather_rows([{"id": key, "judgement": asdict(judgement)} for key, judgement in verifier.collect().items()])
    return {row["id"]: _judgement(row["judgement"]) for row in rows}


def _planner(index: int, group_index: int, rules: DialogueRules) -> int:
    """Where in ``starts`` the episode stands whose plan the one at ``index`` follows."""
    plan_index = rules.plan_index(group_index)
    return index if plan_index is None else index + plan_index - group_index


def _judgement(row: dict) -> Judgement:
    lenient = row["lenient"]
    return Judgement(Verdict(row["verdict"]), None if lenient is None else Verdict(lenient), row["how"])
