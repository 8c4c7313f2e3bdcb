"""What audits take from a run: problems, always the same ones, those drawn anew, and a spread of what training sampled."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from megatron_rema.config import IntegrityConfig
from megatron_rema.reward.functions import named_function
from megatron_rema.types import Episode, Prompt

RENEWALS = {"arith": "megatron_rema.tasks.arith:renewed"}  # short names of integrity.renewal
RENEWAL_ATTEMPTS = 20


def audit_problems(prompts: Sequence[Prompt], settings: IntegrityConfig, seed: int) -> list[Prompt]:
    """The problems that every audit of a run takes from the front: no two with one question, a judge's in the order as given."""
    distinct = list({p.question: p for p in reversed(prompts) if not p.is_swapped}.values())
    return random.Random(f"audit/{seed}").sample(distinct, min(settings.audit_problems, len(distinct)))


def renewed_problems(problems: Sequence[Prompt], known: set[str], renewal: str | None) -> dict[str, Prompt]:
    """prompt_id -> the problem drawn anew, by the function that integrity.renewal names; a question that training knows is drawn again, and
    a problem whose every draw it knows is left out. Raises ValueError where the function returns something else than a Prompt."""
    if renewal is None:
        return {}
    draw = named_function("integrity.renewal", RENEWALS.get(renewal, renewal))
    found = {}
    for problem in problems:
        for attempt in range(RENEWAL_ATTEMPTS):
            anew = draw(problem, random.Random(f"renewed/{problem.prompt_id}/{attempt}"))
            if not isinstance(anew, Prompt):
                raise ValueError(
                    f"integrity.renewal is {renewal!r}, which returned a {type(anew).__name__}; it must return a Prompt, the problem drawn "
                    "anew with its answer: correct it, or set integrity.renewal=null."
                )
            if anew.question not in known:
                found[problem.prompt_id] = replace(anew, prompt_id=f"renewed/{problem.prompt_id}")
                break
    return found


def spread(episodes: Sequence[Episode], count: int) -> list[Episode]:
    """At most ``count`` of them, of as many problems as there are; counterfactual ones are left out."""
    turn: Counter[str] = Counter()
    order = []
    for episode in episodes:
        if not episode.is_counterfactual:
            order.append((turn[episode.prompt.prompt_id], len(order), episode))
            turn[episode.prompt.prompt_id] += 1
    return [episode for _, _, episode in sorted(order, key=lambda item: item[:2])[:count]]
